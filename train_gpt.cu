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
//
// A line of dashes begins each section: scalars and arrays; embedding; norms; the junction;
// matrices (cuBLASLt); attention (Hopper's own is gpt/cuda/attention_hopper.cuh); the MLP's
// activations; loss; the optimizer; the model (what it holds, forward, backward, a step, layer by
// layer); the GPU.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <cublasLt.h>

#include "gpt/base/cache.h"
#include "gpt/base/error.h"
#include "gpt/cpu/bf16.h"
#include "gpt/cuda/cuda.h"
#include "gpt/cuda/gpu.h"
#include "gpt/cuda/hopper.h"
#include "gpt/model/model.h"
#include "gpt/model/slots.h"

#ifdef LNS_NCCL
#include <nccl.h>
#endif

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

// Memory of the GPU, zeroed.
template <class X> struct Array {
    Array() = default;
    explicit Array(int64_t n) : size(n) {
        if (n == 0) return;
        X* memory = nullptr;
        CUDA(cudaMalloc(reinterpret_cast<void**>(&memory), size_t(n) * sizeof(X)));
        data.reset(memory);
        // On the default stream, for which streams of our own do not wait, nor does this call.
        CUDA(cudaMemset(memory, 0, size_t(n) * sizeof(X)));
        CUDA(cudaStreamSynchronize(nullptr));
    }
    operator X*() const { return data.get(); }
    // size numbers, which have arrived when it returns.
    void upload(const X* numbers) const {
        CUDA(cudaMemcpy(data.get(), numbers, size_t(size) * sizeof(X), cudaMemcpyHostToDevice));
        CUDA(cudaStreamSynchronize(nullptr)); // a copy from memory not pinned may return sooner
    }

    struct Free {
        void operator()(X* p) const { cudaFree(p); }
    };
    std::unique_ptr<X, Free> data;
    int64_t size = 0;
};

// Memory of the host that the GPU copies to and from by itself.
template <class X> struct Pinned {
    Pinned() = default;
    explicit Pinned(int64_t n) : size(n) {
        X* memory = nullptr;
        CUDA(cudaMallocHost(reinterpret_cast<void**>(&memory), size_t(n) * sizeof(X)));
        data.reset(memory);
    }
    operator X*() const { return data.get(); }

    struct Free {
        void operator()(X* p) const { cudaFreeHost(p); }
    };
    std::unique_ptr<X, Free> data;
    int64_t size = 0;
};

inline int blocks_for(int64_t n, int64_t each) { return int((n + each - 1) / each); }

// ---------------------------------------------------------------------------------------------
// Embedding: out[row] = wte[token] + wpe[t], out (rows, C). Its gradient is gathered token by
// token, in the order of TokenRows, so that no two blocks meet. The first row is at position
// `first`, which is 0 unless B is 1.

// The rows of a batch by their token: entry i < *count is tokens[i], at the rows
// order[begin[i]] … order[begin[i + 1] − 1], which ascend.
struct TokenRows {
    const int *tokens, *begin, *order, *count;
};

// Moves, per number: 2 or 4 bytes of S (twice with positions) and 4 written.
template <class S>
__global__ static void embedding_forward_kernel(float* out, const int* tokens, const S* wte,
                                                const S* wpe, int first, int64_t rows, int T,
                                                int C) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= rows * C) return;
    const int64_t row = at / C;
    const int channel = int(at % C);
    float x[8], position[8] = {};
    load8(x, wte + int64_t(tokens[row]) * C + channel);
    if (wpe) load8(position, wpe + (first + row) % T * C + channel);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] += position[i];
    store8(out + at, x);
}

template <class S>
void embedding_forward(float* out, const int* tokens, const S* wte, const S* wpe, int first,
                       int64_t rows, int T, int C, cudaStream_t stream) {
    launch(embedding_forward_kernel<S>, blocks_for(rows * C, 256 * 8), 256, 0, stream, out, tokens,
           wte, wpe, first, rows, T, C);
}

// A block adds up 256 channels of all rows of one token: its 8 warps take every eighth row, each
// lane 8 channels. Moves 4 bytes per number of dout, and the gradients of the tokens that occur.
template <class G>
__global__ static void embedding_backward_kernel(G* dwte, TokenRows by_token, const float* dout,
                                                 int C) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * 256); // of each warp
    if (int(blockIdx.x) >= *by_token.count) return;
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    const int channel = blockIdx.y * 256 + lane * 8;
    const int begin = by_token.begin[blockIdx.x], end = by_token.begin[blockIdx.x + 1];
    float sum[8] = {};
    if (channel < C)
#pragma unroll 4
        for (int i = begin + w; i < end; i += 8) {
            float x[8];
            load8(x, dout + int64_t(by_token.order[i]) * C + channel);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += x[j];
        }
    store8(sums + w * 256 + lane * 8, sum);
    __syncthreads();
    if (w > 0 || channel >= C) return;
    G* gradient = dwte + int64_t(by_token.tokens[blockIdx.x]) * C + channel;
    float total[8];
    load8(total, gradient);
    for (int other = 0; other < 8; other++)
        for (int j = 0; j < 8; j++) total[j] += sums[other * 256 + lane * 8 + j];
    store8(gradient, total);
}

// dwpe[t] += Σ over sequences. Moves 4 bytes per number of dout.
template <class G>
__global__ static void position_backward_kernel(G* dwpe, const float* dout, int B, int T, int C) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= int64_t(T) * C) return;
    float total[8];
    load8(total, dwpe + at);
#pragma unroll 4
    for (int b = 0; b < B; b++) {
        float x[8];
        load8(x, dout + int64_t(b) * T * C + at);
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] += x[i];
    }
    store8(dwpe + at, total);
}

template <class G>
void embedding_backward(G* dwte, G* dwpe, const TokenRows& by_token, const float* dout, int B,
                        int T, int C, int V, cudaStream_t stream) {
    const int64_t distinct = std::min<int64_t>(int64_t(B) * T, V); // at most
    launch(embedding_backward_kernel<G>, dim3(unsigned(distinct), blocks_for(C, 256)), 256,
           shared_bytes<float>(8 * 256), stream, dwte, by_token, dout, C);
    if (dwpe)
        launch(position_backward_kernel<G>, blocks_for(int64_t(T) * C, 256 * 8), 256, 0, stream,
               dwpe, dout, B, T, C);
}

// ---------------------------------------------------------------------------------------------
// Norms of one row x of C numbers: y = x̂ ⊙ w + bias with x̂ = (x − mean) · rstd. LayerNorm has the
// mean and 1 / sqrt(variance + eps), RMSNorm (arXiv 1910.07467) 0 and 1 / sqrt(mean square + eps).
// A null weight is 1, a null bias 0. A row is held in registers: by one warp up to 1,024 channels,
// above by a block of 2, 4 or 8 warps; of its vectors of 8 numbers a lane has N.

struct NormStats {
    float mean, rstd;
};

struct RowShape {
    int C, warps, vectors; // warps of a row, vectors of a lane
};

inline RowShape row_shape(int C) {
    int warps = 1;
    while (C > 4 * 8 * warp * warps) warps *= 2;
    if (warps > 8)
        fail("a width of ", C,
             " is more than the 8,192 that a row may have on a GPU: use "
             "--device cpu, or a narrower model");
    return {C, warps, blocks_for(C, 8 * warp * warps)};
}

// The part of a row that a thread holds, and sums over the row. All threads of the row call these
// together.
template <int N> struct RowPart {
    int C, warps;
    float* exchange; // (2, 8), shared by the row's warps
    int turn = 0;

    __device__ int lane() const { return threadIdx.x % (warp * warps); }
    __device__ int at(int n) const { return (lane() + n * warp * warps) * 8; } // the n-th vector
    __device__ bool has(int n) const { return at(n) < C; }

    template <class X> __device__ void load(float (&x)[N][8], const X* row) const {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (has(n))
                load8(x[n], row + at(n));
            else
                for (int i = 0; i < 8; i++) x[n][i] = 0;
    }
    template <class X> __device__ void store(X* row, const float (&x)[N][8]) const {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (has(n)) store8(row + at(n), x[n]);
    }

    // Two slots in turn: whoever writes one again has passed a barrier that all readers reached.
    __device__ float sum(float x) {
        x = warp_sum(x);
        if (warps == 1) return x;
        float* slot = exchange + 8 * turn;
        turn ^= 1;
        if (threadIdx.x % warp == 0) slot[threadIdx.x / warp] = x;
        __syncthreads();
        float all = 0;
        for (int w = 0; w < warps; w++) all += slot[w];
        return all;
    }
};

template <int N>
__device__ NormStats norm_stats(NormType type, float eps, const float (&x)[N][8],
                                RowPart<N>& part) {
    float mean = 0, square = 0;
    if (type == NormType::layer) {
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) mean += x[n][i]; // 0 beyond the row
        mean = part.sum(mean) / float(part.C);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
        if (part.has(n))
            for (int i = 0; i < 8; i++) square += (x[n][i] - mean) * (x[n][i] - mean);
    return {mean, rsqrtf(part.sum(square) / float(part.C) + eps)};
}

// y = scale · (x̂ ⊙ w + bias); y may be x.
template <int N, class S>
__device__ void norm_row_forward(const NormStats& stats, const float (&x)[N][8], const S* w,
                                 const S* bias, float scale, float (&y)[N][8],
                                 const RowPart<N>& part) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!part.has(n)) continue;
        float weight[8] = {1, 1, 1, 1, 1, 1, 1, 1}, offset[8] = {};
        if (w) load8(weight, w + part.at(n));
        if (bias) load8(offset, bias + part.at(n));
#pragma unroll
        for (int i = 0; i < 8; i++)
            y[n][i] = scale * ((x[n][i] - stats.mean) * stats.rstd * weight[i] + offset[i]);
    }
}

// Sums over the rows that a thread sees, of its own channels, in shared memory: a lane's 8 numbers
// as two groups of 4 so far apart that the lanes of a warp do not meet in a bank.
__device__ inline void add_to_sums(float* sums, const float (&x)[8], int at, int C) {
    float4* low = reinterpret_cast<float4*>(sums + at / 2);
    float4* high = reinterpret_cast<float4*>(sums + C / 2 + at / 2);
    float4 a = *low, b = *high;
    a.x += x[0], a.y += x[1], a.z += x[2], a.w += x[3];
    b.x += x[4], b.y += x[5], b.z += x[6], b.w += x[7];
    *low = a, *high = b;
}
// Where add_to_sums has the sum of a channel.
__device__ inline int place_of_sum(int channel, int C) {
    return channel % 8 / 4 * (C / 2) + channel / 8 * 4 + channel % 4;
}

// dx from dy, the gradient of x̂ ⊙ w + bias, in place; adds to the sums of dw and dbias.
// With g = w ⊙ dy: dx = rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), without mean(g) for RMSNorm.
template <int N, class S>
__device__ void norm_row_backward(NormType type, const NormStats& stats, const float (&x)[N][8],
                                  const S* w, float (&dy)[N][8], float* dw, float* dbias,
                                  RowPart<N>& part) {
    float sum = 0, dot = 0;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!part.has(n)) continue;
        float weight[8] = {1, 1, 1, 1, 1, 1, 1, 1}, product[8];
        if (w) load8(weight, w + part.at(n));
        if (dbias) add_to_sums(dbias, dy[n], part.at(n), part.C);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            product[i] = dy[n][i] * (x[n][i] - stats.mean) * stats.rstd;
            dy[n][i] *= weight[i];
            sum += dy[n][i];
            dot += dy[n][i] * (x[n][i] - stats.mean);
        }
        if (dw) add_to_sums(dw, product, part.at(n), part.C);
    }
    const float mean = type == NormType::layer ? part.sum(sum) / float(part.C) : 0;
    const float slope = part.sum(dot) * stats.rstd * stats.rstd / float(part.C);
#pragma unroll
    for (int n = 0; n < N; n++)
        if (part.has(n))
            for (int i = 0; i < 8; i++)
                dy[n][i] = stats.rstd * (dy[n][i] - mean - (x[n][i] - stats.mean) * slope);
}

// ---------------------------------------------------------------------------------------------
// The junction, where a sublayer's output b meets the residual stream r: the one place in which the
// norm schemes differ (gpt/model/scheme.h has its equations). One kernel forward and one backward
// for every row of the table; what a junction has not is a branch that all threads pass by
// together.

// A junction's parameters, or the gradients of them; null where it has none.
template <class P> struct JunctionPointers {
    P *branch_weight = nullptr, *branch_bias = nullptr, *out_weight = nullptr, *out_bias = nullptr,
      *in_weight = nullptr, *in_bias = nullptr, *gamma = nullptr, *gate = nullptr;

    JunctionPointers() = default;
    JunctionPointers(P* base, const JunctionParams& p) {
        auto at = [&](int64_t offset) { return offset < 0 ? nullptr : base + offset; };
        branch_weight = at(p.branch.weight), branch_bias = at(p.branch.bias);
        out_weight = at(p.out.weight), out_bias = at(p.out.bias);
        in_weight = at(p.in.weight), in_bias = at(p.in.bias);
        gamma = at(p.gamma), gate = at(p.gate);
    }
};

struct JunctionStats {
    NormStats branch, out, in;
};

// What a junction does, for a kernel.
struct JunctionPlan {
    bool branch, branch_norm, out_norm, in_norm, gate, gate_on_skip;
    Gamma gamma;
    NormType type;
    float skip, in_scale, eps;
    int C, warps;
    int64_t rows;

    JunctionPlan(const Junction& j, NormType type, double eps, int64_t rows, const RowShape& shape)
        : branch(j.branch), branch_norm(j.branch_norm), out_norm(j.out_norm), in_norm(j.in_norm),
          gate(j.gate), gate_on_skip(j.gate_on_skip), gamma(j.gamma), type(type),
          skip(float(j.skip)), in_scale(float(j.in_scale)), eps(float(eps)), C(shape.C),
          warps(shape.warps), rows(rows) {}
};

template <class S> __device__ float number(const S* x) { return x ? float(*x) : 0.0f; }

// z, y: the branch behind its norm, times γ.
template <int N, class S>
__device__ void apply_gamma(const JunctionPlan& j, const JunctionPointers<const S>& p,
                            const float (&y)[N][8], float (&z)[N][8], const RowPart<N>& part) {
    const float scalar = j.gamma == Gamma::scalar ? number(p.gamma) : 1;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!part.has(n)) continue;
        float gamma[8];
        if (j.gamma == Gamma::vector)
            load8(gamma, p.gamma + part.at(n));
        else
            for (int i = 0; i < 8; i++) gamma[i] = scalar;
#pragma unroll
        for (int i = 0; i < 8; i++) z[n][i] = gamma[i] * y[n][i];
    }
}

// r (rows, C) and u (rows, C) from r_prev and b (rows, C); keeps the norms' statistics (rows). r
// may be r_prev; u may be null if the junction has no in-norm, where it is r. Moves, per number:
// r_prev and r 4 bytes each, b and u those of S.
template <class S, int N>
__global__ static __launch_bounds__(256) void junction_forward_kernel(
    JunctionPlan j, const float* r_prev, const S* b, JunctionPointers<const S> p, float* r, S* u,
    JunctionStats* stats) {
    SharedMemory shared;
    RowPart<N> part{j.C, j.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * j.warps);
    if (row >= j.rows) return; // the whole row's threads
    const int64_t at = row * j.C;
    const bool first = part.lane() == 0;
    float z[N][8];
    if (!j.branch) {
        part.load(z, r_prev + at);
    } else {
        float previous[N][8];
        part.load(z, b + at);
        part.load(previous, r_prev + at);
        if (j.branch_norm) {
            const NormStats s = norm_stats(j.type, j.eps, z, part);
            if (first) stats[row].branch = s;
            norm_row_forward(s, z, p.branch_weight, p.branch_bias, 1, z, part);
        }
        if (j.gamma != Gamma::none) apply_gamma(j, p, z, z, part);
        const float gate = number(p.gate);
        const float kept = j.skip * (j.gate_on_skip ? 1 - gate * sigmoid(gate) : 1);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) z[n][i] += kept * previous[n][i];
    }
    if (j.out_norm) {
        const NormStats s = norm_stats(j.type, j.eps, z, part);
        if (first) stats[row].out = s;
        norm_row_forward(s, z, p.out_weight, p.out_bias, 1, z, part);
    }
    if (j.gate && !j.gate_on_skip) {
        const float gate = number(p.gate), kept = 1 - gate * sigmoid(gate);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) z[n][i] *= kept;
    }
    part.store(r + at, z);
    if (j.in_norm) {
        const NormStats s = norm_stats(j.type, j.eps, z, part);
        if (first) stats[row].in = s;
        norm_row_forward(s, z, p.in_weight, p.in_bias, j.in_scale, z, part);
    }
    if (u) part.store(u + at, z);
}

// Calls f with N, the vectors of a lane, as a constant.
template <class F> void with_vectors(const RowShape& shape, const F& f) {
    switch (shape.vectors) {
    case 1:
        return f(std::integral_constant<int, 1>());
    case 2:
        return f(std::integral_constant<int, 2>());
    case 3:
        return f(std::integral_constant<int, 3>());
    default:
        return f(std::integral_constant<int, 4>());
    }
}

template <class S>
void junction_forward(const Junction& j, NormType type, double eps, const float* r_prev, const S* b,
                      const JunctionPointers<const S>& p, float* r, S* u, JunctionStats* stats,
                      int64_t rows, int C, cudaStream_t stream) {
    const RowShape shape = row_shape(C);
    const int rows_a_block = shape.warps == 1 ? 4 : 1;
    with_vectors(shape, [&](auto N) {
        launch(junction_forward_kernel<S, decltype(N)::value>, blocks_for(rows, rows_a_block),
               warp * shape.warps * rows_a_block, shared_bytes<float>(16), stream,
               JunctionPlan(j, type, eps, rows, shape), r_prev, b, p, r, u, stats);
    });
}

// The gradients of vectors that one junction may have, in the order in which partial sums lie.
template <class G> struct JunctionSums {
    static const int most = 7;
    G* gradient[most]; // null beyond `count`
    int count = 0;
    // Which of them is which; −1: none.
    int in_weight, in_bias, out_weight, out_bias, branch_weight, branch_bias, gamma;
    G *scalar_gamma = nullptr, *gate = nullptr;

    JunctionSums(const JunctionPointers<G>& p, Gamma gamma_kind) {
        auto next = [&](G* wanted) {
            if (!wanted) return -1;
            gradient[count] = wanted;
            return count++;
        };
        in_weight = next(p.in_weight), in_bias = next(p.in_bias);
        out_weight = next(p.out_weight), out_bias = next(p.out_bias);
        branch_weight = next(p.branch_weight), branch_bias = next(p.branch_bias);
        gamma = next(gamma_kind == Gamma::vector ? p.gamma : nullptr);
        if (gamma_kind == Gamma::scalar) scalar_gamma = p.gamma;
        gate = p.gate;
    }
};

// Partial sums of every block: (blocks, 2) doubles of γ and gate, then (blocks, count, C) floats.
struct JunctionScratch {
    double* scalars;
    float* vectors;
};

