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

// ---------------------------------------------------------------------------------------------
// The MLP's activations: h (rows, H) → a (rows, H)

// ---------------------------------------------------------------------------------------------
// Loss

// ---------------------------------------------------------------------------------------------
// The optimizer

// ---------------------------------------------------------------------------------------------
// The model

// ---------------------------------------------------------------------------------------------
// The GPU

void fail_call(const char* call, const char* file, int line, cudaError_t error) {
    const char* advice = "";
    if (error == cudaErrorMemoryAllocation)
        advice = "; lower --batch, ask for --recompute, or see with nvidia-smi who else has memory";
    if (error == cudaErrorNoKernelImageForDevice)
        advice = "; this build has no code for this GPU: make CUDA_ARCH=native";
    if (error == cudaErrorECCUncorrectable)
        advice = "; the GPU's memory is faulty: go on with the last checkpoint on another one";
    fail("the GPU failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ") in ",
         std::string(call, std::min<size_t>(std::strcspn(call, "("), 60)), " at ", file, ":", line,
         advice);
}

} // namespace lns::cuda

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

Gpu gpu(const Ranks& ranks) {
    if (const std::string why = why_no_gpu(); !why.empty()) fail(why);
    Gpu g;
    CUDA(cudaGetDeviceCount(&g.count));
    g.index = ranks.local_rank % g.count;
    CUDA(cudaSetDevice(g.index));
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

double measured_gpu_flops(DType) { fail("measured_gpu_flops: not yet"); }
Bandwidth measured_gpu_bandwidth() { fail("measured_gpu_bandwidth: not yet"); }
std::unique_ptr<Model> make_cuda_model(const Config&, int, int, const ModelOptions&, const Ranks&) {
    fail("make_cuda_model: not yet");
}
MemoryPlan plan_cuda_memory(const Config&, int, int, const ModelOptions&) {
    fail("plan_cuda_memory: not yet");
}

} // namespace lns
