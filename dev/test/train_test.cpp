// The training program as a whole, run as a user runs it.
#include "dev/test/program_helpers.h"

#include "gpt/run/checkpoint.h"
#include "gpt/run/safetensors.h"

#include <nlohmann/json.hpp>
#include <thread>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

std::vector<json> log_of(const std::string& run) {
    std::istringstream in(read_bytes(run + "/log.jsonl"));
    std::vector<json> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(json::parse(line));
    return lines;
}

// The fields that do not depend on the machine's speed.
std::vector<json> without_times(std::vector<json> lines) {
    for (json& line : lines)
        for (const char* key : {"tokens_per_s", "mfu", "seconds"}) line.erase(key);
    return lines;
}

#define ASSERT_RUNS(arguments)                                                                     \
    {                                                                                              \
        Finished finished = train_gpt(arguments);                                                  \
        ASSERT_EQ(finished.status, 0) << finished.output;                                          \
    }

void expect_same_checkpoint(const std::string& a, const std::string& b) {
    for (const char* name : {"/model.safetensors", "/optimizer.safetensors", "/config.json"})
        EXPECT_TRUE(read_bytes(a + name) == read_bytes(b + name)) << name << " differs";
}

} // namespace

TEST(Train, LearnsLogsAndReports) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    Finished f = train_gpt(small_model + "-n lns -x 20 -l 0.01 -v 10 -s 10 -o " + dir / "run");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(
        f.output, {"machine", "peak", "model.layers.*.mlp.up_proj.weight", "FLOPs", "memory",
                   "data", "step 20/20", "tok/s", "MFU", "validation loss", "perplexity", "sample:",
                   "variance", "run directory: " + dir / "run", "./train_gpt sample", "-y -x 40"}));
    std::vector<json> log = log_of(dir / "run");
    ASSERT_EQ(log.size(), 20u);
    for (size_t i = 0; i < log.size(); i++) {
        EXPECT_EQ(log[i]["step"], i + 1);
        EXPECT_EQ(log[i]["tokens"], (i + 1) * 32);
        EXPECT_EQ(log[i].contains("val_loss"), (i + 1) % 10 == 0);
        for (const char* key : {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "seconds"})
            EXPECT_TRUE(log[i][key].is_number()) << key;
    }
    EXPECT_NEAR(log[0]["loss"], std::log(257.), 0.2);
    EXPECT_LT(log[19]["val_loss"], log[9]["val_loss"]);
    EXPECT_EQ(log[1]["lr"], 0.01);
    EXPECT_NEAR(log[19]["lr"], 0.001, 1e-12);

    // eval gives the loss from training
    f = train_gpt("eval " + dir / "run --threads 1");
    double loss = 0, perplexity = 0;
    long long tokens = 0;
    ASSERT_EQ(std::sscanf(f.output.c_str(), "loss %lf  perplexity %lf  tokens %lld", &loss,
                          &perplexity, &tokens),
              3)
        << f.output;
    EXPECT_NEAR(loss, log[19]["val_loss"], 1e-5);
    EXPECT_NEAR(perplexity, std::exp(loss), 0.01);
    EXPECT_EQ(tokens, 64);

    // sample is reproducible, begins with the prompt, and has the requested length
    const std::string sample = "sample " + dir / "run --prompt 'It was' -g 30 --ignore-eot";
    f = train_gpt(sample);
    EXPECT_EQ(f.status, 0);
    EXPECT_EQ(f.output.rfind("It was", 0), 0u) << f.output;
    EXPECT_EQ(f.output, train_gpt(sample).output);
    EXPECT_NE(f.output, train_gpt(sample + " --seed 2").output);
    EXPECT_LE(f.output.size(), 6 + 30 + 1u);
    EXPECT_GT(f.output.size(), 6 + 20u);
}

