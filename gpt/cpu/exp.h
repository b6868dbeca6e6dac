// eˣ and what is made of it, for loops that vectorize.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

namespace lns {

// eˣ for x ≤ 88 to 2 units in the last place, without calls or branches: x = n ln 2 + f with
// |f| ≤ ln 2 / 2, and a polynomial for eᶠ (Cephes' coefficients). It is 0 below −87.6 and never
// subnormal, which would cost a CPU a hundred cycles. NaN stays NaN.
inline float exp_below(float x) {
    x = x < -200.0f ? -200.0f : x;
    const float shifter = 12582912.0f; // 1.5 · 2²³: adding it rounds to an integer
    float shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int exponent = std::bit_cast<int>(shifted) - (std::bit_cast<int>(shifter) - 127);
    exponent = exponent < 0 ? 0 : exponent;
    return p * std::bit_cast<float>(exponent << 23); // p · 2ⁿ
}
inline double exp_below(double x) { return std::exp(x); }

// eˣ for any x. Overflow returns infinity; a clamp would make compilers compute a slow subnormal
// reciprocal per element.
inline float exp_(float x) {
    const float limit = 88.3f, e = exp_below(x > limit ? limit : x);
    return x > limit ? std::numeric_limits<float>::infinity() : e;
}
inline double exp_(double x) { return std::exp(x); }

template <class A> inline A sigmoid(A x) { return A(1) / (A(1) + exp_(-x)); }
template <class A> inline A silu(A x) { return x * sigmoid(x); }
template <class A> inline A dsilu(A x) {
    A s = sigmoid(x);
    return s * (A(1) + x * (A(1) - s));
}

// tanh to 3 units in the last place: a polynomial near 0, by eˣ elsewhere (Cephes' coefficients).
inline float tanh_(float x) {
    const float size = std::fabs(x), square = x * x;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float far = 1.0f - 2.0f / (exp_below(2.0f * (size > 40.0f ? 40.0f : size)) + 1.0f);
    return size < 0.625f ? p * square * x + x : std::copysign(far, x);
}
inline double tanh_(double x) { return std::tanh(x); }

} // namespace lns
