// Chat templates, the Jinja they are written in, and what a model learns of a conversation.
#include "dev/test/data_helpers.h"
#include "gpt/data/chat.h"
#include "gpt/data/instructions.h"
#include "gpt/data/jinja.h"
#include "gpt/data/loader.h"

#include <gtest/gtest.h>
#include <map>
#include <numeric>
#include <set>

using namespace lns;
using namespace lns::test;

namespace {

using Json = nlohmann::ordered_json;

std::string rendered(const std::string& text, const Json& variables = Json::object()) {
    return Jinja(text, "t").render(variables).text;
}

std::string render_error(const std::string& text) {
    return error_of([&] { rendered(text); });
}

const Messages question_and_answer = {{{"role", "user"}, {"content", "Hi"}},
                                      {{"role", "assistant"}, {"content", "Yes"}}};

// The learned parts of an example of the byte tokenizer, each end-of-text as '$'.
std::string learned_text(const Example& example) {
    std::string text;
    for (size_t i = 0; i < example.tokens.size(); i++) {
        if (!example.learned[i]) continue;
        text += example.tokens[i] == 256 ? '$' : char(example.tokens[i]);
    }
    return text;
}

std::string whole_text(const Example& example) {
    std::string text;
    for (int token : example.tokens) text += token == 256 ? '$' : char(token);
    return text;
}

Record record(const std::string& json) { return {"f.jsonl, line 7", parse_json(json, "f")}; }

} // namespace

// What jinja2 3.1.6 prints, in the environment of transformers' apply_chat_template.
TEST(Jinja, PrintsWhatJinja2Prints) {
    const std::vector<std::pair<const char*, const char*>> cases = {
        {"a{% if x %}\n b\n  {% else %}\n c\n{% endif %}\nd", "a c\nd"},
        {"  {%- if x -%}  y  {%- endif -%}  z", "z"},
        {"{# c #}\n  a\n", "  a"},
        {"{{ 'a' ~ 1 ~ true ~ none ~ 1.5 }}|{{ [1,'x',{'a':none}] }}|{{ {'a':[1,'é']} | tojson }}",
         "a1TrueNone1.5|[1, 'x', {'a': None}]|{\"a\": [1, \"é\"]}"},
        {"{% for c in 'aé' %}{{ loop.index }}{{ c }}{{ ',' if not loop.last }}{% else %}none{% "
         "endfor %}",
         "1a,2é"},
        {"{% for i in [1,2,3,4] if i % 2 == 0 %}{{ i }}/{{ loop.length }} {% endfor %}",
         "2/2 4/2 "},
        {"{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% set k = "
         "i %}{% endfor %}{{ ns.n }}{{ k }}",
         "3"},
        {"{{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }}", "-4 2 3.5"},
        {"{{ 'a,b'.split(',')[-1] }}{{ 'Hello'[1:4] }}{{ 'Hello'[::-1] }}{{ ' x '.strip() }}",
         "bellolleHx"},
        {"{{ undefined_name is defined }}{{ undefined_name | default('D') }}{{ x is none }}{{ 'a' "
         "in 'cab' }}{{ 1 not in [2] }}",
         "FalseDFalseTrueTrue"},
        {"{% set b %}in{% endset %}[{{ b | upper }}]", "[IN]"},
        {"{% for a, b in {'k': 1}.items() %}{{ a }}={{ b }}{% endfor %}", "k=1"},
        {"{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break "
         "%}{% endif %}{{ i }}{% endfor %}",
         "02"},
        {"{{ [{'r':'u'},{'r':'a'}] | selectattr('r','equalto','u') | list | length }}{{ 'x' if "
         "false else 'y' }}{{ not true or true }}",
         "1yTrue"}};
    for (const auto& [text, expected] : cases)
        EXPECT_EQ(rendered(text, {{"x", false}}), expected) << text;
}

