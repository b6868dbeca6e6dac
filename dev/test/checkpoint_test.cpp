#include "gpt/run/checkpoint.h"

#include "dev/test/data_helpers.h"
#include "dev/test/holder.h"
#include "gpt/base/random.h"

#include <nlohmann/json.hpp>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

TrainerState some_state() {
    TrainerState s;
    s.step = 12, s.tokens = 3456, s.seconds = 7.5, s.loader = {2, 77}, s.windows = 100;
    s.best_val_loss = 1.25;
    s.flags = {{"--lr", 0.001}, {"--train", "it's \"a\".bin"}};
    s.tokenizer = {"gpt2", 50257, 50256, 0xfedcba9876543210};
    return s;
}

// A saved checkpoint to damage.
struct Saved {
    TemporaryDirectory dir;
    std::string path = dir / "step-000012";
    Holder model{small("llama")};
    Saved() {
        model.initialize(1);
        save_checkpoint(path, model, some_state(), load_tokenizer("bytes").get());
    }
    std::string load_error(const Config& config = small("llama")) const {
        Holder other(config);
        return error_of([&] { load_checkpoint(other, path); });
    }
    // Rewrites model.safetensors after `change`.
    template <class Change> void rewrite(Change change) {
        std::vector<TensorOut> tensors;
        for (const Param& p : model.registry.params)
            tensors.push_back(param_tensor(model, Buffer::parameters, p, p.name));
        change(tensors);
        write_safetensors(path + "/model.safetensors", tensors);
        fs::remove(path + "/checksums.json"); // it would not match
    }
};

} // namespace

// As Muon's will be: one buffer for matrices, two for the rest.
TEST(Checkpoint, HoldsTheStatesThatEachParameterHas) {
    const Optimizer mixed = {
        .name = "mixed",
        .title = "mixed",
        .matrices = UpdateRule::adamw,
        .rest = UpdateRule::adamw,
        .states = {{.name = "momentum", .what = "momentum", .rest = false},
                   {.name = "v", .what = "second moments", .matrices = false}}};
    TemporaryDirectory dir;
    Holder model(small("gpt2"), mixed), other(model.config, mixed);
    model.initialize(3);
    save_checkpoint(dir / "c", model, some_state(), nullptr);
    load_checkpoint(other, dir / "c");
    const Safetensors file(dir / "c/optimizer.safetensors");
    size_t tensors = 0;
    for (int state = 0; state < 2; state++)
        for (const Param& p : model.registry.params) {
            const bool has = p.layer_matrix == (state == 0);
            EXPECT_EQ(file.find(mixed.states[size_t(state)].name + "." + p.name) != nullptr, has);
            tensors += has;
            std::vector<float> a(size_t(p.size())), b(a.size());
            model.read({Buffer::state, state}, p, a.data());
            other.read({Buffer::state, state}, p, b.data());
            EXPECT_EQ(a == b, has) << p.name;
        }
    EXPECT_EQ(tensors, model.registry.params.size());
    EXPECT_LE(fs::file_size(dir / "c/model.safetensors") +
                  fs::file_size(dir / "c/optimizer.safetensors"),
              uint64_t(checkpoint_bytes(mixed, model.registry)));
}

TEST(Checkpoint, RestoresWhatWasSaved) {
    for (const char* type : {"llama", "gpt2", "qwen2", "olmo", "olmo2"}) {
        TemporaryDirectory dir;
        Holder model(small(type, "sandwich+gpas")), other(model.config);
        model.initialize(3);
        save_checkpoint(dir / "c", model, some_state(), nullptr);
        TrainerState s = load_checkpoint(other, dir / "c"), t = some_state();
        for (Buffer b :
             {Buffer(Buffer::parameters), Buffer(Buffer::state, 0), Buffer(Buffer::state, 1)})
            for (const Param& p : model.registry.params)
                for (int64_t i = 0; i < p.size(); i++)
                    ASSERT_EQ(other.held[b.kind + b.index][p.offset + i],
                              model.held[b.kind + b.index][p.offset + i])
                        << type << " " << p.name << " " << i;
        EXPECT_EQ(s.step, t.step);
        EXPECT_EQ(s.tokens, t.tokens);
        EXPECT_EQ(s.seconds, t.seconds);
        EXPECT_EQ(s.loader, t.loader);
        EXPECT_EQ(s.windows, t.windows);
        EXPECT_EQ(s.flags, t.flags);
        EXPECT_EQ(s.tokenizer, t.tokenizer);
        EXPECT_TRUE(std::isnan(s.val_loss));
        EXPECT_EQ(s.best_val_loss, t.best_val_loss);
        EXPECT_LE(fs::file_size(dir / "c/model.safetensors") +
                      fs::file_size(dir / "c/optimizer.safetensors"),
                  uint64_t(checkpoint_bytes(*model.optimizer, model.registry)));
    }
}