// Blocks take every so many rows and add up the parameters' gradients of all of theirs.
// Moves, per number: du and db in S, dr read and written in float, r in float if there is an
// in-norm, and b (S) and r_prev (float) where keeps_branch.
template <class S, class G, int N, bool keeps_branch>
__global__ static __launch_bounds__(256) void junction_backward_kernel(
    JunctionPlan j, const float* r_prev, const S* b, const float* r, JunctionPointers<const S> p,
    const JunctionStats* stats, const S* du, bool starts, float* dr, S* db, JunctionSums<G> which,
    JunctionScratch scratch) {
    const int C = j.C, groups = blockDim.x / (warp * j.warps); // rows at once
    const int group = threadIdx.x / (warp * j.warps);
    SharedMemory shared;
    RowPart<N> part{C, j.warps, shared.take<float>(16)};
    double* scalars = shared.take<double>(2 * blockDim.x);
    float* sums = shared.take<float>(groups * which.count * C); // (groups, count, C)
    for (int i = threadIdx.x; i < groups * which.count * C; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    auto sum_of = [&](int n) { return n < 0 ? nullptr : sums + (group * which.count + n) * C; };

    const float gate = number(p.gate), s = sigmoid(gate);
    const float silu = gate * s, dsilu = s * (1 + gate * (1 - s));
    const float scalar_gamma = j.gamma == Gamma::scalar ? number(p.gamma) : 1;
    double gate_sum = 0, gamma_sum = 0; // of this thread: over all channels much cancels

    // Every group makes as many turns, since those of several warps meet at barriers.
    for (int64_t row0 = int64_t(blockIdx.x) * groups; row0 < j.rows;
         row0 += int64_t(gridDim.x) * groups) {
        const int64_t row = row0 + group, at = row * C;
        if (row >= j.rows) break; // only groups of one warp, which meet nobody
        float dz[N][8];           // gradient of r, then of what came before, step by step
        part.load(dz, du + at);
        float later[N][8] = {};
        if (!starts) part.load(later, dr + at);
        if (j.in_norm) {
            float x[N][8];
            part.load(x, r + at);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) dz[n][i] *= j.in_scale;
            norm_row_backward(j.type, stats[row].in, x, p.in_weight, dz, sum_of(which.in_weight),
                              sum_of(which.in_bias), part);
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) dz[n][i] += later[n][i];

        // What the forward pass had before the out-norm and the gate.
        if constexpr (keeps_branch) {
            float z[N][8];
            if (!j.branch) {
                part.load(z, r_prev + at);
            } else {
                float previous[N][8];
                part.load(z, b + at);
                part.load(previous, r_prev + at);
                if (j.branch_norm)
                    norm_row_forward(stats[row].branch, z, p.branch_weight, p.branch_bias, 1, z,
                                     part);
                if (j.gamma != Gamma::none) apply_gamma(j, p, z, z, part);
                const float kept = j.skip * (j.gate_on_skip ? 1 - silu : 1);
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++) z[n][i] += kept * previous[n][i];
            }
            if (j.gate && !j.gate_on_skip) // no out-norm; stop() passes no gradient: dz stays
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++)
                        gate_sum -= double(dsilu) * double(dz[n][i]) * double(z[n][i]);
            if (j.out_norm)
                norm_row_backward(j.type, stats[row].out, z, p.out_weight, dz,
                                  sum_of(which.out_weight), sum_of(which.out_bias), part);
        }
        if (keeps_branch && j.gate_on_skip) {
            float previous[N][8];
            part.load(previous, r_prev + at);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++)
                    gate_sum -= double(dsilu * j.skip) * double(dz[n][i]) * double(previous[n][i]);
        }
        float down[N][8]; // to r_prev
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) down[n][i] = j.skip * dz[n][i];
        part.store(dr + at, down);
        if (!j.branch) continue;

        if (keeps_branch && (j.branch_norm || j.gamma != Gamma::none)) {
            float x[N][8];
            part.load(x, b + at);
            if (j.gamma != Gamma::none) {
                float y[N][8];
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++) y[n][i] = x[n][i];
                if (j.branch_norm)
                    norm_row_forward(stats[row].branch, x, p.branch_weight, p.branch_bias, 1, y,
                                     part);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    if (!part.has(n)) continue;
                    float product[8], gamma[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) product[i] = dz[n][i] * y[n][i];
                    if (j.gamma == Gamma::vector) {
                        add_to_sums(sum_of(which.gamma), product, part.at(n), C);
                        load8(gamma, p.gamma + part.at(n));
                    } else {
                        for (int i = 0; i < 8; i++) {
                            gamma_sum += double(product[i]);
                            gamma[i] = scalar_gamma;
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 8; i++) dz[n][i] *= gamma[i];
                }
            }
            if (j.branch_norm)
                norm_row_backward(j.type, stats[row].branch, x, p.branch_weight, dz,
                                  sum_of(which.branch_weight), sum_of(which.branch_bias), part);
        }
        part.store(db + at, dz);
    }

    scalars[threadIdx.x] = gamma_sum;
    scalars[blockDim.x + threadIdx.x] = gate_sum;
    __syncthreads();
    if (threadIdx.x < 2) {
        double sum = 0;
        for (int i = 0; i < int(blockDim.x); i++) sum += scalars[threadIdx.x * blockDim.x + i];
        scratch.scalars[2 * blockIdx.x + threadIdx.x] = sum;
    }
    for (int i = threadIdx.x; i < which.count * C; i += blockDim.x) {
        const int place = i / C * C + place_of_sum(i % C, C);
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[g * which.count * C + place];
        scratch.vectors[int64_t(blockIdx.x) * which.count * C + i] = sum;
    }
}

// Adds the blocks' partial sums to the gradients, always in the same order: blockIdx.y is the
// vector, or behind the last the two scalars; 8 warps each take every eighth partial sum of 32
// channels.
template <class G>
__global__ static void junction_gather_kernel(const __grid_constant__ JunctionSums<G> which,
                                              JunctionScratch scratch, int partials, int C) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * warp);
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    if (int(blockIdx.y) == which.count) {
        G* gradient = w == 0 ? which.scalar_gamma : which.gate;
        if (blockIdx.x > 0 || w > 1 || lane > 0 || !gradient) return;
        double sum = 0;
        for (int i = 0; i < partials; i++) sum += scratch.scalars[2 * i + w];
        *gradient = G(float(*gradient) + float(sum));
        return;
    }
    const int channel = blockIdx.x * warp + lane;
    const float* vector = scratch.vectors + blockIdx.y * C + channel;
    float sum = 0;
    if (channel < C)
#pragma unroll 4
        for (int i = w; i < partials; i += 8) sum += vector[int64_t(i) * which.count * C];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (w > 0 || channel >= C) return;
    for (int other = 1; other < 8; other++) sum += sums[other * warp + lane];
    G* gradient = which.gradient[blockIdx.y] + channel;
    *gradient = G(float(*gradient) + sum);
}

// Blocks on a multiprocessor that a backward pass has at most, and bytes of scratch for all.
const int junction_blocks = 8;
inline int64_t junction_scratch(int C, int multiprocessors) {
    return int64_t(junction_blocks) * multiprocessors *
           int64_t(2 * sizeof(double) + 7 * C * sizeof(float));
}

// From du (gradient of u; of r if there is no in-norm) and dr (gradient of r from what comes later;
// where the pass `starts` here it is 0 and not read): db and, in place of dr, the gradient of
// r_prev. Adds the gradients of the parameters.
template <class S, class G>
void junction_backward(const Junction& j, NormType type, double eps, const float* r_prev,
                       const S* b, const float* r, const JunctionPointers<const S>& p,
                       const JunctionStats* stats, const S* du, bool starts, float* dr, S* db,
                       const JunctionPointers<G>& grads, void* scratch_memory, int64_t rows, int C,
                       int multiprocessors, cudaStream_t stream) {
    RowShape shape = row_shape(C);
    const JunctionSums<G> which(grads, j.gamma);
    // As many rows at once as leave room for two blocks on a multiprocessor.
    int groups = shape.warps == 1 ? 4 : 1;
    auto shared = [&] {
        const int threads = warp * shape.warps * groups;
        return shared_bytes<float>(16) + shared_bytes<double>(2 * threads) +
               shared_bytes<float>(size_t(groups) * which.count * C);
    };
    while (groups > 1 && shared() > 100 * 1024) groups /= 2;
    const int threads = warp * shape.warps * groups;
    int blocks = 0;
    JunctionScratch scratch;
    with_vectors(shape, [&](auto N) {
        auto kernel = junction_backward_kernel<S, G, decltype(N)::value, false>;
        if (j.keeps_branch()) kernel = junction_backward_kernel<S, G, decltype(N)::value, true>;
        blocks = std::min(blocks_for(rows, groups),
                          multiprocessors *
                              std::min(junction_blocks, blocks_at_once(kernel, threads, shared())));
        scratch.scalars = static_cast<double*>(scratch_memory);
        scratch.vectors = reinterpret_cast<float*>(scratch.scalars + 2 * blocks);
        launch(kernel, blocks, threads, shared(), stream, JunctionPlan(j, type, eps, rows, shape),
               r_prev, b, r, p, stats, du, starts, dr, db, which, scratch);
    });
    if (which.count > 0 || which.scalar_gamma || which.gate)
        launch(junction_gather_kernel<G>, dim3(blocks_for(C, warp), which.count + 1), 8 * warp,
               shared_bytes<float>(8 * warp), stream, which, scratch, blocks, C);
}

// u once more, from r and its statistics.
template <class S, int N>
__global__ static void input_again_kernel(JunctionPlan j, const float* r, const S* weight,
                                          const S* bias, const JunctionStats* stats, S* u) {
    const RowPart<N> part{j.C, j.warps, nullptr};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * j.warps);
    if (row >= j.rows) return;
    float x[N][8];
    part.load(x, r + row * j.C);
    if (j.in_norm) norm_row_forward(stats[row].in, x, weight, bias, j.in_scale, x, part);
    part.store(u + row * j.C, x);
}

template <class S>
void input_again(const Junction& j, NormType type, double eps, const float* r,
                 const JunctionPointers<const S>& p, const JunctionStats* stats, S* u, int64_t rows,
                 int C, cudaStream_t stream) {
    const RowShape shape = row_shape(C);
    const int rows_a_block = shape.warps == 1 ? 4 : 1;
    with_vectors(shape, [&](auto N) {
        launch(input_again_kernel<S, decltype(N)::value>, blocks_for(rows, rows_a_block),
               warp * shape.warps * rows_a_block, 0, stream,
               JunctionPlan(j, type, eps, rows, shape), r, p.in_weight, p.in_bias, stats, u);
    });
}

// ---------------------------------------------------------------------------------------------
// Matrices: out (rows, OC) = in (rows, C) · wᵀ + bias, w (OC, C), bias (OC) or null. cuBLASLt sees
// everything transposed, since its matrices are column-major: outᵀ (OC, rows) = w · inᵀ.
// Products multiply bf16 with sums in float, or floats without TF32.

template <class X>
constexpr cudaDataType_t data_type = std::is_same_v<X, float> ? CUDA_R_32F : CUDA_R_16BF;

// d (m, n) = a · b + beta · d, column-major: a (m, k), b (k, n), or in memory their transposes; ld:
// elements from one column to the next. Every pointer is aligned to 16 bytes.
struct Product {
    cudaDataType_t in, out; // of a and b, of d
    bool a_transposed, b_transposed;
    int64_t m, n, k;
    const void *a, *b;
    void* d;
    int64_t lda, ldb, ldd;
    float beta = 0;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void* bias = nullptr; // (m), of d's type
    void* gelu_input = nullptr; // (m, n), of d's type: kept by the forward pass for the backward

    std::string key() const {
        auto name = [](cudaDataType_t type) { return type == CUDA_R_32F ? "float32" : "bf16"; };
        return cat(name(in), " to ", name(out), ", ", m, a_transposed ? " t" : " n", " x ", n,
                   b_transposed ? " t" : " n", " x ", k, ", columns every ", lda, " ", ldb, " ",
                   ldd, ", beta ", beta, ", epilogue ", int(epilogue));
    }
};

inline void check_product(cublasStatus_t status, const Product& p, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("cuBLASLt cannot ", what, " (", p.key(), "): ", cublasLtGetStatusString(status),
             ". With CUDA_LAUNCH_BLOCKING=1 in the environment an error of an earlier kernel is "
             "found where it happens");
}

// A product in cuBLASLt's terms.
struct ProductDescriptors {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;

    explicit ProductDescriptors(const Product& p) {
        const char* what = "describe a product";
        check_product(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), p,
                      what);
        auto set = [&](cublasLtMatmulDescAttributes_t name, const auto& value) {
            check_product(cublasLtMatmulDescSetAttribute(operation, name, &value, sizeof(value)), p,
                          what);
        };
        const cublasOperation_t as_is = CUBLAS_OP_N, transposed = CUBLAS_OP_T;
        set(CUBLASLT_MATMUL_DESC_TRANSA, p.a_transposed ? transposed : as_is);
        set(CUBLASLT_MATMUL_DESC_TRANSB, p.b_transposed ? transposed : as_is);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
        if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        if (p.gelu_input) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.gelu_input);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ldd);
        }
        auto layout = [&](cublasLtMatrixLayout_t& made, cudaDataType_t type, bool transpose,
                          int64_t rows, int64_t columns, int64_t ld) {
            if (transpose) std::swap(rows, columns);
            check_product(
                cublasLtMatrixLayoutCreate(&made, type, uint64_t(rows), uint64_t(columns), ld), p,
                what);
        };
        layout(a, p.in, p.a_transposed, p.m, p.k, p.lda);
        layout(b, p.in, p.b_transposed, p.k, p.n, p.ldb);
        layout(d, p.out, false, p.m, p.n, p.ldd);
    }
    ProductDescriptors(const ProductDescriptors&) = delete;
    ~ProductDescriptors() {
        for (cublasLtMatrixLayout_t layout : {a, b, d})
            if (layout) cublasLtMatrixLayoutDestroy(layout);
        if (operation) cublasLtMatmulDescDestroy(operation);
    }
};

// cuBLASLt, its workspace, and the algorithm of each product: chosen by measurement where it is met
// for the first time, and remembered (gpt/base/cache.h) so that the next run has the same bits.
// Where nothing can be remembered, or measured since a stream is being captured, it is the one that
// cuBLASLt guesses to be best; a graph's products should have been run before.
struct Products {
    const cudaStream_t stream; // of all products, since they share the workspace

    // Of workspace; where there is no GPU, what a new one would get.
    static int64_t workspace_bytes() {
        int device = 0, major = 9;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) !=
                cudaSuccess)
            cudaGetLastError();
        return int64_t(major >= 9 ? 64 : 32) << 20;
    }

    explicit Products(cudaStream_t stream) : stream(stream), cache("cublaslt.txt") {
        int device = 0;
        cudaDeviceProp properties;
        CUDA(cudaGetDevice(&device));
        CUDA(cudaGetDeviceProperties(&properties, device));
        machine = cat(properties.name, ", ", properties.multiProcessorCount,
                      " multiprocessors, cuBLASLt ", cublasLtGetVersion(), ", workspace ",
                      workspace_size, ": ");
        if (const cublasStatus_t status = cublasLtCreate(&handle); status != CUBLAS_STATUS_SUCCESS)
            fail("cuBLASLt cannot start: ", cublasLtGetStatusString(status),
                 ". Its version must fit the GPU's driver");
        CUDA(cudaMalloc(&workspace_memory, size_t(workspace_size)));
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
    }
    Products(const Products&) = delete;
    ~Products() {
        cudaEventDestroy(begin), cudaEventDestroy(end);
        cudaFree(workspace_memory);
        cublasLtDestroy(handle);
    }

    int64_t bytes() const { return workspace_size; }

    // False, and nothing is done, where cuBLASLt has no algorithm for such a product.
    bool multiply(const Product& p, cudaStream_t on) {
        if (on != stream) fail("a product was given another stream than the one of its workspace");
        const ProductDescriptors descriptors(p);
        const std::string key = machine + p.key();
        auto known = algorithms.find(key);
        if (known == algorithms.end())
            known = algorithms.emplace(key, choose(p, descriptors, key)).first;
        if (!known->second) return false;
        check_product(run(p, descriptors, *known->second), p, "multiply");
        return true;
    }

    void must_multiply(const Product& p, cudaStream_t on) {
        if (!multiply(p, on)) check_product(CUBLAS_STATUS_NOT_SUPPORTED, p, "multiply");
    }

  private:
    // With a name of its own: nvcc 13.0 stumbles at a vector of cuBLASLt's, which has none.
    struct Algorithm : cublasLtMatmulAlgo_t {};

    cublasLtHandle_t handle = nullptr;
    void* workspace_memory = nullptr;
    const int64_t workspace_size = workspace_bytes();
    cudaEvent_t begin = nullptr, end = nullptr;
    std::string machine;
    Cache cache;
    std::map<std::string, std::optional<Algorithm>> algorithms; // none: there is none

    cublasStatus_t run(const Product& p, const ProductDescriptors& q, const Algorithm& algorithm) {
        const float one = 1;
        return cublasLtMatmul(handle, q.operation, &one, p.a, q.a, p.b, q.b, &p.beta, p.d, q.d, p.d,
                              q.d, &algorithm, workspace_memory, size_t(workspace_size), stream);
    }

    std::optional<Algorithm> choose(const Product& p, const ProductDescriptors& q,
                                    const std::string& key) {
        if (const std::string* text = cache.find(key))
            if (const std::optional<Algorithm> known = from_text(*text); known && runs(q, *known))
                return known;
        const std::vector<Algorithm> candidates = candidates_for(p, q);
        if (candidates.empty()) return std::nullopt;
        cudaStreamCaptureStatus capture;
        CUDA(cudaStreamIsCapturing(stream, &capture));
        if (capture != cudaStreamCaptureStatusNone || cache.path().empty()) return candidates[0];
        const std::optional<std::string> text =
            cache.settle(key, to_text(fastest(p, q, candidates)));
        const std::optional<Algorithm> settled = text ? from_text(*text) : std::nullopt;
        return settled && runs(q, *settled) ? *settled : candidates[0];
    }

    // What cuBLASLt thinks will serve, the best first. Split sums must go through the workspace in
    // float: in place they would be rounded in between.
    std::vector<Algorithm> candidates_for(const Product& p, const ProductDescriptors& q) {
        const char* what = "say how it would multiply";
        cublasLtMatmulPreference_t preference;
        check_product(cublasLtMatmulPreferenceCreate(&preference), p, what);
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
            check_product(
                cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value)), p,
                what);
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace_size));
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
               uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        for (const cublasLtMatmulPreferenceAttributes_t alignment :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(alignment, uint32_t(16));
        const int most = 8;
        cublasLtMatmulHeuristicResult_t found[most];
        int count = 0;
        const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            handle, q.operation, q.a, q.b, q.d, q.d, preference, most, found, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
        check_product(status, p, what);
        std::vector<Algorithm> candidates;
        for (int i = 0; i < count; i++)
            if (found[i].state == CUBLAS_STATUS_SUCCESS && runs(q, {found[i].algo}))
                candidates.push_back({found[i].algo});
        return candidates;
    }

    // Whether the algorithm is one for this product, on this GPU, and gives the same bits each
    // time.
    bool runs(const ProductDescriptors& q, const Algorithm& algorithm) {
        cublasLtMatmulHeuristicResult_t result = {};
        uint32_t reduction = 0;
        size_t written = 0;
        return cublasLtMatmulAlgoCheck(handle, q.operation, q.a, q.b, q.d, q.d, &algorithm,
                                       &result) == CUBLAS_STATUS_SUCCESS &&
               result.workspaceSize <= size_t(workspace_size) &&
               (cublasLtMatmulAlgoConfigGetAttribute(
                    &algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                    sizeof(reduction), &written) != CUBLAS_STATUS_SUCCESS || // it splits nothing
                reduction == CUBLASLT_REDUCTION_SCHEME_NONE ||
                reduction == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    }

    // By running each on the real operands. What d holds is overwritten afterwards, or, where it is
    // added to, kept aside and put back. An earlier one is preferred to one hardly faster.
    Algorithm fastest(const Product& p, const ProductDescriptors& q,
                      const std::vector<Algorithm>& candidates) {
        if (candidates.size() == 1) return candidates[0];
        const size_t bytes =
            size_t((p.n - 1) * p.ldd + p.m) * (p.out == CUDA_R_32F ? sizeof(float) : sizeof(bf16));
        void* kept = nullptr;
        if (p.beta != 0) {
            if (cudaMalloc(&kept, bytes) != cudaSuccess) {
                cudaGetLastError(); // no room to measure
                return candidates[0];
            }
            CUDA(cudaMemcpyAsync(kept, p.d, bytes, cudaMemcpyDeviceToDevice, stream));
        }
        std::vector<float> times(candidates.size(), std::numeric_limits<float>::infinity());
        for (int turn = 0; turn < 3; turn++)
            for (size_t i = 0; i < candidates.size(); i++) {
                bool ran = true;
                float time = 0;
                CUDA(cudaEventRecord(begin, stream));
                for (int again = 0; again < 3; again++)
                    ran = ran && run(p, q, candidates[i]) == CUBLAS_STATUS_SUCCESS;
                CUDA(cudaEventRecord(end, stream));
                CUDA(cudaEventSynchronize(end));
                CUDA(cudaEventElapsedTime(&time, begin, end));
                if (ran) times[i] = std::min(times[i], time);
            }
        size_t best = 0;
        for (size_t i = 1; i < times.size(); i++)
            if (times[i] < 0.98f * times[best]) best = i;
        if (kept) {
            CUDA(cudaMemcpyAsync(p.d, kept, bytes, cudaMemcpyDeviceToDevice, stream));
            CUDA(cudaStreamSynchronize(stream));
            CUDA(cudaFree(kept));
        }
        return candidates[best];
    }

    static std::string to_text(const Algorithm& algorithm) {
        std::ostringstream text;
        for (uint64_t word : algorithm.data) text << std::hex << word << " ";
        return text.str();
    }
    static std::optional<Algorithm> from_text(const std::string& text) {
        Algorithm algorithm = {};
        std::istringstream words(text);
        for (uint64_t& word : algorithm.data)
            if (!(words >> std::hex >> word)) return std::nullopt;
        return algorithm;
    }
};

// out (rows, OC) = bias, in every row. Moves, per number, that of S or float once.
template <class Out, class S>
__global__ static void broadcast_kernel(Out* out, int64_t out_row, const S* bias, int OC) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (channel >= OC) return;
    float x[8];
    load8(x, bias + channel);
    store8(out + blockIdx.x * out_row + channel, x);
}

// w (OC, C) and in (rows, C) as a product's a and b; d, out_row elements from one row of out to the
// next, is set.
template <class Out, class S>
Product linear_product(Out* out, int64_t out_row, const S* in, const S* w, int64_t rows, int C,
                       int OC) {
    return {.in = data_type<S>,
            .out = data_type<Out>,
            .a_transposed = true,
            .b_transposed = false,
            .m = OC,
            .n = rows,
            .k = C,
            .a = w,
            .b = in,
            .d = out,
            .lda = C,
            .ldb = C,
            .ldd = out_row};
}

// Out is S, or float where logits shall not be rounded. out_row: elements from one row of out to
// the next.
template <class S, class Out>
void linear_forward(Products& products, Out* out, int64_t out_row, const S* in, const S* w,
                    const S* bias, int64_t rows, int C, int OC, cudaStream_t stream) {
    Product p = linear_product(out, out_row, in, w, rows, C, OC);
    if (bias) {
        if constexpr (std::is_same_v<S, Out>) {
            p.epilogue = CUBLASLT_EPILOGUE_BIAS, p.bias = bias;
            if (products.multiply(p, stream)) return;
        }
        // Without that epilogue the product is added to the bias, and still rounded once.
        p.epilogue = CUBLASLT_EPILOGUE_DEFAULT, p.bias = nullptr, p.beta = 1;
        launch(broadcast_kernel<Out, S>, dim3(unsigned(rows), blocks_for(OC, 128 * 8)), 128, 0,
               stream, out, out_row, bias, OC);
    }
    products.must_multiply(p, stream);
}

