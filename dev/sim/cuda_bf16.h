// Stands in for CUDA's header of this name: bf16, rounded to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "dev/sim/cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
    unsigned short __x;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        unsigned bits = __float_as_uint(x);
        if ((bits & 0x7FFFFFFF) > 0x7F800000) {
            __x = 0x7FFF; // CUDA has one NaN
        } else {
            bits += 0x7FFF + (bits >> 16 & 1);
            __x = static_cast<unsigned short>(bits >> 16);
        }
    }
    __nv_bfloat16(double x) : __nv_bfloat16(float(x)) {}
    __nv_bfloat16(int x) : __nv_bfloat16(float(x)) {}
    __nv_bfloat16(unsigned x) : __nv_bfloat16(float(x)) {}
    __nv_bfloat16(long x) : __nv_bfloat16(float(x)) {}
    __nv_bfloat16(unsigned long x) : __nv_bfloat16(float(x)) {}
    operator float() const { return __uint_as_float(unsigned(__x) << 16); }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return {x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {x}; }
inline __nv_bfloat16 __double2bfloat16(double x) { return {x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {{x}, {y}}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {{x}, {x}}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {{x.x}, {x.y}}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {float(x.x), float(x.y)}; }
inline float __low2float(__nv_bfloat162 x) { return float(x.x); }
inline float __high2float(__nv_bfloat162 x) { return float(x.y); }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 x) { return x.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 x) { return x.y; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }
inline short __bfloat16_as_short(__nv_bfloat16 x) { return short(x.__x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 x;
    x.__x = bits;
    return x;
}

inline __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) { return {float(a) + float(b)}; }
inline __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) { return {float(a) - float(b)}; }
inline __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) { return {float(a) * float(b)}; }
inline __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) { return {float(a) / float(b)}; }
inline __nv_bfloat16 operator-(__nv_bfloat16 a) { return {-float(a)}; }
inline __nv_bfloat16& operator+=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a + b; }
inline __nv_bfloat16& operator-=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a - b; }
inline __nv_bfloat16& operator*=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a * b; }
inline __nv_bfloat16& operator/=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a / b; }
