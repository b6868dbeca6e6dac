#include "gpt/run/tasks.h"

#include <algorithm>
#include <cstdio>
#include <cwctype>
#include <locale.h>
#include <map>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/data/unicode.h"
#include "gpt/run/rundir.h"

namespace lns {

using nlohmann::json;

namespace {

// ---------------------------------------------------------------------------------------------
// Text, as Python's str treats it

// The first letter in upper case, the others in lower case.
std::string capitalized(const std::string& text) {
    static const locale_t locale = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
    if (!is_utf8(text)) return text;
    std::string out;
    for (std::string_view character : characters(text)) {
        wint_t code = character_at(character, 0).code;
        if (locale) code = out.empty() ? towupper_l(code, locale) : towlower_l(code, locale);
        append_utf8(out, code);
    }
    return out;
}

// HellaSwag's texts of WikiHow have marks in brackets.
std::string without_brackets(const std::string& text) {
    const std::string whole = replaced(stripped(text), " [title]", ". ");
    std::string out;
    for (size_t i = 0; i < whole.size(); i++) {
        const size_t end = whole[i] == '[' ? whole.find_first_of("]\n", i) : whole.npos;
        if (end != whole.npos && whole[end] == ']')
            i = end;
        else
            out += whole[i];
    }
    return replaced(out, "  ", " ");
}

// ---------------------------------------------------------------------------------------------
// Records

// A line of a data set. Its members throw, naming the line, if a field is not as expected.
struct Record {
    const json& value;
    std::string where; // "FILE, line 3"

    template <class... Parts> [[noreturn]] void wrong(const Parts&... parts) const {
        fail(where, ": ", parts...);
    }
    const json& field(const char* name) const {
        if (!value.is_object()) wrong("found ", quoted(value), ", expected an object in braces");
        const auto found = value.find(name);
        if (found != value.end()) return *found;
        std::vector<std::string> names;
        for (const auto& [other, ignored] : value.items()) names.push_back(other);
        wrong("the field '", name, "' is missing; it has ", names.empty() ? "none" : join(names));
    }
    std::string text(const char* name) const { return as_text(field(name), name); }
    std::string as_text(const json& x, const char* name) const {
        if (!x.is_string()) wrong("the field '", name, "' has ", quoted(x), ", expected text");
        return x;
    }
    std::vector<std::string> texts(const char* name) const {
        const json& list = field(name);
        if (!list.is_array() || list.size() < 2)
            wrong("the field '", name, "' is ", quoted(list), ", expected a list of texts");
        std::vector<std::string> all;
        for (const json& x : list) all.push_back(as_text(x, name));
        return all;
    }
    // A whole number, which may be written as text, from 0 to n − 1.
    int label(const char* name, size_t n) const {
        const json& x = field(name);
        for (size_t i = 0; i < n; i++)
            if (x == i || x == std::to_string(i)) return int(i);
        wrong("the label '", name, "' is ", quoted(x), ", expected a number from 0 to ", n - 1);
    }
    Record part(const char* name) const { return {field(name), cat(where, ", '", name, "'")}; }
};

// A question before it is put together.
struct Item {
    std::string text; // what the choices continue
    std::vector<std::string> choices;
    int gold = 0;
    std::string rest = ""; // what continues every choice, which then is a context

