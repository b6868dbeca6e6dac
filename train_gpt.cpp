// lns.cpp: trains GPT and LLaMA language models under every norm scheme of "The Curse of Depth in
// Large Language Models" (arXiv 2502.05795). This file is the model on the CPU, in the order in
// which data flows, each backward directly below its forward; then the training: a step,
// evaluation, the loop, main. What surrounds them (flags, data, checkpoints, other commands) is in
// gpt/, and knows the model only by its interface, gpt/model/model.h.
//
// Sizes: B sequences of T tokens; V vocabulary; C width; L layers; NH heads of q and KVH of k and
// v, of HS channels each; H width of the MLP. Arrays are row-major; a row is a token.
// S is the scalar of stored tensors (double, float or bf16), Acc<S> the accumulator (double, float,
// float). The residual stream and the gradients of parameters are sums over many layers or tokens,
// so they are stored as Acc<S>. A backward function writes the gradients of activations and adds to
// those of parameters. The order of sums does not depend on the number of threads (oneDNN's own
// sums aside).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gpt/base/clock.h"  // defines: now
#include "gpt/base/random.h" // defines: mix_bits
#include "gpt/cpu/arrays.h"  // defines: Acc, Array, thread_scratch, sum_of, add_rows, row_chunks
#include "gpt/cpu/bf16.h"
#include "gpt/cpu/costs.h"         // defines: Costs, of each part of a pass
#include "gpt/cpu/exp.h"           // defines: exp_below, sigmoid, silu, dsilu, tanh_
#include "gpt/cpu/gemm.h"          // defines: gemm, pack, packed_gemm
#include "gpt/cpu/sources.h"       // defines: SourceArguments, sources_forward, sources_backward
#include "gpt/cpu/streams.h"       // defines: StreamArguments, streams_forward, streams_backward
#include "gpt/model/activations.h" // defines: PassTensors, which of them are kept
#include "gpt/model/layers.h"      // defines: JunctionPointers
#include "gpt/model/model.h"
#include "gpt/model/muon.h"   // defines: quintics, muon_scale
#include "gpt/run/program.h"  // defines: run_program, run_command, read_command_line
#include "gpt/run/training.h" // defines: Run, set_up, begin_step, end_step, log_step, save_step, ...

namespace lns {

// ---------------------------------------------------------------------------------------------
// Embedding

// out (rows, C) = scale · (wte[token] + wpe[position]), wte (V, C), wpe (T, C) or null, scale (1)
// or null. positions (rows), or null: the first row is at position `first`, which is 0 unless B
// is 1.
template <class S>
void embedding_forward(Acc<S>* out, const int* tokens, const S* wte, const S* wpe, const S* scale,
                       int first, int64_t rows, int T, int C, const int* positions = nullptr) {
    const Acc<S> factor = scale ? Acc<S>(*scale) : Acc<S>(1);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const S* token = wte + int64_t(tokens[row]) * C;
        const int64_t t = positions ? positions[row] : (first + row) % T;
        const S* position = wpe ? wpe + t * C : nullptr;
        for (int i = 0; i < C; i++)
            out[row * C + i] =
                factor * (Acc<S>(token[i]) + (position ? Acc<S>(position[i]) : Acc<S>(0)));
    }
}

// Adds the gradient of the scale to dscale (1), summed in double because much cancels, and
// multiplies dout (rows, C) by the scale.
template <class S>
void embedding_scale_backward(Acc<S>* dscale, Acc<S>* dout, const int* tokens, const S* wte,
                              const S* wpe, const S* scale, int64_t rows, int T, int C) {
    using A = Acc<S>;
    const int64_t chunks = row_chunks(rows);
    std::vector<double> sums(chunks);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const S* token = wte + int64_t(tokens[row]) * C;
            const S* position = wpe ? wpe + row % T * C : nullptr;
            double dot = 0;
            for (int i = 0; i < C; i++) {
                A& d = dout[row * C + i];
                dot += double(d) * (double(token[i]) + (position ? double(position[i]) : 0));
                d *= A(*scale);
            }
            sums[chunk] += dot;
        }
    if (!dscale) return;
    double sum = 0;
    for (double s : sums) sum += s;
    *dscale += A(sum);
}

// Adds to dwte and dwpe. Threads share channels, and a token's rows are added in order.
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
// Norms of one row x (C): y = x̂ ⊙ w + bias with x̂ = (x − mean) · rstd. LayerNorm: rstd = 1 /
// sqrt(variance + eps). RMSNorm (arXiv 1910.07467): mean = 0, rstd = 1 / sqrt(mean square + eps).
// DyT (arXiv 2503.10622), which stands in for a norm: x̂ = tanh(α · x), α learned; its rstd is α.
// A null weight is 1, a null bias 0.

template <class A> struct NormStats { A mean, rstd; };