TEST(Train, AResumedRunHasTheSameBits) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    write_shard(dir / "t_train_000000.bin", 900); // 56 sequences: 30 steps of 4 see them twice
    write_shard(dir / "t_val_000000.bin", 100);
    for (const std::string numbers :
         {"", "--dtype bf16 --recompute layers ",
          "--dtype bf16 --master-weights no --moments bf16 --rounding stochastic ",
          "--lisa 1 --lisa-interval 2 ",
          "--optimizer muon --normuon --cautious-decay --lisa 1 --lisa-interval 2 "
          "--dtype bf16 --master-weights no --moments bf16 --rounding stochastic ",
          "--optimizer muon --muon-lr 0.02 --muon-scale jordan --momentum 0.9 "
          "--orthogonalize polar-express --dtype bf16 "}) {
        for (const char* run : {"straight", "resumed"}) fs::remove_all(dir / run);
        ASSERT_RUNS(small_model + numbers + "-d 64 -x 30 -v 7 --save-every 13 --keep 0 -i '" +
                    dir / "t_train_*'" + " -o " + dir / "straight");
        fs::create_directory(dir / "resumed");
        fs::copy(dir / "straight/step-000013", dir / "resumed/step-000013");
        fs::copy(dir / "straight/log.jsonl", dir / "resumed/log.jsonl");
        std::ofstream(dir / "resumed/log.jsonl", std::ios::app) << "{\"step\":31,\"lo"; // cut short
        Finished f = train_gpt("-y -o " + dir / "resumed");
        ASSERT_EQ(f.status, 0) << f.output;
        EXPECT_TRUE(says(f.output, {"continuing from", "step 13"}));
        expect_same_checkpoint(dir / "straight/step-000030", dir / "resumed/step-000030");
        EXPECT_EQ(without_times(log_of(dir / "straight")), without_times(log_of(dir / "resumed")));
    }

    Finished f = train_gpt("-y -o " + dir / "resumed");
    EXPECT_EQ(f.status, 0);
    EXPECT_TRUE(says(f.output, {"all 30 steps are done"}));
    f = train_gpt("-y -x 32 -o " + dir / "resumed");
    EXPECT_TRUE(says(f.output, {"--steps was 30 until now and is 32", "step 32/32"}));
    EXPECT_EQ(log_of(dir / "resumed").size(), 32u);
}

TEST(Train, ResumeKeepsAVocabularyLargerThanTheData) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    ASSERT_RUNS(small_model + "--vocab 300 -x 0 -o " + dir / "first");
    ASSERT_RUNS("-m " + dir / "first/step-000000" +
                " --threads 1 -b 2 -t 16 --val-tokens 64 -g 0 -x 1 -o " + dir / "run");
    ASSERT_RUNS("-y -x 2 -o " + dir / "run");
    EXPECT_EQ(checkpoint_config(dir / "run").vocab_size, 300);
}

TEST(Train, ResumeOfNothingStartsARun) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    Finished f = train_gpt(small_model + "-x 2 -y -o " + dir / "run");
    EXPECT_EQ(f.status, 0);
    EXPECT_TRUE(says(f.output, {"no checkpoint", "from the beginning", "step 2/2"}));
}

TEST(Train, ARunKilledBeforeItsFirstCheckpointStartsOver) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string out = dir / "run";
    run("./train_gpt " + small_model + "-n post -x 10000000 --save-every 0 -o " + out +
        " >/dev/null & pid=$!\nuntil [ -s " + out + "/log.jsonl ]; do sleep 0.05; done\n" +
        "kill -KILL $pid; wait $pid");
    Finished f = train_gpt("-y -x 2 -o " + out);
    EXPECT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"2 layers, width 16", "post", "no checkpoint", "step 2/2"}));
    EXPECT_EQ(log_of(out).size(), 2u);

    // The remains of a broken checkpoint are no reason to start over.
    fs::remove(out + "/step-000002/config.json");
    EXPECT_TRUE(fails_with("-y -o " + out, {"step-000002", "config.json"}));
    EXPECT_EQ(log_of(out).size(), 2u);
}

