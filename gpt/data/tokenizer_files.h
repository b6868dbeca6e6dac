// Hugging Face's tokenizer files, as far as they affect tokenization. Unsupported settings that
// would change tokens are an Error; those that would not (chat templates, padding, offsets) are
// ignored.
#pragma once

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lns {

// Reads the whole file. Throws if it is a Git LFS pointer.
std::string read_tokenizer_file(const std::string& path);

// A token outside the vocabulary. Encoding text never yields special ones.
struct AddedToken {
    int id;
    std::string content;
    bool special;
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

enum class Digits { in_runs_with_spaces, each, runs };

// A byte-level BPE, from tokenizer.json or from vocab.json and merges.txt.
struct BytePairs {
    std::string path;                                        // of the vocabulary's file
    nlohmann::json vocab;                                    // token to id
    std::vector<std::pair<std::string, std::string>> merges; // in order of priority
    std::vector<AddedToken> added;
    std::string unknown;       // unk_token, for bytes without a token; "" drops them
    bool fuse_unknown = false; // adjacent ones become one
    Digits digits = Digits::in_runs_with_spaces;
    std::optional<bool> add_prefix_space; // nullopt if absent
    std::string prefix_token;             // which the post-processor puts before a text, or ""
};

// Throws "… is not supported yet" for valid but unsupported settings.
BytePairs read_tokenizer_json(std::string_view text, const std::string& path);

} // namespace lns
