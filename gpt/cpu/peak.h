// The machine's peak FLOP/s and bandwidth, the denominators of MFU and of kernels' speeds. Measured
// on the given number of OpenMP threads as the best of several short rounds; other programs that
// run at the same time lower them.
#pragma once

#include <cstdint>
#include <string>

#include "gpt/model/model.h"

namespace lns {

// FLOP/s of float32 multiply-adds in registers, with this build's instruction set (-march). Takes
// about 0.1 s.
double measured_peak_flops(int threads);

// FLOP/s of bf16 matmuls with float32 accumulators by bf16_unit(): AMX tiles, VDPBF16PS or, without
// either, float32 multiply-adds.
double measured_bf16_flops(int threads);

// FLOP/s of dense bf16 matmuls with float32 accumulators from the data sheet of the GPU with this
// CUDA name; 0 if unknown.
double data_sheet_bf16_flops(const std::string& gpu);

// Whether another program disturbed the measurement of a peak: it is below half of the data sheet's
// (0: unknown), and should not serve as a denominator.
inline bool was_disturbed(double measured, double data_sheet) { return measured < data_sheet / 2; }

inline double measured_peak(DType dtype, int threads) {
    return dtype == DType::bf16 ? measured_bf16_flops(threads) : measured_peak_flops(threads);
}

// Bytes per second to and from memory beyond the caches; 0 if memory is too small to measure.
struct Bandwidth {
    double read = 0;   // bytes read
    double write = 0;  // bytes written by plain stores, for which the CPU also reads each line
    double update = 0; // bytes read plus bytes written by x ← a·x + b in place
};
// Allocates `bytes`, but at most an eighth of the machine's memory. Takes about 0.5 s.
Bandwidth measured_bandwidth(int threads, int64_t bytes = int64_t(512) << 20);

} // namespace lns
