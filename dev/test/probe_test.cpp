// Layer diagnostics of models with known layers: identities, linear maps, closed forms, and finite
// differences elsewhere.
#include "dev/test/program_helpers.h"

#ifndef TESTING
#define TESTING // no main of its own
#endif
#include "train_gpt.cpp"

#include "gpt/run/checkpoint.h"
#include "gpt/run/probe.h"

#include <nlohmann/json.hpp>

using namespace lns;
using namespace lns::test;
using nlohmann::json;
using Stream = Model::Stream;

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

Config small_config(const std::string& arch, const std::string& scheme, int L, int C = 8,
                    int H = 6) {
    Config c = architecture(arch);
    c.vocab_size = 40, c.width = C, c.layers = L, c.heads = 2, c.mlp_width = H, c.positions = 16;
    c.scheme = parse_scheme(scheme);
    c.init_std = 0.4, c.embed_std = 1;
    complete_config(c);
    return c;
}

// In double, for accurate finite differences. Parameters are random.
struct Fixture {
    CpuModel<double> model;
    std::vector<ProbeBatch> batches, others;

    explicit Fixture(const Config& c, int B = 3, int T = 5, Purpose purpose = Purpose::training)
        : model(c, B, T, {.purpose = purpose}) {
        model.initialize(7);
        for (const Param& p : model.registry.params) {
            // Values representable in float, as in copies; norms and γ away from their initial
            // values.
            Floats values(p.size());
            model.read(Buffer::parameters, p, values.data());
            if (p.shape.size() == 1 && p.name.find("gate") == std::string::npos)
                for (int64_t i = 0; i < p.size(); i++)
                    values[i] += 0.1f * float(random_normal(3, fnv1a(p.name), i));
            model.write(Buffer::parameters, p, values.data());
        }
        for (int i = 0; i < 2; i++) batches.push_back(random_batch(c, i == 0 ? B : B - 1, T, i));
        for (int i = 0; i < 8; i++) others.push_back(random_batch(c, B, T, 100 + i));
    }
    static ProbeBatch random_batch(const Config& c, int B, int T, int number) {
        ProbeBatch batch{B, T, {}, {}};
        for (int i = 0; i < B * T; i++) {
            batch.inputs.push_back(int(random_below(c.vocab_size, 1, number, i)));
            batch.targets.push_back(int(random_below(c.vocab_size, 2, number, i)));
        }
        if (T > 2)
            batch.targets[T - 1] = batch.targets[T] = -1; // the first's last, the next's first
        return batch;
    }
    void fill(const std::string& part, float value) {
        for (const Param& p : model.registry.params)
            if (p.name.find(part) != std::string::npos)
                model.write(Buffer::parameters, p, Floats(p.size(), value).data());
    }
    Doubles values(const std::string& name) {
        const Param* p = model.registry.find(name);
        if (!p) fail("there is no ", name);
        Floats values(p->size());
        model.read(Buffer::parameters, *p, values.data());
        return Doubles(values.begin(), values.end());
    }
    Floats read(Stream stream, const ProbeBatch& batch) {
        Floats x(size_t(batch.B) * batch.T * model.config.width);
        model.read(stream, x.data());
        return x;
    }
    std::vector<Floats> residuals(const ProbeBatch& batch) {
        model.embed(batch.inputs.data(), batch.B, batch.T);
        std::vector<Floats> r = {read(Stream::residual, batch)};
        for (int l = 0; l < model.config.layers; l++) {
            model.run_layer(l);
            r.push_back(read(Stream::residual, batch));
        }
        return r;
    }
    LayerDiagnostics probe(const std::string& names, int jacobian_layer = 0, int64_t samples = 16) {
        ProbeSettings s;
        s.probes = parse_probes(names);
        s.jacobian_layer = jacobian_layer;
        s.jacobian_samples = samples;
        s.seed = 5;
        return measure(model, batches, others, s);
    }
    double mean_loss(Model& m) {
        double sum = 0, n = 0;
        for (const ProbeBatch& b : batches) {
            sum += m.loss(b.inputs.data(), b.targets.data(), b.B, b.T);
            for (int target : b.targets) n += target >= 0;
        }
        return sum / n;
    }
};

} // namespace

// A model that is made for a measurement alone gives the same bits as one for training, in less
// memory, and refuses what it was not made for.
TEST(Probe, ModelsAreMadeForWhatIsMeasured) {
    const auto purposes = {Purpose::layers, Purpose::jacobians, Purpose::gradients};
    const std::string names[] = {"variance,angular,removal,permutation,usefulness",
                                 "variance,angular,removal,jacobian", "all"};
    for (const auto& [arch, scheme] : {std::pair{"llama", "pre"},
                                       {"llama", "mix:1"},
                                       {"gpt2", "layerscale"},
                                       {"olmo2", "olmo2"},
                                       {"qwen2", "sandwich+gpas"},
                                       {"llama", "post"}}) {
        const Config c = small_config(arch, scheme, 3);
        Fixture training(c);
        for (int i = 0; const Purpose purpose : purposes) {
            SCOPED_TRACE(cat(arch, " ", scheme, " ", names[i]));
            EXPECT_EQ(purpose_of(parse_probes(names[i])), purpose);
            Fixture f(c, 3, 5, purpose);
            EXPECT_EQ(to_json(f.probe(names[i], 2)), to_json(training.probe(names[i], 2)));
            const std::string error = error_of([&] {
                const ProbeBatch& b = f.batches[0];
                if (purpose == Purpose::layers)
                    f.model.run_layer_backward(1);
                else if (purpose == Purpose::jacobians)
                    f.model.loss_and_gradients(b.inputs.data(), b.targets.data(), b.B, b.T, 1);
                else
                    f.model.update({});
            });
            EXPECT_TRUE(says(error, {"this model was made"}));
            i++;
        }
        Fixture scoring(c, 3, 5, Purpose::score);
        EXPECT_TRUE(says(error_of([&] { scoring.probe("removal"); }), {"layer by layer"}));
    }
}