TEST(Train, TheSameCommandGivesTheSameBits) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string arguments = small_model + "-n mix+gpas --arch gpt2 --threads 2 -x 5 -o ";
    ASSERT_RUNS(arguments + dir / "a");
    ASSERT_RUNS(arguments + dir / "b");
    expect_same_checkpoint(dir / "a/step-000005", dir / "b/step-000005");
    EXPECT_EQ(without_times(log_of(dir / "a")), without_times(log_of(dir / "b")));
    ASSERT_RUNS(arguments + dir / "c --seed 2");
    EXPECT_NE(log_of(dir / "a")[0]["loss"], log_of(dir / "c")[0]["loss"]);
}

TEST(Train, InitialWeightsDoNotDependOnTheThreads) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    ASSERT_RUNS(small_model + "-x 0 --threads 1 -o " + dir / "a");
    ASSERT_RUNS(small_model + "-x 0 --threads 2 -o " + dir / "b");
    expect_same_checkpoint(dir / "a/step-000000", dir / "b/step-000000");
}

TEST(Train, TheBitsDoNotDependOnTheThreads) {
    NEEDS_PROGRAM();
    for (const std::string dtype : {"float32", "bf16"}) {
        TemporaryDirectory dir;
        ASSERT_RUNS(small_model + "-x 5 --threads 1 --dtype " + dtype + " -o " + dir / "a");
        ASSERT_RUNS(small_model + "-x 5 --threads 2 --dtype " + dtype + " -o " + dir / "b");
        expect_same_checkpoint(dir / "a/step-000005", dir / "b/step-000005");
    }
}

// bf16 with master weights tracks float32; without them, small updates are lost.
TEST(Train, LearnsInBf16LikeInFloat32) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    auto loss = [&](const std::string& name, const std::string& numbers) {
        Finished f =
            train_gpt(small_model + "-x 60 -l 0.01 --profile " + numbers + " -o " + dir / name);
        EXPECT_EQ(f.status, 0) << f.output;
        EXPECT_TRUE(
            says(f.output, {"weight gradient", "AdamW", "everything else", "of bandwidth"}));
        return double(log_of(dir / name).back()["val_loss"]);
    };
    const double exact = loss("float", "--dtype float32"), rounded = loss("bf16", "--dtype bf16");
    EXPECT_NEAR(rounded, exact, 0.05);
    EXPECT_LT(rounded, 5.0);
    loss("pure", "--dtype bf16 --master-weights no --moments bf16");
    Finished f = train_gpt("eval " + dir / "bf16");
    EXPECT_EQ(f.status, 0) << f.output;
}

