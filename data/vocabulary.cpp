// vocabulary: trains a SentencePiece model on text, for data/tokenize --tokenizer FILE.model.
//
// The model is like LLaMA's: byte-pair encoding without normalization, a piece for every byte, so
// that every text can be decoded, and single digits. Its sentences are lines, so no piece spans a
// newline. The same text gives the same model.
//
// The trainer aborts at words of 65,536 characters, and skips lines that are long or contain its
// own special characters. So long words and lines are split, and characters that it does not accept
// become spaces. The program says how many.
#include "data/tool.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"
#include "gpt/data/paths.h"
#include "gpt/data/text.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>
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
constexpr size_t longest_line = 16 << 10; // bytes; longer ones are cut at the next space
constexpr size_t longest_word = 1000;     // characters; a piece has 16 at most

// Reads a file, or stdin for "-", byte by byte.
struct Input {
    std::string name;
    Fd file;
    std::string block;
    size_t at = 0;

    explicit Input(const std::string& path) : name(path == "-" ? "stdin" : path) {
        file = Fd(path == "-" ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC));
        if (!file) fail("cannot open ", name, ": ", std::strerror(errno));
        fill();
        if (std::string reason = why_not_text(block, name, "data/vocabulary"); !reason.empty())
            fail(reason);
    }
    void fill() {
        block.resize(1 << 16);
        size_t used = 0;
        while (used < block.size()) {
            const ssize_t n = read(file.fd, block.data() + used, block.size() - used);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail("cannot read ", name, ": ", std::strerror(errno));
            if (n == 0) break;
            used += size_t(n);
        }
        block.resize(used);
        at = 0;
    }
    // -1 at the end
    int peek() {
        if (at == block.size()) fill();
        return block.empty() ? -1 : static_cast<unsigned char>(block[at]);
    }
    int get() {
        const int byte = peek();
        if (byte >= 0) at++;
        return byte;
    }
};

// The sentences for the trainer: the lines of all files, without document separators, long ones in
// parts.
struct Lines : sentencepiece::SentenceIterator {
    const Options& options;
    size_t next = 0; // file
    std::unique_ptr<Input> in;
    std::string chunk;   // of a line
    size_t at = 0;       // in it
    bool inside = false; // more of its line follows
    size_t word = 0;     // characters since the last space or cut
    bool word_cut = false;
    std::string sentence;
    uint64_t bytes = 0, lines = 0, long_lines = 0, long_words = 0, replaced = 0;
    bool ended = false;

    explicit Lines(const Options& options) : options(options) { Next(); }
    bool done() const override { return ended; }
    const std::string& value() const override { return sentence; }
    sentencepiece::util::Status status() const override { return {}; }
    void Next() override {
        sentence.clear();
        while (sentence.empty()) {
            if (at == chunk.size() && !read_chunk()) {
                ended = true;
                return;
            }
            take_sentence();
        }
    }

  private:
    // Reads the next chunk, of this or the next line; false at the end.
    bool read_chunk() {
        while (true) {
            if (!in && next == options.files.size()) return false;
            if (!in) in = std::make_unique<Input>(options.files[next++]);
            const bool begins = !inside;
            chunk.clear(), at = 0, inside = false;
            int byte;
            while ((byte = in->get()) >= 0 && byte != '\n') {
                if (byte == ' ' && chunk.size() >= longest_line) {
                    inside = true; // the trainer puts a space before the next part
                    break;
                }
                chunk += char(byte);
                if (chunk.size() < 2 * longest_line) continue;
                inside = (in->peek() & 0xC0) != 0x80 || chunk.size() > 2 * longest_line + 4;
                if (inside) break;
            }
            if (byte < 0) in = nullptr;
            if (!inside && !chunk.empty() && chunk.back() == '\r') chunk.pop_back();
            if (begins && !inside && (chunk.empty() || chunk == options.separator)) continue;
            if (begins || byte == ' ') word = 0, word_cut = false;
            lines += begins, long_lines += begins && inside;
            bytes += chunk.size();
            if (!chunk.empty()) return true;
        }
    }

    // The length of the character at chunk[i]; 0 if the trainer does not accept it.
    size_t character(size_t i) const {
        const unsigned char lead = static_cast<unsigned char>(chunk[i]);
        if (lead < 0x80) return lead != 0;
        const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
        const std::string_view c = std::string_view(chunk).substr(i, length);
        return c.size() == length && is_utf8(c) && c != "\u2585" ? length : 0;
    }

    // The chunk, up to where a word becomes too long.
    void take_sentence() {
        while (at < chunk.size()) {
            const size_t length = character(at);
            if (length == 0 || chunk[at] == ' ') {
                replaced += length == 0;
                sentence += ' ';
                word = 0, word_cut = false;
                at++;
                continue;
            }
            if (word == longest_word) {
                long_words += !std::exchange(word_cut, true);
                word = 0;
                return;
            }
            sentence.append(chunk, at, length);
            word++;
            at += length;
        }
    }
};

std::string count(uint64_t n, const char* what) { return cat(n, " ", what, n == 1 ? "" : "s"); }

void run(const Options& options) {
    const std::string suffix = ".model";
    if (options.out.size() <= suffix.size() ||
        options.out.substr(options.out.size() - suffix.size()) != suffix)
        fail("--out '", options.out, "' does not end in .model, as SentencePiece models do");
    // 256 bytes, <unk>, <s> and </s> come first; the trainer also needs every letter.
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
    if (!status.ok()) {
        const std::string why = status.ToString();
        const bool too_small = why.find("smaller than required_chars") != std::string::npos;
        fail("SentencePiece cannot learn a vocabulary of ", options.size, " from these ",
             lines.bytes, " bytes: ", why, why.ends_with('.') ? " " : ". ",
             too_small ? "Use a larger --size: every character of the text needs a piece"
                       : "If the text is too short for that many pieces, use a smaller --size");
    }
    write_file_atomic(options.out, model);
    std::printf("%s: %d pieces, learned from %.1f MB in %s\n", printable(options.out).c_str(),
                options.size, double(lines.bytes) / 1e6, count(lines.lines, "line").c_str());
    if (lines.long_lines)
        std::printf("  %s of more than %zu bytes learned in parts\n",
                    count(lines.long_lines, "line").c_str(), longest_line);
    if (lines.long_words)
        std::printf("  %s of more than %zu characters learned in parts\n",
                    count(lines.long_words, "word").c_str(), longest_word);
    if (lines.replaced)
        std::printf("  %s taken for spaces: zero, invalid UTF-8, or U+2585, which SentencePiece "
                    "reserves\n",
                    count(lines.replaced, "byte").c_str());
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
    CLI::App app("Trains a SentencePiece model on text files.");
    app.option_defaults()->always_capture_default();
    app.add_option("files", options.files, "Text files; - or none: stdin")->type_name("FILE");
    app.add_option("-o,--out", options.out, "The model to write, FILE.model")
        ->required()
        ->type_name("FILE")
        ->always_capture_default(false);
    app.add_option("--size", options.size,
                   "Number of pieces, including 256 bytes and 3 special ones")
        ->check(CLI::Range(300, 1 << 20))
        ->type_name("N");
    app.add_option("--doc-separator", options.separator,
                   "A line that ends a document, as for data/tokenize; it is not part of the text")
        ->type_name("STR");
    return lns::run_tool("vocabulary", app, argc, argv, [&] {
        options.out = lns::expand_home(options.out);
        for (std::string& file : options.files) file = lns::expand_home(file);
        if (options.files.empty()) options.files = {"-"};
        lns::run(options);
    });
}