// Layers cannot run one by one where there is more than one stream between them.
TEST(Probe, MixedStreamsAreRefused) {
    for (const char* scheme : {"mhc", "attnres:2"}) {
        Fixture f(small_config("llama", scheme, 3));
        EXPECT_TRUE(
            says(error_of([&] { f.probe("variance"); }), {scheme, "one residual stream", "mixes"}));
        const ProbeBatch& b = f.batches[0];
        f.model.loss(b.inputs.data(), b.targets.data(), b.B, b.T);
        for (double variance : f.model.residual_variance()) EXPECT_GT(variance, 0); // training's
    }
}

// What a model holds is what its plan says, and no more than its purpose needs.
TEST(Probe, MemoryIsThatOfThePurpose) {
    for (const DType dtype : {DType::float32, DType::bf16}) {
        const Config c = small_config("olmo2", "olmo2", 8);
        int64_t before = 0;
        for (const Purpose purpose : {Purpose::score, Purpose::generate, Purpose::jacobians,
                                      Purpose::gradients, Purpose::training}) {
            const ModelOptions options = {.purpose = purpose, .dtype = dtype};
            const MemoryPlan plan = plan_cpu_memory(c, 3, 16, options);
            const int64_t table = 16 * c.head_size / 2 * int64_t(sizeof(CosSin<float>));
            const int64_t held = make_cpu_model(c, 3, 16, options)->bytes();
            EXPECT_EQ(held, plan.total() - plan.scratch + table);
            EXPECT_GT(held, before);
            EXPECT_EQ(plan.gradients > 0, purpose >= Purpose::gradients);
            EXPECT_EQ(plan.optimizer > 0, purpose == Purpose::training);
            before = held;
        }
        // Layers are measured from their inputs: another layer adds one, and its parameters.
        auto activations = [&](int layers, Purpose purpose) {
            Config deep = small_config("olmo2", "olmo2", layers);
            return plan_cpu_memory(deep, 3, 16, {.purpose = purpose, .dtype = dtype}).activations;
        };
        const int64_t r = 3 * 16 * c.width * int64_t(sizeof(float));
        EXPECT_EQ(activations(9, Purpose::layers) - activations(8, Purpose::layers), r);
        EXPECT_EQ(activations(9, Purpose::score), activations(8, Purpose::score));
    }
}

TEST(Probe, IdentityLayersDoNothing) {
    for (const char* arch : {"gpt2", "llama", "olmo2"})
        for (const char* scheme : {"pre", "lns", "layerscale", "pre+gpas"}) {
            SCOPED_TRACE(cat(arch, " ", scheme));
            Fixture f(small_config(arch, scheme, 3));
            for (const char* part : {"o_proj", "down_proj", "c_proj"}) f.fill(part, 0);
            const LayerDiagnostics p = f.probe("all", 2);
            EXPECT_NEAR(p.loss, f.mean_loss(f.model), 1e-12);
            EXPECT_EQ(p.tokens, 21);
            for (double x : p.variance->residual) EXPECT_EQ(x, p.variance->residual[0]);
            for (double x : p.variance->attention) EXPECT_EQ(x, 0);
            for (double x : p.variance->mlp) EXPECT_EQ(x, 0);
            for (const Rows& rows :
                 {p.angular_distance->all_tokens, p.angular_distance->last_token}) {
                ASSERT_EQ(rows.size(), 3u);
                for (size_t n = 1; n <= 3; n++) {
                    EXPECT_EQ(rows[n - 1].size(), 4 - n);
                    for (double x : rows[n - 1]) EXPECT_EQ(x, 0);
                }
            }
            ASSERT_EQ(p.removal->size(), 3u);
            for (size_t n = 1; n <= 3; n++) {
                EXPECT_EQ(p.removal->at(n - 1).size(), 4 - n);
                for (double x : p.removal->at(n - 1)) EXPECT_NEAR(x, p.loss, 1e-7);
            }
            for (double x : *p.permutation) EXPECT_NEAR(x, p.loss, 1e-7);
            for (double x : p.usefulness->linear_loss) EXPECT_NEAR(x, p.loss, 1e-7);
            EXPECT_EQ(p.usefulness->share, 0);
            const LayerDiagnostics::Jacobian& j = *p.jacobian;
            EXPECT_GE(j.probes, 16);
            for (int l = 0; l < 3; l++) {
                EXPECT_EQ(j.deviation[l], 0);
                EXPECT_EQ(j.deviation_error[l], 0);
                EXPECT_EQ(j.norm[l], 1);
            }
            for (int i = 0; i < 8; i++)
                for (int k = 0; k < 8; k++) EXPECT_EQ(j.matrix[i][k], i == k);
        }
}

