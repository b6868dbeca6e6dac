#include "gpt/checkpoint.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <set>

#include "gpt/error.h"
#include "gpt/files.h"
#include "gpt/rundir.h"

namespace lns {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// (rows, columns) to (columns, rows).
void transpose(const float* in, int64_t rows, int64_t columns, float* out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) out[c * rows + r] = in[r * columns + c];
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (int64_t d : shape) text += (text.empty() ? "" : " x ") + std::to_string(d);
    return "(" + text + ")";
}

// Number or null: JSON has no NaN.
json number(double x) { return std::isfinite(x) ? json(x) : json(); }
double number(const json& j) { return j.is_number() ? j.get<double>() : NAN; }

json to_json(const TrainerState& s) {
    return {{"step", s.step},
            {"tokens", s.tokens},
            {"seconds", s.seconds},
            {"epoch", s.loader.epoch},
            {"index", s.loader.index},
            {"windows", s.windows},
            {"val_loss", number(s.val_loss)},
            {"best_val_loss", number(s.best_val_loss)},
            {"flags", s.flags},
            {"tokenizer",
             {{"kind", s.tokenizer.kind},
              {"vocab_size", s.tokenizer.vocab_size},
              {"eot", s.tokenizer.eot},
              {"fingerprint", s.tokenizer.fingerprint}}}};
}

// "'a', 'b' and 7 more"
std::string some_of(const std::vector<std::string>& names) {
    const size_t shown = names.size() > 4 ? 3 : names.size();
    std::string text;
    for (size_t i = 0; i < shown; i++)
        text += cat(i == 0 ? "" : i + 1 == names.size() ? " and " : ", ", "'", names[i], "'");
    return names.size() > shown ? cat(text, " and ", names.size() - shown, " more") : text;
}

// The shards that an index names.
std::set<std::string> shard_names(const std::string& index) {
    json j = json::parse(read_file(index), nullptr, false);
    if (!j.is_object() || !j["weight_map"].is_object() || j["weight_map"].empty())
        fail(index, ": not an index of weights, expected an object with a 'weight_map'");
    std::set<std::string> names;
    for (const json& name : j["weight_map"]) {
        if (!name.is_string() || name.get<std::string>().find('/') != std::string::npos)
            fail(index, ": its weight_map has ", name.dump(), ", expected the name of a file");
        names.insert(name.get<std::string>());
    }
    return names;
}

// What Hugging Face files may have beside the parameters: attention masks, rotary frequencies, and
// a tied head a second time.
bool is_no_parameter(const std::string& name, bool tied) {
    return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") ||
           name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
}

void load_tensors(Model& model, Buffer buffer, const std::string& prefix,
                  const WeightFiles& weights) {
    std::vector<float> values;
    for (const Param& p : model.registry.params) {
        weights.read(p, prefix, values);
        model.write(buffer, p, values.data());
    }
}

} // namespace

WeightFiles::WeightFiles(const std::string& path) : name(path) {
    auto in_dir = [&](const char* file) { return path + "/" + file; };
    const std::string whole = in_dir("model.safetensors");
    const std::string index = in_dir("model.safetensors.index.json");
    if (!fs::is_directory(path)) {
        files.push_back(std::make_unique<Safetensors>(path));
    } else if (fs::exists(whole)) {
        files.push_back(std::make_unique<Safetensors>(name = whole));
    } else if (fs::exists(index)) {
        name = index;
        for (const std::string& shard : shard_names(index)) {
            if (!fs::exists(path + "/" + shard))
                fail(index, " names the file ", shard, ", and it is not there: fetch it too");
            files.push_back(std::make_unique<Safetensors>(path + "/" + shard));
        }
    } else {
        const bool pickled = fs::exists(in_dir("pytorch_model.bin")) ||
                             fs::exists(in_dir("pytorch_model.bin.index.json"));
        fail(path, " has no model.safetensors",
             pickled ? ", only PyTorch's pytorch_model.bin, which is not read here: save the model "
                       "again with transformers, which writes safetensors"
                     : ", nor an index of several: there are no weights");
    }
}

