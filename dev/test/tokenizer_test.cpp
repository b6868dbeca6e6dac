// Tokenizers against reference encodings, made by dev/test/fixtures/tokenizers/make.py. If
// LNS_GPT2_DIR has the full encoder.json and vocab.bpe, they are used too.
#include "dev/test/data_helpers.h"
#include "gpt/base/random.h"
#include "gpt/base/terminal.h"
#include "gpt/data/tokenizer.h"

#include <gtest/gtest.h>
#include <thread>

using namespace lns;
using namespace lns::test;
using namespace std::string_literals;

namespace {

struct Case {
    std::string text;
    std::vector<int> tokens;
};

const std::string fixtures = "dev/test/fixtures/tokenizers/";

#ifdef LNS_PCRE2
const std::vector<Case> gpt2_cases = {
    {""s, {}},
    {"Hello, world!"s, {15496, 11, 995, 0}},
    {"It's what they've said: I'm sure we'll see, you're right, he'd know, don't."s,
     {1026, 338, 644, 484, 1053, 531, 25,   314, 1101, 1654, 356, 1183, 766,
      11,   345, 821, 826, 11,   339, 1549, 760, 11,   836,  470, 13}},
    {"IT'S 'SO' 'twas rock'n'roll' 'tis' ''s"s,
     {2043, 6,  50, 705,  15821, 6,   705,   4246, 292,   3881,
      6,    77, 6,  2487, 6,     705, 48010, 6,    10148, 82}},
    {"In 2023, 1234567890 and 3.14159; 1st, 2nd; x86_64"s,
     {818,   1160, 1954, 11,  17031, 2231, 30924, 3829, 290,  513,  13, 1415,
      19707, 26,   352,  301, 11,    362,  358,   26,   2124, 4521, 62, 2414}},
    {"a  b   c    d     e"s,
     {64, 220, 275, 220, 220, 269, 220, 220, 220, 288, 220, 220, 220, 220, 304}},
    {"trailing spaces   "s, {9535, 4386, 9029, 220, 220, 220}},
    {"   leading"s, {220, 220, 3756}},
    {" "s, {220}},
    {"\n\n\n"s, {628, 198}},
    {"line one\nline two\015\n\n\tindented\n    four spaces\n"s,
     {1370, 530, 198, 1370, 734, 201, 628, 197, 521, 4714, 198, 220, 220, 220, 1440, 9029, 198}},
    {"tab\t\ttab \t x"s, {8658, 197, 197, 8658, 220, 197, 2124}},
    {"smile 🙂 family 👩\342\200\215👩\342\200\215👧 flag 🇳🇴!"s,
     {5796, 576,   32485, 1641, 50169, 102, 447, 235,  41840, 102, 447,
      235,  41840, 100,   6056, 12520, 229, 111, 8582, 229,   112, 0}},
    {"中文字符，日本語の文章。 한국어"s,
     {40792, 23877, 229,   27764, 245,   163, 105,  99,    171, 120,   234,
      33768, 98,    17312, 105,   45739, 252, 5641, 23877, 229, 44165, 254,
      16764, 220,   47991, 250,   166,   113, 255,  168,   244, 112}},
    {"café cafe\314\201 naïve Ångström ßtraße"s,
     {66, 1878, 2634, 26725, 136, 223, 41492, 6184, 227, 782, 2536, 9101, 76, 6184, 253, 9535,
      39683, 68}},
    {"nbsp\302\240here\343\200\200wide\342\200\250line\302\205next\341\240\216mvs"s,
     {77, 24145, 1849, 1456, 5099, 222, 4421, 447, 101, 1370, 126, 227, 19545, 157, 254, 236, 76,
      14259}},
    {"½ ² Ⅷ ٣ ৪ x² 10⁻³"s,
     {23141, 1587, 110, 2343, 227, 100, 18923, 96, 220, 156, 100, 103, 2124, 31185, 838, 46256, 119,
      126, 111}},
    {"Здравствуй, мир! Γειά σου שלום مرحبا"s,
     {140, 245, 43666, 21169, 16142, 38857, 21727, 20375, 38857, 35072, 140,
      117, 11,  12466, 120,   18849, 21169, 0,     7377,  241,   30950, 29945,
      138, 105, 18074, 225,   26517, 139,   227,   14360, 102,   40010, 27072,
      147, 251, 47048, 26897, 148,   255,   39848, 12919}},
    {"<|endoftext|>"s, {27, 91, 437, 1659, 5239, 91, 29}},
    {"antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis"s,
     {415, 29207, 44390, 3699, 1042, 29631, 261, 25955, 859, 2500, 1416, 404, 873, 41896, 709, 349,
      5171, 36221, 42960}},
    {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"s,
     {24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794,
      24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794}},
    {"====================================================================== ---------------------------------------------------------------------------------"s,
     {23926, 50155, 16529, 1783, 12}},
    {"abababababababababababababababababababababababababababababababababababababababababababababababababababababababababababab!                                                                                          "s,
     {397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397,
      397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397,
      397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397, 397,
      397, 397, 397, 0,   220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
      220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
      220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
      220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
      220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220}},
    {"\000\001\037\177"s, {188, 189, 219, 221}},
    {"for (int i = 0; i < n; i++) { sum += x[i]; }"s,
     {1640, 357,   600,  1312, 796,   657,  26, 1312, 1279,  299, 26,
      1312, 29577, 1391, 2160, 15853, 2124, 58, 72,   11208, 1782}},
    {"\357\273\277bom �\342\200\213zero"s, {171, 119, 123, 65, 296, 20543, 9525, 22570}},
};
#endif

#ifdef LNS_SENTENCEPIECE
const std::vector<Case> exact_cases = {
    {""s, {}},
    {"Hello, world!"s, {330, 75, 331, 353, 353, 335, 341, 270, 266, 353, 340, 36}},
    {"First Citizen:\nBefore we proceed any further, hear me speak.\n"s,
     {330, 325, 277, 279, 305, 306, 302, 345, 13,  369, 274, 284, 270, 331, 321, 276, 299,
      301, 271, 355, 263, 278, 260, 333, 341, 330, 259, 294, 280, 331, 288, 344, 13}},
    {"the  fox\n\n  and the dog "s, {264, 330, 287, 13, 13, 330, 286, 264, 285, 358, 330}},
    {" leading\n"s, {330, 319, 331, 332, 340, 304, 358, 13}},
    {"café 🙂 中文\t1\n"s,
     {318, 283, 330, 243, 162, 156, 133, 330, 231, 187, 176, 233, 153, 138, 12, 356, 13}},
    {"line\n\nline \n x"s, {319, 304, 331, 13, 13, 353, 304, 331, 330, 13, 322}},
};

const std::vector<Case> folding_cases = {
    {""s, {}},
    {"Hello, world!"s, {3, 0, 11, 18, 18, 77, 5, 23, 70, 18, 12, 0}},
    {"First Citizen:\nBefore we proceed any further, hear me speak.\n"s,
     {3,  61, 6,  8,  41, 33, 6,  13, 6,  31, 45, 14, 3,  60, 37, 39, 23, 11, 3,  26, 38,
      20, 11, 11, 12, 24, 19, 28, 40, 47, 8,  5,  3,  36, 4,  8,  44, 11, 25, 21, 9}},
    {"the  fox\n\n  and the dog "s, {16, 3, 42, 15, 24, 12, 16, 35, 34}},
    {" leading\n"s, {3, 18, 11, 4, 12, 6, 7, 34}},
    {"café 🙂 中文\t1\n"s, {3, 20, 30, 3, 0, 3, 0, 32}},
    {"line\n\nline \n x"s, {3, 18, 6, 7, 11, 3, 18, 6, 7, 11, 3, 15}},
};
#endif

// Text of unusual pieces, most of them valid UTF-8.
std::string odd_text(uint64_t i) {
    const std::string pieces[] = {"'s",
                                  "'t",
                                  "'re",
                                  "'ve",
                                  "'m",
                                  "'ll",
                                  "'d",
                                  "'",
                                  " ",
                                  "  ",
                                  "\n",
                                  "\t",
                                  "\r\n",
                                  "\u00a0",
                                  "\u3000",
                                  "\u180e",
                                  "\u0085",
                                  "\u2028",
                                  "a",
                                  "the",
                                  "B",
                                  "\u00e9",
                                  "e\u0301",
                                  "1",
                                  "23",
                                  "\u00bd",
                                  "\u4e2d",
                                  "\u3002",
                                  "\U0001F642",
                                  "!",
                                  "...",
                                  "<|endoftext|>",
                                  "\0"s,
                                  "\xff",
                                  "\xe3\x80",
                                  "\xc3",
                                  "\x80",
                                  "\xf0\x9f",
                                  "\xed\xa0\x80",
                                  "\xc0\x80"};
    std::string text;
    uint32_t n = random_below(24, 7, i, 0);
    for (uint32_t k = 1; k <= n; k++) text += pieces[random_below(std::size(pieces), 7, i, k)];
    return text;
}

// Checks that cutting any prefix at safe_cut preserves the tokens of the whole.
testing::AssertionResult cuts_are_exact(const Tokenizer& tokenizer, const std::string& text,
                                        int* cuts = nullptr) {
    std::vector<int> whole = tokenizer.encode(text);
    for (size_t end = 0; end <= text.size(); end++) {
        size_t cut = tokenizer.safe_cut(std::string_view(text).substr(0, end));
        if (cut > end) return testing::AssertionFailure() << "cut " << cut << " of " << end;
        if (cut == 0) continue;
        std::vector<int> parts = tokenizer.encode(text.substr(0, cut));
        std::vector<int> rest = tokenizer.encode_continuation(std::string_view(text).substr(cut));
        parts.insert(parts.end(), rest.begin(), rest.end());
        if (parts != whole)
            return testing::AssertionFailure()
                   << "'" << text.substr(0, cut) << "' and '" << text.substr(cut) << "'";
        if (cuts) ++*cuts;
    }
    return testing::AssertionSuccess();
}

void expect_same_after_saving(const Tokenizer& tokenizer, const std::string& text) {
    TemporaryDirectory dir;
    tokenizer.save(dir / "saved");
    auto again = load_tokenizer(dir / "saved");
    EXPECT_EQ(again->id(), tokenizer.id());
    EXPECT_EQ(again->encode(text), tokenizer.encode(text));
    // Saving another kind replaces it.
    load_tokenizer("bytes")->save(dir / "saved");
    EXPECT_EQ(load_tokenizer(dir / "saved")->id(), load_tokenizer("bytes")->id());
}

} // namespace

