#include "gpt/base/mapped.h"

#include "gpt/base/error.h"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace lns {

// Guards form a list that only grows, so that the handler needs no lock. Those of closed files
// (begin 0) are reused.
struct MappedFile::Guard {
    std::atomic<uintptr_t> begin = 0, end = 0;
    std::atomic<bool> broken = false;
    Guard* next = nullptr;
};

namespace {

std::atomic<MappedFile::Guard*> guards = nullptr;
std::mutex guards_mutex; // held to open or close a file, not in the handler
struct sigaction previous_action;

void on_bus_error(int, siginfo_t* info, void*) {
    const int error = errno;
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (MappedFile::Guard* guard = guards; guard; guard = guard->next) {
        const uintptr_t begin = guard->begin, end = guard->end;
        if (info->si_code <= 0 || begin == 0 || at < begin || at >= end) continue;
        guard->broken = true;
        const uintptr_t page = at & ~(uintptr_t(sysconf(_SC_PAGESIZE)) - 1);
        void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (zeros == MAP_FAILED) break;
        errno = error;
        return;
    }
    sigaction(SIGBUS, &previous_action, nullptr);
    raise(SIGBUS);
}

MappedFile::Guard* acquire_guard(void* map, size_t size) {
    std::lock_guard lock(guards_mutex);
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        return sigaction(SIGBUS, &action, &previous_action) == 0;
    }();
    (void)installed;
    MappedFile::Guard* guard = guards;
    while (guard && guard->begin) guard = guard->next;
    const bool found = guard;
    if (!found) guard = new MappedFile::Guard;
    guard->broken = false;
    guard->end = reinterpret_cast<uintptr_t>(map) + size;
    guard->begin = reinterpret_cast<uintptr_t>(map);
    if (!found) {
        guard->next = guards;
        guards = guard;
    }
    return guard;
}

} // namespace

MappedFile::MappedFile(int fd, const std::string& path) : path_(path) {
    struct stat status;
    if (fstat(fd, &status) != 0) fail("cannot read ", path, ": ", std::strerror(errno));
    void* map = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) fail("cannot map ", path, " into memory: ", std::strerror(errno));
    map_ = map;
    size_ = size_t(status.st_size);
    device_ = status.st_dev;
    inode_ = status.st_ino;
    guard_ = acquire_guard(map_, size_);
}

MappedFile::~MappedFile() {
    if (!map_) return;
    std::lock_guard lock(guards_mutex);
    guard_->begin = 0;
    munmap(map_, size_);
}

void MappedFile::swap(MappedFile& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(map_, other.map_);
    std::swap(size_, other.size_);
    std::swap(device_, other.device_);
    std::swap(inode_, other.inode_);
    std::swap(guard_, other.guard_);
}

void MappedFile::release(const void* begin, size_t n) const {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)),
                    at = reinterpret_cast<uintptr_t>(begin);
    const uintptr_t first = at / page * page;
    if (n > 0) madvise(reinterpret_cast<void*>(first), at + n - first, MADV_DONTNEED);
}

void MappedFile::check() const {
    // The rest of a file's last page reads as zeros without a signal, so compare the sizes. By
    // name: a descriptor per shard would be too many, and a file renamed over this one does not
    // harm it.
    struct stat status;
    const bool same =
        stat(path_.c_str(), &status) == 0 && status.st_dev == device_ && status.st_ino == inode_;
    if (same && size_t(status.st_size) < size_)
        fail(path_, " became shorter while it was in use: it has ", status.st_size,
             " bytes now and had ", size_, ". Restore the file");
    if (guard_ && guard_->broken)
        fail(path_, " can no longer be read: it became shorter while it was in use, or its disk "
                    "failed. Restore the file");
}

} // namespace lns
