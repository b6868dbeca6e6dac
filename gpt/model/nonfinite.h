// The search for the first tensor that is not finite, in the order of computation.
#pragma once

#include <cstdint>
#include <string>

#include "gpt/model/config.h"
#include "gpt/model/params.h"

namespace lns {

// Of the parameters, then of the last pass's activations, then of the gradients from the head down;
// "" if all are finite. M: a backend's model, with accessors of its tensors; c and registry: as its
// memory has them. bad(x, n): whether one of n numbers is not finite.
template <class M, class Bad>
std::string find_nonfinite(M& m, const Config& c, const Registry& registry, bool gradients,
                           const Bad& bad) {
    for (const Param& p : registry.params)
        if (bad(m.weight(p.offset), p.size())) return "the parameter " + p.name;
    if (const int64_t n = m.rows(); n > 0) {
        const auto& acts = m.acts;
        if (bad(m.embedded(), n * c.width)) return "the embedding's output";
        for (int k = 0; k <= 2 * c.layers; k++) {
            const int l = (k - 1) / 2;
            const bool after_attention = k % 2 == 1, after_mlp = k > 0 && k % 2 == 0;
            const std::string layer = "layer " + std::to_string(l + 1) + "'s ";
            if (after_attention && acts.qkv.keeps(l) && bad(m.qkv(l), n * c.qkv_width()))
                return layer + "q, k and v";
            if (after_attention && acts.attended.keeps(l) && bad(m.attended(l), n * c.q_width()))
                return layer + "attention";
            if (after_mlp && acts.hidden.keeps(l) && bad(m.hidden(l), n * c.mlp_in_width()))
                return layer + "MLP input";
            if (after_mlp && acts.activated.keeps(l) && bad(m.activated(l), n * c.mlp_width))
                return layer + "MLP activation";
            if (acts.residual.keeps(k) && bad(m.residual(k), n * c.width))
                return k == 0 ? "the residual stream after the embedding"
                              : "the residual stream after " + layer +
                                    (after_attention ? "attention" : "MLP");
            if (acts.input.keeps(k) && bad(m.input(k), n * c.width))
                return k == 2 * c.layers ? "the final norm's output"
                                         : "the norm before layer " + std::to_string(k / 2 + 1) +
                                               "'s " + (after_attention ? "MLP" : "attention");
        }
        if (bad(acts.losses.begin(), n)) return "the loss";
    }
    if (gradients)
        for (auto p = registry.params.rbegin(); p != registry.params.rend(); ++p)
            if (bad(m.gradient(p->offset), p->size())) return "the gradient of " + p->name;
    return "";
}

} // namespace lns