TEST(Tokenizer, BytesEncodeToThemselves) {
    auto tokenizer = load_tokenizer("bytes");
    EXPECT_EQ(tokenizer->vocab_size(), 257);
    EXPECT_EQ(tokenizer->eot(), 256);
    EXPECT_EQ(tokenizer->encode("A\xff\0"s), (std::vector<int>{65, 255, 0}));
    for (uint64_t i = 0; i < 100; i++)
        EXPECT_EQ(tokenizer->decode(tokenizer->encode(odd_text(i))), odd_text(i));
    EXPECT_EQ(tokenizer->decode({72, 256, 105}), "Hi");
    EXPECT_TRUE(says(error_of([&] { tokenizer->decode({257}); }), {"token 257", "0 to 256"}));
    EXPECT_TRUE(says(error_of([&] { tokenizer->decode({-1}); }), {"token -1"}));
    EXPECT_TRUE(cuts_are_exact(*tokenizer, "two\nlines"));
    expect_same_after_saving(*tokenizer, "text");
}

TEST(Tokenizer, UnknownOnesAreErrors) {
    EXPECT_TRUE(says(error_of([] { load_tokenizer("byte"); }),
                     {"no tokenizer 'byte'", "gpt2:DIR", "FILE.model"}));
    TemporaryDirectory dir;
    EXPECT_TRUE(says(error_of([&] { load_tokenizer(dir.path); }), {dir.path, "has no tokenizer"}));
}

