// The norm schemes: what happens where a sublayer's output meets the residual stream.
//
// A model of L layers has 2L sublayers (attention, MLP, attention, …) and 2L + 1 junctions:
// junction 0 follows the embedding and has no branch, junction k follows sublayer k, and junction
// 2L precedes the head. With r the residual stream, b the output of sublayer k and u the input of
// sublayer k + 1, a junction computes for each token, a row of C numbers:
//
//     b ← norm_branch(b)
//     b ← γ ⊙ b                   LayerScale: a learned vector; SkipInit: a learned scalar
//     r ← skip · r + β · b        Admin: ω ⊙ r, ω a learned vector
//     r ← norm_out(r)
//     r ← r − silu(g) · stop(r)   GPAS; before the sum where there is an out-norm
//     r ← a · r + λ · x₀          +x0, before each layer: x₀ is r after the embedding
//     u ← scale · norm_in(r)      else u = r
//
// Two schemes have a second stream y, which starts as the embedding and has no norm of its own:
//
//     y ← y + b
//     u ← scale · norm_in(r + norm_second(y))   where it is read
//
// Two schemes have another way of mixing in place of the sum (Mixing): r is what it gives, and
// nothing but norm_in follows. gpt/model/mixing.h has their equations.
//
// A scheme is a row of the table in scheme.cpp; the backends know only Junction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lns {

enum class Gamma { none, vector, scalar }; // a learned factor on the branch

// Where ℓ^(−power) multiplies.
enum class DepthScale {
    none,
    output,      // the in-norm's output
    init_weight, // the initial values of the in-norm's weight
    input,       // the in-norm's input, where only eps makes a difference
    branch,      // b, where it is added
    residual,    // the sum of r and b
};

// What precedes u ← scale · norm_in(r).
enum class Mixing {
    sum,     // all of the above
    streams, // r is a mixture of residual streams, among which b is distributed
    sources, // r is an average, by attention, of the embedding and all b so far
};

struct Scheme;

// Sublayer k, from 1, of a model of L layers under a scheme. 2L + 1 is the head.
struct Place {
    int k, L;
    const Scheme& scheme;

    int layer() const { return (k + 1) / 2; } // ℓ
    bool attention() const { return k % 2 == 1; }
    bool head() const { return k == 2 * L + 1; }
    int number() const; // of mix:number, or its default
};

// One row. Null stands for nowhere, or for the constant 1; of xavier_gain, for a plain normal.
struct SchemeRow {
    using Where = bool (*)(const Place&);
    using Factor = double (*)(const Place&);

    const char* name;
    const char* equations; // for `train_gpt schemes`
    // Whether there is a norm behind sublayer k, behind its sum, in front of it.
    Where branch_norm = nullptr, out_norm = nullptr, in_norm = nullptr;
    bool embed_norm = false;                // junction 0 has an out-norm
    Factor skip = nullptr, beta = nullptr;  // of r and of b
    DepthScale depth = DepthScale::none;    // LayerNorm Scaling
    Where depth_at = nullptr;               // the sublayers that it scales; null: all
    Gamma gamma = Gamma::none;              // LayerScale, SkipInit
    double (*gamma_init)(int L) = nullptr;  // γ's initial value
    double (*omega_init)(int L) = nullptr;  // Admin's ω, and its initial value
    bool profiled = false;                  // the first batch sets ω
    double (*xavier_gain)(int L) = nullptr; // V, O, MLP start Xavier-normal with this gain; Q and K
                                            // with 1
    Where reads_second = nullptr;           // whether sublayer k reads the second stream
    bool plain_head = false;                // the head has no in-norm
    bool head_norms = false;                // q, k and v are normed per head
    bool grouped = false;                   // norms are over groups of channels
    bool depth_transfer = false;            // CompleteP
    Mixing mixing = Mixing::sum;
    const char* number_of = nullptr;        // what the number of NAME:number counts
    int (*default_number)(int L) = nullptr; // 0: the architecture's
    const char* what;                       // for `train_gpt schemes` and the README
    const char* source;                     // the paper
};

const std::vector<SchemeRow>& scheme_table();
std::vector<std::string> scheme_names();

