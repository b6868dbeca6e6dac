// The loader visits every window once per epoch, in an order determined by the seed, and resumes
// from its state.
#include "dev/test/data_helpers.h"
#include "gpt/data/loader.h"

#include <algorithm>
#include <gtest/gtest.h>
#include <numeric>
#include <set>

using namespace lns;
using namespace lns::test;

namespace {

std::vector<int> counting(int n, int from = 0) {
    std::vector<int> tokens(static_cast<size_t>(n));
    std::iota(tokens.begin(), tokens.end(), from);
    return tokens;
}

std::shared_ptr<TokenSource> memory(int n) { return std::make_shared<MemorySource>(counting(n)); }

// The first tokens of the next n windows, each checked to be T consecutive numbers and their
// successors.
std::vector<int> firsts(Loader& loader, int T, int n) {
    std::vector<int> result;
    std::vector<int> inputs(static_cast<size_t>(T)), targets(inputs);
    for (int i = 0; i < n; i++) {
        loader.next(1, inputs.data(), targets.data());
        EXPECT_EQ(inputs, counting(T, inputs[0]));
        EXPECT_EQ(targets, counting(T, inputs[0] + 1));
        result.push_back(inputs[0]);
    }
    return result;
}

void write_shard(const std::string& path, const TokenizerId& id, const std::vector<int>& tokens) {
    ShardWriter writer(path, id);
    writer.write(tokens.data(), tokens.size());
    writer.close();
}

struct Endless : TokenSource {
    uint64_t size() const override { return endless; }
    void read(uint64_t pos, size_t n, int* out) override { std::iota(out, out + n, int(pos)); }
    TokenizerId id() const override { return {}; }
    std::string describe() const override { return "endless"; }
};

} // namespace

TEST(Loader, PermutationsArePermutations) {
    for (uint64_t n : {1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 4097}) {
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t to = permute(i, n, 42, 3);
            ASSERT_LT(to, n);
            seen.insert(to);
        }
        EXPECT_EQ(seen.size(), n);
    }
    // Beyond 32 bits, a sample has no duplicates and stays in range.
    std::set<uint64_t> seen;
    const uint64_t n = (uint64_t(1) << 40) + 12345;
    for (uint64_t i = n - 1000; i < n; i++) seen.insert(permute(i, n, 42, 3));
    EXPECT_EQ(seen.size(), 1000u);
    EXPECT_LT(*seen.rbegin(), n);
}

TEST(Loader, PermutationsLookRandom) {
    // Over seeds, each i is uniformly distributed: chi-squared of 16 cells, 15 degrees of freedom.
    const int draws = 16000;
    for (uint64_t i : {0, 7, 15}) {
        std::vector<int> count(16);
        for (int seed = 0; seed < draws; seed++) count[permute(i, 16, uint64_t(seed), 0)]++;
        double chi = 0;
        for (int c : count) chi += (c - draws / 16.0) * (c - draws / 16.0) / (draws / 16.0);
        EXPECT_LT(chi, 45) << "position " << i; // p < 1e-4
    }
    // Neighbours are separated.
    int neighbours = 0;
    for (uint64_t i = 0; i + 1 < 1000; i++) {
        uint64_t a = permute(i, 1000, 1, 0), b = permute(i + 1, 1000, 1, 0);
        neighbours += b == a + 1;
    }
    EXPECT_LT(neighbours, 10);
}

TEST(Loader, AnEpochVisitsEveryWindowOnce) {
    const int T = 7, windows = 142; // 1000 tokens: (1000 - 1) / 7
    Loader loader(memory(1000), T, 1, true);
    EXPECT_EQ(loader.windows_per_epoch(), uint64_t(windows));
    std::vector<int> in_order;
    for (int w = 0; w < windows; w++) in_order.push_back(w * T);
    std::vector<int> first = firsts(loader, T, windows), second = firsts(loader, T, windows);
    EXPECT_NE(first, in_order);
    EXPECT_NE(first, second);
    EXPECT_EQ(loader.state(), (LoaderState{2, 0}));
    Loader same(memory(1000), T, 1, true), other(memory(1000), T, 2, true);
    EXPECT_EQ(firsts(same, T, windows), first);
    EXPECT_NE(firsts(other, T, windows), first);
    std::sort(first.begin(), first.end());
    std::sort(second.begin(), second.end());
    EXPECT_EQ(first, in_order);
    EXPECT_EQ(second, in_order);
}