#ifdef LNS_PCRE2
TEST(Tokenizer, Gpt2EncodesLikeTiktoken) {
    std::vector<std::string> dirs = {fixtures + "gpt2-subset"};
    if (const char* all = std::getenv("LNS_GPT2_DIR")) dirs.push_back(all);
    for (const std::string& dir : dirs) {
        auto tokenizer = load_tokenizer("gpt2:" + dir);
        EXPECT_EQ(tokenizer->vocab_size(), 50257);
        EXPECT_EQ(tokenizer->eot(), 50256);
        for (const Case& c : gpt2_cases) {
            EXPECT_EQ(tokenizer->encode(c.text), c.tokens) << c.text;
            EXPECT_EQ(tokenizer->encode(c.text), c.tokens) << "again, from the cache: " << c.text;
            EXPECT_EQ(tokenizer->decode(c.tokens), c.text);
        }
    }
}

TEST(Tokenizer, Gpt2PreservesAllBytes) {
    auto tokenizer = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    for (uint64_t i = 0; i < 500; i++)
        EXPECT_EQ(tokenizer->decode(tokenizer->encode(odd_text(i))), odd_text(i));
    std::string noise;
    for (uint64_t i = 0; i < 100'000; i++) noise += char(random_below(256, 1, 2, i));
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(noise)), noise);
    EXPECT_EQ(tokenizer->decode({50256}), "");
    EXPECT_TRUE(says(error_of([&] { tokenizer->decode({50257}); }), {"token 50257"}));
}

