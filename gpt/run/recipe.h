// The flags of a new run that are not given: those of its recipe, else tiny's own.
#pragma once

#include "gpt/run/options.h"

namespace lns {

void apply_recipe(Options& options);

} // namespace lns
