// The pre-tokenizers of Hugging Face's tokenizer.json: they split a text into words, which the
// model encodes independently.
#pragma once

#include "gpt/data/gpt_split.h"
#include "gpt/data/regex.h"

#include <nlohmann/json.hpp>

#include <functional>
#include <optional>
#include <vector>

namespace lns {

// Thread-safe.
class PreTokenizer {
  public:
    // From the field "pre_tokenizer" of the file at path. Throws for types that are not supported.
    PreTokenizer(const nlohmann::json& spec, const std::string& path);

    using Word = std::function<void(std::string_view)>;
    // Calls `word` for each word of a part of a text. Words of a byte-level tokenizer are bytes,
    // not the characters that stand for them. at_start: the part is the text's first. continues: it
    // continues an earlier part, so that no space is put before it.
    void operator()(std::string_view part, bool at_start, bool continues, const Word& word) const;

    bool byte_level = false;
    std::optional<bool> add_prefix_space; // ByteLevel's; nullopt if there is none
    // The rule, if it does all of the splitting.
    const GptSplit* only_rule() const;

  private:
    enum Behavior { isolated, removed, contiguous, merged_with_previous, merged_with_next };
    enum Prepend { always, first, never };
    struct Step {
        // space: puts a space before the text; names: bytes become the characters for them
        enum Kind { split, metaspace, space, rule, names } kind;
        // split
        std::optional<Regex> regex = {};
        Behavior behavior = isolated;
        bool invert = false, digits = false;
        // metaspace
        std::string mark = {};
        Prepend prepend = never;
        bool words = false;
        // rule
        std::optional<GptSplit> gpt = {};
    };
    struct Position {
        bool at_start, continues;
    };
    std::vector<Step> steps;
    bool names = false; // words end as names of bytes

    void add(const nlohmann::json& spec, const std::string& path);
    void run(size_t k, std::string_view text, Position position, const Word& word) const;
    template <class Next>
    static void fold(const Step& step, std::string_view text, const Next& next);
};

// GPT-2's files represent a byte by a printable character: itself if printable in Latin-1, else
// U+0100 and up, in order (bytes_to_unicode in openai/gpt-2, src/encoder.py).
std::string byte_name(unsigned char byte);
// The bytes that the characters of the name represent; false if one represents none.
bool bytes_of_name(std::string_view name, std::string& bytes);

} // namespace lns
