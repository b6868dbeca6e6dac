// How many threads this process should use.
#pragma once

#include <string>

namespace lns {

// The first number of OMP_NUM_THREADS or OMP_THREAD_LIMIT, such as "4" or "4,2"; 0 if invalid.
int omp_threads(const std::string& value);

// The number of usable cores, limited by the control group's quota (rounded down: threads that wait
// for each other stall when the quota is used up), OMP_NUM_THREADS and OMP_THREAD_LIMIT; at least
// 1. Notes invalid variables on stderr, once.
int default_threads();

} // namespace lns
