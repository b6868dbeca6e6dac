// The device that runs a model: its memory, peak FLOP/s and bandwidth. Also implements make_model
// and plan_memory (gpt/model/model.h).
#pragma once

#include <string>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/model.h"

namespace lns {

// Selects this rank's GPU. Collective. Throws if ranks mix CPUs and GPUs or share a GPU.
void check_devices(const ModelOptions& options, const Ranks& ranks);

// Throws, suggesting flags with which it would fit, if the model with micro-batches of (B, T) needs
// more than the GPU's free memory or the machine's, of which a control group may have a part.
void check_memory(const Config& config, int B, int T, const ModelOptions& options);

// The largest power-of-two batch of T-token sequences that fits, capped at 2¹⁸ tokens on a GPU and
// 2¹² on a CPU, which suffice for full speed.
int batch_that_fits(const Config& config, int T, const ModelOptions& options);

// FLOP/s of matmuls in the model's dtype.
struct Peak {
    double flops = 0; // the denominator of MFU: a GPU's bf16 data sheet if known, else measured
    double measured = 0;
};
Peak device_peak(const ModelOptions& options, int threads);

// The bandwidth of the CPU's or the GPU's memory.
Bandwidth device_bandwidth(const ModelOptions& options, int threads);

} // namespace lns
