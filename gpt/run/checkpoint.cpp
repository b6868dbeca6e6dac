#include "gpt/run/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>

#include "gpt/base/checksum.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/run/rundir.h"

namespace lns {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// (rows, columns) to (columns, rows).
void transpose(const float* in, int64_t rows, int64_t columns, float* out) {
    const int64_t tile = 16; // rows, so that whole cache lines of `out` are written
#pragma omp parallel for if (rows * columns > 65536)
    for (int64_t r0 = 0; r0 < rows; r0 += tile)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = r0; r < std::min(rows, r0 + tile); r++)
                out[c * rows + r] = in[r * columns + c];
}

bool all_finite(const std::vector<float>& values) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(values.data());
    uint32_t bad = 0;
#pragma omp parallel for simd reduction(| : bad) if (parallel : values.size() > 65536)
    for (size_t i = 0; i < values.size(); i++) bad |= (bits[i] & 0x7f800000) == 0x7f800000;
    return !bad;
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (int64_t d : shape) text += (text.empty() ? "" : " x ") + std::to_string(d);
    return "(" + text + ")";
}

// JSON has no NaN.
json number_or_null(double x) { return std::isfinite(x) ? json(x) : json(); }

json to_json(const TrainerState& s) {
    return {{"step", s.step},
            {"tokens", s.tokens},
            {"seconds", s.seconds},
            {"epoch", s.loader.epoch},
            {"index", s.loader.index},
            {"windows", s.windows},
            {"val_loss", number_or_null(s.val_loss)},
            {"best_val_loss", number_or_null(s.best_val_loss)},
            {"flags", s.flags},
            {"tokenizer",
             {{"kind", s.tokenizer.kind},
              {"vocab_size", s.tokenizer.vocab_size},
              {"eot", s.tokenizer.eot},
              {"fingerprint", s.tokenizer.fingerprint}}}};
}

// "'a', 'b' and 7 more"
std::string abbreviated(const std::vector<std::string>& names) {
    const size_t shown = names.size() > 4 ? 3 : names.size();
    std::string text;
    for (size_t i = 0; i < shown; i++)
        text += cat(i == 0 ? "" : i + 1 == names.size() ? " and " : ", ", "'", names[i], "'");
    return names.size() > shown ? cat(text, " and ", names.size() - shown, " more") : text;
}

// {tensor: its file} of an index.
std::map<std::string, std::string> read_index(const std::string& index) {
    const json j = parse_json(read_file(index), index);
    auto map = j.is_object() ? j.find("weight_map") : j.end();
    if (map == j.end() || !map->is_object() || map->empty())
        fail(index, ": not an index of weights, expected an object with a 'weight_map'");
    std::map<std::string, std::string> files;
    for (const auto& [tensor, name] : map->items()) {
        const std::string file = name.is_string() ? name.get<std::string>() : "";
        if (!file.ends_with(".safetensors") || file.find('/') != std::string::npos)
            fail(index, ": its weight_map has ", quoted(name), ", expected the name of a ",
                 "safetensors file in the same folder");
        files[tensor] = file;
    }
    return files;
}

// Tensors beside the parameters in Hugging Face's files: attention masks, rotary frequencies, and
// the copy of a tied head.
bool is_ignored(const std::string& name, bool tied) {
    return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") ||
           name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
}

const char* checksums_name = "checksums.json";

// The checksum of a file for checksums.json; "" for a foreign safetensors file without one.
std::string file_checksum(const std::string& path) {
    if (!path.ends_with(".safetensors")) return checksum_text(checksum(read_file(path)));
    const std::optional<uint64_t> sum = Safetensors(path).checksum();
    return sum ? checksum_text(*sum) : "";
}

void write_checksums(const std::string& dir) {
    json sums;
    for (const auto& entry : directory_entries(dir))
        sums[entry.path().filename().string()] = file_checksum(entry.path().string());
    write_file_atomic(dir + "/" + checksums_name, json{{"xxh3", sums}}.dump(2) + "\n");
}

