#include "gpt/model/config.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/base/suggest.h"
#include "gpt/model/mixing.h"

namespace lns {

namespace {

struct Preset {
    const char *name, *model_type;
    int vocab_size, width, layers, heads, kv_heads, mlp_width, positions;
    bool tied;
    void (*more)(Config&) = nullptr; // what else differs from the architecture
};

void llama32(Config& c) {
    c.norm_eps = 1e-5, c.rope_theta = 5e5;
    c.rope_scaling = {RopeScaling::llama3, 32, 1, 4, 8192};
}

// clang-format off
// The LLaMA sizes are those of arXiv 2502.05795, its code and that of Mix-LN; the others those of
// their releases. tiny is ours: deep and narrow, with bytes for tokens.
const Preset presets[] = {
    // name, type, V, C, L, NH, KVH, H, positions, tied
    {"tiny",          "llama",    257,   64, 16,  4,  4,   176,   1024, false},
    {"gpt2-124m",     "gpt2",   50257,  768, 12, 12, 12,  3072,   1024, true},
    {"gpt2-350m",     "gpt2",   50257, 1024, 24, 16, 16,  4096,   1024, true},
    {"gpt2-774m",     "gpt2",   50257, 1280, 36, 20, 20,  5120,   1024, true},
    {"gpt2-1558m",    "gpt2",   50257, 1600, 48, 25, 25,  6400,   1024, true},
    {"llama-9m",      "llama",  32000,  128,  4,  4,  4,   352,   2048, false},
    {"llama-20m",     "llama",  32000,  256,  4,  4,  4,   688,   2048, false},
    {"llama-35m",     "llama",  32000,  384,  6,  8,  8,  1024,   2048, false},
    {"llama-40m",     "llama",  32000,  416,  8,  8,  8,  1024,   2048, false},
    {"llama-60m",     "llama",  32000,  512,  8,  8,  8,  1376,   2048, false},
    {"llama-71m",     "llama",  32000,  512, 12,  8,  8,  1368,   2048, false},
    {"llama-100m",    "llama",  32000,  640, 12, 10, 10,  1708,   2048, false},
    {"llama-130m",    "llama",  32000,  768, 12, 12, 12,  2048,   2048, false},
    {"llama-250m",    "llama",  32000,  768, 24, 16, 16,  2560,   2048, false},
    {"llama-350m",    "llama",  32000, 1024, 24, 16, 16,  2736,   2048, false},
    {"llama-1b",      "llama",  32000, 2048, 24, 32, 32,  5461,   2048, false},
    {"llama-3b",      "llama",  32000, 2560, 32, 32, 32,  6848,   2048, false},
    {"llama-7b",      "llama",  32000, 4096, 32, 32, 32, 11008,   2048, false},
    {"llama-3.2-1b",  "llama", 128256, 2048, 16, 32,  8,  8192, 131072, true, llama32},
    {"llama-3.2-3b",  "llama", 128256, 3072, 28, 24,  8,  8192, 131072, true, llama32},
    {"smollm2-135m",  "llama",  49152,  576, 30,  9,  3,  1536,   8192, true,
     [](Config& c) { c.norm_eps = 1e-5, c.rope_theta = 1e5; }},
    {"smollm3-3b",    "smollm3", 128256, 2048, 36, 16, 4, 11008,  65536, true},
    {"deepseek-7b",   "llama", 102400, 4096, 30, 32, 32, 11008,   4096, false},
    {"mistral-7b",    "mistral", 32000, 4096, 32, 32, 8, 14336,  32768, false,
     [](Config& c) { c.window = 4096; }},
    {"qwen2.5-0.5b",  "qwen2", 151936,  896, 24, 14,  2,  4864,  32768, true},
    {"qwen2.5-1.5b",  "qwen2", 151936, 1536, 28, 12,  2,  8960,  32768, true},
    {"qwen2.5-7b",    "qwen2", 152064, 3584, 28, 28,  4, 18944,  32768, false},
    {"qwen3-0.6b",    "qwen3", 151936, 1024, 28, 16,  8,  3072,  40960, true,
     [](Config& c) { c.head_size = 128; }},
    {"qwen3-8b",      "qwen3", 151936, 4096, 36, 32,  8, 12288,  40960, false},
    {"olmo-1b",       "olmo",   50304, 2048, 16, 16, 16,  8192,   2048, true},
    {"olmo-7b",       "olmo",   50304, 4096, 32, 32, 32, 11008,   2048, false},
};
// clang-format on

} // namespace

std::vector<std::string> preset_names() {
    std::vector<std::string> names;
    for (const Preset& preset : presets) names.push_back(preset.name);
    return names;
}

Scheme stock_scheme(const std::string& model_type) {
    return parse_scheme(architecture_row(model_type).scheme);
}

Config architecture(const std::string& model_type) {
    const Architecture& a = architecture_row(model_type);
    Config c;
    c.model_type = model_type;
    c.scheme = parse_scheme(a.scheme);
    c.norm = a.norm;
    c.norm_weight = a.norm_weight;
    c.norm_bias = a.norm_bias;
    c.norm_eps = a.norm_eps;
    c.position_type = a.position_type;
    c.rope_theta = a.rope_theta;
    c.activation = a.activation;
    c.qkv_bias = a.qkv_bias;
    c.attn_out_bias = a.attn_out_bias;
    c.mlp_bias = a.mlp_bias;
    c.qk_norm = a.qk_norm;
    c.tied = a.tied;
    return c;
}

Config preset_config(const std::string& name) {
    for (const Preset& p : presets)
        if (name == p.name) {
            Config c = architecture(p.model_type);
            c.preset = name;
            c.vocab_size = p.vocab_size;
            c.width = p.width;
            c.layers = p.layers;
            c.heads = p.heads;
            c.kv_heads = p.kv_heads;
            c.mlp_width = p.mlp_width;
            c.positions = p.positions;
            c.tied = p.tied;
            if (p.more) p.more(c);
            complete_config(c);
            return c;
        }
    fail("unknown model '", name, "'.", did_you_mean(name, preset_names()), " The presets are ",
         join(preset_names()), "; a directory with a Hugging Face config.json is a model too.");
}

void complete_config(Config& c) {
    if (c.kv_heads == 0) c.kv_heads = c.heads;
    if (c.head_size == 0 && c.heads > 0) {
        if (c.width % c.heads)
            fail("the width ", c.width, " is not a multiple of the ", c.heads,
                 " heads: choose --width and --heads so that it is");
        c.head_size = c.width / c.heads;
    }
    // A gated MLP's customary 8/3 C, as LLaMA rounds it, to a multiple of 8.
    if (c.mlp_width == 0) c.mlp_width = c.gated_mlp() ? (8 * c.width / 3 + 7) / 8 * 8 : 4 * c.width;
    c.scheme.width = c.width;
    if (c.scheme.row->grouped && c.scheme.number < 0) c.scheme.number = c.heads;
    const int every = architecture_row(c.model_type).unrotated_every;
    if (every && c.rotated_layers.empty())
        for (int l = 0; l < c.layers; l++) c.rotated_layers.push_back((l + 1) % every != 0);
    check_config(c);
}

void check_config(const Config& c) {
    struct Size {
        const char* name;
        int value;
        const char* flag;
    };
    for (const Size& size : {Size{"vocabulary", c.vocab_size, "--vocab"},
                             {"width", c.width, "--width"},
                             {"number of layers", c.layers, "--layers"},
                             {"number of heads", c.heads, "--heads"},
                             {"number of kv heads", c.kv_heads, "--kv-heads"},
                             {"head size", c.head_size, "--width and --heads"},
                             {"MLP width", c.mlp_width, "--mlp-width"},
                             {"number of positions", c.positions, "--positions"}})
        if (size.value < 1)
            fail("the model's ", size.name, " is ", size.value, ", expected at least 1: set ",
                 size.flag);
    const double parameters =
        2. * c.vocab_size * c.width + 3. * c.layers * c.width * c.mlp_width +
        2. * c.layers * c.width * (double(c.heads) + c.kv_heads) * c.head_size;
    if (c.layers > 100000 || parameters > 1e15)
        fail("a model of ", c.layers, " layers, width ", c.width, ", MLP width ", c.mlp_width,
             " and vocabulary ", c.vocab_size, " exceeds any machine: check its sizes");
    if (c.heads % c.kv_heads)
        fail("the ", c.heads, " heads are not a multiple of the ", c.kv_heads,
             " kv heads: choose --heads and --kv-heads so that they are");
    if (c.rope() && c.head_size % 2)
        fail(
            "the head size ", c.head_size,
            " is odd, but rotary positions rotate pairs of channels: choose --width and --heads so "
            "that it is even");
    for (auto [list, what] :
         {std::pair{&c.rotated_layers, "rotary positions"}, {&c.window_layers, "a sliding window"}})
        if (!list->empty() && int(list->size()) != c.layers)
            fail("the config.json says which of ", list->size(), " layers have ", what,
                 ", but the model has ", c.layers, ": leave --layers out");
    const SchemeRow& row = *c.scheme.row;
    if (row.mixing == Mixing::streams && c.scheme.number > most_streams)
        fail(c.scheme.name(), " asks for too many residual streams: there may be up to ",
             most_streams);
    if (row.mixing == Mixing::sources && c.scheme.number > 2 * c.layers)
        fail(c.scheme.name(), " asks for more blocks than the model's ", 2 * c.layers,
             " sublayers (attention and MLP)");
    if (row.mixing == Mixing::sum && !row.grouped && c.scheme.number > c.layers)
        fail(c.scheme.name(), " asks for more ", row.number_of, " than the model's ", c.layers);
    if (row.grouped && c.width % c.scheme.number)
        fail("the width ", c.width, " is not a multiple of the ", c.scheme.number, " groups of -n ",
             c.scheme.name(), ": choose -n ", row.name, ":G with a G that divides it");
    if (row.grouped && c.norm == NormType::dyt)
        fail("the scheme '", c.scheme.name(),
             "' does not go with --norm-type dyt: tanh is applied to each channel by itself, so "
             "groups of channels make no difference");
    if (row.depth == DepthScale::init_weight && !c.norm_weight)
        fail("the scheme '", row.name, "' initializes norm weights to 1/sqrt(layer), but ",
             c.model_type, "'s norms have no weights: use lns");
    if (c.norm == NormType::dyt && (c.scheme.gated() || row.depth == DepthScale::input))
        fail("the scheme '", c.scheme.name(), "' does not go with --norm-type dyt: ",
             c.scheme.gated() ? "GPAS shrinks the residual stream" : "it scales the norm's input",
             ", which a norm undoes and tanh does not");
}

std::string norm_type_name(const Config& c) { return c.norm == NormType::dyt ? "dyt" : "stock"; }

void set_norm_type(Config& c, const std::string& name) {
    c.norm = name == "dyt" ? NormType::dyt : architecture_row(c.model_type).norm;
}

namespace {

using nlohmann::json;

// Fields of a config.json that do not change the computation.
const std::set<std::string> harmless = {"_name_or_path",
                                        "architectures",
                                        "auto_map",
                                        "bos_token_id",
                                        "eos_token_id",
                                        "pad_token_id",
                                        "dtype",
                                        "torch_dtype",
                                        "transformers_version",
                                        "use_cache",
                                        "model_type",
                                        "pretraining_tp",
                                        "task_specific_params",
                                        "gradient_checkpointing",
                                        "n_ctx",
                                        "max_sequence_length",
                                        "reorder_and_upcast_attn",
                                        "output_past",
                                        "finetuning_task",
                                        "id2label",
                                        "label2id",
                                        "return_dict",
                                        "is_decoder",
                                        "unk_token_id",
                                        "sep_token_id",
                                        "decoder_start_token_id",
                                        "_attn_implementation",
                                        "lns_cpp",
                                        "_num_labels",
                                        "n_special",
                                        "predict_special_tokens",
                                        "is_llama_config",
                                        "transformers.js_config",
                                        "num_labels"};

// Typed access to fields; errors name the file and the field.
struct Fields {
    json object;
    std::string where;
    std::set<std::string> used;

