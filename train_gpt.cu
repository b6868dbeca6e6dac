// The model of train_gpt.cpp once more, on a GPU: the same sections in the same order under the
// same names, so that the two can be read side by side. Matrix products are cuBLASLt's; everything
// else is a kernel of our own, one pass over memory each, with the function that launches it below.
//
// Sizes: B sequences of T tokens; V vocabulary; C width; L layers; NH heads of q and KVH of k and
// v, of HS channels each; H width of the MLP. Arrays are row-major, a row is a token. C, H, HS and
// V are multiples of 8 here (what a model has less is padded with zeros, see the model), so that 8
// numbers, 16 bytes of bf16, are loaded and stored at once.
// S is the scalar of weights and activations (bf16 or float), G that of the parameters' gradients.
// The residual stream and its gradient are float, and so are all sums. Gradients: a backward
// function writes the gradients of activations and adds those of parameters. No sum depends on the
// order in which blocks or warps run: the same pass gives the same bits.
//
// Nothing here waits for the GPU unless it says so: functions enqueue on a stream.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "gpt/bf16.h"
#include "gpt/cuda.h"
#include "gpt/error.h"
#include "gpt/gpu.h"
#include "gpt/model.h"

namespace lns::cuda {

// ---------------------------------------------------------------------------------------------
// Scalars and arrays

using bf16 = __nv_bfloat16;

const int warp = 32; // threads

// The unit of every access: 8 numbers, as floats. `at` is aligned to 16 bytes.
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

// Of all 32 lanes, in every lane, added in the same order always.
template <class X> __device__ inline X warp_sum(X x) {
#pragma unroll
    for (int offset = warp / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = warp / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

inline int blocks_for(int64_t n, int64_t each) { return int((n + each - 1) / each); }

// ---------------------------------------------------------------------------------------------
// Embedding

// ---------------------------------------------------------------------------------------------
// Norms and the junction

struct NormStats {
    float mean, rstd;
};

// ---------------------------------------------------------------------------------------------
// Matrices

// ---------------------------------------------------------------------------------------------
// Attention. A row of qkv is NH heads of q, KVH of k, KVH of v; NH / KVH heads of q share one of k
// and v (GQA, arXiv 2305.13245).

struct AttentionShape {
    int B, T, NH, KVH, HS;
    int channels;  // of a head that are not padding; HS or a few less
    int first = 0; // what comes before this position is there already; 0 unless B is 1
    __host__ __device__ int64_t rows() const { return int64_t(B) * T; }
    __host__ __device__ int q_width() const { return NH * HS; }
    __host__ __device__ int kv_width() const { return KVH * HS; }
    __host__ __device__ int row() const { return (NH + 2 * KVH) * HS; }
    __host__ __device__ float scale() const { return 1.0f / sqrtf(float(channels)); }
};

// cos and sin of position · θ^(−2i/channels).
struct CosSin {
    float cos, sin;
};

// ---------------------------------------------------------------------------------------------
// The MLP's activations: h (rows, H) → a (rows, H)

// ---------------------------------------------------------------------------------------------
// Loss

// ---------------------------------------------------------------------------------------------
// The optimizer

// ---------------------------------------------------------------------------------------------
// The model

} // namespace lns::cuda
