#include "gpt/model/params.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "gpt/base/error.h"
#include "gpt/model/mixing.h"

namespace lns {

namespace {

const int64_t alignment = 16; // elements: 64 bytes of float32

// DyT's initial α, before attention and elsewhere: arXiv 2503.10622, tables 11 and 12, linear
// between their widths.
double dyt_alpha(int width, bool before_attention) {
    struct Row {
        double width, attention, other;
    };
    const Row table[] = {
        {1024, 1, 1}, {2048, 1, 0.5}, {4096, 0.8, 0.2}, {5120, 0.6, 0.15}, {8192, 0.2, 0.05}};
    auto value = [&](const Row& row) { return before_attention ? row.attention : row.other; };
    size_t n = 0;
    while (n + 2 < std::size(table) && width > table[n + 1].width) n++;
    const Row &a = table[n], &b = table[n + 1];
    const double share = std::clamp((width - a.width) / (b.width - a.width), 0.0, 1.0);
    return std::lerp(value(a), value(b), share);
}

// Adds the parameters of each part of a model; called in order of computation.
struct Builder {
    const Config& c;
    Registry& registry;
    const TensorNames& names = architecture_row(c.model_type).names;
    const SchemeRow& row = *c.scheme.row;
    const int L = c.layers, C = c.width;
    int current_layer = -1; // from 0; −1: none

    // Every parameter that does not continue a stack starts aligned, so kinds of parameters never
    // share a vector of a kernel.
    void align() { registry.size = (registry.size + alignment - 1) / alignment * alignment; }

    // CompleteP's (arXiv 2505.01618, table 1, with α = 1).
    double width_ratio() const { return c.scheme.base_width / double(c.scheme.width); }

    int64_t add(const std::string& name, std::vector<int64_t> shape, double mean, double std) {
        Param p;
        p.name = name;
        p.shape = std::move(shape);
        p.offset = registry.size;
        p.mean = mean;
        p.std = std;
        p.decay = p.shape.size() == 2;
        p.layer = current_layer;
        if (row.depth_transfer) p.eps_scale = width_ratio() * c.scheme.base_layers / L;
        registry.params.push_back(p);
        registry.size += p.size();
        return p.offset;
    }
    int64_t matrix(const std::string& name, int64_t rows, int64_t columns, double std) {
        int64_t offset = add(name + ".weight", {rows, columns}, 0, std);
        registry.params.back().transposed = names.transposed;
        registry.params.back().layer_matrix = true;
        if (row.depth_transfer) {
            registry.params.back().lr_scale = width_ratio();
            registry.params.back().decay_scale = 1 / width_ratio();
        }
        return offset;
    }
    int64_t vector(const std::string& name, int64_t n, double value) {
        align();
        return add(name, {n}, value, 0);
    }
    int64_t bias(const std::string& name, int64_t n, bool wanted) {
        return wanted ? vector(name + ".bias", n, 0) : -1;
    }
    // before_attention: its output, or the stream's that follows, is what attention reads.
    NormParams norm(const std::string& name, double weight, bool before_attention) {
        NormParams n;
        if (c.norm_weight) n.weight = vector(name + ".weight", C, weight);
        if (c.norm_bias) n.bias = vector(name + ".bias", C, 0);
        if (c.norm == NormType::dyt)
            n.alpha = vector(name + ".alpha", 1, dyt_alpha(C, before_attention));
        return n;
    }
    bool before_attention(int k) const { return k % 2 == 0 && k < 2 * L; } // junction k

    std::string root(const char* part) const { return cat(names.root, part); }
    std::string layer(int l) const { return cat(names.root, names.layers, l, "."); } // l from 0

    // Standard deviations: plain normal, or Xavier normal with a gain, sqrt(2 / (in + out)) · gain;
    // with +scaled-init, O and down at std / sqrt(2L) (GPT-2, section 2.3), with +depth-init at
    // std / sqrt(2ℓ); CompleteP's by width.
    double std_of(int64_t out, int64_t in, bool qk, bool residual) const {
        const double std = row.depth_transfer ? c.init_std * std::sqrt(width_ratio()) : c.init_std;
        if (residual && c.scheme.scaled_init) return std / std::sqrt(2.0 * L);
        if (residual && c.scheme.depth_init) return std / std::sqrt(2.0 * (current_layer + 1));
        if (!row.xavier_gain) return std;
        return (qk ? 1.0 : row.xavier_gain(L)) * std::sqrt(2.0 / double(in + out));
    }

