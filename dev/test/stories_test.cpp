// The built-in corpus is reproducible, clean English, and consistent: a checker that is independent
// of the generator reads the text, resolves pronouns, tracks the world and compares the answers.
#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/data/stories.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <regex>
#include <set>

using namespace lns;

namespace {

const std::set<std::string> men = {"Tom", "Ben",  "Sam",  "Max", "Leo", "Tim",    "Dan",    "Jack",
                                   "Fox", "Bear", "Frog", "Pig", "Dog", "Father", "Grandpa"};
const std::set<std::string> women = {"Mia",    "Anna",   "Lily",    "Emma", "Rose", "Kate",
                                     "Zoe",    "Sue",    "Hen",     "Cat",  "Duck", "Mouse",
                                     "Rabbit", "Mother", "Grandma", "Owl"};
const std::set<std::string> toys = {"ball", "kite", "drum", "hat",  "cup",   "book",
                                    "key",  "doll", "boat", "bell", "spoon", "map",
                                    "lamp", "rope", "ring", "flute"};
const std::vector<std::string> numbers = {
    "no",       "one",     "two",     "three",     "four",     "five",     "six",
    "seven",    "eight",   "nine",    "ten",       "eleven",   "twelve",   "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"};

int number(const std::string& word) {
    if (word == "none") return 0;
    auto at = std::find(numbers.begin(), numbers.end(), word);
    EXPECT_NE(at, numbers.end()) << word << " is no number";
    return int(at - numbers.begin());
}

// The sentences after the title. Punctuation ends one if a capital or a quotation mark follows.
std::vector<std::string> sentences(const std::string& text) {
    std::vector<std::string> all;
    std::string now;
    for (size_t i = text.find("\n\n") + 2; i < text.size(); i++) {
        if (text[i] != '\n') now += text[i];
        size_t next = i + 1;
        if (!now.empty() && std::string(".?!").find(text[i]) != std::string::npos) {
            if (next < text.size() && text[next] == '"') now += text[next++];
            size_t mark = next;
            while (next < text.size() && std::isspace(text[next])) next++;
            bool ends = next == text.size() ||
                        (next > mark && (std::isupper(text[next]) || text[next] == '"'));
            if (ends) {
                all.push_back(now);
                now.clear();
                i = next - 1;
            } else {
                i = mark - 1;
            }
        }
    }
    EXPECT_TRUE(now.empty()) << "no mark ends: " << now;
    return all;
}

// The sentences with names instead of he, she, him, her, and "the ball" instead of it. Checks that
// every pronoun is unambiguous.
std::vector<std::string> resolve(const std::string& story) {
    std::vector<std::string> all;
    std::set<std::string> last, last_toys;
    for (const std::string& sentence : sentences(story)) {
        std::set<std::string> now, now_toys;
        std::string out;
        auto only = [&](const std::set<std::string>& here, const std::set<std::string>& before,
                        const std::set<std::string>& fits) -> std::string {
            for (const auto* among : {&here, &before}) {
                std::vector<std::string> found;
                for (const std::string& name : *among)
                    if (fits.count(name)) found.push_back(name);
                if (found.size() == 1) return found[0];
                if (found.size() > 1) break;
            }
            ADD_FAILURE() << "unclear pronoun in '" << sentence << "' of\n" << story;
            return "?";
        };
        for (size_t i = 0; i < sentence.size();) {
            size_t end = i;
            while (end < sentence.size() && std::isalpha(sentence[end])) end++;
            if (end == i) {
                out += sentence[i++];
                continue;
            }
            std::string word = sentence.substr(i, end - i);
            if (word == "he" || word == "He" || word == "him" || word == "his")
                word = only(now, last, men);
            else if (word == "she" || word == "She" || word == "her")
                word = only(now, last, women);
            if (word == "it" && !(now_toys.empty() && last_toys.empty())) {
                word = only(now_toys, last_toys, toys);
                out += "the ";
            }
            if (men.count(word) || women.count(word)) now.insert(word);
            if (toys.count(word)) now_toys.insert(word);
            out += word;
            i = end;
        }
        all.push_back(out);
        last = now, last_toys = now_toys;
    }
    return all;
}

using Match = std::smatch;

struct Rule {
    std::regex shape;
    std::function<void(const Match&)> act;
};

bool apply(const std::vector<Rule>& rules, const std::string& sentence) {
    Match match;
    for (const Rule& rule : rules)
        if (std::regex_match(sentence, match, rule.shape)) {
            rule.act(match);
            return true;
        }
    return false;
}

std::vector<std::string> corpus(int n) {
    std::vector<std::string> all;
    for (int i = 0; i < n; i++) all.push_back(story(1, uint64_t(i)));
    return all;
}

} // namespace

