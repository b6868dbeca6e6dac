// Attention's Hopper path on the simulated GPU, against plain sums in double.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dev/sim/sim.h"
#include "gpt/cuda/attention_hopper.cuh"

namespace lns::cuda {
namespace {

using namespace hopper;

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

// Adds the gradients of q, k and v to dq, dk and dv (with their row stride) from dout (rows of
// dout_row).
void add_gradients(double* dq, double* dk, double* dv, const Expected& forward, const bf16* q,
                   const bf16* k, const bf16* v, const bf16* dout, int T, int HS, int row,
                   int dout_row, double scale) {
    for (int t = 0; t < T; t++) {
        std::vector<double> dp(t + 1);
        double delta = 0;
        for (int i = 0; i <= t; i++) {
            for (int c = 0; c < HS; c++)
                dp[i] += number(dout[int64_t(t) * dout_row + c]) * number(v[int64_t(i) * row + c]);
            delta += dp[i] * forward.p[size_t(t) * T + i];
        }
        for (int i = 0; i <= t; i++) {
            const double p = forward.p[size_t(t) * T + i], ds = p * (dp[i] - delta) * scale;
            for (int c = 0; c < HS; c++) {
                dq[int64_t(t) * row + c] += ds * number(k[int64_t(i) * row + c]);
                dk[int64_t(i) * row + c] += ds * number(q[int64_t(t) * row + c]);
                dv[int64_t(i) * row + c] += p * number(dout[int64_t(t) * dout_row + c]);
            }
        }
    }
}

// rms(x − y) / rms(y) over a part of each row.
double relative_error(const std::vector<bf16>& x, const std::vector<double>& y, int64_t row,
                      int from, int to) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < x.size(); i++)
        if (int64_t(i) % row >= from && int64_t(i) % row < to)
            difference += std::pow(number(x[i]) - y[i], 2), size += y[i] * y[i];
    return std::sqrt(difference / std::max(size, 1e-6)); // one key: its gradient is 0
}

struct Case {
    int B, T, NH, KVH, HS;
};

// Checks for the same bits in every order of threads; the first result is kept.
struct SameBits {
    std::vector<bf16> kept;
    void check(const std::vector<bf16>& got) {
        if (kept.empty()) kept = got;
        EXPECT_EQ(std::memcmp(kept.data(), got.data(), got.size() * sizeof(bf16)), 0)
            << "other bits in another order";
    }
};

void check_forward(const Case& c, SameBits* bits = nullptr) {
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
    if (bits) bits->check(got);
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

void check_backward(const Case& c, bool rotated, SameBits* bits = nullptr) {
    SCOPED_TRACE(testing::Message() << "B " << c.B << " T " << c.T << " NH " << c.NH << " KVH "
                                    << c.KVH << " HS " << c.HS << (rotated ? " rotated" : ""));
    AttentionShape a = {};
    a.B = c.B, a.T = c.T, a.NH = c.NH, a.KVH = c.KVH, a.HS = a.channels = c.HS;
    const int half = c.HS / 2, row = a.row(), q_row = a.q_width();
    const std::vector<bf16> numbers = random_numbers(a.rows() * row, 2, 1);
    const std::vector<bf16> douts = random_numbers(a.rows() * q_row, 3, 1);
    std::vector<CosSin> turns(size_t(c.T) * half);
    for (size_t i = 0; i < turns.size(); i++) {
        const float angle = float(i / half) / float(1 + i % half);
        turns[i] = {std::cos(angle), std::sin(angle)};
    }
    const OnGpu<bf16> qkv(numbers), dout(douts), out(a.rows() * q_row), dqkv(a.rows() * row);
    const OnGpu<float> lse(a.rows() * a.NH), delta(a.rows() * a.NH);
    const OnGpu<CosSin> table(turns);
    ASSERT_TRUE(hopper_attention_forward(out.at, lse.at, qkv.at, a, nullptr));
    ASSERT_TRUE(hopper_attention_backward(dqkv.at, dout.at, out.at, qkv.at, lse.at,
                                          rotated ? table.at : nullptr, delta.at, a, nullptr));
    CUDA(cudaDeviceSynchronize());

    std::vector<double> want(a.rows() * row);
    for (int b = 0; b < c.B; b++) {
        const int64_t from = int64_t(b) * c.T * row;
        for (int h = 0; h < c.NH; h++) {
            const int64_t q = from + h * c.HS, k = from + (c.NH + h / (c.NH / c.KVH)) * c.HS,
                          v = k + c.KVH * c.HS;
            const Expected forward(&numbers[q], &numbers[k], &numbers[v], c.T, c.HS, row,
                                   a.scale());
            add_gradients(&want[q], &want[k], &want[v], forward, &numbers[q], &numbers[k],
                          &numbers[v], &douts[int64_t(b) * c.T * q_row + h * c.HS], c.T, c.HS, row,
                          q_row, a.scale());
        }
        for (int t = 0; t < c.T && rotated; t++)
            for (int h = 0; h < c.NH + c.KVH; h++)
                for (int i = 0; i < half; i++) {
                    double &x = want[from + int64_t(t) * row + h * c.HS + i], &y = (&x)[half];
                    const CosSin turn = turns[size_t(t) * half + i];
                    const double old = x;
                    x = old * turn.cos + y * turn.sin, y = y * turn.cos - old * turn.sin;
                }
    }
    const std::vector<bf16> got = dqkv.read();
    if (bits) bits->check(got);
    EXPECT_LT(relative_error(got, want, row, 0, q_row), 0.01) << "dq";
    EXPECT_LT(relative_error(got, want, row, q_row, q_row + a.kv_width()), 0.01) << "dk";
    EXPECT_LT(relative_error(got, want, row, q_row + a.kv_width(), row), 0.01) << "dv";
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
    SameBits bits[2];
    sim::in_every_order([&] {
        check_forward({2, 300, 3, 1, 64}, &bits[0]);
        check_forward({1, 300, 2, 1, 128}, &bits[1]);
    });
}
TEST_F(HopperGpu, AttentionBackward) {
    for (const Case& c : cases) check_backward(c, c.B == 1);
}
TEST_F(HopperGpu, AttentionBackwardInEveryOrder) {
    SameBits bits[2];
    sim::in_every_order([&] {
        check_backward({1, 300, 2, 1, 64}, true, &bits[0]);
        check_backward({1, 200, 2, 1, 128}, false, &bits[1]);
    });
}
// The simulator detects faults that a GPU would hide: out (64, 64) = a bᵀ with a fault.
enum class Fault { none, not_awaited, bytes, no_fence, read_early, written_early, stride };

template <Fault fault>
__global__ void faulty_kernel(float* out, const __grid_constant__ TensorMap a_map,
                              const __grid_constant__ TensorMap b_map) {
    SharedMemory shared;
    bf16* a = shared.take<bf16>(2 * 64 * 64);
    bf16* b = a + 64 * 64;
    uint64_t* full = shared.take<uint64_t>(1);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_done();
        barrier_expect(full, (fault == Fault::bytes ? 3 : 2) * 64 * 64 * int(sizeof(bf16)));
        copy_box(a, a_map, 0, 0, 0, 0, full);
        copy_box(b, b_map, 0, 0, 0, 0, full);
    }
    __syncthreads();
    if (fault != Fault::not_awaited) barrier_wait(full, 0);
    uint64_t a_matrix = matrix(a), b_matrix = matrix(b);
    if (fault == Fault::stride) b_matrix ^= uint64_t(3 * 512 >> 4) << 32; // 512 for 1,024
    float s[32];
    if (fault != Fault::no_fence) wgmma_fence(s);
    for (int c = 0; c < 64; c += 16)
        wgmma(s, advanced(a_matrix, 2 * c), advanced(b_matrix, 2 * c), c > 0);
    wgmma_commit();
    float early = s[0];
    if (fault == Fault::written_early) s[0] = 1;
    wgmma_wait<0>(s);
    if (fault == Fault::read_early) s[0] = early;
    for (int n = 0; n < 32; n++)
        out[(threadIdx.x / warp * 16 + threadIdx.x % warp / 4 + 8 * second_row(n)) * 64 +
            column_of(n)] = s[n];
}

