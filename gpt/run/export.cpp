#include "gpt/run/export.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/terminal.h"
#include "gpt/cpu/bf16.h"
#include "gpt/model/layers.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/export_files.h"
#include "gpt/run/flags.h"
#include "gpt/run/setup.h"

namespace lns {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// Applies `change` to the fold of every parameter in [begin, begin + size) of registry's buffer.
template <class Change>
void fold_range(ExportPlan& plan, const Registry& registry, int64_t begin, int64_t size,
                Change change) {
    if (begin < 0) return; // the parameter is absent
    for (const Param& p : registry.params)
        if (p.offset >= begin && p.offset < begin + size) change(plan.folds[p.name]);
}

// The layers of L that remain, from 0.
std::vector<int> layers_without(const std::vector<int>& dropped, int L) {
    std::vector<int> layers(L);
    std::iota(layers.begin(), layers.end(), 0);
    for (int layer : dropped) {
        if (layer < 1 || layer > L)
            fail("layer ", layer, " cannot be dropped: the model has layers 1 to ", L);
        if (std::erase(layers, layer - 1) == 0) fail("layer ", layer, " is to be dropped twice");
    }
    if (layers.empty()) fail("all ", L, " layers are to be dropped: leave at least one");
    return layers;
}

// Whether a layer of `scheme` in a model of L layers does the same as layer `other_layer` (both
// from 0) of `other`, but for scales and γ, which are folded.
bool same_layer(const Scheme& scheme, int L, int layer, const Scheme& other, int other_L,
                int other_layer) {
    auto parts = [](const Scheme& s, int layers, int l) {
        std::vector<Junction> all = {entering(junction(s, layers, 2 * l)),
                                     junction(s, layers, 2 * l + 1),
                                     leaving(junction(s, layers, 2 * l + 2))};
        for (Junction& j : all) {
            j.in_scale = j.in_weight_init = 1;
            if (!j.second) j.beta = 1;
        }
        return all;
    };
    return parts(scheme, L, layer) == parts(other, other_L, other_layer);
}

// Drops layers from a plan for all of them.
void drop_layers(ExportPlan& plan, const Config& model) {
    const int L = model.layers, left = int(plan.layers.size());
    if (model.scheme.value_residual && plan.layers[0] != 0)
        fail("layer 1 cannot be dropped: with +value-residual, the other layers mix their values "
             "with its values");
    Scheme& scheme = plan.config.scheme;
    if (scheme.row->mixing != Mixing::sum)
        fail("under the norm scheme ", scheme.name(),
             " later layers read more of a layer than its "
             "output: layers of this model cannot be dropped");
    if (!plan.beyond.empty()) {
        if (scheme.row->depth != DepthScale::none || scheme.row->depth_transfer)
            scheme.row = parse_scheme("pre").row;
        scheme.prores = false;
        if (scheme.row->number_of && !scheme.row->grouped) {
            const int k = number_of(scheme, L);
            scheme.number = int(std::count_if(plan.layers.begin(), plan.layers.end(),
                                              [&](int l) { return l < k; }));
        }
        for (int l = 0; l < left; l++)
            if (!same_layer(scheme, left, l, model.scheme, L, plan.layers[l]))
                fail("the norm scheme ", model.scheme.name(), " has scales that belong to ", L,
                     " layers, and no scheme has them with ", left,
                     ": layers of this model cannot be dropped");
    }
    plan.config.layers = left;
    for (auto list : {&Config::rotated_layers, &Config::window_layers}) {
        std::vector<bool> kept;
        for (int l : plan.layers)
            if (!(model.*list).empty()) kept.push_back((model.*list)[size_t(l)]);
        plan.config.*list = kept;
    }
}

} // namespace

const Param& ExportPlan::source(const Param& exported) const {
    const TensorNames& names = architecture_row(config.model_type).names;
    const std::string stack = cat(names.root, names.layers);
    std::string name = exported.name;
    if (name.starts_with(stack)) {
        size_t digits;
        const int layer = std::stoi(name.substr(stack.size()), &digits);
        name = cat(stack, layers[size_t(layer)], name.substr(stack.size() + digits));
    }
    return *registry->find(name);
}

