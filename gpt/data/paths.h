// Paths as users write them: ~ for a home folder, and patterns for several files.
#pragma once

#include <string>
#include <vector>

namespace lns {

// Expands "~/x" and "~user/x"; other paths are unchanged. Throws if there is no such user.
std::string expand_home(const std::string& path);
// The same for --tokenizer: "~/x" and "gpt2:~/x".
std::string expand_home_in_tokenizer(const std::string& spec);

// A pattern that matches only this path: escapes its special characters.
std::string literal_pattern(const std::string& path);

// The files that match a shell pattern (* ? [ab] {a,b} ~), sorted. A file or folder of the literal
// name has precedence: in "d[1]/*.bin" d[1] is the folder d[1] if it exists. No match is an error.
std::vector<std::string> glob_paths(const std::string& pattern);
bool matches_any(const std::string& pattern);

} // namespace lns
