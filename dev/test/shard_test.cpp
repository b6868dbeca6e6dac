// Shards: llm.c's layout byte for byte, and everything that can be wrong with a file.
#include "dev/test/data_helpers.h"
#include "gpt/base/checksum.h"
#include "gpt/data/paths.h"
#include "gpt/data/shard.h"

#include <csignal>
#include <cstring>
#include <gtest/gtest.h>
#include <sys/resource.h>

using namespace lns;
using namespace lns::test;

namespace {

// The layout of llm.c's dev/data/data_common.py, independently of gpt/data/shard.cpp.
template <class Token> std::string by_hand(std::vector<int32_t> words, std::vector<Token> tokens) {
    words.resize(256);
    std::string bytes(1024 + tokens.size() * sizeof(Token), '\0');
    std::memcpy(bytes.data(), words.data(), 1024);
    std::memcpy(bytes.data() + 1024, tokens.data(), tokens.size() * sizeof(Token));
    return bytes;
}

// The same with words 20 to 23, the checksums.
template <class Token>
std::string with_checksums(std::vector<int32_t> words, std::vector<Token> tokens) {
    std::string bytes = by_hand(words, tokens);
    const uint64_t of_tokens = checksum(bytes.data() + 1024, bytes.size() - 1024);
    std::memcpy(bytes.data() + 80, &of_tokens, 8);
    const uint64_t of_header = checksum(bytes.data(), 1024);
    std::memcpy(bytes.data() + 88, &of_header, 8);
    return bytes;
}

const TokenizerId gpt2{"gpt2", 50257, 50256, 0x0123456789abcdef};

std::vector<int> all_tokens(const Shard& shard) {
    std::vector<int> tokens(shard.tokens);
    shard.read(0, tokens.size(), tokens.data());
    return tokens;
}

void write_shard(const std::string& path, const TokenizerId& id, const std::vector<int>& tokens) {
    ShardWriter writer(path, id);
    writer.write(tokens.data(), tokens.size());
    writer.close();
}

} // namespace

TEST(Shard, WritesTheLayoutOfLlmC) {
    TemporaryDirectory dir;
    write_shard(dir / "unnamed.bin", {}, {0, 1, 258, 65535});
    EXPECT_EQ(read_bytes(dir / "unnamed.bin"),
              with_checksums<uint16_t>({20240520, 1, 4}, {0, 1, 258, 65535}));

    write_shard(dir / "named.bin", gpt2, {50256, 7});
    std::vector<int32_t> words = {
        20240520, 1, 2, 0x31534e4c, 50257, 50256, int32_t(0x89abcdef), 0x01234567, 0x32747067};
    EXPECT_EQ(read_bytes(dir / "named.bin"), with_checksums<uint16_t>(words, {50256, 7}));

    write_shard(dir / "wide.bin", {"x", 128256, -1, 5}, {128255, 3});
    words = {20240801, 7, 2, 0x31534e4c, 128256, -1, 5, 0, 'x'};
    EXPECT_EQ(read_bytes(dir / "wide.bin"), with_checksums<uint32_t>(words, {128255, 3}));
}

TEST(Shard, ReadsFilesOfLlmC) {
    TemporaryDirectory dir;
    write_bytes(dir / "a.bin", by_hand<uint16_t>({20240520, 1, 3}, {50256, 0, 65535}));
    Shard a(dir / "a.bin");
    EXPECT_EQ(all_tokens(a), (std::vector<int>{50256, 0, 65535}));
    EXPECT_EQ(a.id, TokenizerId{});
    write_bytes(dir / "b.bin", by_hand<uint32_t>({20240801, 7, 2}, {128000, 1}));
    EXPECT_EQ(all_tokens(Shard(dir / "b.bin")), (std::vector<int>{128000, 1}));

    std::vector<int> two(2);
    a.read(1, 2, two.data());
    EXPECT_EQ(two, (std::vector<int>{0, 65535}));
    EXPECT_TRUE(says(error_of([&] { a.read(2, 2, two.data()); }), {"which has 3"}));
    EXPECT_TRUE(says(error_of([&] { a.read(UINT64_MAX, 2, two.data()); }), {"which has 3"}));
}

TEST(Shard, KeepsTheTokenizersIdentity) {
    TemporaryDirectory dir;
    write_shard(dir / "a.bin", gpt2, {1});
    EXPECT_EQ(Shard(dir / "a.bin").id, gpt2);
    EXPECT_TRUE(says(error_of([&] {
                         ShardWriter(dir / "b.bin", {std::string(32, 'k'), 10, -1, 0});
                     }),
                     {"does not fit a shard's header"}));
}