ExportPlan plan_export(const Config& config, const Registry& registry,
                       const std::vector<int>& dropped) {
    ExportPlan plan{config, "", {}, layers_without(dropped, config.layers), &registry};
    plan.config.scheme = stock_scheme(config.model_type);
    const Config& c = config;
    const int L = c.layers;
    for (int k = 0; k <= 2 * L; k++) {
        const Junction j = junction(c.scheme, L, k);
        const JunctionParams& p = registry.junctions[k];
        if (j.gamma != Gamma::none || j.beta != 1) { // sublayer k
            const LayerParams& layer = registry.layers[(k - 1) / 2];
            const bool attn = k % 2 == 1;
            const int64_t columns = attn ? c.q_width() : c.mlp_width;
            auto by_factors = [&](Fold& fold) {
                fold.scale = j.beta;
                for (const Param& param : registry.params)
                    if (param.offset == p.gamma) fold.gamma = &param;
            };
            fold_range(plan, registry, attn ? layer.attn_out : layer.mlp_out, c.width * columns,
                       by_factors);
            fold_range(plan, registry, attn ? layer.attn_out_bias : layer.mlp_out_bias, c.width,
                       by_factors);
        }
        if (j.in_scale != 1) { // sublayer k + 1, or the head
            auto by_scale = [&](Fold& fold) { fold.scale = j.in_scale; };
            if (p.in.weight >= 0) {
                fold_range(plan, registry, p.in.weight, c.width, by_scale);
                fold_range(plan, registry, p.in.bias, c.width, by_scale);
            } else if (k < 2 * L) {
                const LayerParams& layer = registry.layers[k / 2];
                const bool attn = k % 2 == 0;
                fold_range(plan, registry, attn ? layer.qkv : layer.mlp_in,
                           int64_t(attn ? c.qkv_width() : c.mlp_in_width()) * c.width, by_scale);
            } else {
                fold_range(plan, registry, registry.head, int64_t(c.vocab_size) * c.width,
                           by_scale);
            }
        }
    }

    // Without γ and the scales, the junctions must equal the stock model's. A tied head has the
    // embedding's values.
    const bool scaled_head = junction(c.scheme, L, 2 * L).in_scale != 1 &&
                             registry.junctions[size_t(2 * L)].in.weight < 0;
    bool folds = same_qkv(c, plan.config) && !(scaled_head && c.tied);
    for (int k = 0; k <= 2 * L; k++) {
        Junction ours = junction(c.scheme, L, k);
        const Junction theirs = junction(plan.config.scheme, L, k);
        const bool factors = ours.gamma != Gamma::none || ours.beta != 1;
        folds &= !factors || !(ours.branch_norm || ours.second); // they come after that norm
        ours.fades = theirs.fades;
        ours.gamma = theirs.gamma;
        ours.beta = theirs.beta;
        ours.in_scale = theirs.in_scale;
        ours.in_weight_init = theirs.in_weight_init;
        folds &= ours == theirs;
    }
    plan.beyond = folds ? beyond_stock_model(plan.config) : beyond_stock_model(config);
    if (!plan.beyond.empty()) {
        plan.config = config;
        for (auto& [name, fold] : plan.folds) fold.gamma = nullptr;
        if (dropped.empty()) plan.folds.clear();
        std::erase_if(plan.folds, [](const auto& fold) { return fold.second.scale == 1; });
    }
    if (!dropped.empty()) drop_layers(plan, config);
    return plan;
}

uint16_t round_to_half(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x), size = u & 0x7FFFFFFF;
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    if (size > 0x7F800000) return sign | 0x7E00; // NaN
    if (size >= 0x477FF000)
        return sign | 0x7C00; // 65520, halfway to the next value beyond the range
    if (size < 0x38800000)    // below 2^-14: a multiple of 2^-24
        return sign | uint16_t(std::nearbyint(std::ldexp(std::bit_cast<float>(size), 24)));
    const uint32_t rounded = size + 0xFFF + (size >> 13 & 1);
    return sign | uint16_t((rounded >> 13) - (112 << 10)); // the biases: 127 − 15
}

