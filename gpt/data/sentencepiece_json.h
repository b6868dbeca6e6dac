// A SentencePiece model as Hugging Face's tokenizer.json.
#pragma once

#include <nlohmann/json.hpp>

#include <string_view>

namespace lns {

// model: the file's content. null if it is no BPE, or if tokenizer.json would not give the same
// tokens: for a table of normalizations, user-defined or unused pieces, pieces that are not UTF-8,
// and white space as a suffix.
nlohmann::json sentencepiece_as_json(std::string_view model);

} // namespace lns
