#include "gpt/base/cache.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/random.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fcntl.h>
#include <filesystem>
#include <sstream>
#include <sys/file.h>

namespace lns {
namespace {

std::string cache_directory() {
    auto variable = [](const char* name) {
        const char* value = std::getenv(name);
        return std::string(value ? value : "");
    };
    if (const std::string directory = variable("LNS_CACHE"); !directory.empty())
        return directory == "none" ? "" : directory;
    if (const std::string xdg = variable("XDG_CACHE_HOME"); !xdg.empty()) return xdg + "/lns.cpp";
    if (const std::string home = variable("HOME"); !home.empty()) return home + "/.cache/lns.cpp";
    return "";
}

// "CHECKSUM\tKEY\tVALUE", without a newline.
std::string line_of(const std::string& key, const std::string& value) {
    const std::string text = key + "\t" + value;
    char checksum[17];
    std::snprintf(checksum, sizeof checksum, "%016llx", (unsigned long long)fnv1a(text));
    return std::string(checksum) + "\t" + text;
}

} // namespace

Cache::Cache(const std::string& file_name) {
    const std::string directory = cache_directory();
    if (directory.empty()) return;
    path_ = directory + "/" + file_name;
    read();
}

void Cache::read() {
    std::string text;
    try {
        text = read_file(path_);
    } catch (const Error&) {
        return;
    }
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        const size_t key = line.find('\t') + 1, value = line.find('\t', key) + 1;
        if (key == 0 || value == 0) continue;
        const std::string k = line.substr(key, value - 1 - key), v = line.substr(value);
        if (line_of(k, v) == line) entries_[k] = v;
    }
}

const std::string* Cache::find(const std::string& key) const {
    const auto found = entries_.find(key);
    return found == entries_.end() ? nullptr : &found->second;
}

std::optional<std::string> Cache::find_or_insert(const std::string& key, const std::string& value) {
    if (path_.empty()) return std::nullopt;
    try {
        std::filesystem::create_directories(std::filesystem::path(path_).parent_path());
        const Fd lock(
            open((path_ + ".lock").c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666));
        if (!lock || flock(lock.fd, LOCK_EX) != 0) return std::nullopt;
        read();
        const auto [entry, inserted] = entries_.emplace(key, value);
        if (!inserted) return entry->second;
        std::string text;
        for (const auto& [k, v] : entries_) text += line_of(k, v) + "\n";
        write_file_atomic(path_, text);
        return value;
    } catch (const std::exception&) { // Error or filesystem_error
        return std::nullopt;
    }
}

} // namespace lns