namespace {

// Matrices of (rows, columns), row-major.
struct Matrix {
    int rows, columns;
    Doubles x;
    Matrix(int rows, int columns, Doubles values)
        : rows(rows), columns(columns), x(std::move(values)) {
        x.resize(size_t(rows) * columns);
    }
    static Matrix identity(int n) {
        Matrix m(n, n, {});
        for (int i = 0; i < n; i++) m(i, i) = 1;
        return m;
    }
    double& operator()(int i, int j) { return x[size_t(i) * columns + j]; }
    double operator()(int i, int j) const { return x[size_t(i) * columns + j]; }
    Matrix operator*(const Matrix& b) const {
        Matrix c(rows, b.columns, {});
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < b.columns; j++)
                for (int k = 0; k < columns; k++) c(i, j) += (*this)(i, k) * b(k, j);
        return c;
    }
    Matrix operator+(Matrix b) const {
        for (size_t i = 0; i < x.size(); i++) b.x[i] += x[i];
        return b;
    }
    Doubles operator*(const Doubles& v) const { return (*this * Matrix(columns, 1, v)).x; }
};

// u = scale · w ⊙ r / rms(r), and ∂u/∂r = scale · diag(w) (I − r rᵀ / (C rms²)) / rms.
std::pair<Doubles, Matrix> rms_norm(const Doubles& r, const Doubles& w, double scale, double eps) {
    const int C = int(r.size());
    double square = 0;
    for (double x : r) square += x * x / C;
    const double rms = std::sqrt(square + eps);
    Doubles u(C);
    Matrix J(C, C, {});
    for (int i = 0; i < C; i++) {
        u[i] = scale * w[i] * r[i] / rms;
        for (int k = 0; k < C; k++)
            J(i, k) = scale * w[i] / rms * ((i == k) - r[i] * r[k] / (C * rms * rms));
    }
    return {u, J};
}

// ∂r_ℓ/∂r_{ℓ−1} of a LLaMA layer for sequences of one token, which attends only to itself:
// (I + W_down M ∂u₂) (I + W_o W_v ∂u₁), M = ∂(silu(g) ⊙ h)/∂u₂ with g = W_gate u₂, h = W_up u₂.
Matrix layer_jacobian(Fixture& f, int layer, const Doubles& r) {
    const Config& c = f.model.config;
    const int C = c.width, H = c.mlp_width;
    const std::string name = cat("model.layers.", layer - 1, ".");
    auto matrix = [&](const char* part, int rows, int columns) {
        return Matrix(rows, columns, f.values(name + part + ".weight"));
    };
    const double scale = c.scheme.row->depth == DepthScale::output ? 1 / std::sqrt(layer) : 1;
    const Matrix I = Matrix::identity(C);
    const Matrix attention = matrix("self_attn.o_proj", C, C) * matrix("self_attn.v_proj", C, C);
    const auto [u1, du1] =
        rms_norm(r, f.values(name + "input_layernorm.weight"), scale, c.norm_eps);
    Doubles middle = attention * u1;
    for (int i = 0; i < C; i++) middle[i] += r[i];

    const auto [u2, du2] =
        rms_norm(middle, f.values(name + "post_attention_layernorm.weight"), scale, c.norm_eps);
    const Matrix gate = matrix("mlp.gate_proj", H, C), up = matrix("mlp.up_proj", H, C);
    const Doubles g = gate * u2, h = up * u2;
    Matrix M(H, C, {});
    for (int i = 0; i < H; i++) {
        const double s = 1 / (1 + std::exp(-g[i]));
        for (int k = 0; k < C; k++)
            M(i, k) = h[i] * s * (1 + g[i] * (1 - s)) * gate(i, k) + g[i] * s * up(i, k);
    }
    return (I + matrix("mlp.down_proj", C, H) * M * du2) * (I + attention * du1);
}

} // namespace

TEST(Probe, JacobianOfALayerInClosedForm) {
    for (const char* scheme : {"pre", "lns"}) {
        SCOPED_TRACE(scheme);
        Fixture f(small_config("llama", scheme, 2), 5, 1);
        const LayerDiagnostics::Jacobian j = *f.probe("jacobian", 2, 3000).jacobian;
        const int C = 8;
        for (int layer : {1, 2}) {
            double deviation = 0, norm = 0; // over all tokens, which the samples are drawn from
            int tokens = 0;
            for (const ProbeBatch& batch : f.batches) {
                const Floats r = f.residuals(batch)[layer - 1];
                for (int b = 0; b < batch.B; b++) {
                    const Matrix J = layer_jacobian(
                        f, layer, Doubles(r.begin() + b * C, r.begin() + (b + 1) * C));
                    const bool first = tokens++ == 0;
                    for (int i = 0; i < C && first && layer == 2; i++)
                        for (int k = 0; k < C; k++)
                            EXPECT_NEAR(j.matrix[i][k], J(i, k), 1e-5) << i << " " << k;
                    for (int i = 0; i < C; i++)
                        for (int k = 0; k < C; k++) {
                            norm += J(i, k) * J(i, k) / C;
                            deviation += (J(i, k) - (i == k)) * (J(i, k) - (i == k)) / C;
                        }
                }
            }
            deviation = std::sqrt(deviation / tokens), norm = std::sqrt(norm / tokens);
            for (auto [found, error, expected] :
                 {std::tuple{j.deviation[layer - 1], j.deviation_error[layer - 1], deviation},
                  std::tuple{j.norm[layer - 1], j.norm_error[layer - 1], norm}}) {
                EXPECT_GT(error, 0);
                EXPECT_LT(error, 0.05 * expected);
                EXPECT_NEAR(found, expected, 4 * error);
            }
        }
    }
}

