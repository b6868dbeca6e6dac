// `train_gpt bench`: the training speed of a model on this machine, by whole training steps on
// random tokens, and its share of the machine's peak. Writes no files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/config.h"
#include "gpt/model/profile.h"
#include "gpt/run/options.h"

namespace lns {

struct Bench {
    Config config;
    std::string device, dtype; // as the model says
    ModelOptions options;
    int B = 0, T = 0, threads = 1;

    std::string gpu;                        // its name, or ""
    double float32_peak = 0, bf16_peak = 0; // FLOP/s, the larger of before and after the steps
    double data_sheet_peak = 0;             // of a GPU in bf16; 0: unknown
    Bandwidth bandwidth;
    std::vector<double> seconds, losses; // of each step, in nats a token
    int64_t peak_memory = 0;             // the most bytes resident; 0: unknown. On a GPU: the drop
                                         // in free memory
    int64_t model_memory = 0;            // as the model says
    int64_t planned_memory = 0;          // as --dry-run predicts
    int64_t parameters = 0;
    Profile profile;  // of the steps, with --profile
    double flops = 0; // to train on one token

    double median_seconds() const;
    double tokens_per_s() const;
    double peak() const;         // measured, of matmuls in the dtype
    double mfu_measured() const; // the steps' share of peak(); NaN if its measurement was disturbed
    double mfu() const;          // their share of the data sheet's peak, if known
};

// options.timed_steps training steps (zero_gradients, forward, backward, gradient norm, AdamW),
// after one for warmup.
Bench measure_training(const Options& options, const Ranks& ranks);

std::string describe(const Bench& bench); // for people
std::string to_json(const Bench& bench);  // one object, on one line

// Runs the command; the exit status.
int bench(const Options& options, const Ranks& ranks);

} // namespace lns
