#include "gpt/data/gpt_split.h"

#include <algorithm>

namespace lns {

using enum CharacterClass;

namespace {

bool ends_line(char c) { return c == '\n' || c == '\r'; }

} // namespace

GptSplit::GptSplit() : table(character_classes().data()) {}

bool GptSplit::choose(const std::string& regex) {
    const std::string begin = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})",
                      end = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
    for (const auto& [digits, most] : {std::pair("", 1), {"{1,2}", 2}, {"{1,3}", 3}})
        if (regex == begin + digits + end) {
            rule = gpt4;
            most_digits = size_t(most);
            return true;
        }
    return false;
}

CharacterClass GptSplit::at(std::string_view text, size_t i, size_t& length) const {
    const unsigned char byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80) {
        length = 1;
        return table[byte];
    }
    const Character c = character_at(text, i);
    length = c.length;
    return c.code == Character::invalid ? other : table[c.code];
}

size_t GptSplit::segment_end(std::string_view text, size_t i) const {
    if (digits == in_runs_with_spaces) return text.size();
    size_t length;
    const bool first = at(text, i, length) == number;
    for (i += length; i < text.size(); i += length)
        if ((at(text, i, length) == number) != first || (first && digits == each)) break;
    return i;
}

size_t GptSplit::next_piece(std::string_view text, size_t i) const {
    return rule == gpt2 ? next_piece_gpt2(text, i) : next_piece_gpt4(text, i);
}

size_t GptSplit::next_piece_gpt2(std::string_view text, size_t i) const {
    if (text[i] == '\'') {
        std::string_view rest = text.substr(i + 1, 2);
        char first = rest.empty() ? 0 : rest[0];
        if (first == 's' || first == 't' || first == 'm' || first == 'd') return i + 2;
        if (rest == "re" || rest == "ve" || rest == "ll") return i + 3;
    }
    size_t length, end = i;
    CharacterClass kind = at(text, i, length);
    if (text[i] == ' ' && i + 1 < text.size()) {
        size_t next_length;
        CharacterClass next = at(text, i + 1, next_length);
        if (next != space) kind = next, length = next_length, end++;
    }
    size_t last = end; // start of the run's last character
    while (true) {
        last = end;
        end += length;
        if (end == text.size()) return end;
        if (at(text, end, length) != kind) break;
    }
    // The last of several spaces belongs to the piece that follows.
    return kind == space && last > i ? last : end;
}

size_t GptSplit::run_end(std::string_view text, size_t i, CharacterClass kind) const {
    size_t length;
    while (i < text.size() && at(text, i, length) == kind) i += length;
    return i;
}

size_t GptSplit::next_piece_gpt4(std::string_view text, size_t i) const {
    if (text[i] == '\'') {
        const std::string_view rest = text.substr(i + 1, 2);
        auto lower = [&](size_t k) { return k < rest.size() ? char(rest[k] | 0x20) : '\0'; };
        const char a = lower(0), b = lower(1);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
            return i + 3;
        if (rest == "\u017f") return i + 3; // a long s is an s in another case
    }
    size_t length;
    const CharacterClass kind = at(text, i, length);
    if (kind == letter) return run_end(text, i + length, letter);
    if (kind == number) {
        size_t end = i + length;
        for (size_t n = 1; n < most_digits && end < text.size(); n++, end += length)
            if (at(text, end, length) != number) break;
        return end;
    }
    const size_t second = i + length;
    CharacterClass next = space;
    if (second < text.size()) next = at(text, second, length);
    if (next == letter && second < text.size() && !ends_line(text[i]))
        return run_end(text, second, letter);
    if (kind == other || (text[i] == ' ' && next == other && second < text.size())) {
        size_t end = run_end(text, second, other);
        while (end < text.size() && ends_line(text[end])) end++;
        return end;
    }
    // White space: up to its last line end; else all but the last, if anything follows.
    size_t last = i, line = i;
    size_t end = i;
    while (end < text.size() && at(text, end, length) == space) {
        last = end;
        if (ends_line(text[end])) line = end + 1;
        end += length;
    }
    if (line > i) return line;
    return end == text.size() || last == i ? end : last;
}

// A piece ends between two characters of different classes, unless the first is a space (which may
// begin the next piece), or a symbol before a letter (a contraction, or gpt4's prefix) or before
// gpt4's line ends. `digits` only adds ends.
size_t GptSplit::safe_cut(std::string_view text) const {
    for (size_t p = text.size(); p-- > 1;) {
        unsigned char byte = static_cast<unsigned char>(text[p]);
        if (byte >= 0x80 && byte < 0xc0) continue; // may be inside a character
        size_t length;
        CharacterClass next = at(text, p, length);
        if (byte >= 0xc0 && length == 1) continue; // following text may complete it
        CharacterClass previous = other;           // if no valid character ends at p
        for (size_t back = 1; back <= std::min<size_t>(p, 4); back++) {
            CharacterClass kind = at(text, p - back, length);
            bool continuation = (static_cast<unsigned char>(text[p - back]) & 0xc0) == 0x80;
            if (length == back && !continuation) previous = kind;
            if (!continuation) break;
        }
        if (previous == space || previous == next) continue;
        if (previous == other && (next == letter || (rule == gpt4 && next == space))) continue;
        return p;
    }
    return 0;
}

} // namespace lns
