#include "gpt/data/unicode.h"

#include "gpt/data/regex.h"

#include <algorithm>

#ifdef LNS_UTF8PROC
#include <cstdlib>
#include <utf8proc.h>
#endif

namespace lns {

Character character_at(std::string_view text, size_t i) {
    auto byte = [&](size_t k) -> uint32_t {
        return k < text.size() ? static_cast<unsigned char>(text[k]) : 0;
    };
    const uint32_t lead = byte(i);
    if (lead < 0x80) return {lead, 1};
    const uint32_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4) return {Character::invalid, 1};
    uint32_t code = lead & (0xff >> (length + 1));
    for (uint32_t k = 1; k < length; k++) {
        if ((byte(i + k) & 0xc0) != 0x80) return {Character::invalid, 1};
        code = code << 6 | (byte(i + k) & 0x3f);
    }
    const bool overlong = code < (length == 3 ? 0x800u : length == 4 ? 0x10000u : 0x80u);
    if (overlong || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return {Character::invalid, 1};
    return {code, length};
}

void append_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += char(code);
    } else if (code < 0x800) {
        out += char(0xc0 | code >> 6);
        out += char(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        out += char(0xe0 | code >> 12);
        out += char(0x80 | (code >> 6 & 0x3f));
        out += char(0x80 | (code & 0x3f));
    } else {
        out += char(0xf0 | code >> 18);
        out += char(0x80 | (code >> 12 & 0x3f));
        out += char(0x80 | (code >> 6 & 0x3f));
        out += char(0x80 | (code & 0x3f));
    }
}

std::string utf8(uint32_t code) {
    std::string out;
    append_utf8(out, code);
    return out;
}

bool is_white_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

size_t leading_space(std::string_view text) {
    size_t i = 0;
    while (i < text.size()) {
        const Character c = character_at(text, i);
        if (!is_white_space(c.code)) break;
        i += c.length;
    }
    return i;
}

size_t trailing_space(std::string_view text) {
    size_t end = text.size();
    while (end > 0) {
        size_t start = end - 1;
        while (start > 0 && end - start < 4 && (text[start] & 0xc0) == 0x80) start--;
        const Character c = character_at(text.substr(0, end), start);
        if (start + c.length != end || !is_white_space(c.code)) break;
        end = start;
    }
    return text.size() - end;
}

std::string without_invalid_bytes(std::string_view text) {
    std::string out(text);
    for (size_t i = 0; i < text.size();) {
        const Character c = character_at(text, i);
        if (c.code == Character::invalid) out[i] = '\x7f';
        i += c.length;
    }
    return out;
}

namespace {

std::vector<CharacterClass> classify_unicode() {
    std::vector<CharacterClass> table(0x110000, CharacterClass::other);
#ifdef LNS_UTF8PROC
    for (uint32_t code = 0; code < 0x110000; code++) {
        const utf8proc_category_t category = utf8proc_category(utf8proc_int32_t(code));
        if (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO)
            table[code] = CharacterClass::letter;
        if (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO)
            table[code] = CharacterClass::number;
    }
#else
    std::string all;
    for (uint32_t code = 0; code < 0x110000; code++)
        if (code < 0xd800 || code >= 0xe000) append_utf8(all, code);
    for (const auto& [pattern, kind] :
         {std::pair("\\p{L}+", CharacterClass::letter), {"\\p{N}+", CharacterClass::number}})
        Regex(pattern, "the splitting of words").each_match(all, [&](size_t begin, size_t end) {
            while (begin < end) {
                const Character c = character_at(all, begin);
                table[c.code] = kind;
                begin += c.length;
            }
        });
#endif
    for (uint32_t code = 0; code < 0x3001; code++)
        if (is_white_space(code)) table[code] = CharacterClass::space;
    return table;
}

} // namespace

const std::vector<CharacterClass>& character_classes() {
    static const std::vector<CharacterClass> table = classify_unicode();
    return table;
}

#ifdef LNS_UTF8PROC

const char* unicode_unavailable() { return nullptr; }

namespace {

// Characters with a decomposition or a combining class that are newer than the tables of
// `tokenizers` 0.23 (Unicode 9), to which they are characters like any other.
constexpr uint32_t newer[][2] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
    {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0xece, 0xece},
    {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0x32ff, 0x32ff},
    {0xa7f2, 0xa7f4},   {0xa82c, 0xa82c},   {0xab69, 0xab69},   {0x10781, 0x10785},
    {0x10787, 0x107b0}, {0x107b2, 0x107ba}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac},
    {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070},
    {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11938, 0x11938},
    {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34},
    {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e030, 0x1e06d},
    {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef},
    {0x1e4ec, 0x1e4ef}, {0x1f16c, 0x1f16c}, {0x1fbf0, 0x1fbf9}};