TEST(Jinja, ErrorsNameTheLine) {
    EXPECT_TRUE(says(render_error("a\n{% macro f() %}{% endmacro %}"),
                     {"t: line 2", "the statement 'macro' is not supported"}));
    EXPECT_TRUE(says(render_error("{% if x %}\n"), {"line 1", "no 'endif'"}));
    EXPECT_TRUE(says(render_error("\n{{ 1 + }}"), {"line 2", "expected a value"}));
    EXPECT_TRUE(says(render_error("{{ 'a }}"), {"line 1"}));
    EXPECT_TRUE(says(render_error("{{ x.y }}"), {"undefined", "attribute y"}));
    EXPECT_TRUE(says(render_error("{{ 'a' + 1 }}"), {"'+' between a string and a number"}));
    EXPECT_TRUE(says(render_error("{{ 'a' | nope }}"), {"filter nope"}));
    EXPECT_TRUE(says(render_error("{{ raise_exception('Roles must alternate') }}"),
                     {"t: Roles must alternate"}));
}

TEST(Jinja, TemplatesFromElsewhereEnd) {
    EXPECT_TRUE(says(render_error("{% for i in range(100000) %}{% for j in range(100000) %}{% "
                                  "endfor %}{% endfor %}"),
                     {"does not end"}));
    EXPECT_TRUE(says(render_error("{{ range(10000000) }}"), {"more than 100000"}));
    EXPECT_TRUE(says(render_error("{{ " + std::string(100000, '(') + "1 }}"), {"nested"}));
    EXPECT_TRUE(says(render_error("{{ 'a' * 9999999999 }}"), {"too often"}));
    for (const char* link : {"+1", "[0]", "|list", " and 1", ".a", " if 1 else 1", " is defined"}) {
        std::string chain = "{{ x";
        for (int i = 0; i < 100000; i++) chain += link;
        EXPECT_TRUE(says(render_error(chain + " }}"), {"line 1", "more than 1"})) << link;
    }
    std::string blocks;
    for (int i = 0; i < 100000; i++) blocks += "{% if 1 %}";
    EXPECT_TRUE(says(render_error(blocks), {"nested"}));
}

TEST(Chat, TemplatesRenderAsTheirSourcesDo) {
    const auto bytes = load_tokenizer("bytes");
    const Messages messages = {{{"role", "system"}, {"content", "S"}},
                               {{"role", "user"}, {"content", " Hi "}}};
    EXPECT_EQ(ChatTemplate::load("chatml").prompt(messages, *bytes),
              "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
              "<|im_start|>assistant\n");
    EXPECT_EQ(ChatTemplate::load("llama-3").prompt(messages, *bytes),
              "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n");
    const Messages instruction =
        to_messages(parse_json(R"({"instruction": "Add.", "input": "1 2", "output": "3"})", "f"));
    EXPECT_EQ(ChatTemplate::load("alpaca").prompt(Messages::array({instruction[0]}), *bytes),
              "Below is an instruction that describes a task, paired with an input that provides "
              "further context. Write a response that appropriately completes the request.\n\n"
              "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n");
    EXPECT_EQ(ChatTemplate::load("plain").prompt(Messages::array({instruction[0]}), *bytes),
              "Add.\n\n1 2");
}

TEST(Chat, AnswersAndTheirEndsAreLearned) {
    const auto bytes = load_tokenizer("bytes");
    auto learned = [&](const std::string& name, const Messages& messages) {
        return learned_text(encode_conversation(messages, ChatTemplate::load(name), *bytes, false));
    };
    EXPECT_EQ(learned("alpaca", question_and_answer), "Yes$");
    EXPECT_EQ(learned("plain", question_and_answer), "Yes$");
    EXPECT_EQ(learned("chatml", question_and_answer), "Yes<|im_end|>\n");
    EXPECT_EQ(learned("llama-3", question_and_answer), "Yes<|eot_id|>");
    Messages two = question_and_answer;
    two.insert(two.end(), question_and_answer.begin(), question_and_answer.end());
    EXPECT_EQ(learned("alpaca", two), "Yes$Yes$");
    const Example all =
        encode_conversation(question_and_answer, ChatTemplate::load("plain"), *bytes, true);
    EXPECT_EQ(whole_text(all), "HiYes$");
    EXPECT_EQ(learned_text(all), "iYes$"); // nothing comes before the first
}

