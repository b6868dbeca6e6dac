// What this GPU reaches at most, measured: that part of gpt/cuda/gpu.h. Defines plain functions:
// for train_gpt.cu alone.
#pragma once

#include <cmath>

#include "gpt/base/random.h"
#include "gpt/cuda/gpu.h"
// defines: bf16, blocks_for
#include "gpt/cuda/kernel.cuh"
// defines: CublasLt, Matmul, data_type, Array, OwnStream, StopWatch
#include "gpt/cuda/matmul.cuh"

namespace lns::cuda {

// Seconds of the fastest of so many runs of what `run` enqueues, after a warm-up.
template <class Run> double fastest(int runs, cudaStream_t stream, const Run& run) {
    const StopWatch stop_watch;
    run();
    float best = INFINITY;
    for (int i = 0; i < runs; i++) best = std::min(best, stop_watch.time(stream, run));
    return std::max(double(best), 1e-3) / 1e3;
}

// Uniform in (−1, 1): on zeros or ones a GPU needs less power and runs faster.
template <class S> __global__ static void random_kernel(S* x, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        x[i] = S(float(mix_bits(uint32_t(i) * 0x9E3779B9u)) * 0x1p-31f - 1.0f);
}

template <class S> static double matmul_flops(int n) {
    OwnStream stream;
    CublasLt cublas(stream);
    const int64_t size = int64_t(n) * n;
    Array<S> a(size), b(size), out(size);
    CUDA(cudaDeviceSynchronize()); // the arrays are zeroed
    launch(random_kernel<S>, blocks_for(size, 4096), 256, 0, stream, a, size);
    launch(random_kernel<S>, blocks_for(size, 4096), 256, 0, stream, b, size);
    const Matmul product = {.in = data_type<S>,
                            .out = data_type<S>,
                            .a_transposed = true,
                            .b_transposed = false,
                            .m = n,
                            .n = n,
                            .k = n,
                            .a = b,
                            .b = a,
                            .d = out,
                            .lda = n,
                            .ldb = n,
                            .ldd = n};
    return 2.0 * n * n * n / fastest(20, stream, [&] { cublas.matmul(product); });
}

enum class Access { read, write, update };

// Accesses all of x (n).
template <Access access>
__global__ static void access_kernel(float4* x, int64_t n, float factor, float term) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        const float4 v = access == Access::write ? make_float4(factor, term, factor, term) : x[i];
        if (access == Access::read)
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        else
            x[i] = make_float4(factor * v.x + term, factor * v.y + term, factor * v.z + term,
                               factor * v.w + term);
    }
    // Never true, but keeps the compiler from dropping the loads.
    if (access == Access::read && sum.x + sum.y + sum.z + sum.w == -1.0f) x[0] = sum;
}

static Bandwidth access_bandwidth(int64_t bytes) {
    OwnStream stream;
    const int64_t n = bytes / int64_t(sizeof(float4));
    Array<float> memory(n * 4);
    CUDA(cudaDeviceSynchronize()); // the array is zeroed
    float4* x = memory.as<float4>();
    const int blocks = std::min(16 * gpu().multiprocessors, blocks_for(n, 4096));
    auto rate = [&](auto* kernel, double accesses) {
        return accesses * double(bytes) / fastest(10, stream, [&] {
                   launch(kernel, blocks, 256, 0, stream, x, n, 0.999f, 1e-3f);
               });
    };
    Bandwidth b;
    b.read = rate(access_kernel<Access::read>, 1);
    b.write = rate(access_kernel<Access::write>, 1);
    b.update = rate(access_kernel<Access::update>, 2);
    return b;
}

} // namespace lns::cuda

namespace lns {

double measured_gpu_flops(DType dtype) {
    auto measure = [](auto scalar) {
        using S = decltype(scalar);
        const int small = 256, large = 8192;
        const double flops = cuda::matmul_flops<S>(small);
        const bool slow = 2.0 * large * large * large / flops > 2; // seconds; 0.3 on a real GPU
        const bool fits = 4 * int64_t(sizeof(S)) * large * large < gpu().free;
        return slow || !fits ? flops : cuda::matmul_flops<S>(large);
    };
    return dtype == DType::bf16 ? measure(cuda::bf16()) : measure(0.0f);
}

Bandwidth measured_gpu_bandwidth() {
    const int64_t small = 1 << 20, large = int64_t(1) << 30; // bytes; no cache has over 1e8
    const Bandwidth b = cuda::access_bandwidth(small);
    const bool slow = double(large) / b.read > 0.01; // seconds; 0.001 on a real GPU
    return slow || 2 * large > gpu().free ? b : cuda::access_bandwidth(large);
}

} // namespace lns
