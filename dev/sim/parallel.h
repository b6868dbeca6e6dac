// The host's threads that share a grid's blocks. OpenMP's wait in a busy loop, which costs more
// than the small kernels of a test.
#pragma once

#include <cstdint>
#include <functional>

namespace lns::sim {

// work(0) … work(n - 1), begun in this order, by as many threads as the machine has processors
// (LNS_SIM_THREADS: another number). Returns when all have ended. work throws nothing.
void parallel_for(int64_t n, const std::function<void(int64_t)>& work);

} // namespace lns::sim
