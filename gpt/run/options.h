// The command line: options.cpp declares every flag once. Flags that are not given come from, in
// this order: the --config file, the resumed run, the recipe, the defaults.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "gpt/run/flags.h"

namespace lns {

struct Options {
    enum class Command {
        train,
        sample,
        chat,
        eval,
        bench,
        probe,
        export_model,
        verify,
        schemes,
        stop
    } command = Command::train; // stop: --help

    // model
    std::string model = "tiny", arch, norm, norm_type, lns_sites = "attn,mlp", completep_base,
                init_from;
    int64_t layers = 0, width = 0, heads = 0, kv_heads = 0, mlp_width = 0, vocab = 0, positions = 0;
    double lns_power = 0.5, init_std = 0, embed_std = 0; // stds 0: the model's own

    // data; train and val "": stories, generated during training
    std::string train, val, tokenizer;
    int64_t batch = 16, seq_len = 256, total_batch = 0; // total_batch 0: a micro-batch per rank
    int64_t seed = 1337;
    bool overfit_batch = false;

    // optimizer and schedule
    std::string recipe, optimizer = "adamw", lr_schedule = "cosine", warmup = "10%";
    int64_t steps = 600;
    double epochs = 0; // 0: as many as the steps make
    double lr = 1e-3, final_lr_frac = 0.1;
    int64_t lisa = 0, lisa_interval = 3; // lisa 0: all layers train
    double weight_decay = 0.1, grad_clip = 1, clip_gates = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
    bool cautious_decay = false, normuon = false;
    double muon_lr = 0, momentum = 0.95; // muon_lr 0: lr
    std::string muon_scale = "moonlight", orthogonalize = "newton-schulz";

    // validation and samples
    int64_t val_every = 100, val_tokens = 131072, sample_every = 250, sample_tokens = 256;
    int64_t probe_every = 0, val_task_limit = 100;
    std::string val_tasks;
    std::string prompt;
    double temperature = 0.8, top_p = 1;
    int64_t top_k = 0;

    // run
    std::string out;
    bool resume = false;
    int64_t save_every = 500, keep = 2;
    bool dry_run = false;
    std::string dump_state;
    std::string dtype = "auto", master_weights = "yes", moments = "float32", rounding = "nearest",
                gradients = "auto", recompute = "none", device = "auto";
    bool profile = false;
    int64_t threads = 0; // 0: one per usable core

    // sample, chat, eval and probe
    std::string checkpoint, chat_template, system;
    bool ignore_eot = false;

    // eval: benchmarks; tasks "": the validation loss
    std::string tasks, task_data = "data/evals", log_samples;
    int64_t fewshot = 0, limit = 0;

    // probe
    std::string probes = "all", removal_tasks;
    int64_t probe_tokens = 16384, jacobian_samples = 128, jacobian_layer = 0;

    // export
    std::string export_dir, export_dtype = "float32", drop_layers;
    int64_t shard_size = 5000000000;

    // verify
    std::vector<std::string> paths;

    // bench
    int64_t timed_steps = 5;
    bool json = false;

    // schemes; layers too
    std::string format = "table";

    std::vector<std::string> argv;    // the command line itself
    std::set<std::string> given;      // the flags in it or in the --config file, "--steps"
    bool continued = false;           // with the flags of a saved run
    SavedFlags flags;                 // of training, to be saved
    std::vector<std::string> changes; // sentences: what a resumed run will do differently

    bool is_given(const char* flag) const { return given.count(flag) > 0; }
    double muon_peak() const { return muon_lr > 0 ? muon_lr : lr; }
    bool model_given() const { return is_given("--model") || model != Options().model; }
    int64_t warmup_steps() const; // of 200 or 10%
};

// Throws a sentence for a wrong flag or value. Prints the answer to --help and --version itself.
Options parse_options(int argc, const char* const* argv);

// Takes over the flags of the run that is resumed. Throws for one that was given and may not
// change.
void continue_options(Options& options, const SavedFlags& saved);

// The flags of training and their values, all but those of one call.
SavedFlags training_flags(Options options);

// The command, and each of its flags but --threads: all ranks must agree on these.
std::map<std::string, std::string> settings(Options options);

} // namespace lns
