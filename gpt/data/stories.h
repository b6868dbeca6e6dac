// The built-in corpus: synthetic short stories in English, seeded and endless. Each tells what
// happens in a small simulated world (who has what, how many are left, who is where), so sentences
// depend on earlier ones, near and far, and the questions at the end have one right answer.
#pragma once

#include "gpt/data/loader.h"

#include <array>
#include <memory>
#include <mutex>
#include <utility>

namespace lns {

// Story `index` of `seed`: a title, a few paragraphs and a final newline; ASCII, 100 to 900 bytes.
// A pure function, the same with every compiler.
std::string story(uint64_t seed, uint64_t index);

// The stories of a seed as tokens of the bytes tokenizer, each followed by end-of-text. Token p is
// token p % block_tokens of block p / block_tokens; block j has the stories from index
// j * block_tokens on, the last one truncated. So any position can be read without the preceding
// ones, and no story repeats. read is thread-safe.
struct StorySource : TokenSource {
    static constexpr size_t block_tokens = 65536;

    explicit StorySource(uint64_t seed);
    uint64_t size() const override { return endless; }
    void read(uint64_t pos, size_t n, int* out) override;
    TokenizerId id() const override { return tokenizer; }
    std::string describe() const override;
    void check_tokens(int vocab) override;

    const uint64_t seed;

  private:
    using Block = std::array<uint16_t, block_tokens>;
    std::shared_ptr<const Block> block(uint64_t number);

    TokenizerId tokenizer;
    std::mutex mutex; // guards the cache
    std::array<std::pair<uint64_t, std::shared_ptr<const Block>>, 4> cache;
    size_t oldest = 0;
};

} // namespace lns
