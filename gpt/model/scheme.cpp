#include "gpt/model/scheme.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

namespace {

using P = const Place&;

bool all(P) { return true; }
bool up_to_number(P p) { return p.layer() <= p.number(); }
bool beyond_number(P p) { return p.layer() > p.number(); }
bool first_layer(P p) { return p.layer() == 1; }
bool attention(P p) { return p.attention(); }
bool mlp(P p) { return !p.attention(); }
bool attention_but_first(P p) { return p.attention() && p.k > 1; }
bool but_first(P p) { return p.k > 1; }
bool head(P p) { return p.head(); }

double deepnorm_skip(P p) { return std::pow(2.0 * p.L, 0.25); }
double deepnorm_gain(int L) { return std::pow(8.0 * L, -0.25); }
double published_skip(P) { return std::sqrt(8.0); }
double published_gain(int L) { return std::pow(8.0 * L, 0.25); }
double layerscale_init(int L) { return L <= 18 ? 0.1 : L <= 24 ? 1e-5 : 1e-6; }
double skipinit_init(int L) { return 1 / std::sqrt(double(L)); }
double published_skipinit_init(int) { return 0.001; }
double keel_skip(P p) { return p.k <= 2 ? 1 : 2 * p.L; }
double siamese_beta(P p) { return 1 / std::sqrt(double(p.k)); }
double published_siamese_beta(P p) { return 1 / std::sqrt(2.0 * p.layer()); }
double completep_beta(P p) { return p.scheme.base_layers / double(p.L); }
// admin-torch's "O(log n)"
double admin_omega(int L) { return std::sqrt((2.0 * L + 1) / std::log(2.0 * L + 1) - 1); }

} // namespace

