#include "gpt/run/chat.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <unistd.h>

#ifdef LNS_LIBEDIT
#include <editline/readline.h>
#endif

#include "gpt/base/error.h"

namespace lns {

namespace {

volatile std::sig_atomic_t interrupted = 0;

// Ctrl-C sets `interrupted`; reads return with EINTR.
struct InterruptHandler {
    struct sigaction before {};
    InterruptHandler() {
        struct sigaction action {};
        action.sa_handler = [](int) { interrupted = 1; };
        sigaction(SIGINT, &action, &before);
    }
    ~InterruptHandler() { sigaction(SIGINT, &before, nullptr); }
};

// Lines of the user.
class Lines {
  public:
    const bool terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);

    // Nothing at the end of the input. A line that Ctrl-C abandons is empty.
    std::optional<std::string> next() {
        interrupted = 0;
        if (!terminal) return plain();
#ifdef LNS_LIBEDIT
        char* line = readline("> ");
        if (!line) {
            std::cout << std::endl;
            return interrupted ? std::optional<std::string>("") : std::nullopt;
        }
        std::string text = line;
        std::free(line);
        if (!text.empty()) add_history(text.c_str());
        return text;
#else
        std::cout << "> " << std::flush;
        return plain();
#endif
    }

  private:
    std::optional<std::string> plain() {
        std::string line;
        for (char c; line.size() < (size_t(1) << 24);) {
            const ssize_t n = ::read(STDIN_FILENO, &c, 1);
            if (n < 0 && errno == EINTR) {
                std::cout << std::endl;
                return "";
            }
            if (n <= 0 && line.empty()) return {};
            if (n <= 0 || c == '\n') return line;
            line += c;
        }
        fail("a line of more than 16 MiB");
    }
};

// Writes an answer as it grows, and returns it.
std::string answer(Model& model, const Tokenizer& tokenizer, const std::vector<int>& prompt,
                   const std::vector<int>& ends, const ChatSettings& settings) {
    std::vector<int> made;
    std::string text;
    TextStream stream;
    const int room = settings.context - int(prompt.size());
    generate(model, prompt, std::min(settings.longest, room), settings.context, settings.sampling,
             [&](int token) {
                 if (interrupted || std::find(ends.begin(), ends.end(), token) != ends.end())
                     return false;
                 made.push_back(token);
                 text = continuation(tokenizer, prompt, made);
                 stream.show(text, whole_characters(text));
                 return true;
             });
    stream.show(text, text.size());
    std::cout << std::endl;
    return text;
}

} // namespace

void chat(Model& model, const Tokenizer& tokenizer, const ChatTemplate& format,
          const ChatSettings& given) {
    ChatSettings settings = given;
    settings.sampling.vocabulary = tokenizer.vocab_size();
    const std::vector<int> ends = answer_ends(format, tokenizer);
    Messages messages = Messages::array();
    const auto begin = [&] {
        messages = Messages::array();
        if (!settings.system.empty())
            messages.push_back({{"role", "system"}, {"content", settings.system}});
    };
    begin();
    const size_t kept = messages.size(); // the system's message is never forgotten
    const InterruptHandler handler;
    Lines lines;
    if (lines.terminal)
        std::cout << "Ctrl-C stops an answer, Ctrl-D ends; /clear begins a new conversation.\n"
                  << std::endl;
    while (std::optional<std::string> line = lines.next()) {
        if (*line == "/clear") begin();
        if (line->empty() || *line == "/clear") continue;
        if (*line == "/quit" || *line == "/exit") break;
        messages.push_back({{"role", "user"}, {"content", *line}});
        const auto encode = [&] {
            return encode_rendered(format.prompt(messages, tokenizer), tokenizer, false);
        };
        std::vector<int> prompt = encode();
        bool forgot = false;
        // A quarter of the context is room for the answer. Questions go with their answers.
        while (int(prompt.size()) > settings.context - settings.context / 4 &&
               messages.size() > kept + 2) {
            messages.erase(messages.begin() + std::ptrdiff_t(kept),
                           messages.begin() + std::ptrdiff_t(kept) + 2);
            prompt = encode();
            forgot = true;
        }
        if (int(prompt.size()) >= settings.context) {
            std::cerr << "train_gpt: that is " << prompt.size() << " tokens with the template; the "
                      << "conversation holds " << settings.context << std::endl;
            messages.erase(messages.end() - 1);
            continue;
        }
        if (forgot && lines.terminal) std::cout << "(the oldest turns are forgotten)\n";
        check_prompt(prompt, model.config.vocab_size);
        const std::string text = answer(model, tokenizer, prompt, ends, settings);
        messages.push_back({{"role", "assistant"}, {"content", text}});
        settings.sampling.seed++;
    }
}

} // namespace lns
