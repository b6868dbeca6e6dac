// The normalization table of a SentencePiece model: a trie of byte strings in Darts-clone's layout,
// whose values are offsets of zero-terminated strings. The library checks neither, so a damaged
// model would make it read out of bounds.
#pragma once

#include <string>
#include <string_view>

namespace lns {

// What is wrong with the tables of a model (the bytes of its file), or "" if nothing is.
std::string charsmap_fault(std::string_view model);

} // namespace lns
