// lns.cpp: trains GPT and LLaMA language models under every norm scheme of "The Curse of Depth in
// Large Language Models" (arXiv 2502.05795). This file is the whole model on the CPU, forward and
// backward, in the order in which data flows: each backward stands directly below its forward.
// The program around it (flags, data, training loop, checkpoints) is in gpt/ and knows only the
// interface gpt/model.h.
//
// Sizes: B sequences of T tokens; V vocabulary; C width; L layers; NH heads of q and KVH of k and
// v, of HS channels each; H width of the MLP. Arrays are row-major, a row is a token.
// S is the scalar in which tensors are stored, Acc<S> the one in which sums are taken; gradients of
// parameters are sums and stored as Acc<S>.
// Gradients: a backward function writes the gradients of activations and adds those of parameters.
// Sums run in an order that does not depend on the number of threads (oneDNN's own aside).

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gpt/error.h"
#include "gpt/gemm.h"
#include "gpt/model.h"

namespace lns {

// ---------------------------------------------------------------------------------------------
// Scalars and arrays

template <class S> using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// eˣ to 2 units in the last place, without calls or branches, so that loops over it vectorize:
// x = n ln 2 + f with |f| ≤ ln 2 / 2, and a polynomial for eᶠ (Cephes' coefficients). Beyond
// ±87.3 it is constant; NaN stays NaN.
inline float exp_(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifter = 12582912.0f; // 1.5 · 2²³: adding it rounds to an integer
    float shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    // n sits in shifted's low bits; as an exponent it multiplies by 2ⁿ.
    return p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
}
inline double exp_(double x) { return std::exp(x); }

template <class A> inline A sigmoid(A x) { return A(1) / (A(1) + exp_(-x)); }
template <class A> inline A silu(A x) { return x * sigmoid(x); }
template <class A> inline A dsilu(A x) {
    A s = sigmoid(x);
    return s * (A(1) + x * (A(1) - s));
}

// Zeroed memory, aligned to a cache line.
template <class S> struct Array {
    Array() = default;
    explicit Array(int64_t n) : size(n) {
        if (n == 0) return;
        size_t bytes = (size_t(n) * sizeof(S) + 63) / 64 * 64;
        data.reset(static_cast<S*>(std::aligned_alloc(64, bytes)));
        if (!data) throw std::bad_alloc();
        std::memset(static_cast<void*>(data.get()), 0, bytes);
    }
    operator S*() const { return data.get(); }

    struct Free {
        void operator()(S* p) const { std::free(p); }
    };
    std::unique_ptr<S, Free> data;
    int64_t size = 0;
};

// A buffer that grows and is a thread's own.
template <class S> S* thread_scratch(int64_t n) {
    static thread_local std::vector<S> buffer;
    if (int64_t(buffer.size()) < n) buffer.resize(n);
    return buffer.data();
}

// Sums over rows are taken in at most this many chunks, whose partial sums are added in order.
const int64_t max_chunks = 32;

// ---------------------------------------------------------------------------------------------
// Embedding: out[row] = wte[token] + wpe[t]. Gathering the gradient goes by channel, so that no two
// threads meet. The first row is at position `first`, which is 0 unless B is 1.

template <class S>
void embedding_forward(S* out, const int* tokens, const S* wte, const S* wpe, int first,
                       int64_t rows, int T, int C) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S* token = wte + int64_t(tokens[row]) * C;
        const S* position = wpe ? wpe + (first + row) % T * C : nullptr;
        for (int i = 0; i < C; i++)
            out[row * C + i] = position ? S(Acc<S>(token[i]) + Acc<S>(position[i])) : token[i];
    }
}

