#include "gpt/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lns {

namespace {

// One register's floats; GCC and Clang turn the arithmetic into the machine's instructions.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(vector_bytes)));
constexpr int floats = vector_bytes / int(sizeof(float));

// Twelve chains of dependent multiply-adds: enough to fill two units of 4 to 5 cycles' latency,
// few enough for 16 registers. The result is used, so that the loop is not dropped.
float multiply_adds(int64_t rounds) {
    Vector r[12];
    for (int i = 0; i < 12; i++) r[i] = Vector{} + float(i);
    volatile float factor = 0.999f, term = 1e-3f;
    Vector a = Vector{} + factor, b = Vector{} + term;
    for (int64_t n = 0; n < rounds; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) r[i] = r[i] * a + b;
    }
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += r[i][0];
    return sum;
}

} // namespace

double measured_peak_flops(int threads) {
    using clock = std::chrono::steady_clock;
    volatile float sink = 0;
    auto seconds_of = [&](int64_t rounds) {
        auto start = clock::now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            float result = multiply_adds(rounds);
#pragma omp critical
            sink = sink + result;
        }
        return std::chrono::duration<double>(clock::now() - start).count();
    };

    int64_t rounds = 1 << 16;
    double seconds = seconds_of(rounds); // starts the threads
    while ((seconds = seconds_of(rounds)) < 0.01 && rounds < (int64_t(1) << 32)) rounds *= 2;
    for (int i = 0; i < 4; i++) seconds = std::min(seconds, seconds_of(rounds));
    return double(threads) * double(rounds) * 12 * floats * 2 / seconds;
}

} // namespace lns
