// `train_gpt bench`: how fast would this model train on this machine? Whole training steps on
// random tokens, against what the machine can do at most. Writes no files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpt/config.h"
#include "gpt/options.h"
#include "gpt/peak.h"
#include "gpt/profile.h"
#include "gpt/ranks.h"

namespace lns {

struct Bench {
    Config config;
    std::string device, dtype; // as the model says
    ModelOptions options;
    int B = 0, T = 0, threads = 1;

    double float32_peak = 0, bf16_peak = 0; // FLOP/s, the better of before and after the steps
    Bandwidth bandwidth;
    std::vector<double> seconds, losses; // of each step, in nats a token
    int64_t peak_memory = 0;             // bytes resident at most; 0 where the system does not say
    int64_t planned_memory = 0;          // as --dry-run predicts
    int64_t parameters = 0;
    Profile profile;  // of the steps, with --profile
    double flops = 0; // to train on one token

    double median_seconds() const;
    double tokens_per_s() const;
    double peak() const; // of the dtype's products
    double mfu() const;  // the part of peak() that the steps' FLOPs took
};

// options.timed_steps training steps as gpt/train.cpp takes them (gradients zeroed, forward,
// backward, their norm, AdamW), after one that is not counted.
Bench measure_training(const Options& options);

std::string describe(const Bench& bench); // for people
std::string to_json(const Bench& bench);  // one object, on one line

// Runs the command; the exit status.
int bench(const Options& options, const Ranks& ranks);

} // namespace lns