template <class S>
void embedding_backward(Acc<S>* dwte, Acc<S>* dwpe, const int* tokens, const S* dout, int B, int T,
                        int C) {
    const int slice = 16; // channels
#pragma omp parallel for
    for (int begin = 0; begin < C; begin += slice) {
        int end = std::min(C, begin + slice);
        for (int64_t row = 0; row < int64_t(B) * T; row++) {
            Acc<S>* dtoken = dwte + int64_t(tokens[row]) * C;
            for (int i = begin; i < end; i++) dtoken[i] += Acc<S>(dout[row * C + i]);
            if (!dwpe) continue;
            Acc<S>* dposition = dwpe + row % T * C;
            for (int i = begin; i < end; i++) dposition[i] += Acc<S>(dout[row * C + i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Norms of one row x of C numbers: y = x̂ ⊙ w + bias with x̂ = (x − mean) · rstd. LayerNorm has the
// mean and 1 / sqrt(variance + eps), RMSNorm (arXiv 1910.07467) 0 and 1 / sqrt(mean square + eps).
// A null weight is 1, a null bias 0.

template <class A> struct NormStats { A mean, rstd; };

template <class A, class X> NormStats<A> norm_stats(NormType type, A eps, const X* x, int C) {
    A mean = 0, square = 0;
    if (type == NormType::layer) {
#pragma omp simd reduction(+ : mean)
        for (int i = 0; i < C; i++) mean += A(x[i]);
        mean /= A(C);
    }
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < C; i++) square += (A(x[i]) - mean) * (A(x[i]) - mean);
    return {mean, A(1) / std::sqrt(square / A(C) + eps)};
}

// y = scale · (x̂ ⊙ w + bias); y may be x.
template <class S, class A, class X, class Y>
void norm_row_forward(const NormStats<A>& stats, const X* x, const S* w, const S* bias, A scale,
                      Y* y, int C) {
    for (int i = 0; i < C; i++) {
        A value = (A(x[i]) - stats.mean) * stats.rstd * (w ? A(w[i]) : A(1));
        y[i] = Y(scale * (value + (bias ? A(bias[i]) : A(0))));
    }
}

// dx from dy, the gradient of x̂ ⊙ w + bias; adds to dw and dbias. dx may be dy.
// With g = w ⊙ dy: dx = rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), without mean(g) for RMSNorm.
template <class S, class A, class X>
void norm_row_backward(NormType type, const NormStats<A>& stats, const X* x, const S* w,
                       const A* dy, A* dx, A* dw, A* dbias, int C) {
    A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int i = 0; i < C; i++) {
        A g = dy[i] * (w ? A(w[i]) : A(1));
        sum += g;
        dot += g * (A(x[i]) - stats.mean);
    }
    if (dw)
        for (int i = 0; i < C; i++) dw[i] += dy[i] * (A(x[i]) - stats.mean) * stats.rstd;
    if (dbias)
        for (int i = 0; i < C; i++) dbias[i] += dy[i];
    A mean = type == NormType::layer ? sum / A(C) : A(0);
    A slope = dot * stats.rstd * stats.rstd / A(C);
    for (int i = 0; i < C; i++) {
        A g = dy[i] * (w ? A(w[i]) : A(1));
        dx[i] = stats.rstd * (g - mean - (A(x[i]) - stats.mean) * slope);
    }
}

// ---------------------------------------------------------------------------------------------
// The junction, where a sublayer's output b meets the residual stream r: the one place in which the
// norm schemes differ (gpt/scheme.h has its equations).

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

template <class S> struct JunctionStats { NormStats<Acc<S>> branch, out, in; };

// r (rows, C) and, if the junction has an in-norm, u (rows, C) from r_prev and b (rows, C); keeps
// the norms' statistics (rows). r may be r_prev. `stopped` (rows, C) is what stop() returns, null
// for its argument: only a check of gradients by finite differences holds it fixed.
template <class S>
void junction_forward(const Junction& j, NormType type, double eps_, const S* r_prev, const S* b,
                      const JunctionPointers<const S>& p, S* r, S* u, JunctionStats<S>* stats,
                      const S* stopped, int64_t rows, int C) {
    using A = Acc<S>;
    const A eps = A(eps_), skip = A(j.skip), in_scale = A(j.in_scale);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * C;
        A* z = thread_scratch<A>(C);
        JunctionStats<S>& st = stats[row];
        if (!j.branch) {
            for (int i = 0; i < C; i++) z[i] = A(r_prev[at + i]);
        } else {
            if (j.branch_norm) {
                st.branch = norm_stats<A>(type, eps, b + at, C);
                norm_row_forward(st.branch, b + at, p.branch_weight, p.branch_bias, A(1), z, C);
            } else {
                for (int i = 0; i < C; i++) z[i] = A(b[at + i]);
            }
            if (j.gamma == Gamma::vector)
                for (int i = 0; i < C; i++) z[i] *= A(p.gamma[i]);
            if (j.gamma == Gamma::scalar)
                for (int i = 0; i < C; i++) z[i] *= A(*p.gamma);
            if (j.gate_on_skip) {
                const S* stop = stopped ? stopped : r_prev;
                for (int i = 0; i < C; i++)
                    z[i] += skip * (A(r_prev[at + i]) - gate * A(stop[at + i]));
            } else {
                for (int i = 0; i < C; i++) z[i] += skip * A(r_prev[at + i]);
            }
        }
        if (j.out_norm) {
            st.out = norm_stats<A>(type, eps, z, C);
            norm_row_forward(st.out, z, p.out_weight, p.out_bias, A(1), z, C);
        }
        if (j.gate && !j.gate_on_skip)
            for (int i = 0; i < C; i++) z[i] -= gate * (stopped ? A(stopped[at + i]) : z[i]);
        for (int i = 0; i < C; i++) r[at + i] = S(z[i]);
        if (j.in_norm) {
            st.in = norm_stats<A>(type, eps, r + at, C);
            norm_row_forward(st.in, r + at, p.in_weight, p.in_bias, in_scale, u + at, C);
        }
    }
}

// From du (gradient of u; of r if there is no in-norm) and dr (gradient of r from what comes
// later): db and, in place of dr, the gradient of r_prev. Adds the gradients of the parameters,
// through partial sums in scratch (max_chunks, 7·C + 1).
template <class S>
void junction_backward(const Junction& j, NormType type, const S* r_prev, const S* b, const S* r,
                       const JunctionPointers<const S>& p, const JunctionStats<S>* stats,
                       const S* du, S* dr, S* db, const JunctionPointers<Acc<S>>& grads,
                       Acc<S>* scratch, int64_t rows, int C) {
    using A = Acc<S>;
    const A skip = A(j.skip), in_scale = A(j.in_scale);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
    const A dgate = j.gate ? dsilu(A(*p.gate)) : A(0);
    const int64_t chunks = std::min(max_chunks, rows), width = 7 * int64_t(C) + 1;

#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A* sums = scratch + chunk * width;
        std::fill(sums, sums + width, A(0));
        auto part = [&](int n, A* wanted) { return wanted ? sums + n * C : nullptr; };
        A *in_weight = part(0, grads.in_weight), *in_bias = part(1, grads.in_bias),
          *out_weight = part(2, grads.out_weight), *out_bias = part(3, grads.out_bias),
          *branch_weight = part(4, grads.branch_weight), *branch_bias = part(5, grads.branch_bias);
        A* gamma_sum = sums + 6 * C;
        double gate_sum = 0, scalar_gamma_sum = 0; // over all channels: much cancels
        A* dz = thread_scratch<A>(3 * C); // gradient of r, then of what came before, step by step
        A *z = dz + C, *y = dz + 2 * C;   // r before the out-norm; b after the branch norm

        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const int64_t at = row * C;
            const JunctionStats<S>& st = stats[row];
            if (j.in_norm) {
                for (int i = 0; i < C; i++) dz[i] = in_scale * A(du[at + i]);
                norm_row_backward(type, st.in, r + at, p.in_weight, dz, dz, in_weight, in_bias, C);
                for (int i = 0; i < C; i++) dz[i] += A(dr[at + i]);
            } else {
                for (int i = 0; i < C; i++) dz[i] = A(du[at + i]) + A(dr[at + i]);
            }

            // What the forward pass had before the out-norm and the gate.
            if (j.keeps_branch()) {
                if (!j.branch) {
                    for (int i = 0; i < C; i++) z[i] = A(r_prev[at + i]);
                } else {
                    if (j.branch_norm)
                        norm_row_forward(st.branch, b + at, p.branch_weight, p.branch_bias, A(1), y,
                                         C);
                    else
                        for (int i = 0; i < C; i++) y[i] = A(b[at + i]);
                    const A kept = skip * (j.gate_on_skip ? A(1) - gate : A(1));
                    for (int i = 0; i < C; i++) {
                        A factor = j.gamma == Gamma::vector   ? A(p.gamma[i])
                                   : j.gamma == Gamma::scalar ? A(*p.gamma)
                                                              : A(1);
                        z[i] = kept * A(r_prev[at + i]) + factor * y[i];
                    }
                }
            }
            if (j.gate && !j.gate_on_skip) { // no out-norm; stop() passes no gradient: dz stays
                double dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int i = 0; i < C; i++) dot += double(dz[i]) * double(z[i]);
                gate_sum -= dgate * dot;
            }
            if (j.out_norm)
                norm_row_backward(type, st.out, z, p.out_weight, dz, dz, out_weight, out_bias, C);

            double dot = 0;
            for (int i = 0; i < C; i++) {
                A d = skip * dz[i];
                if (j.gate_on_skip) dot += double(d) * double(r_prev[at + i]);
                dr[at + i] = S(d);
            }
            gate_sum -= dgate * dot;
            if (!j.branch) continue;

            if (j.gamma == Gamma::vector)
                for (int i = 0; i < C; i++) {
                    gamma_sum[i] += dz[i] * y[i];
                    dz[i] *= A(p.gamma[i]);
                }
            if (j.gamma == Gamma::scalar)
                for (int i = 0; i < C; i++) {
                    scalar_gamma_sum += double(dz[i]) * double(y[i]);
                    dz[i] *= A(*p.gamma);
                }
            if (j.branch_norm)
                norm_row_backward(type, st.branch, b + at, p.branch_weight, dz, dz, branch_weight,
                                  branch_bias, C);
            for (int i = 0; i < C; i++) db[at + i] = S(dz[i]);
        }
        if (j.gamma == Gamma::scalar) gamma_sum[0] = A(scalar_gamma_sum);
        sums[7 * C] = A(gate_sum);
    }
    auto gather = [&](A* grad, int64_t from, int64_t n) {
        for (int64_t chunk = 0; grad && chunk < chunks; chunk++)
            for (int64_t i = 0; i < n; i++) grad[i] += scratch[chunk * width + from + i];
    };
    gather(grads.in_weight, 0, C), gather(grads.in_bias, C, C);
    gather(grads.out_weight, 2 * C, C), gather(grads.out_bias, 3 * C, C);
    gather(grads.branch_weight, 4 * C, C), gather(grads.branch_bias, 5 * C, C);
    gather(grads.gamma, 6 * C, j.gamma == Gamma::vector ? C : 1);
    gather(grads.gate, 7 * C, 1);
}

