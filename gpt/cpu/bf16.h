// bfloat16: the sign and exponent of float32 and the first 7 bits of its fraction. That makes 8
// significant bits, so rounding to nearest has a relative error of at most 1/256.
#pragma once

#include <bit>
#include <cstdint>

namespace lns {

// To nearest, ties to even; infinities and NaN stay. Without branches, so that loops vectorize.
inline uint16_t round_to_bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    const uint32_t nan = u >> 16 | 0x40;
    return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

// In loops assign floats, x[i] = value: compilers vectorize that, but not copies of structs as in
// x[i] = bf16(value).
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

// Up or down with the probabilities that make the mean exact. random: 16 random bits. Infinities
// and NaN are truncated.
inline uint16_t round_stochastically(float x, uint32_t random) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t finite = (u & 0x7F800000) == 0x7F800000 ? 0 : random & 0xFFFF;
    return uint16_t((u + finite) >> 16);
}

// This CPU's unit for bf16 matmuls. LNS_BF16=none, avx512 or amx in the environment selects a
// lesser one, to test the code of other machines.
enum class Bf16Unit {
    none,   // float32 instead
    avx512, // VDPBF16PS of AVX512-BF16
    amx,    // TDPBF16PS of AMX-BF16
};
Bf16Unit bf16_unit();
const char* name_of(Bf16Unit unit); // "none", "AVX512-BF16", "AMX-BF16"

} // namespace lns
