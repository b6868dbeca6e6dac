// The members of CpuModel that training does not need: for checkpoints, error messages and layer
// diagnostics; and the memory plan. train_gpt.cpp includes this after the class.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "gpt/base/error.h"
#include "gpt/model/nonfinite.h"

namespace lns {

template <class S> std::string CpuModel<S>::dtype() const {
    return sizeof(S) == 8 ? "float64" : sizeof(S) == 4 ? "float32" : "bf16";
}

// ---------------------------------------------------------------------------------------------
// Parameters, gradients and moments

template <class S> void CpuModel<S>::set_parameter(int64_t i, A value) {
    parameters[i] = value;
    if (master.size) master[i] = value;
}

template <class S> void CpuModel<S>::read(Buffer buffer, const Param& p, float* out) {
    if (buffer == Buffer::gradients) zero_remaining_gradients();
    const int64_t n = shaped(buffer, p).size();
    with_buffer(*this, buffer, p, [&](const auto* from) {
        for (int64_t i = 0; i < n; i++) out[i] = float(from[i]);
    });
}

template <class S> void CpuModel<S>::write(Buffer buffer, const Param& p, const float* values) {
    kv_cache_valid = false;
    if (buffer == Buffer::gradients) zero_remaining_gradients();
    const int64_t n = shaped(buffer, p).size();
    auto copy = [&]<class X>(X* to) {
        for (int64_t i = 0; i < n; i++) to[i] = X(values[i]);
    };
    with_buffer(*this, buffer, p, copy);
    if (buffer == Buffer::parameters && master.size) copy(parameters + p.offset);
}

template <class S> float* CpuModel<S>::host_gradients() {
    zero_remaining_gradients();
    if constexpr (std::is_same_v<A, float>)
        return gradients;
    else
        return nullptr;
}

template <class S> std::vector<double> CpuModel<S>::gradient_squares() {
    zero_remaining_gradients();
    std::vector<double> squares;
    for (const Param& p : registry.params)
        squares.push_back(sum_of_squares(gradients + p.offset, p.size()));
    return squares;
}

template <class S> std::string CpuModel<S>::first_nonfinite() {
    return find_nonfinite(*this, config, registry, gradients.size && !overwrite_gradients,
                          [](const auto* x, int64_t n) {
                              return std::any_of(x, x + n,
                                                 [](auto v) { return !std::isfinite(A(v)); });
                          });
}

// ---------------------------------------------------------------------------------------------
// Layer by layer: r is residual(2l) before layer l.

// Moves r to the place of junction k, and computes u from it.
template <class S> void CpuModel<S>::enter(int k) {
    if (between != k) std::copy_n(residual(between), rows() * config.width, residual(k));
    JunctionArguments<S> x = junction_arguments(entering(junction_of(k)), k);
    x.r_prev = residual(k), x.y_prev = second(between);
    between = k;
    junction_forward(x, stopped[k]);
}
template <class S> void CpuModel<S>::enter_backward(int k) {
    JunctionArguments<S> x = junction_arguments(entering(junction_of(k)), k);
    x.r_prev = residual(k);
    junction_backward(x, acts.scratch.begin());
}
template <class S> void CpuModel<S>::leave(int k) {
    JunctionArguments<S> x = junction_arguments(leaving(junction_of(k)), k);
    x.u = nullptr;
    junction_forward(x, stopped[k]);
}

template <class S>
void CpuModel<S>::embed(const int* inputs, int b, int t, const Branches& branched) {
    if (options.purpose < Purpose::layers || options.recompute != Recompute::none)
        fail_layer_by_layer();
    check_one_stream();
    set_tokens(inputs, b, t, 0, branched);
    embed();
    between = 0;
    leave(0);
}
template <class S> void CpuModel<S>::run_layer(int l) {
    enter(2 * l);
    attention_sublayer_forward(l);
    join_forward(2 * l + 1);
    mlp_sublayer_forward(l);
    between = 2 * l + 2;
    leave(between);
}
template <class S> double CpuModel<S>::finish(const int* targets) {
    check_targets(targets, rows());
    enter(2 * config.layers);
    head_forward(targets, nullptr, 0, 0, rows());
    return sum_of_losses();
}
template <class S> void CpuModel<S>::finish(const std::vector<ScoredToken>& scored, double* out) {
    enter(2 * config.layers);
    score_rows(scored, out);
}
template <class S> void CpuModel<S>::finish_backward(const int* targets, double loss_scale) {
    if (options.purpose < Purpose::jacobians) fail_backward();
    check_targets(targets, rows());
    enter(2 * config.layers);
    zero_remaining_gradients();
    head_forward_backward(targets, loss_scale);
    clear_stream_gradients();
    enter_backward(2 * config.layers);
}
template <class S> void CpuModel<S>::run_layer_backward(int l) {
    if (options.purpose < Purpose::jacobians) fail_backward();
    zero_remaining_gradients();
    std::fill_n(acts.dinput.begin(), rows() * config.width, S(0));
    const int k = 2 * l + 2;
    junction_backward(junction_arguments(leaving(junction_of(k)), k), acts.scratch.begin());
    mlp_sublayer_backward(l);
    join_backward(2 * l + 1);
    attention_sublayer_backward(l);
    enter_backward(2 * l);
}

// f(x): x(i) is number i of a stream.
template <class S> template <class F> void CpuModel<S>::with_stream(Stream stream, const F& f) {
    auto plain = [&](const auto* x) { f([x](int64_t i) { return float(x[i]); }); };
    switch (stream) {
    case Stream::residual:
        return plain(residual(between));
    case Stream::middle:
        return plain(residual(between - 1));
    case Stream::attention: {
        // Where no junction keeps b, branches may share a slot: r was skip · r + b.
        if (junction_of(between - 1).keeps_branch() || junction_of(between).keeps_branch())
            return plain(branch(between - 1));
        const Junction j = junction_of(between - 1);
        const A skip = A(j.skip), beta = A(j.beta);
        const A *after = residual(between - 1), *before = residual(between - 2);
        if (beta == 1) return f([=](int64_t i) { return float(after[i] - skip * before[i]); });
        return f([=](int64_t i) { return float((after[i] - skip * before[i]) / beta); });
    }
    case Stream::mlp:
        return plain(branch(between));
    case Stream::gradient:
        return plain(acts.dresidual.begin());
    }
}
template <class S> void CpuModel<S>::read(Stream stream, float* out) {
    with_stream(stream, [&](const auto& x) {
#pragma omp parallel for
        for (int64_t i = 0; i < rows() * config.width; i++) out[i] = x(i);
    });
}
template <class S> Acc<S>* CpuModel<S>::writable(Stream stream) {
    if (stream != Stream::residual && stream != Stream::gradient)
        fail("only the residual stream and its gradient can be written between layers");
    return stream == Stream::residual ? residual(between) : acts.dresidual.begin();
}
template <class S> void CpuModel<S>::write(Stream stream, const float* values) {
    A* to = writable(stream);
    if (stream == Stream::gradient) clear_stream_gradients();
#pragma omp parallel for
    for (int64_t i = 0; i < rows() * config.width; i++) to[i] = A(values[i]);
}
template <class S>
void CpuModel<S>::read_rows(Stream stream, const std::vector<int64_t>& rows, float* out) {
    const int C = config.width;
    const A* from = writable(stream);
    for (int64_t row : rows)
        for (int i = 0; i < C; i++) *out++ = float(from[row * C + i]);
}
template <class S>
void CpuModel<S>::write_rows(Stream stream, const std::vector<int64_t>& to, const float* values) {
    const int C = config.width;
    A* x = writable(stream);
    if (stream == Stream::gradient) clear_stream_gradients();
    std::fill_n(x, rows() * C, A(0));
    for (int64_t row : to)
        for (int i = 0; i < C; i++) x[row * C + i] = A(*values++);
}

template <class S> std::vector<Moments> CpuModel<S>::row_moments(Stream stream) {
    std::vector<Moments> moments(rows());
    const int C = config.width;
    with_stream(stream, [&](const auto& x) {
#pragma omp parallel for
        for (int64_t row = 0; row < rows(); row++) {
            double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < C; i++) sum += double(x(row * C + i));
            const double mean = sum / C;
#pragma omp simd reduction(+ : square)
            for (int i = 0; i < C; i++) {
                const double d = double(x(row * C + i)) - mean;
                square += d * d;
            }
            moments[row] = {double(C), mean, square};
        }
    });
    return moments;
}
template <class S> std::vector<double> CpuModel<S>::row_chords(int l, int m) {
    std::vector<double> chords(rows());
    const int C = config.width;
#pragma omp parallel for
    for (int64_t row = 0; row < rows(); row++) {
        const A *a = residual(2 * l) + row * C, *b = residual(2 * m) + row * C;
        double aa = 0, bb = 0, difference = 0;
#pragma omp simd reduction(+ : aa, bb)
        for (int i = 0; i < C; i++) {
            const double x = double(float(a[i])), y = double(float(b[i]));
            aa += x * x, bb += y * y;
        }
        const double ratio = bb > 0 ? std::sqrt(aa / bb) : 0;
#pragma omp simd reduction(+ : difference)
        for (int i = 0; i < C; i++) {
            const double d = double(float(a[i])) - ratio * double(float(b[i]));
            difference += d * d;
        }
        chords[row] = aa > 0 ? difference / aa : bb > 0;
    }
    return chords;
}

