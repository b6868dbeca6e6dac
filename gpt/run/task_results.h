// What a model's answers to benchmarks are worth: accuracies with standard errors, as a table, and
// as JSON in lm-evaluation-harness's layout.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "gpt/base/ranks.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/model.h"
#include "gpt/run/score.h"
#include "gpt/run/tasks.h"

namespace lns {

// A benchmark and the batches that answer it.
struct TaskWork {
    Benchmark benchmark;
    int max_length = 0; // of a sequence
    int64_t rows = 0;   // of a batch
    size_t requests = 0;
    std::vector<ScoreBatch> batches = {};
};

// Reads and encodes the tasks. rows: of a batch; at least what the longest question takes is used
// unless `fixed`, and then throws if that is more. Throws if a token is not below `vocabulary`.
TaskWork prepare_tasks(const std::vector<std::string>& names, const TaskSettings& settings,
                       const Tokenizer& tokenizer, int vocabulary, int max_length, int64_t rows);

// The share of questions that are answered correctly. The standard error is the sample's, of a
// group pooled over its tasks (lm_eval/api/metrics.py); NaN for a single question.
struct Accuracy {
    double value = 0, error = 0;
};
struct TaskScore {
    Accuracy acc, acc_norm; // by log-probability; by that over the number of characters
    double chance = 0;      // acc of guessing
    int64_t questions = 0;
    bool normalized = false; // has acc_norm
};
struct TaskScores {
    std::vector<TaskScore> tasks, groups; // as in the benchmark
};

// The answer of largest log-probability, or of largest log-probability per character; the first of
// equals. scores: of the question's choices.
int chosen(const Question& question, const double* scores, bool normalized);

// Whether each question is answered correctly, by log-probability.
std::vector<bool> right_answers(const Benchmark& benchmark, const std::vector<double>& scores);

// scores: of all requests.
TaskScores judge(const Benchmark& benchmark, const std::vector<double>& scores);

// A line for each task and group.
std::string describe(const Benchmark& benchmark, const TaskScores& scores);

// {task: {"acc": …, "acc_stderr": …, "acc_norm": …}}, for logs; of mmlu only the groups.
nlohmann::ordered_json brief_json(const Benchmark& benchmark, const TaskScores& scores);

// results, groups, group_subtasks, configs, versions, n-shot, higher_is_better, n-samples.
nlohmann::ordered_json results_json(const Benchmark& benchmark, const TaskScores& scores);

// A line of JSON for each question: task, doc_id, target, arguments (context and continuation of
// each choice), resps (their log-probabilities), and which are right: acc, acc_norm.
std::string samples_jsonl(const Benchmark& benchmark, const std::vector<double>& scores);

} // namespace lns
