#include "gpt/data/paths.h"

#include "dev/test/data_helpers.h"

#include <pwd.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;

namespace {

// A working directory with files and folders, and HOME inside it.
struct Folder : TemporaryDirectory {
    std::string before = std::filesystem::current_path(),
                home = getenv("HOME") ? getenv("HOME") : "";
    explicit Folder(const std::vector<std::string>& files) {
        for (const std::string& file : files) {
            const std::filesystem::path at = path + "/" + file;
            std::filesystem::create_directories(at.parent_path());
            write_bytes(at, "x");
        }
        std::filesystem::current_path(path);
        setenv("HOME", (path + "/home").c_str(), 1);
    }
    ~Folder() {
        std::filesystem::current_path(before);
        setenv("HOME", home.c_str(), 1);
    }
};

std::string found(const std::string& pattern) {
    std::string all;
    for (const std::string& path : glob_paths(pattern)) all += "<" + path + ">";
    return all;
}

} // namespace

TEST(Paths, HomeFolders) {
    Folder folder({"home/a.bin"});
    const std::string home = folder / "home";
    EXPECT_EQ(expand_home("~"), home);
    EXPECT_EQ(expand_home("~/x/~"), home + "/x/~");
    for (const char* plain : {"", "x~", "./~", "a/~/b", "/~"}) EXPECT_EQ(expand_home(plain), plain);
    EXPECT_EQ(expand_home_in_tokenizer("gpt2:~/t"), "gpt2:" + home + "/t");
    EXPECT_EQ(expand_home_in_tokenizer("~/t.model"), home + "/t.model");
    EXPECT_EQ(expand_home_in_tokenizer("bytes"), "bytes");
    EXPECT_TRUE(says(error_of([] { expand_home("~nobody-of-this-name/x"); }),
                     {"no user 'nobody-of-this-name'", "./~nobody"}));
    if (const passwd* user = getpwuid(getuid())) {
        EXPECT_EQ(expand_home("~" + std::string(user->pw_name) + "/x"),
                  user->pw_dir + std::string("/x"));
        unsetenv("HOME");
        EXPECT_EQ(expand_home("~/x"), user->pw_dir + std::string("/x"));
        setenv("HOME", home.c_str(), 1);
    }
    EXPECT_EQ(found("~/*.bin"), "<" + home + "/a.bin>");
}

TEST(Paths, Patterns) {
    Folder folder({"d/a_1.bin", "d/a_2.bin", "d/b_1.bin", "e/a_3.bin"});
    EXPECT_EQ(found("d/a_*.bin"), "<d/a_1.bin><d/a_2.bin>");
    EXPECT_EQ(found("d/[ab]_1.bin"), "<d/a_1.bin><d/b_1.bin>");
    EXPECT_EQ(found("{e,d}/a_?.bin"), "<d/a_1.bin><d/a_2.bin><e/a_3.bin>");
    EXPECT_EQ(found("d/../e/*"), "<d/../e/a_3.bin>");
    EXPECT_TRUE(says(error_of([] { glob_paths("d/c*"); }), {"no file matches 'd/c*'"}));
    EXPECT_TRUE(matches_any("*/b*") && !matches_any("*/c*"));
}

TEST(Paths, NamesWithTheCharactersOfPatternsAreLiteral) {
    Folder folder({"d[1]/t_1.bin", "d[1]/t_2.bin", "d1/t_9.bin", "{x}/s.bin", "a[2]_1.bin",
                   "a[2]_2.bin", "q?.bin", "qq.bin", "b\\c/x.bin", "o/d[1]/u.bin"});
    EXPECT_EQ(found("d[1]/t_1.bin"), "<d[1]/t_1.bin>");
    EXPECT_EQ(found("d[1]/t_*.bin"), "<d[1]/t_1.bin><d[1]/t_2.bin>");
    EXPECT_EQ(found("{x}/*.bin"), "<{x}/s.bin>");
    EXPECT_EQ(found("a[2]_*.bin"), "<a[2]_1.bin><a[2]_2.bin>");
    EXPECT_EQ(found("a[2]_1.bin"), "<a[2]_1.bin>");
    EXPECT_EQ(found("q?.bin"), "<q?.bin>");
    EXPECT_EQ(found("b\\c/*.bin"), "<b\\c/x.bin>");
    EXPECT_EQ(found("*/d[1]/u.bin"), "<o/d[1]/u.bin>");
    EXPECT_EQ(found(folder.path + "/d[1]/*_2.bin"), "<" + folder.path + "/d[1]/t_2.bin>");
}

TEST(Paths, ALiteralPatternMatchesOnlyThePath) {
    Folder folder({"d[1]/t_1.bin", "d1/t_1.bin", "q?/t_1.bin", "qq/t_1.bin"});
    EXPECT_EQ(found(literal_pattern("d[1]/t") + "_*.bin"), "<d[1]/t_1.bin>");
    EXPECT_EQ(found(literal_pattern("q?/t") + "_*.bin"), "<q?/t_1.bin>");
    EXPECT_FALSE(matches_any(literal_pattern("q*/t") + "_*.bin"));
}

TEST(Paths, HugeAndDeepPatternsAreRefused) {
    auto repeated = [](int n, const std::string& text) {
        std::string all;
        for (int i = 0; i < n; i++) all += text;
        return all;
    };
    auto refused = [](const std::string& pattern) {
        return error_of([&] { matches_any(pattern); });
    };
    EXPECT_TRUE(says(refused(repeated(5000, "{a,") + repeated(5000, "}")), {"20000 bytes"}));
    EXPECT_TRUE(says(refused(repeated(500, "{a,b}")), {"more than 16 braces"}));
    EXPECT_TRUE(says(refused(std::string(100000, '[')), {"100000 bytes"}));
    EXPECT_FALSE(matches_any(repeated(10, "{x,") + repeated(10, "}")));
}
