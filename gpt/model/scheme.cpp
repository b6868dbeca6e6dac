#include "gpt/model/scheme.h"

#include <algorithm>
#include <cmath>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

namespace {

using enum Layers;

double deepnorm_skip(int L) { return std::pow(2.0 * L, 0.25); }
double deepnorm_gain(int L) { return std::pow(8.0 * L, -0.25); }
double published_skip(int) { return std::sqrt(8.0); }
double published_gain(int L) { return std::pow(8.0 * L, 0.25); }
double layerscale_init(int L) { return L <= 18 ? 0.1 : L <= 24 ? 1e-5 : 1e-6; }
double skipinit_init(int) { return 0.001; }

} // namespace

const std::vector<SchemeRow>& scheme_table() {
    static const std::vector<SchemeRow> table = {
        {.name = "pre", .in_norm = all, .what = "Pre-LN", .source = "arXiv 2002.04745"},
        {.name = "lns",
         .in_norm = all,
         .depth = DepthScale::output,
         .what = "LayerNorm Scaling: scale = ℓ^(−½) on each in-norm; --lns-power, --lns-sites",
         .source = "arXiv 2502.05795"},
        {.name = "lns-init",
         .in_norm = all,
         .depth = DepthScale::init_weight,
         .what = "in-norm weights only start at ℓ^(−½)",
         .source = "arXiv 2506.22049, its code"},
        {.name = "post", .out_norm = all, .what = "Post-LN", .source = "arXiv 1706.03762"},
        {.name = "deepnorm",
         .out_norm = all,
         .skip = deepnorm_skip,
         .xavier_gain = deepnorm_gain,
         .what = "skip = (2L)^¼; Xavier initialization with gain (8L)^(−¼)",
         .source = "arXiv 2203.00555"},
        {.name = "deepnorm-published",
         .out_norm = all,
         .skip = published_skip,
         .xavier_gain = published_gain,
         .what = "skip = √8, gain (8L)^(+¼)",
         .source = "arXiv 2502.05795, its code"},
        {.name = "mix",
         .out_norm = first_k,
         .in_norm = after_k,
         .what = "Mix-LN; k = L/4 by default",
         .source = "arXiv 2412.13795"},
        {.name = "sandwich",
         .branch_norm = all,
         .in_norm = all,
         .what = "Sandwich-LN",
         .source = "arXiv 2105.13290"},
        {.name = "peri",
         .branch_norm = all,
         .in_norm = all,
         .embed_norm = true,
         .what = "Peri-LN: and a norm of the embedding",
         .source = "arXiv 2502.02732"},
        {.name = "olmo2",
         .branch_norm = all,
         .what = "OLMo 2's norms",
         .source = "arXiv 2501.00656"},
        {.name = "layerscale",
         .in_norm = all,
         .gamma = Gamma::vector,
         .gamma_init = layerscale_init,
         .what = "LayerScale: γ is a vector, from 0.1, 1e-5 or 1e-6 by depth",
         .source = "arXiv 2103.17239"},
        {.name = "skipinit",
         .in_norm = all,
         .gamma = Gamma::scalar,
         .gamma_init = skipinit_init,
         .what = "SkipInit: γ is a scalar, from 0.001",
         .source = "arXiv 2002.10444"},
    };
    return table;
}

const char* name_of(Layers layers) {
    switch (layers) {
    case none:
        return "none";
    case all:
        return "all";
    case first_k:
        return "first_k";
    case after_k:
        return "after_k";
    }
    return "";
}
const char* name_of(Gamma gamma) {
    switch (gamma) {
    case Gamma::none:
        return "none";
    case Gamma::vector:
        return "vector";
    case Gamma::scalar:
        return "scalar";
    }
    return "";
}
const char* name_of(DepthScale depth) {
    switch (depth) {
    case DepthScale::none:
        return "none";
    case DepthScale::output:
        return "output";
    case DepthScale::init_weight:
        return "init_weight";
    }
    return "";
}

std::vector<std::string> scheme_names() {
    std::vector<std::string> names;
    for (const SchemeRow& row : scheme_table()) names.push_back(row.name);
    return names;
}

