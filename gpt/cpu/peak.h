// What this machine can do at most: what MFU and a kernel's speed are fractions of. Everything is
// measured, on that many OpenMP threads at once, with short rounds of which the best counts; other
// work on the machine lowers it.
#pragma once

#include <cstdint>
#include <string>

#include "gpt/model/model.h"

namespace lns {

// FLOP/s of float32 multiply-adds in registers, with the instructions that this build may use
// (-march), in about 0.1 s.
double measured_peak_flops(int threads);

// FLOP/s of products of bf16 summed in float32, by bf16_unit(): AMX tiles, VDPBF16PS, or without
// either those of float32, which then take their place.
double measured_bf16_flops(int threads);

// FLOP/s of dense bf16 products summed in float32, by the data sheet of the GPU that CUDA calls so;
// 0 if it is not in our table.
double data_sheet_bf16_flops(const std::string& gpu);

// Whether a peak was measured while something else used the GPU: below half of the data sheet's
// (0: not known), and nothing should be called a percentage of it.
inline bool was_disturbed(double measured, double data_sheet) { return measured < data_sheet / 2; }

inline double measured_peak(DType dtype, int threads) {
    return dtype == DType::bf16 ? measured_bf16_flops(threads) : measured_peak_flops(threads);
}

// Bytes a second to and from memory that no cache holds; each 0 where memory is too short to tell.
struct Bandwidth {
    double read = 0;   // bytes read
    double write = 0;  // bytes written by plain stores, before which the CPU also reads each line
    double update = 0; // bytes read and bytes written, of x ← a·x + b in place
};
// Takes memory of `bytes` while it runs, but at most an eighth of the machine's, and about 0.5 s.
Bandwidth measured_bandwidth(int threads, int64_t bytes = int64_t(512) << 20);

} // namespace lns
