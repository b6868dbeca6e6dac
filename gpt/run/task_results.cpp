#include "gpt/run/task_results.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <exception>

#include "gpt/base/error.h"
#include "gpt/base/terminal.h"

namespace lns {

using Json = nlohmann::ordered_json;

namespace {

// f(task, question, its first request), in order.
template <class F> void each_question(const Benchmark& benchmark, const F& f) {
    size_t request = 0;
    for (size_t t = 0; t < benchmark.tasks.size(); t++)
        for (const Question& q : benchmark.tasks[t].questions) {
            f(t, q, request);
            request += size_t(q.choices());
        }
}

Accuracy share(int64_t right, int64_t n) {
    const double p = double(right) / double(n);
    return {p, n > 1 ? std::sqrt(p * (1 - p) / double(n - 1)) : NAN};
}

// Weighted by size. The error is that of lm_eval's pooled_sample_stderr.
Accuracy pooled(const std::vector<const TaskScore*>& parts, Accuracy TaskScore::*metric) {
    double n = 0, sum = 0, square = 0;
    for (const TaskScore* part : parts) {
        const double size = double(part->questions);
        n += size;
        sum += size * (part->*metric).value;
        square += (size - 1) * size * std::pow((part->*metric).error, 2);
    }
    return {sum / n, std::sqrt(square / (n - double(parts.size())) / n)};
}

// " - " for a part of a group, "   - " for a part of its part.
std::string indent(int depth) { return depth == 0 ? "" : std::string(2 * depth - 1, ' ') + "- "; }

// f(name, alias, depth, score, whether it is a group): groups stand before their parts.
template <class F> void each_result(const Benchmark& b, const TaskScores& scores, const F& f) {
    std::vector<bool> shown(b.tasks.size()), shown_group(b.groups.size());
    auto show = [&](size_t t, int depth) {
        if (!shown[t]) f(b.tasks[t].name, b.tasks[t].alias, depth, scores.tasks[t], false);
        shown[t] = true;
    };
    auto show_group = [&](size_t g) { // and the groups in it
        const int depth = b.groups[g].depth;
        do {
            const TaskGroup& group = b.groups[g];
            f(group.name, group.alias, group.depth, scores.groups[g], true);
            shown_group[g++] = true;
            const bool lowest = g == b.groups.size() || b.groups[g].depth <= group.depth;
            for (size_t i = 0; lowest && i < group.tasks.size(); i++)
                show(size_t(group.tasks[i]), group.depth + 1);
        } while (g < b.groups.size() && b.groups[g].depth > depth);
    };
    for (size_t t = 0; t < b.tasks.size(); t++) {
        for (size_t g = 0; g < b.groups.size() && !shown[t]; g++) {
            const std::vector<int>& tasks = b.groups[g].tasks;
            if (!shown_group[g] && std::find(tasks.begin(), tasks.end(), int(t)) != tasks.end())
                show_group(g);
        }
        show(t, 0);
    }
}

Json number(double x) { return std::isfinite(x) ? Json(x) : Json("N/A"); }

} // namespace

TaskWork prepare_tasks(const std::vector<std::string>& names, const TaskSettings& settings,
                       const Tokenizer& tokenizer, int vocabulary, int max_length, int64_t rows) {
    TaskWork work = {load_benchmark(names, settings), max_length, rows};
    std::vector<std::pair<const Task*, const Question*>> all;
    for (const Task& task : work.benchmark.tasks)
        for (const Question& q : task.questions) all.push_back({&task, &q});
    std::vector<std::vector<Request>> questions(all.size());
    std::vector<std::string> errors(all.size());
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t i = 0; i < all.size(); i++) try {
            questions[i] = encode_question(tokenizer, *all[i].second, max_length);
        } catch (const std::exception& error) {
            errors[i] = error.what();
        }
    for (size_t i = 0; i < all.size(); i++) {
        const Task& task = *all[i].first;
        if (!errors[i].empty())
            fail("question ", all[i].second - task.questions.data() + 1, " of the task ", task.name,
                 ": ", errors[i]);
        for (const Request& r : questions[i]) {
            work.requests++;
            work.rows = std::max(work.rows, int64_t(r.tokens.size()) - 1);
            for (int token : r.tokens)
                if (token >= vocabulary)
                    fail("token ", token, " of the task ", task.name, " is not in the model's ",
                         "vocabulary of ", vocabulary, ": the tokenizer is not the model's");
        }
    }
    work.batches = pack_requests(questions, work.rows);
    return work;
}

int chosen(const Question& question, const double* scores, bool normalized) {
    int best = 0;
    auto value = [&](int i) {
        return normalized ? scores[i] / double(question.characters[size_t(i)]) : scores[i];
    };
    for (int i = 1; i < question.choices(); i++)
        if (value(i) > value(best)) best = i;
    return best;
}

std::vector<bool> right_answers(const Benchmark& benchmark, const std::vector<double>& scores) {
    std::vector<bool> right;
    each_question(benchmark, [&](size_t, const Question& q, size_t request) {
        right.push_back(chosen(q, &scores[request], false) == q.gold);
    });
    return right;
}

