// train_gpt export: a model as a Hugging Face directory, for tools that know nothing of this one.
//
// What folds exactly into the stock (Pre-LN) model of an architecture, and what does not:
//   lns          s · (w ⊙ n + b) = (s w) ⊙ n + (s b): into the norm's weight and bias. A norm
//                without a weight (OLMo): into the matrices behind it, W (s n) = (s W) n.
//   lns-init     is stock already: only its start differs. So does +scaled-init.
//   layerscale,  γ ⊙ (W a + b) = (γ ⊙ W) a + γ ⊙ b, row by row: into the matrix and the bias that
//   skipinit     end the branch.
//   mix:0        is pre.
//   +gpas        does not. With A_k the product of the factors 1 − silu(g) up to junction k, the
//                stream r_k is A_k ρ_k where ρ_k is a Pre-LN stream whose branches are divided by
//                A_{k−1}; but norm(A ρ) is ρ / √(mean ρ² + eps / A²): each norm would need an eps
//                of its own, and the stock models have one.
//   post, deepnorm, mix, sandwich, peri, olmo2 (but in the OLMo 2 architecture): norms where the
//                stock models have none. A norm is not linear: nothing takes it in.
// What does not fold is written as it is, to the bit, under a model_type of its own.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "gpt/model/config.h"
#include "gpt/model/params.h"
#include "gpt/run/options.h"

namespace lns {

// What an exported parameter is: the model's own times `scale` and, if gamma is not null, each row
// r (of a vector: element r) times gamma[r], or gamma[0] if that is one number.
struct Fold {
    double scale = 1;
    const Param* gamma = nullptr;
};

struct ExportPlan {
    Config config;                     // of what is written
    std::string beyond;                // beyond_stock(config): "" if stock tools compute it
    std::map<std::string, Fold> folds; // of the parameters that change, by their names
};

// The stock form if there is one, else the model itself. `registry` is the model's, and has to
// outlive the plan.
ExportPlan plan_export(const Config& config, const Registry& registry);

// float16, to nearest, halves to even; beyond its range (from 65520 on) an infinity.
uint16_t round_to_half(float x);

int export_model(const Options& options);

} // namespace lns