template <class A, class X, class S>
NormStats<A> norm_stats(NormType type, A eps, const X* x, const S* alpha, int C) {
    if (type == NormType::dyt) return {0, A(*alpha)};
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
void norm_row_forward(NormType type, const NormStats<A>& stats, const X* x, const S* w,
                      const S* bias, A scale, Y* y, int C) {
    if (type == NormType::dyt) {
        for (int i = 0; i < C; i++)
            y[i] = scale * (tanh_(stats.rstd * A(x[i])) * (w ? A(w[i]) : A(1)) +
                            (bias ? A(bias[i]) : A(0)));
        return;
    }
    for (int i = 0; i < C; i++) {
        A value = (A(x[i]) - stats.mean) * stats.rstd * (w ? A(w[i]) : A(1));
        y[i] = scale * (value + (bias ? A(bias[i]) : A(0)));
    }
}

// With g = w ⊙ dy ⊙ (1 − x̂²): dx = α · g, dα = Σ g ⊙ x. Arguments as below.
template <class S, class A, class X>
double dyt_row_backward(A alpha, const X* x, const S* w, const A* dy, A* dx, A* dw, A* dbias,
                        int C) {
    double dalpha = 0;
#pragma omp simd reduction(+ : dalpha)
    for (int i = 0; i < C; i++) {
        const A d = dy[i], t = tanh_(alpha * A(x[i]));
        const A g = d * (w ? A(w[i]) : A(1)) * (A(1) - t * t);
        if (dw) dw[i] += d * t;
        if (dbias) dbias[i] += d;
        dalpha += double(g) * double(x[i]);
        dx[i] = alpha * g;
    }
    return dalpha;
}

// dx from dy, the gradient of x̂ ⊙ w + bias; adds to dw and dbias. dx may be dy. Returns the
// gradient of DyT's α, in double as much cancels over all channels.
// With g = w ⊙ dy: dx = rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), without mean(g) for RMSNorm.
template <class S, class A, class X>
double norm_row_backward(NormType type, const NormStats<A>& stats, const X* x, const S* w,
                         const A* dy, A* dx, A* dw, A* dbias, int C) {
    if (type == NormType::dyt) return dyt_row_backward(stats.rstd, x, w, dy, dx, dw, dbias, C);
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
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The junction, where a sublayer's output b meets the residual stream r: the only place where norm
// schemes differ. gpt/model/scheme.h has its equations.

template <class S> struct JunctionStats { NormStats<Acc<S>> branch, out, in, second; };

// The operands of a junction on `rows` tokens.
template <class S> struct JunctionArguments {
    using A = Acc<S>;
    Junction junction;
    NormType norm = NormType::rms;
    double eps = 0;
    int64_t rows = 0;
    int C = 0;
    JunctionPointers<const S> p;

    // Forward: r and u (rows, C) from r_prev and b (rows, C), and stats (rows). r may be r_prev. b
    // is null without a branch. u may be null without an in-norm: it is r then. y (rows, C), from
    // y_prev, which it may be; x₀ (rows, C), which junction 0 writes.
    const A* r_prev = nullptr;
    const S* b = nullptr;
    A* r = nullptr;
    S* u = nullptr;
    JunctionStats<S>* stats = nullptr;
    const A* y_prev = nullptr;
    A *y = nullptr, *x0 = nullptr;

    // Backward, besides: db and, in place of dr, the gradient of r_prev; from du (the gradient of
    // u, or of r without an in-norm) and dr (the gradient of r from later layers). Adds to dp, and
    // to the gradients of y and x₀.
    const S* du = nullptr;
    A* dr = nullptr;
    S* db = nullptr;
    A *dy = nullptr, *dx0 = nullptr;
    JunctionPointers<A> dp;
};

template <class X> X* from(X* x, int i) { return x ? x + i : nullptr; }

// Calls f(statistics, begin, width) for each group of channels that the in-norm of a row z (C) is
// over. Kept statistics are those of the whole row; groups compute theirs again.
template <class S, class F>
void each_in_group(const JunctionArguments<S>& x, const NormStats<Acc<S>>& whole, const Acc<S>* z,
                   const F& f) {
    using A = Acc<S>;
    const int groups = x.junction.in_groups, width = x.C / groups;
    const A eps = A(x.eps * x.junction.in_eps);
    for (int i = 0; i < x.C; i += width)
        f(groups == 1 ? whole : norm_stats<A>(x.norm, eps, z + i, x.p.in_alpha, width), i, width);
}
// u (C) = scale · norm_in(z) of a row.
template <class S>
void in_norm_forward(const JunctionArguments<S>& x, const NormStats<Acc<S>>& whole, const Acc<S>* z,
                     S* u) {
    each_in_group(x, whole, z, [&](const NormStats<Acc<S>>& stats, int i, int width) {
        norm_row_forward(x.norm, stats, z + i, from(x.p.in_weight, i), from(x.p.in_bias, i),
                         Acc<S>(x.junction.in_scale), u + i, width);
    });
}

// z (C) = r + norm_second(y) of a row.
template <class S> void add_second(const JunctionArguments<S>& x, int64_t row, Acc<S>* z) {
    using A = Acc<S>;
    const int64_t at = row * x.C;
    norm_row_forward(x.norm, x.stats[row].second, x.y + at, x.p.second_weight, x.p.second_bias,
                     A(1), z, x.C);
    for (int i = 0; i < x.C; i++) z[i] += x.r[at + i];
}

// `stopped` (rows, C) is what stop() returns; null: its argument. Only gradient checks by finite
// differences set it, to hold it constant.
template <class S>
void junction_forward(const JunctionArguments<S>& x, const Acc<S>* stopped = nullptr) {
    using A = Acc<S>;
    const Junction& j = x.junction;
    const NormType type = x.norm;
    const JunctionPointers<const S>& p = x.p;
    const A* r_prev = x.r_prev;
    const S* b = x.b;
    A* r = x.r;
    S* u = x.u;
    const int C = x.C;
    const A eps = A(x.eps), in_eps = A(x.eps * j.in_eps);
    const A skip = A(j.skip), beta = A(j.beta);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
#pragma omp parallel for
    for (int64_t row = 0; row < x.rows; row++) {
        const int64_t at = row * C;
        A* z = thread_scratch<A>(C);
        JunctionStats<S>& st = x.stats[row];
        if (j.second && !j.branch)
            for (int i = 0; i < C; i++) x.y[at + i] = (j.starts_second ? r_prev : x.y_prev)[at + i];
        if (!j.branch) {
            for (int i = 0; i < C; i++) z[i] = r_prev[at + i];
        } else {
            if (j.branch_norm) {
                st.branch = norm_stats<A>(type, eps, b + at, p.branch_alpha, C);
                norm_row_forward(type, st.branch, b + at, p.branch_weight, p.branch_bias, A(1), z,
                                 C);
            } else {
                for (int i = 0; i < C; i++) z[i] = A(b[at + i]);
            }
            if (j.gamma == Gamma::vector)
                for (int i = 0; i < C; i++) z[i] *= A(p.gamma[i]);
            if (j.gamma == Gamma::scalar)
                for (int i = 0; i < C; i++) z[i] *= A(*p.gamma);
            if (j.second)
                for (int i = 0; i < C; i++) x.y[at + i] = x.y_prev[at + i] + z[i];
            if (j.beta != 1)
                for (int i = 0; i < C; i++) z[i] *= beta;
            if (j.omega || j.gate_on_skip) {
                const A* stop = stopped ? stopped : r_prev;
                for (int i = 0; i < C; i++)
                    z[i] +=
                        (j.omega ? A(p.omega[i]) : skip) * (r_prev[at + i] - gate * stop[at + i]);
            } else {
                for (int i = 0; i < C; i++) z[i] += skip * r_prev[at + i];
            }
        }
        if (j.out_norm) {
            st.out = norm_stats<A>(type, eps, z, p.out_alpha, C);
            norm_row_forward(type, st.out, z, p.out_weight, p.out_bias, A(1), z, C);
        }
        if (j.gate && !j.gate_on_skip)
            for (int i = 0; i < C; i++) z[i] -= gate * (stopped ? stopped[at + i] : z[i]);
        if (j.adds_start) {
            const A a = A(*p.start_skip), lambda = A(*p.start_weight);
            for (int i = 0; i < C; i++) {
                if (!j.branch) x.x0[at + i] = z[i];
                z[i] = a * z[i] + lambda * x.x0[at + i];
            }
        }
        for (int i = 0; i < C; i++) r[at + i] = z[i];
        if (j.reads_second) {
            st.second = norm_stats<A>(type, eps, x.y + at, p.second_alpha, C);
            add_second(x, row, z);
        }
        if (j.in_norm) {
            st.in = norm_stats<A>(type, in_eps, z, p.in_alpha, C);
            in_norm_forward(x, st.in, z, u + at);
        } else if (u) {
            for (int i = 0; i < C; i++) u[at + i] = z[i];
        }
    }
}

inline int64_t junction_scratch(int64_t rows, int C) {
    return row_chunks(rows) * (junction_vectors * int64_t(C) + junction_scalars);
}

// The parameters' gradients go through partial sums in scratch (junction_scratch(rows, C)).
template <class S> void junction_backward(const JunctionArguments<S>& x, Acc<S>* scratch) {
    using A = Acc<S>;
    const Junction& j = x.junction;
    const NormType type = x.norm;
    const JunctionPointers<const S>& p = x.p;
    const A *r_prev = x.r_prev, *r = x.r;
    const S *b = x.b, *du = x.du;
    A* dr = x.dr;
    S* db = x.db;
    const int C = x.C;
    const A skip = A(j.skip), beta = A(j.beta), in_scale = A(j.in_scale);
    const A gate = j.gate ? silu(A(*p.gate)) : A(0);
    const A dgate = j.gate ? dsilu(A(*p.gate)) : A(0);
    const A a = j.adds_start ? A(*p.start_skip) : A(1);
    const A lambda = j.adds_start ? A(*p.start_weight) : A(0);

    // Partial sums of a chunk of rows: a vector (C) for each of these, then the scalars.
    enum { in_w, in_b, out_w, out_b, branch_w, branch_b, second_w, second_b, omega, gamma, count };
    enum { of_gate, of_skip, of_start, in_a, out_a, branch_a, second_a, scalars };
    static_assert(count == junction_vectors && scalars == junction_scalars);
    A* const vectors[count] = {
        x.dp.in_weight,   x.dp.in_bias,       x.dp.out_weight,  x.dp.out_bias, x.dp.branch_weight,
        x.dp.branch_bias, x.dp.second_weight, x.dp.second_bias, x.dp.omega,    x.dp.gamma};
    A* const scalar_gradients[scalars] = {x.dp.gate,        x.dp.start_skip, x.dp.start_weight,
                                          x.dp.in_alpha,    x.dp.out_alpha,  x.dp.branch_alpha,
                                          x.dp.second_alpha};
    const int64_t rows = x.rows, chunks = row_chunks(rows), width = count * int64_t(C) + scalars;

#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A* sums = scratch + chunk * width;
        std::fill(sums, sums + width, A(0));
        auto sums_of = [&](int vector) { return vectors[vector] ? sums + vector * C : nullptr; };
        A *in_weight = sums_of(in_w), *in_bias = sums_of(in_b), *out_weight = sums_of(out_w),
          *out_bias = sums_of(out_b), *branch_weight = sums_of(branch_w),
          *branch_bias = sums_of(branch_b), *second_weight = sums_of(second_w),
          *second_bias = sums_of(second_b), *omega_sum = sums + omega * C,
          *gamma_sum = sums + gamma * C;
        // In double: over all channels much cancels.
        double scalar_sums[scalars] = {}, scalar_gamma_sum = 0;
        double &gate_sum = scalar_sums[of_gate], &skip_sum = scalar_sums[of_skip],
               &weight_sum = scalar_sums[of_start];
        A* dz = thread_scratch<A>(4 * C); // the gradient of r, then of each step before it
        A *z = dz + C, *y = dz + 2 * C;   // r before the out-norm; b after the branch norm
        A* v = dz + 3 * C;                // the in-norm's input

        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const int64_t at = row * C;
            const JunctionStats<S>& st = x.stats[row];
            const A* in = r + at;
            if (j.reads_second) add_second(x, row, v), in = v;
            if (j.in_norm) {
                for (int i = 0; i < C; i++) dz[i] = in_scale * A(du[at + i]);
                each_in_group(x, st.in, in, [&](const NormStats<A>& stats, int i, int width) {
                    scalar_sums[in_a] +=
                        norm_row_backward(type, stats, in + i, from(p.in_weight, i), dz + i, dz + i,
                                          from(in_weight, i), from(in_bias, i), width);
                });
            } else {
                for (int i = 0; i < C; i++) dz[i] = A(du[at + i]);
            }
            if (j.reads_second) {
                scalar_sums[second_a] +=
                    norm_row_backward(type, st.second, x.y + at, p.second_weight, dz, v,
                                      second_weight, second_bias, C);
                for (int i = 0; i < C; i++) x.dy[at + i] += v[i];
            }
            for (int i = 0; i < C; i++) dz[i] += dr[at + i];

            // Recomputes what the forward pass had before the out-norm and the gate.
            if (j.keeps_branch()) {
                if (!j.branch) {
                    for (int i = 0; i < C; i++) z[i] = r_prev[at + i];
                } else {
                    if (j.branch_norm)
                        norm_row_forward(type, st.branch, b + at, p.branch_weight, p.branch_bias,
                                         A(1), y, C);
                    else
                        for (int i = 0; i < C; i++) y[i] = A(b[at + i]);
                    const A kept = skip * (j.gate_on_skip ? A(1) - gate : A(1));
                    for (int i = 0; i < C; i++) {
                        A factor = j.gamma == Gamma::vector   ? A(p.gamma[i])
                                   : j.gamma == Gamma::scalar ? A(*p.gamma)
                                                              : A(1);
                        if (j.beta != 1) factor *= beta;
                        const A of_skip = j.omega ? kept * A(p.omega[i]) : kept;
                        z[i] = of_skip * r_prev[at + i] + factor * y[i];
                    }
                }
            }
            if (j.adds_start) {
                const A* before = z; // of r
                if (!j.branch) {
                    before = x.x0 + at; // r itself may have taken the place of r_prev
                } else if (j.out_norm) {
                    norm_row_forward(type, st.out, z, p.out_weight, p.out_bias, A(1), v, C);
                    before = v;
                }
                const A kept = j.gate && !j.gate_on_skip ? A(1) - gate : A(1);
                for (int i = 0; i < C; i++) {
                    const A d = dz[i], start = x.x0[at + i];
                    skip_sum += double(d) * double(kept * before[i]);
                    weight_sum += double(d) * double(start);
                    dz[i] = a * d;
                    if (j.branch)
                        x.dx0[at + i] += lambda * d;
                    else
                        dz[i] += lambda * d + x.dx0[at + i];
                }
            }
            if (j.gate && !j.gate_on_skip) { // no out-norm; stop() passes no gradient to dz
                double dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int i = 0; i < C; i++) dot += double(dz[i]) * double(z[i]);
                gate_sum -= dgate * dot;
            }
            if (j.out_norm)
                scalar_sums[out_a] += norm_row_backward(type, st.out, z, p.out_weight, dz, dz,
                                                        out_weight, out_bias, C);

            double dot = 0;
            for (int i = 0; i < C; i++) {
                A d = skip * dz[i];
                if (j.omega) {
                    omega_sum[i] += (A(1) - gate) * d * r_prev[at + i];
                    d *= A(p.omega[i]);
                }
                if (j.gate_on_skip) dot += double(d) * double(r_prev[at + i]);
                dr[at + i] = d;
            }
            gate_sum -= dgate * dot;
            if (j.starts_second)
                for (int i = 0; i < C; i++) dr[at + i] += x.dy[at + i];
            if (!j.branch) continue;
            if (j.beta != 1)
                for (int i = 0; i < C; i++) dz[i] *= beta;
            if (j.second)
                for (int i = 0; i < C; i++) dz[i] += x.dy[at + i];

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
                scalar_sums[branch_a] += norm_row_backward(type, st.branch, b + at, p.branch_weight,
                                                           dz, dz, branch_weight, branch_bias, C);
            for (int i = 0; i < C; i++) db[at + i] = dz[i];
        }
        if (j.gamma == Gamma::scalar) gamma_sum[0] = A(scalar_gamma_sum);
        for (int s = 0; s < scalars; s++) sums[count * C + s] = A(scalar_sums[s]);
    }
    auto add_sums = [&](A* gradient, int64_t from, int64_t n) {
        for (int64_t chunk = 0; gradient && chunk < chunks; chunk++)
            for (int64_t i = 0; i < n; i++) gradient[i] += scratch[chunk * width + from + i];
    };
    for (int v = 0; v < count; v++)
        add_sums(vectors[v], v * C, v == gamma && j.gamma == Gamma::scalar ? 1 : C);
    for (int s = 0; s < scalars; s++) add_sums(scalar_gradients[s], count * C + s, 1);
}

