// Benchmarks: the prompts of lm-evaluation-harness, written out by hand; scores in packed batches
// against one request at a time; accuracies and their errors.
#include "dev/test/program_helpers.h"

#include "gpt/run/export.h"
#include "gpt/run/score.h"
#include "gpt/run/task_results.h"
#include "gpt/run/tasks.h"

#include <nlohmann/json.hpp>

using namespace lns;
using namespace lns::test;

namespace {

const std::string fixtures = "dev/test/fixtures/tasks";

TaskSettings settings_of(const std::string& data, int fewshot = 0, int64_t limit = 0) {
    TaskSettings s;
    s.data = data, s.fewshot = fewshot, s.limit = limit;
    return s;
}
Task only(const std::string& name, const TaskSettings& s = settings_of(fixtures)) {
    Benchmark b = load_benchmark({name}, s);
    if (b.tasks.size() != 1) fail(name, " is ", b.tasks.size(), " tasks");
    return b.tasks[0];
}

using Texts = std::vector<std::string>;

// The error for a file of these lines.
std::string error_for(const std::string& name, const std::string& lines) {
    TemporaryDirectory dir;
    write_bytes(dir / (name + ".jsonl"), lines);
    return error_of([&] { load_benchmark({name}, settings_of(dir.path)); });
}

// A byte is a token; as SentencePiece does, a space joins the byte behind it.
struct SpaceTokenizer : Tokenizer {
    std::string decode(const int*, size_t, Specials) const override { return ""; }
    bool has(int) const override { return true; }
    TokenizerId id() const override { return {"test", 200, 199, 0}; }
    void save_files(const std::string&) const override {}
    size_t safe_cut(std::string_view) const override { return 0; }

  protected:
    std::vector<int> tokens_of(std::string_view text, Specials, bool) const override {
        std::vector<int> tokens;
        for (size_t i = 0; i < text.size(); i++) {
            const bool joined = text[i] == ' ' && i + 1 < text.size();
            tokens.push_back(static_cast<unsigned char>(text[joined ? ++i : i]) % 100 +
                             (joined ? 100 : 0));
        }
        return tokens;
    }
};

Config model_config_of(const std::string& arch, const std::string& scheme, int L = 3) {
    Config c = architecture(arch);
    c.vocab_size = 50, c.width = 16, c.layers = L, c.heads = 4, c.positions = 24;
    if (arch == "llama") c.kv_heads = 2;
    c.scheme = parse_scheme(scheme);
    c.init_std = 0.3, c.embed_std = 1;
    complete_config(c);
    return c;
}

// Of 2 to 4 choices with contexts of 1 to 12 tokens, some of which begin alike.
std::vector<std::vector<Request>> random_requests(int questions) {
    std::vector<std::vector<Request>> all;
    auto draw = [i = 0](int n) mutable { return int(random_below(uint32_t(n), 9, 1, i++)); };
    std::vector<int> before = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int q = 0; q < questions; q++) {
        std::vector<int> context(q % 3 ? before.begin() : before.end(), before.end());
        for (int n = 1 + draw(5); n > 0; n--) context.push_back(draw(50));
        const int length = q % 4 == 0 ? 1 : 1 + draw(6); // of answers
        std::vector<Request> choices;
        for (int i = 0, n = 2 + draw(3); i < n; i++) {
            Request r = {context, context.size()};
            if (q % 5 == 4) r.tokens[0] = i; // contexts that differ from the first token on
            for (int k = 0; k < length; k++) r.tokens.push_back(draw(50));
            choices.push_back(r);
        }
        all.push_back(choices);
    }
    return all;
}

size_t count(const std::vector<std::vector<Request>>& questions) {
    size_t n = 0;
    for (const auto& q : questions) n += q.size();
    return n;
}

// One request at a time, from whole logits.
std::vector<double> reference(Model& model, const std::vector<std::vector<Request>>& questions) {
    std::vector<double> sums;
    const int V = model.config.vocab_size;
    for (const auto& question : questions)
        for (const Request& r : question) {
            const int T = int(r.tokens.size()) - 1;
            std::vector<float> logits(size_t(T) * V);
            model.logits(r.tokens.data(), 1, T, false, logits.data());
            double sum = 0;
            for (size_t i = r.continuation; i < r.tokens.size(); i++) {
                double total = 0;
                for (int v = 0; v < V; v++) total += std::exp(double(logits[(i - 1) * V + v]));
                sum += double(logits[(i - 1) * V + r.tokens[i]]) - std::log(total);
            }
            sums.push_back(sum);
        }
    return sums;
}

