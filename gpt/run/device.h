// The device that a model computes on: whether the model fits, and what the device does at most.
// make_model and plan_memory (gpt/model/model.h) are implemented here too.
#pragma once

#include <string>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/model.h"

namespace lns {

// Chooses this rank's GPU. Throws unless all ranks compute on the same kind of device, and each on
// a GPU of its own. Every rank calls it.
void check_devices(const ModelOptions& options, const Ranks& ranks);

// Throws if the model and micro-batches of (B, T) need more memory than the device has, and says
// what would fit.
void check_memory(const Config& config, int B, int T, const ModelOptions& options);

// The largest power of two of sequences of T tokens that fits, but no more than 2¹⁸ tokens on a GPU
// and 2¹² on a CPU: what they can do is seen at fewer.
int batch_that_fits(const Config& config, int T, const ModelOptions& options);

// FLOP/s of products in the model's dtype: of a GPU in bf16 what its data sheet says, if we know
// it, else measured.
struct Peak {
    double flops = 0;    // what MFU is a part of
    double measured = 0; // the same where no data sheet is known
};
Peak device_peak(const ModelOptions& options, int threads);

// Of the CPU's memory or the GPU's.
Bandwidth device_bandwidth(const ModelOptions& options, int threads);

} // namespace lns