TEST(Train, WithLisaOnlyDrawnLayersChange) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string flags = small_model + "--layers 4 -d 64 -x 8 ";
    Finished f =
        train_gpt(flags + "--lisa 2 --lisa-interval 3 --save-every 1 --keep 0 -o " + dir / "lisa");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"LISA       2 of 4 layers at a time, drawn anew every 3 steps"}));
    const std::vector<json> log = log_of(dir / "lisa");
    for (int64_t step = 1; step <= 8; step++) {
        const json& line = log[size_t(step - 1)];
        const std::vector<int> drawn = line["lisa"];
        EXPECT_EQ(drawn.size(), 2u);
        EXPECT_EQ(line["lisa"], log[size_t((step - 1) / 3 * 3)]["lisa"]) << step;
        if (step == 1) continue;
        const Safetensors before(dir / cat("lisa/step-00000", step - 1, "/model.safetensors")),
            after(dir / cat("lisa/step-00000", step, "/model.safetensors"));
        auto bytes = [](const TensorView& view) {
            return std::string_view(static_cast<const char*>(view.data), view.bytes);
        };
        for (const TensorView& view : after.tensors()) {
            const std::string& name = view.name;
            const size_t at = name.find("layers.");
            const bool rests =
                at != std::string::npos &&
                !std::count(drawn.begin(), drawn.end(), 1 + std::stoi(name.substr(at + 7)));
            EXPECT_EQ(bytes(before.at(name)) == bytes(view), rests) << name << " in step " << step;
        }
    }

    // With all layers it is a run without; diagnostics, which need all gradients, change nothing.
    ASSERT_RUNS(flags + "--lisa 4 -o " + dir / "all");
    ASSERT_RUNS(flags + "-o " + dir / "without");
    expect_same_checkpoint(dir / "all/step-000008", dir / "without/step-000008");
    ASSERT_RUNS(flags + "--lisa 2 --lisa-interval 3 --probe-every 1 --probe-tokens 32 -o " +
                dir / "probed");
    expect_same_checkpoint(dir / "lisa/step-000008", dir / "probed/step-000008");
    const auto diagnosed = log_of(dir / "probed");
    for (double norm : diagnosed[4]["probe"]["gradient_norm"]["mlp"])
        EXPECT_GT(norm, 0) << "a layer that rests was not diagnosed";

    EXPECT_TRUE(fails_with(flags + "--lisa 5 -o " + dir / "no", {"--lisa 5", "4 layers"}));
    EXPECT_TRUE(fails_with(flags + "--lisa-interval 2 -o " + dir / "no",
                           {"--lisa-interval 2", "add --lisa"}));
    EXPECT_TRUE(fails_with("-y --lisa 3 -o " + dir / "lisa", {"--lisa was 2"}));
}

TEST(Train, MuonsFlagsBelongToIt) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    for (const std::string flag : {"--muon-lr 0.02", "--muon-scale jordan", "--momentum 0.9",
                                   "--orthogonalize polar-express", "--normuon"})
        EXPECT_TRUE(fails_with(small_model + flag + " --dry-run",
                               {flag.substr(0, flag.find(' ')), "AdamW", "--optimizer muon"}));
    EXPECT_TRUE(fails_with(small_model + "--cautious-decay --weight-decay 0 --dry-run",
                           {"--cautious-decay", "--weight-decay 0"}));
    Finished f = train_gpt(small_model + "-d 64 -x 2 -o " + dir / "muon" +
                           " --optimizer muon --muon-lr 0.02 --muon-scale jordan --cautious-decay");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"Muon", "jordan", "0.02", "AdamW for the rest", "cautious decay"}));
    EXPECT_TRUE(fails_with("-y --optimizer muon --normuon -o " + dir / "muon",
                           {"--optimizer was muon", "normuon"}));
    f = train_gpt("-y -x 3 --muon-lr 0.01 -o " + dir / "muon");
    EXPECT_TRUE(says(f.output, {"--muon-lr was 0.02 until now and is 0.01"}));

    // Muon of a state: a number for each row, of layers' matrices only.
    ASSERT_RUNS(small_model + "-d 64 -x 1 --optimizer muon --normuon -o " + dir / "normuon");
    const Safetensors states(dir / "normuon/step-000001/optimizer.safetensors");
    for (const TensorView& view : states.tensors()) {
        const bool of_layers = view.name.find("proj.weight") != std::string::npos;
        EXPECT_EQ(view.name.rfind("v_rows.", 0) == 0, view.shape.size() == 1 && of_layers)
            << view.name;
        EXPECT_FALSE(view.name.rfind("v.", 0) == 0 && of_layers) << view.name;
    }
}

TEST(Train, MicroBatchesAddUp) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    ASSERT_RUNS(small_model + "--dtype float32 -b 4 -d 64 -x 5 -o " + dir / "a");
    ASSERT_RUNS(small_model + "--dtype float32 -b 1 -d 64 -x 5 -o " + dir / "b");
    std::vector<json> a = log_of(dir / "a"), b = log_of(dir / "b");
    for (size_t i = 0; i < 5; i++) {
        EXPECT_NEAR(a[i]["loss"], b[i]["loss"], 1e-4) << i;
        EXPECT_NEAR(a[i]["grad_norm"], b[i]["grad_norm"], 1e-3) << i;
    }
}