const std::vector<SchemeRow>& scheme_table() {
    // N is a norm.
    static const std::vector<SchemeRow> table = {
        {.name = "pre",
         .equations = "u = N(r), r ← r + b",
         .in_norm = all,
         .what = "Pre-LN",
         .source = "arXiv 2002.04745"},
        {.name = "lns",
         .equations = "u = N(r)/√ℓ, r ← r + b",
         .in_norm = all,
         .depth = DepthScale::output,
         .what = "LayerNorm Scaling; --lns-power, --lns-sites",
         .source = "arXiv 2502.05795"},
        {.name = "lns-init",
         .equations = "u = N(r), r ← r + b",
         .in_norm = all,
         .depth = DepthScale::init_weight,
         .what = "norm weights only start at 1/√ℓ",
         .source = "arXiv 2506.22049, its code"},
        {.name = "lns:before",
         .equations = "u = N(r/√ℓ), r ← r + b",
         .in_norm = all,
         .depth = DepthScale::input,
         .what = "LNS before the norm, where only eps sees it",
         .source = "arXiv 2502.05795, table 8"},
        {.name = "lns:after",
         .equations = "u = N(r), r ← r + b/√ℓ",
         .in_norm = all,
         .depth = DepthScale::branch,
         .what = "LNS after attention and MLP",
         .source = "arXiv 2502.05795, table 8"},
        {.name = "lns:after-attn",
         .equations = "as lns:after, at attention only",
         .in_norm = all,
         .depth = DepthScale::branch,
         .depth_at = attention,
         .what = "",
         .source = "arXiv 2502.05795, table 8"},
        {.name = "lns:after-mlp",
         .equations = "as lns:after, at the MLP only",
         .in_norm = all,
         .depth = DepthScale::branch,
         .depth_at = mlp,
         .what = "",
         .source = "arXiv 2502.05795, table 8"},
        {.name = "lns:after-residual",
         .equations = "u = N(r), r ← (r + b)/√ℓ",
         .in_norm = all,
         .depth = DepthScale::residual,
         .what = "LNS after the sum",
         .source = "arXiv 2502.05795, table 8"},
        {.name = "post",
         .equations = "u = r, r ← N(r + b)",
         .out_norm = all,
         .what = "Post-LN",
         .source = "arXiv 1706.03762"},
        {.name = "deepnorm",
         .equations = "u = r, r ← N((2L)^¼ r + b)",
         .out_norm = all,
         .skip = deepnorm_skip,
         .xavier_gain = deepnorm_gain,
         .what = "Xavier initialization with gain (8L)^(−¼)",
         .source = "arXiv 2203.00555"},
        {.name = "deepnorm-published",
         .equations = "u = r, r ← N(√8 r + b)",
         .out_norm = all,
         .skip = published_skip,
         .xavier_gain = published_gain,
         .what = "gain (8L)^(+¼)",
         .source = "arXiv 2502.05795, its code"},
        {.name = "admin",
         .equations = "u = r, r ← N(ω ⊙ r + b)",
         .out_norm = all,
         .omega_init = admin_omega,
         .profiled = true,
         .what = "the first batch sets the learned vectors ω: ω² = the sum of Var(b) before",
         .source = "arXiv 2004.08249"},
        {.name = "admin:const",
         .equations = "as admin",
         .out_norm = all,
         .omega_init = admin_omega,
         .what = "ω starts at √((2L+1)/ln(2L+1) − 1)",
         .source = "microsoft/admin-torch"},
        {.name = "keel",
         .equations = "u = N(r), r ← N(2L r + b)",
         .out_norm = but_first,
         .in_norm = all,
         .skip = keel_skip,
         .what = "layer 1: r + b, its attention without the outer norm",
         .source = "arXiv 2601.19895"},
        {.name = "mix",
         .equations = "post if ℓ ≤ k, else pre",
         .out_norm = up_to_number,
         .in_norm = beyond_number,
         .number_of = "layers",
         .default_number = [](int L) { return L / 4; },
         .what = "Mix-LN; k = L/4 by default",
         .source = "arXiv 2412.13795"},
        {.name = "sandwich",
         .equations = "u = N(r), r ← r + N(b)",
         .branch_norm = all,
         .in_norm = all,
         .what = "Sandwich-LN",
         .source = "arXiv 2105.13290"},
        {.name = "peri",
         .equations = "as sandwich, and r₀ = N(x₀)",
         .branch_norm = all,
         .in_norm = all,
         .embed_norm = true,
         .what = "Peri-LN: and a norm of the embedding",
         .source = "arXiv 2502.02732"},
        {.name = "olmo2",
         .equations = "u = r, r ← r + N(b)",
         .branch_norm = all,
         .what = "OLMo 2's norms",
         .source = "arXiv 2501.00656"},
        {.name = "hybrid",
         .equations = "attention: u = r, r ← N(r + b); MLP: u = r, r ← r + b",
         .out_norm = attention,
         .head_norms = true,
         .what = "HybridNorm; q, k and v are normed per head",
         .source = "arXiv 2503.04598"},
        {.name = "hybrid*",
         .equations = "as hybrid; layer 1: u = N(r), r ← r + b",
         .out_norm = attention_but_first,
         .in_norm = first_layer,
         .head_norms = true,
         .what = "HybridNorm*",
         .source = "arXiv 2503.04598"},
        {.name = "residual",
         .equations = "u = r, r ← N(r + b), y ← y + b; head: r + N(y)",
         .out_norm = all,
         .reads_second = head,
         .plain_head = true,
         .what = "ResiDual: a Post-LN stream and one that sums",
         .source = "arXiv 2304.14802"},
        {.name = "siamese",
         .equations = "u = N(r + N(y)), r ← N(r + b/√k), y ← y + b; head: r + N(y)",
         .out_norm = all,
         .in_norm = all,
         .beta = siamese_beta,
         .reads_second = all,
         .plain_head = true,
         .what = "SiameseNorm; k is the sublayer",
         .source = "arXiv 2602.08064"},
        {.name = "siamese-published",
         .equations = "as siamese, b/√(2ℓ), r₀ = N(x₀); head: N(r + N(y))",
         .out_norm = all,
         .in_norm = all,
         .embed_norm = true,
         .beta = published_siamese_beta,
         .reads_second = all,
         .what = "SiameseNorm's post_pre",
         .source = "arXiv 2602.08064, its code"},
        {.name = "mhc",
         .equations = "u = N(H_pre X), X ← H_res X + H_post ⊗ b; head: N(mean X)",
         .in_norm = all,
         .mixing = Mixing::streams,
         .number_of = "residual streams",
         .default_number = [](int) { return 4; },
         .what = "mHC: X is k streams, 4 by default; H_res is doubly stochastic, and all H are "
                 "functions of X",
         .source = "arXiv 2512.24880"},
        {.name = "attnres",
         .equations = "u = N(Σ softmaxᵢ(w · N(vᵢ)) vᵢ); v₀ = x₀, vᵢ = bᵢ",
         .in_norm = all,
         .mixing = Mixing::sources,
         .number_of = "blocks",
         .default_number = [](int L) { return 2 * L; },
         .what = "attention residuals; attnres:k sums branches in k blocks",
         .source = "arXiv 2603.15031"},
        {.name = "group",
         .equations = "u = N(r), r ← r + b",
         .in_norm = all,
         .grouped = true,
         .number_of = "groups of channels",
         .default_number = [](int) { return 0; },
         .what = "Group-LN: norms over groups of channels, by default as many as heads",
         .source = "arXiv 2502.05795, table 7"},
        {.name = "completep",
         .equations = "u = N(r), r ← r + (L₀/L) b",
         .in_norm = all,
         .beta = completep_beta,
         .depth_transfer = true,
         .what = "CompleteP: learning rates, decay, eps and initial values by depth and width too; "
                 "--completep-base",
         .source = "arXiv 2505.01618"},
        {.name = "layerscale",
         .equations = "u = N(r), r ← r + γ ⊙ b",
         .in_norm = all,
         .gamma = Gamma::vector,
         .gamma_init = layerscale_init,
         .what = "LayerScale: γ is a vector, from 0.1, 1e-5 or 1e-6 by depth",
         .source = "arXiv 2103.17239"},
        {.name = "skipinit",
         .equations = "u = N(r), r ← r + γ b",
         .in_norm = all,
         .gamma = Gamma::scalar,
         .gamma_init = skipinit_init,
         .what = "SkipInit: γ is a scalar, from 1/√L",
         .source = "arXiv 2002.10444; 2502.05795"},
        {.name = "skipinit-published",
         .equations = "as skipinit",
         .in_norm = all,
         .gamma = Gamma::scalar,
         .gamma_init = published_skipinit_init,
         .what = "γ from 0.001",
         .source = "arXiv 2502.05795, its code"},
    };
    return table;
}

