// The device of a model: its memory and its peak. Defines make_model and plan_memory
// (gpt/model/model.h).
#pragma once

#include <string>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/model.h"

namespace lns {

// Chooses this rank's GPU. Throws unless all ranks use the same kind of device, and each a GPU of
// its own. Every rank calls it.
void check_devices(const ModelOptions& options, const Ranks& ranks);

// Throws if the model and micro-batches of (B, T) need more memory than the device has, and says
// what would fit.
void check_memory(const Config& config, int B, int T, const ModelOptions& options);

// The largest power of two of sequences of T tokens that fits, up to 2¹⁸ tokens on a GPU and 2¹² on
// a CPU: larger batches are not faster.
int batch_that_fits(const Config& config, int T, const ModelOptions& options);

// FLOP/s of matmuls in the model's dtype: the data sheet's for a known GPU in bf16, else measured.
struct Peak {
    double flops = 0;    // MFU is relative to this
    double measured = 0; // the same without a data sheet
};
Peak device_peak(const ModelOptions& options, int threads);

// Of the CPU's memory or the GPU's.
Bandwidth device_bandwidth(const ModelOptions& options, int threads);

} // namespace lns
