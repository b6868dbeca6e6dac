// Attention's Hopper path on the simulated GPU, against plain sums in double.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "train_gpt.cu"

#include "gpt/hopper.h"
namespace lns::cuda {
#include "gpt/attention_hopper.cuh"
}

namespace lns::cuda {
namespace {

class HopperGpu : public testing::Test {
  protected:
    void SetUp() override { setenv("LNS_SIM_ARCH", "90", 1); }
    void TearDown() override { unsetenv("LNS_SIM_ARCH"); }
};

// Memory of the device.
template <class X> struct OnGpu {
    X* at = nullptr;
    size_t n;
    explicit OnGpu(size_t n) : n(n) { CUDA(cudaMalloc(&at, n * sizeof(X))); }
    explicit OnGpu(const std::vector<X>& x) : OnGpu(x.size()) {
        CUDA(cudaMemcpy(at, x.data(), n * sizeof(X), cudaMemcpyHostToDevice));
    }
    ~OnGpu() { cudaFree(at); }
    std::vector<X> read() const {
        std::vector<X> x(n);
        CUDA(cudaMemcpy(x.data(), at, n * sizeof(X), cudaMemcpyDeviceToHost));
        return x;
    }
};

std::vector<bf16> random_numbers(size_t n, unsigned seed, float size) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, size);
    std::vector<bf16> x(n);
    for (bf16& each : x) each = __float2bfloat16_rn(normal(random));
    return x;
}

double number(bf16 x) { return __bfloat162float(x); }

// One head of one sequence: rows of q, k and v, `row` apart.
struct Expected {
    std::vector<double> out, lse, p; // (T, HS), (T), (T, T)
    Expected(const bf16* q, const bf16* k, const bf16* v, int T, int HS, int row, double scale)
        : out(size_t(T) * HS), lse(T), p(size_t(T) * T) {
        for (int t = 0; t < T; t++) {
            double largest = -INFINITY, sum = 0, *score = &p[size_t(t) * T];
            for (int i = 0; i <= t; i++) {
                for (int c = 0; c < HS; c++)
                    score[i] += number(q[int64_t(t) * row + c]) * number(k[int64_t(i) * row + c]);
                score[i] *= scale;
                largest = std::max(largest, score[i]);
            }
            for (int i = 0; i <= t; i++) sum += score[i] = std::exp(score[i] - largest);
            for (int i = 0; i <= t; i++) {
                score[i] /= sum;
                for (int c = 0; c < HS; c++)
                    out[size_t(t) * HS + c] += score[i] * number(v[int64_t(i) * row + c]);
            }
            lse[t] = largest + std::log(sum);
        }
    }
};

struct Case {
    int B, T, NH, KVH, HS;
};

void check_forward(const Case& c) {
    SCOPED_TRACE(testing::Message() << "B " << c.B << " T " << c.T << " NH " << c.NH << " KVH "
                                    << c.KVH << " HS " << c.HS);
    AttentionShape a = {};
    a.B = c.B, a.T = c.T, a.NH = c.NH, a.KVH = c.KVH, a.HS = a.channels = c.HS;
    const std::vector<bf16> numbers = random_numbers(a.rows() * a.row(), 1, 1.5f);
    const OnGpu<bf16> qkv(numbers), out(a.rows() * a.q_width());
    const OnGpu<float> lse(a.rows() * a.NH);
    ASSERT_TRUE(hopper_attention_forward(out.at, lse.at, qkv.at, a, nullptr));
    CUDA(cudaDeviceSynchronize());
    const std::vector<bf16> got = out.read();
    const std::vector<float> got_lse = lse.read();
    double worst = 0, worst_lse = 0;
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.NH; h++) {
            const int kv = h / (c.NH / c.KVH);
            const bf16* rows = &numbers[int64_t(b) * c.T * a.row()];
            const Expected want(rows + h * c.HS, rows + (c.NH + kv) * c.HS,
                                rows + (c.NH + c.KVH + kv) * c.HS, c.T, c.HS, a.row(), a.scale());
            for (int t = 0; t < c.T; t++) {
                for (int i = 0; i < c.HS; i++) {
                    const double x =
                        number(got[(int64_t(b) * c.T + t) * a.q_width() + h * c.HS + i]);
                    worst = std::max(worst, std::abs(x - want.out[size_t(t) * c.HS + i]));
                    ASSERT_FALSE(std::isnan(x)) << "row " << t << " column " << i;
                }
                const double x = got_lse[(int64_t(b) * c.NH + h) * c.T + t];
                ASSERT_FALSE(std::isnan(x)) << "row " << t;
                worst_lse = std::max(worst_lse, std::abs(x - want.lse[t]));
            }
        }
    EXPECT_LT(worst, 0.02); // numbers up to about 5 in bf16
    EXPECT_LT(worst_lse, 1e-4);
}

const std::vector<Case> cases = {
    {1, 1, 2, 2, 64},    {2, 64, 4, 1, 64},   {1, 100, 2, 2, 64},  {2, 128, 2, 2, 64},
    {1, 200, 4, 1, 64},  {2, 300, 2, 2, 64},  {1, 1, 4, 1, 128},   {1, 64, 2, 2, 128},
    {2, 100, 4, 1, 128}, {1, 128, 2, 2, 128}, {2, 200, 2, 2, 128}, {1, 300, 4, 1, 128},
};

TEST_F(HopperGpu, AttentionForward) {
    for (const Case& c : cases) check_forward(c);
}
TEST_F(HopperGpu, AttentionForwardInEveryOrder) {
    sim::in_every_order([] {
        check_forward({1, 300, 2, 1, 64});
        check_forward({1, 300, 2, 1, 128});
    });
}
TEST_F(HopperGpu, OthersAreRefused) {
    AttentionShape a = {};
    a.B = 1, a.T = 64, a.NH = a.KVH = 2, a.HS = a.channels = 48;
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
    a.HS = a.channels = 64, a.first = 3;
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
    a.first = 0;
    setenv("LNS_SIM_ARCH", "80", 1);
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
}

} // namespace
} // namespace lns::cuda
