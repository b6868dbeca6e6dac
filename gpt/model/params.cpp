#include "gpt/model/params.h"

#include <cmath>

namespace lns {

namespace {

const int64_t alignment = 16; // elements: 64 bytes of float32

struct Builder {
    const Config& config;
    Registry& registry;

    // Where the next parameter goes that does not continue a stack.
    void align() { registry.size = (registry.size + alignment - 1) / alignment * alignment; }

    int64_t add(const std::string& name, std::vector<int64_t> shape, double mean, double std) {
        Param p;
        p.name = name;
        p.shape = std::move(shape);
        p.offset = registry.size;
        p.mean = mean;
        p.std = std;
        p.decay = p.shape.size() == 2;
        registry.params.push_back(p);
        registry.size += p.size();
        return p.offset;
    }
    int64_t matrix(const std::string& name, int64_t rows, int64_t columns, double std) {
        int64_t offset = add(name, {rows, columns}, 0, std);
        registry.params.back().transposed = config.model_type == "gpt2";
        return offset;
    }
    int64_t vector(const std::string& name, int64_t n, double value) {
        align();
        return add(name, {n}, value, 0);
    }
    NormParams norm(const std::string& name, double weight) {
        NormParams n;
        if (config.norm_weight) n.weight = vector(name + ".weight", config.width, weight);
        if (config.norm_bias) n.bias = vector(name + ".bias", config.width, 0);
        return n;
    }
};

// Hugging Face's names of the parts of a model.
struct Names {
    bool gpt2;
    std::string root() const { return gpt2 ? "transformer." : "model."; }
    std::string layer(int l) const { // l from 0
        return root() + (gpt2 ? "h." : "layers.") + std::to_string(l) + ".";
    }
};

} // namespace

Registry make_registry(const Config& c) {
    Registry registry;
    Builder b{c, registry};
    const SchemeRow& row = *c.scheme.row;
    const bool gpt2 = c.model_type == "gpt2";
    const Names names{gpt2};
    const int L = c.layers, C = c.width, H = c.mlp_width;
    const double embed_std = c.embed_std > 0 ? c.embed_std : c.init_std;

    registry.token_embedding = b.add(names.root() + (gpt2 ? "wte" : "embed_tokens") + ".weight",
                                     {c.vocab_size, C}, 0, embed_std);
    if (!c.rope) {
        b.align();
        registry.position_embedding =
            b.add(names.root() + "wpe.weight", {c.positions, C}, 0, c.init_std);
    }

    // Standard deviations: plain normal, or Xavier normal with a gain, sqrt(2 / (in + out)) · gain;
    // with +scaled-init, O and down at std / sqrt(2L) (GPT-2, section 2.3).
    auto std_of = [&](int64_t out, int64_t in, bool qk, bool residual) {
        if (residual && c.scheme.scaled_init) return c.init_std / std::sqrt(2.0 * L);
        if (!row.xavier_gain) return c.init_std;
        return (qk ? 1.0 : row.xavier_gain(L)) * std::sqrt(2.0 / double(in + out));
    };

    // The parameters of junction k. A norm is named after the sublayer that it belongs to: the
    // in-norm to the next one, the branch and out norms to the one before.
    registry.junctions.resize(2 * L + 1);
    auto norm_name = [&](int sublayer, bool on_branch) {
        std::string layer = names.layer((sublayer - 1) / 2);
        bool attn = sublayer % 2 == 1;
        if (gpt2) return layer + (on_branch ? "post_ln_" : "ln_") + (attn ? "1" : "2");
        bool both = row.branch_norm != Layers::none;
        if (attn) return layer + (on_branch ? "post_attention_layernorm" : "input_layernorm");
        if (on_branch) return layer + "post_feedforward_layernorm";
        return layer + (both ? "pre_feedforward_layernorm" : "post_attention_layernorm");
    };
    auto add_before = [&](int k) { // the in-norm at junction k, of sublayer k + 1
        Junction j = junction(c.scheme, L, k);
        if (!j.in_norm) return;
        std::string name =
            k == 2 * L ? names.root() + (gpt2 ? "ln_f" : "norm") : norm_name(k + 1, false);
        registry.junctions[k].in = b.norm(name, j.in_weight_init);
    };
    auto add_after = [&](int k) { // what else is at junction k
        Junction j = junction(c.scheme, L, k);
        JunctionParams& p = registry.junctions[k];
        if (k == 0) {
            if (j.out_norm) p.out = b.norm(names.root() + "embed_norm", 1);
            return;
        }
        std::string which = names.layer((k - 1) / 2) + (k % 2 == 1 ? "attn" : "mlp");
        if (j.branch_norm) p.branch = b.norm(norm_name(k, true), 1);
        if (j.gamma != Gamma::none)
            p.gamma =
                b.vector(which + "_gamma", j.gamma == Gamma::vector ? C : 1, row.gamma_init(L));
        if (j.out_norm) p.out = b.norm(norm_name(k, false), 1);
        if (j.gate) p.gate = b.vector(which + "_gate", 1, 0);
    };

    add_after(0);
    const int Q = c.q_width(), KV = c.kv_width();
    for (int l = 0; l < L; l++) {
        const std::string layer = names.layer(l);
        const std::string attn = layer + (gpt2 ? "attn." : "self_attn."), mlp = layer + "mlp.";
        LayerParams p;

        add_before(2 * l);
        b.align();
        if (gpt2) {
            p.qkv = b.matrix(attn + "c_attn.weight", Q + 2 * KV, C, std_of(Q, C, true, false));
            registry.params.back().tail = int64_t(Q + KV) * C;
            registry.params.back().tail_std = std_of(KV, C, false, false);
            p.qkv_bias = b.vector(attn + "c_attn.bias", Q + 2 * KV, 0);
        } else {
            p.qkv = b.matrix(attn + "q_proj.weight", Q, C, std_of(Q, C, true, false));
            b.matrix(attn + "k_proj.weight", KV, C, std_of(KV, C, true, false));
            b.matrix(attn + "v_proj.weight", KV, C, std_of(KV, C, false, false));
            if (c.qkv_bias) {
                p.qkv_bias = b.vector(attn + "q_proj.bias", Q, 0);
                b.add(attn + "k_proj.bias", {KV}, 0, 0);
                b.add(attn + "v_proj.bias", {KV}, 0, 0);
            }
        }
        if (c.qk_norm) {
            p.q_norm = b.vector(attn + "q_norm.weight", Q, 1);
            p.k_norm = b.vector(attn + "k_norm.weight", KV, 1);
        }
        b.align();
        p.attn_out = b.matrix(attn + (gpt2 ? "c_proj" : "o_proj") + ".weight", C, Q,
                              std_of(C, Q, false, true));
        if (c.attn_out_bias)
            p.attn_out_bias = b.vector(attn + (gpt2 ? "c_proj" : "o_proj") + ".bias", C, 0);
        add_after(2 * l + 1);

        add_before(2 * l + 1);
        b.align();
        if (c.gated_mlp) {
            p.mlp_in = b.matrix(mlp + "gate_proj.weight", H, C, std_of(H, C, false, false));
            b.matrix(mlp + "up_proj.weight", H, C, std_of(H, C, false, false));
        } else {
            p.mlp_in = b.matrix(mlp + "c_fc.weight", H, C, std_of(H, C, false, false));
        }
        if (c.mlp_bias) {
            p.mlp_in_bias = b.vector(mlp + (c.gated_mlp ? "gate_proj" : "c_fc") + ".bias", H, 0);
            if (c.gated_mlp) b.add(mlp + "up_proj.bias", {H}, 0, 0);
        }
        b.align();
        p.mlp_out = b.matrix(mlp + (gpt2 ? "c_proj" : "down_proj") + ".weight", C, H,
                             std_of(C, H, false, true));
        if (c.mlp_bias)
            p.mlp_out_bias = b.vector(mlp + (gpt2 ? "c_proj" : "down_proj") + ".bias", C, 0);
        add_after(2 * l + 2);
        registry.layers.push_back(p);
    }
    add_before(2 * L);
    b.align();
    registry.head = c.tied ? registry.token_embedding
                           : b.add("lm_head.weight", {c.vocab_size, C}, 0, c.init_std);
    b.align();
    return registry;
}

const Param* Registry::find(const std::string& name) const {
    for (const Param& p : params)
        if (p.name == name) return &p;
    return nullptr;
}

int64_t Registry::count() const {
    int64_t n = 0;
    for (const Param& p : params) n += p.size();
    return n;
}

double flops_per_token(const Config& c, int T) {
    Registry registry = make_registry(c);
    double matmul = 0;
    for (const Param& p : registry.params)
        if (p.decay && p.offset != registry.position_embedding &&
            (p.offset != registry.token_embedding || c.tied))
            matmul += double(p.size());
    return 6 * matmul + 6.0 * c.layers * c.q_width() * T;
}

} // namespace lns
