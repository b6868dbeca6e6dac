// The JSON parser, for configurations, states, logs, tokenizers and safetensors headers, any of
// which may be foreign or damaged.
#pragma once

#include <nlohmann/json.hpp>

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

namespace lns {

constexpr int json_depth = 64; // nested arrays and objects

// Throws an Error that begins with `where` (the file's name) if the text is not JSON, nests deeper
// than json_depth, repeats a key within an object, or is longer than max_bytes.
nlohmann::json parse_json(std::string_view text, const std::string& where,
                          size_t max_bytes = size_t(256) << 20);
// The same; keys keep their order.
nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& where,
                                          size_t max_bytes = size_t(256) << 20);

// JSON Lines: calls use(value, "FILE, line N") for each line that is not blank. Returns the number
// of lines.
int each_json_line(std::string_view text, const std::string& file,
                   const std::function<void(nlohmann::json, const std::string&)>& use);

// A value for an error message: compact, and cut after about 80 bytes.
std::string quoted(const nlohmann::json& value);

} // namespace lns