// Every scheme but GPAS, whose stop_gradient finite differences do not see.
TEST(Probe, JacobianIsThatOfTheForwardPass) {
    std::vector<std::string> schemes = {"mix:1"};
    for (const SchemeRow& row : scheme_table())
        if (row.mixing == Mixing::sum) schemes.push_back(row.name);
    for (const char* arch : {"gpt2", "llama", "olmo2"})
        for (const std::string& scheme : schemes) {
            if (arch != std::string("llama") && scheme.find_first_of(":-") != scheme.npos) continue;
            SCOPED_TRACE(cat(arch, " ", scheme));
            Fixture f(small_config(arch, scheme, 2));
            const LayerDiagnostics::Jacobian j = *f.probe("jacobian", 2).jacobian;
            ProbeBatch& batch = f.batches[0];
            const Floats r = f.residuals(batch)[1];
            const int C = 8, t = 3; // the first sequence's last token with a target
            double worst = 0, size = 0;
            for (int k = 0; k < C; k++) {
                Floats out[2];
                const float step = 0.01f;
                for (int side : {0, 1}) {
                    Floats moved = r;
                    moved[t * C + k] += side ? step : -step;
                    f.model.rewind(1);
                    f.model.write(Stream::residual, moved.data());
                    f.model.run_layer(1);
                    out[side] = f.read(Stream::residual, batch);
                }
                for (int i = 0; i < C; i++) {
                    const double slope =
                        (double(out[1][t * C + i]) - double(out[0][t * C + i])) / (2 * step);
                    worst = std::max(worst, std::fabs(slope - j.matrix[i][k]));
                    size = std::max(size, std::fabs(slope));
                }
            }
            EXPECT_LT(worst, 5e-3 * size);
        }
}

TEST(Probe, RemovalEqualsAModelWithoutTheLayers) {
    const int L = 3;
    for (const char* arch : {"gpt2", "llama"})
        for (const char* scheme : {"pre", "post", "sandwich"}) {
            SCOPED_TRACE(cat(arch, " ", scheme));
            Fixture f(small_config(arch, scheme, L));
            const LayerDiagnostics p = f.probe("removal,permutation");
            // The loss of a model of these layers.
            auto loss_of = [&](const std::vector<int>& layers) {
                Config c = f.model.config;
                c.layers = int(layers.size());
                CpuModel<double> other(c, 3, 5, {});
                for (const Param& to : other.registry.params) {
                    std::string from = to.name;
                    for (const char* stack : {"layers.", "h."})
                        if (size_t at = from.find(stack); at != std::string::npos) {
                            char& digit = from[at + std::string(stack).size()];
                            digit = char('0' + layers[digit - '0']);
                            break;
                        }
                    const Doubles v = f.values(from);
                    other.write(Buffer::parameters, to, Floats(v.begin(), v.end()).data());
                }
                return f.mean_loss(other);
            };
            EXPECT_NEAR(p.loss, loss_of({0, 1, 2}), 1e-9);
            const Rows& loss = *p.removal;
            EXPECT_NEAR(loss[0][0], loss_of({1, 2}), 1e-6);
            EXPECT_NEAR(loss[0][1], loss_of({0, 2}), 1e-6);
            EXPECT_NEAR(loss[0][2], loss_of({0, 1}), 1e-6);
            EXPECT_NEAR(loss[1][0], loss_of({2}), 1e-6);
            EXPECT_NEAR(loss[1][1], loss_of({0}), 1e-6);
            EXPECT_GT(std::fabs(loss[0][1] - p.loss), 1e-3);
            EXPECT_NEAR(p.permutation->at(0), loss_of({1, 0, 2}), 1e-6);
            EXPECT_NEAR(p.permutation->at(1), loss_of({0, 2, 1}), 1e-6);
            EXPECT_GT(std::fabs(p.permutation->at(0) - p.loss), 1e-4);
        }
}

