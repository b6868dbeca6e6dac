// The one interface between a model, on any device, and what uses it: the training loop,
// checkpoints, sampling and layer diagnostics. train_gpt.cpp implements it on the CPU,
// train_gpt.cu on a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gpt/base/error.h"
#include "gpt/model/config.h"
#include "gpt/model/optimizer.h"
#include "gpt/model/params.h"
#include "gpt/model/profile.h"

namespace lns {

// One of a model's flat buffers.
struct Buffer {
    enum Kind { parameters, gradients, state };
    Kind kind;
    int index = 0; // which of Optimizer::states

    Buffer(Kind kind, int index = 0) : kind(kind), index(index) {}
    bool operator==(const Buffer&) const = default;
};

enum class DType { float32, bf16 };

enum class Device { cpu, cuda };

// What a backward pass recomputes, to save memory: nothing; the norms' outputs and the MLP's
// activations; or whole layers, from their inputs. The gradients are the same to the bit.
enum class Recompute { none, activations, layers };

// What a model is made for, from the least memory to the most. Each can do what those before it
// can.
enum class Purpose {
    score,     // whole forward passes: losses, logits, log-probabilities
    generate,  // keeps k and v, so that logits() computes only new positions
    layers,    // passes layer by layer: keeps r before each layer
    jacobians, // backward passes, to the gradient by r: keeps what they read
    gradients, // gradients of parameters
    training,  // updates: the optimizer's state and the master weights
};

// A model's device, precision and memory.
struct ModelOptions {
    Device device = Device::cpu;
    Purpose purpose = Purpose::training;
    DType dtype = DType::float32; // of weights, activations and the activations' gradients
    bool master_weights = true;   // with bf16: the optimizer keeps a copy of the weights in float32
    const Optimizer* optimizer = &optimizers()[0];
    DType moments = DType::float32;   // of the optimizer's state
    DType gradients = DType::float32; // of parameters; bf16 only on a GPU
    bool stochastic_rounding = false; // of the optimizer's bf16 results; else to nearest
    Recompute recompute = Recompute::none;
};

struct Ranks;

// The mean of n numbers and the sum of squared deviations from it, merged part by part (Chan, Golub
// and LeVeque, 1979).
struct Moments {
    double n = 0, mean = 0, square = 0;

    void add(const Moments& part) {
        if (part.n == 0) return;
        const double all = n + part.n, d = part.mean - mean;
        square += part.square + d * d * n * part.n / all;
        mean += d * part.n / all;
        n = all;
    }
    double variance() const { return square / n; }
    double sum_of_squares() const { return square + n * mean * mean; }
};

// A training step: the tokens of all its micro-batches on this rank, and the update.
struct StepInput {
    const int *inputs, *targets; // (micro_batches, B, T)
    int micro_batches, B, T;
    double loss_scale = 1;                // 1 / (targets ≥ 0, over all micro-batches and ranks)
    double grad_clip = 0;                 // the largest norm of the gradient; 0: any
    Hyperparameters hyperparameters = {}; // grad_scale is ignored
    // Asked between micro-batches; true ends the step there, and nothing is updated. All ranks must
    // get the same answer.
    std::function<bool()> stop = {};
    double gate_clip = 0; // the largest norm of GPAS's gates' gradient, after grad_clip; 0: any
};
struct StepResult {
    double loss = 0;      // the mean over all ranks' targets
    double grad_norm = 0; // of the mean's gradient, before clipping
    bool stopped = false; // by StepInput::stop; the other fields are undefined then
};

// Sequences that branch: continuations of one beginning stand behind each other in a sequence of T
// rows. Row t has the position position[t] in its own text. Rows of a continuation attend to the
// beginning and to their continuation, which starts at row branch[t], but not to the t −
// position[t] rows before that, which belong to others. Both arrays are (B, T); null: no sequence
// branches.
struct Branches {
    const int *position = nullptr, *branch = nullptr;
};
// A token whose probability is asked for after those of `row`, of B·T.
struct ScoredToken {
    int64_t row;
    int token;
};

struct Model {
    Config config;
    Registry registry;
    const Optimizer* optimizer;
    Profile* profile = nullptr;        // books the time of each part of a pass, unless null
    const Ranks* ranks = nullptr;      // that share a training step; null: this process alone
    Hyperparameters of_gradients = {}; // those of the last zero_gradients
    StepResult step_result = {};

