#include "gpt/run/probe.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/cpu/gemm.h"

namespace lns {

Purpose purpose_of(const ProbeSelection& probes) {
    return probes.gradients  ? Purpose::gradients
           : probes.jacobian ? Purpose::jacobians
                             : Purpose::layers;
}

ProbeSelection parse_probes(const std::string& text) {
    ProbeSelection s;
    const std::pair<const char*, bool*> all[] = {
        {"variance", &s.variance},      {"gradients", &s.gradients}, {"angular", &s.angular},
        {"removal", &s.removal},        {"jacobian", &s.jacobian},   {"usefulness", &s.usefulness},
        {"permutation", &s.permutation}};
    std::vector<std::string> known = {"all"};
    for (const auto& [name, flag] : all) known.push_back(name);
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find(',', begin), text.size());
        const std::string name = text.substr(begin, end - begin);
        if (std::find(known.begin(), known.end(), name) == known.end())
            fail("'", name, "' is not one of ", join(known), ".", did_you_mean(name, known));
        s.all |= name == "all";
        for (const auto& [other, flag] : all) *flag |= s.all || name == other;
        begin = end + 1;
    }
    return s;
}

LineFit fit_line(const std::vector<double>& x, const std::vector<double>& y) {
    const double n = double(x.size());
    const double mean_x = std::accumulate(x.begin(), x.end(), 0.0) / n;
    const double mean_y = std::accumulate(y.begin(), y.end(), 0.0) / n;
    double xx = 0, xy = 0, yy = 0;
    for (size_t i = 0; i < x.size(); i++) {
        xx += (x[i] - mean_x) * (x[i] - mean_x);
        xy += (x[i] - mean_x) * (y[i] - mean_y);
        yy += (y[i] - mean_y) * (y[i] - mean_y);
    }
    return {xx > 0 ? xy / xx : NAN, xx > 0 && yy > 0 ? xy * xy / (xx * yy) : NAN};
}

namespace {

using Stream = Model::Stream;
using Floats = std::vector<float>;

struct NoLinearFit : Error {
    using Error::Error;
};

// A layer-by-layer pass over one batch. Layers count from 0 here, and r_l is layer l's input.
struct Pass {
    Model& model;
    const ProbeBatch& batch;
    const int L, C;
    const int64_t rows;               // B·T
    std::vector<int64_t> target_rows; // rows with a target

    Pass(Model& m, const ProbeBatch& b)
        : model(m), batch(b), L(m.config.layers), C(m.config.width), rows(int64_t(b.B) * b.T) {
        for (int64_t row = 0; row < rows; row++)
            if (batch.targets[row] >= 0) target_rows.push_back(row);
        model.embed(batch.inputs.data(), batch.B, batch.T);
    }
    Floats read(Stream stream) {
        Floats x(size_t(rows) * C);
        model.read(stream, x.data());
        return x;
    }
    void run_layers(int begin, int end) {
        for (int l = begin; l < end; l++) model.run_layer(l);
    }
    // The loss, summed over tokens, of layers `begin` to L − 1 applied to r_l.
    double loss_from(int l, int begin) {
        model.rewind(l);
        run_layers(begin, L);
        return finish();
    }
    double finish() { return model.finish(batch.targets.data()); }
    // In the order of rows, so that sums do not depend on threads.
    void add_moments(Moments& all, Stream stream) {
        const std::vector<Moments> moments = model.row_moments(stream);
        for (int64_t row : target_rows) all.add(moments[row]);
    }
};

// The number of tokens with a target.
int64_t count_tokens(const std::vector<ProbeBatch>& batches) {
    int64_t n = 0;
    for (const ProbeBatch& b : batches)
        for (int target : b.targets) n += target >= 0;
    return n;
}

// The angle between unit vectors with this squared difference, over π. Unlike arccos, the arc of a
// chord is accurate for small angles.
double angle_of_chord(double square) {
    return 2 / M_PI * std::asin(std::min(1.0, std::sqrt(square) / 2));
}

// Sums of angular distances; [n − 1][l] is between r_l and r_{l + n}.
struct Angles {
    Rows all, last;
    int64_t tokens = 0, sequences = 0;

