// Tokenizers described by Hugging Face's files. The expected tokens are those of `tokenizers` 0.23
// with the same files.
#include "dev/test/data_helpers.h"
#include "gpt/base/json.h"
#include "gpt/data/tokenizer.h"

using namespace lns;
using namespace lns::test;
using json = nlohmann::json;

namespace {

const std::string lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
[[maybe_unused]] const std::string fixtures = "dev/test/fixtures/tokenizers/";

} // namespace

#ifdef LNS_PCRE2
namespace {

// GPT-2's characters for bytes, with the byte as id, one merge (" a", 256), and end-of-text (257).
json byte_vocab() {
    json vocab;
    int next = 0x100;
    for (int b = 0; b < 256; b++) {
        const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        const int c = printable ? b : next++;
        vocab[c < 0x80 ? std::string(1, char(c))
                       : std::string{char(0xC0 | c >> 6), char(0x80 | (c & 63))}] = b;
    }
    vocab["\u0120a"] = 256;
    vocab["<|endoftext|>"] = 257;
    return vocab;
}

json tokenizer_json(const json& vocab = byte_vocab()) {
    const json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
    return {{"version", "1.0"},
            {"added_tokens", json::array()},
            {"normalizer", nullptr},
            {"pre_tokenizer", level},
            {"post_processor", nullptr},
            {"decoder", level},
            {"model",
             {{"type", "BPE"},
              {"vocab", vocab},
              {"merges", json::array({json::array({"\u0120", "a"})})}}}};
}

json with_digits(bool each) {
    json all = tokenizer_json();
    all["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", each}}, all["pre_tokenizer"]}}};
    return all;
}

// A folder with tokenizer.json (if not null), or vocab.json and merges.txt, and the configuration.
struct Folder : TemporaryDirectory {
    explicit Folder(const json& tokenizer, const json& config = nullptr) {
        if (!tokenizer.is_null()) {
            write_bytes(*this / "tokenizer.json", tokenizer.dump());
        } else {
            write_bytes(*this / "vocab.json", byte_vocab().dump());
            write_bytes(*this / "merges.txt", "#version: 0.2\n\u0120 a\n");
        }
        if (!config.is_null()) write_bytes(*this / "tokenizer_config.json", config.dump());
    }
    std::unique_ptr<Tokenizer> load() const { return load_tokenizer(path); }
    std::string refused() const {
        return error_of([&] { load_tokenizer(path); });
    }
};

std::vector<int> tokens_of(const Folder& folder, const std::string& text) {
    return folder.load()->encode(text);
}

// The same, saved in a checkpoint and loaded.
void expect_kept(const Folder& folder) {
    TemporaryDirectory saved;
    const auto before = folder.load();
    before->save(saved.path);
    const auto after = load_tokenizer(saved.path);
    EXPECT_EQ(after->id(), before->id());
    EXPECT_EQ(after->bos, before->bos);
    for (const char* text : {"a 12 b", " a", "'tis\n\n1"})
        EXPECT_EQ(after->encode(text), before->encode(text));
}

} // namespace

TEST(TokenizerFiles, TokenizerJsonEqualsThePairOfFiles) {
    const Folder pair(nullptr), one(tokenizer_json());
    EXPECT_EQ(one.load()->id(), pair.load()->id());
    EXPECT_EQ(tokens_of(one, "b a"), (std::vector<int>{'b', 256}));
    EXPECT_EQ(load_tokenizer(one / "tokenizer.json")->id(), pair.load()->id());
    expect_kept(one), expect_kept(pair);
    // Merges were written as one string before 2024.
    json old = tokenizer_json();
    old["model"]["merges"] = json::array({"\u0120 a"});
    EXPECT_EQ(Folder(old).load()->id(), pair.load()->id());
    // tokenizer.json has precedence.
    write_bytes(pair / "tokenizer.json", with_digits(true).dump());
    EXPECT_EQ(pair.load()->id(), Folder(with_digits(true)).load()->id());
}

TEST(TokenizerFiles, OurOwnBytesAreRecognized) {
    TemporaryDirectory dir;
    load_tokenizer("bytes")->save(dir.path);
    EXPECT_EQ(load_tokenizer(dir / "tokenizer.json")->id(), load_tokenizer("bytes")->id());
}