// "" if the product is right, else the error.
template <Fault fault> std::string found() {
    const std::vector<bf16> a = random_numbers(64 * 64, 1, 1), b = random_numbers(64 * 64, 2, 1);
    const OnGpu<bf16> a_at(a), b_at(b);
    const OnGpu<float> out(64 * 64);
    AttentionShape shape = {};
    shape.B = 1, shape.T = 64, shape.HS = 64;
    try {
        launch(faulty_kernel<fault>, 1, 128, shared_bytes<bf16>(2 * 64 * 64) + 16, nullptr, out.at,
               heads_map(a_at.at, 1, shape), heads_map(b_at.at, 1, shape));
        CUDA(cudaDeviceSynchronize());
    } catch (const Error& error) {
        return error.what();
    }
    const std::vector<float> got = out.read();
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 64; j++) {
            double sum = 0;
            for (int c = 0; c < 64; c++) sum += number(a[i * 64 + c]) * number(b[j * 64 + c]);
            if (std::isnan(got[i * 64 + j])) return "poison";
            if (std::abs(got[i * 64 + j] - sum) > 1e-3) return "wrong numbers";
        }
    return "";
}

TEST_F(HopperGpu, FaultsAreFound) {
    auto has = [](const std::string& text, const char* part) {
        EXPECT_NE(text.find(part), std::string::npos) << text;
    };
    EXPECT_EQ(found<Fault::none>(), "");
    EXPECT_EQ(found<Fault::not_awaited>(), "poison");
    EXPECT_EQ(found<Fault::read_early>(), "poison");
    EXPECT_EQ(found<Fault::stride>(), "wrong numbers");
    has(found<Fault::bytes>(), "no thread can continue");
    has(found<Fault::no_fence>(), "registers that no wgmma_fence has named");
    has(found<Fault::written_early>(), "sums were written before wgmma_wait");
}

TEST(HopperWork, EachTileOfEachHeadOnce) {
    const int heads = 8, tiles = 5;
    for (int heads_at_once : {1, 3, 8, 100}) {
        std::vector<int> done(heads * tiles);
        for (int n = 0; n < heads * tiles; n++) {
            const Work work(n, heads, tiles, heads_at_once);
            done.at(work.head * tiles + work.tile)++;
        }
        EXPECT_EQ(done, std::vector<int>(heads * tiles, 1)) << heads_at_once;
    }
}

TEST_F(HopperGpu, OtherShapesAreRefused) {
    AttentionShape a = {};
    a.B = 1, a.T = 64, a.NH = a.KVH = 2, a.HS = a.channels = 48;
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
    a.HS = a.channels = 64, a.first = 3;
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
    a.first = 0;
    setenv("LNS_SIM_ARCH", "80", 1);
    EXPECT_FALSE(hopper_attention_forward(nullptr, nullptr, nullptr, a, nullptr));
    EXPECT_FALSE(hopper_attention_backward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                           nullptr, a, nullptr));
}

} // namespace
} // namespace lns::cuda
