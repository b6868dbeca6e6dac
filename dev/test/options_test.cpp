#include "gpt/run/options.h"

#include "dev/test/data_helpers.h"

#include <cmath>

#include "gpt/run/recipe.h"
#include "gpt/run/setup.h"

using namespace lns;
using namespace lns::test;

namespace {

Options parse(std::vector<std::string> words, const SavedFlags& saved = {}) {
    words.insert(words.begin(), "train_gpt");
    std::vector<const char*> argv;
    for (const std::string& word : words) argv.push_back(word.c_str());
    Options o = parse_options(int(argv.size()), argv.data());
    if (o.command == Options::Command::train && saved.empty()) apply_recipe(o);
    if (o.command == Options::Command::train && !saved.empty()) continue_options(o, saved);
    return o;
}

std::string error(const std::vector<std::string>& words, const SavedFlags& saved = {}) {
    return error_of([&] { parse(words, saved); });
}

} // namespace

TEST(Options, DefaultsAreTiny) {
    Options o = parse({});
    EXPECT_EQ(o.command, Options::Command::train);
    EXPECT_EQ(o.model, "tiny");
    EXPECT_FALSE(o.model_given());
    EXPECT_EQ(o.seq_len, 128);
    EXPECT_EQ(parse({"-m", "llama-9m"}).seq_len, 256);
    EXPECT_EQ(parse({"-t", "64"}).seq_len, 64);
    EXPECT_EQ(o.warmup_steps(), o.steps / 10);
    EXPECT_FALSE(o.resume);
}

TEST(Options, ShortAndLongNames) {
    Options o =
        parse({"-i", "a",  "-j", "b",  "-o",  "c",  "-b", "3",   "-t",   "5",        "-d",
               "7",  "-x", "9",  "-l", "0.5", "-u", "11", "-q",  "0.25", "-c",       "0.125",
               "-v", "13", "-s", "15", "-g",  "17", "-n", "lns", "-m",   "llama-9m", "-y"});
    Options p =
        parse({"--train=a", "--val=b", "--out=c", "--batch=3", "--seq-len=5", "--total-batch=7",
               "--steps=9", "--lr=0.5", "--warmup=11", "--final-lr-frac=0.25",
               "--weight-decay=0.125", "--val-every=13", "--sample-every=15", "--sample-tokens=17",
               "--norm=lns", "--model=llama-9m", "--resume"});
    for (const Options& q : {o, p}) {
        EXPECT_EQ(q.train + q.val + q.out, "abc");
        EXPECT_EQ(q.batch * q.seq_len * q.total_batch * q.steps, 3 * 5 * 7 * 9);
        EXPECT_EQ(q.lr, 0.5);
        EXPECT_EQ(q.warmup_steps(), 11);
        EXPECT_EQ(q.final_lr_frac, 0.25);
        EXPECT_EQ(q.weight_decay, 0.125);
        EXPECT_EQ(q.val_every * q.sample_every * q.sample_tokens, 13 * 15 * 17);
        EXPECT_EQ(q.norm + q.model, "lnsllama-9m");
        EXPECT_TRUE(q.resume && q.model_given());
    }
    EXPECT_EQ(o.flags, p.flags);
}

TEST(Options, CountsAndPercents) {
    EXPECT_EQ(parse({"-d", "64k"}).total_batch, 64000);
    EXPECT_EQ(parse({"--val-tokens", "10M"}).val_tokens, 10000000);
    EXPECT_EQ(parse({"-x", "1e6"}).steps, 1000000);
    EXPECT_EQ(parse({"-x", "1000", "-u", "5%"}).warmup_steps(), 50);
    EXPECT_EQ(parse({"-x", "1000", "-u", "2k"}).warmup_steps(), 2000);
    EXPECT_EQ(parse({"-x", "10", "-x", "20"}).steps, 20); // the last one wins
}

TEST(Options, ResumeTakesAnOptionalValue) {
    EXPECT_TRUE(parse({"-o", "r", "-y"}).resume);
    EXPECT_TRUE(parse({"-y", "-o", "r"}).resume);
    EXPECT_TRUE(parse({"-o", "r", "-y", "1"}).resume);
    EXPECT_FALSE(parse({"-o", "r", "-y", "0"}).resume);
    EXPECT_TRUE(says(error({"-o", "r", "-y", "yes"}), {"--resume", "yes"}));
    EXPECT_TRUE(says(error({"-y"}), {"--resume", "-o DIR"}));
}