TEST(TokenizerFiles, DigitsAreSplitFirst) {
    const Folder plain(tokenizer_json()), each(with_digits(true)), runs(with_digits(false));
    // "a\n\n1": the rule's lookahead ends where the digits begin.
    json vocab = byte_vocab();
    vocab["\u010a\u010a"] = 258;
    for (json all : {tokenizer_json(), with_digits(true), with_digits(false)}) {
        all["model"]["vocab"] = vocab;
        all["model"]["merges"].push_back(json::array({"\u010a", "\u010a"}));
        const bool digits = all["pre_tokenizer"]["type"] == "Sequence";
        EXPECT_EQ(tokens_of(Folder(all), "a\n\n1"), digits
                                                        ? (std::vector<int>{'a', 258, '1'})
                                                        : (std::vector<int>{'a', '\n', '\n', '1'}));
        all["model"]["vocab"]["12"] = 259;
        all["model"]["merges"].push_back(json::array({"1", "2"}));
        const bool apart = digits && all["pre_tokenizer"]["pretokenizers"][0]["individual_digits"];
        EXPECT_EQ(tokens_of(Folder(all), "12"),
                  apart ? (std::vector<int>{'1', '2'}) : (std::vector<int>{259}));
    }
    EXPECT_NE(plain.load()->id().fingerprint, each.load()->id().fingerprint);
    EXPECT_NE(runs.load()->id().fingerprint, each.load()->id().fingerprint);
    expect_kept(each), expect_kept(runs);
    // Encoding in parts gives the tokens of the whole.
    const auto tokenizer = each.load();
    const std::string text = "a 12 a\n\n1 a1a 3 \u00b2 a's 4's\n5";
    const std::vector<int> whole = tokenizer->encode(text);
    for (size_t end = 1; end <= text.size(); end++) {
        const size_t cut = tokenizer->safe_cut(text.substr(0, end));
        std::vector<int> parts = tokenizer->encode(text.substr(0, cut));
        for (int token : tokenizer->encode_continuation(text.substr(cut))) parts.push_back(token);
        EXPECT_EQ(parts, whole) << cut;
    }
}

TEST(TokenizerFiles, AddPrefixSpace) {
    json all = tokenizer_json();
    all["pre_tokenizer"]["add_prefix_space"] = true;
    const Folder by_json(all), plain(nullptr);
    const Folder by_config(nullptr,
                           {{"tokenizer_class", "GPT2Tokenizer"}, {"add_prefix_space", true}});
    for (const Folder* folder : {&by_json, &by_config}) {
        EXPECT_EQ(tokens_of(*folder, "a"), (std::vector<int>{256}));
        EXPECT_EQ(tokens_of(*folder, " a"), (std::vector<int>{256}));
        EXPECT_EQ(tokens_of(*folder, "\na"), (std::vector<int>{' ', '\n', 'a'}));
        EXPECT_EQ(tokens_of(*folder, ""), (std::vector<int>{}));
        EXPECT_EQ(folder->load()->encode_continuation("a"), (std::vector<int>{'a'}));
        EXPECT_NE(folder->load()->id(), plain.load()->id());
        expect_kept(*folder);
    }
    EXPECT_TRUE(says(Folder(all, {{"add_prefix_space", false}}).refused(),
                     {"add_prefix_space false", "says otherwise"}));
    EXPECT_TRUE(says(Folder(nullptr, {{"add_prefix_space", "yes"}}).refused(),
                     {"add_prefix_space", "yes"}));
    // null is ignored
    EXPECT_EQ(Folder(nullptr, {{"add_prefix_space", nullptr}}).load()->id(), plain.load()->id());
}

TEST(TokenizerFiles, AddBosToken) {
    EXPECT_EQ(Folder(nullptr).load()->encode_prompt("b"), (std::vector<int>{'b'}));
    const Folder yes(nullptr, {{"add_bos_token", true}});
    EXPECT_EQ(yes.load()->encode_prompt("b"), (std::vector<int>{257, 'b'}));
    EXPECT_EQ(yes.load()->encode("b"), (std::vector<int>{'b'}));
    EXPECT_EQ(yes.load()->id(), Folder(nullptr).load()->id());
    expect_kept(yes);
    const Folder other(nullptr, {{"add_bos_token", true}, {"bos_token", {{"content", "!"}}}});
    EXPECT_EQ(other.load()->encode_prompt(""), (std::vector<int>{'!'}));
    EXPECT_TRUE(says(Folder(nullptr, {{"add_bos_token", true}, {"bos_token", "<s>"}}).refused(),
                     {"add_bos_token", "<s>"}));
    json all = tokenizer_json();
    all["post_processor"] = {
        {"type", "TemplateProcessing"},
        {"single", {{{"SpecialToken", {{"id", "<|endoftext|>"}}}}, {{"Sequence", {{"id", "A"}}}}}}};
    EXPECT_EQ(Folder(all).load()->encode_prompt("b"), (std::vector<int>{257, 'b'}));
}

