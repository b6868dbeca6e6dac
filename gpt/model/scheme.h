// The norm schemes: what happens where a sublayer's output meets the residual stream.
//
// A model of L layers has 2L sublayers (attention, MLP, attention, …) and 2L + 1 junctions:
// junction 0 follows the embedding and has no branch, junction k follows sublayer k, and the
// in-norm of junction 2L is the final norm before the head, in every scheme. With r the residual
// stream, b the output of sublayer k and u the input of sublayer k + 1, a junction computes for
// each token, a row of C numbers:
//
//     b ← norm_branch(b)
//     b ← γ ⊙ b                   LayerScale: a learned vector; SkipInit: a learned scalar
//     r ← skip · r + b
//     r ← norm_out(r)
//     r ← r − silu(g) · stop(r)   GPAS; before the sum where there is an out-norm. Each junction
//                                 has its own g; in GPAS's code the two of a layer share one
//     u ← scale · norm_in(r)      else u = r
//
// A scheme is a row of the table in scheme.cpp; the backends know only Junction.
#pragma once

#include <string>
#include <vector>

namespace lns {

enum class Layers { none, all, first_k, after_k };   // the layers ℓ that have a norm; k of mix:k
enum class Gamma { none, vector, scalar };           // a learned factor on the branch
enum class DepthScale { none, output, init_weight }; // what ℓ^(−power) multiplies at the in-norm

// As `train_gpt schemes --format json` has them, which dev/reference reads.
const char* name_of(Layers layers);
const char* name_of(Gamma gamma);
const char* name_of(DepthScale depth);

// One row. A function of L that is null stands for the constant 1; of init, for a plain normal.
struct SchemeRow {
    const char* name;
    Layers branch_norm = Layers::none, out_norm = Layers::none, in_norm = Layers::none;
    bool embed_norm = false;                // junction 0 has an out-norm
    double (*skip)(int L) = nullptr;        // factor of r
    DepthScale depth = DepthScale::none;    // LayerNorm Scaling
    Gamma gamma = Gamma::none;              // LayerScale, SkipInit
    double (*gamma_init)(int L) = nullptr;  // γ's initial value
    double (*xavier_gain)(int L) = nullptr; // V, O, MLP start Xavier-normal with this gain; Q and K
                                            // with 1
    const char* what;                       // for `train_gpt schemes` and the README
    const char* source;                     // the paper
};

const std::vector<SchemeRow>& scheme_table();
std::vector<std::string> scheme_names();

// A row with its options: "mix:4+gpas+scaled-init".
struct Scheme {
    const SchemeRow* row = nullptr;
    int mix_layers = -1;                  // k of mix:k; −1: L / 4
    bool gpas = false;                    // a gate per junction (arXiv 2506.22049)
    bool scaled_init = false;             // O and down projections start at std / √(2L), in every
                                          // layer (the LNS paper's code spares Post-LN layers)
    double lns_power = 0.5;               // p of ℓ^(−p)
    bool lns_attn = true, lns_mlp = true; // the sublayers whose in-norms are scaled

    std::string name() const;    // as parse_scheme reads it
    std::string sites() const;   // "attn,mlp", as --lns-sites has it
    std::string warning() const; // what a user of this combination should know, or ""
};

// What may follow any scheme's name: "+gpas".
struct SchemeAddition {
    const char* name;
    using Switch = bool Scheme::*; // nvcc would write parentheses of which g++ warns
    Switch enabled;
    const char *what, *source;
};
const std::vector<SchemeAddition>& scheme_additions();

// Throws for an unknown name, suggesting similar ones.
Scheme parse_scheme(const std::string& text);
// "attn", "mlp" or "attn,mlp", into lns_attn and lns_mlp.
void parse_sites(const std::string& text, Scheme& scheme);

// What junction k of a model of L layers does. Sublayer k (1 … 2L) belongs to layer ⌈k/2⌉.
struct Junction {
    bool branch = true; // false at junction 0: r is the embedding's output
    bool branch_norm = false, out_norm = false, in_norm = false;
    Gamma gamma = Gamma::none;
    bool gate = false;         // GPAS
    bool gate_on_skip = false; // before the sum instead of after it
    double skip = 1;
    double in_scale = 1;       // of the in-norm's whole output, bias included
    double in_weight_init = 1; // of the in-norm's weight

    bool operator==(const Junction&) const = default;

    // Whether the backward pass needs the sublayer's output. Where it does not, that output is
    // r − skip · r_prev, as layer diagnostics compute it.
    bool keeps_branch() const { return branch_norm || out_norm || gamma != Gamma::none || gate; }
};

Junction junction(const Scheme& scheme, int L, int k);

} // namespace lns
