#include "gpt/run/rundir.h"

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/json.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <filesystem>
#include <set>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace fs = std::filesystem;

namespace lns {
namespace {

using nlohmann::ordered_json;

std::string log_of(const std::string& path) { return (fs::path(path) / "log.jsonl").string(); }

std::string lock_of(const std::string& path) { return (fs::path(path) / "lock").string(); }

bool is_same_file(const std::string& name, int fd) {
    struct stat named, open;
    return stat(name.c_str(), &named) == 0 && fstat(fd, &open) == 0 &&
           named.st_dev == open.st_dev && named.st_ino == open.st_ino;
}

} // namespace

Fd RunDirectory::lock(const std::string& path) {
    const std::string name = lock_of(path);
    for (const char* file : {"lock", "log.jsonl", "log.damaged", "run.json"})
        check_regular_or_absent((fs::path(path) / file).string());
    Fd lock(open(name.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666));
    if (!lock) fail("cannot write to ", path, ": ", std::strerror(errno));
    char begin[256];
    const ssize_t n = std::max<ssize_t>(0, pread(lock.fd, begin, sizeof begin, 0));
    std::string holder(begin, size_t(n));
    holder.erase(holder.find_last_not_of('\n') + 1);
    if (!holder.empty() && holder.rfind("process ", 0) != 0)
        fail(name, " is not a run's lock: move it away, or choose another directory with -o.");
    if (flock(lock.fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK) {
            fail("another run (", holder.empty() ? "just starting" : holder, ") is writing to ",
                 path, ": wait until it ends, or choose another directory with -o.");
        }
        // Some cluster file systems lack locks; the directory is then unprotected.
        if (errno != ENOLCK && errno != ENOTSUP && errno != ENOSYS)
            fail("cannot lock ", name, ": ", std::strerror(errno));
    }
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    holder = cat("process ", getpid(), " on ", host, "\n");
    if (ftruncate(lock.fd, 0) != 0) fail("cannot write ", name, ": ", std::strerror(errno));
    write_all(lock.fd, holder.data(), holder.size(), name);
    return lock;
}

int64_t checkpoint_step(const std::string& name) {
    const std::string prefix = "step-";
    if (name.compare(0, prefix.size(), prefix) != 0) return -1;
    std::string digits = name.substr(prefix.size());
    bool good = digits.size() >= 6 && digits.size() <= 18 &&
                digits.find_first_not_of("0123456789") == std::string::npos;
    return good ? std::stoll(digits) : -1;
}

std::vector<std::pair<int64_t, std::string>> checkpoints_in(const std::string& path) {
    std::vector<std::pair<int64_t, std::string>> found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(path, error)) {
        int64_t step = checkpoint_step(entry.path().filename().string());
        if (step >= 0 && path_exists(entry.path() / "config.json"))
            found.emplace_back(step, entry.path().string());
    }
    std::sort(found.begin(), found.end());
    return found;
}

RunDirectory::RunDirectory(const std::string& path) : path_(path) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
}

RunDirectory RunDirectory::create(const std::string& path) {
    RunDirectory run(path);
    if (path_exists(run.path_) && !is_directory_at(run.path_))
        fail(path, " is a file; a run needs a directory: choose another path with -o.");
    std::error_code error;
    fs::create_directories(run.path_, error);
    if (error) fail("cannot make the directory ", path, ": ", error.message());
    run.lock_ = lock(run.path_);
    if (path_exists(log_of(run.path_)) || !checkpoints_in(run.path_).empty())
        fail(path, " already holds a run: continue it with -y, or choose another directory with "
                   "-o.");
    remove_stale_temporaries(run.path_, true);
    run.open_log();
    return run;
}

RunDirectory RunDirectory::resume(const std::string& path, Fd held) {
    RunDirectory run(path);
    if (!is_directory_at(run.path_)) fail("there is no run to continue: ", path, " is missing.");
    run.lock_ = held ? std::move(held) : lock(run.path_);
    remove_stale_temporaries(run.path_, true);
    run.open_log();
    return run;
}

void RunDirectory::open_log() {
    std::string name = log_of(path_);
    log_ = Fd(open(name.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0666));
    if (!log_) fail("cannot write ", name, ": ", std::strerror(errno));
}

void RunDirectory::record(int argc, const char* const* argv,
                          const std::map<std::string, std::string>& more, const SavedFlags& flags) {
    std::string name = (fs::path(path_) / "run.json").string();
    ordered_json record = {{"starts", ordered_json::array()}};
    if (path_exists(name)) {
        ordered_json earlier = parse_ordered_json(read_file(name), name);
        if (!earlier.is_object() || !earlier.contains("starts") || !earlier["starts"].is_array())
            fail(name, " is not the record of a run: move it away and start again.");
        record = std::move(earlier);
    }
    const BuildInfo& build = build_info();
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    std::error_code error;
    ordered_json start = {{"command", shell_quoted(argc, argv)},
                          {"directory", fs::current_path(error).string()},
                          {"time", iso_time()},
                          {"host", host},
                          {"process", getpid()},
                          {"cpu", cpu_features()},
                          {"version", build.version},
                          {"compiler", build.compiler},
                          {"flags", build.flags}};
    for (const auto& [feature, value] : build.features) start["features"][feature] = value;
    for (const auto& [key, value] : more) start[key] = value;
    record["starts"].push_back(start);
    if (!flags.empty()) record["options"] = flags;
    // A path in the command need not be UTF-8.
    using Handler = ordered_json::error_handler_t;
    write_file_atomic(name, record.dump(2, ' ', false, Handler::replace) + "\n");
}