    void embeddings() {
        const double std = c.embed_std > 0 ? c.embed_std : c.init_std;
        registry.token_embedding =
            add(root(names.token_embedding) + ".weight", {c.vocab_size, C}, 0, std);
        if (!c.rope()) {
            align();
            registry.position_embedding =
                add(root(names.position_embedding) + ".weight", {c.positions, C}, 0, c.init_std);
        }
        if (c.embed_scale())
            registry.embed_scale = vector(root("embed_scale"), 1, std::sqrt(double(C)));
    }

    // A norm is named after its sublayer: the in-norm after the next one, the branch and out norms
    // after the one before.
    std::string norm_name(int sublayer, bool on_branch) const {
        const bool attn = sublayer % 2 == 1, beside = row.branch_norm;
        const char* mlp = beside ? names.mlp_norm_beside : names.mlp_norm;
        return layer((sublayer - 1) / 2) +
               (on_branch ? (attn ? names.attn_branch_norm : names.mlp_branch_norm)
                          : (attn ? names.attn_norm : mlp));
    }

    // Beside an in-norm of its sublayer, the out-norm has a name of its own.
    std::string out_norm_name(int k) const {
        if (!junction(c.scheme, L, k - 1).in_norm) return norm_name(k, false);
        return layer((k - 1) / 2) + sublayer(k) + "_out_norm";
    }

    // What junction k does in front of sublayer k + 1.
    void junction_before(int k) {
        const Junction j = junction(c.scheme, L, k);
        JunctionParams& p = registry.junctions[k];
        if (j.adds_start) {
            p.start_skip = vector(layer(k / 2) + "x0_skip", 1, 1);
            p.start_weight = vector(layer(k / 2) + "x0_weight", 1, 0);
        }
        const bool last = k == 2 * L;
        const std::string which = last ? root("final") : layer(k / 2) + sublayer(k + 1);
        if (j.mixing == Mixing::streams && !last) streams(p, which + "_streams", {j.mixed, C}, k);
        if (j.mixing == Mixing::sources) {
            p.query = vector(which + "_sources.query", C, 0);
            if (c.norm_weight) p.key_weight = vector(which + "_sources.norm.weight", C, 1);
        }
        const std::string final_name = root(names.final_norm);
        if (j.reads_second)
            p.second = norm(!last       ? layer(k / 2) + sublayer(k + 1) + "_second_norm"
                            : j.in_norm ? root("second_norm")
                                        : final_name,
                            1, before_attention(k));
        if (j.in_norm)
            p.in = norm(last ? final_name : norm_name(k + 1, false), j.in_weight_init,
                        before_attention(k));
    }
    // Maps that start nearly as Pre-LN: sublayer k + 1 reads stream k mod n, almost alone, and adds
    // to all; the streams hardly mix.
    void streams(JunctionParams& p, const std::string& name, const StreamShape& shape, int k) {
        const int n = shape.n;
        align();
        p.stream_weight = add(name + ".weight", {shape.maps(), shape.width()}, 0, c.init_std);
        p.stream_bias = vector(name + ".bias", shape.maps(), 0);
        std::vector<double>& bias = registry.params.back().values;
        bias.assign(size_t(shape.maps()), 0);
        const double others = 0.05, favourite = std::log((1 - others) / others);
        for (int i = 0; i < n; i++)
            bias[i] = i == k % n ? favourite : std::log(others / (n - 1 - others));
        for (int i = 0; i < n * n; i++) bias[2 * n + i] = i % (n + 1) == 0 ? 0 : -5;
        p.stream_scale = vector(name + ".scale", 3, 0.01);
    }

    static const char* sublayer(int k) { return k % 2 == 1 ? "attn" : "mlp"; }

    // The rest of junction k, behind sublayer k.
    void junction_after(int k) {
        const Junction j = junction(c.scheme, L, k);
        JunctionParams& p = registry.junctions[k];
        if (k == 0) {
            if (j.out_norm) p.out = norm(root("embed_norm"), 1, true);
            return;
        }
        const std::string which = layer((k - 1) / 2) + sublayer(k);
        if (j.branch_norm) p.branch = norm(norm_name(k, true), 1, false);
        if (j.gamma != Gamma::none)
            p.gamma = vector(which + "_gamma", j.gamma == Gamma::vector ? C : 1, row.gamma_init(L));
        if (j.out_norm) p.out = norm(out_norm_name(k), 1, before_attention(k));
        if (j.omega) p.omega = vector(which + "_omega", C, row.omega_init(L));
        if (j.gate && c.scheme.gpas_each) p.gate = vector(which + "_gate", 1, 0);
        if (j.gate && c.scheme.gpas)
            p.gate = k % 2 == 1 ? vector(layer((k - 1) / 2) + "gate", 1, 0)
                                : registry.junctions[k - 1].gate;
    }

