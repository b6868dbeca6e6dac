// Several residual streams on the CPU, with maps between them (StreamShape in gpt/model/mixing.h
// has the equations).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gpt/cpu/arrays.h"
#include "gpt/cpu/exp.h"
#include "gpt/cpu/gemm.h"
#include "gpt/model/mixing.h"

namespace lns {

// Of a junction, on `rows` tokens. Maps are (rows, maps): H_pre, H_post, H_res.
template <class S> struct StreamArguments {
    using A = Acc<S>;
    StreamShape shape = {};
    int64_t rows = 0;

    // Before: X of the previous junction (rows, n, C), the maps of the sublayer after it and that
    // sublayer's output (rows, C). At junction 0: the embedding (rows, C), null, null.
    const A* before = nullptr;
    const A* maps_before = nullptr;
    const S* b = nullptr;

    // Of the sublayer after this junction; null at the last one.
    const S *weight = nullptr, *bias = nullptr, *scale = nullptr; // φ (maps, n·C), β (maps), α (3)

    // Forward writes X, which may be `before`; h (rows, C); and, if there is φ, φ x and the maps,
    // which may be maps_before, and 1 / rms(X) (rows).
    A *X = nullptr, *h = nullptr, *projected = nullptr, *maps = nullptr, *rstd = nullptr;

    // Backward, from dh (rows, C) and what the previous call, for the next junction, left: dX, the
    // gradient of X by later junctions, and dmaps, that of H_post and H_res. Replaces these by the
    // same of `before` and maps_before; writes db, and at junction 0 the embedding's gradient.
    const A* dh = nullptr;
    A *dX = nullptr, *dmaps = nullptr;
    A* dprojected = nullptr; // (rows, maps), overwritten
    S* db = nullptr;
    A* dembedded = nullptr;
    A *dweight = nullptr, *dbias = nullptr, *dscale = nullptr; // added to, unless null
};

const double stream_eps = 1e-20; // of the norm of X

// exp of H_res's logits, relative to the largest of each column, which Sinkhorn cancels.
template <class S>
void exponentials(const StreamArguments<S>& x, const Acc<S>* projected, Acc<S>* m) {
    using A = Acc<S>;
    const int n = x.shape.n;
    for (int column = 0; column < n; column++) {
        A largest = 0;
        for (int row = 0; row < n; row++) {
            const int i = row * n + column, map = 2 * n + i;
            m[i] = A(x.scale[2]) * projected[map] + A(x.bias[map]);
            largest = row == 0 ? m[i] : std::max(largest, m[i]);
        }
        for (int row = 0; row < n; row++)
            m[row * n + column] = exp_below(m[row * n + column] - largest);
    }
}

template <class S> void streams_forward(const StreamArguments<S>& x) {
    using A = Acc<S>;
    const int n = x.shape.n, C = x.shape.C, M = x.shape.maps();
    const int64_t width = x.shape.width();
#pragma omp parallel for
    for (int64_t row = 0; row < x.rows; row++) {
        A* X = x.X + row * width;
        if (!x.maps_before) {
            for (int i = 0; i < n; i++) std::copy_n(x.before + row * C, C, X + i * C);
        } else {
            A* old = thread_scratch<A>(width);
            std::copy_n(x.before + row * width, width, old);
            const S* b = x.b + row * C;
            const A *post = x.maps_before + row * M + n, *res = post + n;
            for (int i = 0; i < n; i++) {
                for (int c = 0; c < C; c++) X[i * C + c] = post[i] * A(b[c]);
                for (int j = 0; j < n; j++)
                    for (int c = 0; c < C; c++) X[i * C + c] += res[i * n + j] * old[j * C + c];
            }
        }
        if (x.weight)
            x.rstd[row] =
                A(1) /
                std::sqrt(A(sum_of<A>(width, [=](int64_t i) { return X[i] * X[i]; })) / A(width) +
                          A(stream_eps));
    }
    if (x.weight) {
        const std::vector<A> weight(x.weight, x.weight + M * width);
        gemm(false, true, x.rows, M, width, x.X, weight.data(), x.projected, false);
    }
#pragma omp parallel for
    for (int64_t row = 0; row < x.rows; row++) {
        const A* X = x.X + row * width;
        A *h = x.h + row * C, pre[most_streams];
        std::fill(pre, pre + n, A(1) / A(n));
        if (x.weight) {
            A *projected = x.projected + row * M, *maps = x.maps + row * M;
            A sums[sinkhorn_sums * most_streams];
            for (int i = 0; i < M; i++) projected[i] *= x.rstd[row];
            for (int i = 0; i < 2 * n; i++)
                maps[i] = A(1 + i / n) * sigmoid(A(x.scale[i / n]) * projected[i] + A(x.bias[i]));
            exponentials(x, projected, maps + 2 * n);
            sinkhorn(maps + 2 * n, n, sums);
            std::copy_n(maps, n, pre);
        }
        for (int c = 0; c < C; c++) h[c] = pre[0] * X[c];
        for (int i = 1; i < n; i++)
            for (int c = 0; c < C; c++) h[c] += pre[i] * X[i * C + c];
    }
}

inline int64_t streams_scratch(int64_t rows, const StreamShape& shape) {
    return row_chunks(rows) * (shape.maps() + 3);
}

// From the gradient of a row's maps to that of their logits, in place.
template <class S>
void maps_backward(const StreamArguments<S>& x, const Acc<S>* projected, const Acc<S>* maps,
                   Acc<S>* dmaps) {
    using A = Acc<S>;
    const int n = x.shape.n;
    for (int i = 0; i < 2 * n; i++) dmaps[i] *= maps[i] * (A(1) - maps[i] / A(1 + i / n));
    A m[most_streams * most_streams], sums[sinkhorn_sums * most_streams], *dm = dmaps + 2 * n;
    exponentials(x, projected, m);
    sinkhorn(m, n, sums);
    sinkhorn_backward(m, dm, n, sums);
    for (int i = 0; i < n * n; i++) dm[i] *= m[i];
}

// scratch: streams_scratch(rows, shape)
template <class S> void streams_backward(const StreamArguments<S>& x, Acc<S>* scratch) {
    using A = Acc<S>;
    const int n = x.shape.n, C = x.shape.C, M = x.shape.maps();
    const int64_t width = x.shape.width(), rows = x.rows, chunks = row_chunks(rows);
    auto dot_of = [C](const auto* a, const auto* b) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += A(a[c]) * A(b[c]);
        return sum;
    };

