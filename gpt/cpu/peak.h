// This machine's peaks, to which MFU and the speed of kernels are compared. Measured on all threads
// at once as the best of several short rounds; other work on the machine lowers them.
#pragma once

#include <cstdint>
#include <string>

#include "gpt/model/model.h"

namespace lns {

// FLOP/s of float32 multiply-adds in registers, with the instructions that this build may use
// (-march), in about 0.1 s.
double measured_peak_flops(int threads);

// FLOP/s of bf16 matmuls with float32 accumulators, by bf16_unit(): AMX tiles, VDPBF16PS, or
// without either float32.
double measured_bf16_flops(int threads);

// FLOP/s of dense bf16 matmuls by the data sheet of the GPU with this name in CUDA; 0 if unknown.
double data_sheet_bf16_flops(const std::string& gpu);

// Whether another program used the GPU while a peak was measured: it is below half of the data
// sheet's (0: unknown), and no percentage of it is meaningful.
inline bool was_disturbed(double measured, double data_sheet) { return measured < data_sheet / 2; }

inline double measured_peak(DType dtype, int threads) {
    return dtype == DType::bf16 ? measured_bf16_flops(threads) : measured_peak_flops(threads);
}

// Bytes a second to and from memory, beyond the caches; 0 if there is too little memory to measure.
struct Bandwidth {
    double read = 0;   // bytes read
    double write = 0;  // bytes written by plain stores; the CPU also reads each line
    double update = 0; // bytes read and bytes written, of x ← a·x + b in place
};
// Uses `bytes` of memory, at most an eighth of the machine's, and takes about 0.5 s.
Bandwidth measured_bandwidth(int threads, int64_t bytes = int64_t(512) << 20);

} // namespace lns