void expect_near(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); i++) EXPECT_NEAR(a[i], b[i], tolerance) << i;
}

Benchmark benchmark_of(const std::vector<int>& golds, bool normalized = true) {
    Benchmark b;
    Task& task = b.tasks.emplace_back();
    task.name = task.alias = "made", task.normalized = normalized;
    for (int gold : golds) {
        Question q;
        q.contexts = {"c"}, q.continuations = {" a", " bcd"}, q.characters = {1, 3}, q.gold = gold;
        task.questions.push_back(q);
    }
    return b;
}

} // namespace

TEST(Tasks, PromptsOfHellaswag) {
    const Task task = only("hellaswag");
    EXPECT_TRUE(task.normalized);
    ASSERT_EQ(task.questions.size(), 3u);
    const Question& q = task.questions[0];
    EXPECT_EQ(q.contexts, Texts{"Making tea: A man boils water. The man"});
    EXPECT_EQ(q.continuations, (Texts{" pours it over the leaves.", " paints a fence.",
                                      "  reads a book. of poems.", " flies to the moon."}));
    EXPECT_EQ(q.characters, (std::vector<int>{25, 15, 24, 18}));
    EXPECT_EQ(q.gold, 0);
    // Of an open bracket nothing is dropped; the answer has 13 characters, two of them of 2 bytes.
    EXPECT_EQ(task.questions[1].contexts,
              Texts{"Gardening: How to plant a tree. Dig a hole. It should be wide [not deep."});
    EXPECT_EQ(task.questions[1].continuations, (Texts{" Put the tree into it.", " Sell the spade.",
                                                      " Sing a  song.", " Öffne die Tür."}));
    EXPECT_EQ(task.questions[1].characters[3], 14);
    EXPECT_EQ(task.questions[1].gold, 2);
    EXPECT_EQ(task.questions[2].contexts, Texts{"Rowing: Two women sit in a boat. Été they"});
}

TEST(Tasks, PromptsOfTheOthers) {
    Question q = only("piqa").questions[1];
    EXPECT_EQ(q.contexts, Texts{"Question: Dry wet shoes \nAnswer:"});
    EXPECT_EQ(q.continuations, (Texts{" put them into the sea", " stuff them with paper"}));
    EXPECT_EQ(q.gold, 1);
    EXPECT_EQ(only("piqa").questions[0].characters[1], 25); // with the space at the end

    q = only("arc_easy").questions[1];
    EXPECT_EQ(q.contexts, Texts{"Question: What melts in the sun?\nAnswer:"});
    EXPECT_EQ(q.continuations, (Texts{" stone", " ice", " sand", " glass", " iron"}));
    EXPECT_EQ(q.gold, 1);
    EXPECT_EQ(only("arc_challenge").questions[0].gold, 1);

    q = only("boolq").questions[0];
    EXPECT_EQ(q.contexts, Texts{"Water of the sea has about 35 grams of salt in a litre.\n"
                                "Question: is the sea salty?\nAnswer:"});
    EXPECT_EQ(q.continuations, (Texts{" no", " yes"}));
    EXPECT_EQ(q.gold, 1);
    EXPECT_FALSE(only("boolq").normalized);
    EXPECT_EQ(only("boolq").version, 2);

    q = only("openbookqa").questions[1];
    EXPECT_EQ(q.contexts, Texts{"A seed needs "});
    EXPECT_EQ(q.continuations, (Texts{" water", " a car", " shoes", " music"}));

    q = only("winogrande").questions[1];
    EXPECT_EQ(q.contexts, (Texts{"Ann thanked Eve, for Ann", "Ann thanked Eve, for Eve"}));
    EXPECT_EQ(q.continuations, Texts{" had helped her."});
    EXPECT_EQ(q.gold, 1);
}

