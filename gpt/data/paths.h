// Paths as users write them: ~ for a home folder, and patterns that name several files.
#pragma once

#include <string>
#include <vector>

namespace lns {

// "~/x" and "~user/x" with the home folder in full; every other path as it is. Throws where there
// is no such user.
std::string expand_home(const std::string& path);
// The same of a --tokenizer: "~/x" and "gpt2:~/x".
std::string expand_home_in_tokenizer(const std::string& spec);

// The pattern that matches this path and no other: for a path that was found and becomes part of
// a pattern.
std::string literal_pattern(const std::string& path);

// The files that a shell pattern (* ? [ab] {a,b} ~) names, sorted. What exists under the name
// itself comes first, also among the pattern's folders: in "d[1]/*.bin" d[1] is a folder of that
// name if there is one. No match is an error.
std::vector<std::string> glob_paths(const std::string& pattern);
// Whether there is any.
bool matches_any(const std::string& pattern);

} // namespace lns
