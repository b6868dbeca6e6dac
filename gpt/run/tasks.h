// Benchmarks of multiple choice, as lm-evaluation-harness defines them: which text a model is asked
// to continue, and with which answers. Checked against its version 0.4.13 (lm_eval/tasks and
// lm_eval/api/task.py).
//
//   task            context → continuations                                       metrics
//   hellaswag       P(activity_label + ": " + ctx_a + " " + capitalized ctx_b) → P(endings)
//                                                                                  acc, acc_norm
//   piqa            "Question: {goal}\nAnswer:" → sol1, sol2                       acc, acc_norm
//   arc_easy, arc_challenge
//                   "Question: {question}\nAnswer:" → choices                      acc, acc_norm
//   openbookqa      question_stem → choices                                        acc, acc_norm
//   boolq           "{passage}\nQuestion: {question}?\nAnswer:" → no, yes          acc
//   winogrande      the sentence up to "_" with each option → the rest             acc
//   mmlu            "The following are multiple choice questions (with answers) about
//                   {subject}.\n\n{question}\nA. …\nB. …\nC. …\nD. …\nAnswer:" → A, B, C, D
//                                                                                  acc
// A continuation follows a space. P strips the text, turns " [title]" into ". ", drops what stands
// in brackets and turns two spaces into one.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

struct Question {
    // A choice is a context and its continuation; one of the two lists may have a single element,
    // which all choices share.
    std::vector<std::string> contexts, continuations;
    std::vector<int> characters; // of each choice: acc_norm divides by it
    int gold = 0;

    int choices() const { return int(characters.size()); }
    const std::string& context(int i) const { return contexts[contexts.size() == 1 ? 0 : i]; }
    const std::string& continuation(int i) const {
        return continuations[continuations.size() == 1 ? 0 : i];
    }
};

struct Task {
    std::string name, alias; // "mmlu_anatomy", "anatomy"
    std::string family;      // "mmlu"
    bool normalized = false; // acc_norm besides acc
    int version = 1;         // the definition's, in lm-evaluation-harness
    int fewshot = 0;         // solved examples before each question
    std::string file = "";
    int64_t in_file = 0; // questions, of which the first are taken with a limit
    std::vector<Question> questions = {};
};

// Tasks whose accuracy is also given as one number, weighted by their sizes.
struct TaskGroup {
    std::string name, alias;
    std::vector<std::string> parts; // groups or tasks
    std::vector<int> tasks;         // all tasks below it, in Benchmark::tasks
    int depth = 0;                  // groups above it
};

struct Benchmark {
    std::vector<Task> tasks;
    std::vector<TaskGroup> groups; // a group before its parts
    std::vector<std::string> notes;
};

struct TaskSettings {
    std::string data = "data/evals"; // NAME.jsonl or NAME.jsonl.xz; mmlu_test and mmlu_dev
    int fewshot = 0;
    int64_t limit = 0;        // the first questions of each task; 0: all
    bool share_limit = false; // mmlu's subjects share the limit
};

// "hellaswag,mmlu", also mmlu_stem (a category) and mmlu_anatomy (a subject). Throws for a name
// that is unknown, suggesting similar ones, or repeated.
std::vector<std::string> parse_tasks(const std::string& text);

// Reads the data of these tasks. Throws if a file is absent, or, with its line, for a record that
// lacks a field or has a wrong label.
Benchmark load_benchmark(const std::vector<std::string>& names, const TaskSettings& settings);

} // namespace lns
