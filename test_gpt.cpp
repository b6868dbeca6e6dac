// Checks every gradient and the properties of each norm scheme. Prints a table; exits with 1 if a
// row fails.
//
//   ./test_gpt            all rows
//   ./test_gpt -k NAME    rows whose name contains NAME
//
// What is compared: gradients in double with finite differences; float with double; bf16 with
// float; the GPU (real, or simulated by test_gpt_sim) with the CPU; float with an independent
// PyTorch model (stored fixtures of dev/reference). The error of a tensor is ‖a − b‖ / ‖b‖; a row
// reports the largest over its tensors.

#ifndef TESTING
#define TESTING // train_gpt.cpp without main
#endif
#include "train_gpt.cpp" // NOLINT(bugprone-suspicious-include)

#include <cstdio>
#include <map>

#include <nlohmann/json.hpp>

#include "dev/sim/simulated_gpu.h"
#include "gpt/base/ranks.h"
#include "gpt/base/terminal.h"
#include "gpt/cpu/gemm_kernel.h"
#include "gpt/cuda/gpu.h"
#include "gpt/model/lisa.h"
#include "gpt/run/probe.h"
#include "gpt/run/safetensors.h"

namespace lns {

// Largest errors allowed: of gradients against finite differences, of float against double, of bf16
// against float, and of float against PyTorch.
const double finite_difference_tolerance = 1e-6, float_tolerance = 1e-4, bf16_tolerance = 2e-2,
             torch_tolerance = 1e-5;

struct Row {
    std::string name;
    std::vector<std::pair<std::string, double>> errors = {}; // what was compared, and its error
    std::vector<double> tolerances = {};
    std::string note = {}; // why it failed, if not for an error
    bool printed = false;

    void add(const char* what, double error, double tolerance) {
        errors.push_back({what, error});
        tolerances.push_back(tolerance);
    }
    bool passed() const {
        for (size_t i = 0; i < errors.size(); i++)
            if (!(errors[i].second <= tolerances[i])) return false; // NaN fails
        return !errors.empty() && note.empty();
    }
    void print() {
        std::printf("%-4s %-66s", passed() ? "ok" : "FAIL", name.c_str());
        for (size_t i = 0; i < errors.size(); i++)
            std::printf("  %s %.1e%s", errors[i].first.c_str(), errors[i].second,
                        errors[i].second <= tolerances[i]
                            ? ""
                            : cat(" (at most ", tolerances[i], ")").c_str());
        std::printf("%s%s\n", note.empty() ? "" : "  ", note.c_str());
        std::fflush(stdout);
        printed = true;
    }
};

// ---------------------------------------------------------------------------------------------
// Test values and comparisons

using Doubles = std::vector<double>;

// Normal; value i depends on the name only. Values are kept, since most rows use the same ones.
Doubles random_values(size_t n, const std::string& name, double mean = 0, double std = 1) {
    static thread_local std::map<std::string, Doubles> all;
    Doubles &standard = all[name], x(n);
    for (size_t i = standard.size(); i < n; i++)
        standard.push_back(random_normal(1, fnv1a(name), i));
    for (size_t i = 0; i < n; i++) x[i] = mean + std * standard[i];
    return x;
}

template <class S> std::vector<S> as(const Doubles& x) {
    return std::vector<S>(x.begin(), x.end());
}

double norm(const Doubles& x) {
    double sum = 0;
    for (double v : x) sum += v * v;
    return std::sqrt(sum);
}

// ‖a − b‖ / max(‖b‖, floor)
template <class X> double relative_error(const std::vector<X>& a, const Doubles& b, double floor) {
    double difference = 0;
    for (size_t i = 0; i < b.size(); i++)
        difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    if (difference == 0) return 0;
    return std::sqrt(difference) / std::max(norm(b), floor);
}

// Small enough for the stencil where curvature is largest (a residual stream that a gate has almost
// closed), large enough for 11 digits in differences of the loss.
const double difference_step = 2e-4;

// The derivative at 0 of f() after move(step), by step: a five-point stencil with an error of
// O(h⁴).
double difference_quotient(const std::function<void(double)>& move,
                           const std::function<double()>& f) {
    const double h = difference_step;
    auto at = [&](double step) {
        move(step);
        return f();
    };
    const double near = at(h) - at(-h), far = at(2 * h) - at(-2 * h);
    move(0);
    return (8 * near - far) / (12 * h);
}

// Difference quotients of f, and the gradient's values for them. Every element of a small tensor is
// checked; of a large one some elements, and some random directions of length 1, each of which
// moves all elements.
struct Quotients {
    Doubles measured, expected;
};

// Appends those of the n elements at x; g is their gradient.
void measure(Quotients& out, double* x, const double* g, size_t n,
             const std::function<double()>& f) {
    const size_t all = 24, some = 6, directions = 3;
    const size_t step = n <= all ? 1 : n / some;
    for (size_t i = 0; i < n; i += step) {
        const double x0 = x[i];
        out.measured.push_back(difference_quotient([&](double h) { x[i] = x0 + h; }, f));
        out.expected.push_back(g[i]);
    }
    if (n <= all) return;
    const Doubles x0(x, x + n);
    for (size_t k = 0; k < directions; k++) {
        Doubles d = random_values(n, cat("direction ", k));
        const double length = norm(d);
        double slope = 0;
        for (size_t i = 0; i < n; i++) slope += g[i] * (d[i] /= length);
        auto move = [&](double h) {
            for (size_t i = 0; i < n; i++) x[i] = x0[i] + h * d[i];
        };
        out.measured.push_back(difference_quotient(move, f));
        out.expected.push_back(slope);
    }
}

// The rounding of f causes an error of about 3e-16 · |f| / h in each difference quotient, so
// smaller gradients have no correct digits. Returns the norm below which n of them are compared
// absolutely.
double quotient_floor(double f, size_t n) {
    return std::sqrt(double(n)) * 3e-16 * std::max(std::fabs(f), 1.0) / difference_step /
           finite_difference_tolerance;
}

// ---------------------------------------------------------------------------------------------
// Layers: y = f(x₁, x₂, …) and the gradients of Σ c · y, in double and in float, from the same
// templates

template <class S> using Tensors = std::vector<std::vector<S>>;

template <class S> struct LayerResult {
    std::vector<S> y;
    Tensors<S> gradients; // by each x
};

// run(x, c) returns y, and the gradients if c is not empty.
template <class Run>
Row check_layer(const std::string& name, const std::vector<Doubles>& x, Run run) {
    Row row{name};
    Tensors<double> xd = x;
    Doubles y = run(xd, Doubles()).y, c = random_values(y.size(), name + " cotangent");
    LayerResult<double> exact = run(xd, c);
    auto objective = [&] {
        Doubles out = run(xd, Doubles()).y;
        double sum = 0;
        for (size_t i = 0; i < out.size(); i++) sum += c[i] * out[i];
        return sum;
    };
    double worst = 0;
    for (size_t n = 0; n < xd.size(); n++) {
        Quotients q;
        measure(q, xd[n].data(), exact.gradients[n].data(), xd[n].size(), objective);
        worst = std::max(worst, relative_error(q.expected, q.measured,
                                               quotient_floor(objective(), q.measured.size())));
    }
    row.add("differences", worst, finite_difference_tolerance);

    Tensors<float> xf;
    for (const Doubles& tensor : x) xf.push_back(as<float>(tensor));
    LayerResult<float> rounded = run(xf, as<float>(c));
    double all = 0;
    for (const Doubles& g : exact.gradients) all = std::max(all, norm(g));
    worst = relative_error(rounded.y, exact.y, 0);
    for (size_t n = 0; n < xd.size(); n++)
        worst =
            std::max(worst, relative_error(rounded.gradients[n], exact.gradients[n], 1e-3 * all));
    row.add("float", worst, float_tolerance);
    return row;
}

Row check_embedding(bool scaled) {
    const int B = 2, T = 5, C = 19, V = 7;
    const std::vector<int> tokens = {3, 1, 3, 6, 0, 2, 2, 3, 5, 6};
    std::vector<Doubles> x = {random_values(V * C, "wte"), random_values(T * C, "wpe")};
    if (scaled) x.push_back({1.7});
    return check_layer(
        scaled ? "embedding, scaled" : "embedding", x,
        [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
            LayerResult<S> out{std::vector<S>(B * T * C), {}};
            for (const auto& tensor : x) out.gradients.emplace_back(tensor.size());
            const S *wte = x[0].data(), *wpe = x[1].data(), *scale = scaled ? x[2].data() : nullptr;
            embedding_forward(out.y.data(), tokens.data(), wte, wpe, scale, 0, B * T, T, C);
            if (c.empty()) return out;
            std::vector<S> dout = c;
            if (scaled)
                embedding_scale_backward(out.gradients[2].data(), dout.data(), tokens.data(), wte,
                                         wpe, scale, B * T, T, C);
            embedding_backward(out.gradients[0].data(), out.gradients[1].data(), tokens.data(),
                               dout.data(), B, T, C);
            return out;
        });
}

Row check_linear(int rows, int C, int OC) {
    return check_layer(
        cat("linear ", rows, " x ", C, " -> ", OC),
        {random_values(rows * C, "in"), random_values(OC * C, "w"), random_values(OC, "bias")},
        [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
            LayerResult<S> out{std::vector<S>(rows * OC), {}};
            matmul_forward(out.y.data(), x[0].data(), x[1].data(), x[2].data(), rows, C, OC);
            for (const auto& tensor : x) out.gradients.emplace_back(tensor.size());
            if (!c.empty())
                matmul_backward_input(out.gradients[0].data(), c.data(), x[1].data(), rows, C, OC),
                    matmul_backward_weight(out.gradients[1].data(), out.gradients[2].data(),
                                           c.data(), x[0].data(), rows, C, OC, false);
            return out;
        });
}

Row check_attention(AttentionShape a) {
    return check_layer(cat("attention B=", a.B, " T=", a.T, " NH=", a.NH, " KVH=", a.KVH,
                           " HS=", a.HS, a.window ? cat(" window=", a.window) : ""),
                       {random_values(a.rows() * a.row(), "qkv")},
                       [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
                           LayerResult<S> out{std::vector<S>(a.rows() * a.q_width()),
                                              {std::vector<S>(x[0].size())}};
                           std::vector<Acc<S>> lse(a.rows() * a.NH);
                           attention_forward(out.y.data(), lse.data(), x[0].data(), a);
                           if (!c.empty())
                               attention_backward(out.gradients[0].data(), c.data(), x[0].data(),
                                                  lse.data(), (const CosSin<Acc<S>>*)nullptr, a);
                           return out;
                       });
}

template <class A> std::vector<CosSin<A>> test_rotation(const AttentionShape& a) {
    std::vector<CosSin<A>> table(a.T * a.HS / 2);
    for (size_t i = 0; i < table.size(); i++)
        table[i] = {A(std::cos(0.3 * double(i))), A(std::sin(0.3 * double(i)))};
    return table;
}

// Attention applied to rotated q and k; its backward pass includes the rotation's.
Row check_rope() {
    const AttentionShape a{2, 5, 3, 1, 6};
    return check_layer("rope, then attention", {random_values(a.rows() * a.row(), "qkv")},
                       [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
                           const auto table = test_rotation<Acc<S>>(a);
                           LayerResult<S> out{std::vector<S>(a.rows() * a.q_width()),
                                              {std::vector<S>(x[0].size())}};
                           std::vector<S> qkv(x[0].size());
                           std::vector<Acc<S>> lse(a.rows() * a.NH);
                           qkv_forward<S>(qkv.data(), x[0].data(), nullptr, nullptr, {}, 0,
                                          table.data(), a);
                           attention_forward(out.y.data(), lse.data(), qkv.data(), a);
                           if (!c.empty())
                               attention_backward(out.gradients[0].data(), c.data(), qkv.data(),
                                                  lse.data(), table.data(), a);
                           return out;
                       });
}

// Norms of q and k as wholes; of their heads; of those and v's.
Row check_qkv_norm(const char* name, std::array<int, 3> norms) {
    AttentionShape a{2, 3, 4, 2, 5};
    a.q_norms = norms[0], a.k_norms = norms[1], a.v_norms = norms[2];
    const int Q = a.q_norm_width(), K = a.k_norm_width(), V = a.v_norm_width();
    return check_layer(
        name,
        {random_values(a.rows() * a.row(), "qkv"), random_values(Q, "q weight", 1, 0.3),
         random_values(K, "k weight", 1, 0.3), random_values(V, "v weight", 1, 0.3)},
        [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
            LayerResult<S> out{x[0], {c, std::vector<S>(Q), std::vector<S>(K), std::vector<S>(V)}};
            std::vector<S> raw(a.rows() * a.normed_width());
            std::vector<Acc<S>> scratch(row_chunks(a.rows()) * a.normed_width());
            std::vector<NormStats<Acc<S>>> stats(a.norms() * a.rows());
            const QkvPointers<const S> weights(x[1].data(), x[2].data(), x[3].data());
            qkv_forward<S>(out.y.data(), out.y.data(), raw.data(), stats.data(), weights, 1e-6,
                           nullptr, a);
            auto& g = out.gradients;
            if (!c.empty())
                qkv_norm_backward<S>(g[0].data(), raw.data(), stats.data(), weights,
                                     {g[1].data(), g[2].data(), g[3].data()}, scratch.data(), a);
            return out;
        });
}

// A later layer mixes its v with the first layer's, which gets gradients from both. x is qkv of
// either layer, then m.
Row check_value_residual() {
    const AttentionShape a{2, 3, 2, 1, 5};
    const int KV = a.kv_width();
    const size_t n = a.rows() * a.row();
    return check_layer(
        "value residual",
        {random_values(n, "qkv of the first layer"), random_values(n, "qkv"), {0.3}},
        [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
            LayerResult<S> out{x[0], {std::vector<S>(n), std::vector<S>(n), std::vector<S>(1)}};
            std::vector<S> later = x[1], first_v(a.rows() * KV), v(a.rows() * KV);
            const S *mix = x[2].data(), *none = nullptr;
            mix_values<S>(out.y.data(), first_v.data(), none, none, a);
            mix_values<S>(later.data(), v.data(), first_v.data(), mix, a);
            out.y.insert(out.y.end(), later.begin(), later.end());
            if (c.empty()) return out;
            auto& g = out.gradients;
            std::copy_n(c.begin(), n, g[0].begin());
            std::copy_n(c.begin() + n, n, g[1].begin());
            std::vector<Acc<S>> dvalues(a.rows() * KV), scratch(row_chunks(a.rows()));
            mix_values_backward<S>(g[1].data(), dvalues.data(), v.data(), first_v.data(), mix,
                                   g[2].data(), scratch.data(), a);
            mix_values_backward<S>(g[0].data(), dvalues.data(), first_v.data(), first_v.data(),
                                   nullptr, nullptr, scratch.data(), a);
            return out;
        });
}

Row check_activation(Activation activation) {
    const ActivationRow& row = activations[int(activation)];
    const int rows = 3, H = 21, hidden = rows * (row.gated ? 2 * H : H);
    return check_layer(row.name, {random_values(hidden, "h", 0, 2)},
                       [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
                           LayerResult<S> out{std::vector<S>(rows * H), {std::vector<S>(hidden)}};
                           activation_forward(activation, out.y.data(), x[0].data(), rows, H);
                           if (!c.empty())
                               activation_backward(activation, out.gradients[0].data(), c.data(),
                                                   x[0].data(), rows, H);
                           return out;
                       });
}

// y is the sum over rows; every second target is masked.
Row check_cross_entropy() {
    const int rows = 4, V = 37;
    const std::vector<int> targets = {5, -1, 36, -1};
    return check_layer("cross-entropy, masked targets", {random_values(rows * V, "logits", 0, 3)},
                       [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
                           LayerResult<S> out{std::vector<S>(1), {x[0]}};
                           std::vector<Acc<S>> losses(rows);
                           S* x0 = out.gradients[0].data();
                           cross_entropy(losses.data(), x0, c.empty() ? nullptr : x0,
                                         targets.data(), c.empty() ? 0 : double(c[0]), rows, V);
                           for (auto loss : losses) out.y[0] += S(loss);
                           return out;
                       });
}

// A junction with all its features; x is r_prev, b, y_prev, x₀, then the parameters.
Row check_junction(const std::string& name, Junction j, NormType type, bool weights, bool biases) {
    const int rows = 5, C = j.in_groups > 1 ? 12 : 11;
    j.in_scale = 0.7;
    if (j.branch && !j.omega) j.skip = 1.3;
    if (j.branch) j.beta = 0.8;
    std::vector<Doubles> x = {random_values(rows * C, "r_prev"), random_values(rows * C, "b", 0.5),
                              random_values(rows * C, "y_prev"), random_values(rows * C, "x0")};
    JunctionParams at; // offsets are in units of tensors: x[offset]
    auto add = [&](const char* what, size_t n, double mean) {
        x.push_back(random_values(n, what, mean, 0.4));
        return int64_t(x.size() - 1);
    };
    auto norm = [&](bool has, NormParams& p) {
        if (has && weights) p.weight = add("w", C, 1);
        if (has && biases) p.bias = add("bias", C, 0);
        if (has && type == NormType::dyt) p.alpha = add("alpha", 1, 0.6);
    };
    norm(j.branch_norm, at.branch), norm(j.out_norm, at.out), norm(j.in_norm, at.in);
    norm(j.reads_second, at.second);
    if (j.omega) at.omega = add("omega", C, 1.2);
    if (j.adds_start)
        at.start_skip = add("start_skip", 1, 0.9), at.start_weight = add("start_weight", 1, 0.3);
    if (j.gamma != Gamma::none) at.gamma = add("gamma", j.gamma == Gamma::vector ? C : 1, 0.5);
    if (j.gate) at.gate = add("gate", 1, 0.5);

    const Doubles r_prev = x[0];
    Doubles frozen; // the argument of stop(), before finite differences change x
    return check_layer(
        "junction: " + name, x, [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) mutable {
            auto pointers = [&](auto& tensors, auto kind) {
                using P = std::remove_pointer_t<decltype(kind)>;
                JunctionPointers<P> p;
                auto get = [&](int64_t i) -> P* { return i < 0 ? nullptr : tensors[i].data(); };
                p.branch_weight = get(at.branch.weight), p.branch_bias = get(at.branch.bias);
                p.out_weight = get(at.out.weight), p.out_bias = get(at.out.bias);
                p.in_weight = get(at.in.weight), p.in_bias = get(at.in.bias);
                p.second_weight = get(at.second.weight), p.second_bias = get(at.second.bias);
                p.branch_alpha = get(at.branch.alpha), p.out_alpha = get(at.out.alpha);
                p.in_alpha = get(at.in.alpha), p.second_alpha = get(at.second.alpha);
                p.gamma = get(at.gamma), p.omega = get(at.omega), p.gate = get(at.gate);
                p.start_skip = get(at.start_skip), p.start_weight = get(at.start_weight);
                return p;
            };
            LayerResult<S> out;
            for (const auto& tensor : x) out.gradients.emplace_back(tensor.size());
            std::vector<S> r(rows * C), u(rows * C), y(rows * C), start = x[3], stop;
            std::vector<JunctionStats<S>> stats(rows);
            JunctionArguments<S> a;
            a.junction = j, a.norm = type, a.eps = 1e-5, a.rows = rows, a.C = C;
            a.p = pointers(x, (const S*)nullptr);
            a.r_prev = x[0].data(), a.b = x[1].data();
            a.r = r.data(), a.u = u.data(), a.stats = stats.data();
            a.y_prev = x[2].data(), a.y = y.data(), a.x0 = start.data();
            if (j.gate && !frozen.empty()) stop = as<S>(frozen);
            junction_forward(a, stop.empty() ? nullptr : stop.data());
            if (j.gate && frozen.empty()) {
                frozen = r_prev;
                if (!j.gate_on_skip)
                    for (size_t i = 0; i < r.size(); i++) {
                        double before = double(r[i]);
                        if (j.adds_start)
                            before = (before - double(*a.p.start_weight) * double(start[i])) /
                                     double(*a.p.start_skip);
                        frozen[i] = before / (1 - silu(double(*a.p.gate)));
                    }
            }
            out.y = r;
            const bool has_u = j.in_norm || j.reads_second;
            if (has_u) out.y.insert(out.y.end(), u.begin(), u.end());
            if (j.second) out.y.insert(out.y.end(), y.begin(), y.end());
            if (c.empty()) return out;
            std::vector<S> dr(c.begin(), c.begin() + rows * C), du(rows * C), dy(rows * C);
            if (has_u) std::copy_n(c.begin() + rows * C, rows * C, du.begin());
            if (j.second) std::copy_n(c.end() - rows * C, rows * C, dy.begin());
            std::vector<Acc<S>> scratch(junction_scratch(rows, C));
            a.du = du.data(), a.dr = dr.data(), a.db = out.gradients[1].data();
            a.dy = dy.data(), a.dx0 = out.gradients[3].data();
            a.dp = pointers(out.gradients, (Acc<S>*)nullptr);
            junction_backward(a, scratch.data());
            out.gradients[0] = dr;
            if (j.second && !j.starts_second) out.gradients[2] = dy;
            if (!j.branch) out.gradients[3] = std::vector<S>(rows * C); // it became dr
            return out;
        });
}

// The junctions of a model whose embedding and branches are given, n streams (mHC) between them; x
// is these and each junction's φ, β and α, y every h.
Row check_streams(int n) {
    const int rows = 5, C = 6, junctions = 3;
    const StreamShape shape{n, C};
    const int M = shape.maps(), width = int(shape.width());
    std::vector<Doubles> x = {random_values(rows * C, "embedding")};
    for (int k = 1; k < junctions; k++) x.push_back(random_values(rows * C, cat("b ", k)));
    for (int k = 0; k + 1 < junctions; k++) {
        x.push_back(random_values(M * width, cat("weight ", k)));
        x.push_back(random_values(M, cat("bias ", k), 0, 2));
        x.push_back(random_values(3, cat("scale ", k), 0.5, 0.3));
    }
    return check_layer(
        cat("mHC, ", n, " streams"), x, [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
            LayerResult<S> out{std::vector<S>(junctions * rows * C), {}};
            for (const auto& tensor : x) out.gradients.emplace_back(tensor.size());
            Tensors<S> X(junctions, std::vector<S>(rows * width)),
                projected(junctions, std::vector<S>(rows * M)),
                maps = projected, rstd(junctions, std::vector<S>(rows));
            std::vector<S> dX(rows * width), dmaps(rows * M), dprojected(rows * M),
                scratch(streams_scratch(rows, shape));
            auto arguments = [&](int k) {
                StreamArguments<S> a;
                a.shape = shape, a.rows = rows;
                a.before = x[0].data();
                if (k > 0)
                    a.before = X[k - 1].data(), a.maps_before = maps[k - 1].data(),
                    a.b = x[k].data();
                a.X = X[k].data(), a.h = out.y.data() + k * rows * C;
                if (k + 1 == junctions) return a;
                const int first = junctions + 3 * k; // of the parameters
                a.weight = x[first].data(), a.bias = x[first + 1].data();
                a.scale = x[first + 2].data(), a.projected = projected[k].data();
                a.maps = maps[k].data(), a.rstd = rstd[k].data();
                a.dweight = out.gradients[first].data();
                a.dbias = out.gradients[first + 1].data();
                a.dscale = out.gradients[first + 2].data();
                return a;
            };
            for (int k = 0; k < junctions; k++) streams_forward(arguments(k));
            for (int k = junctions - 1; k >= 0 && !c.empty(); k--) {
                StreamArguments<S> a = arguments(k);
                a.dh = c.data() + k * rows * C, a.dX = dX.data(), a.dmaps = dmaps.data();
                a.dprojected = dprojected.data();
                a.db = a.dembedded = out.gradients[k].data();
                streams_backward(a, scratch.data());
            }
            return out;
        });
}

// What sublayers read by attention over the sources before them; x is the embedding, the branches,
// then each junction's query and key weight.
Row check_sources(int branches, int block) {
    const int rows = 5, C = 7;
    const SourceShape shape{C, block};
    std::vector<Doubles> x = {random_values(rows * C, "embedding"),
                              random_values(branches * rows * C, "branches")};
    for (int k = 1; k <= branches; k++) {
        x.push_back(random_values(C, cat("query ", k)));
        x.push_back(random_values(C, cat("key weight ", k), 1, 0.3));
    }
    return check_layer(cat("attention residuals, ", branches, " branches in blocks of ", block), x,
                       [=]<class S>(const Tensors<S>& x, const std::vector<S>& c) {
                           LayerResult<S> out{std::vector<S>(branches * rows * C), {}};
                           for (const auto& tensor : x) out.gradients.emplace_back(tensor.size());
                           std::vector<S> dsources(shape.count(branches) * rows * C),
                               scratch(sources_scratch(rows, C));
                           auto arguments = [&](int k) {
                               SourceArguments<S> a;
                               a.shape = shape, a.k = k, a.rows = rows, a.eps = 1e-5;
                               a.embedded = x[0].data(), a.branches = x[1].data(),
                               a.stride = rows * C;
                               a.query = x[2 * k].data(), a.key_weight = x[2 * k + 1].data();
                               a.h = out.y.data() + (k - 1) * rows * C;
                               return a;
                           };
                           for (int k = 1; k <= branches; k++) sources_forward(arguments(k));
                           if (c.empty()) return out;
                           for (int k = branches; k >= 1; k--) {
                               SourceArguments<S> a = arguments(k);
                               a.dh = c.data() + (k - 1) * rows * C, a.last = k == branches;
                               a.dsources = dsources.data(), a.dstride = rows * C;
                               a.db = out.gradients[1].data() + (k - 1) * rows * C;
                               a.dquery = out.gradients[2 * k].data();
                               a.dkey_weight = out.gradients[2 * k + 1].data();
                               sources_backward(a, scratch.data());
                           }
                           std::copy_n(dsources.begin(), rows * C, out.gradients[0].begin());
                           return out;
                       });
}

// All forms of matrix products, by gemm() in float and by plain loops, against the definition.
Row check_gemm() {
    Row row{"matrix products, all forms"};
    double worst = 0, worst_plain = 0;
    for (auto [m, n, k] : {std::array{1, 1, 1}, {3, 5, 7}, {65, 130, 257}, {33, 64, 19}})
        for (int form = 0; form < 16; form++) {
            const bool ta = form & 1, tb = form & 2, accumulate = form & 4;
            const bool has_bias = (form & 8) && !accumulate;
            Doubles a = random_values(m * k, "a"), b = random_values(k * n, "b"),
                    out = random_values(m * n, "out"), bias = random_values(n, "bias");
            std::vector<float> af = as<float>(a), bf = as<float>(b), outf = as<float>(out),
                               biasf = as<float>(bias), plain = outf;
            gemm(ta, tb, m, n, k, af.data(), bf.data(), outf.data(), accumulate,
                 has_bias ? biasf.data() : nullptr);
            plain_gemm(ta, tb, m, n, k, af.data(), bf.data(), plain.data(), accumulate,
                       has_bias ? (const float*)biasf.data() : nullptr);
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) {
                    double sum = accumulate ? out[i * n + j] : has_bias ? bias[j] : 0;
                    for (int p = 0; p < k; p++)
                        sum += a[ta ? p * m + i : i * k + p] * b[tb ? j * k + p : p * n + j];
                    out[i * n + j] = sum;
                }
            worst = std::max(worst, relative_error(outf, out, 0));
            worst_plain = std::max(worst_plain, relative_error(plain, out, 0));
        }
    row.add("gemm", worst, 1e-6); // float rounding, 6e-8 · sqrt(k)
    row.add("plain", worst_plain, 1e-6);
    return row;
}