    Angles(int L, int reach) {
        for (int n = 1; n <= reach; n++) all.emplace_back(L - n + 1, 0.0);
        last = all;
    }
    // Requires that the pass has run all layers in order.
    void add(const Pass& pass) {
        std::vector<int64_t> ends; // each sequence's last row with a target
        for (int64_t row : pass.target_rows) {
            if (!ends.empty() && ends.back() / pass.batch.T == row / pass.batch.T) ends.pop_back();
            ends.push_back(row);
        }
        tokens += int64_t(pass.target_rows.size()), sequences += int64_t(ends.size());
        for (size_t n = 1; n <= all.size(); n++)
            for (size_t l = 0; l < all[n - 1].size(); l++) {
                const std::vector<double> chords = pass.model.row_chords(int(l), int(l + n));
                for (int64_t row : pass.target_rows) all[n - 1][l] += angle_of_chord(chords[row]);
                for (int64_t row : ends) last[n - 1][l] += angle_of_chord(chords[row]);
            }
    }
    LayerDiagnostics::AngularDistance means() const {
        LayerDiagnostics::AngularDistance mean = {last, all};
        for (PerLayer& row : mean.last_token)
            for (double& x : row) x /= double(sequences);
        for (PerLayer& row : mean.all_tokens)
            for (double& x : row) x /= double(tokens);
        return mean;
    }
};

void measure_parameter_gradients(Model& model, LayerDiagnostics::GradientNorm& g) {
    const int L = model.config.layers;
    for (PerLayer* norms : {&g.attention, &g.mlp, &g.norm}) norms->assign(L, 0);
    const std::vector<double> squares = model.gradient_squares();
    for (size_t i = 0; i < squares.size(); i++) {
        const Param& p = model.registry.params[i];
        // "model.layers.3.self_attn.q_proj.weight", "transformer.h.3.mlp.c_fc.bias"
        const size_t root = p.name.find('.'), layer = p.name.find('.', root + 1);
        const std::string stack = p.name.substr(root + 1, layer - root - 1);
        if (layer == std::string::npos || (stack != "layers" && stack != "h")) continue;
        size_t digits;
        const int l = std::stoi(p.name.substr(layer + 1), &digits);
        const std::string part = p.name.substr(layer + 1 + digits);
        const bool attention = part.rfind(".self_attn.", 0) == 0 || part.rfind(".attn.", 0) == 0;
        const bool mlp = part.rfind(".mlp.", 0) == 0;
        (attention ? g.attention : mlp ? g.mlp : g.norm)[l] += squares[i];
    }
    for (PerLayer* norms : {&g.attention, &g.mlp, &g.norm})
        for (double& x : *norms) x = std::sqrt(x);
}

// The full model's loss, and the diagnostics of one forward and backward pass.
void measure_streams(LayerDiagnostics& found, Model& model, const std::vector<ProbeBatch>& batches,
                     const ProbeSettings& s) {
    const int L = model.config.layers;
    std::vector<Moments> residual(L + 1), attention(L), mlp(L);
    PerLayer dresidual(L + 1);
    Angles angles(L, s.probes.angular ? (s.reach > 0 ? std::min(s.reach, L) : L) : 0);
    double loss = 0;
    model.zero_gradients();
    for (const ProbeBatch& batch : batches) {
        Pass pass(model, batch);
        for (int l = -1; l < L; l++) {
            if (l >= 0) model.run_layer(l);
            if (!s.probes.variance) continue;
            pass.add_moments(residual[l + 1], Stream::residual);
            if (l < 0) continue;
            pass.add_moments(attention[l], Stream::attention);
            pass.add_moments(mlp[l], Stream::mlp);
        }
        if (s.probes.angular) angles.add(pass);
        loss += pass.finish();
        if (!s.probes.gradients) continue;
        model.finish_backward(batch.targets.data(), 1 / double(found.tokens));
        for (int l = L; l >= 0; l--) {
            if (l < L) model.run_layer_backward(l);
            for (const Moments& row : model.row_moments(Stream::gradient))
                dresidual[l] += row.sum_of_squares();
        }
    }
    found.loss = loss / double(found.tokens);
    if (!std::isfinite(found.loss)) {
        const std::string first = model.first_nonfinite();
        fail("the model's loss is ", found.loss,
             " on these tokens, so its layers cannot be measured",
             first.empty() ? "" : "; the first tensor that is not finite: " + first);
    }
    if (s.probes.variance) {
        LayerDiagnostics::Variance& v = found.variance.emplace();
        for (const Moments& m : residual) v.residual.push_back(m.variance());
        for (const Moments& m : attention) v.attention.push_back(m.variance());
        for (const Moments& m : mlp) v.mlp.push_back(m.variance());
        std::vector<double> layer, log_layer, log_variance;
        for (int l = 1; l <= L; l++) {
            layer.push_back(l), log_layer.push_back(std::log(l));
            log_variance.push_back(std::log(v.residual[l]));
        }
        v.power = fit_line(log_layer, log_variance);
        v.exponential = fit_line(layer, log_variance);
    }
    if (s.probes.angular) found.angular_distance = angles.means();
    if (s.probes.gradients) {
        LayerDiagnostics::GradientNorm& g = found.gradient_norm.emplace();
        for (double x : dresidual) g.residual.push_back(std::sqrt(x));
        measure_parameter_gradients(model, g);
    }
    model.zero_gradients();
}

void measure_removal(LayerDiagnostics& found, Model& model, const std::vector<ProbeBatch>& batches,
                     const std::function<void(double)>& tell) {
    const int L = model.config.layers;
    Rows& loss = found.removal.emplace();
    for (int n = 1; n <= L; n++) loss.emplace_back(L - n + 1, 0.0);
    double done = 0;
    for (const ProbeBatch& batch : batches) {
        Pass pass(model, batch);
        pass.run_layers(0, L);
        for (int l = L - 1; l >= 0; l--) // backwards: running layers overwrites later r only
            for (int n = 1; l + n <= L; n++) {
                loss[n - 1][l] += pass.loss_from(l, l + n) / double(found.tokens);
                tell(++done / (double(L) * (L + 1) / 2 * double(batches.size())));
            }
    }
}

void measure_permutation(LayerDiagnostics& found, Model& model,
                         const std::vector<ProbeBatch>& batches) {
    const int L = model.config.layers;
    PerLayer& loss = found.permutation.emplace(std::max(L - 1, 0), 0.0);
    for (const ProbeBatch& batch : batches) {
        Pass pass(model, batch);
        pass.run_layers(0, L);
        for (int l = L - 2; l >= 0; l--) { // backwards, as above
            model.rewind(l);
            model.run_layer(l + 1), model.run_layer(l);
            pass.run_layers(l + 2, L);
            loss[l] += pass.finish() / double(found.tokens);
        }
    }
}

// The positions with a target in each sequence.
std::vector<std::vector<int>> target_positions(const ProbeBatch& batch) {
    std::vector<std::vector<int>> positions(batch.B);
    for (int64_t row = 0; row < int64_t(batch.B) * batch.T; row++)
        if (batch.targets[row] >= 0) positions[row / batch.T].push_back(int(row % batch.T));
    return positions;
}

// A root mean square and its standard error.
struct RootMeanSquare {
    Moments squares;
    void add(double square) { squares.add({1, square, 0}); }
    double value() const { return std::sqrt(squares.mean); }
    double error() const {
        const double n = squares.n, of_mean = std::sqrt(squares.square / (n - 1) / n);
        return squares.mean > 0 ? of_mean / (2 * value()) : n > 1 ? 0 : NAN;
    }
};

void measure_jacobian(LayerDiagnostics& found, Model& model, const std::vector<ProbeBatch>& batches,
                      const ProbeSettings& s) {
    const int L = model.config.layers, C = model.config.width;
    LayerDiagnostics::Jacobian& j = found.jacobian.emplace(LayerDiagnostics::Jacobian{});
    std::vector<RootMeanSquare> deviation(L), norm(L);
    const uint64_t tokens_stream = fnv1a("jacobian tokens"), signs_stream = fnv1a("jacobian signs");

    // A round takes one sample per sequence; batches get rounds in turn.
    std::vector<int64_t> rounds(batches.size());
    for (size_t i = 0; j.probes < s.jacobian_samples; i = (i + 1) % batches.size()) {
        rounds[i]++;
        for (const std::vector<int>& positions : target_positions(batches[i]))
            j.probes += !positions.empty();
    }
    uint64_t sample = 0;
    for (size_t i = 0; i < batches.size(); i++) {
        if (rounds[i] == 0) break;
        const ProbeBatch& batch = batches[i];
        const std::vector<std::vector<int>> positions = target_positions(batch);
        Pass pass(model, batch);
        pass.run_layers(0, L);
        for (int64_t round = 0; round < rounds[i]; round++) {
            Floats v; // (rows, C), one row per sequence
            std::vector<int64_t> rows;
            for (int b = 0; b < batch.B; b++) {
                if (positions[b].empty()) continue;
                const uint32_t which =
                    random_below(uint32_t(positions[b].size()), s.seed, tokens_stream, sample);
                rows.push_back(int64_t(b) * batch.T + positions[b][which]);
                for (int c = 0; c < C; c++)
                    v.push_back(random_bits(s.seed, signs_stream, sample * C + c) >> 63 ? 1 : -1);
                sample++;
            }
            Floats vJ(v.size());
            for (int l = 0; l < L; l++) {
                model.write_rows(Stream::gradient, rows, v.data());
                model.run_layer_backward(l);
                model.read_rows(Stream::gradient, rows, vJ.data());
                for (size_t row = 0; row < rows.size(); row++) {
                    double from_identity = 0, square = 0;
                    for (size_t i = row * C; i < (row + 1) * C; i++) {
                        const double d = double(vJ[i]) - double(v[i]);
                        from_identity += d * d, square += double(vJ[i]) * double(vJ[i]);
                    }
                    deviation[l].add(from_identity / C), norm[l].add(square / C);
                }
            }
        }
    }
    for (int l = 0; l < L; l++) {
        j.deviation.push_back(deviation[l].value());
        j.deviation_error.push_back(deviation[l].error());
        j.norm.push_back(norm[l].value());
        j.norm_error.push_back(norm[l].error());
    }

    // The matrix: each of B copies of the first sequence with a target gives one row per pass.
    if (s.jacobian_layer > 0 && C <= 256) {
        const ProbeBatch* batch = &batches[0];
        while (count_tokens({*batch}) == 0) batch++;
        const std::vector<std::vector<int>> positions = target_positions(*batch);
        int from = 0;
        while (positions[from].empty()) from++;
        const int t = positions[from].back();
        ProbeBatch copies = *batch;
        for (int b = 0; b < copies.B; b++)
            std::copy_n(batch->inputs.begin() + int64_t(from) * copies.T, copies.T,
                        copies.inputs.begin() + int64_t(b) * copies.T);
        j.full_layer = s.jacobian_layer;
        Pass pass(model, copies);
        pass.run_layers(0, j.full_layer);
        for (int begin = 0; begin < C; begin += copies.B) {
            const int n = std::min(copies.B, C - begin);
            Floats v(size_t(n) * C);
            std::vector<int64_t> rows;
            for (int b = 0; b < n; b++) {
                v[size_t(b) * C + begin + b] = 1;
                rows.push_back(int64_t(b) * copies.T + t);
            }
            model.write_rows(Stream::gradient, rows, v.data());
            model.run_layer_backward(j.full_layer - 1);
            model.read_rows(Stream::gradient, rows, v.data());
            for (int b = 0; b < n; b++)
                j.matrix.emplace_back(v.begin() + int64_t(b) * C, v.begin() + int64_t(b + 1) * C);
        }
    }
    model.zero_gradients();
}

// ---------------------------------------------------------------------------------------------
// Usefulness: layers compared with linear maps

using Doubles = std::vector<double>;

// Replaces the lower triangle of the symmetric a (n, n) by L, a = L·Lᵀ. False if a is not positive
// definite.
bool cholesky(Doubles& a, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        auto dot = [&](int64_t i) {
            double sum = 0;
            const double *x = &a[i * n], *y = &a[j * n];
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < j; k++) sum += x[k] * y[k];
            return sum;
        };
        const double square = a[j * n + j] - dot(j);
        if (!(square > 0)) return false;
        const double pivot = a[j * n + j] = std::sqrt(square);
#pragma omp parallel for if (n > 128)
        for (int64_t i = j + 1; i < n; i++) a[i * n + j] = (a[i * n + j] - dot(i)) / pivot;
    }
    return true;
}