TEST(Probe, VarianceAndAnglesAreThoseOfTheResiduals) {
    Fixture f(small_config("llama", "sandwich", 3));
    const int L = 3, C = 8;
    const LayerDiagnostics p = f.probe("variance,angular");
    std::vector<Doubles> r(L + 1), attention(L), mlp(L); // tokens with a target
    std::vector<bool> last;
    for (const ProbeBatch& batch : f.batches) {
        auto keep = [&](Doubles& to, const Floats& x) {
            for (int row = 0; row < batch.B * batch.T; row++)
                if (batch.targets[row] >= 0)
                    to.insert(to.end(), x.begin() + row * C, x.begin() + (row + 1) * C);
        };
        f.model.embed(batch.inputs.data(), batch.B, batch.T);
        keep(r[0], f.read(Stream::residual, batch));
        for (int l = 0; l < L; l++) {
            f.model.run_layer(l);
            keep(r[l + 1], f.read(Stream::residual, batch));
            keep(attention[l], f.read(Stream::attention, batch));
            keep(mlp[l], f.read(Stream::mlp, batch));
        }
        for (int row = 0; row < batch.B * batch.T; row++) {
            if (batch.targets[row] < 0) continue;
            const bool end = row % batch.T == batch.T - 1;
            last.push_back(end || (row % batch.T == batch.T - 2 && batch.targets[row + 1] < 0));
        }
    }
    auto variance = [](const Doubles& x) {
        double mean = 0, square = 0;
        for (double v : x) mean += v / double(x.size());
        for (double v : x) square += (v - mean) * (v - mean) / double(x.size());
        return square;
    };
    for (int l = 0; l <= L; l++)
        EXPECT_NEAR(p.variance->residual[l] / variance(r[l]), 1, 1e-9) << l;
    for (int l = 0; l < L; l++) {
        EXPECT_NEAR(p.variance->attention[l] / variance(attention[l]), 1, 1e-9) << l;
        EXPECT_NEAR(p.variance->mlp[l] / variance(mlp[l]), 1, 1e-9) << l;
    }
    EXPECT_GT(p.variance->attention[1], 1e-3);

    const size_t tokens = last.size();
    ASSERT_EQ(int64_t(tokens), p.tokens);
    for (int n = 1; n <= L; n++)
        for (int l = 0; l + n <= L; l++) {
            double all = 0, at_end = 0, ends = 0;
            for (size_t t = 0; t < tokens; t++) {
                double aa = 0, ab = 0, bb = 0;
                for (int i = 0; i < C; i++) {
                    const double a = r[l][t * C + i], b = r[l + n][t * C + i];
                    aa += a * a, ab += a * b, bb += b * b;
                }
                const double angle = std::acos(ab / std::sqrt(aa * bb)) / M_PI;
                all += angle / double(tokens);
                if (last[t]) at_end += angle, ends++;
            }
            EXPECT_EQ(ends, 5);
            EXPECT_NEAR(p.angular_distance->all_tokens[n - 1][l], all, 1e-9);
            EXPECT_NEAR(p.angular_distance->last_token[n - 1][l], at_end / ends, 1e-9);
        }
}

TEST(Probe, GradientNormsAreThoseOfTheMeanLoss) {
    for (const char* arch : {"gpt2", "llama", "olmo2"}) {
        SCOPED_TRACE(arch);
        Fixture f(small_config(arch, "lns", 2));
        const LayerDiagnostics p = f.probe("gradients");
        EXPECT_EQ(f.model.gradient_norm(), 0) << "gradients are left behind";
        const LayerDiagnostics::GradientNorm& g = *p.gradient_norm;
        for (const ProbeBatch& b : f.batches)
            f.model.loss_and_gradients(b.inputs.data(), b.targets.data(), b.B, b.T,
                                       1 / double(p.tokens));
        for (int l = 0; l < 2; l++) {
            double attention = 0, mlp = 0, norm = 0;
            for (const Param& q : f.model.registry.params) {
                if (q.name.find(cat("layers.", l, ".")) == std::string::npos &&
                    q.name.find(cat(".h.", l, ".")) == std::string::npos)
                    continue;
                Floats v(q.size());
                f.model.read(Buffer::gradients, q, v.data());
                double sum = 0;
                for (float x : v) sum += double(x) * double(x);
                const bool is_norm = q.name.find("layernorm") != std::string::npos ||
                                     q.name.find(".ln_") != std::string::npos;
                (is_norm                                    ? norm
                 : q.name.find("attn") != std::string::npos ? attention
                                                            : mlp) += sum;
            }
            EXPECT_NEAR(g.attention[l] / std::sqrt(attention), 1, 1e-6);
            EXPECT_NEAR(g.mlp[l] / std::sqrt(mlp), 1, 1e-6);
            EXPECT_NEAR(g.norm[l] / std::sqrt(norm), 1, 1e-6);
        }
        // ∂loss/∂r: the loss's slope along the gradient is the gradient's norm. A single batch.
        f.batches.resize(1);
        const LayerDiagnostics one = f.probe("gradients");
        const ProbeBatch& b = f.batches[0];
        for (int l = 0; l <= 2; l++) {
            const std::vector<Floats> r = f.residuals(b);
            f.model.finish_backward(b.targets.data(), 1 / double(one.tokens));
            for (int k = 1; k >= l; k--) f.model.run_layer_backward(k);
            const Floats d = f.read(Stream::gradient, b);
            const double size = one.gradient_norm->residual[l];
            double loss[2];
            const double step = 0.05;
            for (int side : {0, 1}) {
                Floats moved = r[l];
                for (size_t i = 0; i < d.size(); i++)
                    moved[i] += float((side ? step : -step) * double(d[i]) / size);
                f.model.write(Stream::residual, moved.data());
                for (int k = l; k < 2; k++) f.model.run_layer(k);
                loss[side] = f.model.finish(b.targets.data()) / double(one.tokens);
            }
            EXPECT_NEAR((loss[1] - loss[0]) / (2 * step) / size, 1, 5e-3) << l;
        }
    }
}

