// Bad input gives a message and status 1, and loses nothing.
#include "dev/test/program_helpers.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/model/config.h"
#include "gpt/run/schemes.h"

#include <nlohmann/json.hpp>
#include <sys/mount.h>
#include <sys/stat.h>
#include <tuple>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

// A directory with training shards.
struct Shards : TemporaryDirectory {
    std::string train = path + "/text_train_000000.bin", val = path + "/text_val_000000.bin";
    Shards() {
        write_shard(train, 1000);
        write_shard(val, 200);
    }
    // Expects the arguments to fail with such a message and to leave no run directory.
    testing::AssertionResult fails(const std::string& arguments,
                                   const std::vector<std::string>& parts) const {
        auto result = fails_with(
            small_model + "-x 3 -o " + path + "/run -i " + train + " " + arguments, parts);
        if (result && fs::exists(path + "/run/log.jsonl"))
            return testing::AssertionFailure() << "a run was begun";
        return result;
    }
};

} // namespace

TEST(Program, HelpAndVersion) {
    NEEDS_PROGRAM();
    for (const char* arguments : {"--help", "-h", "sample --help", "eval -h"}) {
        Finished f = train_gpt(arguments);
        EXPECT_EQ(f.status, 0) << arguments;
        EXPECT_TRUE(says(f.output, {"--threads", "--help"}));
    }
    std::string help = train_gpt("--help").output;
    EXPECT_TRUE(says(help, {"-i, --train",
                            "-j, --val",
                            "-o, --out",
                            "-b, --batch",
                            "-t, --seq-len",
                            "-d, --total-batch",
                            "-x, --steps",
                            "-l, --lr",
                            "-u, --warmup",
                            "-q, --final-lr-frac",
                            "-c, --weight-decay",
                            "-v, --val-every",
                            "-s, --sample-every",
                            "-g, --sample-tokens",
                            "-y, --resume",
                            "-n, --norm",
                            "-m, --model",
                            "--lr-schedule",
                            "--grad-clip",
                            "--beta1",
                            "--beta2",
                            "--eps",
                            "--val-tokens",
                            "--save-every",
                            "--keep",
                            "--seed",
                            "--init-std",
                            "--embed-std",
                            "--dtype",
                            "--master-weights",
                            "--moments",
                            "--rounding",
                            "--recompute",
                            "--profile",
                            "--device",
                            "--prompt",
                            "--temperature",
                            "--top-k",
                            "--top-p",
                            "--init-from",
                            "--dump-state",
                            "--overfit-batch",
                            "--dry-run",
                            "--recipe",
                            "--lisa",
                            "--lisa-interval",
                            "--config"}));
    for (size_t begin = 0, end; (end = help.find('\n', begin)) != std::string::npos;
         begin = end + 1)
        EXPECT_LE(end - begin, 102u) << help.substr(begin, end - begin); // bytes, for 100 columns
    EXPECT_TRUE(says(train_gpt("--version").output, {"train_gpt ", "OpenMP"}));
}

TEST(Readme, HasTheProgramsTableOfSchemes) {
    const std::string table = describe_schemes("markdown", 12);
    EXPECT_NE(read_file("README.md").find(table), std::string::npos)
        << "put what `./train_gpt schemes --format markdown` prints into README.md:\n"
        << table;
}

TEST(BadInput, Flags) {
    NEEDS_PROGRAM();
    EXPECT_TRUE(fails_with("--layrs 3", {"--layrs", "'--layers'"}));
    EXPECT_TRUE(fails_with("-b x", {"--batch", "'x'"}));
    EXPECT_TRUE(fails_with("-n pree", {"'pree'", "'pre'"}));
    EXPECT_TRUE(fails_with("-n lsn", {"'lsn'", "Did you mean 'lns'"}));
    EXPECT_TRUE(fails_with("-n pre --lns-power 1", {"--lns-power", "'pre'"}));
    EXPECT_TRUE(fails_with("-i ''", {"--train", "no value"}));
    EXPECT_TRUE(fails_with("--config /none", {"--config", "/none"}));
    EXPECT_TRUE(fails_with("--prompt \"$(printf '\\377')\"", {"--prompt", "UTF-8"}));
    EXPECT_TRUE(fails_with("--prompt x sample /none", {"--prompt", "before `sample`"}));
    EXPECT_TRUE(fails_with("sample /none eval /none", {"`eval`"}));
    EXPECT_TRUE(fails_with("--width 1000000 --layers 100000", {"exceeds any machine"}));
    EXPECT_TRUE(fails_with("-b 1000000 -t 1000 --layers 100", {"memory", "--batch"}));
    EXPECT_TRUE(fails_with(small_model + "--dump-state /tmp", {"/tmp", "directory"}));
    EXPECT_TRUE(fails_with("-m tinny", {"'tinny'", "'tiny'"}));
    EXPECT_TRUE(fails_with("--dtype float32 --master-weights no", {"--master-weights", "bf16"}));
    EXPECT_TRUE(fails_with("--dtype bf16 --rounding stochastic", {"--rounding", "--moments"}));
    EXPECT_TRUE(fails_with("--dtype fp16", {"'fp16'", "bf16"}));
    EXPECT_TRUE(fails_with("--device gpu", {"--device", "cuda"}));
    EXPECT_TRUE(fails_with("--device cpu --dtype bf16 --gradients bf16", {"--gradients", "CPU"}));
    EXPECT_TRUE(fails_with("--width 10 --heads 3", {"10", "3 heads"}));
    EXPECT_TRUE(fails_with("--heads 4 --kv-heads 3", {"4 heads", "3 kv heads"}));
    EXPECT_TRUE(fails_with("-t 1025", {"1025", "1024 positions"}));
    EXPECT_TRUE(fails_with("-d 100 -b 2 -t 16", {"100", "32", "96 or 128"}));
    EXPECT_TRUE(fails_with("-d 16 -b 2 -t 16", {"16", "32", "--batch"}));
    EXPECT_TRUE(fails_with("-j x.bin", {"-j", "-i"}));
}

