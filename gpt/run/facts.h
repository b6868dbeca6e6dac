// What ranks compare before they train together (Ranks::compare).
#pragma once

#include <cstdint>
#include <string>

#include "gpt/base/ranks.h"
#include "gpt/data/loader.h"
#include "gpt/model/config.h"
#include "gpt/model/model.h"

namespace lns {

// Each field of the model's config.json.
Facts config_facts(const Config& config);

// What the data says of itself, its windows, its tokenizer, and tokens from all parts of it. what:
// "training" or "validation".
Facts data_facts(const std::string& what, TokenSource& source, const Loader& loader);

std::pair<std::string, std::string> fingerprint_fact(const std::string& what, uint64_t number);

// A number made of all bits of a model's parameters or moments.
uint64_t fingerprint(Model& model, Buffer buffer);

} // namespace lns
