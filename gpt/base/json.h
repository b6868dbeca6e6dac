// The one JSON parser: of configurations, states, logs, tokenizers and safetensors headers, all of
// which may come from elsewhere or be damaged.
#pragma once

#include <nlohmann/json.hpp>

#include <cstddef>
#include <string>
#include <string_view>

namespace lns {

constexpr int json_depth = 64; // arrays and objects within each other

// Throws a sentence that begins with `where` (the file's name) if the text is not JSON, nests more
// than json_depth deep, repeats a key within an object, or is longer than most_bytes.
nlohmann::json parse_json(std::string_view text, const std::string& where,
                          size_t most_bytes = size_t(256) << 20);
// The same, with the keys in their order.
nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& where,
                                          size_t most_bytes = size_t(256) << 20);

// A value as an error's sentence can quote it: compact, and cut after about 80 bytes.
std::string quoted(const nlohmann::json& value);

} // namespace lns
