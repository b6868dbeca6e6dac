#include "gpt/run/export.h"

#include "dev/test/holder.h"
#include "dev/test/program_helpers.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "gpt/cpu/bf16.h"
#include "gpt/model/layers.h"
#include "gpt/run/checkpoint.h"

using namespace lns;
using namespace lns::test;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

// A checkpoint with random parameters, and its export.
struct Exported {
    TemporaryDirectory dir;
    Holder model;
    Options options;

    explicit Exported(const Config& config) : model(config) {
        model.initialize(7);
        save_checkpoint(dir / "checkpoint", model, {}, nullptr);
        options.checkpoint = dir / "checkpoint";
        options.export_dir = dir / "out";
    }
    Exported(const std::string& model_type, const std::string& scheme)
        : Exported(small(model_type, scheme)) {}

    std::string run() { // its output, or its error message
        testing::internal::CaptureStdout();
        std::string error = error_of([&] { export_model(options); });
        std::string said = testing::internal::GetCapturedStdout();
        return error.empty() ? said : error;
    }
    Holder read(const std::string& from = "out") const {
        Holder other(checkpoint_config(dir / from));
        load_weights(other, dir / from);
        return other;
    }
    json config() const { return json::parse(read_bytes(dir / "out/config.json")); }
    // Expects every parameter times factor(row); parameters that are not in `other` are skipped.
    template <class Factor> void expect(const Holder& other, Factor factor) const {
        for (const Param& p : other.registry.params) {
            const Param* from = model.registry.find(p.name);
            ASSERT_TRUE(from) << p.name;
            const int64_t columns = p.size() / p.shape[0];
            for (int64_t i = 0; i < p.size(); i++)
                ASSERT_EQ(other.held[0][p.offset + i],
                          float(factor(p.name, i / columns) * model.held[0][from->offset + i]))
                    << p.name << " " << i;
        }
    }
    double value(const std::string& name, int64_t i) const {
        return model.held[0][model.registry.find(name)->offset + i];
    }
};

bool in(const std::string& name, const std::string& part) {
    return name.find(part) != std::string::npos;
}

const auto one = [](const std::string&, int64_t) { return 1.0; };

float half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float size =
        exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return h & 0x8000 ? -size : size;
}

} // namespace

TEST(Export, RoundsToHalf) {
    for (uint32_t h = 0; h < 0x7C00; h++) {
        const float x = half_value(uint16_t(h)), next = half_value(uint16_t(h + 1));
        ASSERT_EQ(round_to_half(x), h);
        ASSERT_EQ(round_to_half(-x), h | 0x8000);
        if (h == 0x7BFF) break;
        const float middle = (x + next) / 2; // exact
        ASSERT_EQ(round_to_half(middle), h + h % 2) << x;
        ASSERT_EQ(round_to_half(std::nextafter(middle, 0.0f)), h) << x;
        ASSERT_EQ(round_to_half(std::nextafter(middle, 1e9f)), h + 1) << x;
    }
    EXPECT_EQ(round_to_half(65519.996f), 0x7BFF);
    EXPECT_EQ(round_to_half(65520), 0x7C00);
    EXPECT_EQ(round_to_half(-INFINITY), 0xFC00);
    EXPECT_EQ(round_to_half(NAN) & 0x7E00, 0x7E00);
    EXPECT_EQ(round_to_half(1e-30f), 0);
}

TEST(Export, WithoutFoldingTheBitsAreUnchanged) {
    for (auto [type, scheme] : std::vector<std::array<std::string, 2>>{{"llama", "pre"},
                                                                       {"llama", "lns-init"},
                                                                       {"llama", "mix:0"},
                                                                       {"gpt2", "pre+scaled-init"},
                                                                       {"qwen2", "mix"}, // 2 / 4
                                                                       {"olmo", "pre"},
                                                                       {"olmo2", "olmo2"}}) {
        Exported e(type, scheme);
        EXPECT_TRUE(says(e.run(), {"a stock " + type, "no tokenizer"})) << scheme;
        e.expect(e.read(), one);
        EXPECT_EQ(e.config().at("model_type"), type);
        EXPECT_FALSE(e.config().contains("lns_cpp"));
        EXPECT_EQ(checkpoint_config(e.dir / "out").scheme.name(),
                  type == "olmo2" ? "olmo2" : "pre");
    }
}

