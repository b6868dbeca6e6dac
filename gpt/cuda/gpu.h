// The program's interface to the GPU, without CUDA's headers. train_gpt.cu implements it; in a
// build without CUDA (LNS_CUDA) gpt/cuda/gpu.cpp reports that there is none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gpt/base/ranks.h"
#include "gpt/cpu/peak.h"
#include "gpt/model/model.h"

namespace lns {

bool built_with_cuda();

// "" if this process can compute on a GPU, else a clause that says why not: no CUDA in this build,
// no GPU, a driver too old, a GPU too old for our kernels (below compute capability 8.0). Takes no
// memory of the GPU.
std::string why_no_gpu();

struct Gpu {
    std::string name;         // "NVIDIA H100 80GB HBM3"
    std::string id;           // unique
    int index = 0, count = 0; // the GPU in use, and how many there are
    int major = 0, minor = 0; // compute capability
    int multiprocessors = 0;
    int64_t memory = 0, free = 0; // bytes
    int driver = 0, runtime = 0;  // CUDA's versions, as 1000 · major + 10 · minor
};

// Chooses this process's GPU, else CUDA's first: the ranks of a machine take one each, in order.
// Throws why_no_gpu().
void use_gpu(const Ranks& ranks);

// The GPU of this process. Throws why_no_gpu().
Gpu gpu();

// Peaks of that GPU, each the best of several runs: FLOP/s of an 8192 × 8192 × 8192 product of
// random matrices by cuBLASLt (float32 without TF32), and bytes a second of device memory. They
// need up to a gigabyte; where there is less, or the GPU is very slow, they use smaller sizes.
double measured_gpu_flops(DType dtype);
Bandwidth measured_gpu_bandwidth();

std::unique_ptr<Model> make_cuda_model(const Config& config, int B, int T,
                                       const ModelOptions& options, const Ranks& ranks);
MemoryPlan plan_cuda_memory(const Config& config, int B, int T, const ModelOptions& options);

} // namespace lns