const std::vector<SchemeAddition>& scheme_additions() {
    static const std::vector<SchemeAddition> additions = {
        {"+gpas", &Scheme::gpas,
         "a gate g per sublayer, from 0; on the skip path where there is an out-norm",
         "arXiv 2506.22049"},
        {"+scaled-init", &Scheme::scaled_init,
         "the last matrix of each sublayer starts at 0.02/√(2L), in Post-LN layers of mix:k too",
         "GPT-2"},
    };
    return additions;
}

std::string Scheme::sites() const {
    return lns_attn && lns_mlp ? "attn,mlp" : lns_attn ? "attn" : "mlp";
}

std::string Scheme::warning() const {
    if (row->depth == DepthScale::none || !scaled_init) return "";
    return cat("the LNS paper (arXiv 2502.05795) found scaled initialization to conflict with ",
               row->name,
               ": it holds deep layers back twice. Leave out +scaled-init, unless that is "
               "what you study");
}

std::string Scheme::name() const {
    std::string text = row->name;
    if (mix_layers >= 0) text += ":" + std::to_string(mix_layers);
    for (const SchemeAddition& addition : scheme_additions())
        if (this->*addition.enabled) text += addition.name;
    return text;
}

namespace {

// The row that "mix:4" names, and its k.
void parse_base(const std::string& base, Scheme& scheme) {
    const size_t colon = base.find(':');
    for (const SchemeRow& row : scheme_table())
        if (base.substr(0, colon) == row.name) scheme.row = &row;
    if (!scheme.row)
        fail("unknown norm scheme '", base, "'.",
             did_you_mean(base.substr(0, colon), scheme_names()), " The schemes are ",
             join(scheme_names()), "; +gpas and +scaled-init may follow any.");
    if (colon == std::string::npos) return;
    const std::string k = base.substr(colon + 1);
    if (scheme.row->out_norm != first_k)
        fail("the norm scheme '", scheme.row->name, "' takes no number, found '", base, "'");
    if (k.empty() || k.size() > 6 || k.find_first_not_of("0123456789") != std::string::npos)
        fail(scheme.row->name, ":k needs a number of layers k, found '", base, "'");
    scheme.mix_layers = std::stoi(k);
}

void parse_addition(const std::string& name, Scheme& scheme) {
    std::vector<std::string> names;
    for (const SchemeAddition& addition : scheme_additions()) {
        names.push_back(addition.name);
        if (name == addition.name) scheme.*addition.enabled = true;
    }
    if (std::find(names.begin(), names.end(), name) == names.end())
        fail("unknown addition '", name, "' to the norm scheme.", did_you_mean(name, names),
             " The additions are ", join(names), ".");
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
    return scheme;
}

void parse_sites(const std::string& text, Scheme& scheme) {
    if (text != "attn" && text != "mlp" && text != "attn,mlp" && text != "mlp,attn")
        fail("--lns-sites is 'attn', 'mlp' or 'attn,mlp', found '", text, "'");
    scheme.lns_attn = text != "mlp";
    scheme.lns_mlp = text != "attn";
}

namespace {

bool has(Layers layers, int layer, int k) {
    return layers == all || (layers == first_k && layer <= k) || (layers == after_k && layer > k);
}

} // namespace

Junction junction(const Scheme& scheme, int L, int k) {
    const SchemeRow& row = *scheme.row;
    int mix = scheme.mix_layers >= 0 ? scheme.mix_layers : L / 4;
    Junction j;
    j.branch = k > 0;
    if (k == 0) {
        j.out_norm = row.embed_norm;
    } else {
        int layer = (k + 1) / 2;
        j.branch_norm = has(row.branch_norm, layer, mix);
        j.out_norm = has(row.out_norm, layer, mix);
        j.gamma = row.gamma;
        j.gate = scheme.gpas;
        j.gate_on_skip = j.gate && j.out_norm;
        if (row.skip) j.skip = row.skip(L);
    }
    if (k == 2 * L) {
        j.in_norm = true; // the final norm
        return j;
    }
    int next = k + 1, layer = (next + 1) / 2;
    j.in_norm = has(row.in_norm, layer, mix);
    bool site = next % 2 == 1 ? scheme.lns_attn : scheme.lns_mlp;
    if (j.in_norm && site) {
        const double factor = std::pow(double(layer), -scheme.lns_power);
        if (row.depth == DepthScale::output) j.in_scale = factor;
        if (row.depth == DepthScale::init_weight) j.in_weight_init = factor;
    }
    return j;
}

} // namespace lns
