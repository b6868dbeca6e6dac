// Checksums of what this program writes, compared when it is read: they find damage, not malice.
// A checksum is the XXH3 (64 bits, https://github.com/Cyan4973/xxHash) of the little-endian XXH3s
// of each 256 KiB of the data, so that all cores can share the work and a part is checked while it
// is in the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

constexpr size_t checksum_chunk = size_t(256) << 10;

uint64_t checksum(const void* data, size_t bytes);
inline uint64_t checksum(std::string_view text) { return checksum(text.data(), text.size()); }

// The same by parts: chunk_checksum of each chunk, then of all of them.
uint64_t chunk_checksum(const void* chunk, size_t bytes);
inline uint64_t checksum_of(const std::vector<uint64_t>& chunks) {
    return chunk_checksum(chunks.data(), chunks.size() * sizeof(uint64_t));
}

// The same of data that comes piece by piece.
class Checksum {
  public:
    Checksum();
    ~Checksum();
    void add(const void* data, size_t bytes);
    uint64_t value();

  private:
    struct Partial;
    std::unique_ptr<Partial> partial; // the chunk that is not full yet
    size_t in_partial = 0;            // bytes
    std::vector<uint64_t> chunks;
};

// 16 hexadecimal digits.
std::string checksum_text(uint64_t checksum);

} // namespace lns