TEST(Options, WrongFlagsAreSentences) {
    EXPECT_TRUE(says(error({"--layrs", "3"}), {"no flag --layrs", "Did you mean '--layers'"}));
    EXPECT_TRUE(says(error({"--warmpu=3"}), {"no flag --warmpu.", "--warmup"}));
    EXPECT_TRUE(says(error({"-z"}), {"no flag -z"}));
    EXPECT_TRUE(says(error({"smaple", "x"}), {"'smaple'", "Did you mean 'sample'"}));
    EXPECT_TRUE(says(error({"sample"}), {"CHECKPOINT", "required"}));
    EXPECT_TRUE(says(error({"sample", "x", "--lr", "3"}), {"no flag --lr"}));
    EXPECT_TRUE(says(error({"-b"}), {"--batch", "needs a value"}));
    EXPECT_TRUE(says(error({"-b", "0"}), {"--batch", "0", "expected 1 to"}));
    EXPECT_TRUE(says(error({"-b", "many"}), {"--batch", "'many'"}));
    EXPECT_TRUE(says(error({"-x", "1.5"}), {"--steps", "'1.5'"}));
    EXPECT_TRUE(says(error({"-l", "-1"}), {"--lr", "-1", "at least 0"}));
    EXPECT_TRUE(says(error({"-l", "fast"}), {"--lr", "'fast' is not a number"}));
    EXPECT_TRUE(says(error({"-l", "nan"}), {"--lr", "nan"}));
    EXPECT_TRUE(says(error({"-l", "inf"}), {"--lr", "inf"}));
    EXPECT_TRUE(says(error({"--top-p", "0"}), {"--top-p", "above 0"}));
    EXPECT_TRUE(says(error({"-u", "101%"}), {"--warmup", "101%", "0% to 100%"}));
    EXPECT_TRUE(says(error({"-u", "%"}), {"--warmup", "'%'"}));
    EXPECT_TRUE(
        says(error({"--lr-schedule", "cosin"}), {"--lr-schedule", "Did you mean 'cosine'"}));
    EXPECT_TRUE(says(error({"--recipe", "papers"}), {"--recipe", "paper"}));
}

TEST(Options, PaperRecipeIsUnderTheFlags) {
    Options o = parse({"--recipe", "paper", "-m", "llama-130m"});
    EXPECT_EQ(o.seq_len, 256);
    EXPECT_EQ(o.total_batch, 131072);
    EXPECT_EQ(o.steps, 20000);
    EXPECT_EQ(o.warmup_steps(), 2000);
    EXPECT_EQ(o.lr, 1e-3);
    EXPECT_EQ(o.beta2, 0.999);
    EXPECT_EQ(o.weight_decay, 0);
    EXPECT_EQ(o.grad_clip, 0);
    EXPECT_EQ(o.val_tokens, 10000000);
    EXPECT_NEAR(o.embed_std, std::sqrt(0.4), 1e-9);

    struct Row {
        const char* model;
        int64_t steps, warmup;
        double lr;
    };
    for (const Row& row : {Row{"llama-60m", 10000, 1000, 1e-3},
                           {"llama-250m", 40000, 4000, 1e-3},
                           {"llama-350m", 60000, 6000, 5e-4},
                           {"llama-1b", 100000, 1000, 5e-4}}) {
        Options r = parse({"--recipe", "paper", "-m", row.model});
        EXPECT_EQ(r.steps, row.steps) << row.model;
        EXPECT_EQ(r.warmup_steps(), row.warmup) << row.model;
        EXPECT_EQ(r.lr, row.lr) << row.model;
    }
    o = parse({"--recipe", "paper", "-m", "llama-1b", "-l", "0.002", "--embed-std", "0.02"});
    EXPECT_EQ(o.lr, 0.002);
    EXPECT_EQ(o.embed_std, 0.02);
    EXPECT_EQ(o.steps, 100000);
}

