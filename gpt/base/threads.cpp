#include "gpt/base/threads.h"

#include "gpt/base/build.h"
#include "gpt/base/terminal.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
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

// The quota of the group in this folder.
double quota_of(const std::string& folder, bool version2) {
    std::vector<double> numbers =
        numbers_in(folder + (version2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
    if (!version2)
        for (double period : numbers_in(folder + "/cpu.cfs_period_us")) numbers.push_back(period);
    const bool limited = numbers.size() == 2 && numbers[0] > 0 && numbers[1] > 0; // -1: no quota
    return limited ? numbers[0] / numbers[1] : infinity;
}

// Where a hierarchy of control groups is mounted, and which part of it is.
struct Mount {
    std::string folder, root;
    bool version2;
};

std::vector<Mount> cgroup_mounts(const std::string& root) {
    std::vector<Mount> mounts;
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        // ID PARENT MAJOR:MINOR ROOT FOLDER OPTIONS [MORE...] - TYPE SOURCE OPTIONS
        const std::vector<std::string> words = split(line, ' ');
        const auto dash = std::find(words.begin(), words.end(), "-");
        if (words.size() < 5 || words.end() - dash < 4) continue;
        const std::string &type = dash[1], &options = dash[3];
        if (type == "cgroup2" || (type == "cgroup" && contains(split(options, ','), "cpu")))
            mounts.push_back({words[4], words[3], type == "cgroup2"});
    }
    return mounts;
}

// This process's group in a hierarchy, "" if it has none.
std::string cgroup_path(const std::string& root, bool version2) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        // NUMBER:CONTROLLERS:PATH, and 0::PATH of version 2
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (version2 ? controllers.empty() : contains(split(controllers, ','), "cpu"))
            return line.substr(second + 1);
    }
    return "";
}

// An OpenMP variable; 0 if it is not set or invalid.
int omp_variable(const char* name) {
    const char* value = std::getenv(name);
    if (!value || !*value) return 0;
    const int threads = omp_threads(value);
    if (threads == 0)
        std::fprintf(stderr, "note: %s is '%s', expected a number of threads: it is ignored\n",
                     name, one_line(value).c_str());
    return threads;
}

} // namespace

double cgroup_cpus(const std::string& root) {
    double cpus = infinity;
    for (const Mount& mount : cgroup_mounts(root)) {
        std::string path = cgroup_path(root, mount.version2);
        if (path.empty()) continue;
        // A container sees a part of the hierarchy, and its own path may begin outside it.
        if (mount.root != "/")
            path = path.starts_with(mount.root) ? path.substr(mount.root.size()) : "";
        if (path.find("/..") != std::string::npos) path = "";
        while (true) {
            cpus = std::min(cpus, quota_of(root + mount.folder + path, mount.version2));
            if (path.empty()) break;
            path.resize(std::min(path.rfind('/'), path.size() - 1));
        }
    }
    return cpus;
}

int omp_threads(const std::string& value) {
    const std::string first = value.substr(0, value.find(','));
    const size_t begin = first.find_first_not_of(" \t"), end = first.find_last_not_of(" \t");
    if (begin == std::string::npos) return 0;
    int threads = 0;
    auto [stop, error] = std::from_chars(&first[begin], &first[end] + 1, threads);
    return error == std::errc() && stop == &first[end] + 1 && threads > 0 ? threads : 0;
}

int default_threads() {
    static const int threads = [] {
        double most = std::min(double(usable_cores().size()), cgroup_cpus());
        for (const char* name : {"OMP_NUM_THREADS", "OMP_THREAD_LIMIT"})
            if (int limit = omp_variable(name); limit > 0) most = std::min(most, double(limit));
        return std::max(1, int(most));
    }();
    return threads;
}

} // namespace lns
