// lns.cpp: trains GPT and LLaMA language models under every norm scheme of "The Curse of Depth in
// Large Language Models" (arXiv 2502.05795). This file is the whole model on the CPU, forward and
// backward, in the order in which data flows: each backward stands directly below its forward.
// The program around it (flags, data, training loop, checkpoints) is in gpt/ and knows only the
// interface gpt/model/model.h.
//
// Sizes: B sequences of T tokens; V vocabulary; C width; L layers; NH heads of q and KVH of k and
// v, of HS channels each; H width of the MLP. Arrays are row-major, a row is a token.
// S is the scalar in which tensors are stored (double, float or bf16), Acc<S> the one in which sums
// are taken (double, float, float). Gradients of parameters and of the residual stream are sums
// over many layers or tokens, and stored as Acc<S>. Gradients: a backward function writes the
// gradients of activations and adds those of parameters. Sums run in an order that does not depend
// on the number of threads (oneDNN's own aside).

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/cpu/bf16.h"
#include "gpt/cpu/gemm.h"
#include "gpt/model/model.h"
#include "gpt/model/slots.h"

namespace lns {

// ---------------------------------------------------------------------------------------------
// Scalars and arrays

template <class S> using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// eˣ to 2 units in the last place, without calls or branches, so that loops over it vectorize:
// x = n ln 2 + f with |f| ≤ ln 2 / 2, and a polynomial for eᶠ (Cephes' coefficients). It is 0 below
// −87.6 and never a subnormal number, which costs a CPU a hundred cycles. For x ≤ 88; NaN stays
// NaN.
inline float exp_below(float x) {
    x = x < -200.0f ? -200.0f : x;
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
    int exponent = std::bit_cast<int>(shifted) - (std::bit_cast<int>(shifter) - 127);
    exponent = exponent < 0 ? 0 : exponent;
    return p * std::bit_cast<float>(exponent << 23); // p · 2ⁿ
}
inline double exp_below(double x) { return std::exp(x); }

// The same for any x; infinity above 88.3: had it a largest value, compilers would multiply by the
// subnormal inverse of that for each number, to choose afterwards.
inline float exp_(float x) {
    const float limit = 88.3f, e = exp_below(x > limit ? limit : x);
    return x > limit ? std::numeric_limits<float>::infinity() : e;
}
inline double exp_(double x) { return std::exp(x); }

template <class A> inline A sigmoid(A x) { return A(1) / (A(1) + exp_(-x)); }
template <class A> inline A silu(A x) { return x * sigmoid(x); }
template <class A> inline A dsilu(A x) {
    A s = sigmoid(x);
    return s * (A(1) + x * (A(1) - s));
}

// Zeroed memory, aligned to a cache line; large ones in large pages where Linux gives them.
template <class S> struct Array {
    Array() = default;
    explicit Array(int64_t n) : size(n) {
        if (n == 0) return;
        const size_t page = size_t(2) << 20, line = 64;
        const size_t alignment = size_t(n) * sizeof(S) < 8 * page ? line : page;
        const size_t bytes = (size_t(n) * sizeof(S) + line - 1) / line * line;
        data.reset(static_cast<S*>(
            std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
        if (!data) throw std::bad_alloc();
#ifdef __linux__
        if (alignment == page) madvise(data.get(), bytes, MADV_HUGEPAGE);
#endif
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

// Σ f(i), i < n, in as many lanes as a vector of bf16 has. (`omp simd reduction` adds its lanes one
// by one at the end, which takes longer than a short row.) A lane adds few numbers before it joins
// the total: small numbers would vanish beside the sum of all, which made Σ eˣ over 50,000 tokens
// 7e-6 too low.
template <class A, class F> inline double sum_of(int64_t n, const F& f) {
    const int lanes = 32, most = 32;
    double total = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = std::min<int64_t>(n, i + lanes * most);
        A sums[lanes] = {};
        for (; i + lanes <= end; i += lanes)
#pragma omp simd
            for (int j = 0; j < lanes; j++) sums[j] += f(i + j);
        for (; i < end; i++) sums[i % lanes] += f(i);
        for (int half = lanes / 2; half > 0; half /= 2)
            for (int j = 0; j < half; j++) sums[j] += sums[j + half];
        total += sums[0];
    }
    return total;
}

template <class A> inline A largest_of(int64_t n, const A* x) {
    A largest = x[0];
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// Sums over rows are taken in parts of at most so many rows, whose sums are added in order: the
// error then grows as the root of a part, not of all rows.
const int64_t part_rows = 256;

// The parts of a sum over rows that all threads take: enough of them for small batches too.
inline int64_t row_chunks(int64_t rows) {
    return std::max(std::min<int64_t>(rows, 32), (rows + part_rows - 1) / part_rows);
}

// out[i] += Σ row(r)[i] over r < rows, i < n ≤ N.
template <int N, class A, class Row>
inline void add_rows(A* out, int n, int64_t rows, const Row& row) {
    A sum[N] = {};
    for (int64_t r = 0; r < rows;) {
        A part[N] = {};
        for (const int64_t end = std::min(rows, r + part_rows); r < end; r++) {
            const auto* x = row(r);
            for (int i = 0; i < n; i++) part[i] += A(x[i]);
        }
        for (int i = 0; i < n; i++) sum[i] += part[i];
    }
    for (int i = 0; i < n; i++) out[i] += sum[i];
}

// ---------------------------------------------------------------------------------------------
// Embedding: out[row] = wte[token] + wpe[t]. Gathering the gradient goes by channel, so that no two
// threads meet, and by token. The first row is at position `first`, which is 0 unless B is 1.

template <class S>
void embedding_forward(Acc<S>* out, const int* tokens, const S* wte, const S* wpe, int first,
                       int64_t rows, int T, int C) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S* token = wte + int64_t(tokens[row]) * C;
        const S* position = wpe ? wpe + (first + row) % T * C : nullptr;
        for (int i = 0; i < C; i++)
            out[row * C + i] = Acc<S>(token[i]) + (position ? Acc<S>(position[i]) : Acc<S>(0));
    }
}

template <class A>
void embedding_backward(A* dwte, A* dwpe, const int* tokens, const A* dout, int B, int T, int C) {
    const int slice = 16; // channels
    const int64_t rows = int64_t(B) * T;
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t x, int64_t y) { return tokens[x] < tokens[y]; });
#pragma omp parallel for
    for (int begin = 0; begin < C; begin += slice) {
        const int n = std::min(slice, C - begin);
        for (int64_t i = 0, end; i < rows; i = end) {
            const int token = tokens[order[i]];
            for (end = i + 1; end < rows && tokens[order[end]] == token;) end++;
            add_rows<slice>(dwte + int64_t(token) * C + begin, n, end - i,
                            [&](int64_t r) { return dout + order[i + r] * C + begin; });
        }
        for (int64_t t = 0; t < T && dwpe; t++)
            add_rows<slice>(dwpe + t * C + begin, n, B,
                            [&](int64_t b) { return dout + (b * T + t) * C + begin; });
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
        y[i] = scale * (value + (bias ? A(bias[i]) : A(0)));
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
// norm schemes differ (gpt/model/scheme.h has its equations).

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

// r (rows, C) and u (rows, C) from r_prev and b (rows, C); keeps the norms' statistics (rows). r
// may be r_prev; u may be null if the junction has no in-norm, where it is r. `stopped` (rows, C)
// is what stop() returns, null for its argument: only a check of gradients by finite differences
// holds it fixed.
template <class S>
void junction_forward(const Junction& j, NormType type, double eps_, const Acc<S>* r_prev,
                      const S* b, const JunctionPointers<const S>& p, Acc<S>* r, S* u,
                      JunctionStats<S>* stats, const Acc<S>* stopped, int64_t rows, int C) {
    using A = Acc<S>;
    const A eps = A(eps_), skip = A(j.skip), in_scale = A(j.in_scale);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * C;
        A* z = thread_scratch<A>(C);
        JunctionStats<S>& st = stats[row];
        if (!j.branch) {
            for (int i = 0; i < C; i++) z[i] = r_prev[at + i];
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
                const A* stop = stopped ? stopped : r_prev;
                for (int i = 0; i < C; i++) z[i] += skip * (r_prev[at + i] - gate * stop[at + i]);
            } else {
                for (int i = 0; i < C; i++) z[i] += skip * r_prev[at + i];
            }
        }
        if (j.out_norm) {
            st.out = norm_stats<A>(type, eps, z, C);
            norm_row_forward(st.out, z, p.out_weight, p.out_bias, A(1), z, C);
        }
        if (j.gate && !j.gate_on_skip)
            for (int i = 0; i < C; i++) z[i] -= gate * (stopped ? stopped[at + i] : z[i]);
        for (int i = 0; i < C; i++) r[at + i] = z[i];
        if (j.in_norm) {
            st.in = norm_stats<A>(type, eps, r + at, C);
            norm_row_forward(st.in, r + at, p.in_weight, p.in_bias, in_scale, u + at, C);
        } else if (u) {
            for (int i = 0; i < C; i++) u[at + i] = z[i];
        }
    }
}

// From du (gradient of u; of r if there is no in-norm) and dr (gradient of r from what comes
// later): db and, in place of dr, the gradient of r_prev. Adds the gradients of the parameters,
// through partial sums in scratch (row_chunks(rows), 7·C + 1).
template <class S>
void junction_backward(const Junction& j, NormType type, const Acc<S>* r_prev, const S* b,
                       const Acc<S>* r, const JunctionPointers<const S>& p,
                       const JunctionStats<S>* stats, const S* du, Acc<S>* dr, S* db,
                       const JunctionPointers<Acc<S>>& grads, Acc<S>* scratch, int64_t rows,
                       int C) {
    using A = Acc<S>;
    const A skip = A(j.skip), in_scale = A(j.in_scale);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
    const A dgate = j.gate ? dsilu(A(*p.gate)) : A(0);
    const int64_t chunks = row_chunks(rows), width = 7 * int64_t(C) + 1;

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
                for (int i = 0; i < C; i++) dz[i] += dr[at + i];
            } else {
                for (int i = 0; i < C; i++) dz[i] = A(du[at + i]) + dr[at + i];
            }

