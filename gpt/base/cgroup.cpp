#include "gpt/base/cgroup.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

namespace lns {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
    return parts;
}

bool contains(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

// The first two numbers of a file; "max" is infinity.
std::vector<double> numbers_in(const std::string& path) {
    std::ifstream file(path);
    std::vector<double> numbers;
    for (std::string word; numbers.size() < 2 && file >> word;)
        numbers.push_back(word == "max" ? infinity : std::strtod(word.c_str(), nullptr));
    return numbers;
}

// The CPUs of the group in this folder.
double cpus_of(const std::string& folder, bool version2) {
    std::vector<double> numbers =
        numbers_in(folder + (version2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
    if (!version2)
        for (double period : numbers_in(folder + "/cpu.cfs_period_us")) numbers.push_back(period);
    const bool limited = numbers.size() == 2 && numbers[0] > 0 && numbers[1] > 0; // -1: no quota
    return limited ? numbers[0] / numbers[1] : infinity;
}

double memory_of(const std::string& folder, bool version2) {
    const auto bytes = numbers_in(folder + (version2 ? "/memory.max" : "/memory.limit_in_bytes"));
    return !bytes.empty() && bytes[0] > 0 ? bytes[0] : infinity;
}

// Where a hierarchy of control groups is mounted, and which part of it is.
struct Mount {
    std::string folder, root;
    bool version2;
};

// Of version 2, and of the version 1 that has this controller.
std::vector<Mount> cgroup_mounts(const std::string& root, const std::string& controller) {
    std::vector<Mount> mounts;
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        // ID PARENT MAJOR:MINOR ROOT FOLDER OPTIONS [MORE...] - TYPE SOURCE OPTIONS
        const std::vector<std::string> words = split(line, ' ');
        const auto dash = std::find(words.begin(), words.end(), "-");
        if (words.size() < 5 || words.end() - dash < 4) continue;
        const std::string &type = dash[1], &options = dash[3];
        if (type == "cgroup2" || (type == "cgroup" && contains(split(options, ','), controller)))
            mounts.push_back({words[4], words[3], type == "cgroup2"});
    }
    return mounts;
}

// This process's group in a hierarchy, "" if it has none.
std::string cgroup_path(const std::string& root, const std::string& controller, bool version2) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        // NUMBER:CONTROLLERS:PATH, and 0::PATH of version 2
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (version2 ? controllers.empty() : contains(split(controllers, ','), controller))
            return line.substr(second + 1);
    }
    return "";
}

// limit_of(folder, version2) is the limit of one group.
template <class LimitOf>
double smallest_limit(const std::string& root, const std::string& controller,
                      const LimitOf& limit_of) {
    double limit = infinity;
    for (const Mount& mount : cgroup_mounts(root, controller)) {
        std::string path = cgroup_path(root, controller, mount.version2);
        if (path.empty()) continue;
        // A container sees a part of the hierarchy, and its own path may begin outside it.
        if (mount.root != "/")
            path = path.starts_with(mount.root) ? path.substr(mount.root.size()) : "";
        if (path.find("/..") != std::string::npos) path = "";
        while (true) {
            limit = std::min(limit, limit_of(root + mount.folder + path, mount.version2));
            if (path.empty()) break;
            path.resize(std::min(path.rfind('/'), path.size() - 1));
        }
    }
    return limit;
}

} // namespace

double cgroup_cpus(const std::string& root) { return smallest_limit(root, "cpu", cpus_of); }

double cgroup_memory(const std::string& root) { return smallest_limit(root, "memory", memory_of); }

} // namespace lns
