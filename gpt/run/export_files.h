// What lies beside the weights of an exported model: the tokenizer, the settings of generation, and
// a model card.
#pragma once

#include "gpt/run/export.h"

#include <string>

namespace lns {

// Copies the tokenizer's files from one directory to another, as a tokenizer.json where that is
// possible. Returns their names, or "" if there are none.
std::string export_tokenizer(const std::string& from, const std::string& to);

// generation_config.json: that of the source, or else the special tokens of config.json (its text).
std::string generation_config(const std::string& from, const std::string& config_json);

// README.md. from: the checkpoint; parameters: their number; dtype: of the weights.
std::string model_card(const std::string& from, const std::string& name, const Config& config,
                       const ExportPlan& plan, int64_t parameters, const std::string& dtype);

} // namespace lns