template <class S>
void gelu_forward(S* out, const S* h, int64_t n, cudaStream_t stream); // of the MLP's activations
template <class S>
void gelu_backward(S* dh, const S* da, const S* h, int64_t n, cudaStream_t stream);

// hidden (rows, OC) is what linear_forward gives, activated (rows, OC) = gelu(hidden), as a
// product's end takes it of what has not been rounded yet.
template <class S>
void linear_gelu_forward(Products& products, S* activated, S* hidden, const S* in, const S* w,
                         const S* bias, int64_t rows, int C, int OC, cudaStream_t stream) {
    Product p = linear_product(activated, OC, in, w, rows, C, OC);
    p.epilogue = bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    p.bias = bias, p.gelu_input = hidden;
    if (products.multiply(p, stream)) return;
    linear_forward(products, hidden, OC, in, w, bias, rows, C, OC, stream);
    gelu_forward(activated, hidden, rows * OC, stream);
}

// w (OC, C) and dout (rows, OC), dout_row elements from one row to the next, as a product's a and
// b.
template <class S>
Product linear_backward_product(S* din, const S* dout, int64_t dout_row, const S* w, int64_t rows,
                                int C, int OC) {
    return {.in = data_type<S>,
            .out = data_type<S>,
            .a_transposed = false,
            .b_transposed = false,
            .m = C,
            .n = rows,
            .k = OC,
            .a = w,
            .b = dout,
            .d = din,
            .lda = C,
            .ldb = dout_row,
            .ldd = C};
}

// din (rows, C) from dout (rows, OC).
template <class S>
void linear_backward_input(Products& products, S* din, const S* dout, int64_t dout_row, const S* w,
                           int64_t rows, int C, int OC, cudaStream_t stream) {
    products.must_multiply(linear_backward_product(din, dout, dout_row, w, rows, C, OC), stream);
}

// The same of a matrix that saw gelu(hidden): dhidden (rows, C) from dout (rows, OC) and hidden
// (rows, C).
template <class S>
void linear_gelu_backward_input(Products& products, S* dhidden, const S* dout, const S* hidden,
                                const S* w, int64_t rows, int C, int OC, cudaStream_t stream) {
    Product p = linear_backward_product(dhidden, dout, OC, w, rows, C, OC);
    p.epilogue = CUBLASLT_EPILOGUE_DGELU;
    p.gelu_input = const_cast<S*>(hidden); // which is only read
    if (products.multiply(p, stream)) return;
    linear_backward_input(products, dhidden, dout, OC, w, rows, C, OC, stream);
    gelu_backward(dhidden, dhidden, hidden, rows * C, stream);
}

// A bias's gradient is summed over the rows of each of so many parts, then over the parts.
inline int bias_parts(int64_t rows) { return int(std::min<int64_t>(64, (rows + 31) / 32)); }
inline int64_t linear_scratch(int64_t rows, int OC) { // floats
    return bias_parts(rows) * int64_t(OC);
}

// partial (gridDim.y, OC): the sum over that part of the rows. A block's 8 warps take every eighth
// row of 256 channels. Moves, per number: that of S.
template <class S>
__global__ static void column_sums_kernel(float* partial, const S* dout, int64_t dout_row,
                                          int64_t rows, int OC) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * 256); // of each warp
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    const int channel = blockIdx.x * 256 + lane * 8;
    const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
    float sum[8] = {};
    if (channel < OC)
#pragma unroll 4
        for (int64_t row = begin + w; row < end; row += 8) {
            float x[8];
            load8(x, dout + row * dout_row + channel);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += x[i];
        }
    store8(sums + w * 256 + lane * 8, sum);
    __syncthreads();
    const int own = blockIdx.x * 256 + threadIdx.x;
    if (own >= OC) return;
    float total = 0;
    for (int other = 0; other < 8; other++) total += sums[other * 256 + threadIdx.x];
    partial[int64_t(blockIdx.y) * OC + own] = total;
}

// gradient[i] += Σ over the parts of partial (parts, row), i < n. 8 warps each take every eighth
// part of 32 numbers.
template <class G>
__global__ static void add_partial_sums_kernel(G* gradient, const float* partial, int parts,
                                               int64_t row, int n) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * warp);
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp, i = blockIdx.x * warp + lane;
    float sum = 0;
    if (i < n)
#pragma unroll 4
        for (int part = w; part < parts; part += 8) sum += partial[part * row + i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (w > 0 || i >= n) return;
    for (int other = 1; other < 8; other++) sum += sums[other * warp + lane];
    gradient[i] = G(float(gradient[i]) + sum);
}

template <class G>
void add_partial_sums(G* gradient, const float* partial, int parts, int64_t row, int n,
                      cudaStream_t stream) {
    launch(add_partial_sums_kernel<G>, blocks_for(n, warp), 8 * warp, shared_bytes<float>(8 * warp),
           stream, gradient, partial, parts, row, n);
}

// Adds to dw (OC, C), and to dbias (OC) if there is one, from dout (rows, OC), dout_row elements
// from one row to the next, and in (rows, C). scratch: linear_scratch(rows, OC) floats if there is
// dbias.
template <class S, class G>
void linear_backward_weight(Products& products, G* dw, G* dbias, const S* dout, int64_t dout_row,
                            const S* in, int64_t rows, int C, int OC, float* scratch,
                            cudaStream_t stream) {
    products.must_multiply({.in = data_type<S>,
                            .out = data_type<G>,
                            .a_transposed = false,
                            .b_transposed = true,
                            .m = C,
                            .n = OC,
                            .k = rows,
                            .a = in,
                            .b = dout,
                            .d = dw,
                            .lda = C,
                            .ldb = dout_row,
                            .ldd = C,
                            .beta = 1},
                           stream);
    if (!dbias) return;
    const int parts = bias_parts(rows);
    launch(column_sums_kernel<S>, dim3(blocks_for(OC, 256), parts), 256,
           shared_bytes<float>(8 * 256), stream, scratch, dout, dout_row, rows, OC);
    add_partial_sums(dbias, scratch, parts, OC, OC, stream);
}

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

// N numbers as floats: 8 at once, or one where more would not be aligned.
template <int N, class X> __device__ inline void load_some(float (&x)[N], const X* at) {
    if constexpr (N == 8)
        load8(x, at);
    else
        x[0] = float(*at);
}
template <int N, class X> __device__ inline void store_some(X* at, const float (&x)[N]) {
    if constexpr (N == 8)
        store8(at, x);
    else
        *at = X(x[0]);
}

// Sums over all threads of a block, in every one, added in the same order always. exchange: (N,
// 32), shared.
template <int N, class X> __device__ inline void block_sums(X (&x)[N], X* exchange) {
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp, warps = blockDim.x / warp;
    for (int n = 0; n < N; n++) x[n] = warp_sum(x[n]);
    __syncthreads(); // whoever read the last sums is done
    if (lane == 0)
        for (int n = 0; n < N; n++) exchange[n * warp + w] = x[n];
    __syncthreads();
    for (int n = 0; n < N; n++) x[n] = warp_sum(lane < warps ? exchange[n * warp + lane] : X(0));
}

// Whole warps, enough for so many units of work, but no more than `most`.
inline int threads_for(int64_t units, int most) {
    return int(std::min<int64_t>(most, blocks_for(units, warp) * int64_t(warp)));
}

// Rotary positions (arXiv 2104.09864) with Hugging Face's pairing: of a head, channel i turns with
// channel i + channels/2. A block has a row, a thread N channels of a first half and their
// partners. Moves, per number of q and k: those of S, once read and once written, and once more
// written where raw is kept.
template <int N, class S, class X>
__global__ static void qk_forward_kernel(S* qkv, const X* in, S* raw, NormStats* stats,
                                         const S* q_weight, const S* k_weight, float eps,
                                         const CosSin* table, AttentionShape a) {
    SharedMemory shared;
    float* exchange = shared.take<float>(2 * warp);
    const int Q = a.q_width(), K = a.kv_width();
    const int half = (a.channels + 1) / 2; // an odd last one has a channel of padding for partner
    const int units = half / N;            // of a head
    const int64_t row = a.first + int64_t(blockIdx.x);
    const X* x = in + int64_t(blockIdx.x) * a.row();
    S* y = qkv + row * a.row();
    if constexpr (!std::is_same_v<S, X>) // v, which is otherwise in its place
        for (int at = Q + K + threadIdx.x * 8; at < a.row(); at += blockDim.x * 8) {
            float v[8];
            load8(v, x + at);
            store8(y + at, v);
        }
    float rstd[2] = {1, 1}; // of q, of k
    if (raw) {
        float squares[2] = {};
        for (int unit = threadIdx.x; unit < (a.NH + a.KVH) * units; unit += blockDim.x) {
            const int head = unit / units, at = head * a.HS + unit % units * N;
            float low[N], high[N], square = 0;
            load_some(low, x + at), load_some(high, x + at + half);
            store_some(raw + row * (Q + K) + at, low);
            store_some(raw + row * (Q + K) + at + half, high);
#pragma unroll
            for (int i = 0; i < N; i++) square += low[i] * low[i] + high[i] * high[i];
            squares[0] += head < a.NH ? square : 0;
            squares[1] += head < a.NH ? 0 : square;
        }
        block_sums(squares, exchange);
        rstd[0] = rsqrtf(squares[0] / float(a.NH * a.channels) + eps);
        rstd[1] = rsqrtf(squares[1] / float(a.KVH * a.channels) + eps);
        if (threadIdx.x < 2) stats[2 * row + threadIdx.x] = {0, threadIdx.x ? rstd[1] : rstd[0]};
    }
    for (int unit = threadIdx.x; unit < (a.NH + a.KVH) * units; unit += blockDim.x) {
        const int head = unit / units, i0 = unit % units * N, at = head * a.HS + i0;
        float low[N], high[N];
        load_some(low, x + at), load_some(high, x + at + half);
        if (raw) {
            const bool is_q = head < a.NH;
            const S* weight = is_q ? q_weight + at : k_weight + at - Q;
            float low_weight[N], high_weight[N];
            load_some(low_weight, weight), load_some(high_weight, weight + half);
#pragma unroll
            for (int i = 0; i < N; i++) {
                low[i] *= (is_q ? rstd[0] : rstd[1]) * low_weight[i];
                high[i] *= (is_q ? rstd[0] : rstd[1]) * high_weight[i];
            }
        }
        if (table) {
            const float* pairs = &table[row % a.T * half + i0].cos; // cos, sin, cos, …
            float turns[2][N];
            load_some(turns[0], pairs), load_some(turns[1], pairs + N);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float cos = turns[2 * i / N][2 * i % N];
                const float sin = turns[(2 * i + 1) / N][(2 * i + 1) % N];
                const float x0 = low[i], x1 = high[i];
                low[i] = x0 * cos - x1 * sin;
                high[i] = x1 * cos + x0 * sin;
            }
        }
        store_some(y + at, low), store_some(y + at + half, high);
    }
}

// What q and k (rows, NH·HS and KVH·HS of a row of qkv) go through between their matrix and
// attention, in place: OLMo 2's RMSNorm over the whole of q and of k, if there is `raw` (rows,
// (NH + KVH)·HS), which keeps what it saw, and stats (rows, 2); then rotary positions, if there is
// a table (T, channels/2). From row `first` on. Channels of padding are 0 and stay so.
template <class S, class X>
void qk_forward(S* qkv, const X* in, S* raw, NormStats* stats, const S* q_weight, const S* k_weight,
                double eps, const CosSin* table, const AttentionShape& a, cudaStream_t stream) {
    if (!raw && !table && std::is_same_v<S, X>) return;
    const bool whole = a.channels % 16 == 0; // both halves are vectors of 8
    const int units = (a.NH + a.KVH) * blocks_for(a.channels, whole ? 16 : 2);
    launch(whole ? qk_forward_kernel<8, S, X> : qk_forward_kernel<1, S, X>,
           unsigned(a.rows() - a.first), threads_for(units, 512), shared_bytes<float>(2 * warp),
           stream, qkv, in, raw, stats, q_weight, k_weight, float(eps), table, a);
}
// In place.
template <class S>
void qk_forward(S* qkv, S* raw, NormStats* stats, const S* q_weight, const S* k_weight, double eps,
                const CosSin* table, const AttentionShape& a, cudaStream_t stream) {
    qk_forward(qkv, static_cast<const S*>(qkv + int64_t(a.first) * a.row()), raw, stats, q_weight,
               k_weight, eps, table, a, stream);
}

// The norm's, in place on dqkv's q and k. Blocks take every so many rows, and add up the weights'
// gradients of all of theirs: partial (gridDim.x, Q + K). With g = w ⊙ dy:
// dx = rstd · (g − x̂ · mean(g ⊙ x̂)). Moves, per number of q and k: those of S, twice read and once
// written.
template <int N, class S>
__global__ static void qk_norm_backward_kernel(S* dqkv, const S* raw, const NormStats* stats,
                                               const S* q_weight, const S* k_weight, float* partial,
                                               AttentionShape a) {
    SharedMemory shared;
    const int Q = a.q_width(), width = Q + a.kv_width();
    float* exchange = shared.take<float>(2 * warp);
    float* sums = shared.take<float>(width); // of dw: each thread its own channels
    for (int i = threadIdx.x; i < width; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    const int units = a.channels / N; // of a head
    for (int64_t row = blockIdx.x; row < a.rows(); row += gridDim.x) {
        S* dy = dqkv + row * a.row();
        const S* x = raw + row * width;
        const float rstd[2] = {stats[2 * row].rstd, stats[2 * row + 1].rstd};
        float dots[2] = {};
        for (int unit = threadIdx.x; unit < (a.NH + a.KVH) * units; unit += blockDim.x) {
            const int head = unit / units, at = head * a.HS + unit % units * N;
            const bool is_q = head < a.NH;
            float d[N], value[N], weight[N], dot = 0;
            load_some(d, dy + at), load_some(value, x + at);
            load_some(weight, is_q ? q_weight + at : k_weight + at - Q);
#pragma unroll
            for (int i = 0; i < N; i++) {
                dot += weight[i] * d[i] * value[i];
                d[i] *= value[i] * (is_q ? rstd[0] : rstd[1]);
            }
            if constexpr (N == 8)
                add_to_sums(sums, d, at, width);
            else
                sums[place_of_sum(at, width)] += d[0];
            dots[0] += is_q ? dot : 0;
            dots[1] += is_q ? 0 : dot;
        }
        block_sums(dots, exchange);
        for (int n = 0; n < 2; n++)
            dots[n] *= rstd[n] * rstd[n] / float((n == 0 ? a.NH : a.KVH) * a.channels);
        for (int unit = threadIdx.x; unit < (a.NH + a.KVH) * units; unit += blockDim.x) {
            const int head = unit / units, at = head * a.HS + unit % units * N;
            const bool is_q = head < a.NH;
            float d[N], value[N], weight[N];
            load_some(d, dy + at), load_some(value, x + at);
            load_some(weight, is_q ? q_weight + at : k_weight + at - Q);
#pragma unroll
            for (int i = 0; i < N; i++)
                d[i] = (is_q ? rstd[0] : rstd[1]) *
                       (weight[i] * d[i] - value[i] * (is_q ? dots[0] : dots[1]));
            store_some(dy + at, d);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        partial[int64_t(blockIdx.x) * width + i] = sums[place_of_sum(i, width)];
}

inline int qk_norm_parts(const AttentionShape& a) { return int(std::min<int64_t>(512, a.rows())); }
inline int64_t qk_norm_scratch(const AttentionShape& a) { // floats
    return int64_t(qk_norm_parts(a)) * (a.q_width() + a.kv_width());
}

// dqkv (rows, row) from the gradient of what the norm gave to that of what it saw; adds to
// dq_weight (NH·HS) and dk_weight (KVH·HS). scratch: qk_norm_scratch(a) floats.
template <class S, class G>
void qk_norm_backward(S* dqkv, const S* raw, const NormStats* stats, const S* q_weight,
                      const S* k_weight, G* dq_weight, G* dk_weight, float* scratch,
                      const AttentionShape& a, cudaStream_t stream) {
    const int Q = a.q_width(), K = a.kv_width(), parts = qk_norm_parts(a);
    const bool whole = a.channels % 8 == 0;
    const int units = (a.NH + a.KVH) * (a.channels / (whole ? 8 : 1));
    launch(whole ? qk_norm_backward_kernel<8, S> : qk_norm_backward_kernel<1, S>, parts,
           threads_for(units, 512), shared_bytes<float>(2 * warp) + shared_bytes<float>(Q + K),
           stream, dqkv, raw, stats, q_weight, k_weight, scratch, a);
    add_partial_sums(dq_weight, scratch, parts, Q + K, Q, stream);
    add_partial_sums(dk_weight, scratch + Q, parts, Q + K, K, stream);
}

// FlashAttention-2 (arXiv 2307.08691): a block of 4 warps holds the rows of one tile of queries (or
// keys, in the backward pass) and goes through the tiles of keys (queries) that they see, two in
// shared memory at a time: one to compute with, one on its way. The scores exist a tile at a time,
// in registers. What follows are its tiles, with three verbs: load, multiply, store.

const int attention_warps = 4, attention_threads = attention_warps * warp;

// Rows of D numbers in shared memory, moved in chunks of 16 bytes. ldmatrix reads the same chunk of
// 8 rows at once: those of bf16 are permuted within a row, by the row's number, so that the 8 lie
// in different banks. Rows of float are padded for the same end.
template <class S, int D> struct Tile {
    static constexpr int per_chunk = 16 / sizeof(S);
    static constexpr int stride = sizeof(S) == 2 ? D : D + per_chunk;
    static __host__ __device__ constexpr int size(int rows) { return rows * stride; }

    S* at;

    __device__ S* chunk(int row, int c) const {
        const int place = sizeof(S) == 2 ? (c & ~7) | ((c ^ row) & 7) : c;
        return at + row * stride + place * per_chunk;
    }
    __device__ Tile from_row(int row) const { return {at + row * stride}; } // a multiple of 8

    // Begins to copy ROWS rows from memory. What is not among the first `rows` of them, or the
    // first `columns` of a row, becomes 0.
    template <int ROWS>
    __device__ void load(const S* from, int from_stride, int rows, int columns) const {
        const int chunks = D / per_chunk, rows_at_once = attention_threads / chunks;
        static_assert(ROWS % rows_at_once == 0 && (rows_at_once % 8 == 0 || sizeof(S) > 2));
        const int first = threadIdx.x / chunks, c = threadIdx.x % chunks;
        const S* mine = from + first * from_stride + c * per_chunk;
        if (c * per_chunk >= columns) rows = 0;
#pragma unroll
        for (int row = 0; row < ROWS; row += rows_at_once)
            copy_async(from_row(row).chunk(first, c), mine + row * from_stride, first + row < rows);
    }
};

// Cuts a block's shared memory into tiles.
template <class S> struct TileMemory {
    S* at;
    template <int D> __device__ Tile<S, D> take(int rows) {
        const Tile<S, D> tile = {at};
        at += Tile<S, D>::size(rows);
        return tile;
    }
};

// 16·M rows of N sums, a warp's own, in its lanes' registers as mma leaves them.
template <int M, int N> struct Sums {
    float x[M][N / 8][4];

    static __device__ int row(int m, int e) { return 16 * m + e / 2 * 8 + threadIdx.x % warp / 4; }
    static __device__ int column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }
};

// Over the 4 lanes that have a row, in each of them.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

template <int M, int N> __device__ inline void scale_sums(Sums<M, N>& sums, float factor) {
#pragma unroll
    for (int i = 0; i < M * N / 2; i++) sums.x[i / 4 / (N / 8)][i / 4 % (N / 8)][i % 4] *= factor;
}

// The left factor of a product: rows of a tile, from `row` on, read when they are needed …
template <class S, int D> struct TileRows {
    static constexpr int columns = D;
    Tile<S, D> tile;
    int row;

    __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
        const int lane = threadIdx.x % warp;
        ldmatrix(a, tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16));
    }
};
// … or 16·M rows of bf16 in registers, as mma takes them.
template <int M, int K> struct Fragments {
    static constexpr int columns = K;
    uint32_t x[M][K / 16][4];

    __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = x[m][k][i];
    }
};

// Rows of a tile, read into registers now if they are to be HELD there.
template <bool HELD, int M, class S, int D>
__device__ inline auto left_factor(Tile<S, D> tile, int row) {
    const TileRows<S, D> rows = {tile, row};
    if constexpr (HELD) {
        Fragments<M, D> held;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < D / 16; k++) rows.fragment(held.x[m][k], m, k);
        return held;
    } else {
        return rows;
    }
}

// Sums, rounded: two neighbours of 8 columns are the fragment of 16 that they need to be. float
// goes by way of `scratch`, a tile of the warp's own.
template <int M, int N>
__device__ inline Fragments<M, N> left_factor(const Sums<M, N>& sums, Tile<bf16, N>) {
    Fragments<M, N> rounded;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = sums.x[m][2 * k + i / 2] + i % 2 * 2;
                rounded.x[m][k][i] = pack_bf16(pair[0], pair[1]);
            }
    return rounded;
}
template <int M, int N>
__device__ inline TileRows<float, N> left_factor(const Sums<M, N>& sums, Tile<float, N> scratch) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                scratch.at[sums.row(m, e) * scratch.stride + sums.column(n, e)] = sums.x[m][n][e];
    __syncwarp();
    return {scratch, 0};
}

