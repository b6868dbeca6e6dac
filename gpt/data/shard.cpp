#include "gpt/data/shard.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace lns {

static_assert(std::endian::native == std::endian::little, "shards are little-endian");

namespace {

constexpr int32_t magic16 = 20240520, version16 = 1, magic32 = 20240801, version32 = 7;
constexpr size_t header_words = 256, header_bytes = header_words * 4;
constexpr size_t kind_word = 8, kind_bytes = 32, window_word = 16, mask_word = 17,
                 checksum_word = 20;
constexpr size_t buffer_bytes = 4 << 20;

int32_t tag_word() {
    int32_t word;
    std::memcpy(&word, "LNS1", 4);
    return word;
}

uint64_t get_u64(const int32_t* header, size_t word) {
    return uint64_t(uint32_t(header[word + 1])) << 32 | uint32_t(header[word]);
}
void put_u64(int32_t* header, size_t word, uint64_t value) {
    header[word] = int32_t(uint32_t(value));
    header[word + 1] = int32_t(uint32_t(value >> 32));
}

uint64_t header_checksum(std::vector<int32_t> header) {
    put_u64(header.data(), checksum_word + 2, 0);
    return checksum(header.data(), header_bytes);
}

// The end of an error message: what a file that is not a shard might be.
std::string guess(const unsigned char* start, size_t n) {
    int32_t magic = 0;
    std::memcpy(&magic, start, std::min<size_t>(n, 4));
    int32_t swapped = int32_t(__builtin_bswap32(uint32_t(magic)));
    if (swapped == magic16 || swapped == magic32)
        return "The bytes are swapped: it was written on a big-endian machine; make it again with "
               "data/tokenize";
    if (magic == 20240401) return "That is llm.c's older format; make it again with data/tokenize";
    bool text = std::none_of(start, start + n, [](unsigned char c) {
        return c < 0x20 && c != '\t' && c != '\n' && c != '\r' && c != '\f';
    });
    if (text) return "It looks like text: tokenize it with data/tokenize -o PREFIX FILE";
    return "Make it with data/tokenize";
}

template <class Token> uint64_t first_bad(const Token* tokens, uint64_t n, uint32_t vocab) {
    // Blocks without an early exit, so that the compiler vectorizes them.
    for (uint64_t start = 0; start < n; start += 4096) {
        uint64_t end = std::min(n, start + 4096);
        Token largest = 0;
        for (uint64_t i = start; i < end; i++) largest = std::max(largest, tokens[i]);
        if (largest < vocab) continue;
        for (uint64_t i = start; i < end; i++)
            if (tokens[i] >= vocab) return i;
    }
    return n;
}

} // namespace