std::vector<std::string> scheme_names() {
    std::vector<std::string> names;
    for (const SchemeRow& row : scheme_table()) names.push_back(row.name);
    return names;
}

const std::vector<SchemeAddition>& scheme_additions() {
    static const std::vector<SchemeAddition> additions = {
        {"+gpas", &Scheme::gpas, nullptr, "r ← r − silu(g) stop(r)",
         "a gate g per layer, from 0; on the skip path where there is an out-norm; --clip-gates",
         "arXiv 2506.22049"},
        {"+gpas-each", &Scheme::gpas_each, nullptr, "as +gpas", "a gate per sublayer", "ours"},
        {"+x0", &Scheme::x0, nullptr, "r ← a r + λ x₀ before a layer",
         "x₀ is the embedding; a from 1 and λ from 0 are learned", "KellerJordan/modded-nanogpt"},
        {"+value-residual", &Scheme::value_residual, nullptr, "v ← (1 − m) v + m v₁",
         "v₁ is v of layer 1; m is learned, from ½", "arXiv 2410.17897"},
        {"+prores", &Scheme::prores, &Scheme::prores_steps, "b ← min(t/(Tℓ), 1) b",
         "branches fade in over steps t; +prores:T, 1000 by default", "arXiv 2603.05369"},
        {"+scaled-init", &Scheme::scaled_init, nullptr, "",
         "the last matrix of each sublayer starts at 0.02/√(2L), in Post-LN layers of mix:k too",
         "GPT-2"},
        {"+depth-init", &Scheme::depth_init, nullptr, "", "it starts at 0.02/√(2ℓ)",
         "arXiv 1908.11365"},
    };
    return additions;
}

std::string Scheme::sites() const {
    return lns_attn && lns_mlp ? "attn,mlp" : lns_attn ? "attn" : "mlp";
}

std::string Scheme::warning() const {
    if (row->depth == DepthScale::none || !(scaled_init || depth_init)) return "";
    return cat("the LNS paper (arXiv 2502.05795) found scaled initialization to conflict with ",
               row->name, ": it holds deep layers back twice. Leave out ",
               scaled_init ? "+scaled-init" : "+depth-init", ", unless that is what you study");
}

