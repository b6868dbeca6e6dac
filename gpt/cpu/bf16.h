// bfloat16: the upper half of a float32, with the sign, the exponent and 7 bits of the fraction.
// With the implicit leading 1 these are 8 significant bits: the relative error is at most 1/256.
#pragma once

#include <bit>
#include <cstdint>

namespace lns {

// Rounds to nearest even; keeps infinities and NaN. Branchless, so that loops vectorize.
inline uint16_t round_to_bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    const uint32_t nan = u >> 16 | 0x40;
    return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

// In loops over arrays write x[i] = value, which compilers vectorize, and not x[i] = bf16(value),
// which copies structs.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    explicit bf16(float x) : bits(round_to_bf16(x)) {}
    bf16& operator=(float x) {
        bits = round_to_bf16(x);
        return *this;
    }
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// Rounds up or down so that the expected value is x. random: 16 random bits. Infinities and NaN are
// truncated.
inline uint16_t round_stochastically(float x, uint32_t random) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t noise = (u & 0x7F800000) == 0x7F800000 ? 0 : random & 0xFFFF;
    return uint16_t((u + noise) >> 16);
}

// The CPU's unit for bf16 matmuls. LNS_BF16=none, avx512 or amx in the environment lowers it (never
// raises it), to try out what other machines do.
enum class Bf16Unit {
    none,   // computed in float32
    avx512, // VDPBF16PS of AVX512-BF16
    amx,    // TDPBF16PS of AMX-BF16
};
Bf16Unit bf16_unit();
const char* name_of(Bf16Unit unit); // "none", "AVX512-BF16", "AMX-BF16"

} // namespace lns