TEST(Tasks, PromptsOfMmlu) {
    const Benchmark b = load_benchmark({"mmlu"}, settings_of(fixtures, 2));
    ASSERT_EQ(b.tasks.size(), 4u);
    const Task& task = b.tasks[0];
    EXPECT_EQ(task.name, "mmlu_abstract_algebra");
    ASSERT_EQ(task.questions.size(), 2u);
    EXPECT_EQ(task.questions[0].contexts,
              Texts{"The following are multiple choice questions (with answers) about abstract "
                    "algebra.\n\n"
                    "What is 0 + 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\n"
                    "What is 1 + 0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
                    "How many sides has polygon 3?\nA. 1\nB. 2\nC. 3\nD. none \nAnswer:"});
    EXPECT_EQ(task.questions[0].continuations, (Texts{" A", " B", " C", " D"}));
    EXPECT_EQ(task.questions[0].gold, 2);

    Texts names;
    for (const TaskGroup& g : b.groups) names.push_back(g.name);
    EXPECT_EQ(names, (Texts{"mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"}));
    EXPECT_EQ(b.groups[0].tasks, (std::vector<int>{0, 1, 2, 3}));
    EXPECT_EQ(b.groups[1].tasks, (std::vector<int>{0, 1}));
    EXPECT_TRUE(says(b.notes.at(0), {"no questions of 53 of mmlu's 57 subjects"}));

    TaskSettings shared = settings_of(fixtures, 0, 5);
    for (const Task& t : load_benchmark({"mmlu"}, shared).tasks) EXPECT_EQ(t.questions.size(), 2u);
    shared.share_limit = true; // 5 of 4 subjects
    for (const Task& t : load_benchmark({"mmlu"}, shared).tasks) EXPECT_EQ(t.questions.size(), 2u);
    shared.limit = 4;
    for (const Task& t : load_benchmark({"mmlu"}, shared).tasks) EXPECT_EQ(t.questions.size(), 1u);
    EXPECT_EQ(load_benchmark({"mmlu_stem"}, shared).groups.at(0).name, "mmlu_stem");
    EXPECT_TRUE(load_benchmark({"mmlu_anatomy"}, shared).groups.empty());
}

TEST(Tasks, LimitsAndCompressedFiles) {
    const Task task = only("hellaswag", settings_of(fixtures, 0, 2));
    EXPECT_EQ(task.questions.size(), 2u);
    EXPECT_EQ(task.in_file, 3);
    if (run("command -v xz").status != 0) GTEST_SKIP() << "xz is not installed here";
    TemporaryDirectory dir;
    const std::string file = dir / "it's.jsonl.xz"; // a name that a shell has to be told of
    ASSERT_EQ(run(cat("xz -c ", fixtures, "/piqa.jsonl >\"", file, "\"")).status, 0);
    std::filesystem::rename(file, dir / "piqa.jsonl.xz");
    EXPECT_EQ(only("piqa", settings_of(dir.path)).questions.size(), 2u);
    write_bytes(dir / "piqa.jsonl.xz", read_bytes(dir / "piqa.jsonl.xz").substr(0, 100));
    EXPECT_TRUE(says(error_of([&] { only("piqa", settings_of(dir.path)); }),
                     {"piqa.jsonl.xz cannot be unpacked"}));
}

