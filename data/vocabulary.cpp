// vocabulary: learns a SentencePiece model from text, for data/tokenize --tokenizer FILE.model.
//
// The model is of LLaMA's kind: byte-pair encoding that folds nothing, with a piece for every byte,
// so that it gives back every text; digits one by one. Lines are its sentences, so that no piece
// reaches across a newline. The same text gives the same model.
#include "gpt/error.h"
#include "gpt/paths.h"
#include "gpt/signals.h"
#include "gpt/terminal.h"

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#ifdef LNS_SENTENCEPIECE
#include <sentencepiece_trainer.h>
#endif

namespace lns {
namespace {

struct Options {
    int size = 4096;
    std::string separator, out;
    std::vector<std::string> files;
};

#ifdef LNS_SENTENCEPIECE
// The lines of all files but for those that only separate documents, as the trainer asks for them.
struct Lines : sentencepiece::SentenceIterator {
    const Options& options;
    size_t next = 0; // file
    std::ifstream file;
    std::istream* in = nullptr;
    std::string line;
    uint64_t bytes = 0;
    bool ended = false;

    explicit Lines(const Options& options) : options(options) { Next(); }
    bool done() const override { return ended; }
    const std::string& value() const override { return line; }
    sentencepiece::util::Status status() const override { return {}; }
    void Next() override {
        while (true) {
            if (!in && next == options.files.size()) {
                ended = true;
                return;
            }
            if (!in) open();
            if (!std::getline(*in, line)) {
                in = nullptr;
                continue;
            }
            if (!line.empty() && line.back() == '\r') line.pop_back();
            if (line.empty() || line == options.separator) continue;
            bytes += line.size();
            return;
        }
    }

  private:
    void open() {
        const std::string& path = options.files[next++];
        in = &std::cin;
        if (path == "-") return;
        file = std::ifstream(path, std::ios::binary);
        if (!file) fail("cannot open ", path, ": ", std::strerror(errno));
        in = &file;
    }
};

void run(const Options& options) {
    const std::string suffix = ".model";
    if (options.out.size() <= suffix.size() ||
        options.out.substr(options.out.size() - suffix.size()) != suffix)
        fail("--out '", options.out, "' does not end in .model, as SentencePiece models do");
    // 256 bytes, <unk>, <s> and </s> come first; the trainer wants every letter besides.
    Lines lines(options);
    if (lines.ended) fail("there is no text in the input to learn from");
    std::string model;
    auto status =
        sentencepiece::SentencePieceTrainer::Train({{"model_type", "bpe"},
                                                    {"vocab_size", std::to_string(options.size)},
                                                    {"byte_fallback", "true"},
                                                    {"character_coverage", "0.9995"},
                                                    {"normalization_rule_name", "identity"},
                                                    {"remove_extra_whitespaces", "false"},
                                                    {"split_digits", "true"},
                                                    {"allow_whitespace_only_pieces", "true"},
                                                    {"max_sentence_length", "1000000"},
                                                    {"num_threads", "1"},
                                                    {"minloglevel", "1"}},
                                                   &lines, &model);
    if (!status.ok())
        fail("SentencePiece learns no vocabulary of ", options.size, " from these ", lines.bytes,
             " bytes: ", status.ToString(),
             ". Where it finds the text too short for so many pieces, ask for a smaller --size");
    const std::string temporary = options.out + ".tmp";
    std::ofstream file(temporary, std::ios::binary);
    file << model;
    file.close();
    if (!file || std::rename(temporary.c_str(), options.out.c_str()) != 0)
        fail("cannot write ", options.out, ": ", std::strerror(errno));
    std::printf("%s: %d pieces, learned from %.1f MB\n", printable(options.out).c_str(),
                options.size, double(lines.bytes) / 1e6);
}
#else
void run(const Options&) {
    fail("this build has no SentencePiece. Run `make deps` (it installs libsentencepiece-dev) and "
         "`make data/vocabulary`, or learn the model elsewhere with spm_train");
}
#endif

} // namespace
} // namespace lns

int main(int argc, char** argv) {
    lns::prepare_process();
    lns::Options options;
    CLI::App app("Learns a SentencePiece vocabulary from text files.");
    app.option_defaults()->always_capture_default();
    app.add_option("files", options.files, "Text files; - or none: stdin")->type_name("FILE");
    app.add_option("-o,--out", options.out, "The model to write, FILE.model")
        ->required()
        ->type_name("FILE")
        ->always_capture_default(false);
    app.add_option("--size", options.size, "Pieces, the 256 bytes and 3 special ones among them")
        ->check(CLI::Range(300, 1 << 20))
        ->type_name("N");
    app.add_option("--doc-separator", options.separator,
                   "The line that ends a document, as for data/tokenize: it is not learned")
        ->type_name("STR");
    try {
        app.parse(argc, argv);
        options.out = lns::expand_home(options.out);
        for (std::string& file : options.files) file = lns::expand_home(file);
        if (options.files.empty()) options.files = {"-"};
        lns::run(options);
        return lns::output_status("vocabulary");
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) { // --help
            app.exit(error);
            return lns::output_status("vocabulary");
        }
        std::fprintf(stderr, "vocabulary: %s. See data/vocabulary --help\n",
                     lns::one_line(error.what()).c_str());
    } catch (const std::exception& error) {
        std::fprintf(stderr, "vocabulary: %s\n", lns::one_line(error.what()).c_str());
    }
    return 1;
}
