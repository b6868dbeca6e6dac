// What kernels need beyond C++: checked calls, launches, shared memory, and thin wrappers of the
// instructions that have no C++ name. The simulator (dev/sim) compiles the same kernels with the
// host's compiler; dev/sim/device.h defines these names for it, so kernels have no #ifdef.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "gpt/base/error.h"

namespace lns::cuda {

// Throws a sentence with the call, its place, CUDA's error and what to try.
[[noreturn]] inline void fail_call(const char* call, const char* file, int line,
                                   cudaError_t error) {
    const char* advice = "";
    if (error == cudaErrorMemoryAllocation)
        advice = "; lower --batch, ask for --recompute, or see with nvidia-smi who else has memory";
    if (error == cudaErrorNoKernelImageForDevice)
        advice = "; this build has no code for this GPU: make CUDA_ARCH=native";
    fail("the GPU failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ") in ",
         std::string(call, std::min<size_t>(std::strcspn(call, "("), 60)), " at ", file, ":", line,
         advice);
}

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        if (const cudaError_t error_ = (call); error_ != cudaSuccess)                              \
            ::lns::cuda::fail_call(#call, __FILE__, __LINE__, error_);                             \
    } while (0)

// Shared memory beyond 48 KiB must be requested for a kernel.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
    if (bytes > 48 * 1024)
        CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// kernel(arguments…) on a grid of blocks, each with `shared` bytes of shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, Arguments&&... arguments) {
    allow_shared_memory(kernel, shared);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = shared, config.stream = stream;
    CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

// How many blocks of a kernel fit on a multiprocessor.
template <class... Parameters>
int blocks_at_once(void (*kernel)(Parameters...), int threads, size_t shared) {
    allow_shared_memory(kernel, shared);
    int blocks = 0;
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
    return std::max(blocks, 1);
}

// The bytes of shared memory of an array.
template <class T> __host__ __device__ constexpr size_t shared_bytes(size_t n) {
    return (n * sizeof(T) + 15) / 16 * 16;
}

} // namespace lns::cuda

#ifndef __CUDACC__
#include <device.h> // dev/sim
#else

namespace lns::cuda {

// Allocates a block's shared memory array by array, uninitialized: every thread takes the same
// arrays in the same order. Kernels declare no other shared memory, so that the simulator can check
// each array's bounds.
struct SharedMemory {
    unsigned char* at;

    __device__ SharedMemory() {
        extern __shared__ __align__(1024) unsigned char all_shared_memory[];
        at = all_shared_memory;
    }
    // n elements, aligned to 16 bytes (the first array to 1,024).
    template <class T> __device__ T* take(int n) {
        T* taken = reinterpret_cast<T*>(at);
        at += shared_bytes<T>(n);
        return taken;
    }
};

__device__ inline uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// 2ˣ and log₂ x to about 2 units in the last place; subnormals are flushed to 0.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two values rounded to nearest, the first in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}

// Loads four 8 × 8 matrices of bf16 from shared memory: out[n] of lane i is row i/4, columns 2(i%4)
// and the next, of matrix n, or of its transpose. `row` of lane i points to row i%8 of matrix i/8,
// 16 bytes.
__device__ inline void ldmatrix(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16, 8) += a (16, 16) · b (16, 8), bf16 accumulated in float. Lane i holds rows i/4 (d[0],
// d[1]) and i/4 + 8 (d[2], d[3]) of d, columns 2(i%4) and the next; the 8 × 8 quarters of a as
// ldmatrix loads them, in the order (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15,
// 8-15); of column i/4 of b, rows 2(i%4) and the next (b0) and those + 8 (b1).
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts to copy 16 bytes (or 4) from global to shared memory; where `valid` is false, writes zeros
// and reads nothing. Commit closes a group of copies; wait<N> returns when all but this thread's
// last N groups have arrived.
template <int BYTES = 16>
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
    if constexpr (BYTES == 16) // bypasses the L1 cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(valid ? BYTES : 0), "n"(BYTES)
                     : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

} // namespace lns::cuda
#endif