TEST(Options, RecipeOfFineTuning) {
    Options o = parse({"--recipe", "paper-sft", "-m", "llama-130m"});
    EXPECT_EQ(o.epochs, 4);
    EXPECT_EQ(o.lisa, 4);
    EXPECT_EQ(o.lisa_interval, 3);
    EXPECT_EQ(o.batch, 16);
    EXPECT_EQ(o.seq_len, 512);
    EXPECT_EQ(o.lr, 3e-4);
    EXPECT_EQ(o.lr_schedule, "linear");
    EXPECT_EQ(o.warmup_steps(), 0);
    EXPECT_EQ(o.final_lr_frac, 0);
    EXPECT_EQ(o.beta2, 0.999);
    EXPECT_EQ(o.weight_decay, 0);
    EXPECT_EQ(o.grad_clip, 1);
    EXPECT_EQ(o.dtype + o.master_weights + o.moments, "bf16nobf16");
    EXPECT_EQ(o.flags.at("--lisa"), 4);
    o = parse(
        {"--recipe", "paper-sft", "--layers", "3", "--positions", "64", "--lisa-interval", "5"});
    EXPECT_EQ(o.lisa, 3);
    EXPECT_EQ(o.lisa_interval, 5);
    EXPECT_EQ(o.seq_len, 64);
    for (const char* recipe : {"paper", "paper-sft"}) { // float32 weights have no master copy
        o = parse({"--recipe", recipe, "--dtype", "float32"});
        EXPECT_EQ(o.master_weights + o.moments, "yesfloat32");
    }
    Options again = parse({"-o", "r", "-y"}, o.flags);
    EXPECT_EQ(again.flags, o.flags);
    EXPECT_TRUE(
        says(error({"-o", "r", "-y", "--lisa", "1"}, o.flags), {"--lisa was 4", "is now 1"}));
}

TEST(Options, ConfigFile) {
    TemporaryDirectory dir;
    write_bytes(dir / "run.toml", "lr = 0.25\nnorm = \"lns\"\nval-tokens = \"2k\"\n");
    Options o = parse({"--config", dir / "run.toml", "-l", "0.5"});
    EXPECT_EQ(o.lr, 0.5); // the command line overrides the file
    EXPECT_EQ(o.norm, "lns");
    EXPECT_EQ(o.val_tokens, 2000);
    write_bytes(dir / "wrong.toml", "layrs = 3\n");
    EXPECT_TRUE(says(error({"--config", dir / "wrong.toml"}), {"layrs", "layers"}));
    EXPECT_TRUE(says(error({"--config", dir / "none.toml"}), {"none.toml"}));
}

namespace {

struct ConfigFile : TemporaryDirectory {
    std::string file = *this / "c.ini";
    // Parses --config with this text, then the arguments.
    Options parsed(const std::string& text, std::vector<std::string> words = {}) const {
        write_bytes(file, text);
        words.insert(words.begin(), {"--config", file});
        return parse(words);
    }
    std::string error(const std::string& text, const std::vector<std::string>& words = {}) const {
        return error_of([&] { parsed(text, words); });
    }
};

} // namespace

TEST(Options, ConfigFileTakesWholeValues) {
    ConfigFile config;
    EXPECT_EQ(config.parsed("out = runs/lr=1e-3,wd=0.1").out, "runs/lr=1e-3,wd=0.1");
    EXPECT_EQ(config.parsed("prompt = [a, b] {} c").prompt, "[a, b] {} c");
    EXPECT_EQ(config.parsed("train = [ab]").train, "[ab]");
    EXPECT_EQ(config.parsed("prompt =").prompt, "");
    for (const char* line : {"lr = 0,001", "lr = 1 2", "lr = 0.1 # low", "lr ="})
        EXPECT_TRUE(says(config.error(line), {"c.ini, line 1: --lr", "is not a number"})) << line;
    for (const char* line :
         {"steps = 10 20", "steps = []", "steps = [4", "steps = [,", "steps = ["})
        EXPECT_TRUE(says(config.error(cat("\n", line)), {"c.ini, line 2: --steps", "not a count"}))
            << line;
    EXPECT_TRUE(says(config.error("out ="), {"line 1: --out", "no value"}));
    EXPECT_TRUE(says(config.error("layers = " + std::string(100000, '[')), {"line 1", "--layers"}));
}

