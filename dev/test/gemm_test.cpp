// Matrix products of every type, shape and implementation, against their definition in double.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gpt/cpu/gemm.h"
#include "gpt/cpu/gemm_kernel.h"

using namespace lns;

namespace {

template <class S> struct Aligned { // as pack() requires
    explicit Aligned(int64_t size) { data = (S*)scratch.get(size * int64_t(sizeof(S))); }
    Scratch scratch;
    S* data;
};

template <class S> std::vector<S> random_values(int64_t size, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::vector<S> values(size);
    for (S& v : values) v = S(normal(random));
    return values;
}

struct Form {
    bool a_transposed, b_transposed, accumulate, bias;
};

std::string describe(const Form& f, int64_t m, int64_t n, int64_t k) {
    return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) +
           (f.a_transposed ? " at" : "") + (f.b_transposed ? " bt" : "") +
           (f.accumulate ? " accumulate" : "") + (f.bias ? " bias" : "");
}

template <class S> const double epsilon = 0;
template <> const double epsilon<double> = std::ldexp(1, -53);
template <> const double epsilon<float> = std::ldexp(1, -24);
template <> const double epsilon<bf16> = std::ldexp(1, -8);

// The error of a sum of k products in any order is at most k · eps · Σ|a||b| (Higham, Accuracy and
// Stability, 3.1; with or without FMA), plus the rounding to OUT.
template <class S, class OUT> double bound(int64_t k, double magnitude, double value) {
    const double sum = (k + 2) * epsilon<Sum<S>> * magnitude;
    return sum + epsilon<OUT> * (std::fabs(value) + sum) * (std::is_same_v<OUT, bf16> ? 1 : 0);
}

template <class S, class OUT, class Gemm>
void check(const Form& f, int64_t m, int64_t n, int64_t k, Gemm product) {
    const auto a = random_values<S>(m * k, 1), b = random_values<S>(k * n, 2);
    auto out = random_values<OUT>(m * n, 3);
    const auto bias = random_values<OUT>(n, 4), before = out;
    product(f.a_transposed, f.b_transposed, m, n, k, a.data(), b.data(), out.data(), f.accumulate,
            f.bias ? bias.data() : nullptr);
    double worst = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = f.accumulate ? double(before[i * n + j]) : f.bias ? double(bias[j]) : 0;
            double magnitude = std::fabs(sum);
            for (int64_t p = 0; p < k; p++) {
                const double term = double(a[f.a_transposed ? p * m + i : i * k + p]) *
                                    double(b[f.b_transposed ? j * k + p : p * n + j]);
                sum += term, magnitude += std::fabs(term);
            }
            const double error = std::fabs(double(out[i * n + j]) - sum);
            const double ratio = error / bound<S, OUT>(k, magnitude, sum);
            worst = std::max(worst, std::isnan(ratio) ? 1e9 : ratio);
        }
    EXPECT_LE(worst, 1) << describe(f, m, n, k);
}

// Sizes around the block sizes (14, 16, 32), often an exact multiple.
std::vector<std::array<int64_t, 3>> shapes() {
    std::vector<std::array<int64_t, 3>> out = {
        {1, 1, 1},     {1, 70, 33},   {70, 1, 31},   {15, 17, 1},  {31, 33, 64}, {32, 32, 32},
        {64, 64, 128}, {33, 31, 300}, {96, 64, 513}, {3, 5, 2050}, {130, 65, 40}};
    const int64_t sizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 65, 97};
    std::mt19937 random(7);
    for (int i = 0; i < 12; i++)
        out.push_back({sizes[random() % 12], sizes[random() % 12], sizes[random() % 12]});
    return out;
}

template <class S, class OUT, class Gemm> void check_all(Gemm product) {
    for (auto [m, n, k] : shapes())
        for (int form = 0; form < 12; form++) {
            const Form f{(form & 1) != 0, (form & 2) != 0, form / 4 == 1, form / 4 == 2};
            if (f.accumulate && std::is_same_v<OUT, bf16>) continue;
            check<S, OUT>(f, m, n, k, product);
        }
}

template <class S, class OUT> auto public_gemm() {
    return [](bool ta, bool tb, int64_t m, int64_t n, int64_t k, const S* a, const S* b, OUT* out,
              bool accumulate,
              const OUT* bias) { gemm(ta, tb, m, n, k, a, b, out, accumulate, bias); };
}