TEST(Tokenizer, Gpt2SplitsInvalidBytesAsSymbols) {
    // Like U+FFFD: "\xff" joins a space and other symbols, not letters.
    auto tokenizer = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    std::vector<int> bytes = tokenizer->encode("\xff");
    ASSERT_EQ(bytes.size(), 1u);
    EXPECT_EQ(tokenizer->encode("a's"), (std::vector<int>{64, 338}));            // a and 's
    EXPECT_EQ(tokenizer->encode("\xff's"), (std::vector<int>{bytes[0], 6, 82})); // \xff' and s
}

TEST(Tokenizer, Gpt2CutsAreExact) {
    auto tokenizer = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    int cuts = 0;
    for (uint64_t i = 0; i < 500; i++) ASSERT_TRUE(cuts_are_exact(*tokenizer, odd_text(i), &cuts));
    EXPECT_GT(cuts, 5000);
    EXPECT_EQ(tokenizer->safe_cut("one two"), 3u);
    EXPECT_EQ(tokenizer->safe_cut("onetwo"), 0u);
    EXPECT_EQ(tokenizer->safe_cut("one  "), 3u);
    EXPECT_EQ(tokenizer->safe_cut("\u4e2d\u3002"), 3u);
    EXPECT_EQ(tokenizer->safe_cut("\u4e2d\xe3\x80"), 0u); // the character is incomplete
}

TEST(Tokenizer, Gpt2IsTheSameOnManyThreads) {
    auto tokenizer = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    auto other = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    auto work = [&] {
        for (int round = 0; round < 5; round++)
            for (const Case& c : gpt2_cases) {
                EXPECT_EQ(tokenizer->encode(c.text), c.tokens);
                EXPECT_EQ(other->encode(c.text), c.tokens);
            }
    };
    std::thread a(work), b(work);
    a.join(), b.join();
}