TEST(Loader, WithoutShufflingKeepsTheOrder) {
    Loader loader(memory(29), 7, 1, false);
    EXPECT_EQ(loader.windows_per_epoch(), 4u);
    EXPECT_EQ(firsts(loader, 7, 6), (std::vector<int>{0, 7, 14, 21, 0, 7}));
    Loader shorter(memory(28), 7, 1, false);
    EXPECT_EQ(shorter.windows_per_epoch(), 3u); // the fourth would lack its last target
}

TEST(Loader, SavedAndRestoredExactly) {
    const int T = 5;
    Loader straight(memory(333), T, 9, true);
    std::vector<int> all = firsts(straight, T, 200);
    for (int stop : {0, 1, 65, 66, 67, 132, 150}) {
        Loader before(memory(333), T, 9, true);
        firsts(before, T, stop);
        Loader after(memory(333), T, 9, true);
        after.restore(before.state());
        EXPECT_EQ(firsts(after, T, 200 - stop), std::vector<int>(all.begin() + stop, all.end()));
        EXPECT_EQ(after.state(), straight.state());
    }
    Loader smaller(memory(100), T, 9, true);
    EXPECT_TRUE(says(error_of([&] {
                         smaller.restore({0, 30});
                     }),
                     {"window 30", "19 windows of 5"}));
}

TEST(Loader, RanksTogetherReadTheSameAsOne) {
    const int T = 5, B = 3, R = 4, steps = 17; // crosses epochs of 66 windows mid-step
    Loader one(memory(333), T, 9, true);
    std::vector<int> all = firsts(one, T, B * R * steps), together(all.size());
    for (int rank = 0; rank < R; rank++) {
        Loader loader(memory(333), T, 9, true);
        for (int step = 0; step < steps; step++) {
            loader.skip(uint64_t(rank * B));
            std::vector<int> got = firsts(loader, T, B);
            std::copy(got.begin(), got.end(), together.begin() + (step * R + rank) * B);
            loader.skip(uint64_t((R - 1 - rank) * B));
        }
        EXPECT_EQ(loader.state(), one.state());
    }
    EXPECT_EQ(together, all);
}

TEST(Loader, BatchesAreConsecutiveWindows) {
    Loader a(memory(333), 5, 9, true), b(memory(333), 5, 9, true);
    std::vector<int> inputs(20), targets(20), starts = firsts(a, 5, 4);
    b.next(4, inputs.data(), targets.data());
    for (int w = 0; w < 4; w++)
        for (int t = 0; t < 5; t++) {
            EXPECT_EQ(inputs[size_t(w * 5 + t)], starts[size_t(w)] + t);
            EXPECT_EQ(targets[size_t(w * 5 + t)], starts[size_t(w)] + t + 1);
        }
}

TEST(Loader, WindowsDoNotCrossShards) {
    TemporaryDirectory dir;
    // 23 tokens: 3 windows of 7; 7: none; 1: none; empty: none; 8: one.
    int next = 0;
    std::vector<int> lengths = {23, 7, 1, 0, 8}, starts;
    for (size_t s = 0; s < lengths.size(); s++) {
        for (int w = 0; w < (lengths[s] - 1) / 7; w++) starts.push_back(next + w * 7);
        write_shard(dir / cat("a_", s, ".bin"), {}, counting(lengths[s], next));
        next += lengths[s];
    }
    auto source = std::make_shared<ShardSource>(dir / "a_*.bin");
    EXPECT_EQ(source->size(), 39u);
    EXPECT_EQ(source->parts(), (std::vector<uint64_t>{23, 7, 1, 0, 8}));
    Loader loader(source, 7, 1, false);
    EXPECT_EQ(firsts(loader, 7, 4), starts);
    Loader shuffled(source, 7, 1, true);
    std::vector<int> got = firsts(shuffled, 7, 4);
    std::sort(got.begin(), got.end());
    EXPECT_EQ(got, starts);

    // read itself crosses shards.
    std::vector<int> all(39);
    source->read(0, 39, all.data());
    EXPECT_EQ(all, counting(39));
    EXPECT_TRUE(says(error_of([&] { source->read(30, 10, all.data()); }), {"which has 39"}));
}