TEST(Checkpoint, Gpt2MatricesHaveHuggingFacesLayout) {
    TemporaryDirectory dir;
    Holder model(small("gpt2"));
    model.initialize(5);
    save_checkpoint(dir / "c", model, some_state(), nullptr);
    Safetensors file(dir / "c/model.safetensors");
    const std::string name = "transformer.h.0.attn.c_attn.weight";
    const TensorView& view = file.at(name);
    EXPECT_EQ(view.shape, (std::vector<int64_t>{8, 24})); // (in, out)
    std::vector<float> values(8 * 24);
    file.read_f32(view, values.data());
    const Param* p = model.registry.find(name);
    EXPECT_EQ(values[3 * 24 + 20], model.held[0][p->offset + 20 * 8 + 3]);
    EXPECT_EQ(file.at("transformer.wte.weight").shape, (std::vector<int64_t>{13, 8}));
}

TEST(Checkpoint, IsFoundByItsNameOrItsRuns) {
    Saved saved;
    EXPECT_EQ(find_checkpoint(saved.path), saved.path);
    EXPECT_EQ(find_checkpoint(saved.dir.path), saved.path);
    EXPECT_EQ(newest_checkpoint(saved.dir.path), saved.path);
    EXPECT_EQ(newest_checkpoint(saved.dir / "none"), "");
    EXPECT_TRUE(says(error_of([&] { newest_checkpoint(saved.path); }), {"is a checkpoint", "-o"}));
    EXPECT_TRUE(says(error_of([&] { find_checkpoint("/none"); }), {"/none", "checkpoint"}));
    EXPECT_EQ(load_tokenizer(saved.path)->id().kind, "bytes");
    EXPECT_EQ(saved.load_error(), "");
}

TEST(Checkpoint, TruncatedIsRefused) {
    for (const char* name :
         {"model.safetensors", "optimizer.safetensors", "config.json", "trainer_state.json"}) {
        Saved saved;
        const std::string file = saved.path + "/" + name;
        fs::resize_file(file, fs::file_size(file) / 2);
        EXPECT_TRUE(says(saved.load_error(), {name})) << saved.load_error();
        fs::resize_file(file, 0);
        EXPECT_TRUE(says(saved.load_error(), {name})) << saved.load_error();
    }
}

TEST(Checkpoint, MissingExtraAndMisshapenTensors) {
    Saved saved;
    saved.rewrite([](auto& tensors) { tensors.erase(tensors.begin() + 2); });
    EXPECT_TRUE(says(saved.load_error(),
                     {"model.safetensors", saved.model.registry.params[2].name, "is missing"}));

    saved.rewrite([](auto& tensors) { std::swap(tensors[0].shape[0], tensors[0].shape[1]); });
    EXPECT_TRUE(says(saved.load_error(), {"embed_tokens", "(8 x 13)", "expected (13 x 8)"}));

    const float one = 1;
    saved.rewrite([&](auto& tensors) {
        tensors.push_back(tensor_out({"model.layers.7.oh.weight", "F32", {1}, &one, 4}));
    });
    EXPECT_TRUE(says(saved.load_error(), {"model.layers.7.oh.weight", "not a parameter"}));

    saved.rewrite([&](auto& tensors) { tensors.erase(tensors.begin() + 2, tensors.begin() + 9); });
    EXPECT_TRUE(says(saved.load_error(), {"model.layers.0.self_attn.q_proj.weight'",
                                          "self_attn.v_proj.weight' and 4 more are missing"}));
    saved.rewrite([&](auto& tensors) { tensors.pop_back(); });
    EXPECT_TRUE(says(saved.load_error(), {"lm_head.weight", "tie_word_embeddings"}));
    saved.rewrite([&](auto& tensors) {
        for (const char* name : {"a", "b"})
            tensors.push_back(tensor_out({name, "F32", {1}, &one, 4}));
    });
    EXPECT_TRUE(says(saved.load_error(), {"'a' and 'b' are not parameters"}));

    // Known tensors in Hugging Face files that are not parameters are ignored.
    saved.rewrite([&](auto& tensors) {
        tensors.push_back(
            tensor_out({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, &one, 4}));
    });
    EXPECT_EQ(saved.load_error(), "");

    fs::remove(saved.path + "/optimizer.safetensors");
    EXPECT_TRUE(says(saved.load_error(), {"no optimizer.safetensors", "--init-from"}));
}

