// Admin's profile (arXiv 2004.08249): the first batch says how much each branch varies.
#pragma once

#include "gpt/base/ranks.h"
#include "gpt/model/model.h"

namespace lns {

// Sets ω of every sublayer, from one batch (B, T) of each rank. As in the paper's code
// (LiyuanLucasLiu/Transformer-Clinic, transformer_layer.py): with x the stream before sublayer k
// and f its branch, over all ranks' tokens and channels, ω of the first is 1, and ω of the next is
// √(Var(ω x) + Var(f)). Returns the last. Throws if the model does not run layer by layer.
double profile_omegas(Model& model, const int* inputs, int B, int T, const Ranks& ranks);

} // namespace lns
