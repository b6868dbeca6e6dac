// The model of train_gpt.cpp on a GPU: the same sections in the same order under the same names, so
// that the two can be read side by side. cuBLASLt multiplies matrices; everything else is a kernel
// of our own, one pass over memory each, with the function that launches it below. A line of dashes
// begins each section.
//
// Sizes: B sequences of T tokens; V vocabulary; C width; L layers; NH heads of q and KVH of k and
// v, of HS channels each; H width of the MLP. Arrays are row-major, a row is a token. C, H, HS and
// V are multiples of 8 (gpt/cuda/padding.h), so that memory is accessed 16 bytes at a time.
// S is the scalar of weights and activations (bf16 or float), G that of the parameters' gradients.
// The residual stream, its gradient and all accumulators are float. A backward function writes the
// gradients of activations and adds to those of parameters. No sum depends on the order in which
// blocks or warps run: the same pass gives the same bits.
//
// Functions enqueue on a stream and return; those that wait for the GPU say so.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

// defines: fail, cat
#include "gpt/base/error.h"
// defines: mix_bits
#include "gpt/base/random.h"
// defines: PassTensors, head_part
#include "gpt/model/activations.h"
// defines: JunctionPointers, junction_vectors, fill_rotary_table
#include "gpt/model/layers.h"
// defines: Config, Registry, Param, Junction, Model, ModelOptions, StepInput, Hyperparameters,
// Profile, …
#include "gpt/model/model.h"
#include "gpt/model/muon.h" // defines: quintics, muon_scale

// defines: CUDA, launch, blocks_at_once, shared_bytes, SharedMemory, copy_async, …
#include "gpt/cuda/cuda.h"
// defines: bf16, warp, load8, store8, warp_sum, block_sums, sum_rows, sum_parts, sigmoid,
// blocks_for, threads_for, OnlineSoftmax
#include "gpt/cuda/kernel.cuh"
// defines: Array, Pinned, OwnStream
#include "gpt/cuda/memory.h"
// defines: Matmul, CublasLt, data_type
#include "gpt/cuda/matmul.cuh"
// defines: AttentionShape, CosSin, mma_attention_forward, mma_attention_backward
#include "gpt/cuda/attention.cuh"
// defines: hopper_attention_forward, hopper_attention_backward
#include "gpt/cuda/attention_hopper.cuh"
// defines: TokenRows, BatchLayout, fill_batch
#include "gpt/cuda/batch.h"
// defines: pad_config
#include "gpt/cuda/padding.h"
// defines: Costs
#include "gpt/cuda/costs.h"
// defines: Timed, EventTimes
#include "gpt/cuda/timing.h"
// defines: Communicator
#include "gpt/cuda/nccl.h"
// defines: built_with_cuda, why_no_gpu, use_gpu, gpu
#include "gpt/cuda/gpu_query.cuh"
// defines: measured_gpu_flops, measured_gpu_bandwidth
#include "gpt/cuda/gpu_peaks.cuh"

namespace lns::cuda {

// ---------------------------------------------------------------------------------------------
// Embedding: out[row] = scale · (wte[token] + wpe[t]), out (rows, C). Its gradient is gathered
// token by token, so that no two blocks write to the same row. scale (1), or null: 1. positions
// (rows), or null: the first row is at position `first`, which is 0 unless B is 1.

template <class S>
__global__ static void embedding_forward_kernel(float* out, const int* tokens, const S* wte,
                                                const S* wpe, const S* scale, int first,
                                                int64_t rows, int T, int C, const int* positions) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= rows * C) return;
    const int64_t row = at / C;
    const int channel = int(at % C);
    float x[8], position[8] = {};
    load8(x, wte + int64_t(tokens[row]) * C + channel);
    const int64_t t = positions ? positions[row] : (first + row) % T;
    if (wpe) load8(position, wpe + t * C + channel);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] += position[i];
    if (scale)
        for (int i = 0; i < 8; i++) x[i] *= float(*scale);
    store8(out + at, x);
}

template <class S>
void embedding_forward(float* out, const int* tokens, const S* wte, const S* wpe, const S* scale,
                       int first, int64_t rows, int T, int C, cudaStream_t stream,
                       const int* positions = nullptr) {
    launch(embedding_forward_kernel<S>, blocks_for(rows * C, 256 * 8), 256, 0, stream, out, tokens,
           wte, wpe, scale, first, rows, T, C, positions);
}

// partial (gridDim.x) = a block's part of Σ dout ⊙ (wte[token] + wpe[t]).
template <class S>
__global__ static void
embedding_scale_backward_kernel(double* partial, float* dout, const int* tokens, const S* wte,
                                const S* wpe, const S* scale, int64_t rows, int T, int C) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {};
    for (int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; at < rows * C;
         at += int64_t(gridDim.x) * blockDim.x * 8) {
        const int64_t row = at / C;
        const int channel = int(at % C);
        float d[8], x[8], position[8] = {};
        load8(d, dout + at);
        load8(x, wte + int64_t(tokens[row]) * C + channel);
        if (wpe) load8(position, wpe + row % T * C + channel);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            total[0] += double(d[i]) * double(x[i] + position[i]);
            d[i] *= float(*scale);
        }
        store8(dout + at, d);
    }
    block_sums(total, exchange);
    if (threadIdx.x == 0) partial[blockIdx.x] = total[0];
}
template <class G> __global__ static void add_partial_kernel(G* sum, const double* partial, int n) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {};
    for (int i = threadIdx.x; i < n; i += blockDim.x) total[0] += partial[i];
    block_sums(total, exchange);
    if (threadIdx.x == 0) *sum = G(float(*sum) + float(total[0]));
}

// Of the scale: adds to dscale (1) unless that is null, and multiplies dout by the scale. scratch:
// `blocks` doubles.
template <class S, class G>
void embedding_scale_backward(G* dscale, float* dout, const int* tokens, const S* wte, const S* wpe,
                              const S* scale, int64_t rows, int T, int C, double* scratch,
                              int blocks, cudaStream_t stream) {
    launch(embedding_scale_backward_kernel<S>, blocks, 256, shared_bytes<double>(warp), stream,
           scratch, dout, tokens, wte, wpe, scale, rows, T, C);
    if (dscale)
        launch(add_partial_kernel<G>, 1, 256, shared_bytes<double>(warp), stream, dscale, scratch,
               blocks);
}

// A block sums 256 channels of all rows of one token.
template <class G>
__global__ static void embedding_backward_kernel(G* dwte, TokenRows by_token, const float* dout,
                                                 int C) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * 256);
    if (int(blockIdx.x) >= *by_token.count) return;
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    const int channel = blockIdx.y * 256 + lane * 8;
    sum_rows(sums, by_token.begin[blockIdx.x], by_token.begin[blockIdx.x + 1], channel < C,
             [&](int64_t i) { return dout + int64_t(by_token.order[i]) * C + blockIdx.y * 256; });
    if (w > 0 || channel >= C) return;
    G* gradient = dwte + int64_t(by_token.tokens[blockIdx.x]) * C + channel;
    float total[8];
    load8(total, gradient);
    for (int other = 0; other < 8; other++)
        for (int j = 0; j < 8; j++) total[j] += sums[other * 256 + lane * 8 + j];
    store8(gradient, total);
}

// dwpe[t] += Σ over sequences.
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
// Norms of one row x (C): y = x̂ ⊙ w + bias with x̂ = (x − mean) · rstd. LayerNorm has the
// mean and 1 / sqrt(variance + eps), RMSNorm (arXiv 1910.07467) 0 and 1 / sqrt(mean square + eps).
// DyT (arXiv 2503.10622), which stands in for a norm, has x̂ = tanh(α · x), α learned; its rstd is
// α. A null weight is 1, a null bias 0. A row stays in registers: of one warp up to 1,024 channels,
// of a block of 2, 4 or 8 warps beyond. Each lane has N vectors of 8 elements.

struct NormStats {
    float mean, rstd;
};

struct RowShape {
    int C, warps, vectors; // warps a row, vectors a lane
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

// A thread's part of a row, and sums over the row. All threads of the row call these together.
template <int N> struct RowPart {
    int C, warps;
    float* exchange; // (2, 8), shared by the row's warps
    int which = 0;   // of the two

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

    // The slots alternate: between two writes of one lies a barrier that all its readers reached.
    __device__ float sum(float x) {
        x = warp_sum(x);
        if (warps == 1) return x;
        float* slot = exchange + 8 * which;
        which ^= 1;
        if (threadIdx.x % warp == 0) slot[threadIdx.x / warp] = x;
        __syncthreads();
        float all = 0;
        for (int w = 0; w < warps; w++) all += slot[w];
        return all;
    }
};

template <bool dyt, int N, class S>
__device__ NormStats norm_stats(NormType type, float eps, const float (&x)[N][8], const S* alpha,
                                RowPart<N>& part) {
    if constexpr (dyt) return {0, float(*alpha)};
    float mean = 0, square = 0;
    if (type == NormType::layer) {
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) mean += x[n][i]; // zeros beyond the row
        mean = part.sum(mean) / float(part.C);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
        if (part.has(n))
            for (int i = 0; i < 8; i++) square += (x[n][i] - mean) * (x[n][i] - mean);
    return {mean, rsqrtf(part.sum(square) / float(part.C) + eps)};
}

// y = scale · (x̂ ⊙ w + bias); y may be x.
template <bool dyt, int N, class S>
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
        for (int i = 0; i < 8; i++) {
            const float z = dyt ? tanhf(stats.rstd * x[n][i]) : (x[n][i] - stats.mean) * stats.rstd;
            y[n][i] = scale * (z * weight[i] + offset[i]);
        }
    }
}

// Adds x to a thread's channels `at` … of sums (C), in shared memory. The two halves of 8 elements
// lie C/2 apart, so that the lanes of a warp do not collide in a bank.
__device__ inline void add_to_sums(float* sums, const float (&x)[8], int at, int C) {
    float4* low = reinterpret_cast<float4*>(sums + at / 2);
    float4* high = reinterpret_cast<float4*>(sums + C / 2 + at / 2);
    float4 a = *low, b = *high;
    a.x += x[0], a.y += x[1], a.z += x[2], a.w += x[3];
    b.x += x[4], b.y += x[5], b.z += x[6], b.w += x[7];
    *low = a, *high = b;
}
// The index of a channel's sum.
__device__ inline int index_of_sum(int channel, int C) {
    return channel % 8 / 4 * (C / 2) + channel / 8 * 4 + channel % 4;
}

// With g = w ⊙ dy ⊙ (1 − x̂²): dx = α · g, dα = Σ g ⊙ x. Arguments as below.
template <int N, class S>
__device__ double dyt_row_backward(float alpha, const float (&x)[N][8], const S* w,
                                   float (&dy)[N][8], float* dw, float* dbias,
                                   const RowPart<N>& part) {
    double dalpha = 0;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!part.has(n)) continue;
        float weight[8] = {1, 1, 1, 1, 1, 1, 1, 1}, product[8];
        if (w) load8(weight, w + part.at(n));
        if (dbias) add_to_sums(dbias, dy[n], part.at(n), part.C);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float t = tanhf(alpha * x[n][i]), g = dy[n][i] * weight[i] * (1 - t * t);
            product[i] = dy[n][i] * t;
            dalpha += double(g) * double(x[n][i]);
            dy[n][i] = alpha * g;
        }
        if (dw) add_to_sums(dw, product, part.at(n), part.C);
    }
    return dalpha;
}

// Replaces dy, the gradient of x̂ ⊙ w + bias, by dx; adds to the sums dw and dbias, if not null.
// Returns a thread's part of the gradient of DyT's α, in double as much cancels over all channels.
// With g = w ⊙ dy: dx = rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), without mean(g) for RMSNorm.
template <bool dyt, int N, class S>
__device__ double norm_row_backward(NormType type, const NormStats& stats, const float (&x)[N][8],
                                    const S* w, float (&dy)[N][8], float* dw, float* dbias,
                                    RowPart<N>& part) {
    if constexpr (dyt) return dyt_row_backward(stats.rstd, x, w, dy, dw, dbias, part);
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
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The junction, where a sublayer's output b meets the residual stream r: the one place in which the
// norm schemes differ (gpt/model/scheme.h has its equations). One kernel forward and one backward
// serve every scheme; absent features are skipped by uniform branches.

struct JunctionStats {
    NormStats branch, out, in, second;
};

// A kernel's instances, each with what the one before has: `extended` is for the few schemes with a
// second stream, ω or x₀.
enum class JunctionInstance { plain, extended, dyt };

// What a junction does to rows of C channels, for a kernel.
struct JunctionPlan {
    bool branch, branch_norm, out_norm, in_norm, gate, gate_on_skip, keeps_branch;
    bool omega, adds_start, second, starts_second, reads_second, extended;
    Gamma gamma;
    NormType type;
    float skip, beta, in_scale, eps, in_eps;
    RowShape shape;
    int64_t rows;
    int groups; // above 1: in_norm is false, and there is a norm over groups

    JunctionPlan(const Junction& j, const Config& c, int64_t rows)
        : branch(j.branch), branch_norm(j.branch_norm), out_norm(j.out_norm),
          in_norm(j.in_norm && j.in_groups == 1), gate(j.gate), gate_on_skip(j.gate_on_skip),
          keeps_branch(j.keeps_branch()), omega(j.omega), adds_start(j.adds_start),
          second(j.second), starts_second(j.starts_second), reads_second(j.reads_second),
          extended(j.extended()), gamma(j.gamma), type(c.norm), skip(float(j.skip)),
          beta(float(j.beta)), in_scale(float(j.in_scale)), eps(float(c.norm_eps)),
          in_eps(float(c.norm_eps * j.in_eps)), shape(row_shape(c.width)), rows(rows),
          groups(j.in_norm ? j.in_groups : 1) {}

    JunctionInstance instance() const {
        return type == NormType::dyt ? JunctionInstance::dyt
               : extended            ? JunctionInstance::extended
                                     : JunctionInstance::plain;
    }
};

// A junction and its tensors, all (rows, C).
template <class S> struct JunctionArguments {
    JunctionPlan plan;
    JunctionPointers<const S> params;
    const float* r_prev;
    const S* b;           // null without branch
    float* r;             // may be r_prev
    S* u;                 // null if u is r, without in-norm
    JunctionStats* stats; // (rows)
    const float* y_prev;  // of the second stream, or null
    float *y, *x0;        // y may be y_prev; junction 0 writes x₀
};

// What its backward pass adds to those.
template <class S, class G> struct JunctionGradients {
    JunctionPointers<G> params;
    S* du;     // the gradient of u, of r if there is no in-norm; a norm over groups changes it
    bool last; // nothing comes after this junction: dr is not read, as if it were 0
    float* dr; // the gradient of r from what comes after; replaced by that of r_prev
    S* db;
    float *dy, *dx0; // are added to
    void* scratch;   // junction_scratch bytes
};

template <class S> __device__ float value_or_0(const S* x) { return x ? float(*x) : 0.0f; }

// x ← w ⊙ x, w (C).
template <int N, class S>
__device__ void multiply(float (&x)[N][8], const S* w, const RowPart<N>& part) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!part.has(n)) continue;
        float factor[8];
        load8(factor, w + part.at(n));
        for (int i = 0; i < 8; i++) x[n][i] *= factor[i];
    }
}

