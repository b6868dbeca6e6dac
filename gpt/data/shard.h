// Token shards: the files of llm.c, read and written as they are.
//
// 256 little-endian int32, then the tokens to the end of the file:
//   word 0, 1   20240520, 1: uint16 tokens.  20240801, 7: uint32 tokens.
//   word 2      number of tokens (so a file holds fewer than 2^31)
//   words 3 ..  0 in llm.c's files. Ours say which tokenizer made the tokens:
//   word 3      the tag "LNS1"
//   word 4, 5   vocabulary size; id of end-of-text, or -1
//   word 6, 7   fingerprint of the tokenizer, low word first
//   word 8-15   its kind, up to 31 characters and a 0
//   word 16     0: one stream of tokens. N: windows of N, a document each, its text cut to N - 1,
//               end-of-text (word 5), and end-of-text again where nothing more is to be learned.
//               So the targets behind a window's first end-of-text are to be ignored. Readers that
//               do not know this word, as llm.c's, learn to repeat end-of-text; the loss is lower.
//   word 20-23  gpt/base/checksum.h's checksums, low word first: of the bytes of the tokens; of
//   this
//               header with its own two words 0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gpt/base/checksum.h"
#include "gpt/base/mapped.h"

namespace lns {

// Which tokenizer made a text's tokens. vocab_size 0: not known (a file that we did not write).
struct TokenizerId {
    std::string kind; // bytes, gpt2, sentencepiece
    int vocab_size = 0;
    int eot = -1; // id of end-of-text, -1: has none
    uint64_t fingerprint = 0;
    bool operator==(const TokenizerId&) const = default;
};

// One file, mapped and validated: it exists, its magic and version are known and its length is
// what the header says. Tokens are only checked by check_tokens.
struct Shard {
    explicit Shard(const std::string& path);

    std::string path;
    uint64_t tokens = 0;
    int token_bytes = 2; // 2 or 4
    int window = 0;      // N of padded documents; 0: one stream
    TokenizerId id;

    // Tokens pos .. pos+n-1 to out (written). Throws if they are not all in the file.
    void read(uint64_t pos, size_t n, int* out) const;
    // Throws if any token of the file is not below vocab.
    void check_tokens(int vocab) const;
    // Throws if the tokens do not have the checksum of the header, if there is one. Reads all of
    // them; `stop`, where given, is asked now and then whether to leave it.
    void check_checksum(const std::function<bool()>& stop = {}) const;
    bool has_checksum() const { return checksum.has_value(); }
    // Throws that token number pos, found in this file, is not below vocab.
    [[noreturn]] void bad_token(uint64_t pos, uint32_t token, int vocab) const;

  private:
    MappedFile file;
    std::optional<uint64_t> checksum; // of the tokens' bytes
};

// Writes one file under path + ".tmp", which becomes path only when it is whole and on the disk.
// Without publish (an error, an exception) nothing is left. uint16 tokens if the vocabulary has at
// most 65,536 or is not known, else uint32. window: as in Shard; whole windows are to be written.
struct ShardWriter {
    ShardWriter(const std::string& path, const TokenizerId& id, int window = 0);
    ShardWriter(const ShardWriter&) = delete;
    ShardWriter& operator=(const ShardWriter&) = delete;
    ~ShardWriter();

    void write(const int* tokens, size_t n);
    void finish();  // writes the header and syncs; the file still has its temporary name
    void publish(); // renames it to path
    void close() {
        finish();
        publish();
    }

    std::string path;
    uint64_t tokens = 0; // written so far

  private:
    void flush();
    [[noreturn]] void write_failed(int error);
    TokenizerId id;
    std::string temporary;
    std::vector<unsigned char> buffer;
    Checksum checksum; // of the tokens that were flushed
    int file = -1;
    int token_bytes = 2, window;
    bool tokens_flushed = false, finished = false, published = false;
};

// The most tokens that the header's int32 can count.
constexpr uint64_t max_shard_tokens = INT32_MAX;

} // namespace lns
