#include "gpt/data/regex.h"

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/base/terminal.h"
#include "gpt/data/unicode.h"

#ifdef LNS_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

namespace lns {

#ifdef LNS_PCRE2

namespace {

// PCRE2's \s adds U+180E; its \w and \h are other sets, too.
constexpr const char* white_space =
    R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr const char* word = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";

// From Oniguruma's Ruby syntax to PCRE2's.
std::string translated(const std::string& pattern, const std::string& where) {
    auto refuse = [&](const std::string& what) {
        fail(where, " has the regex ", quoted(pattern), ", whose ", what, " is not supported yet");
    };
    std::string out;
    bool in_class = false;
    size_t class_start = 0; // where its first member would stand
    for (size_t i = 0; i < pattern.size(); i++) {
        const char c = pattern[i];
        const char next = i + 1 < pattern.size() ? pattern[i + 1] : '\0';
        if (c == '\\') {
            auto set = [&](const std::string& members, const char* negated_member) {
                const bool negated = next >= 'A' && next <= 'Z';
                if (!in_class)
                    out += (negated ? "[^" : "[") + members + "]";
                else if (!negated)
                    out += members;
                else if (negated_member)
                    out += negated_member;
                else
                    refuse(cat("\\", next, " in brackets"));
            };
            i++;
            switch (next) {
            case 's':
            case 'S':
                set(white_space, R"(\P{White_Space})");
                break;
            case 'w':
            case 'W':
                set(word, nullptr);
                break;
            case 'd':
            case 'D':
                set(R"(\p{Nd})", R"(\P{Nd})");
                break;
            case 'h':
            case 'H':
                set("0-9a-fA-F", nullptr);
                break;
            case 'u':
                out += "\\x{" + pattern.substr(i + 1, 4) + "}";
                i += 4;
                break;
            default:
                out += c;
                if (next) out += next;
            }
        } else if (in_class) {
            if (c == '[' && next == ':') {
                const size_t end = pattern.find(":]", i + 2);
                if (end == pattern.npos) refuse("bracket");
                out += pattern.substr(i, end + 2 - i);
                i = end + 1;
                continue;
            }
            if (c == '[') refuse("brackets in brackets");
            if (c == '&' && next == '&') refuse("intersection &&");
            if (c == ']' && i > class_start) in_class = false;
            out += c;
        } else if (c == '[') {
            in_class = true;
            out += c;
            if (next == '^') out += next, i++;
            class_start = i + 1;
        } else if (c == '{') {
            // In Ruby's syntax x{1,3}+ is (x{1,3})+, not possessive.
            const size_t end = pattern.find('}', i);
            if (end != pattern.npos && end + 1 < pattern.size() && pattern[end + 1] == '+' &&
                next >= '0' && next <= '9') {
                const std::string least =
                    pattern.substr(i + 1, pattern.find_first_of(",}", i) - i - 1);
                if (least != "0" && least != "1")
                    refuse("repetition " + pattern.substr(i, end + 2 - i));
                out += least == "0" ? "*" : "+";
                i = end + 1;
            } else {
                out += c;
            }
        } else {
            out += c;
        }
    }
    return out;
}

// Of this thread.
struct Scratch {
    pcre2_match_data* match = pcre2_match_data_create(1, nullptr);
    pcre2_match_context* context = pcre2_match_context_create(nullptr);
    pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);
    Scratch() { pcre2_jit_stack_assign(context, nullptr, stack); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        pcre2_match_data_free(match);
        pcre2_match_context_free(context);
        pcre2_jit_stack_free(stack);
    }
};

std::string message_of(int error) {
    PCRE2_UCHAR message[256] = "";
    pcre2_get_error_message(error, message, sizeof message);
    return reinterpret_cast<const char*>(message);
}

} // namespace

Regex::Regex(const std::string& pattern, const std::string& where)
    : pattern(pattern), where(where) {
    const std::string text = translated(pattern, where);
    std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
        pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int error;
    PCRE2_SIZE at;
    code.reset(pcre2_compile(PCRE2_SPTR(text.data()), text.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &at, context.get()),
               pcre2_code_free);
    if (!code)
        fail(where, " has the regex ", quoted(pattern),
             ", which PCRE2 refuses: ", message_of(error), ", at byte ", at, " of ", quoted(text));
    compiled = pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE) == 0;
}

bool Regex::find(std::string_view text, size_t from, Match& match) const {
    static thread_local Scratch scratch;
    int groups = PCRE2_ERROR_JIT_STACKLIMIT;
    if (compiled)
        groups = pcre2_jit_match(code.get(), PCRE2_SPTR(text.data()), text.size(), from, 0,
                                 scratch.match, scratch.context);
    if (groups == PCRE2_ERROR_JIT_STACKLIMIT)
        groups = pcre2_match(code.get(), PCRE2_SPTR(text.data()), text.size(), from,
                             PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch.match, scratch.context);
    if (groups == PCRE2_ERROR_NOMATCH) return false;
    if (groups < 0)
        fail("the regex ", quoted(pattern), " of ", where,
             " cannot be matched: ", message_of(groups));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.match);
    match = {range[0], range[1]};
    if (match.begin > match.end || match.begin < from)
        fail("the regex ", quoted(pattern), " of ", where,
             " matches text that ends before it begins (\\K in a lookaround)");
    return true;
}

#else

Regex::Regex(const std::string&, const std::string& where) {
    fail(where, " needs PCRE2, but this build has none. Install libpcre2-dev (or run `make deps`) "
                "and rebuild");
}
bool Regex::find(std::string_view, size_t, Match&) const { return false; }

#endif

Regex Regex::literal(std::string_view text, const std::string& where) {
    std::string pattern;
    for (char c : text) {
        const bool plain = c < 0 || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') ||
                           (c >= 'a' && c <= 'z') || c == ' ' || c == '\n';
        if (c == '\0')
            pattern += "\\x{0}";
        else
            pattern += plain ? std::string(1, c) : std::string{'\\', c};
    }
    return Regex(pattern, where);
}

Regex::Subject::Subject(std::string_view text) : text(text) {
    if (is_utf8(text)) return;
    copy = without_invalid_bytes(text);
    this->text = copy;
}

size_t Regex::next_character(std::string_view text, size_t at) {
    return at < text.size() ? at + character_at(text, at).length : at + 1;
}

} // namespace lns
