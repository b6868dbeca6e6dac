// `train_gpt export`: writes a model as a Hugging Face directory for stock tools.
//
// Which schemes fold exactly into the stock (Pre-LN) model of an architecture:
//   lns          s · (w ⊙ n + b) = (s w) ⊙ n + (s b): into the norm's weight and bias. If the norm
//                has no weight (OLMo): into the next matrix, W (s n) = (s W) n.
//   lns-init     is stock: only its initialization differs. The same holds for +scaled-init.
//   layerscale,  γ ⊙ (W a + b) = (γ ⊙ W) a + γ ⊙ b, row by row: into the branch's last matrix and
//   skipinit     bias.
//   mix:0        equals pre.
//   +gpas        does not fold. Let A_k be the product of the factors 1 − silu(g) up to junction k.
//                The stream r_k is A_k ρ_k, where ρ_k is a Pre-LN stream whose branches are divided
//                by A_{k−1}; but norm(A ρ) is ρ / √(mean ρ² + eps / A²): each norm would need its
//                own eps, and stock models have a single one.
//   sandwich, peri, olmo2 (except in the OLMo 2 architecture) do not fold: their norms of branches
//                are nonlinear, where stock models have none.
//   lns:after…, completep, +prores: a constant factor of a branch folds like γ, and that of the
//                logits (completep) into the final norm's weight or, without one, into the head.
//   lns:before   does not fold: it changes each norm's eps.
//   Other schemes and additions do not fold: stock models do not norm v (hybrid) or mix it with
//                another layer's (+value-residual, of which layer 1 cannot be dropped), and have
//                neither norms on the stream, nor a second stream, ω or x₀.
// Other models are written unchanged, bit for bit, under a model_type of their own.
//
// Without some layers, as if each had been removed with its junctions (the `removal` of probe.h):
// those that remain keep the scales of their depth, which are folded into norms (lns+gpas becomes
// pre+gpas), and mix:k its k layers, if they remain. DeepNorm's scales belong to a number of layers
// and cannot be kept.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gpt/model/config.h"
#include "gpt/model/params.h"
#include "gpt/run/options.h"

namespace lns {

// An exported parameter is the model's times `scale` and, if gamma is not null, each row r (element
// r of a vector) times gamma[r], or times gamma[0] if gamma is a scalar.
struct Fold {
    double scale = 1;
    const Param* gamma = nullptr;
};

struct ExportPlan {
    Config config;                     // of the exported model
    std::string beyond;                // beyond_stock_model(config): "" if stock tools can run it
    std::map<std::string, Fold> folds; // by name in the model, of the parameters that change
    std::vector<int> layers;           // of the model, from 0: those that are exported
    const Registry* registry;          // of the model

    // The model's parameter that becomes the exported model's.
    const Param& source(const Param& exported) const;
};

// The stock form if there is one, else the model itself; without the layers in `dropped`, from 1.
// The model's `registry` must outlive the plan. Throws if a layer does not exist or is dropped
// twice, if none is left, or if the scheme cannot be kept.
ExportPlan plan_export(const Config& config, const Registry& registry,
                       const std::vector<int>& dropped = {});

// Rounds to float16, to nearest even; values from 65520 on become infinite.
uint16_t round_to_half(float x);

int export_model(const Options& options);

} // namespace lns
