#include "gpt/base/signals.h"

#include "gpt/base/error.h"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <iostream>
#include <unistd.h>

namespace lns {
namespace {

std::atomic<Stage> stage = Stage::starting;
std::atomic<int64_t> first_signal = 0; // nanoseconds since the machine started; 0: none yet
std::atomic<bool> launcher_stopping = false;
static_assert(std::atomic<Stage>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

struct NamedSignal {
    int signal;
    const char* name;
};
constexpr NamedSignal stop_signals[] = {{SIGHUP, "SIGHUP"},   {SIGINT, "SIGINT"},
                                        {SIGTERM, "SIGTERM"}, {SIGUSR1, "SIGUSR1"},
                                        {SIGUSR2, "SIGUSR2"}, {SIGXCPU, "SIGXCPU"}};

// Async-signal-safe: no allocation, no stdio.
void print(const char* text) { (void)!write(STDERR_FILENO, text, strlen(text)); }

[[noreturn]] void exit_now(int signal, const char* reason) {
    print("train_gpt: ");
    for (const NamedSignal& s : stop_signals)
        if (s.signal == signal) print(s.name);
    print(reason);
    _exit(1);
}

void on_stop(int signal) {
    const int error = errno;
    timespec time = {};
    clock_gettime(CLOCK_MONOTONIC, &time);
    const int64_t now = int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
    int64_t first = 0;
    const bool is_first = first_signal.compare_exchange_strong(first, now);
    if (stage == Stage::starting)
        exit_now(signal, " ended the run before its first step: there was nothing to save\n");
    // Terminals, shells and launchers may repeat a signal at once; the kernel repeats SIGXCPU every
    // second.
    if (!is_first && now - first >= 1'000'000'000 && signal != SIGXCPU) {
        if (stage == Stage::saved) _exit(130);
        exit_now(signal, ", a second signal, ended the run at once: nothing was saved since the "
                         "last checkpoint\n");
    }
    errno = error;
}

// SIGCONT. Open MPI's daemon, the parent of a rank, sends it when mpirun is stopped, a second
// before SIGTERM and two before SIGKILL.
void on_continue(int, siginfo_t* info, void*) {
    if (stage == Stage::training && info->si_pid == getppid()) launcher_stopping = true;
}

} // namespace

void prepare_process() {
    for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        if (fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
        // open returns the lowest free descriptor, which is this one. stdout is opened for reading,
        // so that writing to it fails.
        (void)!open("/dev/null", fd == STDERR_FILENO ? O_WRONLY : O_RDONLY);
    }
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
}

void install_stop_handlers() {
    struct sigaction action = {}, previous = {};
    action.sa_handler = on_stop;
    action.sa_flags = SA_RESTART;
    for (const NamedSignal& s : stop_signals) {
        // nohup ignores SIGHUP, and it stays ignored. SIGINT does not: it is ignored in background
        // jobs of scripts, where `kill -INT` still has to work.
        const bool ignored = s.signal == SIGHUP && sigaction(SIGHUP, nullptr, &previous) == 0 &&
                             previous.sa_handler == SIG_IGN;
        if (!ignored) sigaction(s.signal, &action, nullptr);
    }
    if (std::getenv("OMPI_COMM_WORLD_SIZE")) {
        action.sa_sigaction = on_continue;
        action.sa_flags = SA_RESTART | SA_SIGINFO;
        sigaction(SIGCONT, &action, nullptr);
    }
}

void remove_stop_handlers() {
    for (const NamedSignal& s : stop_signals) std::signal(s.signal, SIG_DFL);
    std::signal(SIGCONT, SIG_DFL);
}

void set_stage(Stage next) { stage = next; }

bool stop_requested() { return first_signal != 0 || launcher_stopping; }

std::string output_error(int error) {
    return cat("cannot write to the standard output: ",
               error ? std::strerror(error) : "some of it was lost");
}

void check_output() {
    errno = 0;
    std::cout.flush();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) || !std::cout) fail(output_error(errno));
}

int output_status(const char* program) {
    try {
        check_output();
        return 0;
    } catch (const Error& error) {
        std::fprintf(stderr, "%s: %s\n", program, error.what());
        return 1;
    }
}

} // namespace lns