TEST(Export, LnsIsFoldedIntoTheNorms) {
    for (const char* type : {"llama", "gpt2", "qwen2"}) {
        Exported e(type, "lns");
        EXPECT_TRUE(says(e.run(), {"folded", "lns", "stock tools compute the same"}));
        e.expect(e.read(), [](const std::string& name, int64_t) {
            const bool norm = in(name, "layernorm") || in(name, ".ln_1") || in(name, ".ln_2");
            return norm && in(name, ".1.") ? std::sqrt(0.5) : 1; // layer 2
        });
        EXPECT_EQ(e.config().at("model_type"), type);
    }
    Config c = small("llama", "lns");
    c.scheme.lns_attn = false;
    c.scheme.lns_power = 2;
    Exported e(c);
    e.run();
    e.expect(e.read(), [](const std::string& name, int64_t) {
        return name == "model.layers.1.post_attention_layernorm.weight" ? 0.25 : 1;
    });
}

TEST(Export, LnsOfANormWithoutWeightsIsFoldedIntoTheNextMatrices) {
    Exported e("olmo", "lns+scaled-init");
    EXPECT_TRUE(says(e.run(), {"folded into 5 tensors"}));
    e.expect(e.read(), [](const std::string& name, int64_t) {
        const bool behind = in(name, "q_proj") || in(name, "k_proj") || in(name, "v_proj") ||
                            in(name, "gate_proj") || in(name, "up_proj");
        return behind && in(name, ".1.") ? std::sqrt(0.5) : 1;
    });
}

TEST(Export, GammaIsFoldedIntoTheRowsOfTheLastMatrix) {
    for (auto [type, scheme] : std::vector<std::array<std::string, 2>>{{"llama", "layerscale"},
                                                                       {"gpt2", "layerscale"},
                                                                       {"gpt2", "skipinit"},
                                                                       {"olmo", "skipinit"}}) {
        Exported e(type, scheme);
        EXPECT_TRUE(says(e.run(), {"folded", scheme}));
        const bool vector = scheme == "layerscale";
        e.expect(e.read(), [&](const std::string& name, int64_t row) {
            const bool attn = in(name, "attn.c_proj") || in(name, "o_proj");
            const bool mlp = in(name, "mlp.c_proj") || in(name, "down_proj");
            if (!attn && !mlp) return 1.0;
            const std::string layer =
                name.substr(0, name.find(in(name, ".1.") ? ".1." : ".0.") + 3);
            return e.value(layer + (attn ? "attn_gamma" : "mlp_gamma"), vector ? row : 0);
        });
    }
}

TEST(Export, FactorsOfBranchesAreFoldedIntoTheLastMatrices) {
    auto last = [](const std::string& name) {
        return in(name, "o_proj") || in(name, "down_proj") || in(name, "c_proj");
    };
    for (const char* type : {"llama", "gpt2", "olmo"}) {
        Exported after(type, "lns:after");
        EXPECT_TRUE(says(after.run(), {"folded", "lns:after", "stock tools compute the same"}));
        after.expect(after.read(), [&](const std::string& name, int64_t) {
            return last(name) && in(name, ".1.") ? std::sqrt(0.5) : 1;
        });

        Config c = small(type, "completep");
        c.scheme.base_layers = 1; // of 2, so branches are halved; and a width of 256 for 8
        Exported completep(c);
        if (c.tied) continue;
        EXPECT_TRUE(says(completep.run(), {"folded", "completep"}));
        completep.expect(completep.read(), [&](const std::string& name, int64_t) {
            const bool head = name == (c.norm_weight ? "model.norm.weight" : "lm_head.weight");
            return last(name) ? 0.5 : head ? 32 : 1;
        });
    }
    Config c = small("llama", "pre+prores:10");
    c.scheme.step = 15; // of 10 and 20
    Exported fading(c);
    fading.run();
    fading.expect(fading.read(), [&](const std::string& name, int64_t) {
        return last(name) && in(name, ".1.") ? 0.75 : 1;
    });
}

