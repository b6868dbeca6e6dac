// A memory-mapped file. When its bytes can no longer be read (it was truncated, a disk or a server
// failed) the kernel sends SIGBUS; the handler maps zeros instead, and check() throws. So call
// check() after reading bytes and before trusting them.
#pragma once

#include <cstddef>
#include <string>
#include <sys/types.h>

namespace lns {

class MappedFile {
  public:
    MappedFile() = default;
    // Maps the regular file open as fd, which may then be closed.
    MappedFile(int fd, const std::string& path);
    MappedFile(MappedFile&& other) noexcept { swap(other); }
    MappedFile& operator=(MappedFile&& other) noexcept {
        swap(other);
        return *this;
    }
    ~MappedFile();

    const unsigned char* data() const { return static_cast<const unsigned char*>(map_); }
    size_t size() const { return size_; }
    // Throws if bytes read so far may not be the file's.
    void check() const;
    // Bytes [begin, begin + n) were read and will not be read soon: they no longer count as memory
    // of this process.
    void release(const void* begin, size_t n) const;

    struct Guard; // a map, as the signal handler knows it

  private:
    std::string path_;
    void* map_ = nullptr;
    size_t size_ = 0;
    dev_t device_ = 0;
    ino_t inode_ = 0;
    Guard* guard_ = nullptr;
    void swap(MappedFile& other) noexcept;
};

} // namespace lns
