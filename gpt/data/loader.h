// From tokens to batches: windows of T+1 tokens, shuffled without storing a permutation.
//
// Each part of a source (a shard) is cut into windows of T+1 tokens that start T apart; the last
// token is a target only. Windows do not cross parts, and a part's incomplete last window is
// dropped. An epoch visits every window once, in an order that depends only on (seed, epoch).
//
// Padded documents are windows of T tokens, one document each. Neither the padding nor the next
// document is a target, so T inputs have at most T - 1 targets. Windows of instructions and answers
// have a mask, which says what is a target.
#pragma once

#include "gpt/data/shard.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>

namespace lns {

struct TokenSource {
    static constexpr uint64_t endless = UINT64_MAX;

    virtual ~TokenSource() = default;
    virtual uint64_t size() const = 0; // tokens, or endless
    virtual void read(uint64_t pos, size_t n, int* out) = 0;
    virtual TokenizerId id() const = 0;
    virtual std::string describe() const = 0;
    // The lengths of the parts, which windows do not cross. They add up to size().
    virtual std::vector<uint64_t> parts() const { return {size()}; }
    // The length of padded documents; 0: one stream of tokens.
    virtual int window() const { return 0; }
    // Whether only some tokens, answers, are to be learned, and which of tokens pos .. pos+n-1.
    virtual bool masked() const { return false; }
    virtual void read_mask(uint64_t pos, size_t n, unsigned char* learned) {
        (void)pos;
        std::fill_n(learned, n, 1);
    }
    // Throws if a token is not below vocab; large sources check on reading instead.
    virtual void check_tokens(int vocab) { (void)vocab; }
    // Waits for background checks, and throws their error.
    virtual void finish_checks() {}
};

// All shards that match a pattern, concatenated. Different tokenizers are an error, as is a mixture
// of padded documents and streams. A set that is replaced while it is opened is opened again, so
// that old and new shards never mix.
struct ShardSource : TokenSource {
    explicit ShardSource(const std::string& pattern);
    uint64_t size() const override { return ends.back(); }
    void read(uint64_t pos, size_t n, int* out) override;
    TokenizerId id() const override { return tokenizer; }
    std::string describe() const override;
    std::vector<uint64_t> parts() const override;
    int window() const override { return shards[0].window; }
    bool masked() const override { return shards[0].has_mask(); }
    void read_mask(uint64_t pos, size_t n, unsigned char* learned) override;
    // Checks the first checked_at_once bytes of files at once, checksums included. Others are
    // checked on every read, and their checksums in the background; read() throws its error.
    void check_tokens(int vocab) override;
    void finish_checks() override;

    std::string pattern;
    std::vector<Shard> shards;
    uint64_t checked_at_once = uint64_t(1) << 30;

  private:
    std::vector<uint64_t> ends; // position after each shard's last token
    TokenizerId tokenizer;
    int vocab = 0; // for checks on reading; 0: none
    struct Checker {
        std::atomic<bool> stop = false, failed = false;
        std::exception_ptr failure; // valid once failed
        std::thread thread;
        ~Checker();
    };
    std::unique_ptr<Checker> checker; // null if all shards are checked
    void open(const std::vector<std::string>& paths);
};

// Tokens in memory, for tests and --overfit-batch.
struct MemorySource : TokenSource {
    explicit MemorySource(std::vector<int> tokens, TokenizerId id = {}, int window = 0)
        : tokens(std::move(tokens)), tokenizer(std::move(id)), padded(window) {}
    uint64_t size() const override { return tokens.size(); }
    void read(uint64_t pos, size_t n, int* out) override;
    TokenizerId id() const override { return tokenizer; }
    std::string describe() const override;
    void check_tokens(int vocab) override;
    int window() const override { return padded; }

    std::vector<int> tokens;
    TokenizerId tokenizer;
    int padded; // window()
};

// Windows consumed so far: `epoch` full epochs and `index` windows of the next.
struct LoaderState {
    uint64_t epoch = 0, index = 0;
    bool operator==(const LoaderState&) const = default;
};

// A pseudo-random permutation of 0 .. n-1, evaluated at i: a Feistel network over the next
// power of four, walked along its cycle until it lands below n (Black and Rogaway, 2002).
uint64_t permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t epoch);

struct Loader {
    // Without shuffle, as for validation, and for endless sources windows come in order. Throws if
    // the source has no window of T+1 tokens.
    Loader(std::shared_ptr<TokenSource> source, int T, uint64_t seed, bool shuffle);

    // The next B windows: inputs (B,T) and targets (B,T). targets[b][t] follows inputs[b][t]; it is
    // -1 if that is padding, another document, or not to be learned.
    void next(int B, int* inputs, int* targets);
    // Skips windows in O(1). Rank r of R: skip(r*B), next(B), skip((R-1-r)*B).
    void skip(uint64_t windows);

    LoaderState state() const { return at; }
    void restore(LoaderState state);
    uint64_t windows_per_epoch() const { return windows; } // or endless

    std::shared_ptr<TokenSource> source;

  private:
    uint64_t position(uint64_t window) const; // of its first token
    int T;
    uint64_t seed;
    bool shuffle;
    uint64_t windows = 0;
    std::vector<uint64_t> part_starts, part_windows; // tokens and windows before each part
    LoaderState at;
    int document_end = -1;   // the token that ends and pads documents, if they are padded
    std::vector<int> buffer; // one window: T+1 tokens, or T of a padded document
    std::vector<unsigned char> learned; // of its tokens, if they are masked
};

} // namespace lns