// sums += left · rightᵀ, of N rows of right.
template <int M, int N, class Left, int D>
__device__ inline void multiply_transposed(Sums<M, N>& sums, const Left& left,
                                           Tile<bf16, D> right) {
    const int lane = threadIdx.x % warp;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.fragment(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4]; // 16 rows, 16 columns
            ldmatrix(b, right.chunk(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(sums.x[m][n], a[m], b[0], b[1]);
                mma(sums.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
template <int M, int N, int D>
__device__ inline void multiply_transposed(Sums<M, N>& sums, const TileRows<float, D>& left,
                                           Tile<float, D> right) {
    const int stride = right.stride;
    for (int k = 0; k < D; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sums.x[m][n][e] += left.tile.at[(left.row + sums.row(m, e)) * stride + k] *
                                       right.at[sums.column(n, e) * stride + k];
}

// sums += left · right, of as many rows of right as left has columns.
template <int M, int N, class Left>
__device__ inline void multiply(Sums<M, N>& sums, const Left& left, Tile<bf16, N> right) {
    const int lane = threadIdx.x % warp;
#pragma unroll
    for (int k = 0; k < Left::columns / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.fragment(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4]; // 16 rows, 16 columns
            ldmatrix_transposed(b, right.chunk(16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(sums.x[m][n], a[m], b[0], b[1]);
                mma(sums.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
template <int M, int N, int K>
__device__ inline void multiply(Sums<M, N>& sums, const TileRows<float, K>& left,
                                Tile<float, N> right) {
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sums.x[m][n][e] +=
                        left.tile.at[(left.row + sums.row(m, e)) * left.tile.stride + k] *
                        right.at[k * right.stride + sums.column(n, e)];
}

// Where a warp's sums become rows of memory, 16 at a time: floats of its own, padded for the banks.
template <int D> const int store_stride = D + 8;
template <int D> const int store_size = attention_warps * 16 * store_stride<D>;

// The first `rows` rows of sums, `columns` of each, to memory. If there is a table, from the first
// row's cos and sin on: turned back by it, channel i with channel i + channels/2.
template <class S, int M, int D>
__device__ inline void store(S* to, int64_t stride, int rows, int columns, const Sums<M, D>& sums,
                             float* memory, const CosSin* table = nullptr, int channels = 0) {
    const int half = channels / 2, chunks = D / 8;
    float* own = memory + threadIdx.x / warp * 16 * store_stride<D>;
#pragma unroll
    for (int m = 0; m < M; m++) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<float2*>(own + sums.row(0, e) * store_stride<D> +
                                           sums.column(n, e)) =
                    make_float2(sums.x[m][n][e], sums.x[m][n][e + 1]);
        __syncwarp();
        for (int i = threadIdx.x % warp; i < 16 * chunks; i += warp) {
            const int row = 16 * m + i / chunks, column = i % chunks * 8;
            if (row >= rows || column >= columns) continue;
            const float* from = own + i / chunks * store_stride<D>;
            float x[8];
            load8(x, from + column);
            for (int j = 0; j < 8 && table; j++) {
                const int channel = column + j;
                if (channel >= channels) break;
                const bool first = channel < half;
                const CosSin turn = table[int64_t(row) * half + (first ? channel : channel - half)];
                x[j] = x[j] * turn.cos +
                       (first ? from[channel + half] : -from[channel - half]) * turn.sin;
            }
            store8(to + row * stride + column, x);
        }
    }
}

// How much a warp has at once: 16·M rows of its own, STEP of the others, and whether its own are
// HELD in registers (those of keys and values, in the backward pass, are not). Chosen so that
// nothing spills and two blocks or more fit on a multiprocessor.
template <class S, int D> struct AttentionTiles { // float
    static constexpr int step = D == 64 ? 32 : 8;
    static constexpr int forward_m = 1, forward_step = step, dq_m = 1, dq_step = step, dkv_m = 1,
                         dkv_step = step;
    static constexpr bool forward_held = false, dq_held = false;
};
template <> struct AttentionTiles<bf16, 64> {
    static constexpr int forward_m = 2, forward_step = 64, dq_m = 2, dq_step = 32, dkv_m = 2,
                         dkv_step = 32;
    static constexpr bool forward_held = true, dq_held = true;
};
template <> struct AttentionTiles<bf16, 128> {
    static constexpr int forward_m = 2, forward_step = 32, dq_m = 1, dq_step = 32, dkv_m = 1,
                         dkv_step = 32;
    static constexpr bool forward_held = false, dq_held = true;
};

// Which tile of which head (of b · heads + h) a block has. Blocks begin in the order of their
// numbers: heads come in groups that fit into L2 together, and of a group first all tiles with the
// most work.
struct Turn {
    int tile, head;

    __device__ Turn(int tiles, int heads, int heads_at_once) {
        const int group = blockIdx.x / (tiles * heads_at_once);
        const int i = blockIdx.x % (tiles * heads_at_once);
        const int here = min(heads_at_once, heads - group * heads_at_once);
        tile = i / here, head = group * heads_at_once + i % here;
    }
};
// bytes_each: what all blocks of a head read.
inline int heads_that_fit(int heads, int64_t bytes_each) {
    return int(std::clamp<int64_t>((int64_t(16) << 20) / bytes_each, 1, heads));
}

inline void check_head_size(const AttentionShape& a) {
    if (a.HS > 128)
        fail("attention on a GPU has heads of at most 128 channels, this model's have " +
             std::to_string(a.channels) + ": train it with more heads, or with --device cpu");
}

// Numbers of a block's shared memory: tiles of `tiles` rows in all, with room for what stores, and
// in float each warp's scratch (in bf16 none, but one is asked for).
template <class S, int D> __host__ __device__ constexpr int attention_tile_numbers(int tiles) {
    const int to_store = store_size<D> * int(sizeof(float) / sizeof(S));
    return Tile<S, D>::size(tiles) > to_store ? Tile<S, D>::size(tiles) : to_store;
}
template <class S, int M, int STEP>
constexpr int attention_scratch = sizeof(S) == 2 ? 0
                                                 : Tile<S, STEP>::size(16 * M) * attention_warps;
template <int M, class S, int STEP> __device__ inline Tile<S, STEP> own_scratch(S* scratch) {
    return {scratch + attention_scratch<S, M, STEP> / attention_warps * (threadIdx.x / warp)};
}

const float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// A row's exponentials are 2^(c (score − reference)). The reference is the largest score so far,
// or has been: it follows, and what was summed is scaled, once a score exceeds it by a factor of
// 2⁸. That is exact all the same, and rarely happens.
template <int M> struct OnlineSoftmax {
    float reference[M][2], sum[M][2];

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int i = 0; i < 2 * M; i++) reference[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0;
    }

    // The scores s become exponentials. o: what those so far have weighted.
    template <int N, int D> __device__ void step(Sums<M, N>& s, Sums<M, D>& o, float c) {
        float largest[M][2];
        bool outgrown = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = -INFINITY;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
                    x = fmaxf(x, fmaxf(s.x[m][n][2 * i], s.x[m][n][2 * i + 1]));
                largest[m][i] = quad_max(x);
                outgrown |= c * (largest[m][i] - reference[m][i]) > 8;
            }
        if (__any_sync(0xFFFFFFFFu, outgrown)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float next = fmaxf(reference[m][i], largest[m][i]);
                    const float factor = fast_exp2(c * (reference[m][i] - next));
                    reference[m][i] = next, sum[m][i] *= factor;
#pragma unroll
                    for (int n = 0; n < D / 8; n++)
                        o.x[m][n][2 * i] *= factor, o.x[m][n][2 * i + 1] *= factor;
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float& x = s.x[m][n][e];
                    x = fast_exp2(c * x - c * reference[m][e / 2]);
                    sum[m][e / 2] += x;
                }
    }

    // o becomes the mean, lse (of the warp's first row) the logarithm of each row's denominator.
    template <int D> __device__ void finish(Sums<M, D>& o, float* lse, int rows, float c) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = quad_sum(sum[m][i]);
                const int row = o.row(m, 2 * i);
                if (threadIdx.x % 4 == 0 && row < rows)
                    lse[row] = ln_2 * (c * reference[m][i] + fast_log2(x));
                const float inverse = 1.0f / x;
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    o.x[m][n][2 * i] *= inverse, o.x[m][n][2 * i + 1] *= inverse;
            }
    }
};

// Scores whose (row, column) is `hidden` become −∞: a probability of 0.
template <int M, int N, class Hidden>
__device__ inline void hide(Sums<M, N>& s, const Hidden& hidden) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (hidden(s.row(m, e), s.column(n, e))) s.x[m][n][e] = -INFINITY;
}

template <class S, int D, int M, int STEP, bool HELD>
__global__ static void __launch_bounds__(attention_threads)
    attention_forward_kernel(S* out, float* lse, const S* qkv, AttentionShape a,
                             int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* numbers = shared.take<S>(attention_tile_numbers<S, D>(ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    TileMemory<S> memory = {numbers};
    const auto q_tile = memory.template take<D>(ROWS);
    const auto k_tiles = memory.template take<D>(2 * STEP);
    const auto v_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T - a.first + ROWS - 1) / ROWS;
    const Turn turn(tiles, a.B * a.NH, heads_at_once);
    const int b = turn.head / a.NH, h = turn.head % a.NH, kv = h / (a.NH / a.KVH);
    const S* rows = qkv + int64_t(b * a.T) * a.row();
    const S* keys = rows + (a.NH + kv) * a.HS;
    const int t0 = a.first + (tiles - 1 - turn.tile) * ROWS, seen = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    auto load = [&](int key, int place) {
        const S* row = keys + int64_t(key) * a.row();
        k_tiles.from_row(place).template load<STEP>(row, a.row(), a.T - key, a.HS);
        v_tiles.from_row(place).template load<STEP>(row + a.kv_width(), a.row(), a.T - key, a.HS);
        copy_async_commit();
    };
    q_tile.template load<ROWS>(rows + int64_t(t0) * a.row() + h * a.HS, a.row(), a.T - t0, a.HS);
    copy_async_commit();
    load(0, 0);
    copy_async_wait<1>();
    __syncthreads();
    const auto q = left_factor<HELD, M>(q_tile, warp_row);

    const float c = a.scale() * log2_e;
    Sums<M, D> o = {};
    OnlineSoftmax<M> softmax;
    for (int key = 0, place = 0; key < seen; key += STEP, place ^= STEP) {
        copy_async_wait<0>();
        __syncthreads(); // the tile is there, and nobody reads the one before it any more
        if (key + STEP < seen) load(key + STEP, place ^ STEP);
        if (t >= a.T || key >= t + 16 * M) continue; // nothing that this warp's rows see
        const auto k = k_tiles.from_row(place);
        const auto v = v_tiles.from_row(place);
        Sums<M, STEP> s = {};
        multiply_transposed(s, q, k);
        if (key + STEP > t + 1)
            hide(s, [=](int row, int column) { return key + column > t + row; });
        softmax.step(s, o, c);
        multiply(o, left_factor(s, own_scratch<M, S, STEP>(scratch)), v);
    }
    softmax.finish(o, lse + int64_t(b * a.NH + h) * a.T + t, a.T - t, c);
    __syncthreads();
    store(out + int64_t(b * a.T + t) * a.q_width() + h * a.HS, a.q_width(), a.T - t, a.HS, o,
          reinterpret_cast<float*>(numbers));
}

template <class S, int D>
void attention_forward_tiles(S* out, float* lse, const S* qkv, const AttentionShape& a,
                             cudaStream_t stream) {
    using Tiles = AttentionTiles<S, D>;
    const int M = Tiles::forward_m, STEP = Tiles::forward_step;
    const int ROWS = attention_warps * 16 * M, group = a.NH / a.KVH, heads = a.B * a.NH;
    const size_t shared = shared_bytes<S>(attention_tile_numbers<S, D>(ROWS + 4 * STEP)) +
                          shared_bytes<S>(attention_scratch<S, M, STEP>);
    launch(attention_forward_kernel<S, D, M, STEP, Tiles::forward_held>,
           blocks_for(a.T - a.first, ROWS) * heads, attention_threads, shared, stream, out, lse,
           qkv, a, heads_that_fit(heads, 2 * int64_t(sizeof(S)) * a.T * a.HS / group));
}

#include "gpt/cuda/attention_hopper.cuh"

// Hopper has instructions of its own for this (wgmma, TMA), which are taken where they can serve:
// in llama-130m on 64 x 1,024 tokens attention took 20.9 ms of a step on an H200, by mma 29.2 ms.
// LNS_ATTENTION=mma leaves them out, which the other GPUs have to.
inline bool hopper_wanted() {
    static const bool wanted = [] {
        const char* set = std::getenv("LNS_ATTENTION");
        const std::string name = set ? set : "hopper";
        if (name != "mma" && name != "hopper")
            fail("LNS_ATTENTION is '", name, "' in the environment: expected hopper or mma");
        return name == "hopper";
    }();
    return wanted;
}

// out (B, T, NH·HS) = softmax(q kᵀ · scale) v, causal: position t sees 0 … t. Keeps lse (B, NH, T),
// the logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, float* lse, const S* qkv, const AttentionShape& a,
                       cudaStream_t stream) {
    check_head_size(a);
    if constexpr (std::is_same_v<S, bf16>)
        if (hopper_wanted() && hopper_attention_forward(out, lse, qkv, a, stream)) return;
    if (a.HS <= 64)
        attention_forward_tiles<S, 64>(out, lse, qkv, a, stream);
    else
        attention_forward_tiles<S, 128>(out, lse, qkv, a, stream);
}

// dO · O of a warp's 16·M rows, to shared memory.
template <int M, int D, class S>
__device__ inline void output_dot(float* dots, const S* dout, const S* out, int64_t stride,
                                  int rows, int columns) {
    const int lanes = D / 8, lane = threadIdx.x % warp; // so many have a row
#pragma unroll
    for (int i = 0; i < 16 * M; i += warp / lanes) {
        const int row = i + lane / lanes, column = lane % lanes * 8;
        float sum = 0;
        if (row < rows && column < columns) {
            float x[8], dx[8];
            load8(x, out + row * stride + column);
            load8(dx, dout + row * stride + column);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += x[j] * dx[j];
        }
#pragma unroll
        for (int offset = lanes / 2; offset > 0; offset /= 2)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
        if (column == 0) dots[row] = sum;
    }
}

template <class S, int D, int M, int STEP, bool HELD>
__global__ static void __launch_bounds__(attention_threads)
    attention_dq_kernel(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                        const CosSin* table, float* delta, AttentionShape a, int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* numbers = shared.take<S>(attention_tile_numbers<S, D>(2 * ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    float* dots = shared.take<float>(ROWS);
    TileMemory<S> memory = {numbers};
    const auto q_tile = memory.template take<D>(ROWS), do_tile = memory.template take<D>(ROWS);
    const auto k_tiles = memory.template take<D>(2 * STEP);
    const auto v_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T + ROWS - 1) / ROWS;
    const Turn turn(tiles, a.B * a.NH, heads_at_once);
    const int b = turn.head / a.NH, h = turn.head % a.NH, kv = h / (a.NH / a.KVH);
    const S* rows = qkv + int64_t(b * a.T) * a.row();
    const S* keys = rows + (a.NH + kv) * a.HS;
    const int t0 = (tiles - 1 - turn.tile) * ROWS, seen = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    const int64_t at = int64_t(turn.head) * a.T;                         // in lse and delta
    const int64_t o_at = int64_t(b) * a.T * a.q_width() + h * a.HS;      // in out and dout
    auto load = [&](int key, int place) {
        const S* row = keys + int64_t(key) * a.row();
        k_tiles.from_row(place).template load<STEP>(row, a.row(), a.T - key, a.HS);
        v_tiles.from_row(place).template load<STEP>(row + a.kv_width(), a.row(), a.T - key, a.HS);
        copy_async_commit();
    };
    q_tile.template load<ROWS>(rows + int64_t(t0) * a.row() + h * a.HS, a.row(), a.T - t0, a.HS);
    do_tile.template load<ROWS>(dout + o_at + int64_t(t0) * a.q_width(), a.q_width(), a.T - t0,
                                a.HS);
    copy_async_commit();
    load(0, 0);
    output_dot<M, D>(dots + warp_row, dout + o_at + int64_t(t) * a.q_width(),
                     out + o_at + int64_t(t) * a.q_width(), a.q_width(), a.T - t, a.HS);
    copy_async_wait<1>();
    __syncthreads();
    const auto q = left_factor<HELD, M>(q_tile, warp_row);
    const auto dO = left_factor<HELD, M>(do_tile, warp_row);

    const float c = a.scale() * log2_e;
    Sums<M, D> dq = {};
    float row_lse[M][2], dot[M][2], sum[M][2]; // lse in base 2; of a row of dS
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = dq.row(i / 2, i % 2 * 2);
        row_lse[i / 2][i % 2] = t + row < a.T ? log2_e * lse[at + t + row] : INFINITY;
        dot[i / 2][i % 2] = dots[warp_row + row], sum[i / 2][i % 2] = 0;
    }
    for (int key = 0, place = 0; key < seen; key += STEP, place ^= STEP) {
        copy_async_wait<0>();
        __syncthreads();
        if (key + STEP < seen) load(key + STEP, place ^ STEP);
        if (t >= a.T || key >= t + 16 * M) continue;
        const auto k = k_tiles.from_row(place);
        const auto v = v_tiles.from_row(place);
        Sums<M, STEP> s = {}, ds = {};
        multiply_transposed(s, q, k);
        multiply_transposed(ds, dO, v); // dP as yet
        if (key + STEP > t + 1)
            hide(s, [=](int row, int column) { return key + column > t + row; });
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float p = fast_exp2(c * s.x[m][n][e] - row_lse[m][e / 2]);
                    ds.x[m][n][e] = p * (ds.x[m][n][e] - dot[m][e / 2]);
                    sum[m][e / 2] += ds.x[m][n][e];
                }
        multiply(dq, left_factor(ds, own_scratch<M, S, STEP>(scratch)), k);
    }
    // A row of dS should add up to 0: what it adds up to, O's rounding has taken from dO · O.
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = dq.row(i / 2, i % 2 * 2);
        const float exact = dot[i / 2][i % 2] + quad_sum(sum[i / 2][i % 2]);
        if (threadIdx.x % 4 == 0 && t + row < a.T) delta[at + t + row] = exact;
    }
    __syncthreads();
    scale_sums(dq, a.scale());
    store(dqkv + int64_t(b * a.T + t) * a.row() + h * a.HS, a.row(), a.T - t, a.HS, dq,
          reinterpret_cast<float*>(numbers), table ? table + int64_t(t) * (a.channels / 2) : table,
          a.channels);
}

// The same transposed: a block has a tile of keys, and goes through the queries that see them.
template <class S, int D, int M, int STEP>
__global__ static void __launch_bounds__(attention_threads)
    attention_dkv_kernel(S* dqkv, const S* dout, const S* qkv, const float* lse,
                         const CosSin* table, const float* delta, AttentionShape a,
                         int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* numbers = shared.take<S>(attention_tile_numbers<S, D>(2 * ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    float* lses = shared.take<float>(2 * STEP);
    float* dots = shared.take<float>(2 * STEP);
    TileMemory<S> memory = {numbers};
    const auto k_tile = memory.template take<D>(ROWS), v_tile = memory.template take<D>(ROWS);
    const auto q_tiles = memory.template take<D>(2 * STEP);
    const auto do_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T + ROWS - 1) / ROWS, group = a.NH / a.KVH;
    const Turn turn(tiles, a.B * a.KVH, heads_at_once);
    const int b = turn.head / a.KVH, kv = turn.head % a.KVH;
    const int key0 = turn.tile * ROWS;
    const int warp_row = threadIdx.x / warp * 16 * M, key = key0 + warp_row;
    int next_h = kv * group, next_t = key0; // the tile of queries that is on its way
    auto load = [&](int place) {
        const int64_t row = b * a.T + next_t;
        const S* q = qkv + row * a.row() + next_h * a.HS;
        const S* dO = dout + row * a.q_width() + next_h * a.HS;
        q_tiles.from_row(place).template load<STEP>(q, a.row(), a.T - next_t, a.HS);
        do_tiles.from_row(place).template load<STEP>(dO, a.q_width(), a.T - next_t, a.HS);
        const int t = next_t + threadIdx.x;
        const int64_t at = int64_t(b * a.NH + next_h) * a.T + t;
        if (threadIdx.x < STEP) { // beyond T zeros do: q and dO are 0, too
            copy_async<sizeof(float)>(lses + place + threadIdx.x, lse + at, t < a.T);
            copy_async<sizeof(float)>(dots + place + threadIdx.x, delta + at, t < a.T);
        }
        copy_async_commit();
    };
    const S* kv_rows = qkv + int64_t(b * a.T + key0) * a.row() + (a.NH + kv) * a.HS;
    k_tile.template load<ROWS>(kv_rows, a.row(), a.T - key0, a.HS);
    v_tile.template load<ROWS>(kv_rows + a.kv_width(), a.row(), a.T - key0, a.HS);
    copy_async_commit();
    load(0);
    copy_async_wait<1>();
    __syncthreads();
    const auto k = left_factor<false, M>(k_tile, warp_row);
    const auto v = left_factor<false, M>(v_tile, warp_row);

    const float c = a.scale() * log2_e;
    Sums<M, D> dk = {}, dv = {};
    bool more = true;
    for (int place = 0; more; place ^= STEP) {
        const int t = next_t;
        copy_async_wait<0>();
        __syncthreads();
        next_t += STEP;
        if (next_t >= a.T) next_t = key0, next_h++;
        more = next_h < (kv + 1) * group;
        if (more) load(place ^ STEP);
        if (key >= a.T || t + STEP <= key) continue; // no query that sees this warp's keys
        const auto q = q_tiles.from_row(place), dO = do_tiles.from_row(place);
        Sums<M, STEP> p = {}, ds = {}; // (keys, queries); scores and dP as yet
        multiply_transposed(p, k, q);
        multiply_transposed(ds, v, dO);
        if (t + 1 < key + 16 * M)
            hide(p, [=](int row, int column) { return t + column < key + row; });
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int query = p.column(n, e);
                    float& x = p.x[m][n][e];
                    x = fast_exp2(c * x - log2_e * lses[place + query]);
                    ds.x[m][n][e] = x * (ds.x[m][n][e] - dots[place + query]);
                }
        const auto own = own_scratch<M, S, STEP>(scratch);
        multiply(dv, left_factor(p, own), dO);
        multiply(dk, left_factor(ds, own), q);
    }
    __syncthreads();
    scale_sums(dk, a.scale());
    S* drows = dqkv + int64_t(b * a.T + key) * a.row() + (a.NH + kv) * a.HS;
    store(drows, a.row(), a.T - key, a.HS, dk, reinterpret_cast<float*>(numbers),
          table ? table + int64_t(key) * (a.channels / 2) : table, a.channels);
    store(drows + a.kv_width(), a.row(), a.T - key, a.HS, dv, reinterpret_cast<float*>(numbers));
}

template <class S, int D>
void attention_backward_tiles(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                              const CosSin* table, float* delta, const AttentionShape& a,
                              cudaStream_t stream) {
    using Tiles = AttentionTiles<S, D>;
    const int group = a.NH / a.KVH;
    const int64_t head_bytes = 2 * int64_t(sizeof(S)) * a.T * a.HS; // k and v, or q and dout
    {
        const int M = Tiles::dq_m, STEP = Tiles::dq_step, ROWS = attention_warps * 16 * M;
        const int heads = a.B * a.NH;
        const size_t shared = shared_bytes<S>(attention_tile_numbers<S, D>(2 * ROWS + 4 * STEP)) +
                              shared_bytes<S>(attention_scratch<S, M, STEP>) +
                              shared_bytes<float>(ROWS);
        launch(attention_dq_kernel<S, D, M, STEP, Tiles::dq_held>, blocks_for(a.T, ROWS) * heads,
               attention_threads, shared, stream, dqkv, dout, out, qkv, lse, table, delta, a,
               heads_that_fit(heads, head_bytes / group));
    }
    {
        const int M = Tiles::dkv_m, STEP = Tiles::dkv_step, ROWS = attention_warps * 16 * M;
        const int heads = a.B * a.KVH;
        const size_t shared = shared_bytes<S>(attention_tile_numbers<S, D>(2 * ROWS + 4 * STEP)) +
                              shared_bytes<S>(attention_scratch<S, M, STEP>) +
                              2 * shared_bytes<float>(2 * STEP);
        launch(attention_dkv_kernel<S, D, M, STEP>, blocks_for(a.T, ROWS) * heads,
               attention_threads, shared, stream, dqkv, dout, qkv, lse, table, delta, a,
               heads_that_fit(heads, head_bytes * group));
    }
}

// dqkv (B, T, row) from dout (B, T, NH·HS); where there is a table (T, channels/2), of what was
// rotated by it. With P the softmax and O the output, of a query: dP = dO Vᵀ; dS = P ⊙ (dP − dO ·
// O); dQ = dS K · scale; dK = dSᵀ Q · scale; dV = Pᵀ dO. delta (B, NH, T): scratch, dO · O. Scores
// are computed twice, once for dQ and once for dK and dV, so that every sum is one warp's alone.
template <class S>
void attention_backward(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                        const CosSin* table, float* delta, const AttentionShape& a,
                        cudaStream_t stream) {
    check_head_size(a);
    if constexpr (std::is_same_v<S, bf16>)
        if (hopper_wanted() &&
            hopper_attention_backward(dqkv, dout, out, qkv, lse, table, delta, a, stream))
            return;
    if (a.HS <= 64)
        attention_backward_tiles<S, 64>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
    else
        attention_backward_tiles<S, 128>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
}

// ---------------------------------------------------------------------------------------------
// The MLP's activations: h (rows, H) → a (rows, H)

// GELU in its tanh form (arXiv 1606.08415): x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
// With s = sigmoid(2 · the argument), that is x · s.
const float gelu_slope = 2 * 0.79788456080286535588f;

// Moves, per number: those of S, once read and once written.
template <class S> __global__ static void gelu_forward_kernel(S* out, const S* h, int64_t n) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    float x[8];
    load8(x, h + at);
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] *= sigmoid(gelu_slope * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    store8(out + at, x);
}

template <class S> void gelu_forward(S* out, const S* h, int64_t n, cudaStream_t stream) {
    launch(gelu_forward_kernel<S>, blocks_for(n, 256 * 8), 256, 0, stream, out, h, n);
}

// dh may be da. Moves, per number: those of S, twice read and once written.
template <class S>
__global__ static void gelu_backward_kernel(S* dh, const S* da, const S* h, int64_t n) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    float d[8], value[8];
    load8(d, da + at), load8(value, h + at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float x = value[i];
        const float s = sigmoid(gelu_slope * (x + 0.044715f * x * x * x));
        d[i] *= s + x * s * (1 - s) * gelu_slope * (1 + 3 * 0.044715f * x * x);
    }
    store8(dh + at, d);
}