// x (n, m) ← a⁻¹ x, where a is given by its Cholesky factor.
void cholesky_solve(const Doubles& factor, Doubles& x, int64_t n, int64_t m) {
    const int64_t block = 64;
#pragma omp parallel for
    for (int64_t begin = 0; begin < m; begin += block) {
        const int64_t width = std::min(block, m - begin);
        auto subtract = [&](int64_t to, double scale, int64_t from) {
            for (int64_t i = 0; i < width; i++)
                x[to * m + begin + i] -= scale * x[from * m + begin + i];
        };
        auto divide = [&](int64_t row) {
            for (int64_t i = 0; i < width; i++) x[row * m + begin + i] /= factor[row * n + row];
        };
        for (int64_t i = 0; i < n; i++) {
            for (int64_t k = 0; k < i; k++) subtract(i, factor[i * n + k], k);
            divide(i);
        }
        for (int64_t i = n - 1; i >= 0; i--) {
            divide(i);
            for (int64_t k = 0; k < i; k++) subtract(k, factor[i * n + k], i);
        }
    }
}

// A linear fit of a layer's update y = r_ℓ − r_{ℓ−1} to x = r_{ℓ−1}: y ≈ (x − x̄) A + ȳ.
struct LinearMap {
    int C;
    double n = 0;
    // Σ xᵀx, Σ xᵀy (C, C), Σ x and Σ y; solve() turns xy into A and the sums into means.
    Doubles xx, xy, x_mean, y_mean;

