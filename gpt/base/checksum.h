// Checksums of the files this program writes. They detect damage, not tampering.
// A checksum is the XXH3 (64 bits, https://github.com/Cyan4973/xxHash) of the little-endian XXH3s
// of the data's 256 KiB chunks, so that cores share the work and a chunk is hashed while cached.
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

// Its two steps: the checksum of a chunk, and that of all chunks' checksums.
uint64_t chunk_checksum(const void* chunk, size_t bytes);
inline uint64_t checksum_of(const std::vector<uint64_t>& chunks) {
    return chunk_checksum(chunks.data(), chunks.size() * sizeof(uint64_t));
}

// A streaming checksum.
class Checksum {
  public:
    Checksum();
    ~Checksum();
    void add(const void* data, size_t bytes);
    uint64_t value();

  private:
    struct Partial;
    std::unique_ptr<Partial> partial; // the incomplete last chunk
    size_t partial_bytes = 0;
    std::vector<uint64_t> chunks;
};

// 16 hexadecimal digits.
std::string checksum_text(uint64_t checksum);

} // namespace lns
