// A file mapped into memory. Where its bytes cannot be had any more (it was made shorter, a disk or
// a server failed) the kernel sends SIGBUS; here zeros take their place, and check() throws. So
// whoever used bytes of the map calls check() before believing them.
#pragma once

#include <cstddef>
#include <string>
#include <sys/types.h>

namespace lns {

class MappedFile {
  public:
    MappedFile() = default;
    // Maps the regular file that is open as fd, which may be closed then.
    MappedFile(int fd, const std::string& path);
    MappedFile(MappedFile&& other) noexcept { swap(other); }
    MappedFile& operator=(MappedFile&& other) noexcept {
        swap(other);
        return *this;
    }
    ~MappedFile();

    const unsigned char* data() const { return static_cast<const unsigned char*>(map_); }
    size_t size() const { return size_; }
    // Throws if bytes that were used since the file was opened may not be the file's.
    void check() const;

    struct Guard; // what the signal's handler knows of a map

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