    explicit LinearMap(int C) : C(C), xx(size_t(C) * C), xy(size_t(C) * C), x_mean(C), y_mean(C) {}

    void add(const Pass& pass, const Floats& before, const Floats& after) {
        const int64_t k = int64_t(pass.target_rows.size());
        if (k == 0) return;
        n += double(k);
        Doubles x(size_t(k) * C), y(x.size());
#pragma omp parallel for
        for (int64_t i = 0; i < k; i++) {
            const int64_t from = pass.target_rows[i] * C;
            for (int c = 0; c < C; c++) {
                x[i * C + c] = double(before[from + c]);
                y[i * C + c] = double(after[from + c]) - x[i * C + c];
            }
        }
#pragma omp parallel for
        for (int c = 0; c < C; c++)
            for (int64_t i = 0; i < k; i++) x_mean[c] += x[i * C + c], y_mean[c] += y[i * C + c];
        gemm(true, false, C, C, k, x.data(), x.data(), xx.data(), true);
        gemm(true, false, C, C, k, x.data(), y.data(), xy.data(), true);
    }
    void solve(int layer) {
        for (Doubles* mean : {&x_mean, &y_mean})
            for (double& m : *mean) m /= n;
        double trace = 0;
        for (int i = 0; i < C; i++) {
            for (int j = 0; j < C; j++) {
                xx[size_t(i) * C + j] -= n * x_mean[i] * x_mean[j];
                xy[size_t(i) * C + j] -= n * x_mean[i] * y_mean[j];
            }
            trace += xx[size_t(i) * C + i];
        }
        for (int i = 0; i < C; i++) xx[size_t(i) * C + i] += 1e-6 * trace / C;
        if (!cholesky(xx, C))
            throw NoLinearFit(cat("layer ", layer, " has no linear fit: its input varies too ",
                                  "little over ", n, " tokens, or is not finite; leave usefulness ",
                                  "out of --probes"));
        cholesky_solve(xx, xy, C, C);
        xx = {};
    }
    Floats apply(const Floats& before) const {
        const int64_t rows = int64_t(before.size()) / C;
        Doubles x(before.size()), y(before.size());
#pragma omp parallel for
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < C; i++) x[row * C + i] = double(before[row * C + i]) - x_mean[i];
        gemm(false, false, rows, C, C, x.data(), xy.data(), y.data(), false, y_mean.data());
        Floats after(before.size());
#pragma omp parallel for
        for (size_t i = 0; i < after.size(); i++) after[i] = float(double(before[i]) + y[i]);
        return after;
    }
};