// ---------------------------------------------------------------------------------------------
// Matrices: out (rows, OC) = in (rows, C) · wᵀ + bias, w (OC, C), bias (OC) or null.

template <class S>
void linear_forward(S* out, const S* in, const S* w, const S* bias, int64_t rows, int C, int OC) {
    gemm(false, true, rows, OC, C, in, w, out, false, bias);
}

// Writes din if it is wanted; adds to dw and, if there is one, dbias.
template <class S>
void linear_backward(S* din, Acc<S>* dw, Acc<S>* dbias, const S* dout, const S* in, const S* w,
                     int64_t rows, int C, int OC) {
    if (din) gemm(false, false, rows, C, OC, dout, w, din, false);
    gemm(true, false, OC, C, rows, dout, in, dw, true);
    if (!dbias) return;
    const int slice = 64;
#pragma omp parallel for
    for (int begin = 0; begin < OC; begin += slice) {
        Acc<S> sum[slice] = {};
        int n = std::min(slice, OC - begin);
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < n; i++) sum[i] += Acc<S>(dout[row * OC + begin + i]);
        for (int i = 0; i < n; i++) dbias[begin + i] += sum[i];
    }
}

// ---------------------------------------------------------------------------------------------
// Attention. A row of qkv is NH heads of q, KVH of k, KVH of v; NH / KVH heads of q share one of k
// and v (GQA, arXiv 2305.13245).

struct AttentionShape {
    int B, T, NH, KVH, HS;
    int first = 0; // what comes before this position is there already; 0 unless B is 1
    int64_t rows() const { return int64_t(B) * T; }
    int q_width() const { return NH * HS; }
    int kv_width() const { return KVH * HS; }
    int row() const { return (NH + 2 * KVH) * HS; }
};

// OLMo 2's RMSNorm over the whole of q and of k: qkv's q and k from raw's.
template <class S>
void qk_norm_forward(S* qkv, S* raw, NormStats<Acc<S>>* stats, const S* q_weight, const S* k_weight,
                     double eps, const AttentionShape& a) {
    const int Q = a.q_width(), K = a.kv_width();
    const S* none = nullptr;
#pragma omp parallel for
    for (int64_t row = a.first; row < a.rows(); row++) {
        S *x = raw + row * (Q + K), *y = qkv + row * a.row();
        std::copy(y, y + Q + K, x);
        stats[2 * row] = norm_stats<Acc<S>>(NormType::rms, Acc<S>(eps), x, Q);
        stats[2 * row + 1] = norm_stats<Acc<S>>(NormType::rms, Acc<S>(eps), x + Q, K);
        norm_row_forward(stats[2 * row], x, q_weight, none, Acc<S>(1), y, Q);
        norm_row_forward(stats[2 * row + 1], x + Q, k_weight, none, Acc<S>(1), y + Q, K);
    }
}

// In place on dqkv's q and k. scratch: (max_chunks, Q + K).
template <class S>
void qk_norm_backward(S* dqkv, const S* raw, const NormStats<Acc<S>>* stats, const S* q_weight,
                      const S* k_weight, Acc<S>* dq_weight, Acc<S>* dk_weight, Acc<S>* scratch,
                      const AttentionShape& a) {
    using A = Acc<S>;
    const int Q = a.q_width(), K = a.kv_width();
    const int64_t rows = a.rows(), chunks = std::min(max_chunks, rows);
    A* none = nullptr;
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A *sums = scratch + chunk * (Q + K), *d = thread_scratch<A>(Q + K);
        std::fill(sums, sums + Q + K, A(0));
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const S* x = raw + row * (Q + K);
            S* dy = dqkv + row * a.row();
            for (int i = 0; i < Q + K; i++) d[i] = A(dy[i]);
            norm_row_backward(NormType::rms, stats[2 * row], x, q_weight, d, d, sums, none, Q);
            norm_row_backward(NormType::rms, stats[2 * row + 1], x + Q, k_weight, d + Q, d + Q,
                              sums + Q, none, K);
            for (int i = 0; i < Q + K; i++) dy[i] = S(d[i]);
        }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const A* sums = scratch + chunk * (Q + K);
        for (int i = 0; i < Q; i++) dq_weight[i] += sums[i];
        for (int i = 0; i < K; i++) dk_weight[i] += sums[Q + i];
    }
}

// Rotary positions (arXiv 2104.09864), in place on q and k, with Hugging Face's pairing: channel i
// turns with channel i + HS/2 by the angle t · θ^(−2i/HS). table: (T, HS/2) of (cos, sin).
// direction −1 turns back, which is the gradient.
template <class A> struct CosSin { A cos, sin; };