    // Solved, for the examples before a question.
    std::string solved() const {
        return text + (rest.empty() ? " " + choices[gold] : choices[gold] + " " + rest) + "\n\n";
    }
};

Item read_hellaswag(const Record& r) {
    const std::string context = r.text("ctx_a") + " " + capitalized(r.text("ctx_b"));
    Item item = {without_brackets(r.text("activity_label") + ": " + context), {}};
    for (const std::string& ending : r.texts("endings"))
        item.choices.push_back(without_brackets(ending));
    item.gold = r.label("label", item.choices.size());
    return item;
}

Item read_piqa(const Record& r) {
    return {"Question: " + r.text("goal") + "\nAnswer:",
            {r.text("sol1"), r.text("sol2")},
            r.label("label", 2)};
}

// Of choices {text, label}, and the label of the answer.
Item with_labelled_choices(const Record& r, std::string text) {
    const Record choices = r.part("choices");
    Item item = {std::move(text), choices.texts("text")};
    const std::vector<std::string> labels = choices.texts("label");
    if (labels.size() != item.choices.size())
        choices.wrong("found ", item.choices.size(), " texts and ", labels.size(), " labels");
    const std::string answer(stripped(r.text("answerKey")));
    const auto found = std::find(labels.begin(), labels.end(), answer);
    if (found == labels.end())
        r.wrong("the label 'answerKey' is ", quoted(answer), ", expected one of ", join(labels));
    item.gold = int(found - labels.begin());
    return item;
}
Item read_arc(const Record& r) {
    return with_labelled_choices(r, "Question: " + r.text("question") + "\nAnswer:");
}
Item read_openbookqa(const Record& r) { return with_labelled_choices(r, r.text("question_stem")); }

// The answer is `answer` in BoolQ itself and `label` in SuperGLUE; true or 1 is yes.
Item read_boolq(const Record& r) {
    const char* name = r.value.is_object() && r.value.contains("label") ? "label" : "answer";
    const json& answer = r.field(name);
    return {r.text("passage") + "\nQuestion: " + r.text("question") + "?\nAnswer:",
            {"no", "yes"},
            answer.is_boolean() ? int(answer.get<bool>()) : r.label(name, 2)};
}

Item read_winogrande(const Record& r) {
    const std::string sentence = r.text("sentence"), answer = r.text("answer");
    const size_t blank = sentence.find('_');
    if (blank == sentence.npos)
        r.wrong("the field 'sentence' has no _ for the options: ", quoted(sentence));
    if (answer != "1" && answer != "2")
        r.wrong("the label 'answer' is ", quoted(answer), ", expected \"1\" or \"2\"");
    const std::string before = sentence.substr(0, blank),
                      rest = std::string(stripped(sentence.substr(blank + 1)));
    if (rest.empty()) r.wrong("nothing follows the _ of the field 'sentence'");
    return {"", {before + r.text("option1"), before + r.text("option2")}, answer == "2", rest};
}

Item read_mmlu(const Record& r) {
    const std::vector<std::string> choices = r.texts("choices");
    if (choices.size() != 4)
        r.wrong("the field 'choices' has ", choices.size(), " texts, expected 4");
    std::string text(stripped(r.text("question")));
    for (size_t i = 0; i < 4; i++) text += cat("\n", "ABCD"[i], ". ", choices[i]);
    return {text + "\nAnswer:", {"A", "B", "C", "D"}, r.label("answer", 4)};
}

// ---------------------------------------------------------------------------------------------
// The tasks

struct Definition {
    const char* name;
    Item (*read)(const Record&);
    bool normalized; // acc_norm besides acc
    int version;
};
const Definition definitions[] = {
    {"hellaswag", read_hellaswag, true, 1},   {"piqa", read_piqa, true, 1},
    {"arc_easy", read_arc, true, 1},          {"arc_challenge", read_arc, true, 1},
    {"boolq", read_boolq, false, 2},          {"openbookqa", read_openbookqa, true, 1},
    {"winogrande", read_winogrande, false, 1}};

struct Category {
    const char* name;
    std::vector<const char*> subjects;
};
const Category mmlu_categories[] = {
    {"stem",
     {"abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry",
      "college_computer_science", "college_mathematics", "college_physics", "computer_security",
      "conceptual_physics", "electrical_engineering", "elementary_mathematics",
      "high_school_biology", "high_school_chemistry", "high_school_computer_science",
      "high_school_mathematics", "high_school_physics", "high_school_statistics",
      "machine_learning"}},
    {"other",
     {"business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
      "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
      "professional_accounting", "professional_medicine", "virology"}},
    {"social_sciences",
     {"econometrics", "high_school_geography", "high_school_government_and_politics",
      "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
      "human_sexuality", "professional_psychology", "public_relations", "security_studies",
      "sociology", "us_foreign_policy"}},
    {"humanities",
     {"formal_logic", "high_school_european_history", "high_school_us_history",
      "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
      "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
      "world_religions"}}};

// Runs a command of which the output is read; throws with `what` if it fails.
std::string output_of(const std::string& command, const std::string& what) {
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) fail("cannot start `", command, "`");
    std::string text;
    char part[65536];
    for (size_t n; (n = fread(part, 1, sizeof part, pipe)) > 0;) text.append(part, n);
    if (pclose(pipe) != 0)
        fail(what, " cannot be unpacked: it is damaged, or the program xz is missing (Debian and "
                   "Ubuntu: apt install xz-utils)");
    return text;
}

// The name of DIR/NAME.jsonl or DIR/NAME.jsonl.xz; "" if there is neither.
std::string data_file(const std::string& dir, const std::string& name) {
    for (const char* ending : {".jsonl", ".jsonl.xz"})
        if (const std::string path = dir + "/" + name + ending; path_exists(path)) return path;
    return "";
}
std::string find_data(const std::string& dir, const std::string& name, const std::string& task) {
    const std::string path = data_file(dir, name);
    if (path.empty())
        fail("the task ", task, " has no data: there is neither ", dir, "/", name, ".jsonl nor ",
             name,
             ".jsonl.xz. data/get.sh evals fetches it; --task-data DIR reads it from another "
             "folder");
    return path;
}

template <class Use> void each_record(const std::string& path, const Use& use) {
    const char* words[] = {"xz", "-dc", "--", path.c_str()};
    const std::string text =
        path.ends_with(".xz") ? output_of(shell_quoted(4, words), path) : read_file(path);
    const int lines = each_json_line(text, path, [&](const json& value, const std::string& where) {
        use(Record{value, where});
    });
    if (lines == 0) fail(path, " is empty, expected a question in JSON on each line");
}

Question question_of(const Item& item, const std::string& before) {
    Question q;
    q.gold = item.gold;
    for (const std::string& choice : item.choices)
        q.characters.push_back(int(characters(choice).size()));
    if (item.rest.empty()) {
        q.contexts = {before + item.text};
        for (const std::string& choice : item.choices) q.continuations.push_back(" " + choice);
    } else {
        for (const std::string& choice : item.choices) q.contexts.push_back(before + choice);
        q.continuations = {" " + item.rest};
    }
    return q;
}

std::string shots_of(const std::vector<Item>& examples, const TaskSettings& s,
                     const std::string& task, const std::string& file) {
    if (int64_t(examples.size()) < s.fewshot)
        fail("--fewshot ", s.fewshot, ": ", file, " has only ", examples.size(),
             " examples of the task ", task);
    std::string text;
    for (int i = 0; i < s.fewshot; i++) text += examples[size_t(i)].solved();
    return text;
}

bool wanted(const Task& task, int64_t limit) {
    return limit == 0 || int64_t(task.questions.size()) < limit;
}

Task load_task(const Definition& d, const TaskSettings& s) {
    Task task = {d.name, d.name, d.name, d.normalized, d.version, s.fewshot};
    task.file = find_data(s.data, d.name, d.name);
    std::string shots;
    if (s.fewshot > 0) {
        const std::string name = d.name + std::string("_dev"), file = data_file(s.data, name);
        if (file.empty())
            fail("--fewshot ", s.fewshot, ": the task ", d.name, " has no examples: put them into ",
                 s.data, "/", name, ".jsonl, in the fields of ", task.file,
                 ", or leave the flag out");
        std::vector<Item> examples;
        each_record(file, [&](const Record& r) { examples.push_back(d.read(r)); });
        shots = shots_of(examples, s, d.name, file);
    }
    each_record(task.file, [&](const Record& r) {
        task.in_file++;
        const Item item = d.read(r);
        if (wanted(task, s.limit)) task.questions.push_back(question_of(item, shots));
    });
    return task;
}

// The chosen subjects, in the order of the categories.
void load_mmlu(Benchmark& all, const std::vector<std::string>& names, TaskSettings s) {
    const std::string file = find_data(s.data, "mmlu_test", "mmlu");
    std::vector<std::string> known;
    for (const Category& c : mmlu_categories)
        known.insert(known.end(), c.subjects.begin(), c.subjects.end());
    auto subject_of = [&](const Record& r) {
        const std::string subject = r.text("subject");
        if (std::find(known.begin(), known.end(), subject) == known.end())
            r.wrong("mmlu has no subject ", quoted(subject), ".", did_you_mean(subject, known));
        return subject;
    };
    std::map<std::string, std::vector<Item>> questions, examples;
    each_record(file, [&](const Record& r) { questions[subject_of(r)].push_back(read_mmlu(r)); });
    const std::string dev = s.fewshot > 0 ? find_data(s.data, "mmlu_dev", "mmlu") : "";
    if (s.fewshot > 0)
        each_record(dev, [&](const Record& r) { examples[subject_of(r)].push_back(read_mmlu(r)); });

    std::vector<std::string> absent;
    std::vector<TaskGroup> groups;
    auto named = [&](const std::string& name) {
        return std::find(names.begin(), names.end(), name) != names.end();
    };
    TaskGroup top = {"mmlu", "mmlu", {}, {}};
    for (const Category& c : mmlu_categories) {
        const std::string name = cat("mmlu_", c.name);
        TaskGroup group = {name, c.name, {}, {}, named("mmlu")};
        for (const char* subject : c.subjects) {
            Task task = {cat("mmlu_", subject), subject, "mmlu", false, 1, s.fewshot, file};
            if (!named("mmlu") && !named(name) && !named(task.name)) continue;
            if (questions[subject].empty()) {
                if (named(task.name)) fail(file, " has no questions of the task ", task.name);
                absent.push_back(subject);
                continue;
            }
            group.parts.push_back(task.name);
            group.tasks.push_back(int(all.tasks.size()));
            all.tasks.push_back(std::move(task));
        }
        top.tasks.insert(top.tasks.end(), group.tasks.begin(), group.tasks.end());
        if (group.tasks.empty() || (!named("mmlu") && !named(name))) continue;
        top.parts.push_back(name);
        groups.push_back(group);
    }
    if (top.tasks.empty()) fail(file, " has no questions of ", join(names));
    if (named("mmlu")) groups.insert(groups.begin(), top);
    all.groups.insert(all.groups.end(), groups.begin(), groups.end());

    if (!absent.empty())
        all.notes.push_back(cat(file, " has no questions of ", absent.size(), " of mmlu's ",
                                known.size(), " subjects, ", absent[0], " among them"));
    if (s.share_limit)
        s.limit = (s.limit + int64_t(top.tasks.size()) - 1) / int64_t(top.tasks.size());
    for (Task& task : all.tasks) {
        if (task.family != "mmlu") continue;
        const std::vector<Item>& items = questions[task.alias];
        const std::string before =
            "The following are multiple choice questions (with answers) about " +
            replaced(task.alias, "_", " ") + ".\n\n" +
            shots_of(examples[task.alias], s, task.name, dev);
        task.in_file = int64_t(items.size());
        for (const Item& item : items)
            if (wanted(task, s.limit)) task.questions.push_back(question_of(item, before));
    }
}

} // namespace