TEST(Tasks, WrongFilesAreErrorsWithALine) {
    const std::string good = R"({"goal": "g", "sol1": "a", "sol2": "b", "label": 0})";
    EXPECT_EQ(error_for("piqa", good + "\n\n" + good + "\n"), "");
    EXPECT_TRUE(says(error_for("piqa", good + "\n{\"goal\": \"g\"}\n"),
                     {"piqa.jsonl, line 2: the field 'sol1' is missing; it has goal"}));
    EXPECT_TRUE(says(error_for("piqa", good + "\n" + good.substr(0, 20)),
                     {"piqa.jsonl, line 2 is not valid JSON", "column"}));
    EXPECT_TRUE(says(error_for("piqa", R"({"goal": "g", "sol1": "a", "sol2": "b", "label": 2})"),
                     {"line 1: the label 'label' is 2, expected a number from 0 to 1"}));
    EXPECT_TRUE(says(error_for("piqa", R"({"goal": 3, "sol1": "a", "sol2": "b", "label": 1})"),
                     {"line 1: the field 'goal' has 3, expected text"}));
    EXPECT_TRUE(says(error_for("piqa", "[1]"), {"line 1: found [1], expected an object"}));
    EXPECT_TRUE(says(error_for("piqa", ""), {"is empty"}));
    EXPECT_TRUE(
        says(error_for("arc_easy", R"({"question": "q", "choices": {"text": ["a", "b"], "label":)"
                                   R"( ["A", "B"]}, "answerKey": "C"})"),
             {"the label 'answerKey' is \"C\", expected one of A, B"}));
    EXPECT_TRUE(says(error_for("arc_easy", R"({"question": "q", "choices": ["a", "b"]})"),
                     {"'choices': found [\"a\",\"b\"], expected an object"}));
    EXPECT_TRUE(says(error_for("winogrande", R"({"sentence": "no blank", "option1": "a",)"
                                             R"( "option2": "b", "answer": "1"})"),
                     {"line 1: the field 'sentence' has no _"}));
    EXPECT_TRUE(says(error_for("boolq", R"({"passage": "p", "question": "q", "answer": "yes"})"),
                     {"the label 'answer' is \"yes\""}));
    EXPECT_TRUE(says(error_for("hellaswag", R"({"ctx_a": "a", "ctx_b": "b", "activity_label": )"
                                            R"("l", "endings": ["x", "y"], "label": ""})"),
                     {"the label 'label' is \"\", expected a number from 0 to 1"}));

    TemporaryDirectory dir;
    write_bytes(dir / "mmlu_test.jsonl",
                R"({"question": "q", "subject": "anatomi", "choices": ["1", "2", "3", "4"],)"
                R"( "answer": 0})");
    EXPECT_TRUE(says(error_of([&] { load_benchmark({"mmlu"}, settings_of(dir.path)); }),
                     {"line 1: mmlu has no subject \"anatomi\". Did you mean 'anatomy'?"}));
    EXPECT_TRUE(says(error_of([&] { only("piqa", settings_of(dir.path)); }),
                     {"piqa has no data", "piqa.jsonl.xz", "get.sh evals", "--task-data"}));
    EXPECT_TRUE(says(error_of([&] { only("piqa", settings_of(fixtures, 1)); }),
                     {"piqa has no examples", "piqa_dev.jsonl"}));
    EXPECT_TRUE(says(error_of([&] { load_benchmark({"mmlu"}, settings_of(fixtures, 4)); }),
                     {"has only 3 examples of the task mmlu_abstract_algebra"}));
}

TEST(Tasks, Names) {
    EXPECT_EQ(parse_tasks("piqa,mmlu"), (Texts{"piqa", "mmlu"}));
    EXPECT_TRUE(says(error_of([] { parse_tasks("piqa,helaswag"); }),
                     {"no task 'helaswag'. Did you mean 'hellaswag'?", "winogrande"}));
    EXPECT_TRUE(says(error_of([] { parse_tasks("piqa,piqa"); }), {"named twice"}));
    EXPECT_TRUE(says(error_of([] { parse_tasks("piqa,"); }), {"no task ''"}));
}

TEST(Score, TokensOfAQuestion) {
    const SpaceTokenizer tokenizer;
    Question q;
    q.contexts = {"ab  \n"}, q.continuations = {" e", " dd"}, q.characters = {1, 2};
    // Whitespace that ends the context belongs to the continuation: "ab", "  \n c".
    auto requests = encode_question(tokenizer, q, 100);
    ASSERT_EQ(requests.size(), 2u);
    EXPECT_EQ(requests[0].continuation, 2u);
    EXPECT_EQ(requests[0].tokens, tokenizer.encode("ab  \n e"));
    EXPECT_EQ(requests[1].tokens, tokenizer.encode("ab  \n dd"));
    // From the left; a token more than the longest sequence, for the last is no input.
    requests = encode_question(tokenizer, q, 4);
    EXPECT_EQ(requests[1].tokens.size(), 5u);
    EXPECT_EQ(requests[1].continuation, 1u);
    EXPECT_EQ(requests[1].tokens.back(), tokenizer.encode("d")[0]);
    EXPECT_TRUE(says(error_of([&] { encode_question(tokenizer, q, 3); }),
                     {"has 4 tokens, expected 1 to 3"}));
    // An empty context is the token that begins a text.
    q.contexts = {""};
    requests = encode_question(tokenizer, q, 100);
    EXPECT_EQ(requests[1].tokens, (std::vector<int>{199, 100 + 'd' % 100, 'd' % 100}));
    EXPECT_EQ(requests[1].continuation, 1u);
    // With a tokenizer that can cut.
    const auto bytes = load_tokenizer("bytes");
    q.contexts = {"A question "};
    requests = encode_question(*bytes, q, 100);
    EXPECT_EQ(requests[0].continuation, 10u);
    EXPECT_EQ(requests[0].tokens, bytes->encode("A question  e"));
}

