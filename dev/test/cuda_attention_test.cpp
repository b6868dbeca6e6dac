// Attention by mma against its definition in double, forward and backward: all sizes of heads,
// ragged lengths, shared keys and values, rotated and not, in every order of threads.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dev/sim/sim.h"
#include "gpt/cuda/attention.cuh"

using lns::Error;
using namespace lns::cuda;

namespace {

template <class S> S rounded(double x) {
    if constexpr (sizeof(S) == 2)
        return __float2bfloat16_rn(float(x));
    else
        return float(x);
}

template <class X> struct DeviceArray {
    X* data = nullptr;
    int64_t size;

    explicit DeviceArray(int64_t n) : size(n) {
        CUDA(cudaMalloc(reinterpret_cast<void**>(&data), size * sizeof(X)));
        CUDA(cudaMemset(data, 0xFF, size * sizeof(X))); // NaN
    }
    explicit DeviceArray(const std::vector<X>& values) : DeviceArray(int64_t(values.size())) {
        CUDA(cudaMemcpy(data, values.data(), size * sizeof(X), cudaMemcpyHostToDevice));
    }
    DeviceArray(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data); }
    std::vector<X> values() const {
        std::vector<X> out(size);
        CUDA(cudaMemcpy(out.data(), data, size * sizeof(X), cudaMemcpyDeviceToHost));
        return out;
    }
};

using Doubles = std::vector<double>;

struct Problem {
    AttentionShape a;
    bool rotated;
    double spread = 1; // of q and k: determines how peaked the softmax is

    // Padding channels are 0, as in the model.
    template <class S>
    std::vector<S> values(int64_t rows, int heads, uint32_t seed, int spread_heads = 0) const {
        std::mt19937 random(seed);
        std::normal_distribution<double> normal;
        std::vector<S> x(rows * heads * a.HS);
        for (int64_t i = 0; i < int64_t(x.size()); i++)
            x[i] = rounded<S>(i % a.HS < a.channels
                                  ? (i / a.HS % heads < spread_heads ? spread : 1) * normal(random)
                                  : 0.0);
        return x;
    }
    std::vector<CosSin> table() const {
        std::vector<CosSin> turns;
        for (int t = 0; t < a.T; t++)
            for (int i = 0; i < a.channels / 2; i++) {
                const double angle = t * std::pow(10000.0, -2.0 * i / a.channels);
                turns.push_back({float(std::cos(angle)), float(std::sin(angle))});
            }
        return turns;
    }
};

struct Expected {
    Doubles out, lse, dqkv;
};

// The definition, one query at a time.
template <class S>
Expected expected(const Problem& p, const std::vector<S>& qkv, const std::vector<S>& dout) {
    const AttentionShape& a = p.a;
    const int HS = a.HS, group = a.NH / a.KVH;
    const double scale = 1 / std::sqrt(double(a.channels));
    Expected e;
    e.out.resize(a.rows() * a.q_width());
    e.lse.resize(a.rows() * a.NH);
    e.dqkv.resize(a.rows() * a.row());
    const Doubles x(qkv.begin(), qkv.end()), dO(dout.begin(), dout.end());
    Doubles s(a.T), dp(a.T);
    for (int b = 0; b < a.B; b++)
        for (int h = 0; h < a.NH; h++)
            for (int t = 0; t < a.T; t++) {
                const int64_t row = int64_t(b) * a.T + t;
                const int64_t q = row * a.row() + h * HS, o = row * a.q_width() + h * HS;
                auto key = [&](int i) {
                    return (int64_t(b) * a.T + i) * a.row() + (a.NH + h / group) * HS;
                };
                double largest = -INFINITY, sum = 0, dot = 0;
                const int first = a.window ? std::max(0, t - a.window + 1) : 0;
                for (int i = first; i <= t; i++) {
                    s[i] = dp[i] = 0;
                    for (int d = 0; d < HS; d++) {
                        s[i] += scale * x[q + d] * x[key(i) + d];
                        dp[i] += dO[o + d] * x[key(i) + a.kv_width() + d];
                    }
                    largest = std::max(largest, s[i]);
                }
                for (int i = first; i <= t; i++) sum += std::exp(s[i] - largest);
                e.lse[(int64_t(b) * a.NH + h) * a.T + t] = largest + std::log(sum);
                for (int i = first; i <= t; i++) {
                    s[i] = std::exp(s[i] - largest) / sum;
                    dot += s[i] * dp[i];
                }
                for (int i = first; i <= t; i++)
                    for (int d = 0; d < HS; d++) {
                        const int64_t k = key(i) + d, v = k + a.kv_width();
                        const double ds = s[i] * (dp[i] - dot) * scale;
                        e.out[o + d] += s[i] * x[v];
                        e.dqkv[v] += s[i] * dO[o + d];
                        e.dqkv[q + d] += ds * x[k];
                        e.dqkv[k] += ds * x[q + d];
                    }
            }
    const std::vector<CosSin> turns = p.table();
    const int half = a.channels / 2;
    for (int64_t row = 0; row < a.rows() && p.rotated; row++)
        for (int head = 0; head < a.NH + a.KVH; head++)
            for (int i = 0; i < half; i++) {
                const CosSin turn = turns[row % a.T * half + i];
                double& x0 = e.dqkv[row * a.row() + head * HS + i];
                double& x1 = *(&x0 + half);
                const double y0 = x0 * turn.cos + x1 * turn.sin, y1 = x1 * turn.cos - x0 * turn.sin;
                x0 = y0, x1 = y1;
            }
    return e;
}