// ---------------------------------------------------------------------------------------------
// Memory

template <class S>
MemoryPlan plan_memory(const Config& config, int B, int T, const ModelOptions& o) {
    MemoryPlan plan;
    const Registry registry = make_registry(config);
    const int64_t n = registry.size;
    plan.parameters = n * int64_t(sizeof(S));
    if (o.purpose >= Purpose::gradients) plan.gradients = n * int64_t(sizeof(Acc<S>));
    if (o.purpose == Purpose::training) {
        const OptimizerLayout layout(*o.optimizer, registry);
        plan.optimizer = layout.bytes(o.moments == DType::bf16 ? sizeof(bf16) : sizeof(Acc<S>)) +
                         layout.scratch() * int64_t(sizeof(S)) +
                         layout.most_rows * int64_t(sizeof(Acc<S>));
        if (sizeof(S) < sizeof(Acc<S>) && o.master_weights)
            plan.optimizer += n * int64_t(sizeof(Acc<S>));
    }
    Activations<S> acts;
    acts.layout(config, B, T, o, [&](auto& array, int64_t elements) {
        plan.activations += elements * int64_t(sizeof(array[0]));
    });
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
#else
    const int threads = 1;
#endif
    for (const Param& p : registry.params) {
        if (p.shape.size() != 2) continue;
        const int64_t rows = p.offset == registry.head ? acts.head_rows : acts.rows;
        for (int k = 0; k < 2; k++) // forward, and the input's gradient
            plan.scratch = std::max(
                plan.scratch, gemm_scratch(rows, p.shape[1 - k], p.shape[k], sizeof(S), threads));
    }
    return plan;
}

} // namespace lns
