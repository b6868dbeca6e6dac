#include "gpt/base/cgroup.h"
#include "gpt/base/threads.h"

#include "dev/test/program_helpers.h"

#include <cmath>

#include "gpt/base/build.h"

using namespace lns;
using namespace lns::test;

namespace {

// A root with the files in /proc and /sys that describe a process's control groups.
struct Root : TemporaryDirectory {
    Root(const std::string& groups, const std::string& mounts) {
        file("/proc/self/cgroup", groups);
        file("/proc/self/mountinfo", mounts);
    }
    Root& file(const std::string& name, const std::string& text) {
        std::filesystem::create_directories(std::filesystem::path(path + name).parent_path());
        write_bytes(path + name, text);
        return *this;
    }
    double cpus() const { return cgroup_cpus(path); }
    double memory() const { return cgroup_memory(path); }
};

const std::string version2 =
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
const std::string version1 =
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw master:9 - cgroup cgroup rw,cpu,cpuacct\n";

} // namespace

TEST(Threads, QuotaOfVersion2) {
    Root root("0::/a/b\n", version2);
    EXPECT_EQ(root.cpus(), INFINITY);
    root.file("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    EXPECT_EQ(root.cpus(), INFINITY);
    root.file("/sys/fs/cgroup/a/b/cpu.max", "400000 100000\n");
    EXPECT_EQ(root.cpus(), 4);
    root.file("/sys/fs/cgroup/a/cpu.max", "150000 100000\n"); // the enclosing group has less
    EXPECT_EQ(root.cpus(), 1.5);
    root.file("/sys/fs/cgroup/cpu.max", "50000 100000\n");
    EXPECT_EQ(root.cpus(), 0.5);
    root.file("/sys/fs/cgroup/other/cpu.max", "10000 100000\n");
    EXPECT_EQ(root.cpus(), 0.5);
}

TEST(Threads, QuotaOfVersion1) {
    Root root("4:cpu,cpuacct:/job/1\n3:cpuset:/\n0::/\n", version1);
    EXPECT_EQ(root.cpus(), INFINITY);
    const std::string folder = "/sys/fs/cgroup/cpu,cpuacct/job/";
    root.file(folder + "1/cpu.cfs_quota_us", "-1\n")
        .file(folder + "1/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(root.cpus(), INFINITY);
    root.file(folder + "cpu.cfs_quota_us", "300000\n")
        .file(folder + "cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(root.cpus(), 3);
}

TEST(Threads, QuotaInAContainer) {
    // Without its own namespace: the path begins at the mount's root.
    Root old("0::/docker/x\n", "30 23 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    old.file("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    EXPECT_EQ(old.cpus(), 2);
    Root outside("0::/../y\n", version2);
    outside.file("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    EXPECT_EQ(outside.cpus(), 2);
}

TEST(Threads, MemoryOfControlGroups) {
    Root root("0::/a/b\n", version2);
    EXPECT_EQ(root.memory(), INFINITY);
    root.file("/sys/fs/cgroup/a/b/memory.max", "max\n");
    EXPECT_EQ(root.memory(), INFINITY);
    root.file("/sys/fs/cgroup/a/memory.max", "21474836480\n");
    EXPECT_EQ(root.memory(), 20.0 * (1 << 30));
    root.file("/sys/fs/cgroup/a/b/memory.max", "1000000\n");
    EXPECT_EQ(root.memory(), 1e6);
    Root old("4:memory:/job\n0::/\n",
             "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
    old.file("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "5000\n");
    EXPECT_EQ(old.memory(), 5000);
}

TEST(Threads, DamagedFilesGiveNoQuota) {
    for (const char* text : {"", "\n", "many 100000", "100000", "100000 0", "-5 -5", "nan nan"}) {
        Root root("0::/\n", version2);
        root.file("/sys/fs/cgroup/cpu.max", text);
        EXPECT_EQ(root.cpus(), INFINITY) << text;
    }
    EXPECT_EQ(Root("", "").cpus(), INFINITY);
    EXPECT_EQ(Root("0:\n:::\n0::foo", version2 + "- - -\n\n1 2 3 4 5 - cgroup2").cpus(), INFINITY);
    EXPECT_EQ(cgroup_cpus("/no/such/folder"), INFINITY);
}

TEST(Threads, OpenMPVariables) {
    EXPECT_EQ(omp_threads("4"), 4);
    EXPECT_EQ(omp_threads(" 4 , 2"), 4);
    for (const char* wrong : {"", " ", "0", "-1", "many", "4x", ",2", "99999999999999999999"})
        EXPECT_EQ(omp_threads(wrong), 0) << wrong;
}

TEST(Threads, TheProgramsObeyThem) {
    NEEDS_PROGRAM();
    const std::string clean = "env -u OMP_THREAD_LIMIT -u OMP_NUM_THREADS ";
    const std::string one = "\n           1 thread\n", two = "\n           2 threads\n";
    for (const char* limit : {"OMP_NUM_THREADS=1", "OMP_NUM_THREADS=1,4", "OMP_THREAD_LIMIT=1"})
        EXPECT_TRUE(says(run(clean + limit + " ./train_gpt --dry-run").output, {one})) << limit;
    EXPECT_TRUE(
        says(run(clean + "OMP_NUM_THREADS=1 ./train_gpt --dry-run --threads 2").output, {two}));
    EXPECT_TRUE(says(run(clean + "OMP_NUM_THREADS=many ./train_gpt --dry-run").output,
                     {"OMP_NUM_THREADS is 'many'", "ignored"}));
    EXPECT_TRUE(says(run(clean + "OMP_THREAD_LIMIT=1 ./train_gpt --dry-run --threads 2").output,
                     {"--threads 2", "OMP_THREAD_LIMIT=1"}));
    EXPECT_TRUE(says(run(clean + "OMP_NUM_THREADS=1 data/tokenize --help").output,
                     {"--threads INT:INT in [1 - 1024]=1\n"}));
}
