#include "gpt/files.h"

#include "dev/test/data_helpers.h"

#include <csignal>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
using namespace std::string_literals;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> listing(const std::string& dir) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir))
        names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}
using Names = std::vector<std::string>;

// Runs action in a child process, which may change its limits and mounts; its exit status.
template <class Action> int in_child(Action action) {
    std::fflush(nullptr);
    pid_t pid = fork();
    if (pid == 0) {
        int status = 90;
        try {
            status = action();
        } catch (const std::exception& error) {
            std::fprintf(stderr, "in the child: %s\n", error.what());
        }
        _exit(status);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

} // namespace

TEST(Files, AFileIsReadAsItWasWritten) {
    TemporaryDirectory dir;
    std::string text("line\n\0\xff"s), large(3'000'001, 'x');
    write_file_atomic(dir / "a", text);
    EXPECT_EQ(read_file(dir / "a"), text);
    write_file_atomic(dir / "a", "");
    EXPECT_EQ(read_file(dir / "a"), "");
    write_file_atomic(dir / "a", large);
    EXPECT_EQ(read_file(dir / "a"), large);
    EXPECT_EQ(listing(dir.path), Names{"a"});
    EXPECT_FALSE(read_file("/proc/self/status").empty()); // a file that says it has no bytes
}

TEST(Files, ErrorsNameTheFileAndTheReason) {
    TemporaryDirectory dir;
    EXPECT_TRUE(says(error_of([&] { read_file(dir / "absent"); }),
                     {dir / "absent", "No such file or directory"}));
    EXPECT_TRUE(says(error_of([&] { read_file(dir.path); }), {dir.path, "Is a directory"}));
    EXPECT_TRUE(says(error_of([&] { write_file_atomic(dir / "absent/a", "x"); }),
                     {dir / "absent/a", "No such file or directory"}));
}

TEST(Files, PiecesOfAllSizesArriveInOrder) {
    TemporaryDirectory dir;
    std::string expected;
    AtomicFile file(dir / "a");
    for (size_t size : {1, 0, 1000, 1 << 20, 3, (1 << 20) - 3, (1 << 20) + 1, 2}) {
        std::string piece(size, char('a' + expected.size() % 26));
        file.write(piece.data(), piece.size());
        expected += piece;
    }
    EXPECT_FALSE(fs::exists(dir / "a"));
    file.commit();
    EXPECT_EQ(read_file(dir / "a"), expected);
}

TEST(Files, WithoutCommitNothingChanges) {
    TemporaryDirectory dir;
    write_file_atomic(dir / "a", "before");
    {
        AtomicFile file(dir / "a");
        file.write("after", 5);
        AtomicDirectory directory(dir / "d");
        write_bytes(directory.temporary() + "/x", "x");
    }
    EXPECT_EQ(read_file(dir / "a"), "before");
    EXPECT_EQ(listing(dir.path), Names{"a"});
}

TEST(Files, AFailedWriteIsASentence) {
    int fd = open("/dev/full", O_WRONLY);
    if (fd < 0) GTEST_SKIP() << "no /dev/full here";
    EXPECT_TRUE(says(error_of([&] { write_all(fd, "x", 1, "/dev/full"); }),
                     {"/dev/full", "No space left on device", "free some space"}));
    close(fd);
}

TEST(Files, AWriteThatFailsHalfwayLeavesTheOldFile) {
    TemporaryDirectory dir;
    write_file_atomic(dir / "a", "before");
    EXPECT_EQ(0, in_child([&] {
                  std::signal(SIGXFSZ, SIG_IGN);
                  rlimit limit = {1000, 1000};
                  setrlimit(RLIMIT_FSIZE, &limit);
                  std::string error =
                      error_of([&] { write_file_atomic(dir / "a", std::string(5000, 'x')); });
                  return says(error, {dir / "a", "File too large"}) ? 0 : 1;
              }));
    EXPECT_EQ(read_file(dir / "a"), "before");
    EXPECT_EQ(listing(dir.path), Names{"a"});
}

TEST(Files, AFullDiskLeavesTheOldFilesAndNothingElse) {
    TemporaryDirectory dir;
    int status = in_child([&] {
        if (unshare(CLONE_NEWNS | (geteuid() ? CLONE_NEWUSER : 0)) != 0 ||
            mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
            mount("tmpfs", dir.path.c_str(), "tmpfs", 0, "size=256k") != 0)
            return 77;
        write_file_atomic(dir / "a", "before");
        std::string big(1'000'000, 'x');
        if (!says(error_of([&] { write_file_atomic(dir / "a", big); }),
                  {dir / "a", "No space left"}))
            return 1;
        {
            AtomicDirectory checkpoint(dir / "c");
            if (error_of([&] { write_file_atomic(checkpoint.temporary() + "/m", big); }).empty())
                return 2;
        }
        if (read_file(dir / "a") != "before" || listing(dir.path) != Names{"a"}) return 3;
        if (!says(error_of([&] { check_writable(dir.path, 1'000'000); }),
                  {"252 KiB free", "977 KiB are needed"}))
            return 4;
        check_writable(dir.path, 100'000);
        return 0;
    });
    if (status == 77) GTEST_SKIP() << "no right to mount a small file system here";
    EXPECT_EQ(status, 0);
}

TEST(Files, ADirectoryAppearsWholeOrReplacesOne) {
    TemporaryDirectory dir;
    for (std::string content : {"one", "other"}) {
        AtomicDirectory directory(dir / "d/");
        write_bytes(directory.temporary() + "/" + content, content);
        fs::create_directories(directory.temporary() + "/sub/sub");
        write_bytes(directory.temporary() + "/sub/sub/x", "x");
        EXPECT_EQ(fs::exists(dir / "d/one"), content == "other");
        directory.commit();
        EXPECT_EQ(listing(dir / "d"), (Names{content, "sub"}));
        EXPECT_EQ(listing(dir.path), Names{"d"});
    }
    EXPECT_TRUE(says(error_of([&] { AtomicDirectory d(dir / "absent/d"); }),
                     {dir / "absent/d", "No such file"}));
}

TEST(Files, OnlyWhatKilledProcessesLeftIsRemoved) {
    TemporaryDirectory dir;
    pid_t dead = fork();
    if (dead == 0) _exit(0);
    waitpid(dead, nullptr, 0);
    std::string ours = cat(".a.tmp-", getpid()), alive = cat(".b.tmp-", getppid());
    std::string old = cat(".step-000001.tmp-", dead, ".old"), gone = cat(".c.tmp-", dead);
    for (const std::string& name :
         {ours, alive, gone + "x", std::string("a.tmp-1"), std::string(".x")})
        write_bytes(dir / name, "x");
    fs::create_directories(dir / gone + "/sub");
    fs::create_directories(dir / old);
    remove_stale_temporaries(dir.path);
    // What was moved aside for a successor that never came is put back.
    EXPECT_EQ(listing(dir.path), (Names{alive, gone + "x", ".x", "a.tmp-1", "step-000001"}));
    remove_stale_temporaries(dir.path, true);
    EXPECT_EQ(listing(dir.path), (Names{gone + "x", ".x", "a.tmp-1", "step-000001"}));
    remove_stale_temporaries(dir / "absent");
}

TEST(Files, WhetherADirectoryCanBeWrittenIsFoundOutBefore) {
    TemporaryDirectory dir;
    check_writable(dir.path, 1);
    EXPECT_TRUE(listing(dir.path).empty());
    write_bytes(dir / "file", "");
    EXPECT_TRUE(
        says(error_of([&] { check_writable(dir / "absent"); }), {"absent", "No such file"}));
    EXPECT_TRUE(says(error_of([&] { check_writable(dir / "file"); }), {"is a file"}));
    EXPECT_TRUE(says(error_of([&] { check_writable(dir.path, UINT64_MAX); }),
                     {dir.path, "are needed", "free some space"}));
    EXPECT_EQ(0, in_child([&] {
                  fs::permissions(dir.path, fs::perms(0555));
                  if (geteuid() == 0 && setuid(65534) != 0) return 0;
                  return says(error_of([&] { check_writable(dir.path); }), {"Permission denied"})
                             ? 0
                             : 1;
              }));
    fs::permissions(dir.path, fs::perms(0755));
}