TEST(TokenizerFiles, AVocabularyMayLackBytes) {
    json all = tokenizer_json();
    all["model"]["vocab"].erase("b");
    const Folder left_out(all);
    // Dropped bytes do not separate their neighbours.
    EXPECT_EQ(tokens_of(left_out, "c ba"), (std::vector<int>{'c', 256}));
    EXPECT_EQ(tokens_of(left_out, "b"), (std::vector<int>{}));
    EXPECT_EQ(tokens_of(left_out, std::string(100, 'b')), (std::vector<int>{}));
    EXPECT_EQ(left_out.load()->count_unencodable("abba"), 2u);
    EXPECT_FALSE(left_out.load()->has('b'));
    expect_kept(left_out);

    all["model"]["unk_token"] = "!";
    EXPECT_EQ(tokens_of(Folder(all), "c bba"), (std::vector<int>{'c', ' ', '!', '!', 'a'}));
    EXPECT_NE(Folder(all).load()->id(), left_out.load()->id());
    expect_kept(Folder(all));
    all["model"]["fuse_unk"] = true;
    EXPECT_EQ(tokens_of(Folder(all), "c bba"), (std::vector<int>{'c', ' ', '!', 'a'}));
    const std::vector<int> many = tokens_of(Folder(all), "c" + std::string(100, 'b') + "a");
    EXPECT_EQ(many, (std::vector<int>{'c', '!', 'a'}));
    // encode never returns end-of-text.
    all["model"]["unk_token"] = "<|endoftext|>";
    EXPECT_EQ(tokens_of(Folder(all), "bcb"), (std::vector<int>{'c'}));
    all["model"]["unk_token"] = "<unk>";
    EXPECT_TRUE(says(Folder(all).refused(), {"unk_token", "<unk>"}));
}

TEST(TokenizerFiles, AddedTokens) {
    json all = tokenizer_json();
    all["added_tokens"] = {{{"id", 257}, {"content", "<|endoftext|>"}, {"special", true}},
                           {{"id", 300}, {"content", "<|im_start|>"}, {"special", true}}};
    const Folder special(all);
    const auto tokenizer = special.load();
    EXPECT_EQ(tokenizer->vocab_size(), 301);
    EXPECT_EQ(tokenizer->encode("<|im_start|>").size(), 12u); // ordinary characters
    EXPECT_EQ(tokenizer->decode({'b', 300, 'c'}), "bc");
    EXPECT_FALSE(tokenizer->has(299)); // a gap
    EXPECT_FALSE(tokenizer->has(301));
    expect_kept(special);
    const Folder by_config(
        nullptr,
        {{"added_tokens_decoder", {{"300", {{"content", "<|im_start|>"}, {"special", true}}}}}});
    EXPECT_EQ(by_config.load()->id(), tokenizer->id());
    expect_kept(by_config);

    // The name of a special token stands for it where the caller says so.
    EXPECT_EQ(tokenizer->encode("b<|im_start|>c", Specials::spelled),
              (std::vector<int>{'b', 300, 'c'}));
    EXPECT_EQ(tokenizer->decode({'b', 300, 'c'}, Specials::spelled), "b<|im_start|>c");

    // A token that is not special stands for its text everywhere.
    all["added_tokens"][1]["special"] = false;
    EXPECT_EQ(tokens_of(Folder(all), "b<|im_start|>c"), (std::vector<int>{'b', 300, 'c'}));
    EXPECT_EQ(Folder(all).load()->decode({'b', 300, 'c'}), "b<|im_start|>c");
    EXPECT_NE(Folder(all).load()->id(), tokenizer->id());
    const Folder beside(nullptr);
    write_bytes(beside / "added_tokens.json", R"({"<new>": 258})");
    EXPECT_EQ(tokens_of(beside, "b<new>"), (std::vector<int>{'b', 258}));
    write_bytes(beside / "tokenizer_config.json", R"({"pad_token": "<new>"})");
    EXPECT_EQ(beside.load()->vocab_size(), 259);
    expect_kept(beside);
    all["added_tokens"][1] = {{"id", 300}, {"content", "<|endoftext|>"}, {"special", true}};
    EXPECT_TRUE(says(Folder(all).refused(), {"<|endoftext|>", "257 and 300"}));
}

