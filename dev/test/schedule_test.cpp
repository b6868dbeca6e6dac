#include <gtest/gtest.h>

#include "gpt/model/schedule.h"

using namespace lns;

namespace {
Schedule schedule(const char* kind, int64_t steps = 100, int64_t warmup = 10) {
    return {kind, 2.0, steps, warmup, 0.1};
}
} // namespace

TEST(Schedule, WarmupIsLinearFromTheFirstStep) {
    for (const std::string& kind : schedule_kinds) {
        Schedule s = schedule(kind.c_str());
        EXPECT_DOUBLE_EQ(learning_rate(s, 1), 0.2) << kind;
        EXPECT_DOUBLE_EQ(learning_rate(s, 5), 1.0) << kind;
        EXPECT_DOUBLE_EQ(learning_rate(s, 10), 2.0) << kind;
    }
}

TEST(Schedule, MiddleAndEnd) {
    EXPECT_NEAR(learning_rate(schedule("cosine"), 55), 2 * (0.1 + 0.9 * 0.5), 1e-12);
    EXPECT_NEAR(learning_rate(schedule("linear"), 55), 2 * (0.1 + 0.9 * 0.5), 1e-12);
    // a third of the cosine: (1 + cos 60°) / 2 = 3/4
    EXPECT_NEAR(learning_rate(schedule("cosine"), 40), 2 * (0.1 + 0.9 * 0.75), 1e-12);
    EXPECT_NEAR(learning_rate(schedule("wsd"), 80), 2, 1e-12);
    EXPECT_NEAR(learning_rate(schedule("wsd"), 85), 2 * (0.1 + 0.9 * 0.5), 1e-12); // 1 − √¼
    EXPECT_NEAR(learning_rate(schedule("constant"), 100), 2, 1e-12);
    for (const char* kind : {"cosine", "linear", "wsd"}) {
        EXPECT_NEAR(learning_rate(schedule(kind), 100), 0.2, 1e-12) << kind;
        EXPECT_NEAR(learning_rate(schedule(kind), 1000), 0.2, 1e-12) << kind;
    }
}

TEST(Schedule, EdgeCases) {
    for (const std::string& kind : schedule_kinds) {
        // no warmup: the first step of several is near the peak, a single one is at the end
        EXPECT_GT(learning_rate(schedule(kind.c_str(), 1000, 0), 1), 1.9) << kind;
        EXPECT_TRUE(std::isfinite(learning_rate(schedule(kind.c_str(), 1, 0), 1))) << kind;
        EXPECT_TRUE(std::isfinite(learning_rate(schedule(kind.c_str(), 0, 0), 1))) << kind;
        // a warmup as long as the run, and longer
        EXPECT_DOUBLE_EQ(learning_rate(schedule(kind.c_str(), 10, 10), 10), 2) << kind;
        EXPECT_DOUBLE_EQ(learning_rate(schedule(kind.c_str(), 10, 20), 10), 1) << kind;
    }
    // a warmup that overlaps wsd's decay
    Schedule s = schedule("wsd", 100, 90);
    EXPECT_DOUBLE_EQ(learning_rate(s, 90), 2);
    EXPECT_NEAR(learning_rate(s, 100), 0.2, 1e-12);
}

TEST(Schedule, NeverRisesAfterWarmup) {
    for (const std::string& kind : schedule_kinds)
        for (int64_t step = 11; step <= 120; step++)
            EXPECT_LE(learning_rate(schedule(kind.c_str()), step),
                      learning_rate(schedule(kind.c_str()), step - 1))
                << kind << " " << step;
}

TEST(Schedule, UnknownKind) { EXPECT_THROW(learning_rate(schedule("cosin"), 50), Error); }