TEST(Export, ModelsWithoutAStockFormAreUnchanged) {
    for (auto [type, scheme] : std::vector<std::array<std::string, 2>>{
             {"llama", "post"},       {"llama", "deepnorm"},     {"llama", "mix:1"},
             {"llama", "mix:2"},      {"gpt2", "sandwich"},      {"qwen2", "peri"},
             {"llama", "olmo2"},      {"olmo2", "lns"},          {"llama", "hybrid"},
             {"qwen3", "hybrid*"},    {"llama", "lns+gpas"},     {"llama", "lns+gpas-each"},
             {"llama", "lns:before"}, {"llama", "lns:after+x0"}, {"gpt2", "keel"},
             {"llama", "siamese"},    {"qwen2", "residual"},     {"llama", "admin"},
             {"llama", "mhc"},        {"qwen2", "attnres:2"},    {"olmo", "skipinit+gpas"}}) {
        Exported e(type, scheme);
        EXPECT_TRUE(says(
            e.run(), {"stock tools cannot run it", "the norm scheme " + scheme, "lns-" + type}));
        e.expect(e.read(), one);
        EXPECT_EQ(e.config().at("model_type"), "lns-" + type);
        EXPECT_EQ(checkpoint_config(e.dir / "out").scheme.name(), scheme);
    }
}

TEST(Export, LayersOfMixedStreamsStay) {
    for (const char* scheme : {"mhc:2", "attnres"}) {
        Exported e("llama", scheme);
        e.options.drop_layers = "2";
        EXPECT_TRUE(says(e.run(), {scheme, "layers of this model cannot be dropped"}));
    }
}

TEST(Export, ValueResidualHasNoStockForm) {
    for (const char* scheme : {"pre+value-residual", "lns+value-residual"}) {
        Exported e("llama", scheme);
        EXPECT_TRUE(says(e.run(), {"stock tools cannot run it", "mixed with the first layer's"}));
        e.expect(e.read(), one);
        EXPECT_EQ(checkpoint_config(e.dir / "out").scheme.name(), scheme);
    }
    Exported first("llama", "pre+value-residual"), second("llama", "pre+value-residual");
    first.options.drop_layers = "1";
    EXPECT_TRUE(says(first.run(), {"layer 1 cannot be dropped", "+value-residual"}));
    second.options.drop_layers = "2";
    EXPECT_TRUE(says(second.run(), {"1 of 2 layers", "stock tools cannot run it"}));
}

TEST(Export, ShapesThatStockModelsDoNotHave) {
    Config c = small("gpt2", "pre");
    c.kv_heads = 1;
    Exported grouped(c);
    EXPECT_TRUE(says(grouped.run(), {"stock tools cannot run it", "heads"}));
    EXPECT_EQ(checkpoint_config(grouped.dir / "out").kv_heads, 1);
    grouped.expect(grouped.read(), one);
    c = small("gpt2", "lns");
    c.head_size = 6;
    Exported wide(c);
    EXPECT_TRUE(says(wide.run(), {"stock tools cannot run it", "wide"}));
    wide.expect(wide.read(), one);
    c = small("llama", "pre");
    c.head_size = 6, c.qkv_bias = c.attn_out_bias = c.mlp_bias = true;
    Exported biases(c);
    EXPECT_TRUE(says(biases.run(), {"a stock llama"}));
    biases.expect(biases.read(), one);
    EXPECT_EQ(biases.config().at("head_dim"), 6);
    EXPECT_EQ(biases.config().at("attention_bias"), true);
    EXPECT_EQ(biases.config().at("mlp_bias"), true);
}

