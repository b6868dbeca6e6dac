// What each part of a pass costs on a GPU, for a Profile: bytes of weights and activations, each
// read or written once, and FLOPs of matrix products.
#pragma once

#include <cstdint>

#include "gpt/model/config.h"
#include "gpt/model/scheme.h"

namespace lns::cuda {

struct Cost {
    double bytes, flops = 0;
};

// S: the scalar of weights and activations; G: that of the parameters' gradients.
template <class S, class G> struct Costs {
    const Config& c; // with padded sizes
    double rows, T;
    double attended_width; // NH·HS without padding

    static constexpr double s = sizeof(S), g = sizeof(G), f = sizeof(float);

    Cost embedding_forward() const { return {rows * c.width * (s + f)}; }
    Cost embedding_backward() const { return {rows * c.width * f}; }

    Cost junction_forward(const Junction& j, bool writes_u) const {
        return {rows * c.width * ((1.0 + j.branch) * f + (1.0 * j.branch + writes_u) * s)};
    }
    Cost junction_backward(const Junction& j, bool last) const {
        return {rows * c.width *
                ((2.0 - last + j.in_norm + j.keeps_branch()) * f +
                 (1.0 + j.branch * (1 + j.keeps_branch())) * s)};
    }
    Cost recompute_input() const { return {rows * c.width * (f + s)}; }

    // A product of n rows of C channels with a matrix (OC, C).
    static Cost matmul(double n, double C, double OC, double weight_bytes, double out_bytes) {
        return {n * (C * s + OC * out_bytes) + C * OC * weight_bytes, 2 * n * C * OC};
    }
    Cost linear_forward(double C, double OC) const { return matmul(rows, C, OC, s, s); }
    Cost linear_backward_input(double C, double OC) const { return matmul(rows, C, OC, s, s); }
    Cost linear_backward_weight(double C, double OC) const { return matmul(rows, C, OC, 2 * g, s); }
    // With GELU or its gradient in the epilogue: reads or writes (rows, H) once more.
    Cost linear_gelu() const {
        const Cost plain = linear_forward(c.width, c.mlp_width);
        return {plain.bytes + rows * c.mlp_width * s, plain.flops};
    }
    // The head, n rows of it.
    Cost head_forward(double n, double logit_bytes) const {
        return matmul(n, c.width, c.vocab_size, s, logit_bytes);
    }
    Cost head_backward_input(double n) const { return matmul(n, c.width, c.vocab_size, s, s); }
    Cost head_backward_weight(double n) const { return matmul(n, c.width, c.vocab_size, 2 * g, s); }

    Cost qk_forward() const { return {rows * 2.0 * (c.q_width() + c.kv_width()) * s}; }
    Cost qk_forward_from_float() const { return {rows * c.qkv_width() * (s + f)}; }
    Cost qk_norm_backward() const { return {rows * 3.0 * (c.q_width() + c.kv_width()) * s}; }
    // Two products of queries with keys or values forward, five backward; under the causal mask
    // each takes half of 2·T²·HS FLOPs a head.
    Cost attention_forward() const {
        return {rows * (c.qkv_width() + c.q_width()) * s, 2 * rows * T * attended_width};
    }
    Cost attention_backward() const {
        return {rows * 2.0 * (c.qkv_width() + c.q_width()) * s, 5 * rows * T * attended_width};
    }

    Cost activation_forward() const { return {rows * (c.mlp_in_width() + c.mlp_width) * s}; }
    Cost activation_backward() const { return {rows * (2.0 * c.mlp_in_width() + c.mlp_width) * s}; }
    Cost loss(double n, bool gradients, double logit_bytes) const {
        return {n * c.vocab_size * (1 + gradients) * logit_bytes};
    }

    // Of n parameters.
    static Cost gradients(int64_t n) { return {double(n) * g}; }
    static Cost adamw(int64_t n, double moment_bytes, bool master) {
        return {double(n) * (g + 4 * moment_bytes + (master ? 2 * f + s : 2 * s))};
    }
};

} // namespace lns::cuda