// The columns of x, (rows, columns), as rows.
template <class X> std::vector<X> transposed(const std::vector<X>& x, int64_t rows) {
    const int64_t columns = int64_t(x.size()) / rows;
    std::vector<X> out(x.size());
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[j * rows + i] = x[i * columns + j];
    return out;
}

// Long sums of heavy-tailed numbers z e^(2y), like the head's gradients over a vocabulary, by every
// implementation of matrix products. All factors are bf16, so products are exact and only the
// rounding of additions is measured. The root mean square error of an addition is 0.4 · 2^-24 of
// the partial sum, which is 0.7 of the final sum on average. If parts of n are summed from zero,
// the expected error is 0.28 · 2^-24 √(n + K/n): 3.5e-7 for n = 256, 5.5e-7 for n = 1,024; in a
// single chain it is 3.7e-6.
Row check_long_sums(const std::string& name) {
    const int64_t m = 136, n = 256, k = 50000; // too many sums for split_gemm()
    const Doubles z = random_values(k, "z"), y = random_values(k, "y"), w = random_values(k, "w");
    // Rows and columns are rotations of the same numbers, so that every sum differs.
    std::vector<bf16> a(m * k), b(k * n);
    for (int64_t p = 0; p < k; p++) {
        const bf16 heavy = bf16(float(z[p] * std::exp(2 * y[p]))), other = bf16(float(w[p]));
        for (int64_t i = 0; i < m; i++) a[i * k + (p + 331 * i) % k] = heavy;
        for (int64_t j = 0; j < n; j++) b[(p + 173 * j) % k * n + j] = other;
    }
    const Doubles ad(a.begin(), a.end()), bd(b.begin(), b.end()),
        before = random_values(m * n, "c");
    Doubles exact(m * n);
    gemm(false, false, m, n, k, ad.data(), bd.data(), exact.data(), false);
    Doubles joined = exact;
    for (int64_t i = 0; i < m * n; i++) joined[i] += float(before[i]);

    auto worst = [&]<class T>(const std::vector<T>& a, const std::vector<T>& b, auto product) {
        double error = 0;
        const std::vector<T> at = transposed(a, m), bt = transposed(b, k);
        for (int form = 0; form < 8; form++) {
            const bool ta = form & 1, tb = form & 2, accumulate = form & 4;
            std::vector<float> out = as<float>(before);
            product(ta, tb, (ta ? at : a).data(), (tb ? bt : b).data(), out.data(), accumulate);
            error = std::max(error, relative_error(out, accumulate ? joined : exact, 0));
        }
        return error;
    };
    const std::vector<float> af(a.begin(), a.end()), bf(b.begin(), b.end());
    const float* none = nullptr;
    auto by_gemm = [&](bool ta, bool tb, const auto* a, const auto* b, float* c, bool add) {
        gemm(ta, tb, m, n, k, a, b, c, add, none);
    };
    auto by_kernel = [&](bool ta, bool tb, const float* a, const float* b, float* c, bool add) {
        kernel_gemm(*float_kernel(), ta, tb, m, n, k, a, b, c, add, none);
    };
    auto by_loops = [&](bool ta, bool tb, const float* a, const float* b, float* c, bool add) {
        plain_gemm(ta, tb, m, n, k, a, b, c, add, none);
    };
    Row row{name};
    row.add("gemm", worst(af, bf, by_gemm), 1e-6);
    row.add("kernel", worst(af, bf, by_kernel), 1e-6);
    row.add("plain", worst(af, bf, by_loops), 1e-6);
    row.add("bf16", worst(a, b, by_gemm), 1e-6);
    return row;
}

// The softmax over a vocabulary: the relative error of Σ eˣ is that of every probability.
Row check_long_softmax(const std::string& name) {
    Row row{name};
    const int V = 50000;
    for (double spread : {0.02, 1.0, 4.0}) {
        const Doubles x = random_values(V, cat("logits ", spread), 0, spread);
        Doubles exact = x;
        std::vector<float> rounded = as<float>(x);
        for (int i = 0; i < V; i++) exact[i] = rounded[i];
        const int target = 7;
        double loss;
        float loss_float;
        cross_entropy(&loss, exact.data(), exact.data(), &target, 1, 1, V);
        cross_entropy(&loss_float, rounded.data(), rounded.data(), &target, 1, 1, V);
        double sum = 0, sum_exact = 0;
        for (int i = 0; i < V; i++)
            if (i != target) sum += rounded[i], sum_exact += exact[i];
        row.add(spread == 1  ? "normal"
                : spread < 1 ? "nearly uniform"
                             : "peaked",
                std::fabs(sum / sum_exact - 1), 5e-7);
    }
    return row;
}

Row check_exp() {
    Row row{"exp and tanh in float, units in the last place"};
    double worst = 0, worst_tanh = 0;
    for (int i = 0; i <= 200000; i++) {
        float x = -87.0f + 175.0f * float(i) / 200000;
        double exact = std::exp(double(x));
        double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::max(worst, std::fabs(double(exp_(x)) - exact) / unit);
        x = x < 0 ? -std::exp(x / 10) : std::exp(x / 10 - 6); // to 1 below 0, to 20 above
        exact = std::tanh(double(x));
        unit = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst_tanh = std::max(worst_tanh, std::fabs(double(tanh_(x)) - exact) / unit);
    }
    row.add("exp", worst, 2), row.add("tanh", worst_tanh, 3);
    if (!std::isnan(tanh_(std::nanf(""))) || tanh_(-INFINITY) != -1)
        row.note = "tanh(NaN) is not NaN, or tanh(−∞) not −1";
    if (!std::isnan(exp_(std::nanf("")))) row.note = "exp(NaN) is not NaN";
    if (!(exp_(-1e9f) < 2e-38f) || !(exp_(1e9f) > 1e38f)) row.note = "exp does not saturate";
    return row;
}

// ---------------------------------------------------------------------------------------------
// Models

struct TestModel {
    std::string architecture;
    Config config;
    int B = 2, T = 7;
};

// Architectures, and variants of LLaMA's: grouped heads; Llama 3's positions; and some with DyT.
const std::vector<std::string> architectures = {"gpt2",    "llama",   "llama-gqa", "llama-3",
                                                "qwen2",   "qwen3",   "olmo",      "olmo2",
                                                "mistral", "smollm3", "llama-dyt", "gpt2-dyt"};

