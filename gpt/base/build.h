// The build and the machine, for the banner and the run record.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace lns {

struct BuildInfo {
    std::string version;  // the newest in CHANGELOG.md and the git commit: "0.2.0+1d34a68343-dirty"
    std::string compiler; // first line of its --version
    std::string flags;
    std::vector<std::pair<std::string, std::string>> features; // {"oneDNN", "2.6.3"}, {"MPI", "no"}
};

const BuildInfo& build_info();

// The cores this process may use, read at the first call: pinning threads changes the mask later.
const std::vector<int>& usable_cores();

// This process's resident memory in bytes, now and at its peak; 0 if unknown.
struct Resident {
    int64_t now = 0, peak = 0;
};
Resident resident_bytes();

// "Intel(R) Xeon(R) Processor, 2 cores: AVX2 FMA AVX-512 AVX512-BF16 AMX-BF16": the usable cores,
// and the features that matter to matrix products.
std::string cpu_features();

} // namespace lns