TEST(BadInput, MessagesShowControlCharacters) {
    NEEDS_PROGRAM();
    const std::string odd = "\"$(printf 'a\\033[31m\\nb\\tc')\"", shown = "a^[[31m^Jb^Ic";
    for (const char* flags : {"-i ", "-n ", "sample ", "eval x ", "--config ", "--tokenizer "})
        EXPECT_TRUE(fails_with(flags + odd, {shown})) << flags;
    for (const char* tool : {"data/tokenize -o /none/x ", "data/vocabulary -o x.model "}) {
        const Finished f = run(tool + odd);
        EXPECT_EQ(f.status, 1);
        EXPECT_TRUE(says(f.output, {shown}));
        EXPECT_EQ(std::count(f.output.begin(), f.output.end(), '\n'), 1) << f.output;
    }
}

TEST(Program, ARunFindsItsDataFromOtherFolders) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    fs::create_directories(dir / "w[1]/d{2}");
    fs::create_directory(dir / "other");
    write_shard(dir / "w[1]/d{2}/x[3]_train_000000.bin", 1000);
    write_shard(dir / "w[1]/d{2}/x[3]_val_000000.bin", 200);
    write_shard(dir / "x_val_000000.bin",
                400); // the folders' names as patterns would match this too
    const std::string program = fs::absolute("train_gpt").string();
    auto in = [&](const std::string& folder, const std::string& arguments) {
        return run("cd '" + dir / folder + "' && " + program + " " + arguments + " --threads 1");
    };
    Finished f = in("w[1]", small_model + "-x 2 -g 0 -i 'd{2}/x[3]_train_*.bin' -o ../run");
    ASSERT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {"d{2}/x"}));
    const std::string here = in("w[1]", "eval ../run").output;
    EXPECT_TRUE(says(here, {"loss"}));
    EXPECT_EQ(in("other", "eval ../run").output, here);
    EXPECT_EQ(in("other", "eval ../run/step-000002/").output, here);
    f = in("other", "-o ../run -y -x 4");
    EXPECT_EQ(f.status, 0) << f.output;
    EXPECT_TRUE(says(f.output, {dir / "w[1]/d{2}", "(step 2)"}));
    EXPECT_EQ(in("w[1]", "-o ../run -y -x 5").status, 0);
    EXPECT_EQ(in("other", "-o ../run -y -x 6").status, 0);

    fs::rename(dir / "w[1]/d{2}", dir / "gone");
    for (const char* arguments : {"eval ../run", "-o ../run -y -x 8"}) {
        f = in("other", arguments);
        EXPECT_EQ(f.status, 1);
        EXPECT_TRUE(says(f.output, {"no file matches 'd{2}/x[3]_train_*.bin'", dir / "w[1]"}));
    }
}