            // What the forward pass had before the out-norm and the gate.
            if (j.keeps_branch()) {
                if (!j.branch) {
                    for (int i = 0; i < C; i++) z[i] = r_prev[at + i];
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
                        z[i] = kept * r_prev[at + i] + factor * y[i];
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
                dr[at + i] = d;
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
            for (int i = 0; i < C; i++) db[at + i] = dz[i];
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

template <class S, class Out>
void linear_forward(Out* out, const S* in, const S* w, const Out* bias, int64_t rows, int C,
                    int OC) {
    gemm(false, true, rows, OC, C, in, w, out, false, bias);
}

// din (rows, C) from dout (rows, OC).
template <class S>
void linear_backward_input(S* din, const S* dout, const S* w, int64_t rows, int C, int OC) {
    gemm(false, false, rows, C, OC, dout, w, din, false);
}

// Adds to dw, or writes it where `add` is false; adds to dbias if there is one.
template <class S>
void linear_backward_weight(Acc<S>* dw, Acc<S>* dbias, const S* dout, const S* in, int64_t rows,
                            int C, int OC, bool add) {
    gemm(true, false, OC, C, rows, dout, in, dw, add);
    if (!dbias) return;
    const int slice = 64;
#pragma omp parallel for
    for (int begin = 0; begin < OC; begin += slice)
        add_rows<slice>(dbias + begin, std::min(slice, OC - begin), rows,
                        [&](int64_t row) { return dout + row * OC + begin; });
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

// Rotary positions (arXiv 2104.09864) of one head's HS channels, with Hugging Face's pairing:
// channel i turns with channel i + HS/2 by the angle t · θ^(−2i/HS). turn: (HS/2) of (cos, sin) of
// position t. direction −1 turns back, which is the gradient.
template <class A> struct CosSin { A cos, sin; };

template <class A, class X, class Y>
void rotate(Y* out, const X* x, const CosSin<A>* turn, A direction, int HS) {
    const int half = HS / 2;
    for (int i = 0; i < half; i++) {
        const A c = turn[i].cos, s = direction * turn[i].sin;
        const A x0 = A(x[i]), x1 = A(x[i + half]);
        out[i] = x0 * c - x1 * s;
        out[i + half] = x1 * c + x0 * s;
    }
}

// What q and k go through between their matrix and attention, in one pass from `in`, which may be
// qkv: OLMo 2's RMSNorm over the whole of q and of k, if there is `raw`, which keeps what it saw;
// then rotary positions, if there is a table (T, HS/2).
template <class S, class X>
void qk_forward(S* qkv, const X* in, S* raw, NormStats<Acc<S>>* stats, const S* q_weight,
                const S* k_weight, double eps, const CosSin<Acc<S>>* table,
                const AttentionShape& a) {
    using A = Acc<S>;
    const int Q = a.q_width(), K = a.kv_width(), HS = a.HS;
    const S* none = nullptr;
#pragma omp parallel for
    for (int64_t row = a.first; row < a.rows(); row++) {
        const X* x = in + (row - a.first) * a.row();
        S* y = qkv + row * a.row();
        A* z = thread_scratch<A>(a.row());
        for (int i = 0; i < a.row(); i++) z[i] = A(x[i]);
        if (raw) {
            S* kept = raw + row * (Q + K);
            for (int i = 0; i < Q + K; i++) kept[i] = z[i];
            stats[2 * row] = norm_stats<A>(NormType::rms, A(eps), z, Q);
            stats[2 * row + 1] = norm_stats<A>(NormType::rms, A(eps), z + Q, K);
            norm_row_forward(stats[2 * row], z, q_weight, none, A(1), z, Q);
            norm_row_forward(stats[2 * row + 1], z + Q, k_weight, none, A(1), z + Q, K);
        }
        for (int head = 0; head < a.NH + a.KVH && table; head++)
            rotate(z + head * HS, z + head * HS, table + row % a.T * (HS / 2), A(1), HS);
        for (int i = 0; i < a.row(); i++) y[i] = z[i];
    }
}

// The norm's, in place on dqkv's q and k. scratch: (row_chunks(rows), Q + K).
template <class S>
void qk_norm_backward(S* dqkv, const S* raw, const NormStats<Acc<S>>* stats, const S* q_weight,
                      const S* k_weight, Acc<S>* dq_weight, Acc<S>* dk_weight, Acc<S>* scratch,
                      const AttentionShape& a) {
    using A = Acc<S>;
    const int Q = a.q_width(), K = a.kv_width();
    const int64_t rows = a.rows(), chunks = row_chunks(rows);
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
            for (int i = 0; i < Q + K; i++) dy[i] = d[i];
        }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const A* sums = scratch + chunk * (Q + K);
        for (int i = 0; i < Q; i++) dq_weight[i] += sums[i];
        for (int i = 0; i < K; i++) dk_weight[i] += sums[Q + i];
    }
}

// Rows of queries that attend at once: their scores, (tile, T), are all of T × T that ever exists.
const int attention_tile = 64;

// A thread's memory for attention, one array behind the other, each aligned to a cache line.
struct AttentionScratch {
    char* at;

    explicit AttentionScratch(int64_t bytes) {
        at = thread_scratch<char>(bytes + 64);
        at += 64 - reinterpret_cast<uintptr_t>(at) % 64;
    }
    template <class X> static int64_t bytes(int64_t n) {
        return (n * int64_t(sizeof(X)) + 63) / 64 * 64;
    }
    template <class X> X* take(int64_t n) {
        X* taken = reinterpret_cast<X*>(at);
        at += bytes<X>(n);
        return taken;
    }
};

// What comes after a query gets a score whose probability is 0: cheaper than loops of odd lengths.
template <class A> void hide(A* score, int visible, int seen) {
    std::fill(score + visible, score + seen, A(-1e30));
}

// out (B, T, NH·HS) = softmax(q kᵀ / sqrt(HS)) v, causal: position t sees 0 … t.
// Keeps lse (B, NH, T), the logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, Acc<S>* lse, const S* qkv, const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
    const int64_t packed_k = packed_size<S>(HS, T), packed_v = packed_size<S>(T, HS);
    const int64_t bytes = AttentionScratch::bytes<S>(packed_k) +
                          AttentionScratch::bytes<S>(packed_v) + AttentionScratch::bytes<S>(R * T) +
                          AttentionScratch::bytes<A>(R * (T + HS));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            AttentionScratch scratch(bytes);
            S *kt = scratch.take<S>(packed_k), *v = scratch.take<S>(packed_v); // (HS, T), (T, HS)
            S* p = scratch.take<S>(int64_t(R) * T);
            A *scores = scratch.take<A>(int64_t(R) * T), *o = scratch.take<A>(int64_t(R) * HS);
            pack(kt, HS, T, rows + (a.NH + kv) * HS, 1, a.row());
            pack(v, T, HS, rows + (a.NH + a.KVH + kv) * HS, a.row(), 1);
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t0 = a.first; t0 < T; t0 += R) {
                    const int n = std::min(R, T - t0), seen = t0 + n;
                    packed_gemm(n, seen, HS, rows + int64_t(t0) * a.row() + h * HS, a.row(), 1, kt,
                                HS, T, scores, T, false);
                    A inverse[R];
                    for (int i = 0; i < n; i++) {
                        A* score = scores + int64_t(i) * T;
                        S* probability = p + int64_t(i) * T; // times the sum, until o
                        hide(score, t0 + i + 1, seen);
                        const A largest = largest_of(seen, score);
                        const A sum = A(sum_of<A>(seen, [=](int64_t t) {
                            const A e = exp_below(scale * (score[t] - largest));
                            probability[t] = e;
                            return e;
                        }));
                        inverse[i] = A(1) / sum;
                        lse[(int64_t(b) * a.NH + h) * T + t0 + i] = scale * largest + std::log(sum);
                    }
                    packed_gemm(n, HS, seen, p, T, 1, v, T, HS, o, HS, false);
                    for (int i = 0; i < n; i++) {
                        S* row = out + (int64_t(b) * T + t0 + i) * a.q_width() + h * HS;
                        for (int d = 0; d < HS; d++) row[d] = inverse[i] * o[i * HS + d];
                    }
                }
        }
}

