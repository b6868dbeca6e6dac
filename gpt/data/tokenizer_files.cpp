#include "gpt/data/tokenizer_files.h"

#include <algorithm>
#include <filesystem>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"

namespace lns {

namespace fs = std::filesystem;
using json = nlohmann::json;

namespace {

constexpr int max_tokens = 1 << 24;

[[noreturn]] void unsupported(const std::string& path, const std::string& what) {
    fail(path, " is not supported yet: ", what,
         ". Supported are byte-level BPE with GPT-2's splitting rule, with or without Digits, and "
         "SentencePiece's tokenizer.model");
}

// object[key], null if there is none.
const json& field(const json& object, const char* key) {
    static const json null;
    if (!object.is_object()) return null;
    auto found = object.find(key);
    return found == object.end() ? null : *found;
}

std::string text_of(const json& value) { return value.is_string() ? value.get<std::string>() : ""; }

std::string type_of(const json& part) { return text_of(field(part, "type")); }

bool bool_field(const json& object, const char* key, bool fallback, const std::string& path) {
    const json& value = field(object, key);
    if (value.is_null()) return fallback;
    if (!value.is_boolean())
        fail(path, ": ", key, " is ", quoted(value), ", expected true or false");
    return value.get<bool>();
}

int token_id(const json& value, const std::string& path, const std::string& name) {
    if (!value.is_number_integer() || value < 0 || value >= max_tokens)
        fail(path, " gives the token ", quoted(name), " the id ", quoted(value),
             ", expected a number of 0 to ", max_tokens - 1, ". Fetch it again");
    return value.get<int>();
}

AddedToken added_token(const json& entry, const json& id, const std::string& path) {
    const json& content = field(entry, "content");
    if (!content.is_string())
        fail(path, " has the added token ", quoted(entry), ", expected one with \"content\"");
    return {token_id(id, path, content), content, bool_field(entry, "special", false, path)};
}

} // namespace

std::string read_tokenizer_file(const std::string& path) {
    if (is_directory_at(path)) fail("cannot read the tokenizer file ", path, ": it is a directory");
    std::string text = read_file(path);
    if (is_lfs_pointer(text))
        fail(path, " is a Git LFS pointer, not the file itself. Fetch it: git lfs pull");
    return text;
}

// tokenizer_config.json

TokenizerConfig::TokenizerConfig(const std::string& dir) : path(dir + "/tokenizer_config.json") {
    if (path_exists(path)) {
        text = read_tokenizer_file(path);
        values = parse_json(text, path);
        if (!values.is_object())
            fail(path, " is ", quoted(values), ", expected a JSON object. Fetch it again");
    }
    if (const json& tokens = field(values, "added_tokens_decoder"); !tokens.is_null()) {
        for (const auto& [id, entry] : tokens.items()) {
            if (id.empty() || id.size() > 8 || id.find_first_not_of("0123456789") != id.npos)
                fail(path, " has an added token with the id ", quoted(id), ", expected a number");
            added.push_back(added_token(entry, std::stoi(id), path));
        }
        return;
    }
    const std::string added_tokens = dir + "/added_tokens.json";
    if (!path_exists(added_tokens)) return;
    const json tokens = parse_json(read_tokenizer_file(added_tokens), added_tokens);
    for (const auto& [content, id] : tokens.items())
        added.push_back({token_id(id, added_tokens, content), content, false});
}

std::string TokenizerConfig::tokenizer_class() const {
    return text_of(field(values, "tokenizer_class"));
}

std::optional<bool> TokenizerConfig::flag(const char* name) const {
    if (field(values, name).is_null()) return {};
    return bool_field(values, name, false, path);
}

std::string TokenizerConfig::token(const char* role) const {
    const json& value = field(values, role);
    return text_of(value.is_object() ? field(value, "content") : value);
}

bool TokenizerConfig::is_special(const AddedToken& added) const {
    bool role = false;
    for (const char* name : {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token",
                             "cls_token", "mask_token"})
        role |= token(name) == added.content;
    return added.special || role;
}

void TokenizerConfig::expect_class(std::initializer_list<const char*> known) const {
    const std::string name = tokenizer_class();
    if (name.empty() || std::find(known.begin(), known.end(), name) != known.end()) return;
    fail(path, " has the tokenizer_class ", quoted(name), ", expected ", *known.begin(),
         ": others are not supported yet");
}

// tokenizer.json

namespace {

// A pre-tokenizer, normalizer etc., for a message.
std::string description(const json& part) {
    const std::string type = type_of(part);
    if (type != "Sequence") return type.empty() ? quoted(part) : type;
    std::string names;
    for (const char* list : {"pretokenizers", "normalizers", "processors", "decoders"})
        for (const json& member : field(part, list))
            names += (names.empty() ? "" : ", ") + description(member);
    return "Sequence of " + names;
}

void read_model(const json& model, const std::string& path, BytePairs& out) {
    const std::string type = type_of(model);
    // Files from before 2020 have no type.
    if (type != "BPE" && !(type.empty() && model.contains("merges")))
        unsupported(path, cat("its model is of type ", type.empty() ? quoted(model) : type));
    for (const char* setting : {"byte_fallback", "ignore_merges"})
        if (bool_field(model, setting, false, path))
            unsupported(path, cat("its model has ", setting));
    for (const char* setting : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (const json& value = field(model, setting); !value.is_null() && value != "")
            unsupported(path, cat("its model has ", setting, " ", quoted(value)));
    if (const json& dropout = field(model, "dropout"); !dropout.is_null() && dropout != 0)
        unsupported(path, cat("its model has dropout ", quoted(dropout)));
    out.unknown = text_of(field(model, "unk_token"));
    out.fuse_unknown = bool_field(model, "fuse_unk", false, path);
    out.vocab = field(model, "vocab");
    const json& merges = field(model, "merges");
    if (!merges.is_array())
        fail(path, " has merges ", quoted(merges), ", expected a list. Fetch it again");
    for (const json& merge : merges) {
        const std::string text = text_of(merge);
        const size_t gap = text.find(' ');
        if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
            out.merges.emplace_back(merge[0], merge[1]);
        else if (gap != text.npos && gap > 0 && gap + 1 < text.size() &&
                 text.find(' ', gap + 1) == text.npos)
            out.merges.emplace_back(text.substr(0, gap), text.substr(gap + 1));
        else
            fail(path, " has the merge ", quoted(merge), ", expected two tokens. Fetch it again");
    }
}

void read_splitting(const json& whole, const std::string& path, BytePairs& out) {
    std::vector<json> steps;
    if (type_of(whole) == "Sequence")
        for (const json& step : field(whole, "pretokenizers")) steps.push_back(step);
    else
        steps.push_back(whole);
    const bool digits = steps.size() == 2 && type_of(steps[0]) == "Digits";
    if (steps.size() != (digits ? 2 : 1) || type_of(steps.back()) != "ByteLevel")
        unsupported(path,
                    cat("its pre-tokenizer is ", whole.is_null() ? "none" : description(whole)));
    if (!bool_field(steps.back(), "use_regex", true, path))
        unsupported(path, "its pre-tokenizer is ByteLevel without its splitting rule (use_regex)");
    out.add_prefix_space = bool_field(steps.back(), "add_prefix_space", true, path);
    if (!digits) return;
    out.digits =
        bool_field(steps[0], "individual_digits", false, path) ? Digits::each : Digits::runs;
    if (*out.add_prefix_space)
        unsupported(path, "its pre-tokenizer is Digits with add_prefix_space, a space before every "
                          "run of digits");
}

// A template may put one token before a text. What it puts after the text is end-of-text, which the
// caller adds.
void read_post_processor(const json& part, const std::string& path, BytePairs& out) {
    const std::string type = type_of(part);
    if (part.is_null() || type == "ByteLevel") return;
    if (type == "Sequence") {
        for (const json& step : field(part, "processors")) read_post_processor(step, path, out);
        return;
    }
    const json& single = field(part, "single");
    if (type != "TemplateProcessing" || !single.is_array())
        unsupported(path, cat("its post-processor is ", description(part)));
    bool after = false;
    for (const json& piece : single) {
        const std::string token = text_of(field(field(piece, "SpecialToken"), "id"));
        after |= piece.contains("Sequence");
        if (token.empty() || after) continue;
        if (!out.prefix_token.empty())
            unsupported(path, "its post-processor puts several tokens before a text");
        out.prefix_token = token;
    }
}

} // namespace

BytePairs read_tokenizer_json(std::string_view text, const std::string& path) {
    const json all = parse_json(text, path);
    if (!field(all, "model").is_object())
        fail(path, " is ", quoted(all), ", expected a tokenizer.json with a \"model\"",
             all.is_object() && all.contains("vocab") && all.contains("config")
                 ? ". It looks like Mistral's tekken.json, which is not supported yet"
                 : "");
    BytePairs out;
    out.path = path;
    read_model(all["model"], path, out);
    if (const json& normalizer = field(all, "normalizer"); !normalizer.is_null())
        unsupported(path, cat("its normalizer is ", description(normalizer)));
    read_splitting(field(all, "pre_tokenizer"), path, out);
    read_post_processor(field(all, "post_processor"), path, out);
    if (const json& decoder = field(all, "decoder");
        !decoder.is_null() && type_of(decoder) != "ByteLevel")
        unsupported(path, cat("its decoder is ", description(decoder)));
    for (const json& entry : field(all, "added_tokens"))
        out.added.push_back(added_token(entry, field(entry, "id"), path));
    return out;
}

} // namespace lns
