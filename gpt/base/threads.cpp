#include "gpt/base/threads.h"

#include "gpt/base/build.h"
#include "gpt/base/cgroup.h"
#include "gpt/base/terminal.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>

namespace lns {
namespace {

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
