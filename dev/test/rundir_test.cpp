#include "gpt/run/rundir.h"

#include "dev/test/data_helpers.h"

#include <csignal>
#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
using namespace std::string_literals;
namespace fs = std::filesystem;

namespace {

void make_checkpoint(const RunDirectory& run, int64_t step) {
    AtomicDirectory directory(run.checkpoint_path(step));
    write_bytes(directory.temporary() + "/config.json", "{}");
    directory.commit();
}

std::vector<int64_t> steps(const RunDirectory& run) {
    std::vector<int64_t> steps;
    for (const auto& [step, path] : run.checkpoints()) steps.push_back(step);
    return steps;
}
using Steps = std::vector<int64_t>;

} // namespace

TEST(RunDirectory, ARunIsNeverOverwritten) {
    TemporaryDirectory dir;
    std::string path = dir / "runs/a";
    EXPECT_TRUE(says(error_of([&] { RunDirectory::resume(path); }), {path, "missing"}));
    { RunDirectory::create(path).append("{\"step\":1}"); }
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(path); }),
                     {path, "already holds a run", "-y", "-o"}));
    EXPECT_EQ(read_bytes(path + "/log.jsonl"), "{\"step\":1}\n");
    fs::remove(path + "/log.jsonl"); // a checkpoint alone is protected too
    { make_checkpoint(RunDirectory::resume(path), 5); }
    fs::remove(path + "/log.jsonl");
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(path); }), {"already holds a run"}));
    write_bytes(dir / "file", "");
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(dir / "file"); }), {"is a file"}));
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(dir / "file/a"); }), {dir / "file/a"}));
}

TEST(RunDirectory, TwoProcessesCannotShareOne) {
    TemporaryDirectory dir;
    int ready[2], end[2];
    ASSERT_TRUE(pipe(ready) == 0 && pipe(end) == 0);
    std::fflush(nullptr);
    pid_t other = fork();
    if (other == 0) {
        close(end[1]);
        RunDirectory run = RunDirectory::create(dir / "a");
        char byte = 1;
        if (write(ready[1], &byte, 1) != 1 || read(end[0], &byte, 1) != 0) _exit(1);
        std::raise(SIGKILL); // no destructor runs
    }
    close(end[0]);
    char byte;
    ASSERT_EQ(read(ready[0], &byte, 1), 1);
    for (int resumed : {0, 1})
        EXPECT_TRUE(says(error_of([&] {
                             resumed ? RunDirectory::resume(dir / "a")
                                     : RunDirectory::create(dir / "a");
                         }),
                         {dir / "a", cat("process ", other), "another run"}));
    close(end[1]);
    waitpid(other, nullptr, 0);
    RunDirectory::resume(dir / "a"); // the kernel released the lock
    close(ready[0]), close(ready[1]);
}

TEST(RunDirectory, LogLinesAreCompleteAndLaterOnesAreRemoved) {
    TemporaryDirectory dir;
    std::string path = dir / "a", log = path + "/log.jsonl";
    {
        RunDirectory run = RunDirectory::create(path);
        run.append("{\"model\":\"tiny\"}");
        for (int step = 1; step <= 20; step++) run.append(cat("{\"step\":", step, ",\"loss\":1}"));
        write_bytes(path + "/.step-000010.tmp-99", "x");
    }
    std::ofstream(log, std::ios::app) << "{\"step\":21,\"lo"; // cut short by a kill
    RunDirectory run = RunDirectory::resume(path);
    EXPECT_FALSE(fs::exists(path + "/.step-000010.tmp-99"));
    EXPECT_EQ(run.truncate_log_after(18), 1);
    EXPECT_EQ(read_bytes(run.damaged_log()), "{\"step\":21,\"lo\n");
    run.append("{\"step\":19,\"loss\":2}");
    std::string text = read_bytes(log);
    EXPECT_EQ(text.substr(0, 17), "{\"model\":\"tiny\"}\n");
    EXPECT_TRUE(says(text, {"{\"step\":18,\"loss\":1}\n{\"step\":19,\"loss\":2}\n"}));
    EXPECT_EQ(text.find("\"step\":20"), std::string::npos);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 20);

    // Damaged lines are kept in another file, after earlier ones.
    const std::string deep = std::string(100000, '[') + "\n";
    const std::string bad = "nonsense\n\0\0\n[1]\n{\"step\":\"1\"}\n{\"a\":1,\"a\":2}\n"s + deep;
    write_bytes(log, "{\"step\":1}\n" + bad + "{\"step\":2}\n");
    EXPECT_EQ(run.truncate_log_after(1), 6);
    EXPECT_EQ(read_bytes(log), "{\"step\":1}\n");
    EXPECT_EQ(read_bytes(run.damaged_log()), "{\"step\":21,\"lo\n" + bad);
    run.append("{\"step\":2}");
    EXPECT_EQ(run.truncate_log_after(2), 0);
    EXPECT_EQ(read_bytes(log), "{\"step\":1}\n{\"step\":2}\n");
}

