#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "dev/test/data_helpers.h"
#include "gpt/base/error.h"
#include "gpt/run/sample.h"

using namespace lns;

namespace {

// log of 0.1, 0.4, 0.2, 0.3, up to a constant that the softmax drops
const std::vector<float> logits = {std::log(0.1f) + 3, std::log(0.4f) + 3, std::log(0.2f) + 3,
                                   std::log(0.3f) + 3};

std::vector<Candidate> from(const Sampling& s) { return candidates(logits.data(), 4, s); }

void expect_candidates(const std::vector<Candidate>& found,
                       const std::vector<Candidate>& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); i++) {
        EXPECT_EQ(found[i].token, expected[i].token) << i;
        EXPECT_NEAR(found[i].probability, expected[i].probability, 1e-6) << i;
    }
}

// A model of 4 tokens that predicts (x + 1) mod 4 after x with certainty, and records its inputs.
struct Counter : Model {
    std::vector<std::vector<int>> asked;
    Counter(const Config& c) : Model(c) {}
    std::string device() const override { return "cpu"; }
    std::string dtype() const override { return "float32"; }
    void initialize(uint64_t) override {}
    double loss(const int*, const int*, int, int) override { return 0; }
    double loss_and_gradients(const int*, const int*, int, int, double) override { return 0; }
    void logits(const int* inputs, int, int T, bool, float* out) override {
        asked.push_back({inputs, inputs + T});
        for (int v = 0; v < 4; v++) out[v] = v == (inputs[T - 1] + 1) % 4 ? 100.0f : 0.0f;
    }
    void score(const int*, int, int, const Branches&, const std::vector<ScoredToken>&,
               double*) override {}
    void zero_gradients(const Hyperparameters&) override {}
    double gradient_norm() override { return 0; }
    void update(const Hyperparameters&) override {}
    void read(Buffer, const Param&, float*) override {}
    void write(Buffer, const Param&, const float*) override {}
    std::string first_nonfinite() override { return ""; }
    int64_t bytes() const override { return 0; }
};

Config small() {
    Config c = architecture("llama");
    c.vocab_size = 4, c.width = 8, c.layers = 1, c.heads = 2, c.positions = 16;
    complete_config(c);
    return c;
}

} // namespace

TEST(Sample, Temperature) {
    expect_candidates(from({1, 0, 1, 0}), {{1, 0.4}, {3, 0.3}, {2, 0.2}, {0, 0.1}});
    // at temperature ½ probabilities are proportional to their squares: 16, 9, 4, 1 of 30
    expect_candidates(from({0.5, 0, 1, 0}),
                      {{1, 16 / 30.}, {3, 9 / 30.}, {2, 4 / 30.}, {0, 1 / 30.}});
    expect_candidates(from({0, 0, 1, 0}), {{1, 1}});
}

TEST(Sample, TopK) {
    expect_candidates(from({1, 2, 1, 0}), {{1, 4 / 7.}, {3, 3 / 7.}});
    expect_candidates(from({1, 1, 1, 0}), {{1, 1}});
    expect_candidates(from({1, 99, 1, 0}), {{1, 0.4}, {3, 0.3}, {2, 0.2}, {0, 0.1}});
}

TEST(Sample, TopP) {
    expect_candidates(from({1, 0, 0.69, 0}), {{1, 4 / 7.}, {3, 3 / 7.}});
    expect_candidates(from({1, 0, 0.71, 0}), {{1, 4 / 9.}, {3, 3 / 9.}, {2, 2 / 9.}});
    expect_candidates(from({1, 0, 0.01, 0}), {{1, 1}}); // never empty
    // top-k first: of 4/7 and 3/7, the first suffices for one half
    expect_candidates(from({1, 2, 0.5, 0}), {{1, 1}});
}

TEST(Sample, TiesGoToTheLowerToken) {
    std::vector<float> equal(5, 1.0f);
    EXPECT_EQ(sample_token(equal.data(), 5, {0, 0, 1, 0}, 0), 0);
    EXPECT_EQ(candidates(equal.data(), 5, {1, 2, 1, 0})[1].token, 1);
}

TEST(Sample, ExtremeLogits) {
    std::vector<float> wide = {-1e30f, 0, 1e30f, -std::numeric_limits<float>::infinity()};
    std::vector<Candidate> c = candidates(wide.data(), 4, {1, 0, 1, 0});
    EXPECT_EQ(c[0].token, 2);
    EXPECT_EQ(c[0].probability, 1);
    wide[1] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_THROW(candidates(wide.data(), 4, {0, 0, 1, 0}), Error);
}

