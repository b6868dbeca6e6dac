#include "gpt/base/files.h"

#include "dev/test/data_helpers.h"

#include <csignal>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
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

// The exit status of action in a child process, which may change its limits and mounts.
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

TEST(Files, AFileIsReadAsWritten) {
    TemporaryDirectory dir;
    std::string text("line\n\0\xff"s), large(3'000'001, 'x');
    write_file_atomic(dir / "a", text);
    EXPECT_EQ(read_file(dir / "a"), text);
    write_file_atomic(dir / "a", "");
    EXPECT_EQ(read_file(dir / "a"), "");
    write_file_atomic(dir / "a", large);
    EXPECT_EQ(read_file(dir / "a"), large);
    EXPECT_EQ(listing(dir.path), Names{"a"});
    EXPECT_FALSE(read_file("/proc/self/status").empty()); // its size is reported as 0
}

TEST(Files, ErrorsNameTheFileAndTheReason) {
    TemporaryDirectory dir;
    EXPECT_TRUE(says(error_of([&] { read_file(dir / "absent"); }),
                     {dir / "absent", "No such file or directory"}));
    EXPECT_TRUE(says(error_of([&] { read_file(dir.path); }), {dir.path, "Is a directory"}));
    EXPECT_TRUE(says(error_of([&] { write_file_atomic(dir / "absent/a", "x"); }),
                     {dir / "absent/a", "No such file or directory"}));
}

TEST(Files, AnUnknownStatusIsAnError) {
    TemporaryDirectory dir;
    const std::string name = dir.path + "/" + std::string(300, 'a');
    EXPECT_TRUE(says(error_of([&] { path_exists(name); }), {"cannot access", "name too long"}));
    EXPECT_TRUE(says(error_of([&] { is_directory_at(name); }), {"cannot access"}));
    EXPECT_TRUE(says(error_of([&] { is_regular_file_at(name); }), {"cannot access"}));
    EXPECT_TRUE(says(error_of([&] { directory_entries(dir.path + "/none"); }),
                     {"cannot read the directory", "none"}));
    EXPECT_FALSE(path_exists(dir.path + "/none/file"));
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

TEST(Files, AFailedWriteIsAnError) {
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

TEST(Files, ADirectoryAppearsCompleteOrReplacesOne) {
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

TEST(Files, OnlyRemainsOfKilledProcessesAreRemoved) {
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
    // A directory that was moved aside is restored if its replacement never came.
    EXPECT_EQ(listing(dir.path), (Names{alive, gone + "x", ".x", "a.tmp-1", "step-000001"}));
    remove_stale_temporaries(dir.path, true);
    EXPECT_EQ(listing(dir.path), (Names{gone + "x", ".x", "a.tmp-1", "step-000001"}));
    remove_stale_temporaries(dir / "absent");
}

TEST(Files, LinksAreFollowedToTheirTargets) {
    TemporaryDirectory dir;
    fs::create_directory(dir / "d");
    write_bytes(dir / "d/target", "before");
    fs::create_symlink("d/target", dir / "link");
    fs::create_symlink("link", dir / "link2");
    fs::create_symlink(dir / "d/new", dir / "dangling");
    for (const char* name : {"link", "link2", "dangling"}) {
        write_file_atomic(dir / name, name);
        EXPECT_TRUE(fs::is_symlink(dir / name));
        EXPECT_EQ(read_bytes(dir / name), name);
    }
    EXPECT_EQ(listing(dir / "d"), (Names{"new", "target"}));
    EXPECT_EQ(read_bytes(dir / "d/target"), "link2");
    fs::create_symlink("circle", dir / "circle");
    EXPECT_TRUE(says(error_of([&] { write_file_atomic(dir / "circle", "x"); }), {"circle"}));
}

TEST(Files, FifosAndDevicesAreWrittenDirectly) {
    TemporaryDirectory dir;
    ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0666), 0);
    Fd reader(open((dir / "fifo").c_str(), O_RDONLY | O_NONBLOCK));
    write_file_atomic(dir / "fifo", "through");
    char text[20] = "";
    EXPECT_EQ(read(reader.fd, text, sizeof text), 7);
    EXPECT_STREQ(text, "through");
    EXPECT_TRUE(fs::is_fifo(dir / "fifo"));
    fs::create_symlink("/dev/null", dir / "null");
    write_file_atomic(dir / "null", "x");
    EXPECT_TRUE(fs::is_symlink(dir / "null"));
    EXPECT_TRUE(fs::is_character_file("/dev/null"));
    EXPECT_EQ(listing(dir.path), (Names{"fifo", "null"}));
    EXPECT_EQ(0, in_child([&] { // a process's own descriptor: appends, and the file stays
                  Fd out(open((dir / "out").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666));
                  dup2(out.fd, STDOUT_FILENO);
                  write_all(STDOUT_FILENO, "a", 1, "out");
                  write_file_atomic("/dev/stdout", "b");
                  write_all(STDOUT_FILENO, "c", 1, "out");
                  return 0;
              }));
    EXPECT_EQ(read_bytes(dir / "out"), "abc");
}

TEST(Files, ADirectoryReplacesNeitherFilesNorLinks) {
    TemporaryDirectory dir;
    write_bytes(dir / "file", "mine");
    fs::create_directory(dir / "d");
    fs::create_directory_symlink("d", dir / "link");
    fs::create_directory_symlink("absent", dir / "dangling");
    for (const char* name : {"file", "link", "dangling"})
        EXPECT_TRUE(says(error_of([&] { AtomicDirectory d(dir / name); }), {dir / name}));
    EXPECT_EQ(listing(dir.path), (Names{"d", "dangling", "file", "link"}));
}

TEST(Files, ATemporaryNameIsNeverOpenedThroughALink) {
    TemporaryDirectory dir;
    write_bytes(dir / "victim", "precious");
    fs::create_symlink("victim", temporary_name(dir / "a"));
    fs::create_symlink("victim", temporary_name(dir / "write-check"));
    fs::create_directory_symlink(".", temporary_name(dir / "d"));
    write_file_atomic(dir / "a", "x");
    check_writable(dir.path);
    AtomicDirectory(dir / "d").commit();
    EXPECT_EQ(read_bytes(dir / "victim"), "precious");
    EXPECT_FALSE(fs::is_symlink(dir / "a"));
    EXPECT_EQ(listing(dir.path), (Names{"a", "d", "victim"}));
}

TEST(Files, UnwritableDirectoriesAreFoundInAdvance) {
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