// z = γ · y, y being the branch after its norm.
template <int N, class S>
__device__ void apply_gamma(const JunctionPlan& j, const JunctionPointers<const S>& p,
                            const float (&y)[N][8], float (&z)[N][8], const RowPart<N>& part) {
    const float scalar = j.gamma == Gamma::scalar ? value_or_0(p.gamma) : 1;
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

// z += norm_second(y), and y's statistics unless `stats` has them.
template <bool dyt, int N, class S>
__device__ void add_second(const JunctionArguments<S>& a, int64_t row, bool has_stats,
                           float (&z)[N][8], RowPart<N>& part) {
    float y[N][8];
    part.load(y, a.y + row * part.C);
    NormStats& stats = a.stats[row].second;
    const NormStats s =
        has_stats ? stats
                  : norm_stats<dyt>(a.plan.type, a.plan.eps, y, a.params.second_alpha, part);
    if (!has_stats && part.lane() == 0) stats = s;
    norm_row_forward<dyt>(s, y, a.params.second_weight, a.params.second_bias, 1, y, part);
#pragma unroll
    for (int n = 0; n < N; n++)
        for (int i = 0; i < 8; i++) z[n][i] += y[n][i];
}

template <class S, int N, JunctionInstance instance>
__global__ static __launch_bounds__(256) void junction_forward_kernel(JunctionArguments<S> a) {
    constexpr bool extended = instance != JunctionInstance::plain;
    constexpr bool dyt = instance == JunctionInstance::dyt;
    const JunctionPlan& j = a.plan;
    const JunctionPointers<const S>& p = a.params;
    SharedMemory shared;
    RowPart<N> part{j.shape.C, j.shape.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= j.rows) return; // the same for all threads of a row
    const int64_t at = row * part.C;
    const bool first = part.lane() == 0;
    float z[N][8];
    if (!j.branch) {
        part.load(z, a.r_prev + at);
        if (extended && j.second) {
            float y[N][8];
            part.load(y, (j.starts_second ? a.r_prev : a.y_prev) + at);
            part.store(a.y + at, y);
        }
    } else {
        float previous[N][8];
        part.load(z, a.b + at);
        part.load(previous, a.r_prev + at);
        if (j.branch_norm) {
            const NormStats s = norm_stats<dyt>(j.type, j.eps, z, p.branch_alpha, part);
            if (first) a.stats[row].branch = s;
            norm_row_forward<dyt>(s, z, p.branch_weight, p.branch_bias, 1, z, part);
        }
        if (j.gamma != Gamma::none) apply_gamma(j, p, z, z, part);
        if (extended && j.second) {
            float y[N][8];
            part.load(y, a.y_prev + at);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) y[n][i] += z[n][i];
            part.store(a.y + at, y);
        }
        if (j.beta != 1)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) z[n][i] *= j.beta;
        if (extended && j.omega) multiply(previous, p.omega, part);
        const float gate = value_or_0(p.gate);
        const float kept = j.skip * (j.gate_on_skip ? 1 - gate * sigmoid(gate) : 1);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) z[n][i] += kept * previous[n][i];
    }
    if (j.out_norm) {
        const NormStats s = norm_stats<dyt>(j.type, j.eps, z, p.out_alpha, part);
        if (first) a.stats[row].out = s;
        norm_row_forward<dyt>(s, z, p.out_weight, p.out_bias, 1, z, part);
    }
    if (j.gate && !j.gate_on_skip) {
        const float gate = value_or_0(p.gate), kept = 1 - gate * sigmoid(gate);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) z[n][i] *= kept;
    }
    if (extended && j.adds_start) {
        const float skip = value_or_0(p.start_skip), weight = value_or_0(p.start_weight);
        float x0[N][8];
        if (!j.branch) part.store(a.x0 + at, z);
        part.load(x0, a.x0 + at);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) z[n][i] = skip * z[n][i] + weight * x0[n][i];
    }
    part.store(a.r + at, z);
    if (extended && j.reads_second) add_second<dyt>(a, row, false, z, part);
    if (j.in_norm) {
        const NormStats s = norm_stats<dyt>(j.type, j.in_eps, z, p.in_alpha, part);
        if (first) a.stats[row].in = s;
        norm_row_forward<dyt>(s, z, p.in_weight, p.in_bias, j.in_scale, z, part);
    }
    if (a.u) part.store(a.u + at, z);
}

// A norm over each of several groups of channels, in place of the in-norm. A warp has a group, and
// computes its statistics again in the backward pass.

// Σ f(i) over a group's n channels.
template <class F> __device__ float group_sum(int n, const F& f) {
    float sum = 0;
    for (int i = threadIdx.x % warp; i < n; i += warp) sum += f(i);
    return warp_sum(sum);
}
inline __device__ NormStats group_stats(const JunctionPlan& j, const float* x, int n) {
    float mean = 0;
    if (j.type == NormType::layer) mean = group_sum(n, [&](int i) { return x[i]; }) / float(n);
    const float square = group_sum(n, [&](int i) { return (x[i] - mean) * (x[i] - mean); });
    return {mean, rsqrtf(square / float(n) + j.in_eps)};
}

template <class S> __global__ static void group_norm_forward_kernel(JunctionArguments<S> a) {
    const JunctionPlan& j = a.plan;
    const int n = j.shape.C / j.groups;
    const int64_t of_all = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / warp;
    if (of_all >= j.rows * j.groups) return;
    const int64_t at = of_all * n;
    const int channel = int(of_all % j.groups) * n;
    const float* x = a.r + at;
    const NormStats s = group_stats(j, x, n);
    for (int i = threadIdx.x % warp; i < n; i += warp) {
        const float w = a.params.in_weight ? float(a.params.in_weight[channel + i]) : 1;
        const float bias = value_or_0(a.params.in_bias ? a.params.in_bias + channel + i : nullptr);
        a.u[at + i] = S(j.in_scale * ((x[i] - s.mean) * s.rstd * w + bias));
    }
}
template <class S> void group_norm_forward(const JunctionArguments<S>& a, cudaStream_t stream) {
    launch(group_norm_forward_kernel<S>, blocks_for(a.plan.rows * a.plan.groups, 8), 8 * warp, 0,
           stream, a);
}

// Calls f with N, the vectors a lane, as a constant.
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

// And with the instance, too.
template <class F> void with_instance(const JunctionPlan& plan, const F& f) {
    using enum JunctionInstance;
    with_vectors(plan.shape, [&](auto N) {
        switch (plan.instance()) {
        case plain:
            return f(N, std::integral_constant<JunctionInstance, plain>());
        case extended:
            return f(N, std::integral_constant<JunctionInstance, extended>());
        case dyt:
            return f(N, std::integral_constant<JunctionInstance, dyt>());
        }
    });
}

// Writes r, u and stats from r_prev and b.
template <class S> void junction_forward(const JunctionArguments<S>& a, cudaStream_t stream) {
    const RowShape& shape = a.plan.shape;
    const int block_rows = shape.warps == 1 ? 4 : 1;
    with_instance(a.plan, [&](auto N, auto instance) {
        launch(junction_forward_kernel<S, decltype(N)::value, decltype(instance)::value>,
               blocks_for(a.plan.rows, block_rows), warp * shape.warps * block_rows,
               shared_bytes<float>(16), stream, a);
    });
    if (a.plan.groups > 1) group_norm_forward(a, stream);
}

// The scalars among a junction's parameters, of each instance's kernels.
enum JunctionScalar {
    of_gamma,
    of_gate,
    plain_scalars,
    of_start_skip = plain_scalars,
    of_start_weight,
    extended_scalars,
    of_in_alpha = extended_scalars,
    of_out_alpha,
    of_branch_alpha,
    of_second_alpha,
    dyt_scalars
};
constexpr int scalars_of(JunctionInstance instance) {
    return instance == JunctionInstance::plain      ? plain_scalars
           : instance == JunctionInstance::extended ? extended_scalars
                                                    : dyt_scalars;
}

// The gradients of the vectors and scalars that a junction has, in the order of their partial sums.
template <class G> struct JunctionSums {
    G* gradient[junction_vectors]; // null from `count` on
    int count = 0;
    // The index of each; −1 if there is none.
    int in_weight, in_bias, out_weight, out_bias, branch_weight, branch_bias, second_weight,
        second_bias, omega, gamma;
    G* scalar[dyt_scalars]; // null if there is none

    JunctionSums(const JunctionPointers<G>& p, Gamma gamma_kind) {
        auto next = [&](G* vector) {
            if (!vector) return -1;
            gradient[count] = vector;
            return count++;
        };
        in_weight = next(p.in_weight), in_bias = next(p.in_bias);
        out_weight = next(p.out_weight), out_bias = next(p.out_bias);
        branch_weight = next(p.branch_weight), branch_bias = next(p.branch_bias);
        second_weight = next(p.second_weight), second_bias = next(p.second_bias);
        omega = next(p.omega);
        gamma = next(gamma_kind == Gamma::vector ? p.gamma : nullptr);
        scalar[of_gamma] = gamma_kind == Gamma::scalar ? p.gamma : nullptr;
        scalar[of_gate] = p.gate;
        scalar[of_start_skip] = p.start_skip, scalar[of_start_weight] = p.start_weight;
        scalar[of_in_alpha] = p.in_alpha, scalar[of_out_alpha] = p.out_alpha;
        scalar[of_branch_alpha] = p.branch_alpha, scalar[of_second_alpha] = p.second_alpha;
    }
    bool empty() const {
        return count == 0 && std::all_of(scalar, scalar + dyt_scalars, [](G* x) { return !x; });
    }
};

// Every block's partial sums: (blocks, scalars) doubles, then (blocks, count, C) floats.
struct JunctionScratch {
    double* scalars;
    float* vectors;
};

// Each block loops over rows and accumulates the parameters' gradients of all of them.
template <class S, class G, int N, bool keeps_branch, JunctionInstance instance>
__global__ static __launch_bounds__(256) void junction_backward_kernel(
    const __grid_constant__ JunctionArguments<S> a,
    const __grid_constant__ JunctionGradients<S, G> d,
    const __grid_constant__ JunctionSums<G> which, JunctionScratch scratch) {
    const JunctionPlan& j = a.plan;
    const JunctionPointers<const S>& p = a.params;
    const int C = j.shape.C, row_threads = warp * j.shape.warps;
    const int groups = blockDim.x / row_threads, group = threadIdx.x / row_threads; // of a row
    SharedMemory shared;
    RowPart<N> part{C, j.shape.warps, shared.take<float>(16)};
    constexpr bool extended = instance != JunctionInstance::plain;
    constexpr bool dyt = instance == JunctionInstance::dyt;
    constexpr int scalars = scalars_of(instance);
    double* exchange = shared.take<double>(scalars * blockDim.x);
    float* sums = shared.take<float>(groups * which.count * C); // (groups, count, C)
    for (int i = threadIdx.x; i < groups * which.count * C; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    auto sum_of = [&](int n) { return n < 0 ? nullptr : sums + (group * which.count + n) * C; };

    const float gate = value_or_0(p.gate), s = sigmoid(gate);
    const float silu = gate * s, dsilu = s * (1 + gate * (1 - s));
    const float scalar_gamma = j.gamma == Gamma::scalar ? value_or_0(p.gamma) : 1;
    double totals[dyt_scalars] = {}; // in double: much cancels over all channels
    double &gamma_sum = totals[of_gamma], &gate_sum = totals[of_gate],
           &skip_sum = totals[of_start_skip], &weight_sum = totals[of_start_weight];

    for (int64_t row0 = int64_t(blockIdx.x) * groups; row0 < j.rows;
         row0 += int64_t(gridDim.x) * groups) {
        const int64_t row = row0 + group, at = row * C;
        if (row >= j.rows) break; // a group of one warp: groups of several are alone in a block
        float dz[N][8];           // gradient of r, then of what precedes it, step by step
        part.load(dz, d.du + at);
        float later[N][8] = {};
        if (!d.last) part.load(later, d.dr + at);
        if (j.in_norm) {
            float x[N][8];
            part.load(x, a.r + at);
            if (extended && j.reads_second) add_second<dyt>(a, row, true, x, part);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) dz[n][i] *= j.in_scale;
            totals[of_in_alpha] +=
                norm_row_backward<dyt>(j.type, a.stats[row].in, x, p.in_weight, dz,
                                       sum_of(which.in_weight), sum_of(which.in_bias), part);
        }
        if (extended && j.reads_second) {
            float y[N][8], d_norm[N][8], dy[N][8];
            part.load(y, a.y + at);
            part.load(dy, d.dy + at);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) d_norm[n][i] = dz[n][i];
            totals[of_second_alpha] += norm_row_backward<dyt>(
                j.type, a.stats[row].second, y, p.second_weight, d_norm,
                sum_of(which.second_weight), sum_of(which.second_bias), part);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) dy[n][i] += d_norm[n][i];
            part.store(d.dy + at, dy);
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) dz[n][i] += later[n][i];

        // Recomputes the input of the out-norm and the gate.
        if constexpr (keeps_branch) {
            float z[N][8];
            if (!j.branch) {
                part.load(z, a.r_prev + at);
            } else {
                float previous[N][8];
                part.load(z, a.b + at);
                part.load(previous, a.r_prev + at);
                if (j.branch_norm)
                    norm_row_forward<dyt>(a.stats[row].branch, z, p.branch_weight, p.branch_bias, 1,
                                          z, part);
                if (j.gamma != Gamma::none) apply_gamma(j, p, z, z, part);
                if (j.beta != 1)
                    for (int n = 0; n < N; n++)
                        for (int i = 0; i < 8; i++) z[n][i] *= j.beta;
                if (extended && j.omega) multiply(previous, p.omega, part);
                const float kept = j.skip * (j.gate_on_skip ? 1 - silu : 1);
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++) z[n][i] += kept * previous[n][i];
            }
            if (extended && j.adds_start) {
                float before[N][8], x0[N][8], dx0[N][8]; // r before x₀ is added
                if (j.out_norm)
                    norm_row_forward<dyt>(a.stats[row].out, z, p.out_weight, p.out_bias, 1, before,
                                          part);
                part.load(x0, a.x0 + at);
                part.load(dx0, d.dx0 + at);
                const float kept = j.gate && !j.gate_on_skip ? 1 - silu : 1;
                const float skip = value_or_0(p.start_skip), weight = value_or_0(p.start_weight);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    if (!part.has(n)) continue;
                    for (int i = 0; i < 8; i++) {
                        const float g = dz[n][i];
                        const float r = !j.branch    ? x0[n][i]
                                        : j.out_norm ? before[n][i]
                                                     : kept * z[n][i];
                        skip_sum += double(g) * double(r);
                        weight_sum += double(g) * double(x0[n][i]);
                        dx0[n][i] += weight * g;
                        dz[n][i] = skip * g + (j.branch ? 0 : dx0[n][i]);
                    }
                }
                if (j.branch) part.store(d.dx0 + at, dx0);
            }
            if (j.gate && !j.gate_on_skip) // stop() passes no gradient, so dz stays
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++)
                        gate_sum -= double(dsilu) * double(dz[n][i]) * double(z[n][i]);
            if (j.out_norm)
                totals[of_out_alpha] +=
                    norm_row_backward<dyt>(j.type, a.stats[row].out, z, p.out_weight, dz,
                                           sum_of(which.out_weight), sum_of(which.out_bias), part);
        }
        if (keeps_branch && j.gate_on_skip) {
            float previous[N][8];
            part.load(previous, a.r_prev + at);
            if (extended && j.omega) multiply(previous, p.omega, part);
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++)
                    gate_sum -= double(dsilu * j.skip) * double(dz[n][i]) * double(previous[n][i]);
        }
        float down[N][8]; // gradient of r_prev
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 8; i++) down[n][i] = j.skip * dz[n][i];
        if (extended && j.omega) {
            float previous[N][8];
            part.load(previous, a.r_prev + at);
#pragma unroll
            for (int n = 0; n < N; n++) {
                if (!part.has(n)) continue;
                for (int i = 0; i < 8; i++) previous[n][i] *= (1 - silu) * down[n][i];
                add_to_sums(sum_of(which.omega), previous[n], part.at(n), C);
            }
            multiply(down, p.omega, part);
        }
        float dy[N][8];
        if (extended && j.second) part.load(dy, d.dy + at);
        if (extended && j.starts_second)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) down[n][i] += dy[n][i];
        part.store(d.dr + at, down);
        if (!j.branch) continue;
        if (j.beta != 1)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) dz[n][i] *= j.beta;
        if (extended && j.second)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 8; i++) dz[n][i] += dy[n][i];

        if (keeps_branch && (j.branch_norm || j.gamma != Gamma::none)) {
            float x[N][8];
            part.load(x, a.b + at);
            if (j.gamma != Gamma::none) {
                float y[N][8];
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 8; i++) y[n][i] = x[n][i];
                if (j.branch_norm)
                    norm_row_forward<dyt>(a.stats[row].branch, x, p.branch_weight, p.branch_bias, 1,
                                          y, part);
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
                totals[of_branch_alpha] += norm_row_backward<dyt>(
                    j.type, a.stats[row].branch, x, p.branch_weight, dz,
                    sum_of(which.branch_weight), sum_of(which.branch_bias), part);
        }
        part.store(d.db + at, dz);
    }

#pragma unroll
    for (int i = 0; i < scalars; i++) exchange[i * blockDim.x + threadIdx.x] = totals[i];
    __syncthreads();
    if (threadIdx.x < scalars) {
        double sum = 0;
        for (int i = 0; i < int(blockDim.x); i++) sum += exchange[threadIdx.x * blockDim.x + i];
        scratch.scalars[scalars * blockIdx.x + threadIdx.x] = sum;
    }
    for (int i = threadIdx.x; i < which.count * C; i += blockDim.x) {
        const int index = i / C * C + index_of_sum(i % C, C);
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[g * which.count * C + index];
        scratch.vectors[int64_t(blockIdx.x) * which.count * C + i] = sum;
    }
}

// Adds the blocks' partial sums to the gradients. blockIdx.y is the vector, or `count` for the
// scalars, one a warp.
template <class G>
__global__ static void junction_gather_kernel(const __grid_constant__ JunctionSums<G> which,
                                              JunctionScratch scratch, int scalars, int partials,
                                              int C) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * warp);
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp;
    if (int(blockIdx.y) == which.count) {
        if (blockIdx.x > 0 || w >= scalars || lane > 0 || !which.scalar[w]) return;
        G* gradient = which.scalar[w];
        double sum = 0;
        for (int i = 0; i < partials; i++) sum += scratch.scalars[scalars * i + w];
        *gradient = G(float(*gradient) + float(sum));
        return;
    }
    const int channel = blockIdx.x * warp + lane;
    const float sum = sum_parts(sums, scratch.vectors + blockIdx.y * C + channel, partials,
                                int64_t(which.count) * C, channel < C);
    if (w > 0 || channel >= C) return;
    G* gradient = which.gradient[blockIdx.y] + channel;
    *gradient = G(float(*gradient) + sum);
}