TEST(RunDirectory, NothingIsWrittenThroughALink) {
    TemporaryDirectory dir;
    for (const char* name : {"lock", "log.jsonl", "run.json"})
        for (bool dangling : {false, true}) {
            const std::string path = dir / (name + std::to_string(dangling));
            fs::create_directory(path);
            if (!dangling) write_bytes(dir / "victim", "precious");
            fs::create_symlink("../victim", path + "/" + name);
            for (int resumed : {0, 1})
                EXPECT_TRUE(says(error_of([&] {
                                     resumed ? RunDirectory::resume(path)
                                             : RunDirectory::create(path);
                                 }),
                                 {path + "/" + name, "symbolic link"}));
            EXPECT_EQ(fs::exists(dir / "victim"), !dangling);
            EXPECT_EQ(dangling ? "precious" : read_bytes(dir / "victim"), "precious");
            fs::remove(dir / "victim");
            fs::remove_all(path);
        }
    fs::create_directory(dir / "a");
    ASSERT_EQ(mkfifo((dir / "a/lock").c_str(), 0666), 0);
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(dir / "a"); }), {"a/lock", "regular"}));
    fs::remove(dir / "a/lock");
    write_bytes(dir / "a/lock", "a user's own file");
    EXPECT_TRUE(says(error_of([&] { RunDirectory::create(dir / "a"); }), {"not a run's lock"}));
    EXPECT_EQ(read_bytes(dir / "a/lock"), "a user's own file");
    // A link to the run directory itself is allowed.
    fs::create_directory(dir / "b");
    fs::create_directory_symlink("b", dir / "link");
    RunDirectory::create(dir / "link").append("{}");
    EXPECT_TRUE(fs::is_symlink(dir / "link"));
    EXPECT_EQ(read_bytes(dir / "b/log.jsonl"), "{}\n");
}

TEST(RunDirectory, OneThatDisappearsIsReportedAndRecreated) {
    TemporaryDirectory dir;
    RunDirectory run = RunDirectory::create(dir / "runs/a");
    run.append("{\"step\":1}");
    EXPECT_EQ(run.recreate_if_lost(), "");
    fs::rename(dir / "runs", dir / "moved");
    EXPECT_TRUE(says(run.recreate_if_lost(), {dir / "runs/a was removed, renamed", "recreated"}));
    EXPECT_EQ(run.recreate_if_lost(), "");
    run.append("{\"step\":2}");
    EXPECT_EQ(read_bytes(dir / "runs/a/log.jsonl"), "{\"step\":2}\n");
    EXPECT_EQ(read_bytes(dir / "moved/a/log.jsonl"), "{\"step\":1}\n");
    EXPECT_TRUE(says(error_of([&] { RunDirectory::lock(dir / "runs/a"); }), {"another run"}));

    fs::remove(dir / "runs/a/log.jsonl");
    EXPECT_TRUE(says(run.recreate_if_lost(), {"log.jsonl was removed", "recreated"}));
    fs::remove_all(dir / "runs");
    write_bytes(dir / "runs", "a file in its way");
    EXPECT_TRUE(says(run.recreate_if_lost(), {"cannot be recreated"}));
    EXPECT_TRUE(says(error_of([&] { run.checkpoint_path(2); }), {"cannot be recreated"}));
    fs::remove(dir / "runs");
    EXPECT_TRUE(says(run.recreate_if_lost(), {"recreated without"}));
    make_checkpoint(run, 2);
    EXPECT_EQ(steps(run), Steps{2});
}

