// A model for the tests of files.
#pragma once

#include <cstring>
#include <vector>

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/model/model.h"

namespace lns::test {

// Holds parameters and moments, and computes nothing.
struct Holder : Model {
    std::vector<float> held[4];
    explicit Holder(const Config& c, const Optimizer& optimizer = optimizers()[0])
        : Model(c, optimizer) {
        for (auto& buffer : held) buffer.assign(registry.size, 0);
    }
    std::string device() const override { return "cpu"; }
    std::string dtype() const override { return "float32"; }
    void initialize(uint64_t seed) override {
        for (const Param& p : registry.params)
            for (int b = 0; b < 4; b++)
                for (int64_t i = 0; i < p.size(); i++)
                    held[b][p.offset + i] = float(random_normal(seed + b, fnv1a(p.name), i));
    }
    double loss(const int*, const int*, int, int) override { return 0; }
    double loss_and_gradients(const int*, const int*, int, int, double) override { return 0; }
    void logits(const int*, int, int, bool, float*) override {}
    void score(const int*, int, int, const Branches&, const std::vector<ScoredToken>&,
               double*) override {}
    void zero_gradients(const Hyperparameters&) override {}
    double gradient_norm() override { return 0; }
    void update(const Hyperparameters&) override {}
    void read(Buffer buffer, const Param& p, float* out) override {
        std::memcpy(out, &held[buffer.kind + buffer.index][p.offset], p.size() * sizeof(float));
    }
    void write(Buffer buffer, const Param& p, const float* values) override {
        std::memcpy(&held[buffer.kind + buffer.index][p.offset], values, p.size() * sizeof(float));
    }
    std::string first_nonfinite() override { return ""; }
    int64_t bytes() const override { return 0; }
};

inline Config small(const std::string& model_type, const std::string& scheme = "lns") {
    Config c = architecture(model_type);
    c.vocab_size = 13, c.width = 8, c.layers = 2, c.heads = 2, c.positions = 16;
    c.scheme = parse_scheme(scheme);
    complete_config(c);
    return c;
}

} // namespace lns::test