void measure_usefulness(LayerDiagnostics& found, Model& model,
                        const std::vector<ProbeBatch>& batches,
                        const std::vector<ProbeBatch>& fit_batches,
                        const std::function<void(double)>& tell) {
    const int L = model.config.layers, C = model.config.width;
    LayerDiagnostics::Usefulness& u = found.usefulness.emplace(LayerDiagnostics::Usefulness{});
    u.linear_loss.assign(L, 0);
    u.fit_tokens = count_tokens(fit_batches);
    if (u.fit_tokens == 0)
        throw NoLinearFit("no tokens are left to fit linear maps on besides those to measure on: "
                          "name more validation data with -j, or lower -t");

    // Take as many layers at once as fit into 2 GiB.
    const int group = int(std::max<double>(1, double(1 << 30) / 8 / (double(C) * C)));
    double done = 0;
    for (int begin = 0; begin < L; begin += group) {
        const int end = std::min(L, begin + group);
        std::vector<LinearMap> maps(end - begin, LinearMap(C));
        for (const ProbeBatch& batch : fit_batches) {
            Pass pass(model, batch);
            pass.run_layers(0, begin);
            Floats before = pass.read(Stream::residual);
            for (int l = begin; l < end; l++) {
                model.run_layer(l);
                Floats after = pass.read(Stream::residual);
                maps[l - begin].add(pass, before, after);
                before = std::move(after);
                tell(++done / (double(L) * double(fit_batches.size())));
            }
        }
        for (int l = begin; l < end; l++) maps[l - begin].solve(l + 1);
        for (const ProbeBatch& batch : batches) {
            Pass pass(model, batch);
            pass.run_layers(0, end);
            for (int l = end - 1; l >= begin; l--) { // backwards, as above
                model.rewind(l);
                const Floats r = maps[l - begin].apply(pass.read(Stream::residual));
                model.write(Stream::residual, r.data());
                u.linear_loss[l] += pass.loss_from(l, l + 1) / double(found.tokens);
            }
        }
    }
    double useful = 0;
    for (double loss : u.linear_loss) useful += !(loss <= 1.1 * found.loss);
    u.share = useful / L;
}

} // namespace