bool is_dyt(const std::string& architecture_name) { return architecture_name.ends_with("-dyt"); }

Config variant(const std::string& architecture_name) {
    Config c = architecture(architecture_name.starts_with("llama-")  ? "llama"
                            : architecture_name.starts_with("gpt2-") ? "gpt2"
                                                                     : architecture_name);
    if (is_dyt(architecture_name)) c.norm = NormType::dyt;
    return c;
}

Config small_config(const std::string& architecture_name) {
    Config c = variant(architecture_name);
    const bool plain =
        c.model_type == "gpt2" || architecture_name == "llama" || c.model_type.starts_with("olmo");
    c.vocab_size = 23;
    c.layers = 3;
    c.heads = plain ? 3 : 4;
    c.kv_heads = plain ? 3 : 2;
    c.width = c.heads * 4;
    c.mlp_width = 13;
    c.positions = 9;
    c.tied = c.model_type == "gpt2" || c.model_type == "qwen2";
    if (c.model_type == "qwen3") c.head_size = 6;
    if (c.model_type == "mistral") c.window = 3;
    if (architecture_name == "llama-3") { // channels of each kind: kept, between, slower
        c.head_size = 8, c.rope_theta = 10;
        c.rope_scaling = {RopeScaling::llama3, 8, 1, 4, 30};
        c.qkv_bias = c.attn_out_bias = true;
    }
    if (c.model_type == "smollm3") {
        c.rotated_layers = {true, false, true}, c.window = 4;
        c.window_layers = {false, true, false};
        c.rope_scaling = {RopeScaling::linear, 2};
        c.qkv_bias = c.attn_out_bias = c.mlp_bias = true;
    }
    return c;
}

// Every scheme of the table, with and without additions. Those that only change initial weights
// are check_initialization's.
std::vector<std::string> all_schemes() {
    std::vector<std::string> names;
    for (const SchemeRow& row : scheme_table()) {
        std::string name = row.name;
        if (row.mixing != Mixing::sum) {
            names.insert(names.end(), {name, name + ":2"});
            continue;
        }
        if (row.number_of) name += row.grouped ? ":2" : ":1";
        names.push_back(name);
        if (!row.reads_second) names.push_back(name + "+gpas");
    }
    for (const char* name : {"lns+gpas-each", "pre+x0", "peri+x0", "mix:1+gpas+x0", "pre+prores:5",
                             "post+prores:5", "pre+value-residual", "lns+x0+value-residual"})
        names.push_back(name);
    return names;
}

// Those that a model of this architecture is tested under: norm schemes know nothing of positions,
// windows and activations, so one architecture with RMSNorm and one with LayerNorm need them all.
std::vector<std::string> schemes_of(const std::string& architecture_name) {
    if (architecture_name == "llama" || architecture_name == "gpt2") return all_schemes();
    if (is_dyt(architecture_name)) // norms of every kind
        return {"pre", "lns", "mix:1", "sandwich", "peri", "layerscale", "siamese", "hybrid"};
    return {"pre",           "lns",  "lns-init", "mix:1+gpas",
            "sandwich+gpas", "peri", "siamese",  "hybrid+value-residual"};
}

// Whether the architecture has what the scheme needs.
bool supports_scheme(const Config& c) {
    return c.norm_weight || c.scheme.row->depth != DepthScale::init_weight;
}

// Generic values: norm weights around 1, biases and gates other than 0.
Doubles test_values(const Param& p) {
    const size_t n = size_t(p.size());
    auto named = [&](const char* part) { return p.name.find(part) != std::string::npos; };
    if (p.decay) return random_values(n, p.name, 0, 1 / std::sqrt(double(p.shape[1])));
    if (named(".alpha")) return random_values(n, p.name, 0.6, 0.1);
    if (named("embed_scale")) return random_values(n, p.name, 1.5, 0.1);
    if (named("gate") && n == 1) return random_values(n, p.name, -0.1, 0.1); // 1 would cancel r
    if (named("_omega") || named("x0_skip")) return random_values(n, p.name, 1.2, 0.3);
    if (named("_gamma")) return random_values(n, p.name, 0.6, 0.3);
    if (named("value_mix")) return random_values(n, p.name, 0.4, 0.3);
    if (named("norm") || named("ln_")) return random_values(n, p.name, named("bias") ? 0 : 1, 0.3);
    return random_values(n, p.name, 0, 0.3);
}

template <class S> void fill_parameters(CpuModel<S>& model) {
    for (const Param& p : model.registry.params) {
        Doubles values = test_values(p);
        for (size_t i = 0; i < values.size(); i++)
            model.parameters[p.offset + i] = S(float(values[i]));
    }
}

void test_batch(const Config& c, int n, std::vector<int>& inputs, std::vector<int>& targets,
                bool masked) {
    inputs.resize(n), targets.resize(n);
    for (int i = 0; i < n; i++) {
        inputs[i] = int(random_below(c.vocab_size, 1, 1, i));
        targets[i] = masked && i % 4 == 1 ? -1 : int(random_below(c.vocab_size, 1, 2, i));
    }
}

// Tensors with a single element (gates, SkipInit's γ) count as one, since the gradient of one of
// them may be 0 up to rounding: the final norm cancels the last gate's scale.
std::string tensor_of(const Param& p) {
    const bool embedding = p.name.find("embed") != std::string::npos; // not of a layer
    return p.size() == 1 && !embedding ? "scalars" : p.name;
}

// Gradients by tensor name.
template <class S> std::map<std::string, Doubles> gradients_of(const CpuModel<S>& model) {
    std::map<std::string, Doubles> all;
    for (const Param& p : model.registry.params) {
        Doubles& g = all[tensor_of(p)];
        for (int64_t i = 0; i < p.size(); i++) g.push_back(double(model.gradients[p.offset + i]));
    }
    return all;
}

double compare_gradients(const std::map<std::string, Doubles>& a,
                         const std::map<std::string, Doubles>& b, double floor_share) {
    double all = 0, worst = 0;
    for (const auto& [name, g] : b) all += norm(g) * norm(g);
    for (const auto& [name, g] : b)
        worst = std::max(worst, relative_error(a.at(name), g, floor_share * std::sqrt(all)));
    return worst;
}

// The gradient of every parameter against finite differences of the loss.
Row check_model(const std::string& architecture_name, const std::string& scheme, int B, int T,
                bool masked) {
    Config c = small_config(architecture_name);
    c.scheme = parse_scheme(scheme);
    c.scheme.lns_power = 0.7;
    if (c.scheme.prores) c.scheme.step = 7;
    complete_config(c);
    Row row{architecture_name + "  " + scheme};
    if (B != 2 || T != 7) row.name += cat("  B=", B, " T=", T);

    std::vector<int> inputs, targets;
    test_batch(c, B * T, inputs, targets, masked);
    CpuModel<double> model(c, B, T, {});
    fill_parameters(model);
    const double scale = 1.0 / double(B * T);
    const double loss = model.loss_and_gradients(inputs.data(), targets.data(), B, T, scale);

    // Finite differences keep the argument of stop() constant.
    std::vector<Doubles> frozen(2 * c.layers + 1);
    for (int k = 1; k <= 2 * c.layers; k++) {
        Junction j = junction(c.scheme, c.layers, k);
        if (!j.gate) continue;
        const double* r = model.residual(j.gate_on_skip ? k - 1 : k);
        frozen[k].assign(r, r + model.rows() * c.width);
        const double gate = silu(model.parameters[model.registry.junctions[k].gate]);
        const JunctionParams& p = model.registry.junctions[k];
        for (size_t i = 0; i < frozen[k].size() && !j.gate_on_skip; i++) {
            double& value = frozen[k][i];
            if (j.adds_start)
                value = (value - model.parameters[p.start_weight] * model.start()[i]) /
                        model.parameters[p.start_skip];
            value /= 1 - gate;
        }
        model.stopped[k] = frozen[k].data();
    }
    auto objective = [&] { return scale * model.loss(inputs.data(), targets.data(), B, T); };
    std::map<std::string, Quotients> quotients;
    for (const Param& p : model.registry.params) {
        const Doubles g(model.gradients + p.offset, model.gradients + p.offset + p.size());
        measure(quotients[tensor_of(p)], model.parameters + p.offset, g.data(), g.size(),
                objective);
    }
    double worst = 0;
    for (const auto& [name, q] : quotients)
        worst = std::max(worst, relative_error(q.expected, q.measured,
                                               quotient_floor(scale * loss, q.measured.size())));
    row.add("differences", worst, finite_difference_tolerance);
    return row;
}

// Float against double. Separate from check_model, which runs in parallel: gemm() in float may be
// oneDNN, whose primitives run on one thread at a time.
void check_float(Row& row, const std::string& architecture_name, const std::string& scheme, int B,
                 int T, bool masked) {
    Config c = small_config(architecture_name);
    c.scheme = parse_scheme(scheme);
    c.scheme.lns_power = 0.7;
    if (c.scheme.prores) c.scheme.step = 7;
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, B * T, inputs, targets, masked);
    CpuModel<double> exact(c, B, T, {});
    CpuModel<float> model(c, B, T, {});
    fill_parameters(exact), fill_parameters(model);
    const double scale = 1.0 / double(B * T);
    const double loss = exact.loss_and_gradients(inputs.data(), targets.data(), B, T, scale);
    const double rounded = model.loss_and_gradients(inputs.data(), targets.data(), B, T, scale);
    // The resolution of float is 6e-8 of the largest terms, so the error of a small tensor is
    // relative to 1e-3 of the whole gradient.
    double error = compare_gradients(gradients_of(model), gradients_of(exact), 1e-3);
    row.add("float", std::max(error, std::fabs(rounded - loss) / loss), float_tolerance);
}

// A model wide enough that rounding errors of 2^-9 average out in its sums.
Config bf16_config(const std::string& architecture_name, const std::string& scheme) {
    Config c = small_config(architecture_name);
    c.vocab_size = 97;
    c.width = c.heads * 32;
    c.head_size = 0;
    c.mlp_width = 3 * c.width;
    c.positions = 32;
    c.scheme = parse_scheme(scheme);
    complete_config(c);
    return c;
}

// bf16 against float, at the same weights, exact in bf16. Matrices have about the initial standard
// deviation of 0.02 under every scheme: with larger weights attention is sharp, and an absolute
// error of x becomes a relative error of eˣ (deepnorm's own initialization, with Xavier's weights
// in q and k, gave errors of 1.8e-2 to 2.3e-2, depending on the seed).
void check_bf16(Row& row, const std::string& architecture_name, const std::string& scheme) {
    const Config c = bf16_config(architecture_name, scheme);
    const int B = 2, T = c.positions;
    std::vector<int> inputs, targets;
    test_batch(c, B * T, inputs, targets, true);
    CpuModel<float> exact(c, B, T, {});
    CpuModel<bf16> model(c, B, T, {});
    exact.initialize(1);
    for (const Param& p : exact.registry.params) {
        const Doubles values =
            random_values(size_t(p.size()), p.name, 0, 0.25 / std::sqrt(c.width));
        for (int64_t i = p.offset; i < p.offset + p.size(); i++) {
            if (p.decay) exact.parameters[i] = float(values[i - p.offset]);
            exact.parameters[i] = float(bf16(exact.parameters[i]));
            model.set_parameter(i, exact.parameters[i]);
        }
    }
    const double scale = 1.0 / double(B * T);
    const double loss = exact.loss_and_gradients(inputs.data(), targets.data(), B, T, scale);
    const double rounded = model.loss_and_gradients(inputs.data(), targets.data(), B, T, scale);
    // A tensor below 1/100 of the whole gradient is the remainder of sums that cancel (the bias of
    // k does not change a softmax; a gate's gradient is one sum over all channels), so its error is
    // relative to that.
    double error = compare_gradients(gradients_of(model), gradients_of(exact), 1e-2);
    row.add("bf16", std::max(error, std::fabs(rounded - loss) / loss), bf16_tolerance);
}

// ---------------------------------------------------------------------------------------------
// Against PyTorch: dev/reference/fixtures, made by dev/reference/make_fixtures.py

Config fixture_config(const nlohmann::json& j) {
    Config c = variant(j["architecture"]);
    c.vocab_size = j["vocab_size"], c.width = j["hidden_size"], c.layers = j["num_hidden_layers"];
    c.heads = j["num_attention_heads"], c.kv_heads = j["num_key_value_heads"];
    c.mlp_width = j["intermediate_size"], c.positions = j["max_position_embeddings"];
    c.norm_eps = j["norm_eps"], c.tied = j["tie_word_embeddings"];
    if (!c.rope()) return c;
    c.rope_theta = j["rope_theta"];
    c.head_size = j["head_dim"];
    c.qkv_bias |= bool(j["attention_bias"]), c.attn_out_bias = j["attention_bias"];
    c.mlp_bias = j["mlp_bias"];
    c.window = j["sliding_window"];
    c.window_layers = j["window_layers"].get<std::vector<bool>>();
    c.rotated_layers = j["rotated_layers"].get<std::vector<bool>>();
    const nlohmann::json& scaling = j["rope_scaling"];
    if (scaling.empty()) return c;
    c.rope_scaling = {RopeScaling::linear, scaling["factor"]};
    if (scaling["rope_type"] == "llama3")
        c.rope_scaling = {RopeScaling::llama3, scaling["factor"], scaling["low_freq_factor"],
                          scaling["high_freq_factor"], scaling["original_max_position_embeddings"]};
    return c;
}

// Converts values from the file's layout to that of parameters.
Doubles from_file(const Param& p, const Doubles& values) {
    if (!p.transposed) return values;
    Doubles out(values.size());
    const int64_t rows = p.shape[0], columns = p.shape[1];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[i * columns + j] = values[j * rows + i];
    return out;
}

template <class S>
double fixture_error(const Safetensors& file, const Config& c, const std::string& scheme) {
    auto tensor = [&](const std::string& name) {
        const TensorView& view = file.at(name);
        Doubles values(view.bytes / dtype_bytes(view.dtype));
        file.read_f64(view, values.data());
        return values;
    };
    auto tokens = [&](const std::string& name) {
        const TensorView& view = file.at(name);
        std::vector<int> values(view.bytes / sizeof(int));
        std::memcpy(values.data(), view.data, view.bytes);
        return values;
    };
    const std::vector<int> inputs = tokens("inputs"), targets = tokens("targets");
    const int B = int(file.at("inputs").shape[0]), T = int(file.at("inputs").shape[1]);
    const auto count = std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; });

    CpuModel<S> model(c, B, T, {});
    for (const Param& p : model.registry.params) {
        Doubles values = from_file(p, tensor("param." + p.name));
        for (int64_t i = 0; i < p.size(); i++) model.parameters[p.offset + i] = S(values[i]);
    }
    const double sum =
        model.loss_and_gradients(inputs.data(), targets.data(), B, T, 1.0 / double(count));
    std::vector<float> logits(size_t(B) * T * c.vocab_size);
    model.logits(inputs.data(), B, T, false, logits.data());

    std::map<std::string, Doubles> expected;
    for (const Param& p : model.registry.params) {
        Doubles g = from_file(p, tensor(scheme + "/grad." + p.name));
        Doubles& all = expected[tensor_of(p)];
        all.insert(all.end(), g.begin(), g.end());
    }
    const double loss = tensor(scheme + "/loss")[0];
    return std::max({std::fabs(sum / double(count) - loss) / loss,
                     relative_error(logits, tensor(scheme + "/logits"), 0),
                     compare_gradients(gradients_of(model), expected, 0)});
}

std::vector<Row> check_fixtures(const std::string& filter) {
    std::vector<Row> rows;
    for (const std::string& name : architectures) {
        Safetensors file("dev/reference/fixtures/" + name + ".safetensors");
        Config c = fixture_config(nlohmann::json::parse(file.metadata().at("config")));
        for (const std::string scheme : nlohmann::json::parse(file.metadata().at("schemes"))) {
            Row row{"PyTorch: " + name + "  " + scheme};
            if (row.name.find(filter) == std::string::npos) continue;
            c.scheme = parse_scheme(scheme);
            complete_config(c);
            row.add("float", fixture_error<float>(file, c, scheme), torch_tolerance);
            // In double, the only error is the rounding of the stored float32 values.
            row.add("double", fixture_error<double>(file, c, scheme), 1e-6);
            rows.push_back(row);
        }
    }
    return rows;
}

// ---------------------------------------------------------------------------------------------
// Properties of schemes, architectures and passes

template <class S> struct Pass {
    double loss;
    std::vector<float> logits;
    std::vector<Acc<S>> gradients;
};

template <class S>
Pass<S> pass(CpuModel<S>& model, int B, int T, const std::vector<int>& inputs,
             const std::vector<int>& targets) {
    Pass<S> out;
    model.zero_gradients();
    out.loss = model.loss_and_gradients(inputs.data(), targets.data(), B, T, 0.1);
    out.gradients.assign(model.gradients.begin(), model.gradients.end());
    out.logits.resize(size_t(B) * T * model.config.vocab_size);
    model.logits(inputs.data(), B, T, false, out.logits.data());
    return out;
}