// Block (i, g), of one warp, has group g of every gridDim.x-th row. Replaces du by the gradient of
// r.
template <class S, class G>
__global__ static void group_norm_backward_kernel(JunctionArguments<S> a, S* du,
                                                  const __grid_constant__ JunctionSums<G> which,
                                                  JunctionScratch scratch) {
    const JunctionPlan& j = a.plan;
    const int C = j.shape.C, n = C / j.groups, channel = blockIdx.y * n;
    SharedMemory shared;
    float *dw = shared.take<float>(n), *dbias = shared.take<float>(n); // a lane has its channels
    for (int i = threadIdx.x; i < n; i += warp) dw[i] = dbias[i] = 0;
    for (int64_t row = blockIdx.x; row < j.rows; row += gridDim.x) {
        const int64_t at = row * C + channel;
        const float* x = a.r + at;
        S* d = du + at;
        const NormStats s = group_stats(j, x, n);
        auto dy = [&](int i) { return j.in_scale * float(d[i]); };
        auto g = [&](int i) {
            return a.params.in_weight ? dy(i) * float(a.params.in_weight[channel + i]) : dy(i);
        };
        float mean = 0;
        if (j.type == NormType::layer) mean = group_sum(n, g) / float(n);
        const float dot = group_sum(n, [&](int i) { return g(i) * (x[i] - s.mean); });
        const float slope = dot * s.rstd * s.rstd / float(n);
        for (int i = threadIdx.x; i < n; i += warp) {
            dw[i] += dy(i) * (x[i] - s.mean) * s.rstd;
            dbias[i] += dy(i);
            d[i] = S(s.rstd * (g(i) - mean - (x[i] - s.mean) * slope));
        }
    }
    float* sums = scratch.vectors + int64_t(blockIdx.x) * which.count * C + channel;
    for (int i = threadIdx.x; i < n; i += warp) {
        if (which.in_weight >= 0) sums[which.in_weight * C + i] = dw[i];
        if (which.in_bias >= 0) sums[which.in_bias * C + i] = dbias[i];
    }
}

const int junction_blocks = 8; // at most, on a multiprocessor in the backward pass

inline int64_t junction_scratch(int C, int multiprocessors) {
    return int64_t(junction_blocks) * multiprocessors *
           int64_t(dyt_scalars * sizeof(double) + junction_vectors * C * sizeof(float));
}

// Replaces du by the gradient of r; adds those of the norm's parameters.
template <class S, class G>
void group_norm_backward(const JunctionArguments<S>& a, const JunctionGradients<S, G>& d,
                         int multiprocessors, cudaStream_t stream) {
    const int C = a.plan.shape.C, n = C / a.plan.groups;
    JunctionPointers<G> own;
    own.in_weight = d.params.in_weight, own.in_bias = d.params.in_bias;
    const JunctionSums<G> which(own, Gamma::none);
    const JunctionScratch scratch{nullptr, static_cast<float*>(d.scratch)};
    const int parts = int(std::min<int64_t>(a.plan.rows, junction_blocks * multiprocessors));
    launch(group_norm_backward_kernel<S, G>, dim3(unsigned(parts), unsigned(a.plan.groups)), warp,
           2 * shared_bytes<float>(n), stream, a, d.du, which, scratch);
    if (which.count > 0)
        launch(junction_gather_kernel<G>, dim3(blocks_for(C, warp), which.count), 8 * warp,
               shared_bytes<float>(8 * warp), stream, which, scratch, 0, parts, C);
}

// Writes db and, in place of dr, the gradient of r_prev; adds the gradients of the parameters.
template <class S, class G>
void junction_backward(const JunctionArguments<S>& a, JunctionGradients<S, G> d,
                       int multiprocessors, cudaStream_t stream) {
    if (a.plan.groups > 1) {
        group_norm_backward(a, d, multiprocessors, stream);
        d.params.in_weight = d.params.in_bias = nullptr;
    }
    const RowShape& shape = a.plan.shape;
    const int C = shape.C;
    const JunctionSums<G> which(d.params, a.plan.gamma);
    // As many rows at once as leave room for two blocks on a multiprocessor.
    int groups = shape.warps == 1 ? 4 : 1;
    const int scalars = scalars_of(a.plan.instance());
    auto shared = [&] {
        const int threads = warp * shape.warps * groups;
        return shared_bytes<float>(16) + shared_bytes<double>(size_t(scalars) * threads) +
               shared_bytes<float>(size_t(groups) * which.count * C);
    };
    while (groups > 1 && shared() > 100 * 1024) groups /= 2;
    const int threads = warp * shape.warps * groups;
    int blocks = 0;
    JunctionScratch scratch;
    with_instance(a.plan, [&](auto N, auto instance) {
        constexpr int n = decltype(N)::value;
        constexpr JunctionInstance i = decltype(instance)::value;
        auto kernel = junction_backward_kernel<S, G, n, true, i>;
        if constexpr (i == JunctionInstance::plain)
            if (!a.plan.keeps_branch) kernel = junction_backward_kernel<S, G, n, false, i>;
        blocks = std::min(blocks_for(a.plan.rows, groups),
                          multiprocessors *
                              std::min(junction_blocks, blocks_at_once(kernel, threads, shared())));
        scratch.scalars = static_cast<double*>(d.scratch);
        scratch.vectors = reinterpret_cast<float*>(scratch.scalars + scalars * blocks);
        launch(kernel, blocks, threads, shared(), stream, a, d, which, scratch);
    });
    if (!which.empty())
        launch(junction_gather_kernel<G>, dim3(blocks_for(C, warp), which.count + 1), 8 * warp,
               shared_bytes<float>(8 * warp), stream, which, scratch, scalars, blocks, C);
}

template <class S, int N, JunctionInstance instance>
__global__ static void recompute_input_kernel(JunctionArguments<S> a) {
    constexpr bool extended = instance != JunctionInstance::plain;
    constexpr bool dyt = instance == JunctionInstance::dyt;
    const JunctionPlan& j = a.plan;
    RowPart<N> part{j.shape.C, j.shape.warps, nullptr};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= j.rows) return;
    float x[N][8];
    part.load(x, a.r + row * part.C);
    if (extended && j.reads_second) add_second<dyt>(a, row, true, x, part);
    if (j.in_norm)
        norm_row_forward<dyt>(a.stats[row].in, x, a.params.in_weight, a.params.in_bias, j.in_scale,
                              x, part);
    part.store(a.u + row * part.C, x);
}

// Writes u from r and stats.
template <class S> void recompute_input(const JunctionArguments<S>& a, cudaStream_t stream) {
    if (a.plan.groups > 1) return group_norm_forward(a, stream);
    const RowShape& shape = a.plan.shape;
    const int block_rows = shape.warps == 1 ? 4 : 1;
    with_instance(a.plan, [&](auto N, auto instance) {
        launch(recompute_input_kernel<S, decltype(N)::value, decltype(instance)::value>,
               blocks_for(a.plan.rows, block_rows), warp * shape.warps * block_rows, 0, stream, a);
    });
}

// ---------------------------------------------------------------------------------------------
// Matmul: out (rows, OC) = in (rows, C) · wᵀ + bias, w (OC, C), bias (OC) or null. cuBLASLt's
// matrices are column-major, so it computes the transpose: outᵀ (OC, rows) = w · inᵀ.

// Writes the bias to every row of out (rows, OC).
template <class Out, class S>
__global__ static void broadcast_kernel(Out* out, int64_t out_row, const S* bias, int OC) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (channel >= OC) return;
    float x[8];
    load8(x, bias + channel);
    store8(out + blockIdx.x * out_row + channel, x);
}

// out_row: elements from one row of out to the next.
template <class S, class Out>
Matmul forward_matmul(Out* out, int64_t out_row, const S* in, const S* w, int64_t rows, int C,
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

// Out is S, or float where the result must not be rounded.
template <class S, class Out>
void matmul_forward(CublasLt& cublas, Out* out, int64_t out_row, const S* in, const S* w,
                    const S* bias, int64_t rows, int C, int OC) {
    Matmul p = forward_matmul(out, out_row, in, w, rows, C, OC);
    if (bias) {
        if constexpr (std::is_same_v<S, Out>) {
            p.epilogue = CUBLASLT_EPILOGUE_BIAS, p.bias = bias;
            if (cublas.try_matmul(p)) return;
        }
        // Without that epilogue add the product to the bias, so that the sum is rounded once.
        p.epilogue = CUBLASLT_EPILOGUE_DEFAULT, p.bias = nullptr, p.beta = 1;
        launch(broadcast_kernel<Out, S>, dim3(unsigned(rows), blocks_for(OC, 128 * 8)), 128, 0,
               cublas.stream, out, out_row, bias, OC);
    }
    cublas.matmul(p);
}

// Among the activation functions, below.
template <class S> void gelu_forward(S* out, const S* h, int64_t n, cudaStream_t stream);
template <class S>
void gelu_backward(S* dh, const S* da, const S* h, int64_t n, cudaStream_t stream);

// hidden (rows, OC) = in · wᵀ + bias, activated (rows, OC) = gelu(hidden), where the epilogue takes
// GELU of the sum before it is rounded.
template <class S>
void matmul_gelu_forward(CublasLt& cublas, S* activated, S* hidden, const S* in, const S* w,
                         const S* bias, int64_t rows, int C, int OC) {
    Matmul p = forward_matmul(activated, OC, in, w, rows, C, OC);
    p.epilogue = bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    p.bias = bias, p.gelu_input = hidden;
    if (cublas.try_matmul(p)) return;
    matmul_forward(cublas, hidden, OC, in, w, bias, rows, C, OC);
    gelu_forward(activated, hidden, rows * OC, cublas.stream);
}

// dout_row: elements from one row of dout to the next.
template <class S>
Matmul backward_matmul(S* din, const S* dout, int64_t dout_row, const S* w, int64_t rows, int C,
                       int OC) {
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
void matmul_backward_input(CublasLt& cublas, S* din, const S* dout, int64_t dout_row, const S* w,
                           int64_t rows, int C, int OC) {
    cublas.matmul(backward_matmul(din, dout, dout_row, w, rows, C, OC));
}

// The same where the input was gelu(hidden): dhidden (rows, C) from dout (rows, OC).
template <class S>
void matmul_gelu_backward_input(CublasLt& cublas, S* dhidden, const S* dout, const S* hidden,
                                const S* w, int64_t rows, int C, int OC) {
    Matmul p = backward_matmul(dhidden, dout, OC, w, rows, C, OC);
    p.epilogue = CUBLASLT_EPILOGUE_DGELU;
    p.gelu_input = const_cast<S*>(hidden); // only read
    if (cublas.try_matmul(p)) return;
    matmul_backward_input(cublas, dhidden, dout, OC, w, rows, C, OC);
    gelu_backward(dhidden, dhidden, hidden, rows * C, cublas.stream);
}

// A bias's gradient is summed over the rows of each of bias_parts parts, then over the parts.
inline int bias_parts(int64_t rows) { return int(std::min<int64_t>(64, (rows + 31) / 32)); }
inline int64_t matmul_scratch(int64_t rows, int OC) { // floats
    return bias_parts(rows) * int64_t(OC);
}

// partial (gridDim.y, OC): the sums over each part of the rows; a block takes 256 channels.
template <class S>
__global__ static void column_sums_kernel(float* partial, const S* dout, int64_t dout_row,
                                          int64_t rows, int OC) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * 256);
    const int channel = blockIdx.x * 256 + threadIdx.x % warp * 8;
    sum_rows(sums, rows * blockIdx.y / gridDim.y, rows * (blockIdx.y + 1) / gridDim.y, channel < OC,
             [&](int64_t row) { return dout + row * dout_row + blockIdx.x * 256; });
    const int own = blockIdx.x * 256 + threadIdx.x;
    if (own >= OC) return;
    float total = 0;
    for (int other = 0; other < 8; other++) total += sums[other * 256 + threadIdx.x];
    partial[int64_t(blockIdx.y) * OC + own] = total;
}

// gradient[i] += Σ over the parts of partial (parts, row), i < n.
template <class G>
__global__ static void add_partial_sums_kernel(G* gradient, const float* partial, int parts,
                                               int64_t row, int n) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * warp);
    const int i = blockIdx.x * warp + threadIdx.x % warp;
    const float sum = sum_parts(sums, partial + i, parts, row, i < n);
    if (threadIdx.x >= warp || i >= n) return;
    gradient[i] = G(float(gradient[i]) + sum);
}

template <class G>
void add_partial_sums(G* gradient, const float* partial, int parts, int64_t row, int n,
                      cudaStream_t stream) {
    launch(add_partial_sums_kernel<G>, blocks_for(n, warp), 8 * warp, shared_bytes<float>(8 * warp),
           stream, gradient, partial, parts, row, n);
}

// Adds to dw (OC, C), and to dbias (OC) if not null, from dout (rows, OC) and in (rows, C).
// scratch: matmul_scratch(rows, OC) floats, if there is dbias.
template <class S, class G>
void matmul_backward_weight(CublasLt& cublas, G* dw, G* dbias, const S* dout, int64_t dout_row,
                            const S* in, int64_t rows, int C, int OC, float* scratch) {
    cublas.matmul({.in = data_type<S>,
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
                   .beta = 1});
    if (!dbias) return;
    const int parts = bias_parts(rows);
    launch(column_sums_kernel<S>, dim3(blocks_for(OC, 256), parts), 256,
           shared_bytes<float>(8 * 256), cublas.stream, scratch, dout, dout_row, rows, OC);
    add_partial_sums(dbias, scratch, parts, OC, OC, cublas.stream);
}

} // namespace lns::cuda

// Junctions that mix several streams or all branches, by the rows and matmuls above.
// defines: StreamArguments, StreamGradients, streams_forward, streams_backward
#include "gpt/cuda/streams.cuh"
// defines: SourceArguments, SourceGradients, sources_forward, sources_backward
#include "gpt/cuda/sources.cuh"

namespace lns::cuda {

// ---------------------------------------------------------------------------------------------
// Attention. A row of qkv is NH heads of q, KVH of k, KVH of v; NH / KVH heads of q share one of k
// and v (GQA, arXiv 2305.13245). AttentionShape has the sizes.

// N elements as floats: 8 at once, or one where 8 would not be aligned.
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

// Value residual: from the second layer on, v ← v + m · (v₁ − v), with v₁ the first layer's v. A
// thread has 8 channels.
template <class S, class X>
__global__ static void mix_values_kernel(X* qkv, S* own, const S* first_v, const S* mix,
                                         AttentionShape a) {
    const int KV = a.kv_width();
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8, row = at / KV;
    if (row >= a.rows() - a.first) return;
    X* v = qkv + row * a.row() + a.q_width() + KV + at % KV;
    float x[8];
    load8(x, v);
    if (own) store8(own + at, x);
    if (!mix) return;
    float x1[8];
    load8(x1, first_v + at);
    const float m = float(*mix);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] += m * (x1[i] - x[i]);
    store8(v, x);
}

// In place on v of the qkv matmul's output, which begins at row a.first. Keeps v as it was in `own`
// (rows, KVH·HS), unless that is null; the first layer, where `mix` is null, does only that.
template <class S, class X>
void mix_values(X* qkv, S* own, const S* first_v, const S* mix, const AttentionShape& a,
                cudaStream_t stream) {
    launch(mix_values_kernel<S, X>, blocks_for((a.rows() - a.first) * a.kv_width(), 8 * 256), 256,
           0, stream, qkv, own, first_v, mix, a);
}

// partial (gridDim.x): each block's sum of dv · (v₁ − v).
template <class S>
__global__ static void mix_values_backward_kernel(S* dqkv, float* dvalues, const S* own,
                                                  const S* first_v, const S* mix, double* partial,
                                                  AttentionShape a) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    const int KV = a.kv_width();
    const int64_t end = a.rows() * KV, step = int64_t(gridDim.x) * blockDim.x * 8;
    const float m = mix ? float(*mix) : 0;
    double sum[1] = {};
    for (int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; at < end; at += step) {
        S* dv = dqkv + at / KV * a.row() + a.q_width() + KV + at % KV;
        float d[8], dfirst[8];
        load8(d, dv), load8(dfirst, dvalues + at);
        if (mix) {
            float v[8], v1[8];
            load8(v, own + at), load8(v1, first_v + at);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum[0] += double(d[i]) * (double(v1[i]) - double(v[i])); // much cancels
                dfirst[i] += m * d[i];
                d[i] -= m * d[i];
            }
            store8(dvalues + at, dfirst);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) d[i] += dfirst[i];
        }
        store8(dv, d);
    }
    block_sums(sum, exchange);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}
