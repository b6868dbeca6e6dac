// Hugging Face's tokenizer files, as far as they say how a text becomes tokens. What is understood
// is read, what changes tokens and is not understood is an Error that names it, and what changes no
// token (chat templates, padding, offsets) is ignored.
#pragma once

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lns {

// The whole file, which must not be a Git LFS pointer.
std::string read_tokenizer_file(const std::string& path);

// A token beside the vocabulary's. Special ones never come from a text.
struct AddedToken {
    int id;
    std::string content;
    bool special;
};

// tokenizer_config.json, with added_tokens.json where it lists no added tokens itself.
struct TokenizerConfig {
    std::string path, text; // text: of the file; "" if there is none
    nlohmann::json values = nlohmann::json::object();
    std::vector<AddedToken> added;

    TokenizerConfig() = default;
    explicit TokenizerConfig(const std::string& dir);

    std::string tokenizer_class() const;              // "" if it names none
    std::optional<bool> flag(const char* name) const; // null is as if left out
    std::string token(const char* role) const;        // of bos_token etc.; "" if none
    bool is_special(const AddedToken& token) const;   // by its mark or its role
    void expect_class(std::initializer_list<const char*> known) const; // or none
};

enum class Digits { in_runs_with_spaces, each, runs };

// A byte-level BPE: what tokenizer.json, or the pair of vocab.json and merges.txt, says.
struct BytePairs {
    std::string path;                                        // of the vocabulary
    nlohmann::json vocab;                                    // names and ids
    std::vector<std::pair<std::string, std::string>> merges; // the first is merged first
    std::vector<AddedToken> added;
    std::string unknown;       // the token of bytes that have none; "" if they are left out
    bool fuse_unknown = false; // neighbouring ones become one
    Digits digits = Digits::in_runs_with_spaces;
    std::optional<bool> add_prefix_space; // nullopt: not said here
    std::string before; // the token that its post-processor puts before a text, or ""
};

// Throws a sentence with "is not supported yet" for what is valid and not understood.
BytePairs read_tokenizer_json(std::string_view text, const std::string& path);

} // namespace lns
