// The training loop, and the measuring of a model's loss.
#pragma once

#include <cstdint>
#include <functional>

#include "gpt/base/files.h"
#include "gpt/base/ranks.h"
#include "gpt/data/loader.h"
#include "gpt/model/model.h"
#include "gpt/run/options.h"

namespace lns {

struct Evaluation {
    double loss = 0; // mean of −log p(target), natural logarithm; perplexity is its exponential
    int64_t tokens = 0; // targets that it is the mean of
    bool stopped = false;
};

// The loss over the first `tokens` tokens of the loader's windows (rounded up to whole windows, at
// most an epoch), B windows at a time on each rank. Leaves the loader anywhere. stop is asked
// between batches: true on any rank ends it there.
Evaluation evaluate(Model& model, Loader& loader, const Ranks& ranks, int B, int T, int64_t tokens,
                    const std::function<bool()>& stop = {});

// Trains as the options say; the exit status. lock: of the run that -y names, if it is locked.
int train(Options options, const Ranks& ranks, Fd lock = {});

} // namespace lns
