// Signals, closed descriptors, lost output.
#include "gpt/base/signals.h"

#include "dev/test/data_helpers.h"

#include <csignal>
#include <fcntl.h>
#include <thread>
#include <unistd.h>

using namespace lns;
using namespace lns::test;

namespace {

// The exit status and stderr of a child process that runs action.
template <class Action> Finished in_child(Action action) {
    int ends[2];
    if (pipe(ends) != 0) fail("no pipe");
    std::fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], STDERR_FILENO);
        action();
        _exit(99);
    }
    close(ends[1]);
    Finished f;
    char block[1000];
    for (ssize_t n; (n = read(ends[0], block, sizeof block)) > 0;)
        f.output.append(block, size_t(n));
    close(ends[0]);
    waitpid(pid, &f.status, 0);
    f.status = WIFEXITED(f.status) ? WEXITSTATUS(f.status) : 128 + WTERMSIG(f.status);
    return f;
}

const int stop_signals[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
const auto a_second = std::chrono::milliseconds(1010);

} // namespace

TEST(Signals, TheFirstRequestsAStop) {
    for (int signal : stop_signals) {
        Finished f = in_child([&] {
            install_stop_handlers();
            set_stage(Stage::training);
            if (stop_requested()) _exit(1);
            raise(signal);
            // Terminals, shells and launchers repeat signals.
            raise(signal == SIGINT ? SIGTERM : signal);
            _exit(stop_requested() ? 0 : 2);
        });
        EXPECT_EQ(f.status, 0) << signal;
        EXPECT_EQ(f.output, "");
    }
}

TEST(Signals, ALaterOneEndsAtOnceWithAMessage) {
    Finished f = in_child([&] {
        install_stop_handlers();
        set_stage(Stage::training);
        raise(SIGTERM);
        std::this_thread::sleep_for(a_second);
        raise(SIGXCPU); // the kernel repeats it every second
        raise(SIGINT);
    });
    EXPECT_EQ(f.status, 1);
    EXPECT_EQ(f.output,
              "train_gpt: SIGINT, a second signal, ended the run at once: nothing was saved "
              "since the last checkpoint\n");
    f = in_child([&] {
        install_stop_handlers();
        set_stage(Stage::training);
        raise(SIGTERM);
        set_stage(Stage::saved);
        std::this_thread::sleep_for(a_second);
        raise(SIGINT);
    });
    EXPECT_EQ(f.status, 130);
    EXPECT_EQ(f.output, "");
}

TEST(Signals, BeforeTrainingThereIsNothingToSave) {
    for (int signal : stop_signals) {
        Finished f = in_child([&] {
            install_stop_handlers();
            raise(signal);
        });
        EXPECT_EQ(f.status, 1);
        EXPECT_TRUE(says(f.output, {"train_gpt: SIG", "nothing to save"}));
    }
}

TEST(Signals, NohupIsRespected) {
    Finished f = in_child([&] {
        std::signal(SIGHUP, SIG_IGN);
        std::signal(SIGINT, SIG_IGN); // as in a script's background jobs
        install_stop_handlers();
        set_stage(Stage::training);
        raise(SIGHUP);
        if (stop_requested()) _exit(1);
        raise(SIGINT);
        _exit(stop_requested() ? 0 : 2);
    });
    EXPECT_EQ(f.status, 0);
}

TEST(Signals, OpenMpiAnnouncesTheEnd) {
    for (bool launched : {true, false}) {
        Finished f = in_child([&] {
            launched ? setenv("OMPI_COMM_WORLD_SIZE", "2", 1) : unsetenv("OMPI_COMM_WORLD_SIZE");
            install_stop_handlers();
            set_stage(Stage::training);
            raise(SIGCONT); // from this process, not its parent
            if (stop_requested()) _exit(1);
            // A child of this process, which acts as its launcher.
            int ends[2];
            if (pipe(ends) != 0) _exit(3);
            const pid_t rank = fork();
            if (rank == 0) {
                char byte = 'x';
                if (write(ends[1], &byte, 1) != 1) _exit(4);
                for (int i = 0; i < 100 && !stop_requested(); i++)
                    std::this_thread::sleep_for(std::chrono::milliseconds(launched ? 50 : 2));
                _exit(stop_requested() == launched ? 0 : 2);
            }
            char byte;
            if (read(ends[0], &byte, 1) != 1) _exit(5);
            kill(rank, SIGCONT);
            int status = 0;
            waitpid(rank, &status, 0);
            _exit(WEXITSTATUS(status));
        });
        EXPECT_EQ(f.status, 0) << launched;
    }
}

TEST(Signals, WritingFailsInsteadOfKilling) {
    TemporaryDirectory dir;
    Finished f = in_child([&] {
        prepare_process();
        int ends[2];
        if (pipe(ends) != 0) _exit(1);
        close(ends[0]);
        _exit(write(ends[1], "x", 1) == -1 && errno == EPIPE ? 0 : 2);
    });
    EXPECT_EQ(f.status, 0);
}

TEST(Signals, ClosedDescriptorsAreNotGivenToFiles) {
    TemporaryDirectory dir;
    Finished f = in_child([&] {
        for (int fd : {STDIN_FILENO, STDOUT_FILENO}) close(fd);
        prepare_process();
        int fd = open((dir / "a").c_str(), O_WRONLY | O_CREAT, 0666);
        if (fd <= STDERR_FILENO) _exit(1);
        std::puts("lost");
        _exit(output_status("test") == 1 ? 0 : 2);
    });
    EXPECT_EQ(f.status, 0);
    EXPECT_TRUE(says(f.output, {"test: cannot write to the standard output"}));
}
