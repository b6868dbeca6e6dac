// `train_gpt bench`: the speed of whole training steps on random tokens, and its share of the
// machine's peak. Writes no files.
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
    std::string device, dtype; // Model::device() and dtype()
    ModelOptions options;
    int B = 0, T = 0, threads = 1;

    std::string gpu;                        // its name, or ""
    double float32_peak = 0, bf16_peak = 0; // FLOP/s, the maximum of before and after the steps
    double data_sheet_peak = 0;             // a GPU's bf16 FLOP/s; 0: unknown
    Bandwidth bandwidth;
    std::vector<double> seconds, losses; // per step; losses in nats per token
    int64_t peak_memory = 0;             // peak resident bytes; 0: unknown. On a GPU: the drop in
                                         // free memory
    int64_t model_memory = 0;            // Model::bytes()
    int64_t planned_memory = 0;          // the prediction of --dry-run
    int64_t parameters = 0;
    Profile profile;  // filled by --profile
    double flops = 0; // training FLOPs per token

    double median_seconds() const;
    double tokens_per_s() const;
    double peak() const;         // measured, in the model's dtype
    double mfu_measured() const; // share of peak(); NaN if its measurement was disturbed
    double mfu() const;          // share of the data sheet's peak if known, else of peak()
};

// Times options.timed_steps training steps (zero gradients, forward, backward, gradient norm,
// AdamW) after one warmup step.
Bench measure_training(const Options& options, const Ranks& ranks);

std::string describe(const Bench& bench); // human-readable
std::string to_json(const Bench& bench);  // one object, on one line

// Runs the command and returns its exit status.
int bench(const Options& options, const Ranks& ranks);

} // namespace lns
