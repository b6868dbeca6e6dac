// The command line: every flag is declared once, in options.cpp, with its default, its range and
// its help. What was not given comes from, in this order: the --config file, the run that is
// resumed, the recipe, the model's defaults.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace lns {

struct Options {
    enum class Command {
        train,
        sample,
        eval,
        bench,
        probe,
        export_model,
        verify,
        stop
    } command = Command::train; // stop: --help

    // model
    std::string model = "tiny", arch, norm, lns_sites = "attn,mlp", init_from;
    bool model_given = false; // -m, not its default
    bool batch_given = false; // -b, not the resumed run's
    bool goes_on = false;     // with a run's own flags
    int64_t layers = 0, width = 0, heads = 0, kv_heads = 0, mlp_width = 0, vocab = 0, positions = 0;
    double lns_power = 0.5, init_std = 0, embed_std = 0; // stds 0: the model's own

    // data; "" of train and val: stories made on the way
    std::string train, val, tokenizer;
    int64_t batch = 16, seq_len = 256, total_batch = 0; // total_batch 0: one micro-batch a rank
    int64_t seed = 1337;
    bool overfit_batch = false;

    // optimizer and schedule
    std::string recipe, lr_schedule = "cosine", warmup = "10%";
    int64_t steps = 600;
    double lr = 1e-3, final_lr_frac = 0.1;
    double weight_decay = 0.1, grad_clip = 1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;

    // validation and samples
    int64_t val_every = 100, val_tokens = 131072, sample_every = 250, sample_tokens = 256;
    int64_t probe_every = 0;
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
    int64_t threads = 0; // 0: all that this process may use

    // sample, eval and probe
    std::string checkpoint;
    bool ignore_eot = false;

    // probe
    std::string probes = "all";
    int64_t probe_tokens = 16384, jacobian_samples = 128, jacobian_layer = 0;

    // export
    std::string export_dir, export_dtype = "float32";
    int64_t shard_size = 5000000000;

    // verify
    std::vector<std::string> paths;

    // bench
    int64_t timed_steps = 5;
    bool json = false;

    std::vector<std::string> argv; // the command line itself
    // Every flag that a resumed run takes over, as text: {"--lr", "0.001"}.
    std::map<std::string, std::string> flags;
    // Every flag of the command that all ranks must have alike.
    std::map<std::string, std::string> settings;
    // What a resumed run was told to do otherwise than before, a sentence each.
    std::vector<std::string> changes;

    int64_t warmup_steps() const; // of 200 or 10%
};

using SavedFlags = std::map<std::string, std::string>;

// Throws a sentence for a wrong flag or value. Prints the answer to --help and --version itself.
// `saved`: the flags of the run that is resumed.
Options parse_options(int argc, const char* const* argv, const SavedFlags& saved = {});

} // namespace lns
