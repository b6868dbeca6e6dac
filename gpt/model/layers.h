// What the layers of both backends share: a junction's parameters and the rotary table.
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
