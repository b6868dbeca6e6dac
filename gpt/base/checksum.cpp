#include "gpt/base/checksum.h"

#if defined(__GNUC__) && !defined(__clang__) // GCC warns about its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstdio>

namespace lns {

struct Checksum::Partial {
    XXH3_state_t state;
};

Checksum::Checksum() : partial(std::make_unique<Partial>()) { XXH3_64bits_reset(&partial->state); }
Checksum::~Checksum() = default;

void Checksum::add(const void* data, size_t bytes) {
    const char* next = static_cast<const char*>(data);
    auto fill = [&](size_t n) {
        XXH3_64bits_update(&partial->state, next, n);
        partial_bytes += n, next += n, bytes -= n;
        if (partial_bytes < checksum_chunk) return;
        chunks.push_back(XXH3_64bits_digest(&partial->state));
        XXH3_64bits_reset(&partial->state);
        partial_bytes = 0;
    };
    if (partial_bytes > 0) fill(std::min(bytes, checksum_chunk - partial_bytes));
    const int64_t whole = int64_t(bytes / checksum_chunk), before = int64_t(chunks.size());
    chunks.resize(size_t(before + whole));
#pragma omp parallel for if (whole > 7)
    for (int64_t i = 0; i < whole; i++)
        chunks[size_t(before + i)] =
            chunk_checksum(next + size_t(i) * checksum_chunk, checksum_chunk);
    next += size_t(whole) * checksum_chunk, bytes -= size_t(whole) * checksum_chunk;
    if (bytes > 0) fill(bytes);
}

uint64_t Checksum::value() {
    std::vector<uint64_t> all = chunks;
    if (partial_bytes > 0) all.push_back(XXH3_64bits_digest(&partial->state));
    return checksum_of(all);
}

uint64_t chunk_checksum(const void* chunk, size_t bytes) { return XXH3_64bits(chunk, bytes); }

uint64_t checksum(const void* data, size_t bytes) {
    Checksum sum;
    sum.add(data, bytes);
    return sum.value();
}

std::string checksum_text(uint64_t checksum) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
    return text;
}

} // namespace lns
