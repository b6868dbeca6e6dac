// Hugging Face's tokenizer files, as far as they affect tokenization. Unsupported settings that
// would change tokens are an Error; those that would not (chat templates, padding, offsets) are
// ignored.
#pragma once

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

// Reads the whole file. Throws if it is a Git LFS pointer.
std::string read_tokenizer_file(const std::string& path);

struct TokenizerFile {
    std::string name, content;
};
// Writes a tokenizer's files to dir, and removes those of other kinds.
void save_tokenizer_files(const std::string& dir, const std::vector<TokenizerFile>& files);

// A token that stands for its text wherever that occurs, outside the model's vocabulary or in it.
struct AddedToken {
    int id;
    std::string content;
    bool special = false;                // only where the caller allows it
    bool single_word = false;            // not beside a letter or digit
    bool lstrip = false, rstrip = false; // with the white space before and after it
    bool normalized = false;             // looked for after normalization
};

// tokenizer_config.json, and added_tokens.json if the former lists no added tokens.
struct TokenizerConfig {
    std::string path, text; // text: the file's content, "" if there is none
    nlohmann::json values = nlohmann::json::object();
    std::vector<AddedToken> added;

    TokenizerConfig() = default;
    explicit TokenizerConfig(const std::string& dir);

    std::string tokenizer_class() const;              // "" if absent
    std::optional<bool> flag(const char* name) const; // nullopt if absent or null
    std::string token(const char* role) const;        // bos_token etc.; "" if absent
    bool is_special(const AddedToken& token) const;   // marked as special, or in a role
    // Throws if there is a tokenizer_class and it is not among these.
    void expect_class(std::initializer_list<const char*> known) const;
};

// The chat template of a tokenizer's folder, in chat_template.jinja or tokenizer_config.json; "" if
// there is none.
std::string chat_template_in(const std::string& folder);

// Parts of a tokenizer.json. `path` names the file in errors.

// object[key], null if there is none.
const nlohmann::json& field(const nlohmann::json& object, const char* key);
std::string text_of(const nlohmann::json& value); // "" if it is no string
std::string type_of(const nlohmann::json& part);  // its field "type", or ""
// These throw if the field has another type; a list and a text must not be missing either.
bool bool_field(const nlohmann::json& object, const char* key, bool fallback,
                const std::string& path);
std::string text_field(const nlohmann::json& object, const char* key, const std::string& path);
const nlohmann::json& list_field(const nlohmann::json& object, const char* key,
                                 const std::string& path);
int token_id(const nlohmann::json& value, const std::string& path, const std::string& name);
AddedToken added_token(const nlohmann::json& entry, const nlohmann::json& id,
                       const std::string& path);
// The part's type, and those of a Sequence's members.
std::string description(const nlohmann::json& part);
[[noreturn]] void unsupported(const std::string& path, const std::string& what);
// Limits that no real file reaches, and a damaged one must not exceed.
void limit_parts(size_t n, const char* what, const std::string& path);
void limit_text(const std::string& text, const std::string& path);
std::string from_base64(std::string_view text, const std::string& path);

} // namespace lns
