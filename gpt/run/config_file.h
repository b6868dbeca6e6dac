// The file of --config: flags as lines `long-name = value`.
//
//   # A comment has a line of its own, and begins with # or ;
//   steps = 2000
//   out = runs/lr=1e-3, wd=0.1     everything after the first = is the value
//   prompt = " Once"               one pair of quotes around it is removed
//   [optimizer]                    only groups lines
//   [sample]                       a command's name: flags of that command
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lns {

struct ConfigLine {
    int number = 0; // from 1
    std::string section, name, value;
};

// The lines that set something, in order. Throws a sentence that begins with `where`, the file's
// name, for any other syntax. Names and values are not checked.
std::vector<ConfigLine> parse_config_file(std::string_view text, const std::string& where);

// The same for a regular file of at most 1 MiB.
std::vector<ConfigLine> read_config_file(const std::string& path);

} // namespace lns