TEST(Train, RanksAddUp) {
    NEEDS_PROGRAM();
    if (run("command -v mpirun").status != 0) GTEST_SKIP() << "there is no mpirun";
    if (train_gpt("--version").output.find("MPI: no") != std::string::npos)
        GTEST_SKIP() << "this build has no MPI";
    TemporaryDirectory dir;
    const std::string root = geteuid() == 0 ? "--allow-run-as-root " : "";
    const std::string mpirun = "mpirun " + root + "--oversubscribe -np 2 ./train_gpt ";
    Finished f;
    for (const std::string way : {"", "--lisa 1 ", "--optimizer muon --normuon "}) {
        for (const char* name : {"one", "two"}) fs::remove_all(dir / name);
        const std::string flags = small_model + way + "-x 6 -v 3 --val-tokens 100 ";
        ASSERT_RUNS(flags + "-b 4 -o " + dir / "one");
        f = run(mpirun + flags + "-b 2 -o " + dir / "two");
        ASSERT_EQ(f.status, 0) << f.output;
        EXPECT_EQ(f.output.find("machine"), f.output.rfind("machine"))
            << "said twice: " << f.output;
        std::vector<json> one = log_of(dir / "one"), two = log_of(dir / "two");
        ASSERT_EQ(two.size(), 6u);
        for (size_t i = 0; i < 6; i++) {
            for (const char* key : {"loss", "grad_norm"})
                EXPECT_NEAR(one[i][key], two[i][key], 1e-4 * double(one[i][key])) << i << key;
            for (const char* key : {"tokens", "lisa"})
                EXPECT_EQ(one[i].value(key, json()), two[i].value(key, json())) << key;
            if (i % 3 == 2) {
                EXPECT_NEAR(one[i]["val_loss"], two[i]["val_loss"], 1e-4);
            }
        }
    }
    // An error is reported once, and ends both.
    f = run(mpirun + "-n pree");
    EXPECT_EQ(f.status, 1);
    EXPECT_EQ(f.output.find("'pree'"), f.output.rfind("'pree'")) << f.output;
    const std::string out = dir / "stopped";
    f = run(mpirun + small_model + "-x 10000000 -o " + out + " & pid=$!\n" + "until [ -s " + out +
            "/log.jsonl ]; do sleep 0.05; done; kill -INT $pid; wait $pid");
    EXPECT_TRUE(says(f.output, {"stopped by a signal", "mpirun -np 2 ./train_gpt", "-y"}));
}

TEST(Train, ASignalSavesAndSaysHowToGoOn) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    for (const char* signal : {"INT", "TERM"}) {
        const std::string out = dir / signal;
        Finished f = run("./train_gpt " + small_model + "-x 10000000 -o " + out + " & pid=$!\n" +
                         "until [ -s " + out + "/log.jsonl ]; do sleep 0.05; done\n" + "kill -" +
                         signal + " $pid; wait $pid");
        EXPECT_EQ(f.status, 130) << f.output;
        EXPECT_TRUE(says(f.output, {"stopped by a signal after step", "saved as " + out,
                                    "./train_gpt -o " + out + " -y"}));
        std::string checkpoint = newest_checkpoint(out);
        ASSERT_NE(checkpoint, "");
        EXPECT_EQ(read_trainer_state(checkpoint).step, int64_t(log_of(out).size()));
    }
}

