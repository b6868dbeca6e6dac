// What the kernels share: vectors of 8 elements, sums over lanes, warps and blocks, and the online
// softmax. No sum depends on the order in which warps or blocks run.
#pragma once

#include <type_traits>

// defines: CUDA, launch, shared_bytes, SharedMemory, fast_exp2, fast_log2, pack_bf16
#include "gpt/cuda/cuda.h"

namespace lns::cuda {

using bf16 = __nv_bfloat16;

const int warp = 32; // threads
const float log2_e = 1.44269504f, ln_2 = 0.693147181f;

inline int blocks_for(int64_t n, int64_t each) { return int((n + each - 1) / each); }

// Whole warps, enough for so many units of work, but no more than `most`.
inline int threads_for(int64_t units, int most) {
    return int(std::min<int64_t>(most, blocks_for(units, warp) * int64_t(warp)));
}

// Memory is accessed in vectors of 8 elements, converted to float. `at` is aligned to 16 bytes.
template <class X> __device__ inline void load8(float (&x)[8], const X* at) {
    if constexpr (sizeof(X) == 2) {
        const uint4 raw = *reinterpret_cast<const uint4*>(at);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) { // bf16 is the upper half of a float
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
        }
    } else {
        const float4 a = reinterpret_cast<const float4*>(at)[0];
        const float4 b = reinterpret_cast<const float4*>(at)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
}
template <class X> __device__ inline void store8(X* at, const float (&x)[8]) {
    if constexpr (sizeof(X) == 2) {
        *reinterpret_cast<uint4*>(at) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                                   pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    } else {
        reinterpret_cast<float4*>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

// The sum over each group of `lanes` consecutive lanes, in every lane of the group.
template <int lanes = warp, class X> __device__ inline X warp_sum(X x) {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = warp / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}

// The same of the 4 lanes that share a row of a tensor core's accumulator.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// N sums over all threads of a block, in every thread. exchange: (N, 32), shared.
template <int N, class X> __device__ inline void block_sums(X (&x)[N], X* exchange) {
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp, warps = blockDim.x / warp;
    for (int n = 0; n < N; n++) x[n] = warp_sum(x[n]);
    __syncthreads(); // the previous sums have been read
    if (lane == 0)
        for (int n = 0; n < N; n++) exchange[n * warp + w] = x[n];
    __syncthreads();
    for (int n = 0; n < N; n++) x[n] = warp_sum(lane < warps ? exchange[n * warp + lane] : X(0));
}

// Sums the rows row(i), begin ≤ i < end, of 256 channels, by a block of 8 warps: each warp takes
// every eighth row, each lane 8 channels. `inside`: whether this lane's channels exist. Writes each
// warp's sums to sums (8, 256), in shared memory.
template <class Row>
__device__ inline void sum_rows(float* sums, int64_t begin, int64_t end, bool inside,
                                const Row& row) {
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    float sum[8] = {};
    if (inside)
#pragma unroll 4
        for (int64_t i = begin + w; i < end; i += 8) {
            float x[8];
            load8(x, row(i) + lane * 8);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += x[j];
        }
    store8(sums + w * 256 + lane * 8, sum);
    __syncthreads();
}

// Sums a lane's channel over `parts` partial sums, `row` elements apart, by a block of 8 warps:
// each warp takes every eighth part. Returns the total in warp 0. sums: (8, 32), shared.
__device__ inline float sum_parts(float* sums, const float* partial, int parts, int64_t row,
                                  bool inside) {
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    float sum = 0;
    if (inside)
#pragma unroll 4
        for (int part = w; part < parts; part += 8) sum += partial[part * row];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int other = 1; other < 8 && w == 0; other++) sum += sums[other * warp + lane];
    return sum;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// A softmax whose scores arrive in parts (arXiv 1805.02867): `sum` is Σ 2^(c · (score − largest))
// over the scores so far, or over this lane's share of them. Any `largest` near the maximum gives
// the same softmax.
struct OnlineSoftmax {
    float largest = -INFINITY, sum = 0;

    // Replaces `largest`; returns the factor by which earlier sums are rescaled.
    __device__ float raise(float next, float c) {
        const float factor = fast_exp2(c * (largest - next));
        largest = next, sum *= factor;
        return factor;
    }
    __device__ float exponential(float score, float c) const {
        return fast_exp2(c * score - c * largest);
    }
    // The natural logarithm of the denominator, of which all lanes' shares add up to `total`.
    __device__ float log_sum(float total, float c) const {
        return ln_2 * (c * largest + fast_log2(total));
    }
};

} // namespace lns::cuda