Pass<float> pass_of(Config c, const std::string& scheme, double lns_power = 0.5) {
    c.scheme = parse_scheme(scheme);
    c.scheme.lns_power = lns_power;
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 14, inputs, targets, true);
    CpuModel<float> model(c, 2, 7, {});
    fill_parameters(model);
    return pass(model, 2, 7, inputs, targets);
}

// 0 if all bits are equal, else 1.
double bits_differ(const Pass<float>& a, const Pass<float>& b) {
    auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
        return x.size() == y.size() &&
               std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
    };
    return same(a.logits, b.logits) && same(a.gradients, b.gradients) && a.loss == b.loss ? 0 : 1;
}

// The two schemes give the same bits; power is --lns-power for the first.
Row check_same_bits(const std::string& architecture_name, const std::string& a, double power,
                    const std::string& b) {
    Config c = small_config(architecture_name);
    Row row{cat("claim: ", architecture_name, "  ", a, power == 0 ? " --lns-power 0" : "",
                " equals ", b, ", bit for bit")};
    row.add("differ", bits_differ(pass_of(c, a, power), pass_of(c, b)), 0);
    return row;
}

// Multiplying the scales of LNS into the norms' weights and biases gives the same model under pre.
Row check_folded(const std::string& architecture_name) {
    Row row{"claim: " + architecture_name + "  lns folded into its norm weights is pre"};
    Config c = small_config(architecture_name);
    c.scheme = parse_scheme("lns");
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 14, inputs, targets, true);
    CpuModel<double> lns(c, 2, 7, {});
    fill_parameters(lns);
    c.scheme = parse_scheme("pre");
    CpuModel<double> folded(c, 2, 7, {});
    fill_parameters(folded);
    for (int k = 0; k <= 2 * c.layers; k++) {
        const double scale = junction(lns.config.scheme, c.layers, k).in_scale;
        const NormParams& p = folded.registry.junctions[k].in;
        for (int64_t at : {p.weight, p.bias})
            for (int i = 0; i < c.width && at >= 0; i++) folded.parameters[at + i] *= scale;
    }
    Pass<double> a = pass(folded, 2, 7, inputs, targets), b = pass(lns, 2, 7, inputs, targets);
    row.add("logits", relative_error(a.logits, Doubles(b.logits.begin(), b.logits.end()), 0), 1e-7);
    row.add("loss", std::fabs(a.loss - b.loss) / b.loss, 1e-13);
    return row;
}

// Equal streams, read with weights of sum 1, and equal weights of all sources are Pre-LN, but for
// eps: mHC with α = 0 and attention residuals with queries of 0 start so.
Row check_starts_as_pre(const std::string& architecture_name, const std::string& scheme) {
    Row row{cat("claim: ", architecture_name, "  ", scheme, " starts as pre")};
    Config c = small_config(architecture_name);
    c.norm_eps = 1e-14;
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 14, inputs, targets, true);
    c.scheme = parse_scheme("pre");
    CpuModel<double> pre(c, 2, 7, {});
    c.scheme = parse_scheme(scheme);
    CpuModel<double> model(c, 2, 7, {});
    fill_parameters(pre), model.initialize(1);
    for (const Param& p : model.registry.params) {
        const Param* same = pre.registry.find(p.name);
        for (int64_t i = 0; i < p.size(); i++)
            if (same || p.name.ends_with("_streams.scale"))
                model.parameters[p.offset + i] = same ? pre.parameters[same->offset + i] : 0;
    }
    const double loss = pre.loss_and_gradients(inputs.data(), targets.data(), 2, 7, 1);
    row.add("loss",
            std::fabs(model.loss_and_gradients(inputs.data(), targets.data(), 2, 7, 1) / loss - 1),
            1e-10);
    row.add("gradients", compare_gradients(gradients_of(model), gradients_of(pre), 1e-3), 1e-9);
    return row;
}

// The scale is 1/sqrt(layer) on both norms of a layer, and 1 on the final norm.
Row check_lns_scales() {
    Row row{"claim: lns scales by 1/sqrt(1), 1/sqrt(1), 1/sqrt(2), 1/sqrt(2), ..., final 1"};
    Scheme scheme = parse_scheme("lns");
    double worst = 0;
    for (int k = 0; k < 24; k++) {
        const int layer = k / 2 + 1;
        worst = std::max(
            worst, std::fabs(junction(scheme, 12, k).in_scale - 1 / std::sqrt(double(layer))));
    }
    worst = std::max(worst, std::fabs(junction(scheme, 12, 24).in_scale - 1));
    row.add("scale", worst, 1e-15);
    scheme.lns_mlp = false;
    if (junction(scheme, 12, 5).in_scale != 1 || junction(scheme, 12, 4).in_scale == 1)
        row.note = "--lns-sites attn changes the MLP's norms";
    return row;
}

Row check_causal(const std::string& architecture_name, const std::string& scheme) {
    Row row{
        cat("claim: ", architecture_name, "  ", scheme, "  tokens do not depend on later ones")};
    Config c = small_config(architecture_name);
    c.scheme = parse_scheme(scheme);
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 7, inputs, targets, false);
    CpuModel<double> model(c, 1, 7, {.purpose = Purpose::score});
    fill_parameters(model);
    const int V = c.vocab_size;
    std::vector<float> before(7 * V), after(7 * V), last(V);
    model.logits(inputs.data(), 1, 7, false, before.data());
    model.logits(inputs.data(), 1, 7, true, last.data());
    inputs[4] = (inputs[4] + 1) % V;
    model.logits(inputs.data(), 1, 7, false, after.data());
    row.add("differ", !std::equal(before.begin(), before.begin() + 4 * V, after.begin()), 0);
    if (std::equal(before.begin() + 4 * V, before.begin() + 5 * V, after.begin() + 4 * V))
        row.note = "a position does not depend on its own token";
    if (!std::equal(last.begin(), last.end(), before.begin() + 6 * V))
        row.note = "the last position's logits differ if only they are requested";
    return row;
}

// Logits computed token by token with the KV cache, as when generating text, equal those of the
// whole sequence, also after earlier tokens change; and of a model that keeps no k and v.
Row check_continuation(const std::string& architecture_name, const std::string& scheme) {
    Row row{
        cat("claim: ", architecture_name, "  ", scheme, "  generating equals the whole sequence")};
    Config c = small_config(architecture_name);
    c.scheme = parse_scheme(scheme);
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 9, inputs, targets, false);
    CpuModel<double> whole(c, 1, 9, {.purpose = Purpose::score}),
        parts(c, 1, 9, {.purpose = Purpose::generate}),
        without(c, 1, 9, {.recompute = Recompute::layers});
    fill_parameters(whole), fill_parameters(parts), fill_parameters(without);
    const int V = c.vocab_size;
    std::vector<float> expected(V), found(V);
    double worst = 0;
    for (int t : {2, 3, 4, 9, 5, 6, 3}) {
        if (t == 5) inputs[3] = (inputs[3] + 1) % V; // earlier tokens change
        whole.kv_cache_valid = false;
        whole.logits(inputs.data(), 1, t, true, expected.data());
        for (CpuModel<double>* model : {&without, &parts}) {
            model->logits(inputs.data(), 1, t, true, found.data());
            worst = std::max(worst,
                             relative_error(found, Doubles(expected.begin(), expected.end()), 0));
        }
        if (whole.first != 0) row.note = "the whole sequence was not computed";
        if (t == 9 && parts.first != 4)
            row.note = cat("the first computed position was ", parts.first, ", expected 4");
    }
    row.add("logits", worst, 1e-7);
    return row;
}

// Two micro-batches with masked targets give the gradients of one batch.
Row check_accumulation() {
    Row row{"claim: micro-batches add up to the batch"};
    Config c = small_config("llama");
    complete_config(c);
    std::vector<int> inputs, targets;
    test_batch(c, 14, inputs, targets, true);
    CpuModel<double> whole(c, 2, 7, {}), parts(c, 2, 7, {});
    fill_parameters(whole), fill_parameters(parts);
    const double a = whole.loss_and_gradients(inputs.data(), targets.data(), 2, 7, 0.1);
    const double b = parts.loss_and_gradients(inputs.data(), targets.data(), 1, 7, 0.1) +
                     parts.loss_and_gradients(inputs.data() + 7, targets.data() + 7, 1, 7, 0.1);
    row.add("loss", std::fabs(a - b) / a, 1e-13);
    row.add("gradients", compare_gradients(gradients_of(parts), gradients_of(whole), 0), 1e-12);
    return row;
}

// A second pass with the same parameters gives the same bits.
Row check_deterministic() {
    Row row{"claim: a repeated pass gives the same bits"};
    Config c = small_config("llama");
    for (const char* scheme : {"sandwich+gpas", "mhc", "attnres"})
        row.add("differ", bits_differ(pass_of(c, scheme), pass_of(c, scheme)), 0);
    return row;
}

// The orthogonal factor that Muon's polynomials make of x (rows, columns), by their definition,
// from the right whatever the shape.
Doubles orthogonal_factor(Doubles x, int64_t rows, int64_t columns, const Quintics& polynomials) {
    const double size = std::max(polynomials.margin * norm(x), 1e-7);
    for (double& v : x) v /= size;
    auto product = [](const Doubles& a, const Doubles& b, int64_t m, int64_t k, int64_t n) {
        Doubles out(size_t(m * n));
        for (int64_t i = 0; i < m; i++)
            for (int64_t p = 0; p < k; p++)
                for (int64_t j = 0; j < n; j++) out[i * n + j] += a[i * k + p] * b[p * n + j];
        return out;
    };
    for (const Quintic& q : polynomials.all) {
        Doubles transposed(x.size());
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++) transposed[j * rows + i] = x[i * columns + j];
        const Doubles gram = product(transposed, x, columns, rows, columns);
        Doubles sum = product(gram, gram, columns, columns, columns);
        for (size_t i = 0; i < sum.size(); i++) sum[i] = q.c * sum[i] + q.b * gram[i];
        for (int64_t i = 0; i < columns; i++) sum[i * columns + i] += q.a;
        x = product(x, sum, rows, columns, columns);
    }
    return x;
}

// A parameter, its states, and its update by the definitions of AdamW, Muon and NorMuon.
struct Updated {
    Doubles w, m = Doubles(w.size()), v = Doubles(w.size()), v_rows = {};

    void update(const Param& p, UpdateRule rule, const Doubles& gradient,
                const Hyperparameters& o) {
        const double decay = p.decay ? o.weight_decay * p.decay_scale : 0;
        auto move = [&](size_t i, double lr, double step) {
            const bool decays = !o.cautious || w[i] * step >= 0;
            w[i] -= lr * p.lr_scale * (step + (decays ? decay * w[i] : 0));
        };
        if (rule == UpdateRule::adamw) {
            const double t = double(o.step_of(p.layer));
            for (size_t i = 0; i < w.size(); i++) {
                const double g = o.grad_scale * gradient[i];
                m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
                v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
                move(i, o.lr,
                     m[i] / (1 - std::pow(o.beta1, t)) /
                         (std::sqrt(v[i] / (1 - std::pow(o.beta2, t))) + o.eps * p.eps_scale));
            }
            return;
        }
        Doubles u(w.size());
        for (size_t i = 0; i < w.size(); i++) {
            const double g = (1 - o.momentum) * o.grad_scale * gradient[i];
            m[i] = o.momentum * m[i] + g, u[i] = o.momentum * m[i] + g;
        }
        const int64_t rows = p.shape[0], columns = p.shape[1];
        const bool jordan = o.muon_scale == MuonScale::jordan;
        u = orthogonal_factor(u, rows, columns, quintics(o.orthogonalization));
        if (rule == UpdateRule::normuon) {
            const double before = norm(u);
            v_rows.resize(size_t(rows));
            for (int64_t r = 0; r < rows; r++) {
                double mean = 0;
                for (int64_t c = 0; c < columns; c++)
                    mean += u[r * columns + c] * u[r * columns + c] / double(columns);
                v_rows[r] = o.beta2 * v_rows[r] + (1 - o.beta2) * mean;
                for (int64_t c = 0; c < columns; c++)
                    u[r * columns + c] /= std::sqrt(v_rows[r]) + 1e-10;
            }
            const double wanted = jordan ? before : std::sqrt(double(std::min(rows, columns)));
            const double now = norm(u);
            for (double& x : u) x *= wanted / now;
        }
        const double size = jordan ? std::sqrt(std::max(1.0, double(rows) / double(columns)))
                                   : 0.2 * std::sqrt(double(std::max(rows, columns)));
        for (size_t i = 0; i < w.size(); i++) move(i, o.muon_lr, size * u[i]);
    }
};

// Three steps against the formulas in double, with factors of each parameter's learning rate,
// decay and eps.
Row check_optimizer(const char* optimizer, const Hyperparameters& hyperparameters) {
    Hyperparameters o = hyperparameters;
    const bool adamw = optimizer == std::string("adamw");
    Row row{cat(optimizer_row(optimizer).title, " against its formula, factors for each parameter",
                o.cautious ? ", cautious decay" : "",
                adamw                                                     ? ""
                : o.orthogonalization == Orthogonalization::polar_express ? ", Polar Express"
                                                                          : ", Newton-Schulz",
                adamw                               ? ""
                : o.muon_scale == MuonScale::jordan ? ", Jordan's scale"
                                                    : ", Moonlight's scale")};
    Config c = small_config("qwen2");
    complete_config(c);
    CpuModel<double> model(c, 1, 1, {.optimizer = &optimizer_row(optimizer)});
    for (size_t i = 0; i < model.registry.params.size(); i++) {
        Param& p = model.registry.params[i];
        p.lr_scale = 1 + double(i % 2), p.decay_scale = 1 + double(i % 3);
        p.eps_scale = 1 + 99 * double(i % 5);
    }
    model.optimizer_layout = OptimizerLayout(*model.optimizer, model.registry);
    fill_parameters(model);
    std::vector<Updated> expected;
    for (const Param& p : model.registry.params) {
        if (p.decay != (p.shape.size() == 2)) row.note = "decay is on for " + p.name;
        const double* w = model.parameters + p.offset;
        expected.push_back({.w = Doubles(w, w + p.size())});
    }
    o.lr = 0.01, o.beta2 = 0.95, o.eps = 1e-3, o.weight_decay = 0.1, o.grad_scale = 0.5;
    o.muon_lr = 0.02, o.momentum = 0.9;
    for (o.step = 1; o.step <= 3; o.step++) {
        for (size_t i = 0; i < expected.size(); i++) {
            const Param& p = model.registry.params[i];
            const Doubles g = random_values(size_t(p.size()), cat(p.name, o.step));
            std::copy(g.begin(), g.end(), model.gradients + p.offset);
            expected[i].update(p, model.optimizer->rule(p), g, o);
        }
        model.update(o);
    }
    Doubles found, wanted;
    for (size_t i = 0; i < expected.size(); i++) {
        const double* w = model.parameters + model.registry.params[i].offset;
        found.insert(found.end(), w, w + expected[i].w.size());
        wanted.insert(wanted.end(), expected[i].w.begin(), expected[i].w.end());
    }
    row.add("weights", relative_error(found, wanted, 0), 1e-12);
    if (adamw) return row;
    // Singular values near 1: u uᵀ is nearly the identity.
    const int64_t rows = 8, columns = 20;
    const Doubles u = orthogonal_factor(random_values(size_t(rows * columns), "u"), rows, columns,
                                        quintics(o.orthogonalization));
    double worst = 0;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < rows; j++) {
            double dot = i == j ? -1 : 0;
            for (int64_t k = 0; k < columns; k++) dot += u[i * columns + k] * u[j * columns + k];
            worst = std::max(worst, std::fabs(dot));
        }
    row.add("distance from orthogonal", worst,
            o.orthogonalization == Orthogonalization::polar_express ? 0.2 : 0.5);
    return row;
}

// Recomputed activations have the same bits as stored ones, under every scheme.
template <class S> Row check_recompute(const std::string& name, const std::string& scheme) {
    Row row{cat("claim: ", sizeof(S) == 2 ? "bf16 " : "", name, "  ", scheme,
                "  gradients do not change with --recompute")};
    const Config c = bf16_config(name, scheme);
    std::vector<int> inputs, targets;
    test_batch(c, 2 * 7, inputs, targets, true);
    std::vector<float> kept;
    int64_t bytes = 0, differ = 0;
    for (Recompute recompute : {Recompute::none, Recompute::activations, Recompute::layers}) {
        CpuModel<S> model(c, 2, 7, {.recompute = recompute});
        model.initialize(1);
        for (int pass = 0; pass < 2; pass++) // the second adds to the first
            model.loss_and_gradients(inputs.data(), targets.data(), 2, 7, 0.1);
        if (recompute == Recompute::none)
            kept.assign(model.gradients.begin(), model.gradients.end());
        for (size_t i = 0; i < kept.size(); i++)
            differ += float(model.gradients[i]) != kept[i] || !std::isfinite(kept[i]);
        if (recompute != Recompute::none && model.bytes() >= bytes)
            row.note = "--recompute saves no memory";
        bytes = model.bytes();
    }
    row.add("differ", double(differ), 0);
    return row;
}