// dqkv (B, T, row) from dout (B, T, NH·HS); where there is a table, of what was rotated by it. With
// P the softmax and O the output, of a query: dP = dO Vᵀ; dS = P ⊙ (dP − dO · O); dQ = dS K /
// sqrt(HS); dK = dSᵀ Q / sqrt(HS); dV = Pᵀ dO.
template <class S>
void attention_backward(S* dqkv, const S* dout, const S* qkv, const Acc<S>* lse,
                        const CosSin<Acc<S>>* table, const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
    const int64_t tall = packed_size<S>(T, HS), wide = packed_size<S>(HS, T);
    const int64_t small = packed_size<S>(R, HS), scores = int64_t(R) * T, matrix = int64_t(T) * HS;
    const int64_t bytes =
        AttentionScratch::bytes<S>(tall) + 2 * AttentionScratch::bytes<S>(wide) +
        2 * AttentionScratch::bytes<S>(small) + 2 * AttentionScratch::bytes<S>(scores) +
        2 * AttentionScratch::bytes<A>(scores) + 2 * AttentionScratch::bytes<A>(matrix) +
        AttentionScratch::bytes<A>(R * HS);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            S* drows = dqkv + int64_t(b) * T * a.row();
            AttentionScratch scratch(bytes);
            S *k = scratch.take<S>(tall), *kt = scratch.take<S>(wide), *vt = scratch.take<S>(wide);
            S *q = scratch.take<S>(small), *dO = scratch.take<S>(small);
            S *p = scratch.take<S>(scores), *ds = scratch.take<S>(scores);
            A *s = scratch.take<A>(scores), *dp = scratch.take<A>(scores);
            A *dk = scratch.take<A>(matrix), *dv = scratch.take<A>(matrix);
            A* dq = scratch.take<A>(R * HS);
            pack(k, T, HS, rows + (a.NH + kv) * HS, a.row(), 1);
            pack(kt, HS, T, rows + (a.NH + kv) * HS, 1, a.row());
            pack(vt, HS, T, rows + (a.NH + a.KVH + kv) * HS, 1, a.row());
            auto store = [&](A* gradient, A factor, int t, int head) {
                S* out = drows + int64_t(t) * a.row() + head * HS;
                for (int d = 0; d < HS; d++) gradient[d] *= factor;
                if (table)
                    rotate(out, gradient, table + t * (HS / 2), A(-1), HS);
                else
                    for (int d = 0; d < HS; d++) out[d] = gradient[d];
            };
            std::fill(dk, dk + matrix, A(0));
            std::fill(dv, dv + matrix, A(0));
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t0 = 0; t0 < T; t0 += R) {
                    const int n = std::min(R, T - t0), seen = t0 + n;
                    const int64_t at = (int64_t(b) * T + t0) * a.q_width() + h * HS;
                    const S* query = rows + int64_t(t0) * a.row() + h * HS;
                    pack(q, n, HS, query, a.row(), 1);
                    pack(dO, n, HS, dout + at, a.q_width(), 1);
                    packed_gemm(n, seen, HS, query, a.row(), 1, kt, HS, T, s, T, false);
                    packed_gemm(n, seen, HS, dout + at, a.q_width(), 1, vt, HS, T, dp, T, false);
                    for (int i = 0; i < n; i++) {
                        A *score = s + int64_t(i) * T, *dprobability = dp + int64_t(i) * T;
                        S *probability = p + int64_t(i) * T, *dscore = ds + int64_t(i) * T;
                        hide(score, t0 + i + 1, seen);
                        const A normalizer = lse[(int64_t(b) * a.NH + h) * T + t0 + i];
                        // dO · O = Σ P ⊙ dP, which unlike O has not been rounded.
                        const A dot = A(sum_of<A>(seen, [=](int64_t t) {
                            score[t] = exp_below(scale * score[t] - normalizer);
                            probability[t] = score[t];
                            return score[t] * dprobability[t];
                        }));
#pragma omp simd
                        for (int t = 0; t < seen; t++)
                            dscore[t] = score[t] * (dprobability[t] - dot);
                    }
                    packed_gemm(n, HS, seen, ds, T, 1, k, T, HS, dq, HS, false);
                    packed_gemm(seen, HS, n, ds, 1, T, q, n, HS, dk, HS, true);
                    packed_gemm(seen, HS, n, p, 1, T, dO, n, HS, dv, HS, true);
                    for (int i = 0; i < n; i++) store(dq + i * HS, scale, t0 + i, h);
                }
            for (int t = 0; t < T; t++) {
                store(dk + t * HS, scale, t, a.NH + kv);
                S* out = drows + int64_t(t) * a.row() + (a.NH + a.KVH + kv) * HS;
                for (int d = 0; d < HS; d++) out[d] = dv[t * HS + d];
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
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        A x = A(h[i]);
        out[i] = x * sigmoid(c * (x + A(0.044715) * x * x * x));
    }
}

template <class S> void gelu_backward(S* dh, const S* da, const S* h, int64_t n) {
    using A = Acc<S>;
    const A c = A(2 * 0.79788456080286535588);
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        A x = A(h[i]), s = sigmoid(c * (x + A(0.044715) * x * x * x));
        A ds = s * (A(1) - s) * c * (A(1) + A(3 * 0.044715) * x * x);
        dh[i] = A(da[i]) * (s + x * ds);
    }
}

// SwiGLU (arXiv 2002.05202): a row of h is gate (H), up (H); a = silu(gate) ⊙ up.
template <class S> void swiglu_forward(S* out, const S* h, int64_t rows, int H) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S *gate = h + row * 2 * H, *up = gate + H;
#pragma omp simd
        for (int i = 0; i < H; i++) out[row * H + i] = silu(A(gate[i])) * A(up[i]);
    }
}

template <class S> void swiglu_backward(S* dh, const S* da, const S* h, int64_t rows, int H) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S *gate = h + row * 2 * H, *up = gate + H;
        S *dgate = dh + row * 2 * H, *dup = dgate + H;
