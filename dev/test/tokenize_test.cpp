// The program data/tokenize, run as a user runs it.
#include "dev/test/data_helpers.h"
#include "gpt/base/random.h"
#include "gpt/data/loader.h"
#include "gpt/data/tokenizer.h"

#include <csignal>
#include <gtest/gtest.h>
#include <thread>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

// LNS_TOKENIZE, or the one that make builds. Sanitizer builds have only the tests.
struct TokenizeProgram : testing::Test {
    TemporaryDirectory dir;
    std::string program =
        std::getenv("LNS_TOKENIZE") ? std::getenv("LNS_TOKENIZE") : "data/tokenize";
    void SetUp() override {
        if (fs::exists(program)) return;
#ifdef __SANITIZE_ADDRESS__
        GTEST_SKIP() << "data/tokenize is not built here";
#else
        FAIL() << "there is no " << program << ": run make data/tokenize first";
#endif
    }
    Finished tokenize(const std::string& arguments) {
        return run("cd '" + dir.path + "' && '" + fs::absolute(program).string() + "' " +
                   arguments);
    }
    // Runs it and expects success.
    std::string tokenized(const std::string& arguments) {
        Finished finished = tokenize(arguments);
        EXPECT_EQ(finished.status, 0) << finished.output;
        return finished.output;
    }
    std::string failed(const std::string& arguments) {
        Finished finished = tokenize(arguments);
        EXPECT_EQ(finished.status, 1) << finished.output;
        return finished.output;
    }
    std::vector<int> tokens(const std::string& pattern) {
        ShardSource source(dir / pattern);
        std::vector<int> all(source.size());
        source.read(0, all.size(), all.data());
        return all;
    }
    std::vector<std::string> names() {
        std::vector<std::string> found;
        for (const auto& entry : fs::directory_iterator(dir.path))
            found.push_back(entry.path().filename().string());
        std::sort(found.begin(), found.end());
        return found;
    }
};

const std::string fixtures = fs::absolute("dev/test/fixtures/tokenizers").string();

std::vector<int> bytes_of(const std::string& text) { return load_tokenizer("bytes")->encode(text); }

std::vector<int> operator+(std::vector<int> a, const std::vector<int>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

// Lines of random words, n bytes or slightly more.
std::string prose(size_t n, uint64_t seed = 1) {
    const char* words[] = {"the", "fox", "said", "it's", "12345", "naïve", "中文", "!", "--", "x"};
    std::string text;
    for (uint64_t i = 0; text.size() < n; i++) {
        text += words[random_below(10, seed, 0, i)];
        uint32_t after = random_below(12, seed, 1, i);
        text += after == 0 ? "\n" : after == 1 ? "\n\n" : after == 2 ? "  " : " ";
    }
    return text;
}

} // namespace

TEST_F(TokenizeProgram, AFileIsOneDocumentWhoseEndIsForValidation) {
    std::string text;
    for (int i = 0; i < 1000; i++) text += cat("line ", i, "\n");
    write_bytes(dir / "text.txt", text);
    std::string summary = tokenized("text.txt -o out --val-fraction 0.1");
    EXPECT_TRUE(says(summary, {"1 document, 8890 bytes, 8891 tokens", "out_train_000000.bin"}));
    EXPECT_EQ(names(), (std::vector<std::string>{"out_tokenizer", "out_train_000000.bin",
                                                 "out_val_000000.bin", "text.txt"}));
    std::vector<int> train = tokens("out_train_*.bin"), val = tokens("out_val_*.bin");
    EXPECT_EQ(train + val, bytes_of(text) + std::vector<int>{256});
    EXPECT_NEAR(double(val.size()), 889, 10);
    EXPECT_EQ(train.back(), '\n'); // between lines
    auto tokenizer = load_tokenizer(dir / "out_tokenizer");
    EXPECT_EQ(ShardSource(dir / "out_val_*.bin").id(), tokenizer->id());
    EXPECT_EQ(tokenizer->decode(val), text.substr(train.size()));

    tokenized("text.txt -o out --val-fraction 0");
    EXPECT_EQ(tokens("out_train_*.bin"), bytes_of(text) + std::vector<int>{256});
    EXPECT_FALSE(fs::exists(dir / "out_val_000000.bin")); // it was from the previous run
}

