// How many threads this process should use.
#pragma once

#include <string>

namespace lns {

// CPUs that the control groups of this process give it (cpu.max of version 2, cpu.cfs_quota_us of
// version 1), the smallest quota of all that enclose it; infinity without one. `root` stands before
// /proc and /sys.
double cgroup_cpus(const std::string& root = "");

// The first number of OMP_NUM_THREADS or OMP_THREAD_LIMIT, as "4" or "4,2"; 0 if it is not one.
int omp_threads(const std::string& value);

// The usable cores, no more than the control group's quota (rounded down: threads that wait for
// each other stall when one has used up its share), OMP_NUM_THREADS and OMP_THREAD_LIMIT. At least
// 1. Says once on stderr that it ignores a variable that is no number.
int default_threads();

} // namespace lns