    explicit Model(const Config& c, const Optimizer& optimizer = optimizers()[0])
        : config(c), registry(make_registry(c)), optimizer(&optimizer) {}
    virtual ~Model() = default;

    // "cpu", "cuda"; "float32", …
    virtual std::string device() const = 0;
    virtual std::string dtype() const = 0;

    // Sets every parameter to its initial value, gradients and moments to 0.
    virtual void initialize(uint64_t seed) = 0;

    // The sum over targets ≥ 0 of −log p(target), natural logarithm; a target of −1 is ignored.
    // inputs, targets: (B, T). Throws if B·T exceeds the model's batch, T its positions, or a token
    // its vocabulary.
    virtual double loss(const int* inputs, const int* targets, int B, int T) = 0;

    // The same, and adds loss_scale × the gradient of that sum to the gradients. For the gradient
    // of the mean, loss_scale is 1 / (targets ≥ 0 of the whole step, over all its micro-batches).
    virtual double loss_and_gradients(const int* inputs, const int* targets, int B, int T,
                                      double loss_scale) = 0;

    // logits (B, T, V), or (B, V) of the last position if last_only.
    virtual void logits(const int* inputs, int B, int T, bool last_only, float* out) = 0;

    // out[i] = log p(scored[i].token), natural logarithm, after a forward pass over inputs (B, T).
    virtual void score(const int* inputs, int B, int T, const Branches& branches,
                       const std::vector<ScoredToken>& scored, double* out) = 0;

    // Layers that rest by these hyperparameters get no gradients until the next call; from
    // gradient_norm on, theirs are 0.
    virtual void zero_gradients(const Hyperparameters& hyperparameters = {}) = 0;
    virtual double gradient_norm() = 0; // ‖all gradients‖₂
    virtual void update(const Hyperparameters& hyperparameters) = 0;

    // A whole training step: zero_gradients, loss_and_gradients of every micro-batch, their sum
    // over ranks, gradient_norm, update. begin_step may return while the device still works;
    // end_step waits for it. `step` may be overwritten in between. If the loss or the norm is not
    // finite, nothing is updated. By default begin_step does everything with the calls above.
    virtual void begin_step(const StepInput& step);
    virtual StepResult end_step() { return step_result; }

    // One parameter's values, gradient or optimizer state, which it must have, as float32, in
    // memory's layout (not the file's): as many numbers as shaped() says.
    virtual void read(Buffer buffer, const Param& param, float* out) = 0;
    virtual void write(Buffer buffer, const Param& param, const float* values) = 0;

    Param shaped(Buffer buffer, const Param& p) const {
        return buffer.kind == Buffer::state ? optimizer->shaped(buffer.index, p) : p;
    }

    // The flat gradient buffer (registry.size) on the host, for ranks to sum in place; null if
    // there is none.
    virtual float* host_gradients() { return nullptr; }