TEST(Score, PackedRequestsAreThoseOneByOne) {
    const auto questions = random_requests(30);
    const Ranks ranks;
    for (const auto& [arch, scheme] :
         std::vector<std::pair<std::string, std::string>>{{"gpt2", "pre"},
                                                          {"llama", "lns"},
                                                          {"olmo2", "olmo2"},
                                                          {"llama", "post"},
                                                          {"mistral", "pre"},
                                                          {"smollm3", "pre"}}) {
        SCOPED_TRACE(arch);
        Config c = model_config_of(arch, scheme);
        if (arch == "mistral") c.window = 5;
        const auto made = make_cpu_model(c, 1, 96, {.purpose = Purpose::score});
        Model& model = *made;
        model.initialize(3);
        const auto expected = reference(model, questions);
        for (int64_t rows : {24, 60, 96}) {
            const auto batches = pack_requests(questions, rows);
            expect_near(score_requests(model, batches, count(questions), ranks), expected, 2e-5);
            for (const ScoreBatch& b : batches) EXPECT_LE(int64_t(b.B) * b.T, rows);
        }
    }
    // What is shared is computed once: contexts, and the examples of questions in a row.
    size_t apart = 0, packed = 0;
    for (const auto& q : questions)
        for (const Request& r : q) apart += r.tokens.size() - 1;
    for (const ScoreBatch& b : pack_requests(questions, 96)) packed += b.inputs.size();
    EXPECT_LT(double(packed), 0.7 * double(apart));
    EXPECT_TRUE(says(error_of([&] { pack_requests(questions, 8); }), {"and a batch 8"}));
    const auto made =
        make_cpu_model(model_config_of("gpt2", "pre"), 1, 96, {.purpose = Purpose::score});
    Model& model = *made;
    double out;
    const int tokens[] = {1, 2}, far[] = {0, 24}, branch[] = {0, 1};
    EXPECT_TRUE(says(error_of([&] {
                         model.score(tokens, 1, 2, {far, branch}, {{0, 1}}, &out);
                     }),
                     {"25 tokens", "24 positions"}));
    EXPECT_TRUE(says(error_of([&] {
                         model.score(tokens, 1, 2, {}, {{2, 1}}, &out);
                     }),
                     {"row 2 of 2"}));
}

// A removed layer, and the model that export writes without it.
TEST(Score, WithoutALayerAsExportDropsIt) {
    const auto questions = random_requests(12);
    const size_t n = count(questions);
    const auto batches = pack_requests(questions, 96);
    const Ranks ranks;
    for (const auto& [arch, scheme] :
         std::vector<std::pair<std::string, std::string>>{{"llama", "pre"},
                                                          {"gpt2", "lns"},
                                                          {"llama", "lns+gpas"},
                                                          {"llama", "mix:2"},
                                                          {"llama", "layerscale"},
                                                          {"olmo", "lns"},
                                                          {"llama", "sandwich"},
                                                          {"llama", "peri"},
                                                          {"llama", "post"},
                                                          {"olmo2", "olmo2"}}) {
        SCOPED_TRACE(cat(arch, " ", scheme));
        const Config config = model_config_of(arch, scheme, 4);
        const auto made = make_cpu_model(config, 1, 96, {});
        Model& model = *made;
        model.initialize(5);
        std::vector<float> values;
        auto read = [&](const Param& p) {
            values.resize(size_t(p.size()));
            model.read(Buffer::parameters, p, values.data());
            return values;
        };
        for (const Param& p : model.registry.params) // gates, γ and norms, too
            if (p.shape.size() == 1) {
                std::vector<float> x = read(p);
                for (size_t i = 0; i < x.size(); i++)
                    x[i] += 0.2f * float(random_normal(4, fnv1a(p.name), i));
                model.write(Buffer::parameters, p, x.data());
            }
        const auto scores = score_without_layers(model, batches, n);
        ASSERT_EQ(scores.size(), 5u);
        expect_near(scores[4], score_requests(model, batches, n, ranks), 1e-5);
        for (int l = 0; l < 4; l++) {
            const ExportPlan plan = plan_export(config, model.registry, {l + 1});
            const auto made_pruned =
                make_cpu_model(plan.config, 1, 96, {.purpose = Purpose::score});
            Model& pruned = *made_pruned;
            ASSERT_EQ(pruned.config.layers, 3);
            for (const Param& p : pruned.registry.params) {
                const Param& source = plan.source(p);
                std::vector<float> x = read(source);
                if (const auto fold = plan.folds.find(source.name); fold != plan.folds.end()) {
                    std::vector<float> gamma = {1};
                    if (fold->second.gamma) gamma = read(*fold->second.gamma);
                    const size_t columns = x.size() / size_t(source.shape[0]);
                    for (size_t i = 0; i < x.size(); i++)
                        x[i] *=
                            float(fold->second.scale) * gamma[gamma.size() == 1 ? 0 : i / columns];
                }
                pruned.write(Buffer::parameters, p, x.data());
            }
            expect_near(score_requests(pruned, batches, n, ranks), scores[size_t(l)], 1e-4);
        }
    }
    const Config deep = model_config_of("llama", "deepnorm", 4);
    const Registry registry = make_registry(deep);
    EXPECT_TRUE(says(error_of([&] { plan_export(deep, registry, {2}); }),
                     {"deepnorm has scales that belong to 4 layers"}));
}

