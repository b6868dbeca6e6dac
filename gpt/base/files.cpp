#include "gpt/base/files.h"

#include "gpt/base/error.h"
#include "gpt/base/terminal.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <signal.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

namespace fs = std::filesystem;

namespace lns {
namespace {

std::string parent_of(const std::string& path) {
    std::string parent = fs::path(path).parent_path().string();
    return parent.empty() ? "." : parent;
}

std::string reason(int error) {
    std::string text = std::strerror(error);
    if (error == ENOSPC || error == EDQUOT) text += "; free some space or choose another directory";
    if (error == EFBIG) text += ": it exceeds the limit on a file's size (ulimit -f)";
    return text;
}

void sync(int fd, const std::string& path) {
    // EINVAL and ENOTSUP: a pipe, or a file system without sync.
    if (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP)
        fail("cannot write ", path, " to the disk: ", reason(errno));
}

void close_checked(Fd& file, const std::string& path) {
    int fd = std::exchange(file.fd, -1);
    // Network file systems report a full disk only here.
    if (close(fd) != 0 && errno != EINTR) fail("cannot finish writing ", path, ": ", reason(errno));
}

void sync_path(const std::string& path, int flags) {
    Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | flags));
    if (!file) fail("cannot open ", path, " to sync it: ", reason(errno));
    sync(file.fd, path);
}

// The target of a chain of links, which need not exist; "" for a process's own descriptors, such as
// /dev/stdout.
std::string link_target(const std::string& path) {
    fs::path at = path;
    std::error_code error;
    for (int links = 0; fs::is_symlink(fs::symlink_status(at, error)); links++) {
        if (at.string().rfind("/proc/", 0) == 0) return "";
        if (links == 40) fail("cannot write ", path, ": its links form a circle");
        at = at.parent_path() / fs::read_symlink(at, error); // an absolute one replaces it
        if (error) fail("cannot read the link ", at.string(), ": ", error.message());
    }
    return at.string();
}

void rename_checked(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0)
        fail("cannot rename ", from, " to ", to, ": ", reason(errno));
}

} // namespace

Fd::~Fd() {
    if (fd >= 0) close(fd);
}

fs::file_status status_of(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::none)
        fail("cannot access ", path.string(), ": ", error.message());
    return status;
}
bool path_exists(const fs::path& path) { return fs::exists(status_of(path)); }
bool is_directory_at(const fs::path& path) { return fs::is_directory(status_of(path)); }
bool is_regular_file_at(const fs::path& path) { return fs::is_regular_file(status_of(path)); }

std::vector<fs::directory_entry> directory_entries(const fs::path& directory) {
    std::error_code error;
    std::vector<fs::directory_entry> entries;
    for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
         entry.increment(error))
        entries.push_back(*entry);
    if (error) fail("cannot read the directory ", directory.string(), ": ", error.message());
    return entries;
}

std::string read_file(const std::string& path) {
    Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) fail("cannot open ", path, ": ", reason(errno));
    struct stat status;
    std::string text;
    if (fstat(file.fd, &status) == 0 && S_ISREG(status.st_mode)) text.reserve(status.st_size);
    char buffer[1 << 16];
    for (;;) {
        ssize_t n = read(file.fd, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("cannot read ", path, ": ", reason(errno));
        if (n == 0) return text;
        text.append(buffer, n);
    }
}

void write_all(int fd, const void* data, size_t size, const std::string& path) {
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
        ssize_t n = write(fd, next, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("cannot write ", path, ": ", reason(errno));
        next += n, size -= n;
    }
}

void write_file_atomic(const std::string& path, std::string_view text) {
    AtomicFile file(path);
    file.write(text.data(), text.size());
    file.commit();
}

std::string temporary_name(const std::string& path) {
    fs::path target(path);
    if (!target.has_filename()) target = target.parent_path(); // "run/" is "run"
    return (target.parent_path() / cat(".", target.filename().string(), ".tmp-", getpid()))
        .string();
}

Fd create_file(const std::string& path) {
    for (int attempt = 0;; attempt++) {
        Fd file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666));
        if (file || errno != EEXIST || attempt == 10) return file;
        if (unlink(path.c_str()) != 0 && errno != ENOENT) return file;
    }
}

void check_regular_or_absent(const std::string& path) {
    struct stat status;
    if (lstat(path.c_str(), &status) != 0 || S_ISREG(status.st_mode)) return;
    fail(path, S_ISLNK(status.st_mode) ? " is a symbolic link" : " is not a regular file",
         ", and is not replaced: remove it, or choose another name.");
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
    struct stat status;
    const bool exists = stat(path.c_str(), &status) == 0;
    if (exists && S_ISDIR(status.st_mode)) fail("cannot write ", path, ": it is a directory");
    const bool stream = exists && (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode));
    if (exists && !stream && !S_ISREG(status.st_mode))
        fail("cannot write ", path, ": it is a block device or a socket; name a file");
    const std::string target = stream ? "" : link_target(path);
    if (target.empty()) {
        file_ = Fd(open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
    } else {
        path_ = target;
        temporary_ = temporary_name(path_);
        file_ = create_file(temporary_);
    }
    if (!file_) fail("cannot write ", path, ": ", reason(errno));
}