// The mean weight after steps with a gradient of 1, where Adam's step is the learning rate. Float
// master weights follow it; bf16 weights rounded to nearest lose steps below 1/512 of a weight;
// rounded stochastically they are correct on average.
Row check_rounding() {
    Row row{"AdamW in bf16: master weights, nearest, stochastic"};
    Config c = bf16_config("llama", "pre");
    const int steps = 64;
    const double lr = 1e-3, expected = 1 - lr * steps;
    auto mean_after = [&](ModelOptions o) {
        CpuModel<bf16> model(c, 1, 1, o);
        for (int64_t i = 0; i < model.registry.size; i++) {
            model.set_parameter(i, 1);
            model.gradients[i] = 1;
        }
        for (int step = 1; step <= steps; step++) model.update({.lr = lr, .step = step});
        double sum = 0, n = 0;
        for (const Param& p : model.registry.params) {
            std::vector<float> values(p.size());
            model.read(Buffer::parameters, p, values.data());
            for (float value : values) sum += double(value), n++;
        }
        return sum / n;
    };
    row.add("master", std::fabs(mean_after({.dtype = DType::bf16}) - expected), 1e-5);
    row.add("stochastic moments",
            std::fabs(mean_after({.moments = DType::bf16, .stochastic_rounding = true}) - expected),
            1e-3);
    ModelOptions pure{.master_weights = false, .moments = DType::bf16};
    row.add("nearest moves", std::fabs(mean_after(pure) - 1), 0); // 1 − 0.001 rounds to 1
    pure.stochastic_rounding = true;
    row.add("stochastic", std::fabs(mean_after(pure) - expected), 1e-3);
    return row;
}

// Every matrix has the initial standard deviation of its scheme. Estimated from n normal numbers it
// has a relative error of about 1/sqrt(2n).
Row check_initialization(const std::string& scheme) {
    Row row{"initialization: " + scheme};
    Config c = preset_config("llama-9m");
    c.vocab_size = 500;
    c.scheme = parse_scheme(scheme);
    const SchemeRow& row_of = *c.scheme.row;
    c.embed_std = 0.5;
    complete_config(c);
    CpuModel<float> model(c, 1, 1, {.purpose = Purpose::score});
    model.initialize(42);
    const double L = c.layers;
    double worst = 0;
    for (const Param& p : model.registry.params) {
        const float* w = model.parameters + p.offset;
        auto named = [&](const char* part) { return p.name.find(part) != std::string::npos; };
        if (!p.decay) {
            if (named("_streams.bias")) {
                const int n = c.scheme.row->default_number(c.layers);
                double reads = 0;
                for (int i = 0; i < n; i++) reads += sigmoid(double(w[i]));
                if (std::fabs(reads - 1) > 1e-6 || w[n] != 0 || w[2 * n] != 0 || w[2 * n + 1] > -4)
                    row.note = p.name + " is not near Pre-LN";
                continue;
            }
            double expected = named("_streams.scale")               ? 0.01
                              : named("query")                      ? 0
                              : named("gamma")                      ? row_of.gamma_init(c.layers)
                              : named("omega")                      ? row_of.omega_init(c.layers)
                              : named("value_mix")                  ? 0.5
                              : named("gate") || named("x0_weight") ? 0
                                                                    : 1;
            if (row_of.depth == DepthScale::init_weight && named("layers."))
                expected = 1 / std::sqrt(1 + std::stod(p.name.substr(p.name.find("layers.") + 7)));
            for (int64_t i = 0; i < p.size(); i++)
                if (std::fabs(double(w[i]) - expected) > 1e-7)
                    row.note = cat(p.name, " starts at ", w[i], ", expected ", expected);
            continue;
        }
        double expected = 0.02, out = double(p.shape[0]), in = double(p.shape[1]);
        if (named("embed_tokens"))
            expected = 0.5;
        else if (row_of.xavier_gain && !named("lm_head")) {
            const bool qk = named("q_proj") || named("k_proj");
            expected = (qk ? 1 : row_of.xavier_gain(c.layers)) * std::sqrt(2 / (in + out));
        }
        if (row_of.depth_transfer && named("proj")) expected *= std::sqrt(256.0 / c.width);
        if (c.scheme.depth_init && (named("o_proj") || named("down_proj"))) {
            const double layer = 1 + std::stod(p.name.substr(p.name.find("layers.") + 7));
            expected /= std::sqrt(2 * layer);
        }
        if (c.scheme.scaled_init && (named("o_proj") || named("down_proj")))
            expected = 0.02 / std::sqrt(2 * L);
        double sum = 0, square = 0;
        for (int64_t i = 0; i < p.size(); i++) sum += w[i], square += double(w[i]) * w[i];
        const double n = double(p.size()), tolerance = 5 / std::sqrt(2 * n);
        worst = std::max(worst, std::fabs(std::sqrt(square / n) / expected - 1) / tolerance);
        worst = std::max(worst, std::fabs(sum / n) / expected / (5 / std::sqrt(n)));
    }
    row.add("5 sigma", worst, 1);
    return row;
}

// Philox against known answers from Random123's kat_vectors, and moments of normal numbers.
Row check_random() {
    Row row{"random numbers: Philox4x32-10, normal moments"};
    const auto zero = philox(0, 0, 0);
    const auto ones = philox(~0ull, ~0ull, ~0ull);
    const std::array<uint32_t, 4> zero_known = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    const std::array<uint32_t, 4> ones_known = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
    row.add("known answers", zero != zero_known || ones != ones_known, 0);
    double moments[5] = {};
    const int n = 200000;
    for (int i = 0; i < n; i++) {
        const double x = random_normal(7, 7, i);
        for (int k = 1; k <= 4; k++) moments[k] += std::pow(x, k) / n;
    }
    row.add("moments",
            std::max({std::fabs(moments[1]), std::fabs(moments[2] - 1), std::fabs(moments[3]),
                      std::fabs(moments[4] - 3)}),
            0.05);
    return row;
}

// CompleteP's factors (arXiv 2505.01618, table 1), of a model of 4 times the depth and half the
// width of the base.
Row check_completep() {
    Row row{"CompleteP's factors"};
    Config c = small_config("llama");
    c.layers = 8, c.width = 128, c.heads = c.kv_heads = 4, c.head_size = 0;
    c.scheme = parse_scheme("completep");
    complete_config(c);
    for (const Param& p : make_registry(c).params) {
        const double lr = p.layer_matrix ? 2 : 1, decay = p.layer_matrix ? 0.5 : 1;
        if (p.lr_scale != lr || p.decay_scale != decay || p.eps_scale != 0.5)
            row.note = cat(p.name, " has the factors ", p.lr_scale, ", ", p.decay_scale, " and ",
                           p.eps_scale);
    }
    row.add("logits", std::fabs(junction(c.scheme, 8, 16).in_scale - 2), 0);
    row.add("branches", std::fabs(junction(c.scheme, 8, 5).beta - 0.25), 0);
    return row;
}

// A buffer's tensors; those with a single element count as one, as in gradients_of.
std::map<std::string, Doubles> tensors_of(Model& model, Buffer buffer) {
    std::map<std::string, Doubles> all;
    for (const Param& p : model.registry.params) {
        std::vector<float> values(p.size());
        model.read(buffer, p, values.data());
        Doubles& tensor = all[tensor_of(p)];
        tensor.insert(tensor.end(), values.begin(), values.end());
    }
    return all;
}

// Fills the model with weights that are exact in bf16: matrices with about the initial standard
// deviation; norms, biases and gates with their initial values if `initial`, else generic ones.
// Moments become 0 if `initial`.
void fill_weights(Model& model, bool initial = false) {
    if (initial) model.initialize(1); // moments too
    for (const Param& p : model.registry.params) {
        std::vector<float> values(p.size());
        model.read(Buffer::parameters, p, values.data());
        Doubles other = test_values(p);
        if (p.decay)
            other =
                random_values(size_t(p.size()), p.name, 0, 0.25 / std::sqrt(model.config.width));
        for (size_t i = 0; i < values.size(); i++)
            values[i] = float(bf16(p.decay || !initial ? float(other[i]) : values[i]));
        model.write(Buffer::parameters, p, values.data());
    }
}

// Compares the statistics of streams that a model computes in place with those of copies of the
// streams, in a forward and a backward pass. Returns the largest relative error.
double statistics_error(Model& model, const std::vector<int>& inputs,
                        const std::vector<int>& targets, int B, int T) {
    const int L = model.config.layers, C = model.config.width, rows = B * T;
    double worst = 0;
    auto compare = [&](double found, double expected, double size) {
        worst = std::max(worst, std::fabs(found - expected) / size);
    };
    auto copy = [&](Model::Stream stream) {
        std::vector<float> x(size_t(rows) * C);
        model.read(stream, x.data());
        return x;
    };
    auto check_moments = [&](Model::Stream stream) {
        const std::vector<float> x = copy(stream);
        const std::vector<Moments> moments = model.row_moments(stream);
        if (int(moments.size()) != rows) worst = INFINITY;
        for (int row = 0; row < rows && worst < INFINITY; row++) {
            double mean = 0, square = 0, size = 0;
            for (int i = 0; i < C; i++) mean += double(x[row * C + i]) / C;
            for (int i = 0; i < C; i++) {
                square += (x[row * C + i] - mean) * (x[row * C + i] - mean);
                size += double(x[row * C + i]) * x[row * C + i];
            }
            if (size == 0) size = 1;
            compare(moments[row].n, C, C);
            compare(moments[row].mean, mean, std::sqrt(size / C));
            compare(moments[row].square, square, size);
            compare(moments[row].sum_of_squares(), size == 1 ? 0 : size, size);
        }
    };
    model.zero_gradients();
    model.embed(inputs.data(), B, T);
    std::vector<std::vector<float>> r = {copy(Model::Stream::residual)};
    check_moments(Model::Stream::residual);
    for (int l = 0; l < L; l++) {
        model.run_layer(l);
        r.push_back(copy(Model::Stream::residual));
        for (Model::Stream stream :
             {Model::Stream::residual, Model::Stream::attention, Model::Stream::mlp})
            check_moments(stream);
    }
    for (int l = 0; l <= L; l++)
        for (int m = l; m <= L; m++) {
            const std::vector<double> chords = model.row_chords(l, m);
            for (int row = 0; row < rows; row++) {
                double aa = 0, ab = 0, bb = 0;
                for (int i = row * C; i < (row + 1) * C; i++) {
                    aa += double(r[l][i]) * r[l][i], bb += double(r[m][i]) * r[m][i];
                    ab += double(r[l][i]) * r[m][i];
                }
                compare(chords[row], 2 - 2 * ab / std::sqrt(aa * bb), 1);
                if (l == m && chords[row] != 0) worst = INFINITY;
            }
        }
    // Rewinding to a layer and running the rest again
    const double loss = model.finish(targets.data());
    model.rewind(1);
    if (copy(Model::Stream::residual) != r[1]) worst = INFINITY;
    for (int l = 1; l < L; l++) model.run_layer(l);
    compare(model.finish(targets.data()), loss, 1e-6 * loss);
    model.finish_backward(targets.data(), 0.1);
    for (int l = L - 1; l >= 0; l--) model.run_layer_backward(l);
    check_moments(Model::Stream::gradient);
    const std::vector<double> squares = model.gradient_squares();
    for (size_t i = 0; i < squares.size(); i++) {
        std::vector<float> g(size_t(model.registry.params[i].size()));
        model.read(Buffer::gradients, model.registry.params[i], g.data());
        double square = 0;
        for (float x : g) square += double(x) * x;
        compare(squares[i], square, square > 0 ? square : 1);
    }
    // write_rows writes the given rows and zeroes the others.
    std::vector<float> values(2 * C), back(values.size());
    for (int i = 0; i < 2 * C; i++) values[i] = float(i + 1);
    model.write_rows(Model::Stream::gradient, {rows - 1, 2}, values.data());
    model.read_rows(Model::Stream::gradient, {rows - 1, 2}, back.data());
    const std::vector<float> whole = copy(Model::Stream::gradient);
    if (back != values || whole[2 * C] != float(C + 1) ||
        std::count(whole.begin(), whole.end(), 0.0f) != (rows - 2) * C)
        worst = INFINITY;
    return worst;
}

// Running a model layer by layer gives the results of a whole pass, forward and backward; skipping
// a layer gives those of a model built without it.
template <class Make>
Row check_layers(const std::string& prefix, const std::string& name, const std::string& scheme,
                 const Make& make) {
    Row row{cat(prefix, name, "  ", scheme, "  layer by layer")};
    Config c = bf16_config(name, scheme);
    const int B = 2, T = 9;
    std::vector<int> inputs, targets;
    test_batch(c, B * T, inputs, targets, true);
    std::unique_ptr<Model> whole = make(c, B, T), parts = make(c, B, T);
    fill_weights(*whole), fill_weights(*parts);
    whole->zero_gradients(), parts->zero_gradients();
    const double loss = whole->loss_and_gradients(inputs.data(), targets.data(), B, T, 0.1);
    parts->embed(inputs.data(), B, T);
    for (int l = 0; l < c.layers; l++) parts->run_layer(l);
    const double found = parts->finish(targets.data());
    row.add("loss", std::fabs(found - loss) / loss, 1e-6); // a whole pass may round its logits
    parts->finish_backward(targets.data(), 0.1);
    for (int l = c.layers - 1; l >= 0; l--) parts->run_layer_backward(l);
    auto gradients = tensors_of(*whole, Buffer::gradients);
    auto by_layer = tensors_of(*parts, Buffer::gradients);
    double worst = 0, all = 0; // without embeddings, which run_layer_backward stops above
    for (const auto& [n, g] : gradients) all += norm(g) * norm(g);
    for (const auto& [n, g] : gradients) {
        const bool embedding = n.find("wte") != std::string::npos ||
                               n.find("wpe") != std::string::npos ||
                               n.find("embed") != std::string::npos;
        if (!embedding)
            worst = std::max(worst, relative_error(by_layer.at(n), g, 1e-3 * std::sqrt(all)));
    }
    row.add("gradients", worst, 1e-5);

    // Skips the middle one of 3 layers. The scales of lns and the layers of mix depend on the
    // layer's number, so the shorter model is the same only under other schemes.
    parts->embed(inputs.data(), B, T);
    std::vector<float> before(size_t(B) * T * c.width), after(before.size()), b(before.size());
    parts->read(Model::Stream::residual, before.data());
    parts->run_layer(0);
    parts->read(Model::Stream::residual, after.data());
    parts->read(Model::Stream::attention, b.data());
    double size = 0;
    for (float x : b) size += double(x) * x;
    if (!(size > 0) || before == after) row.note = "the first layer does nothing";
    parts->run_layer(2);
    const double without = parts->finish(targets.data());
    Config shorter = c;
    shorter.layers = 2;
    complete_config(shorter);
    std::unique_ptr<Model> two = make(shorter, B, T);
    for (const Param& p : two->registry.params) {
        std::string from = p.name;
        for (const char* layers : {"layers.1.", "h.1."})
            if (size_t at = from.find(layers); at != std::string::npos)
                from[at + std::string(layers).size() - 2] = '2';
        std::vector<float> values(p.size());
        parts->read(Buffer::parameters, *parts->registry.find(from), values.data());
        two->write(Buffer::parameters, p, values.data());
    }
    const double built = two->loss(inputs.data(), targets.data(), B, T);
    if (c.scheme.row->depth == DepthScale::none && !c.scheme.row->beta)
        row.add("removed", std::fabs(without - built) / built, 1e-6);
    row.add("statistics", statistics_error(*parts, inputs, targets, B, T), 1e-5);
    return row;
}

// ---------------------------------------------------------------------------------------------
// The GPU against the CPU, through the Model interface

// The default for programs without the simulator.
[[gnu::weak]] const SimulatedGpu* simulated_gpu() { return nullptr; }

const Ranks& alone() {
    static const Ranks ranks;
    return ranks;
}

std::unique_ptr<Model> gpu_model(const Config& c, int B, int T, ModelOptions options = {}) {
    options.device = Device::cuda;
    return make_cuda_model(c, B, T, options, alone());
}

// The results of two passes that accumulate gradients, then a step of AdamW.
struct Trained {
    double loss = 0;
    std::map<std::string, Doubles> gradients, change;
    std::vector<float> logits;
};

