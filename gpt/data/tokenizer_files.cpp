#include "gpt/data/tokenizer_files.h"

#include <algorithm>
#include <filesystem>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"

namespace lns {

namespace fs = std::filesystem;
using json = nlohmann::json;

void unsupported(const std::string& path, const std::string& what) {
    fail(path, " is not supported yet: ", what);
}

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

std::string text_field(const json& object, const char* key, const std::string& path) {
    const json& value = field(object, key);
    if (!value.is_string()) fail(path, ": ", key, " is ", quoted(value), ", expected a text");
    return value.get<std::string>();
}

const json& list_field(const json& object, const char* key, const std::string& path) {
    const json& value = field(object, key);
    if (!value.is_array()) fail(path, ": ", key, " is ", quoted(value), ", expected a list");
    return value;
}

int token_id(const json& value, const std::string& path, const std::string& name) {
    constexpr int max_tokens = 1 << 22;
    if (!value.is_number_integer() || value < 0 || value >= max_tokens)
        fail(path, " gives the token ", quoted(name), " the id ", quoted(value),
             ", expected a number of 0 to ", max_tokens - 1, ". Fetch it again");
    return value.get<int>();
}

AddedToken added_token(const json& entry, const json& id, const std::string& path) {
    const json& content = field(entry, "content");
    if (!content.is_string())
        fail(path, " has the added token ", quoted(entry), ", expected one with \"content\"");
    auto flag = [&](const char* key, bool fallback) {
        return bool_field(entry, key, fallback, path);
    };
    const bool special = flag("special", false);
    return {token_id(id, path, content),
            content,
            special,
            flag("single_word", false),
            flag("lstrip", false),
            flag("rstrip", false),
            flag("normalized", !special)};
}

std::string description(const json& part) {
    const std::string type = type_of(part);
    if (type != "Sequence") return type.empty() ? quoted(part) : type;
    std::string names;
    for (const char* list : {"pretokenizers", "normalizers", "processors", "decoders"})
        for (const json& member : field(part, list))
            names += (names.empty() ? "" : ", ") + description(member);
    return "Sequence of " + names;
}

void limit_parts(size_t n, const char* what, const std::string& path) {
    if (n > 100) fail(path, " has a ", what, " of ", n, " parts, expected at most 100");
}

void limit_text(const std::string& text, const std::string& path) {
    if (text.size() > 1000)
        fail(path, " puts ", text.size(), " bytes in the place of others: ", quoted(text),
             ", expected at most 1000");
}

std::string from_base64(std::string_view text, const std::string& path) {
    constexpr std::string_view digits =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    while (text.ends_with('=')) text.remove_suffix(1);
    std::string out;
    uint32_t bits = 0, n = 0;
    for (char c : text) {
        const size_t digit = digits.find(c);
        if (digit == digits.npos)
            fail(path, " has the character ", quoted(std::string(1, c)),
                 " in a table, expected base64. Fetch it again");
        bits = bits << 6 | uint32_t(digit);
        if ((n += 6) < 8) continue;
        n -= 8;
        out += char(bits >> n & 0xff);
    }
    return out;
}

std::string read_tokenizer_file(const std::string& path) {
    if (is_directory_at(path)) fail("cannot read the tokenizer file ", path, ": it is a directory");
    std::string text = read_file(path);
    if (is_lfs_pointer(text))
        fail(path, " is a Git LFS pointer, not the file itself. Fetch it: git lfs pull");
    return text;
}

void save_tokenizer_files(const std::string& dir, const std::vector<TokenizerFile>& files) {
    std::error_code error;
    fs::create_directories(dir, error);
    if (error) fail("cannot make the directory ", dir, ": ", error.message());
    for (const char* name : {"tokenizer.model", "vocab.json", "merges.txt", "encoder.json",
                             "vocab.bpe", "tokenizer.json", "tokenizer_config.json",
                             "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"})
        if (std::none_of(files.begin(), files.end(),
                         [&](const TokenizerFile& file) { return file.name == name; }))
            fs::remove(fs::path(dir) / name, error);
    for (const TokenizerFile& file : files) write_file_atomic(dir + "/" + file.name, file.content);
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
        added.push_back({.id = token_id(id, added_tokens, content), .content = content});
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

std::string chat_template_in(const std::string& folder) {
    const std::string file = folder + "/chat_template.jinja",
                      path = folder + "/tokenizer_config.json";
    if (is_regular_file_at(file)) return read_file(file);
    if (!is_regular_file_at(path)) return "";
    const nlohmann::json config = parse_json(read_file(path), path);
    const nlohmann::json found =
        config.is_object() ? config.value("chat_template", nlohmann::json()) : nlohmann::json();
    if (found.is_string()) return found.get<std::string>();
    if (found.is_array()) // several, with names
        for (const nlohmann::json& entry : found)
            if (entry.is_object() && text_of(field(entry, "name")) == "default")
                return text_of(field(entry, "template"));
    return "";
}

} // namespace lns