TEST(Stories, AreAFunctionOfSeedAndIndex) {
    uint64_t hash = fnv1a("");
    for (uint64_t i = 0; i < 300; i++) {
        EXPECT_EQ(story(5, i), story(5, i));
        hash = fnv1a(story(1, i), hash);
    }
    EXPECT_NE(story(1, 0), story(1, 1));
    EXPECT_NE(story(1, 0), story(2, 0));
    EXPECT_NE(story(1, 0), story(1, uint64_t(1) << 40));
    // If this changes, the corpus changed, and losses are not comparable with earlier ones.
    EXPECT_EQ(hash, 17145544490107995010u);
}

TEST(Stories, AreCleanText) {
    size_t bytes = 0;
    std::set<std::string> words;
    std::regex article("\\b([Aa]n?) ([a-z]+)");
    for (const std::string& text : corpus(3000)) {
        SCOPED_TRACE(text);
        bytes += text.size();
        EXPECT_GE(text.size(), 100u);
        EXPECT_LE(text.size(), 900u);
        EXPECT_EQ(text.back(), '\n');
        EXPECT_NE(text[text.size() - 2], '\n');
        for (char c : text) EXPECT_TRUE(c == '\n' || (c >= 32 && c < 127));
        for (const char* wrong : {"  ", " \n", "\n ", "\n\n\n", " .", " ,", "..", "{", "}", "|",
                                  "~", "?.", ",.", " a a", "one apples", "is three", "are one "})
            EXPECT_EQ(text.find(wrong), std::string::npos) << "'" << wrong << "'";
        EXPECT_EQ(std::count(text.begin(), text.end(), '"') % 2, 0);
        for (std::sregex_iterator at(text.begin(), text.end(), article), end; at != end; ++at) {
            bool vowel = std::string("aeiou").find((*at)[2].str()[0]) != std::string::npos;
            EXPECT_EQ((*at)[1].length(), vowel ? 2 : 1) << at->str();
        }
        for (const std::string& sentence : sentences(text)) {
            char first = sentence[sentence[0] == '"'];
            EXPECT_TRUE(std::isupper(first)) << sentence;
        }
        std::string word;
        for (char c : text)
            if (std::isalpha(c))
                word += char(std::tolower(c));
            else if (!word.empty())
                words.insert(word), word.clear();
    }
    EXPECT_GT(words.size(), 250u);
    EXPECT_LT(words.size(), 600u); // learnable by a small model in minutes
    EXPECT_GT(bytes / 3000, 300u);
    EXPECT_LT(bytes / 3000, 500u);
}

TEST(Stories, RarelyRepeat) {
    std::set<std::string> different;
    for (const std::string& text : corpus(10000)) different.insert(text);
    EXPECT_GT(different.size(), 9900u);
}

