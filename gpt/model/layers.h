// What the layers of both backends share: a junction's operands and the rotary table.
#pragma once

#include <cmath>
#include <cstdint>

#include "gpt/model/config.h"
#include "gpt/model/params.h"
#include "gpt/model/scheme.h"

namespace lns {

// A junction's parameters, or their gradients; null where it has none.
template <class P> struct JunctionPointers {
    P *branch_weight = nullptr, *branch_bias = nullptr, *out_weight = nullptr, *out_bias = nullptr,
      *in_weight = nullptr, *in_bias = nullptr, *gamma = nullptr, *gate = nullptr;

    JunctionPointers() = default;
    // base: of the flat buffer, or null.
    JunctionPointers(P* base, const JunctionParams& p) {
        auto pointer = [&](int64_t offset) {
            return base && offset >= 0 ? base + offset : nullptr;
        };
        branch_weight = pointer(p.branch.weight), branch_bias = pointer(p.branch.bias);
        out_weight = pointer(p.out.weight), out_bias = pointer(p.out.bias);
        in_weight = pointer(p.in.weight), in_bias = pointer(p.in.bias);
        gamma = pointer(p.gamma), gate = pointer(p.gate);
    }
};

// The vectors (C) among them: weight and bias of three norms, and γ.
const int junction_vectors = 7;

// The operands of a junction on `rows` tokens of width C. S: the scalar of activations and
// parameters; A: of the residual stream; G: of the parameters' gradients; Stats: the statistics of
// a row's norms.
template <class S, class A, class G, class Stats> struct JunctionOperands {
    Junction junction;
    NormType norm = NormType::rms;
    double eps = 0;
    int64_t rows = 0;
    int C = 0;
    JunctionPointers<const S> p;

    // Forward: r and u (rows, C) from r_prev and b (rows, C), and stats (rows). r may be r_prev. b
    // is null without a branch. u may be null without an in-norm: it is r then.
    const A* r_prev = nullptr;
    const S* b = nullptr;
    A* r = nullptr;
    S* u = nullptr;
    Stats* stats = nullptr;

    // Backward, besides: db and, in place of dr, the gradient of r_prev; from du (the gradient of
    // u, or of r without an in-norm) and dr (the gradient of r from later layers). Adds to dp.
    const S* du = nullptr;
    A* dr = nullptr;
    S* db = nullptr;
    JunctionPointers<G> dp;
};

// A junction is split in two between layers that run one by one: the norms that leave a layer, and
// the norm that enters the next.
inline Junction leaving(Junction j) {
    j.in_norm = false;
    return j;
}
inline Junction entering(const Junction& j) {
    Junction in;
    in.branch = false;
    in.in_norm = j.in_norm, in.in_scale = j.in_scale;
    return in;
}

// Rotary positions (arXiv 2104.09864): table (positions, HS/2) of (cos, sin) of t · θ^(−2i/HS).
template <class CosSin> void fill_rotary_table(CosSin* table, const Config& c, int64_t positions) {
    using A = decltype(table->cos);
    const int half = c.head_size / 2;
    for (int64_t t = 0; t < positions; t++)
        for (int i = 0; i < half; i++) {
            const double angle = double(t) * std::pow(c.rope_theta, -2.0 * i / c.head_size);
            table[t * half + i] = {A(std::cos(angle)), A(std::sin(angle))};
        }
}

} // namespace lns
