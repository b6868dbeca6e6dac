// The limits of this process's control groups, on Linux: the smallest of all enclosing groups, of
// either version; infinity if there is none. `root` precedes /proc and /sys.
#pragma once

#include <string>

namespace lns {

// CPUs (cpu.max in version 2, cpu.cfs_quota_us in version 1).
double cgroup_cpus(const std::string& root = "");

// Bytes of memory (memory.max, memory.limit_in_bytes).
double cgroup_memory(const std::string& root = "");

} // namespace lns