// ---------------------------------------------------------------------------------------------
// Matmul: out (rows, OC) = in (rows, C) · wᵀ + bias, w (OC, C), bias (OC) or null.

template <class S, class Out>
void matmul_forward(Out* out, const S* in, const S* w, const Out* bias, int64_t rows, int C,
                    int OC) {
    gemm(false, true, rows, OC, C, in, w, out, false, bias);
}

// din (rows, C) from dout (rows, OC).
template <class S>
void matmul_backward_input(S* din, const S* dout, const S* w, int64_t rows, int C, int OC) {
    gemm(false, false, rows, C, OC, dout, w, din, false);
}

// Adds to dw, or overwrites it unless `add`; adds to dbias if there is one.
template <class S>
void matmul_backward_weight(Acc<S>* dw, Acc<S>* dbias, const S* dout, const S* in, int64_t rows,
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
// Attention. A row of qkv is NH heads of q, KVH of k, KVH of v; NH / KVH heads of q share a head of
// k and v (GQA, arXiv 2305.13245).

struct AttentionShape {
    int B, T, NH, KVH, HS;
    int first = 0; // positions before this one are in the KV cache; 0 unless B is 1
    Branches branches = {};
    int window = 0; // a query sees so many keys, its own and those before it; 0: all
    int q_norms = 0, k_norms = 0, v_norms = 0; // RMSNorms, each of an equal part of q, k or v
    int64_t rows() const { return int64_t(B) * T; }
    int q_width() const { return NH * HS; }
    int kv_width() const { return KVH * HS; }
    int row() const { return (NH + 2 * KVH) * HS; }
    int64_t position(int64_t row) const {
        return branches.position ? branches.position[row] : row % T;
    }
    // q, k and v, one after the other, as far as they are normed: v may not be.
    int norms() const { return q_norms + k_norms + v_norms; }
    int normed_width() const { return q_width() + kv_width() + (v_norms ? kv_width() : 0); }
    int q_norm_width() const { return q_norms ? q_width() / q_norms : 0; }
    int k_norm_width() const { return k_norms ? kv_width() / k_norms : 0; }
    int v_norm_width() const { return v_norms ? kv_width() / v_norms : 0; }
    // Norm n is of `width` channels from `begin` on. Norms of a tensor (0: q, 1: k, 2: v) share its
    // weight.
    struct NormPart {
        int tensor, begin, width;
    };
    NormPart norm_part(int n) const {
        const int in_k = n - q_norms, in_v = in_k - k_norms;
        if (in_k < 0) return {0, n * q_norm_width(), q_norm_width()};
        if (in_v < 0) return {1, q_width() + in_k * k_norm_width(), k_norm_width()};
        return {2, q_width() + kv_width() + in_v * v_norm_width(), v_norm_width()};
    }
};

// Value residual (arXiv 2410.17897): from the second layer on, v ← v + m · (v₁ − v), with v₁ the
// first layer's v and m a learned scalar. In place on v of the qkv matmul's output, from row
// a.first on. Keeps v as it was in `own` (rows, KVH·HS), unless that is null; the first layer,
// where `mix` is null, does only that.
template <class S, class X>
void mix_values(X* qkv, S* own, const S* first_v, const S* mix, const AttentionShape& a) {
    using A = Acc<S>;
    const int KV = a.kv_width();
#pragma omp parallel for
    for (int64_t row = 0; row < a.rows() - a.first; row++) {
        X* v = qkv + row * a.row() + a.q_width() + KV;
        if (own)
            for (int i = 0; i < KV; i++) own[row * KV + i] = v[i];
        if (mix)
            for (int i = 0; i < KV; i++)
                v[i] = A(v[i]) + A(*mix) * (A(first_v[row * KV + i]) - A(v[i]));
    }
}

// In place on v of dqkv. From the second layer on, adds the gradient of v₁ to dvalues (rows,
// KVH·HS), and that of m to dmix, if not null; in the first layer, adds dvalues to dv. scratch:
// (row_chunks(rows)).
template <class S>
void mix_values_backward(S* dqkv, Acc<S>* dvalues, const S* own, const S* first_v, const S* mix,
                         Acc<S>* dmix, Acc<S>* scratch, const AttentionShape& a) {
    using A = Acc<S>;
    const int KV = a.kv_width();
    const int64_t rows = a.rows(), chunks = row_chunks(rows);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        double sum = 0; // over all channels, where much cancels
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            S* dv = dqkv + row * a.row() + a.q_width() + KV;
            A* dfirst = dvalues + row * KV;
            const S *v = own + row * KV, *v1 = first_v + row * KV;
            for (int i = 0; i < KV; i++) {
                const A d = A(dv[i]);
                if (!mix) {
                    dv[i] = d + dfirst[i];
                    continue;
                }
                sum += double(d) * (double(v1[i]) - double(v[i]));
                dfirst[i] += A(*mix) * d;
                dv[i] = d - A(*mix) * d;
            }
        }
        scratch[chunk] = A(sum);
    }
    for (int64_t chunk = 0; dmix && chunk < chunks; chunk++) *dmix += scratch[chunk];
}

// Rotary positions (arXiv 2104.09864) of one head's HS channels, with Hugging Face's pairing:
// channels i and i + HS/2 are rotated by the angle t · θ^(−2i/HS). turn: position t's row of the
// table, (HS/2) of (cos, sin). direction −1 rotates back, which is the gradient.
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

// From the qkv matmul's output `in`, which may be qkv, to what attention reads: RMSNorms of q, k
// and v, if there is `raw` (rows, normed width), which keeps their input; then rotary positions, if
// there is a table (T, HS/2). stats (rows, norms).
template <class S, class X>
void qkv_forward(S* qkv, const X* in, S* raw, NormStats<Acc<S>>* stats,
                 const QkvPointers<const S>& weights, double eps, const CosSin<Acc<S>>* table,
                 const AttentionShape& a) {
    using A = Acc<S>;
    const int normed = a.normed_width(), HS = a.HS;
    const S *const weight[] = {weights.q, weights.k, weights.v}, *none = nullptr;
#pragma omp parallel for
    for (int64_t row = a.first; row < a.rows(); row++) {
        const X* x = in + (row - a.first) * a.row();
        S* y = qkv + row * a.row();
        A* z = thread_scratch<A>(a.row());
        for (int i = 0; i < a.row(); i++) z[i] = A(x[i]);
        if (raw) {
            S* kept = raw + row * normed;
            for (int i = 0; i < normed; i++) kept[i] = z[i];
            for (int n = 0; n < a.norms(); n++) {
                const auto [tensor, begin, width] = a.norm_part(n);
                NormStats<A>& st = stats[row * a.norms() + n];
                st = norm_stats<A>(NormType::rms, A(eps), z + begin, none, width);
                norm_row_forward(NormType::rms, st, z + begin, weight[tensor], none, A(1),
                                 z + begin, width);
            }
        }
        for (int head = 0; head < a.NH + a.KVH && table; head++)
            rotate(z + head * HS, z + head * HS, table + a.position(row) * (HS / 2), A(1), HS);
        for (int i = 0; i < a.row(); i++) y[i] = z[i];
    }
}

// Of the norms, in place on dqkv. scratch: (row_chunks(rows), normed width).
template <class S>
void qkv_norm_backward(S* dqkv, const S* raw, const NormStats<Acc<S>>* stats,
                       const QkvPointers<const S>& weights, const QkvPointers<Acc<S>>& dweights,
                       Acc<S>* scratch, const AttentionShape& a) {
    using A = Acc<S>;
    const S* const weight[] = {weights.q, weights.k, weights.v};
    A *const dweight[] = {dweights.q, dweights.k, dweights.v}, *none = nullptr;
    const int q_weights = a.q_norm_width(), k_weights = a.k_norm_width();
    const int first_sum[] = {0, q_weights, q_weights + k_weights,
                             q_weights + k_weights + a.v_norm_width()};
    const int normed = a.normed_width();
    const int64_t rows = a.rows(), chunks = row_chunks(rows);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A *sums = scratch + chunk * normed, *d = thread_scratch<A>(normed);
        std::fill(sums, sums + normed, A(0));
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const S* x = raw + row * normed;
            S* dy = dqkv + row * a.row();
            for (int i = 0; i < normed; i++) d[i] = A(dy[i]);
            for (int n = 0; n < a.norms(); n++) {
                const auto [tensor, begin, width] = a.norm_part(n);
                norm_row_backward(NormType::rms, stats[row * a.norms() + n], x + begin,
                                  weight[tensor], d + begin, d + begin, sums + first_sum[tensor],
                                  none, width);
            }
            for (int i = 0; i < normed; i++) dy[i] = d[i];
        }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int tensor = 0; tensor < 3 && dweight[tensor]; tensor++) {
            const A* sums = scratch + chunk * normed + first_sum[tensor];
            for (int i = 0; i < first_sum[tensor + 1] - first_sum[tensor]; i++)
                dweight[tensor][i] += sums[i];
        }
}