TEST(Options, ConfigFileFlagsAreTrueOrFalse) {
    ConfigFile config;
    for (const char* yes : {"true", "yes", "on", "1"}) {
        EXPECT_TRUE(config.parsed(cat("overfit-batch = ", yes)).overfit_batch) << yes;
        EXPECT_TRUE(config.parsed(cat("out = r\nresume = ", yes)).resume) << yes;
    }
    for (const char* no : {"false", "no", "off", "0"}) {
        EXPECT_FALSE(config.parsed(cat("overfit-batch = ", no)).overfit_batch) << no;
        EXPECT_FALSE(config.parsed(cat("out = r\nresume = ", no)).resume) << no;
        EXPECT_TRUE(config.parsed(cat("overfit-batch = ", no), {"--overfit-batch"}).overfit_batch);
    }
    for (const char* line : {"overfit-batch = 2", "overfit-batch =", "resume = maybe"})
        EXPECT_TRUE(says(config.error(line), {"line 1: --", "neither true nor false"})) << line;
}

TEST(Options, ConfigFileNamesAreChecked) {
    ConfigFile config;
    EXPECT_TRUE(says(config.error("[train]\nsteps = 2\n[optimizer]\nlrr = 1e-5"),
                     {"c.ini, line 4", "no flag 'lrr'", "--lr"}));
    EXPECT_TRUE(says(config.error("[sample]\nlr = 1"), {"line 2", "no flag 'lr' of `sample`"}));
    EXPECT_TRUE(says(config.error("[eval]\nlrr = 1", {"sample", "x"}), {"line 2", "`eval`"}));
    EXPECT_TRUE(says(config.error("ignore-eot = 1"), {"line 1", "put it under [sample]"}));
    EXPECT_TRUE(says(config.error("probes = all"), {"line 1", "put it under [probe]"}));
    for (const char* name : {"config", "help", "version"})
        EXPECT_TRUE(says(config.error(cat(name, " = x")), {"line 1", name, "command line"}))
            << name;
    EXPECT_TRUE(says(config.error("[sample]\nhelp = x"), {"line 2", "command line"}));
    EXPECT_TRUE(says(config.error("sample = x"), {"line 1", "no flag 'sample'"}));
    EXPECT_TRUE(says(config.error("[sample]\nCHECKPOINT = x"), {"line 2", "no flag"}));
    EXPECT_TRUE(says(config.error("lr = 1\n[a]\n--lr = 2"), {"line 3", "--lr", "line 1 already"}));
    EXPECT_TRUE(says(config.error("l = 1\nlr = 2"), {"line 2", "line 1 already"}));
    EXPECT_TRUE(
        says(config.error("lr = x", {"-l", "1"}), {"line 1", "'x'"})); // checked nevertheless
}

TEST(Options, ConfigFileIsUnderTheCommandLine) {
    ConfigFile config;
    const std::string text = "[any]\nlr = 0.25\nsteps = 7\nout = r\nresume = yes\n";
    Options o = config.parsed(text, {"-x", "9", "-y", "0"});
    EXPECT_EQ(o.lr, 0.25);
    EXPECT_EQ(o.steps, 9);
    EXPECT_FALSE(o.resume);
    EXPECT_EQ(o.flags["--lr"], 0.25);
    EXPECT_EQ(o.flags["--steps"], 9);
    EXPECT_EQ(config.parsed("recipe = paper\nmodel = llama-130m\nlr = 0.5").lr, 0.5);
    EXPECT_EQ(config.parsed("model = llama-130m").seq_len, 256);
}

