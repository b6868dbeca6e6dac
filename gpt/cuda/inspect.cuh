// The members of CudaModel that training does not need: for checkpoints, error messages and layer
// diagnostics, all of which wait for the GPU; and the memory plan. train_gpt.cu includes this after
// the class.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

// defines: row_moments, row_chords, find_nonfinite
#include "gpt/cuda/diagnostics.cuh"
// defines: pad_config, Placement
#include "gpt/cuda/padding.h"
// defines: leaving, entering
#include "gpt/model/layers.h"
// defines: find_nonfinite
#include "gpt/model/nonfinite.h"

namespace lns::cuda {

// ---------------------------------------------------------------------------------------------
// Parameters, gradients and moments

template <class S, class G> void CudaModel<S, G>::read(Buffer buffer, const Param& p, float* out) {
    const Param q = shaped(buffer, padded_param(p));
    const Placement place(shaped(buffer, p), q, config, padded_config);
    with_buffer(*this, buffer, q, [&](auto* from) {
        const auto values = fetch(from, q.size());
        place.each([&](int64_t i, int64_t j) { out[i] = float(values[j]); });
    });
}
template <class S, class G>
void CudaModel<S, G>::write(Buffer buffer, const Param& p, const float* values) {
    kv_cache_valid = false;
    const Param q = shaped(buffer, padded_param(p));
    const Placement place(shaped(buffer, p), q, config, padded_config);
    auto upload = [&](auto* to) {
        using X = std::remove_reference_t<decltype(*to)>;
        std::vector<X> padded(size_t(q.size()), X(0.0f));
        place.each([&](int64_t i, int64_t j) { padded[j] = X(values[i]); });
        CUDA(cudaMemcpyAsync(to, padded.data(), padded.size() * sizeof(X), cudaMemcpyHostToDevice,
                             stream));
        stream.wait();
    };
    with_buffer(*this, buffer, q, upload);
    if (buffer == Buffer::parameters && master.size) upload(parameters + q.offset);
}
template <class S, class G> const Param& CudaModel<S, G>::padded_param(const Param& p) const {
    const auto at =
        std::lower_bound(registry.params.begin(), registry.params.end(), p.offset,
                         [](const Param& other, int64_t offset) { return other.offset < offset; });
    return padded_registry.params[size_t(at - registry.params.begin())];
}

// n elements from the GPU.
template <class S, class G>
template <class X>
std::vector<std::remove_const_t<X>> CudaModel<S, G>::fetch(X* from, int64_t n) {
    std::vector<std::remove_const_t<X>> values(n);
    CUDA(cudaMemcpyAsync(values.data(), from, size_t(n) * sizeof(X), cudaMemcpyDeviceToHost,
                         stream));
    stream.wait();
    return values;
}

template <class S, class G> std::string CudaModel<S, G>::first_nonfinite() {
    const Array<int> found(1);
    return lns::find_nonfinite(*this, padded_config, padded_registry, gradients.size > 0,
                               [&](const auto* x, int64_t n) {
                                   cuda::find_nonfinite(found.begin(), x, n, stream);
                                   return fetch(found.begin(), 1)[0] != 0;
                               });
}

// ---------------------------------------------------------------------------------------------
// Layer by layer

// Moves r to the place of junction k, and computes u.
template <class S, class G> void CudaModel<S, G>::enter(int k) {
    if (between != k)
        for (auto [to, from] :
             {std::pair{residual(k), residual(between)}, {second(k), second(between)}})
            if (to != from)
                CUDA(cudaMemcpyAsync(to, from, stream_bytes(), cudaMemcpyDeviceToDevice, stream));
    between = k;
    junction_forward(junction_arguments(entering(junction_of(k)), k, residual(k),
                                        acts.input.slot[k] < 0 ? nullptr : input(k)),
                     stream);
}
template <class S, class G> void CudaModel<S, G>::enter_backward(int k, bool last) {
    junction_backward(junction_arguments(entering(junction_of(k)), k, residual(k), nullptr),
                      junction_gradients(k, last), multiprocessors, stream);
}
template <class S, class G> void CudaModel<S, G>::leave(int k, const float* r_prev) {
    between = k;
    junction_forward(junction_arguments(leaving(junction_of(k)), k, r_prev, nullptr), stream);
}
template <class S, class G> void CudaModel<S, G>::leave_backward(int k, const float* r_prev) {
    junction_backward(junction_arguments(leaving(junction_of(k)), k, r_prev, nullptr),
                      junction_gradients(k, false), multiprocessors, stream);
}

template <class S, class G>
void CudaModel<S, G>::embed(const int* inputs, int b, int t, const Branches& branched) {
    if (options.purpose < Purpose::layers || options.recompute != Recompute::none)
        fail_layer_by_layer();
    check_one_stream();
    begin_pass(inputs, nullptr, b, t, 0, branched);
    kv_cache_valid = false;
    embed();
    leave(0, embedded());
    wait();
}
template <class S, class G> void CudaModel<S, G>::run_layer(int l) {
    enter(2 * l);
    attention_sublayer_forward(l);
    join_forward(2 * l + 1);
    mlp_sublayer_forward(l);
    leave(2 * l + 2, residual(2 * l + 1));
    wait();
}
template <class S, class G>
void CudaModel<S, G>::set_targets(const int* targets, double loss_scale) {
    const BatchLayout to = layout();
    check_targets(targets, to.rows);
    const float scale = float(loss_scale);
    CUDA(cudaMemcpyAsync(batch + to.targets(), targets, size_t(to.rows) * sizeof(int),
                         cudaMemcpyHostToDevice, stream));
    CUDA(cudaMemcpyAsync(batch + to.loss_scale(), &scale, sizeof scale, cudaMemcpyHostToDevice,
                         stream));
    stream.wait();
}
template <class S, class G> double CudaModel<S, G>::finish(const int* targets) {
    set_targets(targets, 0);
    enter(2 * config.layers);
    return head_loss();
}
template <class S, class G>
void CudaModel<S, G>::finish(const std::vector<ScoredToken>& scored, double* out) {
    enter(2 * config.layers);
    score_rows(scored, out);
}
template <class S, class G>
void CudaModel<S, G>::finish_backward(const int* targets, double loss_scale) {
    if (options.purpose < Purpose::jacobians) fail_backward();
    set_targets(targets, loss_scale);
    enter(2 * config.layers);
    head_forward_backward();
    clear_stream_gradients();
    enter_backward(2 * config.layers, true);
    wait();
}
template <class S, class G> void CudaModel<S, G>::run_layer_backward(int l) {
    if (options.purpose < Purpose::jacobians) fail_backward();
    CUDA(cudaMemsetAsync(acts.dinput, 0, size_t(rows()) * padded_config.width * sizeof(S), stream));
    leave_backward(2 * l + 2, residual(2 * l + 1));
    mlp_sublayer_backward(l);
    join_backward(2 * l + 1);
    attention_sublayer_backward(l);
    enter_backward(2 * l, false);
    wait();
}
// f(x, before, skip, beta): a stream is (x − skip · before) / β, or x where before is null.
template <class S, class G>
template <class F>
void CudaModel<S, G>::with_stream(Stream which, const F& f) {
    const float* none = nullptr;
    switch (which) {
    case Stream::residual:
        return f(residual(between), none, 0.0f, 1.0f);
    case Stream::middle:
        return f(residual(between - 1), none, 0.0f, 1.0f);
    case Stream::attention:
        // Where no junction keeps b, branches may share a slot: r was skip · r + b.
        if (junction_of(between - 1).keeps_branch() || junction_of(between).keeps_branch())
            return f(branch(between - 1), none, 0.0f, 1.0f);
        return f(residual(between - 1), static_cast<const float*>(residual(between - 2)),
                 float(junction_of(between - 1).skip), float(junction_of(between - 1).beta));
    case Stream::mlp:
        return f(branch(between), none, 0.0f, 1.0f);
    case Stream::gradient:
        return f(acts.dresidual + 0, none, 0.0f, 1.0f);
    }
}
template <class S, class G> void CudaModel<S, G>::read(Stream which, float* out) {
    const int64_t n = rows() * padded_config.width;
    with_stream(which, [&](const auto* x, const float* before, float skip, float beta) {
        const auto values = fetch(x, n);
        const auto old = before ? fetch(before, n) : std::vector<float>();
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++)
            out[i] = before ? (float(values[i]) - skip * old[i]) / beta : float(values[i]);
    });
}
template <class S, class G> float* CudaModel<S, G>::writable(Stream which) {
    if (which != Stream::residual && which != Stream::gradient)
        fail("of the streams between layers r and its gradient alone can be written");
    return which == Stream::residual ? residual(between) : acts.dresidual + 0;
}
template <class S, class G> void CudaModel<S, G>::write(Stream which, const float* values) {
    if (which == Stream::gradient) clear_stream_gradients();
    CUDA(cudaMemcpyAsync(writable(which), values, stream_bytes(), cudaMemcpyHostToDevice, stream));
    stream.wait();
}
template <class S, class G>
void CudaModel<S, G>::read_rows(Stream which, const std::vector<int64_t>& from, float* out) {
    const int64_t C = padded_config.width;
    for (int64_t row : from) {
        CUDA(cudaMemcpyAsync(out, writable(which) + row * C, size_t(C) * sizeof(float),
                             cudaMemcpyDeviceToHost, stream));
        out += C;
    }
    stream.wait();
}
template <class S, class G>
void CudaModel<S, G>::write_rows(Stream which, const std::vector<int64_t>& to,
                                 const float* values) {
    const int64_t C = padded_config.width;
    if (which == Stream::gradient) clear_stream_gradients();
    CUDA(cudaMemsetAsync(writable(which), 0, stream_bytes(), stream));
    for (int64_t row : to) {
        CUDA(cudaMemcpyAsync(writable(which) + row * C, values, size_t(C) * sizeof(float),
                             cudaMemcpyHostToDevice, stream));
        values += C;
    }
    stream.wait();
}