std::string Scheme::name() const {
    std::string text = row->name;
    if (number >= 0) text += ":" + std::to_string(number);
    for (const SchemeAddition& addition : scheme_additions()) {
        if (!(this->*addition.enabled)) continue;
        text += addition.name;
        if (addition.number && this->*addition.number != Scheme().*addition.number)
            text += ":" + std::to_string(this->*addition.number);
    }
    return text;
}

namespace {

// The number behind the colon in `text`.
int parse_number(const std::string& text, size_t colon, const char* counts) {
    const std::string digits = text.substr(colon + 1);
    if (digits.empty() || digits.size() > 6 ||
        digits.find_first_not_of("0123456789") != std::string::npos)
        fail(text.substr(0, colon), ":k needs a number of ", counts, " k, found '", text, "'");
    return std::stoi(digits);
}

// The row that "mix:4" or "lns:after" names, and its number.
void parse_base(const std::string& base, Scheme& scheme) {
    size_t colon = base.size();
    for (size_t end : {base.size(), base.find(':')})
        for (const SchemeRow& row : scheme_table())
            if (!scheme.row && base.substr(0, end) == row.name)
                scheme.row = &row, colon = std::min(end, colon);
    const bool word =
        colon + 1 < base.size() && !std::isdigit(static_cast<unsigned char>(base[colon + 1]));
    if (!scheme.row || (word && !scheme.row->number_of))
        fail("unknown norm scheme '", base, "'.", did_you_mean(base, scheme_names()),
             " The schemes are ", join(scheme_names()),
             "; +gpas and other additions may follow: ", "`train_gpt schemes` lists them.");
    if (colon == base.size()) return;
    if (!scheme.row->number_of)
        fail("the norm scheme '", scheme.row->name, "' takes no number, found '", base, "'");
    scheme.number = parse_number(base, colon, scheme.row->number_of);
    if (scheme.row->grouped && scheme.number == 0) fail("'", base, "' asks for no group at all");
    if (scheme.row->mixing != Mixing::sum && scheme.number == 0)
        fail("'", base, "' asks for no ", scheme.row->number_of, " at all");
}

void parse_addition(const std::string& text, Scheme& scheme) {
    const size_t colon = text.find(':');
    const std::string name = text.substr(0, colon);
    std::vector<std::string> names;
    for (const SchemeAddition& addition : scheme_additions()) {
        names.push_back(addition.name);
        if (name != addition.name) continue;
        scheme.*addition.enabled = true;
        if (colon == std::string::npos) return;
        if (!addition.number) fail("'", name, "' takes no number, found '", text, "'");
        scheme.*addition.number = parse_number(text, colon, "steps");
        if (scheme.*addition.number == 0)
            fail("'", text, "' fades branches in over no steps at all: leave it out");
        return;
    }
    fail("unknown addition '", name, "' to the norm scheme.", did_you_mean(name, names),
         " The additions are ", join(names), ".");
}

// Throws for additions that have no meaning.
void check_additions(const Scheme& s) {
    auto refuse = [&](bool both, const char* addition, const auto&... reason) {
        if (both) fail(addition, " does not go with ", s.row->name, ": ", reason...);
    };
    const bool second = s.row->reads_second, profiled = s.row->profiled;
    refuse(s.gpas && s.gpas_each, "+gpas", "+gpas-each was asked for, too; choose one");
    refuse(s.scaled_init && s.depth_init, "+scaled-init",
           "+depth-init was asked for, too, and both set the same initial values; choose one");
    const char* streams = "it has two residual streams, and the addition is defined on one";
    refuse(s.gated() && second, s.gpas ? "+gpas" : "+gpas-each", streams);
    refuse(s.x0 && second, "+x0", streams);
    refuse(s.prores && second, "+prores", streams);
    const char* mixing = "a branch of it joins no sum that the addition could change";
    const bool mixed = s.row->mixing != Mixing::sum;
    refuse(s.gated() && mixed, s.gpas ? "+gpas" : "+gpas-each", mixing);
    refuse(s.x0 && mixed, "+x0", mixing);
    refuse(s.prores && mixed, "+prores", mixing);
    refuse(s.prores && profiled, "+prores",
           "its ω come from the variance of the first batch's branches, which would be 0");
}

} // namespace

