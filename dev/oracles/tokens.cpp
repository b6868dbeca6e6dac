// tokens TOKENIZER encode|spell|decode|show: a filter for dev/oracles/compare_tokenizers.py, which
// compares with PyPI's tokenizers. encode and spell (Specials::spelled) read texts and write
// tokens; decode and show read tokens and write texts. A record is a count, then so many bytes or
// tokens; counts and tokens are int32.
//
// tokens TOKENIZER time FILE: prints the megabytes encoded per second on one core, best of three.
// tokens TOKENIZER export FOLDER: as `train_gpt export` does.
#include "gpt/base/clock.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/data/tokenizer.h"
#include "gpt/run/export_files.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

namespace lns {
namespace {

// False at the end of the input.
template <class T> bool read_record(std::vector<T>& record) {
    int32_t count;
    if (std::fread(&count, sizeof count, 1, stdin) != 1) return false;
    record.resize(size_t(count));
    return count == 0 ||
           std::fread(record.data(), sizeof(T), record.size(), stdin) == record.size();
}

template <class T> void write_record(const T* values, size_t n) {
    const auto count = int32_t(n);
    std::fwrite(&count, sizeof count, 1, stdout);
    std::fwrite(values, sizeof(T), n, stdout);
}

void run(const std::string& spec, const std::string& mode, const std::string& path) {
    const auto tokenizer = load_tokenizer(spec);
    if (mode == "export") {
        std::filesystem::create_directories(path);
        tokenizer->save(path + "/checkpoint");
        export_tokenizer(path + "/checkpoint", path);
        return;
    }
    if (mode == "time") {
        const std::string text = read_file(path);
        double best = 0;
        for (int i = 0; i < 3; i++) {
            const double start = now();
            tokenizer->encode(text);
            best = std::max(best, double(text.size()) / 1e6 / (now() - start));
        }
        std::printf("%.1f\n", best);
        return;
    }
    const Specials specials =
        mode == "spell" || mode == "show" ? Specials::spelled : Specials::ignored;
    std::vector<char> text;
    std::vector<int> tokens;
    if (mode == "encode" || mode == "spell")
        while (read_record(text)) {
            tokens = tokenizer->encode({text.data(), text.size()}, specials);
            if (mode == "spell" && tokenizer->bos >= 0)
                tokens.insert(tokens.begin(), tokenizer->bos);
            if (mode == "spell" && tokenizer->eos >= 0) tokens.push_back(tokenizer->eos);
            write_record(tokens.data(), tokens.size());
        }
    else if (mode == "decode" || mode == "show")
        while (read_record(tokens)) {
            const std::string out = tokenizer->decode(tokens, specials);
            write_record(out.data(), out.size());
        }
    else
        fail("the mode is ", mode, ", expected encode, spell, decode, show, time or export");
}

} // namespace
} // namespace lns

int main(int argc, char** argv) {
    try {
        if (argc < 3)
            lns::fail("usage: tokens TOKENIZER encode|spell|decode|show|time|export [PATH]");
        lns::run(argv[1], argv[2], argc > 3 ? argv[3] : "");
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tokens: %s\n", error.what());
        return 1;
    }
}