bool is_newer(uint32_t code) {
    const auto* range = std::lower_bound(std::begin(newer), std::end(newer), code,
                                         [](auto& r, uint32_t c) { return r[1] < c; });
    return range != std::end(newer) && (*range)[0] <= code;
}

// Appends a run of valid characters in the form.
void append_normal_form(std::string& out, std::string_view run, NormalForm form) {
    int options = UTF8PROC_STABLE;
    options |=
        form == NormalForm::nfc || form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
    utf8proc_uint8_t* made = nullptr;
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(run.data()),
                     utf8proc_ssize_t(run.size()), &made, utf8proc_option_t(options));
    if (size >= 0)
        out.append(reinterpret_cast<const char*>(made), size_t(size));
    else
        out += run;
    std::free(made);
}

} // namespace

std::string normal_form(std::string_view text, NormalForm form) {
    std::string out;
    out.reserve(text.size());
    // ASCII characters are in every form, and no character before one depends on it.
    for (size_t i = 0, run; i < text.size(); i = run) {
        for (run = i; run < text.size() && text[run] >= 0;) run++;
        const size_t base = run - (run > i && run < text.size()); // may take an accent
        out.append(text, i, base - i);
        size_t end = run;
        while (end < text.size() && text[end] < 0) {
            const Character c = character_at(text, end);
            if (c.code == Character::invalid || is_newer(c.code)) break;
            end += c.length;
        }
        if (end > base) append_normal_form(out, text.substr(base, end - base), form);
        if (end < text.size() && text[end] < 0) { // kept as it is
            const uint32_t length = character_at(text, end).length;
            out.append(text, end, length);
            end += length;
        }
        run = end;
    }
    return out;
}

std::string lower_case(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
        const Character c = character_at(text, i);
        if (c.code < 0x80)
            out += char(c.code >= 'A' && c.code <= 'Z' ? c.code + 32 : c.code);
        else if (c.code == Character::invalid)
            out += text[i];
        else if (c.code == 0x130)
            out += "i\u0307";
        else
            append_utf8(out, uint32_t(utf8proc_tolower(utf8proc_int32_t(c.code))));
        i += c.length;
    }
    return out;
}

size_t grapheme_length(std::string_view text) {
    if (text.empty()) return 0;
    Character c = character_at(text, 0);
    size_t end = c.length;
    utf8proc_int32_t state = 0;
    while (end < text.size()) {
        const Character next = character_at(text, end);
        if (utf8proc_grapheme_break_stateful(utf8proc_int32_t(c.code), utf8proc_int32_t(next.code),
                                             &state))
            break;
        c = next;
        end += c.length;
    }
    return end;
}

#else

const char* unicode_unavailable() {
    return "this build has no utf8proc. Install libutf8proc-dev (or run `make deps`) and rebuild";
}
std::string normal_form(std::string_view text, NormalForm) { return std::string(text); }
std::string lower_case(std::string_view text) { return std::string(text); }
size_t grapheme_length(std::string_view text) {
    return text.empty() ? 0 : character_at(text, 0).length;
}

#endif

std::vector<std::string_view> characters(std::string_view text) {
    std::vector<std::string_view> all;
    for (size_t i = 0; i < text.size(); i += all.back().size())
        all.push_back(text.substr(i, character_at(text, i).length));
    return all;
}

std::string_view stripped(std::string_view text, bool left, bool right, std::string_view set) {
    const std::vector<std::string_view> chosen = characters(set);
    auto drops = [&](std::string_view character) {
        if (!set.empty()) return std::find(chosen.begin(), chosen.end(), character) != chosen.end();
        const uint32_t code = character_at(character, 0).code;
        return is_white_space(code) || (code >= 0x1c && code <= 0x1f); // as str.isspace
    };
    const std::vector<std::string_view> all = characters(text);
    for (auto c = all.begin(); left && c != all.end() && drops(*c); ++c)
        text.remove_prefix(c->size());
    for (auto c = all.rbegin(); right && !text.empty() && drops(*c); ++c)
        text.remove_suffix(c->size());
    return text;
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
    std::string out;
    for (size_t at = 0;;) {
        const size_t next = text.find(from, at);
        out += text.substr(at, next - at);
        if (next == text.npos) return out;
        out += to, at = next + from.size();
    }
}

} // namespace lns