TEST(TokenizerFiles, UnsupportedSettingsAreNamed) {
    struct Change {
        std::string at;
        json value;
        std::string name;
    };
    for (const Change& c : std::vector<Change>{
             {"/model/type", "WordPiece", "WordPiece"},
             {"/model/end_of_word_suffix", "</w>", "end_of_word_suffix"},
             {"/model/dropout", 0.1, "dropout"},
             {"/normalizer", {{"type", "Nmt"}}, "Nmt"},
             {"/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Nmt"}}}}}, "Nmt"},
             {"/pre_tokenizer", {{"type", "UnicodeScripts"}}, "UnicodeScripts"},
             {"/post_processor",
              {{"type", "TemplateProcessing"},
               {"single", {{{"SpecialToken", {{"id", "!"}}}}, {{"SpecialToken", {{"id", "a"}}}}}}},
              "several tokens before"},
             {"/decoder", {{"type", "CTC"}}, "CTC"}}) {
        json all = tokenizer_json();
        all[json::json_pointer(c.at)] = c.value;
        const std::string sentence = Folder(all).refused();
        EXPECT_TRUE(says(sentence, {"not supported yet", c.name})) << c.at;
        EXPECT_EQ(sentence.find("damaged"), std::string::npos) << sentence;
    }
    const Folder pair(nullptr, {{"tokenizer_class", "Qwen2Tokenizer"}});
    EXPECT_TRUE(says(pair.refused(), {"Qwen2Tokenizer", "not supported yet"}));
    // Malformed parts are errors with a message.
    for (const char* at : {"/model", "/model/vocab", "/model/merges", "/added_tokens",
                           "/model/merges/0", "/post_processor", "/normalizer", "/decoder",
                           "/pre_tokenizer", "/pre_tokenizer/use_regex"})
        for (const json& value : {json(7), json("x"), json(json::array({1})), json({{"a", 1}})}) {
            json all = tokenizer_json();
            all[json::json_pointer(at)] = value;
            EXPECT_NE(Folder(all).refused(), "") << at << value;
        }
}

TEST(TokenizerFiles, RegexesThatWouldDifferAreNamed) {
    auto refused = [](const std::string& regex) {
        json all = tokenizer_json();
        all["pre_tokenizer"] = {
            {"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Split"}, {"pattern", {{"Regex", regex}}}}, all["pre_tokenizer"]}}};
        return Folder(all).refused();
    };
    EXPECT_EQ(refused(R"((?i:'s)|\s+(?!\S)|\p{N}{1,3}+|[^\s\w]++|\u00e9|\h)"), "");
    EXPECT_TRUE(says(refused("(a"), {"regex \"(a\"", "PCRE2 refuses", "at byte 2"}));
    EXPECT_TRUE(says(refused("[a[b]]"), {"brackets in brackets", "not supported yet"}));
    EXPECT_TRUE(says(refused("[a&&b]"), {"&&", "not supported yet"}));
    EXPECT_TRUE(says(refused(R"([\W])"), {"\\W in brackets", "not supported yet"}));
    EXPECT_TRUE(says(refused("a{2,3}+"), {"{2,3}+", "not supported yet"}));
    EXPECT_TRUE(says(refused("\\p{Nonsense}"), {"PCRE2 refuses"}));
}

TEST(TokenizerFiles, TheTokensAroundATextAreThoseOfTransformers) {
    json all = tokenizer_json();
    auto around = [&](const json& config) {
        const auto tokenizer = Folder(all, config).load();
        return std::pair(tokenizer->bos, tokenizer->eos);
    };
    EXPECT_EQ(around(nullptr), std::pair(-1, -1));
    all["post_processor"] = {{"type", "RobertaProcessing"}, {"sep", {"!", 33}}, {"cls", {"a", 97}}};
    EXPECT_EQ(around(nullptr), std::pair('a' + 0, '!' + 0));
    // transformers 5 ignores the configuration's flags beside a tokenizer.json.
    EXPECT_EQ(around({{"add_bos_token", false}, {"eos_token", "b"}}), std::pair('a' + 0, '!' + 0));
    const Folder pair(nullptr, {{"add_eos_token", true}, {"eos_token", "b"}});
    EXPECT_EQ(pair.load()->eos, 'b');
    EXPECT_EQ(pair.load()->bos, -1);
    expect_kept(pair);
    all["post_processor"]["cls"] = 3;
    EXPECT_TRUE(says(Folder(all).refused(), {"cls", "expected a list"}));
}

TEST(TokenizerFiles, ManyEqualCharactersTakeLinearTime) {
    const Folder folder(tokenizer_json());
    const auto tokenizer = folder.load();
    for (const char* unit : {" ", "\n", "a", " a", "1", "\u4e2d", "<|", "'"}) {
        std::string text;
        while (text.size() < 1'000'000) text += unit;
        EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << unit;
    }
}