template <class S>
void rope(S* qkv, const CosSin<Acc<S>>* table, int direction, const AttentionShape& a) {
    const int half = a.HS / 2;
#pragma omp parallel for
    for (int64_t row = a.first; row < a.rows(); row++) {
        const CosSin<Acc<S>>* turn = table + row % a.T * half;
        for (int head = 0; head < a.NH + a.KVH; head++) {
            S* x = qkv + row * a.row() + head * a.HS;
            for (int i = 0; i < half; i++) {
                Acc<S> c = turn[i].cos, s = Acc<S>(direction) * turn[i].sin;
                Acc<S> x0 = Acc<S>(x[i]), x1 = Acc<S>(x[i + half]);
                x[i] = S(x0 * c - x1 * s);
                x[i + half] = S(x1 * c + x0 * s);
            }
        }
    }
}

// Rows of queries that attend at once: their scores, (tile, T), are all of T × T that ever exists.
const int attention_tile = 32;

// (n, HS) rows at a stride, times scale, into a dense matrix, (HS, n) if transposed.
template <class S, class A>
void pack(A* out, const S* in, int64_t stride, int n, int HS, A scale, bool transposed) {
    for (int t = 0; t < n; t++)
        for (int i = 0; i < HS; i++)
            out[transposed ? int64_t(i) * n + t : int64_t(t) * HS + i] =
                scale * A(in[t * stride + i]);
}

// out (B, T, NH·HS) = softmax(q kᵀ / sqrt(HS)) v, causal: position t sees 0 … t.
// Keeps lse (B, NH, T), the logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, Acc<S>* lse, const S* qkv, const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            A* kt = thread_scratch<A>(int64_t(2 * T + 2 * R) * HS + int64_t(R) * T); // (HS, T)
            A *v = kt + int64_t(T) * HS, *q = v + int64_t(T) * HS, *o = q + R * HS, *p = o + R * HS;
            pack(kt, rows + (a.NH + kv) * HS, a.row(), T, HS, A(1), true);
            pack(v, rows + (a.NH + a.KVH + kv) * HS, a.row(), T, HS, A(1), false);
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t0 = a.first; t0 < T; t0 += R) {
                    const int n = std::min(R, T - t0), seen = t0 + n;
                    pack(q, rows + int64_t(t0) * a.row() + h * HS, a.row(), n, HS, scale, false);
                    small_gemm(n, seen, HS, q, HS, 1, kt, T, p, T, false);
                    for (int i = 0; i < n; i++) {
                        A* score = p + int64_t(i) * T;
                        const int visible = t0 + i + 1;
                        A largest = score[0], sum = 0;
#pragma omp simd reduction(max : largest)
                        for (int t = 1; t < visible; t++)
                            largest = score[t] > largest ? score[t] : largest;
#pragma omp simd reduction(+ : sum)
                        for (int t = 0; t < visible; t++) {
                            score[t] = exp_(score[t] - largest);
                            sum += score[t];
                        }
                        std::fill(score + visible, score + seen, A(0));
                        const A inverse = A(1) / sum;
                        for (int t = 0; t < visible; t++) score[t] *= inverse;
                        lse[(int64_t(b) * a.NH + h) * T + t0 + i] = largest + std::log(sum);
                    }
                    small_gemm(n, HS, seen, p, T, 1, v, HS, o, HS, false);
                    for (int i = 0; i < n; i++) {
                        S* row = out + (int64_t(b) * T + t0 + i) * a.q_width() + h * HS;
                        for (int d = 0; d < HS; d++) row[d] = S(o[i * HS + d]);
                    }
                }
        }
}

// dqkv (B, T, row) from dout (B, T, NH·HS). With P the softmax and O the output, of a query:
// dP = dO Vᵀ; dS = P ⊙ (dP − dO · O); dQ = dS K / sqrt(HS); dK = dSᵀ Q / sqrt(HS); dV = Pᵀ dO.
template <class S>
void attention_backward(S* dqkv, const S* dout, const S* qkv, const S* out, const Acc<S>* lse,
                        const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            S* drows = dqkv + int64_t(b) * T * a.row();
            const int64_t matrix = int64_t(T) * HS, tile = int64_t(R) * HS;
            A* kt = thread_scratch<A>(5 * matrix + 3 * tile + int64_t(2 * R) * T); // (HS, T)
            A *vt = kt + matrix, *k = vt + matrix, *dk = k + matrix, *dv = dk + matrix;
            A *q = dv + matrix, *dq = q + tile, *dO = dq + tile, *p = dO + tile;
            A* dp = p + int64_t(R) * T;
            pack(kt, rows + (a.NH + kv) * HS, a.row(), T, HS, A(1), true);
            pack(k, rows + (a.NH + kv) * HS, a.row(), T, HS, A(1), false);
            pack(vt, rows + (a.NH + a.KVH + kv) * HS, a.row(), T, HS, A(1), true);
            std::fill(dk, dk + 2 * matrix, A(0));
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t0 = 0; t0 < T; t0 += R) {
                    const int n = std::min(R, T - t0), seen = t0 + n;
                    const int64_t at = (int64_t(b) * T + t0) * a.q_width() + h * HS;
                    pack(q, rows + int64_t(t0) * a.row() + h * HS, a.row(), n, HS, scale, false);
                    pack(dO, dout + at, a.q_width(), n, HS, A(1), false);
                    small_gemm(n, seen, HS, q, HS, 1, kt, T, p, T, false);
                    small_gemm(n, seen, HS, dO, HS, 1, vt, T, dp, T, false);
                    for (int i = 0; i < n; i++) {
                        A *probability = p + int64_t(i) * T, *ds = dp + int64_t(i) * T;
                        const int visible = t0 + i + 1;
                        const A normalizer = lse[(int64_t(b) * a.NH + h) * T + t0 + i];
                        A dot = 0;
                        for (int d = 0; d < HS; d++)
                            dot += dO[i * HS + d] * A(out[at + int64_t(i) * a.q_width() + d]);
                        for (int t = 0; t < visible; t++) {
                            probability[t] = exp_(probability[t] - normalizer);
                            ds[t] = probability[t] * (ds[t] - dot);
                        }
                        std::fill(probability + visible, probability + seen, A(0));
                        std::fill(ds + visible, ds + seen, A(0));
                    }
                    small_gemm(n, HS, seen, dp, T, 1, k, HS, dq, HS, false);
                    small_gemm(seen, HS, n, dp, 1, T, q, HS, dk, HS, true);
                    small_gemm(seen, HS, n, p, 1, T, dO, HS, dv, HS, true);
                    for (int i = 0; i < n; i++)
                        for (int d = 0; d < HS; d++)
                            drows[int64_t(t0 + i) * a.row() + h * HS + d] =
                                S(scale * dq[i * HS + d]);
                }
            for (int t = 0; t < T; t++)
                for (int d = 0; d < HS; d++) {
                    drows[int64_t(t) * a.row() + (a.NH + kv) * HS + d] = S(dk[t * HS + d]);
                    drows[int64_t(t) * a.row() + (a.NH + a.KVH + kv) * HS + d] = S(dv[t * HS + d]);
                }
        }
}

