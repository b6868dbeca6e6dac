// The simulator's half of gpt/cuda/cuda.h: the same names for kernels that run on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dev/sim/sim.h"

namespace lns::cuda {

template <class T> constexpr size_t shared_bytes(size_t n);

// A block's shared memory, each array between red zones.
struct SharedMemory {
    int arrays = 0;

    template <class T> T* take(int n) {
        return static_cast<T*>(sim::take_shared(arrays++, size_t(n) * sizeof(T)));
    }
};

inline uint32_t shared_address(const void* pointer) { return sim::shared_offset(pointer); }

inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }
inline float fast_exp2(float x) { return flush_subnormal(exp2f(flush_subnormal(x))); }
inline float fast_log2(float x) { return flush_subnormal(log2f(flush_subnormal(x))); }

inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    std::memcpy(&bits, &both, sizeof bits);
    return bits;
}

struct MatrixLoad {
    uint32_t* out;
    const void* row;
};

// A lane's `row` is row lane % 8 of matrix lane / 8.
inline uint32_t matrix_number(const sim::Lanes& lanes, int matrix, int row, int column) {
    const auto& lane = *static_cast<MatrixLoad*>(lanes.operands[8 * matrix + row]);
    return static_cast<const uint16_t*>(lane.row)[column];
}

inline void check_matrix_row(const char* name, const void* row) {
    if (sim::shared_offset(row) % 16)
        sim::fail_in_kernel(cat(name, ": the row at ", row, " is not aligned to 16 bytes"));
}

inline void ldmatrix(uint32_t (&out)[4], const void* row, sim::Site where = sim::here()) {
    check_matrix_row("ldmatrix", row);
    MatrixLoad mine = {out, row};
    sim::meet("ldmatrix", where, 0xFFFFFFFFu, &mine, [](const sim::Lanes& lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < 4; m++)
                static_cast<MatrixLoad*>(lanes.operands[lane])->out[m] =
                    matrix_number(lanes, m, lane / 4, 2 * (lane % 4)) |
                    matrix_number(lanes, m, lane / 4, 2 * (lane % 4) + 1) << 16;
    });
}
inline void ldmatrix_transposed(uint32_t (&out)[4], const void* row,
                                sim::Site where = sim::here()) {
    check_matrix_row("ldmatrix_transposed", row);
    MatrixLoad mine = {out, row};
    sim::meet("ldmatrix_transposed", where, 0xFFFFFFFFu, &mine, [](const sim::Lanes& lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < 4; m++)
                static_cast<MatrixLoad*>(lanes.operands[lane])->out[m] =
                    matrix_number(lanes, m, 2 * (lane % 4), lane / 4) |
                    matrix_number(lanes, m, 2 * (lane % 4) + 1, lane / 4) << 16;
    });
}

struct MatrixProduct {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                sim::Site where = sim::here()) {
    MatrixProduct mine = {d, a, {b0, b1}};
    sim::meet("mma", where, 0xFFFFFFFFu, &mine, [](const sim::Lanes& lanes) {
        auto low = [](uint32_t two) { return __uint_as_float(two << 16); };
        auto high = [](uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); };
        // PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
        float A[16][16], B[16][8], D[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const auto& of = *static_cast<MatrixProduct*>(lanes.operands[lane]);
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int i = 0; i < 4; i++) {
                float* row = A[group + i % 2 * 8] + pair + i / 2 * 8;
                row[0] = low(of.a[i]), row[1] = high(of.a[i]);
            }
            for (int i = 0; i < 2; i++) {
                B[pair + 8 * i][group] = low(of.b[i]);
                B[pair + 8 * i + 1][group] = high(of.b[i]);
            }
            for (int i = 0; i < 4; i++) D[group + i / 2 * 8][pair + i % 2] = of.d[i];
        }
        sim::multiply_add(D[0], A[0], B[0], 16, 8, 16);
        for (int lane = 0; lane < 32; lane++) {
            const auto& of = *static_cast<MatrixProduct*>(lanes.operands[lane]);
            for (int i = 0; i < 4; i++) of.d[i] = D[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
        }
    });
}

template <int BYTES = 16>
inline void copy_async(void* shared, const void* global, bool valid = true) {
    sim::copy_later(shared, global, BYTES, valid);
}
inline void copy_async_commit() { sim::copy_commit(); }
template <int N> inline void copy_async_wait() { sim::copy_wait(N); }

} // namespace lns::cuda