std::vector<std::string> parse_tasks(const std::string& text) {
    std::vector<std::string> shown, known, names;
    for (const Definition& d : definitions) shown.push_back(d.name);
    shown.push_back("mmlu");
    known = shown;
    for (const Category& c : mmlu_categories) {
        known.push_back(cat("mmlu_", c.name));
        for (const char* subject : c.subjects) known.push_back(cat("mmlu_", subject));
    }
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find(',', begin), text.size());
        const std::string name = text.substr(begin, end - begin);
        if (std::find(known.begin(), known.end(), name) == known.end())
            fail("there is no task '", name, "'.", did_you_mean(name, known), " The tasks are ",
                 join(shown), "; a subject or category of mmlu is mmlu_anatomy, mmlu_stem");
        if (std::find(names.begin(), names.end(), name) != names.end())
            fail("the task ", name, " is named twice");
        names.push_back(name);
        begin = end + 1;
    }
    return names;
}

Benchmark load_benchmark(const std::vector<std::string>& names, const TaskSettings& s) {
    Benchmark all;
    bool mmlu = false;
    for (const std::string& name : names) {
        for (const Definition& d : definitions)
            if (name == d.name) all.tasks.push_back(load_task(d, s));
        if (name.starts_with("mmlu") && !std::exchange(mmlu, true)) load_mmlu(all, names, s);
    }
    for (const Task& task : all.tasks)
        if (task.questions.empty()) fail(task.file, " has no questions of the task ", task.name);
    return all;
}

} // namespace lns