TEST(Checkpoint, AnotherModelsIsRefused) {
    Saved saved;
    EXPECT_TRUE(says(saved.load_error(small("qwen2")), {saved.path, "another model", "llama"}));
    EXPECT_TRUE(says(saved.load_error(small("llama", "pre")), {"norm scheme", "lns", "pre"}));
    Config wide = small("llama");
    wide.vocab_size = 14;
    EXPECT_TRUE(says(saved.load_error(wide), {"vocabulary", "13", "14"}));
}

TEST(Checkpoint, TrainerStateWithAMissingField) {
    Saved saved;
    const std::string file = saved.path + "/trainer_state.json";
    auto state = nlohmann::json::parse(read_bytes(file));
    state.erase("index");
    write_bytes(file, state.dump());
    EXPECT_TRUE(says(saved.load_error(), {"trainer_state.json", "damaged", "checksums.json"}));
    fs::remove(saved.path + "/checksums.json");
    EXPECT_TRUE(says(saved.load_error(), {"trainer_state.json", "index"}));
}

TEST(Checkpoint, EveryNumberOfTheStateHasItsTypeAndRange) {
    Saved saved;
    const std::string file = saved.path + "/trainer_state.json", good = read_bytes(file);
    fs::remove(saved.path + "/checksums.json");
    ASSERT_EQ(saved.load_error(), "");
    auto with = [&](const std::string& field, const std::string& value) {
        std::string text = good;
        const size_t at = text.find("\"" + field + "\": ") + field.size() + 4;
        text.replace(at, text.find_first_of(",\n", at) - at, value);
        write_bytes(file, text);
        return saved.load_error();
    };
    for (const char* field : {"step", "tokens", "epoch", "index", "windows", "vocab_size"})
        for (const char* value :
             {"-7", "1e30", "19.7", "12.0", "\"12\"", "null", "true", "[]", "18446744073709551616"})
            EXPECT_TRUE(says(with(field, value), {file, field})) << field << " " << value;
    for (const char* field : {"step", "tokens", "vocab_size", "eot"})
        EXPECT_TRUE(says(with(field, "9223372036854775808"), {file, field})) << field;
    for (const char* value : {"-1", "\"1\"", "null", "1e999", "[]"})
        EXPECT_TRUE(says(with("seconds", value), {file})) << value;
    for (const char* value : {"-1", "\"1\"", "[]"})
        EXPECT_TRUE(says(with("val_loss", value), {file, "val_loss"})) << value;
    EXPECT_TRUE(says(with("eot", "-2"), {file, "eot"}));
    EXPECT_TRUE(says(with("fingerprint", "-2"), {file, "fingerprint"}));
    EXPECT_TRUE(says(with("kind", "3"), {file, "kind"}));
    EXPECT_EQ(with("--lr", "\"0.001\""), ""); // as older versions wrote it
    for (const char* value : {"null", "[]", "{}"})
        EXPECT_TRUE(says(with("--lr", value), {file, "flags", "--lr"})) << value;
    EXPECT_TRUE(says(with("step", "13"), {file, "13", "step 12"}));
    EXPECT_TRUE(says(with("step", "12, \"step\": 12"), {file, "step", "twice"}));
    EXPECT_EQ(with("step", "12"), "");
}

