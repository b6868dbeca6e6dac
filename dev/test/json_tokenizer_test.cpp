// Tokenizers of each kind of tokenizer.json. fixtures/tokenizers/kinds.jsonl has tiny ones, hard
// texts and what `tokenizers` 0.23 makes of them; dev/oracles/compare_tokenizers.py wrote it.
#include "dev/test/data_helpers.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"
#include "gpt/data/tokenizer.h"
#include "gpt/data/unicode.h"

#include <sstream>

using namespace lns;
using namespace lns::test;
using json = nlohmann::json;

namespace {

struct Kind {
    std::string name;
    json cases;
    std::unique_ptr<Tokenizer> tokenizer;
};

// Without utf8proc those that need it are left out.
std::vector<Kind> kinds() {
    std::vector<Kind> all;
    std::istringstream lines(read_file("dev/test/fixtures/tokenizers/kinds.jsonl"));
    for (std::string line; std::getline(lines, line);) {
        json kind = parse_json(line, "kinds.jsonl");
        TemporaryDirectory dir;
        write_bytes(dir / "tokenizer.json", kind["tokenizer"].dump());
        std::string error;
        std::unique_ptr<Tokenizer> tokenizer;
        try {
            tokenizer = load_tokenizer(dir.path);
        } catch (const Error& e) {
            error = e.what();
        }
        if (unicode_unavailable() && error.find("utf8proc") != error.npos) continue;
        EXPECT_EQ(error, "") << kind["name"];
        all.push_back({kind["name"], kind["cases"], std::move(tokenizer)});
    }
    return all;
}

} // namespace

#ifdef LNS_PCRE2
TEST(JsonTokenizer, EncodesAndDecodesLikeTokenizers) {
    size_t cases = 0;
    for (const Kind& kind : kinds()) {
        const Tokenizer& t = *kind.tokenizer;
        for (const json& c : kind.cases) {
            const std::string text = c["text"], where = kind.name + ": " + text;
            EXPECT_EQ(t.encode(text), c["plain"].get<std::vector<int>>()) << where;
            std::vector<int> whole = t.encode(text, Specials::spelled);
            if (t.bos >= 0) whole.insert(whole.begin(), t.bos);
            if (t.eos >= 0) whole.push_back(t.eos);
            EXPECT_EQ(whole, c["spelled"].get<std::vector<int>>()) << where;
            EXPECT_EQ(t.decode(whole, Specials::spelled), c["shown"]) << where;
            EXPECT_EQ(t.decode(whole), c["decoded"]) << where;
            cases++;
        }
    }
    EXPECT_GT(cases, 150u);
}

TEST(JsonTokenizer, KeepsBytesThatAreNotUtf8) {
    for (const Kind& kind : kinds()) {
        if (kind.name != "llama3-like" && kind.name != "deepseek-like" &&
            kind.name != "o200k-like" && kind.name != "gemma-like" && kind.name != "qwen2-like")
            continue;
        for (const std::string text :
             {"\xff", "a\xc3", "\x80\x80 b\xe3\x80", "one \xf0\x9f\x99 two"})
            EXPECT_EQ(kind.tokenizer->decode(kind.tokenizer->encode(text)), text) << kind.name;
    }
}

TEST(JsonTokenizer, ATextCutInTwoGivesTheSameTokens) {
    const char* units[] = {"a",      "the", " next", " ",      "\n",     "\n\n",
                           "12",     ".",   "'s",    "\u00e9", "\u0301", "\u4e2d",
                           "\u2581", "\t",  "[R]",   "word",   "\xff",   "\U0001F642"};
    for (const Kind& kind : kinds()) {
        uint64_t drawn = 0;
        int cuts = 0;
        for (int i = 0; i < 400; i++) {
            std::string text;
            for (int n = 0; n < 12; n++)
                text += units[random_below(uint32_t(std::size(units)), 5, 0, drawn++)];
            const size_t end = random_below(uint32_t(text.size()), 5, 1, drawn++);
            const size_t cut = kind.tokenizer->safe_cut(text.substr(0, end));
            if (cut == 0) continue;
            cuts++;
            std::vector<int> parts = kind.tokenizer->encode(text.substr(0, cut));
            for (int token : kind.tokenizer->encode_continuation(text.substr(cut)))
                parts.push_back(token);
            ASSERT_EQ(parts, kind.tokenizer->encode(text))
                << kind.name << ": " << testing::PrintToString(text) << " cut at " << cut;
        }
        EXPECT_GT(cuts, kind.name == "t5-like" ? -1 : 20) << kind.name;
    }
}

TEST(JsonTokenizer, LongRunsTakeLinearTime) {
    for (const Kind& kind : kinds())
        for (const char* unit : {" ", "\n", "a", "\u2581", "1", "\u00e9"}) {
            std::string text;
            while (text.size() < 200'000) text += unit;
            EXPECT_GE(kind.tokenizer->encode(text).size(), 0u);
        }
}

// The rules that are written out, against PCRE2's view of the same regexes.
TEST(JsonTokenizer, SplittingRulesEqualTheirRegexes) {
    json rule, regex;
    std::istringstream lines(read_file("dev/test/fixtures/tokenizers/kinds.jsonl"));
    for (std::string line; std::getline(lines, line);)
        if (json kind = parse_json(line, "kinds.jsonl"); kind["name"] == "llama3-like")
            rule = regex = kind["tokenizer"];
    json& pattern = regex["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
    pattern = "(?:" + pattern.get<std::string>() + ")"; // not recognized
    TemporaryDirectory dir;
    write_bytes(dir / "rule.json", rule.dump());
    write_bytes(dir / "regex.json", regex.dump());
    const auto a = load_tokenizer(dir / "rule.json"), b = load_tokenizer(dir / "regex.json");
    const char* units[] = {"a",      "S",      "'",      "'s",     "'LL", "'re", " ",
                           "  ",     "\n",     "\r",     "\t",     "1",   "23",  ".",
                           "-",      "\u017f", "\u00e9", "\u0301", "/",   "\"",  "\u4e2d",
                           "\u3000", "\u0085", "\u2028", "\u00b2"};
    uint64_t drawn = 0;
    std::vector<std::string> texts(20'000);
    for (std::string& text : texts)
        for (int n = 0; n < 10; n++)
            text += units[random_below(uint32_t(std::size(units)), 5, 0, drawn++)];
    std::vector<std::vector<int>> expected;
    for (const std::string& text : texts) expected.push_back(b->encode(text));
    for (size_t i = 0; i < texts.size(); i++)
        ASSERT_EQ(a->encode(texts[i]), expected[i]) << testing::PrintToString(texts[i]);
}
#endif