// RMSNorm is linear on tokens of equal norm, as is attention on sequences of one token: such a
// layer, without its MLP, is its own best linear fit.
TEST(Probe, ALinearLayerIsUselessAndAnotherIsNot) {
    Config c = small_config("llama", "pre", 1);
    Fixture f(c, 40, 1);
    for (auto* batches : {&f.batches, &f.others})
        for (ProbeBatch& b : *batches)
            for (int i = 0; i < b.B; i++) b.inputs[i] = i; // the whole vocabulary
    const Param& wte = *f.model.registry.find("model.embed_tokens.weight");
    Floats rows(wte.size());
    f.model.read(Buffer::parameters, wte, rows.data());
    for (int v = 0; v < 40; v++) {
        double square = 0;
        for (int i = 0; i < 8; i++) square += double(rows[v * 8 + i]) * double(rows[v * 8 + i]);
        for (int i = 0; i < 8; i++) rows[v * 8 + i] /= float(std::sqrt(square));
    }
    f.model.write(Buffer::parameters, wte, rows.data());
    const Param& down = *f.model.registry.find("model.layers.0.mlp.down_proj.weight");
    Floats weights(down.size());
    f.model.read(Buffer::parameters, down, weights.data());
    f.fill("down_proj", 0);
    LayerDiagnostics p = f.probe("usefulness,removal");
    EXPECT_NEAR(p.usefulness->linear_loss[0], p.loss, 1e-4);
    EXPECT_GT(std::fabs(p.removal->at(0)[0] - p.loss), 1e-2) << "the layer does nothing";
    EXPECT_EQ(p.usefulness->share, 0);
    EXPECT_EQ(p.usefulness->fit_tokens, 8 * 40);

    for (float& w : weights) w *= 20;
    f.model.write(Buffer::parameters, down, weights.data());
    for (ProbeBatch& b : f.batches) // the model's own predictions
        for (int i = 0; i < b.B; i++) {
            Floats logits(40);
            f.model.logits(&b.inputs[i], 1, 1, true, logits.data());
            b.targets[i] = int(std::max_element(logits.begin(), logits.end()) - logits.begin());
        }
    p = f.probe("usefulness");
    EXPECT_GT(p.usefulness->linear_loss[0], 1.1 * p.loss);
    EXPECT_EQ(p.usefulness->share, 1);
}

TEST(Probe, FitsRecoverKnownParameters) {
    std::vector<double> x, line, curve;
    for (int l = 1; l <= 24; l++) {
        x.push_back(l), line.push_back(3 - 0.25 * l), curve.push_back(std::log(l));
    }
    EXPECT_NEAR(fit_line(x, line).slope, -0.25, 1e-12);
    EXPECT_NEAR(fit_line(x, line).r2, 1, 1e-12);
    EXPECT_NEAR(fit_line(curve, curve).slope, 1, 1e-12);
    EXPECT_LT(fit_line(x, curve).r2, 0.9);
    EXPECT_TRUE(std::isnan(fit_line({1}, {1}).slope));
    EXPECT_TRUE(std::isnan(fit_line({1, 2}, {1, 1}).r2));
    EXPECT_EQ(fit_line({1, 2}, {1, 1}).slope, 0);
}

TEST(Probe, NamesOfProbes) {
    EXPECT_TRUE(parse_probes("all").permutation);
    const ProbeSelection s = parse_probes("variance,removal");
    EXPECT_TRUE(s.variance && s.removal);
    EXPECT_FALSE(s.gradients || s.angular || s.jacobian || s.usefulness || s.permutation);
    EXPECT_TRUE(says(error_of([] { parse_probes("removals"); }), {"'removals'", "'removal'"}));
    EXPECT_TRUE(says(error_of([] { parse_probes("variance,"); }), {"''", "jacobian"}));
}

TEST(Probe, WhatIsNotFiniteIsNamed) {
    Fixture f(small_config("llama", "pre", 2));
    f.fill("layers.1.mlp.up_proj", NAN);
    EXPECT_TRUE(says(error_of([&] { f.probe("variance"); }), {"loss", "layers.1.mlp.up_proj"}));
}

namespace {

json read_json(const std::string& path) { return json::parse(read_bytes(path)); }

} // namespace