TEST(Checkpoint, DamageIsNoticedWhereverItIs) {
    Saved saved;
    uint64_t draws = 0;
    auto below = [&](size_t n) { return random_below(uint32_t(n), 1, 2, draws++); };
    int files = 0;
    for (const auto& entry : fs::directory_iterator(saved.path)) {
        const std::string file = entry.path(), good = read_bytes(file);
        files++;
        for (int i = 0; i < 200; i++) {
            std::string bytes = good;
            bytes[below(bytes.size())] ^= char(1 << below(8));
            write_bytes(file, bytes);
            const std::string error = saved.load_error();
            // White space in checksums.json does not matter.
            if (error.empty() && file.ends_with("checksums.json")) continue;
            ASSERT_TRUE(says(error, {saved.path})) << file;
            ASSERT_NE(checkpoint_damage(saved.path), "") << file;
        }
        write_bytes(file, good);
    }
    EXPECT_EQ(files, 7); // model, optimizer, config, state, checksums and the tokenizer's two
    EXPECT_EQ(checkpoint_damage(saved.path), "");
    EXPECT_EQ(saved.load_error(), "");

    // A file from another checkpoint counts as damage.
    Holder other{small("llama")};
    other.initialize(2);
    save_checkpoint(saved.dir / "other", other, some_state(), nullptr);
    fs::copy_file(saved.dir / "other/model.safetensors", saved.path + "/model.safetensors",
                  fs::copy_options::overwrite_existing);
    EXPECT_TRUE(says(saved.load_error(), {"model.safetensors", "not the file", "checksums.json"}));
    fs::remove(saved.path + "/checksums.json");
    EXPECT_EQ(saved.load_error(), "");
}

TEST(Checkpoint, ADamagedOneNamesTheNewestIntactOne) {
    Saved saved;
    for (int64_t step : {3, 5, 20}) {
        TrainerState state = some_state();
        state.step = step;
        save_checkpoint(saved.dir / (step < 10 ? "step-00000" : "step-0000") + std::to_string(step),
                        saved.model, state, nullptr);
    }
    const std::string damaged = saved.dir / "step-000012/optimizer.safetensors";
    fs::resize_file(damaged, fs::file_size(damaged) - 1);
    EXPECT_TRUE(says(saved.load_error(), {damaged, saved.dir / "step-000005 is whole", "mv ",
                                          "damaged-step-000012", "-y"}));
    for (const char* older : {"step-000003", "step-000005"})
        fs::resize_file(saved.dir / older + "/config.json", 5);
    EXPECT_TRUE(says(saved.load_error(), {damaged, "No earlier checkpoint", "is whole"}));
    // A different model than requested is not damage.
    save_checkpoint(saved.path, saved.model, some_state(), nullptr);
    EXPECT_EQ(saved.load_error(small("qwen2")).find("whole"), std::string::npos);
}

TEST(Checkpoint, NonFiniteValuesAreRefused) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        Saved saved;
        saved.model.held[0][saved.model.registry.params[1].offset + 3] = bad;
        saved.rewrite([](auto&) {});
        EXPECT_TRUE(says(saved.load_error(),
                         {"model.safetensors", saved.model.registry.params[1].name, "finite"}));
    }
}

TEST(Checkpoint, AHeadWithTiedEmbeddingsMustEqualThem) {
    TemporaryDirectory dir;
    Holder model(small("gpt2")), other(model.config);
    ASSERT_TRUE(model.config.tied);
    model.initialize(5);
    const Param& embedding = model.registry.params[0];
    std::vector<float> head(model.held[0].begin() + embedding.offset,
                            model.held[0].begin() + embedding.offset + embedding.size());
    auto load = [&] {
        std::vector<TensorOut> tensors;
        for (const Param& p : model.registry.params)
            tensors.push_back(param_tensor(model, Buffer::parameters, p, p.name));
        tensors.push_back(tensor_out(
            {"lm_head.weight", "F32", embedding.file_shape(), head.data(), head.size() * 4}));
        write_safetensors(dir / "model.safetensors", tensors);
        write_bytes(dir / "config.json", config_to_json(model.config));
        return error_of([&] { load_weights(other, dir.path); });
    };
    EXPECT_EQ(load(), "");
    head.back() += 1;
    EXPECT_TRUE(says(load(), {"lm_head.weight", "differs", "tie_word_embeddings"}));
}

