// What this program was built from and on what it runs, for the banner and the run's record.
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

// Numbers of the cores that this process might use when it first asked; later it pins its threads.
const std::vector<int>& usable_cores();

// Bytes of memory that this process holds, and has held at most; 0 where the system does not say.
struct Resident {
    int64_t now = 0, peak = 0;
};
Resident resident_bytes();

// "Intel(R) Xeon(R) Processor, 2 cores: AVX2 FMA AVX-512 AVX512-BF16 AMX-BF16": the cores are
// those this process may use, the features those that matter to matrix products.
std::string cpu_features();

} // namespace lns