Trained train_once(Model& model, int B, int T, bool initial = false) {
    Trained out;
    std::vector<int> inputs, targets;
    test_batch(model.config, B * T, inputs, targets, B * T > 1);
    fill_weights(model, initial);
    out.change = tensors_of(model, Buffer::parameters);
    model.zero_gradients();
    for (int pass = 0; pass < 2; pass++)
        out.loss += model.loss_and_gradients(inputs.data(), targets.data(), B, T, 0.5 / (B * T));
    out.gradients = tensors_of(model, Buffer::gradients);
    out.logits.resize(size_t(B) * T * model.config.vocab_size);
    model.logits(inputs.data(), B, T, false, out.logits.data());
    // With this large eps the step is almost linear in the gradient, and with this large learning
    // rate it exceeds the rounding of weights: its error is that of the gradient.
    model.update({.lr = 100, .eps = 1, .weight_decay = 1e-3, .step = 1, .grad_scale = 0.5});
    for (const auto& [name, after] : tensors_of(model, Buffer::parameters)) {
        Doubles& change = out.change[name];
        for (size_t i = 0; i < after.size(); i++) change[i] = after[i] - change[i];
    }
    return out;
}

double largest_error(const Trained& a, const Trained& b, double floor_share) {
    return std::max({std::fabs(a.loss - b.loss) / b.loss,
                     relative_error(a.logits, Doubles(b.logits.begin(), b.logits.end()), 0),
                     compare_gradients(a.gradients, b.gradients, floor_share),
                     compare_gradients(a.change, b.change, floor_share)});
}

bool same_bits(const Trained& a, const Trained& b) {
    return a.loss == b.loss && a.gradients == b.gradients && a.change == b.change &&
           a.logits == b.logits;
}

Row check_gpu(const std::string& name, const Config& c, int B, int T) {
    Row row{"cuda: " + name};
    std::unique_ptr<Model> reference = make_cpu_model(c, B, T, {});
    row.add(
        "float",
        largest_error(train_once(*gpu_model(c, B, T), B, T), train_once(*reference, B, T), 1e-3),
        float_tolerance);
    // Initial norm weights, as in check_bf16: generic ones make attention sharper, and then bf16
    // has errors of up to 2e-2 on the CPU too.
    std::unique_ptr<Model> rounded = gpu_model(c, B, T, {.dtype = DType::bf16});
    row.add(
        "bf16",
        largest_error(train_once(*rounded, B, T, true), train_once(*reference, B, T, true), 1e-2),
        bf16_tolerance);
    return row;
}

// Sizes of every kind: several attention tiles, grouped queries, padded heads, MLPs and
// vocabularies, rows that take several warps.
std::vector<Row> check_gpu_shapes(const std::function<bool(const std::string&)>& wanted) {
    struct Shape {
        std::string architecture;
        int width, heads, kv_heads, head_size, mlp_width, vocab, B, T;
    };
    std::vector<Row> rows;
    for (const Shape& s : {Shape{"llama", 64, 2, 1, 64, 85, 97, 1, 150},
                           {"llama", 40, 2, 2, 20, 61, 50, 2, 9},
                           {"gpt2", 40, 2, 2, 20, 75, 51, 2, 9},
                           {"olmo2", 40, 2, 1, 20, 61, 50, 2, 9},
                           {"qwen2", 48, 3, 1, 16, 56, 300, 1, 65},
                           {"llama", 128, 1, 1, 128, 64, 64, 2, 70},
                           {"llama", 128, 1, 1, 128, 64, 64, 1, 1},
                           {"gpt2", 1096, 2, 2, 32, 64, 40, 1, 5}}) {
        const std::string name =
            cat(s.architecture, " C=", s.width, " heads ", s.heads, "/", s.kv_heads,
                " HS=", s.head_size, " H=", s.mlp_width, " V=", s.vocab, " B=", s.B, " T=", s.T);
        if (!wanted("cuda: " + name)) continue;
        Config c = architecture(s.architecture);
        c.vocab_size = s.vocab, c.width = s.width, c.layers = 2, c.heads = s.heads;
        c.kv_heads = s.kv_heads, c.head_size = s.head_size, c.mlp_width = s.mlp_width;
        c.positions = s.T + 3, c.tied = s.architecture == "gpt2";
        c.scheme = parse_scheme("lns");
        complete_config(c);
        rows.push_back(check_gpu(name, c, s.B, s.T));
        rows.back().print();
    }
    return rows;
}

// Repeating a pass gives the same bits; so does --recompute, except for GELU, whose input
// `--recompute activations` rounds; and in the simulator so does any order of threads.
Row check_gpu_bits(const std::string& name, const std::string& scheme, DType dtype) {
    Row row{cat("cuda: ", name, "  ", scheme, dtype == DType::bf16 ? " bf16" : " float",
                "  bits repeat")};
    const Config c = bf16_config(name, scheme);
    const int B = 2, T = 9;
    ModelOptions options{.dtype = dtype};
    std::unique_ptr<Model> model = gpu_model(c, B, T, options);
    const Trained first = train_once(*model, B, T);
    model->initialize(1);
    row.add("again", !same_bits(train_once(*model, B, T), first), 0);
    int64_t bytes = model->bytes();
    for (Recompute recompute : {Recompute::activations, Recompute::layers}) {
        options.recompute = recompute;
        std::unique_ptr<Model> other = gpu_model(c, B, T, options);
        const Trained found = train_once(*other, B, T);
        if (other->bytes() >= bytes) row.note = "--recompute saves no memory";
        bytes = other->bytes();
        if (recompute == Recompute::activations && !c.gated_mlp())
            row.add("activations", compare_gradients(found.gradients, first.gradients, 1e-2),
                    bf16_tolerance);
        else
            row.add(recompute == Recompute::layers ? "layers" : "activations",
                    !same_bits(found, first), 0);
    }
    if (const SimulatedGpu* gpu = simulated_gpu()) {
        options.recompute = Recompute::none;
        int different = 0;
        gpu->in_every_order([&] {
            different += !same_bits(train_once(*gpu_model(c, B, T, options), B, T), first);
        });
        row.add("thread orders", different, 0);
    }
    return row;
}

// begin_step and end_step equal the single calls, and leave the weights unchanged if the loss is
// not finite.
Row check_gpu_step(DType gradients) {
    Row row{cat("cuda: a step equals its parts, gradients in ",
                gradients == DType::bf16 ? "bf16" : "float32")};
    struct LateStreams { // a simulated GPU does asynchronous work only when waited for
        LateStreams() { set(true); }
        ~LateStreams() { set(false); }
        void set(bool late) {
            if (const SimulatedGpu* gpu = simulated_gpu()) gpu->set_late_streams(late);
        }
    } const late;
    const Config c = bf16_config("qwen2", "sandwich+gpas");
    const int B = 2, T = 9, M = 3;
    std::vector<int> inputs, targets;
    test_batch(c, M * B * T, inputs, targets, true);
    const ModelOptions options{.dtype = DType::bf16, .moments = gradients, .gradients = gradients};
    std::unique_ptr<Model> whole = gpu_model(c, B, T, options), parts = gpu_model(c, B, T, options);
    fill_weights(*whole), fill_weights(*parts);
    Hyperparameters adam{.lr = 1e-2, .weight_decay = 0.1};
    const double clip = 0.01;
    int differ = 0;
    for (adam.step = 1; adam.step <= 3; adam.step++) {
        whole->begin_step({inputs.data(), targets.data(), M, B, T, 0.02, clip, adam});
        const StepResult result = whole->end_step();
        parts->zero_gradients();
        double loss = 0;
        for (int m = 0; m < M; m++)
            loss += parts->loss_and_gradients(&inputs[m * B * T], &targets[m * B * T], B, T, 0.02);
        const double norm = parts->gradient_norm();
        if (norm < clip) row.note = "nothing was clipped";
        row.add("loss", std::fabs(result.loss - 0.02 * loss) / result.loss, 1e-14);
        row.add("norm", std::fabs(result.grad_norm - norm) / norm, 1e-14);
        adam.grad_scale = double(float(clip)) / norm;
        parts->update(adam);
        adam.grad_scale = 1;
        const auto a = tensors_of(*whole, Buffer::parameters),
                   b = tensors_of(*parts, Buffer::parameters);
        differ += a != b ||
                  tensors_of(*whole, {Buffer::state, 1}) != tensors_of(*parts, {Buffer::state, 1});
    }
    const auto before = tensors_of(*whole, Buffer::parameters);
    const Param& p = *whole->registry.find("model.norm.weight");
    std::vector<float> values(p.size()), broken(p.size(), NAN);
    whole->read(Buffer::parameters, p, values.data());
    whole->write(Buffer::parameters, p, broken.data());
    whole->begin_step({inputs.data(), targets.data(), M, B, T, 0.02, clip, adam});
    if (std::isfinite(whole->end_step().loss)) row.note = "the loss of NaN is finite";
    if (whole->first_nonfinite() != "the parameter model.norm.weight")
        row.note = "first_nonfinite says " + whole->first_nonfinite();
    whole->write(Buffer::parameters, p, values.data());
    differ += tensors_of(*whole, Buffer::parameters) != before;
    row.add("differ", differ, 0);
    return row;
}

// A row whose states differ between matrices and the rest updates in ranges, of which each has its
// own place in the states: AdamW's bits must not depend on that.
Row check_ranges(Device device) {
    Row row{cat(device == Device::cuda ? "cuda: " : "", "AdamW in ranges of the buffers")};
    const Optimizer split = {.name = "split",
                             .title = "split",
                             .matrices = UpdateRule::adamw,
                             .rest = UpdateRule::adamw,
                             .states = {{"v", "second moments"},
                                        {.name = "of matrices", .what = "unused", .rest = false},
                                        {"m", "first moments"}}};
    const Config c = bf16_config("qwen2", "layerscale+gpas"); // stacks of biases, scalars
    ModelOptions options{.device = device,
                         .dtype = DType::bf16,
                         .master_weights = false,
                         .moments = DType::bf16,
                         .stochastic_rounding = true};
    auto make = [&] {
        return device == Device::cuda ? gpu_model(c, 1, 1, options)
                                      : make_cpu_model(c, 1, 1, options);
    };
    const std::unique_ptr<Model> whole = make();
    options.optimizer = &split;
    const std::unique_ptr<Model> ranges = make();
    for (Model* model : {whole.get(), ranges.get()}) {
        model->initialize(1);
        for (int64_t step = 1; step <= 3; step++) {
            for (const Param& p : model->registry.params) {
                const Doubles g = random_values(size_t(p.size()), cat(p.name, step));
                const std::vector<float> values(g.begin(), g.end());
                model->write(Buffer::gradients, p, values.data());
            }
            model->update({.lr = 0.01, .weight_decay = 0.1, .step = step});
        }
    }
    auto differ = [&](Buffer a, Buffer b) {
        return double(tensors_of(*whole, a) != tensors_of(*ranges, b));
    };
    row.add("weights", differ(Buffer::parameters, Buffer::parameters), 0);
    row.add("first moments", differ({Buffer::state, 0}, {Buffer::state, 2}), 0);
    row.add("second moments", differ({Buffer::state, 1}, {Buffer::state, 0}), 0);
    const int64_t more = ranges->bytes() - whole->bytes();
    auto plan_of = [&](const Optimizer* optimizer) {
        options.optimizer = optimizer;
        return (device == Device::cuda ? plan_cuda_memory(c, 1, 1, options)
                                       : plan_cpu_memory(c, 1, 1, options))
            .optimizer;
    };
    if (more <= 0) row.note = "a state of matrices takes no memory";
    row.add("memory that was not planned",
            double(std::abs(more - (plan_of(&split) - plan_of(&optimizers()[0])))), 0);
    return row;
}

// The layer of a parameter, from 0, by its name; −1: none.
int layer_by_name(const std::string& name) {
    for (const char* layers : {".layers.", ".h."})
        if (const size_t at = name.find(layers); at != std::string::npos)
            return std::stoi(name.substr(at + std::string(layers).size()));
    return -1;
}

// Steps of Muon on a device, where a layer rests in the second, against the formulas; its memory
// and its FLOPs.
Row check_muon(const std::string& name, const std::string& scheme, const char* optimizer,
               ModelOptions options) {
    const bool cuda = options.device == Device::cuda, bf16 = options.dtype == DType::bf16;
    Row row{cat(cuda ? "cuda: " : "", optimizer_row(optimizer).title, "  ", name, "  ", scheme,
                !bf16                    ? " float"
                : options.master_weights ? " bf16"
                                         : " pure bf16")};
    Config c = small_config(name);
    c.layers = 2, c.width = 16 * c.heads, c.head_size = 0, c.mlp_width = 100, c.vocab_size = 97;
    c.scheme = parse_scheme(scheme);
    complete_config(c);
    auto make = [&](const char* which) {
        options.optimizer = &optimizer_row(which);
        return cuda ? gpu_model(c, 1, 1, options) : make_cpu_model(c, 1, 1, options);
    };
    auto plan = [&](const char* which) {
        options.optimizer = &optimizer_row(which);
        return (cuda ? plan_cuda_memory(c, 1, 1, options) : plan_cpu_memory(c, 1, 1, options))
            .optimizer;
    };
    const std::unique_ptr<Model> model = make(optimizer);
    const int64_t more = model->bytes() - make("adamw")->bytes();
    row.add("memory that was not planned", double(std::abs(more - plan(optimizer) + plan("adamw"))),
            0);
    fill_weights(*model, true);
    const std::vector<Param>& params = model->registry.params;
    auto read = [&](Buffer buffer, const Param& p) {
        std::vector<float> values(size_t(model->shaped(buffer, p).size()));
        model->read(buffer, p, values.data());
        return Doubles(values.begin(), values.end());
    };
    std::vector<Updated> expected;
    for (const Param& p : params) expected.push_back({.w = read(Buffer::parameters, p)});
    std::vector<Doubles> begin;
    for (const Updated& x : expected) begin.push_back(x.w);

    Hyperparameters o{.lr = 0.01,
                      .beta2 = 0.95,
                      .weight_decay = 0.1,
                      .grad_scale = 0.5,
                      .cautious = true,
                      .muon_lr = 0.01,
                      .orthogonalization = Orthogonalization::polar_express};
    double flops = 0;
    for (const Param& p : params)
        if (p.layer_matrix) {
            const double m = double(std::max(p.shape[0], p.shape[1]));
            const double n = double(std::min(p.shape[0], p.shape[1]));
            flops += 5 * (2 * n * n * m + 2 * n * n * n + 2 * n * n * m);
        }
    int moved = 0;
    for (o.step = 1; o.step <= 3; o.step++) {
        const bool rests = o.step == 2;
        o.layer_steps.assign(size_t(c.layers), o.step);
        o.layer_steps[0] = rests ? 0 : (o.step + 1) / 2;
        std::vector<Doubles> before;
        for (const Param& p : params) before.push_back(read(Buffer::parameters, p));
        for (size_t i = 0; i < params.size(); i++) {
            const Param& p = params[i];
            const Doubles x = random_values(size_t(p.size()), cat(p.name, o.step));
            const std::vector<float> g(x.begin(), x.end());
            model->write(Buffer::gradients, p, g.data());
            if (!o.rests(p.layer))
                expected[i].update(p, model->optimizer->rule(p), read(Buffer::gradients, p), o);
        }
        Profile profile;
        model->profile = &profile;
        model->update(o);
        model->profile = nullptr;
        if (o.step == 1)
            row.add("FLOPs", std::fabs(profile.part("update", "Muon").flops / flops - 1),
                    cuda ? 0.1 : 1e-12); // a GPU pads the width of MLPs
        for (size_t i = 0; i < params.size(); i++)
            moved +=
                params[i].layer == 0 && rests && read(Buffer::parameters, params[i]) != before[i];
    }
    row.add("a resting layer changed", moved, 0);
    std::map<std::string, std::pair<Doubles, Doubles>> compared;
    auto compare = [&](const std::string& what, const Doubles& found, const Doubles& wanted) {
        auto& [a, b] = compared[what];
        a.insert(a.end(), found.begin(), found.end()),
            b.insert(b.end(), wanted.begin(), wanted.end());
    };
    for (size_t i = 0; i < params.size(); i++) {
        const Param& p = params[i];
        Doubles found = read(Buffer::parameters, p), wanted = expected[i].w;
        for (size_t n = 0; n < found.size(); n++) found[n] -= begin[i][n], wanted[n] -= begin[i][n];
        compare(p.layer_matrix ? "matrices" : "rest", found, wanted);
        for (int s = 0; s < int(model->optimizer->states.size()); s++) {
            const std::string& state = model->optimizer->states[size_t(s)].name;
            if (model->optimizer->has(s, p))
                compare(state, read({Buffer::state, s}, p),
                        state == "m"   ? expected[i].m
                        : state == "v" ? expected[i].v
                                       : expected[i].v_rows);
        }
    }
    for (const auto& [what, pair] : compared)
        row.add(what.c_str(), relative_error(pair.first, pair.second, 0),
                !bf16                                    ? 1e-4
                : !options.master_weights                ? 0.1
                : what == "matrices" || what == "v_rows" ? 5e-2
                                                         : 1e-5);
    return row;
}