TEST_F(TokenizeProgram, DocumentsEndAtSeparatorLines) {
    // Lines that only begin or end with it do not count; a last line without a newline does.
    std::string text =
        "one\ntwo\n<|end|>\nthree <|end|>\n<|end|> four\n\n<|end|>\r\n<|end|>\nfive\n<|end|>";
    write_bytes(dir / "text.txt", text);
    write_bytes(dir / "more.txt", "<|end|>\nsix\n<|end");
    std::string summary =
        tokenized("text.txt more.txt -o out --doc-separator '<|end|>' --val-fraction 0");
    std::vector<int> eot = {256};
    EXPECT_EQ(tokens("out_train_*.bin"),
              bytes_of("one\ntwo\n") + eot + bytes_of("three <|end|>\n<|end|> four\n\n") + eot +
                  bytes_of("five\n") + eot + bytes_of("six\n<|end") + eot);
    EXPECT_TRUE(says(summary, {"4 documents"}));
}

TEST_F(TokenizeProgram, WholeDocumentsAreSpreadOverValidation) {
    std::string text;
    for (int i = 0; i < 2000; i++) text += cat("document ", 10000 + i, "\n===\n");
    write_bytes(dir / "text.txt", text);
    tokenized("text.txt -o out --doc-separator === --val-fraction 0.1");
    std::vector<int> val = tokens("out_val_*.bin"), train = tokens("out_train_*.bin");
    EXPECT_EQ(val.size(), 200u * 16);
    EXPECT_EQ(train.size(), 1800u * 16);
    for (size_t i = 0; i < val.size(); i += 16) {
        std::string document = load_tokenizer("bytes")->decode(&val[i], 16);
        int number = std::stoi(document.substr(9)) - 10000;
        EXPECT_NEAR(number, int(i) / 16 * 10, 10); // spread over the text
    }
    write_bytes(dir / "two.txt", "one\n===\ntwo\n");
    tokenized("two.txt -o two --doc-separator === --val-fraction 0.01");
    EXPECT_EQ(tokens("two_val_*.bin"), bytes_of("two\n") + std::vector<int>{256});
}