namespace {

struct ExportType {
    const char *name, *file, *torch; // in --dtype, a safetensors header, a config.json
};
ExportType export_type(const std::string& name) {
    for (const ExportType& type : {ExportType{"float32", "F32", "float32"},
                                   {"float16", "F16", "float16"},
                                   {"bfloat16", "BF16", "bfloat16"},
                                   {"bf16", "BF16", "bfloat16"}})
        if (name == type.name) return type;
    fail("--dtype ", name, " is none of float32, float16 and bfloat16");
}

// A parameter's folded values in the file's layout.
void exported_values(const WeightFiles& weights, const Param& p, const Fold* fold,
                     std::vector<float>& out) {
    weights.read(p, "", out);
    if (fold) {
        std::vector<float> gamma;
        if (fold->gamma) weights.read(*fold->gamma, "", gamma);
        const int64_t rows = p.shape[0], columns = p.size() / rows;
        for (int64_t r = 0; r < rows; r++) {
            const double factor =
                fold->scale * (gamma.empty() ? 1 : gamma[gamma.size() == 1 ? 0 : size_t(r)]);
            for (int64_t i = r * columns; i < (r + 1) * columns; i++)
                out[i] = float(factor * out[i]);
        }
    }
    to_file_layout(p, out);
}

// Of parameter p, as `name`.
TensorOut tensor_of(const WeightFiles& weights, const std::string& name, const Param& p,
                    const Fold* fold, const ExportType& type) {
    return {name, type.file, p.file_shape(), [=, &weights, &p](const TensorSink& sink) {
                std::vector<float> values;
                exported_values(weights, p, fold, values);
                if (type.file == std::string("F32"))
                    return sink(values.data(), values.size() * sizeof(float));
                std::vector<uint16_t> rounded(values.size());
                const bool half = type.file == std::string("F16");
                for (size_t i = 0; i < values.size(); i++) {
                    rounded[i] = half ? round_to_half(values[i]) : round_to_bf16(values[i]);
                    if (half && std::isfinite(values[i]) && (rounded[i] & 0x7FFF) == 0x7C00)
                        fail("the tensor '", p.name, "' has the value ", values[i],
                             ", beyond float16's maximum of 65504: export as bfloat16 or float32");
                }
                sink(rounded.data(), rounded.size() * sizeof(uint16_t));
            }};
}

// config.json for stock tools: with the dtype, and with the tokens that begin and end a text, which
// would otherwise default to those of the architecture's first release.
std::string exported_config(const ExportPlan& plan, const std::string& from,
                            const ExportType& type) {
    json config = json::parse(config_to_json(plan.config));
    config["torch_dtype"] = type.torch;
    if (plan.beyond.empty()) config.erase("lns_cpp");
    json source;
    if (path_exists(from + "/config.json"))
        source = parse_json(read_file(from + "/config.json"), from + "/config.json");
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
        config[key] = source.is_object() && source.contains(key) ? source[key] : json();
    if (path_exists(from + "/trainer_state.json"))
        if (int eot = read_trainer_state(from).tokenizer.eot; eot >= 0)
            config["bos_token_id"] = config["eos_token_id"] = eot;
    return config.dump(2) + "\n";
}

// Divides tensors into files of at most max_bytes, unless one tensor is larger. bytes: the total.
std::vector<std::vector<TensorOut>> shards_of(const std::vector<TensorOut>& tensors,
                                              int64_t max_bytes, int64_t& bytes) {
    std::vector<std::vector<TensorOut>> shards(1);
    int64_t shard_bytes = 0;
    bytes = 0;
    for (const TensorOut& tensor : tensors) {
        int64_t size = int64_t(dtype_bytes(tensor.dtype));
        for (int64_t n : tensor.shape) size *= n;
        if (shard_bytes + size > max_bytes && !shards.back().empty()) {
            shards.emplace_back();
            shard_bytes = 0;
        }
        shards.back().push_back(tensor);
        shard_bytes += size;
        bytes += size;
    }
    return shards;
}

std::string shard_name(size_t i, size_t n) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, n);
    return name;
}

void write_weights(const std::string& dir, const std::vector<std::vector<TensorOut>>& shards,
                   int64_t bytes, const std::map<std::string, std::string>& metadata) {
    if (shards.size() == 1)
        return write_safetensors(dir + "/model.safetensors", shards[0], metadata);
    json index = {{"metadata", {{"total_size", bytes}}}, {"weight_map", json::object()}};
    for (size_t i = 0; i < shards.size(); i++) {
        const std::string name = shard_name(i, shards.size());
        write_safetensors(dir + "/" + name, shards[i], metadata);
        for (const TensorOut& tensor : shards[i]) index["weight_map"][tensor.name] = name;
    }
    write_file_atomic(dir + "/model.safetensors.index.json", index.dump(2) + "\n");
}

// A field of dir's tokenizer_config.json; null if absent.
json tokenizer_field(const std::string& dir, const char* field) {
    const std::string path = dir + "/tokenizer_config.json";
    if (!path_exists(path)) return {};
    const json config = parse_json(read_file(path), path);
    return config.is_object() ? config.value(field, json()) : json();
}