TEST(Probe, TheCommandWritesAndReports) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    write_shard(dir / "t_train_000000.bin", 900);
    write_shard(dir / "t_val_000000.bin", 1000); // 62 sequences of 16
    const std::string run_dir = dir / "run", probe = "probe " + run_dir + " --threads 1 ";
    Finished f = train_gpt(small_model + "-n lns --layers 3 -x 3 -i '" + dir / "t_train_*'" +
                           " -o " + run_dir);
    ASSERT_EQ(f.status, 0) << f.output;
    f = train_gpt(probe + "--probe-tokens 160 --dtype float32");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"embed", "var r", "|dr|", "angle", "removed", "swapped", "linear",
                                "|J-I|", "wrote " + run_dir + "/probe.json"}));
    const json all = read_json(run_dir + "/probe.json");
    EXPECT_EQ(all["version"], 1);
    EXPECT_EQ(all["checkpoint"], run_dir + "/step-000003");
    EXPECT_EQ(all["step"], 3);
    EXPECT_EQ(all["scheme"], "lns");
    EXPECT_EQ(all["layers"], 3);
    EXPECT_EQ(all["width"], 16);
    EXPECT_EQ(all["tokens"], 160);
    for (const char* key : {"residual", "attention", "mlp"}) {
        EXPECT_EQ(all["variance"][key].size(), key[0] == 'r' ? 4u : 3u);
        EXPECT_EQ(all["gradient_norm"][key].size(), key[0] == 'r' ? 4u : 3u);
    }
    for (const char* key : {"power_exponent", "power_r2", "exponential_rate", "exponential_r2"})
        EXPECT_TRUE(all["variance"][key].is_number());
    EXPECT_EQ(all["gradient_norm"]["norm"].size(), 3u);
    for (const char* key : {"last_token", "all_tokens"})
        for (size_t n = 1; n <= 3; n++)
            EXPECT_EQ(all["angular_distance"][key][n - 1].size(), 4 - n);
    for (size_t n = 1; n <= 3; n++) EXPECT_EQ(all["removal"]["blocks"][n - 1].size(), 4 - n);
    EXPECT_EQ(all["removal"]["single"], all["removal"]["blocks"][0]);
    for (const char* key : {"deviation", "deviation_error", "norm", "norm_error"})
        EXPECT_EQ(all["jacobian"][key].size(), 3u);
    EXPECT_GE(all["jacobian"]["probes"], 128);
    EXPECT_EQ(all["jacobian"]["full"]["layer"], 3);
    EXPECT_EQ(all["jacobian"]["full"]["matrix"].size(), 16u);
    EXPECT_EQ(all["jacobian"]["full"]["matrix"][15].size(), 16u);
    EXPECT_EQ(all["usefulness"]["linear_loss"].size(), 3u);
    EXPECT_EQ(all["permutation"].size(), 2u);

    // eval agrees, a repeated command gives the same bits, and diagnostics not requested are null
    f = train_gpt("eval " + run_dir + " --threads 1 --dtype float32 --val-tokens 160");
    double loss = 0;
    ASSERT_EQ(std::sscanf(f.output.c_str(), "loss %lf", &loss), 1) << f.output;
    EXPECT_NEAR(all["loss"], loss, 1e-5);
    const std::string other = dir / "other.json";
    f = train_gpt(probe + "--probe-tokens 160 --dtype float32 -o " + other);
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_EQ(read_bytes(other), read_bytes(run_dir + "/probe.json"));
    f = train_gpt(probe + "--probes variance --probe-tokens 16 -b 2 -o " + other);
    ASSERT_EQ(f.status, 0) << f.output;
    const json some = read_json(other);
    EXPECT_TRUE(some["variance"].is_object());
    for (const char* key :
         {"gradient_norm", "angular_distance", "removal", "jacobian", "usefulness", "permutation"})
        EXPECT_TRUE(some.contains(key) && some[key].is_null()) << key;

    f = train_gpt(probe + "--probe-tokens 100k --probes variance,usefulness -o " + other);
    EXPECT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"note:", "only 62 sequences of 16 tokens"}));
    EXPECT_TRUE(fails_with(probe + "--probes angulr", {"--probes", "'angular'"}));
    EXPECT_TRUE(fails_with(probe + "--jacobian-layer 4", {"4", "3 layers"}));
    EXPECT_TRUE(fails_with(probe + "-t 100000", {"--seq-len 100000", "positions"}));
    EXPECT_TRUE(fails_with("probe " + dir / "none", {"none"}));
    write_shard(dir / "short.bin", 20);
    EXPECT_TRUE(fails_with(probe + "--probes variance,usefulness -j " + dir / "short.bin",
                           {"one sequence", "usefulness"}));
    write_shard(dir / "short.bin", 10);
    EXPECT_TRUE(fails_with(probe + "-j " + dir / "short.bin", {"short.bin", "17"}));
    std::filesystem::copy(run_dir + "/step-000003", dir / "alone",
                          std::filesystem::copy_options::recursive);
    EXPECT_TRUE(fails_with("probe " + dir / "alone", {"does not belong to a run", "-o FILE"}));
}

// Fewer tokens than --probe-tokens, fewer sequences than --batch, one sequence, padded documents:
// everything possible is measured, and the rest is reported as missing.
TEST(Probe, SmallValidationSets) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    write_shard(dir / "t_train_000000.bin", 900);
    write_shard(dir / "t_val_000000.bin", 100);
    Finished f = train_gpt(small_model + "-x 1 -i '" + dir / "t_train_*' -o " + dir / "run");
    ASSERT_EQ(f.status, 0) << f.output;
    const std::string probe = "probe " + dir / "run --threads 1 -o " + dir / "p.json ";

    // Files of n sequences of 16 tokens; of documents of given lengths, in windows of 16.
    write_shard(dir / "1.bin", 17), write_shard(dir / "2.bin", 33), write_shard(dir / "5.bin", 90);
    auto write_documents = [&](const char* name, const std::vector<int>& lengths) {
        std::vector<int> tokens;
        for (int length : lengths)
            for (int t = 0; t < 16; t++) tokens.push_back(t < length ? 'a' + t : 256);
        ShardWriter writer(dir / name, load_tokenizer("bytes")->id(), 16);
        writer.write(tokens.data(), tokens.size());
        writer.close();
    };
    write_documents("documents.bin", {3, 12, 1, 7, 16});
    write_documents("ends.bin", {9, 0, 0, 0}); // only the first has targets
    write_documents("late.bin", {0, 9, 4, 5});
    for (const std::string shard : {"1", "2", "5", "documents", "ends", "late"})
        for (const std::string batch : {"", "-b 2 "}) {
            SCOPED_TRACE(shard + " " + batch);
            const bool fits = shard != "1" && shard != "ends";
            const std::string data = "-j " + dir / (shard + ".bin ") + batch;
            f = train_gpt(probe + data);
            ASSERT_EQ(f.status, 0) << f.output;
            const std::string text = read_bytes(dir / "p.json");
            const json p = json::parse(text);
            EXPECT_EQ(p["usefulness"].is_object(), fits) << f.output;
            EXPECT_EQ(f.output.find("usefulness is left out") == std::string::npos, fits);
            for (const char* key : {"variance", "gradient_norm", "angular_distance", "removal",
                                    "jacobian", "permutation"})
                EXPECT_FALSE(p[key].is_null()) << key;
            EXPECT_TRUE(std::isfinite(double(p["jacobian"]["deviation"][1])));
            for (const char* name : {"variance", "gradients", "angular", "removal", "jacobian",
                                     "permutation", "usefulness"}) {
                if (!batch.empty() || (shard != "1" && shard != "ends")) continue;
                f = train_gpt(probe + data + "--probes " + name);
                EXPECT_EQ(f.status, name == std::string("usefulness") && !fits) << f.output;
            }
        }
    f = train_gpt(probe + "--probes variance -j " + dir / "2.bin");
    EXPECT_TRUE(says(f.output, {"only 2 sequences of 16 tokens: 2 to measure on, of 1024"}));
    EXPECT_EQ(f.output.find("fit"), std::string::npos);
}