TEST(Train, AFullDiskWhileTrainingLosesNothing) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    // A file size limit stands in for a full disk: a checkpoint's files exceed it.
    auto limited = [&](const std::string& arguments) {
        return run("ulimit -f 32; ./train_gpt " + arguments + " -o " + dir / "run");
    };
    ASSERT_RUNS(small_model + "-x 4 -o " + dir / "run");
    const std::string before = read_bytes(dir / "run/step-000004/model.safetensors");
    Finished f = limited("-y -x 8 --save-every 2 --keep 1");
    EXPECT_EQ(f.status, 1) << f.output; // the final checkpoint must be saved
    EXPECT_TRUE(says(f.output, {"WARNING: no checkpoint at step 6", "training goes on",
                                "saved is " + dir / "run/step-000004", "train_gpt: cannot write"}));
    EXPECT_EQ(read_bytes(dir / "run/step-000004/model.safetensors"), before);
    EXPECT_EQ(newest_checkpoint(dir / "run"), dir / "run/step-000004");
    ASSERT_RUNS("-y -x 8 -o " + dir / "run");
    EXPECT_EQ(newest_checkpoint(dir / "run"), dir / "run/step-000008");
}

TEST(Train, KeepsTheNewestCheckpoints) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    ASSERT_RUNS(small_model + "-x 9 --save-every 2 --keep 2 -o " + dir / "run");
    EXPECT_FALSE(fs::exists(dir / "run/step-000006"));
    EXPECT_TRUE(fs::exists(dir / "run/step-000008"));
    EXPECT_TRUE(fs::exists(dir / "run/step-000009"));
}

TEST(Train, NonFiniteValuesStopTheRun) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    // Every weight moves by 1e30 in the fourth step; there is a checkpoint of the second.
    ASSERT_RUNS(small_model + "-n pre -x 3 --save-every 2 -o " + dir / "run");
    Finished f =
        train_gpt("-y -x 9 --save-every 1 --lr-schedule constant -u 0 -l 1e30 -o " + dir / "run");
    EXPECT_EQ(f.status, 1) << f.output;
    EXPECT_TRUE(says(f.output, {"train_gpt: step ", "is not finite", "first tensor", "--lr",
                                "last good checkpoint is " + dir / "run/step-"}))
        << f.output;
    Safetensors file(newest_checkpoint(dir / "run") + "/model.safetensors");
    for (const TensorView& view : file.tensors()) {
        std::vector<float> values(view.bytes / sizeof(float));
        file.read_f32(view, values.data());
        for (float x : values) ASSERT_TRUE(std::isfinite(x)) << view.name;
    }
}

TEST(Train, OverfitsOneBatch) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    ASSERT_RUNS(small_model + "--overfit-batch -x 60 -l 0.02 -o " + dir / "run");
    EXPECT_LT(log_of(dir / "run").back()["loss"], 1.0);
}

TEST(Train, DryRunWritesNothing) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    Finished f = train_gpt("--dry-run -m llama-7b -o " + dir / "run");
    EXPECT_EQ(f.status, 0);
    EXPECT_TRUE(says(f.output, {"6.74B", "memory", "FLOPs a token", "FLOPs a step", "in all"}));
    EXPECT_FALSE(fs::exists(dir / "run"));
    f = train_gpt("--dry-run --recipe paper -m llama-130m");
    EXPECT_TRUE(says(f.output,
                     {"20000 steps of 131072 tokens", "32 micro-batches", "bf16", "no clipping"}));
}

