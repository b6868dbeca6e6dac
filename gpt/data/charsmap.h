// The table by which a SentencePiece model normalizes text: a trie of byte strings, as Darts-clone
// lays it out, whose values are places among strings that end with a 0. The library follows both
// unchecked, so a damaged model would read beyond them.
#pragma once

#include <string>
#include <string_view>

namespace lns {

// What is wrong with the tables of a model (the bytes of its file), or "".
std::string charsmap_fault(std::string_view model);

} // namespace lns