    // 1. h = H_pre X and the maps, from X.
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        A* sums = scratch + chunk * (M + 3); // of β's gradient and α's
        std::fill(sums, sums + M + 3, A(0));
        for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
            const A *X = x.X + row * width, *dh = x.dh + row * C;
            A* dX = x.dX + row * width;
            if (!x.weight) {
                for (int i = 0; i < n; i++)
                    for (int c = 0; c < C; c++) dX[i * C + c] = dh[c] / A(n);
                continue;
            }
            const A *projected = x.projected + row * M, *maps = x.maps + row * M;
            A *dmaps = x.dmaps + row * M, *dprojected = x.dprojected + row * M;
            for (int i = 0; i < n; i++) dmaps[i] = dot_of(X + i * C, dh);
            maps_backward(x, projected, maps, dmaps);
            A mean = 0; // of x ⊙ dx
            for (int i = 0; i < M; i++) {
                const int kind = x.shape.kind(i);
                sums[i] += dmaps[i];
                sums[M + kind] += dmaps[i] * projected[i];
                const A d = A(x.scale[kind]) * dmaps[i];
                mean += d * projected[i] / A(width);
                dprojected[i] = x.rstd[row] * d;
            }
            const A shrink = x.rstd[row] * x.rstd[row] * mean;
            for (int i = 0; i < n; i++)
                for (int c = 0; c < C; c++)
                    dX[i * C + c] += maps[i] * dh[c] - shrink * X[i * C + c];
        }
    }
    if (x.weight) {
        const std::vector<A> weight(x.weight, x.weight + M * width);
        gemm(false, false, rows, width, M, x.dprojected, weight.data(), x.dX, true);
        if (x.dweight) gemm(true, false, M, width, rows, x.dprojected, x.X, x.dweight, true);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const A* sums = scratch + chunk * (M + 3);
            for (int i = 0; x.dbias && i < M; i++) x.dbias[i] += sums[i];
            for (int i = 0; x.dscale && i < 3; i++) x.dscale[i] += sums[M + i];
        }
    }

    // 2. X, from what was before.
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        A* dX = x.dX + row * width;
        if (!x.maps_before) {
            A* dembedded = x.dembedded + row * C;
            for (int c = 0; c < C; c++) dembedded[c] = dX[c];
            for (int i = 1; i < n; i++)
                for (int c = 0; c < C; c++) dembedded[c] += dX[i * C + c];
            continue;
        }
        const A *before = x.before + row * width, *post = x.maps_before + row * M + n,
                *res = post + n;
        const S* b = x.b + row * C;
        S* db = x.db + row * C;
        A *dpost = x.dmaps + row * M + n, *dres = dpost + n, *old = thread_scratch<A>(width + C);
        A* sum = old + width;
        std::copy_n(dX, width, old);
        std::fill(dX, dX + width, A(0));
        std::fill(sum, sum + C, A(0));
        for (int i = 0; i < n; i++) {
            const A* d = old + i * C;
            dpost[i] = dot_of(d, b);
            for (int c = 0; c < C; c++) sum[c] += post[i] * d[c];
            for (int j = 0; j < n; j++) {
                dres[i * n + j] = dot_of(d, before + j * C);
                for (int c = 0; c < C; c++) dX[j * C + c] += res[i * n + j] * d[c];
            }
        }
        for (int c = 0; c < C; c++) db[c] = sum[c];
    }
}

} // namespace lns