template <class S, class G> std::vector<Moments> CudaModel<S, G>::row_moments(Stream which) {
    double factor = 1;
    with_stream(which, [&](const auto* x, const float* before, float skip, float beta) {
        cuda::row_moments(acts.moments, x, before, skip, rows(), padded_config.width, stream);
        factor = 1 / double(beta);
    });
    std::vector<Moments> moments = fetch(acts.moments + 0, rows());
    for (Moments& m : moments) m.mean *= factor, m.square *= factor * factor;
    return moments;
}
template <class S, class G> std::vector<double> CudaModel<S, G>::row_chords(int l, int m) {
    double* chords = acts.moments.template as<double>();
    cuda::row_chords(chords, residual(2 * l), residual(2 * m), rows(), padded_config.width, stream);
    return fetch(chords, rows());
}
template <class S, class G> std::vector<double> CudaModel<S, G>::gradient_squares() {
    const Array<double> norms(int64_t(padded_registry.params.size()));
    for (size_t i = 0; i < padded_registry.params.size(); i++) {
        const Param& p = padded_registry.params[i]; // a scalar is followed by zeros
        cuda::gradient_norm<G>(norms + i, gradient(p.offset), (p.size() + 7) / 8 * 8, sums + 2,
                               stream);
    }
    std::vector<double> squares = fetch(norms + 0, norms.size);
    for (double& x : squares) x *= x;
    return squares;
}