    // Layer by layer, for layer diagnostics: the residual stream r (B·T, C) can be read and written
    // between layers (l from 0), which may run in any order and number. Throws unless made for that
    // (Purpose::layers and beyond), or with recompute. With +value-residual, a layer takes the
    // first layer's v from the last run of that, as a constant; its gradient is that of all layers
    // that have run backward since the last finish_backward or writing of dr.
    //
    // r ← the input of layer 0, of tokens (B, T); where sequences branch, nothing runs backward.
    virtual void embed(const int*, int, int, const Branches& = {}) { fail_layer_by_layer(); }
    // r ← the output of layer l
    virtual void run_layer(int) { fail_layer_by_layer(); }
    // The loss of r after the final norm and the head, as loss(); targets (B, T).
    virtual double finish(const int*) { fail_layer_by_layer(); }
    // The same for score().
    virtual void finish(const std::vector<ScoredToken>&, double*) { fail_layer_by_layer(); }
    // Backward through what ran last: dr ← loss_scale × that loss's gradient by r; then dr ← the
    // gradient by the input of layer l. Both add to the parameters' gradients, if there are any.
    virtual void finish_backward(const int*, double) { fail_layer_by_layer(); }
    virtual void run_layer_backward(int) { fail_layer_by_layer(); }
    enum class Stream {
        residual,  // r
        middle,    // r between attention and MLP of the last layer that ran
        attention, // b of the attention of the last layer that ran
        mlp,       // b of its MLP
        gradient,  // dr
    };
    // (B·T, C); only r and dr can be written.
    virtual void read(Stream, float*) { fail_layer_by_layer(); }
    virtual void write(Stream, const float*) { fail_layer_by_layer(); }
    // Some rows (n, C) of r or dr; writing sets all others to 0.
    virtual void read_rows(Stream, const std::vector<int64_t>&, float*) { fail_layer_by_layer(); }
    virtual void write_rows(Stream, const std::vector<int64_t>&, const float*) {
        fail_layer_by_layer();
    }
    // r ← the last input of layer l; l = L: the output of layer L − 1. A layer that runs overwrites
    // its own input and that of the next layer, nothing before.
    virtual void rewind(int) { fail_layer_by_layer(); }
    // Statistics of each row, computed on the device in double: the moments of a stream; and
    // ‖a/‖a‖ − b/‖b‖‖², where a and b are r after rewind(l) and rewind(m).
    virtual std::vector<Moments> row_moments(Stream) { fail_layer_by_layer(); }
    virtual std::vector<double> row_chords(int, int) { fail_layer_by_layer(); }
    // Σ g² over the gradient of each parameter, in the registry's order.
    virtual std::vector<double> gradient_squares() { fail_layer_by_layer(); }
    // Of embed().
    void check_one_stream() const {
        if (config.scheme.row->mixing != Mixing::sum)
            fail("layer diagnostics and the removal of layers are about one residual stream, and "
                 "the norm scheme '",
                 config.scheme.name(), "' has none: it mixes ",
                 config.scheme.row->mixing == Mixing::streams ? "several streams"
                                                              : "the outputs of all layers");
    }
    [[noreturn]] static void fail_backward() { fail("this model was made for forward passes"); }
    [[noreturn]] static void fail_layer_by_layer() {
        fail("this model was not made to run layer by layer, or with --recompute");
    }

    // Var(r) (of what sublayers read, where it is no sum) over tokens and channels, of the last
    // forward pass: after the embedding, then after each layer, L + 1 numbers.
    std::vector<double> residual_variance();

    // The first tensor that is not finite, in the order of computation (gpt/model/nonfinite.h); ""
    // if there is none.
    virtual std::string first_nonfinite() = 0;

    // Memory of parameters, gradients, optimizer and activations.
    virtual int64_t bytes() const = 0;

    // Throw unless a model of at most `rows` = B·T tokens can take these.
    void check_tokens(const int* inputs, int B, int T, int64_t rows,
                      const Branches& branches = {}) const;
    void check_targets(const int* targets, int64_t n) const;
    void check_scored(const std::vector<ScoredToken>& scored, int64_t rows) const;
};

// Calls f with a parameter's place in the array of a buffer, in float or bf16. For both backends'
// models; p as the model's arrays hold it.
template <class M, class F> void with_buffer(M& model, Buffer buffer, const Param& p, const F& f) {
    if (buffer == Buffer::parameters)
        return model.master.size ? f(model.master + p.offset) : f(model.parameters + p.offset);
    if (buffer == Buffer::gradients) return f(model.gradients + p.offset);
    const int64_t at = model.optimizer_layout.offset(buffer.index, p);
    auto& state = model.states[size_t(buffer.index)];
    state.rounded.size ? f(state.rounded + at) : f(state.full + at);
}

// A model's memory for micro-batches of (B, T), without making it.
struct MemoryPlan {
    int64_t parameters = 0, gradients = 0, optimizer = 0, activations = 0;
    int64_t scratch = 0; // of matmuls
    int64_t total() const { return parameters + gradients + optimizer + activations + scratch; }
};

// The model on options.device, for micro-batches of at most B·T tokens.
std::unique_ptr<Model> make_model(const Config& config, int B, int T, const ModelOptions& options,
                                  const Ranks& ranks);
MemoryPlan plan_memory(const Config& config, int B, int T, const ModelOptions& options);

std::unique_ptr<Model> make_cpu_model(const Config& config, int B, int T,
                                      const ModelOptions& options);
MemoryPlan plan_cpu_memory(const Config& config, int B, int T, const ModelOptions& options);

} // namespace lns
