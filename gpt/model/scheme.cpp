#include "gpt/model/scheme.h"

#include <cmath>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

namespace {

using enum Layers;
const auto no_depth = DepthScale::none;
const auto no_gamma = Gamma::none;

double deepnorm_skip(int L) { return std::pow(2.0 * L, 0.25); }
double deepnorm_gain(int L) { return std::pow(8.0 * L, -0.25); }
double published_skip(int) { return std::sqrt(8.0); }
double published_gain(int L) { return std::pow(8.0 * L, 0.25); }
double layerscale_init(int L) { return L <= 18 ? 0.1 : L <= 24 ? 1e-5 : 1e-6; }
double skipinit_init(int) { return 0.001; }

} // namespace

// clang-format off
const std::vector<SchemeRow>& scheme_table() {
    static const std::vector<SchemeRow> table = {
        // name, branch norm, out norm, in norm, embed norm, skip, depth, gamma, gamma init, Xavier gain
        {"pre", none, none, all, false, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "Pre-LN: a norm before each sublayer", "Xiong et al., arXiv 2002.04745"},
        {"lns", none, none, all, false, nullptr, DepthScale::output, no_gamma, nullptr, nullptr,
         "LayerNorm Scaling: Pre-LN, each norm's output times 1/sqrt(layer)", "Sun et al., arXiv 2502.05795"},
        {"lns-init", none, none, all, false, nullptr, DepthScale::init_weight, no_gamma, nullptr, nullptr,
         "the norm weights only start at 1/sqrt(layer), and learn", "Chen et al., arXiv 2506.22049, its code"},
        {"post", none, all, none, false, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "Post-LN: a norm after each sum", "Vaswani et al., arXiv 1706.03762"},
        {"deepnorm", none, all, none, false, deepnorm_skip, no_depth, no_gamma, nullptr, deepnorm_gain,
         "Post-LN with skip (2L)^(1/4) and Xavier gain (8L)^(-1/4)", "Wang et al., arXiv 2203.00555"},
        {"deepnorm-published", none, all, none, false, published_skip, no_depth, no_gamma, nullptr, published_gain,
         "as in the LNS paper's code: skip sqrt(8), gain (8L)^(+1/4)", "Sun et al., arXiv 2502.05795, its code"},
        {"mix", none, first_k, after_k, false, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "Mix-LN: Post-LN in the first k layers (mix:k; k = L/4), Pre-LN after", "Li et al., arXiv 2412.13795"},
        {"sandwich", all, none, all, false, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "a norm before and after each sublayer", "Ding et al., arXiv 2105.13290"},
        {"peri", all, none, all, true, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "Peri-LN: sandwich, and a norm of the embedding", "Kim et al., arXiv 2502.02732"},
        {"olmo2", all, none, none, false, nullptr, no_depth, no_gamma, nullptr, nullptr,
         "a norm of each sublayer's output only", "OLMo 2, arXiv 2501.00656"},
        {"layerscale", none, none, all, false, nullptr, no_depth, Gamma::vector, layerscale_init, nullptr,
         "Pre-LN, the branch times a learned vector that starts small", "Touvron et al. (CaiT), arXiv 2103.17239"},
        {"skipinit", none, none, all, false, nullptr, no_depth, Gamma::scalar, skipinit_init, nullptr,
         "Pre-LN, the branch times a learned scalar from 0.001", "De and Smith, arXiv 2002.10444"},
    };
    return table;
}
// clang-format on

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
    if (gpas) text += "+gpas";
    if (scaled_init) text += "+scaled-init";
    return text;
}

Scheme parse_scheme(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, '+');) parts.push_back(part);
    if (parts.empty() || text.back() == '+') fail("the norm scheme '", text, "' is incomplete");

    Scheme scheme;
    std::string base = parts[0];
    std::vector<std::string> names;
    size_t colon = base.find(':');
    for (const SchemeRow& row : scheme_table()) {
        names.push_back(row.name);
        if (base.substr(0, colon) == row.name) scheme.row = &row;
    }
    if (!scheme.row)
        fail("unknown norm scheme '", base, "'.", did_you_mean(base.substr(0, colon), names),
             " The schemes are ", join(names), "; +gpas and +scaled-init may follow any.");
    if (colon != std::string::npos) {
        std::string k = base.substr(colon + 1);
        if (scheme.row->out_norm != first_k)
            fail("the norm scheme '", scheme.row->name, "' takes no number, found '", text, "'");
        if (k.empty() || k.size() > 6 || k.find_first_not_of("0123456789") != std::string::npos)
            fail("mix:k needs a number of layers k, found '", text, "'");
        scheme.mix_layers = std::stoi(k);
    }
    for (size_t i = 1; i < parts.size(); i++) {
        if (parts[i] == "gpas")
            scheme.gpas = true;
        else if (parts[i] == "scaled-init")
            scheme.scaled_init = true;
        else
            fail("unknown addition '+", parts[i], "' to the norm scheme '", text, "'.",
                 did_you_mean(parts[i], {"gpas", "scaled-init"}),
                 " The additions are +gpas and +scaled-init.");
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
    if (j.in_norm && site && row.depth != DepthScale::none) {
        double factor = std::pow(double(layer), -scheme.lns_power);
        (row.depth == DepthScale::output ? j.in_scale : j.in_weight_init) = factor;
    }
    return j;
}

} // namespace lns