// Columns from … to of rows of `width`.
struct Columns {
    int width, from, to;
    bool has(size_t i) const { return int(i % width) >= from && int(i % width) < to; }
};

double norm(const Doubles& x, const Columns& columns) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); i++)
        if (columns.has(i)) sum += x[i] * x[i];
    return std::sqrt(sum);
}

// ‖x − expected‖ / max(‖expected‖, at_least).
template <class X>
double error(const std::vector<X>& x, const Doubles& expected, const Columns& columns,
             double at_least = 0) {
    Doubles difference(x.size());
    for (size_t i = 0; i < x.size(); i++) difference[i] = double(float(x[i])) - expected[i];
    return norm(difference, columns) / std::max(norm(expected, columns), at_least);
}

template <class S> struct Result {
    std::vector<S> out, dqkv;
    std::vector<float> lse;
    bool operator==(const Result& other) const {
        auto same = [](const auto& x, const auto& y) {
            return x.size() == y.size() && !std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]);
        };
        return same(out, other.out) && same(dqkv, other.dqkv) && same(lse, other.lse);
    }
};

template <class S>
Result<S> computed(const Problem& p, const std::vector<S>& qkv, const std::vector<S>& dout) {
    const AttentionShape& a = p.a;
    const DeviceArray<S> in(qkv), gradient(dout);
    const DeviceArray<S> out(a.rows() * a.q_width()), dqkv(a.rows() * a.row());
    const DeviceArray<float> lse(a.rows() * a.NH), delta(a.rows() * a.NH);
    const DeviceArray<CosSin> table(p.table());
    mma_attention_forward<S>(out.data, lse.data, in.data, a, nullptr);
    if (a.first == 0)
        mma_attention_backward<S>(dqkv.data, gradient.data, out.data, in.data, lse.data,
                                  p.rotated ? table.data : nullptr, delta.data, a, nullptr);
    CUDA(cudaDeviceSynchronize());
    return {out.values(), dqkv.values(), lse.values()};
}

struct Worst {
    double out = 0, lse = 0, dq = 0, dk = 0, dv = 0;
};

template <class S> void check(const Problem& p, Worst& worst) {
    const AttentionShape& a = p.a;
    const std::vector<S> qkv = p.values<S>(a.rows(), a.NH + 2 * a.KVH, 1, a.NH + a.KVH);
    const std::vector<S> dout = p.values<S>(a.rows(), a.NH, 2);
    const Expected e = expected(p, qkv, dout);
    const Result<S> r = computed(p, qkv, dout);
    const int Q = a.q_width(), K = a.kv_width(), W = a.row();
    const Columns q = {W, 0, Q}, k = {W, Q, Q + K}, v = {W, Q + K, W};
    const bool alone = a.T == 1 || a.window == 1; // then dq and dk are 0
    const double small = alone ? norm(e.dqkv, v) : 0;
    const Worst here = {error(r.out, e.out, {Q, 0, Q}), error(r.lse, e.lse, {1, 0, 1}, 1.0),
                        error(r.dqkv, e.dqkv, q, small), error(r.dqkv, e.dqkv, k, small),
                        error(r.dqkv, e.dqkv, v)};
    const double tolerance = sizeof(S) == 2 ? 8e-3 : 2e-6;
    const std::string what = "T " + std::to_string(a.T) + ", heads " + std::to_string(a.NH) + "/" +
                             std::to_string(a.KVH) + ", HS " + std::to_string(a.HS) +
                             ", channels " + std::to_string(a.channels) +
                             (p.rotated ? ", rotated" : "") +
                             (a.window ? ", window " + std::to_string(a.window) : "");
    EXPECT_LT(here.out, tolerance) << what;
    EXPECT_LT(here.lse, 2e-6) << what;
    EXPECT_LT(here.dq, tolerance) << what;
    EXPECT_LT(here.dk, tolerance) << what;
    EXPECT_LT(here.dv, tolerance) << what;
    worst.out = std::max(worst.out, here.out), worst.lse = std::max(worst.lse, here.lse);
    worst.dq = std::max(worst.dq, here.dq), worst.dk = std::max(worst.dk, here.dk);
    worst.dv = std::max(worst.dv, here.dv);
}