Shard::Shard(const std::string& path) : path(path) {
    Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)); // do not block on a pipe
    if (!fd)
        fail("cannot open the shard ", path, ": ", std::strerror(errno),
             ". Shards are made with data/tokenize");
    struct stat info;
    if (fstat(fd.fd, &info) != 0) fail("cannot read ", path, ": ", std::strerror(errno));
    if (S_ISDIR(info.st_mode))
        fail(path, " is a directory, expected a shard file. Name its files, as in '", path,
             "/*_train_*.bin'");
    if (!S_ISREG(info.st_mode)) fail(path, " is not a regular file, expected a shard");
    if (info.st_size == 0) fail(path, " is empty, expected a shard. Make it with data/tokenize");

    file = MappedFile(fd.fd, path);
    const unsigned char* map = file.data();
    const uint64_t size = file.size();
    std::vector<int32_t> header(header_words);
    std::memcpy(header.data(), map, std::min<uint64_t>(size, header_bytes));
    if (size < 4 || (header[0] != magic16 && header[0] != magic32))
        fail(path, " is not a shard: it starts with ", header[0], ", expected ", magic16, " or ",
             magic32, ". ", guess(map, std::min<uint64_t>(size, header_bytes)));
    if (size < header_bytes)
        fail(path, " is truncated: ", size, " bytes, expected a header of ", header_bytes,
             " and the tokens. Make it again with data/tokenize");
    token_bytes = header[0] == magic16 ? 2 : 4;
    int32_t version = token_bytes == 2 ? version16 : version32;
    if (header[1] != version)
        fail(path, " has version ", header[1], ", expected ", version, " after the magic ",
             header[0], ". Make it again with data/tokenize");
    if (header[2] < 0)
        fail(path, " has a damaged header: ", header[2],
             " tokens. Make it again with data/tokenize");
    tokens = uint64_t(header[2]);
    uint64_t expected = header_bytes + tokens * uint64_t(token_bytes);
    if (size != expected)
        fail(path, size < expected ? " is truncated: " : " is longer than it says: ", size,
             " bytes, expected ", expected, " for its ", tokens, " tokens of ", token_bytes,
             " bytes. ",
             size < expected ? "Fetch it again, or make it again with data/tokenize"
                             : "Make it again with data/tokenize");
    // Both are 0 in files from llm.c and from our earlier versions.
    const uint64_t tokens_sum = get_u64(header.data(), checksum_word);
    const uint64_t header_sum = get_u64(header.data(), checksum_word + 2);
    if (tokens_sum || header_sum) {
        if (header_sum != header_checksum(header))
            fail(path, " has a damaged header: its checksum does not match. Make it again with "
                       "data/tokenize");
        checksum = tokens_sum;
    }
    if (header[3] == tag_word()) {
        id.vocab_size = header[4];
        id.eot = header[5];
        id.fingerprint = get_u64(header.data(), 6);
        const char* kind = reinterpret_cast<const char*>(&header[kind_word]);
        id.kind.assign(kind, strnlen(kind, kind_bytes));
        if (id.vocab_size <= 0 || id.eot < -1 || id.eot >= id.vocab_size)
            fail(path, " has a damaged header: vocabulary ", id.vocab_size, ", end-of-text ",
                 id.eot, ". Make it again with data/tokenize");
        window = header[window_word];
        if (window != 0 &&
            (window < 2 || (id.eot < 0 && !header[mask_word]) || tokens % uint64_t(window)))
            fail(path, " has a damaged header: ", tokens, " tokens, end-of-text ", id.eot,
                 ", in windows of ", window, ". Make it again with data/tokenize");
        if (header[mask_word] < 0 || header[mask_word] > 1 || (header[mask_word] && !window))
            fail(path, " has a damaged header, or one of a newer program: word ", mask_word, " is ",
                 header[mask_word], ", in windows of ", window,
                 ". Make it again with data/tokenize");
        mask_checksum = get_u64(header.data(), mask_word + 1);
        if (header[mask_word]) open_mask();
    }
    file.check();
}

std::string mask_path(const std::string& shard) {
    const std::string end = ".bin";
    return (shard.ends_with(end) ? shard.substr(0, shard.size() - end.size()) : shard) + ".mask";
}

void Shard::open_mask() {
    const std::string name = mask_path(path);
    const Fd fd(open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct stat info;
    if (!fd || fstat(fd.fd, &info) != 0)
        fail(path, " holds instructions and answers, but ", name,
             ", which says which tokens are answers, cannot be read: ", std::strerror(errno),
             ". Copy it too, or make both again with data/tokenize");
    const uint64_t expected = (tokens + 7) / 8;
    if (!S_ISREG(info.st_mode) || uint64_t(info.st_size) != expected)
        fail(name, " does not belong to ", path, ": ", info.st_size, " bytes, expected ", expected,
             " for its ", tokens, " tokens. Make both again with data/tokenize");
    if (expected > 0) mask = MappedFile(fd.fd, name);
}

void Shard::read_mask(uint64_t pos, size_t n, unsigned char* out) const {
    if (pos > tokens || n > tokens - pos)
        fail("cannot read the mask of tokens ", pos, " to ", pos + n, " of ", path, ", which has ",
             tokens);
    if (!has_mask()) {
        std::fill_n(out, n, 1);
        return;
    }
    for (size_t i = 0; i < n; i++) out[i] = mask.data()[(pos + i) / 8] >> ((pos + i) % 8) & 1;
    mask.check();
}

void Shard::read(uint64_t pos, size_t n, int* out) const {
    if (pos > tokens || n > tokens - pos)
        fail("cannot read tokens ", pos, " to ", pos + n, " of ", path, ", which has ", tokens);
    const unsigned char* start = file.data() + header_bytes + pos * uint64_t(token_bytes);
    if (token_bytes == 2) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(start);
        for (size_t i = 0; i < n; i++) out[i] = from[i];
    } else {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(start);
        // Values beyond int (damage) must stay beyond every vocabulary.
        for (size_t i = 0; i < n; i++) out[i] = int(std::min<uint32_t>(from[i], INT32_MAX));
    }
    file.check();
}