    void qkv(LayerParams& p, const std::string& attn) {
        const int Q = c.q_width(), KV = c.kv_width();
        const double qk_std = std_of(Q, C, true, false), v_std = std_of(KV, C, false, false);
        align();
        if (!*names.k) {
            p.qkv = matrix(attn + names.q, Q + 2 * KV, C, qk_std);
            registry.params.back().tail = int64_t(Q + KV) * C;
            registry.params.back().tail_std = v_std;
            p.qkv_bias = bias(attn + names.q, Q + 2 * KV, c.qkv_bias);
            return;
        }
        p.qkv = matrix(attn + names.q, Q, C, qk_std);
        matrix(attn + names.k, KV, C, std_of(KV, C, true, false));
        matrix(attn + names.v, KV, C, v_std);
        if (!c.qkv_bias) return;
        p.qkv_bias = bias(attn + names.q, Q, true);
        add(attn + names.k + ".bias", {KV}, 0, 0);
        add(attn + names.v + ".bias", {KV}, 0, 0);
    }

    void attention(LayerParams& p, const std::string& attn) {
        const int Q = c.q_width();
        qkv(p, attn);
        if (c.scheme.value_residual && current_layer > 0)
            p.value_mix = vector(attn + "value_mix", 1, 0.5);
        if (c.q_norms()) {
            p.q_norm = vector(attn + "q_norm.weight", Q / c.q_norms(), 1);
            p.k_norm = vector(attn + "k_norm.weight", c.kv_width() / c.k_norms(), 1);
        }
        if (c.v_norms()) p.v_norm = vector(attn + "v_norm.weight", c.head_size, 1);
        align();
        p.attn_out = matrix(attn + names.attn_out, C, Q, std_of(C, Q, false, true));
        p.attn_out_bias = bias(attn + names.attn_out, C, c.attn_out_bias);
    }

    void mlp(LayerParams& p, const std::string& mlp) {
        const int H = c.mlp_width;
        align();
        p.mlp_in = matrix(mlp + names.mlp_in, H, C, std_of(H, C, false, false));
        if (c.gated_mlp()) matrix(mlp + names.mlp_up, H, C, std_of(H, C, false, false));
        p.mlp_in_bias = bias(mlp + names.mlp_in, H, c.mlp_bias);
        if (c.mlp_bias && c.gated_mlp()) add(mlp + names.mlp_up + ".bias", {H}, 0, 0);
        align();
        p.mlp_out = matrix(mlp + names.mlp_out, C, H, std_of(C, H, false, true));
        p.mlp_out_bias = bias(mlp + names.mlp_out, C, c.mlp_bias);
    }
};

} // namespace

Registry make_registry(const Config& c) {
    Registry registry;
    Builder b{c, registry};
    registry.junctions.resize(2 * c.layers + 1);
    b.embeddings();
    b.junction_after(0);
    for (int l = 0; l < c.layers; l++) {
        LayerParams p;
        b.current_layer = l;
        b.junction_before(2 * l);
        b.attention(p, b.layer(l) + b.names.attention);
        b.junction_after(2 * l + 1);
        b.junction_before(2 * l + 1);
        b.mlp(p, b.layer(l) + "mlp.");
        b.junction_after(2 * l + 2);
        registry.layers.push_back(p);
    }
    b.current_layer = -1;
    b.junction_before(2 * c.layers);
    b.align();
    registry.head = c.tied ? registry.token_embedding
                           : b.add("lm_head.weight", {c.vocab_size, c.width}, 0, c.init_std);
    b.align();
    return registry;
}

const Param* Registry::find(const std::string& name) const {
    for (const Param& p : params)
        if (p.name == name) return &p;
    return nullptr;
}

std::vector<int64_t> Registry::gates() const {
    std::vector<int64_t> offsets;
    for (const JunctionParams& junction : junctions)
        if (junction.gate >= 0 && (offsets.empty() || offsets.back() != junction.gate))
            offsets.push_back(junction.gate);
    return offsets;
}

int64_t Registry::count() const {
    int64_t n = 0;
    for (const Param& p : params) n += p.size();
    return n;
}

double flops_per_token(const Config& c, int T, int resting) {
    Registry registry = make_registry(c);
    double matmul = 0, of_layers = 0;
    for (const Param& p : registry.params)
        if (p.decay && p.offset != registry.position_embedding &&
            (p.offset != registry.token_embedding || c.tied))
            matmul += double(p.size()), of_layers += p.layer_matrix ? double(p.size()) : 0;
    return 6 * matmul - 2 * of_layers * resting / c.layers + 6.0 * c.layers * c.q_width() * T;
}

} // namespace lns
