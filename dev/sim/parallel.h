// A pool of host threads for a grid's blocks. OpenMP's wait in a busy loop, which costs more than
// the small kernels of a test.
#pragma once

#include <cstdint>
#include <functional>

namespace lns::sim {

// Calls work(0) … work(n - 1), started in this order, by as many threads as the machine has
// processors, or LNS_SIM_THREADS. Returns when all have ended. work must not throw.
void parallel_for(int64_t n, const std::function<void(int64_t)>& work);

} // namespace lns::sim