TEST(Score, AccuraciesAndErrors) {
    // By log-probability the second is larger, per character the first.
    const Benchmark b = benchmark_of({0, 1, 1, 0});
    const std::vector<double> scores = {-2, -3, -2, -3, -9, -3, -2, -2}; // 0, 0, 1, 0: a tie
    TaskScores found = judge(b, scores);
    EXPECT_DOUBLE_EQ(found.tasks[0].acc.value, 0.75);
    EXPECT_NEAR(found.tasks[0].acc.error, std::sqrt(0.75 * 0.25 / 3), 1e-15);
    // −2 and −1; −2 and −1; −9 and −1; −2 and −2/3: always the second.
    EXPECT_DOUBLE_EQ(found.tasks[0].acc_norm.value, 0.5);
    EXPECT_DOUBLE_EQ(found.tasks[0].chance, 0.5);
    EXPECT_EQ(right_answers(b, scores), (std::vector<bool>{true, false, true, true}));

    const nlohmann::json json = results_json(b, found);
    EXPECT_EQ(json["results"]["made"]["acc,none"], 0.75);
    EXPECT_EQ(json["results"]["made"]["acc_norm,none"], 0.5);
    EXPECT_EQ(json["n-samples"]["made"]["effective"], 4);
    EXPECT_EQ(json["versions"]["made"], 1);
    EXPECT_TRUE(says(describe(b, found), {"made", "0.7500", "0.2500", "0.5000", "0.2887"}));
    const std::string samples = samples_jsonl(b, scores);
    const auto line = nlohmann::json::parse(samples.substr(0, samples.find('\n')));
    EXPECT_EQ(line["arguments"][1], (nlohmann::json{"c", " bcd"}));
    EXPECT_EQ(line["resps"], (nlohmann::json{-2, -3}));
    EXPECT_EQ(line["acc"], 1);
    EXPECT_EQ(line["acc_norm"], 0);

    // A single question has no standard error.
    const Benchmark single = benchmark_of({0}, false);
    const nlohmann::json one = results_json(single, judge(single, {-1, -2}));
    EXPECT_EQ(one["results"]["made"]["acc_stderr,none"], "N/A");
    EXPECT_FALSE(one["results"]["made"].contains("acc_norm,none"));
}

TEST(Score, GroupsAreWeightedBySize) {
    Benchmark b = benchmark_of({0, 0, 0, 0}, false);
    b.tasks.push_back(benchmark_of({1, 0}, false).tasks[0]);
    b.tasks[1].name = "other";
    b.groups = {{"all", "all", {"made", "other"}, {0, 1}}};
    const std::vector<double> scores = {-1, -2, -1, -2, -1, -2, -3, -2, -1, -2, -1, -2};
    const TaskScores found = judge(b, scores); // 3 of 4, 1 of 2
    EXPECT_NEAR(found.groups[0].acc.value, 4.0 / 6, 1e-15);
    // lm_eval's pooled_sample_stderr: se² · n · (n − 1) is n · p · (1 − p) of each.
    const double square = 4 * 0.75 * 0.25 + 2 * 0.5 * 0.5;
    EXPECT_NEAR(found.groups[0].acc.error, std::sqrt(square / (6 - 2) / 6), 1e-15);
    EXPECT_EQ(found.groups[0].questions, 6);
    EXPECT_EQ(brief_json(b, found).size(), 1u); // the parts of a group are left out
    const nlohmann::json json = results_json(b, found);
    EXPECT_EQ(json["groups"].size(), 1u);
    EXPECT_EQ(json["group_subtasks"]["all"], (nlohmann::json{"made", "other"}));
    EXPECT_EQ(json["results"]["other"]["alias"], " - made");
}