TEST(Export, TypesAreRoundedToNearest) {
    for (const char* type : {"float16", "bfloat16", "bf16"}) {
        Exported e("llama", "pre");
        e.options.export_dtype = type;
        e.run();
        const bool half = type == std::string("float16");
        EXPECT_EQ(e.config().at("torch_dtype"), half ? "float16" : "bfloat16");
        Safetensors file(e.dir / "out/model.safetensors");
        for (const Param& p : e.model.registry.params) {
            const TensorView& view = file.at(p.name);
            ASSERT_EQ(view.dtype, half ? "F16" : "BF16");
            for (int64_t i = 0; i < p.size(); i++) {
                const float x = e.model.held[0][p.offset + i];
                uint16_t found;
                std::memcpy(&found, static_cast<const char*>(view.data) + 2 * i, 2);
                ASSERT_EQ(found, half ? round_to_half(x) : round_to_bf16(x));
            }
        }
        // and again, from rounded values
        const Holder rounded = e.read();
        e.options.checkpoint = e.dir / "out";
        e.options.export_dir = e.dir / "again";
        e.run();
        EXPECT_EQ(read_bytes(e.dir / "again/model.safetensors"),
                  read_bytes(e.dir / "out/model.safetensors"));
    }
}

TEST(Export, Shards) {
    for (int64_t most : {int64_t(1), int64_t(1000), int64_t(1) << 40}) {
        Exported e("gpt2", "lns+gpas");
        e.options.shard_size = most;
        EXPECT_TRUE(says(e.run(), {most > 1000 ? "in 1 file" : "files"}));
        e.expect(e.read(), one);
        EXPECT_EQ(fs::exists(e.dir / "out/model.safetensors"), most > 1000);
        if (most > 1000) continue;
        const json index = json::parse(read_bytes(e.dir / "out/model.safetensors.index.json"));
        std::set<std::string> files;
        for (const auto& name : index.at("weight_map")) files.insert(name.get<std::string>());
        EXPECT_EQ(index.at("weight_map").size(), e.model.registry.params.size());
        EXPECT_EQ(index.at("metadata").at("total_size"), 4 * e.model.registry.count());
        EXPECT_EQ(most == 1, files.size() == e.model.registry.params.size());
        for (const std::string& name : files) {
            Safetensors file(e.dir / "out/" + name);
            size_t bytes = 0;
            for (const TensorView& view : file.tensors()) bytes += view.bytes;
            EXPECT_TRUE(bytes <= size_t(most) || file.tensors().size() == 1) << name;
        }
    }
}

TEST(Export, TokenizerAndItsTokens) {
    TemporaryDirectory dir;
    Holder model(small("llama"));
    model.initialize(1);
    TrainerState state;
    state.tokenizer = load_tokenizer("bytes")->id();
    state.step = 7, state.tokens = 800, state.val_loss = 1.25;
    state.flags = {{"--train", "a|b_*.bin"}};
    save_checkpoint(dir / "c", model, state, load_tokenizer("bytes").get());
    for (const char* name : {"tokenizer.json", "checksums.json"}) // older checkpoints have none
        fs::remove(fs::path(dir / "c") / name);
    Options options;
    options.checkpoint = dir / "c", options.export_dir = dir / "new/out/";
    testing::internal::CaptureStdout();
    export_model(options);
    EXPECT_TRUE(says(testing::internal::GetCapturedStdout(), {"tokenizer_config.json"}));
    EXPECT_EQ(load_tokenizer(dir / "new/out")->id(), load_tokenizer("bytes")->id());
    EXPECT_EQ(
        json::parse(read_bytes(dir / "new/out/tokenizer.json")).at("model").at("vocab").size(),
        257u);
    auto config = json::parse(read_bytes(dir / "new/out/config.json"));
    EXPECT_EQ(config.at("eos_token_id"), 256);
    const json generation = json::parse(read_bytes(dir / "new/out/generation_config.json"));
    EXPECT_EQ(generation, json({{"bos_token_id", 256}, {"eos_token_id", 256}}));
    const std::string card = read_bytes(dir / "new/out/README.md");
    EXPECT_TRUE(says(card, {"library_name: transformers", "# out", "norm scheme | lns, folded",
                            "| validation loss | 1.2500, perplexity 3.49 |", "license",
                            "| training | 7 steps, 800 tokens |", "| data | a\\|b_*.bin |"}));
    EXPECT_TRUE(config.at("pad_token_id").is_null());
    // Settings of a foreign config.json are kept.
    config["eos_token_id"] = {1, 2};
    config["pad_token_id"] = 3;
    write_bytes(dir / "new/out/config.json", config.dump());
    options.checkpoint = dir / "new/out", options.export_dir = dir / "third";
    testing::internal::CaptureStdout();
    export_model(options);
    testing::internal::GetCapturedStdout();
    config = json::parse(read_bytes(dir / "third/config.json"));
    EXPECT_EQ(config.at("eos_token_id"), json({1, 2}));
    EXPECT_EQ(config.at("pad_token_id"), 3);
}