// ---------------------------------------------------------------------------------------------
// The memory plan

template <class S, class G>
MemoryPlan plan_memory(const Config& config, int B, int T, const ModelOptions& o) {
    MemoryPlan plan;
    const Config padded_config = pad_config(config);
    const Registry registry = make_registry(padded_config);
    const int64_t n = registry.size;
    plan.parameters = n * int64_t(sizeof(S));
    if (o.purpose >= Purpose::gradients) plan.gradients = n * int64_t(sizeof(G));
    if (o.purpose == Purpose::training) {
        const OptimizerLayout layout(*o.optimizer, registry);
        plan.optimizer = layout.bytes(o.moments == DType::bf16 ? sizeof(bf16) : sizeof(float)) +
                         layout.scratch() * int64_t(sizeof(S)) +
                         MuonScratch<S>::sums(layout) * int64_t(sizeof(double));
        if (sizeof(S) < sizeof(float) && o.master_weights)
            plan.optimizer += n * int64_t(sizeof(float));
        plan.optimizer += n / 64;
    }
    // Without a GPU, those of an H100.
    const int multiprocessors = why_no_gpu().empty() ? gpu().multiprocessors : 132;
    Activations<S> acts;
    acts.layout(padded_config, B, T, o, multiprocessors, [&](auto& array, int64_t elements) {
        plan.activations += elements * int64_t(sizeof(array[0]));
    });
    if (config.rope())
        plan.activations += std::min<int64_t>(config.positions, acts.rows) *
                            (config.head_size / 2) * int64_t(sizeof(CosSin));
    plan.activations += BatchLayout{acts.rows}.ints() * int64_t(sizeof(int));
    plan.scratch = CublasLt::workspace_bytes();
    return plan;
}

} // namespace lns::cuda
