// What train_gpt.cu needs beside C++: checked calls, launches, shared memory, and the instructions
// that have no C++ name, each behind a thin wrapper. This file defines them for the GPU; under the
// simulator (dev/sim), which compiles the same kernels with the host's compiler, dev/sim/device.h
// does. Kernel code knows only these names and has no #ifdef of its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "gpt/base/error.h"

namespace lns::cuda {

// Throws a sentence: the call, where it stands, what CUDA says of it and what to try.
[[noreturn]] void fail_call(const char* call, const char* file, int line, cudaError_t error);

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        if (const cudaError_t error_ = (call); error_ != cudaSuccess)                              \
            ::lns::cuda::fail_call(#call, __FILE__, __LINE__, error_);                             \
    } while (0)

// kernel(arguments…) on a grid of blocks, each with `shared` bytes of shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, Arguments&&... arguments) {
    if (shared > 48 * 1024) // more than that a kernel must ask for
        CUDA(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = shared, config.stream = stream;
    CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

// Blocks of a kernel that one multiprocessor holds at once.
template <class... Parameters>
int blocks_at_once(void (*kernel)(Parameters...), int threads, size_t shared) {
    if (shared > 48 * 1024)
        CUDA(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    int blocks = 0;
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
    return std::max(blocks, 1);
}

// Bytes of shared memory that an array takes.
template <class T> __host__ __device__ constexpr size_t shared_bytes(size_t n) {
    return (n * sizeof(T) + 15) / 16 * 16;
}

} // namespace lns::cuda

#ifndef __CUDACC__
#include <device.h> // dev/sim
#else

namespace lns::cuda {

// A block's shared memory, given out array by array: every thread takes the same ones in the same
// order. Contents are not set. All shared memory of our kernels is taken here, none is declared, so
// that the simulator can watch each array's bounds.
struct SharedMemory {
    unsigned char* at;

    __device__ SharedMemory() {
        extern __shared__ __align__(1024) unsigned char all_shared_memory[];
        at = all_shared_memory;
    }
    // n numbers, aligned to 16 bytes (a first array to 1,024).
    template <class T> __device__ T* take(int n) {
        T* taken = reinterpret_cast<T*>(at);
        at += shared_bytes<T>(n);
        return taken;
    }
};

__device__ inline uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// 2ˣ and log₂ x to about 2 units in the last place; subnormal numbers are 0.
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

// Two numbers rounded to nearest, the first in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}

// Four 8 × 8 matrices of bf16 from shared memory: lane i holds row i/4, columns 2(i%4) and the
// next, of matrix n in out[n]; with `transposed`, of its transpose. row: 16 bytes, of row i%8 of
// matrix i/8 in lane i.
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

// d (16, 8) += a (16, 16) · b (16, 8), bf16 with sums in float32. Lane i holds of d rows i/4 (d[0],
// d[1]) and i/4 + 8 (d[2], d[3]), columns 2(i%4) and the next; of a the 8 × 8 quarters as ldmatrix
// gives them, in the order (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); of b
// rows 2(i%4) and the next (b[0]) and those + 8 (b[1]) of column i/4.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes (or 4) from global to shared memory, without waiting; zeros where `valid` is false, and
// then nothing is read. Done once its group, closed by commit, has been waited for: wait<N> returns
// when all but the last N groups of this thread have arrived.
template <int BYTES = 16>
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
    if constexpr (BYTES == 16) // past the L1 cache
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