template <class G>
__global__ static void add_mix_gradient_kernel(G* dmix, const double* partial, int parts) {
    double sum = 0;
    for (int i = threadIdx.x; i < parts; i += warp) sum += partial[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) *dmix = G(float(*dmix) + float(sum));
}

inline int mix_values_parts(const AttentionShape& a) {
    return int(std::min<int64_t>(512, blocks_for(a.rows() * a.kv_width(), 8 * 256)));
}
inline int64_t mix_values_scratch(const AttentionShape& a) { // bytes
    return mix_values_parts(a) * int64_t(sizeof(double));
}

// In place on v of dqkv. From the second layer on, adds the gradient of v₁ to dvalues (rows,
// KVH·HS), and that of m to dmix, if not null; in the first layer, where `mix` is null, adds
// dvalues to dv. scratch: mix_values_scratch(a) bytes.
template <class S, class G>
void mix_values_backward(S* dqkv, float* dvalues, const S* own, const S* first_v, const S* mix,
                         G* dmix, double* scratch, const AttentionShape& a, cudaStream_t stream) {
    const int parts = mix_values_parts(a);
    launch(mix_values_backward_kernel<S>, parts, 256, shared_bytes<double>(warp), stream, dqkv,
           dvalues, own, first_v, mix, scratch, a);
    if (mix && dmix) launch(add_mix_gradient_kernel<G>, 1, warp, 0, stream, dmix, scratch, parts);
}

// Rotary positions (arXiv 2104.09864) with Hugging Face's pairing: channel i of a head is rotated
// with channel i + channels/2. A block has a row, a thread N channels of a first half and their
// partners.
template <QkNorm norm, int N, class S, class X>
__global__ static void qkv_forward_kernel(S* qkv, const X* in, S* raw, NormStats* stats,
                                          QkvPointers<const S> weights, float eps,
                                          const CosSin* table, AttentionShape a) {
    SharedMemory shared;
    float* exchange = shared.take<float>(2 * warp);
    const int heads = a.prepared_heads(), width = a.prepared_width(), Q = a.q_width();
    float* head_rstd = norm == QkNorm::heads ? shared.take<float>(heads) : nullptr;
    const int half = (a.channels + 1) / 2; // an odd last channel is paired with padding
    const int units = half / N;            // of a head
    const int64_t row = a.first + int64_t(blockIdx.x);
    const X* x = in + int64_t(blockIdx.x) * a.row();
    S* y = qkv + row * a.row();
    if constexpr (!std::is_same_v<S, X>) // the rest is copied
        for (int at = width + threadIdx.x * 8; at < a.row(); at += blockDim.x * 8) {
            float v[8];
            load8(v, x + at);
            store8(y + at, v);
        }
    float rstd[2] = {1, 1};                // of q, of k
    if constexpr (norm == QkNorm::heads) { // a warp has a head
        for (int head = threadIdx.x / warp; head < heads; head += blockDim.x / warp) {
            float square = 0;
            for (int unit = threadIdx.x % warp; unit < units; unit += warp) {
                const int at = head * a.HS + unit * N;
                float low[N], high[N];
                load_some(low, x + at), load_some(high, x + at + half);
                store_some(raw + row * width + at, low);
                store_some(raw + row * width + at + half, high);
#pragma unroll
                for (int i = 0; i < N; i++) square += low[i] * low[i] + high[i] * high[i];
            }
            square = warp_sum(square);
            if (threadIdx.x % warp == 0) {
                head_rstd[head] = rsqrtf(square / float(a.channels) + eps);
                stats[row * heads + head] = {0, head_rstd[head]};
            }
        }
        __syncthreads();
    } else if constexpr (norm == QkNorm::whole) {
        float squares[2] = {};
        for (int unit = threadIdx.x; unit < heads * units; unit += blockDim.x) {
            const int head = unit / units, at = head * a.HS + unit % units * N;
            float low[N], high[N], square = 0;
            load_some(low, x + at), load_some(high, x + at + half);
            store_some(raw + row * width + at, low);
            store_some(raw + row * width + at + half, high);
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
    for (int unit = threadIdx.x; unit < heads * units; unit += blockDim.x) {
        const int head = unit / units, i0 = unit % units * N, at = head * a.HS + i0;
        float low[N], high[N];
        load_some(low, x + at), load_some(high, x + at + half);
        const bool is_q = head < a.NH, is_v = head >= a.NH + a.KVH;
        if constexpr (norm != QkNorm::none) {
            constexpr bool of_heads = norm == QkNorm::heads;
            const S* weight = (is_q   ? weights.q
                               : is_v ? weights.v
                                      : weights.k) +
                              (of_heads ? i0
                               : is_q   ? at
                                        : at - Q);
            const float scale = of_heads ? head_rstd[head] : is_q ? rstd[0] : rstd[1];
            float low_weight[N], high_weight[N];
            load_some(low_weight, weight), load_some(high_weight, weight + half);
#pragma unroll
            for (int i = 0; i < N; i++) {
                low[i] *= scale * low_weight[i];
                high[i] *= scale * high_weight[i];
            }
        }
        if (table && !is_v) {
            const float* pairs = &table[a.position(row) * half + i0].cos; // cos, sin, cos, …
            float turn[2][N];
            load_some(turn[0], pairs), load_some(turn[1], pairs + N);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float cos = turn[2 * i / N][2 * i % N];
                const float sin = turn[(2 * i + 1) / N][(2 * i + 1) % N];
                const float x0 = low[i], x1 = high[i];
                low[i] = x0 * cos - x1 * sin;
                high[i] = x1 * cos + x0 * sin;
            }
        }
        store_some(y + at, low), store_some(y + at + half, high);
    }
}

// From the output of the qkv matrix to attention's input, from row `first` on: RMSNorms of q, k and
// v, if `raw` (rows, prepared_width()), which keeps their input, and stats (rows, norms) are not
// null; then rotary positions, if there is a table (T, channels/2). `in` begins at row `first`;
// where it is S it is part of qkv. Padding channels stay 0.
template <class S, class X>
void qkv_forward(S* qkv, const X* in, S* raw, NormStats* stats, const QkvPointers<const S>& weights,
                 double eps, const CosSin* table, const AttentionShape& a, cudaStream_t stream) {
    if (!raw && !table && std::is_same_v<S, X>) return;
    const bool whole = a.channels % 16 == 0; // both halves are vectors of 8
    const int heads = a.prepared_heads(), units = heads * blocks_for(a.channels, whole ? 16 : 2);
    auto launch_with = [&]<QkNorm norm>() {
        launch(whole ? qkv_forward_kernel<norm, 8, S, X> : qkv_forward_kernel<norm, 1, S, X>,
               unsigned(a.rows() - a.first), threads_for(units, 512),
               shared_bytes<float>(2 * warp) + shared_bytes<float>(heads), stream, qkv, in, raw,
               stats, weights, float(eps), table, a);
    };
    if (!raw)
        launch_with.template operator()<QkNorm::none>();
    else if (a.heads_normed())
        launch_with.template operator()<QkNorm::heads>();
    else
        launch_with.template operator()<QkNorm::whole>();
}

// The norms of one row's heads; a warp has a head. sums: as below.
template <int N, class S>
__device__ inline void head_norms_backward(S* dy, const S* x, const NormStats* stats,
                                           const QkvPointers<const S>& norms, float* sums,
                                           const AttentionShape& a) {
    const int units = a.channels / N, width = a.prepared_width();
    for (int head = threadIdx.x / warp; head < a.prepared_heads(); head += blockDim.x / warp) {
        const S* weights = head < a.NH ? norms.q : head < a.NH + a.KVH ? norms.k : norms.v;
        const float rstd = stats[head].rstd;
        float d[N], value[N], weight[N], dot = 0;
        for (int unit = threadIdx.x % warp; unit < units; unit += warp) {
            const int at = head * a.HS + unit * N;
            load_some(d, dy + at), load_some(value, x + at), load_some(weight, weights + unit * N);
#pragma unroll
            for (int i = 0; i < N; i++) {
                dot += weight[i] * d[i] * value[i];
                d[i] *= value[i] * rstd;
            }
            if constexpr (N == 8)
                add_to_sums(sums, d, at, width);
            else
                sums[index_of_sum(at, width)] += d[0];
        }
        dot = warp_sum(dot) * rstd * rstd / float(a.channels);
        for (int unit = threadIdx.x % warp; unit < units; unit += warp) {
            const int at = head * a.HS + unit * N;
            load_some(d, dy + at), load_some(value, x + at), load_some(weight, weights + unit * N);
#pragma unroll
            for (int i = 0; i < N; i++) d[i] = rstd * (weight[i] * d[i] - value[i] * dot);
            store_some(dy + at, d);
        }
    }
}

// In place on dqkv. Each block loops over rows and accumulates the weights' gradients of all of
// them: partial (gridDim.x, Q + K) or, if the norms are of heads, (gridDim.x, 2·HS), with those of
// v 3·HS. With g = w ⊙ dy: dx = rstd · (g − x̂ · mean(g ⊙ x̂)).
template <bool of_heads, int N, class S>
__global__ static void qkv_norm_backward_kernel(S* dqkv, const S* raw, const NormStats* stats,
                                                QkvPointers<const S> weights, float* partial,
                                                AttentionShape a) {
    SharedMemory shared;
    const int Q = a.q_width(), width = a.prepared_width();
    float* exchange = shared.take<float>(2 * warp);
    float* sums = shared.take<float>(width); // of dw; each thread has its own channels
    for (int i = threadIdx.x; i < width; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    const int units = a.channels / N; // of a head
    for (int64_t row = blockIdx.x; row < a.rows(); row += gridDim.x) {
        S* dy = dqkv + row * a.row();
        const S* x = raw + row * width;
        if constexpr (of_heads) {
            head_norms_backward<N>(dy, x, stats + row * a.prepared_heads(), weights, sums, a);
            continue;
        }
        const float rstd[2] = {stats[2 * row].rstd, stats[2 * row + 1].rstd};
        float dots[2] = {};
        for (int unit = threadIdx.x; unit < (a.NH + a.KVH) * units; unit += blockDim.x) {
            const int head = unit / units, at = head * a.HS + unit % units * N;
            const bool is_q = head < a.NH;
            float d[N], value[N], weight[N], dot = 0;
            load_some(d, dy + at), load_some(value, x + at);
            load_some(weight, is_q ? weights.q + at : weights.k + at - Q);
#pragma unroll
            for (int i = 0; i < N; i++) {
                dot += weight[i] * d[i] * value[i];
                d[i] *= value[i] * (is_q ? rstd[0] : rstd[1]);
            }
            if constexpr (N == 8)
                add_to_sums(sums, d, at, width);
            else
                sums[index_of_sum(at, width)] += d[0];
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
            load_some(weight, is_q ? weights.q + at : weights.k + at - Q);
#pragma unroll
            for (int i = 0; i < N; i++)
                d[i] = (is_q ? rstd[0] : rstd[1]) *
                       (weight[i] * d[i] - value[i] * (is_q ? dots[0] : dots[1]));
            store_some(dy + at, d);
        }
    }
    __syncthreads();
    if constexpr (of_heads) {
        const int count = (a.v_norms ? 3 : 2) * a.HS;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const int tensor = i / a.HS; // 0: q, 1: k, 2: v
            const int begin = tensor == 0 ? 0 : a.NH + (tensor - 1) * a.KVH;
            const int end = a.NH + tensor * a.KVH;
            float sum = 0;
            for (int head = begin; head < end; head++)
                sum += sums[index_of_sum(head * a.HS + i % a.HS, width)];
            partial[int64_t(blockIdx.x) * count + i] = sum;
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x)
            partial[int64_t(blockIdx.x) * width + i] = sums[index_of_sum(i, width)];
    }
}

inline int qkv_norm_parts(const AttentionShape& a) { return int(std::min<int64_t>(512, a.rows())); }
inline int64_t qkv_norm_scratch(const AttentionShape& a) { // floats
    return int64_t(qkv_norm_parts(a)) * a.prepared_width();
}

// Turns dqkv (rows, row), the gradient of the norms' output, into that of their input; adds to the
// gradients of the weights, as wide as a norm, if there are any. scratch: qkv_norm_scratch(a)
// floats.
template <class S, class G>
void qkv_norm_backward(S* dqkv, const S* raw, const NormStats* stats,
                       const QkvPointers<const S>& weights, const QkvPointers<G>& dweights,
                       float* scratch, const AttentionShape& a, cudaStream_t stream) {
    const int parts = qkv_norm_parts(a);
    const bool whole = a.channels % 8 == 0;
    const int units = a.prepared_heads() * (a.channels / (whole ? 8 : 1));
    auto launch_with = [&]<bool of_heads>() {
        launch(whole ? qkv_norm_backward_kernel<of_heads, 8, S>
                     : qkv_norm_backward_kernel<of_heads, 1, S>,
               parts, threads_for(units, 512),
               shared_bytes<float>(2 * warp) + shared_bytes<float>(a.prepared_width()), stream,
               dqkv, raw, stats, weights, scratch, a);
    };
    a.heads_normed() ? launch_with.template operator()<true>()
                     : launch_with.template operator()<false>();
    const int widths[] = {a.q_width() / a.q_norms, a.kv_width() / a.k_norms, a.v_norms ? a.HS : 0};
    const int all = widths[0] + widths[1] + widths[2];
    int tensor = 0;
    G* const gradients[] = {dweights.q, dweights.k, dweights.v}; // nvcc takes no list in the loop
    for (G* gradient : gradients) {
        if (gradient) add_partial_sums(gradient, scratch, parts, all, widths[tensor], stream);
        scratch += widths[tensor++];
    }
}

// Hopper GPUs use their own instructions (wgmma, TMA) where the shape allows it: for llama-130m on
// 64 x 1,024 tokens on an H200 attention takes 20.9 ms a step, and 29.2 ms by mma.
// LNS_ATTENTION=mma uses the path of the other GPUs.
inline bool use_hopper_attention() {
    static const bool use = [] {
        const char* set = std::getenv("LNS_ATTENTION");
        const std::string name = set ? set : "hopper";
        if (name != "mma" && name != "hopper")
            fail("LNS_ATTENTION is '", name, "' in the environment: expected hopper or mma");
        return name == "hopper";
    }();
    return use;
}

// out (B, T, NH·HS) = softmax(q kᵀ · scale) v under the causal mask. Keeps lse (B, NH, T), the
// logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, float* lse, const S* qkv, const AttentionShape& a,
                       cudaStream_t stream) {
    if constexpr (std::is_same_v<S, bf16>)
        if (use_hopper_attention() && hopper_attention_forward(out, lse, qkv, a, stream)) return;
    mma_attention_forward(out, lse, qkv, a, stream);
}

// dqkv (B, T, row) from dout (B, T, NH·HS); with a table (T, channels/2), the gradient before
// rotation. With P the softmax and O the output, of a query: dP = dO Vᵀ; dS = P ⊙ (dP − dO · O);
// dQ = dS K · scale; dK = dSᵀ Q · scale; dV = Pᵀ dO. delta (B, NH, T): scratch, dO · O. Scores are
// recomputed twice, for dQ and for dK and dV, so that every accumulator belongs to one warp.
template <class S>
void attention_backward(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                        const CosSin* table, float* delta, const AttentionShape& a,
                        cudaStream_t stream) {
    if constexpr (std::is_same_v<S, bf16>)
        if (use_hopper_attention() &&
            hopper_attention_backward(dqkv, dout, out, qkv, lse, table, delta, a, stream))
            return;
    mma_attention_backward(dqkv, dout, out, qkv, lse, table, delta, a, stream);
}

// ---------------------------------------------------------------------------------------------
// The MLP's activation functions: a (rows, H) from h (rows, H) or, gated, (rows, 2·H).

// GELU in its tanh form (arXiv 1606.08415): x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
// With s = sigmoid(2 · the argument), that is x · s.
const float gelu_slope = 2 * 0.79788456080286535588f;

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

// dh may be da.
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
        gate[i] = d[i] * up[i] * s * (1 + g * (1 - s)); // gradients from here on
        up[i] = d[i] * g * s;
    }
    store8(dh + at, gate), store8(dh + at + H, up);
}

template <class S>
void swiglu_backward(S* dh, const S* da, const S* h, int64_t rows, int H, cudaStream_t stream) {
    launch(swiglu_backward_kernel<S>, dim3(unsigned(rows), blocks_for(H, 128 * 8)), 128, 0, stream,
           dh, da, h, H);
}

// a (rows, H) from h (rows, H) or, gated, (rows, 2·H).
template <class S>
void activation_forward(Activation activation, S* out, const S* h, int64_t rows, int H,
                        cudaStream_t stream) {
    switch (activation) {
    case Activation::gelu:
        return gelu_forward(out, h, rows * H, stream);
    case Activation::swiglu:
        return swiglu_forward(out, h, rows, H, stream);
    }
}

template <class S>
void activation_backward(Activation activation, S* dh, const S* da, const S* h, int64_t rows, int H,
                         cudaStream_t stream) {
    switch (activation) {
    case Activation::gelu:
        return gelu_backward(dh, da, h, rows * H, stream);
    case Activation::swiglu:
        return swiglu_backward(dh, da, h, rows, H, stream);
    }
}