Scheme parse_scheme(const std::string& text) {
    if (text.empty() || text.back() == '+') fail("the norm scheme '", text, "' is incomplete");
    Scheme scheme;
    size_t end = text.find('+');
    parse_base(text.substr(0, end), scheme);
    while (end != std::string::npos) {
        const size_t begin = end;
        end = text.find('+', begin + 1);
        parse_addition(text.substr(begin, end == text.npos ? end : end - begin), scheme);
    }
    check_additions(scheme);
    return scheme;
}

void parse_sites(const std::string& text, Scheme& scheme) {
    if (text != "attn" && text != "mlp" && text != "attn,mlp" && text != "mlp,attn")
        fail("--lns-sites is 'attn', 'mlp' or 'attn,mlp', found '", text, "'");
    scheme.lns_attn = text != "mlp";
    scheme.lns_mlp = text != "attn";
}

void parse_base_model(const std::string& text, Scheme& scheme) {
    int layers = 0, width = 0, end = 0;
    const bool read = std::sscanf(text.c_str(), "%6dx%6d%n", &layers, &width, &end) == 2;
    if (!read || size_t(end) != text.size() || layers < 1 || width < 1)
        fail("--completep-base is LAYERSxWIDTH, like 2x256, found '", text, "'");
    scheme.base_layers = layers, scheme.base_width = width;
}

int number_of(const Scheme& scheme, int L) {
    if (scheme.number >= 0 || !scheme.row->default_number) return scheme.number;
    return scheme.row->default_number(L);
}
int Place::number() const { return number_of(scheme, L); }

double faded_in(const Scheme& s, int layer) {
    if (!s.prores) return 1;
    return std::min(1.0, double(s.step) / (double(s.prores_steps) * layer));
}

Junction junction(const Scheme& scheme, int L, int k) {
    const SchemeRow& row = *scheme.row;
    const Place place{k, L, scheme}, next{k + 1, L, scheme};
    auto has = [](SchemeRow::Where where, const Place& p) { return where && where(p); };
    auto value = [](SchemeRow::Factor factor, const Place& p) { return factor ? factor(p) : 1; };
    // ℓ^(−p) at a sublayer, if it is scaled there.
    auto depth_factor = [&](const Place& p, DepthScale where) {
        const bool site = p.attention() ? scheme.lns_attn : scheme.lns_mlp;
        const bool scaled = row.depth == where && site && (!row.depth_at || row.depth_at(p));
        return scaled ? std::pow(double(p.layer()), -scheme.lns_power) : 1;
    };

    Junction j;
    j.branch = k > 0;
    if (row.mixing == Mixing::streams) {
        j.mixing = row.mixing, j.mixed = place.number();
    } else if (row.mixing == Mixing::sources && k > 0) {
        j.mixing = row.mixing, j.mixed = (2 * L + place.number() - 1) / place.number();
    }
    if (row.grouped) j.in_groups = std::max(1, scheme.number);
    j.second = row.reads_second;
    j.starts_second = j.second && k == 0;
    if (k == 0) {
        j.out_norm = row.embed_norm;
    } else {
        j.branch_norm = has(row.branch_norm, place);
        j.out_norm = has(row.out_norm, place);
        j.gamma = row.gamma;
        j.omega = row.omega_init;
        j.gate = scheme.gated();
        j.gate_on_skip = j.gate && j.out_norm;
        const double sum = depth_factor(place, DepthScale::residual);
        const double faded = faded_in(scheme, place.layer());
        j.fades = faded < 1;
        j.skip = value(row.skip, place) * sum;
        j.beta = value(row.beta, place) * depth_factor(place, DepthScale::branch) * sum * faded;
    }
    j.adds_start = scheme.x0 && next.attention() && !next.head();
    j.reads_second = has(row.reads_second, next);
    if (next.head()) {
        j.in_norm = !row.plain_head; // the final norm
        if (row.depth_transfer) j.in_scale = scheme.base_width / double(scheme.width);
        return j;
    }
    j.in_norm = has(row.in_norm, next);
    if (!j.in_norm) return j;
    j.in_scale = depth_factor(next, DepthScale::output);
    j.in_eps = std::pow(depth_factor(next, DepthScale::input), -2);
    j.in_weight_init = depth_factor(next, DepthScale::init_weight);
    return j;
}

} // namespace lns
