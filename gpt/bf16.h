// bfloat16: the sign and exponent of float32 and the first 7 bits of its fraction. With the leading
// 1 that makes 8 significant bits, so rounding to nearest is off by at most 1/256.
#pragma once

#include <bit>
#include <cstdint>

namespace lns {

struct bf16 {
    uint16_t bits = 0;

    bf16() = default;
    // To nearest, halves to even; infinities stay, NaN stays NaN. Without branches: loops
    // vectorize.
    explicit bf16(float x) {
        const uint32_t u = std::bit_cast<uint32_t>(x);
        const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
        const uint32_t nan = u >> 16 | 0x40;
        bits = uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
    }
    explicit bf16(double x) : bf16(float(x)) {}
    explicit bf16(int x) : bf16(float(x)) {}
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// Rounds up or down with the probabilities that make the mean exact. random: 16 random bits.
inline bf16 round_stochastic(float x, uint32_t random) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    if ((u & 0x7F800000) == 0x7F800000) return bf16(x); // not finite
    bf16 y;
    y.bits = uint16_t((u + (random & 0xFFFF)) >> 16);
    return y;
}

// What this CPU has for matrix products of bf16. LNS_BF16=none, avx512 or amx in the environment
// lowers it (never raises it), to try on one machine what another does.
enum class Bf16Unit {
    none,   // products are taken in float32
    avx512, // VDPBF16PS of AVX512-BF16
    amx,    // TDPBF16PS of AMX-BF16
};
Bf16Unit bf16_unit();
const char* name_of(Bf16Unit unit); // "none", "AVX512-BF16", "AMX-BF16"

} // namespace lns