uint64_t probe_windows(int64_t tokens, int T) { return uint64_t(std::max<int64_t>(tokens / T, 1)); }

std::vector<ProbeBatch> read_batches(Loader& loader, int T, int B, uint64_t first, uint64_t n) {
    std::vector<ProbeBatch> batches;
    if (n == 0) return batches; // `first` may then be the end
    loader.restore({0, first});
    for (uint64_t i = 0; i < n; i += uint64_t(B)) {
        ProbeBatch batch;
        batch.B = int(std::min<uint64_t>(B, n - i)), batch.T = T;
        batch.inputs.resize(size_t(batch.B) * T), batch.targets.resize(batch.inputs.size());
        loader.next(batch.B, batch.inputs.data(), batch.targets.data());
        batches.push_back(std::move(batch));
    }
    return batches;
}

LayerDiagnostics measure(Model& model, const std::vector<ProbeBatch>& batches,
                         const std::vector<ProbeBatch>& fit_batches, const ProbeSettings& s) {
    LayerDiagnostics found;
    found.layers = model.config.layers, found.width = model.config.width;
    found.tokens = count_tokens(batches);
    if (found.tokens == 0) fail("none of the tokens to measure on has a target");
    auto tell = [&](const char* name) {
        return [&s, name](double part) {
            if (s.tell) s.tell(cat(name, format_number("  %.0f%%", 100 * part)));
        };
    };
    tell("streams")(0);
    measure_streams(found, model, batches, s);
    if (s.probes.jacobian) tell("jacobian")(0), measure_jacobian(found, model, batches, s);
    if (s.probes.permutation) tell("permutation")(0), measure_permutation(found, model, batches);
    if (s.probes.removal) measure_removal(found, model, batches, tell("removal"));
    try {
        if (s.probes.usefulness)
            measure_usefulness(found, model, batches, fit_batches, tell("usefulness"));
    } catch (const NoLinearFit& why) {
        if (!s.probes.all) throw;
        found.usefulness.reset();
        found.notes.push_back(cat("usefulness is left out: ", why.what()));
    }
    return found;
}

