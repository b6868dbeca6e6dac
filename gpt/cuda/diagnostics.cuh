// Statistics of rows of C channels for layer diagnostics, in double. A warp owns a row and reads it
// twice, the second time from a cache.
#pragma once

#include <cmath>

// defines: warp, load8, warp_sum, blocks_for
#include "gpt/cuda/kernel.cuh"
#include "gpt/model/model.h"

namespace lns::cuda {

const int diagnosed_rows = 8; // of a block

// Calls f with pairs of this lane's elements of two rows; y may be null.
template <class X, class Y, class F>
__device__ inline void each_pair(const X* x, const Y* y, int C, const F& f) {
    for (int i = threadIdx.x % warp * 8; i < C; i += 8 * warp) {
        float a[8], b[8] = {};
        load8(a, x + i);
        if (y) load8(b, y + i);
        for (int k = 0; k < 8; k++) f(a[k], b[k]);
    }
}

// moments (rows) of each row of x − skip · before; before may be null.
template <class X>
__global__ static void row_moments_kernel(Moments* moments, const X* x, const float* before,
                                          float skip, int64_t rows, int C) {
    const int64_t row = int64_t(blockIdx.x) * diagnosed_rows + threadIdx.x / warp;
    if (row >= rows) return;
    auto each = [&](const auto& f) {
        each_pair(x + row * C, before ? before + row * C : nullptr, C,
                  [&](float value, float old) { f(double(before ? value - skip * old : value)); });
    };
    double sum = 0, square = 0;
    each([&](double value) { sum += value; });
    const double mean = warp_sum(sum) / C;
    each([&](double value) { square += (value - mean) * (value - mean); });
    square = warp_sum(square);
    if (threadIdx.x % warp == 0) moments[row] = {double(C), mean, square};
}
template <class X>
void row_moments(Moments* moments, const X* x, const float* before, float skip, int64_t rows, int C,
                 cudaStream_t stream) {
    launch(row_moments_kernel<X>, blocks_for(rows, diagnosed_rows), diagnosed_rows * warp, 0,
           stream, moments, x, before, skip, rows, C);
}

// chords (rows): ‖a/‖a‖ − b/‖b‖‖² of each row, exactly 0 where a and b are equal.
__global__ static void row_chords_kernel(double* chords, const float* a, const float* b,
                                         int64_t rows, int C) {
    const int64_t row = int64_t(blockIdx.x) * diagnosed_rows + threadIdx.x / warp;
    if (row >= rows) return;
    auto each = [&](const auto& f) {
        each_pair(a + row * C, b + row * C, C, [&](float x, float y) { f(double(x), double(y)); });
    };
    double aa = 0, bb = 0, difference = 0;
    each([&](double x, double y) { aa += x * x, bb += y * y; });
    aa = warp_sum(aa), bb = warp_sum(bb);
    const double ratio = bb > 0 ? sqrt(aa / bb) : 0;
    each([&](double x, double y) { difference += (x - ratio * y) * (x - ratio * y); });
    difference = warp_sum(difference);
    if (threadIdx.x % warp == 0) chords[row] = aa > 0 ? difference / aa : double(bb > 0);
}
inline void row_chords(double* chords, const float* a, const float* b, int64_t rows, int C,
                       cudaStream_t stream) {
    launch(row_chords_kernel, blocks_for(rows, diagnosed_rows), diagnosed_rows * warp, 0, stream,
           chords, a, b, rows, C);
}

template <class X> __global__ static void find_nonfinite_kernel(int* found, const X* x, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        if (!std::isfinite(float(x[i]))) *found = 1; // every writer writes the same
}
// Sets *found, on the GPU, to whether one of x (n) is not finite.
template <class X> void find_nonfinite(int* found, const X* x, int64_t n, cudaStream_t stream) {
    CUDA(cudaMemsetAsync(found, 0, sizeof(int), stream));
    launch(find_nonfinite_kernel<X>, 256, 256, 0, stream, found, x, n);
}

} // namespace lns::cuda
