// The tokenizers of Hugging Face's tokenizer.json, as `tokenizers` runs them: added tokens,
// normalizer, pre-tokenizer, model, post-processor, decoder. GPT-2's pair of files is one of them.
#pragma once

#include "gpt/data/tokenizer.h"
#include "gpt/data/tokenizer_files.h"

namespace lns {

// path: a tokenizer.json, or a folder with one or with GPT-2's vocab.json and merges.txt.
std::unique_ptr<Tokenizer> load_json_tokenizer(const std::string& path);
// From the content of a tokenizer.json.
std::unique_ptr<Tokenizer> make_json_tokenizer(const nlohmann::json& document,
                                               const std::string& path);

// The post-processor of a tokenizer.json that puts these tokens before and after a text; "": none.
nlohmann::json template_json(const nlohmann::json& document, const std::string& before,
                             const std::string& after);

// The tokenizer.json of a byte-level BPE: vocab and merges are its model's, use_regex splits by
// GPT-2's rule.
nlohmann::json byte_level_json(nlohmann::json vocab, nlohmann::json merges,
                               const std::vector<AddedToken>& added, bool add_prefix_space,
                               bool use_regex);

} // namespace lns