TEST(BadInput, Shards) {
    NEEDS_PROGRAM();
    Shards s;
    std::string whole = read_bytes(s.train);
    EXPECT_TRUE(s.fails("-i " + s / "none.bin", {"none.bin"}));
    EXPECT_TRUE(s.fails("-i " + s.path, {s.path, "directory"}));
    write_bytes(s / "text.txt", "Once upon a time\n");
    EXPECT_TRUE(s.fails("-i " + s / "text.txt", {"text.txt", "data/tokenize"}));
    ASSERT_EQ(mkfifo((s / "pipe").c_str(), 0600), 0);
    EXPECT_TRUE(s.fails("-i " + s / "pipe", {"pipe", "not a regular file"}));
    write_bytes(s.train, "");
    EXPECT_TRUE(s.fails("", {s.train, "empty"}));
    write_bytes(s.train, whole.substr(0, whole.size() - 100));
    EXPECT_TRUE(s.fails("", {s.train, "1000"}));
    write_bytes(s.train, "GIF89a" + whole.substr(6));
    EXPECT_TRUE(s.fails("", {s.train, "not a shard"}));
    write_bytes(s.train, whole);
    EXPECT_TRUE(s.fails("--vocab 100", {"257", "100", "--vocab"}));
    write_shard(s.train, 1000, {});
    write_shard(s.val, 200, {});
    EXPECT_TRUE(s.fails("--vocab 100", {s.train, "100"})); // it has larger tokens
    write_shard(s.val, 16, {});
    EXPECT_TRUE(s.fails("", {"text_val_", "17"}));
    fs::remove(s.val);
    EXPECT_TRUE(s.fails("", {"-j", "_val_"}));
    write_bytes(s.train, whole);
    write_shard(s.val, 200, {"gpt2", 50257, 50256, 1});
    EXPECT_TRUE(s.fails("", {"another tokenizer", "bytes", "gpt2"}));
    EXPECT_TRUE(s.fails("-j " + s.train + " --tokenizer gpt2:" + s / "none", {"none"}));
}

TEST(BadInput, ConfigJson) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    auto config = nlohmann::json::parse(config_to_json(preset_config("llama-9m")));
    config.erase("num_hidden_layers");
    write_bytes(dir / "config.json", config.dump());
    EXPECT_TRUE(fails_with("-m " + dir.path, {dir / "config.json", "num_hidden_layers"}));
    config = nlohmann::json::parse(config_to_json(preset_config("llama-9m")));
    for (const auto& [key, value, told] :
         std::vector<std::tuple<std::string, nlohmann::json, std::string>>{
             {"rope_parameters", "x", "an object"},
             {"initializer_range", "x", "a number"},
             {"hidden_size", 1000000000, "1e8"},
             {"lns_cpp", 3, "not an object"},
             {"lns_cpp", {{"scheme", "lsn"}}, "'lns'"},
             {"lns_cpp", {{"later", 1}}, "later"}}) {
        auto other = config;
        other[key] = value;
        write_bytes(dir / "config.json", other.dump());
        EXPECT_TRUE(fails_with("-m " + dir.path, {dir / "config.json", key, told}));
    }
    config.erase("lns_cpp");
    config["initializer_range"] = 0.5;
    EXPECT_EQ(config_from_json(config.dump(), "x").init_std, 0.5);
    write_bytes(dir / "config.json", "{");
    EXPECT_TRUE(fails_with("-m " + dir.path, {dir / "config.json", "JSON"}));
    EXPECT_TRUE(fails_with("-m " + dir / "none", {"none"}));
}

TEST(BadInput, Checkpoints) {
    NEEDS_PROGRAM();
    Shards s;
    Finished f = train_gpt(small_model + "-n lns -x 2 -o " + s / "lns -i " + s.train);
    ASSERT_EQ(f.status, 0) << f.output;
    const std::string c = s / "lns/step-000002", from = "--init-from " + c;
    EXPECT_TRUE(s.fails(from + " -n pre", {"norm scheme", "lns", "pre"}));
    EXPECT_TRUE(s.fails(from + " --arch gpt2", {"architecture", "llama", "gpt2"}));
    EXPECT_TRUE(s.fails(from + " --layers 3", {"layers", "2", "3"}));
    EXPECT_TRUE(s.fails("--init-from " + s / "none", {"none"}));
    EXPECT_TRUE(fails_with("-y -n pre -o " + s / "lns", {"--norm was lns", "pre"}));
    EXPECT_TRUE(fails_with("-y -o " + c, {c, "is a checkpoint"}));
    EXPECT_TRUE(fails_with("-o " + s / "lns -x 1 " + small_model, {"already holds a run", "-y"}));
    write_shard(s.train, 900);
    EXPECT_TRUE(fails_with("-y -x 3 -o " + s / "lns", {"training data", "--init-from"}));

    const std::string weights = c + "/model.safetensors";
    fs::resize_file(weights, fs::file_size(weights) - 10);
    EXPECT_TRUE(s.fails(from, {weights}));
    write_shard(s.train, 1000);
    EXPECT_TRUE(fails_with("-y -x 3 -o " + s / "lns", {weights}));
    EXPECT_TRUE(fails_with("sample " + s / "lns", {weights}));
    EXPECT_TRUE(fails_with("eval " + s / "lns", {weights}));
    EXPECT_TRUE(fails_with("eval " + s / "none", {"none"}));
}