TEST(Tokenizer, Gpt2DependsOnlyOnItsFilesMeaning) {
    TemporaryDirectory dir;
    auto tokenizer = load_tokenizer("gpt2:" + fixtures + "gpt2-subset");
    expect_same_after_saving(*tokenizer, "It's what they've said");

    // The same with Hugging Face's names, CRLF line ends and other white space.
    std::string vocab = read_bytes(fixtures + "gpt2-subset/encoder.json"), crlf;
    for (char c : read_bytes(fixtures + "gpt2-subset/vocab.bpe"))
        crlf += c == '\n' ? "\r\n"s : ""s + c;
    write_bytes(dir / "vocab.json", "\n\n " + vocab);
    write_bytes(dir / "merges.txt", crlf);
    EXPECT_EQ(load_tokenizer("gpt2:" + dir.path)->id(), tokenizer->id());
    // A different order of merges is a different tokenizer.
    std::string lines = read_bytes(fixtures + "gpt2-subset/vocab.bpe");
    size_t first = lines.find('\n') + 1, second = lines.find('\n', first) + 1,
           third = lines.find('\n', second) + 1;
    write_bytes(dir / "merges.txt", lines.substr(0, first) + lines.substr(second, third - second) +
                                        lines.substr(first, second - first) + lines.substr(third));
    EXPECT_NE(load_tokenizer("gpt2:" + dir.path)->id().fingerprint, tokenizer->id().fingerprint);
}

TEST(Tokenizer, Gpt2RefusesDamagedFiles) {
    const std::string vocab = read_bytes(fixtures + "gpt2-subset/encoder.json");
    const std::string merges = read_bytes(fixtures + "gpt2-subset/vocab.bpe");
    auto refused = [&](const std::string& vocab, const std::string& merges) {
        TemporaryDirectory dir;
        write_bytes(dir / "encoder.json", vocab);
        write_bytes(dir / "vocab.bpe", merges);
        return error_of([&] { load_tokenizer("gpt2:" + dir.path); });
    };
    EXPECT_EQ(refused(vocab, merges), "");
    EXPECT_TRUE(says(error_of([] { load_tokenizer("gpt2:/nowhere"); }), {"no directory /nowhere"}));
    TemporaryDirectory dir;
    write_bytes(dir / "vocab.json", vocab);
    EXPECT_TRUE(
        says(error_of([&] { load_tokenizer("gpt2:" + dir.path); }), {"merges.txt is missing"}));
    write_bytes(dir / "merges.txt", merges);
    write_bytes(dir / "tokenizer_config.json", R"({"tokenizer_class": "Qwen2Tokenizer"})");
    EXPECT_TRUE(says(error_of([&] { load_tokenizer("gpt2:" + dir.path); }),
                     {"class \"Qwen2Tokenizer\", expected GPT2Tokenizer"}));

    EXPECT_TRUE(says(refused(vocab.substr(0, 1000), merges), {"encoder.json is not valid JSON"}));
    EXPECT_TRUE(says(refused("[1]", merges), {"is not a JSON object"}));
    EXPECT_TRUE(says(refused("{\"hi\": 0}", merges), {"no token for any byte"}));
    EXPECT_TRUE(says(refused("{\"!\": 0}", merges), {"do not belong together"}));
    EXPECT_TRUE(says(refused("{\"!\": 0, \"!\": 1}", merges), {"twice"}));
    EXPECT_TRUE(says(refused("{\"!\": -1}", merges), {"\"!\" the id -1"}));
    EXPECT_TRUE(says(refused("{\"!\": 0, \"a\": 0}", merges), {"two tokens the id 0"}));
    EXPECT_TRUE(says(refused("{\"\u4e2d\": 0}", merges), {"no token for any byte"}));
    EXPECT_TRUE(says(refused(vocab, "#version: 0.2\n"), {"has no merges"}));
    EXPECT_TRUE(says(refused(vocab, merges + "a b c\n"), {"is \"a b c\", expected two tokens"}));
    EXPECT_TRUE(says(refused(vocab, merges + "\xA0 b\n"), {"line", "not UTF-8"}));
    EXPECT_TRUE(
        says(refused(vocab, merges + "q q\n"), {"no token \"qq\"", "do not belong together"}));
    EXPECT_TRUE(says(refused(vocab, merges + "h e\n"), {"repeat \"h e\""}));
}
#else
TEST(Tokenizer, Gpt2SaysWhatIsMissing) {
    EXPECT_TRUE(says(error_of([] { load_tokenizer("gpt2:" + fixtures + "gpt2-subset"); }),
                     {"needs PCRE2", "libpcre2-dev"}));
}
#endif

