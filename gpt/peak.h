// How many float32 operations a second this machine can do at most: what MFU is a fraction of.
#pragma once

namespace lns {

// FLOP/s of multiply-adds in registers, with the instructions that this build may use (-march), on
// that many OpenMP threads at once: the best of
// several short rounds, about 0.1 s in all. Other work on the machine lowers it.
double measured_peak_flops(int threads);

inline double measured_bandwidth(int) { return 25e9; }
} // namespace lns