TEST(Sample, DrawsFollowTheDistribution) {
    const int n = 40000;
    std::vector<int> seen(4);
    for (int i = 0; i < n; i++) seen[sample_token(logits.data(), 4, {1, 0, 1, 7}, i)]++;
    const double p[] = {0.1, 0.4, 0.2, 0.3};
    for (int v = 0; v < 4; v++) // five standard deviations
        EXPECT_NEAR(double(seen[v]) / n, p[v], 5 * std::sqrt(p[v] * (1 - p[v]) / n)) << v;
}

TEST(Sample, SeedDecides) {
    auto draw = [](uint64_t seed) {
        std::vector<int> tokens;
        for (int i = 0; i < 50; i++)
            tokens.push_back(sample_token(logits.data(), 4, {1, 0, 1, seed}, i));
        return tokens;
    };
    EXPECT_EQ(draw(1), draw(1));
    EXPECT_NE(draw(1), draw(2));
}

TEST(Sample, GenerateCropsTheContextAndStops) {
    Counter model(small());
    std::vector<int> tokens = generate(model, {0, 1, 2}, 5, 4, {1, 0, 1, 0});
    EXPECT_EQ(tokens, (std::vector<int>{3, 0, 1, 2, 3}));
    EXPECT_EQ(model.asked[0], (std::vector<int>{0, 1, 2}));
    EXPECT_EQ(model.asked[4], (std::vector<int>{3, 0, 1, 2}));

    tokens = generate(model, {0}, 5, 4, {0, 0, 1, 0}, [](int token) { return token != 2; });
    EXPECT_EQ(tokens, (std::vector<int>{1, 2}));
    EXPECT_THROW(generate(model, {}, 5, 4, {}), Error);
}

TEST(Sample, TokensTheTokenizerLacksAreNotDrawn) {
    Counter model(small());
    for (int token : generate(model, {0}, 50, 4, {2, 0, 1, 0, 2})) EXPECT_LT(token, 2);
}

TEST(Sample, TextIsTheDifferenceBetweenDecodings) {
    const auto bytes = load_tokenizer("bytes");
    EXPECT_EQ(continuation(*bytes, {'a', ' '}, {'b'}), "b");
    EXPECT_EQ(continuation(*bytes, {256}, {'b', 256, 'c'}), "bc");
    EXPECT_EQ(continuation(*bytes, {}, {}), "");
    // tokens that the tokenizer lacks
    EXPECT_EQ(continuation(*bytes, {'a', 999}, {257, 'b', -1}), "b");
#ifdef LNS_SENTENCEPIECE
    const auto pieces = load_tokenizer("dev/test/fixtures/tokenizers/exact.model");
    const std::vector<int> prompt = pieces->encode("the fox"),
                           whole = pieces->encode("the fox the");
    const std::vector<int> made(whole.begin() + std::ptrdiff_t(prompt.size()), whole.end());
    EXPECT_EQ(continuation(*pieces, prompt, made), " the");
    EXPECT_EQ(continuation(*pieces, {2}, made), "the"); // a text begins without a space
    // byte pieces: <0x00> is 3
    auto byte = [](int b) { return b + 3; };
    EXPECT_EQ(continuation(*pieces, prompt, {byte(0xe4), byte(0xb8), byte(0xad)}), "\u4e2d");
    std::vector<int> cut = prompt;
    cut.push_back(byte(0xe4));
    EXPECT_EQ(continuation(*pieces, cut, {byte(0xb8), byte(0xad)}), "\u4e2d");
    EXPECT_EQ(whole_characters(continuation(*pieces, prompt, {byte('x'), byte(0xe4), byte(0xb8)})),
              1u);
#endif
}

TEST(Sample, UnfinishedCharactersAreHeldBack) {
    EXPECT_EQ(whole_characters(""), 0u);
    EXPECT_EQ(whole_characters("ab"), 2u);
    EXPECT_EQ(whole_characters("a\u00e9"), 3u);
    EXPECT_EQ(whole_characters("a\xc3"), 1u);
    EXPECT_EQ(whole_characters("a\xf0\x9f\x99"), 1u);
    EXPECT_EQ(whole_characters("a\U0001F642"), 5u);
    EXPECT_EQ(whole_characters("\xf0"), 0u);
    EXPECT_EQ(whole_characters("a\xff"), 1u);
    EXPECT_EQ(whole_characters("a\x80\x80\x80\x80"), 5u); // these cannot be completed
    EXPECT_EQ(whole_characters("a\uFFFD\uFFFD"), 1u);
    EXPECT_EQ(whole_characters("a\uFFFD\uFFFD\uFFFD\uFFFD"), 4u); // a character has 4 bytes
}