TEST(TokenizerFiles, OtherKindsAreNamed) {
    TemporaryDirectory dir;
    write_bytes(dir / "vocab.txt", "[PAD]\n[UNK]\n");
    EXPECT_TRUE(
        says(error_of([&] { load_tokenizer(dir.path); }), {"not supported yet", "WordPiece"}));
    write_bytes(dir / "tekken.json", R"({"config": {}, "vocab": []})");
    EXPECT_TRUE(says(error_of([&] { load_tokenizer(dir / "tekken.json"); }),
                     {"tekken.json", "not supported yet"}));
}

TEST(TokenizerFiles, LfsPointersAreRecognized) {
    for (const char* name :
         {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}) {
        const Folder folder(nullptr);
        write_bytes(folder / name, lfs);
        EXPECT_TRUE(says(folder.refused(), {name, "Git LFS pointer"}));
    }
}
#endif

#ifdef LNS_SENTENCEPIECE
namespace {

struct ModelFolder : TemporaryDirectory {
    explicit ModelFolder(const json& config) {
        write_bytes(*this / "tokenizer.model", read_bytes(fixtures + "exact.model"));
        write_bytes(*this / "tokenizer_config.json", config.dump());
    }
    std::string refused() const {
        return error_of([&] { load_tokenizer(path); });
    }
};

} // namespace

TEST(TokenizerFiles, SentencePieceRespectsItsConfiguration) {
    const auto plain = load_tokenizer(fixtures + "exact.model");
    const std::vector<int> tokens = plain->encode("the fox");
    EXPECT_EQ(plain->encode_prompt("the fox"), tokens);
    std::vector<int> with_bos = tokens;
    with_bos.insert(with_bos.begin(), 1);
    for (const json& config :
         {json{{"add_bos_token", true}}, json{{"tokenizer_class", "LlamaTokenizer"}},
          json{{"add_bos_token", true}, {"bos_token", {{"content", "<s>"}}}}}) {
        const ModelFolder folder(config);
        const auto tokenizer = load_tokenizer(folder.path);
        EXPECT_EQ(tokenizer->id(), plain->id());
        EXPECT_EQ(tokenizer->encode_prompt("the fox"), with_bos);
        // If the file is named, its directory's other files are respected.
        EXPECT_EQ(load_tokenizer(folder / "tokenizer.model")->bos, 1);
        TemporaryDirectory saved;
        tokenizer->save(saved.path);
        EXPECT_EQ(load_tokenizer(saved.path)->bos, 1);
    }
    EXPECT_EQ(
        load_tokenizer(
            ModelFolder(json{{"add_bos_token", false}, {"tokenizer_class", "LlamaTokenizer"}}).path)
            ->bos,
        -1);
    EXPECT_TRUE(says(ModelFolder(json{{"add_bos_token", true}, {"bos_token", "<bos>"}}).refused(),
                     {"add_bos_token", "<bos>"}));
    EXPECT_TRUE(says(ModelFolder(json{{"tokenizer_class", "XLMRobertaTokenizer"}}).refused(),
                     {"XLMRobertaTokenizer", "not supported yet"}));
    EXPECT_TRUE(says(
        ModelFolder(json{{"added_tokens_decoder", {{"9999", {{"content", "<x>"}}}}}}).refused(),
        {"<x>", "not supported yet"}));
}

TEST(TokenizerFiles, SentencePieceWithoutItsPrefixSpace) {
    const auto plain = load_tokenizer(fixtures + "exact.model");
    const ModelFolder off(json{{"add_prefix_space", false}}), on(json{{"add_prefix_space", true}});
    const auto tokenizer = load_tokenizer(off.path);
    EXPECT_EQ(load_tokenizer(on.path)->id(), plain->id());
    EXPECT_NE(tokenizer->id(), plain->id());
    EXPECT_EQ(tokenizer->encode(" the fox"), plain->encode("the fox"));
    EXPECT_NE(tokenizer->encode("the fox"), plain->encode("the fox"));
    TemporaryDirectory saved;
    tokenizer->save(saved.path);
    EXPECT_EQ(load_tokenizer(saved.path)->id(), tokenizer->id());
    EXPECT_EQ(load_tokenizer(saved.path)->encode("the fox"), tokenizer->encode("the fox"));
}

TEST(TokenizerFiles, OtherModelsAreNamed) {
    TemporaryDirectory dir;
    write_bytes(dir / "tokenizer.model", "IQ== 0\nIg== 1\n");
    EXPECT_TRUE(
        says(error_of([&] { load_tokenizer(dir.path); }), {"not supported yet", "tiktoken"}));
    write_bytes(dir / "tokenizer.model", lfs);
    EXPECT_TRUE(says(error_of([&] { load_tokenizer(dir.path); }), {"Git LFS pointer"}));
}
#endif
