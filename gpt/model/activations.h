// The tensors of a pass, on either backend: which of them are kept for the backward pass, and which
// share memory. `Array` is the backend's; S is the scalar of activations, A the one of the residual
// stream and of sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gpt/model/config.h"
#include "gpt/model/mixing.h"
#include "gpt/model/model.h"
#include "gpt/model/slots.h"

namespace lns {

template <template <class> class Array, class S, class A, class NormStats, class JunctionStats>
struct PassTensors {
    int64_t rows = 0;          // B·T at most
    bool branch_pairs = false; // all layers share two slots of b

    Array<A> embedded;                 // (rows, C), if junction 0 has a norm or others read it
    Slots<Array<A>> residual;          // (rows, C) of each junction: r
    Slots<Array<S>> input;             // (rows, C) of each junction: u, unless it is r itself
    Slots<Array<S>> branch;            // (rows, C) of each junction but the first: b
    Slots<Array<A>> second;            // (rows, C) of each junction: y, if there is one
    Array<A> start;                    // (rows, C): x₀, if it is added again
    StreamShape stream_shape = {};     // of Mixing::streams; n = 0 elsewhere
    SourceShape source_shape = {};     // of Mixing::sources; block = 0 elsewhere
    Slots<Array<A>> streams;           // (rows, n, C) of each junction: X
    Slots<Array<A>> projected, maps;   // (rows, maps) of each junction but the last
    Slots<Array<A>> stream_rstd;       // (rows) of each of these: 1 / rms(X)
    Slots<Array<JunctionStats>> stats; // (rows) of each junction
    Slots<Array<S>> qkv;               // (rows, (NH + 2·KVH)·HS) of each layer
    Array<A> unrounded_qkv;            // (rows, the same), where they are rounded after the norm
    Slots<Array<S>> values;            // (rows, KVH·HS): v before it is mixed with the first
                                       // layer's; that of the first layer is always kept
    Slots<Array<S>> qkv_raw;           // (rows, normed width): what is normed of q, k and v
    Slots<Array<NormStats>> qkv_stats; // (rows, norms of q, k and v)
    Slots<Array<S>> attended;          // (rows, NH·HS)
    Slots<Array<A>> lse;               // (rows, NH)
    Slots<Array<S>> hidden, activated; // (rows, H or 2·H), (rows, H)
    Array<A> losses;                   // (rows)

    Array<A> dresidual;       // (rows, C)
    Array<A> dsecond, dstart; // (rows, C)
    Array<A> dstreams, dmaps, dprojected, dsources;
    Array<S> dinput, dbranch; // (rows, C)
    Array<S> dwide, dnarrow;  // gradients of qkv or hidden, and of attended or activated
    Array<A> dvalues;         // (rows, KVH·HS), of the first layer's v by the layers that mix it

    int branch_of(int k) const { return branch_pairs ? 2 - k % 2 : k; }