TEST(Options, ConfigFileOfCommands) {
    ConfigFile config;
    const std::string text = "batch = 3\ntop-k = 5\nseed = 7\nout = r\nresume = 1\nseq-len = 9\n"
                             "[sample]\nseed = 8\n[eval]\nval-tokens = 4k\nthreads = 2\n";
    Options o = config.parsed(text, {"sample", "c"});
    EXPECT_EQ(o.command, Options::Command::sample);
    EXPECT_EQ(o.top_k, 5); // training's lines apply if the command has the flag
    EXPECT_EQ(o.seed, 8);  // and the command's own override them
    EXPECT_EQ(o.threads, 0);
    EXPECT_EQ(o.out, "");
    EXPECT_FALSE(o.resume);
    EXPECT_EQ(config.parsed(text, {"sample", "c", "--seed", "9", "--top-k", "6"}).seed, 9);
    EXPECT_EQ(config.parsed(text, {"sample", "c", "--seed", "9", "--top-k", "6"}).top_k, 6);
    o = config.parsed(text, {"eval", "c"});
    EXPECT_EQ(o.batch, 3);
    EXPECT_EQ(o.val_tokens, 4000);
    EXPECT_EQ(o.threads, 2);
    EXPECT_EQ(o.seq_len, 0);
    EXPECT_EQ(config.parsed(text, {"probe", "c"}).out, "");
    EXPECT_EQ(config.parsed(text).seed, 7);
    write_bytes(config.file, text);
    EXPECT_EQ(parse({"eval", "c", "--config", config.file}).val_tokens, 4000);
    EXPECT_TRUE(says(config.error("", {"-l", "1", "eval", "c"}), {"--lr stands before `eval`"}));
}

TEST(Options, HomeInEveryPath) {
    const std::string before = getenv("HOME") ? getenv("HOME") : "";
    setenv("HOME", "/h", 1);
    Options o = parse({"-o", "~/o", "--init-from", "~/i", "--dump-state=~/s", "-m", "~/m",
                       "--tokenizer", "gpt2:~/t"});
    EXPECT_EQ(o.out + o.init_from + o.dump_state + o.model + o.tokenizer,
              "/h/o/h/i/h/s/h/mgpt2:/h/t");
    EXPECT_EQ(o.flags["--tokenizer"], "gpt2:/h/t");
    for (const char* command : {"sample", "eval", "probe"})
        EXPECT_EQ(parse({command, "~/c"}).checkpoint, "/h/c") << command;
    o = parse({"export", "~/c", "~/d"});
    EXPECT_EQ(o.checkpoint + o.export_dir, "/h/c/h/d");
    EXPECT_EQ(parse({"probe", "c", "-o", "~/p"}).out, "/h/p");
    EXPECT_EQ(parse({"sample", "c", "--prompt", "~/p"}).prompt, "~/p");
    EXPECT_TRUE(says(error({"-o", "~nobody-of-this-name/x"}), {"--out", "no user"}));
    ConfigFile config;
    EXPECT_EQ(config.parsed("out = ~/o").out, "/h/o");
    setenv("HOME", config.path.c_str(), 1);
    EXPECT_TRUE(says(error({"--config", "~/c2.ini"}), {config.path + "/c2.ini"}));
    EXPECT_EQ(parse({"--config", "~/c.ini"}).out, config.path + "/o");
    setenv("HOME", before.c_str(), 1);
}

TEST(Options, UnquotedPatterns) {
    TemporaryDirectory dir;
    const std::string a = dir / "x_train_000.bin", b = dir / "x_train_001.bin", c = dir / "x_2.bin";
    for (const std::string& file : {a, b, c}) write_bytes(file, "");
    EXPECT_TRUE(
        says(error({"-x", "3", "-i", a, b, "-b", "2"}), {"-i takes one pattern", "2 files", "quote",
                                                         "-i '" + dir.path + "/x_train_00*.bin'"}));
    EXPECT_TRUE(says(error({"--val", a, b, c}), {"--val '" + dir.path + "/x_*.bin'"}));
    EXPECT_TRUE(says(error({"eval", "-j", a, b, "run"}), {"2 files", "quote the pattern"}));
    EXPECT_TRUE(says(error({"eval", "run", "-j", a, b}), {"quote the pattern"}));
    EXPECT_TRUE(says(error({"-i", a, "evla"}), {"did not expect 'evla'", "'eval'"}));
    EXPECT_TRUE(says(error({"-o", a, b}), {"did not expect"}));
}

