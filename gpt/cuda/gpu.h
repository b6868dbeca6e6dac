// What the program asks of a GPU, without CUDA's headers. train_gpt.cu implements it; without CUDA
// (LNS_CUDA) gpt/cuda/gpu.cpp says that this build has none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/model.h"

namespace lns {

bool built_with_cuda();

// "" if this process can compute on a GPU, else a sentence, to be gone on with, that says why not:
// no CUDA in this build, no GPU, a driver too old, a GPU too old for our kernels (below compute
// capability 8.0). Asking takes no memory of the GPU.
std::string why_no_gpu();

struct Gpu {
    std::string name;         // "NVIDIA H100 80GB HBM3"
    std::string id;           // of this one and no other
    int index = 0, count = 0; // the one in use, of so many
    int major = 0, minor = 0; // compute capability
    int multiprocessors = 0;
    int64_t memory = 0, free = 0; // bytes
    int driver = 0, runtime = 0;  // CUDA's versions, as 1000 · major + 10 · minor
};

// Chooses this process's GPU, CUDA's first otherwise: ranks of one machine take one each, in their
// order. Throws why_no_gpu().
void use_gpu(const Ranks& ranks);

// The GPU of this process. Throws why_no_gpu().
Gpu gpu();

// Of that GPU. FLOP/s of an 8192 × 8192 × 8192 product of random numbers by cuBLASLt (float32
// without TF32) and bytes a second of device memory, each the best of several. They take up to a
// gigabyte while they run; where that is too much, or the GPU is very slow, they measure on less.
double measured_gpu_flops(DType dtype);
Bandwidth measured_gpu_bandwidth();

std::unique_ptr<Model> make_cuda_model(const Config& config, int B, int T,
                                       const ModelOptions& options, const Ranks& ranks);
MemoryPlan plan_cuda_memory(const Config& config, int B, int T, const ModelOptions& options);

} // namespace lns