template <class S>
void gelu_backward(S* dh, const S* da, const S* h, int64_t n, cudaStream_t stream) {
    launch(gelu_backward_kernel<S>, blocks_for(n, 256 * 8), 256, 0, stream, dh, da, h, n);
}

// SwiGLU (arXiv 2002.05202): a row of h is gate (H), up (H); a = silu(gate) ⊙ up.
// Moves, per number of out: those of S, twice read and once written.
template <class S> __global__ static void swiglu_forward_kernel(S* out, const S* h, int H) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (channel >= H) return;
    const int64_t row = blockIdx.x;
    float gate[8], up[8];
    load8(gate, h + row * 2 * H + channel), load8(up, h + row * 2 * H + H + channel);
#pragma unroll
    for (int i = 0; i < 8; i++) up[i] *= gate[i] * sigmoid(gate[i]);
    store8(out + row * H + channel, up);
}

template <class S>
void swiglu_forward(S* out, const S* h, int64_t rows, int H, cudaStream_t stream) {
    launch(swiglu_forward_kernel<S>, dim3(unsigned(rows), blocks_for(H, 128 * 8)), 128, 0, stream,
           out, h, H);
}

// Moves, per number of da: those of S, three times read and twice written.
template <class S>
__global__ static void swiglu_backward_kernel(S* dh, const S* da, const S* h, int H) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (channel >= H) return;
    const int64_t row = blockIdx.x, at = row * 2 * H + channel;
    float d[8], gate[8], up[8];
    load8(d, da + row * H + channel), load8(gate, h + at), load8(up, h + at + H);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float g = gate[i], s = sigmoid(g);
        gate[i] = d[i] * up[i] * s * (1 + g * (1 - s)); // now their gradients
        up[i] = d[i] * g * s;
    }
    store8(dh + at, gate), store8(dh + at + H, up);
}

template <class S>
void swiglu_backward(S* dh, const S* da, const S* h, int64_t rows, int H, cudaStream_t stream) {
    launch(swiglu_backward_kernel<S>, dim3(unsigned(rows), blocks_for(H, 128 * 8)), 128, 0, stream,
           dh, da, h, H);
}

// ---------------------------------------------------------------------------------------------
// Loss: −log softmax(logits)[target] of each row, 0 where the target is −1.

// exp(x − y), and 1 where they are the same.
__device__ inline float exp_of_difference(float x, float y) {
    return fast_exp2((x - y) * 1.44269504088896f);
}

// A block has a row, which it reads once and, if it fits, keeps in shared memory: each thread reads
// there only what it copied itself. The softmax's largest logit and sum are found together: a sum
// so far is scaled down where a larger logit is met. Moves, per number: those of X, once read and,
// with gradients, once written.
template <bool kept, class X>
__global__ static __launch_bounds__(kept ? 1024 : 512) void cross_entropy_kernel(
    float* losses, X* logits, bool gradients, const int* targets, const float* loss_scale, int V,
    int64_t row) {
    const float least = -1e30f;
    SharedMemory shared;
    float* exchange = shared.take<float>(2 * warp);
    const int vectors = (V + 7) / 8; // the last may hold columns of padding
    X* x = logits + blockIdx.x * row;
    const int target = targets[blockIdx.x];
    if (target < 0) { // all threads
        const float zeros[8] = {};
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        for (int64_t n = threadIdx.x; gradients && n < row / 8; n += blockDim.x)
            store8(x + n * 8, zeros);
        return;
    }
    const float at_target = float(x[target]); // which will be overwritten, behind a barrier
    const X* source = x;
    if constexpr (kept) {
        X* copy = shared.take<X>(vectors * 8);
        for (int n = threadIdx.x; n < vectors; n += blockDim.x)
            for (int i = 0; i < 8; i += 16 / int(sizeof(X)))
                copy_async(copy + n * 8 + i, x + n * 8 + i);
        copy_async_commit();
        copy_async_wait<0>();
        source = copy;
    }
    auto load = [&](float(&value)[8], int n) {
        load8(value, source + n * 8);
        if (n * 8 + 8 > V)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (n * 8 + i >= V) value[i] = -INFINITY; // of which the probability is 0
    };

    float largest = least, sum = 0;
    for (int n = threadIdx.x; n < vectors; n += blockDim.x) {
        float value[8];
        load(value, n);
        float top = value[0];
#pragma unroll
        for (int i = 1; i < 8; i++) top = fmaxf(top, value[i]);
        if (top > largest) {
            sum *= exp_of_difference(largest, top);
            largest = top;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum += exp_of_difference(value[i], largest);
    }
    // Of the warp, then of the block.
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp, warps = blockDim.x / warp;
    auto gather = [&] {
        const float top = warp_max(largest);
        sum = warp_sum(sum * exp_of_difference(largest, top));
        largest = top;
    };
    gather();
    if (lane == 0) exchange[w] = largest, exchange[warp + w] = sum;
    __syncthreads();
    largest = lane < warps ? exchange[lane] : least;
    sum = lane < warps ? exchange[warp + lane] : 0;
    gather();

    if (threadIdx.x == 0) losses[blockIdx.x] = (largest - at_target) + logf(sum);
    if (!gradients) return;
    const float scale = *loss_scale, factor = scale / sum;
    for (int64_t n = threadIdx.x; n < row / 8; n += blockDim.x) {
        float value[8] = {};
        if (n < vectors) {
            load(value, int(n));
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = exp_of_difference(value[i], largest) * factor;
            if (n == target / 8)
#pragma unroll
                for (int i = 0; i < 8; i++) value[i] -= i == target % 8 ? scale : 0;
        }
        store8(x + n * 8, value);
    }
}

// losses (rows) of logits (rows, V), `row` elements from one row to the next. With `gradients`, in
// place of the logits, loss_scale × their gradient, and 0 in the columns from V on; loss_scale lies
// on the device.
template <class S, class X>
void cross_entropy(float* losses, X* logits, bool gradients, const int* targets,
                   const float* loss_scale, int64_t rows, int V, int64_t row, cudaStream_t stream) {
    int device = 0, limit = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const int vectors = blocks_for(V, 8);
    const size_t exchange = shared_bytes<float>(2 * warp);
    const size_t all = exchange + shared_bytes<X>(size_t(vectors) * 8);
    const bool kept = all <= size_t(limit);
    // A multiprocessor has room for several blocks, or for one that should have more threads.
    const int threads = threads_for(vectors, kept && all > size_t(limit) / 2 ? 1024 : 512);
    launch(kept ? cross_entropy_kernel<true, X> : cross_entropy_kernel<false, X>, unsigned(rows),
           threads, kept ? all : exchange, stream, losses, logits, gradients, targets, loss_scale,
           V, row);
}

// One block: rows are few.
__global__ static void add_losses_kernel(double* sum, const float* losses, int64_t rows) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {};
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) total[0] += double(losses[row]);
    block_sums(total, exchange);
    if (threadIdx.x == 0) *sum += total[0];
}

// *sum, on the device, += Σ losses (rows).
inline void add_losses(double* sum, const float* losses, int64_t rows, cudaStream_t stream) {
    launch(add_losses_kernel, 1, 1024, shared_bytes<double>(warp), stream, sum, losses, rows);
}

// ---------------------------------------------------------------------------------------------
// The optimizer. n, the length of the flat buffers, is a multiple of 8.

const int norm_blocks = 1024; // at most; as many partial sums

// Squares are added in float, 8 at a time, then in double. Moves, per number: that of G.
template <class G>
__global__ static void square_sums_kernel(double* partial, const G* gradients, int64_t n) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    const int64_t step = int64_t(gridDim.x) * blockDim.x * 8;
    const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    const int turns = first < n ? int((n - first + step - 1) / step) : 0;
    double total[1] = {};
#pragma unroll 4
    for (int turn = 0; turn < turns; turn++) {
        float g[8], sum = 0;
        load8(g, gradients + first + turn * step);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += g[i] * g[i];
        total[0] += double(sum);
    }
    block_sums(total, exchange);
    if (threadIdx.x == 0) partial[blockIdx.x] = total[0];
}

__global__ static void root_of_sums_kernel(double* norm, const double* partial, int n) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {int(threadIdx.x) < n ? partial[threadIdx.x] : 0.0};
    block_sums(total, exchange);
    if (threadIdx.x == 0) *norm = sqrt(total[0]);
}

// *norm = ‖gradients (n)‖₂, on the device. scratch: norm_blocks doubles.
template <class G>
void gradient_norm(double* norm, const G* gradients, int64_t n, double* scratch,
                   cudaStream_t stream) {
    const int blocks = int(std::clamp<int64_t>(n / (4 * 256 * 8), 1, norm_blocks));
    launch(square_sums_kernel<G>, blocks, 256, shared_bytes<double>(warp), stream, scratch,
           gradients, n);
    launch(root_of_sums_kernel, 1, norm_blocks, shared_bytes<double>(warp), stream, norm, scratch,
           blocks);
}

// What a step's AdamW needs to know. It lies on the device, so that a captured graph reads the
// present step's.
struct AdamWNumbers {
    float lr, beta1, beta2, eps, weight_decay;
    float correction1, correction2; // 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ)
    float grad_clip;                // the gradient's norm is scaled down to this; 0: never
    float grad_scale;               // multiplies every gradient, where its norm is not looked at
    uint32_t step;
};

// gpt/base/random.h's, for the GPU.
__device__ inline uint32_t mix_bits(uint32_t x) {
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

// Up or down to a bf16 with the probabilities that make the mean exact, as round_stochastically of
// gpt/cpu/bf16.h does; a float that bf16 holds exactly. random: 16 random bits.
__device__ inline float round_to_bf16_stochastically(float x, uint32_t random) {
    const uint32_t u = __float_as_uint(x);
    const uint32_t finite = (u & 0x7F800000u) == 0x7F800000u ? 0 : random & 0xFFFFu;
    return __uint_as_float((u + finite) & 0xFFFF0000u);
}

// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
// w ← w − lr · (m̂ / (√v̂ + eps) + decay · w), with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).
// Moves, per number: G read, two M read and written, S written, and the master read and written or,
// without one, S read. About 20 FLOPs.
template <bool stochastic, class S, class M, class G>
__global__ static void adamw_kernel(S* parameters, float* master, const G* gradients, M* moment1,
                                    M* moment2, const uint32_t* decays, const AdamWNumbers* numbers,
                                    const double* norm, const double* loss, int64_t n) {
    const int64_t vector = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, at = vector * 8;
    if (at >= n) return;
    float g[8], m[8], v[8], w[8];
    load8(g, gradients + at), load8(m, moment1 + at), load8(v, moment2 + at);
    if (master)
        load8(w, master + at);
    else
        load8(w, parameters + at);
    const AdamWNumbers o = *numbers;
    if ((norm && !std::isfinite(*norm)) || (loss && !std::isfinite(*loss))) return;
    float scale = o.grad_scale;
    if (norm)
        scale = o.grad_clip > 0 && *norm > double(o.grad_clip) ? float(o.grad_clip / *norm) : 1;
    const float decay = decays[vector / 32] >> vector % 32 & 1 ? o.weight_decay : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float d = scale * g[i];
        m[i] = o.beta1 * m[i] + (1 - o.beta1) * d;
        v[i] = o.beta2 * v[i] + (1 - o.beta2) * d * d;
        const float step = m[i] * o.correction1 / (sqrtf(v[i] * o.correction2) + o.eps);
        w[i] -= o.lr * (step + decay * w[i]);
        if constexpr (stochastic) { // 16 random bits for each of the three, of (step, at + i)
            const uint32_t random = mix_bits(uint32_t(at + i) * 0x9E3779B9u + o.step);
            const uint32_t more = mix_bits(random + uint32_t((at + i) >> 32));
            if (sizeof(M) == 2) {
                m[i] = round_to_bf16_stochastically(m[i], random);
                v[i] = round_to_bf16_stochastically(v[i], random >> 16);
            }
            if (sizeof(S) == 2 && !master) w[i] = round_to_bf16_stochastically(w[i], more);
        }
    }
    store8(moment1 + at, m), store8(moment2 + at, v);
    if (master) store8(master + at, w);
    store8(parameters + at, w);
}

// parameters, moments and master (or null), all (n), from the gradients (n). decays: a bit for each
// 8 numbers, whether their weights decay. norm: null, or the gradients' norm, by which they are
// clipped; loss: null, or the step's loss; if one of them is not finite nothing is written. With
// `stochastic`, moments in bf16, and parameters in bf16 without a master, are rounded at random.
template <class S, class M, class G>
void adamw(S* parameters, float* master, const G* gradients, M* moment1, M* moment2,
           const uint32_t* decays, const AdamWNumbers* numbers, const double* norm,
           const double* loss, bool stochastic, int64_t n, cudaStream_t stream) {
    launch(stochastic ? adamw_kernel<true, S, M, G> : adamw_kernel<false, S, M, G>,
           blocks_for(n, 256 * 8), 256, 0, stream, parameters, master, gradients, moment1, moment2,
           decays, numbers, norm, loss, n);
}

// ---------------------------------------------------------------------------------------------
// The model

// The model whose sizes are multiples of 8: what it has more is padded with zeros, which stay zero
// (a channel of weight 0 adds nothing, and its gradient is a product with 0).
inline Config padded(Config c) {
    auto up = [](int& n) { n = (n + 7) / 8 * 8; };
    up(c.vocab_size), up(c.mlp_width), up(c.head_size);
    return c;
}

// Where the numbers of a parameter of the real model lie in that of the padded one.
struct Placement {
    struct Axis {
        int64_t real = 1, padded = 1, group = 1, padded_group = 1;

        Axis(int64_t n, int64_t m, const Config& real_model, const Config& model)
            : real(n), padded(m), group(n), padded_group(m) {
            const int head = real_model.head_size, padded_head = model.head_size;
            if (n % head == 0 && n / head * padded_head == m)
                group = head, padded_group = padded_head; // every head's channels
        }
        int64_t operator()(int64_t i) const { return i / group * padded_group + i % group; }
    };
    Axis rows, columns;

    Placement(const Param& p, const Param& q, const Config& real_model, const Config& model)
        : rows(p.shape[0], q.shape[0], real_model, model),
          columns(p.shape.size() == 2 ? p.shape[1] : 1, q.shape.size() == 2 ? q.shape[1] : 1,
                  real_model, model) {
        if (p.shape.size() == 1 || p.shape[1] == q.shape[1])
            columns.group = columns.real, columns.padded_group = columns.padded;
    }
    // f(i, j): number i of the real parameter is number j of the padded one.
    template <class F> void each(const F& f) const {
#pragma omp parallel for
        for (int64_t r = 0; r < rows.real; r++)
            for (int64_t c = 0; c < columns.real; c++)
                f(r * columns.real + c, rows(r) * columns.padded + columns(c));
    }
};

// The tokens of a micro-batch, as they lie on the host and on the GPU, one array behind the other:
// inputs, targets, then TokenRows.
struct BatchLayout {
    int64_t rows;

    int64_t ints() const { return 5 * rows + 8; }
    int64_t targets() const { return rows; }
    int64_t order() const { return 2 * rows; }
    int64_t tokens() const { return 3 * rows; }
    int64_t begin() const { return 4 * rows; } // (rows + 1)
    int64_t count() const { return 5 * rows + 4; }
    int64_t loss_scale() const { return 5 * rows + 5; } // a float
};

// Writes the micro-batch. counts: (V + 1), scratch.
inline void fill_batch(int* out, const BatchLayout& at, const int* inputs, const int* targets,
                       float loss_scale, int V, std::vector<int>& counts) {
    std::copy(inputs, inputs + at.rows, out);
    if (targets) std::copy(targets, targets + at.rows, out + at.targets());
    counts.assign(V + 1, 0);
    for (int64_t i = 0; i < at.rows; i++) counts[inputs[i] + 1]++;
    int *tokens = out + at.tokens(), *begin = out + at.begin(), distinct = 0;
    for (int token = 0; token < V; token++) {
        if (counts[token + 1] > 0) tokens[distinct] = token, begin[distinct++] = counts[token];
        counts[token + 1] += counts[token];
    }
    begin[distinct] = int(at.rows);
    out[at.count()] = distinct;
    for (int64_t i = 0; i < at.rows; i++) out[at.order() + counts[inputs[i]]++] = int(i);
    std::memcpy(out + at.loss_scale(), &loss_scale, sizeof loss_scale);
}