TEST(Chat, GenerationBlocksMarkAnswers) {
    const auto bytes = load_tokenizer("bytes");
    const ChatTemplate format("t", "{% for m in messages %}[{% if m.role == 'assistant' %}{% "
                                   "generation %}{{ m.content }}{% endgeneration %}{% else %}{{ "
                                   "m.content }}{% endif %}]{{ loop.last }}{% endfor %}");
    const Example example = encode_conversation(question_and_answer, format, *bytes, false);
    EXPECT_EQ(whole_text(example), "[Hi]False[Yes]True");
    EXPECT_EQ(learned_text(example), "Yes");
    // Without them, this template's answers cannot be told from what follows.
    const ChatTemplate unmarked(
        "u", "{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}");
    EXPECT_TRUE(
        says(error_of([&] { encode_conversation(question_and_answer, unmarked, *bytes, false); }),
             {"template u", "generation"}));
}

TEST(Chat, RecordsOfThreeKinds) {
    auto messages = [](const char* json) { return to_messages(parse_json(json, "f")); };
    EXPECT_EQ(messages(R"({"prompt": "a", "completion": "b"})"),
              messages(R"({"messages": [{"role": "user", "content": "a"},
                                        {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]})"));
    EXPECT_EQ(messages(R"({"prompt": [{"role": "user", "content": "a"}],
                           "completion": [{"role": "assistant", "content": "b"}]})"),
              messages(R"({"prompt": "a", "completion": "b"})"));
    EXPECT_EQ(messages(R"({"instruction": "a", "output": "b", "more": 1})")[0]["content"], "a");
    auto error = [&](const char* json) { return error_of([&] { messages(json); }); };
    EXPECT_TRUE(says(error(R"({"text": "a"})"), {"instruction", "prompt", "messages"}));
    EXPECT_TRUE(says(error(R"({"instruction": "a"})"), {"no field 'output'"}));
    EXPECT_TRUE(says(error(R"({"prompt": 3, "completion": "b"})"), {"'prompt' is 3"}));
    EXPECT_TRUE(says(error(R"({"messages": [{"role": "user", "content": [{"type": "image"}]}]})"),
                     {"image", "type text"}));
    EXPECT_TRUE(says(error(R"([1])"), {"[1]", "expected an object"}));
}

TEST(Instructions, BrokenLinesAreNamed) {
    auto read = [](const std::string& text) {
        std::vector<std::string> places;
        read_records(text, "f.jsonl", [&](Record record) { places.push_back(record.where); });
        return places;
    };
    EXPECT_EQ(read("{\"a\":1}\n\n{\"a\":2}"),
              (std::vector<std::string>{"f.jsonl, line 1", "f.jsonl, line 3"}));
    EXPECT_EQ(read("\xef\xbb\xbf{\"a\":1}"), (std::vector<std::string>{"f.jsonl, line 1"}));
    EXPECT_EQ(read("\xef\xbb\xbf [{\"a\":1},\n{\"a\":2}]"),
              (std::vector<std::string>{"f.jsonl, record 1", "f.jsonl, record 2"}));
    EXPECT_TRUE(says(error_of([&] { read("{\"a\":1}\n{\"a\":1, \"b\" 2}\n"); }),
                     {"f.jsonl, line 2", "error at column 13"}));
}

