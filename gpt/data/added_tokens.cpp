#include "gpt/data/added_tokens.h"

#include "gpt/data/regex.h"
#include "gpt/data/unicode.h"

namespace lns {

namespace {

bool matches(const Regex& regex, std::string_view text) {
    bool found = false;
    regex.each_match(text, [&](size_t, size_t) { found = true; });
    return found;
}

// Whether a letter, digit or the like stands before and after text[begin, end).
bool beside_word(std::string_view text, size_t begin, size_t end) {
    static const Regex word(std::string("\\A[") + rust_word + "]\\z", "single_word");
    size_t before = begin;
    while (before > 0 && begin - before < 4 && (text[--before] & 0xc0) == 0x80) {
    }
    if (before < begin && matches(word, text.substr(before, begin - before))) return true;
    return end < text.size() && matches(word, text.substr(end, character_at(text, end).length));
}

} // namespace

AddedTokens::AddedTokens(const std::vector<AddedToken>& tokens) : tokens(tokens) {
    std::vector<std::pair<std::string, int>> entries;
    for (const AddedToken& token : tokens) {
        entries.emplace_back(token.content, int(entries.size()));
        only_special &= token.special;
    }
    trie = Trie(std::move(entries));
}

void AddedTokens::split(std::string_view text, bool specials, const Part& part) const {
    size_t done = 0;
    for (size_t i = 0; !trie.empty() && (specials || !only_special) && i < text.size();) {
        size_t length = 0;
        const AddedToken* token = nullptr;
        if (trie.starts_with(text[i]))
            trie.each_prefix(text.substr(i), [&](size_t n, int index) {
                length = n;
                token = &tokens[size_t(index)];
            });
        if (!token) {
            i++;
            continue;
        }
        size_t begin = i, end = i + length;
        i = end;
        if ((token->special && !specials) || (token->single_word && beside_word(text, begin, end)))
            continue;
        if (token->lstrip) begin -= trailing_space(text.substr(done, begin - done));
        if (token->rstrip) end += leading_space(text.substr(end));
        if (done < begin) part(text.substr(done, begin - done), -1);
        part(text.substr(begin, end - begin), token->id);
        done = end;
        i = std::max(i, end);
    }
    if (done < text.size()) part(text.substr(done), -1);
}

} // namespace lns