TEST_F(TokenizeProgram, ShardsAreFullAndOldOnesAreRemoved) {
    std::string text = prose(10'000);
    write_bytes(dir / "text.txt", text);
    tokenized("text.txt -o out --val-fraction 0 --shard-tokens 1k");
    for (int i = 0; i < 9; i++)
        EXPECT_EQ(Shard(dir / cat("out_train_00000", i, ".bin")).tokens, 1000u);
    EXPECT_EQ(Shard(dir / "out_train_000009.bin").tokens,
              1001u); // end-of-text is not alone in a shard
    EXPECT_EQ(tokens("out_train_*.bin"), bytes_of(text) + std::vector<int>{256});

    write_bytes(dir / "out_train_notes.bin", "mine");
    write_bytes(dir / "out_trainer_000009.bin", "mine");
    std::string output = tokenized("text.txt -o out --val-fraction 0 --shard-tokens 4k");
    EXPECT_TRUE(says(output, {"removed 7 shards"}));
    EXPECT_EQ(names(), (std::vector<std::string>{"out_tokenizer", "out_train_000000.bin",
                                                 "out_train_000001.bin", "out_train_000002.bin",
                                                 "out_train_notes.bin", "out_trainer_000009.bin",
                                                 "text.txt"}));
}

TEST_F(TokenizeProgram, EndOfTextIsNotAloneInAShard) {
    for (int n : {999, 1000, 1001, 2000, 400'000}) {
        write_bytes(dir / "text.txt", std::string(size_t(n), 'a'));
        tokenized("text.txt -q -o out --val-fraction 0 --shard-tokens 1k");
        EXPECT_EQ(tokens("out_train_*.bin"),
                  bytes_of(std::string(size_t(n), 'a')) + std::vector<int>{256});
        const std::vector<uint64_t> parts = ShardSource(dir / "out_train_*.bin").parts();
        EXPECT_EQ(parts.back(), n % 1000 ? uint64_t(n % 1000) + 1 : 1001u);
        for (size_t i = 0; i + 1 < parts.size(); i++) EXPECT_EQ(parts[i], 1000u);
    }
}

// The tokens are those of the whole text, however it is delivered and cut.
TEST_F(TokenizeProgram, TheTokensAreThoseOfTheWholeText) {
    std::string text = prose(1'200'000);
    write_bytes(dir / "text.txt", text);
    std::vector<std::string> specs = {"bytes"};
#ifdef LNS_PCRE2
    specs.push_back("gpt2:" + fixtures + "/gpt2-subset");
#endif
#ifdef LNS_SENTENCEPIECE
    specs.push_back(fixtures + "/exact.model");
#endif
    for (const std::string& spec : specs) {
        auto tokenizer = load_tokenizer(spec);
        std::vector<int> expected = tokenizer->encode(text) + std::vector<int>{tokenizer->eot()};
        std::string flags = " -q --tokenizer " + spec + " ";
        tokenized(flags + "text.txt -o a --val-fraction 0 --threads 1");
        EXPECT_EQ(tokens("a_train_*.bin"), expected) << spec;
        tokenized(flags + "text.txt -o b --val-fraction 0 --threads 5");
        EXPECT_EQ(tokens("b_train_*.bin"), expected) << spec;
        tokenized(flags + "text.txt -o c --val-fraction 0.3");
        EXPECT_EQ(tokens("c_train_*.bin") + tokens("c_val_*.bin"), expected) << spec;
        // A separator that never occurs changes nothing, nor does a pipe in small pieces.
        run("cd '" + dir.path + "' && dd if=text.txt bs=997 status=none | '" +
            fs::absolute(program).string() + "' -o d --doc-separator '#' --val-fraction 0" + flags);
        EXPECT_EQ(tokens("d_train_*.bin"), expected) << spec;
    }
}

TEST_F(TokenizeProgram, APipeOfUnknownLengthIsSplitIntoBlocks) {
    std::string text = prose(6'000'000);
    write_bytes(dir / "text.txt", text);
    std::string command =
        "cat text.txt | " + fs::absolute(program).string() + " --val-fraction 0.1 -o ";
    for (const char* threads : {"a --threads 1", "b --threads 3"})
        EXPECT_EQ(run("cd '" + dir.path + "' && " + command + threads).status, 0);
    std::vector<int> val = tokens("a_val_*.bin"), train = tokens("a_train_*.bin");
    EXPECT_EQ(val.size() + train.size(), text.size() + 1);
    EXPECT_NEAR(double(val.size()) / double(text.size()), 0.1, 0.02);
    EXPECT_EQ(tokens("b_val_*.bin"), val);
    EXPECT_EQ(tokens("b_train_*.bin"), train);
    EXPECT_NE(train, bytes_of(text.substr(0, train.size())));
    // A short one is treated as a file.
    run("cd '" + dir.path + "' && head -c 100000 text.txt > short.txt");
    tokenized("short.txt -o file");
    tokenized("-o pipe < short.txt");
    EXPECT_EQ(run("cd '" + dir.path + "' && cat short.txt | " + fs::absolute(program).string() +
                  " - -o pipe")
                  .status,
              0);
    EXPECT_EQ(tokens("file_val_*.bin"), tokens("pipe_val_*.bin"));
    EXPECT_EQ(tokens("file_train_*.bin"), tokens("pipe_train_*.bin"));
}

TEST_F(TokenizeProgram, TextWithoutAPlaceToCut) {
#ifdef LNS_PCRE2
    std::string text(2'500'000, 'z');
    write_bytes(dir / "text.txt", text);
    std::string output =
        tokenized("text.txt -o out --val-fraction 0 --tokenizer gpt2:" + fixtures + "/gpt2-subset");
    EXPECT_TRUE(says(output, {"had no place to cut"}));
    EXPECT_EQ(load_tokenizer(dir / "out_tokenizer")->decode(tokens("out_train_*.bin")), text);
#endif
}

TEST_F(TokenizeProgram, BadInputIsAnError) {
    write_bytes(dir / "text.txt", "some text\n");
    write_bytes(dir / "empty.txt", "");
    EXPECT_TRUE(says(failed("text.txt"), {"tokenize: --out is required"}));
    EXPECT_TRUE(says(failed("none.txt -o out"), {"cannot open none.txt: No such file"}));
    EXPECT_TRUE(says(failed(". -o out"), {". is a directory"}));
    EXPECT_TRUE(says(failed("empty.txt -o out"), {"no text in the input"}));
    EXPECT_TRUE(says(failed("text.txt -o out --tokenizer what"), {"no tokenizer 'what'"}));
    EXPECT_TRUE(says(failed("text.txt -o out --shard-tokens many"), {"'many' is not a count"}));
    EXPECT_TRUE(
        says(failed("text.txt -o out --shard-tokens 0"), {"--shard-tokens 0", "at least 1"}));
    EXPECT_TRUE(says(failed("text.txt -o out --shard-tokens 3G"), {"at most 2147483647"}));
    EXPECT_TRUE(says(failed("text.txt -o out --val-fraction 1"), {"--val-fraction", "0.99"}));
    EXPECT_TRUE(says(failed("text.txt -o out --frob"), {"--frob"}));
    EXPECT_TRUE(says(failed("text.txt -o text.txt/out"), {"text.txt"}));
    EXPECT_TRUE(says(failed("text.txt -o dir/"), {"names no file"}));
    EXPECT_TRUE(
        says(failed("text.txt -o out --doc-separator \"$(printf 'a\\nb')\""), {"--doc-separator"}));
    fs::remove_all(dir / "dir");
    EXPECT_EQ(names(), (std::vector<std::string>{"empty.txt", "text.txt"})); // nothing remains
    tokenized("text.txt -o out -q");
    EXPECT_TRUE(says(failed("out_train_000000.bin -o again"), {"is already a shard of tokens"}));
    run("gzip -k " + dir / "text.txt");
    EXPECT_TRUE(says(failed("text.txt.gz -o again"), {"is compressed", "gzip -dc"}));
}

TEST_F(TokenizeProgram, AFullDiskLeavesEarlierShards) {
    write_bytes(dir / "small.txt", "some text\n");
    tokenized("small.txt -o out");
    std::string before = read_bytes(dir / "out_train_000000.bin");
    write_bytes(dir / "text.txt", prose(8'000'000));
    // A file size limit (in KiB) stands in for a full disk.
    Finished full = run("cd '" + dir.path + "' && ulimit -f 1000 && " +
                        fs::absolute(program).string() + " text.txt -o out --shard-tokens 1M");
    EXPECT_EQ(full.status, 1);
    EXPECT_TRUE(says(full.output, {"tokenize: cannot write", "Nothing is left of it"}));
    EXPECT_EQ(read_bytes(dir / "out_train_000000.bin"), before);
    EXPECT_EQ(names(), (std::vector<std::string>{"out_tokenizer", "out_train_000000.bin",
                                                 "out_val_000000.bin", "small.txt", "text.txt"}));
}

TEST_F(TokenizeProgram, CtrlCLeavesNothing) {
    // It is waiting for the pipe when the signal comes.
    Finished finished =
        run("cd '" + dir.path + "' && { yes 'some text' | head -c 9000000; sleep 1.2; } | " +
            "timeout --preserve-status -s INT 0.7 " + fs::absolute(program).string() +
            " -o out; echo exit $?");
    EXPECT_TRUE(says(finished.output, {"tokenize: interrupted", "exit 1"}));
    EXPECT_EQ(names(), (std::vector<std::string>{}));
}

TEST_F(TokenizeProgram, PadsAndCutsDocuments) {
    const std::string separator = " --doc-separator '<|end|>'";
    const std::string longer = prose(600'000); // in several parts, on several threads
    write_bytes(dir / "text.txt",
                "ab\n<|end|>\n<|end|>\nabcdef\n<|end|>\n" + longer + "\n<|end|>\nabc\n<|end|>\n");
    std::string summary = tokenized(
        "text.txt -o out --val-fraction 0 --pad-documents 5 --shard-tokens 12" + separator);
    EXPECT_TRUE(says(summary, {"4 documents", "20 tokens of bytes", "windows of 5",
                               "50.0% of the documents are longer and cut",
                               "5.0% of the tokens are padding"}));
    // The empty document is dropped; 12 tokens per shard are 2 windows.
    EXPECT_TRUE(fs::exists(dir / "out_train_000001.bin"));
    const int e = 256;
    std::vector<int> expected = {'a', 'b', '\n', e, e, 'a', 'b', 'c', 'd', e};
    for (int token : bytes_of(longer.substr(0, 4))) expected.push_back(token);
    for (int token : {e, int('a'), int('b'), int('c'), int('\n'), e}) expected.push_back(token);
    EXPECT_EQ(tokens("out_train_*.bin"), expected);
    ShardSource source(dir / "out_train_*.bin");
    EXPECT_EQ(source.window(), 5);
    EXPECT_EQ(source.parts(), (std::vector<uint64_t>{10, 10}));

    // Each file a document
    write_bytes(dir / "a.txt", "xyz");
    write_bytes(dir / "b.txt", "w");
    tokenized("a.txt b.txt -o two --val-fraction 0 --pad-documents 3");
    EXPECT_EQ(tokens("two_train_*.bin"), (std::vector<int>{'x', 'y', e, 'w', e, e}));

    EXPECT_TRUE(says(failed("text.txt -o bad --pad-documents 5"), {"--doc-separator", "whole"}));
    EXPECT_TRUE(
        says(failed("text.txt -o bad --pad-documents 1 --val-fraction 0"), {"--pad-documents 1"}));
    EXPECT_TRUE(says(failed("text.txt -o bad --pad-documents x"), {"--pad-documents"}));
    EXPECT_FALSE(fs::exists(dir / "bad_train_000000.bin"));
}

TEST_F(TokenizeProgram, FilesThatAreNotTextAreNamed) {
    std::string wide;
    for (char c : std::string("hello world, this is text\n")) wide += {c, '\0'};
    std::string swapped;
    for (size_t i = 0; i < wide.size(); i += 2) swapped += {wide[i + 1], wide[i]};
    std::string wider;
    for (char c : std::string("hello\n")) wider += {c, '\0', '\0', '\0'};
    const std::tuple<std::string, const char*, const char*> cases[] = {
        {"\xff\xfe" + wide, "UTF-16LE", "iconv -f UTF-16 -t UTF-8"},
        {"\xfe\xff" + swapped, "UTF-16BE", "iconv -f UTF-16 -t UTF-8"},
        {wide, "UTF-16LE", "iconv -f UTF-16LE -t UTF-8"},
        {swapped, "UTF-16BE", "iconv -f UTF-16BE -t UTF-8"},
        {std::string("\xff\xfe\0\0", 4) + wider, "UTF-32LE", "iconv -f UTF-32 -t UTF-8"},
        {wider, "UTF-32LE", "iconv -f UTF-32LE -t UTF-8"},
        {"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer",
         "git lfs"},
        {"\x1f\x8b\x08", "compressed", "gzip -dc"}};
    for (const auto& [bytes, what, advice] : cases) {
        write_bytes(dir / "x.txt", bytes);
        EXPECT_TRUE(says(failed("x.txt -o out"), {"x.txt is", what, advice}));
        EXPECT_TRUE(says(failed("-o out <x.txt"), {"stdin is", what}));
    }
    EXPECT_EQ(names(), (std::vector<std::string>{"x.txt"}));
    // A few zeros are reported.
    write_bytes(dir / "x.txt", prose(1000) + std::string(3, '\0') + prose(1000));
    EXPECT_TRUE(says(tokenized("x.txt -o out"), {"3 bytes of the input are 0"}));
}

TEST_F(TokenizeProgram, OneDocumentHasNoValidation) {
    write_bytes(dir / "one.txt", "one text\n<|end|>\n");
    const std::string with = tokenized("one.txt -q -o a --doc-separator '<|end|>'");
    EXPECT_TRUE(says(with, {"one document", "no validation tokens"}));
    EXPECT_EQ(with.find("no line of"), std::string::npos) << with;
    EXPECT_TRUE(says(tokenized("one.txt -q -o a --doc-separator '#'"),
                     {"no line of --doc-separator", "no validation tokens"}));
}

TEST_F(TokenizeProgram, MessagesHaveNoControlCharacters) {
    const std::string output = failed("\"$(printf 'no\\033[31m.txt')\" -o out");
    EXPECT_EQ(output.find('\x1b'), std::string::npos);
    EXPECT_TRUE(says(output, {"cannot open no^[[31m.txt"}));
}

#ifdef LNS_SENTENCEPIECE
TEST_F(TokenizeProgram, DocumentsBeginWithBosIfTheTokenizerSaysSo) {
    fs::create_directory(dir / "model");
    fs::copy_file(fixtures + "/exact.model", dir / "model/tokenizer.model");
    write_bytes(dir / "model/tokenizer_config.json", R"({"add_bos_token": true})");
    write_bytes(dir / "text.txt", "the\n#\nfox\n");
    tokenized("text.txt -q -o out --val-fraction 0 --doc-separator '#' --tokenizer model");
    const auto tokenizer = load_tokenizer(dir / "out_tokenizer");
    const std::vector<int> bos = {1}, eos = {2};
    EXPECT_EQ(tokens("out_train_*.bin"),
              bos + tokenizer->encode("the\n") + eos + bos + tokenizer->encode("fox\n") + eos);
}
#endif

// Links, folders and devices with the set's names are not replaced.
TEST_F(TokenizeProgram, OnlyPlainFilesAreReplaced) {
    write_bytes(dir / "text.txt", prose(1000));
    write_bytes(dir / "precious", "precious");
    fs::create_symlink("precious", dir / "out_train_000000.bin");
    EXPECT_TRUE(says(failed("text.txt -o out"), {"out_train_000000.bin is a symbolic link"}));
    fs::remove(dir / "out_train_000000.bin");
    run("mkfifo '" + dir / "out_val_000003.bin'");
    EXPECT_TRUE(says(failed("text.txt -o out"), {"out_val_000003.bin is not a regular file"}));
    fs::remove(dir / "out_val_000003.bin");
    fs::create_directory(dir / "elsewhere");
    fs::create_directory_symlink("elsewhere", dir / "out_tokenizer");
    EXPECT_TRUE(says(failed("text.txt -o out"), {"out_tokenizer is a symbolic link"}));
    fs::remove(dir / "out_tokenizer");
    fs::create_symlink("precious", dir / "out.lock");
    EXPECT_TRUE(says(failed("text.txt -o out"), {"out.lock", "symbolic link"}));
    fs::remove(dir / "out.lock");
    EXPECT_EQ(read_bytes(dir / "precious"), "precious");
    tokenized("text.txt -o out");
}

// dev/test/publish_test.cpp kills at every step; here the program is killed while it renames.
TEST_F(TokenizeProgram, AKillLeavesOneSet) {
    write_bytes(dir / "A", std::string(8000, 'A'));
    write_bytes(dir / "B", std::string(6000, 'B'));
    auto shown = [&] {
        std::vector<int> all = tokens("out_train_*.bin") + tokens("out_val_*.bin");
        const bool one =
            std::all_of(all.begin(), all.end() - 1, [&](int t) { return t == all[0]; });
        return one ? cat(char(all[0]), all.size()) : "mixed";
    };
    const std::string flags = " -q --threads 1 --shard-tokens 100 -o out ";
    const std::string whole[] = {"A8001", "B6001"};
    tokenized(flags + "A");
    int kills = 0;
    for (uint64_t i = 0; i < 16; i++) {
        const std::string before = shown(), wanted = whole[i % 2];
        const Finished killed =
            tokenize(flags + (i % 2 ? "B" : "A") + " & p=$!; sleep " +
                     std::to_string(0.001 * random_below(40, 5, 0, i)) + "; kill -9 $p; wait $p");
        kills += killed.status == 137;
        const std::string after = shown();
        ASSERT_TRUE(after == before || after == wanted) << after << " after " << before;
    }
    EXPECT_GT(kills, 0);
    tokenized(flags + "A");
    EXPECT_EQ(shown(), whole[0]);
    for (const std::string& name : names()) EXPECT_NE(name[0], '.') << name; // cleaned up
}