void Shard::check_tokens(int vocab) const {
    const unsigned char* start = file.data() + header_bytes;
    if (token_bytes == 2) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(start);
        uint64_t bad = first_bad(from, tokens, uint32_t(vocab));
        if (bad < tokens) bad_token(bad, from[bad], vocab);
    } else {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(start);
        uint64_t bad = first_bad(from, tokens, uint32_t(vocab));
        if (bad < tokens) bad_token(bad, from[bad], vocab);
    }
    file.check();
}

void Shard::check_checksum(const std::function<bool()>& stop) const {
    if (!checksum) return;
    // In the background, small pieces: one thread, which leaves the others to training.
    const size_t piece = (stop ? 4 : 64) * checksum_chunk;
    const uint64_t bytes = tokens * uint64_t(token_bytes);
    Checksum sum;
    for (uint64_t at = 0; at < bytes; at += piece) {
        if (stop && stop()) return;
        sum.add(file.data() + header_bytes + at, size_t(std::min<uint64_t>(piece, bytes - at)));
    }
    file.check();
    if (sum.value() != *checksum)
        fail(path, " is damaged: the checksum of its tokens does not match. Make it again with "
                   "data/tokenize, or replace it by an intact copy");
    if (!has_mask()) return;
    Checksum mask_sum;
    mask_sum.add(mask.data(), mask.size());
    mask.check();
    if (mask_sum.value() != mask_checksum)
        fail(mask_path(path), " is damaged, or belongs to another shard than ", path,
             ": its checksum does not match. Make both again with data/tokenize, or replace it by "
             "an intact copy");
}

void Shard::bad_token(uint64_t pos, uint32_t token, int vocab) const {
    std::string made = id.vocab_size ? cat("; it was made with the ", id.kind,
                                           " tokenizer, whose vocabulary has ", id.vocab_size)
                                     : "";
    fail("token ", pos, " of ", path, " is ", token,
         ", expected one below the model's vocabulary of ", vocab, made,
         ". Use a model with the tokenizer's vocabulary (--vocab), or make the shard "
         "again with data/tokenize");
}

ShardWriter::ShardWriter(const std::string& path, const TokenizerId& id, int window, bool masked)
    : path(path), id(id), temporary(path + ".tmp"), token_bytes(id.vocab_size > 65536 ? 4 : 2),
      window(window), masked(masked) {
    if (window != 0 && (window < 2 || (id.eot < 0 && !masked)))
        fail("documents cannot be padded to ", window, " tokens with the end-of-text ", id.eot,
             ": padding needs a window of 2 or more and a tokenizer with an end-of-text");
    if (id.kind.size() >= kind_bytes)
        fail("the tokenizer's kind '", id.kind, "' does not fit a shard's header (", kind_bytes - 1,
             " characters)");
    check_regular_or_absent(path);
    file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    if (file < 0)
        fail("cannot write ", temporary, ": ", std::strerror(errno),
             ". Choose a place that can be written with --out");
    if (flock(file, LOCK_EX | LOCK_NB) != 0) {
        ::close(file);
        file = -1;
        fail("another process is writing ", temporary, ". Wait for it, or choose another --out");
    }
    if (ftruncate(file, 0) != 0) write_failed(errno);
    buffer.reserve(buffer_bytes);
    buffer.resize(header_bytes); // zeros until finish() knows the count
}

ShardWriter::~ShardWriter() {
    if (!published) unlink(temporary.c_str());
    if (!published && masked && finished) unlink((mask_path(path) + ".tmp").c_str());
    if (file >= 0) ::close(file);
}

void ShardWriter::write_failed(int error) {
    fail("cannot write ", temporary, " after ", tokens, " tokens: ", std::strerror(error),
         ". Nothing is left of it; ",
         error == ENOSPC || error == EDQUOT
             ? "make room (a token takes 2 bytes, 4 if the vocabulary exceeds 65,536) or choose "
               "another disk with --out"
             : "choose a place that can be written with --out");
}

