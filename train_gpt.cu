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
        const int place = sizeof(S) == 2 ? c ^ (row % 8) : c;
        return at + row * stride + place * per_chunk;
    }
    __device__ Tile from_row(int row) const { return {at + row * stride}; } // a multiple of 8

    // Begins to copy ROWS rows from memory. What is not among the first `rows` of them, or the
    // first `columns` of a row, becomes 0.
    template <int ROWS>
    __device__ void load(const S* from, int from_stride, int rows, int columns) const {
        const int chunks = D / per_chunk;
        static_assert(ROWS * chunks % attention_threads == 0);
#pragma unroll
        for (int i = 0; i < ROWS * chunks; i += attention_threads) {
            const int row = (i + threadIdx.x) / chunks, c = (i + threadIdx.x) % chunks;
            copy_async(chunk(row, c), from + row * from_stride + c * per_chunk,
                       row < rows && c * per_chunk < columns);
        }
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

// How much a warp has at once: 16·M rows of its own, STEP of the others, and of its own whether
// they are HELD in registers. Chosen so that nothing spills, and so that two blocks or more are on
// a multiprocessor where there are tensor cores to keep busy.
template <class S, int D> struct AttentionTiles { // float
    static constexpr int step = D == 64 ? 32 : 8;
    static constexpr int forward_m = 1, forward_step = step, dq_m = 1, dq_step = step, dkv_m = 1,
                         dkv_step = step;
    static constexpr bool forward_held = false, dq_held = false, dkv_held = false;
};
template <> struct AttentionTiles<bf16, 64> {
    static constexpr int forward_m = 2, forward_step = 64, dq_m = 2, dq_step = 32, dkv_m = 2,
                         dkv_step = 32;
    static constexpr bool forward_held = true, dq_held = true, dkv_held = false;
};
template <> struct AttentionTiles<bf16, 128> {
    static constexpr int forward_m = 2, forward_step = 32, dq_m = 1, dq_step = 32, dkv_m = 1,
                         dkv_step = 32;
    static constexpr bool forward_held = false, dq_held = true, dkv_held = true;
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
constexpr int attention_scratch = sizeof(S) == 2 ? 0 : attention_warps* Tile<S, STEP>::size(16 * M);
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
                x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1)); // 4 lanes have a row
                x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
                largest[m][i] = x;
                outgrown |= c * (x - reference[m][i]) > 8;
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
                float x = sum[m][i];
                x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
                x += __shfl_xor_sync(0xFFFFFFFFu, x, 2);
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
    const S* rows = qkv + int64_t(b) * a.T * a.row();
    const int t0 = a.first + (tiles - 1 - turn.tile) * ROWS, seen = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    auto load = [&](int key, int place) {
        const S* row = rows + int64_t(key) * a.row() + (a.NH + kv) * a.HS;
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
    softmax.finish(o, lse + int64_t(turn.head) * a.T + t, a.T - t, c);
    __syncthreads();
    store(out + (int64_t(b) * a.T + t) * a.q_width() + h * a.HS, a.q_width(), a.T - t, a.HS, o,
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

// out (B, T, NH·HS) = softmax(q kᵀ · scale) v, causal: position t sees 0 … t. Keeps lse (B, NH, T),
// the logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, float* lse, const S* qkv, const AttentionShape& a,
                       cudaStream_t stream) {
    check_head_size(a);
    if (a.HS <= 64)
        attention_forward_tiles<S, 64>(out, lse, qkv, a, stream);
    else
        attention_forward_tiles<S, 128>(out, lse, qkv, a, stream);
}

// dO · O of a warp's 16·M rows, in shared and in global memory.
template <int M, int D, class S>
__device__ inline void output_dot(float* shared, float* delta, const S* dout, const S* out,
                                  int64_t stride, int rows, int columns) {
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
        if (column == 0) {
            shared[row] = sum;
            if (row < rows) delta[row] = sum;
        }
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
    const S* rows = qkv + int64_t(b) * a.T * a.row();
    const int t0 = (tiles - 1 - turn.tile) * ROWS, seen = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    const int64_t at = int64_t(turn.head) * a.T;                         // in lse and delta
    const int64_t o_at = int64_t(b) * a.T * a.q_width() + h * a.HS;      // in out and dout
    auto load = [&](int key, int place) {
        const S* row = rows + int64_t(key) * a.row() + (a.NH + kv) * a.HS;
        k_tiles.from_row(place).template load<STEP>(row, a.row(), a.T - key, a.HS);
        v_tiles.from_row(place).template load<STEP>(row + a.kv_width(), a.row(), a.T - key, a.HS);
        copy_async_commit();
    };
    q_tile.template load<ROWS>(rows + int64_t(t0) * a.row() + h * a.HS, a.row(), a.T - t0, a.HS);
    do_tile.template load<ROWS>(dout + o_at + int64_t(t0) * a.q_width(), a.q_width(), a.T - t0,
                                a.HS);
    copy_async_commit();
    load(0, 0);
    output_dot<M, D>(dots + warp_row, delta + at + t, dout + o_at + int64_t(t) * a.q_width(),
                     out + o_at + int64_t(t) * a.q_width(), a.q_width(), a.T - t, a.HS);
    copy_async_wait<1>();
    __syncthreads();
    const auto q = left_factor<HELD, M>(q_tile, warp_row);
    const auto dO = left_factor<HELD, M>(do_tile, warp_row);

    const float c = a.scale() * log2_e;
    Sums<M, D> dq = {};
    float row_lse[M][2], dot[M][2]; // lse in base 2
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = dq.row(i / 2, i % 2 * 2);
        row_lse[i / 2][i % 2] = t + row < a.T ? log2_e * lse[at + t + row] : INFINITY;
        dot[i / 2][i % 2] = dots[warp_row + row];
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
                }
        multiply(dq, left_factor(ds, own_scratch<M, S, STEP>(scratch)), k);
    }
    __syncthreads();
    scale_sums(dq, a.scale());
    store(dqkv + (int64_t(b) * a.T + t) * a.row() + h * a.HS, a.row(), a.T - t, a.HS, dq,
          reinterpret_cast<float*>(numbers), table ? table + int64_t(t) * (a.channels / 2) : table,
          a.channels);
}

