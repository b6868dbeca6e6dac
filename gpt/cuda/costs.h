// What each part of a pass on a GPU costs, for a Profile: FLOPs of matrix products, and bytes of
// weights and activations, each read or written once.
#pragma once

#include <cstdint>

#include "gpt/model/config.h"
#include "gpt/model/mixing.h"
#include "gpt/model/profile.h"
#include "gpt/model/scheme.h"

namespace lns::cuda {

// S: the scalar of weights and activations; G: that of the parameters' gradients.
template <class S, class G> struct Costs {
    static constexpr double s = sizeof(S), g = sizeof(G), f = sizeof(float);

    const Config& c; // padded
    double rows, T;
    double attended_width; // NH·HS without padding

    Cost embedding_forward() const { return {"forward", "embedding", 0, rows * c.width * (s + f)}; }
    Cost embedding_backward() const { return {"backward", "embedding", 0, rows * c.width * f}; }

    Cost junction_forward(const Junction& j, bool writes_u) const {
        return {"forward", "junctions", 0,
                rows * c.width * ((1.0 + j.branch) * f + (1.0 * j.branch + writes_u) * s)};
    }
    Cost junction_backward(const Junction& j, bool last) const {
        return {"backward", "junctions", 0,
                rows * c.width *
                    ((2.0 - last + j.in_norm + j.keeps_branch()) * f +
                     (1.0 + j.branch * (1 + j.keeps_branch())) * s)};
    }
    // Streams and their maps, or all sources of junction k.
    Cost mix_forward(const Junction& j, int k) const {
        if (j.mixing == Mixing::sources)
            return {"forward", "sources", 0, rows * c.width * (2 * f + k * s)};
        const StreamShape x{j.mixed, c.width};
        return {"forward", "streams", 2 * rows * x.maps() * double(x.width()),
                rows * (4 * f * double(x.width()) + (f + s) * c.width)};
    }
    Cost mix_backward(const Junction& j, int k) const {
        if (j.mixing == Mixing::sources) {
            const double sources = SourceShape{c.width, j.mixed}.count(k);
            return {"backward", "sources", 0,
                    rows * c.width * ((2 + 2 * sources) * f + (2 * k + 1) * s)};
        }
        const StreamShape x{j.mixed, c.width};
        return {"backward", "streams", 4 * rows * x.maps() * double(x.width()),
                rows * (10 * f * double(x.width()) + (2 * f + 2 * s) * c.width)};
    }
    Cost input_recompute() const { return {"recompute", "junctions", 0, rows * c.width * (f + s)}; }

    // n rows times a matrix (OC, C).
    static Cost matmul(const char* group, const char* name, int64_t n, double C, double OC,
                       double matrix_bytes, double out_bytes = s) {
        return {group, name, 2 * double(n) * C * OC,
                double(n) * (C * s + OC * out_bytes) + C * OC * matrix_bytes};
    }
    static Cost matmul_forward(const char* name, int64_t n, double C, double OC, double out_bytes) {
        return matmul("forward", name, n, C, OC, s, out_bytes);
    }
    static Cost matmul_backward_input(const char* name, int64_t n, double C, double OC) {
        return matmul("input gradient", name, n, C, OC, s);
    }
    static Cost matmul_backward_weight(const char* name, int64_t n, double C, double OC) {
        return matmul("weight gradient", name, n, C, OC, 2 * g);
    }
    // With GELU or its gradient in the epilogue, which writes or reads `hidden`.
    Cost matmul_gelu(const char* group, const char* name) const {
        Cost cost = matmul(group, name, int64_t(rows), c.width, c.mlp_width, s);
        cost.bytes += rows * c.mlp_width * s;
        return cost;
    }

    Cost qkv_forward() const { return {"forward", "q and k", 0, rows * 2 * c.normed_width() * s}; }
    Cost qkv_forward_unrounded() const {
        return {"forward", "q and k", 0, rows * c.qkv_width() * (s + f)};
    }
    Cost qkv_norm_backward() const {
        return {"backward", "q and k norm", 0, rows * 3 * c.normed_width() * s};
    }
    // In either pass; v is read and written in numbers of so many bytes.
    Cost mix_values(const char* group, double value_bytes) const {
        return {group, "value residual", 0, rows * c.kv_width() * (2 * value_bytes + 2 * s)};
    }
    Cost attention_forward() const {
        return {"forward", "attention", attention_flops(2),
                rows * (c.qkv_width() + c.q_width()) * s};
    }
    Cost attention_backward() const {
        return {"backward", "attention", attention_flops(5),
                rows * 2 * (c.qkv_width() + c.q_width()) * s};
    }
    // The causal mask leaves half of T² in each product.
    double attention_flops(int products) const { return products * rows * T * attended_width; }

    Cost activation_forward(const char* group) const {
        return {group, activation(), 0, rows * (c.mlp_in_width() + c.mlp_width) * s};
    }
    Cost activation_backward() const {
        return {"backward", activation(), 0, rows * (2.0 * c.mlp_in_width() + c.mlp_width) * s};
    }
    const char* activation() const { return c.activation_row().name; }

    Cost loss(int64_t n, bool gradients, double logit_bytes) const {
        return {"forward", "loss", 0, double(n) * c.vocab_size * (1 + gradients) * logit_bytes};
    }

    // Of n parameters.
    static Cost zero_gradients(int64_t n) { return {"update", "zero gradients", 0, double(n) * g}; }
    static Cost gradient_sum(int64_t n) { return {"update", "sum over ranks", 0, double(n) * g}; }
    static Cost gradient_norm(int64_t n) { return {"update", "gradient norm", 0, double(n) * g}; }
    // A matrix's. Each of five polynomials takes three products.
    static Cost muon(int64_t rows, int64_t columns, double moment_bytes, bool master) {
        const double n = double(std::min(rows, columns)), m = double(std::max(rows, columns));
        return {"update", "Muon", 5 * 2 * n * n * (2 * m + n),
                n * m * (g + 2 * moment_bytes + (master ? 2 * f + s : 2 * s))};
    }
    static Cost adamw(int64_t n, double moment_bytes, bool master) {
        return {"update", "AdamW", 0,
                double(n) * (g + 4 * moment_bytes + (master ? 2 * f + s : 2 * s))};
    }
};

} // namespace lns::cuda
