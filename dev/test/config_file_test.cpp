#include "gpt/run/config_file.h"

#include "dev/test/data_helpers.h"

#include <sys/stat.h>

using namespace lns;
using namespace lns::test;

namespace {

// "section/name=value" of every line, each in angle brackets.
std::string parsed(std::string_view text) {
    std::string all;
    for (const ConfigLine& line : parse_config_file(text, "c.ini"))
        all += cat("<", line.section, "/", line.name, "=", line.value, ">");
    return all;
}

std::string error(std::string_view text) {
    return error_of([&] { parse_config_file(text, "c.ini"); });
}

} // namespace

TEST(ConfigFile, TheWholeTextAfterTheEqualsSignIsTheValue) {
    EXPECT_EQ(parsed("lr = 0,001\nsteps = 10 20"), "</lr=0,001></steps=10 20>");
    EXPECT_EQ(parsed("out=runs/lr=1e-3, wd=0.1\t \n"), "</out=runs/lr=1e-3, wd=0.1>");
    EXPECT_EQ(parsed("out = d # of today"), "</out=d # of today>");
    EXPECT_EQ(parsed("train = a[1]_{x,y}*.bin"), "</train=a[1]_{x,y}*.bin>");
    EXPECT_EQ(parsed("prompt ="), "</prompt=>");
    EXPECT_EQ(parsed("--lr = 1"), "</lr=1>");
    EXPECT_EQ(parse_config_file("\n\na = 1\n", "c.ini")[0].number, 3);
}

TEST(ConfigFile, OnePairOfQuotesIsRemoved) {
    EXPECT_EQ(parsed("p = \" a \"\nq = '\"b\"'\nr = \"c\nt = \"\nu = \"\""),
              "</p= a ></q=\"b\"></r=\"c></t=\"></u=>");
}

TEST(ConfigFile, CommentsSectionsAndLineEnds) {
    EXPECT_EQ(parsed("\xEF\xBB\xBF# x = 1\r\n  ; y = 2\r\n\r\n a = 1\r\n[ g h ]\r\nb = [c]\r\n"),
              "</a=1><g h/b=[c]>");
    EXPECT_EQ(parsed(""), "");
}

TEST(ConfigFile, OtherLinesAreErrorsThatNameTheLine) {
    EXPECT_TRUE(says(error("a = 1\noverfit-batch\n"), {"c.ini, line 2", "'overfit-batch'", "="}));
    EXPECT_TRUE(says(error("= 1"), {"c.ini, line 1", "no name"}));
    for (const char* section : {"[]", "[ ]", "[a", "[[a]]", "[a] b", "["})
        EXPECT_TRUE(says(error(section), {"c.ini, line 1", "not a section"})) << section;
    EXPECT_TRUE(says(error("{\"lr\": 0.1}"), {"line 1", "expected `long-name = value`"}));
}

TEST(ConfigFile, FilesThatAreNotTextAreRefused) {
    EXPECT_TRUE(says(error(std::string_view("a = 1\nb = 2\0003", 13)),
                     {"line 2", "control", "'b = 2^@3', expected"}));
    EXPECT_TRUE(says(error("a = \x1B[31m"), {"line 1", "control"}));
    EXPECT_TRUE(says(error("a = 1\rb = 2"), {"line 1", "control"}));
    EXPECT_TRUE(says(error("\xFF\xFE\x61"), {"UTF-16"}));
    EXPECT_TRUE(says(error(std::string(10 << 20, 'x')), {"10485760 bytes", "at most"}));
    const std::string deep = error(std::string(1 << 20, '['));
    EXPECT_TRUE(says(deep, {"line 1", "not a section"}));
    EXPECT_LT(deep.size(), 300u); // messages shorten it
    EXPECT_EQ(parse_config_file("layers = " + std::string(100000, '['), "c").size(), 1u);
}

TEST(ConfigFile, WhatIsNotAFileIsRefused) {
    TemporaryDirectory dir;
    auto fails = [&](const std::string& path) { return error_of([&] { read_config_file(path); }); };
    EXPECT_TRUE(says(fails(dir / "none"), {"--config", "none", "cannot be opened"}));
    EXPECT_TRUE(says(fails(dir.path), {dir.path, "is a directory"}));
    ASSERT_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
    EXPECT_TRUE(says(fails(dir / "pipe"), {"pipe", "expected a file"}));
    EXPECT_TRUE(says(fails("/dev/zero"), {"/dev/zero", "device"}));
    write_bytes(dir / "huge", std::string(2 << 20, '\n'));
    EXPECT_TRUE(says(fails(dir / "huge"), {"huge", "more than 1048576 bytes"}));
    write_bytes(dir / "good", "a = 1");
    EXPECT_EQ(read_config_file(dir / "good").size(), 1u);
}
