// The added tokens of Hugging Face's tokenizer.json, at which a text is split before anything else.
#pragma once

#include "gpt/data/tokenizer_files.h"
#include "gpt/data/trie.h"

#include <functional>

namespace lns {

// Thread-safe.
class AddedTokens {
  public:
    AddedTokens() = default;
    explicit AddedTokens(const std::vector<AddedToken>& tokens);

    // Calls part(text, id) for the tokens in the text (with the white space that they take), and
    // for the parts between (id −1), which are not empty. Of overlapping tokens the leftmost
    // counts, then the longest. specials: whether special ones are looked for, too.
    using Part = std::function<void(std::string_view text, int id)>;
    void split(std::string_view text, bool specials, const Part& part) const;
    bool empty() const { return tokens.empty(); }

  private:
    std::vector<AddedToken> tokens;
    Trie trie; // of indexes into tokens
    bool only_special = true;
};

} // namespace lns
