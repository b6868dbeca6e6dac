// The decoders of Hugging Face's tokenizer.json: from tokens to text.
#pragma once

#include "gpt/data/regex.h"

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <vector>

namespace lns {

// Thread-safe.
class Decoder {
  public:
    // From the field "decoder" of the file at path. Throws for types that are not supported.
    Decoder(const nlohmann::json& spec, const std::string& path);
    // The text of the tokens. Bytes that are no UTF-8 are kept, unlike in `tokenizers`.
    std::string operator()(std::vector<std::string> tokens) const;
    // Whether tokens name bytes and nothing else is done, so that their texts can be concatenated.
    bool only_bytes() const { return steps.size() == 1 && steps[0].kind == Step::byte_level; }

  private:
    struct Step {
        enum Kind { byte_level, byte_fallback, fuse, metaspace, replace, strip } kind;
        std::string text = {};           // metaspace: the mark; replace: with what; strip: of what
        std::optional<Regex> regex = {}; // replace
        size_t from_start = 0, from_end = 0; // strip: at most so many
        bool first = false;                  // metaspace: the first token's marks are dropped
    };
    std::vector<Step> steps;
    bool exists = false;
    void add(const nlohmann::json& spec, const std::string& path);
    static void apply(const Step& step, std::vector<std::string>& tokens);
};

} // namespace lns