// Throws if a file of a checkpoint does not match checksums.json. A safetensors file may be
// missing: its reader reports that.
void check_files(const std::string& dir) {
    const std::string where = dir + "/" + checksums_name;
    if (!path_exists(where)) return; // not written by this program
    const json all = parse_json(read_file(where), where);
    auto sums = all.is_object() ? all.find("xxh3") : all.end();
    if (sums == all.end() || !sums->is_object() || all.size() != 1)
        fail(where, " is damaged: expected an object 'xxh3' of files and their checksums");
    for (const auto& [name, sum] : sums->items()) {
        const std::string path = dir + "/" + name;
        if (name.find('/') != std::string::npos || !sum.is_string())
            fail(where, " is damaged: it has ", quoted(name), ": ", quoted(sum));
        const bool tensors = name.ends_with(".safetensors");
        if (!path_exists(path)) {
            if (tensors) continue;
            fail(path, " is missing, though ", where, " lists it");
        }
        if (file_checksum(path) != sum)
            fail(path, tensors ? " is not the file that was written here" : " is damaged",
                 ": its checksum is not the one in ", where, " (", sum.get<std::string>(),
                 "). If you changed it on purpose, remove ", checksums_name);
    }
}

// An error that already names the newest whole checkpoint.
struct AdvisedError : Error {
    using Error::Error;
};

// How to resume from the newest whole checkpoint before the damaged one at path; "" if path is not
// a damaged checkpoint of a run.
std::string resume_advice(const std::string& path) {
    fs::path damaged = path;
    if (!damaged.has_filename()) damaged = damaged.parent_path(); // "run/step-000020/"
    const std::string run = damaged.parent_path().empty() ? "." : damaged.parent_path().string();
    auto all = checkpoints_in(run);
    auto here = std::find_if(all.begin(), all.end(), [&](const auto& checkpoint) {
        return fs::path(checkpoint.second).filename() == damaged.filename();
    });
    if (here == all.end() || checkpoint_damage(path).empty()) return "";
    for (auto other = all.rbegin(); other != all.rend(); ++other) {
        if (other->first >= here->first || !checkpoint_damage(other->second).empty()) continue;
        const char* move[] = {"mv", here->second.c_str(), ""};
        const std::string aside = (fs::path(run) / cat("damaged-", damaged.filename().string()));
        move[2] = aside.c_str();
        return cat(". ", other->second,
                   " is whole: name that one, or to resume training from it, `",
                   shell_quoted(3, move), "` and start again with -y");
    }
    return cat(". No earlier checkpoint in ", run, " is whole");
}

// Reads a checkpoint, adding resume_advice() to its errors.
template <class Read> auto with_advice(const std::string& path, Read read) {
    try {
        return read();
    } catch (const AdvisedError&) {
        throw;
    } catch (const Error& error) {
        std::string sentence = error.what();
        const std::string advice = resume_advice(path);
        if (!advice.empty() && sentence.back() == '.') sentence.pop_back();
        throw AdvisedError(sentence + advice);
    }
}

// The tensors of optimizer.safetensors: f(buffer, parameter as shaped, the prefix of its name).
template <class F>
void each_state(const Optimizer& optimizer, const Registry& registry, const F& f) {
    for (int i = 0; const OptimizerState& state : optimizer.states) {
        for (const Param& p : registry.params)
            if (optimizer.has(i, p))
                f(Buffer{Buffer::state, i}, optimizer.shaped(i, p), state.name + ".");
        i++;
    }
}

} // namespace