template <class OUT, class T, class P> auto gemm_by(const Kernel<T, P>& kernel) {
    return [&kernel](bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, const T* b,
                     OUT* out, bool accumulate, const OUT* bias) {
        kernel_gemm(kernel, ta, tb, m, n, k, a, b, out, accumulate, bias);
    };
}

// pack() with unused rows and columns, and both strides of a.
template <class S, class Size, class Pack, class Gemm>
void check_packed(Size size, Pack pack_b, Gemm product) {
    for (auto [m, n, k] : shapes())
        for (int form = 0; form < 16; form++) {
            const int64_t packed_k = form & 4 ? k + 19 : k, packed_n = form & 4 ? n + 37 : n;
            const auto whole = random_values<S>(packed_k * packed_n, 5);
            Aligned<S> packed(size(packed_k, packed_n));
            const bool tb = form & 1;
            // Elements beyond the first k rows and n columns must not matter.
            std::vector<S> b = whole;
            for (int64_t p = 0; p < packed_k; p++)
                for (int64_t j = 0; j < packed_n; j++)
                    if (p >= k || j >= n)
                        b[tb ? j * packed_k + p : p * packed_n + j] =
                            S(std::numeric_limits<float>::quiet_NaN());
            pack_b(packed.data, packed_k, packed_n, b.data(), tb ? 1 : packed_n, tb ? packed_k : 1);
            check<S, Sum<S>>({(form & 2) != 0, tb, (form & 8) != 0, false}, m, n, k,
                             [&](bool ta, bool, int64_t m, int64_t n, int64_t k, const S* a,
                                 const S* bs, Sum<S>* out, bool accumulate, const Sum<S>*) {
                                 // Use check()'s own b.
                                 std::vector<S> own = b;
                                 for (int64_t p = 0; p < k; p++)
                                     for (int64_t j = 0; j < n; j++)
                                         own[tb ? j * packed_k + p : p * packed_n + j] =
                                             bs[tb ? j * k + p : p * n + j];
                                 pack_b(packed.data, packed_k, packed_n, own.data(),
                                        tb ? 1 : packed_n, tb ? packed_k : 1);
                                 std::vector<Sum<S>> c(m * (n + 3), Sum<S>(7));
                                 for (int64_t i = 0; i < m; i++)
                                     std::copy(out + i * n, out + (i + 1) * n, &c[i * (n + 3)]);
                                 product(m, n, k, a, ta ? 1 : k, ta ? m : 1, packed.data, packed_k,
                                         packed_n, c.data(), n + 3, accumulate);
                                 for (int64_t i = 0; i < m; i++) {
                                     std::copy(&c[i * (n + 3)], &c[i * (n + 3)] + n, out + i * n);
                                     for (int64_t j = n; j < n + 3; j++)
                                         EXPECT_EQ(c[i * (n + 3) + j], 7);
                                 }
                             });
        }
}

template <class S> void check_public_packed() {
    check_packed<S>(packed_size<S>, pack<S>, packed_gemm<S>);
}

template <class T, class P> void check_packed_by(const Kernel<T, P>& kernel) {
    check_packed<T>(
        [&](int64_t k, int64_t n) {
            return kernel_packed_size(kernel, k, n) * int64_t(sizeof(P) / sizeof(T));
        },
        [&](T* packed, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column) {
            kernel_pack(kernel, (P*)packed, k, n, b, b_row, b_column);
        },
        [&](int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column,
            const T* packed, int64_t packed_k, int64_t packed_n, float* c, int64_t c_row,
            bool accumulate) {
            kernel_packed_gemm(kernel, m, n, k, a, a_row, a_column, (const P*)packed, packed_k,
                               packed_n, c, c_row, accumulate);
        });
}

// oneDNN's too, even if gemm() does not choose it.
template <class S, class OUT> void check_onednn() {
    float one = 1;
    S a{one};
    OUT out{};
    if (!onednn_gemm(false, false, 1, 1, 1, &a, &a, &out, false, (const OUT*)nullptr)) return;
    check_all<S, OUT>([](bool ta, bool tb, int64_t m, int64_t n, int64_t k, const S* a, const S* b,
                         OUT* out, bool accumulate, const OUT* bias) {
        onednn_gemm(ta, tb, m, n, k, a, b, out, accumulate, bias);
    });
}

const Bf16Unit units[] = {Bf16Unit::none, Bf16Unit::avx512, Bf16Unit::amx};

} // namespace

TEST(Gemm, IsTheProductInEveryType) {
    check_all<double, double>(public_gemm<double, double>());
    check_all<float, float>(public_gemm<float, float>());
    check_all<bf16, bf16>(public_gemm<bf16, bf16>());
    check_all<bf16, float>(public_gemm<bf16, float>());
}

