#include "gpt/options.h"

#include "dev/test/data_helpers.h"

#include <cmath>

#include "gpt/setup.h"

using namespace lns;
using namespace lns::test;

namespace {

Options parse(std::vector<std::string> words, const SavedFlags& saved = {}) {
    words.insert(words.begin(), "train_gpt");
    std::vector<const char*> argv;
    for (const std::string& word : words) argv.push_back(word.c_str());
    return parse_options(int(argv.size()), argv.data(), saved);
}

std::string error(const std::vector<std::string>& words, const SavedFlags& saved = {}) {
    return error_of([&] { parse(words, saved); });
}

} // namespace

TEST(Options, DefaultsAreTiny) {
    Options o = parse({});
    EXPECT_EQ(o.command, Options::Command::train);
    EXPECT_EQ(o.model, "tiny");
    EXPECT_FALSE(o.model_given);
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
        EXPECT_TRUE(q.resume && q.model_given);
    }
    EXPECT_EQ(o.flags, p.flags);
}

TEST(Options, CountsAndPercents) {
    EXPECT_EQ(parse({"-d", "64k"}).total_batch, 64000);
    EXPECT_EQ(parse({"--val-tokens", "10M"}).val_tokens, 10000000);
    EXPECT_EQ(parse({"-x", "1e6"}).steps, 1000000);
    EXPECT_EQ(parse({"-x", "1000", "-u", "5%"}).warmup_steps(), 50);
    EXPECT_EQ(parse({"-x", "1000", "-u", "2k"}).warmup_steps(), 2000);
    EXPECT_EQ(parse({"-x", "10", "-x", "20"}).steps, 20); // the last one counts
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

TEST(Options, ConfigFile) {
    TemporaryDirectory dir;
    write_bytes(dir / "run.toml", "lr = 0.25\nnorm = \"lns\"\nval-tokens = \"2k\"\n");
    Options o = parse({"--config", dir / "run.toml", "-l", "0.5"});
    EXPECT_EQ(o.lr, 0.5); // the command line is above the file
    EXPECT_EQ(o.norm, "lns");
    EXPECT_EQ(o.val_tokens, 2000);
    write_bytes(dir / "wrong.toml", "layrs = 3\n");
    EXPECT_TRUE(says(error({"--config", dir / "wrong.toml"}), {"layrs", "layers"}));
    EXPECT_TRUE(says(error({"--config", dir / "none.toml"}), {"none.toml"}));
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

    // The same flags once more, written otherwise, change nothing.
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
    EXPECT_TRUE(c.qk_norm);
    EXPECT_EQ(c.width, 128);
    EXPECT_EQ(c.scheme.name(), "olmo2");
    c = config({"--arch", "gpt2"});
    EXPECT_FALSE(c.rope);
    EXPECT_EQ(c.mlp_width, 4 * c.width);

    c = config({"-n", "lns", "--lns-power", "0.25", "--lns-sites", "mlp"});
    EXPECT_EQ(c.scheme.lns_power, 0.25);
    EXPECT_EQ(c.scheme.sites(), "mlp");

    TemporaryDirectory dir;
    write_bytes(dir / "config.json", config_to_json(c));
    for (const std::string& path : {dir.path, dir / "config.json"}) {
        EXPECT_EQ(config_difference(config({"-m", path}), c), "");
        EXPECT_EQ(config({"-m", path, "--layers", "3"}).scheme.lns_power, 0.25);
    }
}