TEST(Export, BadInput) {
    Exported e("llama", "lns");
    fs::create_directory(e.dir / "out"); // empty, so it is used
    EXPECT_TRUE(says(e.run(), {"wrote"}));
    EXPECT_TRUE(says(e.run(), {e.dir / "out", "not empty"}));
    e.options.export_dir = e.dir / "checkpoint/config.json";
    EXPECT_TRUE(says(e.run(), {"config.json", "exists"}));
    e.options.export_dir = e.dir / "checkpoint/config.json/out";
    EXPECT_TRUE(says(e.run(), {"cannot make the directory"}));
    e.options.export_dir = e.dir / "half";
    e.options.export_dtype = "float16";
    const Param& p = *e.model.registry.find("model.norm.weight");
    e.model.held[0][p.offset] = 7e4f;
    save_checkpoint(e.dir / "checkpoint", e.model, {}, nullptr);
    EXPECT_TRUE(says(e.run(), {"model.norm.weight", "70000", "65504", "bfloat16"}));
    EXPECT_FALSE(fs::exists(e.dir / "half"));
    EXPECT_EQ(std::distance(fs::directory_iterator(e.dir.path), {}), 2); // no partial output
    fs::resize_file(e.dir / "checkpoint/model.safetensors", 1000);
    EXPECT_TRUE(says(e.run(), {"model.safetensors", "truncated"}));
    e.options.checkpoint = e.dir / "none";
    EXPECT_TRUE(says(e.run(), {"none"}));
}

