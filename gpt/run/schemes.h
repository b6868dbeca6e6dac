// `train_gpt schemes`: the table of norm schemes, for a terminal or as the README has it.
#pragma once

#include <string>

namespace lns {

std::string describe_schemes(bool markdown);

} // namespace lns
