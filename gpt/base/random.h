// Counter-based random numbers: number i of a stream is a pure function of (seed, stream, i), and
// does not depend on the threads that draw it or their order.
// Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace lns {

inline std::array<uint32_t, 4> philox(uint64_t key, uint64_t high, uint64_t low) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    std::array<uint32_t, 4> c = {uint32_t(low), uint32_t(low >> 32), uint32_t(high),
                                 uint32_t(high >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
        c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1,
             uint32_t(a)};
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return c;
}

// 64-bit FNV-1a, to name streams and fingerprint files.
inline uint64_t fnv1a(std::string_view bytes, uint64_t hash = 0xcbf29ce484222325) {
    for (unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3;
    return hash;
}

// 32 bits that depend on every bit of x, in a few instructions that vectorize (an integer hash with
// the constants of Wellons' hash-prospector).
constexpr uint32_t mix_bits(uint32_t x) {
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

// 64 uniform bits.
inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t i) {
    std::array<uint32_t, 4> c = philox(seed, stream, i);
    return uint64_t(c[0]) << 32 | c[1];
}

// Uniform in [0, 1), 53 bits.
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t i) {
    return double(random_bits(seed, stream, i) >> 11) * 0x1p-53;
}

// Uniform in 0 .. n-1 (n < 2^32; the bias is below n / 2^64).
inline uint32_t random_below(uint32_t n, uint64_t seed, uint64_t stream, uint64_t i) {
    return uint32_t((unsigned __int128)(random_bits(seed, stream, i)) * n >> 64);
}

// Standard normal, by the Box-Muller transform of one Philox block.
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t i) {
    std::array<uint32_t, 4> c = philox(seed, stream, i);
    double u = (double(uint64_t(c[0]) << 32 | c[1]) + 0.5) * 0x1p-64;
    double v = double(uint64_t(c[2]) << 32 | c[3]) * 0x1p-64;
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * 3.14159265358979323846 * v);
}

} // namespace lns
