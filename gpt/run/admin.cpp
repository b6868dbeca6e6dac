#include "gpt/run/admin.h"

#include <cmath>
#include <vector>

namespace lns {

namespace {

double variance_of(Model& model, Model::Stream stream, const Ranks& ranks) {
    Moments all;
    for (const Moments& row : model.row_moments(stream)) all.add(row);
    double sums[3] = {all.n, all.n * all.mean, all.sum_of_squares()};
    ranks.sum(sums, 3);
    const double mean = sums[1] / sums[0];
    return sums[2] / sums[0] - mean * mean;
}

void set_omega(Model& model, int k, double value) {
    for (const Param& p : model.registry.params)
        if (p.offset == model.registry.junctions[size_t(k)].omega)
            model.write(Buffer::parameters, p,
                        std::vector<float>(size_t(p.size()), float(value)).data());
}

} // namespace

double profile_omegas(Model& model, const int* inputs, int B, int T, const Ranks& ranks) {
    using Stream = Model::Stream;
    double omega = 1, next = 1;
    auto set = [&](int k, double of_stream, double of_branch) {
        omega = next;
        set_omega(model, k, omega);
        next = std::sqrt(omega * omega * of_stream + of_branch);
    };
    model.embed(inputs, B, T);
    for (int l = 0; l < model.config.layers; l++) {
        const double before = variance_of(model, Stream::residual, ranks);
        model.run_layer(l);
        set(2 * l + 1, before, variance_of(model, Stream::attention, ranks));
        model.rewind(l);
        model.run_layer(l); // attention again, with its ω
        set(2 * l + 2, variance_of(model, Stream::middle, ranks),
            variance_of(model, Stream::mlp, ranks));
        model.rewind(l);
        model.run_layer(l);
    }
    return omega;
}

} // namespace lns
