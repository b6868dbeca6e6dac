#include "gpt/model/architecture.h"

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

namespace {

const TensorNames gpt2_names = {.root = "transformer.",
                                .layers = "h.",
                                .token_embedding = "wte",
                                .position_embedding = "wpe",
                                .attention = "attn.",
                                .q = "c_attn",
                                .k = "",
                                .v = "",
                                .attn_out = "c_proj",
                                .mlp_in = "c_fc",
                                .mlp_up = "",
                                .mlp_out = "c_proj",
                                .attn_norm = "ln_1",
                                .attn_branch_norm = "post_ln_1",
                                .mlp_norm = "ln_2",
                                .mlp_norm_beside = "ln_2",
                                .mlp_branch_norm = "post_ln_2",
                                .final_norm = "ln_f",
                                .transposed = true};

const ConfigKeys gpt2_keys = {
    .width = "n_embd",
    .layers = "n_layer",
    .heads = "n_head",
    .kv_heads = nullptr,
    .head_size = nullptr,
    .mlp_width = "n_inner",
    .positions = "n_positions",
    .norm_eps = "layer_norm_epsilon",
    .activation = "activation_function",
    .attention_bias = nullptr,
    .dropouts = {"attn_pdrop", "embd_pdrop", "resid_pdrop"},
    .only = {{"scale_attn_weights", "true"},
             {"scale_attn_by_inverse_layer_idx", "false"},
             {"add_cross_attention", "false"}},
    .written = {{"attn_pdrop", "0.0"}, {"embd_pdrop", "0.0"}, {"resid_pdrop", "0.0"}}};

const std::vector<std::pair<const char*, const char*>> rotary_only = {
    {"partial_rotary_factor", "1.0"}, {"rope_interleaved", "false"}, {"clip_qkv", "null"}};

const std::vector<Architecture>& architectures() {
    static const std::vector<Architecture> table = {
        {.model_type = "gpt2",
         .model_class = "GPT2LMHeadModel",
         .norm = NormType::layer,
         .norm_bias = true,
         .norm_eps = 1e-5,
         .position_type = PositionType::learned,
         .activation = Activation::gelu,
         .activation_names = {"gelu_new", "gelu_pytorch_tanh"},
         .qkv_bias = true,
         .attn_out_bias = true,
         .mlp_bias = true,
         .tied = true,
         .absent_norm_eps = 1e-5,
         .absent_positions = 0,
         .absent_mlp_factor = 4,
         .names = gpt2_names,
         .keys = gpt2_keys},
        {.model_type = "llama",
         .model_class = "LlamaForCausalLM",
         .keys = {.mlp_bias = "mlp_bias", .only = rotary_only}},
        {.model_type = "qwen2",
         .model_class = "Qwen2ForCausalLM",
         .rope_theta = 1e6,
         .qkv_bias = true, // whatever attention_bias says
         .windows = WindowLayers::upper,
         .absent_positions = 32768,
         .kv_heads_required = true,
         .keys = {.attention_bias = nullptr, .only = rotary_only, .ignored = {"attention_bias"}}},
        {.model_type = "qwen3",
         .model_class = "Qwen3ForCausalLM",
         .rope_theta = 1e6,
         .qk_norm = QkNorm::heads,
         .windows = WindowLayers::upper,
         .absent_positions = 32768,
         .absent_head_size = 128,
         .kv_heads_required = true,
         .keys = {.only = rotary_only}},
        {.model_type = "mistral",
         .model_class = "MistralForCausalLM",
         .norm_eps = 1e-5,
         .windows = WindowLayers::all,
         .absent_positions = 4096 * 32,
         .kv_heads_required = true,
         .keys = {.attention_bias = nullptr, .only = rotary_only}},
        {.model_type = "smollm3",
         .model_class = "SmolLM3ForCausalLM",
         .rope_theta = 5e6,
         .windows = WindowLayers::unrotated,
         .unrotated_every = 4,
         .tied = true,
         .absent_rope_theta = 2e6,
         .absent_positions = 32768,
         .kv_heads_required = true,
         .keys = {.mlp_bias = "mlp_bias", .only = rotary_only}},
        {.model_type = "olmo",
         .model_class = "OlmoForCausalLM",
         .norm = NormType::layer,
         .norm_weight = false,
         .norm_eps = 1e-5,
         .keys = {.norm_eps = nullptr, .only = rotary_only, .ignored = {"rms_norm_eps"}}},
        {.model_type = "olmo2",
         .model_class = "Olmo2ForCausalLM",
         .scheme = "olmo2",
         .qk_norm = QkNorm::whole,
         .absent_norm_eps = 1e-5,
         .keys = {.only = rotary_only}},
    };
    return table;
}

} // namespace

std::vector<std::string> architecture_names() {
    std::vector<std::string> names;
    for (const Architecture& row : architectures()) names.push_back(row.model_type);
    return names;
}

const Architecture* find_architecture(const std::string& model_type) {
    for (const Architecture& row : architectures())
        if (model_type == row.model_type) return &row;
    return nullptr;
}

const Architecture& architecture_row(const std::string& model_type) {
    if (const Architecture* row = find_architecture(model_type)) return *row;
    fail("the architecture '", model_type, "' is not supported.",
         did_you_mean(model_type, architecture_names()), " The architectures are ",
         join(architecture_names()), ".");
}

} // namespace lns
