#include "gpt/cpu/peak.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <unistd.h>

#include "gpt/base/clock.h"
#include "gpt/base/random.h"
#include "gpt/cpu/bf16.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lns {

namespace {

// A vector register, as a vector type of GCC and Clang.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(vector_bytes)));
constexpr int floats = vector_bytes / int(sizeof(float));

// A loop of arithmetic in registers. Its result is used, so that compilers keep the loop.
struct Work {
    float (*run)(int64_t rounds);
    double flops; // per round
};

// Twelve chains of dependent multiply-adds: enough to fill two units with latencies of 4 to 5
// cycles, few enough for 16 registers. The attribute keeps Clang from using half-width registers.
#if defined(__clang__) && defined(__x86_64__)
__attribute__((min_vector_width(512)))
#endif
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

#if defined(__x86_64__)
// Twelve chains of VDPBF16PS, each adding 2 products to each of 16 floats.
__attribute__((target("avx512f,avx512bf16"))) float dot_products(int64_t rounds) {
    __m512 r[12];
    for (int i = 0; i < 12; i++) r[i] = _mm512_set1_ps(float(i));
    const __m512bh a = _mm512_cvtne2ps_pbh(r[1], r[1]), b = _mm512_cvtne2ps_pbh(r[2], r[2]);
    for (int64_t n = 0; n < rounds; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) r[i] = _mm512_dpbf16_ps(r[i], a, b);
    }
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += _mm512_cvtss_f32(r[i]);
    return sum;
}

// The 8 tiles as in a matmul: 4 accumulators of 16 x 16 floats for the 2 x 2 products of 16 x 32 by
// 32 x 16 tiles. Operands are random, as in models: with zeros or ones a Xeon of 2024 draws less
// power and runs a quarter faster.
__attribute__((target("amx-tile,amx-bf16"))) float tile_products(int64_t rounds) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    alignas(64) bf16 operands[4][16 * 32];
    alignas(64) float sum[16 * 16];
    for (int i = 0; i < 4 * 16 * 32; i++) // uniform in (-1, 1)
        operands[i / 512][i % 512] = float(mix_bits(uint32_t(i + 1))) * 0x1p-31f - 1.0f;
    asm volatile("" ::"r"(operands) : "memory"); // GCC 12 misses that _tile_loadd reads memory
    // With _tile_loadconfig, GCC 12 drops the stores that fill the configuration.
    asm volatile("ldtilecfg %0" ::"m"(config));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, operands[0], 64);
    _tile_loadd(5, operands[1], 64);
    _tile_loadd(6, operands[2], 64);
    _tile_loadd(7, operands[3], 64);
    for (int64_t n = 0; n < rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, 64);
    _tile_release();
    return sum[0];
}
#endif

double measured_flops(const Work& work, int threads) {
    volatile float sink = 0;
    auto seconds_of = [&](int64_t rounds) {
        const double start = now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            float result = work.run(rounds);
#pragma omp critical
            sink = sink + result;
        }
        return now() - start;
    };

    int64_t rounds = 1 << 14;
    double seconds = seconds_of(rounds); // also starts the threads
    while ((seconds = seconds_of(rounds)) < 0.01 && rounds < (int64_t(1) << 32)) rounds *= 2;
    for (int i = 0; i < 4; i++) seconds = std::min(seconds, seconds_of(rounds));
    return double(threads) * double(rounds) * work.flops / seconds;
}

float read_all(Vector* x, int64_t n) {
    Vector sum[8] = {};
    for (int64_t i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += x[i + j];
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    return sum[0][0];
}

float write_all(Vector* x, int64_t n) {
    volatile float value = 0.999f; // its bytes differ, so that compilers do not call memset
    const Vector v = Vector{} + value;
    for (int64_t i = 0; i < n; i++) x[i] = v;
    return x[n - 1][0];
}

float update_all(Vector* x, int64_t n) {
    volatile float factor = 0.999f, term = 1e-3f;
    const Vector a = Vector{} + factor, b = Vector{} + term;
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * a + b;
    return x[n - 1][0];
}

} // namespace

double measured_peak_flops(int threads) {
    return measured_flops({multiply_adds, 12 * floats * 2}, threads);
}

double measured_bf16_flops(int threads) {
#if defined(__x86_64__)
    switch (bf16_unit()) {
    case Bf16Unit::amx:
        return measured_flops({tile_products, 4 * 16 * 16 * 32 * 2}, threads);
    case Bf16Unit::avx512:
        return measured_flops({dot_products, 12 * 16 * 2 * 2}, threads);
    case Bf16Unit::none:
        break;
    }
#endif
    return measured_peak_flops(threads);
}