// Steps in which branches fade in and the gates' gradient is clipped, against the same from parts:
// after the clipping of all, the gates' gradient has norm `limit`, and the others have what they
// had. `make` makes both models.
template <class Make> Row check_gates_and_fading(const char* device, const Make& make) {
    Row row{cat(device, "clipped gates, branches that fade in")};
    Config c = bf16_config("llama", "pre+gpas+prores:2");
    const int B = 2, T = 8, steps = 4;
    const double limit = 1e-3, grad_clip = 0.5;
    std::vector<int> inputs, targets;
    test_batch(c, B * T, inputs, targets, false);
    c.scheme.step = 0;
    std::unique_ptr<Model> whole = make(c, B, T), parts = make_cpu_model(c, B, T, {});
    for (Model* model : {whole.get(), parts.get()}) fill_weights(*model);
    const double scale = 1.0 / (B * T);
    double worst = 0, clipped = 0;
    for (int step = 1; step <= steps; step++) {
        whole->config.scheme.step = parts->config.scheme.step = step - 1;
        StepInput input{
            inputs.data(), targets.data(), 1, B, T, scale, grad_clip, {.lr = 1e-2, .step = step}};
        input.gate_clip = limit;
        whole->begin_step(input);
        const StepResult result = whole->end_step();

        parts->zero_gradients();
        const double loss =
            parts->loss_and_gradients(inputs.data(), targets.data(), B, T, scale) * scale;
        const double norm = parts->gradient_norm();
        worst = std::max(
            {worst, std::fabs(result.loss / loss - 1), std::fabs(result.grad_norm / norm - 1)});
        Hyperparameters o = input.hyperparameters;
        o.grad_scale = std::min(1.0, grad_clip / norm);
        double square = 0;
        float* gradients = parts->host_gradients();
        for (int64_t gate : parts->registry.gates())
            square += std::pow(o.grad_scale * double(gradients[gate]), 2);
        clipped += std::sqrt(square) > limit;
        for (int64_t gate : parts->registry.gates())
            gradients[gate] *= float(std::min(1.0, limit / std::sqrt(square)));
        parts->update(o);
    }
    row.add("losses, norms", worst, 1e-4);
    if (clipped == 0) row.note = "the gates' gradient was never clipped";
    const Buffer first_moments{Buffer::state, 0};
    const auto a = tensors_of(*whole, first_moments), b = tensors_of(*parts, first_moments);
    double moments = 0;
    for (const auto& [name, values] : b)
        moments = std::max(moments, relative_error(a.at(name), values, 1e-6));
    row.add("moments", moments, 1e-3);
    return row;
}

// Steps with LISA: layers that rest keep all their bits and have no gradient; the others have those
// of a pass through the whole model, and are updated by AdamW with their own number of steps, as
// torch.optim.AdamW counts for each tensor.
Row check_lisa(const std::string& name, const std::string& scheme, const ModelOptions& options) {
    const bool cuda = options.device == Device::cuda, bf16 = options.dtype == DType::bf16;
    Row row{cat(cuda ? "cuda: " : "", "LISA  ", name, "  ", scheme,
                !bf16                    ? " float"
                : options.master_weights ? " bf16"
                                         : " pure bf16",
                options.recompute == Recompute::none ? "" : " --recompute")};
    const Config c = bf16_config(name, scheme);
    const int B = 2, T = 9, M = 2;
    std::vector<int> inputs, targets;
    test_batch(c, M * B * T, inputs, targets, true);
    auto make = [&] {
        return cuda ? gpu_model(c, B, T, options) : make_cpu_model(c, B, T, options);
    };
    const std::unique_ptr<Model> model = make(), full = make();
    fill_weights(*model);
    const std::vector<Param>& params = model->registry.params;
    auto tensors = [&](Model& from, Buffer buffer) {
        std::vector<std::vector<float>> all;
        for (const Param& p : from.registry.params)
            from.read(buffer, p, all.emplace_back(size_t(p.size())).data());
        return all;
    };
    const std::vector<Buffer> buffers = {
        Buffer::parameters, {Buffer::state, 0}, {Buffer::state, 1}};
    auto weights_and_moments = [&] {
        std::vector<std::vector<std::vector<float>>> all;
        for (Buffer buffer : buffers) all.push_back(tensors(*model, buffer));
        return all;
    };

    Lisa lisa(3, c.layers, 1, 1); // draws layers 2, 1, 0, 2
    Hyperparameters adam{.lr = 1e-2, .beta2 = 0.95, .weight_decay = 0.1};
    const double scale = 0.02, clip = 0.05;
    std::vector<int> updates(size_t(c.layers));
    int wrong_gradients = 0, moved = 0, stuck = 0, clipped = 0;
    double norm_error = 0;
    Doubles changes, expected_changes;
    for (adam.step = 1; adam.step <= 4; adam.step++) {
        const auto before = weights_and_moments();
        for (size_t n = 0; n < params.size(); n++)
            full->write(Buffer::parameters, full->registry.params[n], before[0][n].data());
        full->zero_gradients();
        for (int m = 0; m < M; m++)
            full->loss_and_gradients(&inputs[m * B * T], &targets[m * B * T], B, T, scale);
        const auto all_gradients = tensors(*full, Buffer::gradients);

        adam.layer_steps = lisa.updates(adam.step);
        model->begin_step({inputs.data(), targets.data(), M, B, T, scale, clip, adam});
        const double norm = model->end_step().grad_norm;
        const auto after = weights_and_moments();
        const auto gradients = tensors(*model, Buffer::gradients);
        for (int layer : lisa.drawn) updates[size_t(layer)]++;

        double square = 0;
        const double factor = norm > clip ? clip / norm : 1;
        clipped += norm > clip;
        for (size_t n = 0; n < params.size(); n++) {
            const int layer = layer_by_name(params[n].name);
            const std::vector<float>&g = gradients[n], &w = before[0][n];
            if (layer >= 0 && std::count(lisa.drawn.begin(), lisa.drawn.end(), layer) == 0) {
                wrong_gradients += g != std::vector<float>(g.size());
                for (size_t i = 0; i < buffers.size(); i++) moved += after[i][n] != before[i][n];
                continue;
            }
            wrong_gradients += g != all_gradients[n];
            stuck += after[0][n] == w;
            const int t = layer < 0 ? int(adam.step) : updates[size_t(layer)];
            for (size_t i = 0; i < g.size(); i++) {
                square += double(g[i]) * g[i];
                const double d = factor * g[i], decay = params[n].shape.size() == 2 ? 0.1 : 0;
                const double m = 0.9 * before[1][n][i] + 0.1 * d;
                const double v = 0.95 * before[2][n][i] + 0.05 * d * d;
                const double mhat = m / (1 - std::pow(0.9, t)), vhat = v / (1 - std::pow(0.95, t));
                expected_changes.push_back(-1e-2 *
                                           (mhat / (std::sqrt(vhat) + 1e-8) + decay * w[i]));
                changes.push_back(double(after[0][n][i]) - w[i]);
            }
        }
        norm_error = std::max(norm_error, std::fabs(norm - std::sqrt(square)) / norm);
    }
    if (updates != std::vector<int>{1, 1, 2}) row.note = "other layers trained";
    if (clipped == 0) row.note = "nothing was clipped";
    row.add("gradients", wrong_gradients, 0);
    row.add("norm", norm_error, 1e-6);
    row.add("resting layers changed", moved, 0);
    row.add("others did not", stuck, 0);
    row.add("update", relative_error(changes, expected_changes, 0),
            bf16 && !options.master_weights ? 0.1 : 1e-4);
    return row;
}

// check_rounding on the GPU.
Row check_gpu_rounding() {
    Row row{"cuda: AdamW in bf16: master weights, nearest, stochastic"};
    Config c = bf16_config("llama", "pre");
    const int steps = 64;
    const double lr = 1e-3, expected = 1 - lr * steps;
    auto mean_after = [&](ModelOptions o) {
        o.dtype = DType::bf16;
        std::unique_ptr<Model> model = gpu_model(c, 1, 1, o);
        for (const Param& p : model->registry.params) {
            const std::vector<float> ones(p.size(), 1);
            model->write(Buffer::parameters, p, ones.data());
            model->write(Buffer::gradients, p, ones.data());
        }
        for (int step = 1; step <= steps; step++) model->update({.lr = lr, .step = step});
        double sum = 0, n = 0;
        for (const auto& [name, values] : tensors_of(*model, Buffer::parameters))
            for (double value : values) sum += value, n++;
        return sum / n;
    };
    row.add("master", std::fabs(mean_after({}) - expected), 1e-5);
    row.add("stochastic moments",
            std::fabs(mean_after({.moments = DType::bf16, .stochastic_rounding = true}) - expected),
            1e-3);
    ModelOptions pure{.master_weights = false, .moments = DType::bf16, .gradients = DType::bf16};
    row.add("nearest moves", std::fabs(mean_after(pure) - 1), 0); // 1 − 0.001 rounds to 1
    pure.stochastic_rounding = true;
    row.add("stochastic", std::fabs(mean_after(pure) - expected), 1e-3);
    return row;
}

// Logits computed token by token equal those of the whole sequence; these, the variance and the
// loss without gradients equal the CPU's.
Row check_gpu_inference(const std::string& architecture_name, const std::string& scheme) {
    Row row{cat("cuda: ", architecture_name, "  ", scheme, "  generating, variance, evaluation")};
    const Config c = bf16_config(architecture_name, scheme);
    std::vector<int> inputs, targets;
    test_batch(c, 32, inputs, targets, true);
    std::unique_ptr<Model> reference = make_cpu_model(c, 1, 32, {.purpose = Purpose::layers}),
                           whole = gpu_model(c, 1, 32, {.purpose = Purpose::layers}),
                           parts = gpu_model(c, 1, 32, {.purpose = Purpose::generate});
    for (Model* model : {reference.get(), whole.get(), parts.get()}) fill_weights(*model);
    const int V = c.vocab_size;
    std::vector<float> expected(V), found(V), all(32 * V);
    double worst = 0;
    for (int t : {2, 3, 4, 9, 5, 6, 3, 32}) {
        if (t == 5) inputs[3] = (inputs[3] + 1) % V; // earlier tokens change
        whole->logits(inputs.data(), 1, t, false, all.data());
        parts->logits(inputs.data(), 1, t, true, found.data());
        reference->logits(inputs.data(), 1, t, true, expected.data());
        const Doubles exact(expected.begin(), expected.end());
        worst = std::max(worst, relative_error(found, exact, 0));
        std::copy(all.begin() + (t - 1) * V, all.begin() + t * V, found.begin());
        worst = std::max(worst, relative_error(found, exact, 0));
    }
    row.add("logits", worst, 1e-5);
    const double loss = reference->loss(inputs.data(), targets.data(), 1, 32);
    row.add("loss", std::fabs(whole->loss(inputs.data(), targets.data(), 1, 32) - loss) / loss,
            1e-5);
    const std::vector<double> a = whole->residual_variance(), b = reference->residual_variance();
    row.add("variance", relative_error(a, b, 0), 1e-5);

    // Two continuations of 12 tokens, in one sequence and each in its own.
    std::vector<int> position(32), branch(32);
    std::vector<ScoredToken> scored;
    for (int t = 0; t < 32; t++) {
        const int own = t < 12 ? 0 : t < 20 ? 12 : 20;
        branch[t] = own, position[t] = own ? 12 + t - own : t;
        if (own) scored.push_back({t, inputs[31 - t]});
    }
    Doubles together(scored.size()), apart;
    whole->score(inputs.data(), 1, 32, {position.data(), branch.data()}, scored, together.data());
    for (auto [begin, end] : {std::pair{12, 20}, {20, 32}}) {
        std::vector<int> text(inputs.begin(), inputs.begin() + 12);
        text.insert(text.end(), inputs.begin() + begin, inputs.begin() + end);
        std::vector<ScoredToken> own(scored.begin() + begin - 12, scored.begin() + end - 12);
        for (ScoredToken& s : own) s.row -= begin - 12;
        Doubles out(own.size());
        reference->score(text.data(), 1, int(text.size()), {}, own, out.data());
        apart.insert(apart.end(), out.begin(), out.end());
    }
    row.add("score", relative_error(together, apart, 0), 1e-5);
    return row;
}

// Layer diagnostics on the GPU equal those on the CPU. During training they copy only a few numbers
// per row to the host, not whole streams.
Row check_gpu_probes(const std::string& name, const std::string& scheme, DType dtype) {
    Row row{
        cat("cuda: ", name, "  ", scheme, dtype == DType::bf16 ? " bf16" : " float", "  probes")};
    const Config c = bf16_config(name, scheme);
    const int B = 3, T = 16;
    std::vector<ProbeBatch> batches, others;
    for (int i = 0; i < 9; i++) {
        ProbeBatch batch{i == 1 ? B - 1 : B, T, {}, {}};
        test_batch(c, batch.B * T, batch.inputs, batch.targets, true);
        if (i > 0)
            for (int& token : batch.inputs) token = (token * (i + 1) + i) % c.vocab_size;
        (i < 2 ? batches : others).push_back(batch);
    }
    const ModelOptions options{.dtype = dtype};
    std::unique_ptr<Model> gpu = gpu_model(c, B, T, options),
                           cpu = make_cpu_model(c, B, T, options);
    fill_weights(*gpu), fill_weights(*cpu);
    auto numbers_in = [](const LayerDiagnostics& diagnostics) {
        Doubles numbers;
        auto collect = [&](const auto& self, const nlohmann::ordered_json& value) -> void {
            if (value.is_number()) numbers.push_back(value);
            if (value.is_structured())
                for (const auto& part : value) self(self, part);
        };
        const nlohmann::ordered_json json = to_json(diagnostics);
        collect(collect, json);
        return numbers;
    };
    const double tolerance = dtype == DType::bf16 ? 2 * bf16_tolerance : float_tolerance;
    for (const char* probe :
         {"variance", "gradients", "angular", "removal", "jacobian", "usefulness", "permutation"}) {
        ProbeSettings s;
        s.probes = parse_probes(probe);
        s.jacobian_layer = 2, s.jacobian_samples = 8;
        const auto made = gpu_model(c, B, T, {.purpose = purpose_of(s.probes), .dtype = dtype});
        fill_weights(*made);
        const Doubles found = numbers_in(measure(*made, batches, others, s)),
                      expected = numbers_in(measure(*cpu, batches, others, s));
        double worst = found.size() == expected.size() && !found.empty() ? 0 : INFINITY;
        for (size_t i = 0; i < expected.size() && worst < INFINITY; i++)
            worst = std::max(worst, std::fabs(found[i] - expected[i]) /
                                        std::max(std::fabs(expected[i]), 0.1));
        row.add(probe, worst, tolerance);
    }
    if (const SimulatedGpu* simulated = simulated_gpu()) {
        ProbeSettings s;
        s.probes = parse_probes("variance,gradients,angular");
        s.reach = 1;
        const uint64_t before = simulated->bytes_to_host();
        measure(*gpu, batches, {}, s);
        const double streams = 4 * c.layers + 2, rows = (2 * B - 1) * T, angles = c.layers;
        const double few = rows * (streams * sizeof(Moments) + angles * sizeof(double)) +
                           sizeof(double) * double(gpu->registry.params.size() + 2);
        row.add("to the host", double(simulated->bytes_to_host() - before) / few, 1);
    }
    return row;
}

// The memory plan equals what the model allocates.
Row check_gpu_plan() {
    Row row{"cuda: --dry-run's bytes are those allocated"};
    for (auto [name, options] :
         {std::pair{"llama", ModelOptions{}},
          {"gpt2", ModelOptions{.dtype = DType::bf16}},
          {"olmo2", ModelOptions{.dtype = DType::bf16,
                    .master_weights = false,
                    .moments = DType::bf16,
                    .gradients = DType::bf16,
                    .recompute = Recompute::layers}},
          {"qwen2", ModelOptions{.purpose = Purpose::score, .dtype = DType::bf16}},
          {"olmo", ModelOptions{.purpose = Purpose::layers}},
          {"llama-gqa", ModelOptions{.purpose = Purpose::jacobians, .dtype = DType::bf16}}}) {
        const Config c = bf16_config(name, "peri");
        const double allocated = double(gpu_model(c, 2, 32, options)->bytes());
        options.device = Device::cuda;
        row.add(name,
                std::fabs(double(plan_cuda_memory(c, 2, 32, options).total()) / allocated - 1),
                1e-3);
    }
    return row;
}

