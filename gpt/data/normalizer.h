// The normalizers of Hugging Face's tokenizer.json.
#pragma once

#include "gpt/data/charsmap.h"
#include "gpt/data/regex.h"
#include "gpt/data/unicode.h"

#include <nlohmann/json.hpp>

#include <optional>
#include <vector>

namespace lns {

// Thread-safe.
class Normalizer {
  public:
    // From the field "normalizer" of the file at path. Throws for types that are not supported.
    Normalizer(const nlohmann::json& spec, const std::string& path);
    bool empty() const { return steps.empty(); }
    // continues: the text continues another, so nothing is done to its start.
    std::string operator()(std::string_view text, bool continues = false) const;

  private:
    struct Step {
        enum Kind { prepend, replace, strip, form, lower, charsmap } kind;
        std::string content = {}; // prepend, replace
        std::string text = {};    // replace: what, if it is no regex
        std::optional<Regex> regex = {};
        bool left = false, right = false; // strip
        NormalForm normal_form = NormalForm::nfc;
        std::optional<Charsmap> map = {};
    };
    std::vector<Step> steps;
    std::string path;
    void add(const nlohmann::json& spec, const std::string& path);
};

} // namespace lns
