#include "gpt/model/scheme.h"

#include "dev/test/data_helpers.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "gpt/run/schemes.h"

using namespace lns;
using namespace lns::test;

namespace {

const SchemeRow& row_of(const char* name) { return *parse_scheme(name).row; }

} // namespace

TEST(Scheme, NamesAreReadAsTheyAreWritten) {
    for (const std::string& name : scheme_names()) {
        EXPECT_EQ(parse_scheme(name).name(), name);
        const Scheme all = parse_scheme(name + "+scaled-init+gpas");
        EXPECT_TRUE(all.gpas && all.scaled_init);
        EXPECT_EQ(all.name(), name + "+gpas+scaled-init");
    }
    EXPECT_EQ(parse_scheme("mix:12").mix_layers, 12);
}

TEST(Scheme, WrongNamesAreSentences) {
    auto error = [](const char* text) { return error_of([&] { parse_scheme(text); }); };
    EXPECT_TRUE(says(error("lsn"), {"'lsn'", "Did you mean 'lns'", "skipinit", "+gpas"}));
    EXPECT_TRUE(says(error("pre+gpsa"), {"'+gpsa'", "Did you mean '+gpas'"}));
    EXPECT_TRUE(says(error("pre:3"), {"'pre' takes no number"}));
    for (const char* k : {"mix:", "mix:x", "mix:-1", "mix:1234567"})
        EXPECT_TRUE(says(error(k), {"number of layers k", k})) << k;
    for (const char* text : {"", "pre+", "+"})
        EXPECT_TRUE(says(error(text), {"incomplete"})) << text;
}

// The papers' numbers.
TEST(Scheme, Constants) {
    EXPECT_DOUBLE_EQ(row_of("deepnorm").skip(8), 2);
    EXPECT_DOUBLE_EQ(row_of("deepnorm").xavier_gain(2), 0.5);
    EXPECT_DOUBLE_EQ(row_of("deepnorm-published").skip(3), std::sqrt(8.0));
    EXPECT_DOUBLE_EQ(row_of("deepnorm-published").xavier_gain(2), 2);
    for (auto [L, start] : {std::pair{18, 0.1}, {19, 1e-5}, {24, 1e-5}, {25, 1e-6}})
        EXPECT_EQ(row_of("layerscale").gamma_init(L), start);
    EXPECT_EQ(row_of("skipinit").gamma_init(3), 0.001);
    for (int k = 0; k < 8; k++) { // layers 1, 1, 2, 2, 3, …
        const double factor = 1 / std::sqrt(double(k / 2 + 1));
        EXPECT_DOUBLE_EQ(junction(parse_scheme("lns"), 4, k).in_scale, factor);
        EXPECT_DOUBLE_EQ(junction(parse_scheme("lns-init"), 4, k).in_weight_init, factor);
    }
    EXPECT_EQ(junction(parse_scheme("lns"), 4, 8).in_scale, 1); // the final norm
}

TEST(Scheme, IsDescribed) {
    const std::string names = describe_schemes("names", 12), table = describe_schemes("table", 12);
    const auto rows = nlohmann::json::parse(describe_schemes("json", 8));
    ASSERT_EQ(rows.size(), scheme_table().size());
    for (size_t i = 0; i < rows.size(); i++) {
        const SchemeRow& row = scheme_table()[i];
        EXPECT_EQ(rows[i].at("name"), row.name);
        EXPECT_EQ(rows[i].at("skip"), row.skip ? row.skip(8) : 1);
        EXPECT_TRUE(says(names, {row.name + std::string("\n")}));
        EXPECT_TRUE(says(table, {row.name, row.what, row.source}));
    }
    EXPECT_EQ(rows[4].at("name"), "deepnorm");
    EXPECT_EQ(rows[4].at("out_norm"), "all");
    EXPECT_EQ(rows[4].at("in_norm"), "none");
}