// What a pass computes and keeps, laid out once. What a backward pass does not need, or computes
// again, shares a slot. Widths are padded.
template <class S> struct Activations {
    int64_t rows = 0; // B·T at most

    Array<float> embedded;             // (rows, C), if junction 0 has a norm
    Slots<Array<float>> residual;      // (rows, C) of each junction: r
    Slots<Array<S>> input;             // (rows, C) of each junction: u, where it is not r itself
    Slots<Array<S>> branch;            // (rows, C) of each junction but the first: b
    Slots<Array<JunctionStats>> stats; // (rows) of each junction
    Slots<Array<S>> qkv;               // (rows, (NH + 2·KVH)·HS) of each layer
    Array<float> wide;                 // (rows, the same): q, k and v before they are rounded
    Slots<Array<S>> qk_raw;            // (rows, (NH + KVH)·HS), with OLMo 2's norm
    Slots<Array<NormStats>> qk_stats;  // (rows, 2)
    Slots<Array<S>> attended;          // (rows, NH·HS)
    Slots<Array<float>> lse;           // (rows, NH)
    Slots<Array<S>> hidden, activated; // (rows, H or 2·H), (rows, H)

    int64_t head_rows = 0, logit_rows = 0; // rows of the head at once, in training and without
    Array<char> logits;  // (head_rows, V) of S, then their gradients, or (logit_rows, V) floats
    Array<float> losses; // (rows)

    Array<float> dresidual;   // (rows, C)
    Array<S> dinput, dbranch; // (rows, C)
    Array<S> dwide, dnarrow;  // gradients of qkv or hidden, and of attended or activated
    Array<float> delta;       // (rows, NH): dO · O
    Array<char> scratch;      // partial sums
    Array<Moments> moments;   // (rows) of the stream that is looked at

    // OLMo 2's norm of q and k makes the most of their rounding: they are rounded once, behind it
    // and the rotation. Others are rounded before the rotation too, which spares a pass in float.
    static bool rounds_behind_norm(const Config& c) {
        return c.qk_norm && !c.qkv_bias && !std::is_same_v<S, float>;
    }

    // Calls make(array, elements) for every array.
    template <class Make>
    void layout(const Config& c, int B, int T, const ModelOptions& o, int multiprocessors,
                const Make& make) {
        const int C = c.width, L = c.layers, K = 2 * L + 1, V = c.vocab_size;
        const bool train = o.training, layers = o.recompute == Recompute::layers;
        rows = int64_t(B) * T;
        auto junction_of = [&](int k) { return junction(c.scheme, L, k); };
        auto keep = [&](int) { return train && !layers; };
        auto keep_light = [&](int) { return train && o.recompute == Recompute::none; };
        make(embedded, junction_of(0).out_norm ? rows * C : 0);
        // Of each layer its input is kept, from which the rest can be computed again.
        residual.layout(K, rows * C, make, [&](int k) { return k % 2 == 0 || keep(k); });
        input.layout(K, rows * C, make, keep_light,
                     [&](int k) { return junction_of(k).in_norm || !std::is_same_v<S, float>; });
        // A layer computed again needs both its branches at once.
        branch.layout(
            layers ? 3 : K, rows * C, make,
            [&](int k) { return train && (layers || junction_of(k).keeps_branch()); },
            [&](int k) { return k > 0; });
        stats.layout(K, rows, make, [&](int) { return true; });
        // Generating text goes on from every layer's k and v.
        qkv.layout(L, rows * c.qkv_width(), make, [&](int l) { return !train || keep(l); });
        const int64_t qk = c.qk_norm ? rows : 0;
        make(wide, rounds_behind_norm(c) ? rows * c.qkv_width() : 0);
        qk_raw.layout(L, qk * (c.q_width() + c.kv_width()), make, keep);
        qk_stats.layout(L, qk * 2, make, keep);
        attended.layout(L, rows * c.q_width(), make, keep);
        lse.layout(L, rows * c.heads, make, keep);
        hidden.layout(L, rows * c.mlp_in_width(), make, keep);
        activated.layout(L, rows * c.mlp_width, make, keep_light);

        // So many rows at once that the head's matrix is seldom read, and its gradient seldom added
        // to: half a gigabyte of logits. Equal parts, of a multiple of 128 rows.
        auto parts = [&](int64_t elements) {
            const int64_t most = std::max<int64_t>(256, elements / V / 128 * 128);
            const int64_t n = (rows + most - 1) / most;
            return std::min(rows, ((rows + n - 1) / n + 127) / 128 * 128);
        };
        head_rows = train ? parts(int64_t(1) << 28) : 0;
        logit_rows = train ? std::max<int64_t>(1, head_rows * int64_t(sizeof(S)) / 4)
                           : parts(int64_t(1) << 26);
        make(logits, std::max(head_rows * int64_t(sizeof(S)), logit_rows * 4) * V);
        make(losses, rows);
        make(moments, rows);
        if (!train) return;
        make(dresidual, rows * C);
        make(dinput, rows * C);
        make(dbranch, rows * C);
        make(dwide, rows * std::max(c.qkv_width(), c.mlp_in_width()));
        make(dnarrow, rows * std::max(c.q_width(), c.mlp_width));
        make(delta, rows * c.heads);
        const AttentionShape a{B, T, c.heads, c.kv_heads, c.head_size, c.head_size};
        make(scratch,
             std::max({junction_scratch(C, multiprocessors),
                       int64_t(sizeof(float)) * qk_norm_scratch(a),
                       int64_t(sizeof(float)) *
                           linear_scratch(rows, std::max({C, c.qkv_width(), c.mlp_in_width()}))}));
    }
};

// Times parts of a pass by events, for a Profile: they are read once the GPU has come to them.
struct GpuTimes {
    struct Span {
        const char *group, *name;
        double flops, bytes;
        cudaEvent_t start, stop;
    };
    std::vector<Span> spans;
    std::vector<cudaEvent_t> events; // free ones

    GpuTimes() = default;
    GpuTimes(const GpuTimes&) = delete;
    ~GpuTimes() {
        for (const Span& span : spans) cudaEventDestroy(span.start), cudaEventDestroy(span.stop);
        for (cudaEvent_t event : events) cudaEventDestroy(event);
    }
    cudaEvent_t event() {
        if (events.empty()) {
            cudaEvent_t made;
            CUDA(cudaEventCreate(&made));
            return made;
        }
        cudaEvent_t event = events.back();
        events.pop_back();
        return event;
    }
    // Books all spans; the stream has been waited for.
    void book(Profile* profile) {
        for (const Span& span : spans) {
            float milliseconds = 0;
            CUDA(cudaEventElapsedTime(&milliseconds, span.start, span.stop));
            if (profile) {
                Profile::Part& part = profile->part(span.group, span.name);
                part.calls++;
                part.seconds += milliseconds / 1e3;
                part.flops += span.flops, part.bytes += span.bytes;
            }
            events.push_back(span.start), events.push_back(span.stop);
        }
        spans.clear();
    }
};

// One part: from here to the end of the scope.
struct GpuTimed {
    GpuTimes* times;
    cudaStream_t stream;

    GpuTimed(GpuTimes* times, cudaStream_t stream, const char* group, const char* name,
             double bytes, double flops)
        : times(times), stream(stream) {
        if (!times) return;
        times->spans.push_back({group, name, flops, bytes, times->event(), times->event()});
        CUDA(cudaEventRecord(times->spans.back().start, stream));
    }
    ~GpuTimed() noexcept(false) {
        if (times) CUDA(cudaEventRecord(times->spans.back().stop, stream));
    }
    GpuTimed(const GpuTimed&) = delete;
};

struct OwnStream {
    cudaStream_t stream = nullptr;
    OwnStream() { CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    ~OwnStream() { cudaStreamDestroy(stream); }
    OwnStream(const OwnStream&) = delete;
    operator cudaStream_t() const { return stream; }
    void wait() const { CUDA(cudaStreamSynchronize(stream)); }
};

// What rows of C numbers tell, in double: a warp has a row, and reads it twice, the second time
// from a cache. Moves 4 bytes (of S in a branch: 2) per number, in row_chords_kernel 8.
const int rows_of_block = 8;
__device__ inline int64_t row_of_warp() {
    return int64_t(blockIdx.x) * rows_of_block + threadIdx.x / warp;
}

// The moments of each row of x − skip · before; before may be null.
template <class X>
__global__ static void row_moments_kernel(Moments* moments, const X* x, const float* before,
                                          float skip, int64_t rows, int C) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    auto each = [&](const auto& f) { // of this lane's numbers
        for (int i = threadIdx.x % warp * 8; i < C; i += 8 * warp) {
            float numbers[8], others[8];
            load8(numbers, x + row * C + i);
            if (before) {
                load8(others, before + row * C + i);
                for (int k = 0; k < 8; k++) numbers[k] -= skip * others[k];
            }
            for (int k = 0; k < 8; k++) f(double(numbers[k]));
        }
    };
    double sum = 0, square = 0;
    each([&](double number) { sum += number; });
    const double mean = warp_sum(sum) / C;
    each([&](double number) { square += (number - mean) * (number - mean); });
    square = warp_sum(square);
    if (threadIdx.x % warp == 0) moments[row] = {double(C), mean, square};
}

// ‖a/‖a‖ − b/‖b‖‖² of each row, exactly 0 where a and b are the same.
__global__ static void row_chords_kernel(double* chords, const float* a, const float* b,
                                         int64_t rows, int C) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    auto each = [&](const auto& f) {
        for (int i = threadIdx.x % warp * 8; i < C; i += 8 * warp) {
            float x[8], y[8];
            load8(x, a + row * C + i), load8(y, b + row * C + i);
            for (int k = 0; k < 8; k++) f(double(x[k]), double(y[k]));
        }
    };
    double aa = 0, bb = 0, difference = 0;
    each([&](double x, double y) { aa += x * x, bb += y * y; });
    aa = warp_sum(aa), bb = warp_sum(bb);
    const double ratio = bb > 0 ? sqrt(aa / bb) : 0;
    each([&](double x, double y) { difference += (x - ratio * y) * (x - ratio * y); });
    difference = warp_sum(difference);
    if (threadIdx.x % warp == 0) chords[row] = aa > 0 ? difference / aa : double(bb > 0);
}

template <class X> __global__ static void find_nonfinite_kernel(int* found, const X* x, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        if (!std::isfinite(float(x[i]))) *found = 1; // all write the same
}

// Sums over the ranks that train one model together, each with a GPU of its own: by NCCL, or
// without it through the host, which waits.
struct Communicator {
    const Ranks* ranks = nullptr;
#ifdef LNS_NCCL
    ncclComm_t nccl = nullptr;

    static void check(ncclResult_t result, const char* what) {
        if (result != ncclSuccess)
            fail(what, " failed: ", ncclGetErrorString(result),
                 "; NCCL_DEBUG=INFO in the environment tells more");
    }
    void join(const Ranks& all) {
        ranks = &all;
        if (all.size == 1) return;
        ncclUniqueId id = {};
        if (all.first()) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        all.broadcast(&id, sizeof id);
        check(ncclCommInitRank(&nccl, all.size, id, all.rank), "ncclCommInitRank");
    }
    ~Communicator() {
        if (nccl) ncclCommDestroy(nccl);
    }
    template <class X> void sum(X* x, int64_t n, cudaStream_t stream) const {
        if (ranks->size == 1) return;
        const ncclDataType_t type = std::is_same_v<X, double>  ? ncclDouble
                                    : std::is_same_v<X, float> ? ncclFloat
                                                               : ncclBfloat16;
        check(ncclAllReduce(x, x, size_t(n), type, ncclSum, nccl, stream), "ncclAllReduce");
    }
#else
    void join(const Ranks& all) { ranks = &all; }
    template <class X> void sum(X* x, int64_t n, cudaStream_t stream) const {
        if (ranks->size == 1) return;
        std::vector<X> values(static_cast<size_t>(n));
        CUDA(cudaMemcpyAsync(values.data(), x, values.size() * sizeof(X), cudaMemcpyDeviceToHost,
                             stream));
        CUDA(cudaStreamSynchronize(stream));
        if constexpr (std::is_same_v<X, double>) {
            ranks->sum(values.data(), int(n));
        } else {
            std::vector<float> floats(values.begin(), values.end());
            ranks->sum(floats.data(), n);
            for (int64_t i = 0; i < n; i++) values[i] = X(floats[i]);
        }
        CUDA(cudaMemcpyAsync(x, values.data(), values.size() * sizeof(X), cudaMemcpyHostToDevice,
                             stream));
        CUDA(cudaStreamSynchronize(stream));
    }
#endif
};