    // Calls make(array, elements) for every array. round_late: q, k and v are rounded once, after
    // their norm and rotation.
    template <class Make>
    void layout(const Config& c, int B, int T, const ModelOptions& o, bool round_late,
                const Make& make) {
        const int C = c.width, L = c.layers, K = 2 * L + 1;
        const bool backward = o.purpose >= Purpose::jacobians;
        const bool recompute_layers = o.recompute == Recompute::layers;
        rows = int64_t(B) * T;
        auto junction_of = [&](int k) { return junction(c.scheme, L, k); };
        auto keep = [&](int) { return backward && !recompute_layers; };
        auto keep_light = [&](int) { return backward && o.recompute == Recompute::none; };
        const Junction head = junction_of(2 * L);
        const bool sources = head.mixing == Mixing::sources;
        if (head.mixing == Mixing::streams) stream_shape = {head.mixed, C};
        if (sources) source_shape = {C, head.mixed};
        const bool read_again = junction_of(0).out_norm || head.mixing != Mixing::sum;
        make(embedded, read_again ? rows * C : 0);
        // The backward pass always has each layer's input: the rest can be recomputed from it.
        const bool inputs = o.purpose >= Purpose::layers;
        residual.layout(K, rows * C, make,
                        [&](int k) { return (inputs && k % 2 == 0) || keep(k); });
        second.layout(
            K, rows * C, make,
            [&](int k) {
                return (inputs && k % 2 == 0) || (keep(k) && junction_of(k).reads_second);
            },
            [&](int k) { return junction_of(k).second; });
        make(start, c.scheme.x0 ? rows * C : 0);
        auto has_maps = [&](int k) { return stream_shape.n > 0 && k < 2 * L; };
        auto keep_maps = [&](int) { return backward; };
        streams.layout(
            K, rows * stream_shape.width(), make,
            [&](int k) { return (inputs && k % 2 == 0) || keep(k); },
            [&](int) { return stream_shape.n > 0; });
        projected.layout(K, rows * stream_shape.row(), make, keep_maps, has_maps);
        maps.layout(K, rows * stream_shape.row(), make, keep_maps, has_maps);
        stream_rstd.layout(K, rows, make, keep_maps, has_maps);
        input.layout(K, rows * C, make, keep_light, [&](int k) {
            const Junction j = junction_of(k);
            return j.in_norm || j.reads_second || !std::is_same_v<S, A>;
        });
        // Recomputing a layer takes both of its branches at once, and so does measuring one.
        branch_pairs = (recompute_layers || o.purpose == Purpose::layers) && !sources;
        branch.layout(
            branch_pairs ? 3 : K, rows * C, make,
            [&](int k) {
                return branch_pairs || sources || (backward && junction_of(k).keeps_branch());
            },
            [&](int k) { return k > 0; });
        stats.layout(K, rows, make, [&](int) { return backward; });
        // In generating text, every layer's k and v are the KV cache.
        qkv.layout(L, rows * c.qkv_width(), make,
                   [&](int l) { return o.purpose == Purpose::generate || keep(l); });
        make(unrounded_qkv, round_late ? rows * c.qkv_width() : 0);
        const int64_t value_elements = c.scheme.value_residual ? rows * c.kv_width() : 0;
        values.layout(
            L, value_elements, make, [&](int l) { return l == 0 || keep(l); },
            [&](int l) { return l == 0 || backward; });
        qkv_raw.layout(L, c.qkv_norms() ? rows * c.normed_width() : 0, make, keep);
        qkv_stats.layout(L, rows * c.qkv_norms(), make, keep);
        attended.layout(L, rows * c.q_width(), make, keep);
        lse.layout(L, rows * c.heads, make, keep);
        hidden.layout(L, rows * c.mlp_in_width(), make, keep);
        activated.layout(L, rows * c.mlp_width, make, keep_light);
        make(losses, rows);
        if (!backward) return;
        make(dresidual, rows * C);
        make(dsecond, junction_of(0).second ? rows * C : 0);
        make(dstart, c.scheme.x0 ? rows * C : 0);
        make(dstreams, rows * stream_shape.width());
        for (Array<A>* array : {&dmaps, &dprojected})
            make(*array, stream_shape.n > 0 ? rows * stream_shape.row() : 0);
        make(dsources, sources ? source_shape.count(2 * L) * rows * C : 0);
        make(dinput, rows * C);
        make(dbranch, rows * C);
        make(dwide, rows * std::max(c.qkv_width(), c.mlp_in_width()));
        make(dnarrow, rows * std::max(c.q_width(), c.mlp_width));
        make(dvalues, value_elements);
    }
};

// Rows of the head at once: equal parts of about `elements` logits, at least 256 rows, in multiples
// of `multiple`. Large parts read the head's matrix, and add to its gradient, seldom.
inline int64_t head_part(int64_t rows, int V, int64_t elements, int64_t multiple) {
    const int64_t most = std::max<int64_t>(256, elements / V / multiple * multiple);
    const int64_t parts = (rows + most - 1) / most;
    return std::min(rows, ((rows + parts - 1) / parts + multiple - 1) / multiple * multiple);
}

} // namespace lns