// Settings of Hugging Face's config.json files, supported and refused.
TEST(Import, Config) {
    const json llama = json::parse(R"({"model_type": "llama", "hidden_size": 64, "vocab_size": 10,
        "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
        "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"], "rope_scaling": null})");
    auto read = [&](const json& more, const char* type = "llama") {
        json all = llama;
        all["model_type"] = type;
        if (!more.is_null()) all.update(more); // {} is null
        return config_from_json(all.dump(), "x/config.json");
    };
    auto error = [&](const json& more, const char* type = "llama") {
        return error_of([&] { read(more, type); });
    };
    Config c = read({});
    EXPECT_EQ(c.kv_heads, 4);
    EXPECT_EQ(c.head_size, 16);
    EXPECT_EQ(c.norm_eps, 1e-5);
    EXPECT_EQ(c.rope_theta, 10000);
    EXPECT_FALSE(c.tied || c.qkv_bias || c.attn_out_bias || c.mlp_bias);
    EXPECT_EQ(read({{"rope_theta", 5e5}}).rope_theta, 5e5);
    EXPECT_EQ(
        read({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 7.0}}}}).rope_theta, 7);
    EXPECT_EQ(read({{"rope_theta", 3}, {"rope_scaling", {{"type", "default"}}}}).rope_theta, 3);
    EXPECT_EQ(read({{"head_dim", 8}}).head_size, 8);
    EXPECT_TRUE(read({{"tie_word_embeddings", true}}).tied);
    c = read({{"attention_bias", true}});
    EXPECT_TRUE(c.qkv_bias && c.attn_out_bias && !c.mlp_bias);
    EXPECT_TRUE(read({{"mlp_bias", true}}).mlp_bias);

    for (const char* field : {"rope_scaling", "rope_parameters"}) {
        EXPECT_TRUE(says(error({{field, {{"rope_type", "yarn"}, {"factor", 8.0}}}}),
                         {"x/config.json", field, "yarn", "llama3"}));
        EXPECT_TRUE(says(error({{field, {{"type", "linear"}}}}), {field, "'factor' is missing"}));
        EXPECT_TRUE(says(error({{field, {{"type", "linear"}, {"factor", -2}}}}), {"factor", "-2"}));
        EXPECT_TRUE(says(error({{field, {{"full_attention", {{"rope_theta", 1.0}}}}}}),
                         {field, "full_attention", "not known"}));
        EXPECT_TRUE(says(error({{field,
                                 {{"rope_type", "llama3"},
                                  {"factor", 2},
                                  {"low_freq_factor", 4},
                                  {"high_freq_factor", 4}}}}),
                         {"low_freq_factor", "less than"}));
        EXPECT_TRUE(says(error({{field, {{"rope_theta", -1}}}}), {field, "rope_theta", "above 0"}));
        EXPECT_TRUE(says(error({{field, {{"rope_theta", "x"}}}}), {field, "rope_theta"}));
        EXPECT_TRUE(says(error({{field, 3}}), {field, "an object"}));
    }
    for (const auto& [key, value] : std::vector<std::pair<std::string, json>>{
             {"hidden_act", "gelu"},
             {"partial_rotary_factor", 0.5},
             {"sliding_window", 4096},
             {"layer_types", {"full_attention", "sliding_attention"}},
             {"rope_interleaved", true},
             {"attention_bias", "yes"},
             {"quantization_config", {{"bits", 4}}}})
        EXPECT_TRUE(says(error({{key, value}}), {"x/config.json", key}));
    EXPECT_TRUE(says(error({{"clip_qkv", 8.0}}, "olmo"), {"clip_qkv", "8.0"}));
    EXPECT_TRUE(says(error({{"mlp_bias", true}}, "olmo"), {"mlp_bias"}));
    EXPECT_TRUE(says(error({}, "mixtral"), {"mixtral", "llama", "mistral"}));

    c = read({{"num_key_value_heads", 2},
              {"sliding_window", 4096},
              {"use_sliding_window", false},
              {"max_window_layers", 2}},
             "qwen2");
    EXPECT_TRUE(c.qkv_bias && !c.attn_out_bias);
    EXPECT_EQ(c.rope_theta, 10000); // what transformers assumes, and not Qwen2.5's
    EXPECT_TRUE(says(error({}, "qwen2"), {"num_key_value_heads"}));
    c = read({{"clip_qkv", nullptr}}, "olmo");
    EXPECT_TRUE(!c.norm_weight && c.norm == NormType::layer && c.norm_eps == 1e-5);
    c = read({}, "olmo2");
    EXPECT_TRUE(c.qk_norm == QkNorm::whole && c.scheme.name() == "olmo2");

    // The original GPT-2's.
    c = config_from_json(
        R"({"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "n_special": 0,
        "predict_special_tokens": true, "resid_pdrop": 0.1, "summary_activation": null,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
        "summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true,
        "max_length": 50}}, "vocab_size": 50257})",
        "x");
    EXPECT_EQ(config_difference(c, preset_config("gpt2-124m")), "");
    EXPECT_EQ(c.notes.size(), 3u); // dropout
}

// A config.json of 4 layers with these fields, read.
Config config_of(const char* type, const json& more) {
    json all = {{"model_type", type},       {"hidden_size", 64},      {"vocab_size", 10},
                {"intermediate_size", 100}, {"num_hidden_layers", 4}, {"num_attention_heads", 4},
                {"num_key_value_heads", 2}, {"rms_norm_eps", 1e-5}};
    if (!more.is_null()) all.update(more);
    return config_from_json(all.dump(), "x/config.json");
}

