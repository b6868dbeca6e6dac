// UTF-8, and the operations of Unicode that tokenizers need. Invalid bytes are kept as they are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

struct Character {
    uint32_t code; // invalid: no valid character starts here, length is 1
    uint32_t length;
    static constexpr uint32_t invalid = 0xffffffff;
};

// The character at text[i], i < text.size(), by Unicode's table 3-7: no overlong forms, no
// surrogates.
Character character_at(std::string_view text, size_t i);
void append_utf8(std::string& out, uint32_t code);
std::string utf8(uint32_t code);

// Whether it has the property White_Space.
bool is_white_space(uint32_t code);
// The lengths of the white space at the start and at the end.
size_t leading_space(std::string_view text);
size_t trailing_space(std::string_view text);

// The text with each byte that belongs to no character replaced by DEL, so that offsets are kept.
std::string without_invalid_bytes(std::string_view text);

enum class CharacterClass : unsigned char { other, letter, number, space };
// The class of each character: \p{L}, \p{N}, White_Space, or none of them. By utf8proc, or PCRE2,
// whichever there is; throws if there is neither.
const std::vector<CharacterClass>& character_classes();

// These need utf8proc: without it, unicode_unavailable() says what to install, and they return
// their argument. Otherwise it is nullptr.
const char* unicode_unavailable();
enum class NormalForm { nfc, nfd, nfkc, nfkd };
std::string normal_form(std::string_view text, NormalForm form);
// Character by character, as Rust's char::to_lowercase.
std::string lower_case(std::string_view text);
// The length of the first grapheme cluster of valid text. 0 if it is empty.
size_t grapheme_length(std::string_view text);

// As Python's str does it.

// The characters; each byte that belongs to none is one.
std::vector<std::string_view> characters(std::string_view text);
// Without the characters of `set`, or white space if that is empty, at the left and right ends.
std::string_view stripped(std::string_view text, bool left = true, bool right = true,
                          std::string_view set = "");
// With each `from`, which must not be empty, replaced by `to`.
std::string replaced(std::string_view text, std::string_view from, std::string_view to);

} // namespace lns