TEST(RunDirectory, AFullDiskCutsNoLogLine) {
    TemporaryDirectory dir;
    std::fflush(nullptr);
    pid_t pid = fork();
    if (pid == 0) {
        RunDirectory run = RunDirectory::create(dir / "a");
        run.append("{\"step\":1}");
        std::signal(SIGXFSZ, SIG_IGN);
        rlimit limit = {15, 15};
        setrlimit(RLIMIT_FSIZE, &limit);
        _exit(error_of([&] { run.append("{\"step\":2}"); }).empty());
    }
    int status = 0;
    waitpid(pid, &status, 0);
    EXPECT_EQ(status, 0);
    EXPECT_EQ(read_bytes(dir / "a/log.jsonl"), "{\"step\":1}\n");
}

TEST(RunDirectory, EveryStartIsRecordedForRepeating) {
    TemporaryDirectory dir;
    const char* first[] = {"./train_gpt",      "-n", "lns", "--prompt",
                           "it's $HOME \"x\"", "",   "-i",  "data/*.bin"};
    { RunDirectory::create(dir / "a").record(8, first, {{"device", "cpu"}}); }
    const char* second[] = {"./train_gpt", "-y", "1"};
    RunDirectory::resume(dir / "a").record(3, second);
    auto record = nlohmann::json::parse(read_bytes(dir / "a/run.json"));
    ASSERT_EQ(record["starts"].size(), 2u);
    auto start = record["starts"][0];
    EXPECT_EQ(record["starts"][1]["command"], "./train_gpt -y 1");
    EXPECT_EQ(start["device"], "cpu");
    EXPECT_EQ(start["directory"], fs::current_path().string());
    EXPECT_EQ(start["time"].get<std::string>().size(), 20u);
    for (const char* key : {"host", "version", "compiler", "flags", "features", "cpu", "process"})
        EXPECT_TRUE(start.contains(key)) << key;
    // A shell parses the same words.
    Finished words = run("printf '%s|' " + start["command"].get<std::string>());
    EXPECT_EQ(words.output, "./train_gpt|-n|lns|--prompt|it's $HOME \"x\"||-i|data/*.bin|");

    write_bytes(dir / "a/run.json", "{}");
    EXPECT_TRUE(says(error_of([&] { RunDirectory::resume(dir / "a").record(3, second); }),
                     {"run.json", "not the record"}));
}

TEST(RunDirectory, CheckpointsAreFoundInOrderAndTheOldestRemoved) {
    TemporaryDirectory dir;
    RunDirectory run = RunDirectory::create(dir / "a/");
    EXPECT_EQ(run.path(), dir / "a");
    EXPECT_EQ(run.checkpoint_path(500), dir / "a/step-000500");
    EXPECT_EQ(run.checkpoint_path(12345678), dir / "a/step-12345678");
    for (int64_t step : {500, 1000000, 20, 999999, 0}) make_checkpoint(run, step);
    fs::create_directories(dir / "a/step-000600"); // no config.json: no checkpoint
    fs::create_directories(dir / "a/step-99");
    EXPECT_EQ(steps(run), (Steps{0, 20, 500, 999999, 1000000}));
    EXPECT_EQ(latest_checkpoint(dir / "a"), dir / "a/step-1000000");
    EXPECT_EQ(latest_checkpoint(dir / "a/step-000020"), dir / "a/step-000020");
    run.keep_last(0);
    EXPECT_EQ(steps(run).size(), 5u);
    run.keep_last(2);
    EXPECT_EQ(steps(run), (Steps{999999, 1000000}));
    EXPECT_FALSE(fs::exists(dir / "a/step-000020"));
    run.keep_last(5);
    EXPECT_EQ(steps(run), (Steps{999999, 1000000}));

    EXPECT_TRUE(says(error_of([&] { latest_checkpoint(dir / "b"); }), {"b does not exist"}));
    EXPECT_TRUE(says(error_of([&] { latest_checkpoint(dir.path); }), {"holds no checkpoint"}));
}

TEST(RunDirectory, ANewRunGetsAUniqueName) {
    TemporaryDirectory dir;
    EXPECT_EQ(default_run_path(dir / "tiny-lns"), dir / "tiny-lns");
    fs::create_directories(dir / "tiny-lns");
    EXPECT_EQ(default_run_path(dir / "tiny-lns"), dir / "tiny-lns-2");
    fs::create_directories(dir / "tiny-lns-2");
    EXPECT_EQ(default_run_path(dir / "tiny-lns"), dir / "tiny-lns-3");
}
