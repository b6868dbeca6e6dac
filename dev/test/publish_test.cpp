// Replaces a set of files by a process that is killed at each of its system calls in turn.
#include "dev/test/data_helpers.h"
#include "gpt/data/paths.h"
#include "gpt/data/publish.h"

#include <csignal>
#include <sys/ptrace.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

void write_set(
    const std::string& prefix, const std::string& text, size_t train, size_t val,
    const std::function<void()>& before_publishing = [] {}) {
    PublishedSet set(prefix);
    for (size_t i = 0; i < train; i++) write_bytes(set.new_path("train", i), text);
    for (size_t i = 0; i < val; i++) write_bytes(set.new_path("val", i), text);
    fs::create_directory(set.new_tokenizer());
    write_bytes(set.new_tokenizer() + "/tokenizer.json", text);
    before_publishing();
    set.publish();
}

// "old 3 1": the content of the files, and the number of each kind; or "nothing"
std::string shown(const std::string& prefix) {
    std::string text, counts;
    auto add = [&](const std::string& more) {
        if (text.empty()) text = more;
        if (text != more) text = "mixed";
    };
    for (const char* kind : {"train", "val"}) {
        std::vector<std::string> paths;
        try {
            paths = glob_paths(prefix + "_" + kind + "_*.bin");
        } catch (const Error&) { // none
        }
        for (const std::string& path : paths) add(read_bytes(path));
        counts += cat(" ", paths.size());
    }
    if (fs::exists(prefix + "_tokenizer")) add(read_bytes(prefix + "_tokenizer/tokenizer.json"));
    return text.empty() ? "nothing" : text + counts;
}

bool all_plain(const std::string& dir) {
    for (const auto& entry : fs::directory_iterator(dir))
        if (entry.is_symlink() || entry.path().filename().string()[0] == '.') return false;
    return true;
}

// Runs the action in a child that is killed before its n-th system call after it calls its
// argument. false if it ended before, -1 if processes cannot be traced here.
int killed_at(int n, const std::function<void(const std::function<void()>&)>& action) {
    const pid_t child = fork();
    if (child == 0) {
        action([] {
            if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(3);
            raise(SIGSTOP);
        });
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status)) return -1;
    for (int stops = 0; stops < 2 * n; stops++) { // one before and one after each call
        ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status)) return 0;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return 1;
}

// Every step is synced, which takes a disk a second.
struct MemoryForTemporaries {
    std::string before = std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "";
    MemoryForTemporaries() {
        if (fs::is_directory("/dev/shm")) setenv("TMPDIR", "/dev/shm", 1);
    }
    ~MemoryForTemporaries() {
        if (before.empty())
            unsetenv("TMPDIR");
        else
            setenv("TMPDIR", before.c_str(), 1);
    }
};

struct Sizes {
    size_t train, val;
};

} // namespace

TEST(Publish, AKillAtAnyStepLeavesOneSet) {
    const MemoryForTemporaries memory;
    for (const auto& [before, after] : {std::pair<Sizes, Sizes>{{3, 1}, {3, 1}},
                                        {{4, 2}, {2, 0}},
                                        {{1, 0}, {3, 1}},
                                        {{0, 0}, {2, 1}}}) {
        int steps = 0;
        for (int n = 1;; n++) {
            TemporaryDirectory dir;
            const std::string prefix = dir / "x";
            if (before.train) write_set(prefix, "old", before.train, before.val);
            const std::string old = shown(prefix);
            const int killed =
                killed_at(n, [&, &after = after](const std::function<void()>& begin) {
                    write_set(prefix, "new", after.train, after.val, begin);
                });
            if (killed < 0) GTEST_SKIP() << "processes cannot be traced here";
            const std::string fresh = cat("new ", after.train, " ", after.val);
            const std::string found = shown(prefix);
            ASSERT_TRUE(found == fresh || found == old) << found << " at step " << n;
            if (!killed) {
                EXPECT_EQ(found, fresh);
                EXPECT_TRUE(all_plain(dir.path));
                break;
            }
            steps += found == old;
            // The next publisher cleans up, even if it fails.
            { PublishedSet next(prefix); }
            ASSERT_EQ(shown(prefix), found) << "cleaned up after step " << n;
            ASSERT_TRUE(all_plain(dir.path)) << "cleaned up after step " << n;
        }
        EXPECT_GT(steps, 5);
    }
}

TEST(Publish, UnpublishedSetsLeaveNothing) {
    TemporaryDirectory dir;
    write_set(dir / "x", "old", 2, 1);
    {
        PublishedSet set(dir / "x");
        write_bytes(set.new_path("train", 0), "new");
        EXPECT_TRUE(
            says(error_of([&] { PublishedSet second(dir / "x"); }), {"another tokenize", "/x_*"}));
        PublishedSet other(dir / "x2"); // another prefix
    }
    EXPECT_EQ(shown(dir / "x"), "old 2 1");
    EXPECT_TRUE(all_plain(dir.path));
}

TEST(Publish, OtherFilesStay) {
    TemporaryDirectory dir;
    for (const char* name : {"x_train_notes.bin", "x_trainer_000001.bin", "xx_train_000001.bin"})
        write_bytes(dir / name, "mine");
    write_set(dir / "x", "old", 4, 1);
    PublishedSet set(dir / "x");
    write_bytes(set.new_path("train", 0), "new");
    EXPECT_EQ(set.publish(), 4); // 3 of train, 1 of val
    for (const char* name : {"x_train_notes.bin", "x_trainer_000001.bin", "xx_train_000001.bin"})
        EXPECT_EQ(read_bytes(dir / name), "mine");
    EXPECT_EQ(read_bytes(dir / "x_train_000000.bin"), "new");
    EXPECT_FALSE(fs::exists(dir / "x_train_000001.bin"));
    EXPECT_FALSE(fs::exists(dir / "x_tokenizer"));
}

TEST(Publish, ASwitchedReaderSeesNoMixture) {
    // A dangling link of a set being published is ignored.
    TemporaryDirectory dir;
    write_bytes(dir / "x_train_000000.bin", "old");
    fs::create_symlink(".x.set/x_train_000001.bin", dir / "x_train_000001.bin");
    EXPECT_EQ(glob_paths(dir / "x_train_*.bin"),
              (std::vector<std::string>{dir / "x_train_000000.bin"}));
    // Any other broken link is still an error.
    fs::create_symlink("nowhere", dir / "x_train_000002.bin");
    EXPECT_EQ(glob_paths(dir / "x_train_*.bin").size(), 2u);
}
