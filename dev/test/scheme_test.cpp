#include "gpt/model/scheme.h"

#include "dev/test/data_helpers.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "gpt/model/config.h"
#include "gpt/run/schemes.h"

using namespace lns;
using namespace lns::test;

namespace {

const SchemeRow& row_of(const char* name) { return *parse_scheme(name).row; }

} // namespace

TEST(Scheme, NamesAreReadAsTheyAreWritten) {
    for (const std::string& name : scheme_names()) {
        EXPECT_EQ(parse_scheme(name).name(), name);
        const SchemeRow& row = *parse_scheme(name).row;
        if (row.reads_second || row.mixing != Mixing::sum) continue;
        const Scheme all = parse_scheme(name + "+scaled-init+gpas");
        EXPECT_TRUE(all.gpas && all.scaled_init);
        EXPECT_EQ(all.name(), name + "+gpas+scaled-init");
    }
    for (const char* name :
         {"mix:12", "group:4", "mhc:2", "attnres:8", "lns:after", "pre+gpas-each+x0+value-residual",
          "lns:after-mlp+prores:200+depth-init"})
        EXPECT_EQ(parse_scheme(name).name(), name);
    EXPECT_EQ(parse_scheme("mix:12").number, 12);
    EXPECT_EQ(parse_scheme("pre+prores").name(), "pre+prores");
    EXPECT_EQ(parse_scheme("pre+prores:1000").name(), "pre+prores");
    EXPECT_EQ(parse_scheme("pre+prores:7").prores_steps, 7);
}

TEST(Scheme, WrongNamesAreSentences) {
    auto error = [](const char* text) { return error_of([&] { parse_scheme(text); }); };
    EXPECT_TRUE(says(error("lsn"), {"'lsn'", "Did you mean 'lns'", "skipinit", "+gpas"}));
    EXPECT_TRUE(says(error("lns:afte"), {"'lns:afte'", "Did you mean 'lns:after'"}));
    EXPECT_TRUE(says(error("pre+gpsa"), {"'+gpsa'", "Did you mean '+gpas'"}));
    EXPECT_TRUE(says(error("pre:3"), {"'pre' takes no number"}));
    EXPECT_TRUE(says(error("pre+x0:3"), {"'+x0' takes no number"}));
    EXPECT_TRUE(says(error("pre+prores:0"), {"no steps at all"}));
    EXPECT_TRUE(says(error("group:0"), {"no group at all"}));
    EXPECT_TRUE(says(error("mhc:0"), {"'mhc:0'", "no residual streams at all"}));
    EXPECT_TRUE(says(error("attnres:0"), {"'attnres:0'", "no blocks at all"}));
    for (const char* k : {"mix:", "mix:x", "mix:-1", "mix:1234567"})
        EXPECT_TRUE(says(error(k), {"number of layers k", k})) << k;
    for (const char* text : {"", "pre+", "+"})
        EXPECT_TRUE(says(error(text), {"incomplete"})) << text;
}

TEST(Scheme, AdditionsThatHaveNoMeaningAreRefused) {
    auto error = [](const char* text) { return error_of([&] { parse_scheme(text); }); };
    EXPECT_TRUE(says(error("siamese+gpas"), {"+gpas", "siamese", "two residual streams"}));
    EXPECT_TRUE(says(error("residual+x0"), {"+x0", "residual", "two residual streams"}));
    EXPECT_TRUE(says(error("mhc+gpas"), {"+gpas", "mhc", "joins no sum"}));
    EXPECT_TRUE(says(error("attnres:4+x0"), {"+x0", "attnres", "joins no sum"}));
    EXPECT_TRUE(says(error("attnres+prores"), {"+prores", "attnres", "joins no sum"}));
    EXPECT_TRUE(says(error("admin+prores"), {"+prores", "admin", "variance"}));
    EXPECT_TRUE(says(error("pre+gpas+gpas-each"), {"+gpas-each", "choose one"}));
    EXPECT_TRUE(says(error("pre+scaled-init+depth-init"), {"+depth-init", "choose one"}));
}

