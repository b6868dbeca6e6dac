// The registry of parameters: the one list, in order of computation, from which come the flat
// buffer's offsets, the checkpoint's names, the optimizer's groups and the printed table.
//
// q, k and v follow each other, and so do gate and up: each is a Hugging Face tensor and a slice
// of one matrix of stacked rows, which the model multiplies at once.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "gpt/base/random.h"
#include "gpt/model/config.h"

namespace lns {

struct Param {
    std::string name;           // Hugging Face's
    std::vector<int64_t> shape; // (OC, C) of a matrix, rows are outputs; (n) of a vector
    int64_t offset = 0;         // in the flat buffer, in elements
    double mean = 0, std = 0;   // starts at normal(mean, std)
    int64_t tail = INT64_MAX;   // elements from here on (V in GPT-2's c_attn)
    double tail_std = 0;        // start at normal(mean, tail_std)
    std::vector<double> values; // starts at these, unless empty
    bool decay = false;         // weight decay: matrices only
    bool layer_matrix = false;  // a matrix of a layer, not an embedding or the head
    int layer = -1;             // from 0; −1: it belongs to no layer
    bool transposed = false;    // the file has (C, OC): GPT-2's Conv1D
    double lr_scale = 1, decay_scale = 1, eps_scale = 1; // multiply those of the optimizer

    int64_t size() const {
        int64_t n = 1;
        for (int64_t d : shape) n *= d;
        return n;
    }
    std::vector<int64_t> file_shape() const {
        return transposed ? std::vector<int64_t>{shape[1], shape[0]} : shape;
    }
};

// Offsets of a norm's weight and bias, (C), and DyT's α, (1); −1 where it has none.
struct NormParams {
    int64_t weight = -1, bias = -1, alpha = -1;
};

struct LayerParams {
    int64_t qkv, qkv_bias = -1;           // (NH·HS + 2·KVH·HS, C)
    int64_t q_norm = -1, k_norm = -1;     // (NH·HS), (KVH·HS); of heads: (HS) each
    int64_t v_norm = -1;                  // (HS)
    int64_t value_mix = -1;               // (1)
    int64_t attn_out, attn_out_bias = -1; // (C, NH·HS)
    int64_t mlp_in, mlp_in_bias = -1;     // (H, C), or gate and up (2·H, C)
    int64_t mlp_out, mlp_out_bias = -1;   // (C, H)
};

struct JunctionParams {
    NormParams branch, out, in, second;
    int64_t gamma = -1;                         // (C) or (1)
    int64_t omega = -1;                         // (C)
    int64_t gate = -1;                          // (1)
    int64_t start_skip = -1, start_weight = -1; // (1): a and λ of +x0
    // φ (maps, n·C), β (maps) and α (3) of streams; w (C) and the keys' norm (C) of sources
    // (gpt/model/mixing.h)
    int64_t stream_weight = -1, stream_bias = -1, stream_scale = -1;
    int64_t query = -1, key_weight = -1;
};

struct Registry {
    std::vector<Param> params;
    int64_t size = 0; // of the flat buffer, in elements; each matrix starts at a multiple of 16

    int64_t token_embedding = -1, position_embedding = -1; // (V, C), (P, C)
    int64_t embed_scale = -1;                              // (1)
    std::vector<LayerParams> layers;                       // L
    std::vector<JunctionParams> junctions;                 // 2L + 1
    int64_t head = -1;                                     // (V, C); the token embedding if tied

    const Param* find(const std::string& name) const; // null if there is none
    std::vector<int64_t> gates() const;               // GPAS's, as offsets
    int64_t count() const;                            // of parameters
};

Registry make_registry(const Config& config);

// Initial values of one parameter: out[i] is a pure function of (seed, the parameter's name, i).
template <class S> void initialize(const Param& p, uint64_t seed, S* out) {
    const uint64_t stream = fnv1a(p.name);
#pragma omp parallel for
    for (int64_t i = 0; i < p.size(); i++) {
        double std = i < p.tail ? p.std : p.tail_std;
        const double mean = p.values.empty() ? p.mean : p.values[size_t(i)];
        const double x = std > 0 ? mean + std * random_normal(seed, stream, i) : mean;
        out[i] = std::is_same_v<S, double> ? S(x) : S(float(x));
    }
}

// FLOPs of a forward and backward pass, per token, at sequence length T:
// 6 × (parameters that take part in a matmul; a tied head counts once) + 6 × L × C × T. Matrices of
// `resting` layers count 4 times, not 6: they have no gradient.
double flops_per_token(const Config& config, int T, int resting = 0);

} // namespace lns