// ---------------------------------------------------------------------------------------------
// Loss: −log softmax(logits)[target] of each row, 0 where the target is −1.

// out (n, C) = in[rows[i]], the rows that are scored.
template <class S>
__global__ static void gather_rows_kernel(S* out, const S* in, const int* rows, int64_t n, int C) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n * C) return;
    float x[8];
    load8(x, in + rows[at / C] * int64_t(C) + at % C);
    store8(out + at, x);
}

template <class S>
void gather_rows(S* out, const S* in, const int* rows, int64_t n, int C, cudaStream_t stream) {
    launch(gather_rows_kernel<S>, blocks_for(n * C, 256 * 8), 256, 0, stream, out, in, rows, n, C);
}

// exp(x − y), exactly 1 where they are equal.
__device__ inline float exp_of_difference(float x, float y) { return fast_exp2((x - y) * log2_e); }

// A block has a row, which it reads once and, if it fits, caches in shared memory, where each
// thread reads only what it copied itself.
template <bool cached, class X>
__global__ static __launch_bounds__(cached ? 1024 : 512) void cross_entropy_kernel(
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
    const float at_target = float(x[target]); // overwritten later, after a barrier
    const X* source = x;
    if constexpr (cached) {
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
                if (n * 8 + i >= V) value[i] = -INFINITY; // probability 0
    };

    OnlineSoftmax softmax;
    softmax.largest = least;
    for (int n = threadIdx.x; n < vectors; n += blockDim.x) {
        float value[8];
        load(value, n);
        float top = value[0];
#pragma unroll
        for (int i = 1; i < 8; i++) top = fmaxf(top, value[i]);
        if (top > softmax.largest) softmax.raise(top, log2_e);
#pragma unroll
        for (int i = 0; i < 8; i++) softmax.sum += exp_of_difference(value[i], softmax.largest);
    }
    // Of the warp, then of the block.
    const int lane = threadIdx.x % warp, w = threadIdx.x / warp, warps = blockDim.x / warp;
    auto merge_lanes = [&] {
        softmax.raise(warp_max(softmax.largest), log2_e);
        softmax.sum = warp_sum(softmax.sum);
    };
    merge_lanes();
    if (lane == 0) exchange[w] = softmax.largest, exchange[warp + w] = softmax.sum;
    __syncthreads();
    softmax.largest = lane < warps ? exchange[lane] : least;
    softmax.sum = lane < warps ? exchange[warp + lane] : 0;
    merge_lanes();
    const float largest = softmax.largest, sum = softmax.sum;

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

// losses (rows) of logits (rows, V), `row` elements from one row to the next. With `gradients`,
// replaces the logits by loss_scale × their gradient, 0 in the columns from V on; loss_scale is on
// the GPU.
template <class X>
void cross_entropy(float* losses, X* logits, bool gradients, const int* targets,
                   const float* loss_scale, int64_t rows, int V, int64_t row, cudaStream_t stream) {
    int device = 0, limit = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const int vectors = blocks_for(V, 8);
    const size_t exchange = shared_bytes<float>(2 * warp);
    const size_t all = exchange + shared_bytes<X>(size_t(vectors) * 8);
    const bool cached = all <= size_t(limit);
    // Where a multiprocessor has room for one block alone, that has more threads.
    const int threads = threads_for(vectors, cached && all > size_t(limit) / 2 ? 1024 : 512);
    launch(cached ? cross_entropy_kernel<true, X> : cross_entropy_kernel<false, X>, unsigned(rows),
           threads, cached ? all : exchange, stream, losses, logits, gradients, targets, loss_scale,
           V, row);
}

// By one block: rows are few.
__global__ static void add_losses_kernel(double* sum, const float* losses, int64_t rows) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {};
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) total[0] += double(losses[row]);
    block_sums(total, exchange);
    if (threadIdx.x == 0) *sum += total[0];
}

// *sum, on the GPU, += Σ losses (rows).
inline void add_losses(double* sum, const float* losses, int64_t rows, cudaStream_t stream) {
    launch(add_losses_kernel, 1, 1024, shared_bytes<double>(warp), stream, sum, losses, rows);
}

// ---------------------------------------------------------------------------------------------
// AdamW (arXiv 1711.05101). The length of the flat buffers, and of a range of them, is a multiple
// of 8.

const int norm_blocks = 1024; // at most

// Sums 8 squares in float, then all in double.
template <class G>
__global__ static void square_sums_kernel(double* partial, const G* gradients, int64_t n) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    const int64_t step = int64_t(gridDim.x) * blockDim.x * 8;
    const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    const int count = first < n ? int((n - first + step - 1) / step) : 0;
    double total[1] = {};
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        float g[8], sum = 0;
        load8(g, gradients + first + i * step);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += g[j] * g[j];
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

// *norm = ‖gradients (n)‖₂, on the GPU. scratch: norm_blocks doubles.
template <class G>
void gradient_norm(double* norm, const G* gradients, int64_t n, double* scratch,
                   cudaStream_t stream) {
    const int blocks = int(std::clamp<int64_t>(n / (4 * 256 * 8), 1, norm_blocks));
    launch(square_sums_kernel<G>, blocks, 256, shared_bytes<double>(warp), stream, scratch,
           gradients, n);
    launch(root_of_sums_kernel, 1, norm_blocks, shared_bytes<double>(warp), stream, norm, scratch,
           blocks);
}

// A step's hyperparameters, of one layer or of what belongs to none (−1). They are on the GPU, so
// that a captured graph reads the current step's.
struct UpdateStep {
    float lr, beta1, beta2, eps, weight_decay;
    float correction1, correction2; // 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ)
    float grad_clip;                // clip the gradient's norm to this; 0: never
    float grad_scale;               // multiplies every gradient, where there is no norm
    float muon_lr, momentum;
    bool cautious;
    uint32_t step;
};
inline UpdateStep make_update_step(const Hyperparameters& o, double grad_clip, int layer) {
    const double t = double(o.step_of(layer));
    return {.lr = float(o.lr),
            .beta1 = float(o.beta1),
            .beta2 = float(o.beta2),
            .eps = float(o.eps),
            .weight_decay = float(o.weight_decay),
            .correction1 = float(1 / (1 - std::pow(o.beta1, t))),
            .correction2 = float(1 / (1 - std::pow(o.beta2, t))),
            .grad_clip = float(grad_clip),
            .grad_scale = float(o.grad_scale),
            .muon_lr = float(o.muon_lr),
            .momentum = float(o.momentum),
            .cautious = o.cautious,
            .step = uint32_t(o.step)};
}

// Scales GPAS's gates' gradients so that their norm, after the clipping of all, is at most `limit`.
// norm: of all.
template <class G>
__global__ static void clip_gates_kernel(G* gradients, const int64_t* gates, int n,
                                         const double* norm, double grad_clip, double limit) {
    double square = 0;
    for (int i = 0; i < n; i++)
        square += double(float(gradients[gates[i]])) * double(float(gradients[gates[i]]));
    const double scale = grad_clip > 0 && *norm > grad_clip ? grad_clip / *norm : 1;
    const double of_gates = scale * sqrt(square);
    for (int i = 0; i < n && of_gates > limit; i++)
        gradients[gates[i]] = G(float(gradients[gates[i]]) * float(limit / of_gates));
}

// The optimizer's flat buffers, and the n elements from `begin` on that it updates. The moments are
// those of these (n) alone.
template <class S, class M, class G> struct AdamWBuffers {
    S* parameters;
    float* master; // may be null
    const G* gradients;
    M *moment1, *moment2;
    const uint32_t* decays; // a bit for each 8 elements: whether weight decay applies
    const UpdateStep* step;
    const double* norm; // the gradient's, for clipping; may be null
    const double* loss; // may be null
    int64_t n, begin = 0;
    float lr_scale = 1, decay_scale = 1, eps_scale = 1; // Param's, of all n
};

// Rounds up or down to a bf16, as a float, with probabilities that make the mean exact: as
// round_stochastically of gpt/cpu/bf16.h. random: 16 random bits.
__device__ inline float round_to_bf16_stochastically(float x, uint32_t random) {
    const uint32_t u = __float_as_uint(x);
    const uint32_t finite = (u & 0x7F800000u) == 0x7F800000u ? 0 : random & 0xFFFFu;
    return __uint_as_float((u + finite) & 0xFFFF0000u);
}

// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
// w ← w − lr · (m̂ / (√v̂ + eps) + decay · w), with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).
template <bool stochastic, class S, class M, class G>
__global__ static __launch_bounds__(256, 4) void adamw_kernel(AdamWBuffers<S, M, G> a) {
    const int64_t i0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i0 >= a.n) return;
    const int64_t at = a.begin + i0, vector = at / 8;
    float g[8], m[8], v[8], w[8];
    load8(g, a.gradients + at), load8(m, a.moment1 + i0), load8(v, a.moment2 + i0);
    if (a.master)
        load8(w, a.master + at);
    else
        load8(w, a.parameters + at);
    const UpdateStep o = *a.step;
    if ((a.norm && !std::isfinite(*a.norm)) || (a.loss && !std::isfinite(*a.loss))) return;
    float scale = o.grad_scale;
    if (a.norm)
        scale = o.grad_clip > 0 && *a.norm > double(o.grad_clip) ? float(o.grad_clip / *a.norm) : 1;
    const float lr = o.lr * a.lr_scale, eps = o.eps * a.eps_scale;
    const bool decays = a.decays[vector / 32] >> vector % 32 & 1;
    const float decay = decays ? o.weight_decay * a.decay_scale : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float d = scale * g[i];
        m[i] = o.beta1 * m[i] + (1 - o.beta1) * d;
        v[i] = o.beta2 * v[i] + (1 - o.beta2) * d * d;
        const float step = m[i] * o.correction1 / (sqrtf(v[i] * o.correction2) + eps);
        w[i] -= lr * (step + (o.cautious && w[i] * step < 0 ? 0 : decay) * w[i]);
        if constexpr (stochastic) { // 16 random bits each, a function of (step, at + i)
            const uint32_t random = mix_bits(uint32_t(at + i) * 0x9E3779B9u + o.step);
            const uint32_t more = mix_bits(random + uint32_t((at + i) >> 32));
            if (sizeof(M) == 2) {
                m[i] = round_to_bf16_stochastically(m[i], random);
                v[i] = round_to_bf16_stochastically(v[i], random >> 16);
            }
            if (sizeof(S) == 2 && !a.master) w[i] = round_to_bf16_stochastically(w[i], more);
        }
    }
    store8(a.moment1 + i0, m), store8(a.moment2 + i0, v);
    if (a.master) store8(a.master + at, w);
    store8(a.parameters + at, w);
}

// Updates parameters, master weights and moments; nothing if the norm or the loss is not finite.
// With `stochastic`, moments in bf16, and parameters in bf16 without a master, are rounded at
// random.
template <class S, class M, class G>
void adamw_update(const AdamWBuffers<S, M, G>& a, bool stochastic, cudaStream_t stream) {
    launch(stochastic ? adamw_kernel<true, S, M, G> : adamw_kernel<false, S, M, G>,
           blocks_for(a.n, 256 * 8), 256, 0, stream, a);
}

// ---------------------------------------------------------------------------------------------
// Muon (gpt/model/muon.h): m ← μ m + (1 − μ) g; u = μ m + (1 − μ) g;
// w ← w − lr · (scale · orthogonal(u) + decay · w). Pointers are those of one matrix.

// A matrix (rows, columns), padded, with its momentum and what else belongs to it.
template <class S, class M, class G> struct MuonBuffers {
    S* parameters;
    float* master; // may be null
    const G* gradients;
    M *momentum, *row_moments; // (rows, columns); (rows), null: no NorMuon
    const UpdateStep* step;
    const double *norm, *loss; // as AdamWBuffers'
    int64_t begin;             // in the flat buffers, for random bits
    int64_t rows, columns;
    float lr_scale, decay_scale; // the latter 0: no decay

    __host__ __device__ int64_t size() const { return rows * columns; }
    __device__ bool skipped() const {
        return (norm && !std::isfinite(*norm)) || (loss && !std::isfinite(*loss));
    }
    __device__ float gradient_scale() const {
        if (!norm) return step->grad_scale;
        const double clip = step->grad_clip;
        return clip > 0 && *norm > clip ? float(clip / *norm) : 1;
    }
    __device__ uint32_t random_bits(int64_t i) const {
        return mix_bits(uint32_t(begin + i) * 0x9E3779B9u + step->step);
    }
};

// Scratch of an update, for the largest matrix.
template <class S> struct MuonScratch {
    S *x, *y, *gram, *polynomial;
    double *norm, *partial, *row_squares; // norm_blocks; most_rows
    float* row_sizes;                     // most_rows

    MuonScratch(const OptimizerLayout& layout, S* values, double* sums)
        : x(values), y(x + layout.largest), gram(y + layout.largest),
          polynomial(gram + layout.gram), norm(sums), partial(norm + 1),
          row_squares(partial + norm_blocks),
          row_sizes(reinterpret_cast<float*>(row_squares + layout.most_rows)) {}
    // Elements of `sums`.
    static int64_t sums(const OptimizerLayout& layout) {
        return layout.scratch() ? 1 + norm_blocks + 2 * layout.most_rows : 0;
    }
};

// m, and in partial each block's sum of u².
template <bool stochastic, class S, class M, class G>
__global__ static void muon_momentum_kernel(MuonBuffers<S, M, G> a, double* partial) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    const int64_t stride = int64_t(gridDim.x) * blockDim.x * 8;
    const float scale = a.gradient_scale(), mu = a.step->momentum;
    const bool skipped = a.skipped();
    double total[1] = {};
    for (int64_t i0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i0 < a.size();
         i0 += stride) {
        float g[8], m[8], sum = 0;
        load8(g, a.gradients + i0), load8(m, a.momentum + i0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            m[i] = mu * m[i] + (1 - mu) * (scale * g[i]);
            if constexpr (stochastic && sizeof(M) == 2)
                m[i] = round_to_bf16_stochastically(m[i], a.random_bits(i0 + i));
            const float u = mu * float(M(m[i])) + (1 - mu) * (scale * g[i]);
            sum += u * u;
        }
        if (!skipped) store8(a.momentum + i0, m);
        total[0] += double(sum);
    }
    block_sums(total, exchange);
    if (threadIdx.x == 0) partial[blockIdx.x] = total[0];
}

// x = u / max(margin · ‖u‖, 1e-7)
template <class S, class M, class G>
__global__ static void muon_direction_kernel(S* x, MuonBuffers<S, M, G> a, const double* norm,
                                             double margin) {
    const int64_t i0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i0 >= a.size()) return;
    const float scale = a.gradient_scale(), mu = a.step->momentum;
    const float inverse = float(1 / fmax(margin * *norm, 1e-7));
    float g[8], m[8];
    load8(g, a.gradients + i0), load8(m, a.momentum + i0);
#pragma unroll
    for (int i = 0; i < 8; i++) m[i] = inverse * (mu * m[i] + (1 - mu) * (scale * g[i]));
    store8(x + i0, m);
}

// square (n, n) ← a I + b gram + c square
template <class S>
__global__ static void quintic_kernel(S* square, const S* gram, int n, float a, float b, float c) {
    const int64_t i0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i0 >= int64_t(n) * n) return;
    const int row = int(i0 / n), column = int(i0 % n);
    float x[8], y[8];
    load8(x, square + i0), load8(y, gram + i0);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = c * x[i] + b * y[i] + (column + i == row ? a : 0);
    store8(square + i0, x);
}

// out (m, n) = op(a) · op(b), row-major: op(a) (m, k) is stored (k, m) if a_transposed. All ranks
// have to compute the same bits, so that none measures which algorithm is the fastest.
template <class S>
void row_major_product(CublasLt& cublas, S* out, const S* a, bool a_transposed, const S* b,
                       bool b_transposed, int64_t m, int64_t n, int64_t k) {
    cublas.matmul({.in = data_type<S>,
                   .out = data_type<S>,
                   .a_transposed = b_transposed,
                   .b_transposed = a_transposed,
                   .m = n,
                   .n = m,
                   .k = k,
                   .a = b,
                   .b = a,
                   .d = out,
                   .lda = b_transposed ? k : n,
                   .ldb = a_transposed ? m : k,
                   .ldd = n,
                   .timed = false});
}

// Nearly the orthogonal factor of scratch.x (rows, columns), of norm 1 at most; in scratch.x or y.
template <class S>
S* orthogonalize(CublasLt& cublas, const MuonScratch<S>& scratch, int64_t rows, int64_t columns,
                 const Quintics& quintics) {
    const bool wide = rows <= columns;
    const int n = int(std::min(rows, columns));
    S *x = scratch.x, *y = scratch.y, *gram = scratch.gram, *polynomial = scratch.polynomial;
    for (const Quintic& q : quintics.all) {
        wide ? row_major_product(cublas, gram, x, false, x, true, n, n, columns)
             : row_major_product(cublas, gram, x, true, x, false, n, n, rows);
        row_major_product(cublas, polynomial, gram, false, gram, false, n, n, n);
        launch(quintic_kernel<S>, blocks_for(int64_t(n) * n, 256 * 8), 256, 0, cublas.stream,
               polynomial, gram, n, float(q.a), float(q.b), float(q.c));
        wide ? row_major_product(cublas, y, polynomial, false, x, false, n, columns, n)
             : row_major_product(cublas, y, x, false, polynomial, false, rows, n, n);
        std::swap(x, y);
    }
    return x;
}

