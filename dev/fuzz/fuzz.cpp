// libFuzzer targets, one per parser of foreign or possibly damaged input. The program's own name
// selects one from the table at the end: `make fuzz` links it under each name.
//
// A parser may throw lns::Error or return a value that satisfies the invariants checked here. Other
// exceptions, crashes, 10 seconds or a gigabyte are findings.
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <unistd.h>
#include <vector>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/data/shard.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/config.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/config_file.h"
#include "gpt/run/options.h"
#include "gpt/run/recipe.h"
#include "gpt/run/rundir.h"
#include "gpt/run/safetensors.h"

namespace {

namespace fs = std::filesystem;
using namespace lns;

// Aborts, so that libFuzzer keeps the input.
void must(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "broken invariant: %s\n", what);
    std::abort();
}

// This process's directory, in memory if the system has a RAM disk. run.sh removes it.
const std::string& scratch() {
    static const std::string path = [] {
        const char* parent = std::getenv("FUZZ_SCRATCH");
        std::string name = cat(parent ? parent : "/tmp", "/fuzz-", getpid());
        fs::create_directories(name);
        return name;
    }();
    return path;
}

std::string file(const std::string& name, std::string_view bytes) {
    const std::string path = scratch() + "/" + name;
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    must(fd >= 0 && write(fd, bytes.data(), bytes.size()) == ssize_t(bytes.size()),
         "the file is written");
    close(fd);
    return path;
}

// The input split into n parts at bytes 0xFF, which do not occur in text.
std::vector<std::string_view> parts(std::string_view input, size_t n) {
    std::vector<std::string_view> all;
    while (all.size() + 1 < n) {
        const size_t end = std::min(input.find('\xFF'), input.size());
        all.push_back(input.substr(0, end));
        input.remove_prefix(std::min(end + 1, input.size()));
    }
    all.push_back(input);
    return all;
}

void json(std::string_view input) {
    const nlohmann::json value = parse_json(input, "input");
    must(quoted(value).size() < 400, "a quotation is short");
    const std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    must(parse_json(text, "text").dump() == text, "writing and reading give the same value");
}

void safetensors(std::string_view input) {
    const Safetensors read(file("x.safetensors", input));
    size_t bytes = 0;
    for (const TensorView& view : read.tensors()) {
        int64_t elements = 1;
        for (int64_t size : view.shape) elements *= size;
        must(view.bytes == size_t(elements) * dtype_bytes(view.dtype), "a tensor has its size");
        must(read.find(view.name) != nullptr, "a tensor is found");
        bytes += view.bytes;
        if (view.dtype != "F32" && view.dtype != "F16" && view.dtype != "BF16" &&
            view.dtype != "F64")
            continue;
        std::vector<float> values(size_t(elements), 0);
        read.read_f32(view, values.data());
    }
    uint64_t header;
    std::memcpy(&header, input.data(), sizeof header);
    must(bytes + header + sizeof header == input.size(), "the tensors fill the file");
    const std::string copy = scratch() + "/copy.safetensors";
    write_safetensors(copy, read.tensors(), read.metadata());
    must(Safetensors(copy).tensors().size() == read.tensors().size(), "a copy has all tensors");
}

// An index of two existing files.
void index(std::string_view input) {
    static const bool made = [] {
        const float values[4] = {1, 2, 3, 4};
        const TensorView a = {"a", "F32", {2, 2}, values, sizeof values};
        const TensorView b = {"b", "F32", {4}, values, sizeof values};
        fs::create_directories(scratch() + "/index");
        write_safetensors(scratch() + "/index/model-00001-of-00002.safetensors", std::vector{a});
        write_safetensors(scratch() + "/index/model-00002-of-00002.safetensors", std::vector{b});
        return true;
    }();
    must(made, "two files are made");
    file("index/model.safetensors.index.json", input);
    WeightFiles weights(scratch() + "/index");
}

void shard(std::string_view input) {
    const Shard read(file("x_train_000000.bin", input));
    must(1024 + read.tokens * uint64_t(read.token_bytes) == input.size(), "tokens fill the file");
    std::vector<int> tokens(read.tokens);
    read.read(0, tokens.size(), tokens.data());
    for (int vocab : {read.id.vocab_size, 257})
        if (vocab > 0) {
            std::string error;
            try {
                read.check_tokens(vocab);
            } catch (const Error& e) {
                error = e.what();
            }
            bool below = true;
            for (int token : tokens) below &= token >= 0 && token < vocab;
            must(below == error.empty(), "tokens outside the vocabulary are found");
        }
}