#ifdef LNS_SENTENCEPIECE
TEST(Tokenizer, SentencePieceEncodesLikeTheLibrary) {
    for (const auto& [name, cases] :
         {std::pair{"exact.model", exact_cases}, {"folding.model", folding_cases}}) {
        auto tokenizer = load_tokenizer(fixtures + name);
        EXPECT_EQ(tokenizer->eot(), 2);
        for (const Case& c : cases)
            EXPECT_EQ(tokenizer->encode(c.text), c.tokens) << name << ": " << c.text;
    }
}

TEST(Tokenizer, SentencePiecePreservesWhatItDoesNotFold) {
    auto exact = load_tokenizer(fixtures + "exact.model");
    for (const Case& c : exact_cases) EXPECT_EQ(exact->decode(c.tokens), c.text);
    auto folding = load_tokenizer(fixtures + "folding.model");
    EXPECT_EQ(folding->decode(folding->encode("the  fox\n\n  and the dog ")),
              "the fox and the dog");
    EXPECT_TRUE(
        says(error_of([&] { exact->decode({exact->vocab_size()}); }), {"cannot be decoded"}));
    EXPECT_TRUE(says(error_of([&] { exact->decode({-1}); }), {"cannot be decoded"}));
}

TEST(Tokenizer, SentencePieceCutsAreExact) {
    for (const char* name : {"exact.model", "folding.model"}) {
        auto tokenizer = load_tokenizer(fixtures + name);
        int cuts = 0;
        for (uint64_t i = 0; i < 300; i++)
            ASSERT_TRUE(cuts_are_exact(*tokenizer, odd_text(i), &cuts)) << name;
        EXPECT_GT(cuts, 1000) << name;
        EXPECT_EQ(tokenizer->safe_cut("one\ntwo"), 3u);
        EXPECT_EQ(tokenizer->safe_cut("one two"), 0u);
        // encode itself splits long texts.
        std::string text;
        for (uint64_t i = 0; i < 2000; i++) text += odd_text(i);
        std::vector<int> whole = tokenizer->encode(text), parts;
        for (std::string_view rest = text; !rest.empty();) {
            size_t n = std::min<size_t>(rest.size(), 1500), cut = 0;
            while (n < rest.size() && !(cut = tokenizer->safe_cut(rest.substr(0, n)))) n++;
            if (cut == 0) cut = rest.size();
            auto more = parts.empty() ? tokenizer->encode(rest.substr(0, cut))
                                      : tokenizer->encode_continuation(rest.substr(0, cut));
            parts.insert(parts.end(), more.begin(), more.end());
            rest.remove_prefix(cut);
        }
        EXPECT_EQ(parts, whole) << name;
    }
}

TEST(Tokenizer, SentencePieceSavesItsModel) {
    expect_same_after_saving(*load_tokenizer(fixtures + "exact.model"), "Hello, world!");
    expect_same_after_saving(*load_tokenizer(fixtures + "folding.model"), "Hello, world!");
}

