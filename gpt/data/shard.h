// Token shards, in the format of llm.c.
//
// 256 little-endian int32, then the tokens to the end of the file:
//   word 0, 1   20240520, 1: uint16 tokens.  20240801, 7: uint32 tokens.
//   word 2      number of tokens (fewer than 2^31)
//   words 3 ..  0 in llm.c's files. Ours identify the tokenizer:
//   word 3      the tag "LNS1"
//   word 4, 5   vocabulary size; id of end-of-text, or -1
//   word 6, 7   fingerprint of the tokenizer, low word first
//   word 8-15   its kind, up to 31 characters and a 0
//   word 16     0: one stream of tokens. N: windows of N tokens, one document each: its text cut to
//               N - 1, end-of-text (word 5), and padding of end-of-text. Targets after a window's
//               first end-of-text must be ignored. Readers that do not know this word, such as
//               llm.c, learn to repeat end-of-text and report a lower loss.
//   word 17     1: instructions and answers. Beside NAME.bin, NAME.mask has a bit for each token
//   (of
//               token i, bit i mod 8 of byte i / 8), which is 1 if it is to be learned, as a token
//               of an answer. All other tokens are context. Windows (word 16) hold one example or
//               several, and end-of-text ends none. Readers that do not know this word learn all.
//   word 18, 19 checksum of NAME.mask
//   word 20-23  checksums (gpt/base/checksum.h), low word first: of the tokens' bytes; of this
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

// The tokenizer that made the tokens. vocab_size 0: unknown (a file from another program).
struct TokenizerId {
    std::string kind; // bytes, gpt2, bpe, unigram, sentencepiece
    int vocab_size = 0;
    int eot = -1; // id of end-of-text, -1 if there is none
    uint64_t fingerprint = 0;
    bool operator==(const TokenizerId&) const = default;
};

// A mapped file with a valid header: magic, version, length and the header's checksum are checked
// on opening. Tokens are checked by check_tokens and check_checksum.
struct Shard {
    explicit Shard(const std::string& path);

    std::string path;
    uint64_t tokens = 0;
    int token_bytes = 2; // 2 or 4
    int window = 0;      // the length of padded documents; 0: one stream
    TokenizerId id;

    // Writes tokens pos .. pos+n-1 to out. Throws if the file has fewer.
    void read(uint64_t pos, size_t n, int* out) const;
    // Whether each of tokens pos .. pos+n-1 is to be learned; all are in a file without a mask.
    void read_mask(uint64_t pos, size_t n, unsigned char* out) const;
    bool has_mask() const { return mask.data(); }
    // Throws if any token of the file is not below vocab.
    void check_tokens(int vocab) const;
    // Throws if tokens or mask do not match the header's checksums, if it has some. Reads the whole
    // file; stops early if `stop`, which is polled, returns true.
    void check_checksum(const std::function<bool()>& stop = {}) const;
    bool has_checksum() const { return checksum.has_value(); }
    // Throws the error that token number pos is not below vocab.
    [[noreturn]] void bad_token(uint64_t pos, uint32_t token, int vocab) const;

  private:
    MappedFile file, mask;
    std::optional<uint64_t> checksum; // the header's, of the tokens' bytes
    uint64_t mask_checksum = 0;
    void open_mask();
};

// data/sft_train_000000.mask of data/sft_train_000000.bin
std::string mask_path(const std::string& shard);

// Writes path + ".tmp", which is renamed to path once complete and synced. Without publish (after
// an error) nothing remains. Tokens are uint16 if the vocabulary has at most 65,536 or is unknown,
// else uint32. window: as in Shard; the file must consist of whole windows. masked: with a file
// NAME.mask.
struct ShardWriter {
    ShardWriter(const std::string& path, const TokenizerId& id, int window = 0,
                bool masked = false);
    ShardWriter(const ShardWriter&) = delete;
    ShardWriter& operator=(const ShardWriter&) = delete;
    ~ShardWriter();

    // learned (n): 1 for tokens to be learned; of masked shards only.
    void write(const int* tokens, size_t n, const unsigned char* learned = nullptr);
    void finish();  // writes the header and syncs
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
    Checksum checksum; // of the flushed tokens
    int file = -1;
    int token_bytes = 2, window;
    bool masked;
    std::vector<unsigned char> mask;
    void write_mask();
    bool tokens_flushed = false, finished = false, published = false;
};

// The limit of the header's int32.
constexpr uint64_t max_shard_tokens = INT32_MAX;

} // namespace lns
