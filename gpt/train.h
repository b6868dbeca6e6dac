// The training loop, and the measuring of a model's loss.
#pragma once

#include <cstdint>

#include "gpt/loader.h"
#include "gpt/model.h"
#include "gpt/options.h"
#include "gpt/ranks.h"

namespace lns {

struct Evaluation {
    double loss = 0; // mean of −log p(target), natural logarithm; perplexity is its exponential
    int64_t tokens = 0; // targets that it is the mean of
};

// The loss over the first `tokens` tokens of the loader's windows (rounded up to whole windows, at
// most an epoch), B windows at a time on each rank. Leaves the loader anywhere.
Evaluation evaluate(Model& model, Loader& loader, const Ranks& ranks, int B, int T, int64_t tokens);

// Trains as the options say; the exit status.
int train(Options options, const Ranks& ranks);

} // namespace lns