TEST(Shard, LargeFilesStreamThroughTheBuffer) {
    TemporaryDirectory dir;
    std::vector<int> tokens(3'000'001);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = int(i * 7919 % 50257);
    ShardWriter writer(dir / "a.bin", gpt2);
    for (size_t i = 0; i < tokens.size();) {
        size_t n = std::min<size_t>(tokens.size() - i, 99'991);
        writer.write(tokens.data() + i, n);
        i += n;
    }
    writer.close();
    EXPECT_EQ(all_tokens(Shard(dir / "a.bin")), tokens);
}

TEST(Shard, RefusesWhatIsNotAShard) {
    TemporaryDirectory dir;
    auto refused = [&](const std::string& bytes) {
        write_bytes(dir / "bad.bin", bytes);
        std::string error = error_of([&] { Shard(dir / "bad.bin"); });
        EXPECT_TRUE(says(error, {dir / "bad.bin"}));
        return error;
    };
    EXPECT_TRUE(says(error_of([&] { Shard(dir / "none.bin"); }), {"none.bin", "No such file"}));
    EXPECT_TRUE(says(error_of([&] { Shard shard(dir.path); }), {"is a directory"}));
    EXPECT_TRUE(says(refused(""), {"is empty"}));
    std::string good = by_hand<uint16_t>({20240520, 1, 3}, {1, 2, 3});
    EXPECT_TRUE(says(refused(good.substr(0, 3)), {"is not a shard"}));
    EXPECT_TRUE(says(refused(good.substr(0, 100)), {"truncated: 100 bytes"}));
    EXPECT_TRUE(says(refused(good.substr(0, good.size() - 1)),
                     {"truncated: 1029 bytes, expected 1030 for its 3 tokens"}));
    EXPECT_TRUE(says(refused(good + "x"), {"longer than it says: 1031 bytes, expected 1030"}));
    EXPECT_TRUE(
        says(refused(by_hand<uint16_t>({20240520, 2, 3}, {1, 2, 3})), {"version 2, expected 1"}));
    EXPECT_TRUE(says(refused(by_hand<uint32_t>({20240801, 1, 1}, {1})), {"version 1, expected 7"}));
    EXPECT_TRUE(says(refused(by_hand<uint16_t>({20240520, 1, -5}, {1})), {"-5 tokens"}));
    EXPECT_TRUE(
        says(refused(by_hand<uint16_t>({int32_t(0x88d83401), 1, 1}, {1})), {"bytes are swapped"}));
    EXPECT_TRUE(says(refused(by_hand<uint16_t>({12345, 1, 1}, {1})),
                     {"starts with 12345, expected 20240520 or 20240801"}));
    EXPECT_TRUE(says(refused("Once upon a time\n"), {"looks like text"}));
    EXPECT_TRUE(says(refused(by_hand<uint16_t>({20240520, 1, 1, 0x31534e4c, 10, 10}, {1})),
                     {"damaged header"}));
}

TEST(Shard, NoBitCanFlipUnnoticed) {
    TemporaryDirectory dir;
    write_shard(dir / "a.bin", gpt2, {50256, 7, 8});
    const std::string good = read_bytes(dir / "a.bin");
    Shard(dir / "a.bin").check_checksum();
    for (size_t bit = 0; bit < 8 * good.size(); bit++) {
        std::string bytes = good;
        bytes[bit / 8] ^= char(1 << bit % 8);
        write_bytes(dir / "bad.bin", bytes);
        EXPECT_NE(error_of([&] { Shard(dir / "bad.bin").check_checksum(); }), "")
            << "bit " << bit % 8 << " of byte " << bit / 8;
    }
}

TEST(Shard, FindsTokensBeyondTheVocabulary) {
    TemporaryDirectory dir;
    std::vector<int> tokens(10'000, 255);
    tokens[9'001] = 256;
    write_shard(dir / "a.bin", {"bytes", 257, 256, 1}, tokens);
    Shard a(dir / "a.bin");
    EXPECT_EQ(error_of([&] { a.check_tokens(257); }), "");
    EXPECT_TRUE(says(error_of([&] { a.check_tokens(256); }),
                     {"token 9001 of ", "is 256, expected one below",
                      "bytes tokenizer, whose vocabulary has 257"}));
    write_bytes(dir / "b.bin", by_hand<uint32_t>({20240801, 7, 2}, {5, 0xffffffff}));
    EXPECT_TRUE(
        says(error_of([&] { Shard(dir / "b.bin").check_tokens(INT32_MAX); }), {"is 4294967295"}));
    EXPECT_TRUE(says(error_of([&] {
                         write_shard(dir / "c.bin", {"bytes", 257, 256, 1}, {3, 257});
                     }),
                     {"token 257 does not fit the vocabulary of 257"}));
    EXPECT_TRUE(says(error_of([&] {
                         write_shard(dir / "c.bin", {"bytes", 257, 256, 1}, {-1});
                     }),
                     {"token -1 does not fit"}));
}

TEST(Shard, AnUnfinishedFileLeavesNothing) {
    TemporaryDirectory dir;
    write_shard(dir / "a.bin", gpt2, {1, 2, 3});
    std::string before = read_bytes(dir / "a.bin");
    {
        ShardWriter writer(dir / "a.bin", gpt2);
        int token = 4;
        writer.write(&token, 1);
        EXPECT_TRUE(says(error_of([&] { ShardWriter(dir / "a.bin", gpt2); }),
                         {"another process is writing"}));
        writer.finish();
    }
    EXPECT_EQ(read_bytes(dir / "a.bin"), before);
    EXPECT_FALSE(std::filesystem::exists(dir / "a.bin.tmp"));
    EXPECT_TRUE(
        says(error_of([&] { ShardWriter(dir / "missing/a.bin", gpt2); }), {"No such file"}));
}

TEST(Shard, AFullDiskIsAnErrorAndLeavesNothing) {
    TemporaryDirectory dir;
    write_shard(dir / "a.bin", gpt2, {1, 2, 3});
    std::string before = read_bytes(dir / "a.bin");
    // A file size limit stands in for a full disk: write(2) fails in the same place.
    rlimit old;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
    auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
    rlimit small{5 << 20, old.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    std::vector<int> tokens(4 << 20, 1);
    std::string error = error_of([&] { write_shard(dir / "a.bin", gpt2, tokens); });
    setrlimit(RLIMIT_FSIZE, &old);
    std::signal(SIGXFSZ, old_handler);
    EXPECT_TRUE(says(error, {"cannot write", "Nothing is left"}));
    EXPECT_FALSE(std::filesystem::exists(dir / "a.bin.tmp"));
    EXPECT_EQ(read_bytes(dir / "a.bin"), before);
}

TEST(Shard, PatternsAreSortedAndMustMatch) {
    TemporaryDirectory dir;
    for (const char* name : {"t_000010.bin", "t_000002.bin", "t_000001.bin", "v_000000.bin"})
        write_bytes(dir / name, "x");
    EXPECT_EQ(glob_paths(dir / "t_*.bin"),
              (std::vector<std::string>{dir / "t_000001.bin", dir / "t_000002.bin",
                                        dir / "t_000010.bin"}));
    EXPECT_EQ(glob_paths(dir / "v_000000.bin").size(), 1u);
    EXPECT_TRUE(says(error_of([&] { glob_paths(dir / "x_*.bin"); }), {"no file matches"}));
}

TEST(Shard, WindowsOfPaddedDocuments) {
    TemporaryDirectory dir;
    const TokenizerId bytes{"bytes", 257, 256, 7};
    {
        ShardWriter writer(dir / "a.bin", bytes, 3);
        const int tokens[] = {1, 256, 256, 2, 3, 256};
        writer.write(tokens, 6);
        writer.close();
    }
    std::vector<int32_t> words = {20240520, 1, 6, 0x31534e4c, 257, 256, 7, 0, 0x65747962, 's'};
    words.resize(17);
    words[16] = 3;
    // llm.c reads only the first three words.
    EXPECT_EQ(read_bytes(dir / "a.bin"), with_checksums<uint16_t>(words, {1, 256, 256, 2, 3, 256}));
    EXPECT_EQ(Shard(dir / "a.bin").window, 3);
    EXPECT_EQ(Shard(Shard(dir / "a.bin")).window, 3); // moved

    auto refused = [&](int word, int32_t value) {
        std::vector<int32_t> other = words;
        other[size_t(word)] = value;
        write_bytes(dir / "bad.bin", by_hand<uint16_t>(other, {1, 256, 256, 2, 3, 256}));
        return error_of([&] { Shard(dir / "bad.bin"); });
    };
    for (int window : {-3, 1, 4, 7})
        EXPECT_TRUE(says(refused(16, window), {"damaged header", cat("windows of ", window)}));
    EXPECT_TRUE(says(refused(5, -1), {"damaged header", "end-of-text -1"}));

    EXPECT_TRUE(says(error_of([&] {
                         ShardWriter(dir / "b.bin", {"x", 9, -1, 0}, 3);
                     }),
                     {"cannot be padded to 3", "end-of-text -1"}));
    ShardWriter half(dir / "b.bin", bytes, 3);
    const int two[] = {1, 2};
    half.write(two, 2);
    EXPECT_TRUE(says(error_of([&] { half.close(); }), {"inside a window: 2 tokens"}));
}
