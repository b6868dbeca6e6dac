// What the layers of both backends share: parameters of a junction and of attention, and the rotary
// table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gpt/model/config.h"
#include "gpt/model/params.h"
#include "gpt/model/scheme.h"

namespace lns {

// A junction's parameters, or their gradients; null where it has none.
template <class P> struct JunctionPointers {
    P *branch_weight = nullptr, *branch_bias = nullptr, *out_weight = nullptr, *out_bias = nullptr,
      *in_weight = nullptr, *in_bias = nullptr, *second_weight = nullptr, *second_bias = nullptr,
      *branch_alpha = nullptr, *out_alpha = nullptr, *in_alpha = nullptr, *second_alpha = nullptr,
      *gamma = nullptr, *omega = nullptr, *gate = nullptr, *start_skip = nullptr,
      *start_weight = nullptr;

    JunctionPointers() = default;
    // base: of the flat buffer, or null.
    JunctionPointers(P* base, const JunctionParams& p) {
        auto pointer = [&](int64_t offset) {
            return base && offset >= 0 ? base + offset : nullptr;
        };
        branch_weight = pointer(p.branch.weight), branch_bias = pointer(p.branch.bias);
        out_weight = pointer(p.out.weight), out_bias = pointer(p.out.bias);
        in_weight = pointer(p.in.weight), in_bias = pointer(p.in.bias);
        second_weight = pointer(p.second.weight), second_bias = pointer(p.second.bias);
        branch_alpha = pointer(p.branch.alpha), out_alpha = pointer(p.out.alpha);
        in_alpha = pointer(p.in.alpha), second_alpha = pointer(p.second.alpha);
        gamma = pointer(p.gamma), omega = pointer(p.omega), gate = pointer(p.gate);
        start_skip = pointer(p.start_skip), start_weight = pointer(p.start_weight);
    }
};

// The vectors (C) among them: weight and bias of four norms, γ and ω.
const int junction_vectors = 10;
// And the scalars, but for a scalar γ: the gate, a and λ of +x0, and α of four norms.
const int junction_scalars = 7;

// The weights of the norms of q, k and v, or their gradients; null where there are none.
template <class P> struct QkvPointers {
    P *q = nullptr, *k = nullptr, *v = nullptr;

    QkvPointers() = default;
    QkvPointers(P* q, P* k, P* v) : q(q), k(k), v(v) {}
    // base: of the flat buffer, or null.
    QkvPointers(P* base, const LayerParams& p) {
        auto pointer = [&](int64_t offset) {
            return base && offset >= 0 ? base + offset : nullptr;
        };
        q = pointer(p.q_norm), k = pointer(p.k_norm), v = pointer(p.v_norm);
    }
};

// A junction is split in two between layers that run one by one: what leaves a layer, and what
// enters the next.
inline Junction leaving(Junction j) {
    j.in_norm = j.reads_second = false;
    return j;
}
inline Junction entering(const Junction& j) {
    Junction in;
    in.branch = false;
    in.in_norm = j.in_norm, in.in_scale = j.in_scale, in.in_eps = j.in_eps;
    in.in_groups = j.in_groups;
    in.second = j.second, in.reads_second = j.reads_second;
    return in;
}

// The angle by which channel i of HS/2 turns from one position to the next: θ^(−2i/HS)
// (arXiv 2104.09864), scaled as transformers does (5.24, modeling_rope_utils.py).
inline double rotary_frequency(const Config& c, int i) {
    const RopeScaling& s = c.rope_scaling;
    const double frequency = std::pow(c.rope_theta, -2.0 * i / c.head_size);
    if (s.type == RopeScaling::none) return frequency;
    if (s.type == RopeScaling::linear) return frequency / s.factor;
    const double periods = s.original_positions * frequency / (2 * 3.14159265358979323846);
    const double kept =
        std::clamp((periods - s.low_frequency) / (s.high_frequency - s.low_frequency), 0.0, 1.0);
    return frequency * (kept + (1 - kept) / s.factor);
}

// Rotary positions: table (positions, HS/2) of (cos, sin).
template <class CosSin> void fill_rotary_table(CosSin* table, const Config& c, int64_t positions) {
    using A = decltype(table->cos);
    const int half = c.head_size / 2;
    for (int64_t t = 0; t < positions; t++)
        for (int i = 0; i < half; i++) {
            const double angle = double(t) * rotary_frequency(c, i);
            table[t * half + i] = {A(std::cos(angle)), A(std::sin(angle))};
        }
}

} // namespace lns
