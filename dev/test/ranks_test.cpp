// What ranks compare, how they share a step, and how they detect a hang. dev/test/ranks.sh tests
// the program.
#include "gpt/base/ranks.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>
#include <unistd.h>

#include "dev/test/data_helpers.h"
#include "gpt/base/watch.h"
#include "gpt/run/facts.h"
#include "gpt/run/setup.h"

namespace lns {
namespace {

using test::says;

TEST(Ranks, DifferencesAreNamed) {
    const Facts first = {{"--lr", "0.003"}, {"--seed", "1"}, {"--norm", ""}};
    EXPECT_EQ(differences({first, first, first}), "");
    EXPECT_EQ(
        differences({first, {{"--lr", "0.1"}, {"--seed", "1"}, {"--norm", "lns"}}}),
        "rank 1 has --lr 0.1 and rank 0 has 0.003; rank 1 has --norm lns and rank 0 has none");
    EXPECT_EQ(differences({first, first, {{"--lr", "0.003"}, {"--norm", ""}}}),
              "rank 2 has --seed none and rank 0 has 1");
    EXPECT_EQ(
        differences({first, {{"--lr", "0.003"}, {"--seed", "1"}, {"--norm", ""}, {"-z", "1"}}}),
        "rank 1 has -z 1 and rank 0 has none");
}

TEST(Ranks, ManyDifferencesAreCounted) {
    Facts first, other;
    for (const char* name : {"a", "b", "c", "d", "e"})
        first.push_back({name, "0"}), other.push_back({name, "1"});
    const std::string text = differences({first, other, other});
    EXPECT_EQ(text.substr(text.rfind(';')), "; and 2 more");
}

TEST(Ranks, LongValuesAreShownFromWhereTheyDiffer) {
    const std::string long_text(1000, 'x');
    const std::string text = differences(
        {{{"a build with", long_text + " -O2"}}, {{"a build with", long_text + " -O3"}}});
    EXPECT_EQ(text, "rank 1 has a build with … -O3 and rank 0 has … -O2");
}

TEST(Ranks, ControlCharactersAreEscaped) {
    EXPECT_EQ(differences({{{"--out", "a"}}, {{"--out", "\x1b[2J"}}}),
              "rank 1 has --out ^[[2J and rank 0 has a");
}

Options shape_options(int64_t total, int64_t batch, bool goes_on, bool batch_given = false) {
    Options o;
    o.seq_len = 16, o.total_batch = total, o.batch = batch;
    o.continued = goes_on;
    if (batch_given) o.given = {"--batch"};
    return o;
}

std::string shape_error(const Options& o, int ranks) {
    try {
        step_shape(o, ranks);
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

TEST(Ranks, AnotherNumberOfRanksKeepsTheStep) {
    // 12 sequences of 16 tokens: 3 ranks of 4.
    const Options o = shape_options(192, 4, true);
    for (auto [ranks, batch] : {std::pair{1, 4}, {2, 3}, {3, 4}, {4, 3}, {6, 2}, {12, 1}}) {
        const StepShape shape = step_shape(o, ranks);
        EXPECT_EQ(shape.tokens, 192) << ranks;
        EXPECT_EQ(shape.batch, batch) << ranks;
    }
}

TEST(Ranks, AdviceOnTheNumberOfRanksWorks) {
    EXPECT_TRUE(says(shape_error(shape_options(192, 4, true), 5),
                     {"12 sequences", "5 ranks cannot share", "start 4 (mpirun -np 4) or 6"}));
    EXPECT_TRUE(says(shape_error(shape_options(192, 4, true), 20), {"start 12 (mpirun -np 12)"}));
    // With an explicit -b, the advice must suit it, or say to drop it.
    EXPECT_TRUE(
        says(shape_error(shape_options(192, 4, true, true), 5), {"start 3 (mpirun -np 3)"}));
    EXPECT_EQ(step_shape(shape_options(192, 4, true, true), 3).batch, 4);
    EXPECT_TRUE(says(shape_error(shape_options(192, 5, true, true), 5),
                     {"start 4 (mpirun -np 4) or 6", "without --batch"}));
}

TEST(Ranks, AdviceOnTheBatchWorks) {
    EXPECT_TRUE(says(shape_error(shape_options(192, 4, true, true), 2), {"try --batch 3"}));
    EXPECT_EQ(step_shape(shape_options(192, 3, true, true), 2).batch, 3);
    EXPECT_TRUE(says(shape_error(shape_options(64, 8, false), 1), {"try --batch 4"}));
    EXPECT_EQ(step_shape(shape_options(64, 4, false), 1).tokens, 64);
    EXPECT_TRUE(says(shape_error(shape_options(100, 8, false), 1), {"try --total-batch 128"}));
    EXPECT_EQ(step_shape(shape_options(128, 8, false), 1).tokens, 128);
    EXPECT_TRUE(
        says(shape_error(shape_options(200, 4, false), 2), {"try --total-batch 128 or 256"}));
    EXPECT_EQ(step_shape(shape_options(256, 4, false), 2).tokens, 256);
    EXPECT_EQ(step_shape(shape_options(0, 4, false), 3).tokens, 192);
}

TEST(Ranks, DataIsIdentifiedByItsContents) {
    std::vector<int> tokens(5000, 1);
    auto facts = [&] {
        auto source = std::make_shared<MemorySource>(tokens);
        return data_facts("training", *source, Loader(source, 16, 1, true));
    };
    const Facts before = facts();
    EXPECT_EQ(differences({before, facts()}), "");
    tokens.back() = 2;
    EXPECT_TRUE(
        says(differences({before, facts()}), {"rank 1 has training data with the fingerprint"}));
    tokens.resize(4000);
    EXPECT_TRUE(says(differences({before, facts()}), {"rank 1 has training sequences 249"}));
}

TEST(Watch, TheTimeoutIsSeconds) {
    setenv("LNS_RANK_TIMEOUT", "7.5", 1);
    EXPECT_EQ(rank_timeout(), 7.5);
    for (const char* wrong : {"ten", "-1", "0.01", "nan", "1e9"}) {
        setenv("LNS_RANK_TIMEOUT", wrong, 1);
        EXPECT_THROW(rank_timeout(), Error) << wrong;
    }
    unsetenv("LNS_RANK_TIMEOUT");
    EXPECT_EQ(rank_timeout(), 20);
}

// Ranks 0 and 1 of 2 in this process.
struct Two {
    Watch zero{0, 2}, one{1, 2};
    Two() {
        const Rendezvous point = zero.open(1, true);
        std::thread connects([&] { one.connect(point, true); });
        const std::vector<char> reached = zero.accept_all();
        connects.join();
        zero.start(reached);
        one.start(reached);
    }
};

TEST(WatchDeathTest, AStepThatTakesFarLongerEndsAllRanks) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    auto hang = [] {
        Two two;
        two.zero.set_advice("Saved is x");
        two.one.waiting = true;
        for (int i = 0; i < 2; i++) {
            two.zero.begin_section("a step");
            if (i == 0) two.zero.end_section();
        }
        sleep(30);
    };
    EXPECT_EXIT(hang(), testing::ExitedWithCode(1),
                "a step has taken .* does not finish on rank 0 .*All ranks end. Saved is x");
}

TEST(WatchDeathTest, AFirstStepMayTakeLong) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    auto work = [] {
        Two two;
        two.zero.begin_section("a step");
        sleep(2);
        two.zero.end_section();
        two.one.leave();
        two.zero.leave();
        std::_Exit(7);
    };
    EXPECT_EXIT(work(), testing::ExitedWithCode(7), "");
}

TEST(WatchDeathTest, StrangersAreRejected) {
    Watch zero(0, 2), stranger(1, 2);
    const Rendezvous point = zero.open(1, true);
    Rendezvous wrong = point;
    wrong.key++;
    Watch one(1, 2);
    std::thread connects([&] {
        stranger.connect(wrong, true);
        one.connect(point, true);
    });
    EXPECT_EQ(zero.accept_all(), (std::vector<char>{1, 1}));
    connects.join();
}

} // namespace
} // namespace lns