TEST(Train, DumpStateWritesAPass) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string file = dir / "state.safetensors";
    ASSERT_RUNS(small_model + "--arch gpt2 -n lns --dump-state " + file);
    Safetensors state(file);
    const Config config = config_from_json(state.metadata().at("config"), file);
    EXPECT_EQ(config.scheme.name(), "lns");
    EXPECT_EQ(state.at("inputs").shape, (std::vector<int64_t>{2, 16}));
    EXPECT_EQ(state.at("inputs").dtype, "I32");
    EXPECT_EQ(state.at("targets").shape, (std::vector<int64_t>{2, 16}));
    const TensorView& logits = state.at("logits");
    ASSERT_EQ(logits.shape, (std::vector<int64_t>{2, 16, 257}));
    std::vector<float> values(2 * 16 * 257);
    state.read_f32(logits, values.data());

    // the loss is the mean over the targets, computed from the logits
    const int* targets = static_cast<const int*>(state.at("targets").data);
    double sum = 0;
    for (int i = 0; i < 32; i++) {
        double z = 0;
        for (int v = 0; v < 257; v++) z += std::exp(double(values[i * 257 + v]));
        sum += std::log(z) - values[i * 257 + targets[i]];
    }
    float loss;
    state.read_f32(state.at("loss"), &loss);
    EXPECT_NEAR(loss, sum / 32, 1e-5);

    const Registry registry = make_registry(config);
    EXPECT_EQ(state.tensors().size(), 4 + 2 * registry.params.size());
    for (const Param& p : registry.params) {
        EXPECT_EQ(state.at(p.name).shape, p.file_shape());
        EXPECT_EQ(state.at("grad." + p.name).shape, p.file_shape());
    }

    // a run's first step has the same loss
    ASSERT_RUNS(small_model + "--arch gpt2 -n lns -x 1 -o " + dir / "first");
    double squares = 0;
    for (const Param& p : registry.params) {
        std::vector<float> grad(p.size());
        state.read_f32(state.at("grad." + p.name), grad.data());
        for (float g : grad) squares += double(g) * g;
    }
    EXPECT_NEAR(log_of(dir / "first")[0]["loss"], loss, 1e-5);
    EXPECT_NEAR(log_of(dir / "first")[0]["grad_norm"], std::sqrt(squares), 1e-5);

    // and a run starts from it
    ASSERT_RUNS("--threads 1 -b 2 -t 16 -v 0 -s 0 -g 0 -x 0 --val-tokens 64 --init-from " + file +
                " -o " + dir / "run");
    Safetensors weights(dir / "run/step-000000/model.safetensors");
    for (const Param& p : registry.params)
        EXPECT_EQ(std::string((const char*)weights.at(p.name).data, size_t(p.size()) * 4),
                  std::string((const char*)state.at(p.name).data, size_t(p.size()) * 4));
}

TEST(Train, PaddingIsNotLearned) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    // The same documents, padded with end-of-text and with other tokens.
    for (int k = 0; k < 2; k++) {
        std::vector<int> tokens;
        for (int w = 0; w < 40; w++) {
            const int length = 3 + w % 12;
            for (int t = 0; t < 16; t++)
                tokens.push_back(t < length ? 'a' + (w + t) % 20 : t == length ? 256 : k ? 7 : 256);
        }
        for (const char* part : {"train", "val"}) {
            ShardWriter writer(dir / cat("t", k, "_", part, "_000000.bin"),
                               load_tokenizer("bytes")->id(), 16);
            writer.write(tokens.data(), tokens.size());
            writer.close();
        }
    }
    std::vector<json> logs[2];
    for (int k = 0; k < 2; k++) {
        Finished f = train_gpt(small_model + "-t 16 -x 5 -v 5 --val-tokens 640 --threads 1 -i '" +
                               dir / cat("t", k, "_train_*.bin") + "' -o " + dir / cat("run", k));
        ASSERT_EQ(f.status, 0) << f.output;
        logs[k] = without_times(log_of(dir / cat("run", k)));
        for (json& line : logs[k]) line.erase("residual_variance"); // includes padded positions
    }
    EXPECT_EQ(logs[0], logs[1]);

    // 40 windows, 3 … 14 targets each, a document's end among them
    long long targets = 0, told = 0;
    for (int w = 0; w < 40; w++) targets += 3 + w % 12;
    double loss, perplexity;
    Finished f = train_gpt("eval " + dir / "run0 --threads 1");
    ASSERT_EQ(std::sscanf(f.output.c_str(), "loss %lf  perplexity %lf  tokens %lld", &loss,
                          &perplexity, &told),
              3)
        << f.output;
    EXPECT_EQ(told, targets);

    f = train_gpt(small_model + "-t 8 -x 5 -i '" + dir / "t0_train_*.bin" + "' -o " +
                  dir / "other");
    EXPECT_EQ(f.status, 1);
    EXPECT_TRUE(says(f.output, {"documents padded to 16", "--seq-len 16"}));
}