template <class S, class G> struct CudaModel : Model {
    static constexpr bool exact = std::is_same_v<S, float>; // parameters need no master weights

    ModelOptions options;
    Config shape;    // with padded sizes
    Registry memory; // where its parameters lie
    int multiprocessors = 0;
    OwnStream stream, copies; // of the computation, of tokens copied ahead
    Products products;

    Array<S> parameters;
    Array<float> master; // of the parameters, if they are bf16 and it is wanted
    Array<G> gradients;
    Array<float> moment1, moment2;
    Array<bf16> rounded_moment1, rounded_moment2; // instead, with moments in bf16
    Array<uint32_t> decays;                       // one bit for each 8 numbers
    Activations<S> acts;
    Array<CosSin> rope_table; // (T, channels/2)

    // The numbers of a step that only the GPU sees.
    Array<double> sums; // loss, norm; then scratch of the norm
    Array<AdamWNumbers> numbers;
    Pinned<double> sums_back; // loss, norm
    Pinned<AdamWNumbers> numbers_ahead;

    Array<int> batch;   // the micro-batch at work (BatchLayout)
    Array<int> batches; // those of a step, copied ahead
    Pinned<int> batches_ahead;
    std::vector<cudaEvent_t> arrived; // of each of them
    std::vector<int> counts;

    std::vector<int> tokens; // of the last pass
    int B = 0, T = 0;        // of the last pass
    int first = 0;           // rows before this one were not computed anew in the last pass
    bool continues = false;  // whether the next pass may go on where the last one ended
    int64_t held = 0;        // bytes

    // A micro-step of (B, T), captured the second time: the first chooses the products' algorithms.
    struct Graph {
        int B, T;
        cudaGraphExec_t graph; // null: seen once
    };
    std::vector<Graph> graphs;
    GpuTimes times;
    double step_scale = 0; // loss_scale of the step under way
    bool stopped = false;  // that step, by its StepInput::stop

    Communicator communicator;

    CudaModel(const Config& c, int max_B, int max_T, const ModelOptions& o, const Ranks& ranks)
        : Model(c), options(o), shape(padded(c)), memory(make_registry(shape)),
          multiprocessors(lns::gpu().multiprocessors), products(stream) {
        check_shape(c);
        this->ranks = &ranks;
        auto make = [&](auto& array, int64_t n) {
            array = std::remove_reference_t<decltype(array)>(n);
            held += n * int64_t(sizeof(array[0]));
        };
        make(parameters, memory.size + slack());
        if (o.training) {
            const bool rounded = o.moments == DType::bf16;
            make(master, exact || !o.master_weights ? 0 : memory.size);
            make(gradients, memory.size);
            for (Array<float>* array : {&moment1, &moment2})
                make(*array, rounded ? 0 : memory.size);
            for (Array<bf16>* array : {&rounded_moment1, &rounded_moment2})
                make(*array, rounded ? memory.size : 0);
            make(decays, blocks_for(memory.size, 8 * 32));
            upload_decays();
            make(numbers, 1);
            numbers_ahead = Pinned<AdamWNumbers>(1);
        }
        acts.layout(shape, max_B, max_T, o, multiprocessors, make);
        make(sums, 2 + 1024);
        sums_back = Pinned<double>(2);
        make(batch, BatchLayout{acts.rows}.ints());
        if (c.rope()) upload_rope_table(make);
        held += products.bytes();
        communicator.join(ranks);
        CUDA(cudaDeviceSynchronize()); // the streams do not wait for what zeroed the arrays
    }
    ~CudaModel() override {
        cudaStreamSynchronize(stream);
        for (cudaEvent_t event : arrived) cudaEventDestroy(event);
        for (const Graph& g : graphs)
            if (g.graph) cudaGraphExecDestroy(g.graph);
    }

    static void check_shape(const Config& c) {
        if (c.width % 8)
            fail("a GPU takes 8 channels at once, and the model's width is ", c.width,
                 ": choose a --width that is a multiple of 8, or --device cpu");
        row_shape(c.width);
    }
    int64_t slack() const { return 0; }

    void upload_decays() {
        std::vector<uint32_t> bits(size_t(decays.size));
        for (const Param& p : memory.params)
            for (int64_t i = p.offset / 8; p.decay && i < (p.offset + p.size()) / 8; i++)
                bits[i / 32] |= 1u << i % 32;
        decays.upload(bits.data());
    }
    template <class Make> void upload_rope_table(const Make& make) {
        const int half = config.head_size / 2;
        const int64_t reach = std::min<int64_t>(config.positions, acts.rows);
        std::vector<CosSin> table(size_t(reach * half));
        for (int64_t t = 0; t < reach; t++)
            for (int i = 0; i < half; i++) {
                const double angle =
                    double(t) * std::pow(config.rope_theta, -2.0 * i / config.head_size);
                table[t * half + i] = {float(std::cos(angle)), float(std::sin(angle))};
            }
        make(rope_table, reach * half);
        rope_table.upload(table.data());
    }

    std::string device() const override { return "cuda"; }
    std::string dtype() const override { return exact ? "float32" : "bf16"; }
    int64_t bytes() const override { return held; }

    // Tensors of the last pass, from row `first` on. k counts junctions from 0, l layers from 0.
    int64_t rows() const { return int64_t(B) * T - first; }
    float* residual(int k) { return acts.residual[k] + int64_t(first) * shape.width; }
    S* input(int k) { // u: what the sublayer after junction k sees
        if constexpr (exact)
            if (acts.input.slot[k] < 0) return residual(k);
        return acts.input[k] + int64_t(first) * shape.width;
    }
    S* branch(int k) {
        const bool layers = options.recompute == Recompute::layers;
        return acts.branch[layers ? 2 - k % 2 : k] + int64_t(first) * shape.width;
    }
    float* embedded() {
        return acts.embedded.size ? acts.embedded + int64_t(first) * shape.width : residual(0);
    }
    float* before(int k) { return k == 0 ? embedded() : residual(k - 1); } // r_prev
    JunctionStats* stats(int k) { return acts.stats[k] + first; }
    S* hidden(int l) { return acts.hidden[l] + int64_t(first) * shape.mlp_in_width(); }
    S* activated(int l) { return acts.activated[l] + int64_t(first) * shape.mlp_width; }

    // Those of attention, from row 0 on.
    S* qkv(int l) { return acts.qkv[l]; }
    S* qk_raw(int l) { return shape.qk_norm ? acts.qk_raw[l] : nullptr; }
    NormStats* qk_stats(int l) { return shape.qk_norm ? acts.qk_stats[l] : nullptr; }
    S* attended(int l) { return acts.attended[l]; }
    float* lse(int l) { return acts.lse[l]; }
    AttentionShape attention() const {
        return {B, T, shape.heads, shape.kv_heads, shape.head_size, config.head_size, first};
    }
    const S* weight(int64_t offset) const { return offset < 0 ? nullptr : parameters + offset; }
    G* gradient(int64_t offset) const { return offset < 0 ? nullptr : gradients + offset; }
    BatchLayout layout() const { return {int64_t(B) * T}; }
    const int* inputs() const { return batch; }
    const int* targets() const { return batch + layout().targets(); }
    TokenRows by_token() const {
        const BatchLayout at = layout();
        return {batch + at.tokens(), batch + at.begin(), batch + at.order(), batch + at.count()};
    }
    const float* loss_scale() const {
        return reinterpret_cast<const float*>(batch + layout().loss_scale());
    }
    JunctionPointers<const S> junction_parameters(int k) const {
        return {static_cast<const S*>(parameters), memory.junctions[k]};
    }
    float* scratch() const { return reinterpret_cast<float*>(acts.scratch + 0); }

    // Books the time until the end of the scope. bytes: of activations and weights, each read or
    // written once.
    GpuTimed timed(const char* group, const char* name, double bytes, double flops = 0) {
        return GpuTimed(profile ? &times : nullptr, stream, group, name, bytes, flops);
    }
    double moved(double per_row) const { return double(rows()) * per_row * sizeof(S); }

    void matrix_forward(const char* name, S* out, const S* in, int64_t w, int64_t bias, int C,
                        int OC) {
        GpuTimed t = timed_matrix("forward", name, C, OC, sizeof(S));
        linear_forward(products, out, OC, in, weight(w), weight(bias), rows(), C, OC, stream);
    }
    void matrix_backward(const char* name, S* din, const S* dout, const S* in, int64_t w,
                         int64_t bias, int C, int OC) {
        {
            GpuTimed t = timed_matrix("input gradient", name, C, OC, sizeof(S));
            linear_backward_input(products, din, dout, OC, weight(w), rows(), C, OC, stream);
        }
        weight_gradient(name, dout, in, w, bias, C, OC);
    }
    void weight_gradient(const char* name, const S* dout, const S* in, int64_t w, int64_t bias,
                         int C, int OC) {
        GpuTimed t = timed_matrix("weight gradient", name, C, OC, 2 * sizeof(G));
        linear_backward_weight(products, gradient(w), gradient(bias), dout, OC, in, rows(), C, OC,
                               scratch(), stream);
    }
    GpuTimed timed_matrix(const char* group, const char* name, double C, double OC,
                          double matrix_bytes) {
        return timed(group, name, moved(C + OC) + C * OC * matrix_bytes,
                     2 * double(rows()) * C * OC);
    }

    // Of the micro-batch in `batch`. Positions before `from` keep what the last pass left there.
    void forward(int from = 0) {
        first = from;
        {
            GpuTimed t = timed("forward", "embedding",
                               double(rows()) * shape.width * (sizeof(S) + sizeof(float)));
            embedding_forward(embedded(), inputs() + first, weight(memory.token_embedding),
                              weight(memory.position_embedding), first, rows(), T, shape.width,
                              stream);
        }
        join_forward(0);
        for (int l = 0; l < shape.layers; l++) {
            attention_sublayer_forward(l);
            join_forward(2 * l + 1);
            mlp_sublayer_forward(l);
            join_forward(2 * l + 2);
        }
    }

    // From the gradient of the final norm's output, in dinput.
    void backward() {
        for (int l = shape.layers - 1; l >= 0; l--) {
            if (options.recompute == Recompute::layers) layer_again(l);
            join_backward(2 * l + 2);
            mlp_sublayer_backward(l);
            join_backward(2 * l + 1);
            attention_sublayer_backward(l);
        }
        join_backward(0);
        GpuTimed t = timed("backward", "embedding", double(rows()) * shape.width * sizeof(float));
        embedding_backward(gradient(memory.token_embedding), gradient(memory.position_embedding),
                           by_token(), static_cast<const float*>(acts.dresidual), B, T, shape.width,
                           shape.vocab_size, stream);
    }

    void join_forward(int k) {
        const Junction j = junction(shape.scheme, shape.layers, k);
        S* u = acts.input.slot[k] < 0 ? nullptr : input(k);
        GpuTimed t = timed(
            "forward", "junctions",
            double(rows()) * shape.width *
                ((1.0 + j.branch) * sizeof(float) + (1.0 * j.branch + (u != nullptr)) * sizeof(S)));
        junction_forward(j, shape.norm, shape.norm_eps, before(k),
                         k == 0 ? static_cast<const S*>(nullptr) : branch(k),
                         junction_parameters(k), residual(k), u, stats(k), rows(), shape.width,
                         stream);
    }

    void join_backward(int k) {
        const Junction j = junction(shape.scheme, shape.layers, k);
        const bool starts = k == 2 * shape.layers; // nothing came later
        GpuTimed t = timed("backward", "junctions",
                           double(rows()) * shape.width *
                               ((2.0 - starts + j.in_norm + j.keeps_branch()) * sizeof(float) +
                                (1.0 + j.branch * (1 + j.keeps_branch())) * sizeof(S)));
        junction_backward(j, shape.norm, shape.norm_eps, before(k),
                          k == 0 ? static_cast<const S*>(nullptr) : branch(k), residual(k),
                          junction_parameters(k), stats(k), static_cast<const S*>(acts.dinput),
                          starts, static_cast<float*>(acts.dresidual),
                          static_cast<S*>(acts.dbranch),
                          JunctionPointers<G>(gradients, memory.junctions[k]), acts.scratch, rows(),
                          shape.width, multiprocessors, stream);
    }

    // u of junction k once more, from r and its statistics, if it was not kept.
    void input_again(int k) {
        if (acts.input.slot[k] < 0 || acts.input.keeps(k)) return;
        GpuTimed t =
            timed("again", "junctions", double(rows()) * shape.width * (sizeof(float) + sizeof(S)));
        cuda::input_again(junction(shape.scheme, shape.layers, k), shape.norm, shape.norm_eps,
                          residual(k), junction_parameters(k), stats(k), input(k), rows(),
                          shape.width, stream);
    }

    // What of layer l was not kept, once more, from its input.
    void layer_again(int l) {
        input_again(2 * l);
        attention_sublayer_forward(l);
        join_forward(2 * l + 1);
        mlp_sublayer_forward(l);
    }

    // branch(2l + 1) = attention of input(2l)
    void attention_sublayer_forward(int l) {
        const LayerParams& p = memory.layers[l];
        const int C = shape.width, Q = shape.q_width(), W = shape.qkv_width();
        if (acts.wide.size) {
            {
                GpuTimed t = timed_matrix("forward", "qkv", C, W, sizeof(S));
                linear_forward(products, acts.wide + 0, W, static_cast<const S*>(input(2 * l)),
                               weight(p.qkv), static_cast<const S*>(nullptr), rows(), C, W, stream);
            }
            GpuTimed t = timed("forward", "q and k", moved(W * (1.0 + sizeof(float) / sizeof(S))));
            qk_forward(qkv(l), static_cast<const float*>(acts.wide), qk_raw(l), qk_stats(l),
                       weight(p.q_norm), weight(p.k_norm), shape.norm_eps, cos_sin(), attention(),
                       stream);
        } else {
            matrix_forward("qkv", qkv(l) + int64_t(first) * W, input(2 * l), p.qkv, p.qkv_bias, C,
                           W);
        }
        if (!acts.wide.size && (shape.rope() || shape.qk_norm)) {
            GpuTimed t = timed("forward", "q and k", moved(2.0 * (Q + shape.kv_width())));
            qk_forward(qkv(l), qk_raw(l), qk_stats(l), weight(p.q_norm), weight(p.k_norm),
                       shape.norm_eps, cos_sin(), attention(), stream);
        }
        {
            GpuTimed t = timed("forward", "attention", moved(W + Q), attention_flops(2));
            attention_forward(attended(l), lse(l), static_cast<const S*>(qkv(l)), attention(),
                              stream);
        }
        matrix_forward("attention out", branch(2 * l + 1), attended(l) + int64_t(first) * Q,
                       p.attn_out, p.attn_out_bias, Q, C);
    }
    const CosSin* cos_sin() const { return shape.rope() ? rope_table + 0 : nullptr; }

    // Of so many products of queries with what they see, half of all: T²/2 of each head.
    double attention_flops(int products) const {
        return double(products) * double(rows()) * T * config.q_width();
    }

    // From dbranch to dinput.
    void attention_sublayer_backward(int l) {
        const LayerParams& p = memory.layers[l];
        const int C = shape.width, Q = shape.q_width(), W = shape.qkv_width();
        S *dattended = acts.dnarrow, *dqkv = acts.dwide;
        input_again(2 * l);
        matrix_backward("attention out", dattended, static_cast<const S*>(acts.dbranch),
                        attended(l), p.attn_out, p.attn_out_bias, Q, C);
        {
            GpuTimed t =
                timed("backward", "attention", moved(2.0 * W + 2.0 * Q), attention_flops(5));
            attention_backward(dqkv, static_cast<const S*>(dattended),
                               static_cast<const S*>(attended(l)), static_cast<const S*>(qkv(l)),
                               static_cast<const float*>(lse(l)), cos_sin(),
                               static_cast<float*>(acts.delta), attention(), stream);
        }
        if (shape.qk_norm) {
            GpuTimed t = timed("backward", "q and k norm", moved(3.0 * (Q + shape.kv_width())));
            qk_norm_backward(dqkv, static_cast<const S*>(qk_raw(l)),
                             static_cast<const NormStats*>(qk_stats(l)), weight(p.q_norm),
                             weight(p.k_norm), gradient(p.q_norm), gradient(p.k_norm), scratch(),
                             attention(), stream);
        }
        matrix_backward("qkv", acts.dinput, dqkv, input(2 * l), p.qkv, p.qkv_bias, C, W);
    }

    // GELU at the end of the product before it; not where it is computed again from `hidden` alone,
    // which has been rounded by then: a pass must see the same numbers twice.
    bool gelu_in_product() const {
        return !shape.gated_mlp() && options.recompute != Recompute::activations;
    }

    // branch(2l + 2) = MLP of input(2l + 1)
    void mlp_sublayer_forward(int l) {
        const LayerParams& p = memory.layers[l];
        const int C = shape.width, H = shape.mlp_width, W = shape.mlp_in_width();
        if (gelu_in_product()) {
            GpuTimed t = timed("forward", "MLP in", moved(C + 2.0 * H) + double(C) * H * sizeof(S),
                               2 * double(rows()) * C * H);
            linear_gelu_forward(products, activated(l), hidden(l),
                                static_cast<const S*>(input(2 * l + 1)), weight(p.mlp_in),
                                weight(p.mlp_in_bias), rows(), C, H, stream);
        } else {
            matrix_forward("MLP in", hidden(l), input(2 * l + 1), p.mlp_in, p.mlp_in_bias, C, W);
            activate(l, "forward");
        }
        matrix_forward("MLP out", branch(2 * l + 2), activated(l), p.mlp_out, p.mlp_out_bias, H, C);
    }

    void activate(int l, const char* group) {
        const int H = shape.mlp_width;
        GpuTimed t =
            timed(group, shape.gated_mlp() ? "swiglu" : "gelu", moved(shape.mlp_in_width() + H));
        if (shape.gated_mlp())
            swiglu_forward(activated(l), static_cast<const S*>(hidden(l)), rows(), H, stream);
        else
            gelu_forward(activated(l), static_cast<const S*>(hidden(l)), rows() * H, stream);
    }

    void mlp_sublayer_backward(int l) {
        const LayerParams& p = memory.layers[l];
        const int C = shape.width, H = shape.mlp_width, W = shape.mlp_in_width();
        S *dactivated = acts.dnarrow, *dhidden = acts.dwide;
        const S* dbranch = acts.dbranch;
        if (!acts.activated.keeps(l) && options.recompute == Recompute::activations)
            activate(l, "again");
        weight_gradient("MLP out", dbranch, activated(l), p.mlp_out, p.mlp_out_bias, H, C);
        if (!shape.gated_mlp()) {
            GpuTimed t =
                timed("input gradient", "MLP out", moved(C + 2.0 * H) + double(C) * H * sizeof(S),
                      2 * double(rows()) * C * H);
            linear_gelu_backward_input(products, dhidden, dbranch, static_cast<const S*>(hidden(l)),
                                       weight(p.mlp_out), rows(), H, C, stream);
        } else {
            {
                GpuTimed t = timed_matrix("input gradient", "MLP out", H, C, sizeof(S));
                linear_backward_input(products, dactivated, dbranch, C, weight(p.mlp_out), rows(),
                                      H, C, stream);
            }
            GpuTimed t = timed("backward", "swiglu", moved(2.0 * W + H));
            swiglu_backward(dhidden, static_cast<const S*>(dactivated),
                            static_cast<const S*>(hidden(l)), rows(), H, stream);
        }
        input_again(2 * l + 1);
        matrix_backward("MLP in", acts.dinput, dhidden, input(2 * l + 1), p.mlp_in, p.mlp_in_bias,
                        C, W);
    }

    // The head and its loss, some rows at a time, so that (rows, V) logits never exist. The logits
    // are S and overwritten by their gradient if that is wanted, else float.
    template <class X> void head_forward(bool gradients, int64_t row, int64_t n) {
        const int V = shape.vocab_size, C = shape.width;
        X* logits = reinterpret_cast<X*>(acts.logits + 0);
        {
            GpuTimed t =
                timed("forward", "head",
                      double(n) * (C * sizeof(S) + V * sizeof(X)) + double(V) * C * sizeof(S),
                      2.0 * double(n) * C * V);
            linear_forward(products, logits, V, input(2 * shape.layers) + row * C,
                           weight(memory.head), static_cast<const S*>(nullptr), n, C, V, stream);
        }
        GpuTimed t = timed("forward", "loss", double(n) * V * (1 + gradients) * sizeof(X));
        cross_entropy<S>(acts.losses + row, logits, gradients, targets() + row, loss_scale(), n,
                         config.vocab_size, V, stream);
    }

    // With the gradients, of the final norm's output in dinput.
    void head() {
        const int V = shape.vocab_size, C = shape.width;
        const S* dlogits = reinterpret_cast<const S*>(acts.logits + 0);
        for (int64_t row = 0; row < rows(); row += acts.head_rows) {
            const int64_t n = std::min(acts.head_rows, rows() - row);
            head_forward<S>(true, row, n);
            const double bytes = double(n) * (C + V) * sizeof(S);
            const double flops = 2.0 * double(n) * C * V;
            {
                GpuTimed t =
                    timed("input gradient", "head", bytes + double(V) * C * sizeof(S), flops);
                linear_backward_input(products, acts.dinput + row * C, dlogits, V,
                                      weight(memory.head), n, C, V, stream);
            }
            GpuTimed t =
                timed("weight gradient", "head", bytes + 2.0 * double(V) * C * sizeof(G), flops);
            linear_backward_weight(products, gradient(memory.head), static_cast<G*>(nullptr),
                                   dlogits, V, input(2 * shape.layers) + row * C, n, C, V,
                                   scratch(), stream);
        }
    }

    void add_loss() { add_losses(sums, static_cast<const float*>(acts.losses), rows(), stream); }

    // Copies a micro-batch to where kernels look for it.
    void set_batch(const int* tokens, const int* targets, double loss_scale) {
        reserve_batches(1);
        fill_batch(batches_ahead, layout(), tokens, targets, float(loss_scale), config.vocab_size,
                   counts);
        CUDA(cudaMemcpyAsync(batch, batches_ahead, size_t(layout().ints()) * sizeof(int),
                             cudaMemcpyHostToDevice, stream));
    }
    void reserve_batches(int n) {
        const int64_t ints = BatchLayout{acts.rows}.ints();
        if (batches_ahead.size >= n * ints) return;
        stream.wait();
        batches_ahead = Pinned<int>(n * ints);
        if (n == 1) return;
        batches = Array<int>(n * ints);
        while (int(arrived.size()) < n) {
            arrived.emplace_back();
            CUDA(cudaEventCreateWithFlags(&arrived.back(), cudaEventDisableTiming));
        }
    }

    double take_loss() {
        CUDA(cudaMemcpyAsync(sums_back, sums, sizeof(double), cudaMemcpyDeviceToHost, stream));
        stream.wait();
        times.book(profile);
        return sums_back[0];
    }

    double loss(const int* inputs, const int* targets, int b, int t) override {
        check_tokens(inputs, b, t);
        check_targets(targets);
        continues = false;
        tokens.assign(inputs, inputs + int64_t(B) * T);
        set_batch(inputs, targets, 0);
        forward();
        return loss_of_input();
    }
    // Of the final norm's output.
    double loss_of_input() {
        CUDA(cudaMemsetAsync(sums, 0, sizeof(double), stream));
        for (int64_t row = 0; row < rows(); row += acts.logit_rows)
            head_forward<float>(false, row, std::min(acts.logit_rows, rows() - row));
        add_loss();
        return take_loss();
    }

    double loss_and_gradients(const int* inputs, const int* targets, int b, int t,
                              double loss_scale) override {
        if (!options.training) fail("this model was made without gradients");
        check_tokens(inputs, b, t);
        check_targets(targets);
        set_batch(inputs, targets, loss_scale);
        CUDA(cudaMemsetAsync(sums, 0, sizeof(double), stream));
        micro_step();
        return take_loss();
    }

    // Forward and backward of the micro-batch in `batch`; adds to the gradients and to the loss.
    void micro_step() {
        continues = false;
        first = 0;
        auto known = std::find_if(graphs.begin(), graphs.end(),
                                  [&](const Graph& g) { return g.B == B && g.T == T; });
        if (profile || known == graphs.end()) {
            compute();
            if (known == graphs.end()) graphs.push_back({B, T, nullptr});
            return;
        }
        if (!known->graph) {
            cudaGraph_t recorded;
            CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            compute();
            CUDA(cudaStreamEndCapture(stream, &recorded));
            CUDA(cudaGraphInstantiate(&known->graph, recorded, 0));
            CUDA(cudaGraphDestroy(recorded));
        }
        CUDA(cudaGraphLaunch(known->graph, stream));
    }
    void compute() {
        forward();
        head();
        backward();
        add_loss();
    }

    void begin_step(const StepInput& step) override {
        if (!options.training) fail("this model was made without gradients");
        reserve_batches(std::max(2, step.micro_batches));
        const int64_t n = int64_t(step.B) * step.T, ints = BatchLayout{n}.ints();
        // 1. The tokens of all micro-batches, on a stream of their own.
        for (int m = 0; m < step.micro_batches; m++) {
            check_tokens(step.inputs + m * n, step.B, step.T);
            check_targets(step.targets + m * n);
            int* ahead = batches_ahead + m * ints;
            fill_batch(ahead, layout(), step.inputs + m * n, step.targets + m * n,
                       float(step.loss_scale), config.vocab_size, counts);
            CUDA(cudaMemcpyAsync(batches + m * ints, ahead, size_t(ints) * sizeof(int),
                                 cudaMemcpyHostToDevice, copies));
            CUDA(cudaEventRecord(arrived[m], copies));
        }
        // 2. The gradient of the mean loss.
        zero_gradients();
        CUDA(cudaMemsetAsync(sums, 0, 2 * sizeof(double), stream));
        stopped = false;
        for (int m = 0; m < step.micro_batches; m++) {
            if (m > 0 && step.stop) {
                // The host keeps one micro-batch ahead, so that a stop has little to wait for.
                if (m > 1) CUDA(cudaEventSynchronize(arrived[m - 2]));
                stopped = step.stop();
                if (stopped) return;
            }
            CUDA(cudaStreamWaitEvent(stream, arrived[m], 0));
            CUDA(cudaMemcpyAsync(batch, batches + m * ints, size_t(ints) * sizeof(int),
                                 cudaMemcpyDeviceToDevice, stream));
            micro_step();
            // Its tokens have been taken: from here on the event says that it is computed.
            if (step.stop) CUDA(cudaEventRecord(arrived[m], stream));
        }
        if (ranks->size > 1) {
            GpuTimed t = timed("update", "sum over ranks", double(memory.size) * sizeof(G));
            communicator.sum(gradients + 0, memory.size, stream);
            communicator.sum(sums + 0, 1, stream);
        }
        // 3. Its norm, and the step down it.
        step_scale = step.loss_scale;
        set_numbers(step.optimizer, step.grad_clip);
        norm_of_gradients();
        update(sums + 1, sums + 0);
        CUDA(cudaMemcpyAsync(sums_back, sums, 2 * sizeof(double), cudaMemcpyDeviceToHost, stream));
    }

    StepResult end_step() override {
        stream.wait();
        times.book(profile);
        return {sums_back[0] * step_scale, sums_back[1], stopped};
    }

    // If the tokens continue those of the last call, as in generating text, only the new positions
    // are computed: every layer's k and v are still there.
    void logits(const int* inputs, int b, int t, bool last_only, float* out) override {
        int from = 0;
        if (continues && last_only && b == 1)
            while (from < std::min(t - 1, T) && inputs[from] == tokens[from]) from++;
        check_tokens(inputs, b, t);
        tokens.assign(inputs, inputs + int64_t(B) * T);
        set_batch(inputs, nullptr, 0);
        forward(from);
        const int V = shape.vocab_size, C = shape.width;
        float* logits = reinterpret_cast<float*>(acts.logits + 0);
        const int64_t step = last_only ? 1 : acts.logit_rows;
        for (int64_t row = last_only ? T - 1 - first : 0; row < rows();
             row += last_only ? T : step) {
            const int64_t n = std::min(step, rows() - row);
            linear_forward(products, logits, V, input(2 * shape.layers) + row * C,
                           weight(memory.head), static_cast<const S*>(nullptr), n, C, V, stream);
            const size_t wanted = size_t(config.vocab_size) * sizeof(float);
            CUDA(cudaMemcpy2DAsync(out, wanted, logits, size_t(V) * sizeof(float), wanted,
                                   size_t(n), cudaMemcpyDeviceToHost, stream));
            stream.wait();
            out += n * config.vocab_size;
        }
        continues = b == 1;
    }

    void check_tokens(const int* inputs, int b, int t) {
        if (b < 1 || t < 1 || int64_t(b) * t > acts.rows)
            fail("a batch of ", b, " x ", t, " tokens was given to a model made for ", acts.rows);
        if (t > config.positions)
            fail("a sequence of ", t, " tokens was given to a model of ", config.positions,
                 " positions");
        B = b, T = t, first = 0;
        for (int64_t i = 0; i < int64_t(B) * T; i++)
            if (inputs[i] < 0 || inputs[i] >= config.vocab_size)
                fail("token ", inputs[i], " is not in the model's vocabulary of ",
                     config.vocab_size);
    }
    void check_targets(const int* targets) {
        for (int64_t i = 0; i < rows(); i++)
            if (targets[i] < -1 || targets[i] >= config.vocab_size)
                fail("target ", targets[i], " is neither -1 nor in the model's vocabulary of ",
                     config.vocab_size);
    }

    void initialize(uint64_t seed) override {
        continues = false;
        std::vector<float> values;
        for (const Param& p : registry.params) {
            values.resize(size_t(p.size()));
            lns::initialize(p, seed, values.data());
            write(Buffer::parameters, p, values.data());
        }
        auto clear = [&](auto& array) {
            if (array.size)
                CUDA(cudaMemsetAsync(array, 0, size_t(array.size) * sizeof(array[0]), stream));
        };
        clear(gradients), clear(moment1), clear(moment2);
        clear(rounded_moment1), clear(rounded_moment2);
        stream.wait();
    }

    void zero_gradients() override {
        GpuTimed t = timed("update", "zero gradients", double(memory.size) * sizeof(G));
        CUDA(cudaMemsetAsync(gradients, 0, size_t(memory.size) * sizeof(G), stream));
    }

    void norm_of_gradients() {
        GpuTimed t = timed("update", "gradient norm", double(memory.size) * sizeof(G));
        cuda::gradient_norm(sums + 1, static_cast<const G*>(gradients), memory.size, sums + 2,
                            stream);
    }
    double gradient_norm() override {
        norm_of_gradients();
        CUDA(cudaMemcpyAsync(sums_back + 1, sums + 1, sizeof(double), cudaMemcpyDeviceToHost,
                             stream));
        stream.wait();
        times.book(profile);
        return sums_back[1];
    }

    void set_numbers(const AdamW& o, double grad_clip) {
        AdamWNumbers& n = numbers_ahead[0];
        n.lr = float(o.lr), n.beta1 = float(o.beta1), n.beta2 = float(o.beta2);
        n.eps = float(o.eps), n.weight_decay = float(o.weight_decay);
        n.correction1 = float(1 / (1 - std::pow(o.beta1, double(o.step))));
        n.correction2 = float(1 / (1 - std::pow(o.beta2, double(o.step))));
        n.grad_clip = float(grad_clip), n.grad_scale = float(o.grad_scale);
        n.step = uint32_t(o.step);
        CUDA(cudaMemcpyAsync(numbers, numbers_ahead, sizeof n, cudaMemcpyHostToDevice, stream));
    }
    void update(const AdamW& o) override {
        set_numbers(o, 0);
        update(nullptr, nullptr);
        stream.wait();
        times.book(profile);
    }
    // norm, loss: on the GPU, or null.
    void update(const double* norm, const double* loss) {
        continues = false;
        if (options.moments == DType::bf16)
            update(rounded_moment1 + 0, rounded_moment2 + 0, norm, loss);
        else
            update(moment1 + 0, moment2 + 0, norm, loss);
    }
    template <class M> void update(M* m, M* v, const double* norm, const double* loss) {
        GpuTimed t = timed("update", "AdamW",
                           double(memory.size) *
                               (sizeof(G) + 4.0 * sizeof(M) +
                                (master.size ? 2.0 * sizeof(float) + sizeof(S) : 2.0 * sizeof(S))));
        adamw(parameters + 0, master + 0, static_cast<const G*>(gradients), m, v,
              static_cast<const uint32_t*>(decays), static_cast<const AdamWNumbers*>(numbers), norm,
              loss, options.stochastic_rounding, memory.size, stream);
    }

    // f(the array of a buffer)
    template <class F> void with_buffer(Buffer buffer, const F& f) {
        const bool rounded = options.moments == DType::bf16;
        if (buffer == Buffer::parameters)
            master.size ? f(master) : f(parameters);
        else if (buffer == Buffer::gradients)
            f(gradients);
        else if (buffer == Buffer::moment1)
            rounded ? f(rounded_moment1) : f(moment1);
        else
            rounded ? f(rounded_moment2) : f(moment2);
    }
    const Param& padded_param(const Param& p) const {
        return memory.params[size_t(&p - registry.params.data())];
    }

    void read(Buffer buffer, const Param& p, float* out) override {
        const Param& q = padded_param(p);
        const Placement place(p, q, config, shape);
        with_buffer(buffer, [&](auto& array) {
            using X = std::remove_reference_t<decltype(array[0])>;
            std::vector<X> values(size_t(q.size()));
            CUDA(cudaMemcpyAsync(values.data(), array + q.offset, values.size() * sizeof(X),
                                 cudaMemcpyDeviceToHost, stream));
            stream.wait();
            place.each([&](int64_t i, int64_t j) { out[i] = float(values[j]); });
        });
    }

    void write(Buffer buffer, const Param& p, const float* numbers) override {
        continues = false;
        const Param& q = padded_param(p);
        const Placement place(p, q, config, shape);
        auto upload = [&](auto& array) {
            using X = std::remove_reference_t<decltype(array[0])>;
            std::vector<X> values(size_t(q.size()), X(0.0f));
            place.each([&](int64_t i, int64_t j) { values[j] = X(numbers[i]); });
            CUDA(cudaMemcpyAsync(array + q.offset, values.data(), values.size() * sizeof(X),
                                 cudaMemcpyHostToDevice, stream));
            stream.wait();
        };
        with_buffer(buffer, upload);
        if (buffer == Buffer::parameters && master.size) upload(parameters);
    }

    // Layer by layer: a junction between two layers in two parts, the norms on the way out of one
    // and the norm on the way into the next. r is residual(2l) before layer l.
    static Junction way_out(Junction j) {
        j.in_norm = false;
        return j;
    }
    static Junction way_in(const Junction& j) {
        Junction in;
        in.branch = false;
        in.in_norm = j.in_norm, in.in_scale = j.in_scale;
        return in;
    }
    int at = 0; // r is residual(at)

    void join_part_forward(const Junction& j, int k, const float* r_prev, S* u) {
        junction_forward(j, shape.norm, shape.norm_eps, r_prev,
                         j.branch ? branch(k) : static_cast<const S*>(nullptr),
                         junction_parameters(k), residual(k), u, stats(k), rows(), shape.width,
                         stream);
    }
    void join_part_backward(const Junction& j, int k, const float* r_prev, bool starts = false) {
        junction_backward(j, shape.norm, shape.norm_eps, r_prev,
                          j.branch ? branch(k) : static_cast<const S*>(nullptr), residual(k),
                          junction_parameters(k), stats(k), static_cast<const S*>(acts.dinput),
                          starts, static_cast<float*>(acts.dresidual),
                          static_cast<S*>(acts.dbranch),
                          JunctionPointers<G>(gradients, memory.junctions[k]), acts.scratch, rows(),
                          shape.width, multiprocessors, stream);
    }
    // r into the place of junction k, and u from it.
    void enter(int k) {
        if (at != k)
            CUDA(cudaMemcpyAsync(residual(k), residual(at), stream_bytes(),
                                 cudaMemcpyDeviceToDevice, stream));
        at = k;
        join_part_forward(way_in(junction(config.scheme, config.layers, k)), k, residual(k),
                          acts.input.slot[k] < 0 ? nullptr : input(k));
    }
    void enter_backward(int k, bool starts = false) {
        const Junction j = way_in(junction(config.scheme, config.layers, k));
        join_part_backward(j, k, residual(k), starts);
    }
    size_t stream_bytes() const { return size_t(rows()) * shape.width * sizeof(float); }
    void check_probes() const {
        if (!options.training || options.recompute != Recompute::none) no_layers();
    }

    void embed(const int* inputs, int b, int t) override {
        check_probes();
        check_tokens(inputs, b, t);
        continues = false, at = 0;
        set_batch(inputs, nullptr, 0);
        embedding_forward(embedded(), this->inputs(), weight(memory.token_embedding),
                          weight(memory.position_embedding), first, rows(), T, shape.width, stream);
        join_part_forward(way_out(junction(config.scheme, config.layers, 0)), 0, embedded(),
                          nullptr);
        stream.wait();
    }
    void run_layer(int l) override {
        enter(2 * l);
        attention_sublayer_forward(l);
        join_forward(2 * l + 1);
        mlp_sublayer_forward(l);
        at = 2 * l + 2;
        join_part_forward(way_out(junction(config.scheme, config.layers, at)), at,
                          residual(2 * l + 1), nullptr);
        stream.wait();
        times.book(profile);
    }
    // The targets, to where kernels look for them.
    void set_targets(const int* targets, double loss_scale) {
        check_targets(targets);
        const float scale = float(loss_scale);
        const BatchLayout to = layout();
        CUDA(cudaMemcpyAsync(batch + to.targets(), targets, size_t(to.rows) * sizeof(int),
                             cudaMemcpyHostToDevice, stream));
        CUDA(cudaMemcpyAsync(batch + to.loss_scale(), &scale, sizeof scale, cudaMemcpyHostToDevice,
                             stream));
        stream.wait();
    }
    double finish(const int* targets) override {
        set_targets(targets, 0);
        enter(2 * config.layers);
        return loss_of_input();
    }
    void finish_backward(const int* targets, double loss_scale) override {
        set_targets(targets, loss_scale);
        enter(2 * config.layers);
        head();
        enter_backward(2 * config.layers, true);
        stream.wait();
        times.book(profile);
    }
    void run_layer_backward(int l) override {
        CUDA(cudaMemsetAsync(acts.dinput, 0, size_t(rows()) * shape.width * sizeof(S), stream));
        const Junction out = junction(config.scheme, config.layers, 2 * l + 2);
        join_part_backward(way_out(out), 2 * l + 2, residual(2 * l + 1));
        mlp_sublayer_backward(l);
        join_backward(2 * l + 1);
        attention_sublayer_backward(l);
        enter_backward(2 * l);
        stream.wait();
        times.book(profile);
    }
    // f(x, before, skip): the numbers of a stream are x − skip · before, where before is not null.
    template <class F> void with_stream(Stream which, const F& f) {
        const float* none = nullptr;
        switch (which) {
        case Stream::residual:
            return f(residual(at), none, 0.0f);
        case Stream::attention:
            if (branch(at - 1) != branch(at)) return f(branch(at - 1), none, 0.0f);
            // They share a slot, where no junction needs b again: it was r ← skip · r + b.
            return f(residual(at - 1), static_cast<const float*>(residual(at - 2)),
                     float(junction(config.scheme, config.layers, at - 1).skip));
        case Stream::mlp:
            return f(branch(at), none, 0.0f);
        case Stream::gradient:
            return f(acts.dresidual + 0, none, 0.0f);
        }
    }
    // n numbers from the GPU.
    template <class X> std::vector<X> fetch(const X* from, int64_t n) {
        std::vector<X> numbers(n);
        CUDA(cudaMemcpyAsync(numbers.data(), from, size_t(n) * sizeof(X), cudaMemcpyDeviceToHost,
                             stream));
        stream.wait();
        return numbers;
    }
    void read(Stream which, float* out) override {
        const int64_t n = rows() * shape.width;
        with_stream(which, [&](const auto* x, const float* before, float skip) {
            const auto numbers = fetch(x, n);
            const std::vector<float> others = before ? fetch(before, n) : std::vector<float>();
#pragma omp parallel for
            for (int64_t i = 0; i < n; i++)
                out[i] = before ? float(numbers[i]) - skip * others[i] : float(numbers[i]);
        });
    }
    float* writable(Stream which) {
        if (which != Stream::residual && which != Stream::gradient)
            fail("of the streams between layers r and its gradient alone can be written");
        return which == Stream::residual ? residual(at) : acts.dresidual + 0;
    }
    void write(Stream which, const float* values) override {
        CUDA(cudaMemcpyAsync(writable(which), values, stream_bytes(), cudaMemcpyHostToDevice,
                             stream));
        stream.wait();
    }
    void read_rows(Stream which, const std::vector<int64_t>& from, float* out) override {
        const int64_t C = shape.width;
        for (int64_t row : from) {
            CUDA(cudaMemcpyAsync(out, writable(which) + row * C, size_t(C) * sizeof(float),
                                 cudaMemcpyDeviceToHost, stream));
            out += C;
        }
        stream.wait();
    }
    void write_rows(Stream which, const std::vector<int64_t>& to, const float* values) override {
        const int64_t C = shape.width;
        CUDA(cudaMemsetAsync(writable(which), 0, stream_bytes(), stream));
        for (int64_t row : to) {
            CUDA(cudaMemcpyAsync(writable(which) + row * C, values, size_t(C) * sizeof(float),
                                 cudaMemcpyHostToDevice, stream));
            values += C;
        }
        stream.wait();
    }
    void rewind(int l) override { at = 2 * l; }

    std::vector<Moments> row_moments(Stream which) override {
        with_stream(which, [&](const auto* x, const float* before, float skip) {
            using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
            launch(row_moments_kernel<X>, blocks_for(rows(), rows_of_block), rows_of_block * warp,
                   0, stream, acts.moments + 0, x, before, skip, rows(), shape.width);
        });
        return fetch(acts.moments + 0, rows());
    }
    std::vector<double> row_chords(int l, int m) override {
        double* chords = reinterpret_cast<double*>(acts.moments + 0);
        launch(row_chords_kernel, blocks_for(rows(), rows_of_block), rows_of_block * warp, 0,
               stream, chords, residual(2 * l), residual(2 * m), rows(), shape.width);
        return fetch(chords, rows());
    }
    std::vector<double> gradient_squares() override {
        const Array<double> norms(int64_t(memory.params.size()));
        for (size_t i = 0; i < memory.params.size(); i++) {
            const Param& p = memory.params[i]; // a single number is followed by zeros
            cuda::gradient_norm(norms + i, static_cast<const G*>(gradients + p.offset),
                                (p.size() + 7) / 8 * 8, sums + 2, stream);
        }
        std::vector<double> squares = fetch(norms + 0, norms.size);
        for (double& x : squares) x *= x;
        return squares;
    }

    std::string first_nonfinite() override {
        Array<int> found(1);
        auto bad = [&](const auto* x, int64_t n) {
            using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
            CUDA(cudaMemsetAsync(found, 0, sizeof(int), stream));
            launch(find_nonfinite_kernel<X>, 256, 256, 0, stream, static_cast<int*>(found), x, n);
            int result = 0;
            CUDA(cudaMemcpyAsync(&result, found, sizeof(int), cudaMemcpyDeviceToHost, stream));
            stream.wait();
            return result != 0;
        };
        for (const Param& p : memory.params)
            if (bad(weight(p.offset), p.size())) return "the parameter " + p.name;
        if (rows() > 0) {
            const int64_t n = rows(), C = shape.width;
            if (bad(embedded(), n * C)) return "the embedding's output";
            for (int k = 0; k <= 2 * shape.layers; k++) {
                const int l = (k - 1) / 2;
                std::string layer = "layer " + std::to_string(l + 1) + "'s ";
                if (k > 0 && k % 2 == 1) {
                    if (acts.qkv.keeps(l) && bad(qkv(l), n * shape.qkv_width()))
                        return layer + "q, k and v";
                    if (acts.attended.keeps(l) && bad(attended(l), n * shape.q_width()))
                        return layer + "attention";
                }
                if (k > 0 && k % 2 == 0) {
                    if (acts.hidden.keeps(l) && bad(hidden(l), n * shape.mlp_in_width()))
                        return layer + "MLP input";
                    if (acts.activated.keeps(l) && bad(activated(l), n * shape.mlp_width))
                        return layer + "MLP activation";
                }
                if (acts.residual.keeps(k) && bad(residual(k), n * C))
                    return k == 0 ? "the residual stream after the embedding"
                                  : "the residual stream after " + layer +
                                        (k % 2 == 1 ? "attention" : "MLP");
                if (acts.input.keeps(k) && bad(input(k), n * C))
                    return k == 2 * shape.layers
                               ? "the final norm's output"
                               : "the norm before layer " + std::to_string(k / 2 + 1) + "'s " +
                                     (k % 2 == 0 ? "attention" : "MLP");
            }
            if (bad(static_cast<const float*>(acts.losses), n)) return "the loss";
        }
        if (options.training)
            for (auto p = memory.params.rbegin(); p != memory.params.rend(); ++p)
                if (bad(gradient(p->offset), p->size())) return "the gradient of " + p->name;
        return "";
    }
};

