#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "gpt/model/lisa.h"

using namespace lns;

TEST(Lisa, DrawsEachSetAlike) {
    std::map<std::vector<int>, int> found;
    const int draws = 20000;
    for (uint64_t draw = 0; draw < draws; draw++) {
        const std::vector<int> drawn = drawn_layers(7, draw, 5, 2);
        ASSERT_EQ(drawn.size(), 2u);
        ASSERT_TRUE(0 <= drawn[0] && drawn[0] < drawn[1] && drawn[1] < 5);
        ASSERT_EQ(drawn, drawn_layers(7, draw, 5, 2));
        found[drawn]++;
    }
    ASSERT_EQ(found.size(), 10u); // of 5 over 2
    for (const auto& [drawn, n] : found)
        EXPECT_NEAR(n, draws / 10, 5 * std::sqrt(draws * 0.1 * 0.9)) << drawn[0] << drawn[1];
    EXPECT_EQ(drawn_layers(7, 3, 4, 4), (std::vector<int>{0, 1, 2, 3}));
    int alike = 0;
    for (uint64_t draw = 0; draw < 100; draw++)
        alike += drawn_layers(7, draw, 30, 4) == drawn_layers(8, draw, 30, 4);
    EXPECT_LT(alike, 3) << "draws do not depend on the seed";
}

TEST(Lisa, CountsTheUpdatesOfEachLayer) {
    for (const int64_t interval : {1, 3, 5}) {
        const int layers = 6, n = 2;
        Lisa lisa(11, layers, n, interval), another = lisa;
        std::vector<int64_t> count(layers);
        for (int64_t step = 1; step <= 40; step++) {
            const std::vector<int> drawn =
                drawn_layers(11, uint64_t((step - 1) / interval), layers, n);
            std::vector<int64_t> expected(layers);
            for (int layer : drawn) expected[size_t(layer)] = ++count[size_t(layer)];
            EXPECT_EQ(lisa.updates(step), expected) << step;
            EXPECT_EQ(lisa.updates(step), expected) << "asked twice";
            EXPECT_EQ(lisa.drawn, drawn);
            if (step % 7 == 0) { // as after resuming; then as from the beginning
                EXPECT_EQ(Lisa(11, layers, n, interval).updates(step), expected);
                EXPECT_EQ(another.updates(step), expected);
                another.updates(1);
            }
        }
        EXPECT_GT(*std::max_element(count.begin(), count.end()), interval) << "no layer came back";
    }
}
