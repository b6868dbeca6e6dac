// A training run around its loop, which is in train_gpt.cpp: what it holds, how it is set up, what
// it prints and saves, and how it survives errors. A process is one rank of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpt/base/files.h"
#include "gpt/base/ranks.h"
#include "gpt/base/terminal.h"
#include "gpt/data/loader.h"
#include "gpt/model/lisa.h"
#include "gpt/model/model.h"
#include "gpt/model/schedule.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/device.h"
#include "gpt/run/options.h"
#include "gpt/run/probe.h"
#include "gpt/run/rundir.h"
#include "gpt/run/setup.h"

namespace lns {

struct Run {
    Options o;
    const Ranks& ranks;
    Fd lock; // of the directory of a run that continues

    Config config;
    Data data;
    std::optional<Loader> loader, val_loader;
    Schedule schedule;
    std::optional<Lisa> lisa;
    int B = 0, T = 0, micro_batches = 0; // of this rank, a step
    int64_t tokens_per_step = 0;         // over all micro-batches and ranks
    int threads = 1;                     // of this rank
    ModelOptions model_options;
    Peak peak;        // of all ranks
    double flops = 0; // to train on one token
    std::unique_ptr<Model> model;

    TrainerState state;
    std::vector<int> inputs, targets;      // (micro_batches, B, T), of this rank
    bool drawn = false;                    // they are the next step's
    LoaderState before_draw;               // the loader's state before they were drawn
    CaughtError draw_error;                // belongs to the step that they are for
    std::vector<double> variance;          // of the residual stream, at the last validation
    std::vector<ProbeBatch> probe_batch;   // with --probe-every: the first validation sequences
    std::optional<TaskWork> tasks;         // of --val-tasks
    std::optional<TaskScores> task_scores; // of the last validation
    std::optional<RunDirectory> directory; // of rank 0
    std::string last_checkpoint;           // "": none yet
    int64_t saved_step = -1;               // the step of last_checkpoint
    bool updating = false;                 // weights may be half of one step, half of the next
    bool given_up = false;                 // this step, between two micro-batches
    std::string lost_directory;            // the last warning about a directory that disappeared
    bool log_broken = false;               // and its warning printed
    double step_seconds = 0;               // of the last step, on rank 0
    double recent_seconds = 0, recent_steps = 0; // sums over about the last ten seconds
    Progress progress;
    Profile profile;                            // of the steps after the first
    double profiled = 0;                        // seconds
    int64_t profiled_steps = 0, steps_made = 0; // of this process

    Run(Options options, const Ranks& ranks, Fd lock = {})
        : o(std::move(options)), ranks(ranks), lock(std::move(lock)) {}

    // On rank 0, above the progress line.
    void print(const std::string& text) {
        if (ranks.first()) progress.message(text);
    }
};

struct Step {
    double loss = 0, lr = 0, grad_norm = 0, seconds = 0;
};

struct Evaluation {
    double loss = 0; // mean of −log p(target), natural logarithm; perplexity is its exponential
    int64_t tokens = 0; // targets in the mean
    bool stopped = false;
};

// train_gpt.cpp. The loss over the first `tokens` tokens of the loader's windows (rounded up to
// whole windows, at most an epoch), B windows at a time on each rank. Leaves the loader anywhere.
// stop is asked between batches: true on any rank ends the evaluation.
Evaluation evaluate(Model& model, Loader& loader, const Ranks& ranks, int B, int T, int64_t tokens,
                    const std::function<bool()>& stop = {});

// Everything before the first step. False if there are no steps to make: --dry-run, --dump-state,
// or a run that is complete.
bool set_up(Run& run);

// A step's parts, in order. draw_tokens: of this step, unless they were drawn during the last one.
void draw_tokens(Run& run);
double count_targets(const Run& run); // over all micro-batches and ranks; throws if there are none
void begin_step(Run& run, StepInput& step);
void draw_next_tokens(Run& run); // while the step is computed; not after the last step
StepResult end_step(Run& run);   // throws if the loss or the gradient is not finite
void record_time(Run& run, double seconds);

// Whether this rank, or any rank, has a reason to stop.
bool should_stop(const Run& run);
bool any_should_stop(const Run& run);
// Throws, and names the first tensor that is not finite, if a value of this step is not.
void check_finite(Run& run, int64_t step, const char* what, double value);

// Scores --val-tasks, on all ranks. Does nothing without them, or if a stop is requested.
void score_tasks(Run& run);

// On rank 0.
LayerDiagnostics probe_layers(Run& run); // on the same tokens each time; training is not affected
void log_step(Run& run, const Step& step, double val_loss,
              const std::optional<LayerDiagnostics>& probes);
void print_step(Run& run, const Step& step, double val_loss, bool now); // now: not only when due
void print_sample(Run& run);
// Saves the last step. An error of a run that ends here is thrown, else it is a warning.
void save_step(Run& run, bool ends);

// Returns loop(run). If that throws, the last complete step is saved first.
bool save_on_error(Run& run, bool (*loop)(Run&));

// Prints the summary. finished: false if a stop was requested. Returns the exit status.
int finish(Run& run, bool finished);

} // namespace lns