TEST(Stories, WhoHasWhatIsTrue) {
    std::map<std::string, std::string> holder, first; // of each toy; "": nobody
    std::string wanted, asker;
    int moved = 0, answers = 0;
    auto start = [&](const std::string& who, const std::string& toy) {
        holder[toy] = who;
        first.emplace(toy, who);
    };
    auto pass = [&](const std::string& from, const std::string& toy, const std::string& to) {
        EXPECT_EQ(holder[toy], from) << "who gives away the " << toy;
        EXPECT_NE(from, to);
        holder[toy] = to, moved++;
    };
    auto find = [&](const std::string& who, const std::string& toy) {
        EXPECT_EQ(holder[toy], "") << "who finds the " << toy;
        holder[toy] = who, moved++;
    };
    auto holds = [&](const std::string& who, const std::string& list) {
        for (const auto& [toy, has] : holder)
            EXPECT_EQ(has == who, std::regex_search(list, std::regex("\\b" + toy + "\\b")))
                << who << " is said to have " << list;
    };
    const std::vector<Rule> rules = {
        {std::regex("(\\w+) (?:had|held|brought|also had) an? \\w+ (\\w+)(?: at home)?\\."),
         [&](const Match& m) { start(m[1], m[2]); }},
        {std::regex("(\\w+) looked at home and found an? \\w+ (\\w+)\\."),
         [&](const Match& m) { start(m[1], m[2]); }},
        {std::regex("So \\w+ went to (\\w+), who had an? \\w+ (\\w+)\\."),
         [&](const Match& m) { start(m[1], m[2]); }},
        {std::regex("(?:More than anything, )?(\\w+) wanted an? \\w+ (\\w+)\\."),
         [&](const Match& m) { wanted = m[2]; }},
        {std::regex("(?:\\w+ went to )?(\\w+)(?:, who)? had one\\."),
         [&](const Match& m) { start(m[1], wanted); }},
        {std::regex("(?:Then |So )?(\\w+) (?:gave|passed|handed) the (\\w+) to (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[2], m[3]); }},
        {std::regex("(\\w+) gave the (\\w+) to (\\w+) and got the (\\w+)(?: back)?\\."),
         [&](const Match& m) { pass(m[1], m[2], m[3]), pass(m[3], m[4], m[1]); }},
        {std::regex("(\\w+) gave (\\w+) the (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[3], m[2]); }},
        {std::regex("(\\w+) gave (\\w+) the (\\w+) for the (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[3], m[2]), pass(m[2], m[4], m[1]); }},
        {std::regex(
             "(\\w+) and (\\w+) swapped, so now \\1 had the (\\w+) and \\2 had the (\\w+)\\."),
         [&](const Match& m) { pass(m[2], m[3], m[1]), pass(m[1], m[4], m[2]); }},
        {std::regex("(\\w+) was tired of the (\\w+) and gave the \\2 to (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[2], m[3]); }},
        {std::regex("(\\w+) wanted the (\\w+), so (\\w+) gave the \\2 to \\1\\."),
         [&](const Match& m) { pass(m[3], m[2], m[1]); }},
        {std::regex("\"Yes,\" said (\\w+), and (\\w+) took the (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[3], m[2]); }},
        {std::regex("\"Can I play with the \\w+\\?\" asked (\\w+)\\."),
         [&](const Match& m) { asker = m[1]; }},
        {std::regex("\"You can have the (\\w+),\" said (\\w+)\\."),
         [&](const Match& m) { pass(m[2], m[1], asker); }},
        {std::regex("(?:Then )?(\\w+) took the (\\w+) from (\\w+)\\."),
         [&](const Match& m) { pass(m[3], m[2], m[1]); }},
        {std::regex("(\\w+) (?:put|left|dropped) the (\\w+) (?:on|by) the \\w+\\."),
         [&](const Match& m) { pass(m[1], m[2], ""); }},
        {std::regex("(?:Soon )?(\\w+) (?:picked up|found) the (\\w+)(?: (?:on|by) the \\w+)?\\."),
         [&](const Match& m) { find(m[1], m[2]); }},
        {std::regex("(\\w+) saw the (\\w+) (?:on|by) the \\w+ and took the \\2\\."),
         [&](const Match& m) { find(m[1], m[2]); }},
        {std::regex("(\\w+) ran to the (\\w+) and picked the \\2 up\\."),
         [&](const Match& m) { find(m[1], m[2]); }},
        {std::regex("(\\w+) took the (\\w+) to (\\w+)\\."),
         [&](const Match& m) { pass(m[1], m[2], m[3]); }},
        {std::regex("(\\w+) took the (\\w+) and gave (\\w+) the (\\w+)\\."),
         [&](const Match& m) { pass(m[3], m[2], m[1]), pass(m[1], m[4], m[3]); }},
        {std::regex(
             "(?:Now )?(\\w+) had (nothing|the \\w+(?:, the \\w+)*(?: and the \\w+)?) now\\."),
         [&](const Match& m) { holds(m[1], m[2]); }},
        {std::regex(
             "Now (\\w+) had (nothing|the \\w+ and the \\w+|the \\w+, the \\w+ and the \\w+)\\."),
         [&](const Match& m) { holds(m[1], m[2]); }},
        {std::regex("(?:Now|At last,) (\\w+) had the (\\w+)\\."),
         [&](const Match& m) { EXPECT_EQ(holder[m[2]], m[1]); }},
        {std::regex("Now no one had the (\\w+)\\."),
         [&](const Match& m) { EXPECT_EQ(holder[m[1]], ""); }},
        {std::regex("\"?(\\w+|No one) has the (\\w+)[.,].*"),
         [&](const Match& m) {
             EXPECT_EQ(holder[m[2]], m[1] == "No one" ? "" : m[1].str());
             answers++;
         }},
        {std::regex("\"?(\\w+) had the (\\w+) first[.,].*"),
         [&](const Match& m) {
             EXPECT_EQ(first[m[2]], m[1]);
             answers++;
         }},
    };
    const std::regex question("[^]*Who has the \\w+ now\\?[^]*");
    for (const std::string& text : corpus(1500)) {
        if (!std::regex_match(text, question)) continue;
        SCOPED_TRACE(text);
        holder.clear(), first.clear();
        for (const std::string& sentence : resolve(text)) apply(rules, sentence);
        if (testing::Test::HasFailure()) break; // one story is enough to read
    }
    EXPECT_GT(moved, 1000);
    EXPECT_GT(answers, 300);
}

TEST(Stories, HowManyAreLeftIsTrue) {
    std::map<std::string, int> count;
    std::string kind;
    int changes = 0, answers = 0;
    auto has = [&](const std::string& who, const std::string& n) {
        if (count.emplace(who, number(n)).second) return; // the first statement about someone
        EXPECT_EQ(count[who], number(n)) << "what " << who << " has";
    };
    auto change = [&](const std::string& who, int n) {
        EXPECT_TRUE(count.count(who)) << who;
        EXPECT_GE(count[who] += n, 0) << who;
        changes++;
    };
    auto give = [&](const std::string& from, const std::string& n, const std::string& to) {
        change(from, -number(n)), change(to, number(n));
    };
    const std::vector<Rule> rules = {
        {std::regex("(\\w+) had a bag with (\\w+) \\w+\\."),
         [&](const Match& m) { has(m[1], m[2]); }},
        {std::regex("(\\w+) found (\\w+) \\w+(?: \\w+ the \\w+)?\\."),
         [&](const Match& m) { has(m[1], m[2]); }},
        {std::regex("(\\w+) had more than (\\w+)\\."),
         [&](const Match& m) { EXPECT_GT(count[m[1]], count[m[2]]); }},
        {std::regex("(\\w+) had fewer than (\\w+)\\."),
         [&](const Match& m) { EXPECT_LT(count[m[1]], count[m[2]]); }},
        {std::regex("\"I have more than you, (\\w+),\" said (\\w+)\\."),
         [&](const Match& m) { EXPECT_LT(count[m[1]], count[m[2]]); }},
        {std::regex("(\\w+) had as many as (\\w+)\\."),
         [&](const Match& m) { EXPECT_EQ(count[m[1]], count[m[2]]); }},
        {std::regex("(\\w+) and (\\w+) had the same number\\."),
         [&](const Match& m) { EXPECT_EQ(count[m[1]], count[m[2]]); }},
        {std::regex("\"?(\\w+) has (?:more|the most)[.,].*"),
         [&](const Match& m) {
             for (const auto& [who, n] : count) EXPECT_TRUE(who == m[1] || n < count[m[1]]) << who;
         }},
        {std::regex("(?:Then )?(\\w+) gave (\\w+) to (\\w+)\\."),
         [&](const Match& m) { give(m[1], m[2], m[3]); }},
        {std::regex("(?:Now )?(\\w+) had (\\w+) \\w+(?: left| now)?\\."),
         [&](const Match& m) { has(m[1], m[2]); }},
        {std::regex("That left (\\w+) with (\\w+) \\w+\\."),
         [&](const Match& m) { has(m[1], m[2]); }},
        {std::regex("\"(?:Now )?I have (\\w+) \\w+(?: left)?,\" said (\\w+)\\."),
         [&](const Match& m) { has(m[2], m[1]); }},
        {std::regex("(?:Now )?(\\w+) had (\\w+)(?: \\w+| now)?, and (\\w+) had (\\w+)\\."),
         [&](const Match& m) { has(m[1], m[2]), has(m[3], m[4]); }},
        {std::regex("(?:Then )?(\\w+) found (\\w+) more .*"),
         [&](const Match& m) { change(m[1], number(m[2])); }},
        {std::regex("(\\w+) got (\\w+) more \\w+ from \\w+\\."),
         [&](const Match& m) { change(m[1], number(m[2])); }},
        {std::regex("(?:Father|Mother|Grandma|Grandpa|Owl) gave (\\w+) (\\w+) more \\w+\\."),
         [&](const Match& m) { change(m[1], number(m[2])); }},
        {std::regex("(?:Father|Mother|Grandma|Grandpa|Owl) gave (\\w+) (\\w+) \\w+\\."),
         [&](const Match& m) { has(m[1], m[2]); }},
        {std::regex("(?:Then )?(\\w+) gave (\\w+) \\w+ to (\\w+)\\."),
         [&](const Match& m) { give(m[1], m[2], m[3]); }},
        {std::regex("(?:Then )?(\\w+) gave (\\w+) (\\w+) \\w+\\."),
         [&](const Match& m) { give(m[1], m[3], m[2]); }},
        {std::regex("(\\w+) was sad, so (\\w+) gave \\1 (\\w+) \\w+\\."),
         [&](const Match& m) { give(m[2], m[3], m[1]); }},
        {std::regex("\"Here, (\\w+),\" said (\\w+), and gave \\1 (\\w+) \\w+\\."),
         [&](const Match& m) { give(m[2], m[3], m[1]); }},
        {std::regex("(?:Then )?(\\w+) (?:was hungry and |sat down and )?ate (\\w+) .*"),
         [&](const Match& m) { change(m[1], -number(m[2])); }},
        {std::regex("(\\w+) (?:lost|dropped) (\\w+) .*"),
         [&](const Match& m) { change(m[1], -number(m[2])); }},
        {std::regex("A bird took (\\w+) \\w+ from (\\w+)\\."),
         [&](const Match& m) { change(m[2], -number(m[1])); }},
        {std::regex("How many (\\w+) do (\\w+) and (\\w+) have together\\?"),
         [&](const Match& m) { count["They"] = count[m[2]] + count[m[3]]; }},
        {std::regex("\"How many (\\w+) do (\\w+) and (\\w+) have together\\?\".*"),
         [&](const Match& m) { count["They"] = count[m[2]] + count[m[3]]; }},
        {std::regex("\"?(\\w+) (?:has|have) (\\w+) \\w+[.,].*"), [&](const Match& m) {
             EXPECT_TRUE(count.count(m[1])) << m[1];
             EXPECT_EQ(count[m[1]], number(m[2]));
             answers++;
         }}};
    const std::regex question(
        "[^]*(?:How many \\w+ does \\w+ have|Who has more \\w+|Who has the most "
        "\\w+) now\\?[^]*");
    const std::regex trade("[^]*(?:Give me|I will give)[^]*"); // see the next test
    for (const std::string& text : corpus(2500)) {
        if (!std::regex_match(text, question) || std::regex_match(text, trade)) continue;
        SCOPED_TRACE(text);
        count.clear();
        for (const std::string& sentence : resolve(text)) apply(rules, sentence);
        if (testing::Test::HasFailure()) break;
    }
    EXPECT_GT(changes, 800);
    EXPECT_GT(answers, 250);
}

TEST(Stories, TradesAreTrue) {
    std::map<std::string, std::map<std::string, int>> count; // by trader and kind
    std::string seller, offered, asked;                      // the last offer, "three nuts"
    std::set<std::string> traders;
    int deals = 0, answers = 0;
    const std::map<std::string, std::string> plural = {{"berry", "berries"}, {"leaf", "leaves"}};
    auto kind = [&](const std::string& goods) { // of "one berry"
        std::string word = goods.substr(goods.find(' ') + 1);
        if (plural.count(word)) return plural.at(word);
        return word.back() == 's' ? word : word + "s";
    };
    auto amount = [](const std::string& goods) { return number(goods.substr(0, goods.find(' '))); };
    auto start = [&](const std::string& who, const std::string& goods) {
        count[who][kind(goods)] = amount(goods);
        traders.insert(who);
    };
    auto has = [&](const std::string& who, const std::string& goods) {
        EXPECT_EQ(count[who][kind(goods)], amount(goods)) << who << ", " << goods;
    };
    auto deal = [&](const std::string& a, const std::string& given, const std::string& b,
                    const std::string& got) {
        EXPECT_GE(count[a][kind(given)] -= amount(given), 0) << a;
        EXPECT_GE(count[b][kind(got)] -= amount(got), 0) << b;
        count[b][kind(given)] += amount(given);
        count[a][kind(got)] += amount(got);
        deals++;
    };
    const std::string goods = "(\\w+ \\w+)";
    const std::vector<Rule> rules = {
        {std::regex("(\\w+) had " + goods + ", and (\\w+) had " + goods + "\\."),
         [&](const Match& m) { start(m[1], m[2]), start(m[3], m[4]); }},
        {std::regex("(\\w+) had " + goods + "\\."), [&](const Match& m) { start(m[1], m[2]); }},
        {std::regex("\"I will give you " + goods + " for " + goods + ",\" said (\\w+)\\."),
         [&](const Match& m) { offered = m[1], asked = m[2], seller = m[3]; }},
        {std::regex("\"Give me " + goods + ", and I will give you " + goods + ",\" said (\\w+)\\."),
         [&](const Match& m) { asked = m[1], offered = m[2], seller = m[3]; }},
        {std::regex("So (\\w+) gave " + goods + " to (\\w+), and \\3 gave " + goods + " to \\1\\."),
         [&](const Match& m) { deal(m[1], m[2], m[3], m[4]); }},
        {std::regex("So (\\w+) gave (\\w+) " + goods + ", and \\2 gave \\1 " + goods + "\\."),
         [&](const Match& m) { deal(m[1], m[3], m[2], m[4]); }},
        {std::regex("They traded " + goods + " for " + goods + "\\."),
         [&](const Match& m) {
             EXPECT_EQ(m[1], offered);
             EXPECT_EQ(m[2], asked);
             deal(seller, m[1], *traders.begin() == seller ? *traders.rbegin() : *traders.begin(),
                  m[2]);
         }},
        {std::regex("(?:Now )?(\\w+) had " + goods + " and " + goods + "(?: now)?\\."),
         [&](const Match& m) { has(m[1], m[2]), has(m[1], m[3]); }},
        {std::regex("\"?(\\w+) has " + goods + "[.,].*"),
         [&](const Match& m) { has(m[1], m[2]), answers++; }},
    };
    const std::regex trade("[^]*(?:Give me|I will give you) \\w+ \\w+(?:,| for \\w+ \\w+,)[^]*");
    for (const std::string& text : corpus(2500)) {
        if (!std::regex_match(text, trade) || text.find("How many") == std::string::npos) continue;
        SCOPED_TRACE(text);
        count.clear(), traders.clear();
        for (const std::string& sentence : resolve(text)) apply(rules, sentence);
        if (testing::Test::HasFailure()) break;
    }
    EXPECT_GT(deals, 100);
    EXPECT_GT(answers, 150);
}

TEST(Stories, WhoIsWhereIsTrue) {
    std::map<std::string, std::string> at, before, holder; // of people and toys; holder "": nobody
    int moves = 0, answers = 0;
    auto go = [&](const std::string& who, const std::string& place) {
        EXPECT_NE(at[who], place);
        before[who] = at[who], at[who] = place, moves++;
    };
    auto take = [&](const std::string& who, const std::string& toy) {
        EXPECT_EQ(holder[toy], "") << who << " takes the " << toy;
        EXPECT_EQ(at[toy], at[who]) << who << " takes the " << toy;
        holder[toy] = who;
    };
    auto leave = [&](const std::string& who, const std::string& toy) {
        EXPECT_EQ(holder[toy], who);
        holder[toy] = "", at[toy] = at[who];
    };
    const std::string where = "\\w+ the (\\w+)";
    const std::vector<Rule> rules = {
        {std::regex("(\\w+) was there too\\."),
         [&](const Match& m) {
             int here = 0;
             for (const auto& [who, place] : at) here += !toys.count(who) && place == at[m[1]];
             EXPECT_GE(here, 2);
         }},
        {std::regex("(?:There was|An?)(?: an?)? \\w+ (\\w+)(?: lay)? " + where + "\\."),
         [&](const Match& m) { at[m[1]] = m[2]; }},
        {std::regex("No one else was " + where + "\\."),
         [&](const Match& m) {
             int here = 0;
             for (const auto& [who, place] : at) here += !toys.count(who) && place == m[1];
             EXPECT_EQ(here, 1);
         }},
        {std::regex("(?:Then )?(\\w+) (?:went|walked) to the (\\w+)\\."),
         [&](const Match& m) { go(m[1], m[2]); }},
        {std::regex("(\\w+) ran from the (\\w+) to the (\\w+)\\."),
         [&](const Match& m) {
             EXPECT_EQ(at[m[1]], m[2]);
             go(m[1], m[3]);
         }},
        {std::regex("(\\w+) (?:took|carried) the (\\w+) to the (\\w+)\\."),
         [&](const Match& m) {
             EXPECT_EQ(holder[m[2]], m[1]);
             go(m[1], m[3]);
         }},
        {std::regex("(\\w+) went to the (\\w+) with the (\\w+)\\."),
         [&](const Match& m) {
             EXPECT_EQ(holder[m[3]], m[1]);
             go(m[1], m[2]);
         }},
        {std::regex("There (\\w+) met (\\w+)\\."),
         [&](const Match& m) { EXPECT_EQ(at[m[1]], at[m[2]]); }},
        {std::regex("\"Hello, (\\w+),\" said (\\w+)\\."),
         [&](const Match& m) { EXPECT_EQ(at[m[1]], at[m[2]]); }},
        {std::regex("(\\w+) (?:picked up|took) the (\\w+)\\."),
         [&](const Match& m) { take(m[1], m[2]); }},
        {std::regex("(\\w+) saw the (\\w+) and picked the \\2 up\\."),
         [&](const Match& m) { take(m[1], m[2]); }},
        {std::regex("(\\w+) (?:left|put|put down) the (\\w+) (?:down|" + where + ")\\."),
         [&](const Match& m) {
             leave(m[1], m[2]);
             EXPECT_TRUE(!m[3].matched || at[m[1]] == m[3]);
         }},
        {std::regex("\"?The (\\w+) is " + where + "[.,].*"),
         [&](const Match& m) {
             EXPECT_EQ(holder[m[1]], "");
             EXPECT_EQ(at[m[1]], m[2]);
             answers++;
         }},
        {std::regex("\"?(\\w+) is " + where + "[.,].*"),
         [&](const Match& m) {
             EXPECT_EQ(at[m[1]], m[2]);
             answers++;
         }},
        {std::regex("\"?(\\w+) has the (\\w+) " + where + "[.,].*"),
         [&](const Match& m) {
             EXPECT_EQ(holder[m[2]], m[1]);
             EXPECT_EQ(at[m[1]], m[3]);
             answers++;
         }},
        {std::regex("\"?(\\w+) was " + where + "[.,].*"), [&](const Match& m) {
             if (at.emplace(m[1], m[2]).second) return;
             EXPECT_EQ(before[m[1]], m[2]); // "Where was Tom before that?"
             answers++;
         }}};
    const std::regex question("[^]*Where is \\w+ now\\?[^]*");
    for (const std::string& text : corpus(2500)) {
        if (!std::regex_match(text, question)) continue;
        SCOPED_TRACE(text);
        at.clear(), before.clear(), holder.clear();
        for (const std::string& sentence : resolve(text)) apply(rules, sentence);
        if (testing::Test::HasFailure()) break;
    }
    EXPECT_GT(moves, 500);
    EXPECT_GT(answers, 400);
}

TEST(Stories, PronounsAreClear) {
    for (const std::string& text : corpus(2000)) {
        resolve(text);
        if (testing::Test::HasFailure()) break;
    }
}

TEST(StorySource, IsStoriesSeparatedByEndOfText) {
    StorySource source(7);
    EXPECT_EQ(source.size(), TokenSource::endless);
    EXPECT_EQ(source.id().kind, "bytes");
    EXPECT_EQ(source.id().vocab_size, 257);
    EXPECT_EQ(source.id().eot, 256);
    const size_t block = StorySource::block_tokens;
    std::vector<int> tokens(2 * block);
    source.read(0, tokens.size(), tokens.data());
    for (uint64_t j : {0, 1}) {
        size_t at = j * block;
        for (uint64_t i = 0; at < (j + 1) * block; i++) {
            std::string expected = story(7, j * block + i);
            for (size_t k = 0; k <= expected.size() && at < (j + 1) * block; k++, at++) {
                int token = k < expected.size() ? expected[k] : 256;
                ASSERT_EQ(tokens[at], token) << "token " << at;
            }
        }
    }
}

TEST(StorySource, RandomAccessIsSequentialAccess) {
    const size_t block = StorySource::block_tokens, total = 6 * block;
    StorySource sequential(1);
    std::vector<int> all(total);
    for (size_t at = 0; at < total; at += 1000)
        sequential.read(at, std::min<size_t>(1000, total - at), &all[at]);
    StorySource random(1);
    for (uint64_t i = 0; i < 60; i++) {
        size_t n = 1 + random_below(700, 1, 0, 2 * i);
        size_t pos = i % 3 ? random_below(uint32_t(total - n), 1, 0, 2 * i + 1)
                           : block * (1 + i % 5) - n / 2; // across two blocks
        std::vector<int> some(n);
        random.read(pos, n, some.data());
        ASSERT_TRUE(std::equal(some.begin(), some.end(), &all[pos])) << n << " tokens at " << pos;
    }
    std::vector<int> far(10);
    random.read(UINT64_MAX - 10, 10, far.data());
    EXPECT_THROW(random.read(UINT64_MAX - 10, 11, far.data()), Error);
}

TEST(StorySource, SeedsGiveDifferentStories) {
    StorySource one(1), two(2);
    std::set<std::string> told;
    for (uint64_t i = 0; i < 1000; i++) told.insert(story(1, i));
    size_t shared = 0;
    for (uint64_t i = 0; i < 1000; i++) shared += told.count(story(2, i));
    EXPECT_LE(shared, 2u);
    std::vector<int> a(500), b(500);
    one.read(0, 500, a.data());
    two.read(0, 500, b.data());
    EXPECT_NE(a, b);
}

TEST(StorySource, NeedsItsVocabulary) {
    StorySource source(1);
    EXPECT_NO_THROW(source.check_tokens(257));
    EXPECT_THROW(source.check_tokens(256), Error);
}
