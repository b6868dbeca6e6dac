// The regular expressions of Hugging Face's tokenizers, which are in Oniguruma's syntax, by PCRE2.
#pragma once

#include <memory>
#include <string>
#include <string_view>

struct pcre2_real_code_8;

namespace lns {

// Members of a bracket: the characters of words in Rust's regexes.
constexpr const char* rust_word = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d})";

// Thread-safe.
class Regex {
  public:
    // Throws an Error that begins with `where` (the file's name) if PCRE2 refuses the pattern, or
    // if it would mean something else there.
    Regex(const std::string& pattern, const std::string& where);
    // The pattern that matches this text.
    static Regex literal(std::string_view text, const std::string& where);

    struct Match {
        size_t begin, end;
    };
    // Calls found(begin, end) for each match in the text, from left to right, as Oniguruma's
    // find_iter: an empty match directly behind another is skipped. Bytes that are not UTF-8 count
    // as DEL.
    template <class Found> void each_match(std::string_view text, const Found& found) const {
        const Subject subject(text);
        size_t at = 0, last = std::string_view::npos; // end of the last match
        Match match;
        while (at <= text.size() && find(subject.text, at, match)) {
            if (match.begin == match.end && match.end == last) {
                at = next_character(subject.text, at);
                continue;
            }
            found(match.begin, match.end);
            at = last = match.end;
        }
    }

    // The text with each match replaced by `with`.
    std::string replaced(std::string_view text, std::string_view with) const {
        std::string out;
        size_t at = 0;
        each_match(text, [&](size_t begin, size_t end) {
            out += text.substr(at, begin - at);
            out += with;
            at = end;
        });
        out += text.substr(at);
        return out;
    }

  private:
    // The text, or a valid copy.
    struct Subject {
        std::string copy;
        std::string_view text;
        explicit Subject(std::string_view text);
    };
    bool find(std::string_view text, size_t from, Match& match) const;
    static size_t next_character(std::string_view text, size_t at);

    std::string pattern, where;
    std::shared_ptr<pcre2_real_code_8> code;
    bool compiled = false; // to machine code
};

} // namespace lns