// 1234567 as "1.2 MB".
std::string size_text(int64_t bytes) {
    const char* units[] = {"bytes", "kB", "MB", "GB", "TB"};
    double size = double(bytes);
    int unit = 0;
    while (size >= 1000 && unit < 4) size /= 1000, unit++;
    char text[32];
    std::snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", size, units[unit]);
    return text;
}

} // namespace

int export_model(const Options& o) {
    const std::string from = find_checkpoint(o.checkpoint);
    const Config config = checkpoint_config(from);
    const Registry registry = make_registry(config);
    const WeightFiles weights(from);
    weights.check(config, registry, !is_directory_at(from));
    const ExportPlan plan = plan_export(
        config, registry, o.drop_layers.empty() ? std::vector<int>() : parse_layers(o.drop_layers));
    const Registry written = make_registry(plan.config);
    const ExportType type = export_type(o.export_dtype);

    std::string dir = o.export_dir;
    while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
    if (path_exists(dir) && !(is_directory_at(dir) && directory_entries(dir).empty()))
        fail(dir, " exists already", is_directory_at(dir) ? " and is not empty" : "",
             ": name a new directory for the exported model");
    const fs::path parent = fs::absolute(dir).parent_path();
    std::error_code error;
    fs::create_directories(parent, error);
    if (error) fail("cannot make the directory ", parent.string(), ": ", error.message());

    if (path_exists(from + "/trainer_state.json") && has_tokenizer(from))
        expect_tokenizer(*load_tokenizer(from), from, read_trainer_state(from).tokenizer);

    std::vector<TensorOut> tensors;
    for (const Param& p : written.params) {
        const Param& source = plan.source(p);
        const auto fold = plan.folds.find(source.name);
        tensors.push_back(tensor_of(weights, p.name, source,
                                    fold == plan.folds.end() ? nullptr : &fold->second, type));
    }
    int64_t bytes;
    const auto shards = shards_of(tensors, o.shard_size, bytes);
    check_writable(parent.string(), uint64_t(bytes) + 512 * tensors.size() + 65536);

    AtomicDirectory directory(dir);
    const std::string& at = directory.temporary();
    write_weights(
        at, shards, bytes,
        {{"format", "pt"}, {"exported_from", "lns.cpp, norm scheme " + config.scheme.name()}});
    const std::string config_json = exported_config(plan, from, type);
    write_file_atomic(at + "/config.json", config_json);
    const std::string copied = is_directory_at(from) ? export_tokenizer(from, at) : "";
    write_file_atomic(at + "/generation_config.json", generation_config(from, config_json));
    write_file_atomic(at + "/README.md",
                      model_card(from, fs::path(dir).filename().string(), config, plan,
                                 bytes / int64_t(dtype_bytes(type.file)), type.torch));
    // A model without byte pieces, such as T5's: no class of transformers is known to match it.
    const bool no_class = path_exists(at + "/tokenizer.model") &&
                          !path_exists(at + "/tokenizer.json") &&
                          tokenizer_field(at, "tokenizer_class").is_null();
    directory.commit();

    std::printf("wrote %s: %s, %s, %zu tensors, %s in %zu file%s\n", printable(dir).c_str(),
                json::parse(config_to_json(plan.config))["model_type"].get<std::string>().c_str(),
                type.torch, tensors.size(), size_text(bytes).c_str(), shards.size(),
                shards.size() == 1 ? "" : "s");
    if (!o.drop_layers.empty())
        std::printf("%zu of %d layers, without %s\n", plan.layers.size(), config.layers,
                    o.drop_layers.c_str());
    if (!plan.beyond.empty())
        std::printf("stock tools cannot run it: it has %s; train_gpt can\n", plan.beyond.c_str());
    else if (!plan.folds.empty())
        std::printf("the norm scheme %s is folded into %zu tensors: stock tools compute the same\n",
                    config.scheme.name().c_str(), plan.folds.size());
    else
        std::printf("a stock %s: nothing had to be folded\n", plan.config.model_type.c_str());
    if (copied.empty())
        std::printf("there is no tokenizer with the weights: add one\n");
    else
        std::printf("copied the tokenizer: %s\n", copied.c_str());
    if (no_class)
        std::printf(
            "tokenizer.model has no byte pieces, so stock tools may encode text differently: "
            "compare their tokens before use\n");
    return 0;
}

} // namespace lns