// squares[r] = the sum of squares of row r of x, by a block each.
template <class S>
__global__ static void row_squares_kernel(double* squares, const S* x, int64_t columns) {
    SharedMemory shared;
    double* exchange = shared.take<double>(warp);
    double total[1] = {};
    for (int64_t c = threadIdx.x * 8; c < columns; c += blockDim.x * 8) {
        float row[8], sum = 0;
        load8(row, x + blockIdx.x * columns + c);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += row[i] * row[i];
        total[0] += double(sum);
    }
    block_sums(total, exchange);
    if (threadIdx.x == 0) squares[blockIdx.x] = total[0];
}

// NorMuon, by one block: v ← β₂ v + (1 − β₂) · the mean square of a row, and the rows' factors
// 1 / (√v + eps), times one that makes the norm of all `norm`, or if that is 0 the norm before.
// columns: without padding.
template <bool stochastic, class S, class M, class G>
__global__ static void normalize_rows_kernel(float* sizes, MuonBuffers<S, M, G> a,
                                             const double* squares, int columns, double norm) {
    SharedMemory shared;
    double* exchange = shared.take<double>(2 * warp);
    const float beta2 = a.step->beta2;
    double total[2] = {};
    for (int64_t r = threadIdx.x; r < a.rows; r += blockDim.x) {
        const float mean = float(squares[r]) / float(columns);
        float v[1] = {beta2 * float(a.row_moments[r]) + (1 - beta2) * mean};
        const float factor = 1 / (sqrtf(v[0]) + float(normuon_eps));
        total[0] += squares[r], total[1] += factor * factor * squares[r];
        sizes[r] = factor;
        if constexpr (stochastic && sizeof(M) == 2)
            v[0] = round_to_bf16_stochastically(v[0], a.random_bits(r) >> 16);
        if (!a.skipped()) a.row_moments[r] = M(v[0]);
    }
    block_sums(total, exchange);
    if (norm == 0) norm = sqrt(total[0]);
    const float common = float(norm / (sqrt(total[1]) + normuon_eps));
    for (int64_t r = threadIdx.x; r < a.rows; r += blockDim.x) sizes[r] *= common;
}

// row_sizes: may be null.
template <bool stochastic, class S, class M, class G>
__global__ static void muon_update_kernel(MuonBuffers<S, M, G> a, const S* factor, float size,
                                          const float* row_sizes) {
    const int64_t i0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i0 >= a.size() || a.skipped()) return;
    const UpdateStep o = *a.step;
    const float lr = o.muon_lr * a.lr_scale, decay = o.weight_decay * a.decay_scale;
    if (row_sizes) size *= row_sizes[i0 / a.columns];
    float w[8], x[8];
    load8(x, factor + i0);
    a.master ? load8(w, a.master + i0) : load8(w, a.parameters + i0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float step = size * x[i];
        w[i] -= lr * (step + (o.cautious && w[i] * step < 0 ? 0 : decay) * w[i]);
        if constexpr (stochastic && sizeof(S) == 2)
            if (!a.master)
                w[i] = round_to_bf16_stochastically(
                    w[i], mix_bits(a.random_bits(i0 + i) + uint32_t((a.begin + i0 + i) >> 32)));
    }
    if (a.master) store8(a.master + i0, w);
    store8(a.parameters + i0, w);
}

// rows, columns: without padding.
template <bool stochastic, class S, class M, class G>
void muon_update(CublasLt& cublas, const MuonBuffers<S, M, G>& a, const MuonScratch<S>& scratch,
                 const Hyperparameters& o, int64_t rows, int64_t columns) {
    const cudaStream_t stream = cublas.stream;
    const Quintics polynomials = quintics(o.orthogonalization);
    const int blocks = int(std::clamp<int64_t>(a.size() / (4 * 256 * 8), 1, norm_blocks));
    launch(muon_momentum_kernel<stochastic, S, M, G>, blocks, 256, shared_bytes<double>(warp),
           stream, a, scratch.partial);
    launch(root_of_sums_kernel, 1, norm_blocks, shared_bytes<double>(warp), stream, scratch.norm,
           scratch.partial, blocks);
    launch(muon_direction_kernel<S, M, G>, blocks_for(a.size(), 256 * 8), 256, 0, stream, scratch.x,
           a, scratch.norm, polynomials.margin);
    const S* factor = orthogonalize(cublas, scratch, a.rows, a.columns, polynomials);
    if (a.row_moments) {
        launch(row_squares_kernel<S>, int(a.rows), 128, shared_bytes<double>(warp), stream,
               scratch.row_squares, factor, a.columns);
        launch(normalize_rows_kernel<stochastic, S, M, G>, 1, 1024, shared_bytes<double>(2 * warp),
               stream, scratch.row_sizes, a, scratch.row_squares, int(columns),
               normuon_norm(o.muon_scale, rows, columns, 0));
    }
    launch(muon_update_kernel<stochastic, S, M, G>, blocks_for(a.size(), 256 * 8), 256, 0, stream,
           a, factor, float(muon_scale(o.muon_scale, rows, columns)),
           a.row_moments ? scratch.row_sizes : nullptr);
}

// ---------------------------------------------------------------------------------------------
// The model

template <class S> using CudaTensors = PassTensors<Array, S, float, NormStats, JunctionStats>;

template <class S> struct Activations : CudaTensors<S> {
    int64_t head_rows = 0, logit_rows = 0; // rows of logits at once, with gradients and without
    Array<char> logits;  // (head_rows, V) of S, then their gradients, or (logit_rows, V) floats
    Array<float> delta;  // (rows, NH): dO · O
    Array<char> scratch; // partial sums
    Array<float> stream_weight; // (maps, n·C): φ or its gradient, in float
    Array<Moments> moments;     // (rows), for layer diagnostics

    // Calls make(array, elements) for every array. Widths are padded.
    template <class Make>
    void layout(const Config& c, int B, int T, const ModelOptions& o, int multiprocessors,
                const Make& make) {
        // QK-norm amplifies rounding errors, so q and k are rounded once, after norm and RoPE.
        // Without it they are also rounded before RoPE, which saves a pass in float.
        CudaTensors<S>::layout(c, B, T, o,
                               c.qkv_norms() && !c.qkv_bias && !std::is_same_v<S, float>, make);
        const int64_t rows = this->rows;
        const int V = c.vocab_size;
        const bool backward = o.purpose >= Purpose::jacobians;
        const StreamShape& streams = this->stream_shape;
        make(stream_weight, streams.maps() * streams.width());
        // Half a gigabyte of logits where there is a backward pass.
        head_rows = backward ? head_part(rows, V, int64_t(1) << 28, 128) : 0;
        logit_rows = backward ? std::max<int64_t>(1, head_rows * int64_t(sizeof(S)) / 4)
                              : head_part(rows, V, int64_t(1) << 26, 128);
        make(logits, std::max(head_rows * int64_t(sizeof(S)), logit_rows * 4) * V);
        make(moments, rows);
        if (!backward) return;
        make(delta, rows * c.heads);
        AttentionShape a{B, T, c.heads, c.kv_heads, c.head_size, c.head_size};
        a.v_norms = c.v_norms();
        const int widest = std::max({c.width, c.qkv_width(), c.mlp_in_width(), streams.maps() + 3});
        make(scratch, std::max({junction_scratch(c.width, multiprocessors),
                                int64_t(sizeof(float)) * qkv_norm_scratch(a),
                                c.scheme.value_residual ? mix_values_scratch(a) : 0,
                                int64_t(sizeof(float)) * matmul_scratch(rows, widest)}));
    }
};

