#include "gpt/base/build.h"

#include "build_info.h" // written by the Makefile

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace lns {

const BuildInfo& build_info() {
    static const BuildInfo info = {LNS_VERSION, LNS_COMPILER, LNS_FLAGS, {LNS_FEATURES}};
    return info;
}

const std::vector<int>& usable_cores() {
    static const std::vector<int> cores = [] {
        std::vector<int> numbers;
#ifdef __linux__
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
            for (int core = 0; core < CPU_SETSIZE; core++)
                if (CPU_ISSET(core, &allowed)) numbers.push_back(core);
#endif
        const int all = std::max(1, int(std::thread::hardware_concurrency()));
        if (numbers.empty())
            for (int core = 0; core < all; core++) numbers.push_back(core);
        return numbers;
    }();
    return cores;
}

// getrusage's peak starts at the parent's size on Linux, so read /proc.
Resident resident_bytes() {
    Resident bytes;
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
        int64_t* wanted = word == "VmHWM:" ? &bytes.peak : word == "VmRSS:" ? &bytes.now : nullptr;
        if (wanted && status >> *wanted) *wanted *= 1024;
    }
    return bytes;
}

std::string cpu_features() {
    // x86 has "model name" and "flags", ARM "CPU part" and "Features".
    std::ifstream file("/proc/cpuinfo");
    std::string line, model;
    std::set<std::string> flags;
    while (std::getline(file, line)) {
        size_t colon = line.find(':');
        if (colon == std::string::npos) continue;
        std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
        std::string value = line.substr(std::min(line.size(), colon + 2));
        if (key == "model name" && model.empty()) model = value;
        if ((key == "flags" || key == "Features") && flags.empty()) {
            std::istringstream words(value);
            for (std::string word; words >> word;) flags.insert(word);
        }
    }
#if defined(__aarch64__)
    if (model.empty()) model = "ARM64 processor";
#endif
    if (model.empty()) model = "unknown processor";

    const size_t cores = usable_cores().size();
    std::string text = model + ", " + std::to_string(cores) + (cores == 1 ? " core" : " cores");
    const std::pair<const char*, const char*> known[] = {
        {"avx2", "AVX2"},         {"fma", "FMA"},
        {"avx512f", "AVX-512"},   {"avx512_bf16", "AVX512-BF16"},
        {"amx_bf16", "AMX-BF16"}, {"asimd", "NEON"},
        {"bf16", "BF16"},         {"sve", "SVE"},
        {"sve2", "SVE2"},
    };
    const char* separator = ": ";
    for (auto [flag, name] : known) {
        if (!flags.count(flag)) continue;
        text += separator + std::string(name);
        separator = " ";
    }
    return text;
}

} // namespace lns
