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
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <cublasLt.h>

#include "gpt/bf16.h"
#include "gpt/cache.h"
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
// norm schemes differ (gpt/scheme.h has its equations). One kernel forward and one backward for
// every row of the table; what a junction has not is a branch that all threads pass by together.

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
    bool branch, branch_norm, out_norm, in_norm, gate, gate_on_skip, keeps_branch;
    Gamma gamma;
    NormType type;
    float skip, in_scale, eps;
    int C, warps;
    int64_t rows;

    JunctionPlan(const Junction& j, NormType type, double eps, int64_t rows, const RowShape& shape)
        : branch(j.branch), branch_norm(j.branch_norm), out_norm(j.out_norm), in_norm(j.in_norm),
          gate(j.gate), gate_on_skip(j.gate_on_skip), keeps_branch(j.keeps_branch()),
          gamma(j.gamma), type(type), skip(float(j.skip)), in_scale(float(j.in_scale)),
          eps(float(eps)), C(shape.C), warps(shape.warps), rows(rows) {}
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
template <class S, class G, int N>
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
        if (j.keeps_branch) {
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
        if (j.gate_on_skip) {
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

        if (j.branch_norm || j.gamma != Gamma::none) {
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
__global__ static void junction_gather_kernel(JunctionSums<G> which, JunctionScratch scratch,
                                              int partials, int C) {
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

// Blocks that a backward pass has at most.
inline int junction_blocks(int multiprocessors) { return 2 * multiprocessors; }
// Bytes of scratch for a width of C.
inline int64_t junction_scratch(int C, int multiprocessors) {
    return junction_blocks(multiprocessors) * int64_t(2 * sizeof(double) + 7 * C * sizeof(float));
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
    const RowShape shape = row_shape(C);
    const JunctionSums<G> which(grads, j.gamma);
    // As many rows at once as leave room for two blocks on a multiprocessor.
    int groups = shape.warps == 1 ? 8 : 1;
    auto shared = [&] {
        const int threads = warp * shape.warps * groups;
        return shared_bytes<float>(16) + shared_bytes<double>(2 * threads) +
               shared_bytes<float>(size_t(groups) * which.count * C);
    };
    while (groups > 1 && shared() > 80 * 1024) groups /= 2;
    const int blocks = std::min(blocks_for(rows, groups), junction_blocks(multiprocessors));
    JunctionScratch scratch;
    scratch.scalars = static_cast<double*>(scratch_memory);
    scratch.vectors = reinterpret_cast<float*>(scratch.scalars + 2 * blocks);
    with_vectors(shape, [&](auto N) {
        launch(junction_backward_kernel<S, G, decltype(N)::value>, blocks,
               warp * shape.warps * groups, shared(), stream,
               JunctionPlan(j, type, eps, rows, shape), r_prev, b, r, p, stats, du, starts, dr, db,
               which, scratch);
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
// for the first time, and remembered (gpt/cache.h) so that the next run has the same bits. Where
// nothing can be remembered, or measured since a stream is being captured, it is the one that
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
template <int N, class S>
__global__ static void qk_forward_kernel(S* qkv, S* raw, NormStats* stats, const S* q_weight,
                                         const S* k_weight, float eps, const CosSin* table,
                                         AttentionShape a) {
    SharedMemory shared;
    float* exchange = shared.take<float>(2 * warp);
    const int Q = a.q_width(), K = a.kv_width();
    const int half = (a.channels + 1) / 2; // an odd last one has a channel of padding for partner
    const int units = half / N;            // of a head
    const int64_t row = a.first + int64_t(blockIdx.x);
    S* x = qkv + row * a.row();
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
        store_some(x + at, low), store_some(x + at + half, high);
    }
}

// What q and k (rows, NH·HS and KVH·HS of a row of qkv) go through between their matrix and
// attention, in place: OLMo 2's RMSNorm over the whole of q and of k, if there is `raw` (rows,
// (NH + KVH)·HS), which keeps what it saw, and stats (rows, 2); then rotary positions, if there is
// a table (T, channels/2). From row `first` on. Channels of padding are 0 and stay so.
template <class S>
void qk_forward(S* qkv, S* raw, NormStats* stats, const S* q_weight, const S* k_weight, double eps,
                const CosSin* table, const AttentionShape& a, cudaStream_t stream) {
    if (!raw && !table) return;
    const bool whole = a.channels % 16 == 0; // both halves are vectors of 8
    const int units = (a.NH + a.KVH) * blocks_for(a.channels, whole ? 16 : 2);
    launch(whole ? qk_forward_kernel<8, S> : qk_forward_kernel<1, S>, unsigned(a.rows() - a.first),
           threads_for(units, 512), shared_bytes<float>(2 * warp), stream, qkv, raw, stats,
           q_weight, k_weight, float(eps), table, a);
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
__global__ static __launch_bounds__(1024) void cross_entropy_kernel(float* losses, X* logits,
                                                                    bool gradients,
                                                                    const int* targets,
                                                                    const float* loss_scale, int V,
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

// gpt/random.h's, for the GPU.
__device__ inline uint32_t mix_bits(uint32_t x) {
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

// Up or down to a bf16 with the probabilities that make the mean exact, as round_stochastically of
// gpt/bf16.h does; a float that bf16 holds exactly. random: 16 random bits.
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

} // namespace lns::cuda
