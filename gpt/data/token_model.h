// The models of Hugging Face's tokenizer.json: they turn a word into tokens.
#pragma once

#include <nlohmann/json.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lns {

// The tokens by id, as the file writes them.
struct Vocabulary {
    std::string path; // for errors
    std::vector<std::string> names;
    std::vector<bool> known, special; // special ones never result from text
    std::unordered_map<std::string, int> ids;

    void add(int id, const std::string& name); // throws if the id is taken
    int find(const std::string& name) const;   // -1 if there is none
};

// Thread-safe.
struct TokenModel {
    virtual ~TokenModel() = default;
    // Appends the tokens of a word that is not empty.
    virtual void encode(std::string_view word, std::vector<int>& out) const = 0;
    // The number of bytes that have no token.
    virtual size_t count_unencodable(std::string_view) const { return 0; }
    // Whether no token spans the start of a mark (U+2581, for a space) behind another character, so
    // that the words there can be encoded on their own.
    virtual bool splits_at_marks() const { return false; }
    int unknown = -1;         // for characters without a token; -1 if there is none
    uint64_t fingerprint = 0; // of the vocabulary, the merges or scores, and the settings
};

// These read the field "model" of the tokenizer.json at path. They throw for types and settings
// that are not supported, and for damaged files.
Vocabulary read_vocabulary(const nlohmann::json& model, const std::string& path);
// byte_level: words are bytes, and tokens name them (byte_name). eot: never results from text.
// fingerprint: that of the vocabulary.
std::unique_ptr<TokenModel> read_token_model(const nlohmann::json& model, bool byte_level,
                                             const Vocabulary& vocabulary, int eot,
                                             uint64_t fingerprint);

} // namespace lns