void config(std::string_view input) {
    const Config read = config_from_json(std::string(input), "config.json");
    const std::string text = config_to_json(read);
    must(config_to_json(config_from_json(text, "text")) == text,
         "a configuration survives writing and reading");
}

void state(std::string_view input) {
    fs::create_directories(scratch() + "/step-000001");
    file("step-000001/config.json", "{}");
    file("step-000001/model.safetensors", "");
    file("step-000001/trainer_state.json", input);
    const TrainerState read = read_trainer_state(scratch() + "/step-000001");
    must(read.step >= 0 && read.tokens >= 0, "counts are not negative");
}

// run.json, then log.jsonl.
void run(std::string_view input) {
    const auto part = parts(input, 2);
    const std::string path = scratch() + "/run";
    fs::create_directories(path);
    file("run/run.json", part[0]);
    file("run/log.jsonl", part[1]);
    const auto attempt = [](const std::function<void()>& action) {
        try {
            action();
        } catch (const Error&) {
        }
    };
    attempt([&] { recorded_flags(path); });
    attempt([&] { RunDirectory::resume(path).truncate_log_after(1); });
}

// Checks the properties that every tokenizer has for any text.
void check_encoding(const Tokenizer& tokenizer, std::string_view text, bool exact) {
    const std::vector<int> tokens = tokenizer.encode(text);
    for (int token : tokens)
        must(token >= 0 && token < tokenizer.vocab_size(), "tokens are in range");
    const std::string back = tokenizer.decode(tokens);
    if (exact) must(back == text, "decoding inverts encoding");
    const size_t cut = tokenizer.safe_cut(text);
    must(cut <= text.size(), "a cut is inside the text");
    if (cut == 0) return;
    std::vector<int> joined = tokenizer.encode(text.substr(0, cut));
    const std::vector<int> rest = tokenizer.encode_continuation(text.substr(cut));
    joined.insert(joined.end(), rest.begin(), rest.end());
    must(joined == tokens, "encoding in parts gives the same tokens");
}

const char* sample_text =
    "One day, Tim's cat\tsat  down. Ünï\xE2\x82\xAC \xF0\x9F\x99\x82\n12 345!";

// GPT-2's tokenizer: encoder.json, then vocab.bpe.
void gpt2(std::string_view input) {
    const auto part = parts(input, 2);
    fs::create_directories(scratch() + "/gpt2");
    file("gpt2/encoder.json", part[0]);
    file("gpt2/vocab.bpe", part[1]);
    check_encoding(*load_tokenizer("gpt2:" + scratch() + "/gpt2"), sample_text, false);
}

const std::string fixtures = "dev/test/fixtures/tokenizers/";

// A Hugging Face directory: tokenizer_config.json, then tokenizer.json, beside valid files, and a
// text. Safe cuts are not checked: loading tests them on samples, which a made-up regex may pass.
void tokenizer_json(std::string_view input) {
    const auto part = parts(input, 3);
    const std::string dir = scratch() + "/hf";
    fs::create_directories(dir);
    for (const auto& [from, to] :
         {std::pair("encoder.json", "vocab.json"), {"vocab.bpe", "merges.txt"}})
        if (!fs::exists(dir + "/" + to))
            fs::copy_file(fixtures + "gpt2-subset/" + from, dir + "/" + to);
    file("hf/tokenizer_config.json", part[0]);
    if (part[1].empty())
        fs::remove(dir + "/tokenizer.json");
    else
        file("hf/tokenizer.json", part[1]);
    const auto tokenizer = load_tokenizer(dir);
    for (const std::string_view text : {std::string_view(sample_text), part[2]})
        for (const Specials specials : {Specials::ignored, Specials::spelled}) {
            const std::vector<int> tokens = tokenizer->encode(text, specials);
            for (int token : tokens) must(tokenizer->has(token), "tokens are known");
            tokenizer->decode(tokens, specials);
            must(tokenizer->safe_cut(text) <= text.size(), "a cut is inside the text");
        }
}

// Safe cuts are not checked: loading a model tests them on samples, and a damaged model may behave
// differently on this text.
void sentencepiece(std::string_view input) {
    const auto tokenizer = load_tokenizer(file("x.model", input));
    const std::vector<int> tokens = tokenizer->encode(sample_text);
    for (int token : tokens)
        must(token >= 0 && token < tokenizer->vocab_size(), "tokens are in range");
    tokenizer->decode(tokens);
}

