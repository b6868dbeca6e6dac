// The architectures: families of models that Hugging Face's tools know by a model_type. Each is a
// row of the table in architecture.cpp; the registry of parameters, and reading and writing a
// config.json, follow from it.
//
// Easy to get wrong: rope_theta and norm_eps differ between families; GPT-2's norms and matrices
// have biases and its head is the embedding; Qwen2's q, k and v alone have biases; OLMo's norm has
// no parameters; OLMo 2 norms the whole of q and k, Qwen3 each head of them; every fourth layer of
// SmolLM3 has no positions; a Mistral without the field sliding_window has a window of 4096.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lns {

enum class NormType { layer, rms, dyt }; // dyt: in place of either, tanh (arXiv 2503.10622)
enum class PositionType { learned, rotary };

// RMSNorm of q and k, before the rotation: of each as a whole, or of each of their heads.
enum class QkNorm { none, whole, heads };

// Which layers a config.json gives a sliding window, unless it has a list: all; those from
// max_window_layers on; those without rotary positions. But for `all`, only if use_sliding_window.
enum class WindowLayers { none, all, upper, unrotated };

// The MLP's activations, each a function of each backend.
enum class Activation { gelu, swiglu };
struct ActivationRow {
    const char* name;
    bool gated; // of a gate and an up matrix, else of one
};
inline constexpr ActivationRow activations[] = {
    // in the order of Activation
    {.name = "gelu", .gated = false}, // in its tanh form
    {.name = "swiglu", .gated = true},
};

// Names of the parts in Hugging Face's checkpoints, without ".weight" and ".bias".
struct TensorNames {
    const char* root = "model.";
    const char* layers = "layers.";
    const char* token_embedding = "embed_tokens";
    const char* position_embedding = ""; // learned positions only
    const char* attention = "self_attn.";
    const char *q = "q_proj", *k = "k_proj", *v = "v_proj"; // k "": one matrix, named q, for all
    const char* attn_out = "o_proj";
    const char *mlp_in = "gate_proj", *mlp_up = "up_proj"; // up: gated only
    const char* mlp_out = "down_proj";
    // A sublayer's norms: in front of it or after the sum, and on the branch. mlp_norm_beside: in
    // place of mlp_norm in a model with branch norms.
    const char *attn_norm = "input_layernorm", *attn_branch_norm = "post_attention_layernorm";
    const char *mlp_norm = "post_attention_layernorm",
               *mlp_norm_beside = "pre_feedforward_layernorm";
    const char* mlp_branch_norm = "post_feedforward_layernorm";
    const char* final_norm = "norm";
    bool transposed = false; // matrices are (in, out): GPT-2's Conv1D
};

// Keys of a config.json; null: there is none.
struct ConfigKeys {
    const char* width = "hidden_size";
    const char* layers = "num_hidden_layers";
    const char* heads = "num_attention_heads";
    const char* kv_heads = "num_key_value_heads";
    const char* head_size = "head_dim";
    const char* mlp_width = "intermediate_size";
    const char* positions = "max_position_embeddings";
    const char* norm_eps = "rms_norm_eps";
    const char* activation = "hidden_act";
    const char* attention_bias = "attention_bias"; // of q, k, v and the output
    const char* mlp_bias = nullptr;
    std::vector<const char*> dropouts = {"attention_dropout"};
    // Values that change the computation: the one that is supported, as JSON.
    std::vector<std::pair<const char*, const char*>> only = {};
    std::vector<const char*> ignored = {};
    std::vector<std::pair<const char*, const char*>> written = {}; // besides those above, as JSON
};

struct Architecture {
    const char* model_type;
    const char* model_class;    // of transformers
    const char* scheme = "pre"; // the stock model's
    NormType norm = NormType::rms;
    bool norm_weight = true, norm_bias = false;
    double norm_eps = 1e-6;
    PositionType position_type = PositionType::rotary;
    double rope_theta = 10000;
    Activation activation = Activation::swiglu;
    std::vector<const char*> activation_names = {"silu"}; // in config.json; the first is written
    bool qkv_bias = false, attn_out_bias = false, mlp_bias = false;
    QkNorm qk_norm = QkNorm::none;
    WindowLayers windows = WindowLayers::none;
    int unrotated_every = 0; // n: every n-th layer has no positions, unless a list says which
    bool tied = false;       // the head is the token embedding; also what an absent field means

    // What absent fields of a config.json mean to transformers; 0: they are required.
    double absent_norm_eps = 1e-6, absent_rope_theta = 10000;
    int absent_positions = 2048;
    int absent_head_size = 0;       // else width / heads
    int absent_mlp_factor = 0;      // MLP width / width
    bool kv_heads_required = false; // else as many as heads

    TensorNames names = {};
    ConfigKeys keys = {};
};

std::vector<std::string> architecture_names();

// null if there is none of that model_type.
const Architecture* find_architecture(const std::string& model_type);

// Throws for an unknown name, suggesting similar ones.
const Architecture& architecture_row(const std::string& model_type);

} // namespace lns