// ---------------------------------------------------------------------------------------------
// The MLP's activations: h (rows, H) → a (rows, H).

// GELU in its tanh form (arXiv 1606.08415): x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
// With s = sigmoid(2 · the argument), that is x · s.
template <class S> void gelu_forward(S* out, const S* h, int64_t n) {
    using A = Acc<S>;
    const A c = A(2 * 0.79788456080286535588);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        A x = A(h[i]);
        out[i] = S(x * sigmoid(c * (x + A(0.044715) * x * x * x)));
    }
}

template <class S> void gelu_backward(S* dh, const S* da, const S* h, int64_t n) {
    using A = Acc<S>;
    const A c = A(2 * 0.79788456080286535588);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        A x = A(h[i]), s = sigmoid(c * (x + A(0.044715) * x * x * x));
        A ds = s * (A(1) - s) * c * (A(1) + A(3 * 0.044715) * x * x);
        dh[i] = S(A(da[i]) * (s + x * ds));
    }
}

// SwiGLU (arXiv 2002.05202): a row of h is gate (H), up (H); a = silu(gate) ⊙ up.
template <class S> void swiglu_forward(S* out, const S* h, int64_t rows, int H) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S *gate = h + row * 2 * H, *up = gate + H;
        for (int i = 0; i < H; i++) out[row * H + i] = S(silu(A(gate[i])) * A(up[i]));
    }
}

template <class S> void swiglu_backward(S* dh, const S* da, const S* h, int64_t rows, int H) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S *gate = h + row * 2 * H, *up = gate + H;
        S *dgate = dh + row * 2 * H, *dup = dgate + H;
        for (int i = 0; i < H; i++) {
            A d = A(da[row * H + i]), g = A(gate[i]), s = sigmoid(g);
            dup[i] = S(d * g * s);
            dgate[i] = S(d * A(up[i]) * s * (A(1) + g * (A(1) - s)));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Loss: −log softmax(logits)[target] of each row, 0 where the target is −1.

// losses (rows). Overwrites logits (rows, V) by loss_scale × their gradient if that is wanted.
template <class S>
void cross_entropy(Acc<S>* losses, S* logits, const int* targets, bool gradient, double loss_scale,
                   int64_t rows, int V) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        S* x = logits + row * V;
        const int target = targets[row];
        if (target < 0) {
            losses[row] = 0;
            if (gradient) std::fill(x, x + V, S(0));
            continue;
        }
        A largest = A(x[0]), sum = 0;
#pragma omp simd reduction(max : largest)
        for (int i = 1; i < V; i++) largest = A(x[i]) > largest ? A(x[i]) : largest;
        const A at_target = A(x[target]);
        if (!gradient) {
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < V; i++) sum += exp_(A(x[i]) - largest);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < V; i++) {
                A e = exp_(A(x[i]) - largest);
                x[i] = S(e);
                sum += e;
            }
            const A factor = A(loss_scale) / sum;
            for (int i = 0; i < V; i++) x[i] = S(A(x[i]) * factor);
            x[target] = S(A(x[target]) - A(loss_scale));
        }
        losses[row] = largest + std::log(sum) - at_target;
    }
}

// ---------------------------------------------------------------------------------------------
// The model

// What a pass computes and keeps, laid out once. A pass that is followed by a backward keeps every
// layer's tensors; else layers share one slot.
template <class S> struct Activations {
    int64_t rows = 0; // B·T at most
    bool training = false;
    std::vector<int> in_slot, branch_slot; // of junction k, −1: none

    Array<S> embedded;                 // (rows, C), if junction 0 has a norm
    Array<S> residual;                 // (2L + 1, rows, C): r after each junction
    Array<S> input;                    // (slots, rows, C): u, where a junction has an in-norm
    Array<S> branch;                   // (slots, rows, C): b
    Array<JunctionStats<S>> stats;     // (2L + 1, rows)
    Array<S> qkv;                      // (L, rows, (NH + 2·KVH)·HS), of every layer always
    Array<S> qk_raw, attended;         // (L, rows, (NH + KVH)·HS | NH·HS)
    Array<NormStats<Acc<S>>> qk_stats; // (L, rows, 2)
    Array<Acc<S>> lse;                 // (L, rows, NH)
    Array<S> hidden, activated;        // (L, rows, H or 2·H), (L, rows, H)
    Array<S> logits;                   // (head_rows, V)
    Array<Acc<S>> losses;              // (rows)

    Array<S> dresidual, dinput, dbranch; // (rows, C)
    Array<S> dwide, dnarrow;             // gradients of qkv or hidden, and of attended or activated
    Array<Acc<S>> scratch;               // partial sums

    int64_t head_rows = 0; // rows whose logits exist at once

    // Calls make(array, elements) for every array.
    template <class Make> void layout(const Config& c, int B, int T, bool train, Make make) {
        const int64_t C = c.width, L = c.layers, kept = train ? L : 1;
        rows = int64_t(B) * T;
        training = train;
        int in_slots = 0, branch_slots = 1; // slot 0 is shared by branches that are not kept
        for (int k = 0; k <= 2 * L; k++) {
            Junction j = junction(c.scheme, int(L), k);
            in_slot.push_back(!j.in_norm ? -1 : train ? in_slots++ : 0);
            branch_slot.push_back(!j.branch ? -1 : train && j.keeps_branch() ? branch_slots++ : 0);
        }
        const bool embed_norm = junction(c.scheme, int(L), 0).out_norm;
        make(embedded, embed_norm ? rows * C : 0);
        make(residual, (2 * L + 1) * rows * C);
        make(input, std::max(in_slots, 1) * rows * C);
        make(branch, branch_slots * rows * C);
        make(stats, (2 * L + 1) * rows);
        make(qkv, L * rows * c.qkv_width());
        make(qk_raw, c.qk_norm ? kept * rows * (c.q_width() + c.kv_width()) : 0);
        make(qk_stats, c.qk_norm ? kept * rows * 2 : 0);
        make(attended, kept * rows * c.q_width());
        make(lse, kept * rows * c.heads);
        make(hidden, kept * rows * c.mlp_in_width());
        make(activated, kept * rows * c.mlp_width);
        head_rows = std::min(rows, std::max<int64_t>(256, (1 << 24) / c.vocab_size));
        make(logits, head_rows * c.vocab_size);
        make(losses, rows);
        if (!train) return;
        make(dresidual, rows * C);
        make(dinput, rows * C);
        make(dbranch, rows * C);
        make(dwide, rows * std::max(c.qkv_width(), c.mlp_in_width()));
        make(dnarrow, rows * std::max(c.q_width(), c.mlp_width));
        make(scratch, max_chunks * std::max<int64_t>(7 * C + 1, c.q_width() + c.kv_width()));
    }
};