double data_sheet_bf16_flops(const std::string& gpu) {
    // Half of the data sheet's figure if that assumes sparsity. The first matching row counts, so
    // longer names come first. Slower boards of the same name (Max-Q, laptops) and parts of a GPU
    // (MIG) are unknown.
    struct Row {
        const char* words;
        double tflops;
    };
    static const Row table[] = {
        {"B200", 2250},              // NVIDIA DGX B200 data sheet: 36 PFLOPS with sparsity of 8
        {"GB200", 2500},             // NVIDIA GB200 NVL72: 360 PFLOPS with sparsity of 72
        {"H200 NVL", 835.5},         // NVIDIA H200 data sheet: 1,671 with sparsity
        {"H200", 989.4},             // NVIDIA H200 data sheet, SXM: 1,979 with sparsity
        {"GH200", 989.4},            // NVIDIA GH200 data sheet: 1,979 with sparsity
        {"H100 PCIe", 756},          // NVIDIA H100 data sheet: 1,513 with sparsity
        {"H100 NVL", 835.5},         // NVIDIA H100 NVL product brief: 1,671 with sparsity
        {"H100", 989.4},             // NVIDIA H100 data sheet, SXM: 1,979 with sparsity
        {"H20", 148},                // NVIDIA H20 data sheet
        {"A100", 312},               // NVIDIA A100 data sheet, all of its boards
        {"A40", 149.7},              // NVIDIA A40 data sheet
        {"A30", 165},                // NVIDIA A30 data sheet
        {"A10", 125},                // NVIDIA A10 data sheet
        {"L40S", 362.05},            // NVIDIA L40S data sheet
        {"L40", 181.05},             // NVIDIA L40 data sheet
        {"L4", 121},                 // NVIDIA L4 data sheet: 242 with sparsity
        {"RTX A6000", 154.8},        // NVIDIA Ampere GA102 whitepaper, appendix A
        {"RTX 6000 Ada", 364.2},     // NVIDIA RTX 6000 Ada data sheet: 1,457 of FP8 with sparsity
        {"GeForce RTX 3090", 71},    // NVIDIA Ampere GA102 whitepaper, appendix A
        {"GeForce RTX 4080", 97.5},  // NVIDIA Ada GPU architecture whitepaper, appendix A
        {"GeForce RTX 4090", 165.2}, // NVIDIA Ada GPU architecture whitepaper, appendix A
        {"GeForce RTX 5090", 209.5}, // NVIDIA RTX Blackwell GPU architecture whitepaper, appendix
    };
    // "NVIDIA A100-SXM4-80GB" has the words NVIDIA, A100, SXM4, 80GB.
    std::string name = " " + gpu + " ";
    std::replace(name.begin(), name.end(), '-', ' ');
    auto has = [&](const std::string& word) { return name.find(" " + word + " ") != name.npos; };
    for (const char* other : {"MIG", "Laptop", "Max Q", "D", "Ti", "SUPER"})
        if (has(other)) return 0;
    for (const Row& row : table) {
        std::istringstream words(row.words);
        bool all = true;
        for (std::string word; words >> word;) all = all && has(word);
        if (all) return row.tflops * 1e12;
    }
    return 0;
}

Bandwidth measured_bandwidth(int threads, int64_t bytes) {
#ifdef _SC_PHYS_PAGES
    bytes = std::min(bytes, int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE) / 8);
#endif
    const int64_t part = bytes / threads / 4096 * 4096; // per thread
    if (part < 4096) return {};
    std::unique_ptr<void, decltype(&std::free)> memory(
        std::aligned_alloc(4096, size_t(part) * size_t(threads)), std::free);
    if (!memory) return {};

    volatile float sink = 0;
    auto rate = [&](float (*pass)(Vector*, int64_t), int accesses) {
        double best = 0;
        for (int round = 0; round < 3; round++) {
            const double start = now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
            for (int t = 0; t < threads; t++) {
                Vector* x = reinterpret_cast<Vector*>(static_cast<char*>(memory.get()) + t * part);
                float result = pass(x, part / vector_bytes);
#pragma omp critical
                sink = sink + result;
            }
            best = std::max(best, double(accesses) * double(part) * threads / (now() - start));
        }
        return best;
    };
    Bandwidth result;
    result.write = rate(write_all, 1); // first, since pages are allocated when first written
    result.read = rate(read_all, 1);
    result.update = rate(update_all, 2);
    return result;
}

} // namespace lns