#pragma omp simd
        for (int i = 0; i < H; i++) {
            A d = A(da[row * H + i]), g = A(gate[i]), s = sigmoid(g);
            dup[i] = d * g * s;
            dgate[i] = d * A(up[i]) * s * (A(1) + g * (A(1) - s));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Loss: −log softmax(logits)[target] of each row, 0 where the target is −1.

// losses (rows) of logits (rows, V). Writes loss_scale × the logits' gradient to dlogits if that is
// wanted; dlogits may be logits.
template <class S>
void cross_entropy(Acc<S>* losses, Acc<S>* logits, S* dlogits, const int* targets,
                   double loss_scale, int64_t rows, int V) {
    using A = Acc<S>;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        A* x = logits + row * V;
        S* dx = dlogits ? dlogits + row * V : nullptr;
        const int target = targets[row];
        if (target < 0) {
            losses[row] = 0;
            if (dx) std::fill(dx, dx + V, S(0));
            continue;
        }
        const A largest = largest_of(V, x);
        const A at_target = x[target];
        A sum;
        if (!dx) {
            sum = A(sum_of<A>(V, [=](int64_t i) { return exp_below(x[i] - largest); }));
        } else {
            sum = A(sum_of<A>(V, [=](int64_t i) { return x[i] = exp_below(x[i] - largest); }));
            const A factor = A(loss_scale) / sum;
            const A at = x[target] * factor - A(loss_scale);
#pragma omp simd
            for (int i = 0; i < V; i++) dx[i] = x[i] * factor;
            dx[target] = at;
        }
        losses[row] = (largest - at_target) + std::log(sum);
    }
}

// ---------------------------------------------------------------------------------------------
// The model

// What a pass computes and keeps, laid out once. What a backward pass does not need, or computes
// again, shares a slot.
template <class S> struct Activations {
    int64_t rows = 0; // B·T at most

    Array<Acc<S>> embedded;               // (rows, C), if junction 0 has a norm
    Slots<Array<Acc<S>>> residual;        // (rows, C) of each junction: r
    Slots<Array<S>> input;                // (rows, C) of each junction: u, where it is not r itself
    Slots<Array<S>> branch;               // (rows, C) of each junction but the first: b
    Slots<Array<JunctionStats<S>>> stats; // (rows) of each junction
    Slots<Array<S>> qkv;                  // (rows, (NH + 2·KVH)·HS) of each layer
    Array<Acc<S>> wide;     // (rows, (NH + 2·KVH)·HS): q, k and v before they are rounded
    Slots<Array<S>> qk_raw; // (rows, (NH + KVH)·HS), with OLMo 2's norm
    Slots<Array<NormStats<Acc<S>>>> qk_stats; // (rows, 2)
    Slots<Array<S>> attended;                 // (rows, NH·HS)
    Slots<Array<Acc<S>>> lse;                 // (rows, NH)
    Slots<Array<S>> hidden, activated;        // (rows, H or 2·H), (rows, H)

    int64_t logit_rows = 0, head_rows = 0; // rows of the head at once, forward and backward
    Array<Acc<S>> logits;                  // (logit_rows, V)
    Array<S> dlogits;                      // (head_rows, V)
    Array<Acc<S>> losses;                  // (rows)

    Array<Acc<S>> dresidual;  // (rows, C)
    Array<S> dinput, dbranch; // (rows, C)
    Array<S> dwide, dnarrow;  // gradients of qkv or hidden, and of attended or activated
    Array<Acc<S>> scratch;    // partial sums

    // Calls make(array, elements) for every array.
    template <class Make>
    void layout(const Config& c, int B, int T, const ModelOptions& o, const Make& make) {
        const int C = c.width, L = c.layers, K = 2 * L + 1, V = c.vocab_size;
        const bool train = o.training, layers = o.recompute == Recompute::layers;
        rows = int64_t(B) * T;
        auto junction_of = [&](int k) { return junction(c.scheme, L, k); };
        auto keep = [&](int) { return train && !layers; };
        auto keep_light = [&](int) { return train && o.recompute == Recompute::none; };
        const bool embed_norm = junction_of(0).out_norm;
        make(embedded, embed_norm ? rows * C : 0);
        // Of each layer its input is kept, from which the rest can be computed again.
        residual.layout(K, rows * C, make, [&](int k) { return k % 2 == 0 || keep(k); });
        input.layout(K, rows * C, make, keep_light,
                     [&](int k) { return junction_of(k).in_norm || !std::is_same_v<S, Acc<S>>; });
        // A layer computed again needs both its branches at once.
        branch.layout(
            layers ? 3 : K, rows * C, make,
            [&](int k) { return train && (layers || junction_of(k).keeps_branch()); },
            [&](int k) { return k > 0; });
        stats.layout(K, rows, make, [&](int) { return true; });
        // Generating text goes on from every layer's k and v.
        qkv.layout(L, rows * c.qkv_width(), make, [&](int l) { return !train || keep(l); });
        make(wide,
             !std::is_same_v<S, Acc<S>> && (c.rope() || c.qk_norm) ? rows * c.qkv_width() : 0);
        const int64_t qk = c.qk_norm ? rows : 0;
        qk_raw.layout(L, qk * (c.q_width() + c.kv_width()), make, keep);
        qk_stats.layout(L, qk * 2, make, keep);
        attended.layout(L, rows * c.q_width(), make, keep);
        lse.layout(L, rows * c.heads, make, keep);
        hidden.layout(L, rows * c.mlp_in_width(), make, keep);
        activated.layout(L, rows * c.mlp_width, make, keep_light);

        // In training so many rows at once that the head's matrix is seldom read, and its gradient
        // seldom added to. Equal parts, of a multiple of 32 rows.
        auto parts = [&](int64_t elements, int64_t all, int64_t least) {
            const int64_t most = std::max<int64_t>(least, elements / V / 32 * 32);
            const int64_t n = (all + most - 1) / most;
            return std::min(all, ((all + n - 1) / n + 31) / 32 * 32);
        };
        head_rows = parts(int64_t(1) << 26, rows, 256);
        logit_rows =
            train ? parts(int64_t(1) << 25, head_rows, 256) : parts(int64_t(1) << 24, rows, 256);
        const bool in_place = train && std::is_same_v<S, Acc<S>>;
        make(logits, in_place ? 0 : logit_rows * V);
        make(losses, rows);
        if (!train) return;
        make(dlogits, head_rows * V);
        make(dresidual, rows * C);
        make(dinput, rows * C);
        make(dbranch, rows * C);
        make(dwide, rows * std::max(c.qkv_width(), c.mlp_in_width()));
        make(dnarrow, rows * std::max(c.q_width(), c.mlp_width));
        make(scratch, row_chunks(rows) * std::max<int64_t>(7 * C + 1, c.q_width() + c.kv_width()));
    }
};