std::vector<LayerDiagnostics::TaskRemoval>
measure_task_removal(Model& model, const TaskWork& work,
                     const std::function<void(const std::string&)>& tell) {
    const int L = model.config.layers;
    const auto scores = score_without_layers(model, work.batches, work.requests, [&](double part) {
        if (tell) tell(format_number("benchmarks without a layer  %.0f%%", 100 * part));
    });
    std::vector<std::vector<bool>> right;
    for (const std::vector<double>& s : scores) right.push_back(right_answers(work.benchmark, s));

    const Benchmark& b = work.benchmark;
    std::vector<size_t> first = {0}; // question of each task
    for (const Task& task : b.tasks) first.push_back(first.back() + task.questions.size());
    std::vector<LayerDiagnostics::TaskRemoval> all;
    auto add = [&](const std::string& name, const std::vector<int>& tasks, bool part) {
        LayerDiagnostics::TaskRemoval& x = all.emplace_back();
        x.task = name, x.part = part;
        for (int l = 0; l < L; l++) {
            Moments whole, change;
            for (int t : tasks)
                for (size_t q = first[size_t(t)]; q < first[size_t(t) + 1]; q++) {
                    whole.add({1, double(right[size_t(L)][q]), 0});
                    change.add({1, double(right[size_t(l)][q]) - double(right[size_t(L)][q]), 0});
                }
            x.questions = int64_t(whole.n), x.accuracy = whole.mean;
            x.change.push_back(change.mean);
            x.error.push_back(std::sqrt(change.square / (change.n - 1) / change.n));
        }
    };
    std::set<int> in_groups;
    for (const TaskGroup& group : b.groups) {
        add(group.name, group.tasks, group.depth > 0);
        in_groups.insert(group.tasks.begin(), group.tasks.end());
    }
    for (int t = 0; t < int(b.tasks.size()); t++)
        add(b.tasks[size_t(t)].name, {t}, in_groups.count(t) > 0);
    return all;
}

nlohmann::ordered_json to_json(const LayerDiagnostics& p, bool sparse) {
    using Json = nlohmann::ordered_json;
    Json json;
    auto add = [&](const char* key, const auto& part, auto to_object) {
        if (part)
            json[key] = to_object(*part);
        else if (!sparse)
            json[key] = nullptr;
    };
    add("variance", p.variance, [](const LayerDiagnostics::Variance& v) {
        return Json{{"residual", v.residual},
                    {"attention", v.attention},
                    {"mlp", v.mlp},
                    {"power_exponent", v.power.slope},
                    {"power_r2", v.power.r2},
                    {"exponential_rate", v.exponential.slope},
                    {"exponential_r2", v.exponential.r2}};
    });
    add("gradient_norm", p.gradient_norm, [](const LayerDiagnostics::GradientNorm& g) {
        return Json{
            {"residual", g.residual}, {"attention", g.attention}, {"mlp", g.mlp}, {"norm", g.norm}};
    });
    add("angular_distance", p.angular_distance, [](const LayerDiagnostics::AngularDistance& a) {
        return Json{{"last_token", a.last_token}, {"all_tokens", a.all_tokens}};
    });
    add("removal", p.removal, [](const Rows& loss) {
        return Json{{"single", loss.at(0)}, {"blocks", loss}};
    });
    for (const LayerDiagnostics::TaskRemoval& t : p.task_removal)
        json["task_removal"][t.task] = {{"questions", t.questions},
                                        {"accuracy", t.accuracy},
                                        {"change", t.change},
                                        {"change_error", t.error}};
    add("jacobian", p.jacobian, [](const LayerDiagnostics::Jacobian& j) {
        Json full;
        if (j.full_layer > 0) full = {{"layer", j.full_layer}, {"matrix", j.matrix}};
        return Json{{"deviation", j.deviation}, {"deviation_error", j.deviation_error},
                    {"norm", j.norm},           {"norm_error", j.norm_error},
                    {"probes", j.probes},       {"full", full}};
    });
    add("usefulness", p.usefulness, [](const LayerDiagnostics::Usefulness& u) {
        return Json{
            {"linear_loss", u.linear_loss}, {"share", u.share}, {"fit_tokens", u.fit_tokens}};
    });
    add("permutation", p.permutation, [](const PerLayer& loss) { return Json(loss); });
    return json;
}

namespace {

std::string number(double x) { return format_number("%.3g", x); }
std::string signed_number(double x) { return format_number("%+.4f", x); }
std::string cell(const PerLayer& x, int index) {
    return index < 0 || index >= int(x.size()) ? "-" : number(x[index]);
}

// A table with only the measured columns; row 0 is the embedding.
struct LayerTable {
    Table table;
    int first; // 0 or 1