TaskScores judge(const Benchmark& benchmark, const std::vector<double>& scores) {
    TaskScores found;
    std::vector<int64_t> right(benchmark.tasks.size()), right_norm(right.size());
    found.tasks.resize(right.size());
    each_question(benchmark, [&](size_t t, const Question& q, size_t request) {
        TaskScore& score = found.tasks[t];
        right[t] += chosen(q, &scores[request], false) == q.gold;
        right_norm[t] += chosen(q, &scores[request], true) == q.gold;
        score.questions++;
        score.chance += 1 / double(q.choices());
    });
    for (size_t t = 0; t < right.size(); t++) {
        TaskScore& score = found.tasks[t];
        score.normalized = benchmark.tasks[t].normalized;
        score.acc = share(right[t], score.questions);
        score.acc_norm = share(right_norm[t], score.questions);
        score.chance /= double(score.questions);
    }
    for (const TaskGroup& group : benchmark.groups) {
        std::vector<const TaskScore*> parts;
        for (int t : group.tasks) parts.push_back(&found.tasks[size_t(t)]);
        TaskScore score;
        score.acc = pooled(parts, &TaskScore::acc);
        for (const TaskScore* part : parts) {
            score.questions += part->questions;
            score.chance += part->chance * double(part->questions);
        }
        score.chance /= double(score.questions);
        found.groups.push_back(score);
    }
    return found;
}

std::string describe(const Benchmark& benchmark, const TaskScores& scores) {
    Table table;
    table.headers = {"task", "questions", "chance", "acc", "+-", "acc_norm", "+-"};
    each_result(
        benchmark, scores,
        [&](const std::string&, const std::string& alias, int depth, const TaskScore& s, bool) {
            auto text = [](double x) { return std::isnan(x) ? "-" : format_number("%.4f", x); };
            std::vector<std::string> row = {indent(depth) + alias,
                                            std::to_string(s.questions),
                                            text(s.chance),
                                            text(s.acc.value),
                                            text(s.acc.error),
                                            "-",
                                            "-"};
            if (s.normalized) row[5] = text(s.acc_norm.value), row[6] = text(s.acc_norm.error);
            table.rows.push_back(row);
        });
    return table.text();
}

Json brief_json(const Benchmark& benchmark, const TaskScores& scores) {
    Json json;
    each_result(
        benchmark, scores,
        [&](const std::string& name, const std::string&, int depth, const TaskScore& s,
            bool group) {
            if (depth > 0 && !group) return;
            Json& x = json[name] = {{"acc", s.acc.value}, {"acc_stderr", number(s.acc.error)}};
            if (s.normalized)
                x["acc_norm"] = s.acc_norm.value, x["acc_norm_stderr"] = number(s.acc_norm.error);
            x["chance"] = s.chance;
            x["questions"] = s.questions;
        });
    return json;
}

Json results_json(const Benchmark& benchmark, const TaskScores& scores) {
    Json json = {{"results", Json::object()},          {"groups", Json::object()},
                 {"group_subtasks", Json::object()},   {"configs", Json::object()},
                 {"versions", Json::object()},         {"n-shot", Json::object()},
                 {"higher_is_better", Json::object()}, {"n-samples", Json::object()}};
    each_result(benchmark, scores,
                [&](const std::string& name, const std::string& alias, int depth,
                    const TaskScore& s, bool group) {
                    Json x = {{"alias", indent(depth) + alias},
                              {"name", name},
                              {"sample_len", s.questions},
                              {"acc,none", s.acc.value},
                              {"acc_stderr,none", number(s.acc.error)}};
                    Json better = {{"acc", true}};
                    if (s.normalized) {
                        x["acc_norm,none"] = s.acc_norm.value;
                        x["acc_norm_stderr,none"] = number(s.acc_norm.error);
                        better["acc_norm"] = true;
                    }
                    json["results"][name] = x;
                    if (group) json["groups"][name] = x;
                    json["higher_is_better"][name] = better;
                });
    for (const TaskGroup& group : benchmark.groups) {
        json["group_subtasks"][group.name] = group.parts;
        json["versions"][group.name] = "2";
        json["n-shot"][group.name] = benchmark.tasks[size_t(group.tasks[0])].fewshot;
    }
    for (size_t t = 0; t < benchmark.tasks.size(); t++) {
        const Task& task = benchmark.tasks[t];
        json["versions"][task.name] = task.version;
        json["n-shot"][task.name] = task.fewshot;
        json["n-samples"][task.name] = {{"original", task.in_file},
                                        {"effective", task.questions.size()}};
        Json metrics = Json::array();
        for (const char* metric : {"acc", "acc_norm"})
            if (metric == std::string("acc") || task.normalized)
                metrics.push_back(
                    {{"metric", metric}, {"aggregation", "mean"}, {"higher_is_better", true}});
        json["configs"][task.name] = {
            {"task", task.name},
            {"task_alias", task.alias},
            {"dataset_path", "json"},
            {"dataset_kwargs", {{"data_files", task.file}}},
            {"output_type", "multiple_choice"},
            {"metric_list", metrics},
            {"num_fewshot", task.fewshot},
            {"target_delimiter", " "},
            {"fewshot_delimiter", "\n\n"},
            {"metadata", {{"version", task.version}, {"chance", scores.tasks[t].chance}}},
        };
    }
    if (benchmark.groups.empty()) json.erase("groups");
    return json;
}

std::string samples_jsonl(const Benchmark& benchmark, const std::vector<double>& scores) {
    std::string text;
    each_question(benchmark, [&](size_t t, const Question& q, size_t request) {
        const Task& task = benchmark.tasks[t];
        Json line = {
            {"task", task.name},      {"doc_id", &q - task.questions.data()},
            {"target", q.gold},       {"arguments", Json::array()},
            {"resps", Json::array()}, {"acc", int(chosen(q, &scores[request], false) == q.gold)}};
        if (task.normalized) line["acc_norm"] = int(chosen(q, &scores[request], true) == q.gold);
        for (int i = 0; i < q.choices(); i++) {
            line["arguments"].push_back({q.context(i), q.continuation(i)});
            line["resps"].push_back(scores[request + size_t(i)]);
        }
        text += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    });
    return text;
}

} // namespace lns