std::pair<const Safetensors*, const TensorView*>
WeightFiles::find(const std::string& tensor) const {
    for (const auto& file : files) {
        const TensorView* view = file->find(tensor);
        for (const std::string root : {"transformer.", "model."})
            if (!view && tensor.starts_with(root)) view = file->find(tensor.substr(root.size()));
        if (view) return {file.get(), view};
    }
    return {nullptr, nullptr};
}

void WeightFiles::check(const Config& config, const Registry& registry, bool others) const {
    std::vector<std::string> missing, unknown;
    std::set<std::string> known;
    for (const Param& p : registry.params) {
        auto [file, view] = find(p.name);
        if (!view)
            missing.push_back(p.name);
        else if (view->shape != p.file_shape())
            fail(file->path(), ": the tensor '", view->name, "' is ", shape_text(view->shape),
                 ", expected ", shape_text(p.file_shape()));
        else
            known.insert(view->name);
    }
    if (!missing.empty()) {
        const bool one = missing.size() == 1;
        fail(name, ": the tensor", one ? " " : "s ", some_of(missing), one ? " is" : " are",
             " missing: ",
             one && missing[0] == "lm_head.weight"
                 ? "if the head is the embedding, its config.json has to say "
                   "\"tie_word_embeddings\": true"
                 : "this is not a whole checkpoint of this model");
    }
    if (others) return;
    for (const auto& file : files)
        for (const TensorView& view : file->tensors())
            if (!known.count(view.name) && !is_no_parameter(view.name, config.tied))
                unknown.push_back(view.name);
    if (unknown.empty()) return;
    const bool one = unknown.size() == 1;
    fail(name, ": the tensor", one ? " " : "s ", some_of(unknown),
         one ? " is no parameter" : " are no parameters",
         " of this model: its config.json and its weights do not belong together");
}

void WeightFiles::read(const Param& p, const std::string& prefix, std::vector<float>& out) const {
    auto [file, view] = find(prefix + p.name);
    if (!view)
        fail(name, ": the tensor '", prefix, p.name,
             "' is missing: this is not a whole checkpoint of this model");
    if (view->shape != p.file_shape())
        fail(file->path(), ": the tensor '", view->name, "' is ", shape_text(view->shape),
             ", expected ", shape_text(p.file_shape()));
    out.resize(p.size());
    file->read_f32(*view, out.data());
    if (!p.transposed) return;
    const std::vector<float> values = out;
    transpose(values.data(), p.shape[1], p.shape[0], out.data());
}

void to_file_layout(const Param& p, std::vector<float>& values) {
    if (!p.transposed) return;
    const std::vector<float> rows = values;
    transpose(rows.data(), p.shape[0], p.shape[1], values.data());
}

TensorOut param_tensor(Model& model, Buffer buffer, const Param& param, const std::string& name) {
    return {name, "F32", param.file_shape(), [&model, buffer, &param](const TensorSink& sink) {
                std::vector<float> values(param.size());
                model.read(buffer, param, values.data());
                to_file_layout(param, values);
                sink(values.data(), values.size() * sizeof(float));
            }};
}

void save_checkpoint(const std::string& dir, Model& model, const TrainerState& state,
                     const Tokenizer* tokenizer) {
    AtomicDirectory directory(dir);
    const std::string& at = directory.temporary();
    std::vector<TensorOut> weights, moments;
    for (const Param& p : model.registry.params)
        weights.push_back(param_tensor(model, Buffer::parameters, p, p.name));
    for (auto [buffer, prefix] : {std::pair{Buffer::moment1, "m."}, {Buffer::moment2, "v."}})
        for (const Param& p : model.registry.params)
            moments.push_back(param_tensor(model, buffer, p, prefix + p.name));
    write_safetensors(at + "/model.safetensors", weights, {{"format", "pt"}});
    write_safetensors(at + "/optimizer.safetensors", moments);
    write_file_atomic(at + "/config.json", config_to_json(model.config));
    write_file_atomic(at + "/trainer_state.json", to_json(state).dump(2) + "\n");
    if (tokenizer) tokenizer->save(at);
    directory.commit();
}

