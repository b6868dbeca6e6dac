// Files that are read whole, and written whole or not at all. Nothing is lost silently: every
// write, sync and close is checked, and a full disk is an Error that names the file.
// A file is written as .NAME.tmp-PID beside its target, synced and renamed. Temporary files are
// never opened through a link.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lns {

// An owned file descriptor.
struct Fd {
    int fd = -1;
    Fd() = default;
    explicit Fd(int fd) : fd(fd) {}
    Fd(Fd&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        std::swap(fd, other.fd);
        return *this;
    }
    ~Fd();
    explicit operator bool() const { return fd >= 0; }
};

// Like std::filesystem's, but they throw an Error if the system cannot tell: the name is too long,
// a directory may not be entered.
bool path_exists(const std::filesystem::path& path);
bool is_directory_at(const std::filesystem::path& path);
bool is_regular_file_at(const std::filesystem::path& path);
std::vector<std::filesystem::directory_entry>
directory_entries(const std::filesystem::path& directory);

// Whether the text is a Git LFS pointer, which stands for a large file that was not fetched.
inline bool is_lfs_pointer(std::string_view text) {
    return text.starts_with("version https://git-lfs");
}

// Reads the whole file.
std::string read_file(const std::string& path);

// Writes all of data or throws; path is for the message only.
void write_all(int fd, const void* data, size_t size, const std::string& path);

// Creates a file for writing. An existing file or link of that name is removed first.
Fd create_file(const std::string& path);

// Throws if the path exists but is not a regular file (a link, a FIFO, a device).
void check_regular_or_absent(const std::string& path);

// Replaces the file's content, or leaves it unchanged on failure. Links are followed. FIFOs and
// character devices are written to directly; block devices and sockets are refused.
void write_file_atomic(const std::string& path, std::string_view text);

// The same in several writes. Without commit() nothing changes.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string& path);
    ~AtomicFile();
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* data, size_t size); // buffered
    bool can_overwrite() const;                // false for a pipe
    void overwrite(uint64_t offset, const void* data, size_t size);
    void commit(); // syncs, renames, syncs the directory

  private:
    std::string path_, temporary_, buffer_; // temporary_ is empty if path_ is written directly
    Fd file_;
    void flush();
};

// A directory written as temporary(), which commit() syncs and renames to path. An existing
// directory is exchanged atomically and then removed; links and files are refused.
class AtomicDirectory {
  public:
    explicit AtomicDirectory(const std::string& path);
    ~AtomicDirectory(); // without commit() the temporary directory is removed
    AtomicDirectory(const AtomicDirectory&) = delete;
    AtomicDirectory& operator=(const AtomicDirectory&) = delete;

    const std::string& temporary() const { return temporary_; }
    void commit();

  private:
    std::string path_, temporary_;
};

// .NAME.tmp-PID beside path.
std::string temporary_name(const std::string& path);

// Removes a file or a directory, which is never partly visible under its name.
void remove_atomic(const std::string& path);

// Removes temporaries that killed processes left in dir: those whose process is dead or has our own
// PID, since containers reuse PIDs; with all = true (if the caller holds a lock on dir) every one.
// Call it before writing anything.
void remove_stale_temporaries(const std::string& dir, bool all = false);

// Throws unless dir is a writable directory with bytes_needed free.
void check_writable(const std::string& dir, uint64_t bytes_needed = 0);

} // namespace lns