TEST(Options, AResumedRunTakesItsFlagsOver) {
    Options first = parse({"-n", "lns", "-l", "1e-3", "-x", "40", "--layers", "3", "-d", "64k",
                           "--overfit-batch", "--recipe", "paper", "-u", "7%"});
    Options again = parse({"-o", "r", "-y"}, first.flags);
    EXPECT_EQ(again.flags, first.flags);
    EXPECT_EQ(again.norm, "lns");
    EXPECT_EQ(again.layers, 3);
    EXPECT_EQ(again.heads, 0);
    EXPECT_TRUE(again.overfit_batch);
    EXPECT_EQ(again.warmup_steps(), first.warmup_steps());
    EXPECT_TRUE(again.changes.empty());

    // Repeating the flags in another notation changes nothing.
    again = parse({"-o", "r", "-y", "-n", "lns", "-l", "0.001", "-d", "64000"}, first.flags);
    EXPECT_EQ(again.flags, first.flags);
    EXPECT_TRUE(again.changes.empty());

    again = parse({"-o", "r", "-y", "-x", "80", "-v", "3"}, first.flags);
    EXPECT_EQ(again.steps, 80);
    ASSERT_EQ(again.changes.size(), 1u);
    EXPECT_TRUE(says(again.changes[0], {"--steps was 40", "80"}));

    EXPECT_TRUE(says(error({"-o", "r", "-y", "-n", "pre"}, first.flags),
                     {"--norm was lns", "is now pre", "-o"}));
    EXPECT_TRUE(says(error({"-o", "r", "-y", "--seed", "5"}, first.flags), {"--seed", "5"}));
}

// Older versions saved text, and empty text for what was not given.
TEST(Options, AResumedRunMayHoldText) {
    const SavedFlags text = {{"--norm", "lns"},   {"--lr", "3e-04"},           {"--layers", "3"},
                             {"--heads", "0"},    {"--overfit-batch", "true"}, {"--recipe", ""},
                             {"--tokenizer", ""}, {"--none-such", "7"}};
    Options o = parse({"-o", "r", "-y", "--lr", "0.0003"}, text);
    EXPECT_EQ(o.norm, "lns");
    EXPECT_EQ(o.layers, 3);
    EXPECT_EQ(o.heads, 0);
    EXPECT_TRUE(o.overfit_batch);
    EXPECT_TRUE(o.changes.empty());
    EXPECT_EQ(o.flags.at("--layers"), 3);
    EXPECT_EQ(o.flags.at("--overfit-batch"), true);
    EXPECT_FALSE(parse({"-o", "r", "-y"}, {{"--overfit-batch", ""}}).overfit_batch);
    const std::vector<std::pair<std::string, nlohmann::json>> wrong = {
        {"--layers", "x"}, {"--layers", -1}, {"--layers", 1.5},    {"--lr", "fast"},
        {"--lr", true},    {"--norm", 3},    {"--moments", "fp8"}, {"--overfit-batch", "2"}};
    for (const auto& [name, value] : wrong)
        EXPECT_TRUE(says(error({"-o", "r", "-y"}, {{name, value}}), {"the run's flag " + name}));
}

TEST(Options, ModelFromFlags) {
    auto config = [](const std::vector<std::string>& words) { return model_config(parse(words)); };
    Config c = config({"--layers", "2", "--width", "16", "--heads", "4", "--kv-heads", "2"});
    EXPECT_EQ(c.layers, 2);
    EXPECT_EQ(c.head_size, 4);
    EXPECT_EQ(c.kv_heads, 2);
    EXPECT_EQ(c.mlp_width, 48); // 8/3 of 16, rounded up to eights
    EXPECT_EQ(c.preset, "");

    c = config({"-m", "llama-9m", "--layers", "6", "-n", "mix:2", "--init-std", "0.01"});
    EXPECT_EQ(c.width, 128);
    EXPECT_EQ(c.mlp_width, 352);
    EXPECT_EQ(c.layers, 6);
    EXPECT_EQ(c.scheme.name(), "mix:2");
    EXPECT_EQ(c.init_std, 0.01);

    c = config({"-m", "llama-9m", "--arch", "olmo2"});
    EXPECT_EQ(c.model_type, "olmo2");
    EXPECT_EQ(c.qk_norm, QkNorm::whole);
    EXPECT_EQ(c.width, 128);
    EXPECT_EQ(c.scheme.name(), "olmo2");
    c = config({"--arch", "gpt2"});
    EXPECT_FALSE(c.rope());
    EXPECT_EQ(c.mlp_width, 4 * c.width);

    c = config({"-n", "lns", "--lns-power", "0.25", "--lns-sites", "mlp"});
    EXPECT_EQ(c.scheme.lns_power, 0.25);
    EXPECT_EQ(c.scheme.sites(), "mlp");

    // By default as many groups as heads
    EXPECT_EQ(config({"-m", "llama-9m", "-n", "group"}).scheme.name(), "group:4");
    EXPECT_EQ(config({"-m", "llama-9m", "-n", "group:16"}).scheme.name(), "group:16");
    EXPECT_TRUE(says(error_of([&] {
                         config({"-m", "llama-9m", "-n", "group:5"});
                     }),
                     {"width 128", "5 groups"}));

    TemporaryDirectory dir;
    write_bytes(dir / "config.json", config_to_json(c));
    for (const std::string& path : {dir.path, dir / "config.json"}) {
        EXPECT_EQ(config_difference(config({"-m", path}), c), "");
        EXPECT_EQ(config({"-m", path, "--layers", "3"}).scheme.lns_power, 0.25);
    }
}