inline MemoryPlan plan(const Config& config, int B, int T, const ModelOptions& o, auto scalar,
                       auto gradient) {
    using S = decltype(scalar);
    MemoryPlan plan;
    const Config shape = padded(config);
    const int64_t n = make_registry(shape).size;
    plan.parameters = n * int64_t(sizeof(S));
    if (o.training) {
        plan.gradients = n * int64_t(sizeof gradient);
        plan.optimizer = 2 * n * int64_t(o.moments == DType::bf16 ? sizeof(bf16) : sizeof(float));
        if (sizeof(S) < sizeof(float) && o.master_weights)
            plan.optimizer += n * int64_t(sizeof(float));
        plan.optimizer += n / 64;
    }
    // Where a run is only planned, as many as an H100 has.
    const int multiprocessors = why_no_gpu().empty() ? gpu().multiprocessors : 132;
    Activations<S> acts;
    acts.layout(shape, B, T, o, multiprocessors, [&](auto& array, int64_t elements) {
        plan.activations += elements * int64_t(sizeof(array[0]));
    });
    if (config.rope())
        plan.activations += std::min<int64_t>(config.positions, acts.rows) *
                            (config.head_size / 2) * int64_t(sizeof(CosSin));
    plan.activations += BatchLayout{acts.rows}.ints() * int64_t(sizeof(int));
    plan.scratch = Products::workspace_bytes();
    return plan;
}

} // namespace lns::cuda

namespace lns {

std::unique_ptr<Model> make_cuda_model(const Config& config, int B, int T,
                                       const ModelOptions& options, const Ranks& ranks) {
    using namespace cuda;
    if (options.dtype == DType::float32)
        return std::make_unique<CudaModel<float, float>>(config, B, T, options, ranks);
    if (options.gradients == DType::float32)
        return std::make_unique<CudaModel<cuda::bf16, float>>(config, B, T, options, ranks);
    return std::make_unique<CudaModel<cuda::bf16, cuda::bf16>>(config, B, T, options, ranks);
}

MemoryPlan plan_cuda_memory(const Config& config, int B, int T, const ModelOptions& options) {
    if (options.dtype == DType::float32) return cuda::plan(config, B, T, options, 0.0f, 0.0f);
    if (options.gradients == DType::float32)
        return cuda::plan(config, B, T, options, cuda::bf16(), 0.0f);
    return cuda::plan(config, B, T, options, cuda::bf16(), cuda::bf16());
}

// ---------------------------------------------------------------------------------------------
// The GPU

void cuda::fail_call(const char* call, const char* file, int line, cudaError_t error) {
    const char* advice = "";
    if (error == cudaErrorMemoryAllocation)
        advice = "; lower --batch, ask for --recompute, or see with nvidia-smi who else has memory";
    if (error == cudaErrorNoKernelImageForDevice)
        advice = "; this build has no code for this GPU: make CUDA_ARCH=native";
    fail("the GPU failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ") in ",
         std::string(call, std::min<size_t>(std::strcspn(call, "("), 60)), " at ", file, ":", line,
         advice);
}

bool built_with_cuda() { return true; }

std::string why_no_gpu() {
    static const std::string why = []() -> std::string {
        auto version = [](int v) { return cat(v / 1000, ".", v % 1000 / 10); };
        int driver = 0, runtime = 0, count = 0, major = 0, minor = 0;
        CUDA(cudaDriverGetVersion(&driver));
        CUDA(cudaRuntimeGetVersion(&runtime));
        if (driver == 0) return "there is no NVIDIA driver here";
        const cudaError_t error = cudaGetDeviceCount(&count);
        cudaGetLastError(); // told here, not by the next call
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

namespace cuda {

// Seconds of the fastest of so many runs of what `run` enqueues, after one that is not counted.
template <class Run> double fastest(int runs, cudaStream_t stream, const Run& run) {
    struct Events {
        cudaEvent_t start = nullptr, stop = nullptr;
        Events() {
            CUDA(cudaEventCreate(&start));
            CUDA(cudaEventCreate(&stop));
        }
        ~Events() { cudaEventDestroy(start), cudaEventDestroy(stop); }
    } events;
    run();
    float best = INFINITY;
    for (int i = 0; i < runs; i++) {
        float milliseconds = 0;
        CUDA(cudaEventRecord(events.start, stream));
        run();
        CUDA(cudaEventRecord(events.stop, stream));
        CUDA(cudaEventSynchronize(events.stop));
        CUDA(cudaEventElapsedTime(&milliseconds, events.start, events.stop));
        best = std::min(best, milliseconds);
    }
    return std::max(double(best), 1e-3) / 1e3;
}

// Uniform in (−1, 1): a GPU multiplies zeros or ones faster, since it then needs less power.
template <class S> __global__ static void random_kernel(S* x, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        uint32_t bits = uint32_t(i) * 0x9E3779B9u;
        bits = (bits ^ bits >> 16) * 0x21F0AAADu;
        bits = (bits ^ bits >> 15) * 0xD35A2D97u;
        x[i] = S(float(bits ^ bits >> 15) * 0x1p-31f - 1.0f);
    }
}

template <class S> static double product_flops(int n) {
    OwnStream stream;
    Products products(stream);
    const int64_t size = int64_t(n) * n;
    Array<S> a(size), b(size), out(size);
    CUDA(cudaDeviceSynchronize()); // their zeros are written
    launch(random_kernel<S>, blocks_for(size, 4096), 256, 0, stream, a, size);
    launch(random_kernel<S>, blocks_for(size, 4096), 256, 0, stream, b, size);
    auto product = [&] {
        linear_forward(products, out + 0, n, static_cast<const S*>(a), static_cast<const S*>(b),
                       static_cast<const S*>(nullptr), n, n, n, stream);
    };
    return 2.0 * n * n * n / fastest(20, stream, product);
}

enum class Access { read, write, update };

// All of x (n), in place.
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
    // Never so, but the compiler cannot know that nobody wants the sum.
    if (access == Access::read && sum.x + sum.y + sum.z + sum.w == -1.0f) x[0] = sum;
}

static Bandwidth access_bandwidth(int64_t bytes) {
    OwnStream stream;
    const int64_t n = bytes / int64_t(sizeof(float4));
    Array<float> memory(n * 4);
    CUDA(cudaDeviceSynchronize()); // its zeros are written
    float4* x = reinterpret_cast<float4*>(memory + 0);
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

} // namespace cuda

double measured_gpu_flops(DType dtype) {
    auto measure = [](auto scalar) {
        using S = decltype(scalar);
        const int small = 256, large = 8192;
        const double flops = cuda::product_flops<S>(small);
        const bool slow = 2.0 * large * large * large / flops > 2; // seconds; a GPU takes 0.3
        const bool fits = 4 * int64_t(sizeof(S)) * large * large < gpu().free;
        return slow || !fits ? flops : cuda::product_flops<S>(large);
    };
    return dtype == DType::bf16 ? measure(cuda::bf16()) : measure(0.0f);
}

Bandwidth measured_gpu_bandwidth() {
    const int64_t small = 1 << 20, large = int64_t(1) << 30; // bytes; the largest caches have 1e8
    const Bandwidth b = cuda::access_bandwidth(small);
    const bool slow = double(large) / b.read > 0.01; // seconds; a GPU takes 0.001
    return slow || 2 * large > gpu().free ? b : cuda::access_bandwidth(large);
}

} // namespace lns
