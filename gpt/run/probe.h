// Layer diagnostics: measurements of each layer, through Model's layer-by-layer interface, on any
// device, for every scheme and architecture.
//
// r_0 is the input of the first layer and r_ℓ the output of layer ℓ = 1 … L, the residual stream
// (B·T, C) after the out-norm, if there is one, and before the next in-norm. Losses are means of
// −log p(target), natural logarithm, over the N tokens that have a target; so are other means and
// variances. Probes leave the gradients as they were.
//
//   variance    Var(r_ℓ) over tokens and channels, ℓ = 0 … L (L + 1), and Var(b) of each
//               attention's and MLP's output b before its junction (L each). Two straight lines by
//               least squares over ℓ = 1 … L: log Var(r_ℓ) = a + rate·ℓ, exponential growth, and
//               log Var(r_ℓ) = a + exponent·log ℓ, a power; R² says which describes it (Theorem 3.3
//               of arXiv 2502.05795).
//   gradients   ‖∂loss/∂r_ℓ‖₂ over all N tokens (L + 1), and the norm of the gradients of layer
//               ℓ's parameters (L each): of attention (q, k, v, out, and norms on q and k), of the
//               MLP, and of all else: norms, γ, gates. With loss the mean, the former shrinks as
//               1/√N.
//   angular     d(r_ℓ, r_{ℓ+n}) = arccos(cos(r_ℓ, r_{ℓ+n}))/π, from 0 (same direction) to 1: rows
//               n = 1 … L of ℓ = 0 … L − n. On the last token of each sequence (Gromov et al.,
//               arXiv 2403.17887; both versions of the code of arXiv 2502.05795), and the mean over
//               all tokens, which is ours.
//   removal     the loss without layers ℓ … ℓ+n−1: rows n = 1 … L of ℓ = 1 … L − n + 1. A layer is
//               removed with its junctions: layer ℓ+n reads r_{ℓ−1}. The difference to the loss of
//               the whole model is ΔP of arXiv 2502.05795.
//   jacobian    of J = ∂r_ℓ[t]/∂r_{ℓ−1}[t], a token's stream after layer ℓ by its own before it
//               (C, C), the tokens before t held fixed: ‖J − I‖_F/√C and ‖J‖_F/√C (L each), each
//               the root of the mean square over sampled tokens. For v of random signs,
//               E‖vᵀ(J − I)‖² = ‖J − I‖_F² (Hutchinson), and vᵀJ is one backward pass; every
//               sequence of a batch gives one sample. Its standard error is that of the mean, by
//               the delta method: spread of tokens and of v together. For C ≤ 256 also J itself of
//               one layer, at the last token of the first sequence. As in training, stop() of
//               GPAS passes no gradient.
//   usefulness  the loss with layer ℓ replaced by its best linear fit r_ℓ ≈ r_{ℓ−1} A + c (L):
//               least squares in double on other tokens, with a ridge of 1e-6 · trace/C towards
//               A = I; and the share of layers for which that costs more than 10% of the loss.
//   permutation the loss with layers ℓ and ℓ+1 swapped, with their norms and scales, ℓ = 1 … L − 1
//               (usefulness and permutation: arXiv 2603.15389).
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gpt/data/loader.h"
#include "gpt/model/model.h"

namespace lns {

// B sequences of T tokens; a target of −1 is ignored.
struct ProbeBatch {
    int B = 0, T = 0;
    std::vector<int> inputs, targets; // (B, T)
};

struct ProbeSelection {
    bool variance = false, gradients = false, angular = false, removal = false, jacobian = false,
         usefulness = false, permutation = false;
    bool all = false; // probes that need more data are left out, with a note
};

// "variance,removal", or "all". Throws for an unknown name, and suggests similar ones.
ProbeSelection parse_probes(const std::string& text);

using PerLayer = std::vector<double>;
using Rows = std::vector<PerLayer>;

// The least-squares line y = a + slope · x. NaN if undefined: fewer than two points, or for R²
// equal y.
struct LineFit {
    double slope, r2;
};
LineFit fit_line(const std::vector<double>& x, const std::vector<double>& y);

struct Probes {
    int layers = 0, width = 0; // L, C
    int64_t tokens = 0;        // N
    double loss = 0;           // of the whole model

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
        int64_t probes = 0; // pairs of a token and a v
        int full_layer = 0; // 0: no matrix
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
    std::optional<Jacobian> jacobian;
    std::optional<Usefulness> usefulness;
    std::optional<PerLayer> permutation;
    std::vector<std::string> notes; // probes that were left out, and why
};

struct ProbeSettings {
    ProbeSelection probes;
    int reach = 0;                                // of angular: the largest n; 0: L
    int64_t jacobian_samples = 128;               // at least
    int jacobian_layer = 0;                       // whose matrix to write; 0: none
    uint64_t seed = 0;                            // of the sampled tokens and v
    std::function<void(const std::string&)> tell; // reports progress, unless null
};

// The model must be made for training, without --recompute, for batches of this size. Usefulness
// fits on `others`. Throws if the loss is not finite.
Probes measure(Model& model, const std::vector<ProbeBatch>& batches,
               const std::vector<ProbeBatch>& others, const ProbeSettings& settings);

// Whole windows of T tokens with at most this many tokens, but at least one window.
uint64_t probe_windows(int64_t tokens, int T);

// Windows `first` to first + n of a loader, B at a time. Leaves the loader anywhere.
std::vector<ProbeBatch> read_batches(Loader& loader, int T, int B, uint64_t first, uint64_t n);

// The contents of probe.json: an object per probe; null, or nothing if `sparse`, if not measured.
nlohmann::ordered_json to_json(const Probes& probes, bool sparse = false);

// A table, one line per layer.
std::string describe(const Probes& probes);

} // namespace lns
