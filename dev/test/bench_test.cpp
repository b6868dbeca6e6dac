// The machine's peaks, and `train_gpt bench`. No test depends on the machine's speed.
#include "dev/test/program_helpers.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "gpt/cpu/bf16.h"
#include "gpt/cpu/peak.h"
#include "gpt/run/bench.h"

using namespace lns;
using namespace lns::test;

TEST(Peak, IsMeasured) {
    const double float32 = measured_peak_flops(1), bf16 = measured_bf16_flops(1);
    EXPECT_GT(float32, 1e7); // any CPU of the last decades, even without optimization
    EXPECT_GT(bf16, 1e7);
    EXPECT_LT(bf16, 1e15);
    if (bf16_unit() == Bf16Unit::amx) {
        EXPECT_GT(bf16, float32); // by 16
    }
    EXPECT_GT(measured_peak_flops(2), 1e7);
    EXPECT_GT(measured_bf16_flops(2), 1e7); // each thread has its own tiles
}

TEST(Peak, BandwidthIsMeasured) {
    Bandwidth b = measured_bandwidth(2, 8 << 20);
    EXPECT_GT(b.read, 1e6);
    EXPECT_GT(b.write, 1e6);
    EXPECT_GT(b.update, 1e6);
    b = measured_bandwidth(4, 100); // fewer pages than threads
    EXPECT_EQ(b.read + b.write + b.update, 0);
}

TEST(Peak, DataSheetsAreFoundByCudaNames) {
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA H100 80GB HBM3"), 989.4e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA H100 PCIe"), 756e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA H200"), 989.4e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA GH200 480GB"), 989.4e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA A100-SXM4-80GB"), 312e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA A100 80GB PCIe"), 312e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA A10"), 125e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA L40S"), 362.05e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA L4"), 121e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA GeForce RTX 4090"), 165.2e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA RTX A6000"), 154.8e12);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA B200"), 2250e12);
    // Others, slower or a part of one.
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA GeForce RTX 4090 Laptop GPU"), 0);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA GeForce RTX 4090 D"), 0);
    EXPECT_EQ(data_sheet_bf16_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), 0);
    EXPECT_EQ(data_sheet_bf16_flops("Tesla V100-SXM2-16GB"), 0);
    EXPECT_EQ(data_sheet_bf16_flops(""), 0);
}

TEST(Bench, JsonSaysEverything) {
    NEEDS_PROGRAM();
    Finished f = train_gpt("bench -b 2 -t 16 --steps 2 --threads 1 -n lns --json --dtype float32 "
                           "--device cpu --profile");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_EQ(std::count(f.output.begin(), f.output.end(), '\n'), 1);
    nlohmann::json j = nlohmann::json::parse(f.output);
    EXPECT_EQ(j["model"], "tiny");
    EXPECT_EQ(j["scheme"], "lns");
    EXPECT_EQ(j["dtype"], "float32");
    EXPECT_EQ(j["batch"], 2);
    EXPECT_EQ(j["seq_len"], 16);
    EXPECT_EQ(j["threads"], 1);
    EXPECT_EQ(j["seconds"].size(), 2u);
    EXPECT_GT(j["parameters"], 800000);
    EXPECT_EQ(j["config"]["num_hidden_layers"], 16);
    for (const char* name : {"median_seconds", "tokens_per_s", "mfu", "flops_per_token",
                             "planned_memory", "model_memory", "peak_flops"}) {
        ASSERT_TRUE(j.contains(name)) << name;
        if (j[name].is_number()) {
            EXPECT_GT(j[name], 0) << name;
        }
    }
    EXPECT_GT(j["profile"].size(), 10u);
    EXPECT_GT(j["peak_flops"]["float32"], 0);
    EXPECT_GT(j["peak_flops"]["bf16"], 0);
    EXPECT_NEAR(double(j["tokens_per_s"]) * double(j["median_seconds"]), 32, 1e-6);
    EXPECT_NEAR(double(j["losses"][0]), std::log(257.), 0.5); // an untrained model
    EXPECT_LT(j["losses"][1], j["losses"][0]);                // on the same tokens again
}

TEST(Bench, ADisturbedPeakIsDiscarded) {
    Bench b;
    b.config = architecture("llama");
    b.config.scheme = parse_scheme("pre");
    b.config.vocab_size = 8, b.config.width = 8, b.config.layers = 1, b.config.heads = 1;
    b.config.positions = 8;
    complete_config(b.config);
    b.dtype = "bf16", b.gpu = "NVIDIA H200", b.options.device = Device::cuda;
    b.B = b.T = 8, b.seconds = {1}, b.flops = 1e9;
    b.data_sheet_peak = 989.4e12, b.float32_peak = 5e13, b.bf16_peak = 8e14;
    EXPECT_TRUE(says(describe(b), {"% of the measured"}));
    EXPECT_TRUE(nlohmann::json::parse(to_json(b))["mfu_measured"].is_number());
    b.bf16_peak = 1e9;
    EXPECT_EQ(describe(b).find("of the measured"), std::string::npos);
    EXPECT_TRUE(says(describe(b), {"less than half of the data sheet's"}));
    EXPECT_TRUE(nlohmann::json::parse(to_json(b))["mfu_measured"].is_null());
    EXPECT_GT(nlohmann::json::parse(to_json(b))["mfu"], 0);
}

// The memory that --dry-run plans is the process's peak within 5%, and --recompute lowers it.
TEST(Bench, MemoryIsAsPredicted) {
    NEEDS_PROGRAM();
    double before = 1e18;
    for (const std::string flags : {"--dtype bf16", "--dtype bf16 --recompute activations",
                                    "--dtype bf16 --recompute layers", "--dtype float32"}) {
        if (flags == "--dtype float32") before = 1e18;
        Finished f = train_gpt("bench -m llama-9m -b 8 -t 256 --steps 1 --json " + flags);
        ASSERT_EQ(f.status, 0) << f.output;
        nlohmann::json j = nlohmann::json::parse(f.output);
        const double peak = j["peak_memory"], planned = j["planned_memory"];
        if (peak == 0) GTEST_SKIP() << "this system does not report a process's memory";
        EXPECT_NEAR(planned / peak, 1, 0.05) << flags;
        EXPECT_LT(peak, before) << flags;
        before = peak;
    }
}

TEST(Bench, TableAndErrors) {
    NEEDS_PROGRAM();
    Finished f = train_gpt("bench -b 1 -t 8 --steps 1 --threads 1");
    EXPECT_EQ(f.status, 0);
    EXPECT_TRUE(says(f.output, {"tiny", "tokens/s", "MFU", "--dry-run", "GFLOP/s"}));
    EXPECT_TRUE(says(train_gpt("bench --help").output, {"--model", "--steps", "--json"}));
    EXPECT_TRUE(fails_with("bench -m tinny", {"'tinny'", "Did you mean 'tiny'"}));
    EXPECT_TRUE(fails_with("bench --steps 0", {"--steps", "expected 1 to"}));
    EXPECT_TRUE(fails_with("bench -t 4096", {"--seq-len", "1024"}));
    EXPECT_TRUE(fails_with("bench -m llama-7b -b 1000000 -t 2048",
                           {"training this model needs", "--batch"}));
    EXPECT_TRUE(fails_with("bench --device cuda", {"--device"}));
    EXPECT_TRUE(fails_with("bench --lr 1", {"no flag --lr"}));
    EXPECT_TRUE(fails_with("-m tiny bench", {"--model", "`bench`"}));
}
