// What does not fit into memory, and what would.
#include "gpt/run/device.h"

#include <cmath>
#include <unistd.h>

#include "dev/test/program_helpers.h"
#include "gpt/base/cgroup.h"
#include "gpt/base/files.h"
#include "gpt/run/safetensors.h"

using namespace lns;
using namespace lns::test;

namespace {

const double memory =
    std::min(double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGE_SIZE)), cgroup_memory());

// A LLaMA of one narrow layer, whose embedding and head have about n parameters.
Config wide_vocabulary(double n) {
    Config c = architecture("llama");
    c.width = 1 << 10, c.layers = 1, c.heads = 1, c.mlp_width = 8, c.positions = 1 << 20;
    c.vocab_size = int(n / c.width / 2);
    complete_config(c);
    return c;
}

std::string error(const Config& c, int B, int T, const ModelOptions& options) {
    return error_of([&] { check_memory(c, B, T, options); });
}

} // namespace

TEST(Device, MemoryThatSuffices) {
    EXPECT_EQ(error(wide_vocabulary(memory / 8), 1, 1, {.purpose = Purpose::score}), "");
}

TEST(Device, EvaluatesInLessPrecisionIfThatFits) {
    const Config c = wide_vocabulary(memory / 3);
    const std::string found = error(c, 1, 1, {.purpose = Purpose::score});
    EXPECT_TRUE(says(found, {"evaluating this model needs", ": try --dtype bf16"}));
    EXPECT_EQ(found.find("--recompute"), std::string::npos) << found;
    EXPECT_EQ(error(c, 1, 1, {.purpose = Purpose::score, .dtype = DType::bf16}), "");
    EXPECT_TRUE(says(error(wide_vocabulary(memory), 1, 1, {.purpose = Purpose::generate}),
                     {"generating text", "even with --dtype bf16", "use a smaller model"}));
}

TEST(Device, TrainsWithSmallerBatchesOrRecomputed) {
    Config c = wide_vocabulary(1e6);
    c.layers = 12, c.mlp_width = 4096;
    const double one = (double(plan_memory(c, 2000, 256, {}).total()) -
                        double(plan_memory(c, 1000, 256, {}).total())) /
                       1000;
    const int B = int(1.1 * memory / one);
    const std::string found = error(c, B, 256, {});
    EXPECT_TRUE(says(found, {"training this model needs", ": try --batch ", ", or --recompute "}));
    const int batch = std::stoi(found.substr(found.find("--batch ") + 8));
    EXPECT_EQ(error(c, batch, 256, {}), "");
    EXPECT_NE(error(c, batch + 1, 256, {}), "");
    EXPECT_EQ(error(c, B, 256, {.recompute = Recompute::layers}), "");
}

TEST(Device, TrainsInTheLeastMemoryOrNotAtAll) {
    // 16 bytes of each parameter in float32; 10 with bf16 weights and moments.
    EXPECT_TRUE(says(error(wide_vocabulary(memory / 13), 8, 256, {}),
                     {": try ", "--dtype bf16 --master-weights no --moments bf16"}));
    EXPECT_TRUE(says(error(wide_vocabulary(memory), 8, 256, {}),
                     {"even with --batch 1 --dtype bf16", "--recompute layers it needs",
                      "use a smaller model"}));
}

TEST(Device, MeasuresWithoutGradientsIfThatFits) {
    const ModelOptions options = {.purpose = Purpose::gradients, .dtype = DType::bf16};
    EXPECT_TRUE(says(error(wide_vocabulary(memory / 4), 1, 1, options),
                     {"measuring this model's layers needs", ": try --probes variance,"}));
}

namespace {

// A folder with a bf16 model of zeros in two shards.
Registry write_zeros(const std::string& dir, int width) {
    Config c = architecture("llama");
    c.vocab_size = 257, c.width = width, c.layers = 5, c.heads = 8, c.mlp_width = 11 * width / 4;
    c.positions = 64;
    complete_config(c);
    const Registry registry = make_registry(c);
    std::string index;
    std::vector<TensorOut> shards[2];
    for (size_t i = 0; i < registry.params.size(); i++) {
        const Param& p = registry.params[i];
        const size_t shard = 2 * i / registry.params.size();
        auto zeros = [n = size_t(p.size())](const TensorSink& sink) {
            const std::vector<uint16_t> all(n);
            sink(all.data(), n * 2);
        };
        shards[shard].push_back({p.name, "BF16", p.file_shape(), zeros});
        index += cat(index.empty() ? "" : ",", "\"", p.name, "\":\"", shard, ".safetensors\"");
    }
    for (int i : {0, 1}) write_safetensors(cat(dir, "/", i, ".safetensors"), shards[i]);
    write_bytes(dir + "/model.safetensors.index.json", "{\"weight_map\":{" + index + "}}");
    write_bytes(dir + "/config.json", config_to_json(c));
    return registry;
}

// The largest memory of evaluating it.
double peak_memory(const std::string& dir) {
    write_shard(dir + "/val.bin", 33);
    const Finished f =
        run("python3 -c 'import resource, subprocess, sys\n"
            "subprocess.run(sys.argv[1:], check=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)' ./train_gpt eval " +
            dir + " --dtype bf16 --threads 1 -b 1 -t 16 -j " + dir + "/val.bin");
    EXPECT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"loss 5.549076"})); // ln 257
    return 1024 * std::stod(f.output.substr(f.output.find("tokens 32") + 9));
}

} // namespace

// A bf16 model in shards evaluates in bf16 within its size, one tensor in float32, and little more
// beside what the program itself takes.
TEST(Device, LoadsWithoutASecondCopy) {
    NEEDS_PROGRAM();
    if (run("python3 -c 0").status != 0) GTEST_SKIP() << "python3 measures the memory";
    TemporaryDirectory dir, small;
    write_zeros(small.path, 32);
    const Registry registry = write_zeros(dir.path, 1024);
    const double weights = 2.0 * double(registry.size), tensor = 4.0 * 1024 * 2816;
    EXPECT_GT(weights, 100e6);
    EXPECT_LT(peak_memory(dir.path) - peak_memory(small.path), weights + tensor + 50e6) << weights;
}