// A few hundred steps from the same weights on the same tokens, which follow a pattern that can be
// learned: the losses stay close.
Row check_gpu_training(DType dtype, int steps, double tolerance) {
    Row row{cat("cuda: ", steps, " steps in ", dtype == DType::bf16 ? "bf16" : "float32",
                " as on the CPU in float32")};
    Config c = architecture("llama");
    c.vocab_size = 29, c.width = 32, c.layers = 2, c.heads = 2, c.mlp_width = 48, c.positions = 16;
    c.scheme = parse_scheme("lns");
    complete_config(c);
    const int B = 2, T = 16;
    std::unique_ptr<Model> reference = make_cpu_model(c, B, T, {}),
                           model = gpu_model(c, B, T, {.dtype = dtype});
    reference->initialize(1), model->initialize(1);
    std::vector<int> inputs(B * T), targets(B * T);
    double last[2] = {}, begin = 0, worst = 0;
    for (int64_t step = 1; step <= steps; step++) {
        for (int b = 0; b < B; b++) { // arithmetic progressions
            const int start = int(random_below(29, 1, uint64_t(b), uint64_t(2 * step)));
            const int stride = 1 + int(random_below(4, 1, uint64_t(b), uint64_t(2 * step + 1)));
            for (int t = 0; t < T; t++) {
                inputs[b * T + t] = (start + t * stride) % 29;
                targets[b * T + t] = (start + (t + 1) * stride) % 29;
            }
        }
        const Hyperparameters adam{.lr = 3e-3, .beta2 = 0.95, .weight_decay = 0.1, .step = step};
        int n = 0;
        for (Model* m : {reference.get(), model.get()}) {
            m->begin_step({inputs.data(), targets.data(), 1, B, T, 1.0 / (B * T), 1, adam});
            last[n++] = m->end_step().loss;
        }
        if (step == 1) begin = last[0];
        worst = std::max(worst, std::fabs(last[0] - last[1]));
    }
    row.add("loss", worst, tolerance);
    if (last[0] > 0.5 * begin) row.note = cat("nothing was learned: ", begin, " to ", last[0]);
    return row;
}

std::vector<Row> check_gpu_all(const std::function<bool(const std::string&)>& wanted) {
    std::vector<Row> rows;
    if (const std::string why = why_no_gpu(); !why.empty()) {
        std::printf("SKIPPED: the rows `cuda: …`: %s\n", why.c_str());
        return rows;
    }
    auto keep = [&](const std::string& name, const auto& check) {
        if (!wanted("cuda: " + name)) return;
        rows.push_back(check());
        rows.back().print();
    };
    for (const std::string& name : architectures)
        for (const std::string& scheme : schemes_of(name)) {
            Config small = small_config(name);
            small.scheme = parse_scheme(scheme);
            if (!supports_scheme(small)) continue;
            keep(name + "  " + scheme,
                 [&] { return check_gpu(name + "  " + scheme, bf16_config(name, scheme), 2, 8); });
        }
    for (Row& row : check_gpu_shapes(wanted)) rows.push_back(std::move(row));
    for (auto [name, scheme] : {std::pair{"llama", "lns"},
                                {"gpt2", "pre"},
                                {"olmo2", "sandwich+gpas"},
                                {"llama-gqa", "deepnorm"},
                                {"qwen2", "peri"},
                                {"llama-gqa", "mhc"},
                                {"gpt2", "attnres:3"},
                                {"llama-gqa", "hybrid+value-residual"},
                                {"olmo", "layerscale"},
                                {"gpt2-dyt", "peri"},
                                {"llama-gqa", "group:2"}})
        for (DType dtype : {DType::float32, DType::bf16})
            keep(
                cat(name, "  ", scheme, dtype == DType::bf16 ? " bf16" : " float", "  bits repeat"),
                [&, name = name, scheme = scheme] { return check_gpu_bits(name, scheme, dtype); });
    for (auto [name, scheme] : {std::pair{"gpt2", "layerscale"},
                                {"llama-gqa", "post"},
                                {"qwen2", "sandwich+gpas"},
                                {"llama-gqa", "siamese"},
                                {"gpt2", "lns:after"},
                                {"llama-gqa", "hybrid+value-residual"},
                                {"gpt2-dyt", "sandwich"},
                                {"llama-gqa", "group:2"}})
        keep(cat(name, "  ", scheme, "  layer by layer"), [&, name = name, scheme = scheme] {
            return check_layers("cuda: ", name, scheme,
                                [](const Config& c, int B, int T) { return gpu_model(c, B, T); });
        });
    for (auto [name, scheme] :
         {std::pair{"gpt2", "pre"}, {"llama-gqa", "lns"}, {"olmo2", "sandwich+gpas"}})
        for (DType dtype : {DType::float32, DType::bf16})
            keep(cat(name, "  ", scheme, dtype == DType::bf16 ? " bf16" : " float", "  probes"),
                 [&, name = name, scheme = scheme] {
                     return check_gpu_probes(name, scheme, dtype);
                 });
    keep("clipped gates, branches that fade in", [&] {
        return check_gates_and_fading(
            "cuda: ", [](const Config& c, int B, int T) { return gpu_model(c, B, T); });
    });
    for (const std::string& name : architectures)
        for (const char* scheme : {"lns", "hybrid+value-residual"}) {
            if (scheme != std::string("lns") && name != "llama-gqa") continue;
            keep(cat(name, "  ", scheme, "  generating, variance, evaluation"),
                 [&] { return check_gpu_inference(name, scheme); });
        }
    for (DType gradients : {DType::float32, DType::bf16})
        keep(cat("a step equals its parts, gradients in ",
                 gradients == DType::bf16 ? "bf16" : "float32"),
             [&] { return check_gpu_step(gradients); });
    keep("AdamW in bf16: master weights, nearest, stochastic", check_gpu_rounding);
    keep("AdamW in ranges of the buffers", [] { return check_ranges(Device::cuda); });
    keep("LISA", [] {
        return check_lisa("qwen2", "sandwich+gpas", {.device = Device::cuda, .dtype = DType::bf16});
    });
    keep("LISA in pure bf16", [] {
        return check_lisa("olmo2", "olmo2",
                          {.device = Device::cuda,
                           .dtype = DType::bf16,
                           .master_weights = false,
                           .moments = DType::bf16,
                           .gradients = DType::bf16,
                           .stochastic_rounding = true,
                           .recompute = Recompute::activations});
    });
    for (const char* optimizer : {"muon", "normuon"}) {
        keep(cat(optimizer_row(optimizer).title, " float"),
             [=] { return check_muon("gpt2", "post", optimizer, {.device = Device::cuda}); });
        keep(cat(optimizer_row(optimizer).title, " bf16"), [=] {
            return check_muon("llama-gqa", "lns", optimizer,
                              {.device = Device::cuda, .dtype = DType::bf16});
        });
        keep(cat(optimizer_row(optimizer).title, " pure bf16"), [=] {
            return check_muon("qwen2", "sandwich+gpas", optimizer,
                              {.device = Device::cuda,
                               .dtype = DType::bf16,
                               .master_weights = false,
                               .moments = DType::bf16,
                               .gradients = DType::bf16,
                               .stochastic_rounding = true});
        });
    }
    keep("--dry-run's bytes are those allocated", check_gpu_plan);
    // Training is chaotic: two runs in float that differ only by rounding diverge this far.
    keep("200 steps in float32 as on the CPU in float32",
         [] { return check_gpu_training(DType::float32, 200, 2e-2); });
    keep("200 steps in bf16 as on the CPU in float32",
         [] { return check_gpu_training(DType::bf16, 200, 0.2); });
    return rows;
}

// ---------------------------------------------------------------------------------------------

std::vector<Row> all_rows(const std::string& filter) {
    std::vector<Row> rows;
    auto wanted = [&](const std::string& name) { return name.find(filter) != std::string::npos; };
    auto keep = [&](Row row) {
        if (wanted(row.name)) rows.push_back(std::move(row));
    };
    if (filter.rfind("PyTorch", 0) == 0) return check_fixtures(filter);
    rows = check_gpu_all(wanted);
    if (simulated_gpu()) return rows; // test_gpt runs the other rows
    if (filter.rfind("cuda", 0) == 0) return rows;

    keep(check_random()), keep(check_exp()), keep(check_gemm()), keep(check_embedding(false)),
        keep(check_embedding(true));
    if (const char* name = "matrix products of heavy-tailed numbers, K=50000"; wanted(name))
        rows.push_back(check_long_sums(name));
    if (const char* name = "cross-entropy's sum, V=50000"; wanted(name))
        rows.push_back(check_long_softmax(name));
    keep(check_linear(5, 7, 9)), keep(check_linear(1, 3, 70));
    for (NormType type : {NormType::rms, NormType::layer, NormType::dyt}) {
        const std::string norm = type == NormType::rms     ? " RMSNorm"
                                 : type == NormType::layer ? " LayerNorm"
                                                           : " DyT";
        for (const std::string& name : all_schemes()) {
            if (type == NormType::dyt && (parse_scheme(name).gated() || name == "group:2"))
                continue;
            // Layer 2 of 4, where mix:1 and mix:3 differ: its attention's junction.
            const Junction j = junction(parse_scheme(name), 4, 3);
            if (j.mixing == Mixing::sum)
                keep(check_junction(name + norm, j, type, true, type != NormType::rms));
        }
        keep(check_junction("mix:3" + norm, junction(parse_scheme("mix:3"), 4, 3), type, true,
                            true));
        keep(check_junction("peri's embedding" + norm, junction(parse_scheme("peri"), 4, 0), type,
                            true, true));
        keep(check_junction("sandwich, no parameters" + norm,
                            junction(parse_scheme("sandwich"), 4, 3), type, false, false));
    }
    for (int n : {1, 2, 4, 8}) keep(check_streams(n));
    for (auto [branches, block] : {std::pair{1, 1}, {5, 1}, {5, 2}, {4, 4}, {6, 3}})
        keep(check_sources(branches, block));
    keep(check_rope()), keep(check_qkv_norm("q and k norm", {1, 1, 0}));
    keep(check_qkv_norm("norms of q's and k's heads", {4, 2, 0}));
    keep(check_qkv_norm("norms of q's, k's and v's heads", {4, 2, 2}));
    keep(check_value_residual());
    for (AttentionShape a : {AttentionShape{1, 1, 1, 1, 4},
                             {2, 7, 3, 3, 5},
                             {1, 9, 4, 2, 6},
                             {1, 35, 2, 1, 4},
                             {1, 64, 2, 2, 2},
                             {2, 7, 2, 1, 4, 0, {}, 3},
                             {1, 70, 1, 1, 2, 0, {}, 5}})
        keep(check_attention(a));
    for (int i = 0; i < int(std::size(activations)); i++) keep(check_activation(Activation(i)));
    keep(check_cross_entropy()), keep(check_ranges(Device::cpu));
    const ModelOptions pure_bf16{.dtype = DType::bf16,
                                 .master_weights = false,
                                 .moments = DType::bf16,
                                 .stochastic_rounding = true,
                                 .recompute = Recompute::activations};
    for (bool cautious : {false, true}) keep(check_optimizer("adamw", {.cautious = cautious}));
    for (const char* optimizer : {"muon", "normuon"})
        for (Orthogonalization how :
             {Orthogonalization::newton_schulz, Orthogonalization::polar_express})
            for (MuonScale scale : {MuonScale::moonlight, MuonScale::jordan})
                keep(check_optimizer(optimizer, {.cautious = scale == MuonScale::jordan,
                                                 .orthogonalization = how,
                                                 .muon_scale = scale}));
    keep(check_muon("gpt2", "post", "muon", {}));
    keep(check_muon("llama-gqa", "lns", "normuon", {}));
    keep(check_muon("qwen2", "sandwich+gpas", "muon", {.dtype = DType::bf16}));
    keep(check_muon("olmo2", "olmo2", "normuon", pure_bf16));
    keep(check_rounding());
    keep(check_completep());
    keep(check_gates_and_fading(
        "", [](const Config& c, int B, int T) { return make_cpu_model(c, B, T, {}); }));
    keep(check_lisa("llama-gqa", "lns", {}));
    keep(check_lisa("qwen2", "sandwich+gpas", {.dtype = DType::bf16}));
    keep(check_lisa("gpt2", "post", {.recompute = Recompute::layers}));
    keep(check_lisa("llama-gqa", "hybrid+value-residual", {}));
    keep(check_lisa("olmo2", "olmo2", pure_bf16));

    for (const std::string& scheme : scheme_names()) keep(check_initialization(scheme));
    for (const char* scheme : {"lns+gpas+scaled-init", "deepnorm+scaled-init", "pre+depth-init+x0"})
        keep(check_initialization(scheme));
    for (const std::string& name : architectures) {
        keep(check_same_bits(name, "lns", 0, "pre"));
        keep(check_same_bits(name, "mix:0", 0.5, "pre"));
        keep(check_same_bits(name, "mix:3", 0.5, "post"));
        if (!is_dyt(name)) keep(check_same_bits(name, "group:1", 0.5, "pre"));
        if (!is_dyt(name)) keep(check_same_bits(name, "mix:3+gpas", 0.5, "post+gpas"));
        if (small_config(name).norm_weight) keep(check_folded(name)); // OLMo has no norm weights
        const std::string stock = stock_scheme(small_config(name).model_type).name();
        keep(check_causal(name, stock)), keep(check_continuation(name, stock));
    }
    for (auto [name, scheme] : {std::pair{"llama-gqa", "hybrid+value-residual"},
                                {"gpt2", "pre+value-residual"},
                                {"llama", "siamese"},
                                {"gpt2", "residual"},
                                {"qwen2", "mix:1+gpas+x0"},
                                {"qwen2", "mhc+value-residual"},
                                {"gpt2", "attnres:2"}})
        keep(check_causal(name, scheme)), keep(check_continuation(name, scheme));
    for (const char* name : {"llama", "gpt2"})
        for (const char* scheme : {"mhc", "mhc:2", "attnres", "attnres:2"})
            keep(check_starts_as_pre(name, scheme));
    keep(check_lns_scales()), keep(check_accumulation()), keep(check_deterministic());
    auto on_cpu = [](const Config& c, int B, int T) { return make_cpu_model(c, B, T, {}); };
    for (auto [name, scheme] : {std::pair{"llama", "pre"},
                                {"gpt2", "layerscale"},
                                {"olmo2", "olmo2"},
                                {"qwen2", "sandwich+gpas"},
                                {"llama-gqa", "post"},
                                {"llama-gqa", "hybrid+value-residual"},
                                {"gpt2", "pre+value-residual"},
                                {"qwen2", "siamese"},
                                {"llama", "residual"},
                                {"gpt2", "lns:after"},
                                {"olmo", "peri"},
                                {"gpt2-dyt", "peri"},
                                {"olmo", "group:2"}})
        keep(check_layers("claim: ", name, scheme, on_cpu));
    for (auto [name, scheme] : {std::pair{"llama", "lns"},
                                {"gpt2", "pre"},
                                {"olmo2", "sandwich+gpas"},
                                {"llama-gqa", "deepnorm"},
                                {"qwen2", "peri"},
                                {"qwen3", "lns"},
                                {"llama-gqa", "hybrid+value-residual"},
                                {"gpt2", "pre+value-residual"},
                                {"llama-gqa", "siamese"},
                                {"gpt2", "residual"},
                                {"qwen2", "peri+x0"},
                                {"llama-gqa", "mhc"},
                                {"gpt2", "mhc:3+value-residual"},
                                {"llama-gqa", "attnres"},
                                {"gpt2", "attnres:2"},
                                {"smollm3", "pre"},
                                {"olmo", "mix:1"},
                                {"llama-dyt", "sandwich"},
                                {"gpt2", "group:3"}}) {
        keep(check_recompute<float>(name, scheme));
        keep(check_recompute<bf16>(name, scheme));
    }

    struct Case {
        std::string architecture, scheme;
        int B, T;
    };
    std::vector<Case> cases;
    for (const std::string& name : architectures) {
        for (const std::string& scheme : schemes_of(name)) cases.push_back({name, scheme, 2, 7});
        for (auto [B, T] : {std::pair{1, 1}, {1, 9}, {3, 2}}) cases.push_back({name, "lns", B, T});
    }
    std::erase_if(cases, [&](const Case& c) {
        Config config = small_config(c.architecture);
        config.scheme = parse_scheme(c.scheme);
        return !supports_scheme(config) || !wanted(c.architecture + "  " + c.scheme);
    });
    const size_t first = rows.size();
    rows.resize(first + cases.size());
    // Models are independent of each other: one thread each.
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < cases.size(); i++)
        rows[first + i] = check_model(cases[i].architecture, cases[i].scheme, cases[i].B,
                                      cases[i].T, cases[i].T > 1);
    for (size_t i = 0; i < cases.size(); i++)
        check_float(rows[first + i], cases[i].architecture, cases[i].scheme, cases[i].B, cases[i].T,
                    cases[i].T > 1);
    for (size_t i = 0; i < cases.size(); i++)
        if (cases[i].T == 7) check_bf16(rows[first + i], cases[i].architecture, cases[i].scheme);

    for (Row& row : check_fixtures(filter)) rows.push_back(std::move(row));
    return rows;
}

int run_tests(int argc, char** argv) {
    std::string filter;
    if (argc == 3 && std::string(argv[1]) == "-k")
        filter = argv[2];
    else if (argc != 1)
        fail("expected no arguments or -k NAME, found '", argv[1], "'");

    int failed = 0, passed = 0;
    for (Row& row : all_rows(filter)) {
        (row.passed() ? passed : failed)++;
        if (!row.printed) row.print();
    }
    if (passed + failed == 0) fail("no check's name contains '", filter, "'");
    std::printf("\n%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

} // namespace lns

int main(int argc, char** argv) {
    try {
        return lns::run_tests(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "test_gpt: %s\n", lns::one_line(error.what()).c_str());
        return 1;
    }
}