TEST(BadInput, TokenizersThatAreNotTheModels) {
    NEEDS_PROGRAM();
    Shards s, other; // the same vocabulary size with other tokens
    const TokenizerId made = {"gpt2", 257, 256, 1};
    write_shard(other.train, 1000, made);
    write_shard(other.val, 200, made);
    const std::string run = s / "mine", checkpoint = run + "/step-000002", hf = s / "hf";
    Finished f = train_gpt(small_model + "-n pre -x 2 -o " + run + " -i " + s.train);
    ASSERT_EQ(f.status, 0) << f.output;
    f = train_gpt("export " + run + " " + hf);
    ASSERT_EQ(f.status, 0) << f.output;
    const std::vector<std::string> told = {"another tokenizer (bytes of 257)", "gpt2 of 257"};
    for (const std::string& weights : {run, hf}) {
        EXPECT_TRUE(s.fails("--init-from " + weights + " -i " + other.train, told));
        EXPECT_TRUE(fails_with("eval " + weights + " --threads 1 -j " + other.val, told));
        EXPECT_TRUE(fails_with(
            "probe " + weights + " --threads 1 -o " + s / "probe.json" + " -j " + other.val, told));
        f = train_gpt("eval " + weights + " --threads 1 -t 16 -j " + s.val);
        EXPECT_EQ(f.status, 0) << f.output;
        f = train_gpt(small_model + "-x 1 --dry-run --init-from " + weights + " -i " + s.train);
        EXPECT_EQ(f.status, 0) << f.output;
    }
    // Tokens of an unknown tokenizer are assumed to be the model's.
    write_shard(other.val, 200, {});
    EXPECT_EQ(train_gpt("eval " + hf + " --threads 1 -t 16 -j " + other.val).status, 0);
    // A tokenizer that cannot be read may be a different one.
    write_bytes(hf + "/tokenizer.json", R"({"model": {"type": "WordPiece", "vocab": {}}})");
    write_bytes(hf + "/tokenizer_config.json", "{}");
    EXPECT_TRUE(fails_with("eval " + hf + " --threads 1 -t 16 -j " + s.val,
                           {"cannot be compared", "WordPiece", "not supported yet"}));
#ifdef LNS_SENTENCEPIECE
    // A foreign tokenizer in a checkpoint
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "checksums.json"})
        fs::remove(fs::path(checkpoint) / name);
    fs::copy_file("dev/test/fixtures/tokenizers/exact.model", checkpoint + "/tokenizer.model");
    for (const std::string& command : {"sample " + run, "export " + run + " " + s / "hf2"})
        EXPECT_TRUE(fails_with(command, {checkpoint, "sentencepiece", "is not the model's"}));
#endif
}

TEST(BadInput, DirectoriesThatCannotBeWritten) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    write_bytes(dir / "file", "mine");
    EXPECT_TRUE(fails_with(small_model + "-x 1 -o " + dir / "file", {dir / "file"}));
    EXPECT_TRUE(fails_with(small_model + "-x 1 -o " + dir / "file/run", {dir / "file/run"}));
    EXPECT_EQ(read_bytes(dir / "file"), "mine");
    if (geteuid() != 0) {
        fs::create_directory(dir / "locked");
        fs::permissions(dir / "locked", fs::perms::owner_read | fs::perms::owner_exec);
        EXPECT_TRUE(fails_with(small_model + "-x 1 -o " + dir / "locked/run", {"locked"}));
    }
}

TEST(BadInput, AFullDiskIsFoundBeforeTraining) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    if (mount("none", dir.path.c_str(), "tmpfs", 0, "size=64k") != 0)
        GTEST_SKIP() << "mounting a small file system needs root";
    auto result = fails_with(small_model + "-x 3 -o " + dir / "run", {"run", "free"});
    bool trained = fs::exists(dir / "run/log.jsonl") && fs::file_size(dir / "run/log.jsonl") > 0;
    umount(dir.path.c_str());
    EXPECT_TRUE(result);
    EXPECT_FALSE(trained);
}

TEST(BadInput, TwoRunsIntoOneDirectory) {
    NEEDS_PROGRAM();
    TemporaryDirectory dir;
    const std::string arguments = small_model + "-x 1000000 -o " + dir / "run";
    Finished f =
        run("./train_gpt " + arguments + " >/dev/null 2>&1 & first=$!\n" + "until [ -s " +
            dir / "run/log.jsonl" + " ]; do sleep 0.05; done\n" + "./train_gpt " + arguments +
            " >/dev/null; echo status $?\n" + "./train_gpt -y" + arguments +
            " >/dev/null; echo status $?\n" + "kill -INT $first; wait $first; echo first $?");
    EXPECT_TRUE(says(f.output, {"another run", dir / "run", "status 1", "first 130"})) << f.output;
}
