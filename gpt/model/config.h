// What a model is. One block covers all architectures; a preset, the flags or a Hugging Face
// config.json fill in this struct, and everything else is derived from it.
#pragma once

#include <string>
#include <vector>

#include "gpt/model/architecture.h"
#include "gpt/model/scheme.h"

namespace lns {

// The rotary positions of models that were pre-trained on shorter texts turn slower: all channels
// by a factor; or, in Llama 3.1 and later, those whose period is long beside the original texts.
struct RopeScaling {
    enum Type { none, linear, llama3 };
    Type type = none;
    double factor = 1;
    // llama3: channels turn as before if their period is at most original_positions /
    // high_frequency, `factor` times slower if it is at least original_positions / low_frequency.
    double low_frequency = 1, high_frequency = 4;
    int original_positions = 0;
    bool operator==(const RopeScaling&) const = default;
};

struct Config {
    std::string preset;               // "llama-130m", or "" when from elsewhere
    std::string model_type = "llama"; // the architecture, as Hugging Face has it

    int vocab_size = 0; // V
    int width = 0;      // C
    int layers = 0;     // L
    int heads = 0;      // NH, of q
    int kv_heads = 0;   // KVH, of k and v; NH/KVH queries share one
    int head_size = 0;  // HS; C / NH unless the config.json has a head_dim
    int mlp_width = 0;  // H
    int positions = 0;  // the longest sequence

    NormType norm = NormType::rms; // of the residual stream; those of q and k are RMSNorms
    bool norm_weight = true;       // OLMo has none
    bool norm_bias = false;        // GPT-2
    double norm_eps = 1e-6;
    PositionType position_type = PositionType::rotary;
    double rope_theta = 10000;
    RopeScaling rope_scaling;
    std::vector<bool> rotated_layers; // which have rotary positions; empty: all
    int window = 0; // a query sees so many keys, its own and those before it; 0: all
    std::vector<bool> window_layers;            // which have that window; empty: all
    Activation activation = Activation::swiglu; // of the MLP
    bool qkv_bias = false, attn_out_bias = false, mlp_bias = false;
    QkNorm qk_norm = QkNorm::none; // the architecture's; a scheme's norms of heads replace it
    bool tied = false;             // the head is the embedding

    Scheme scheme;
    double init_std = 0.02;
    double embed_std = 0; // of the token embedding; 0: init_std

    std::vector<std::string> notes; // from reading a config.json, for the user

    bool rope() const { return position_type == PositionType::rotary; }
    bool rotates(int l) const {
        return rope() && (rotated_layers.empty() || rotated_layers[size_t(l)]);
    }
    // Of layer l in sequences of T tokens; 0: no query has so many keys.
    int window_of(int l, int T) const {
        return window < T && (window_layers.empty() || window_layers[size_t(l)]) ? window : 0;
    }
    const ActivationRow& activation_row() const { return activations[int(activation)]; }
    // DyT's code for LLaMA multiplies the embedding's output by a learned scalar, from √C.
    bool embed_scale() const { return norm == NormType::dyt; }
    bool gated_mlp() const { return activation_row().gated; }
    int q_width() const { return heads * head_size; }
    int kv_width() const { return kv_heads * head_size; }
    int qkv_width() const { return q_width() + 2 * kv_width(); }
    // RMSNorms of q, k and v in each layer.
    bool head_norms() const { return scheme.row->head_norms || qk_norm == QkNorm::heads; }
    int q_norms() const { return head_norms() ? heads : qk_norm != QkNorm::none; }
    int k_norms() const { return head_norms() ? kv_heads : qk_norm != QkNorm::none; }
    int v_norms() const { return scheme.row->head_norms ? kv_heads : 0; }
    int qkv_norms() const { return q_norms() + k_norms() + v_norms(); }
    int normed_width() const { return q_width() + kv_width() + (v_norms() ? kv_width() : 0); }
    int mlp_in_width() const { return gated_mlp() ? 2 * mlp_width : mlp_width; } // gate and up
};

std::vector<std::string> preset_names();

// Throws for an unknown name, suggesting similar ones.
Config preset_config(const std::string& name);

// An architecture without sizes. Throws if it is unknown.
Config architecture(const std::string& model_type);

// Derives the sizes that are still 0 (kv_heads, head_size, mlp_width), then calls check_config.
void complete_config(Config& config);

// Throws a sentence if the sizes do not fit together.
void check_config(const Config& config);

// A Hugging Face config.json, ours or another's; `where` is the file's name, for errors. Throws for
// an unsupported field that would change the computation.
Config config_from_json(const std::string& text, const std::string& where);
std::string config_to_json(const Config& config);

// "" if the stock model of this architecture computes the same, else what this one has beyond it.
// Its model_type is then "lns-llama" for "llama": other tools refuse it instead of computing
// something else.
std::string beyond_stock_model(const Config& config);

// Whether attention computes q, k and v alike under the schemes of both.
bool same_qkv(const Config& a, const Config& b);

// "dyt" or "stock", the architecture's own, as --norm-type and a config.json have it.
std::string norm_type_name(const Config& config);
void set_norm_type(Config& config, const std::string& name);

// The scheme of an architecture's stock model.
Scheme stock_scheme(const std::string& model_type);

// "" if weights of `found` fit `wanted`, else a sentence about the first field that differs.
std::string config_difference(const Config& found, const Config& wanted);

} // namespace lns