template <class S> struct CpuModel : Model {
    using A = Acc<S>;
    static constexpr bool exact = std::is_same_v<S, A>; // parameters need no master weights

    ModelOptions options;
    Array<S> parameters;
    Array<A> master; // of the parameters, if they are bf16 and it is wanted
    Array<A> gradients;
    Array<A> moment1, moment2;
    Array<bf16> rounded_moment1, rounded_moment2; // instead, with moments in bf16
    bool fresh = false; // the next backward pass writes the matrices' gradients and adds to none
    Activations<S> acts;
    Array<CosSin<A>> rope_table;
    std::vector<int> tokens; // of the last pass
    int B = 0, T = 0;        // of the last pass
    int first = 0;           // rows before this one were not computed anew in the last pass
    bool continues = false;  // whether the next pass may go on where the last one ended
    int64_t held = 0;        // bytes

    // What stop() returns at junction k, null for its argument; only gradient checks set it.
    std::vector<const A*> stopped;

    CpuModel(const Config& c, int max_B, int max_T, const ModelOptions& o) : Model(c), options(o) {
        auto make = [&](auto& array, int64_t n) {
            array = std::remove_reference_t<decltype(array)>(n);
            held += n * int64_t(sizeof(array[0]));
        };
        make(parameters, registry.size);
        if (o.training) {
            const bool rounded = o.moments == DType::bf16;
            make(master, exact || !o.master_weights ? 0 : registry.size);
            make(gradients, registry.size);
            for (Array<A>* array : {&moment1, &moment2}) make(*array, rounded ? 0 : registry.size);
            for (Array<bf16>* array : {&rounded_moment1, &rounded_moment2})
                make(*array, rounded ? registry.size : 0);
        }
        acts.layout(c, max_B, max_T, o, make);
        stopped.resize(2 * c.layers + 1);
        if (!c.rope()) return;
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
    std::string dtype() const override {
        return sizeof(S) == 8 ? "float64" : sizeof(S) == 4 ? "float32" : "bf16";
    }
    int64_t bytes() const override { return held; }

    // Tensors of the last pass, from row `first` on. k counts junctions from 0, l layers from 0.
    int64_t rows() const { return int64_t(B) * T - first; }
    A* residual(int k) { return acts.residual[k] + int64_t(first) * config.width; }
    S* input(int k) { // u: what the sublayer after junction k sees
        if constexpr (exact)
            if (acts.input.slot[k] < 0) return residual(k);
        return acts.input[k] + int64_t(first) * config.width;
    }
    S* branch(int k) {
        const bool layers = options.recompute == Recompute::layers;
        return acts.branch[layers ? 2 - k % 2 : k] + int64_t(first) * config.width;
    }
    A* embedded() {
        return acts.embedded.size ? acts.embedded + int64_t(first) * config.width : residual(0);
    }
    A* before(int k) { return k == 0 ? embedded() : residual(k - 1); } // r_prev
    JunctionStats<S>* stats(int k) { return acts.stats[k] + first; }
    S* hidden(int l) { return acts.hidden[l] + int64_t(first) * config.mlp_in_width(); }
    S* activated(int l) { return acts.activated[l] + int64_t(first) * config.mlp_width; }

    // Those of attention, from row 0 on.
    S* qkv(int l) { return acts.qkv[l]; }
    S* qk_raw(int l) { return acts.qk_raw[l]; }
    NormStats<A>* qk_stats(int l) { return acts.qk_stats[l]; }
    S* attended(int l) { return acts.attended[l]; }
    A* lse(int l) { return acts.lse[l]; }
    AttentionShape attention() const {
        return {B, T, config.heads, config.kv_heads, config.head_size, first};
    }
    A* logits() {
        if constexpr (exact)
            if (acts.logits.size == 0) return acts.dlogits;
        return acts.logits;
    }
    const S* weight(int64_t offset) const { return offset < 0 ? nullptr : parameters + offset; }
    A* gradient(int64_t offset) const { return offset < 0 ? nullptr : gradients + offset; }

    // Books the time until the end of the scope. bytes: of activations and weights, each read or
    // written once.
    Timed timed(const char* group, const char* name, double bytes, double flops = 0) const {
        return Timed(profile, group, name, flops, bytes);
    }
    double moved(double per_row) const { return double(rows()) * per_row * sizeof(S); }

    template <class Out>
    void matrix_forward(const char* name, Out* out, const S* in, int64_t w, int64_t bias, int C,
                        int OC) {
        Timed t = timed_matrix("forward", name, C, OC, sizeof(S));
        if constexpr (std::is_same_v<Out, S>) {
            linear_forward(out, in, weight(w), weight(bias), rows(), C, OC);
        } else {
            std::vector<Out> sum_bias;
            if (bias >= 0) sum_bias.assign(weight(bias), weight(bias) + OC);
            linear_forward(out, in, weight(w), bias < 0 ? nullptr : sum_bias.data(), rows(), C, OC);
        }
    }
    void matrix_backward(const char* name, S* din, const S* dout, const S* in, int64_t w,
                         int64_t bias, int C, int OC) {
        {
            Timed t = timed_matrix("input gradient", name, C, OC, sizeof(S));
            linear_backward_input(din, dout, weight(w), rows(), C, OC);
        }
        Timed t = timed_matrix("weight gradient", name, C, OC, fresh ? sizeof(A) : 2 * sizeof(A));
        linear_backward_weight(gradient(w), gradient(bias), dout, in, rows(), C, OC, !fresh);
    }
    Timed timed_matrix(const char* group, const char* name, double C, double OC,
                       double matrix_bytes) const {
        return timed(group, name, moved(C + OC) + C * OC * matrix_bytes,
                     2 * double(rows()) * C * OC);
    }

    // Positions before `from` keep what the last pass left there.
    void forward(const int* inputs, int b, int t, int from = 0) {
        check_tokens(inputs, b, t);
        first = from;
        continues = false;
        tokens.assign(inputs, inputs + int64_t(B) * T);
        {
            Timed t = timed("forward", "embedding", moved(2 * config.width));
            embedding_forward(embedded(), inputs + first, weight(registry.token_embedding),
                              weight(registry.position_embedding), first, rows(), T, config.width);
        }
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
        std::fill(acts.dresidual + 0, acts.dresidual + rows() * config.width, A(0));
        for (int l = config.layers - 1; l >= 0; l--) {
            if (options.recompute == Recompute::layers) layer_again(l);
            join_backward(2 * l + 2);
            mlp_sublayer_backward(l);
            join_backward(2 * l + 1);
            attention_sublayer_backward(l);
        }
        join_backward(0);
        Timed t = timed("backward", "embedding", moved(config.width) * 3 * sizeof(A) / sizeof(S));
        embedding_backward(gradient(registry.token_embedding),
                           gradient(registry.position_embedding), tokens.data(),
                           (const A*)acts.dresidual, B, T, config.width);
    }

    void join_forward(int k) {
        const Junction j = junction(config.scheme, config.layers, k);
        Timed t =
            timed("forward", "junctions", moved(config.width * (1.0 + 2 * j.branch + j.in_norm)));
        junction_forward(j, config.norm, config.norm_eps, before(k), k == 0 ? nullptr : branch(k),
                         JunctionPointers<const S>(parameters, registry.junctions[k]), residual(k),
                         acts.input.slot[k] < 0 ? nullptr : input(k), stats(k), stopped[k], rows(),
                         config.width);
    }

    void join_backward(int k) {
        const Junction j = junction(config.scheme, config.layers, k);
        Timed t = timed("backward", "junctions",
                        moved(config.width * (2.0 + j.branch * (1 + 2 * j.keeps_branch()) +
                                              2.0 * sizeof(A) / sizeof(S))));
        junction_backward(j, config.norm, before(k), k == 0 ? nullptr : branch(k), residual(k),
                          JunctionPointers<const S>(parameters, registry.junctions[k]), stats(k),
                          (const S*)acts.dinput, (A*)acts.dresidual, (S*)acts.dbranch,
                          JunctionPointers<A>(gradients, registry.junctions[k]), (A*)acts.scratch,
                          rows(), config.width);
    }

    // u of junction k once more, from r and its statistics, if it was not kept.
    void input_again(int k) {
        if (acts.input.slot[k] < 0 || acts.input.keeps(k)) return;
        Timed t = timed("again", "junctions", moved(2 * config.width));
        const Junction j = junction(config.scheme, config.layers, k);
        const JunctionPointers<const S> p(parameters, registry.junctions[k]);
        const int C = config.width;
#pragma omp parallel for
        for (int64_t row = 0; row < rows(); row++) {
            const A* r = residual(k) + row * C;
            S* u = input(k) + row * C;
            if (j.in_norm)
                norm_row_forward(stats(k)[row].in, r, p.in_weight, p.in_bias, A(j.in_scale), u, C);
            else
                for (int i = 0; i < C; i++) u[i] = r[i];
        }
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
        const LayerParams& p = registry.layers[l];
        const int C = config.width, W = config.qkv_width();
        S* out = qkv(l) + int64_t(first) * W;
        if (!config.rope() && !config.qk_norm) {
            matrix_forward("qkv", out, input(2 * l), p.qkv, p.qkv_bias, C, W);
        } else if constexpr (exact) {
            matrix_forward("qkv", out, input(2 * l), p.qkv, p.qkv_bias, C, W);
            qk_forward(l, out);
        } else { // rounded once, behind norm and rotation
            matrix_forward("qkv", (A*)acts.wide, input(2 * l), p.qkv, p.qkv_bias, C, W);
            qk_forward(l, (A*)acts.wide);
        }
        {
            Timed t = timed("forward", "attention", moved(config.qkv_width() + config.q_width()),
                            attention_flops(2));
            attention_forward(attended(l), lse(l), qkv(l), attention());
        }
        matrix_forward("attention out", branch(2 * l + 1), attended(l) + first * config.q_width(),
                       p.attn_out, p.attn_out_bias, config.q_width(), config.width);
    }
    template <class X> void qk_forward(int l, const X* in) {
        const LayerParams& p = registry.layers[l];
        Timed t = timed("forward", "q and k",
                        moved(config.qkv_width() * (1 + sizeof(X) / double(sizeof(S)))));
        lns::qk_forward(qkv(l), in, config.qk_norm ? qk_raw(l) : nullptr, qk_stats(l),
                        weight(p.q_norm), weight(p.k_norm), config.norm_eps, cos_sin(),
                        attention());
    }
    const CosSin<A>* cos_sin() const { return config.rope() ? rope_table + 0 : nullptr; }

    // Of so many products of queries with what they see, half of all: T²/2 of each head.
    double attention_flops(int products) const {
        return double(products) * double(rows()) * T * config.q_width();
    }

    // From dbranch to dinput.
    void attention_sublayer_backward(int l) {
        const LayerParams& p = registry.layers[l];
        S *dattended = acts.dnarrow, *dqkv = acts.dwide;
        input_again(2 * l);
        matrix_backward("attention out", dattended, (const S*)acts.dbranch, attended(l), p.attn_out,
                        p.attn_out_bias, config.q_width(), config.width);
        {
            Timed t =
                timed("backward", "attention",
                      moved(2.0 * config.qkv_width() + 2.0 * config.q_width()), attention_flops(5));
            attention_backward(dqkv, dattended, qkv(l), lse(l), cos_sin(), attention());
        }
        if (config.qk_norm) {
            Timed t = timed("backward", "q and k norm", moved(3.0 * config.qkv_width()));
            qk_norm_backward(dqkv, qk_raw(l), qk_stats(l), weight(p.q_norm), weight(p.k_norm),
                             gradient(p.q_norm), gradient(p.k_norm), (A*)acts.scratch, attention());
        }
        matrix_backward("qkv", acts.dinput, dqkv, input(2 * l), p.qkv, p.qkv_bias, config.width,
                        config.qkv_width());
    }

    // branch(2l + 2) = MLP of input(2l + 1)
    void mlp_sublayer_forward(int l) {
        const LayerParams& p = registry.layers[l];
        matrix_forward("MLP in", hidden(l), input(2 * l + 1), p.mlp_in, p.mlp_in_bias, config.width,
                       config.mlp_in_width());
        activate(l, "forward");
        matrix_forward("MLP out", branch(2 * l + 2), activated(l), p.mlp_out, p.mlp_out_bias,
                       config.mlp_width, config.width);
    }

    void activate(int l, const char* group) {
        const int H = config.mlp_width;
        Timed t =
            timed(group, config.gated_mlp() ? "swiglu" : "gelu", moved(config.mlp_in_width() + H));
        if (config.gated_mlp())
            swiglu_forward(activated(l), hidden(l), rows(), H);
        else
            gelu_forward(activated(l), hidden(l), rows() * H);
    }

    void mlp_sublayer_backward(int l) {
        const LayerParams& p = registry.layers[l];
        const int H = config.mlp_width;
        S *dactivated = acts.dnarrow, *dhidden = acts.dwide;
        if (!acts.activated.keeps(l) && options.recompute == Recompute::activations)
            activate(l, "again");
        matrix_backward("MLP out", dactivated, (const S*)acts.dbranch, activated(l), p.mlp_out,
                        p.mlp_out_bias, H, config.width);
        {
            Timed t = timed("backward", config.gated_mlp() ? "swiglu" : "gelu",
                            moved(2.0 * config.mlp_in_width() + H));
            if (config.gated_mlp())
                swiglu_backward(dhidden, dactivated, hidden(l), rows(), H);
            else
                gelu_backward(dhidden, dactivated, hidden(l), rows() * H);
        }
        input_again(2 * l + 1);
        matrix_backward("MLP in", acts.dinput, dhidden, input(2 * l + 1), p.mlp_in, p.mlp_in_bias,
                        config.width, config.mlp_in_width());
    }

    // The head and its loss, some rows at a time, so that (rows, V) logits never exist; from a row
    // `begin` on, n rows. Writes loss_scale × the logits' gradient to dlogits if that is wanted.
    void head_forward(const int* targets, S* dlogits, double loss_scale, int64_t begin, int64_t n) {
        const int V = config.vocab_size, C = config.width;
        for (int64_t row = begin; row < begin + n; row += acts.logit_rows) {
            const int64_t part = std::min(acts.logit_rows, begin + n - row);
            S* dpart = dlogits ? dlogits + (row - begin) * V : nullptr;
            A* x = logits();
            if constexpr (exact)
                if (dpart) x = dpart;
            {
                Timed t = timed("forward", "head",
                                double(part) * (C * sizeof(S) + V * sizeof(A)) +
                                    double(V) * C * sizeof(S),
                                2.0 * double(part) * C * V);
                linear_forward(x, input(2 * config.layers) + row * C, weight(registry.head),
                               (const A*)nullptr, part, C, V);
            }
            Timed t = timed("forward", "loss", double(part) * V * (sizeof(A) + sizeof(S)));
            cross_entropy(acts.losses + row, x, dpart, targets + row, loss_scale, part, V);
        }
    }

    double sum_of_losses() const {
        double sum = 0;
        for (int64_t row = 0; row < rows(); row++) sum += double(acts.losses[row]);
        return sum;
    }

    // With the gradients, of the final norm's output in dinput.
    double head(const int* targets, double loss_scale) {
        const int V = config.vocab_size, C = config.width;
        S* dlogits = acts.dlogits;
        for (int64_t row = 0; row < rows(); row += acts.head_rows) {
            const int64_t n = std::min(acts.head_rows, rows() - row);
            head_forward(targets, dlogits, loss_scale, row, n);
            const bool add = !fresh || row > 0;
            const double bytes = double(n) * (C + V) * sizeof(S);
            const double flops = 2.0 * double(n) * C * V;
            {
                Timed t = timed("input gradient", "head", bytes + double(V) * C * sizeof(S), flops);
                linear_backward_input(acts.dinput + row * C, dlogits, weight(registry.head), n, C,
                                      V);
            }
            Timed t = timed("weight gradient", "head",
                            bytes + (1.0 + add) * double(V) * C * sizeof(A), flops);
            linear_backward_weight(gradient(registry.head), (A*)nullptr, dlogits,
                                   input(2 * config.layers) + row * C, n, C, V, add);
        }
        return sum_of_losses();
    }

    double loss(const int* inputs, const int* targets, int b, int t) override {
        forward(inputs, b, t);
        check_targets(targets);
        head_forward(targets, nullptr, 0, 0, rows());
        return sum_of_losses();
    }

    double loss_and_gradients(const int* inputs, const int* targets, int b, int t,
                              double loss_scale) override {
        if (!options.training) fail("this model was made without gradients");
        forward(inputs, b, t);
        check_targets(targets);
        const double sum = head(targets, loss_scale);
        backward();
        fresh = false;
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
        const int64_t step = last_only ? 1 : acts.logit_rows;
        for (int64_t row = last_only ? T - 1 - first : 0; row < rows();
             row += last_only ? T : step) {
            const int64_t n = std::min(step, rows() - row);
            A* logits = this->logits();
            linear_forward(logits, final_input + row * C, weight(registry.head), (const A*)nullptr,
                           n, C, V);
            for (int64_t i = 0; i < n * V; i++) *out++ = float(logits[i]);
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
        for (const Param& p : registry.params) {
            lns::initialize(p, seed, parameters + p.offset);
            if (master.size) lns::initialize(p, seed, master + p.offset);
        }
        for (Array<A>* array : {&gradients, &moment1, &moment2})
            std::fill(*array + 0, *array + array->size, A(0));
        for (Array<bf16>* array : {&rounded_moment1, &rounded_moment2})
            std::fill(*array + 0, *array + array->size, bf16(0));
    }

    void set_parameter(int64_t i, A value) {
        parameters[i] = value;
        if (master.size) master[i] = value;
    }

    // Matrices that a backward pass multiplies get their gradients written, not added to, by the
    // first pass: only the others are set to 0 here.
    void zero_gradients() override {
        Timed t = timed("update", "zero gradients", 0);
        fresh = true;
        each_param([&](const Param& p) { return !written_first(p); },
                   [&](int64_t i, const Param&) { gradients[i] = 0; });
    }
    bool written_first(const Param& p) const {
        if (p.offset == registry.head) return true;
        return p.shape.size() == 2 && p.offset != registry.token_embedding &&
               p.offset != registry.position_embedding;
    }
    // For whoever looks at the gradients before a pass has written them.
    void write_fresh_zeros() {
        if (!fresh || gradients.size == 0) return;
        each_param([&](const Param& p) { return written_first(p); },
                   [&](int64_t i, const Param&) { gradients[i] = 0; });
        fresh = false;
    }
    // f(i, p) for every number i of the parameters p that are wanted, all threads at it.
    template <class Wanted, class F> void each_param(const Wanted& wanted, const F& f) {
#pragma omp parallel
        for (const Param& p : registry.params) {
            if (!wanted(p)) continue;
            const int64_t end = p.offset + p.size();
#pragma omp for nowait schedule(static)
            for (int64_t i = p.offset; i < end; i++) f(i, p);
        }
    }

    double gradient_norm() override {
        Timed t = timed("update", "gradient norm", double(registry.size) * sizeof(A));
        write_fresh_zeros();
        return std::sqrt(sum_of_squares(gradients, registry.size));
    }
    static double sum_of_squares(const A* g, int64_t size) {
        const int64_t block = 1 << 12, blocks = (size + block - 1) / block;
        std::vector<double> sums(blocks);
#pragma omp parallel for
        for (int64_t i = 0; i < blocks; i++) {
            sums[i] = sum_of<A>(std::min(block, size - i * block),
                                [x = g + i * block](int64_t at) { return x[at] * x[at]; });
        }
        double sum = 0;
        for (double s : sums) sum += s;
        return sum;
    }

    // m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
    // w ← w − lr · (m̂ / (√v̂ + eps) + decay · w), with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).
    void update(const AdamW& o) override {
        continues = false;
        write_fresh_zeros();
        if (options.moments == DType::bf16)
            update(o, (bf16*)rounded_moment1, (bf16*)rounded_moment2);
        else
            update(o, (A*)moment1, (A*)moment2);
    }
    template <class M> void update(const AdamW& o, M* moment1, M* moment2) {
        const bool stochastic = options.stochastic_rounding && (!exact || !std::is_same_v<M, A>);
        Timed t = timed("update", "AdamW",
                        double(registry.size) *
                            (sizeof(A) + 4 * sizeof(M) +
                             (master.size ? 2 * sizeof(A) + sizeof(S) : 2 * sizeof(S))));
        if (master.size)
            stochastic ? update<true>(o, (A*)master, moment1, moment2)
                       : update<false>(o, (A*)master, moment1, moment2);
        else
            stochastic ? update<true>(o, (S*)parameters, moment1, moment2)
                       : update<false>(o, (S*)parameters, moment1, moment2);
    }
    // One pass over memory. weights: the master weights, or the parameters themselves.
    template <bool stochastic, class W, class M>
    void update(const AdamW& o, W* weights, M* moment1, M* moment2) {
        const A beta1 = A(o.beta1), beta2 = A(o.beta2), eps = A(o.eps), lr = A(o.lr);
        const A correction1 = A(1 / (1 - std::pow(o.beta1, double(o.step))));
        const A correction2 = A(1 / (1 - std::pow(o.beta2, double(o.step))));
        const A scale = A(o.grad_scale);
        const A* gradients = this->gradients;
        S* copy = master.size ? parameters + 0 : nullptr;
        auto store = [](auto& x, A value, [[maybe_unused]] uint32_t random) {
            using X = std::remove_reference_t<decltype(x)>;
            if constexpr (stochastic && std::is_same_v<X, bf16>)
                x.bits = round_stochastically(float(value), random);
            else
                x = value;
        };
#pragma omp parallel
        for (const Param& p : registry.params) {
            const A decay = p.decay ? A(o.weight_decay) : A(0);
            const int64_t end = p.offset + p.size();
#pragma omp for simd nowait schedule(static)
            for (int64_t i = p.offset; i < end; i++) {
                // 16 random bits for each of the three, of (step, i).
                uint32_t random = 0, more = 0;
                if constexpr (stochastic) {
                    random = mix_bits(uint32_t(i) * 0x9E3779B9u + uint32_t(o.step));
                    more = mix_bits(random + uint32_t(i >> 32));
                }
                const A g = scale * gradients[i];
                const A m = beta1 * A(moment1[i]) + (A(1) - beta1) * g;
                const A v = beta2 * A(moment2[i]) + (A(1) - beta2) * g * g;
                const A w = A(weights[i]);
                const A step = m * correction1 / (std::sqrt(v * correction2) + eps);
                const A updated = w - lr * (step + decay * w);
                store(moment1[i], m, random), store(moment2[i], v, random >> 16);
                store(weights[i], updated, more);
                if (copy) copy[i] = updated;
            }
        }
    }

    void read(Buffer buffer, const Param& p, float* out) override {
        if (buffer == Buffer::gradients) write_fresh_zeros();
        auto copy = [&](const auto& from) {
            for (int64_t i = 0; i < p.size(); i++) out[i] = float(from[p.offset + i]);
        };
        const bool rounded = options.moments == DType::bf16;
        if (buffer == Buffer::parameters)
            master.size ? copy(master) : copy(parameters);
        else if (buffer == Buffer::gradients)
            copy(gradients);
        else if (buffer == Buffer::moment1)
            rounded ? copy(rounded_moment1) : copy(moment1);
        else
            rounded ? copy(rounded_moment2) : copy(moment2);
    }

    void write(Buffer buffer, const Param& p, const float* values) override {
        continues = false;
        auto copy = [&](auto& to) {
            using X = std::remove_reference_t<decltype(to[0])>;
            for (int64_t i = 0; i < p.size(); i++) to[p.offset + i] = X(values[i]);
        };
        const bool rounded = options.moments == DType::bf16;
        if (buffer == Buffer::parameters)
            for (int64_t i = 0; i < p.size(); i++) set_parameter(p.offset + i, A(values[i]));
        else if (buffer == Buffer::gradients)
            write_fresh_zeros(), copy(gradients);
        else if (buffer == Buffer::moment1)
            rounded ? copy(rounded_moment1) : copy(moment1);
        else
            rounded ? copy(rounded_moment2) : copy(moment2);
    }

    float* host_gradients() override {
        write_fresh_zeros();
        if constexpr (std::is_same_v<A, float>)
            return gradients;
        else
            return nullptr;
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

    void join_part_forward(const Junction& j, int k, const A* r_prev, S* u) {
        junction_forward(j, config.norm, config.norm_eps, r_prev,
                         j.branch ? branch(k) : static_cast<const S*>(nullptr),
                         JunctionPointers<const S>(parameters, registry.junctions[k]), residual(k),
                         u, stats(k), stopped[k], rows(), config.width);
    }
    void join_part_backward(const Junction& j, int k, const A* r_prev) {
        junction_backward(j, config.norm, r_prev, j.branch ? branch(k) : nullptr, residual(k),
                          JunctionPointers<const S>(parameters, registry.junctions[k]), stats(k),
                          static_cast<const S*>(acts.dinput), static_cast<A*>(acts.dresidual),
                          static_cast<S*>(acts.dbranch),
                          JunctionPointers<A>(gradients, registry.junctions[k]),
                          static_cast<A*>(acts.scratch), rows(), config.width);
    }
    // r into the place of junction k, and u from it.
    void enter(int k) {
        if (at != k) std::copy_n(residual(at), rows() * config.width, residual(k));
        at = k;
        join_part_forward(way_in(junction(config.scheme, config.layers, k)), k, residual(k),
                          acts.input.slot[k] < 0 ? nullptr : input(k));
    }
    void enter_backward(int k) {
        Junction j = way_in(junction(config.scheme, config.layers, k));
        join_part_backward(j, k, residual(k));
    }
    void check_probes() const {
        if (!options.training || options.recompute != Recompute::none) no_layers();
    }

    void embed(const int* inputs, int b, int t) override {
        check_probes();
        check_tokens(inputs, b, t);
        first = 0, continues = false, at = 0;
        tokens.assign(inputs, inputs + int64_t(B) * T);
        embedding_forward(embedded(), inputs, weight(registry.token_embedding),
                          weight(registry.position_embedding), first, rows(), T, config.width);
        join_part_forward(way_out(junction(config.scheme, config.layers, 0)), 0, embedded(),
                          nullptr);
    }
    void run_layer(int l) override {
        enter(2 * l);
        attention_sublayer_forward(l);
        join_forward(2 * l + 1);
        mlp_sublayer_forward(l);
        at = 2 * l + 2;
        join_part_forward(way_out(junction(config.scheme, config.layers, at)), at,
                          residual(2 * l + 1), nullptr);
    }
    double finish(const int* targets) override {
        check_targets(targets);
        enter(2 * config.layers);
        head_forward(targets, nullptr, 0, 0, rows());
        return sum_of_losses();
    }
    void finish_backward(const int* targets, double loss_scale) override {
        check_targets(targets);
        enter(2 * config.layers);
        write_fresh_zeros();
        head(targets, loss_scale);
        std::fill_n(acts.dresidual + 0, rows() * config.width, A(0));
        enter_backward(2 * config.layers);
    }
    void run_layer_backward(int l) override {
        write_fresh_zeros();
        std::fill_n(acts.dinput + 0, rows() * config.width, S(0));
        const Junction out = junction(config.scheme, config.layers, 2 * l + 2);
        join_part_backward(way_out(out), 2 * l + 2, residual(2 * l + 1));
        mlp_sublayer_backward(l);
        join_backward(2 * l + 1);
        attention_sublayer_backward(l);
        enter_backward(2 * l);
    }
    // f(x): x(i) is number i of a stream.
    template <class F> void with_stream(Stream stream, const F& f) {
        auto plain = [&](const auto* x) { f([x](int64_t i) { return float(x[i]); }); };
        switch (stream) {
        case Stream::residual:
            return plain(residual(at));
        case Stream::attention: {
            if (branch(at - 1) != branch(at)) return plain(branch(at - 1));
            // They share a slot, where no junction needs b again: it was r ← skip · r + b.
            const A skip = A(junction(config.scheme, config.layers, at - 1).skip);
            const A *after = residual(at - 1), *before = residual(at - 2);
            return f([=](int64_t i) { return float(after[i] - skip * before[i]); });
        }
        case Stream::mlp:
            return plain(branch(at));
        case Stream::gradient:
            return plain(acts.dresidual + 0);
        }
    }
    void read(Stream stream, float* out) override {
        with_stream(stream, [&](const auto& x) {
#pragma omp parallel for
            for (int64_t i = 0; i < rows() * config.width; i++) out[i] = x(i);
        });
    }
    A* writable(Stream stream) {
        if (stream != Stream::residual && stream != Stream::gradient)
            fail("of the streams between layers r and its gradient alone can be written");
        return stream == Stream::residual ? residual(at) : acts.dresidual + 0;
    }
    void write(Stream stream, const float* values) override {
        A* to = writable(stream);
#pragma omp parallel for
        for (int64_t i = 0; i < rows() * config.width; i++) to[i] = A(values[i]);
    }
    void read_rows(Stream stream, const std::vector<int64_t>& rows, float* out) override {
        const int C = config.width;
        const A* from = writable(stream);
        for (int64_t row : rows)
            for (int i = 0; i < C; i++) *out++ = float(from[row * C + i]);
    }
    void write_rows(Stream stream, const std::vector<int64_t>& to, const float* values) override {
        const int C = config.width;
        A* x = writable(stream);
        std::fill_n(x, rows() * C, A(0));
        for (int64_t row : to)
            for (int i = 0; i < C; i++) x[row * C + i] = A(*values++);
    }
    void rewind(int l) override { at = 2 * l; }

    std::vector<Moments> row_moments(Stream stream) override {
        std::vector<Moments> moments(rows());
        const int C = config.width;
        with_stream(stream, [&](const auto& x) {
#pragma omp parallel for
            for (int64_t row = 0; row < rows(); row++) {
                double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < C; i++) sum += double(x(row * C + i));
                const double mean = sum / C;
#pragma omp simd reduction(+ : square)
                for (int i = 0; i < C; i++) {
                    const double d = double(x(row * C + i)) - mean;
                    square += d * d;
                }
                moments[row] = {double(C), mean, square};
            }
        });
        return moments;
    }
    std::vector<double> row_chords(int l, int m) override {
        std::vector<double> chords(rows());
        const int C = config.width;
#pragma omp parallel for
        for (int64_t row = 0; row < rows(); row++) {
            const A *a = residual(2 * l) + row * C, *b = residual(2 * m) + row * C;
            double aa = 0, bb = 0, difference = 0;
#pragma omp simd reduction(+ : aa, bb)
            for (int i = 0; i < C; i++) {
                const double x = double(float(a[i])), y = double(float(b[i]));
                aa += x * x, bb += y * y;
            }
            const double ratio = bb > 0 ? std::sqrt(aa / bb) : 0;
#pragma omp simd reduction(+ : difference)
            for (int i = 0; i < C; i++) {
                const double d = double(float(a[i])) - ratio * double(float(b[i]));
                difference += d * d;
            }
            chords[row] = aa > 0 ? difference / aa : bb > 0;
        }
        return chords;
    }
    std::vector<double> gradient_squares() override {
        write_fresh_zeros();
        std::vector<double> squares;
        for (const Param& p : registry.params)
            squares.push_back(sum_of_squares(gradients + p.offset, p.size()));
        return squares;
    }

    std::string first_nonfinite() override {
        auto bad = [](const auto* x, int64_t n) {
            for (int64_t i = 0; i < n; i++)
                if (!std::isfinite(A(x[i]))) return true;
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
                if (k > 0 && k % 2 == 1) {
                    if (acts.qkv.keeps(l) && bad(qkv(l), n * config.qkv_width()))
                        return layer + "q, k and v";
                    if (acts.attended.keeps(l) && bad(attended(l), n * config.q_width()))
                        return layer + "attention";
                }
                if (k > 0 && k % 2 == 0) {
                    if (acts.hidden.keeps(l) && bad(hidden(l), n * config.mlp_in_width()))
                        return layer + "MLP input";
                    if (acts.activated.keeps(l) && bad(activated(l), n * config.mlp_width))
                        return layer + "MLP activation";
                }
                if (acts.residual.keeps(k) && bad(residual(k), n * C))
                    return k == 0 ? "the residual stream after the embedding"
                                  : "the residual stream after " + layer +
                                        (k % 2 == 1 ? "attention" : "MLP");
                if (acts.input.keeps(k) && bad(input(k), n * C))
                    return k == 2 * config.layers
                               ? "the final norm's output"
                               : "the norm before layer " + std::to_string(k / 2 + 1) + "'s " +
                                     (k % 2 == 0 ? "attention" : "MLP");
            }
            if (bad((const A*)acts.losses, n)) return "the loss";
        }
        if (options.training && !fresh)
            for (auto p = registry.params.rbegin(); p != registry.params.rend(); ++p)
                if (bad(gradients + p->offset, p->size())) return "the gradient of " + p->name;
        return "";
    }
};

std::unique_ptr<Model> make_cpu_model(const Config& config, int B, int T,
                                      const ModelOptions& options) {
    if (options.dtype == DType::bf16)
        return std::make_unique<CpuModel<bf16>>(config, B, T, options);
    return std::make_unique<CpuModel<float>>(config, B, T, options);
}

template <class S>
MemoryPlan plan_memory(const Config& config, int B, int T, const ModelOptions& o) {
    MemoryPlan plan;
    const int64_t n = make_registry(config).size;
    plan.parameters = n * int64_t(sizeof(S));
    if (o.training) {
        plan.gradients = n * int64_t(sizeof(Acc<S>));
        plan.optimizer = 2 * n * int64_t(o.moments == DType::bf16 ? sizeof(bf16) : sizeof(Acc<S>));
        if (sizeof(S) < sizeof(Acc<S>) && o.master_weights)
            plan.optimizer += n * int64_t(sizeof(Acc<S>));
    }
    Activations<S> acts;
    acts.layout(config, B, T, o, [&](auto& array, int64_t elements) {
        plan.activations += elements * int64_t(sizeof(array[0]));
    });
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
#else
    const int threads = 1;
#endif
    const Registry registry = make_registry(config);
    for (const Param& p : registry.params) {
        if (p.shape.size() != 2) continue;
        const int64_t rows = p.offset == registry.head ? acts.head_rows : acts.rows;
        for (int k = 0; k < 2; k++) // forward, and the input's gradient
            plan.scratch = std::max(
                plan.scratch, gemm_scratch(rows, p.shape[1 - k], p.shape[k], sizeof(S), threads));
    }
    return plan;
}

MemoryPlan plan_cpu_memory(const Config& config, int B, int T, const ModelOptions& options) {
    return options.dtype == DType::bf16 ? plan_memory<bf16>(config, B, T, options)
                                        : plan_memory<float>(config, B, T, options);
}

} // namespace lns

#ifndef TESTING
#include "gpt/run/program.h"

int main(int argc, char** argv) { return lns::run_program(argc, argv); }
#endif
