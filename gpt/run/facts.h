// Facts that must be equal on all ranks before they train together (Ranks::compare).
#pragma once

#include <cstdint>
#include <string>

#include "gpt/base/ranks.h"
#include "gpt/data/loader.h"
#include "gpt/model/config.h"
#include "gpt/model/model.h"

namespace lns {

// The fields of the model's config.json.
Facts config_facts(const Config& config);

// The data's description, number of windows, tokenizer, and a hash of tokens sampled throughout.
// what: "training" or "validation".
Facts data_facts(const std::string& what, TokenSource& source, const Loader& loader);

std::pair<std::string, std::string> fingerprint_fact(const std::string& what, uint64_t number);

// A hash of all bits of a model's parameters or moments.
uint64_t fingerprint(Model& model, Buffer buffer);

} // namespace lns
