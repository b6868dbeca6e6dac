// Which GPU this process has, and why it may have none: that part of gpt/cuda/gpu.h. Defines plain
// functions: for train_gpt.cu alone.
#pragma once

#include <string>

#include "gpt/cuda/cuda.h"
#include "gpt/cuda/gpu.h"

namespace lns {

bool built_with_cuda() { return true; }

std::string why_no_gpu() {
    static const std::string why = []() -> std::string {
        auto version = [](int v) { return cat(v / 1000, ".", v % 1000 / 10); };
        int driver = 0, runtime = 0, count = 0, major = 0, minor = 0;
        CUDA(cudaDriverGetVersion(&driver));
        CUDA(cudaRuntimeGetVersion(&runtime));
        if (driver == 0) return "there is no NVIDIA driver here";
        const cudaError_t error = cudaGetDeviceCount(&count);
        cudaGetLastError(); // reported here, not by the next call
        if (error == cudaErrorInsufficientDriver)
            return cat("the NVIDIA driver is made for CUDA ", version(driver),
                       ", and this build needs one for ", version(runtime), ": update it");
        if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
            return "the NVIDIA driver shows this process no GPU (see nvidia-smi, and "
                   "CUDA_VISIBLE_DEVICES)";
        if (error != cudaSuccess)
            return cat("CUDA does not start: ", cudaGetErrorString(error), " (see nvidia-smi)");
        CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
        CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
        if (major < 8)
            return cat("the GPU has compute capability ", major, ".", minor,
                       ", and 8.0 (Ampere) is the least that this program runs on");
        return "";
    }();
    return why;
}

void use_gpu(const Ranks& ranks) {
    if (const std::string why = why_no_gpu(); !why.empty()) fail(why);
    int count = 0;
    CUDA(cudaGetDeviceCount(&count));
    CUDA(cudaSetDevice(ranks.local_rank % count));
}

Gpu gpu() {
    if (const std::string why = why_no_gpu(); !why.empty()) fail(why);
    Gpu g;
    CUDA(cudaGetDeviceCount(&g.count));
    CUDA(cudaGetDevice(&g.index));
    cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, g.index));
    g.name = properties.name;
    g.id.assign(reinterpret_cast<const char*>(&properties.uuid), sizeof properties.uuid);
    g.major = properties.major, g.minor = properties.minor;
    if (g.major < 8)
        fail("GPU ", g.index, " (", g.name, ") has compute capability ", g.major, ".", g.minor,
             ", and 8.0 is needed: choose others with CUDA_VISIBLE_DEVICES");
    g.multiprocessors = properties.multiProcessorCount;
    size_t free = 0, total = 0;
    CUDA(cudaMemGetInfo(&free, &total));
    g.free = int64_t(free), g.memory = int64_t(total);
    CUDA(cudaDriverGetVersion(&g.driver));
    CUDA(cudaRuntimeGetVersion(&g.runtime));
    return g;
}

} // namespace lns