// The same transposed: a block has a tile of keys, and goes through the queries that see them.
template <class S, int D, int M, int STEP, bool HELD>
__global__ static void __launch_bounds__(attention_threads)
    attention_dkv_kernel(S* dqkv, const S* dout, const S* qkv, const float* lse,
                         const CosSin* table, const float* delta, AttentionShape a,
                         int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* numbers = shared.take<S>(attention_tile_numbers<S, D>(2 * ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    float* lses = shared.take<float>(2 * STEP); // in base 2
    float* dots = shared.take<float>(2 * STEP);
    TileMemory<S> memory = {numbers};
    const auto k_tile = memory.template take<D>(ROWS), v_tile = memory.template take<D>(ROWS);
    const auto q_tiles = memory.template take<D>(2 * STEP);
    const auto do_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T + ROWS - 1) / ROWS, group = a.NH / a.KVH;
    const Turn turn(tiles, a.B * a.KVH, heads_at_once);
    const int b = turn.head / a.KVH, kv = turn.head % a.KVH;
    const S* rows = qkv + int64_t(b) * a.T * a.row();
    const int key0 = turn.tile * ROWS;
    const int warp_row = threadIdx.x / warp * 16 * M, key = key0 + warp_row;
    const int steps = group * ((a.T - key0 + STEP - 1) / STEP);
    int next_h = kv * group, next_t = key0; // the tile of queries that is on its way
    float next_lse = 0, next_dot = 0;       // of one of them
    auto load = [&](int place) {
        const S* q = rows + int64_t(next_t) * a.row() + next_h * a.HS;
        const S* dO = dout + (int64_t(b) * a.T + next_t) * a.q_width() + next_h * a.HS;
        q_tiles.from_row(place).template load<STEP>(q, a.row(), a.T - next_t, a.HS);
        do_tiles.from_row(place).template load<STEP>(dO, a.q_width(), a.T - next_t, a.HS);
        copy_async_commit();
        const bool there = threadIdx.x < STEP && next_t + int(threadIdx.x) < a.T;
        const int64_t at = (int64_t(b) * a.NH + next_h) * a.T + next_t + threadIdx.x;
        next_lse = there ? log2_e * lse[at] : INFINITY; // a probability of 0
        next_dot = there ? delta[at] : 0;
    };
    const S* kv_rows = rows + int64_t(key0) * a.row() + (a.NH + kv) * a.HS;
    k_tile.template load<ROWS>(kv_rows, a.row(), a.T - key0, a.HS);
    v_tile.template load<ROWS>(kv_rows + a.kv_width(), a.row(), a.T - key0, a.HS);
    copy_async_commit();
    load(0);
    copy_async_wait<1>();
    __syncthreads();
    const auto k = left_factor<HELD, M>(k_tile, warp_row);
    const auto v = left_factor<false, M>(v_tile, warp_row);

    const float c = a.scale() * log2_e;
    Sums<M, D> dk = {}, dv = {};
    for (int step = 0, place = 0; step < steps; step++, place ^= STEP) {
        const int t = next_t;
        copy_async_wait<0>();
        if (threadIdx.x < STEP) {
            lses[place + threadIdx.x] = next_lse;
            dots[place + threadIdx.x] = next_dot;
        }
        __syncthreads();
        next_t += STEP;
        if (next_t >= a.T) next_t = key0, next_h++;
        if (step + 1 < steps) load(place ^ STEP);
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
                    x = fast_exp2(c * x - lses[place + query]);
                    ds.x[m][n][e] = x * (ds.x[m][n][e] - dots[place + query]);
                }
        const auto own = own_scratch<M, S, STEP>(scratch);
        multiply(dv, left_factor(p, own), dO);
        multiply(dk, left_factor(ds, own), q);
    }
    __syncthreads();
    scale_sums(dk, a.scale());
    S* drows = dqkv + (int64_t(b) * a.T + key) * a.row() + (a.NH + kv) * a.HS;
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
        launch(attention_dkv_kernel<S, D, M, STEP, Tiles::dkv_held>, blocks_for(a.T, ROWS) * heads,
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
    if (a.HS <= 64)
        attention_backward_tiles<S, 64>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
    else
        attention_backward_tiles<S, 128>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
}

// ---------------------------------------------------------------------------------------------
// The MLP's activations: h (rows, H) → a (rows, H)

// ---------------------------------------------------------------------------------------------
// Loss

// ---------------------------------------------------------------------------------------------
// The optimizer

// ---------------------------------------------------------------------------------------------
// The model

} // namespace lns::cuda