// What is read is also what is written.
void expect_rewritten(const Config& c) {
    const Config again = config_from_json(config_to_json(c), "again");
    EXPECT_EQ(config_difference(again, c), "");
    EXPECT_EQ(again.window, c.window);
    EXPECT_EQ(again.window_layers, c.window_layers);
    EXPECT_EQ(again.rotated_layers, c.rotated_layers);
    EXPECT_EQ(again.rope_scaling, c.rope_scaling);
    EXPECT_EQ(again.head_size, c.head_size);
}

TEST(Import, ScaledPositions) {
    const json llama3 = {{"rope_type", "llama3"},
                         {"factor", 32.0},
                         {"low_freq_factor", 1.0},
                         {"high_freq_factor", 4.0},
                         {"original_max_position_embeddings", 8192}};
    Config c = config_of("llama", {{"rope_scaling", llama3}, {"rope_theta", 5e5}});
    EXPECT_EQ(c.rope_scaling, (RopeScaling{RopeScaling::llama3, 32, 1, 4, 8192}));
    EXPECT_EQ(c.rope_theta, 5e5);
    expect_rewritten(c);
    json parameters = llama3;
    parameters["rope_theta"] = 5e5;
    EXPECT_EQ(config_difference(config_of("llama", {{"rope_parameters", parameters}}), c), "");
    // As in transformers 5.24 for theta 5e5 and head_dim 16: kept, between and slower
    EXPECT_EQ(rotary_frequency(c, 0), 1);
    EXPECT_EQ(rotary_frequency(c, 3), std::pow(5e5, -6.0 / 16));
    EXPECT_NEAR(rotary_frequency(c, 4), 0.000429556705, 1e-10);
    EXPECT_EQ(rotary_frequency(c, 5), std::pow(5e5, -10.0 / 16) / 32);

    c = config_of("llama", {{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}});
    EXPECT_EQ(c.rope_scaling, (RopeScaling{RopeScaling::linear, 4}));
    EXPECT_EQ(rotary_frequency(c, 1), std::pow(1e4, -2.0 / 16) / 4);
    expect_rewritten(c);
    const std::string difference = config_difference(config_of("llama", {}), c);
    EXPECT_TRUE(says(difference, {"position settings", "linear"}));
}

// A preset is what a run with it writes.
TEST(Import, Presets) {
    for (const std::string& name : preset_names()) {
        SCOPED_TRACE(name);
        expect_rewritten(preset_config(name));
    }
    EXPECT_EQ(make_registry(preset_config("smollm2-135m")).count(), 134515008);
    EXPECT_EQ(make_registry(preset_config("llama-3.2-1b")).count(), 1235814400);
    EXPECT_EQ(make_registry(preset_config("qwen3-0.6b")).count(), 596049920);
    EXPECT_EQ(make_registry(preset_config("mistral-7b")).count(), 7241732096);
    EXPECT_EQ(make_registry(preset_config("deepseek-7b")).count(), 6910365696);
    EXPECT_EQ(make_registry(preset_config("smollm3-3b")).count(), 3075098624);
    EXPECT_EQ(make_registry(preset_config("qwen3-8b")).count(), 8190735360);
}