template <class S, class G> struct CudaModel : Model {
    static constexpr bool exact = std::is_same_v<S, float>; // parameters need no master weights

    ModelOptions options;
    Config padded_config;
    Registry padded_registry; // of the flat buffers
    int multiprocessors = 0;
    OwnStream stream, copies; // of the computation; of micro-batches copied ahead
    CublasLt cublas;

    Array<S> parameters;
    Array<float> master; // weights in float, if parameters are bf16 and options want it
    Array<G> gradients;
    struct State { // of the optimizer, in one of two precisions
        Array<float> full;
        Array<bf16> rounded;
    };
    OptimizerLayout optimizer_layout; // padded
    Array<S> muon_values;             // MuonScratch's
    Array<double> muon_sums;
    std::vector<State> states;
    Array<uint32_t> decays; // a bit for each 8 parameters
    Array<int64_t> gates;   // GPAS's, as offsets
    Activations<S> acts;
    Array<CosSin> rotary_table; // (T, channels/2)

    // What a step computes and reads on the GPU without the host.
    Array<double> sums; // loss, gradient norm, then the norm's scratch
    Pinned<double> host_sums;
    Array<UpdateStep> update_steps; // of what belongs to no layer, then of each layer
    Pinned<UpdateStep> host_update_steps;

    Array<int> batch;   // the current micro-batch, as BatchLayout has it
    Array<int> batches; // a step's, copied ahead
    Pinned<int> host_batches;
    std::vector<cudaEvent_t> arrived; // for each of them
    std::vector<int> counts;

    std::vector<int> tokens;     // of the last pass
    int B = 0, T = 0;            // of the last pass
    int first = 0;               // the first row that the last pass computed
    bool kv_cache_valid = false; // whether the next pass may reuse the last one's k and v
    Branches branches;           // of the last pass, in branch_rows
    Array<int> branch_rows;      // (2, rows), once a pass branches
    Array<S> scored_input;       // (logit_rows, C), once tokens are scored, and their
    Array<int> scored_rows;      // rows, then tokens: (2, logit_rows)
    int between = 0;             // layer by layer, r is residual(between)
    int64_t bytes_held = 0;

    // A micro-step of (B, T). The first one chooses the matmuls' algorithms, the second is
    // captured.
    struct Graph {
        int B, T;
        cudaGraphExec_t graph; // null before the capture
    };
    std::vector<Graph> graphs;
    EventTimes times;
    double step_scale = 0; // loss_scale of the current step
    bool stopped = false;  // whether StepInput::stop ended it

    Communicator communicator;

    CudaModel(const Config& c, int max_B, int max_T, const ModelOptions& o, const Ranks& ranks)
        : Model(c, *o.optimizer), options(o), padded_config(pad_config(c)),
          padded_registry(make_registry(padded_config)),
          multiprocessors(lns::gpu().multiprocessors), cublas(stream),
          optimizer_layout(*optimizer, padded_registry) {
        if (c.width % 8)
            fail("a GPU takes 8 channels at once, and the model's width is ", c.width,
                 ": choose a --width that is a multiple of 8, or --device cpu");
        row_shape(c.width); // throws if that is too wide
        this->ranks = &ranks;
        auto make = [&](auto& array, int64_t n) {
            array = std::remove_reference_t<decltype(array)>(n);
            bytes_held += n * int64_t(sizeof(array[0]));
        };
        const int64_t n = padded_registry.size;
        make(parameters, n);
        if (o.purpose >= Purpose::gradients) make(gradients, n);
        if (o.purpose == Purpose::training) {
            make(master, exact || !o.master_weights ? 0 : n);
            for (int64_t size : optimizer_layout.sizes) {
                State& state = states.emplace_back();
                o.moments == DType::bf16 ? make(state.rounded, size) : make(state.full, size);
            }
            make(muon_values, optimizer_layout.scratch());
            make(muon_sums, MuonScratch<S>::sums(optimizer_layout));
            make(decays, blocks_for(n, 8 * 32));
            upload_decays();
            const std::vector<int64_t> offsets = padded_registry.gates();
            make(gates, int64_t(offsets.size()));
            if (gates.size) gates.upload(offsets.data());
            make(update_steps, 1 + c.layers);
            host_update_steps = Pinned<UpdateStep>(1 + c.layers);
        }
        acts.layout(padded_config, max_B, max_T, o, multiprocessors, make);
        make(sums, 2 + norm_blocks);
        host_sums = Pinned<double>(2);
        make(batch, BatchLayout{acts.rows}.ints());
        if (c.rope()) upload_rotary_table(make);
        bytes_held += cublas.bytes();
        communicator.join(ranks);
        CUDA(cudaDeviceSynchronize()); // our streams do not wait for the zeroing of the arrays
    }
    ~CudaModel() override {
        cudaStreamSynchronize(stream);
        for (cudaEvent_t event : arrived) cudaEventDestroy(event);
        for (const Graph& g : graphs)
            if (g.graph) cudaGraphExecDestroy(g.graph);
    }

    void upload_decays() {
        std::vector<uint32_t> bits(size_t(decays.size));
        for (const Param& p : padded_registry.params)
            for (int64_t i = p.offset / 8; p.decay && i < (p.offset + p.size()) / 8; i++)
                bits[i / 32] |= 1u << i % 32;
        decays.upload(bits.data());
    }
    template <class Make> void upload_rotary_table(const Make& make) {
        const int64_t positions = std::min<int64_t>(config.positions, acts.rows);
        std::vector<CosSin> table(size_t(positions * (config.head_size / 2)));
        fill_rotary_table(table.data(), config, positions);
        make(rotary_table, int64_t(table.size()));
        rotary_table.upload(table.data());
    }

    void initialize(uint64_t seed) override {
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
        clear(gradients);
        for (State& state : states) clear(state.full), clear(state.rounded);
        stream.wait();
    }

    // Tensors of the last pass, from row `first` on. k counts junctions from 0, l layers from 0.
    int64_t rows() const { return int64_t(B) * T - first; }
    float* residual(int k) { return acts.residual[k] + int64_t(first) * padded_config.width; }
    S* input(int k) { // u: the input of the sublayer after junction k
        if constexpr (exact)
            if (acts.input.slot[k] < 0) return residual(k);
        return acts.input[k] + int64_t(first) * padded_config.width;
    }
    S* branch(int k) {
        return acts.branch[acts.branch_of(k)] + int64_t(first) * padded_config.width;
    }
    float* embedded() {
        return acts.embedded.size ? acts.embedded + int64_t(first) * padded_config.width
                                  : residual(0);
    }
    float* before(int k) { return k == 0 ? embedded() : residual(k - 1); } // r_prev
    JunctionStats* stats(int k) { return acts.stats[k] + first; }
    float* second(int k) { // y of junction k, if there is one
        if (!acts.second.array.size) return nullptr;
        return acts.second[k] + int64_t(first) * padded_config.width;
    }
    float* start() {
        return acts.start.size ? acts.start + int64_t(first) * padded_config.width : nullptr;
    }
    S* hidden(int l) { return acts.hidden[l] + int64_t(first) * padded_config.mlp_in_width(); }
    S* activated(int l) { return acts.activated[l] + int64_t(first) * padded_config.mlp_width; }
    S* values(int l) { // before they are mixed; null where they are not kept
        if (acts.values.slot[l] < 0) return nullptr;
        return acts.values[l] + int64_t(first) * padded_config.kv_width();
    }

    // Those of attention, from row 0 on.
    S* qkv(int l) { return acts.qkv[l]; }
    S* qkv_raw(int l) { return config.qkv_norms() ? acts.qkv_raw[l] : nullptr; }
    NormStats* qkv_stats(int l) { return config.qkv_norms() ? acts.qkv_stats[l] : nullptr; }
    S* attended(int l) { return acts.attended[l]; }
    float* lse(int l) { return acts.lse[l]; }
    AttentionShape attention(int l) const {
        const Config& c = padded_config;
        return {B,     T,        c.heads,           c.kv_heads,  c.head_size, config.head_size,
                first, branches, c.window_of(l, T), c.q_norms(), c.k_norms(), c.v_norms()};
    }
    const CosSin* cos_sin(int l) const { return config.rotates(l) ? +rotary_table : nullptr; }
    const S* weight(int64_t offset) const { return offset < 0 ? nullptr : parameters + offset; }
    // Null without gradients, too.
    G* gradient(int64_t offset) const {
        return offset < 0 || !gradients.size ? nullptr : gradients + offset;
    }
    float* scratch() const { return acts.scratch.template as<float>(); }

    // The parts of the current micro-batch.
    BatchLayout layout() const { return {int64_t(B) * T}; }
    const int* inputs() const { return batch; }
    const int* targets() const { return batch + layout().targets(); }
    const float* loss_scale() const {
        return reinterpret_cast<const float*>(batch + layout().loss_scale());
    }

    Costs<S, G> costs() const {
        return {padded_config, double(rows()), double(T), double(config.q_width())};
    }
    // Books the time until the end of the scope.
    Timed timed(const Cost& cost) { return Timed(profile ? &times : nullptr, stream, cost); }

    // Of the micro-batch in `batch`. Positions before `from` are in the KV cache.
    void forward(int from = 0) {
        first = from;
        embed();
        join_forward(0);
        for (int l = 0; l < config.layers; l++) {
            attention_sublayer_forward(l);
            join_forward(2 * l + 1);
            mlp_sublayer_forward(l);
            join_forward(2 * l + 2);
        }
    }
    void embed() {
        const Timed timer = timed(costs().embedding_forward());
        embedding_forward<S>(embedded(), inputs() + first, weight(padded_registry.token_embedding),
                             weight(padded_registry.position_embedding),
                             weight(padded_registry.embed_scale), first, rows(), T,
                             padded_config.width, stream, branches.position);
    }

    // From the gradient of the final norm's output, in dinput.
    void backward() {
        clear_stream_gradients();
        for (int l = config.layers - 1; l >= 0; l--) {
            if (options.recompute == Recompute::layers) recompute_layer(l);
            join_backward(2 * l + 2);
            mlp_sublayer_backward(l);
            join_backward(2 * l + 1);
            attention_sublayer_backward(l);
        }
        join_backward(0);
        const Timed timer = timed(costs().embedding_backward());
        if (config.embed_scale())
            embedding_scale_backward<S, G>(
                gradient(padded_registry.embed_scale), acts.dresidual, inputs(),
                weight(padded_registry.token_embedding), weight(padded_registry.position_embedding),
                weight(padded_registry.embed_scale), rows(), T, padded_config.width,
                acts.scratch.template as<double>(), 2 * multiprocessors, stream);
        embedding_backward<G>(gradient(padded_registry.token_embedding),
                              gradient(padded_registry.position_embedding),
                              layout().token_rows(batch), acts.dresidual, B, T, padded_config.width,
                              padded_config.vocab_size, stream);
    }

    // Before a backward pass: of the second stream, of x₀ and of layer 1's v.
    void clear_stream_gradients() {
        for (Array<float>* gradient : {&acts.dsecond, &acts.dstart, &acts.dvalues})
            if (gradient->size)
                CUDA(cudaMemsetAsync(*gradient, 0, size_t(gradient->size) * sizeof(float), stream));
    }

    Junction junction_of(int k) const { return junction(config.scheme, config.layers, k); }
    JunctionArguments<S> junction_arguments(const Junction& j, int k, const float* r_prev, S* u) {
        return {JunctionPlan(j, padded_config, rows()),
                JunctionPointers<const S>(parameters, padded_registry.junctions[k]),
                r_prev,
                j.branch ? branch(k) : nullptr,
                residual(k),
                u,
                stats(k),
                second(j.branch ? k - 1 : k),
                second(k),
                start()};
    }
    JunctionArguments<S> junction_arguments(int k) {
        return junction_arguments(junction_of(k), k, before(k),
                                  acts.input.slot[k] < 0 ? nullptr : input(k));
    }
    JunctionGradients<S, G> junction_gradients(int k, bool last) {
        return {JunctionPointers<G>(gradients, padded_registry.junctions[k]),
                acts.dinput,
                last,
                acts.dresidual,
                acts.dbranch,
                acts.dsecond,
                acts.dstart,
                acts.scratch};
    }
    void join_forward(int k) {
        const Junction j = junction_of(k);
        const bool mixes = j.mixing != Mixing::sum;
        if (mixes) mix_forward(j, k);
        const Junction rest = mixes ? entering(j) : j;
        const bool has_input = acts.input.slot[k] >= 0;
        const Timed timer = timed(costs().junction_forward(rest, has_input));
        junction_forward(junction_arguments(rest, k, mixes ? residual(k) : before(k),
                                            has_input ? input(k) : nullptr),
                         stream);
    }
    void join_backward(int k) {
        const Junction j = junction_of(k);
        const bool mixes = j.mixing != Mixing::sum;
        {
            const Junction rest = mixes ? entering(j) : j;
            const bool last = mixes || k == 2 * config.layers; // nothing else reads such an r
            const Timed timer = timed(costs().junction_backward(rest, last));
            junction_backward(junction_arguments(rest, k, before(k), nullptr),
                              junction_gradients(k, last), multiprocessors, stream);
        }
        if (mixes) mix_backward(j, k);
    }

    // residual(k), where it is not a sum.
    void mix_forward(const Junction& j, int k) {
        const Timed timer = timed(costs().mix_forward(j, k));
        if (j.mixing == Mixing::streams) return streams_forward(cublas, stream_arguments(k));
        sources_forward(source_arguments(k), stream);
    }
    // From its gradient in dresidual to dbranch; at the first junction, to the embedding's gradient
    // in dresidual.
    void mix_backward(const Junction& j, int k) {
        const Timed timer = timed(costs().mix_backward(j, k));
        const JunctionParams& p = padded_registry.junctions[k];
        if (j.mixing == Mixing::streams)
            return streams_backward(
                cublas, stream_arguments(k),
                StreamGradients<S, G>{acts.dresidual, acts.dstreams, acts.dmaps, acts.dprojected,
                                      acts.dbranch, acts.dresidual, gradient(p.stream_weight),
                                      gradient(p.stream_bias), gradient(p.stream_scale),
                                      acts.stream_weight, scratch()});
        sources_backward(source_arguments(k),
                         SourceGradients<S, G>{acts.dresidual, acts.dsources, acts.branch.stride,
                                               k == 2 * config.layers, acts.dbranch,
                                               gradient(p.query), gradient(p.key_weight),
                                               scratch()},
                         multiprocessors, stream);
        if (k == 1)
            CUDA(cudaMemcpyAsync(acts.dresidual, acts.dsources, stream_bytes(),
                                 cudaMemcpyDeviceToDevice, stream));
    }
    StreamArguments<S> stream_arguments(int k) {
        const JunctionParams& p = padded_registry.junctions[k];
        const StreamShape& shape = acts.stream_shape;
        auto tensor = [&](const Slots<Array<float>>& slots, int k, int64_t row) {
            return slots.slot[k] < 0 ? nullptr : slots[k] + first * row;
        };
        const bool starts = k == 0;
        return {shape,
                row_shape(shape.C),
                rows(),
                starts ? embedded() : tensor(acts.streams, k - 1, shape.width()),
                starts ? nullptr : tensor(acts.maps, k - 1, shape.row()),
                starts ? nullptr : branch(k),
                weight(p.stream_weight),
                weight(p.stream_bias),
                weight(p.stream_scale),
                acts.stream_weight,
                tensor(acts.streams, k, shape.width()),
                residual(k),
                tensor(acts.projected, k, shape.row()),
                tensor(acts.maps, k, shape.row()),
                tensor(acts.stream_rstd, k, 1)};
    }
    SourceArguments<S> source_arguments(int k) {
        const JunctionParams& p = padded_registry.junctions[k];
        return {acts.source_shape,
                row_shape(padded_config.width),
                k,
                rows(),
                float(config.norm_eps),
                embedded(),
                branch(1),
                acts.branch.stride,
                weight(p.query),
                weight(p.key_weight),
                residual(k)};
    }

    // The matrices of layer l, (OC, C) and (OC), as offsets.
    struct Matrix {
        const char* name;
        int64_t weight, bias;
        int C, OC, layer;
    };
    Matrix qkv_matrix(int l) const {
        const LayerParams& p = padded_registry.layers[l];
        const Config& c = padded_config;
        return {"qkv", p.qkv, p.qkv_bias, c.width, c.qkv_width(), l};
    }
    Matrix attention_out_matrix(int l) const {
        const LayerParams& p = padded_registry.layers[l];
        const Config& c = padded_config;
        return {"attention out", p.attn_out, p.attn_out_bias, c.q_width(), c.width, l};
    }
    Matrix mlp_in_matrix(int l) const {
        const LayerParams& p = padded_registry.layers[l];
        const Config& c = padded_config;
        return {"MLP in", p.mlp_in, p.mlp_in_bias, c.width, c.mlp_in_width(), l};
    }
    Matrix mlp_out_matrix(int l) const {
        const LayerParams& p = padded_registry.layers[l];
        const Config& c = padded_config;
        return {"MLP out", p.mlp_out, p.mlp_out_bias, c.mlp_width, c.width, l};
    }
    // Out is S, or float where the result must not be rounded.
    template <class Out> void multiply_forward(Out* out, const S* in, const Matrix& m) {
        const Timed timer = timed(costs().matmul_forward(m.name, rows(), m.C, m.OC, sizeof(Out)));
        matmul_forward<S>(cublas, out, m.OC, in, weight(m.weight), weight(m.bias), rows(), m.C,
                          m.OC);
    }
    void multiply_backward(S* din, const S* dout, const S* in, const Matrix& m) {
        multiply_backward_input(din, dout, m);
        multiply_backward_weight(dout, in, m);
    }
    void multiply_backward_input(S* din, const S* dout, const Matrix& m) {
        const Timed timer = timed(costs().matmul_backward_input(m.name, rows(), m.C, m.OC));
        matmul_backward_input<S>(cublas, din, dout, m.OC, weight(m.weight), rows(), m.C, m.OC);
    }
    void multiply_backward_weight(const S* dout, const S* in, const Matrix& m) {
        if (!gradients.size || of_gradients.rests(m.layer)) return;
        const Timed timer = timed(costs().matmul_backward_weight(m.name, rows(), m.C, m.OC));
        matmul_backward_weight<S>(cublas, gradient(m.weight), gradient(m.bias), dout, m.OC, in,
                                  rows(), m.C, m.OC, scratch());
    }

    // branch(2l + 1) = attention of input(2l)
    void attention_sublayer_forward(int l) {
        const QkvPointers<const S> weights(parameters, padded_registry.layers[l]);
        S* computed = qkv(l) + int64_t(first) * padded_config.qkv_width();
        if (acts.unrounded_qkv.size) {
            float* unrounded = acts.unrounded_qkv;
            multiply_forward(unrounded, input(2 * l), qkv_matrix(l));
            mix_values(l, unrounded);
            const Timed timer = timed(costs().qkv_forward_unrounded());
            qkv_forward<S, float>(qkv(l), unrounded, qkv_raw(l), qkv_stats(l), weights,
                                  config.norm_eps, cos_sin(l), attention(l), stream);
        } else {
            multiply_forward(computed, input(2 * l), qkv_matrix(l));
            mix_values(l, computed);
            if (config.rotates(l) || config.qkv_norms()) {
                const Timed timer = timed(costs().qkv_forward());
                qkv_forward<S, S>(qkv(l), computed, qkv_raw(l), qkv_stats(l), weights,
                                  config.norm_eps, cos_sin(l), attention(l), stream);
            }
        }
        {
            const Timed timer = timed(costs().attention_forward());
            attention_forward<S>(attended(l), lse(l), qkv(l), attention(l), stream);
        }
        multiply_forward(branch(2 * l + 1), attended(l) + int64_t(first) * padded_config.q_width(),
                         attention_out_matrix(l));
    }

    // v of the qkv matmul's output.
    template <class X> void mix_values(int l, X* computed) {
        if (!config.scheme.value_residual) return;
        const Timed timer = timed(costs().mix_values("forward", sizeof(X)));
        cuda::mix_values<S>(computed, values(l), values(0),
                            weight(padded_registry.layers[l].value_mix), attention(l), stream);
    }

    // From dbranch to dinput.
    void attention_sublayer_backward(int l) {
        const LayerParams& p = padded_registry.layers[l];
        S *dattended = acts.dnarrow, *dqkv = acts.dwide;
        recompute_input(2 * l);
        multiply_backward(dattended, acts.dbranch, attended(l), attention_out_matrix(l));
        {
            const Timed timer = timed(costs().attention_backward());
            attention_backward<S>(dqkv, dattended, attended(l), qkv(l), lse(l), cos_sin(l),
                                  acts.delta, attention(l), stream);
        }
        if (config.qkv_norms()) {
            const Timed timer = timed(costs().qkv_norm_backward());
            qkv_norm_backward<S, G>(dqkv, qkv_raw(l), qkv_stats(l), {+parameters, p},
                                    {+gradients, p}, scratch(), attention(l), stream);
        }
        if (config.scheme.value_residual) {
            const Timed timer = timed(costs().mix_values("backward", sizeof(S)));
            mix_values_backward<S, G>(dqkv, acts.dvalues, values(l), values(0), weight(p.value_mix),
                                      gradient(p.value_mix), acts.scratch.template as<double>(),
                                      attention(l), stream);
        }
        multiply_backward(acts.dinput, dqkv, input(2 * l), qkv_matrix(l));
    }

    // branch(2l + 2) = MLP of input(2l + 1)
    void mlp_sublayer_forward(int l) {
        // GELU is part of the product before it, unless it is recomputed: then its input is
        // `hidden`, already rounded, and both passes must see the same values.
        if (config.activation == Activation::gelu && options.recompute != Recompute::activations) {
            const Matrix m = mlp_in_matrix(l);
            const Timed timer = timed(costs().matmul_gelu("forward", m.name));
            matmul_gelu_forward<S>(cublas, activated(l), hidden(l), input(2 * l + 1),
                                   weight(m.weight), weight(m.bias), rows(), m.C, m.OC);
        } else {
            multiply_forward(hidden(l), input(2 * l + 1), mlp_in_matrix(l));
            activate(l, "forward");
        }
        multiply_forward(branch(2 * l + 2), activated(l), mlp_out_matrix(l));
    }
    void activate(int l, const char* group) {
        const int H = padded_config.mlp_width;
        const Timed timer = timed(costs().activation_forward(group));
        activation_forward<S>(config.activation, activated(l), hidden(l), rows(), H, stream);
    }

    // From dbranch to dinput.
    void mlp_sublayer_backward(int l) {
        const Matrix out = mlp_out_matrix(l);
        S *dactivated = acts.dnarrow, *dhidden = acts.dwide;
        if (options.recompute == Recompute::activations) activate(l, "recompute");
        multiply_backward_weight(acts.dbranch, activated(l), out);
        if (config.activation == Activation::gelu) {
            const Timed timer = timed(costs().matmul_gelu("input gradient", out.name));
            matmul_gelu_backward_input<S>(cublas, dhidden, acts.dbranch, hidden(l),
                                          weight(out.weight), rows(), out.C, out.OC);
        } else {
            multiply_backward_input(dactivated, acts.dbranch, out);
            const Timed timer = timed(costs().activation_backward());
            activation_backward<S>(config.activation, dhidden, dactivated, hidden(l), rows(), out.C,
                                   stream);
        }
        recompute_input(2 * l + 1);
        multiply_backward(acts.dinput, dhidden, input(2 * l + 1), mlp_in_matrix(l));
    }

    // The parts of layer l that were not kept, from its input.
    void recompute_layer(int l) {
        recompute_input(2 * l);
        attention_sublayer_forward(l);
        join_forward(2 * l + 1);
        mlp_sublayer_forward(l);
    }
    // u of junction k, from r and its statistics, if it was not kept.
    void recompute_input(int k) {
        if (acts.input.slot[k] < 0 || acts.input.keeps(k)) return;
        const Timed timer = timed(costs().input_recompute());
        cuda::recompute_input(junction_arguments(k), stream);
    }

    // Logits of n rows from `row` on. X is S, or float where they must not be rounded.
    template <class X> X* head_logits(int64_t row, int64_t n) {
        const int V = padded_config.vocab_size, C = padded_config.width;
        X* logits = acts.logits.template as<X>();
        const Timed timer = timed(costs().matmul_forward("head", n, C, V, sizeof(X)));
        matmul_forward<S, X>(cublas, logits, V, input(2 * config.layers) + row * C,
                             weight(padded_registry.head), nullptr, n, C, V);
        return logits;
    }
    // Their losses; with `gradients` the logits' gradients replace them.
    template <class X> void head_forward(bool gradients, int64_t row, int64_t n) {
        X* logits = head_logits<X>(row, n);
        const Timed timer = timed(costs().loss(n, gradients, sizeof(X)));
        cross_entropy<X>(acts.losses + row, logits, gradients, targets() + row, loss_scale(), n,
                         config.vocab_size, padded_config.vocab_size, stream);
    }

    // The head and its loss, some rows at a time, so that logits (rows, V) never exist. Forward and
    // backward, to the gradient of the final norm's output in dinput.
    void head_forward_backward() {
        const int V = padded_config.vocab_size, C = padded_config.width;
        const S* dlogits = acts.logits.template as<S>();
        for (int64_t row = 0; row < rows(); row += acts.head_rows) {
            const int64_t n = std::min(acts.head_rows, rows() - row);
            head_forward<S>(true, row, n);
            {
                const Timed timer = timed(costs().matmul_backward_input("head", n, C, V));
                matmul_backward_input<S>(cublas, acts.dinput + row * C, dlogits, V,
                                         weight(padded_registry.head), n, C, V);
            }
            if (!gradients.size) continue;
            const Timed timer = timed(costs().matmul_backward_weight("head", n, C, V));
            matmul_backward_weight<S, G>(cublas, gradient(padded_registry.head), nullptr, dlogits,
                                         V, input(2 * config.layers) + row * C, n, C, V, scratch());
        }
    }

    // Of the final norm's output, without gradients. Waits.
    double head_loss() {
        CUDA(cudaMemsetAsync(sums, 0, sizeof(double), stream));
        for (int64_t row = 0; row < rows(); row += acts.logit_rows)
            head_forward<float>(false, row, std::min(acts.logit_rows, rows() - row));
        add_losses(sums, acts.losses, rows(), stream);
        return fetch_sum(0);
    }

    double loss(const int* inputs, const int* targets, int b, int t) override {
        begin_pass(inputs, targets, b, t, 0);
        kv_cache_valid = false;
        forward();
        return head_loss();
    }

    void score(const int* inputs, int b, int t, const Branches& branched,
               const std::vector<ScoredToken>& scored, double* out) override {
        begin_pass(inputs, nullptr, b, t, 0, branched);
        kv_cache_valid = false;
        forward();
        score_rows(scored, out);
    }
    // The head on the rows that are scored, a part at a time. Waits.
    void score_rows(const std::vector<ScoredToken>& scored, double* out) {
        const int V = padded_config.vocab_size, C = padded_config.width;
        check_scored(scored, rows());
        const size_t part = size_t(acts.logit_rows);
        if (scored_input.size == 0)
            scored_input = Array<S>(acts.logit_rows * C),
            scored_rows = Array<int>(2 * acts.logit_rows);
        std::vector<int> at(2 * part); // rows, then tokens
        float* logits = acts.logits.template as<float>();
        for (size_t done = 0; done < scored.size(); done += part) {
            const size_t n = std::min(part, scored.size() - done);
            for (size_t i = 0; i < n; i++)
                at[i] = int(scored[done + i].row), at[part + i] = scored[done + i].token;
            CUDA(cudaMemcpyAsync(scored_rows, at.data(), at.size() * sizeof(int),
                                 cudaMemcpyHostToDevice, stream));
            gather_rows<S>(scored_input, input(2 * config.layers), scored_rows, int64_t(n), C,
                           stream);
            matmul_forward<S, float>(cublas, logits, V, scored_input, weight(padded_registry.head),
                                     nullptr, int64_t(n), C, V);
            cross_entropy<float>(acts.losses, logits, false, scored_rows + part, loss_scale(),
                                 int64_t(n), config.vocab_size, V, stream);
            const std::vector<float> losses = fetch(acts.losses + 0, int64_t(n));
            for (size_t i = 0; i < n; i++) out[done + i] = -double(losses[i]);
        }
    }

    double loss_and_gradients(const int* inputs, const int* targets, int b, int t,
                              double loss_scale) override {
        check_gradients();
        begin_pass(inputs, targets, b, t, loss_scale);
        CUDA(cudaMemsetAsync(sums, 0, sizeof(double), stream));
        micro_step();
        return fetch_sum(0);
    }

    // Forward and backward of the micro-batch in `batch`; adds to the gradients and to the loss.
    void micro_step() {
        kv_cache_valid = false;
        first = 0, branches = {};
        auto compute = [&] {
            forward();
            head_forward_backward();
            backward();
            add_losses(sums, acts.losses, rows(), stream);
        };
        auto known = std::find_if(graphs.begin(), graphs.end(),
                                  [&](const Graph& g) { return g.B == B && g.T == T; });
        // A graph would have to be captured again for each draw of LISA's layers, and while
        // branches fade in.
        const bool changes =
            !of_gradients.layer_steps.empty() || faded_in(config.scheme, config.layers) < 1;
        if (profile || changes || known == graphs.end()) {
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

    void begin_step(const StepInput& step) override {
        check_gradients();
        reserve_batches(std::max(2, step.micro_batches));
        const int64_t n = int64_t(step.B) * step.T, ints = BatchLayout{n}.ints();
        // 1. Copy the tokens of all micro-batches, on a stream of their own.
        for (int m = 0; m < step.micro_batches; m++) {
            check_tokens(step.inputs + m * n, step.B, step.T, acts.rows);
            check_targets(step.targets + m * n, n);
            int* ahead = host_batches + m * ints;
            fill_batch(ahead, {n}, step.inputs + m * n, step.targets + m * n,
                       float(step.loss_scale), config.vocab_size, counts);
            CUDA(cudaMemcpyAsync(batches + m * ints, ahead, size_t(ints) * sizeof(int),
                                 cudaMemcpyHostToDevice, copies));
            CUDA(cudaEventRecord(arrived[m], copies));
        }
        // 2. The gradient of the mean loss.
        B = step.B, T = step.T;
        zero_gradients(step.hyperparameters);
        CUDA(cudaMemsetAsync(sums, 0, 2 * sizeof(double), stream));
        stopped = false;
        for (int m = 0; m < step.micro_batches; m++) {
            if (m > 0 && step.stop) {
                // The host is only one micro-batch ahead, so that a stop takes effect soon.
                if (m > 1) CUDA(cudaEventSynchronize(arrived[m - 2]));
                stopped = step.stop();
                if (stopped) return;
            }
            CUDA(cudaStreamWaitEvent(stream, arrived[m], 0));
            CUDA(cudaMemcpyAsync(batch, batches + m * ints, size_t(ints) * sizeof(int),
                                 cudaMemcpyDeviceToDevice, stream));
            micro_step();
            // The tokens have been consumed: reuse the event for the end of the micro-step.
            if (step.stop) CUDA(cudaEventRecord(arrived[m], stream));
        }
        if (ranks->size > 1) {
            const Timed timer = timed(costs().gradient_sum(padded_registry.size));
            communicator.sum<G>(gradients, padded_registry.size, stream);
            communicator.sum<double>(sums, 1, stream);
        }
        // 3. Its norm, and the update.
        step_scale = step.loss_scale;
        enqueue_gradient_norm();
        if (step.gate_clip > 0 && gates.size)
            launch(clip_gates_kernel<G>, 1, 1, 0, stream, gradients + 0, gates + 0, int(gates.size),
                   sums + 1, step.grad_clip, step.gate_clip);
        enqueue_update(step.hyperparameters, step.grad_clip, sums + 1, sums);
        CUDA(cudaMemcpyAsync(host_sums, sums, 2 * sizeof(double), cudaMemcpyDeviceToHost, stream));
    }

    StepResult end_step() override {
        wait();
        return {host_sums[0] * step_scale, host_sums[1], stopped};
    }

    // If the tokens continue those of the last call, as in generating text, only the new positions
    // are computed: the KV cache has the others.
    void logits(const int* inputs, int b, int t, bool last_only, float* out) override {
        int from = 0;
        if (kv_cache_valid && last_only && b == 1)
            while (from < std::min(t - 1, T) && inputs[from] == tokens[from]) from++;
        begin_pass(inputs, nullptr, b, t, 0);
        tokens.assign(inputs, inputs + int64_t(B) * T);
        forward(from);
        const int64_t step = last_only ? 1 : acts.logit_rows;
        for (int64_t row = last_only ? T - 1 - first : 0; row < rows();
             row += last_only ? T : step) {
            const int64_t n = std::min(step, rows() - row);
            const float* logits = head_logits<float>(row, n);
            const size_t row_bytes = size_t(config.vocab_size) * sizeof(float);
            CUDA(cudaMemcpy2DAsync(out, row_bytes, logits,
                                   size_t(padded_config.vocab_size) * sizeof(float), row_bytes,
                                   size_t(n), cudaMemcpyDeviceToHost, stream));
            stream.wait();
            out += n * config.vocab_size;
        }
        kv_cache_valid = b == 1 && acts.qkv.keeps(0);
    }

    void zero_gradients(const Hyperparameters& hyperparameters = {}) override {
        if (!gradients.size) return;
        of_gradients = hyperparameters;
        const Timed timer = timed(costs().zero_gradients(padded_registry.size));
        CUDA(cudaMemsetAsync(gradients, 0, size_t(padded_registry.size) * sizeof(G), stream));
    }

    double gradient_norm() override {
        enqueue_gradient_norm();
        return fetch_sum(1);
    }
    void enqueue_gradient_norm() {
        const Timed timer = timed(costs().gradient_norm(padded_registry.size));
        // Norms and biases of layers that rest have gradients so far.
        for (const UpdateRange& range : optimizer_layout.ranges_of(of_gradients))
            if (of_gradients.rests(range.layer))
                CUDA(cudaMemsetAsync(gradients + range.begin, 0, size_t(range.size()) * sizeof(G),
                                     stream));
        cuda::gradient_norm<G>(sums + 1, gradients, padded_registry.size, sums + 2, stream);
    }

    void update(const Hyperparameters& o) override {
        if (options.purpose != Purpose::training) fail("this model was made without an optimizer");
        enqueue_update(o, 0, nullptr, nullptr);
        wait();
    }
    // norm, loss: on the GPU, or null.
    void enqueue_update(const Hyperparameters& o, double grad_clip, const double* norm,
                        const double* loss) {
        kv_cache_valid = false;
        for (int layer = -1; layer < config.layers; layer++)
            host_update_steps[1 + layer] = make_update_step(o, grad_clip, layer);
        CUDA(cudaMemcpyAsync(update_steps, host_update_steps,
                             size_t(update_steps.size) * sizeof(UpdateStep), cudaMemcpyHostToDevice,
                             stream));
        for (const UpdateRange& range : optimizer_layout.ranges_of(o))
            if (!o.rests(range.layer))
                options.moments == DType::bf16 ? update_range<bf16>(o, range, norm, loss)
                                               : update_range<float>(o, range, norm, loss);
    }
    template <class M>
    void update_range(const Hyperparameters& o, const UpdateRange& range, const double* norm,
                      const double* loss) {
        auto state = [&](const char* name) {
            const size_t s = size_t(optimizer->index(name));
            return state_array<M>(states[s]) + range.states[s];
        };
        switch (range.rule) {
        case UpdateRule::adamw: {
            const Timed timer = timed(costs().adamw(range.size(), sizeof(M), master.size > 0));
            const Param& p = padded_registry.params[range.first]; // the factors of all
            adamw_update(AdamWBuffers<S, M, G>{parameters, master, gradients, state("m"),
                                               state("v"), decays, update_steps + 1 + range.layer,
                                               norm, loss, range.size(), range.begin,
                                               float(p.lr_scale), float(p.decay_scale),
                                               float(p.eps_scale)},
                         options.stochastic_rounding, stream);
            break;
        }
        case UpdateRule::muon:
        case UpdateRule::normuon:
            for (size_t i = range.first; i < range.last; i++) {
                M* momentum = state("m") + padded_registry.params[i].offset - range.begin;
                options.stochastic_rounding
                    ? update_matrix<true>(o, range, i, momentum, norm, loss)
                    : update_matrix<false>(o, range, i, momentum, norm, loss);
            }
            break;
        }
    }
    // Muon, of the i-th parameter.
    template <bool stochastic, class M>
    void update_matrix(const Hyperparameters& o, const UpdateRange& range, size_t i, M* momentum,
                       const double* norm, const double* loss) {
        const Param &p = padded_registry.params[i], &real = registry.params[i];
        const Timed timer = timed(costs().muon(p.shape[0], p.shape[1], sizeof(M), master.size > 0));
        M* row_moments = nullptr;
        if (range.rule == UpdateRule::normuon) {
            const int s = optimizer->index("v_rows");
            row_moments = state_array<M>(states[size_t(s)]) + optimizer_layout.offset(s, p);
        }
        const MuonBuffers<S, M, G> buffers = {parameters + p.offset,
                                              master.size ? master + p.offset : nullptr,
                                              gradients + p.offset,
                                              momentum,
                                              row_moments,
                                              update_steps + 1 + range.layer,
                                              norm,
                                              loss,
                                              p.offset,
                                              p.shape[0],
                                              p.shape[1],
                                              float(p.lr_scale),
                                              p.decay ? float(p.decay_scale) : 0};
        muon_update<stochastic>(cublas, buffers,
                                MuonScratch<S>(optimizer_layout, muon_values, muon_sums), o,
                                real.shape[0], real.shape[1]);
    }
    template <class M> static M* state_array(const State& state) {
        if constexpr (std::is_same_v<M, float>)
            return state.full;
        else
            return state.rounded;
    }

    // Checks a micro-batch and copies it to `batch`; targets may be null.
    void begin_pass(const int* inputs, const int* targets, int b, int t, double loss_scale,
                    const Branches& branched = {}) {
        check_tokens(inputs, b, t, acts.rows, branched);
        if (targets) check_targets(targets, int64_t(b) * t);
        B = b, T = t, first = 0;
        reserve_batches(1);
        fill_batch(host_batches, layout(), inputs, targets, float(loss_scale), config.vocab_size,
                   counts);
        CUDA(cudaMemcpyAsync(batch, host_batches, size_t(layout().ints()) * sizeof(int),
                             cudaMemcpyHostToDevice, stream));
        branches = {};
        if (!branched.position) return;
        if (branch_rows.size == 0) branch_rows = Array<int>(2 * acts.rows);
        branches = {branch_rows, branch_rows + acts.rows};
        for (auto [to, from] : {std::pair{branches.position, branched.position},
                                std::pair{branches.branch, branched.branch}})
            CUDA(cudaMemcpyAsync(const_cast<int*>(to), from, size_t(b) * size_t(t) * sizeof(int),
                                 cudaMemcpyHostToDevice, stream));
        stream.wait();
    }
    void reserve_batches(int n) {
        const int64_t ints = BatchLayout{acts.rows}.ints();
        if (host_batches.size >= n * ints) return;
        stream.wait();
        host_batches = Pinned<int>(n * ints);
        if (n == 1) return;
        batches = Array<int>(n * ints);
        while (int(arrived.size()) < n) {
            arrived.emplace_back();
            CUDA(cudaEventCreateWithFlags(&arrived.back(), cudaEventDisableTiming));
        }
    }

    void check_gradients() const {
        if (!gradients.size) fail("this model was made without gradients");
    }

    void wait() {
        stream.wait();
        times.add_to(profile);
    }
    double fetch_sum(int i) {
        CUDA(cudaMemcpyAsync(host_sums + i, sums + i, sizeof(double), cudaMemcpyDeviceToHost,
                             stream));
        wait();
        return host_sums[i];
    }

    // gpt/cuda/inspect.cuh
    std::string device() const override { return "cuda"; }
    std::string dtype() const override { return exact ? "float32" : "bf16"; }
    int64_t bytes() const override { return bytes_held; }
    template <class X> std::vector<std::remove_const_t<X>> fetch(X* from, int64_t n);
    const Param& padded_param(const Param& p) const;
    void read(Buffer buffer, const Param& p, float* out) override;
    void write(Buffer buffer, const Param& p, const float* values) override;
    std::string first_nonfinite() override;
    void enter(int k);
    void enter_backward(int k, bool last);
    void leave(int k, const float* r_prev);
    void leave_backward(int k, const float* r_prev);
    void embed(const int* inputs, int b, int t, const Branches& branched = {}) override;
    void run_layer(int l) override;
    void set_targets(const int* targets, double loss_scale);
    double finish(const int* targets) override;
    void finish(const std::vector<ScoredToken>& scored, double* out) override;
    void finish_backward(const int* targets, double loss_scale) override;
    void run_layer_backward(int l) override;
    size_t stream_bytes() const { return size_t(rows()) * padded_config.width * sizeof(float); }
    template <class F> void with_stream(Stream which, const F& f);
    float* writable(Stream which);
    void read(Stream which, float* out) override;
    void write(Stream which, const float* values) override;
    void read_rows(Stream which, const std::vector<int64_t>& from, float* out) override;
    void write_rows(Stream which, const std::vector<int64_t>& to, const float* values) override;
    void rewind(int l) override { between = 2 * l; }
    std::vector<Moments> row_moments(Stream which) override;
    std::vector<double> row_chords(int l, int m) override;
    std::vector<double> gradient_squares() override;
};

} // namespace lns::cuda

// defines: other members of CudaModel, plan_memory
#include "gpt/cuda/inspect.cuh"

namespace lns::cuda {

// Calls f with the scalars S and G of these options.
template <class F> auto with_scalars(const ModelOptions& o, const F& f) {
    if (o.dtype == DType::float32) return f(0.0f, 0.0f);
    return o.gradients == DType::float32 ? f(bf16(), 0.0f) : f(bf16(), bf16());
}

} // namespace lns::cuda

namespace lns {

std::unique_ptr<Model> make_cuda_model(const Config& config, int B, int T,
                                       const ModelOptions& options, const Ranks& ranks) {
    return cuda::with_scalars(options, [&](auto s, auto g) -> std::unique_ptr<Model> {
        return std::make_unique<cuda::CudaModel<decltype(s), decltype(g)>>(config, B, T, options,
                                                                           ranks);
    });
}

MemoryPlan plan_cuda_memory(const Config& config, int B, int T, const ModelOptions& options) {
    return cuda::with_scalars(options, [&](auto s, auto g) {
        return cuda::plan_memory<decltype(s), decltype(g)>(config, B, T, options);
    });
}

} // namespace lns