void RunDirectory::append(std::string_view json_line) {
    std::string name = log_of(path_), line(json_line);
    line += '\n';
    off_t before = lseek(log_.fd, 0, SEEK_END);
    try {
        write_all(log_.fd, line.data(), line.size(), name);
    } catch (...) {
        // On a full disk, remove the part of the line that was written.
        if (before >= 0 && ftruncate(log_.fd, before) != 0) {
        }
        throw;
    }
}

std::string RunDirectory::recreate_if_lost() {
    lost_.clear();
    if (is_same_file(log_of(path_), log_.fd)) return "";
    const bool locked = is_same_file(lock_of(path_), lock_.fd);
    const std::string gone = cat(locked ? log_of(path_) : path_,
                                 " was removed, renamed or unmounted while it was in use");
    try {
        fs::create_directories(path_);
        if (!locked) lock_ = lock(path_);
        open_log();
    } catch (const std::exception& error) {
        return lost_ = cat(gone, " and cannot be recreated: ", error.what());
    }
    return cat(gone, ". It was recreated without its contents");
}

int64_t RunDirectory::truncate_log_after(int64_t step) {
    const std::string name = log_of(path_), text = read_file(name);
    std::string kept, damaged;
    int64_t count = 0;
    for (size_t begin = 0, end; begin < text.size(); begin = end) {
        end = std::min(text.find('\n', begin), text.size() - 1) + 1;
        const std::string_view line(text.data() + begin, end - begin);
        try {
            const nlohmann::json entry = parse_json(line, name);
            auto found = entry.is_object() ? entry.find("step") : entry.end();
            const bool stepless = entry.is_object() && found == entry.end();
            if (!stepless && (found == entry.end() || !found->is_number()))
                fail(name, " has a line without a step");
            if (line.back() != '\n') fail(name, " ends within a line");
            if (stepless || found->get<double>() <= double(step)) kept += line;
        } catch (const Error&) { // such as a line truncated by a kill
            damaged += line;
            if (line.back() != '\n') damaged += '\n';
            count++;
        }
    }
    if (count > 0) { // keeping earlier damaged lines
        const std::string aside = damaged_log();
        write_file_atomic(aside, (path_exists(aside) ? read_file(aside) : "") + damaged);
    }
    write_file_atomic(name, kept);
    open_log(); // write_file_atomic replaced the file
    return count;
}

std::string RunDirectory::damaged_log() const { return (fs::path(path_) / "log.damaged").string(); }

std::string RunDirectory::checkpoint_path(int64_t step) const {
    if (!lost_.empty()) throw Error(lost_);
    char name[32];
    std::snprintf(name, sizeof name, "step-%06lld", static_cast<long long>(step));
    return (fs::path(path_) / name).string();
}

std::vector<std::pair<int64_t, std::string>> RunDirectory::checkpoints() const {
    return checkpoints_in(path_);
}

void RunDirectory::keep_last(int n) {
    auto all = checkpoints();
    if (n <= 0) return;
    for (size_t i = 0; i + n < all.size(); i++) remove_atomic(all[i].second);
}

std::string default_run_path(const std::string& prefix) {
    std::string path = prefix;
    for (int i = 2; path_exists(path); i++) path = cat(prefix, "-", i);
    return path;
}

std::string latest_checkpoint(const std::string& path) {
    if (path_exists(fs::path(path) / "config.json")) return path;
    if (!is_directory_at(path))
        fail(path, path_exists(path) ? " is a file" : " does not exist",
             "; expected a checkpoint or a run directory.");
    auto found = checkpoints_in(path);
    if (found.empty())
        fail(path, " holds no checkpoint: expected a config.json, or directories step-….");
    return found.back().second;
}

SavedFlags recorded_flags(const std::string& path) {
    const std::string name = (fs::path(path) / "run.json").string();
    if (!is_regular_file_at(name)) return {};
    const nlohmann::json record = parse_json(read_file(name), name);
    auto options = record.is_object() ? record.find("options") : record.end();
    if (options == record.end()) return {};
    return parse_saved_flags(*options, name + ": its options");
}

std::vector<std::string> start_directories(const std::string& path) {
    const std::string name = (fs::path(path) / "run.json").string();
    std::vector<std::string> found;
    if (path.empty() || !is_regular_file_at(name)) return found;
    try {
        const nlohmann::json record = parse_json(read_file(name), name);
        for (const nlohmann::json& start : record.at("starts")) {
            const std::string directory = start.at("directory");
            if (directory.starts_with('/')) found.insert(found.begin(), directory);
        }
    } catch (const nlohmann::json::exception&) { // its readers report a damaged record
    } catch (const Error&) {
    }
    std::set<std::string> seen;
    std::erase_if(found, [&](const std::string& folder) { return !seen.insert(folder).second; });
    return found;
}

std::string shell_quoted(int argc, const char* const* argv) {
    std::string out;
    for (int i = 0; i < argc; i++) {
        std::string word = argv[i], quoted;
        bool plain = !word.empty();
        for (unsigned char c : word) {
            plain = plain && (std::isalnum(c) || std::strchr("_-+=./:,@%", c));
            quoted += c == '\'' ? "'\\''" : std::string(1, char(c));
        }
        out += (i ? " " : "") + (plain ? word : "'" + quoted + "'");
    }
    return out;
}

std::string iso_time() {
    std::time_t now = std::time(nullptr);
    std::tm utc;
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    return text;
}

} // namespace lns