int64_t checkpoint_bytes(const Registry& registry) {
    // Headers name every tensor with its shape and offsets: below 512 bytes each.
    return 3 * (4 * registry.count() + 512 * int64_t(registry.params.size())) + 65536;
}

std::string find_checkpoint(const std::string& path) {
    if (!fs::exists(path))
        fail("there is no '", path, "': expected a run's directory, a checkpoint, or a Hugging ",
             "Face directory");
    if (!fs::is_directory(path) || fs::exists(path + "/config.json")) return path;
    return latest_checkpoint(path);
}

std::string newest_checkpoint(const std::string& run) {
    if (fs::exists(run + "/config.json"))
        fail(run, " is a checkpoint: -o names the run's directory, which holds it");
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(run, error))
        if (entry.path().filename().string().rfind("step-", 0) == 0 && entry.is_directory() &&
            !fs::exists(entry.path() / "config.json"))
            fail(entry.path().string(),
                 " has no config.json, so it is not a whole checkpoint: put "
                 "it back, or remove the directory to go on from what else is there");
    try {
        return latest_checkpoint(run);
    } catch (const Error&) {
        return "";
    }
}

Config checkpoint_config(const std::string& path) {
    std::string at = find_checkpoint(path);
    if (fs::is_directory(at)) at += "/config.json";
    if (at.size() > 5 && at.substr(at.size() - 5) == ".json")
        return config_from_json(read_file(at), at);
    Safetensors file(at);
    auto config = file.metadata().find("config");
    if (config == file.metadata().end())
        fail(at, " does not say what model it is of ('config' in its metadata): name the directory "
                 "that holds it and its config.json");
    return config_from_json(config->second, at);
}

void load_weights(Model& model, const std::string& path) {
    const std::string at = find_checkpoint(path);
    if (std::string difference = config_difference(checkpoint_config(at), model.config);
        !difference.empty())
        fail(at, " is of another model than asked for: ", difference);
    WeightFiles weights(at);
    weights.check(model.config, model.registry, !fs::is_directory(at));
    load_tensors(model, Buffer::parameters, "", weights);
}

TrainerState read_trainer_state(const std::string& path) {
    const std::string where = find_checkpoint(path) + "/trainer_state.json";
    json j = json::parse(read_file(where), nullptr, false);
    if (!j.is_object()) fail(where, ": not a JSON object, expected a trainer's state");
    try {
        TrainerState s;
        s.step = j.at("step");
        s.tokens = j.at("tokens");
        s.seconds = j.at("seconds");
        s.loader = {j.at("epoch"), j.at("index")};
        s.windows = j.at("windows");
        s.val_loss = number(j.at("val_loss"));
        s.best_val_loss = number(j.at("best_val_loss"));
        s.flags = j.at("flags");
        const json& t = j.at("tokenizer");
        s.tokenizer = {t.at("kind"), t.at("vocab_size"), t.at("eot"), t.at("fingerprint")};
        return s;
    } catch (const json::exception& error) {
        fail(where, ": ", error.what());
    }
}

TrainerState load_checkpoint(Model& model, const std::string& path) {
    const std::string at = find_checkpoint(path);
    load_weights(model, at);
    if (!fs::exists(at + "/optimizer.safetensors"))
        fail(at, " has no optimizer.safetensors, so training cannot go on from it exactly: start "
                 "from its weights with --init-from");
    WeightFiles moments(at + "/optimizer.safetensors");
    load_tensors(model, Buffer::moment1, "m.", moments);
    load_tensors(model, Buffer::moment2, "v.", moments);
    return read_trainer_state(at);
}

} // namespace lns