// The tests' tokenizers. exact: decoding inverts encoding.
struct Known {
    std::string spec;
    bool exact;
};
// Those of kinds.jsonl.
std::vector<std::string> each_kind() {
    std::vector<std::string> folders;
    std::istringstream lines(read_file(fixtures + "kinds.jsonl"));
    for (std::string line; std::getline(lines, line);) {
        const nlohmann::json kind = parse_json(line, "kinds.jsonl");
        const std::string name = kind["name"];
        fs::create_directories(scratch() + "/" + name);
        folders.push_back(scratch() + "/" + name);
        file(name + "/tokenizer.json", kind["tokenizer"].dump());
    }
    return folders;
}
const std::vector<std::pair<std::unique_ptr<Tokenizer>, bool>>& known_tokenizers() {
    static const auto all = [] {
        std::vector<std::pair<std::unique_ptr<Tokenizer>, bool>> loaded;
        for (const auto& [spec, exact] : {Known{"bytes", true},
                                          {"gpt2:" + fixtures + "gpt2-subset", true},
                                          {fixtures + "exact.model", false},
                                          {fixtures + "folding.model", false}})
            loaded.emplace_back(load_tokenizer(spec), exact);
        for (const std::string& folder : each_kind())
            loaded.emplace_back(load_tokenizer(folder), false);
        return loaded;
    }();
    return all;
}

void encode(std::string_view input) {
    for (const auto& [tokenizer, exact] : known_tokenizers())
        check_encoding(*tokenizer, input, exact);
}

// Two bytes per token; some tokens are outside the vocabulary.
void decode(std::string_view input) {
    for (const auto& [tokenizer, exact] : known_tokenizers()) {
        std::vector<int> tokens;
        for (size_t i = 0; i + 1 < input.size(); i += 2)
            tokens.push_back((uint8_t(input[i]) | uint8_t(input[i + 1]) << 8) %
                                 (tokenizer->vocab_size() + 2) -
                             int(input[i] == '\xFF'));
        try {
            const std::string whole = tokenizer->decode(tokens);
            if (!exact) continue;
            const size_t middle = tokens.size() / 2;
            must(tokenizer->decode(tokens.data(), middle) +
                         tokenizer->decode(tokens.data() + middle, tokens.size() - middle) ==
                     whole,
                 "bytes do not depend on their neighbours");
        } catch (const Error&) {
        }
    }
}

void parse(const std::vector<std::string>& arguments) {
    std::vector<const char*> argv = {"train_gpt"};
    for (const std::string& argument : arguments) argv.push_back(argument.c_str());
    Options options = parse_options(int(argv.size()), argv.data());
    if (options.command == Options::Command::train) apply_recipe(options);
}

// One argument per line, except --config, which would read other files.
void flags(std::string_view input) {
    std::vector<std::string> arguments;
    while (!input.empty()) {
        const size_t end = std::min(input.find('\n'), input.size());
        arguments.emplace_back(input.substr(0, end));
        if (arguments.back().find("--conf") != std::string::npos) return;
        input.remove_prefix(std::min(end + 1, input.size()));
    }
    parse(arguments);
}

void config_file(std::string_view input) {
    parse_config_file(input, "flags.conf"); // rejects most inputs, a hundred times faster
    parse({"--config", file("flags.conf", input)});
}

// checksums.json of a checkpoint whose only file is empty.
void checksums(std::string_view input) {
    fs::create_directories(scratch() + "/checksums");
    file("checksums/config.json", "");
    file("checksums/checksums.json", input);
    checkpoint_config(scratch() + "/checksums");
}

struct Target {
    const char* name;
    void (*run)(std::string_view input);
};
const Target targets[] = {
    {"json", json},
    {"safetensors", safetensors},
    {"index", index},
    {"shard", shard},
    {"config", config},
    {"state", state},
    {"run", run},
    {"gpt2", gpt2},
    {"tokenizer_json", tokenizer_json},
    {"sentencepiece", sentencepiece},
    {"encode", encode},
    {"decode", decode},
    {"flags", flags},
    {"config_file", config_file},
    {"checksums", checksums},
};
const Target* target = nullptr;

} // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::string name = fs::path((*argv)[0]).filename();
    for (const Target& t : targets)
        if (name == t.name) target = &t;
    if (target) return 0;
    if (*argc < 2 || std::strcmp((*argv)[1], "--list") != 0)
        std::fprintf(stderr, "%s is not a target; the targets are:\n", name.c_str());
    for (const Target& t : targets) std::printf("%s\n", t.name);
    std::exit(*argc < 2);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        target->run({reinterpret_cast<const char*>(data), size});
    } catch (const Error&) {
    }
    return 0;
}
