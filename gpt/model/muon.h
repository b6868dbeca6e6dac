// Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), as both backends have it: a matrix
// moves by the orthogonal factor of its momentum. With A = X Xᵀ and X the momentum divided by its
// Frobenius norm, each quintic is X ← (a I + b A + c A²) X, which moves all singular values towards
// 1. Matrices with more rows than columns use A = Xᵀ X, from the right. As in the sources, X and A
// are bf16 if the model is.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "gpt/model/optimizer.h"

namespace lns {

struct Quintic {
    double a, b, c;
};
struct Quintics {
    double margin; // X starts at u / max(margin · ‖u‖, 1e-7)
    std::array<Quintic, 5> all;
};

inline Quintics quintics(Orthogonalization how) {
    if (how == Orthogonalization::newton_schulz) {
        const Quintic q = {3.4445, -4.7750, 2.0315}; // singular values end in 0.7 to 1.2
        return {1, {q, q, q, q, q}};
    }
    // Polar Express (arXiv 2505.16932, listing 1), with its safety factor of 1.01
    Quintics q = {1.01,
                  {{{8.28721201814563, -23.595886519098837, 17.300387312530933},
                    {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
                    {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
                    {3.3184196573706015, -2.488488024314874, 0.51004894012372},
                    {2.300652019954817, -1.6689039845747493, 0.4188073119525673}}}};
    for (Quintic& x : q.all)
        x.a /= q.margin, x.b /= std::pow(q.margin, 3), x.c /= std::pow(q.margin, 5);
    return q;
}

// The factor of the learning rate for a matrix (rows, columns). Moonlight's (arXiv 2502.16982)
// gives updates the usual size of AdamW's, so that both take the same learning rate.
inline double muon_scale(MuonScale scale, int64_t rows, int64_t columns) {
    if (scale == MuonScale::moonlight) return 0.2 * std::sqrt(double(std::max(rows, columns)));
    return std::sqrt(std::max(1.0, double(rows) / double(columns)));
}

// NorMuon (arXiv 2510.05491) divides each row of the orthogonal factor X (rows, columns) by the
// root of its second moment, then scales X to this Frobenius norm. With Moonlight's scale the
// update then has a root mean square of 0.2, as in the paper's algorithm 1; with Jordan's it keeps
// the norm of X, as in the paper's code. The momentum is Nesterov's, as in that code.
inline double normuon_norm(MuonScale scale, int64_t rows, int64_t columns, double norm) {
    return scale == MuonScale::moonlight ? std::sqrt(double(std::min(rows, columns))) : norm;
}
const double normuon_eps = 1e-10; // added to roots

} // namespace lns