TEST(Probe, TrainingProbesOnlyTheGivenTokens) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string out = dir / "run", numbers = "--dtype float32 ";
    for (const auto& [tokens, same] : {std::pair{"31", "16"}, {"1", "16"}, {"1000", "32"}}) {
        std::filesystem::remove_all(out);
        Finished f =
            train_gpt(small_model + numbers + "-d 64 -x 1 --probe-every 1 --probe-tokens " +
                      tokens + " -o " + out);
        ASSERT_EQ(f.status, 0) << f.output;
        f = train_gpt("probe " + out + " --threads 1 --probes variance --probe-tokens " + same);
        ASSERT_EQ(f.status, 0) << f.output;
        const json logged = json::parse(read_bytes(out + "/log.jsonl"))["probe"]["variance"];
        const json measured = read_json(out + "/probe.json")["variance"];
        for (int l = 0; l <= 2; l++)
            EXPECT_NEAR(double(logged["residual"][l]) / double(measured["residual"][l]), 1, 1e-9);
    }
}

TEST(Probe, ProbesDoNotChangeTraining) {
    NEEDS_PROGRAM();
    for (const std::string numbers :
         {"--dtype float32 ", "--dtype bf16 --master-weights no --moments bf16 "
                              "--rounding stochastic "}) {
        TemporaryDirectory dir;
        const std::string arguments = small_model + numbers + "-n mix+gpas --arch gpt2 -d 64 -x 6 ";
        for (const std::string& more : {"-o " + dir / "a", "--probe-every 2 -o " + dir / "b"}) {
            Finished f = train_gpt(arguments + more);
            ASSERT_EQ(f.status, 0) << f.output;
        }
        for (const char* name : {"/model.safetensors", "/optimizer.safetensors"})
            EXPECT_TRUE(read_bytes(dir / "a/step-000006" + name) ==
                        read_bytes(dir / "b/step-000006" + name))
                << name << " differs";
        std::istringstream a(read_bytes(dir / "a/log.jsonl")), b(read_bytes(dir / "b/log.jsonl"));
        for (int step = 1; step <= 6; step++) {
            std::string line_a, line_b;
            ASSERT_TRUE(std::getline(a, line_a) && std::getline(b, line_b));
            const json without = json::parse(line_a), with = json::parse(line_b);
            for (const char* key : {"loss", "grad_norm"}) EXPECT_EQ(without[key], with[key]);
            EXPECT_FALSE(without.contains("probe"));
            ASSERT_EQ(with.contains("probe"), step % 2 == 0);
            if (step % 2 == 1) continue;
            const json& probe = with["probe"];
            EXPECT_EQ(probe.size(), 3u);
            EXPECT_EQ(probe["variance"]["residual"].size(), 3u);
            EXPECT_EQ(probe["gradient_norm"]["residual"].size(), 3u);
            EXPECT_EQ(probe["angular_distance"]["all_tokens"].size(), 1u);
            EXPECT_EQ(probe["angular_distance"]["all_tokens"][0].size(), 2u);
        }
        // The last diagnostics are of the saved model.
        Finished f = train_gpt("probe " + dir / "b --threads 1 -b 2 --probe-tokens 32 --probes " +
                               "variance,gradients");
        ASSERT_EQ(f.status, 0) << f.output;
        const json found = read_json(dir / "b/probe.json");
        std::string last, line;
        std::istringstream log(read_bytes(dir / "b/log.jsonl"));
        while (std::getline(log, line)) last = line;
        const json told = json::parse(last)["probe"];
        for (int l = 0; l <= 2; l++) {
            EXPECT_NEAR(double(found["variance"]["residual"][l]) /
                            double(told["variance"]["residual"][l]),
                        1, 1e-6);
            EXPECT_NEAR(double(found["gradient_norm"]["residual"][l]) /
                            double(told["gradient_norm"]["residual"][l]),
                        1, 1e-6);
        }
    }
    EXPECT_TRUE(fails_with(small_model + "--probe-every 1 --recompute layers", {"--recompute"}));
}