// Queries that attend at once: only their scores (tile, T) exist at a time, not T × T.
const int attention_tile = 64;

// Hides keys from query t of sequence b, by scores whose probability is 0: those after it, those of
// other branches and those before its window. That is cheaper than loops of odd lengths.
template <class A> void apply_masks(A* score, int b, int t, int seen, const AttentionShape& a) {
    const A hidden = A(-1e30);
    std::fill(score + t + 1, score + seen, hidden);
    int window_begin = a.window ? std::max(0, t - a.window + 1) : 0;
    if (a.branches.branch) {
        const int64_t row = int64_t(b) * a.T + t;
        const int own = a.branches.branch[row], others = t - a.branches.position[row];
        std::fill(score + own - others, score + own, hidden);
        if (a.window && window_begin < own) window_begin = std::max(0, window_begin - others);
    }
    std::fill(score, score + window_begin, hidden);
}

// out (B, T, NH·HS) = softmax(q kᵀ / sqrt(HS)) v, causal: position t attends to 0 … t or,
// with a window, to the last of these. lse (B, NH, T): the logarithm of each softmax's denominator.
template <class S>
void attention_forward(S* out, Acc<S>* lse, const S* qkv, const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
    const int64_t packed_k = packed_size<S>(HS, T), packed_v = packed_size<S>(T, HS);
    const int64_t bytes = ScratchArrays::bytes<S>(packed_k) + ScratchArrays::bytes<S>(packed_v) +
                          ScratchArrays::bytes<S>(R * T) + ScratchArrays::bytes<A>(R * (T + HS));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            ScratchArrays scratch(bytes);
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
                        S* probability = p + int64_t(i) * T; // not yet divided by the sum
                        apply_masks(score, b, t0 + i, seen, a);
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

// dqkv (B, T, row) from dout (B, T, NH·HS), through the rotation too if there is a table. With P
// the softmax and O the output of a query: dP = dO Vᵀ; dS = P ⊙ (dP − dO · O); dQ = dS K /
// sqrt(HS); dK = dSᵀ Q / sqrt(HS); dV = Pᵀ dO.
template <class S>
void attention_backward(S* dqkv, const S* dout, const S* qkv, const Acc<S>* lse,
                        const CosSin<Acc<S>>* table, const AttentionShape& a) {
    using A = Acc<S>;
    const int T = a.T, HS = a.HS, group = a.NH / a.KVH, R = attention_tile;
    const A scale = A(1) / std::sqrt(A(HS));
    const int64_t tall = packed_size<S>(T, HS), wide = packed_size<S>(HS, T);
    const int64_t small = packed_size<S>(R, HS), scores = int64_t(R) * T, matrix = int64_t(T) * HS;
    const int64_t bytes = ScratchArrays::bytes<S>(tall) + 2 * ScratchArrays::bytes<S>(wide) +
                          2 * ScratchArrays::bytes<S>(small) + 2 * ScratchArrays::bytes<S>(scores) +
                          2 * ScratchArrays::bytes<A>(scores) +
                          2 * ScratchArrays::bytes<A>(matrix) + ScratchArrays::bytes<A>(R * HS);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < a.B; b++)
        for (int kv = 0; kv < a.KVH; kv++) {
            const S* rows = qkv + int64_t(b) * T * a.row();
            S* drows = dqkv + int64_t(b) * T * a.row();
            ScratchArrays scratch(bytes);
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
                        apply_masks(score, b, t0 + i, seen, a);
                        const A normalizer = lse[(int64_t(b) * a.NH + h) * T + t0 + i];
                        // dO · O = Σ P ⊙ dP, without the rounding of O.
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
// The MLP's activation functions

// GELU in its tanh form (arXiv 1606.08415): x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
// That is x · sigmoid(2 · tanh's argument).
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

// a (rows, H) from h (rows, H) or, gated, (rows, 2·H).
template <class S>
void activation_forward(Activation activation, S* out, const S* h, int64_t rows, int H) {
    switch (activation) {
    case Activation::gelu:
        return gelu_forward(out, h, rows * H);
    case Activation::swiglu:
        return swiglu_forward(out, h, rows, H);
    }
}

template <class S>
void activation_backward(Activation activation, S* dh, const S* da, const S* h, int64_t rows,
                         int H) {
    switch (activation) {
    case Activation::gelu:
        return gelu_backward(dh, da, h, rows * H);
    case Activation::swiglu:
        return swiglu_backward(dh, da, h, rows, H);
    }
}

// ---------------------------------------------------------------------------------------------
// Loss

// losses (rows) = −log softmax(logits)[target], 0 where the target is −1; logits (rows, V). Writes
// loss_scale × the gradient of logits to dlogits unless that is null; dlogits may be logits.
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
            const A dtarget = x[target] * factor - A(loss_scale);
#pragma omp simd
            for (int i = 0; i < V; i++) dx[i] = x[i] * factor;
            dx[target] = dtarget;
        }
        losses[row] = (largest - at_target) + std::log(sum);
    }
}

// ---------------------------------------------------------------------------------------------
// AdamW (arXiv 1711.05101): m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
// w ← w − lr · (m̂ / (√v̂ + eps) + decay · w), with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).

// The flat buffers. weights: the master weights, whose rounded copy is `parameters`; or the
// parameters themselves, and `parameters` is null. The moments are those of a range of them.
template <class S, class W, class M> struct AdamWBuffers {
    W* weights;
    S* parameters;
    const Acc<S>* gradients;
    M *moment1, *moment2;
};

// 16 random bits for each of three numbers of element i, from (step, i), to round them to bf16.
template <bool stochastic> struct RandomBits {
    uint32_t first = 0, second = 0;

    RandomBits(int64_t i, int64_t step) {
        if constexpr (stochastic) {
            first = mix_bits(uint32_t(i) * 0x9E3779B9u + uint32_t(step));
            second = mix_bits(first + uint32_t(i >> 32));
        }
    }
    template <class X, class A> void store(X& x, A value, int which) const {
        if constexpr (stochastic && std::is_same_v<X, bf16>)
            x.bits = round_stochastically(float(value), which == 0   ? first
                                                        : which == 1 ? first >> 16
                                                                     : second);
        else
            x = value;
    }
};

// Cautious decay (arXiv 2510.12402) stops where the update makes the weight larger.
template <class A> A decay_of(A decay, A w, A step, bool cautious) {
    return cautious && w * step < 0 ? A(0) : decay;
}

