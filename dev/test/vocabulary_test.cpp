// The program data/vocabulary, run as a user runs it, on texts that the trainer does not accept
// unchanged.
#include "dev/test/data_helpers.h"
#include "gpt/data/tokenizer.h"

#include <sys/stat.h>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

#ifdef LNS_SENTENCEPIECE
namespace {

// LNS_VOCABULARY, or the one that make builds. Sanitizer builds have only the tests.
struct VocabularyProgram : testing::Test {
    TemporaryDirectory dir;
    std::string program =
        std::getenv("LNS_VOCABULARY") ? std::getenv("LNS_VOCABULARY") : "data/vocabulary";
    std::string plain;
    void SetUp() override {
        if (!fs::exists(program)) GTEST_SKIP() << program << " is not built";
        for (int i = 0; i < 300; i++)
            plain +=
                "hello world the quick brown fox jumps over lazy dogs while seven zebras vex him\n";
    }
    Finished learn(const std::string& text, const std::string& arguments = "--size 320") {
        write_bytes(dir / "text.txt", text);
        return run("cd '" + dir.path + "' && '" + fs::absolute(program).string() + "' " +
                   arguments + " -o v.model text.txt");
    }
    // Expects it to learn from the text and report that, and the model to have the piece.
    testing::AssertionResult learns(const std::string& text, const std::vector<std::string>& parts,
                                    const std::string& piece = "he") {
        fs::remove(dir / "v.model");
        const Finished f = learn(text);
        if (f.status != 0) return testing::AssertionFailure() << f.status << ": " << f.output;
        if (read_bytes(dir / "v.model").find(piece) == std::string::npos)
            return testing::AssertionFailure() << "no piece '" << piece << "'";
        const auto tokenizer = load_tokenizer(dir / "v.model");
        if (tokenizer->decode(tokenizer->encode(plain)) != plain)
            return testing::AssertionFailure() << "it does not give back a text";
        return says(f.output, parts);
    }
    testing::AssertionResult refuses(const std::string& text,
                                     const std::vector<std::string>& parts) {
        const Finished f = learn(text);
        if (f.status != 1) return testing::AssertionFailure() << f.status << ": " << f.output;
        if (f.output.find("vocabulary: ") == std::string::npos)
            return testing::AssertionFailure() << f.output;
        return says(f.output, parts);
    }
};

} // namespace

TEST_F(VocabularyProgram, LongWordsAndLinesAreSplit) {
    for (int n : {60'000, 70'000, 200'000}) {
        std::string word;
        for (int i = 0; i < n; i++) word += char('a' + i % 8);
        EXPECT_TRUE(learns("base64 " + word + "\n" + plain,
                           {"320 pieces", "301 lines", "1 line of more than 16384 bytes",
                            "1 word of more than 1000 characters"}));
    }
    std::string line;
    while (line.size() < 1'400'000) line += "alphabeta ";
    EXPECT_TRUE(learns(line + "\n" + plain, {"1.4 MB in 301 lines", "1 line of more"}, "alpha"));
    // Words of several bytes per character, and one without any ASCII byte.
    std::string wide;
    for (int i = 0; i < 50'000; i++) wide += i % 2 ? "\u4e2d" : "\u6587";
    EXPECT_TRUE(learns(wide + "\n" + plain, {"1 word of more"}, "\u4e2d\u6587"));
    // A word at the limit is not split.
    const Finished f = learn(std::string(1000, 'x') + "\n" + plain);
    EXPECT_EQ(f.output.find("in parts"), std::string::npos) << f.output;
    EXPECT_TRUE(learns(std::string(1001, 'x') + "\n" + plain, {"1 word of more"}));
}

TEST_F(VocabularyProgram, UnacceptableBytesBecomeSpaces) {
    EXPECT_TRUE(learns(plain + std::string("a\0b\n", 4), {"1 byte taken for spaces"}));
    EXPECT_TRUE(learns(plain + "a\xff\xfe b\xc3\n", {"3 bytes taken for spaces"}));
    EXPECT_TRUE(learns(plain + "a\u2585b\n", {"3 bytes taken for spaces"}));
    EXPECT_TRUE(learns(plain + "a\u2581b \u2047\tc\r\n\ufeff", {"320 pieces"}));
}

TEST_F(VocabularyProgram, FilesThatAreNotTextAreNamed) {
    std::string wide = "\xff\xfe";
    for (char c : plain) wide += {c, '\0'};
    EXPECT_TRUE(refuses(wide, {"text.txt is text in UTF-16LE", "iconv"}));
    EXPECT_TRUE(refuses(wide.substr(2), {"text.txt is text in UTF-16LE", "iconv"}));
    EXPECT_TRUE(
        refuses("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", {"Git LFS pointer"}));
    EXPECT_TRUE(refuses("\x1f\x8b", {"compressed"}));
    EXPECT_TRUE(refuses("\n\n", {"no text"}));
    EXPECT_TRUE(refuses("a", {"smaller --size"}));
    EXPECT_FALSE(fs::exists(dir / "v.model"));
    const Finished f = run("cd '" + dir.path + "' && '" + fs::absolute(program).string() +
                           "' -o v.model \"$(printf 'no\\033[31m')\" .");
    EXPECT_EQ(f.status, 1);
    EXPECT_TRUE(says(f.output, {"cannot open no^[[31m"}));
    EXPECT_EQ(f.output.find('\x1b'), std::string::npos);
}

TEST_F(VocabularyProgram, ItsOutputFollowsNoPredictableLink) {
    // A predictable temporary name must not be opened through a link.
    write_bytes(dir / "precious", "precious");
    fs::create_symlink("precious", dir / "v.model.tmp");
    EXPECT_EQ(learn(plain).status, 0);
    EXPECT_EQ(read_bytes(dir / "precious"), "precious");
    EXPECT_TRUE(fs::is_regular_file(fs::symlink_status(dir / "v.model")));
}
#endif