TEST(Instructions, EmptyAndLongAnswers) {
    const auto bytes = load_tokenizer("bytes");
    const ChatTemplate plain = ChatTemplate::load("plain");
    InstructionOptions options;
    options.window = 5;
    auto encode = [&](const char* json) {
        return encode_record(record(json), plain, *bytes, options);
    };
    EXPECT_EQ(encode(R"({"prompt": "ab", "completion": " \n"})").kind, Encoded::empty);
    EXPECT_EQ(encode(R"({"prompt": "abcde", "completion": "x"})").kind, Encoded::too_long);
    const Encoded cut = encode(R"({"prompt": "abc", "completion": "xyz"})");
    EXPECT_EQ(cut.kind, Encoded::usable);
    EXPECT_TRUE(cut.cut);
    EXPECT_EQ(learned_text(cut.example), "xy");
    EXPECT_FALSE(encode(R"({"prompt": "abc", "completion": "x"})").cut);
    EXPECT_TRUE(
        says(error_of([&] { encode(R"({"messages": [{"role": "user", "content": "a"}]})"); }),
             {"f.jsonl, line 7", "no answer"}));
}

TEST(Instructions, PackedWindowsHoldWholeExamples) {
    std::vector<Example> windows;
    Packer packer(10, 0, true, [&](const Example& window) { windows.push_back(window); });
    const std::vector<int> lengths = {6, 3, 4, 5, 1, 10, 2};
    for (int length : lengths)
        packer.add({std::vector<int>(size_t(length), length),
                    std::vector<unsigned char>(size_t(length), 1)});
    packer.finish();
    std::map<int, int> found;
    for (const Example& window : windows) {
        ASSERT_EQ(window.tokens.size(), 10u);
        for (size_t i = 0; i < 10; i++) {
            EXPECT_EQ(window.learned[i], window.tokens[i] != 0);
            found[window.tokens[i]]++;
        }
        // The tokens of an example stand together: there are as many runs as numbers.
        const std::set<int> numbers(window.tokens.begin(), window.tokens.end());
        std::vector<int> runs = window.tokens;
        runs.erase(std::unique(runs.begin(), runs.end()), runs.end());
        EXPECT_EQ(runs.size(), numbers.size());
    }
    for (int length : lengths) EXPECT_EQ(found[length], length);
    EXPECT_EQ(windows.size(), 4u); // 6+3+1, 4+5, 10, 2
    EXPECT_EQ(packer.padding, 9u);
}

// The loader's targets are the tokens whose bit is set in the mask, and -1 elsewhere.
TEST(Instructions, MasksOfShardsReachTheTargets) {
    const TemporaryDirectory dir;
    const auto bytes = load_tokenizer("bytes");
    const std::string path = dir / "s_train_000000.bin";
    std::vector<int> tokens(12);
    std::iota(tokens.begin(), tokens.end(), 1);
    const std::vector<unsigned char> learned = {1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1};
    {
        ShardWriter writer(path, bytes->id(), 4, true);
        writer.write(tokens.data(), tokens.size(), learned.data());
        writer.close();
    }
    auto source = std::make_shared<ShardSource>(path);
    source->check_tokens(257);
    Loader loader(source, 4, 1, false);
    std::vector<int> inputs(12), targets(12);
    loader.next(3, inputs.data(), targets.data());
    EXPECT_EQ(inputs, tokens);
    // Of each window's first token there is no prediction.
    EXPECT_EQ(targets, (std::vector<int>{-1, 3, 4, -1, -1, -1, -1, -1, 10, -1, 12, -1}));

    const std::string mask = mask_path(path), right = read_bytes(mask);
    auto error = [&] { return error_of([&] { ShardSource(path).check_tokens(257); }); };
    for (size_t bit = 0; bit < right.size() * 8; bit++) {
        std::string damaged = right;
        damaged[bit / 8] = char(damaged[bit / 8] ^ (1 << bit % 8));
        write_bytes(mask, damaged);
        EXPECT_TRUE(says(error(), {mask, "checksum"}));
    }
    write_bytes(mask, right + "x");
    EXPECT_TRUE(says(error(), {"does not belong", "3 bytes, expected 2"}));
    std::filesystem::remove(mask);
    EXPECT_TRUE(says(error(), {mask, "cannot be read"}));
}