TEST(Loader, EndlessSourcesGoInOrder) {
    Loader loader(std::make_shared<Endless>(), 7, 1, true);
    EXPECT_EQ(loader.windows_per_epoch(), TokenSource::endless);
    EXPECT_EQ(firsts(loader, 7, 3), (std::vector<int>{0, 7, 14}));
    loader.skip(10);
    EXPECT_EQ(firsts(loader, 7, 1), (std::vector<int>{91}));
    EXPECT_EQ(loader.state(), (LoaderState{0, 14}));
}

TEST(Loader, TooShortIsAnError) {
    EXPECT_TRUE(says(error_of([] { Loader(memory(64), 64, 1, true); }),
                     {"needs 65 tokens", "has 64 at most"}));
    EXPECT_EQ(error_of([] { Loader(memory(65), 64, 1, true); }), "");
    EXPECT_TRUE(says(error_of([] { Loader(memory(65), 0, 1, true); }), {"at least 1"}));
}

TEST(Loader, DifferentTokenizersDoNotMix) {
    TemporaryDirectory dir;
    write_shard(dir / "a_0.bin", {}, {1, 2});
    write_shard(dir / "a_1.bin", {"gpt2", 50257, 50256, 1}, {1, 2});
    ShardSource known(dir / "a_*.bin");
    EXPECT_EQ(known.id().kind, "gpt2");
    write_shard(dir / "a_2.bin", {"gpt2", 50257, 50256, 2}, {1, 2});
    EXPECT_TRUE(says(error_of([&] { ShardSource(dir / "a_*.bin"); }),
                     {"a_1.bin", "a_2.bin", "different contents"}));
}

TEST(Loader, TokensAreCheckedAtOnceOrOnReading) {
    TemporaryDirectory dir;
    write_shard(dir / "a_0.bin", {}, {1, 2, 3, 4});
    write_shard(dir / "a_1.bin", {}, {1, 2, 9, 4});
    ShardSource source(dir / "a_*.bin");
    EXPECT_EQ(error_of([&] { source.check_tokens(10); }), "");
    EXPECT_TRUE(says(error_of([&] { source.check_tokens(9); }), {"token 2 of ", "a_1.bin is 9"}));
    source.checked_at_once = 8; // the first file only
    EXPECT_EQ(error_of([&] { source.check_tokens(9); }), "");
    int out[6];
    EXPECT_EQ(error_of([&] { source.read(0, 6, out); }), "");
    EXPECT_TRUE(says(error_of([&] { source.read(3, 6, out); }), {"which has 8"}));
    EXPECT_TRUE(says(error_of([&] { source.read(3, 4, out); }), {"token 2 of ", "a_1.bin is 9"}));
    EXPECT_TRUE(says(error_of([] { MemorySource({1, -1}).check_tokens(5); }), {"is -1"}));
}

TEST(Loader, ChecksumsAreComparedAtOnceOrInTheBackground) {
    TemporaryDirectory dir;
    for (const char* name : {"a_0.bin", "a_1.bin"})
        write_shard(dir / name, {"bytes", 257, 256, 1}, std::vector<int>(10, 7));
    std::string bytes = read_bytes(dir / "a_1.bin");
    bytes[bytes.size() - 2] ^= 4;
    write_bytes(dir / "a_1.bin", bytes);
    ShardSource at_once(dir / "a_*.bin");
    EXPECT_TRUE(says(error_of([&] { at_once.check_tokens(257); }), {"a_1.bin is damaged"}));
    at_once.finish_checks(); // nothing remains to be checked

    ShardSource later(dir / "a_*.bin");
    later.checked_at_once = 20; // the first file only
    later.check_tokens(257);
    EXPECT_TRUE(says(error_of([&] { later.finish_checks(); }), {"a_1.bin is damaged"}));
    int token;
    EXPECT_TRUE(says(error_of([&] { later.read(0, 1, &token); }), {"a_1.bin is damaged"}));

    bytes[bytes.size() - 2] ^= 4;
    write_bytes(dir / "a_1.bin", bytes);
    ShardSource whole(dir / "a_*.bin");
    whole.checked_at_once = 20;
    whole.check_tokens(257);
    whole.finish_checks();
    whole.read(19, 1, &token);
    EXPECT_EQ(token, 7);
    { // destroying a source does not wait for its checks
        ShardSource left(dir / "a_*.bin");
        left.checked_at_once = 0;
        left.check_tokens(257);
    }
}

