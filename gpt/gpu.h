// What the program asks of a GPU, without CUDA's headers. train_gpt.cu implements it; without CUDA
// (LNS_CUDA) gpt/gpu.cpp says that this build has none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gpt/model.h"
#include "gpt/peak.h"
#include "gpt/ranks.h"

namespace lns {

// "" if this process can compute on a GPU, else a sentence that says why not: no CUDA in this
// build, no GPU, a driver too old, one too old for our kernels (below compute capability 8.0).
std::string why_no_gpu();

struct Gpu {
    std::string name;         // "NVIDIA H100 80GB HBM3"
    int index = 0, count = 0; // the one in use, of so many
    int major = 0, minor = 0; // compute capability
    int multiprocessors = 0;
    int64_t memory = 0, free = 0; // bytes
    int driver = 0, runtime = 0;  // CUDA's versions, as 1000 · major + 10 · minor
    double bf16_peak = 0; // FLOP/s of dense products, of the data sheet; 0: not in our table
};

// The GPU of this process: ranks of one machine take one each. Throws why_no_gpu().
Gpu gpu();

// FLOP/s of an 8192 × 8192 × 8192 product of random numbers by cuBLASLt (float32 without TF32), the
// best of several, and bytes a second of device memory.
double measured_gpu_flops(DType dtype);
Bandwidth measured_gpu_bandwidth();

std::unique_ptr<Model> make_cuda_model(const Config& config, int B, int T,
                                       const ModelOptions& options, const Ranks& ranks);
MemoryPlan plan_cuda_memory(const Config& config, int B, int T, const ModelOptions& options);

} // namespace lns
