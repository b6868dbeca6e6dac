// Thin wrappers of Hopper's own instructions (sm_90a), as those of gpt/cuda/cuda.h: copies by the
// tensor memory accelerator (TMA), barriers in shared memory that count the bytes copied, and
// products by 4 warps together (wgmma). Sections are those of PTX ISA 9.0. For the simulator
// dev/sim/hopper.h defines the same names.
#pragma once

#include <type_traits>

#include "gpt/cuda/cuda.h"

#ifndef __CUDACC__
#include <hopper.h> // dev/sim
#else

#include <cuda.h>
#include <cudaTypedefs.h>

namespace lns::cuda {

// Whether the architecture being compiled for has them. On others these kernels are empty and allow
// one warp, by which the host recognizes them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool hopper_instructions = true;
#else
constexpr bool hopper_instructions = false;
#endif

// Whether this GPU is a Hopper and this build has the kernel for it.
template <class Kernel> bool has_hopper_code(Kernel* kernel) {
    int device = 0, major = 0, minor = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0) return false;
    cudaFuncAttributes code;
    CUDA(cudaFuncGetAttributes(&code, kernel));
    return code.maxThreadsPerBlock > 32;
}

// ---- Tensor maps: TMA's descriptors of arrays, encoded by the driver

using TensorMap = CUtensorMap; // a kernel takes it as const __grid_constant__ TensorMap

// Of an array of bf16 (sizes[3], sizes[2], sizes[1], sizes[0]), where the innermost dimension is
// contiguous and the others are `strides` bytes apart, multiples of 16. A copy transfers a `box`,
// as rows of box[0] elements, which must be 128 bytes, with their 16-byte units swizzled: unit u of
// row r is stored at u ^ r % 8.
inline TensorMap tensor_map(const __nv_bfloat16* array, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] { // without linking to libcuda
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result));
        if (result != cudaDriverEntryPointSuccess)
            fail("the GPU's driver has no cuTensorMapEncodeTiled: it is older than CUDA 12. Update "
                 "it, or set LNS_ATTENTION=mma");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }();
    const uint32_t every[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<__nv_bfloat16*>(array), sizes,
               strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        fail("cuTensorMapEncodeTiled refused an array of ", sizes[0], " × ", sizes[1], " × ",
             sizes[2], " × ", sizes[3], " elements: error ", int(result),
             ". This is a bug: please report it");
    return map;
}

__device__ inline void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- Barriers in shared memory (mbarrier, 9.7.13.15). A phase ends when `arrivals` threads and
// all expected bytes have arrived; phases count from 0.

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}
// Called by the initializing thread before a __syncthreads: makes the barriers visible to TMA.
__device__ inline void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
// Arrives, and makes the phase expect this many bytes of copies.
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Waits until the phase has ended. It must be the current one or the previous: only its parity is
// compared, so phase -1 has ended from the start.
__device__ inline void barrier_wait(uint64_t* barrier, int phase) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(phase & 1)
                 : "memory");
}

// Starts to copy a box of the map's array, at these coordinates (innermost first), to shared
// memory, aligned to 1,024 bytes; elements beyond the array are 0. Called by one thread; the box's
// bytes arrive at the barrier.
__device__ inline void copy_box(void* shared, const TensorMap& map, int c0, int c1, int c2, int c3,
                                uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier))
                 : "memory");
}

// ---- Warp specialization

// Sets the number of registers of each thread of a warpgroup; all 4 warps call it.
template <int registers> __device__ inline void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Barrier `id` (1 to 15) of `threads` threads, whole warps: some wait, others only arrive.
__device__ inline void named_barrier_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wgmma (9.7.15): asynchronous products of a warpgroup, 4 warps from a multiple of 4 on.
// Between wgmma_commit and wgmma_wait their accumulators and operand registers must not be touched.

// The descriptor (9.7.15.5.1.2.2) of a matrix in shared memory as copy_box writes it: rows of 64
// elements, swizzled, the first aligned to 1,024 bytes. As an operand
// - either K runs along the rows: `next` is unused, and K + 16 is 32 bytes further;
// - or the rows are K (transposed, "MN-major"): the next 64 elements of a row are `next` bytes
//   further, and K + 16 is 2,048 bytes further.
__device__ inline uint64_t matrix(const void* shared, int next = 16) {
    return uint64_t((shared_address(shared) & 0x3FFFF) >> 4) | uint64_t(next >> 4) << 16 |
           uint64_t(1024 >> 4) << 32 | // to the next 8 rows
           uint64_t(1) << 62;          // 128-byte swizzle
}
// The descriptor `bytes` further on.
__device__ inline uint64_t advanced(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

// The compiler does not know that wgmma writes its accumulators later: this marks them as written.
template <class X, int N> __device__ inline void changed(X (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        if constexpr (sizeof(x[i]) > 4)
            changed(x[i]);
        else if constexpr (std::is_same_v<X, float>)
            asm volatile("" : "+f"(x[i])::"memory");
        else
            asm volatile("" : "+r"(x[i])::"memory");
}

// Required between writing these registers and the first wgmma that reads or accumulates to them.
template <class... Registers> __device__ inline void wgmma_fence(Registers&... registers) {
    (changed(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group: the products since the last call.
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all but the last N groups are done, whose accumulators are given.
template <int N, class... Accumulators>
__device__ inline void wgmma_wait(Accumulators&... accumulators) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (changed(accumulators), ...);
}

// asm wants each accumulator by name: in its text, and as an operand.
#define OPERANDS_32                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "                                           \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "                                           \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_64                                                                                \
    OPERANDS_32                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "                                    \
    "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "                                      \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d) SUMS_16(d, 0), SUMS_16(d, 16)
#define SUMS_64(d) SUMS_32(d), SUMS_16(d, 32), SUMS_16(d, 48)

// d (64, 2·N) = a (64, 16) · b (16, 2·N), or d += with `add`, N floats a lane. Each warp has 16
// rows of d: lane i holds columns 8n + 2(i%4) and the next of rows i/4 (d[4n], d[4n + 1]) and i/4 +
// 8 (d[4n + 2], d[4n + 3]). wgmma: K runs along the rows of a and b; wgmma_transposed: a is in
// registers as mma's (9.7.15.5.1.1.1), and b's rows are K.
__device__ inline void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OPERANDS_32 "}, "
                 "%32, %33, add, 1, 1, 0, 0;\n}"
                 : SUMS_32(d)
                 : "l"(a), "l"(b), "r"(int(add)));
}
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" OPERANDS_64 "}, "
                 "%64, %65, add, 1, 1, 0, 0;\n}"
                 : SUMS_64(d)
                 : "l"(a), "l"(b), "r"(int(add)));
}
__device__ inline void wgmma_transposed(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                        bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OPERANDS_32 "}, "
                 "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
                 : SUMS_32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ inline void wgmma_transposed(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                        bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" OPERANDS_64 "}, "
                 "{%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
                 : SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
#undef OPERANDS_32
#undef OPERANDS_64
#undef SUMS_4
#undef SUMS_16
#undef SUMS_32
#undef SUMS_64

} // namespace lns::cuda
#endif
