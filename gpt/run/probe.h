// Layer diagnostics: measurements of what each layer does, for every scheme, architecture and
// device, through Model's layer-by-layer interface.
//
// r_0 is the input of the first layer, r_ℓ the output of layer ℓ = 1 … L: the residual stream (B·T,
// C) after the out-norm, if any, and before the next in-norm. Losses, means and variances are over
// the N tokens that have a target; losses are −log p(target) in nats. Clears gradients.
//
//   variance    Var(r_ℓ) over tokens and channels, ℓ = 0 … L (L + 1), and Var(b) of the outputs b
//               of attention and MLP before their junctions (L each). Two least-squares lines over
//               ℓ = 1 … L: log Var(r_ℓ) = a + rate·ℓ, exponential growth, and log Var(r_ℓ) = a +
//               exponent·log ℓ, a power law; R² tells which fits better (Theorem 3.3 of arXiv
//               2502.05795).
//   gradients   ‖∂loss/∂r_ℓ‖₂ over all N tokens (L + 1), and the gradient norms of layer ℓ's
//               parameters (L each): attention (q, k, v, out, and norms on q and k), MLP, and the
//               rest (norms, γ, gates). As the loss is a mean, the former shrinks as 1/√N.
//   angular     d(r_ℓ, r_{ℓ+n}) = arccos(cos(r_ℓ, r_{ℓ+n}))/π, from 0 (same direction) to 1: rows
//               n = 1 … L of ℓ = 0 … L − n. On the last token of each sequence (Gromov et al.,
//               arXiv 2403.17887; both versions of the code of arXiv 2502.05795), and averaged over
//               all tokens (not in these papers).
//   removal     the loss without layers ℓ … ℓ+n−1: rows n = 1 … L of ℓ = 1 … L − n + 1. A layer is
//               removed with its junctions: the input of layer ℓ+n is r_{ℓ−1}. The cost of removal
//               is the increase over the full model's loss (ΔP of arXiv 2502.05795).
//   The same for benchmarks: the change of accuracy without layer ℓ (L), beside the whole model's
//               (figure 1 of arXiv 2502.05795). The standard error is that of the mean difference
//               between the two answers to each question.
//   jacobian    Of J = ∂r_ℓ[t]/∂r_{ℓ−1}[t] (C, C), at fixed earlier tokens: ‖J − I‖_F/√C and
//               ‖J‖_F/√C (L each), as root mean squares over sampled tokens. For a vector v of
//               random signs, E‖vᵀ(J − I)‖² = ‖J − I‖_F² (Hutchinson), and vᵀJ takes one backward
//               pass; every sequence of a batch gives one sample. The standard error, by the delta
//               method, includes the variation over both tokens and v. For C ≤ 256 also J itself of
//               one layer, at the last token of the first sequence. As in training, GPAS's gate
//               passes no gradient (stop()).
//   usefulness  the loss with layer ℓ replaced by its best linear fit r_ℓ ≈ r_{ℓ−1} A + c (L):
//               least squares in double on separate tokens, with a ridge of 1e-6 · trace/C towards
//               A = I; and the share of layers whose replacement costs more than 10% of the loss.
//   permutation the loss with layers ℓ and ℓ+1 swapped, including their norms and scales,
//               ℓ = 1 … L − 1 (usefulness and permutation: arXiv 2603.15389).
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gpt/data/loader.h"
#include "gpt/model/model.h"
#include "gpt/run/task_results.h"

namespace lns {

// B sequences of T tokens; a target of −1 is ignored.
struct ProbeBatch {
    int B = 0, T = 0;
    std::vector<int> inputs, targets; // (B, T)
};

struct ProbeSelection {
    bool variance = false, gradients = false, angular = false, removal = false, jacobian = false,
         usefulness = false, permutation = false;
    bool all = false; // "all": skip what the data is too small for, with a note
};

// What a model must be made for, so that these can be measured.
Purpose purpose_of(const ProbeSelection& probes);

// Parses "variance,removal" or "all". Throws for an unknown name, suggesting similar ones.
ProbeSelection parse_probes(const std::string& text);

using PerLayer = std::vector<double>;
using Rows = std::vector<PerLayer>;

// The least-squares line y = a + slope · x. The slope is NaN for fewer than two distinct x, R² also
// if all y are equal.
struct LineFit {
    double slope, r2;
};
LineFit fit_line(const std::vector<double>& x, const std::vector<double>& y);

struct LayerDiagnostics {
    int layers = 0, width = 0; // L, C
    int64_t tokens = 0;        // N
    double loss = 0;           // of the full model

    struct Variance {
        PerLayer residual, attention, mlp;
        LineFit power, exponential;
    };
    struct GradientNorm {
        PerLayer residual, attention, mlp, norm;
    };
    struct AngularDistance {
        Rows last_token, all_tokens;
    };
    struct Jacobian {
        PerLayer deviation, deviation_error, norm, norm_error;
        int64_t probes = 0; // (token, v) samples
        int full_layer = 0; // the matrix's layer; 0: no matrix
        Rows matrix;        // (C, C): [i][j] = ∂r_ℓ[t, i]/∂r_{ℓ−1}[t, j]
    };
    struct Usefulness {
        PerLayer linear_loss;
        double share = 0;
        int64_t fit_tokens = 0;
    };
    std::optional<Variance> variance;
    std::optional<GradientNorm> gradient_norm;
    std::optional<AngularDistance> angular_distance;
    std::optional<Rows> removal;
    struct TaskRemoval {
        std::string task;  // or group
        bool part = false; // of a group that is here, too
        int64_t questions = 0;
        double accuracy = 0; // of the whole model
        PerLayer change, error;
    };
    std::vector<TaskRemoval> task_removal;
    std::optional<Jacobian> jacobian;
    std::optional<Usefulness> usefulness;
    std::optional<PerLayer> permutation;
    std::vector<std::string> notes; // what was skipped, and why
};

struct ProbeSettings {
    ProbeSelection probes;
    int reach = 0;                                // the largest n of angular; 0: L
    int64_t jacobian_samples = 128;               // a minimum
    int jacobian_layer = 0;                       // the layer whose matrix is kept; 0: none
    uint64_t seed = 0;                            // for sampling tokens and v
    std::function<void(const std::string&)> tell; // reports progress; may be null
};

// Requires a model made for purpose_of(settings.probes), without --recompute, and for batches of
// this size. usefulness fits on fit_batches. Throws if the loss is not finite.
LayerDiagnostics measure(Model& model, const std::vector<ProbeBatch>& batches,
                         const std::vector<ProbeBatch>& fit_batches, const ProbeSettings& settings);

// For each task and group of the work. Requires a model of Purpose::layers for batches of
// work.rows.
std::vector<LayerDiagnostics::TaskRemoval>
measure_task_removal(Model& model, const TaskWork& work,
                     const std::function<void(const std::string&)>& tell = {});

// The number of whole windows of T tokens in `tokens`, at least 1.
uint64_t probe_windows(int64_t tokens, int T);

// Reads windows `first` to first + n in batches of B. Moves the loader's position.
std::vector<ProbeBatch> read_batches(Loader& loader, int T, int B, uint64_t first, uint64_t n);

// The contents of probe.json: one object per measurement; those not taken are null, or absent if
// `sparse`.
nlohmann::ordered_json to_json(const LayerDiagnostics& probes, bool sparse = false);

// Tables with one row per layer.
std::string describe(const LayerDiagnostics& probes);

} // namespace lns