// One pass over the memory of a range. stochastic: bf16 results are rounded stochastically.
template <bool stochastic, class S, class W, class M>
void adamw_update(const AdamWBuffers<S, W, M>& x, const Hyperparameters& o,
                  const Registry& registry, const UpdateRange& range) {
    using A = Acc<S>;
    const A beta1 = A(o.beta1), beta2 = A(o.beta2);
    const double t = double(o.step_of(range.layer));
    const A correction1 = A(1 / (1 - std::pow(o.beta1, t)));
    const A correction2 = A(1 / (1 - std::pow(o.beta2, t)));
    const A scale = A(o.grad_scale);
    W* weights = x.weights;
    S* copy = x.parameters;
    const A* gradients = x.gradients;
    M *moment1 = x.moment1, *moment2 = x.moment2;
#pragma omp parallel
    for (size_t n = range.first; n < range.last; n++) {
        const Param& p = registry.params[n];
        const A lr = A(o.lr * p.lr_scale), eps = A(o.eps * p.eps_scale);
        const A decay = p.decay ? A(o.weight_decay * p.decay_scale) : A(0);
        const int64_t end = p.offset + p.size();
#pragma omp for simd nowait schedule(static)
        for (int64_t i = p.offset; i < end; i++) {
            const int64_t at = i - range.begin;
            const RandomBits<stochastic> random(i, o.step);
            const A g = scale * gradients[i];
            const A m = beta1 * A(moment1[at]) + (A(1) - beta1) * g;
            const A v = beta2 * A(moment2[at]) + (A(1) - beta2) * g * g;
            const A w = A(weights[i]);
            const A step = m * correction1 / (std::sqrt(v * correction2) + eps);
            const A updated = w - lr * (step + decay_of(decay, w, step, o.cautious) * w);
            random.store(moment1[at], m, 0), random.store(moment2[at], v, 1);
            random.store(weights[i], updated, 2);
            if (copy) copy[i] = updated;
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Muon (gpt/model/muon.h): m ← μ m + (1 − μ) g; u = μ m + (1 − μ) g;
// w ← w − lr · (scale · orthogonal(u) + decay · w).

// x (rows, columns) of norm 1 ← nearly its orthogonal factor; x is used up. y: as large; gram,
// polynomial: (n, n), n the smaller size. Returns x or y.
template <class S>
S* orthogonalize(S* x, S* y, S* gram, S* polynomial, int64_t rows, int64_t columns,
                 const Quintics& quintics) {
    using A = Acc<S>;
    const int64_t n = std::min(rows, columns);
    const bool wide = rows <= columns;
    for (const Quintic& q : quintics.all) {
        wide ? gemm(false, true, n, n, columns, x, x, gram, false)
             : gemm(true, false, n, n, rows, x, x, gram, false);
        gemm(false, false, n, n, n, gram, gram, polynomial, false);
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {
            S* row = polynomial + i * n;
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                row[j] =
                    A(q.c) * A(row[j]) + A(q.b) * A(gram[i * n + j]) + (i == j ? A(q.a) : A(0));
        }
        wide ? gemm(false, false, n, columns, n, polynomial, x, y, false)
             : gemm(false, false, rows, n, n, x, polynomial, y, false);
        std::swap(x, y);
    }
    return x;
}

// squares[r] = the sum of squares of a row (columns); returns the sum of all.
template <class A, class F>
double squares_of_rows(A* squares, int64_t rows, int64_t columns, const F& value) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++)
        squares[r] = A(sum_of<A>(columns, [&](int64_t c) {
            const A x = value(r * columns + c);
            return x * x;
        }));
    return sum_of<double>(rows, [=](int64_t r) { return double(squares[r]); });
}

template <class S, class W, class M> struct MuonBuffers {
    W* weights;
    S* parameters; // as AdamWBuffers'
    const Acc<S>* gradients;
    M *momentum, *row_moments; // of the range's elements and rows; the latter null: no NorMuon
    S* scratch;                // layout.scratch()
    Acc<S>* row_scratch;       // layout.most_rows
};

// NorMuon: v ← β₂ v + (1 − β₂) · the mean square of a row. sizes (rows): from sums of squares to
// the factors of the rows, 1 / (√v + eps) and one that makes the norm of all `norm`.
template <bool stochastic, class A, class M>
void normalize_rows(A* sizes, M* v, int64_t rows, int64_t columns, double beta2, double norm,
                    const Param& p, int64_t step) {
    double square = 0;
    for (int64_t r = 0; r < rows; r++) {
        const A mean = sizes[r] / A(columns), moment = A(beta2) * A(v[r]) + A(1 - beta2) * mean;
        RandomBits<stochastic>(p.offset + r, step).store(v[r], moment, 1);
        const A factor = A(1) / (std::sqrt(moment) + A(normuon_eps));
        square += double(factor * factor * sizes[r]);
        sizes[r] = factor;
    }
    const A common = A(norm / (std::sqrt(square) + normuon_eps));
    for (int64_t r = 0; r < rows; r++) sizes[r] *= common;
}

template <bool stochastic, class S, class W, class M>
void muon_update(MuonBuffers<S, W, M> x, const Hyperparameters& o, const Registry& registry,
                 const UpdateRange& range, const OptimizerLayout& layout) {
    using A = Acc<S>;
    const Quintics polynomials = quintics(o.orthogonalization);
    const A mu = A(o.momentum), scale = A(o.grad_scale);
    S *u = x.scratch, *other = u + layout.largest, *gram = other + layout.largest;
    A* sizes = x.row_scratch;
    for (size_t n = range.first; n < range.last; n++) {
        const Param& p = registry.params[n];
        const int64_t rows = p.shape[0], columns = p.shape[1];
        const A* gradient = x.gradients + p.offset;
        W* weights = x.weights + p.offset;
        M* momentum = x.momentum + p.offset - range.begin;
        auto mixed = [=](int64_t i) {
            return mu * A(momentum[i]) + (A(1) - mu) * (scale * gradient[i]);
        };
#pragma omp parallel for simd
        for (int64_t i = 0; i < p.size(); i++)
            RandomBits<stochastic>(p.offset + i, o.step).store(momentum[i], mixed(i), 0);
        const double norm = std::sqrt(squares_of_rows(sizes, rows, columns, mixed));
        const A inverse = A(1 / std::max(polynomials.margin * norm, 1e-7));
#pragma omp parallel for simd
        for (int64_t i = 0; i < p.size(); i++) u[i] = inverse * mixed(i);
        const S* factor =
            orthogonalize(u, other, gram, gram + layout.gram, rows, columns, polynomials);

        std::fill_n(sizes, rows, A(1));
        if (x.row_moments) {
            const double size = std::sqrt(
                squares_of_rows(sizes, rows, columns, [=](int64_t i) { return A(factor[i]); }));
            normalize_rows<stochastic>(sizes, x.row_moments, rows, columns, o.beta2,
                                       normuon_norm(o.muon_scale, rows, columns, size), p, o.step);
            x.row_moments += rows;
        }
        const A size = A(muon_scale(o.muon_scale, rows, columns));
        const A lr = A(o.muon_lr * p.lr_scale);
        const A decay = p.decay ? A(o.weight_decay * p.decay_scale) : A(0);
#pragma omp parallel for
        for (int64_t r = 0; r < rows; r++) {
            const A row_size = size * sizes[r];
#pragma omp simd
            for (int64_t i = r * columns; i < (r + 1) * columns; i++) {
                const A w = A(weights[i]), step = row_size * A(factor[i]);
                const A updated = w - lr * (step + decay_of(decay, w, step, o.cautious) * w);
                RandomBits<stochastic>(p.offset + i, o.step).store(weights[i], updated, 2);
                if (x.parameters) x.parameters[p.offset + i] = updated;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The model

template <class S>
using CpuTensors = PassTensors<Array, S, Acc<S>, NormStats<Acc<S>>, JunctionStats<S>>;

template <class S> struct Activations : CpuTensors<S> {
    int64_t logit_rows = 0, head_rows = 0; // rows of the head at once, forward and backward
    Array<Acc<S>> logits;                  // (logit_rows, V); in dlogits, if that is Acc<S>
    Array<S> dlogits;                      // (head_rows, V)
    Array<Acc<S>> scratch;                 // partial sums

    template <class Make>
    void layout(const Config& c, int B, int T, const ModelOptions& o, const Make& make) {
        const bool exact = std::is_same_v<S, Acc<S>>;
        CpuTensors<S>::layout(c, B, T, o, !exact && (c.rope() || c.qkv_norms()), make);
        const int64_t rows = this->rows;
        const int V = c.vocab_size;
        const bool backward = o.purpose >= Purpose::jacobians;
        head_rows = head_part(rows, V, int64_t(1) << 26, 32);
        logit_rows = backward ? head_part(head_rows, V, int64_t(1) << 25, 32)
                              : head_part(rows, V, int64_t(1) << 24, 32);
        make(logits, backward && exact ? 0 : logit_rows * V);
        if (!backward) return;
        make(dlogits, head_rows * V);
        make(scratch,
             std::max({junction_scratch(rows, c.width), row_chunks(rows) * c.normed_width(),
                       streams_scratch(rows, this->stream_shape)}));
    }
};

template <class S> struct CpuModel : Model {
    using A = Acc<S>;
    static constexpr bool exact = std::is_same_v<S, A>;

    ModelOptions options;
    Array<S> parameters;
    Array<A> master; // weights, beside bf16 parameters
    Array<A> gradients;
    struct State { // of the optimizer, in one of two precisions
        Array<A> full;
        Array<bf16> rounded;
    };
    OptimizerLayout optimizer_layout;
    std::vector<State> states;
    Array<S> muon_scratch;
    Array<A> muon_row_scratch;
    bool overwrite_gradients = false; // of matrices, by the next backward pass: zero_gradients()
    Activations<S> acts;
    Array<CosSin<A>> rotary_table;

    // The last pass: its tokens (B, T), and the first position that it computed; the KV cache has
    // those before.
    std::vector<int> tokens, positions, branches; // the last two (B, T), or empty: none branch
    int B = 0, T = 0, first = 0;
    bool kv_cache_valid = false;
    int between = 0; // layer by layer, r is residual(between)

    int64_t bytes_held = 0;
    std::vector<const A*> stopped; // of each junction; null but in gradient checks

    CpuModel(const Config& c, int max_B, int max_T, const ModelOptions& o)
        : Model(c, *o.optimizer), options(o), optimizer_layout(*optimizer, registry) {
        auto make = [&](auto& array, int64_t n) {
            array = std::remove_reference_t<decltype(array)>(n);
            bytes_held += n * int64_t(sizeof(array[0]));
        };
        make(parameters, registry.size);
        if (o.purpose >= Purpose::gradients) make(gradients, registry.size);
        if (o.purpose == Purpose::training) {
            make(master, exact || !o.master_weights ? 0 : registry.size);
            for (int64_t n : optimizer_layout.sizes) {
                State& state = states.emplace_back();
                o.moments == DType::bf16 ? make(state.rounded, n) : make(state.full, n);
            }
            make(muon_scratch, optimizer_layout.scratch());
            make(muon_row_scratch, optimizer_layout.most_rows);
        }
        acts.layout(c, max_B, max_T, o, make);
        stopped.resize(2 * c.layers + 1);
        if (!c.rope()) return;
        const int64_t positions = std::min<int64_t>(c.positions, acts.rows);
        make(rotary_table, positions * (c.head_size / 2));
        fill_rotary_table(rotary_table.begin(), c, positions);
    }

    void initialize(uint64_t seed) override {
        kv_cache_valid = false;
        for (const Param& p : registry.params) {
            lns::initialize(p, seed, parameters + p.offset);
            if (master.size) lns::initialize(p, seed, master + p.offset);
        }
        std::fill(gradients.begin(), gradients.end(), A(0));
        for (State& state : states) {
            std::fill(state.full.begin(), state.full.end(), A(0));
            std::fill(state.rounded.begin(), state.rounded.end(), bf16(0));
        }
    }

    // Tensors of the last pass, from row `first` on. k counts junctions from 0, l layers from 0.
    int64_t rows() const { return int64_t(B) * T - first; }
    A* residual(int k) { return acts.residual[k] + int64_t(first) * config.width; }
    S* input(int k) { // u of junction k, which the next sublayer reads
        if constexpr (exact)
            if (acts.input.slot[k] < 0) return residual(k);
        return acts.input[k] + int64_t(first) * config.width;
    }
    S* branch(int k) { return acts.branch[acts.branch_of(k)] + int64_t(first) * config.width; }
    A* embedded() {
        return acts.embedded.size ? acts.embedded + int64_t(first) * config.width : residual(0);
    }
    A* before(int k) { return k == 0 ? embedded() : residual(k - 1); } // r_prev
    JunctionStats<S>* stats(int k) { return acts.stats[k] + first; }
    A* second(int k) { // y of junction k, if there is one
        return acts.second.array.size ? acts.second[k] + int64_t(first) * config.width : nullptr;
    }
    A* start() { return acts.start.size ? acts.start + int64_t(first) * config.width : nullptr; }
    S* hidden(int l) { return acts.hidden[l] + int64_t(first) * config.mlp_in_width(); }
    S* activated(int l) { return acts.activated[l] + int64_t(first) * config.mlp_width; }
    S* values(int l) { // before they are mixed; null where they are not kept
        if (acts.values.slot[l] < 0) return nullptr;
        return acts.values[l] + int64_t(first) * config.kv_width();
    }

    // Those of attention, from row 0 on: it reads the KV cache.
    S* qkv(int l) { return acts.qkv[l]; }
    S* qkv_raw(int l) { return config.qkv_norms() ? acts.qkv_raw[l] : nullptr; }
    NormStats<A>* qkv_stats(int l) { return acts.qkv_stats[l]; }
    S* attended(int l) { return acts.attended[l]; }
    A* lse(int l) { return acts.lse[l]; }
    AttentionShape attention(int l) const {
        const Config& c = config;
        return {B,           T,           c.heads,     c.kv_heads,
                c.head_size, first,       branching(), c.window_of(l, T),
                c.q_norms(), c.k_norms(), c.v_norms()};
    }
    Branches branching() const {
        return positions.empty() ? Branches{} : Branches{positions.data(), branches.data()};
    }
    const CosSin<A>* cos_sin(int l) const { return config.rotates(l) ? +rotary_table : nullptr; }

    const S* weight(int64_t offset) const { return offset < 0 ? nullptr : parameters + offset; }
    // Null without gradients, too.
    A* gradient(int64_t offset) const {
        return offset < 0 || !gradients.size ? nullptr : gradients + offset;
    }
    Costs<S> costs() const { return {config, double(rows()), double(T)}; }

    // Positions before `from` are in the KV cache.
    void forward(const int* inputs, int b, int t, int from = 0, const Branches& branched = {}) {
        set_tokens(inputs, b, t, from, branched);
        embed();
        join_forward(0);
        for (int l = 0; l < config.layers; l++) {
            attention_sublayer_forward(l);
            join_forward(2 * l + 1);
            mlp_sublayer_forward(l);
            join_forward(2 * l + 2);
        }
    }
    void set_tokens(const int* inputs, int b, int t, int from, const Branches& branched) {
        check_tokens(inputs, b, t, acts.rows, branched);
        B = b, T = t, first = from, kv_cache_valid = false;
        const int64_t n = int64_t(B) * T;
        tokens.assign(inputs, inputs + n);
        positions.assign(branched.position, branched.position + (branched.position ? n : 0));
        branches.assign(branched.branch, branched.branch + (branched.branch ? n : 0));
    }
    void embed() {
        const Timed timer(profile, costs().embedding_forward());
        embedding_forward(embedded(), tokens.data() + first, weight(registry.token_embedding),
                          weight(registry.position_embedding), weight(registry.embed_scale), first,
                          rows(), T, config.width, branching().position);
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
        const Timed timer(profile, costs().embedding_backward());
        if (config.embed_scale())
            embedding_scale_backward(gradient(registry.embed_scale), acts.dresidual.begin(),
                                     tokens.data(), weight(registry.token_embedding),
                                     weight(registry.position_embedding),
                                     weight(registry.embed_scale), rows(), T, config.width);
        embedding_backward(gradient(registry.token_embedding),
                           gradient(registry.position_embedding), tokens.data(),
                           acts.dresidual.begin(), B, T, config.width);
    }

    void clear_stream_gradients() {
        for (Array<A>* gradient : {&acts.dresidual, &acts.dsecond, &acts.dstart})
            std::fill_n(gradient->begin(), gradient->size ? rows() * config.width : 0, A(0));
        std::fill(acts.dvalues.begin(), acts.dvalues.end(), A(0));
    }

    Junction junction_of(int k) const { return junction(config.scheme, config.layers, k); }
    JunctionArguments<S> junction_arguments(const Junction& j, int k) {
        JunctionArguments<S> x;
        x.junction = j, x.norm = config.norm, x.eps = config.norm_eps;
        x.rows = rows(), x.C = config.width;
        x.p = {parameters, registry.junctions[k]}, x.dp = {gradients, registry.junctions[k]};
        x.r_prev = before(k), x.r = residual(k), x.stats = stats(k);
        if (j.branch) x.b = branch(k);
        if (acts.input.slot[k] >= 0) x.u = input(k);
        if (j.second) x.y_prev = second(std::max(k - 1, 0)), x.y = second(k);
        if (j.adds_start) x.x0 = start();
        x.du = acts.dinput, x.dr = acts.dresidual, x.db = acts.dbranch;
        x.dy = acts.dsecond, x.dx0 = acts.dstart;
        return x;
    }
    void join_forward(int k) {
        Junction j = junction_of(k);
        const A* r_prev = before(k);
        if (j.mixing != Mixing::sum) {
            mix_forward(j, k);
            j = entering(j), r_prev = residual(k);
        }
        const Timed timer(profile, costs().junction_forward(j));
        JunctionArguments<S> x = junction_arguments(j, k);
        x.r_prev = r_prev;
        junction_forward(x, stopped[k]);
    }
    void join_backward(int k) {
        const Junction j = junction_of(k);
        const bool mixes = j.mixing != Mixing::sum;
        if (mixes) std::fill_n(+acts.dresidual, rows() * config.width, A(0)); // its r ends here
        {
            const Junction rest = mixes ? entering(j) : j;
            const Timed timer(profile, costs().junction_backward(rest));
            junction_backward(junction_arguments(rest, k), acts.scratch.begin());
        }
        if (mixes) mix_backward(j, k);
    }

    // residual(k), where it is not a sum.
    void mix_forward(const Junction& j, int k) {
        const Timed timer(profile, costs().mix_forward(j, k));
        if (j.mixing == Mixing::streams) return streams_forward(stream_arguments(k));
        sources_forward(source_arguments(k));
    }
    // From its gradient in dresidual to dbranch; at the first junction, to the embedding's gradient
    // in dresidual.
    void mix_backward(const Junction& j, int k) {
        const Timed timer(profile, costs().mix_backward(j, k));
        if (j.mixing == Mixing::streams)
            return streams_backward(stream_arguments(k), acts.scratch.begin());
        sources_backward(source_arguments(k), acts.scratch.begin());
        if (k == 1) std::copy_n(acts.dsources.begin(), rows() * config.width, +acts.dresidual);
    }
    StreamArguments<S> stream_arguments(int k) {
        const JunctionParams& p = registry.junctions[k];
        StreamArguments<S> x;
        x.shape = acts.stream_shape, x.rows = rows();
        auto tensor = [&](const Slots<Array<A>>& slots, int k, int64_t row) {
            return slots[k] + first * row;
        };
        const int64_t width = x.shape.width(), maps = x.shape.maps();
        x.before = k == 0 ? embedded() : tensor(acts.streams, k - 1, width);
        if (k > 0) x.maps_before = tensor(acts.maps, k - 1, maps), x.b = branch(k);
        x.X = tensor(acts.streams, k, width), x.h = residual(k);
        x.weight = weight(p.stream_weight), x.bias = weight(p.stream_bias);
        x.scale = weight(p.stream_scale);
        if (x.weight) {
            x.projected = tensor(acts.projected, k, maps), x.maps = tensor(acts.maps, k, maps);
            x.rstd = tensor(acts.stream_rstd, k, 1);
        }
        x.dh = x.dembedded = acts.dresidual, x.dX = acts.dstreams, x.dmaps = acts.dmaps;
        x.dprojected = acts.dprojected, x.db = acts.dbranch;
        x.dweight = gradient(p.stream_weight), x.dbias = gradient(p.stream_bias);
        x.dscale = gradient(p.stream_scale);
        return x;
    }
    SourceArguments<S> source_arguments(int k) {
        const JunctionParams& p = registry.junctions[k];
        SourceArguments<S> x;
        x.shape = acts.source_shape, x.k = k, x.rows = rows(), x.eps = config.norm_eps;
        x.embedded = embedded(), x.branches = branch(1), x.stride = acts.branch.stride;
        x.query = weight(p.query), x.key_weight = weight(p.key_weight), x.h = residual(k);
        x.dh = acts.dresidual, x.last = k == 2 * config.layers, x.db = acts.dbranch;
        x.dsources = acts.dsources, x.dstride = acts.branch.stride;
        x.dquery = gradient(p.query), x.dkey_weight = gradient(p.key_weight);
        return x;
    }

    // The matrices of layer l, (OC, C) and (OC), as offsets.
    struct Matrix {
        const char* name;
        int64_t weight, bias;
        int C, OC, layer;
    };
    Matrix qkv_matrix(int l) const {
        const LayerParams& p = registry.layers[l];
        return {"qkv", p.qkv, p.qkv_bias, config.width, config.qkv_width(), l};
    }
    Matrix attention_out_matrix(int l) const {
        const LayerParams& p = registry.layers[l];
        return {"attention out", p.attn_out, p.attn_out_bias, config.q_width(), config.width, l};
    }
    Matrix mlp_in_matrix(int l) const {
        const LayerParams& p = registry.layers[l];
        return {"MLP in", p.mlp_in, p.mlp_in_bias, config.width, config.mlp_in_width(), l};
    }
    Matrix mlp_out_matrix(int l) const {
        const LayerParams& p = registry.layers[l];
        return {"MLP out", p.mlp_out, p.mlp_out_bias, config.mlp_width, config.width, l};
    }
    template <class Out> void multiply_forward(Out* out, const S* in, const Matrix& m) {
        const Timed timer(profile, costs().matmul_forward(m.name, rows(), m.C, m.OC, sizeof(Out)));
        if constexpr (std::is_same_v<Out, S>) {
            matmul_forward(out, in, weight(m.weight), weight(m.bias), rows(), m.C, m.OC);
        } else {
            std::vector<Out> bias;
            if (m.bias >= 0) bias.assign(weight(m.bias), weight(m.bias) + m.OC);
            matmul_forward(out, in, weight(m.weight), m.bias < 0 ? nullptr : bias.data(), rows(),
                           m.C, m.OC);
        }
    }
    void multiply_backward(S* din, const S* dout, const S* in, const Matrix& m) {
        {
            const Timed timer(profile, costs().matmul_backward_input(m.name, rows(), m.C, m.OC));
            matmul_backward_input(din, dout, weight(m.weight), rows(), m.C, m.OC);
        }
        if (!gradients.size || of_gradients.rests(m.layer)) return;
        const bool add = !overwrite_gradients;
        const Timed timer(profile, costs().matmul_backward_weight(m.name, rows(), m.C, m.OC, add));
        matmul_backward_weight(gradient(m.weight), gradient(m.bias), dout, in, rows(), m.C, m.OC,
                               add);
    }

    // branch(2l + 1) = attention of input(2l)
    void attention_sublayer_forward(int l) {
        S* computed = qkv(l) + int64_t(first) * config.qkv_width();
        if (config.rope() || config.qkv_norms()) {
            // Rounded once, after norm and rotation.
            A* unrounded = acts.unrounded_qkv;
            if constexpr (exact) unrounded = computed;
            multiply_forward(unrounded, input(2 * l), qkv_matrix(l));
            mix_values(l, unrounded);
            const Timed timer(profile, costs().qkv_forward(sizeof(A)));
            qkv_forward(qkv(l), unrounded, qkv_raw(l), qkv_stats(l),
                        {+parameters, registry.layers[l]}, config.norm_eps, cos_sin(l),
                        attention(l));
        } else {
            multiply_forward(computed, input(2 * l), qkv_matrix(l));
            mix_values(l, computed);
        }
        {
            const Timed timer(profile, costs().attention_forward());
            attention_forward(attended(l), lse(l), qkv(l), attention(l));
        }
        multiply_forward(branch(2 * l + 1), attended(l) + int64_t(first) * config.q_width(),
                         attention_out_matrix(l));
    }

    // v of the qkv matmul's output.
    template <class X> void mix_values(int l, X* computed) {
        if (!config.scheme.value_residual) return;
        const Timed timer(profile, costs().mix_values("forward", sizeof(X)));
        lns::mix_values<S>(computed, values(l), values(0), weight(registry.layers[l].value_mix),
                           attention(l));
    }

    // From dbranch to dinput.
    void attention_sublayer_backward(int l) {
        const LayerParams& p = registry.layers[l];
        S *dattended = acts.dnarrow, *dqkv = acts.dwide;
        recompute_input(2 * l);
        multiply_backward(dattended, acts.dbranch, attended(l), attention_out_matrix(l));
        {
            const Timed timer(profile, costs().attention_backward());
            attention_backward(dqkv, dattended, qkv(l), lse(l), cos_sin(l), attention(l));
        }
        if (config.qkv_norms()) {
            const Timed timer(profile, costs().qkv_norm_backward());
            qkv_norm_backward(dqkv, qkv_raw(l), qkv_stats(l), {+parameters, p}, {+gradients, p},
                              acts.scratch.begin(), attention(l));
        }
        if (config.scheme.value_residual) {
            const Timed timer(profile, costs().mix_values("backward", sizeof(S)));
            mix_values_backward<S>(dqkv, acts.dvalues, values(l), values(0), weight(p.value_mix),
                                   gradient(p.value_mix), acts.scratch.begin(), attention(l));
        }
        multiply_backward(acts.dinput, dqkv, input(2 * l), qkv_matrix(l));
    }

    // branch(2l + 2) = MLP of input(2l + 1)
    void mlp_sublayer_forward(int l) {
        multiply_forward(hidden(l), input(2 * l + 1), mlp_in_matrix(l));
        activate(l, "forward");
        multiply_forward(branch(2 * l + 2), activated(l), mlp_out_matrix(l));
    }
    void activate(int l, const char* group) {
        const Timed timer(profile, costs().activation_forward(group));
        activation_forward(config.activation, activated(l), hidden(l), rows(), config.mlp_width);
    }

    // From dbranch to dinput.
    void mlp_sublayer_backward(int l) {
        S *dactivated = acts.dnarrow, *dhidden = acts.dwide;
        if (options.recompute == Recompute::activations) activate(l, "recompute");
        multiply_backward(dactivated, acts.dbranch, activated(l), mlp_out_matrix(l));
        {
            const Timed timer(profile, costs().activation_backward());
            activation_backward(config.activation, dhidden, dactivated, hidden(l), rows(),
                                config.mlp_width);
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
        const Timed timer(profile, costs().input_recompute());
        const Junction j = junction_of(k);
        const JunctionArguments<S> x = junction_arguments(j, k);
        const int C = config.width;
#pragma omp parallel for
        for (int64_t row = 0; row < rows(); row++) {
            const A* r = residual(k) + row * C;
            S* u = input(k) + row * C;
            if (j.reads_second) {
                A* z = thread_scratch<A>(C);
                add_second(x, row, z);
                r = z;
            }
            if (j.in_norm)
                in_norm_forward(x, stats(k)[row].in, r, u);
            else
                for (int i = 0; i < C; i++) u[i] = r[i];
        }
    }

    // The head and its loss, of n rows from `begin` on. A few rows at a time, so that logits
    // (rows, V) never exist. Writes loss_scale × their gradient to dlogits (n, V) unless that is
    // null.
    void head_forward(const int* targets, S* dlogits, double loss_scale, int64_t begin, int64_t n) {
        const int V = config.vocab_size, C = config.width;
        for (int64_t row = begin; row < begin + n; row += acts.logit_rows) {
            const int64_t part = std::min(acts.logit_rows, begin + n - row);
            S* dpart = dlogits ? dlogits + (row - begin) * V : nullptr;
            A* x = logits();
            if constexpr (exact)
                if (dpart) x = dpart;
            {
                const Timed timer(profile, costs().matmul_forward("head", part, C, V, sizeof(A)));
                matmul_forward<S, A>(x, input(2 * config.layers) + row * C, weight(registry.head),
                                     nullptr, part, C, V);
            }
            const Timed timer(profile, costs().loss(part));
            cross_entropy(acts.losses + row, x, dpart, targets + row, loss_scale, part, V);
        }
    }
    A* logits() {
        if constexpr (exact)
            if (acts.logits.size == 0) return acts.dlogits;
        return acts.logits;
    }

    // Forward and backward, to the gradient of the final norm's output in dinput.
    void head_forward_backward(const int* targets, double loss_scale) {
        const int V = config.vocab_size, C = config.width;
        for (int64_t row = 0; row < rows(); row += acts.head_rows) {
            const int64_t n = std::min(acts.head_rows, rows() - row);
            S* dlogits = acts.dlogits;
            head_forward(targets, dlogits, loss_scale, row, n);
            {
                const Timed timer(profile, costs().matmul_backward_input("head", n, C, V));
                matmul_backward_input(acts.dinput + row * C, dlogits, weight(registry.head), n, C,
                                      V);
            }
            if (!gradients.size) continue;
            const bool add = !overwrite_gradients || row > 0;
            const Timed timer(profile, costs().matmul_backward_weight("head", n, C, V, add));
            matmul_backward_weight<S>(gradient(registry.head), nullptr, dlogits,
                                      input(2 * config.layers) + row * C, n, C, V, add);
        }
    }
    double sum_of_losses() const {
        double sum = 0;
        for (int64_t row = 0; row < rows(); row++) sum += double(acts.losses[row]);
        return sum;
    }

    double loss(const int* inputs, const int* targets, int b, int t) override {
        forward(inputs, b, t);
        check_targets(targets, rows());
        head_forward(targets, nullptr, 0, 0, rows());
        return sum_of_losses();
    }

    void score(const int* inputs, int b, int t, const Branches& branched,
               const std::vector<ScoredToken>& scored, double* out) override {
        forward(inputs, b, t, 0, branched);
        score_rows(scored, out);
    }
    // The head on the rows that are scored, a part at a time.
    void score_rows(const std::vector<ScoredToken>& scored, double* out) {
        const int V = config.vocab_size, C = config.width;
        check_scored(scored, rows());
        std::vector<S> u(size_t(acts.logit_rows) * C);
        std::vector<int> targets(acts.logit_rows);
        for (size_t done = 0; done < scored.size(); done += targets.size()) {
            const size_t n = std::min(targets.size(), scored.size() - done);
            for (size_t i = 0; i < n; i++) {
                const auto [row, token] = scored[done + i];
                std::copy_n(input(2 * config.layers) + row * C, C, &u[i * C]);
                targets[i] = token;
            }
            matmul_forward<S, A>(logits(), u.data(), weight(registry.head), nullptr, int64_t(n), C,
                                 V);
            cross_entropy<S>(acts.losses.begin(), logits(), nullptr, targets.data(), 0, int64_t(n),
                             V);
            for (size_t i = 0; i < n; i++) out[done + i] = -double(acts.losses[i]);
        }
    }

    double loss_and_gradients(const int* inputs, const int* targets, int b, int t,
                              double loss_scale) override {
        if (!gradients.size) fail("this model was made without gradients");
        forward(inputs, b, t);
        check_targets(targets, rows());
        head_forward_backward(targets, loss_scale);
        backward();
        overwrite_gradients = false;
        return sum_of_losses();
    }

    // If the tokens continue those of the last call, as in generating text, only the new positions
    // are computed.
    void logits(const int* inputs, int b, int t, bool last_only, float* out) override {
        int from = 0;
        if (kv_cache_valid && last_only && b == 1)
            while (from < std::min(t - 1, T) && inputs[from] == tokens[from]) from++;
        forward(inputs, b, t, from);
        const int V = config.vocab_size, C = config.width;
        const int64_t step = last_only ? T : acts.logit_rows;
        for (int64_t row = last_only ? T - 1 - first : 0; row < rows(); row += step) {
            const int64_t n = last_only ? 1 : std::min(step, rows() - row);
            A* x = logits();
            matmul_forward<S, A>(x, input(2 * config.layers) + row * C, weight(registry.head),
                                 nullptr, n, C, V);
            for (int64_t i = 0; i < n * V; i++) *out++ = float(x[i]);
        }
        kv_cache_valid = b == 1 && acts.qkv.keeps(0);
    }

    // The first backward pass overwrites the gradients of matmuls: only the others are zeroed here.
    void zero_gradients(const Hyperparameters& hyperparameters = {}) override {
        if (!gradients.size) return;
        const Timed timer(profile, costs().zero_gradients());
        of_gradients = hyperparameters;
        overwrite_gradients = true;
        zero_gradients_where([&](const Param& p) { return !overwritten(p); });
    }
    bool overwritten(const Param& p) const {
        return p.offset == registry.head || (p.layer_matrix && !of_gradients.rests(p.layer));
    }
    // Before anything reads gradients that no pass has written.
    void zero_remaining_gradients() {
        if (!overwrite_gradients) return;
        zero_gradients_where([&](const Param& p) { return overwritten(p); });
        overwrite_gradients = false;
    }
    template <class Wanted> void zero_gradients_where(const Wanted& wanted) {
#pragma omp parallel
        for (const Param& p : registry.params) {
            if (!wanted(p)) continue;
            const int64_t end = p.offset + p.size();
#pragma omp for nowait schedule(static)
            for (int64_t i = p.offset; i < end; i++) gradients[i] = 0;
        }
    }

    double gradient_norm() override {
        const Timed timer(profile, costs().gradient_norm(registry.size));
        zero_remaining_gradients();
        // Norms and biases of layers that rest have gradients so far.
        zero_gradients_where(
            [&](const Param& p) { return !p.layer_matrix && of_gradients.rests(p.layer); });
        return std::sqrt(sum_of_squares(gradients.begin(), registry.size));
    }

    void update(const Hyperparameters& o) override {
        if (options.purpose != Purpose::training) fail("this model was made without an optimizer");
        kv_cache_valid = false;
        zero_remaining_gradients();
        for (const UpdateRange& range : optimizer_layout.ranges_of(o)) {
            if (o.rests(range.layer)) continue;
            if (master.size)
                update_range(o, range, master.begin(), parameters.begin());
            else
                update_range<S>(o, range, parameters.begin(), nullptr);
        }
    }
    template <class W>
    void update_range(const Hyperparameters& o, const UpdateRange& range, W* weights, S* copy) {
        if (options.moments == DType::bf16)
            update_range<W, bf16>(o, range, weights, copy);
        else
            update_range<W, A>(o, range, weights, copy);
    }
    template <class W, class M>
    void update_range(const Hyperparameters& o, const UpdateRange& range, W* weights, S* copy) {
        auto state = [&](const char* name) {
            const size_t s = size_t(optimizer->index(name));
            return state_array<M>(states[s]) + range.states[s];
        };
        const bool stochastic = options.stochastic_rounding && (!exact || !std::is_same_v<M, A>);
        switch (range.rule) {
        case UpdateRule::adamw: {
            const Timed timer(profile, costs().adamw(range.size(), sizeof(M), copy));
            const AdamWBuffers<S, W, M> x{weights, copy, gradients, state("m"), state("v")};
            stochastic ? adamw_update<true>(x, o, registry, range)
                       : adamw_update<false>(x, o, registry, range);
            break;
        }
        case UpdateRule::muon:
        case UpdateRule::normuon: {
            const Timed timer(profile, costs().muon(registry, range, sizeof(M), copy));
            M* row_moments = nullptr;
            if (range.rule == UpdateRule::normuon) {
                const int s = optimizer->index("v_rows");
                row_moments = state_array<M>(states[size_t(s)]) +
                              optimizer_layout.offset(s, registry.params[range.first]);
            }
            const MuonBuffers<S, W, M> x{weights,     copy,         gradients,       state("m"),
                                         row_moments, muon_scratch, muon_row_scratch};
            stochastic ? muon_update<true>(x, o, registry, range, optimizer_layout)
                       : muon_update<false>(x, o, registry, range, optimizer_layout);
            break;
        }
        }
    }
    template <class M> static M* state_array(const State& state) {
        if constexpr (std::is_same_v<M, A>)
            return state.full;
        else
            return state.rounded;
    }

    // gpt/cpu/inspect.h
    std::string device() const override { return "cpu"; }
    std::string dtype() const override;
    int64_t bytes() const override { return bytes_held; }
    void set_parameter(int64_t i, A value);
    void read(Buffer buffer, const Param& p, float* out) override;
    void write(Buffer buffer, const Param& p, const float* values) override;
    float* host_gradients() override;
    std::string first_nonfinite() override;
    void enter(int k);
    void enter_backward(int k);
    void leave(int k);
    void embed(const int* inputs, int b, int t, const Branches& branched = {}) override;
    void run_layer(int l) override;
    double finish(const int* targets) override;
    void finish(const std::vector<ScoredToken>& scored, double* out) override;
    void finish_backward(const int* targets, double loss_scale) override;
    void run_layer_backward(int l) override;
    template <class F> void with_stream(Stream stream, const F& f);
    A* writable(Stream stream);
    void read(Stream stream, float* out) override;
    void write(Stream stream, const float* values) override;
    void read_rows(Stream stream, const std::vector<int64_t>& rows, float* out) override;
    void write_rows(Stream stream, const std::vector<int64_t>& to, const float* values) override;
    void rewind(int l) override { between = 2 * l; }
    std::vector<Moments> row_moments(Stream stream) override;
    std::vector<double> row_chords(int l, int m) override;
    std::vector<double> gradient_squares() override;
};

} // namespace lns

#include "gpt/cpu/inspect.h" // defines: other members of CpuModel, plan_memory

namespace lns {

std::unique_ptr<Model> make_cpu_model(const Config& config, int B, int T,
                                      const ModelOptions& options) {
    if (options.dtype == DType::bf16)
        return std::make_unique<CpuModel<bf16>>(config, B, T, options);
    return std::make_unique<CpuModel<float>>(config, B, T, options);
}

MemoryPlan plan_cpu_memory(const Config& config, int B, int T, const ModelOptions& options) {
    return options.dtype == DType::bf16 ? plan_memory<bf16>(config, B, T, options)
                                        : plan_memory<float>(config, B, T, options);
}

// ---------------------------------------------------------------------------------------------
// Training. gpt/run/training.h has the run and the functions that set it up, print and save.

// Moves the weights down the gradient of the mean loss over all micro-batches and ranks. Returns
// nothing, and changes nothing, if a stop was requested between two micro-batches.
std::optional<Step> train_step(Run& run) {
    const Options& o = run.o;
    const int64_t number = run.state.step + 1;
    const double start = now();

    draw_tokens(run);
    StepInput input = {run.inputs.data(), run.targets.data(), run.micro_batches, run.B, run.T};
    input.loss_scale = 1 / count_targets(run);
    input.grad_clip = o.grad_clip, input.gate_clip = o.clip_gates;
    const double lr = learning_rate(run.schedule, number);
    Schedule of_muon = run.schedule;
    of_muon.peak = o.muon_peak();
    input.hyperparameters = hyperparameters(o, lr, learning_rate(of_muon, number), number);
    if (run.lisa) input.hyperparameters.layer_steps = run.lisa->updates(number);

    begin_step(run, input);
    draw_next_tokens(run);
    const StepResult result = end_step(run);
    if (result.stopped) return std::nullopt;

    run.state.step = number;
    run.state.tokens += run.tokens_per_step;
    const double seconds = now() - start;
    record_time(run, seconds);
    return Step{result.loss, lr, result.grad_norm, seconds};
}

Evaluation evaluate(Model& model, Loader& loader, const Ranks& ranks, int B, int T, int64_t tokens,
                    const std::function<bool()>& stop) {
    const uint64_t wanted = std::max<uint64_t>(1, uint64_t(tokens + T - 1) / T);
    const uint64_t windows = std::min(wanted, loader.windows_per_epoch());
    std::vector<int> inputs(size_t(B) * T), targets(inputs.size());
    double loss_and_targets[2] = {0, 0}; // sums
    CaughtError error;
    for (uint64_t first = 0; first < windows; first += uint64_t(ranks.size) * B) {
        if (stop && first > 0 && ranks.any(stop())) return {NAN, 0, true};
        const uint64_t window = first + uint64_t(ranks.rank) * B; // of this rank
        if (window >= windows) continue;
        const int b = int(std::min<uint64_t>(B, windows - window));
        error.run([&] {
            loader.restore({0, window});
            loader.next(b, inputs.data(), targets.data());
            Ranks::TimedSection section(ranks, "a batch of validation");
            loss_and_targets[0] += model.loss(inputs.data(), targets.data(), b, T);
        });
        for (size_t i = 0; i < size_t(b) * T; i++) loss_and_targets[1] += targets[i] >= 0;
    }
    error.share(ranks);
    ranks.sum(loss_and_targets, 2);
    const auto [loss, n] = loss_and_targets;
    if (n == 0) fail("no token of the validation data has a target");
    return {loss / n, int64_t(n)};
}

// Returns NaN if a stop was requested before the end.
double validate(Run& run) {
    const Evaluation e = evaluate(*run.model, *run.val_loader, run.ranks, run.B, run.T,
                                  run.o.val_tokens, [&] { return should_stop(run); });
    if (e.stopped) return NAN;
    check_finite(run, run.state.step, "the validation loss", e.loss);
    run.state.val_loss = e.loss;
    if (!(run.state.best_val_loss <= e.loss)) run.state.best_val_loss = e.loss;
    run.variance = run.model->residual_variance(); // of the last validation batch
    return e.loss;
}

// Steps until the last, or until a stop is requested: then returns false.
bool train(Run& run) {
    const Options& o = run.o;
    const bool first = run.ranks.first(); // alone prints and saves
    bool stop = false;
    while (!stop && run.state.step < o.steps) {
        const std::optional<Step> step = train_step(run);
        if (!step) {
            if (first) save_step(run, true);
            return false;
        }
        const bool last = run.state.step == o.steps;
        stop = any_should_stop(run) && !last;
        auto due = [&](int64_t every) {
            return last || (!stop && every > 0 && run.state.step % every == 0);
        };

        double val_loss = NAN;
        if (due(o.val_every)) {
            val_loss = validate(run);
            score_tasks(run);
            stop = stop || (std::isnan(val_loss) && !last);
        }
        if (!first) continue;
        std::optional<LayerDiagnostics> probes;
        if (o.probe_every > 0 && due(o.probe_every)) probes = probe_layers(run);
        log_step(run, *step, val_loss, probes);
        print_step(run, *step, val_loss, last || stop);
        if (o.sample_tokens > 0 && due(o.sample_every)) print_sample(run);
        if (stop || due(o.save_every)) save_step(run, last || stop);
    }
    return !stop;
}

} // namespace lns

#ifndef TESTING
int main(int argc, char** argv) {
    using namespace lns;
    return run_program([&](const Ranks& ranks) {
        CommandLine line = read_command_line(argc, argv, ranks);
        if (line.options.command != Options::Command::train)
            return run_command(line.options, ranks);
        Run run(std::move(line.options), ranks, std::move(line.lock));
        if (!set_up(run)) return 0;
        const bool finished = save_on_error(run, train);
        return finish(run, finished);
    });
}
#endif
