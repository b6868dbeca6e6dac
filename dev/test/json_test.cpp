#include "gpt/base/json.h"

#include "dev/test/data_helpers.h"

using namespace lns;
using namespace lns::test;

namespace {
std::string json_error(const std::string& text, size_t most = 1 << 20) {
    return error_of([&] { parse_json(text, "x.json", most); });
}
} // namespace

TEST(Json, IsReadExactly) {
    EXPECT_EQ(parse_json("{\"a\": [1, 2.5, \"é\", null]}", "x")["a"][2], "é");
    EXPECT_EQ(parse_ordered_json("{\"b\": 1, \"a\": 2}", "x").dump(), "{\"b\":1,\"a\":2}");
    // The same key in different objects is allowed.
    EXPECT_EQ(json_error("[{\"a\": {\"a\": 1}}, {\"a\": 1}]"), "");
}

TEST(Json, InvalidJsonIsAnError) {
    const std::string zero("{}\0garbage", 10);
    for (const std::string& text :
         {std::string(""), std::string("{"), std::string("{\"a\": 1e999}"), std::string("[1,]"),
          std::string("\"\xff\""), zero, std::string("{} {}"), std::string("nul")})
        EXPECT_TRUE(says(json_error(text), {"x.json", "not valid JSON"})) << text;
    EXPECT_LT(json_error("[\"" + std::string(100000, 'a')).size(), 400u);
    EXPECT_TRUE(says(json_error("version https://git-lfs.github.com/spec/v1\n"), {"Git LFS"}));
    EXPECT_TRUE(says(json_error("[1, 2, 3]", 8), {"x.json", "9 bytes", "8"}));
}

TEST(Json, RepeatedKeysAreRefused) {
    EXPECT_TRUE(says(json_error("{\"a\": 1, \"b\": {\"c\": 1, \"c\": 1}}"), {"\"c\"", "twice"}));
    EXPECT_TRUE(says(error_of([] { parse_ordered_json("{\"a\": 1, \"\\u0061\": 1}", "x"); }),
                     {"\"a\"", "twice"}));
}

TEST(Json, DepthIsLimited) {
    auto nested = [](int n) { return std::string(size_t(n), '[') + std::string(size_t(n), ']'); };
    EXPECT_EQ(json_error(nested(json_depth)), "");
    EXPECT_TRUE(says(json_error(nested(json_depth + 1)), {"x.json", "nests more than 64"}));
    EXPECT_TRUE(says(json_error(std::string(500000, '[')), {"x.json", "nests more than 64"}));
    std::string objects;
    for (int i = 0; i < 100000; i++) objects += "{\"a\":";
    EXPECT_TRUE(says(json_error(objects), {"x.json", "nests more than 64"}));
}

TEST(Json, QuotesAreShort) {
    EXPECT_EQ(quoted(parse_json("{\"a\":[1,\"b\"]}", "x")), "{\"a\":[1,\"b\"]}");
    nlohmann::json deep = 1;
    for (int i = 0; i < 10000; i++) deep = nlohmann::json::array({std::move(deep)});
    EXPECT_LT(quoted(deep).size(), 100u);
    EXPECT_LT(quoted(nlohmann::json(std::string(1000000, 'x'))).size(), 100u);
    EXPECT_EQ(quoted(nlohmann::json("\x1b[2J")).find('\x1b'), std::string::npos);
}
