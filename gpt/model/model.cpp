#include "gpt/model/model.h"

#include <algorithm>
#include <cmath>

#include "gpt/base/ranks.h"

namespace lns {

void Model::begin_step(const StepInput& step) {
    const int64_t n = int64_t(step.B) * step.T;
    zero_gradients(step.hyperparameters);
    double loss = 0;
    for (int m = 0; m < step.micro_batches; m++) {
        if (m > 0 && step.stop && step.stop()) {
            step_result = {0, 0, true};
            return;
        }
        loss += loss_and_gradients(step.inputs + m * n, step.targets + m * n, step.B, step.T,
                                   step.loss_scale);
    }
    if (ranks && ranks->size > 1) {
        const Timed timer(profile, {"", "sum over ranks"});
        loss = ranks->sum(loss);
        ranks->sum(host_gradients(), registry.size);
    }
    step_result = {loss * step.loss_scale, gradient_norm()};
    if (!std::isfinite(step_result.loss) || !std::isfinite(step_result.grad_norm)) return;
    Hyperparameters hyperparameters = step.hyperparameters;
    const bool clip = step.grad_clip > 0 && step_result.grad_norm > step.grad_clip;
    hyperparameters.grad_scale = clip ? step.grad_clip / step_result.grad_norm : 1;
    if (step.gate_clip > 0) {
        float* gradients = host_gradients();
        double square = 0;
        for (int64_t gate : registry.gates()) square += std::pow(double(gradients[gate]), 2);
        const double norm = hyperparameters.grad_scale * std::sqrt(square);
        for (int64_t gate : registry.gates())
            if (norm > step.gate_clip) gradients[gate] *= float(step.gate_clip / norm);
    }
    update(hyperparameters);
}

void Model::check_tokens(const int* inputs, int B, int T, int64_t rows,
                         const Branches& branches) const {
    if (B < 1 || T < 1 || int64_t(B) * T > rows)
        fail("a batch of ", B, " x ", T, " tokens was given to a model made for ", rows);
    const int* position = branches.position;
    const int longest = position ? 1 + *std::max_element(position, position + int64_t(B) * T) : T;
    if (longest > config.positions)
        fail("a sequence of ", longest, " tokens was given to a model of ", config.positions,
             " positions");
    for (int64_t i = 0; i < int64_t(B) * T; i++)
        if (inputs[i] < 0 || inputs[i] >= config.vocab_size)
            fail("token ", inputs[i], " is not in the model's vocabulary of ", config.vocab_size);
}

void Model::check_targets(const int* targets, int64_t n) const {
    for (int64_t i = 0; i < n; i++)
        if (targets[i] < -1 || targets[i] >= config.vocab_size)
            fail("target ", targets[i], " is neither -1 nor in the model's vocabulary of ",
                 config.vocab_size);
}

void Model::check_scored(const std::vector<ScoredToken>& scored, int64_t rows) const {
    for (const auto& [row, token] : scored)
        if (row < 0 || row >= rows || token < 0 || token >= config.vocab_size)
            fail("token ", token, " at row ", row, " of ", rows,
                 " cannot be scored by a model with a ", "vocabulary of ", config.vocab_size);
}

std::vector<double> Model::residual_variance() {
    std::vector<double> variance;
    for (int l = 0; l <= config.layers; l++) {
        rewind(l);
        Moments all;
        for (const Moments& row : row_moments(Stream::residual)) all.add(row);
        variance.push_back(all.variance());
    }
    return variance;
}

} // namespace lns