AtomicFile::~AtomicFile() {
    if (!temporary_.empty()) unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t size) {
    constexpr size_t limit = 1 << 20;
    if (buffer_.size() + size > limit) flush();
    if (size >= limit) {
        write_all(file_.fd, data, size, path_);
    } else {
        buffer_.append(static_cast<const char*>(data), size);
    }
}

bool AtomicFile::can_overwrite() const { return lseek(file_.fd, 0, SEEK_CUR) >= 0; }

void AtomicFile::overwrite(uint64_t offset, const void* data, size_t size) {
    flush();
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
        ssize_t n = pwrite(file_.fd, next, size, off_t(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("cannot write ", path_, ": ", reason(errno));
        next += n, offset += uint64_t(n), size -= size_t(n);
    }
}

void AtomicFile::flush() {
    write_all(file_.fd, buffer_.data(), buffer_.size(), path_);
    buffer_.clear();
}

void AtomicFile::commit() {
    flush();
    sync(file_.fd, path_);
    close_checked(file_, path_);
    if (temporary_.empty()) return;
    rename_checked(temporary_, path_);
    temporary_.clear();
    sync_path(parent_of(path_), O_DIRECTORY);
}

AtomicDirectory::AtomicDirectory(const std::string& path)
    : path_(path), temporary_(temporary_name(path)) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
    std::error_code error;
    const fs::file_status status = fs::symlink_status(path_, error);
    if (fs::exists(status) && !fs::is_directory(status))
        fail("cannot make the directory ", path_, ": it is ",
             fs::is_symlink(status) ? "a symbolic link" : "a file",
             "; choose another name, or the directory itself");
    fs::remove_all(temporary_, error);
    if (mkdir(temporary_.c_str(), 0777) != 0)
        fail("cannot make the directory ", path_, ": ", reason(errno));
}

AtomicDirectory::~AtomicDirectory() {
    std::error_code error;
    if (!temporary_.empty()) fs::remove_all(temporary_, error);
}

void AtomicDirectory::commit() {
    for (const auto& entry : fs::recursive_directory_iterator(temporary_)) {
        if (entry.is_symlink()) continue;
        if (entry.is_regular_file()) sync_path(entry.path().string(), 0);
        if (entry.is_directory()) sync_path(entry.path().string(), O_DIRECTORY);
    }
    sync_path(temporary_, O_DIRECTORY);
    if (path_exists(path_)) {
        const char *from = temporary_.c_str(), *to = path_.c_str();
        if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) != 0) {
            // The file system cannot exchange: for a moment the name does not exist.
            std::string old = temporary_ + ".old";
            rename_checked(path_, old);
            rename_checked(temporary_, path_);
            temporary_ = old;
        }
        sync_path(parent_of(path_), O_DIRECTORY);
        std::error_code error; // remains of the old directory are harmless
        fs::remove_all(temporary_, error);
    } else {
        rename_checked(temporary_, path_);
        sync_path(parent_of(path_), O_DIRECTORY);
    }
    temporary_.clear();
}

void remove_atomic(const std::string& path) {
    std::string temporary = temporary_name(path);
    std::error_code error;
    fs::remove_all(temporary, error);
    rename_checked(path, temporary);
    fs::remove_all(temporary, error);
    if (error) fail("cannot remove ", path, ": ", error.message());
}

void remove_stale_temporaries(const std::string& dir, bool all) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(dir, error)) {
        std::string name = entry.path().filename().string();
        size_t mark = name.rfind(".tmp-");
        if (name[0] != '.' || mark == std::string::npos) continue;
        int pid = 0, used = 0;
        if (std::sscanf(name.c_str() + mark, ".tmp-%9d%n", &pid, &used) != 1 || pid <= 0) continue;
        std::string rest = name.substr(mark + used);
        if (!rest.empty() && rest != ".old") continue;
        bool alive = pid != getpid() && (kill(pid, 0) == 0 || errno == EPERM);
        if (alive && !all) continue;
        fs::path target = entry.path().parent_path() / name.substr(1, mark - 1);
        if (rest == ".old" && !path_exists(target)) { // killed between the two renames
            fs::rename(entry.path(), target, error);
        } else {
            fs::remove_all(entry.path(), error);
        }
    }
}

void check_writable(const std::string& dir, uint64_t bytes_needed) {
    struct stat status;
    if (stat(dir.c_str(), &status) != 0) fail("cannot write to ", dir, ": ", reason(errno));
    if (!S_ISDIR(status.st_mode))
        fail(dir, " is a file, expected a directory: choose another name.");
    std::string probe = temporary_name((fs::path(dir) / "write-check").string());
    {
        Fd file = create_file(probe);
        if (!file) fail("cannot write to the directory ", dir, ": ", reason(errno));
    }
    unlink(probe.c_str());
    struct statvfs space;
    if (statvfs(dir.c_str(), &space) != 0) return; // unknown
    uint64_t available = uint64_t(space.f_bavail) * space.f_frsize;
    if (available < bytes_needed)
        fail(dir, " has ", format_bytes(double(available)), " free and ",
             format_bytes(double(bytes_needed)),
             " are needed: free some space or choose another directory.");
}

} // namespace lns