// The papers' numbers.
TEST(Scheme, Constants) {
    const int L = 8;
    auto at = [&](const char* name, int k) { return junction(parse_scheme(name), L, k); };
    EXPECT_DOUBLE_EQ(at("deepnorm", 3).skip, 2);
    EXPECT_DOUBLE_EQ(row_of("deepnorm").xavier_gain(2), 0.5);
    EXPECT_DOUBLE_EQ(at("deepnorm-published", 3).skip, std::sqrt(8.0));
    EXPECT_DOUBLE_EQ(row_of("deepnorm-published").xavier_gain(2), 2);
    for (auto [layers, start] : {std::pair{18, 0.1}, {19, 1e-5}, {24, 1e-5}, {25, 1e-6}})
        EXPECT_EQ(row_of("layerscale").gamma_init(layers), start);
    EXPECT_DOUBLE_EQ(row_of("skipinit").gamma_init(16), 0.25);
    EXPECT_EQ(row_of("skipinit-published").gamma_init(16), 0.001);
    EXPECT_DOUBLE_EQ(row_of("admin").omega_init(8), std::sqrt(17 / std::log(17.0) - 1));
    for (int k = 0; k < 2 * L; k++) { // layers 1, 1, 2, 2, 3, …
        const double factor = 1 / std::sqrt(double(k / 2 + 1));
        EXPECT_DOUBLE_EQ(at("lns", k).in_scale, factor);
        EXPECT_DOUBLE_EQ(at("lns-init", k).in_weight_init, factor);
        EXPECT_DOUBLE_EQ(at("lns:before", k).in_eps, k / 2 + 1);
        EXPECT_DOUBLE_EQ(at("lns:after", k + 1).beta, factor);
        EXPECT_DOUBLE_EQ(at("lns:after-attn", k + 1).beta, k % 2 ? 1 : factor);
        EXPECT_DOUBLE_EQ(at("lns:after-mlp", k + 1).beta, k % 2 ? factor : 1);
        const Junction sum = at("lns:after-residual", k + 1);
        EXPECT_TRUE(sum.skip == sum.beta && std::fabs(sum.skip - factor) < 1e-15);
        EXPECT_DOUBLE_EQ(at("siamese", k + 1).beta, 1 / std::sqrt(k + 1.0));
        EXPECT_DOUBLE_EQ(at("siamese-published", k + 1).beta, factor / std::sqrt(2.0));
        EXPECT_DOUBLE_EQ(at("completep", k + 1).beta, 2.0 / L);
    }
    EXPECT_EQ(at("lns", 2 * L).in_scale, 1); // the final norm
    // Keel: one norm less at the first attention, no factor in layer 1.
    EXPECT_EQ(at("keel", 1).out_norm, false);
    EXPECT_TRUE(at("keel", 2).out_norm && at("keel", 2).skip == 1 && at("keel", 3).skip == 2 * L);
    // HybridNorm: behind attention; HybridNorm*: layer 1 is Pre-LN.
    EXPECT_TRUE(at("hybrid", 1).out_norm && !at("hybrid", 2).out_norm && !at("hybrid", 0).in_norm);
    EXPECT_TRUE(!at("hybrid*", 1).out_norm && at("hybrid*", 3).out_norm);
    EXPECT_TRUE(at("hybrid*", 0).in_norm && at("hybrid*", 1).in_norm && !at("hybrid*", 2).in_norm);
    // ResiDual reads its second stream at the head alone, whose norm is that stream's.
    EXPECT_TRUE(!at("residual", 3).reads_second && at("residual", 2 * L).reads_second);
    EXPECT_TRUE(!at("residual", 2 * L).in_norm && at("siamese-published", 2 * L).in_norm);
}

TEST(Scheme, BranchesFadeIn) {
    Scheme s = parse_scheme("pre+prores:10");
    EXPECT_EQ(junction(s, 4, 5).beta, 1); // of a model that is trained
    s.step = 0;
    EXPECT_EQ(junction(s, 4, 1).beta, 0);
    s.step = 15; // of 10, 20, 30 and 40
    EXPECT_EQ(junction(s, 4, 2).beta, 1);
    EXPECT_DOUBLE_EQ(junction(s, 4, 3).beta, 0.75);
    EXPECT_DOUBLE_EQ(junction(s, 4, 6).beta, 0.5);
    EXPECT_DOUBLE_EQ(junction(s, 4, 8).beta, 0.375);
}

TEST(Scheme, MixedJunctions) {
    const Junction mhc = junction(parse_scheme("mhc"), 4, 3);
    EXPECT_TRUE(mhc.mixing == Mixing::streams && mhc.mixed == 4 && mhc.in_norm);
    EXPECT_NE(mhc, junction(parse_scheme("mhc:2"), 4, 3));
    EXPECT_EQ(junction(parse_scheme("attnres"), 4, 0).mixing, Mixing::sum);
    EXPECT_EQ(junction(parse_scheme("attnres"), 4, 1).mixed, 1);
    EXPECT_EQ(junction(parse_scheme("attnres:8"), 4, 1), junction(parse_scheme("attnres"), 4, 1));
    EXPECT_EQ(junction(parse_scheme("attnres:3"), 4, 5).mixed, 3); // 3, 3 and 2 sublayers
    for (const auto& [scheme, what] :
         {std::pair{"mhc:9", "up to 8"}, {"attnres:9", "8 sublayers"}}) {
        Config c = preset_config("llama-9m");
        c.layers = 4, c.scheme = parse_scheme(scheme);
        EXPECT_TRUE(says(error_of([&] { complete_config(c); }), {scheme, what}));
    }
}

TEST(Scheme, IsDescribed) {
    const std::string names = describe_schemes("names", 12), table = describe_schemes("table", 12);
    const auto rows = nlohmann::json::parse(describe_schemes("json", 8));
    ASSERT_EQ(rows.size(), scheme_table().size());
    for (size_t i = 0; i < rows.size(); i++) {
        const SchemeRow& row = scheme_table()[i];
        EXPECT_EQ(rows[i].at("name"), row.name);
        EXPECT_TRUE(says(names, {row.name + std::string("\n")}));
        EXPECT_TRUE(says(table, {row.name, row.equations, row.what, row.source}));
        for (int k = 1; k <= 16; k++) {
            const Junction j = junction(parse_scheme(row.name), 8, k);
            EXPECT_EQ(rows[i].at("out_norm")[size_t(k) - 1], j.out_norm) << row.name;
            EXPECT_EQ(rows[i].at("branch_norm")[size_t(k) - 1], j.branch_norm) << row.name;
        }
    }
}
