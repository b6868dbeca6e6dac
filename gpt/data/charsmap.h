// The normalization table of a SentencePiece model: a trie of byte strings in Darts-clone's layout,
// whose values are offsets of zero-terminated strings. The library checks neither, so a damaged
// model would make it read out of bounds.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

// One table, in memory.
class Charsmap {
  public:
    // Throws an Error that begins with `where` if the table is damaged.
    Charsmap(std::string_view table, const std::string& where);
    // The replacement for the shortest key with which the text begins, as `tokenizers` looks it up;
    // false if there is none.
    bool find(std::string_view text, std::string_view& replacement) const;

  private:
    std::vector<uint32_t> units;
    std::string strings;
};

// What is wrong with the tables of a model (the bytes of its file), or "" if nothing is.
std::string charsmap_fault(std::string_view model);

} // namespace lns