TEST(Tokenizer, SentencePieceAsTokenizerJson) {
    auto exact = load_tokenizer(fixtures + "exact.model");
    TemporaryDirectory dir;
    write_bytes(dir / "exact.json", exact->as_tokenizer_json());
    auto other = load_tokenizer(dir / "exact.json");
    for (uint64_t i = 0; i < 500; i++) {
        if (!is_utf8(odd_text(i))) continue; // SentencePiece replaces other bytes
        EXPECT_EQ(other->encode(odd_text(i)), exact->encode(odd_text(i))) << odd_text(i);
    }
    // Tables of normalizations are applied in another way there.
    EXPECT_EQ(load_tokenizer(fixtures + "folding.model")->as_tokenizer_json(), "");
    EXPECT_EQ(load_tokenizer("bytes")->as_tokenizer_json(), "");
}

TEST(Tokenizer, SentencePieceRefusesWhatIsNotAModel) {
    auto refused = [](const std::string& bytes) {
        TemporaryDirectory dir;
        write_bytes(dir / "x.model", bytes);
        return error_of([&] { load_tokenizer(dir / "x.model"); });
    };
    EXPECT_TRUE(
        says(error_of([] { load_tokenizer("none.model"); }), {"cannot open", "none.model"}));
    EXPECT_TRUE(says(refused(""), {"x.model is empty"}));
    EXPECT_TRUE(says(refused("IQ== 0\nIg== 1\n"), {"tiktoken"}));
    EXPECT_TRUE(says(refused("version https://git-lfs.github.com/spec/v1\n"), {"Git LFS pointer"}));
    EXPECT_TRUE(says(refused("some text that is no model"), {"x.model is damaged"}));
    std::string model = read_bytes(fixtures + "exact.model");
    EXPECT_TRUE(says(refused(model.substr(0, model.size() / 2)), {"x.model is damaged"}));
}
#else
TEST(Tokenizer, SentencePieceSaysWhatIsMissing) {
    EXPECT_TRUE(says(error_of([] { load_tokenizer(fixtures + "exact.model"); }),
                     {"no SentencePiece", "libsentencepiece-dev"}));
}
#endif

#ifdef LNS_SENTENCEPIECE
// Texts of characters that normalization changes, cut where safe_cut allows before the rest is
// known.
TEST(SentencePieceTokenizer, ATextCutInTwoGivesTheSameTokens) {
    const char* characters[] = {"a",      "b",        ",",      " ",      "\n",     "\n",
                                "\t",     "\r",       "\x01",   "\x7f",   "\u2581", "\u2581",
                                "\u00a0", "\u3000",   "\u2003", "\u00b4", "\ufeff", "\u200b",
                                "\u4e2d", "\xe2\x96", "\xff",   "\u0085", "\u2028"};
    uint64_t drawn = 0;
    auto below = [&](size_t n) { return random_below(uint32_t(n), 1, 0, drawn++); };
    auto draw = [&](size_t most) {
        std::string text;
        for (size_t n = below(most + 1); n > 0; n--)
            text += characters[below(std::size(characters))];
        return text;
    };
    for (const char* name : {"exact.model", "folding.model"}) {
        auto tokenizer = load_tokenizer(fixtures + name);
        int cuts = 0;
        for (int i = 0; i < 20000; i++) {
            const std::string begin = draw(10), text = begin + draw(4);
            const size_t cut = tokenizer->safe_cut(begin);
            std::vector<int> parts = tokenizer->encode(text.substr(0, cut));
            const std::vector<int> rest = cut > 0 ? tokenizer->encode_continuation(text.substr(cut))
                                                  : tokenizer->encode(text);
            parts.insert(parts.end(), rest.begin(), rest.end());
            ASSERT_EQ(parts, tokenizer->encode(text))
                << name << ": " << testing::PrintToString(text) << " cut at " << cut;
            cuts += cut > 0;
        }
        EXPECT_GT(cuts, 4000) << name;
    }
    EXPECT_GT(load_tokenizer(fixtures + "folding.model")->safe_cut("\u4e2d\nunder"), 0u);
}
#endif
