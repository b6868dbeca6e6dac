// From tokens to batches: windows of T+1 tokens, in a shuffled order that needs no memory.
//
// A source's parts (its shards) are each cut into windows that start T apart and hold T+1 tokens,
// the last being only a target. No window crosses two parts; a part's tail that fills no window is
// not used. An epoch visits every window once, in an order that depends on (seed, epoch) only.
//
// Padded documents are windows already: T is their length, a window is one document, and neither
// the padding nor the next document is a target. So T inputs have at most T - 1 targets.
#pragma once

#include "gpt/data/shard.h"

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
    // Lengths of the parts, in order, that a window must not cross. They add up to size().
    virtual std::vector<uint64_t> parts() const { return {size()}; }
    // The length of the windows that hold a document each; 0: there are none, any may be cut.
    virtual int window() const { return 0; }
    // Throws if a token is not below vocab; what is too long to check now is checked when read.
    virtual void check_tokens(int vocab) { (void)vocab; }
    // Waits for checks that go on in the background, and throws what they found.
    virtual void finish_checks() {}
};

// All shards that match a pattern, one after the other. Shards that name different tokenizers are
// an error, as are some with padded documents among others. A set that is replaced while it is
// opened is opened again, so that it never holds some of the old one.
struct ShardSource : TokenSource {
    explicit ShardSource(const std::string& pattern);
    uint64_t size() const override { return ends.back(); }
    void read(uint64_t pos, size_t n, int* out) override;
    TokenizerId id() const override { return tokenizer; }
    std::string describe() const override;
    std::vector<uint64_t> parts() const override;
    int window() const override { return shards[0].window; }
    // Checks whole files up to checked_at_once bytes in all, checksums too. Of the others it checks
    // every read, and in the background the checksums, each once; read() throws what that found.
    void check_tokens(int vocab) override;
    void finish_checks() override;

    std::string pattern;
    std::vector<Shard> shards;
    uint64_t checked_at_once = uint64_t(1) << 30;

  private:
    std::vector<uint64_t> ends; // position after each shard's last token
    TokenizerId tokenizer;
    int vocab = 0; // 0: not checked
    struct Checker {
        std::atomic<bool> stop = false, failed = false;
        std::exception_ptr failure; // to be looked at when failed
        std::thread thread;
        ~Checker();
    };
    std::unique_ptr<Checker> checker; // null: no shard awaits its check
    void open(const std::vector<std::string>& paths);
};

// Tokens in memory, for tests and for overfitting a batch.
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
    int padded; // the length of windows that hold a document each, or 0
};

// Windows given out so far: `epoch` whole rounds and `index` windows of the next.
struct LoaderState {
    uint64_t epoch = 0, index = 0;
    bool operator==(const LoaderState&) const = default;
};

// A pseudo-random permutation of 0 .. n-1, evaluated at i: a Feistel network over the next
// power of four, walked along its cycle until it lands below n (Black and Rogaway, 2002).
uint64_t permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t epoch);

struct Loader {
    // shuffle false: the windows in order, as for validation. Endless sources always go in order.
    // Throws if the source has no window of T+1 tokens.
    Loader(std::shared_ptr<TokenSource> source, int T, uint64_t seed, bool shuffle);

    // The next B windows: inputs (B,T), targets (B,T), where targets[b][t] follows inputs[b][t], or
    // is -1 if what follows is padding or another document.
    void next(int B, int* inputs, int* targets);
    // Passes over windows in O(1). Rank r of R: skip(r*B), next(B), skip((R-1-r)*B).
    void skip(uint64_t windows);

    LoaderState state() const { return at; }
    void restore(LoaderState state);
    uint64_t windows_per_epoch() const { return windows; } // TokenSource::endless if it is

    std::shared_ptr<TokenSource> source;

  private:
    uint64_t position(uint64_t window) const; // of its first token
    int T;
    uint64_t seed;
    bool shuffle;
    uint64_t windows = 0;
    std::vector<uint64_t> part_starts, part_windows; // tokens, windows before each part
    LoaderState at;
    int document_end = -1;   // of padded documents: the token that ends and pads them
    std::vector<int> buffer; // one window, T+1; T of padded documents
};

} // namespace lns