template <class S> struct CpuModel : Model {
    using A = Acc<S>;

    Array<S> parameters;
    Array<A> gradients, moment1, moment2;
    Activations<S> acts;
    Array<CosSin<A>> rope_table;
    std::vector<int> tokens; // of the last pass
    int B = 0, T = 0;        // of the last pass
    int first = 0;           // rows before this one were not computed anew in the last pass
    bool continues = false;  // whether the next pass may go on where the last one ended
    int64_t held = 0;        // bytes

    // What stop() returns at junction k, null for its argument; only gradient checks set it.
    std::vector<const S*> stopped;

    CpuModel(const Config& c, int max_B, int max_T, bool training) : Model(c) {
        auto make = [&](auto& array, int64_t n) {
            array = std::remove_reference_t<decltype(array)>(n);
            held += n * int64_t(sizeof(array[0]));
        };
        make(parameters, registry.size);
        if (training) {
            make(gradients, registry.size);
            make(moment1, registry.size);
            make(moment2, registry.size);
        }
        acts.layout(c, max_B, max_T, training, make);
        stopped.resize(2 * c.layers + 1);
        if (!c.rope) return;
        const int half = c.head_size / 2;
        const int64_t reach = std::min<int64_t>(c.positions, acts.rows);
        make(rope_table, reach * half);
        for (int64_t t = 0; t < reach; t++)
            for (int i = 0; i < half; i++) {
                double angle = double(t) * std::pow(c.rope_theta, -2.0 * i / c.head_size);
                rope_table[t * half + i] = {A(std::cos(angle)), A(std::sin(angle))};
            }
    }

    std::string device() const override { return "cpu"; }
    std::string dtype() const override { return sizeof(S) == 8 ? "float64" : "float32"; }
    int64_t bytes() const override { return held; }

    // Tensors of the last pass, from row `first` on. k counts junctions from 0, l layers from 0.
    int64_t rows() const { return int64_t(B) * T - first; }
    int64_t slot(int l) const { return acts.training ? l : 0; }
    int64_t row(int64_t slot) const { return slot * acts.rows + first; }
    S* residual(int k) { return acts.residual + row(k) * config.width; }
    S* input(int k) { // u: what the sublayer after junction k sees
        int s = acts.in_slot[k];
        return s < 0 ? residual(k) : acts.input + row(s) * config.width;
    }
    S* branch(int k) { return acts.branch + row(acts.branch_slot[k]) * config.width; }
    S* embedded() {
        return acts.embedded.size ? acts.embedded + row(0) * config.width : residual(0);
    }
    S* before(int k) { return k == 0 ? embedded() : residual(k - 1); } // r_prev
    JunctionStats<S>* stats(int k) { return acts.stats + row(k); }
    S* hidden(int l) { return acts.hidden + row(slot(l)) * config.mlp_in_width(); }
    S* activated(int l) { return acts.activated + row(slot(l)) * config.mlp_width; }

    // Those of attention, from row 0 on.
    S* qkv(int l) { return acts.qkv + l * acts.rows * config.qkv_width(); }
    S* qk_raw(int l) {
        return acts.qk_raw + slot(l) * acts.rows * (config.q_width() + config.kv_width());
    }
    NormStats<A>* qk_stats(int l) { return acts.qk_stats + slot(l) * acts.rows * 2; }
    S* attended(int l) { return acts.attended + slot(l) * acts.rows * config.q_width(); }
    A* lse(int l) { return acts.lse + slot(l) * acts.rows * config.heads; }
    AttentionShape attention() const {
        return {B, T, config.heads, config.kv_heads, config.head_size, first};
    }
    const S* weight(int64_t offset) const { return offset < 0 ? nullptr : parameters + offset; }
    A* gradient(int64_t offset) const { return offset < 0 ? nullptr : gradients + offset; }

    // Positions before `from` keep what the last pass left there.
    void forward(const int* inputs, int b, int t, int from = 0) {
        check_tokens(inputs, b, t);
        first = from;
        continues = false;
        tokens.assign(inputs, inputs + int64_t(B) * T);

        embedding_forward(embedded(), inputs + first, weight(registry.token_embedding),
                          weight(registry.position_embedding), first, rows(), T, config.width);
        join_forward(0);
        for (int l = 0; l < config.layers; l++) {
            attention_sublayer_forward(l);
            join_forward(2 * l + 1);
            mlp_sublayer_forward(l);
            join_forward(2 * l + 2);
        }
    }

    // From the gradient of the final norm's output, in dinput.
    void backward() {
        std::fill(acts.dresidual + 0, acts.dresidual + rows() * config.width, S(0));
        for (int l = config.layers - 1; l >= 0; l--) {
            join_backward(2 * l + 2);
            mlp_sublayer_backward(l);
            join_backward(2 * l + 1);
            attention_sublayer_backward(l);
        }
        join_backward(0);
        embedding_backward(gradient(registry.token_embedding),
                           gradient(registry.position_embedding), tokens.data(),
                           (const S*)acts.dresidual, B, T, config.width);
    }

    void join_forward(int k) {
        junction_forward(junction(config.scheme, config.layers, k), config.norm, config.norm_eps,
                         before(k), k == 0 ? nullptr : branch(k),
                         JunctionPointers<const S>(parameters, registry.junctions[k]), residual(k),
                         input(k), stats(k), stopped[k], rows(), config.width);
    }

    void join_backward(int k) {
        junction_backward(junction(config.scheme, config.layers, k), config.norm, before(k),
                          k == 0 ? nullptr : branch(k), residual(k),
                          JunctionPointers<const S>(parameters, registry.junctions[k]), stats(k),
                          (const S*)acts.dinput, (S*)acts.dresidual, (S*)acts.dbranch,
                          JunctionPointers<A>(gradients, registry.junctions[k]), (A*)acts.scratch,
                          rows(), config.width);
    }

    // branch(2l + 1) = attention of input(2l)
    void attention_sublayer_forward(int l) {
        const LayerParams& p = registry.layers[l];
        linear_forward(qkv(l) + first * config.qkv_width(), input(2 * l), weight(p.qkv),
                       weight(p.qkv_bias), rows(), config.width, config.qkv_width());
        if (config.qk_norm)
            qk_norm_forward(qkv(l), qk_raw(l), qk_stats(l), weight(p.q_norm), weight(p.k_norm),
                            config.norm_eps, attention());
        if (config.rope) rope(qkv(l), (const CosSin<A>*)rope_table, 1, attention());
        attention_forward(attended(l), lse(l), qkv(l), attention());
        linear_forward(branch(2 * l + 1), attended(l) + first * config.q_width(),
                       weight(p.attn_out), weight(p.attn_out_bias), rows(), config.q_width(),
                       config.width);
    }

    // From dbranch to dinput.
    void attention_sublayer_backward(int l) {
        const LayerParams& p = registry.layers[l];
        S *dattended = acts.dnarrow, *dqkv = acts.dwide;
        linear_backward(dattended, gradient(p.attn_out), gradient(p.attn_out_bias),
                        (const S*)acts.dbranch, attended(l), weight(p.attn_out), rows(),
                        config.q_width(), config.width);
        attention_backward(dqkv, dattended, qkv(l), attended(l), lse(l), attention());
        if (config.rope) rope(dqkv, (const CosSin<A>*)rope_table, -1, attention());
        if (config.qk_norm)
            qk_norm_backward(dqkv, qk_raw(l), qk_stats(l), weight(p.q_norm), weight(p.k_norm),
                             gradient(p.q_norm), gradient(p.k_norm), (A*)acts.scratch, attention());
        linear_backward((S*)acts.dinput, gradient(p.qkv), gradient(p.qkv_bias), dqkv, input(2 * l),
                        weight(p.qkv), rows(), config.width, config.qkv_width());
    }

    // branch(2l + 2) = MLP of input(2l + 1)
    void mlp_sublayer_forward(int l) {
        const LayerParams& p = registry.layers[l];
        const int H = config.mlp_width;
        linear_forward(hidden(l), input(2 * l + 1), weight(p.mlp_in), weight(p.mlp_in_bias), rows(),
                       config.width, config.mlp_in_width());
        if (config.gated_mlp)
            swiglu_forward(activated(l), hidden(l), rows(), H);
        else
            gelu_forward(activated(l), hidden(l), rows() * H);
        linear_forward(branch(2 * l + 2), activated(l), weight(p.mlp_out), weight(p.mlp_out_bias),
                       rows(), H, config.width);
    }

    void mlp_sublayer_backward(int l) {
        const LayerParams& p = registry.layers[l];
        const int H = config.mlp_width;
        S *dactivated = acts.dnarrow, *dhidden = acts.dwide;
        linear_backward(dactivated, gradient(p.mlp_out), gradient(p.mlp_out_bias),
                        (const S*)acts.dbranch, activated(l), weight(p.mlp_out), rows(), H,
                        config.width);
        if (config.gated_mlp)
            swiglu_backward(dhidden, dactivated, hidden(l), rows(), H);
        else
            gelu_backward(dhidden, dactivated, hidden(l), rows() * H);
        linear_backward((S*)acts.dinput, gradient(p.mlp_in), gradient(p.mlp_in_bias), dhidden,
                        input(2 * l + 1), weight(p.mlp_in), rows(), config.width,
                        config.mlp_in_width());
    }

    // The head and its loss, some rows at a time, so that (rows, V) logits never exist.
    double head(const int* targets, bool training, double loss_scale) {
        const S* final_input = input(2 * config.layers);
        const int V = config.vocab_size, C = config.width;
        const S* w = weight(registry.head);
        for (int64_t row = 0; row < rows(); row += acts.head_rows) {
            const int64_t n = std::min(acts.head_rows, rows() - row);
            const S* x = final_input + row * C;
            linear_forward((S*)acts.logits, x, w, (const S*)nullptr, n, C, V);
            cross_entropy(acts.losses + row, (S*)acts.logits, targets + row, training, loss_scale,
                          n, V);
            if (training)
                linear_backward(acts.dinput + row * C, gradient(registry.head), (A*)nullptr,
                                (const S*)acts.logits, x, w, n, C, V);
        }
        double sum = 0;
        for (int64_t row = 0; row < rows(); row++) sum += double(acts.losses[row]);
        return sum;
    }

    double loss(const int* inputs, const int* targets, int b, int t) override {
        forward(inputs, b, t);
        check_targets(targets);
        return head(targets, false, 0);
    }

    double loss_and_gradients(const int* inputs, const int* targets, int b, int t,
                              double loss_scale) override {
        if (!acts.training) fail("this model was made without gradients");
        forward(inputs, b, t);
        check_targets(targets);
        double sum = head(targets, true, loss_scale);
        backward();
        return sum;
    }

    // If the tokens continue those of the last call, as in generating text, only the new positions
    // are computed: every layer's k and v are still there.
    void logits(const int* inputs, int b, int t, bool last_only, float* out) override {
        int from = 0;
        if (continues && last_only && b == 1)
            while (from < std::min(t - 1, T) && inputs[from] == tokens[from]) from++;
        forward(inputs, b, t, from);
        const int V = config.vocab_size, C = config.width;
        const S* final_input = input(2 * config.layers);
        const int64_t step = last_only ? 1 : acts.head_rows;
        for (int64_t row = last_only ? T - 1 - first : 0; row < rows();
             row += last_only ? T : step) {
            const int64_t n = std::min(step, rows() - row);
            linear_forward((S*)acts.logits, final_input + row * C, weight(registry.head),
                           (const S*)nullptr, n, C, V);
            for (int64_t i = 0; i < n * V; i++) *out++ = float(acts.logits[i]);
        }
        continues = b == 1;
    }

    void check_tokens(const int* inputs, int b, int t) {
        if (b < 1 || t < 1 || int64_t(b) * t > acts.rows)
            fail("a batch of ", b, " x ", t, " tokens was given to a model made for ", acts.rows);
        if (t > config.positions)
            fail("a sequence of ", t, " tokens was given to a model of ", config.positions,
                 " positions");
        B = b, T = t;
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
        for (const Param& p : registry.params) lns::initialize(p, seed, parameters + p.offset);
        for (Array<A>* array : {&gradients, &moment1, &moment2})
            std::fill(*array + 0, *array + array->size, A(0));
    }

    void zero_gradients() override {
#pragma omp parallel for
        for (int64_t i = 0; i < registry.size; i++) gradients[i] = 0;
    }

    double gradient_norm() override {
        const int64_t block = 1 << 16, blocks = (registry.size + block - 1) / block;
        std::vector<double> sums(blocks);
#pragma omp parallel for
        for (int64_t i = 0; i < blocks; i++) {
            double sum = 0;
            const int64_t end = std::min(registry.size, (i + 1) * block);
#pragma omp simd reduction(+ : sum)
            for (int64_t at = i * block; at < end; at++)
                sum += double(gradients[at]) * double(gradients[at]);
            sums[i] = sum;
        }
        double sum = 0;
        for (double s : sums) sum += s;
        return std::sqrt(sum);
    }

    // m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
    // w ← w − lr · (m̂ / (√v̂ + eps) + decay · w), with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).
    void update(const AdamW& o) override {
        continues = false;
        const A beta1 = A(o.beta1), beta2 = A(o.beta2), eps = A(o.eps), lr = A(o.lr);
        const A correction1 = A(1 / (1 - std::pow(o.beta1, double(o.step))));
        const A correction2 = A(1 / (1 - std::pow(o.beta2, double(o.step))));
        const A scale = A(o.grad_scale);
#pragma omp parallel
        for (const Param& p : registry.params) {
            const A decay = p.decay ? A(o.weight_decay) : A(0);
            const int64_t end = p.offset + p.size();
#pragma omp for nowait schedule(static)
            for (int64_t i = p.offset; i < end; i++) {
                const A g = scale * gradients[i];
                const A m = moment1[i] = beta1 * moment1[i] + (A(1) - beta1) * g;
                const A v = moment2[i] = beta2 * moment2[i] + (A(1) - beta2) * g * g;
                const A w = A(parameters[i]);
                const A step = m * correction1 / (std::sqrt(v * correction2) + eps);
                parameters[i] = S(w - lr * (step + decay * w));
            }
        }
    }

    void read(Buffer buffer, const Param& p, float* out) override {
        const A* from = buffer == Buffer::gradients ? gradients
                        : buffer == Buffer::moment1 ? moment1
                                                    : moment2;
        for (int64_t i = 0; i < p.size(); i++)
            out[i] = buffer == Buffer::parameters ? float(parameters[p.offset + i])
                                                  : float(from[p.offset + i]);
    }

    void write(Buffer buffer, const Param& p, const float* values) override {
        continues = false;
        A* to = buffer == Buffer::gradients ? gradients
                : buffer == Buffer::moment1 ? moment1
                                            : moment2;
        for (int64_t i = 0; i < p.size(); i++) {
            if (buffer == Buffer::parameters)
                parameters[p.offset + i] = S(values[i]);
            else
                to[p.offset + i] = A(values[i]);
        }
    }

    float* host_gradients() override {
        if constexpr (std::is_same_v<A, float>)
            return gradients;
        else
            return nullptr;
    }

    std::vector<double> residual_variance() override {
        std::vector<double> variance;
        const int64_t n = rows() * config.width;
        for (int l = 0; l <= config.layers; l++) {
            const S* r = residual(2 * l);
            double sum = 0, square = 0;
            for (int64_t i = 0; i < n; i++) sum += double(r[i]);
            const double mean = sum / double(n);
            for (int64_t i = 0; i < n; i++) square += (double(r[i]) - mean) * (double(r[i]) - mean);
            variance.push_back(square / double(n));
        }
        return variance;
    }

    std::string first_nonfinite() override {
        auto bad = [](const auto* x, int64_t n) {
            for (int64_t i = 0; i < n; i++)
                if (!std::isfinite(x[i])) return true;
            return false;
        };
        for (const Param& p : registry.params)
            if (bad(parameters + p.offset, p.size())) return "the parameter " + p.name;
        if (rows() > 0) {
            const int64_t n = rows(), C = config.width;
            if (bad(embedded(), n * C)) return "the embedding's output";
            for (int k = 0; k <= 2 * config.layers; k++) {
                const int l = (k - 1) / 2;
                std::string layer = "layer " + std::to_string(l + 1) + "'s ";
                if (acts.training && k > 0 && k % 2 == 1) {
                    if (bad(qkv(l), n * config.qkv_width())) return layer + "q, k and v";
                    if (bad(attended(l), n * config.q_width())) return layer + "attention";
                }
                if (acts.training && k > 0 && k % 2 == 0) {
                    if (bad(hidden(l), n * config.mlp_in_width())) return layer + "MLP input";
                    if (bad(activated(l), n * config.mlp_width)) return layer + "MLP activation";
                }
                if (bad(residual(k), n * C))
                    return k == 0 ? "the residual stream after the embedding"
                                  : "the residual stream after " + layer +
                                        (k % 2 == 1 ? "attention" : "MLP");
                if (acts.training && bad(input(k), n * C))
                    return k == 2 * config.layers
                               ? "the final norm's output"
                               : "the norm before layer " + std::to_string(k / 2 + 1) + "'s " +
                                     (k % 2 == 0 ? "attention" : "MLP");
            }
            if (bad((const A*)acts.losses, n)) return "the loss";
        }
        if (acts.training)
            for (auto p = registry.params.rbegin(); p != registry.params.rend(); ++p)
                if (bad(gradients + p->offset, p->size())) return "the gradient of " + p->name;
        return "";
    }
};

std::unique_ptr<Model> make_cpu_model(const Config& config, int B, int T, bool training) {
    return std::make_unique<CpuModel<float>>(config, B, T, training);
}

MemoryPlan plan_cpu_memory(const Config& config, int B, int T, bool training) {
    MemoryPlan plan;
    const int64_t n = make_registry(config).size;
    plan.parameters = n * int64_t(sizeof(float));
    if (training) plan.gradients = plan.parameters, plan.optimizer = 2 * plan.parameters;
    Activations<float> acts;
    acts.layout(config, B, T, training, [&](auto& array, int64_t elements) {
        plan.activations += elements * int64_t(sizeof(array[0]));
    });
    return plan;
}

} // namespace lns

#ifndef TESTING
#include "gpt/program.h"

int main(int argc, char** argv) { return lns::run_program(argc, argv); }
#endif
