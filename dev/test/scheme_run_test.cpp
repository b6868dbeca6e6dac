// Norm schemes as a user trains them.
#include "dev/test/program_helpers.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "gpt/base/files.h"
#include "gpt/base/terminal.h"
#include "gpt/run/admin.h"
#include "gpt/run/checkpoint.h"

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

double last_loss(const std::string& run) {
    std::istringstream in(read_bytes(run + "/log.jsonl"));
    nlohmann::json last;
    for (std::string line; std::getline(in, line);) last = nlohmann::json::parse(line);
    return last.at("val_loss");
}

std::string trained(const std::string& flags, const std::string& out) {
    return small_model + "-d 64 --save-every 2 " + flags + " -o " + out;
}

} // namespace

// Trained in one go, and in two: the same bits. Then it is evaluated, and it speaks.
TEST(SchemeRuns, ResumeToTheBit) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    for (const char* scheme :
         {"admin", "keel", "hybrid*", "siamese", "residual", "completep", "lns:after-residual",
          "pre+prores:1", "mix:1+gpas+x0 --clip-gates 0.01", "pre+value-residual"}) {
        const std::string flags = cat("-n '", scheme);
        const size_t space = flags.find(' ', 4);
        const std::string n =
            flags.substr(0, space) + "'" + (space == flags.npos ? "" : flags.substr(space));
        const std::string whole = dir / "whole", parts = dir / "parts";
        fs::remove_all(whole), fs::remove_all(parts);
        Finished f = train_gpt(trained(n + " -x 4", whole));
        ASSERT_EQ(f.status, 0) << scheme << ": " << f.output;
        f = train_gpt(trained(n + " -x 4", parts));
        ASSERT_EQ(f.status, 0) << f.output;
        fs::remove_all(parts + "/step-000004");
        f = train_gpt(" -y -o " + parts);
        ASSERT_EQ(f.status, 0) << f.output;
        for (const char* name : {"/model.safetensors", "/optimizer.safetensors", "/config.json"})
            EXPECT_TRUE(read_bytes(whole + "/step-000004" + name) ==
                        read_bytes(parts + "/step-000004" + name))
                << scheme << name;
        f = train_gpt("eval " + whole);
        EXPECT_TRUE(says(f.output, {cat("loss ", format_number("%.6f", last_loss(whole)))}))
            << scheme;
        f = train_gpt("sample " + whole + " -g 8");
        EXPECT_EQ(f.status, 0) << scheme << ": " << f.output;
    }
}

// With LayerNorm, Var(x) = 1 behind the first sublayer, so ω² of sublayer k + 1 is Var(x₀) + Σ
// Var(f).
TEST(SchemeRuns, AdminSumsTheVariancesOfTheBranches) {
    Config c = architecture("gpt2");
    c.vocab_size = 50, c.width = 64, c.layers = 3, c.heads = 4, c.positions = 32;
    c.scheme = parse_scheme("admin"), c.embed_std = 1;
    complete_config(c);
    const int B = 4, T = 32;
    auto model = make_cpu_model(c, B, T, {.purpose = Purpose::layers});
    model->initialize(1);
    std::vector<int> inputs(size_t(B) * T);
    for (size_t i = 0; i < inputs.size(); i++) inputs[i] = int(i * i % 50);
    const double last = profile_omegas(*model, inputs.data(), B, T, {});

    using Stream = Model::Stream;
    auto variance = [&](Stream stream) {
        Moments all;
        for (const Moments& row : model->row_moments(stream)) all.add(row);
        return all.variance();
    };
    auto omega = [&](int layer, const char* which) {
        const Param* p = model->registry.find(cat("transformer.h.", layer, ".", which, "_omega"));
        std::vector<float> values(size_t(p->size()));
        model->read(Buffer::parameters, *p, values.data());
        for (float value : values) EXPECT_EQ(value, values[0]);
        return double(values[0]);
    };
    EXPECT_EQ(omega(0, "attn"), 1);
    model->embed(inputs.data(), B, T);
    double square = variance(Stream::residual);
    for (int l = 0; l < 3; l++) {
        model->run_layer(l);
        square += variance(Stream::attention);
        EXPECT_NEAR(omega(l, "mlp"), std::sqrt(square), 1e-4 * std::sqrt(square)) << l;
        square += variance(Stream::mlp);
        if (l == 2) break;
        EXPECT_NEAR(omega(l + 1, "attn"), std::sqrt(square), 1e-4 * std::sqrt(square)) << l;
    }
    EXPECT_EQ(float(last), float(omega(2, "mlp")));
}

TEST(SchemeRuns, OlderGatesAreOneASublayer) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    Finished f = train_gpt(trained("-n pre+gpas-each -x 2", dir / "run"));
    ASSERT_EQ(f.status, 0) << f.output;
    const std::string file = dir / "run/step-000002/config.json";
    std::string config = read_bytes(file);
    config.replace(config.find("+gpas-each"), 10, "+gpas"); // as an older program wrote it
    write_file_atomic(file, config);
    fs::remove(dir / "run/step-000002/checksums.json");
    EXPECT_EQ(checkpoint_config(dir / "run/step-000002").scheme.name(), "pre+gpas-each");
}

TEST(SchemeRuns, FlagsOfOtherSchemesAreErrors) {
    NEEDS_PROGRAM();
    EXPECT_TRUE(fails_with("-n pre --clip-gates 1 --dry-run", {"--clip-gates", "+gpas", "'pre'"}));
    EXPECT_TRUE(
        fails_with("-n pre --completep-base 2x256 --dry-run", {"--completep-base", "'pre'"}));
    EXPECT_TRUE(
        fails_with("-n completep --completep-base 2by256 --dry-run", {"2by256", "LAYERSxWIDTH"}));
    EXPECT_TRUE(
        fails_with("-n admin --recompute layers --dry-run", {"--recompute layers", "admin:const"}));
    EXPECT_TRUE(fails_with("-n siamese+gpas --dry-run", {"two residual streams"}));
}