TEST(Options, NormType) {
    auto config = [](const std::vector<std::string>& words) { return model_config(parse(words)); };
    TemporaryDirectory dir;
    for (const char* arch : {"llama", "gpt2", "olmo"}) {
        const Config stock = config({"--arch", arch}),
                     c = config({"--arch", arch, "--norm-type", "dyt"});
        EXPECT_EQ(c.norm, NormType::dyt);
        EXPECT_TRUE(says(beyond_stock_model(c), {"DyT"}));
        EXPECT_TRUE(says(config_difference(stock, c), {"type of norm", "Norm, expected DyT"}));
        EXPECT_TRUE(says(config_difference(c, stock), {"type of norm is DyT"}));
        write_bytes(dir / "config.json", config_to_json(c));
        EXPECT_EQ(config_difference(config({"-m", dir.path}), c), "");
        EXPECT_EQ(config({"-m", dir.path, "--norm-type", "stock"}).norm, stock.norm);
        EXPECT_TRUE(says(config_to_json(c), {cat("\"lns-", arch, "\"").c_str()}));
        EXPECT_EQ(config_to_json(stock).find("norm_type"), std::string::npos);
    }
    auto error = [&](const std::vector<std::string>& words) {
        return error_of([&] { config(words); });
    };
    EXPECT_TRUE(says(error({"--norm-type", "rms"}), {"--norm-type", "'rms'", "stock", "dyt"}));
    for (const char* scheme : {"pre+gpas", "lns:before", "group"})
        EXPECT_TRUE(says(error({"--norm-type", "dyt", "-n", scheme}),
                         {scheme, "does not go with --norm-type dyt", "tanh"}));
    std::string bad = config_to_json(config({}));
    bad.replace(bad.find("\"scheme\""), 0, "\"norm_type\": \"tanh\", ");
    EXPECT_TRUE(says(error_of([&] { config_from_json(bad, "x"); }), {"norm_type", "tanh", "dyt"}));

    // α₀ of arXiv 2503.10622, table 12, before attention and elsewhere
    for (auto [width, attention, other] : {std::tuple{768, 1.0, 1.0},
                                           {1024, 1.0, 1.0},
                                           {2048, 1.0, 0.5},
                                           {3072, 0.9, 0.35},
                                           {4096, 0.8, 0.2},
                                           {8192, 0.2, 0.05},
                                           {9000, 0.2, 0.05}}) {
        const Config c = config({"--width", std::to_string(width), "--heads", "1", "--layers", "2",
                                 "--norm-type", "dyt", "-n", "peri"});
        const Registry registry = make_registry(c);
        auto value = [&](const char* name) { return registry.find(cat("model.", name))->mean; };
        EXPECT_NEAR(value("layers.1.input_layernorm.alpha"), attention, 1e-12);
        EXPECT_NEAR(value("embed_norm.alpha"), attention, 1e-12);
        EXPECT_NEAR(value("layers.1.post_attention_layernorm.alpha"), other, 1e-12);
        EXPECT_NEAR(value("layers.1.pre_feedforward_layernorm.alpha"), other, 1e-12);
        EXPECT_NEAR(value("norm.alpha"), other, 1e-12);
        EXPECT_NEAR(value("embed_scale"), std::sqrt(width), 1e-12);
        EXPECT_FALSE(registry.find("model.norm.alpha")->decay);
    }
}