TEST(Checkpoint, WeightsFromSeveralFiles) {
    Saved saved;
    const auto& params = saved.model.registry.params;
    nlohmann::json index;
    for (int part : {0, 1}) {
        std::vector<TensorOut> tensors;
        std::string name = "model-" + std::to_string(part) + ".safetensors";
        for (size_t i = part; i < params.size(); i += 2) {
            tensors.push_back(
                param_tensor(saved.model, Buffer::parameters, params[i], params[i].name));
            index["weight_map"][params[i].name] = name;
        }
        write_safetensors(saved.path + "/" + name, tensors);
    }
    fs::remove(saved.path + "/model.safetensors");
    write_bytes(saved.path + "/model.safetensors.index.json", index.dump());
    Holder other(small("llama"));
    load_weights(other, saved.path);
    for (const Param& p : params)
        EXPECT_EQ(other.held[0][p.offset], saved.model.held[0][p.offset]) << p.name;
    std::swap(index["weight_map"][params[0].name], index["weight_map"][params[1].name]);
    write_bytes(saved.path + "/model.safetensors.index.json", index.dump());
    EXPECT_TRUE(says(saved.load_error(), {"index.json", params[0].name, "do not belong together"}));
    fs::remove(saved.path + "/model-1.safetensors");
    EXPECT_TRUE(says(saved.load_error(), {"index.json", "model-1.safetensors", "not there"}));
    index["weight_map"][params[0].name] = std::string(300, 'a') + ".safetensors";
    write_bytes(saved.path + "/model.safetensors.index.json", index.dump());
    EXPECT_TRUE(says(saved.load_error(), {"cannot access", "name too long"}));
    for (const char* text : {"{", "[]", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 1}}",
                             "{\"weight_map\": {\"a\": \"../model.safetensors\"}}",
                             "{\"weight_map\": {\"a\": \"..\"}}"}) {
        write_bytes(saved.path + "/model.safetensors.index.json", text);
        EXPECT_TRUE(says(saved.load_error(), {"index.json", "expected"})) << text;
    }
    fs::remove(saved.path + "/model.safetensors.index.json");
    EXPECT_TRUE(says(saved.load_error(), {saved.path, "no model.safetensors"}));
    write_bytes(saved.path + "/pytorch_model.bin", "");
    EXPECT_TRUE(says(saved.load_error(), {"pytorch_model.bin", "safetensors"}));
}

TEST(Checkpoint, Gpt2FilesWithoutTheRootName) {
    TemporaryDirectory dir;
    Holder model(small("gpt2", "pre")), other(model.config);
    model.initialize(5);
    std::vector<TensorOut> tensors;
    const float one = 1;
    for (const Param& p : model.registry.params)
        tensors.push_back(param_tensor(model, Buffer::parameters, p, p.name.substr(12)));
    tensors.push_back(tensor_out({"h.0.attn.bias", "F32", {1, 1, 1, 1}, &one, 4}));
    write_safetensors(dir / "model.safetensors", tensors);
    write_bytes(dir / "config.json", config_to_json(model.config));
    load_weights(other, dir.path);
    for (const Param& p : model.registry.params)
        EXPECT_EQ(other.held[0][p.offset + 1], model.held[0][p.offset + 1]) << p.name;
}

TEST(Checkpoint, AFailedSaveLeavesTheOldOne) {
    Saved saved;
    const std::string before = read_bytes(saved.path + "/model.safetensors");
    struct Broken : Holder {
        using Holder::Holder;
        void read(Buffer buffer, const Param& p, float* out) override {
            if (buffer == Buffer(Buffer::state, 1)) fail("the device is gone");
            Holder::read(buffer, p, out);
        }
    } broken(saved.model.config);
    EXPECT_TRUE(says(error_of([&] { save_checkpoint(saved.path, broken, {}, nullptr); }),
                     {"the device is gone"}));
    EXPECT_EQ(read_bytes(saved.path + "/model.safetensors"), before);
    EXPECT_EQ(saved.load_error(), "");
    // no partial file remains
    EXPECT_EQ(std::distance(fs::directory_iterator(saved.dir.path), {}), 1);
}