// A row with its options: "mix:4+gpas+scaled-init".
struct Scheme {
    const SchemeRow* row = nullptr;
    int number = -1;             // k of mix:k; −1: the default
    bool gpas = false;           // a gate per layer (arXiv 2506.22049)
    bool gpas_each = false;      // a gate per sublayer
    bool x0 = false;             // the embedding is added again before each layer
    bool value_residual = false; // v of layer 1 is mixed into the others'
    bool prores = false;         // branches fade in
    int prores_steps = 1000;     // steps until layer 1's is whole; ℓ times that for ℓ's
    bool scaled_init = false;    // O and down projections start at std / √(2L), in every
                                 // layer (the LNS paper's code spares Post-LN layers)
    bool depth_init = false;     // at std / √(2ℓ)
    double lns_power = 0.5;      // p of ℓ^(−p)
    bool lns_attn = true, lns_mlp = true;  // the sublayers that ℓ^(−p) scales
    int base_layers = 2, base_width = 256; // CompleteP: the model that was tuned
    int width = 256;                       // CompleteP: this model's, from the Config
    int64_t step = INT64_MAX;              // updates so far: how far branches have faded in

    std::string name() const;    // as parse_scheme reads it
    std::string sites() const;   // "attn,mlp", as --lns-sites has it
    std::string warning() const; // what a user of this combination should know, or ""
    bool gated() const { return gpas || gpas_each; }
};

// What may follow any scheme's name: "+gpas".
struct SchemeAddition {
    const char* name;
    using Switch = bool Scheme::*; // nvcc would write parentheses of which g++ warns
    Switch enabled;
    using Number = int Scheme::*;
    Number number; // of +prores:number, or null
    const char *equations, *what, *source;
};
const std::vector<SchemeAddition>& scheme_additions();

// Throws for an unknown name, suggesting similar ones, and for additions that do not go together.
Scheme parse_scheme(const std::string& text);
// "attn", "mlp" or "attn,mlp", into lns_attn and lns_mlp.
void parse_sites(const std::string& text, Scheme& scheme);

// "2x256", layers and width, into base_layers and base_width.
void parse_base_model(const std::string& text, Scheme& scheme);

// The number of a scheme in a model of L layers; 0: the architecture's.
int number_of(const Scheme& scheme, int L);

// How much of a branch of layer ℓ is added after so many updates: min(step / (steps · ℓ), 1)
// (ProRes, arXiv 2603.05369). 1 without +prores.
double faded_in(const Scheme& scheme, int layer);

// What junction k of a model of L layers does. Sublayer k (1 … 2L) belongs to layer ⌈k/2⌉.
struct Junction {
    bool branch = true; // false at junction 0: r is the embedding's output
    bool branch_norm = false, out_norm = false, in_norm = false;
    Gamma gamma = Gamma::none;
    bool omega = false;         // a learned vector multiplies r
    bool gate = false;          // GPAS
    bool gate_on_skip = false;  // before the sum instead of after it
    bool adds_start = false;    // r ← a · r + λ · x₀
    bool fades = false;         // β still grows
    bool second = false;        // there is a second stream
    bool starts_second = false; // junction 0: y is the embedding
    bool reads_second = false;  // u is computed from r + norm_second(y)
    Mixing mixing = Mixing::sum;
    int mixed = 0; // streams; or branches of a source
    double skip = 1, beta = 1;
    int in_groups = 1;         // the in-norm is one of each of so many groups of channels
    double in_scale = 1;       // of the in-norm's whole output, bias included
    double in_eps = 1;         // of the in-norm's eps
    double in_weight_init = 1; // of the in-norm's weight

    bool operator==(const Junction&) const = default;

    // Whether the backward pass needs the sublayer's output. Where it does not, that output is
    // (r − skip · r_prev) / β, as layer diagnostics compute it.
    bool keeps_branch() const {
        return branch_norm || out_norm || gamma != Gamma::none || gate || adds_start || fades ||
               mixing != Mixing::sum;
    }
    // Whether it has ingredients of few schemes, for which there are kernels of their own.
    bool extended() const { return omega || adds_start || second; }
};

Junction junction(const Scheme& scheme, int L, int k);

} // namespace lns
