// What each part of a pass on the CPU moves and computes, for the profile. Bytes are those of
// activations and weights, each read or written once.
#pragma once

#include <cstdint>

#include "gpt/cpu/arrays.h"
#include "gpt/model/config.h"
#include "gpt/model/mixing.h"
#include "gpt/model/optimizer.h"
#include "gpt/model/profile.h"

namespace lns {

template <class S> struct Costs {
    using A = Acc<S>;
    static constexpr double s = sizeof(S), a = sizeof(A);

    const Config& c;
    double rows, T;

    Cost embedding_forward() const { return {"forward", "embedding", 0, rows * s * 2 * c.width}; }
    Cost embedding_backward() const { return {"backward", "embedding", 0, rows * a * 3 * c.width}; }

    Cost junction_forward(const Junction& j) const {
        return {"forward", "junctions", 0, rows * s * c.width * (1.0 + 2 * j.branch + j.in_norm)};
    }
    Cost junction_backward(const Junction& j) const {
        const double branch = j.branch * (1 + 2 * j.keeps_branch());
        return {"backward", "junctions", 0, rows * c.width * (s * (2 + branch) + 2 * a)};
    }
    // Streams and their maps, or all sources of junction k.
    Cost mix_forward(const Junction& j, int k) const {
        if (j.mixing == Mixing::sources)
            return {"forward", "sources", 0, source_bytes(k) + a * rows * c.width};
        const StreamShape x{j.mixed, c.width};
        return {"forward", "streams", 2 * rows * x.maps() * double(x.width()),
                rows * (3 * a * double(x.width()) + (a + s) * c.width)};
    }
    Cost mix_backward(const Junction& j, int k) const {
        if (j.mixing == Mixing::sources)
            return {"backward", "sources", 0,
                    source_bytes(k) +
                        rows * c.width *
                            (a * (1 + 2.0 * SourceShape{c.width, j.mixed}.count(k)) + s)};
        const StreamShape x{j.mixed, c.width};
        return {"backward", "streams", 4 * rows * x.maps() * double(x.width()),
                rows * (9 * a * double(x.width()) + (a + 2 * s) * c.width)};
    }
    double source_bytes(int k) const { return rows * c.width * (a + k * s); }
    Cost input_recompute() const { return {"recompute", "junctions", 0, rows * s * 2 * c.width}; }

    // n rows times a matrix (OC, C).
    Cost matmul_forward(const char* name, int64_t n, double C, double OC, double out_bytes) const {
        return {"forward", name, 2 * double(n) * C * OC,
                double(n) * (s * C + out_bytes * OC) + s * C * OC};
    }
    Cost matmul_backward_input(const char* name, int64_t n, double C, double OC) const {
        return {"input gradient", name, 2 * double(n) * C * OC,
                double(n) * s * (C + OC) + s * C * OC};
    }
    Cost matmul_backward_weight(const char* name, int64_t n, double C, double OC, bool add) const {
        return {"weight gradient", name, 2 * double(n) * C * OC,
                double(n) * s * (C + OC) + (1.0 + add) * a * C * OC};
    }

    Cost qkv_forward(double source_bytes) const {
        return {"forward", "q and k", 0, rows * c.qkv_width() * (s + source_bytes)};
    }
    Cost qkv_norm_backward() const {
        return {"backward", "q and k norm", 0, rows * s * 3 * c.qkv_width()};
    }
    // In either pass; v is read and written in numbers of so many bytes.
    Cost mix_values(const char* group, double value_bytes) const {
        return {group, "value residual", 0, rows * c.kv_width() * (2 * value_bytes + 2 * s)};
    }
    Cost attention_forward() const {
        return {"forward", "attention", attention_flops(2),
                rows * s * (c.qkv_width() + c.q_width())};
    }
    Cost attention_backward() const {
        return {"backward", "attention", attention_flops(5),
                rows * s * 2 * (c.qkv_width() + c.q_width())};
    }
    // The causal mask leaves half of T² in each product.
    double attention_flops(int products) const { return products * rows * T * c.q_width(); }

    Cost activation_forward(const char* group) const {
        return {group, activation(), 0, rows * s * (c.mlp_in_width() + c.mlp_width)};
    }
    Cost activation_backward() const {
        return {"backward", activation(), 0, rows * s * (2.0 * c.mlp_in_width() + c.mlp_width)};
    }
    const char* activation() const { return c.activation_row().name; }

    Cost loss(int64_t n) const {
        return {"forward", "loss", 0, double(n) * c.vocab_size * (a + s)};
    }

    static Cost zero_gradients() { return {"update", "zero gradients"}; }
    static Cost gradient_norm(int64_t n) { return {"update", "gradient norm", 0, double(n) * a}; }
    // The gradient is read; moments, master weights or parameters are read and written.
    static Cost adamw(int64_t n, double moment_bytes, bool master) {
        return {"update", "AdamW", 0,
                double(n) * (a + 4 * moment_bytes + (master ? 2 * a + s : 2 * s))};
    }
    // Of the matrices of a range. Each polynomial takes three products.
    static Cost muon(const Registry& registry, const UpdateRange& range, double moment_bytes,
                     bool master) {
        double flops = 0;
        for (size_t i = range.first; i < range.last; i++) {
            const auto [rows, columns] =
                std::minmax(registry.params[i].shape[0], registry.params[i].shape[1]);
            flops += 5 * 2 * double(rows) * double(rows) * (2 * double(columns) + double(rows));
        }
        return {"update", "Muon", flops,
                double(range.size()) * (a + 2 * moment_bytes + (master ? 2 * a + s : 2 * s))};
    }
};

} // namespace lns