WeightFiles::WeightFiles(const std::string& path) : name(path) {
    auto in_dir = [&](const char* file) { return path + "/" + file; };
    const std::string whole = in_dir("model.safetensors");
    const std::string index = in_dir("model.safetensors.index.json");
    if (!is_directory_at(path)) {
        files.push_back(std::make_unique<Safetensors>(path));
    } else if (path_exists(whole)) {
        files.push_back(std::make_unique<Safetensors>(name = whole));
    } else if (path_exists(index)) {
        name = index;
        std::map<std::string, const Safetensors*> shards;
        for (const auto& [tensor, shard] : read_index(index)) {
            const Safetensors*& file = shards[shard];
            if (!file) {
                if (!path_exists(path + "/" + shard))
                    fail(index, " names the file ", shard, ", which is not there: fetch it too");
                files.push_back(std::make_unique<Safetensors>(path + "/" + shard));
                file = files.back().get();
            }
            if (!file->find(tensor))
                fail(index, " places the tensor '", tensor, "' in ", shard,
                     ", which lacks it: the files do not belong together");
        }
    } else {
        const bool pickled = path_exists(in_dir("pytorch_model.bin")) ||
                             path_exists(in_dir("pytorch_model.bin.index.json"));
        fail(path, " has no model.safetensors",
             pickled
                 ? ", only PyTorch's pytorch_model.bin, which train_gpt cannot read: resave the "
                   "model with transformers, which writes safetensors"
                 : " and no model.safetensors.index.json: there are no weights");
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

void WeightFiles::check(const Config& config, const Registry& registry, bool allow_extra) const {
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
        fail(name, ": the tensor", one ? " " : "s ", abbreviated(missing), one ? " is" : " are",
             " missing: ",
             one && missing[0] == "lm_head.weight"
                 ? "if the head shares the embedding, set \"tie_word_embeddings\": true in "
                   "config.json"
                 : "this is not a whole checkpoint of this model");
    }
    if (config.tied) check_tied_head(registry);
    if (allow_extra) return;
    for (const auto& file : files)
        for (const TensorView& view : file->tensors())
            if (!known.count(view.name) && !is_ignored(view.name, config.tied))
                unknown.push_back(view.name);
    if (unknown.empty()) return;
    const bool one = unknown.size() == 1;
    fail(name, ": the tensor", one ? " " : "s ", abbreviated(unknown),
         one ? " is not a parameter" : " are not parameters",
         " of this model: its config.json and its weights do not belong together");
}

void WeightFiles::check_tied_head(const Registry& registry) const {
    auto [head_file, head] = find("lm_head.weight");
    const Param& embedding = registry.params[0];
    auto [file, view] = find(embedding.name);
    if (!head) return;
    bool same = head->shape == view->shape;
    if (same) {
        std::vector<float> a(size_t(embedding.size())), b(a.size());
        head_file->read_f32(*head, a.data());
        file->read_f32(*view, b.data());
        same = std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    }
    if (!same)
        fail(head_file->path(), ": 'lm_head.weight' differs from '", view->name,
             "', although config.json ties them (tie_word_embeddings): set that to false to use "
             "the head, or remove the head");
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
    if (!all_finite(out))
        fail(file->path(), ": the tensor '", view->name,
             "' has values that are not finite (NaN or infinity): the model is broken");
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
    return {name, "F32", param.file_shape(), [&model, buffer, param](const TensorSink& sink) {
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
    std::vector<TensorOut> weights, state_tensors;
    for (const Param& p : model.registry.params)
        weights.push_back(param_tensor(model, Buffer::parameters, p, p.name));
    each_state(*model.optimizer, model.registry,
               [&](Buffer buffer, const Param& p, const std::string& prefix) {
                   state_tensors.push_back(param_tensor(model, buffer, p, prefix + p.name));
               });
    write_safetensors(at + "/model.safetensors", weights, {{"format", "pt"}});
    write_safetensors(at + "/optimizer.safetensors", state_tensors);
    write_file_atomic(at + "/config.json", config_to_json(model.config));
    write_file_atomic(at + "/trainer_state.json", to_json(state).dump(2) + "\n");
    if (tokenizer) tokenizer->save(at);
    write_checksums(at);
    directory.commit();
}

int64_t checkpoint_bytes(const Optimizer& optimizer, const Registry& registry) {
    int64_t bytes = 65536;
    // A tensor takes less than 512 bytes of header.
    auto add = [&](const Param& p) { bytes += 4 * p.size() + 512; };
    for (const Param& p : registry.params) add(p);
    each_state(optimizer, registry, [&](Buffer, const Param& p, const std::string&) { add(p); });
    return bytes;
}

std::string find_checkpoint(const std::string& path) {
    if (!path_exists(path))
        fail("'", path, "' does not exist: expected a run's directory, a checkpoint, or a Hugging ",
             "Face directory");
    if (!is_directory_at(path) || path_exists(path + "/config.json")) return path;
    return latest_checkpoint(path);
}

std::string newest_checkpoint(const std::string& run) {
    if (path_exists(run + "/config.json"))
        fail(run, " is a checkpoint; -o expects the run's directory that holds it");
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(run, error))
        if (entry.path().filename().string().rfind("step-", 0) == 0 && entry.is_directory() &&
            !path_exists(entry.path() / "config.json"))
            fail(entry.path().string(),
                 " has no config.json, so it is not a whole checkpoint: restore that file, or "
                 "remove the directory to resume from another checkpoint");
    try {
        return latest_checkpoint(run);
    } catch (const Error&) {
        return "";
    }
}

namespace {

Config read_config(std::string at) {
    if (is_directory_at(at)) check_files(at), at += "/config.json";
    if (at.ends_with(".json")) return config_from_json(read_file(at), at);
    Safetensors file(at);
    auto config = file.metadata().find("config");
    if (config == file.metadata().end())
        fail(at, " does not describe its model ('config' in its metadata): name the directory that "
                 "holds it and its config.json");
    return config_from_json(config->second, at);
}

// Reads fields of trainer_state.json, checking types and ranges.
struct StateFields {
    const json& object;
    const std::string& where;

    const json& field(const char* key) const {
        auto found = object.find(key);
        if (found == object.end()) fail(where, ": the field '", key, "' is missing");
        return *found;
    }
    template <class Integer> Integer integer(const char* key, int64_t min = 0) const {
        const json& value = field(key);
        const bool fits =
            value.is_number_unsigned()
                ? value.get<uint64_t>() <= uint64_t(std::numeric_limits<Integer>::max())
                : value.is_number_integer() && value.get<int64_t>() >= min;
        if (!fits)
            fail(where, ": the field '", key, "' is ", quoted(value), ", expected an integer from ",
                 min, " to ", std::numeric_limits<Integer>::max());
        return value.get<Integer>();
    }
    double number(const char* key, bool may_be_null) const {
        const json& value = field(key);
        if (may_be_null && value.is_null()) return NAN;
        if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() < 0)
            fail(where, ": the field '", key, "' is ", quoted(value),
                 ", expected a number of at least 0", may_be_null ? ", or null" : "");
        return value.get<double>();
    }
    std::string text(const char* key) const {
        const json& value = field(key);
        if (!value.is_string())
            fail(where, ": the field '", key, "' is ", quoted(value), ", expected a string");
        return value.get<std::string>();
    }
};

TrainerState state_from_json(const std::string& text, const std::string& where) {
    const json j = parse_json(text, where);
    if (!j.is_object()) fail(where, ": expected a JSON object with the trainer's state");
    const StateFields f{j, where};
    TrainerState s;
    s.step = f.integer<int64_t>("step");
    s.tokens = f.integer<int64_t>("tokens");
    s.seconds = f.number("seconds", false);
    s.loader = {f.integer<uint64_t>("epoch"), f.integer<uint64_t>("index")};
    s.windows = f.integer<uint64_t>("windows");
    s.val_loss = f.number("val_loss", true);
    s.best_val_loss = f.number("best_val_loss", true);
    s.flags = parse_saved_flags(f.field("flags"), where + ": its flags");
    if (!f.field("tokenizer").is_object())
        fail(where, ": the field 'tokenizer' is ", quoted(j["tokenizer"]), ", expected an object");
    const StateFields t{j["tokenizer"], where + ", tokenizer"};
    s.tokenizer = {t.text("kind"), t.integer<int>("vocab_size"), t.integer<int>("eot", -1),
                   t.integer<uint64_t>("fingerprint")};
    return s;
}

TrainerState read_state(const std::string& at) {
    const std::string where = at + "/trainer_state.json";
    TrainerState s = state_from_json(read_file(where), where);
    fs::path dir = at;
    if (!dir.has_filename()) dir = dir.parent_path();
    const int64_t named = checkpoint_step(dir.filename().string());
    if (named >= 0 && named != s.step)
        fail(where, ": its step is ", s.step, ", but its directory is that of step ", named);
    return s;
}

// Of a run: those of older versions do not name it.
const Optimizer& optimizer_of(const SavedFlags& flags) {
    const auto found = flags.find("--optimizer");
    return found == flags.end() ? optimizers()[0] : optimizer_row(flag_text(found->second));
}

} // namespace

std::string checkpoint_damage(const std::string& path) {
    try {
        const Config config = read_config(path);
        const Registry registry = make_registry(config);
        const WeightFiles weights(path);
        weights.check(config, registry, !is_directory_at(path));
        std::vector<float> values;
        for (const Param& p : registry.params) weights.read(p, "", values);
        if (!path_exists(path + "/trainer_state.json")) return "";
        const TrainerState state = read_state(path);
        if (!path_exists(path + "/optimizer.safetensors"))
            return path + " has no optimizer.safetensors: training cannot resume from it exactly";
        const WeightFiles tensors(path + "/optimizer.safetensors");
        each_state(optimizer_of(state.flags), registry,
                   [&](Buffer, const Param& p, const std::string& prefix) {
                       tensors.read(p, prefix, values);
                   });
        return "";
    } catch (const Error& error) {
        return error.what();
    }
}

bool WeightFiles::have_checksums() const {
    return std::all_of(files.begin(), files.end(), [](auto& file) { return file->checksum(); });
}

bool has_checksums(const std::string& path) { return WeightFiles(path).have_checksums(); }

Config checkpoint_config(const std::string& path) {
    const std::string at = find_checkpoint(path);
    return with_advice(at, [&] { return read_config(at); });
}

void load_weights(Model& model, const std::string& path) {
    const std::string at = find_checkpoint(path);
    if (std::string difference = config_difference(checkpoint_config(at), model.config);
        !difference.empty())
        fail(at, " holds another model than this one: ", difference);
    with_advice(at, [&] {
        WeightFiles weights(at);
        weights.check(model.config, model.registry, !is_directory_at(at));
        std::vector<float> values;
        for (const Param& p : model.registry.params) {
            weights.read(p, "", values);
            model.write(Buffer::parameters, p, values.data());
        }
    });
}

TrainerState read_trainer_state(const std::string& path) {
    const std::string at = find_checkpoint(path);
    return with_advice(at, [&] {
        check_files(at);
        return read_state(at);
    });
}

TrainerState load_checkpoint(Model& model, const std::string& path) {
    const std::string at = find_checkpoint(path);
    load_weights(model, at);
    if (!path_exists(at + "/optimizer.safetensors"))
        fail(at, " has no optimizer.safetensors, so training cannot resume from it exactly: start "
                 "from its weights with --init-from");
    with_advice(at, [&] {
        WeightFiles tensors(at + "/optimizer.safetensors");
        std::vector<float> values;
        each_state(*model.optimizer, model.registry,
                   [&](Buffer buffer, const Param& p, const std::string& prefix) {
                       tensors.read(p, prefix, values);
                       model.write(buffer, p, values.data());
                   });
    });
    return read_trainer_state(at);
}

} // namespace lns