TEST(Gemm, IsTheProductWithEveryFloatKernel) {
    check_all<float, float>(gemm_by<float>(*float_kernel()));
    check_all<bf16, float>(gemm_by<float>(*widening_kernel()));
    check_all<bf16, bf16>(gemm_by<bf16>(*widening_kernel()));
}

TEST(Gemm, IsTheProductWithEveryBf16Unit) {
    for (Bf16Unit unit : units)
        if (const auto* kernel = unit <= bf16_unit() ? bf16_kernel(unit) : nullptr) {
            SCOPED_TRACE(kernel->name);
            check_all<bf16, float>(gemm_by<float>(*kernel));
            check_all<bf16, bf16>(gemm_by<bf16>(*kernel));
        }
}

TEST(Gemm, IsTheProductWithOneDnn) {
    check_onednn<float, float>();
    if (bf16_unit() == Bf16Unit::none) return;
    check_onednn<bf16, bf16>();
    check_onednn<bf16, float>();
}

TEST(Gemm, PackedIsTheProductInEveryType) {
    check_public_packed<double>();
    check_public_packed<float>();
    check_public_packed<bf16>();
}

TEST(Gemm, PackedIsTheProductWithEveryKernel) {
    check_packed_by(*float_kernel());
    check_packed_by(*widening_kernel());
    for (Bf16Unit unit : units)
        if (const auto* kernel = unit <= bf16_unit() ? bf16_kernel(unit) : nullptr) {
            SCOPED_TRACE(kernel->name);
            check_packed_by(*kernel);
        }
}

namespace {

// Every shape, with 1 and 2 threads.
template <class S, class OUT, class Gemm> void check_threads(Gemm product) {
    for (auto [m, n, k] : {std::array<int64_t, 3>{97, 130, 300}, {64, 48, 2100}, {520, 33, 70}})
        for (int form = 0; form < 4; form++) {
            const auto a = random_values<S>(m * k, 1), b = random_values<S>(k * n, 2);
            std::vector<OUT> out[2];
            for (int threads : {1, 2}) {
#ifdef _OPENMP
                omp_set_num_threads(threads);
#endif
                out[threads - 1].resize(m * n);
                product((form & 1) != 0, (form & 2) != 0, m, n, k, a.data(), b.data(),
                        out[threads - 1].data(), false, (const OUT*)nullptr);
            }
            EXPECT_EQ(std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(OUT)), 0)
                << describe({(form & 1) != 0, (form & 2) != 0, false, false}, m, n, k);
        }
}

// Non-finite values in a row of a or a column of b affect only that row or column.
template <class S, class OUT, class Gemm> void check_containment(Gemm product) {
    for (int form = 0; form < 4; form++)
        for (float poison :
             {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            const int64_t m = 45, n = 37, k = 43, row = 31, column = 17;
            const bool ta = form & 1, tb = form & 2;
            auto a = random_values<S>(m * k, 1), b = random_values<S>(k * n, 2);
            for (int64_t p = 0; p < k; p++) {
                a[ta ? p * m + row : row * k + p] = S(poison);
                b[tb ? column * k + p : p * n + column] = S(poison);
            }
            std::vector<OUT> out(m * n);
            product(ta, tb, m, n, k, a.data(), b.data(), out.data(), false, (const OUT*)nullptr);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    EXPECT_EQ(std::isfinite(float(out[i * n + j])), i != row && j != column)
                        << i << ", " << j;
        }
}

template <class S, class OUT, class Gemm> void check_bits(Gemm product) {
    check_threads<S, OUT>(product);
    check_containment<S, OUT>(product);
}

} // namespace

TEST(Gemm, ThreadsDoNotChangeBitsAndNansStayInTheirRows) {
    check_bits<double, double>(public_gemm<double, double>());
    check_bits<float, float>(public_gemm<float, float>());
    check_bits<bf16, bf16>(public_gemm<bf16, bf16>());
    check_bits<bf16, float>(public_gemm<bf16, float>());
    check_bits<float, float>(gemm_by<float>(*float_kernel()));
    check_bits<bf16, float>(gemm_by<float>(*widening_kernel()));
    for (Bf16Unit unit : units)
        if (const auto* kernel = unit <= bf16_unit() ? bf16_kernel(unit) : nullptr) {
            check_bits<bf16, float>(gemm_by<float>(*kernel));
            check_bits<bf16, bf16>(gemm_by<bf16>(*kernel));
        }
}
