// Sizes and arithmetic of the schemes whose junctions mix more than one residual stream and one
// branch: `streams` and `sources` of Mixing in scheme.h. At junction k both compute h, which takes
// r's place: sublayer k + 1 reads u = norm_in(h). All of it is per token, in float.
#pragma once

#include <cstdint>

namespace lns {

// Hyper-connections on a manifold (mHC, arXiv 2512.24880): n residual streams X (n, C). With x =
// vec(X) / rms(vec(X)), the sublayer after a junction has the maps
//
//     H_pre (n)     = σ(α₀ φ_pre x + β_pre)
//     H_post (n)    = 2 σ(α₁ φ_post x + β_post)
//     H_res (n, n)  = Sinkhorn(exp(α₂ φ_res x + β_res))
//
// and reads h = H_pre X; the next junction does X ← H_res X + H_post ⊗ b. X starts as n copies of
// the embedding, and ends as h = the mean of its streams (the paper states neither).
// A row of maps is H_pre, H_post, then the rows of H_res.
struct StreamShape {
    int n, C;
    constexpr int64_t width() const { return int64_t(n) * C; } // of X
    constexpr int maps() const { return n * (n + 2); }
    constexpr int kind(int map) const { return map < n ? 0 : map < 2 * n ? 1 : 2; } // whose α
    // Elements of a row in memory: the maps and three more, rounded up to 8.
    constexpr int row() const { return (maps() + 3 + 7) / 8 * 8; }
};
const int most_streams = 8;

const int sinkhorn_iterations = 20;
const int sinkhorn_sums = 2 * sinkhorn_iterations; // vectors (n)

// Divides n lines of m by their sums. Element j of line i is m[i · line + j · next].
template <class A> constexpr void divide_by_sums(A* m, int n, int line, int next, A* sums) {
    for (int i = 0; i < n; i++) {
        sums[i] = A(1e-30); // not 0, where all numbers have underflowed
        for (int j = 0; j < n; j++) sums[i] += m[i * line + j * next];
        const A inverse = A(1) / sums[i];
        for (int j = 0; j < n; j++) m[i * line + j * next] *= inverse;
    }
}
// dm, the gradient of the quotients m, becomes that of the dividends, which m becomes.
template <class A>
constexpr void divide_by_sums_backward(A* m, A* dm, int n, int line, int next, const A* sums) {
    for (int i = 0; i < n; i++) {
        const A inverse = A(1) / sums[i];
        A dot = 0;
        for (int j = 0; j < n; j++) dot += dm[i * line + j * next] * m[i * line + j * next];
        for (int j = 0; j < n; j++) {
            A &d = dm[i * line + j * next], &x = m[i * line + j * next];
            d = (d - dot) * inverse;
            x *= sums[i];
        }
    }
}

// Makes m (n, n), positive, doubly stochastic: divides columns, then rows by their sums, 20 times
// (Sinkhorn and Knopp, 1967). Writes sums (sinkhorn_sums, n).
template <class A> constexpr void sinkhorn(A* m, int n, A* sums) {
    for (int t = 0; t < sinkhorn_iterations; t++) {
        divide_by_sums(m, n, 1, n, sums + 2 * t * n);
        divide_by_sums(m, n, n, 1, sums + (2 * t + 1) * n);
    }
}
// From m and the sums that it left: turns dm, the gradient of its result, into that of its
// argument, which m becomes.
template <class A> constexpr void sinkhorn_backward(A* m, A* dm, int n, const A* sums) {
    for (int t = sinkhorn_iterations - 1; t >= 0; t--) {
        divide_by_sums_backward(m, dm, n, n, 1, sums + (2 * t + 1) * n);
        divide_by_sums_backward(m, dm, n, 1, n, sums + 2 * t * n);
    }
}

// Attention residuals (arXiv 2603.15031): h = Σ_i softmax_i(w · RMSNorm(v_i)) v_i over the sources
// before a sublayer: v₀ is the embedding, v_i (i ≥ 1) the sum of the branches of block i, as far as
// there are any yet. With one branch a block this is the paper's Full form.
struct SourceShape {
    int C, block; // channels; branches a block
    constexpr int count(int k) const { return 1 + (k + block - 1) / block; } // of junction k
    // Source i ≥ 1 of junction k is the sum of branches begin(i) … end(i, k), counted from 1.
    constexpr int begin(int i) const { return (i - 1) * block + 1; }
    constexpr int end(int i, int k) const { return i * block < k ? i * block : k; } // inclusive
};

} // namespace lns