TEST(Loader, APaddedDocumentIsAWindow) {
    // end-of-text 9; the documents 1 2 / 3 4 5 (cut) / 6 / 7 8 of a window of 4
    const std::vector<int> tokens = {1, 2, 9, 9, 3, 4, 5, 9, 6, 9, 9, 9, 7, 8, 9, 9};
    const TokenizerId id{"x", 10, 9, 1};
    auto source = [&] { return std::make_shared<MemorySource>(tokens, id, 4); };
    Loader loader(source(), 4, 1, false);
    EXPECT_EQ(loader.windows_per_epoch(), 4u);
    std::vector<int> inputs(16), targets(16);
    loader.next(4, inputs.data(), targets.data());
    EXPECT_EQ(inputs, tokens);
    // A document's end is a target; padding and the next document are not.
    EXPECT_EQ(targets, (std::vector<int>{2, 9, -1, -1, 4, 5, 9, -1, 9, -1, -1, -1, 8, 9, -1, -1}));

    // As in the paper's code: labels are the tokens, -100 for padding, and the model compares
    // position t with label t + 1 (so the last has none).
    for (size_t w = 0; w < 4; w++) {
        bool ended = false;
        std::vector<int> expected;
        for (size_t t = 0; t < 4; t++) {
            expected.push_back(ended ? -1 : tokens[w * 4 + t]);
            ended |= tokens[w * 4 + t] == 9;
        }
        expected.erase(expected.begin());
        expected.push_back(-1);
        EXPECT_EQ(std::vector<int>(targets.begin() + w * 4, targets.begin() + w * 4 + 4), expected);
    }

    Loader shuffled(source(), 4, 1, true);
    std::multiset<int> firsts;
    for (int i = 0; i < 4; i++) {
        shuffled.next(1, inputs.data(), targets.data());
        firsts.insert(inputs[0]);
    }
    EXPECT_EQ(firsts, (std::multiset<int>{1, 3, 6, 7}));

    for (int T : {2, 3, 8})
        EXPECT_TRUE(says(error_of([&] { Loader(source(), T, 1, false); }),
                         {cat("sequences of ", T), "--seq-len 4", "--pad-documents"}));
}

TEST(Loader, PaddedShardsDoNotMixWithStreams) {
    TemporaryDirectory dir;
    const TokenizerId id{"x", 10, 9, 1};
    auto padded = [&](const std::string& name, const std::vector<int>& tokens, int window) {
        ShardWriter writer(dir / name, id, window);
        writer.write(tokens.data(), tokens.size());
        writer.close();
    };
    padded("a_0.bin", {1, 9, 9, 2, 3, 9}, 3);
    padded("a_1.bin", {4, 9, 9}, 3);
    auto source = std::make_shared<ShardSource>(dir / "a_*.bin");
    EXPECT_EQ(source->window(), 3);
    EXPECT_TRUE(says(source->describe(), {"documents padded to 3 tokens"}));
    Loader loader(source, 3, 1, false);
    EXPECT_EQ(loader.windows_per_epoch(), 3u); // the last window of a shard is complete
    std::vector<int> inputs(9), targets(9);
    loader.next(3, inputs.data(), targets.data());
    EXPECT_EQ(targets, (std::vector<int>{9, -1, -1, 3, 9, -1, 9, -1, -1}));
    for (int window : {0, 1}) {
        padded("a_2.bin", {1, 9, 1, 9}, window ? 4 : 0);
        EXPECT_TRUE(says(error_of([&] { ShardSource(dir / "a_*.bin"); }),
                         {"a_0.bin has documents padded to 3", "a_2.bin has",
                          window ? "padded to 4" : "one stream of tokens"}));
    }
}
