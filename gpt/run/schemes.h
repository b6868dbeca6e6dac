// `train_gpt schemes`: the norm schemes, for readers and for programs.
#pragma once

#include <string>

namespace lns {

// format: "table" for a terminal; "markdown", as the README has it; "names", a name per line; or
// "json", with each scheme's ingredients in a model of L layers.
std::string describe_schemes(const std::string& format, int L);

} // namespace lns