    const json* find(const char* key) {
        used.insert(key);
        auto it = object.find(key);
        return it == object.end() || it->is_null() ? nullptr : &*it;
    }
    int integer(const char* key, int otherwise = -1, int least = 1) {
        const json* value = find(key);
        if (!value) {
            if (otherwise >= 0) return otherwise;
            fail(where, ": the field '", key, "' is missing");
        }
        if (!value->is_number_integer() || value->get<double>() < least ||
            value->get<double>() > 1e8)
            fail(where, ": the field '", key, "' is ", quoted(*value),
                 ", expected a whole number from ", least, " to 1e8");
        return value->get<int>();
    }
    double number(const char* key, double otherwise) {
        const json* value = find(key);
        if (!value) return otherwise;
        if (!value->is_number() || !(value->get<double>() > 0) ||
            !std::isfinite(value->get<double>()))
            fail(where, ": the field '", key, "' is ", quoted(*value),
                 ", expected a number above 0");
        return value->get<double>();
    }
    bool boolean(const char* key, bool otherwise) {
        const json* value = find(key);
        if (!value) return otherwise;
        if (!value->is_boolean())
            fail(where, ": the field '", key, "' is ", quoted(*value), ", expected true or false");
        return value->get<bool>();
    }
    std::string text(const char* key, const std::string& otherwise) {
        const json* value = find(key);
        if (!value) return otherwise;
        if (!value->is_string())
            fail(where, ": the field '", key, "' is ", quoted(*value), ", expected a string");
        return value->get<std::string>();
    }
    // Refuses another value, which would change the computation.
    void only(const char* key, const json& supported) {
        const json* value = find(key);
        if (value && *value != supported)
            fail(where, ": the field '", key, "' is ", quoted(*value), ", and only ",
                 quoted(supported), " is supported");
    }
};

void read_sizes(Fields& f, const Architecture& a, Config& c) {
    const ConfigKeys& k = a.keys;
    c.vocab_size = f.integer("vocab_size");
    c.width = f.integer(k.width);
    c.layers = f.integer(k.layers);
    c.heads = f.integer(k.heads);
    const bool required = a.kv_heads_required && !f.object.contains(k.kv_heads);
    if (k.kv_heads) c.kv_heads = f.integer(k.kv_heads, required ? -1 : c.heads);
    if (k.head_size && (f.find(k.head_size) || a.absent_head_size))
        c.head_size = f.integer(k.head_size, a.absent_head_size);
    c.mlp_width = f.integer(k.mlp_width, a.absent_mlp_factor ? a.absent_mlp_factor * c.width : -1);
    c.positions = f.integer(k.positions, a.absent_positions ? a.absent_positions : -1);
}

// rope_theta and rope_scaling, or transformers 5's rope_parameters, which has both.
void read_rope(Fields& f, const Architecture& a, Config& c) {
    c.rope_theta = f.number("rope_theta", a.absent_rope_theta);
    for (const char* field : {"rope_parameters", "rope_scaling"}) { // the latter comes first
        const json* rope = f.find(field);
        if (!rope) continue;
        if (!rope->is_object())
            fail(f.where, ": the field '", field, "' is ", quoted(*rope), ", expected an object");
        Fields inner{*rope, cat(f.where, ", ", field), {}};
        c.rope_theta = inner.number("rope_theta", c.rope_theta);
        inner.only("partial_rotary_factor", 1.0);
        RopeScaling s;
        const std::string type = inner.text("rope_type", inner.text("type", "default"));
        if (type != "default" && type != "linear" && type != "llama3")
            fail(f.where, ": the field '", field, "' has rotary positions of type \"", type,
                 "\", and only \"default\", \"linear\" and \"llama3\" are supported");
        if (type != "default") {
            s.type = type == "linear" ? RopeScaling::linear : RopeScaling::llama3;
            if (!inner.find("factor")) fail(inner.where, ": the field 'factor' is missing");
            s.factor = inner.number("factor", 1);
        }
        if (s.type == RopeScaling::llama3) {
            s.low_frequency = inner.number("low_freq_factor", s.low_frequency);
            s.high_frequency = inner.number("high_freq_factor", s.high_frequency);
            s.original_positions = inner.integer("original_max_position_embeddings", c.positions);
            if (s.low_frequency >= s.high_frequency)
                fail(inner.where, ": 'low_freq_factor' is ", s.low_frequency,
                     ", expected less than 'high_freq_factor', ", s.high_frequency);
        }
        for (const auto& [key, value] : rope->items())
            if (!inner.used.count(key) && !value.is_null())
                fail(inner.where, ": the field '", key, "' (", quoted(value),
                     ") is not known to this program");
        c.rope_scaling = s;
    }
}

// Which layers have rotary positions: SmolLM3's fields.
void read_rotated_layers(Fields& f, const Architecture& a, Config& c) {
    if (!a.unrotated_every) return;
    const int every = f.integer("no_rope_layer_interval", a.unrotated_every);
    const json* list = f.find("no_rope_layers"); // 1: a layer that has them
    if (list && !(list->is_array() && list->size() >= size_t(c.layers)))
        fail(f.where, ": the field 'no_rope_layers' is ", quoted(*list), ", expected a list of ",
             c.layers, " numbers, 1 for a layer with rotary positions and 0 for one without");
    for (int l = 0; l < c.layers; l++) {
        if (list && (*list)[size_t(l)] != 0 && (*list)[size_t(l)] != 1)
            fail(f.where, ": the field 'no_rope_layers' has ", quoted((*list)[size_t(l)]),
                 ", expected 0 or 1");
        c.rotated_layers.push_back(list ? (*list)[size_t(l)] == 1 : (l + 1) % every != 0);
    }
}

// The sliding window, and which layers have it; after read_rotated_layers.
void read_window(Fields& f, const Architecture& a, Config& c) {
    const char* full = "full_attention";
    const char* sliding = "sliding_attention";
    const bool always = a.windows == WindowLayers::all;
    if (a.windows == WindowLayers::none) {
        f.only("use_sliding_window", false);
        f.only("sliding_window", nullptr);
    } else {
        const bool used = f.boolean("use_sliding_window", always);
        const bool absent = always && !f.object.contains("sliding_window");
        if (absent || (f.find("sliding_window") && used))
            c.window = f.integer("sliding_window", absent ? 4096 : -1); // as in transformers 5.24
    }
    const int upper = f.integer("max_window_layers", 28, 0);
    const json* types = f.find("layer_types");
    if (types && !(types->is_array() && types->size() == size_t(c.layers)))
        fail(f.where, ": the field 'layer_types' is ", quoted(*types), ", expected a list of ",
             c.layers, " types, one for each layer");
    for (int l = 0; l < c.layers; l++) {
        const json type = types ? (*types)[size_t(l)] : json(nullptr);
        if (types && type != full && (type != sliding || !c.window))
            fail(f.where, ": the field 'layer_types' has ", quoted(type), ", and only \"", full,
                 c.window ? cat("\" and \"", sliding, "\" are supported")
                          : "\" is supported without a sliding window");
        if (always && types && c.window && type != sliding)
            fail(f.where, ": the field 'layer_types' has ", quoted(type), ", but in a ",
                 a.model_type, " every layer has the sliding window");
        if (always || !c.window) continue;
        c.window_layers.push_back(types                              ? type == sliding
                                  : a.windows == WindowLayers::upper ? l >= upper
                                                                     : !c.rotates(l));
    }
}

void read_layers(Fields& f, const Architecture& a, Config& c) {
    const ConfigKeys& k = a.keys;
    if (k.norm_eps) c.norm_eps = f.number(k.norm_eps, a.absent_norm_eps);
    if (c.rope()) {
        read_rope(f, a, c);
        read_rotated_layers(f, a, c);
        read_window(f, a, c);
    }
    const std::string activation = f.text(k.activation, a.activation_names[0]);
    if (std::find(a.activation_names.begin(), a.activation_names.end(), activation) ==
        a.activation_names.end())
        fail(f.where, ": the field '", k.activation, "' is \"", activation, "\", and only \"",
             a.activation_names[0], "\" is supported");
    if (k.attention_bias) c.qkv_bias = c.attn_out_bias = f.boolean(k.attention_bias, false);
    if (k.mlp_bias)
        c.mlp_bias = f.boolean(k.mlp_bias, false);
    else
        f.only("mlp_bias", false);
    for (const auto& [key, value] : k.only) f.only(key, json::parse(value));
    for (const char* key : k.ignored) f.find(key);
    for (const auto& [key, value] : f.object.items())
        if (key.starts_with("summary_")) f.used.insert(key); // of another head
    for (const char* key : k.dropouts)
        if (const json* dropout = f.find(key); dropout && *dropout != 0)
            c.notes.push_back(cat(f.where, " has ", key, " ", quoted(*dropout),
                                  "; this program trains without dropout"));
}

// Our own field, lns_cpp.
void read_ours(const json& ours, const std::string& where, const Architecture& a, Config& c) {
    if (!ours.is_object()) fail(where, ": not an object but ", quoted(ours));
    Fields o{ours, where, {}};
    try {
        c.scheme = parse_scheme(o.text("scheme", c.scheme.name()));
        parse_sites(o.text("lns_sites", "attn,mlp"), c.scheme);
    } catch (const Error& error) {
        fail(where, ": ", error.what());
    }
    const json* power = o.find("lns_power");
    if (power && !(power->is_number() && power->get<double>() >= 0 && power->get<double>() <= 10))
        fail(where, ": the field 'lns_power' is ", quoted(*power),
             ", expected a number from 0 to 10");
    if (power) c.scheme.lns_power = *power;
    // Files without this field are of a time when +gpas had a gate for each sublayer.
    const std::string gates = o.text("gates", c.scheme.gpas ? "sublayer" : "layer");
    if (c.scheme.gpas && gates == "sublayer") c.scheme.gpas = false, c.scheme.gpas_each = true;
    c.scheme.base_layers = o.integer("base_layers", c.scheme.base_layers);
    c.scheme.base_width = o.integer("base_width", c.scheme.base_width);
    if (o.find("step")) c.scheme.step = o.integer("step", 0, 0);
    const std::string norm_type = o.text("norm_type", "stock");
    if (norm_type != "stock" && norm_type != "dyt")
        fail(where, ": the field 'norm_type' is \"", norm_type,
             "\", expected \"stock\" or \"dyt\"");
    set_norm_type(c, norm_type);
    c.preset = o.text("preset", "");
    // Sizes that the architecture's own config.json cannot say
    if (!a.keys.kv_heads) c.kv_heads = o.integer("kv_heads", c.heads);
    if (!a.keys.head_size && o.find("head_size")) c.head_size = o.integer("head_size");
    c.init_std = o.number("init_std", c.init_std);
    c.embed_std = o.number("embed_std", c.init_std);
    for (const auto& [key, value] : ours.items())
        if (!o.used.count(key))
            fail(where, ": the field '", key, "' (", quoted(value),
                 ") is not known to this program: a newer one wrote it");
}

// What read_rope, read_rotated_layers and read_window read.
void write_positions(json& j, const Architecture& a, const Config& c) {
    j["rope_theta"] = c.rope_theta;
    const RopeScaling& s = c.rope_scaling;
    if (s.type != RopeScaling::none) {
        json& scaling = j["rope_scaling"];
        scaling = {{"rope_type", s.type == RopeScaling::linear ? "linear" : "llama3"},
                   {"factor", s.factor}};
        if (s.type == RopeScaling::llama3)
            scaling.update({{"low_freq_factor", s.low_frequency},
                            {"high_freq_factor", s.high_frequency},
                            {"original_max_position_embeddings", s.original_positions}});
    }
    for (int l = 0; a.unrotated_every && l < c.layers; l++)
        j["no_rope_layers"].push_back(int(c.rotates(l)));
    if (a.windows == WindowLayers::none) return;
    j["sliding_window"] = c.window ? json(c.window) : json();
    if (a.windows == WindowLayers::all) return;
    j["use_sliding_window"] = c.window > 0;
    if (!c.window) return;
    for (bool sliding : c.window_layers)
        j["layer_types"].push_back(sliding ? "sliding_attention" : "full_attention");
    const auto first = std::find(c.window_layers.begin(), c.window_layers.end(), true);
    if (a.windows == WindowLayers::upper) j["max_window_layers"] = first - c.window_layers.begin();
}

} // namespace

Config config_from_json(const std::string& text, const std::string& where) {
    Fields f{parse_json(text, where), where, {}};
    if (!f.object.is_object()) fail(where, ": not a JSON object, expected a model's config.json");
    const json* type = f.find("model_type");
    if (!type) fail(where, ": the field 'model_type' is missing");
    if (!type->is_string())
        fail(where, ": the field 'model_type' is ", quoted(*type), ", expected a string");
    std::string model_type = type->get<std::string>();
    const json* ours = f.find("lns_cpp");
    if (ours && model_type.rfind("lns-", 0) == 0) model_type = model_type.substr(4);
    const Architecture* a = find_architecture(model_type);
    if (!a)
        fail(where, ": the field 'model_type' is \"", model_type, "\", and only ",
             join(architecture_names()), " are supported");

    Config c = architecture(model_type);
    read_sizes(f, *a, c);
    read_layers(f, *a, c);
    c.tied = f.boolean("tie_word_embeddings", a->tied);
    c.init_std = f.number("initializer_range", c.init_std);
    if (ours) read_ours(*ours, where + ", lns_cpp", *a, c);
    for (const auto& [key, value] : f.object.items())
        if (!f.used.count(key) && !harmless.count(key) && !value.is_null() && value != false)
            fail(where, ": the field '", key, "' (", quoted(value),
                 ") is not known to this program: if it does not change what the model computes, "
                 "remove it");
    try {
        complete_config(c);
    } catch (const Error& error) {
        fail(where, ": ", error.what());
    }
    return c;
}

std::string config_to_json(const Config& c) {
    const bool stock = beyond_stock_model(c).empty();
    const Architecture& a = architecture_row(c.model_type);
    const ConfigKeys& k = a.keys;
    json j;
    j["architectures"] = {std::string(stock ? "" : "Lns") + a.model_class};
    j["model_type"] = (stock ? "" : "lns-") + c.model_type;
    j["vocab_size"] = c.vocab_size;
    j["tie_word_embeddings"] = c.tied;
    j["initializer_range"] = c.init_std;
    j["torch_dtype"] = "float32";
    j[k.width] = c.width;
    j[k.layers] = c.layers;
    j[k.heads] = c.heads;
    if (k.kv_heads) j[k.kv_heads] = c.kv_heads;
    if (k.head_size && (c.q_width() != c.width || a.absent_head_size)) j[k.head_size] = c.head_size;
    j[k.mlp_width] = c.mlp_width;
    j[k.positions] = c.positions;
    if (k.norm_eps) j[k.norm_eps] = c.norm_eps;
    if (c.rope()) write_positions(j, a, c);
    j[k.activation] = a.activation_names[0];
    if (k.attention_bias) j[k.attention_bias] = c.qkv_bias;
    if (k.mlp_bias) j[k.mlp_bias] = c.mlp_bias;
    for (const auto& [key, value] : k.written) j[key] = json::parse(value);
    j["lns_cpp"] = {
        {"scheme", c.scheme.name()},     {"lns_power", c.scheme.lns_power},
        {"lns_sites", c.scheme.sites()}, {"preset", c.preset},
        {"init_std", c.init_std},        {"embed_std", c.embed_std > 0 ? c.embed_std : c.init_std}};
    if (c.scheme.gpas) j["lns_cpp"]["gates"] = "layer";
    if (c.scheme.row->depth_transfer)
        j["lns_cpp"]["base_layers"] = c.scheme.base_layers,
        j["lns_cpp"]["base_width"] = c.scheme.base_width;
    if (c.scheme.prores && c.scheme.step < INT64_MAX) j["lns_cpp"]["step"] = c.scheme.step;
    if (c.norm == NormType::dyt) j["lns_cpp"]["norm_type"] = norm_type_name(c);
    if (!k.kv_heads && c.kv_heads != c.heads) j["lns_cpp"]["kv_heads"] = c.kv_heads;
    if (!k.head_size && c.q_width() != c.width) j["lns_cpp"]["head_size"] = c.head_size;
    return j.dump(2) + "\n";
}

bool same_qkv(const Config& a, const Config& b) {
    return a.q_norms() == b.q_norms() && a.k_norms() == b.k_norms() && a.v_norms() == b.v_norms() &&
           a.scheme.value_residual == b.scheme.value_residual;
}

std::string beyond_stock_model(const Config& c) {
    // Compared by what junctions do, not by name: mix:0 is pre. Initial values make no difference.
    const Scheme stock = stock_scheme(c.model_type);
    if (c.scheme.value_residual) return "values mixed with the first layer's (+value-residual)";
    for (int k = 0; k <= 2 * c.layers; k++) {
        Junction ours = junction(c.scheme, c.layers, k), theirs = junction(stock, c.layers, k);
        ours.in_weight_init = theirs.in_weight_init;
        if (ours != theirs)
            return cat("the norm scheme ", c.scheme.name(), " (the stock ", c.model_type, " has ",
                       stock.name(), ")");
    }
    Config other = c;
    other.scheme = stock;
    if (!same_qkv(c, other)) return "norms of each head's q, k and v";
    if (c.norm == NormType::dyt) return "tanh in place of norms (DyT)";
    const ConfigKeys& k = architecture_row(c.model_type).keys;
    if (!k.kv_heads && c.kv_heads != c.heads)
        return "fewer heads of keys and values than of queries";
    if (!k.head_size && c.q_width() != c.width)
        return "heads that together are not as wide as the residual stream";
    if (c.width % c.heads) return "a width that is not a multiple of the heads";
    return "";
}

std::string config_difference(const Config& found, const Config& wanted) {
    auto differs = [](const char* what, const auto& a, const auto& b) {
        return a == b ? std::string() : cat("its ", what, " is ", a, ", expected ", b);
    };
    auto scheme = [](const Config& c) {
        Scheme s = c.scheme;
        s.number = number_of(s, c.layers);
        s.scaled_init = s.depth_init = false; // only where training started
        return s.name();
    };
    auto base = [](const Config& c) { return cat(c.scheme.base_layers, "x", c.scheme.base_width); };
    auto norm_type = [](const Config& c) {
        return c.norm == NormType::dyt     ? "DyT (--norm-type dyt)"
               : c.norm == NormType::layer ? "LayerNorm"
                                           : "RMSNorm";
    };
    auto positions = [](const Config& c) {
        json fields;
        write_positions(fields, architecture_row(c.model_type), c);
        fields.erase("rope_theta");
        return fields.dump();
    };
    for (const std::string& difference :
         {differs("architecture", found.model_type, wanted.model_type),
          differs("number of layers", found.layers, wanted.layers),
          differs("width", found.width, wanted.width),
          differs("number of heads", found.heads, wanted.heads),
          differs("number of kv heads", found.kv_heads, wanted.kv_heads),
          differs("head size", found.head_size, wanted.head_size),
          differs("MLP width", found.mlp_width, wanted.mlp_width),
          differs("vocabulary", found.vocab_size, wanted.vocab_size),
          differs("type of norm", std::string(norm_type(found)), std::string(norm_type(wanted))),
          differs("norm scheme", scheme(found), scheme(wanted)),
          differs("LNS power", found.scheme.lns_power, wanted.scheme.lns_power),
          differs("LNS sites", found.scheme.sites(), wanted.scheme.sites()),
          wanted.scheme.row->depth_transfer ? differs("CompleteP base", base(found), base(wanted))
                                            : "",
          differs("rope_theta", found.rope_theta, wanted.rope_theta),
          wanted.rope() ? differs("position settings", positions(found), positions(wanted)) : "",
          differs("norm epsilon", found.norm_eps, wanted.norm_eps),
          differs("biases of q, k and v (0 or 1)", found.qkv_bias, wanted.qkv_bias),
          differs("bias of the attention's output (0 or 1)", found.attn_out_bias,
                  wanted.attn_out_bias),
          differs("biases of the MLP (0 or 1)", found.mlp_bias, wanted.mlp_bias),
          differs("tied head (0 or 1)", found.tied, wanted.tied)})
        if (!difference.empty()) return difference;
    return "";
}

} // namespace lns