const int head_sizes[][2] = {{8, 8}, {16, 16}, {48, 48}, {56, 52}, {64, 64}, {80, 80}, {128, 128}};
const int heads[][2] = {{1, 1}, {4, 2}, {4, 1}};
const int lengths[] = {1, 7, 64, 65, 130, 200};

// Every length with every head size, cycling through the numbers of heads.
template <class S> void check_all() {
    Worst worst;
    int n = 0;
    for (int T : lengths)
        for (const auto& size : head_sizes) {
            const auto& head = heads[n % 3];
            check<S>({{T < 64 ? 3 : 1, T, head[0], head[1], size[0], size[1]}, n % 2 == 0}, worst);
            n++;
        }
    std::printf("largest relative errors: out %.1e, lse %.1e, dq %.1e, dk %.1e, dv %.1e\n",
                worst.out, worst.lse, worst.dq, worst.dk, worst.dv);
}

} // namespace

TEST(CudaAttention, IsItsDefinitionInBf16) { check_all<bf16>(); }
TEST(CudaAttention, IsItsDefinitionInFloat) { check_all<float>(); }

// Windows within a tile, of a tile, and of several; tiles of which a query sees nothing.
TEST(CudaAttention, IsItsDefinitionWithAWindow) {
    Worst worst;
    int n = 0;
    for (auto [T, window] : {std::pair{7, 1}, {65, 3}, {130, 17}, {200, 64}, {200, 70}, {300, 129}})
        for (int HS : {64, 128}) {
            const auto& head = heads[n++ % 3];
            const AttentionShape a = {2, T, head[0], head[1], HS, HS, 0, {}, window};
            check<bf16>({a, n % 2 == 0}, worst);
            if (HS == 64 && T <= 130) check<float>({a, n % 2 == 0}, worst);
        }
}

// Scores far apart, so that the running maximum changes often and most probabilities are 0, and of
// equal size, so that the gradient is a small difference.
TEST(CudaAttention, IsExactForPeakedAndForFlatSoftmax) {
    for (double spread : {0.05, 4.0}) {
        Worst worst;
        check<bf16>({{1, 256, 2, 1, 64, 64}, false, spread}, worst);
        std::printf("spread %.2f: out %.1e, lse %.1e, dq %.1e, dk %.1e, dv %.1e\n", spread,
                    worst.out, worst.lse, worst.dq, worst.dk, worst.dv);
    }
}

TEST(CudaAttention, GivesTheSameBitsInEveryOrderOfThreads) {
    for (int HS : {64, 128}) {
        const Problem p = {{1, 130, 2, 1, HS, HS}, true};
        const auto qkv = p.values<bf16>(p.a.rows(), p.a.NH + 2 * p.a.KVH, 1);
        const auto dout = p.values<bf16>(p.a.rows(), p.a.NH, 2);
        const Result<bf16> once = computed(p, qkv, dout);
        lns::sim::in_every_order([&] {
            EXPECT_TRUE(computed(p, qkv, dout) == once) << lns::sim::name_of(lns::sim::order());
        });
    }
    const Problem p = {{1, 70, 2, 1, 64, 64}, true};
    const auto qkv = p.values<float>(p.a.rows(), p.a.NH + 2 * p.a.KVH, 1);
    const auto dout = p.values<float>(p.a.rows(), p.a.NH, 2);
    const Result<float> once = computed(p, qkv, dout);
    lns::sim::in_every_order([&] {
        EXPECT_TRUE(computed(p, qkv, dout) == once) << lns::sim::name_of(lns::sim::order());
    });
}

TEST(CudaAttention, BeginsWhereItIsTold) {
    for (auto [first, window] : {std::pair{1, 0}, {64, 0}, {199, 0}, {64, 50}, {199, 150}}) {
        Problem p = {{1, 200, 4, 2, 64, 64, 0, {}, window}, false};
        const auto qkv = p.values<bf16>(p.a.rows(), p.a.NH + 2 * p.a.KVH, 1);
        const auto dout = p.values<bf16>(p.a.rows(), p.a.NH, 2);
        Expected e = expected(p, qkv, dout);
        p.a.first = first;
        Result<bf16> r = computed(p, qkv, dout);
        const int Q = p.a.q_width();
        for (int64_t i = 0; i < int64_t(first) * Q; i++)
            ASSERT_TRUE(std::isnan(float(r.out[i]))) << "written before " << first;
        r.out.erase(r.out.begin(), r.out.begin() + int64_t(first) * Q);
        e.out.erase(e.out.begin(), e.out.begin() + int64_t(first) * Q);
        EXPECT_LT(error(r.out, e.out, {Q, 0, Q}), 8e-3) << first;
    }
}

TEST(CudaAttention, RefusesAHeadThatIsTooWide) {
    const AttentionShape a = {1, 8, 1, 1, 136, 136};
    float* none = nullptr;
    try {
        mma_attention_forward<float>(none, none, none, a, nullptr);
        FAIL();
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("at most 128"), std::string::npos);
    }
}