void ShardWriter::flush() {
    const size_t header = tokens_flushed ? 0 : header_bytes;
    checksum.add(buffer.data() + header, buffer.size() - header);
    tokens_flushed = true;
    for (size_t done = 0; done < buffer.size();) {
        ssize_t n = ::write(file, buffer.data() + done, buffer.size() - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) write_failed(errno);
        done += size_t(n);
    }
    buffer.clear();
}

void ShardWriter::write(const int* from, size_t n, const unsigned char* learned) {
    if (tokens + n > max_shard_tokens)
        fail(path, " would hold ", tokens + n, " tokens; a shard's header counts at most ",
             max_shard_tokens, ". Use smaller shards (--shard-tokens)");
    uint32_t vocab = id.vocab_size ? uint32_t(id.vocab_size) : 65536;
    for (size_t i = 0; i < n; i++) {
        uint32_t token = uint32_t(from[i]);
        if (token >= vocab)
            fail("token ", from[i], " does not fit the vocabulary of ", vocab, " of ", path);
        for (int b = 0; b < token_bytes; b++)
            buffer.push_back(static_cast<unsigned char>(token >> (8 * b)));
        if (masked) {
            if (tokens % 8 == 0) mask.push_back(0);
            if (learned && learned[i]) mask.back() |= static_cast<unsigned char>(1 << tokens % 8);
        }
        tokens++;
        if (buffer.size() >= buffer_bytes) flush();
    }
}

void ShardWriter::finish() {
    if (finished) return;
    if (window && tokens % uint64_t(window))
        fail(path, " would end inside a window: ", tokens, " tokens in windows of ", window);
    flush();
    std::vector<int32_t> header(header_words);
    header[0] = token_bytes == 2 ? magic16 : magic32;
    header[1] = token_bytes == 2 ? version16 : version32;
    header[2] = int32_t(tokens);
    if (id.vocab_size) {
        header[3] = tag_word();
        header[4] = id.vocab_size;
        header[5] = id.eot;
        put_u64(header.data(), 6, id.fingerprint);
        std::memcpy(&header[kind_word], id.kind.data(), id.kind.size());
        header[window_word] = window;
        if (masked) {
            write_mask();
            header[mask_word] = 1;
            Checksum mask_sum;
            mask_sum.add(mask.data(), mask.size());
            put_u64(header.data(), mask_word + 1, mask_sum.value());
        }
    }
    put_u64(header.data(), checksum_word, checksum.value());
    put_u64(header.data(), checksum_word + 2, header_checksum(header));
    ssize_t n = pwrite(file, header.data(), header_bytes, 0);
    if (n != ssize_t(header_bytes)) write_failed(n < 0 ? errno : ENOSPC);
    if (fsync(file) != 0) write_failed(errno);
    int failed = ::close(std::exchange(file, -1));
    if (failed) write_failed(errno);
    buffer = {};
    finished = true;
}

// Under a temporary name, as the shard.
void ShardWriter::write_mask() {
    const std::string name = mask_path(path) + ".tmp";
    const Fd out(open(name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666));
    if (!out) write_failed(errno);
    for (size_t done = 0; done < mask.size();) {
        const ssize_t n = ::write(out.fd, mask.data() + done, mask.size() - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) write_failed(errno);
        done += size_t(n);
    }
    if (fsync(out.fd) != 0) write_failed(errno);
}

void ShardWriter::publish() {
    if (published) return;
    const std::string name = mask_path(path);
    if (masked && rename((name + ".tmp").c_str(), name.c_str()) != 0)
        fail("cannot rename ", name, ".tmp to ", name, ": ", std::strerror(errno));
    if (rename(temporary.c_str(), path.c_str()) != 0)
        fail("cannot rename ", temporary, " to ", path, ": ", std::strerror(errno));
    published = true;
    // Sync the directory, which has the name.
    size_t slash = path.rfind('/');
    std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    int directory = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory >= 0) {
        fsync(directory);
        ::close(directory);
    }
}

} // namespace lns