    LayerTable(int first, int layers) : first(first) {
        table.headers = {"layer"};
        for (int l = first; l <= layers; l++)
            table.rows.push_back({l == 0 ? "embed" : std::to_string(l)});
    }
    // Appends text_of(l) for layers l from `first` to L.
    template <class TextOf> void column(const char* name, const TextOf& text_of) {
        table.headers.push_back(name);
        for (size_t i = 0; i < table.rows.size(); i++)
            table.rows[i].push_back(text_of(first + int(i)));
    }
    std::string text() const { return table.headers.size() > 1 ? table.text() : ""; }
};

std::string describe_streams(const LayerDiagnostics& p) {
    LayerTable t(0, p.layers);
    auto sublayers = [&](const char* name, const PerLayer& x) {
        t.column(name, [&](int l) { return cell(x, l - 1); });
    };
    std::string after;
    if (p.variance) {
        const LayerDiagnostics::Variance& v = *p.variance;
        const double max = *std::max_element(v.residual.begin(), v.residual.end());
        t.column("var r", [&](int l) { return number(v.residual[l]); });
        t.column("", [&](int l) { return bar(v.residual[l], max, 16); });
        sublayers("var attn", v.attention), sublayers("var mlp", v.mlp);
        after = cat("var r grows over layers as l^", number(v.power.slope), ", R2 ",
                    format_number("%.3f", v.power.r2), "; as exp(", number(v.exponential.slope),
                    " l), R2 ", format_number("%.3f", v.exponential.r2), "\n");
    }
    if (p.angular_distance) sublayers("angle", p.angular_distance->all_tokens[0]);
    if (p.gradient_norm) {
        const LayerDiagnostics::GradientNorm& g = *p.gradient_norm;
        t.column("|dr|", [&](int l) { return number(g.residual[l]); });
        sublayers("|g| attn", g.attention), sublayers("|g| mlp", g.mlp),
            sublayers("|g| norm", g.norm);
    }
    return t.text() + after;
}

std::string describe_layers(const LayerDiagnostics& p) {
    LayerTable t(1, p.layers);
    auto costs = [&](const char* name, const PerLayer& loss) {
        t.column(name, [&, n = int(loss.size())](int l) {
            return l > n ? "-" : signed_number(loss[l - 1] - p.loss);
        });
    };
    std::string after;
    if (p.removal) {
        const PerLayer& loss = p.removal->at(0);
        const double max = *std::max_element(loss.begin(), loss.end()) - p.loss;
        costs("removed", loss);
        t.column("", [&](int l) { return bar(std::max(0.0, loss[l - 1] - p.loss), max, 16); });
        after = "cheapest to remove:";
        for (size_t n = 1; n <= std::min<size_t>(p.layers, 64); n *= 2) {
            const PerLayer& of_n = p.removal->at(n - 1);
            const size_t l = std::min_element(of_n.begin(), of_n.end()) - of_n.begin();
            after += cat(n > 1 ? "; " : " ", n > 1 ? cat(l + 1, "-", l + n) : cat(l + 1), " ",
                         signed_number(of_n[l] - p.loss));
        }
        after += "\n";
    }
    for (const LayerDiagnostics::TaskRemoval& task : p.task_removal) {
        if (task.part) continue;
        t.column(task.task.c_str(), [&](int l) { return signed_number(task.change[l - 1]); });
        t.column("+-", [&](int l) { return format_number("%.4f", task.error[l - 1]); });
        after += cat(task.task, ": accuracy ", format_number("%.4f", task.accuracy), " of ",
                     task.questions, " questions; the columns are its change without the layer\n");
    }
    if (p.permutation) costs("swapped", *p.permutation);
    if (p.usefulness) {
        costs("linear", p.usefulness->linear_loss);
        after += cat(format_number("%.0f%%", 100 * p.usefulness->share),
                     " of the layers cost more than 10% of the loss as linear maps (fitted on ",
                     format_count(double(p.usefulness->fit_tokens)), " tokens)\n");
    }
    if (p.jacobian) {
        const LayerDiagnostics::Jacobian& j = *p.jacobian;
        t.column("|J-I|", [&](int l) { return number(j.deviation[l - 1]); });
        t.column("+-", [&](int l) { return format_number("%.2g", j.deviation_error[l - 1]); });
        t.column("|J|", [&](int l) { return number(j.norm[l - 1]); });
        t.column("+-", [&](int l) { return format_number("%.2g", j.norm_error[l - 1]); });
        after += cat("Jacobian norms over sqrt(C), from ", j.probes, " sampled tokens\n");
    }
    return t.text() + after;
}

} // namespace

std::string describe(const LayerDiagnostics& p) {
    const std::string streams = describe_streams(p), layers = describe_layers(p);
    return streams + (streams.empty() || layers.empty() ? "" : "\n") + layers;
}

} // namespace lns