TEST(Import, SlidingWindows) {
    using Layers = std::vector<bool>;
    Config c = config_of("mistral", {});
    EXPECT_EQ(c.window, 4096);          // as in transformers
    EXPECT_EQ(c.window_of(3, 4096), 0); // no query has more keys
    EXPECT_EQ(c.window_of(3, 4097), 4096);
    expect_rewritten(c);
    c = config_of("mistral", {{"sliding_window", nullptr}});
    EXPECT_EQ(c.window, 0);
    EXPECT_EQ(c.window_of(0, 100), 0);
    expect_rewritten(c);

    for (const char* type : {"qwen2", "qwen3"}) {
        c = config_of(type, {{"sliding_window", 32}});
        EXPECT_EQ(c.window, 0);
        expect_rewritten(c);
        c = config_of(
            type, {{"sliding_window", 32}, {"use_sliding_window", true}, {"max_window_layers", 1}});
        EXPECT_EQ(c.window, 32);
        EXPECT_EQ(c.window_layers, (Layers{false, true, true, true}));
        EXPECT_EQ(c.window_of(0, 100), 0);
        EXPECT_EQ(c.window_of(1, 100), 32);
        expect_rewritten(c);
        const json types = {"sliding_attention", "full_attention", "sliding_attention",
                            "full_attention"};
        c = config_of(
            type, {{"sliding_window", 32}, {"use_sliding_window", true}, {"layer_types", types}});
        EXPECT_EQ(c.window_layers, (Layers{true, false, true, false}));
        expect_rewritten(c);
        EXPECT_TRUE(says(error_of([&] {
                             config_of(type, {{"layer_types", types}});
                         }),
                         {"layer_types", "sliding_attention", "without a sliding window"}));
        EXPECT_TRUE(says(error_of([&] {
                             config_of(type, {{"layer_types", {"full_attention"}}});
                         }),
                         {"layer_types", "4 types"}));
    }
    EXPECT_EQ(config_of("qwen3", {}).head_size, 128); // whatever the width
    EXPECT_EQ(config_of("qwen3", {}).qk_norm, QkNorm::heads);

    c = config_of("smollm3", {});
    EXPECT_EQ(c.rotated_layers, (Layers{true, true, true, false}));
    EXPECT_EQ(c.rope_theta, 2e6);
    expect_rewritten(c);
    c = config_of(
        "smollm3",
        {{"no_rope_layers", {1, 0, 1, 1}}, {"use_sliding_window", true}, {"sliding_window", 8}});
    EXPECT_EQ(c.rotated_layers, (Layers{true, false, true, true}));
    EXPECT_EQ(c.window_layers, (Layers{false, true, false, false}));
    expect_rewritten(c);
    EXPECT_TRUE(says(error_of([] {
                         config_of("smollm3", {{"no_rope_layers", {1, 0}}});
                     }),
                     {"no_rope_layers", "4 numbers"}));
    EXPECT_TRUE(says(error_of([] {
                         config_of("smollm3", {{"no_rope_layers", {1, 0, 2, 1}}});
                     }),
                     {"no_rope_layers", "0 or 1"}));
}

TEST(Program, ExportsAndReadsTheSameModelAgain) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    write_shard(dir / "text_val_000000.bin", 400);
    for (const char* scheme : {"lns", "post", "pre"}) {
        const std::string run = dir / scheme, out = run + "-out", val = dir / "text_val_000000.bin";
        ASSERT_EQ(
            train_gpt(small_model + "--dtype float32 -x 5 -o " + run + " -n " + scheme).status, 0);
        Finished f = train_gpt("export " + run + " " + out);
        ASSERT_EQ(f.status, 0) << f.output;
        EXPECT_TRUE(says(f.output, {"wrote " + out}));
        const std::string how =
            " --dtype float32 --threads 1 -b 2 -t 16 --val-tokens 384 -j " + val;
        f = train_gpt("eval " + run + how);
        EXPECT_EQ(f.status, 0);
        EXPECT_EQ(train_gpt("eval " + out + how).output, f.output);
        const std::string text = " --prompt Once -g 8 --dtype float32 --threads 1";
        f = train_gpt("sample " + run + text);
        EXPECT_EQ(f.status, 0);
        EXPECT_EQ(train_gpt("sample " + out + text).output, f.output);
        EXPECT_TRUE(fails_with("export " + run + " " + out, {out, "not empty"}));
        EXPECT_TRUE(says(train_gpt("-m " + out + " --dry-run").output, {"2 layers"}));
    }
    EXPECT_TRUE(fails_with("export " + dir / "pre", {"DIR"}));
    EXPECT_TRUE(
        fails_with("export " + dir / "pre" + " " + dir / "x --dtype int8", {"int8", "bfloat16"}));
    EXPECT_TRUE(
        fails_with("export " + dir / "pre" + " " + dir / "x --shard-size 0", {"shard-size"}));
    EXPECT_TRUE(fails_with("export " + dir / "none" + " " + dir / "x", {"none"}));
    EXPECT_TRUE(fails_with("eval " + dir / "pre-out", {"-j"}));
}
