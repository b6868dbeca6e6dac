// Attention residuals on the CPU: what sublayers read is a softmax over the embedding and all
// branches before (SourceShape in gpt/model/mixing.h has the equations).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gpt/cpu/arrays.h"
#include "gpt/cpu/exp.h"
#include "gpt/model/mixing.h"

namespace lns {

// Of junction k ≥ 1, on `rows` tokens.
template <class S> struct SourceArguments {
    using A = Acc<S>;
    SourceShape shape = {};
    int k = 0;
    int64_t rows = 0;
    double eps = 0;                // of the keys' norm
    const A* embedded = nullptr;   // (rows, C)
    const S* branches = nullptr;   // that of sublayer 1, (rows, C); the others follow
    int64_t stride = 0;            // from one to the next
    const S* query = nullptr;      // w (C)
    const S* key_weight = nullptr; // of the keys' norm, (C); null: 1

    A* h = nullptr; // (rows, C), written

    // Backward, from dh (rows, C). dsources: gradients of the sources, (rows, C) each, dstride
    // apart; written if this is the last junction, else added to. db: that of branch k.
    const A* dh = nullptr;
    A* dsources = nullptr;
    int64_t dstride = 0;
    bool last = false;
    S* db = nullptr;
    A *dquery = nullptr, *dkey_weight = nullptr; // added to, unless null

    A scale(int c) const { return A(query[c]) * (key_weight ? A(key_weight[c]) : A(1)); }
};

// The sources of a row and their weights, in scratch of source_scratch numbers.
template <class A> struct SourceRow {
    A *v, *rstd, *score, *weight; // (count, C), (count) each
};
inline int64_t source_scratch(int count, int C) { return int64_t(count) * (C + 3); }

template <class S>
SourceRow<Acc<S>> source_row(const SourceArguments<S>& x, int64_t row, Acc<S>* scratch) {
    using A = Acc<S>;
    const int C = x.shape.C, count = x.shape.count(x.k);
    const int64_t at = row * C;
    SourceRow<A> s;
    s.v = scratch, s.rstd = s.v + int64_t(count) * C, s.score = s.rstd + count;
    s.weight = s.score + count;
    for (int i = 0; i < count; i++) {
        A* v = s.v + int64_t(i) * C;
        for (int c = 0; c < C; c++) v[c] = i == 0 ? x.embedded[at + c] : A(0);
        for (int k = x.shape.begin(i); i > 0 && k <= x.shape.end(i, x.k); k++) {
            const S* b = x.branches + (k - 1) * x.stride + at;
            for (int c = 0; c < C; c++) v[c] += A(b[c]);
        }
        A square = 0, dot = 0;
#pragma omp simd reduction(+ : square, dot)
        for (int c = 0; c < C; c++) {
            square += v[c] * v[c];
            dot += v[c] * x.scale(c);
        }
        s.rstd[i] = A(1) / std::sqrt(square / A(C) + A(x.eps));
        s.score[i] = dot * s.rstd[i];
    }
    const A largest = *std::max_element(s.score, s.score + count);
    A sum = 0;
    for (int i = 0; i < count; i++) sum += s.weight[i] = exp_below(s.score[i] - largest);
    for (int i = 0; i < count; i++) s.weight[i] /= sum;
    return s;
}

template <class S> void sources_forward(const SourceArguments<S>& x) {
    using A = Acc<S>;
    const int C = x.shape.C, count = x.shape.count(x.k);
#pragma omp parallel for
    for (int64_t row = 0; row < x.rows; row++) {
        const SourceRow<A> s = source_row(x, row, thread_scratch<A>(source_scratch(count, C)));
        A* h = x.h + row * C;
        std::fill(h, h + C, A(0));
        for (int i = 0; i < count; i++)
            for (int c = 0; c < C; c++) h[c] += s.weight[i] * s.v[int64_t(i) * C + c];
    }
}

inline int64_t sources_scratch(int64_t rows, int C) { return row_chunks(rows) * C; }

// With a the softmax and s its argument: da_i = dh · v_i, ds = a ⊙ (da − a · da), and v_i has the
// gradient a_i dh, besides what ds_i has through the norm. scratch: sources_scratch(rows, C).
template <class S> void sources_backward(const SourceArguments<S>& x, Acc<S>* scratch) {
    using A = Acc<S>;
    const int C = x.shape.C, count = x.shape.count(x.k);
    const int64_t rows = x.rows, chunks = row_chunks(rows);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A* sums = scratch + chunk * C; // of ds_i v_i / rms(v_i)
        std::fill(sums, sums + C, A(0));
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            A* mine = thread_scratch<A>(source_scratch(count, C) + count);
            const SourceRow<A> s = source_row(x, row, mine);
            A *da = mine + source_scratch(count, C), mean = 0;
            const A* dh = x.dh + row * C;
            for (int i = 0; i < count; i++) {
                const A* v = s.v + int64_t(i) * C;
                A dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int c = 0; c < C; c++) dot += dh[c] * v[c];
                da[i] = dot;
                mean += s.weight[i] * dot;
            }
            for (int i = 0; i < count; i++) {
                const A* v = s.v + int64_t(i) * C;
                A* dv = x.dsources + i * x.dstride + row * C;
                const A ds = s.weight[i] * (da[i] - mean) * s.rstd[i];
                const A slope = ds * s.rstd[i] * s.score[i] / A(C);
                for (int c = 0; c < C; c++) {
                    const A d = s.weight[i] * dh[c] + ds * x.scale(c) - slope * v[c];
                    dv[c] = x.last ? d : dv[c] + d;
                    sums[c] += ds * v[c];
                }
            }
            const A* dv = x.dsources + (count - 1) * x.dstride + row * C;
            for (int c = 0; c < C; c++) x.db[row * C + c] = dv[c];
        }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int c = 0; c < C; c++) {
            const A sum = scratch[chunk * C + c];
            if (x.dquery) x.dquery[c] += sum * (x.key_weight ? A(x.key_weight[c]) : A(1));
            if (x.dkey_weight) x.dkey_weight[c] += sum * A(x.query[c]);
        }
}

} // namespace lns
