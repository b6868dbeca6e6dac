// Files as a trainer needs them: read whole, written whole or not at all. Nothing is lost silently:
// every write, sync and close is checked, and a full disk is an Error that names the file.
// What is being written lies beside its target as .NAME.tmp-PID until it is synced and renamed.
// That name is never opened through a link.
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

// What stands under a path, links followed. Unlike std::filesystem's they throw an Error where the
// system does not say: a name too long, a directory that may not be entered.
bool path_exists(const std::filesystem::path& path);
bool is_directory_at(const std::filesystem::path& path);
bool is_regular_file_at(const std::filesystem::path& path);
std::vector<std::filesystem::directory_entry>
directory_entries(const std::filesystem::path& directory);

// How the files begin that Git LFS leaves in the place of those that it did not fetch.
constexpr std::string_view lfs_pointer = "version https://git-lfs";

// The whole file.
std::string read_file(const std::string& path);

// Writes all of data or throws; path only names the file in the message.
void write_all(int fd, const void* data, size_t size, const std::string& path);

// A new file, open for writing. Anything that stands under the name is removed first, a link too.
Fd create_file(const std::string& path);

// Throws if anything but a regular file stands under the name: a link, a FIFO, a device.
void check_regular_or_absent(const std::string& path);

// The file appears under its name with all of text, or is left as it was. A link's target is
// written, not the link. FIFOs and devices that take characters are written to as they are; block
// devices and sockets are refused.
void write_file_atomic(const std::string& path, std::string_view text);

// The same for a file written piece by piece: without commit() nothing changes.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string& path);
    ~AtomicFile();
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* data, size_t size); // buffered
    // Writes over what was written before, at an offset from the beginning.
    bool can_overwrite() const; // false of a pipe
    void overwrite(uint64_t at, const void* data, size_t size);
    void commit(); // syncs, renames, syncs the directory

  private:
    std::string path_, temporary_, buffer_; // temporary_ is empty of what is written to directly
    Fd file_;
    void flush();
};

// A directory written under temporary(), which commit() syncs and renames to path. A directory
// that already stands there is exchanged in the same instant and then removed; links and files are
// refused.
class AtomicDirectory {
  public:
    explicit AtomicDirectory(const std::string& path);
    ~AtomicDirectory(); // removes what was not committed
    AtomicDirectory(const AtomicDirectory&) = delete;
    AtomicDirectory& operator=(const AtomicDirectory&) = delete;

    const std::string& temporary() const { return temporary_; }
    void commit();

  private:
    std::string path_, temporary_;
};

// .NAME.tmp-PID beside path.
std::string temporary_name(const std::string& path);

// Removes a file or a directory so that no half of it is ever seen under its name.
void remove_atomic(const std::string& path);

// Removes the temporaries in dir that killed processes left: those whose process no longer lives
// or has our own PID, which a container gives out again; all = true, for who holds a lock on dir,
// removes every one. Call it before writing anything.
void remove_stale_temporaries(const std::string& dir, bool all = false);

// Throws unless dir is a directory in which bytes_needed can be written.
void check_writable(const std::string& dir, uint64_t bytes_needed = 0);

} // namespace lns
