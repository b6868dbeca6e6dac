// Files that change while they are mapped.
#include "gpt/base/mapped.h"

#include "dev/test/program_helpers.h"
#include "gpt/base/files.h"
#include "gpt/run/safetensors.h"

#include <csignal>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

const size_t page = size_t(sysconf(_SC_PAGESIZE));

MappedFile map_file(const std::string& path) {
    Fd fd(open(path.c_str(), O_RDONLY));
    return MappedFile(fd.fd, path);
}

} // namespace

TEST(Mapped, ATruncatedFileIsAnErrorInsteadOfASignal) {
    TemporaryDirectory dir;
    for (size_t left : {size_t(0), 2 * page, 3 * page - 1}) {
        write_bytes(dir / "a", std::string(3 * page, 'x'));
        MappedFile file = map_file(dir / "a");
        EXPECT_EQ(file.size(), 3 * page);
        file.check();
        fs::resize_file(dir / "a", left);
        // Missing pages read as zeros, the others are unchanged.
        EXPECT_EQ(file.data()[3 * page - 1], 0);
        if (left > 0) {
            EXPECT_EQ(file.data()[left - 1], 'x');
        }
        EXPECT_TRUE(says(error_of([&] { file.check(); }),
                         {dir / "a", cat("has ", left, " bytes now and had ", 3 * page)}));
        // check() still fails after the file grew again: bytes read in between were wrong.
        if (left == 3 * page - 1) continue; // no signal, so no record of it
        write_bytes(dir / "a", std::string(3 * page, 'y'));
        EXPECT_TRUE(says(error_of([&] { file.check(); }), {dir / "a", "no longer be read"}));
    }
}

TEST(Mapped, AReplacedOrRemovedFileStaysReadable) {
    TemporaryDirectory dir;
    write_bytes(dir / "a", std::string(2 * page, 'x'));
    MappedFile first = map_file(dir / "a"), file = std::move(first);
    write_file_atomic(dir / "a", "other");
    file.check();
    fs::remove(dir / "a");
    file.check();
    EXPECT_EQ(file.data()[2 * page - 1], 'x');
}

TEST(Mapped, AnotherSigbusStillKills) {
    TemporaryDirectory dir;
    write_bytes(dir / "a", "x");
    MappedFile file = map_file(dir / "a");
    EXPECT_DEATH(raise(SIGBUS), ""); // from the signal, or from the sanitizer
    // An unguarded map.
    write_bytes(dir / "b", std::string(page, 'x'));
    Fd fd(open((dir / "b").c_str(), O_RDWR));
    auto* bytes = static_cast<volatile char*>(mmap(nullptr, page, PROT_READ, MAP_SHARED, fd.fd, 0));
    ASSERT_NE(bytes, MAP_FAILED);
    fs::resize_file(dir / "b", 0);
    EXPECT_DEATH((void)bytes[0], "");
    munmap(const_cast<char*>(bytes), page);
}

TEST(Mapped, ShardsAndWeightsNameTheFile) {
    TemporaryDirectory dir;
    write_shard(dir / "a.bin", 10000);
    Shard shard(dir / "a.bin");
    fs::resize_file(dir / "a.bin", 5000);
    std::vector<int> tokens(100);
    EXPECT_TRUE(
        says(error_of([&] { shard.read(9000, 100, tokens.data()); }), {dir / "a.bin", "shorter"}));
    EXPECT_TRUE(says(error_of([&] { shard.check_tokens(256); }), {dir / "a.bin", "shorter"}));

    std::vector<float> values(5000, 1), out(5000);
    write_safetensors(dir / "w",
                      std::vector<TensorView>{{"w", "F32", {5000}, values.data(), 20000}});
    Safetensors weights(dir / "w");
    fs::resize_file(dir / "w", 5000);
    EXPECT_TRUE(says(error_of([&] { weights.read_f32(weights.at("w"), out.data()); }),
                     {dir / "w", "shorter"}));
}
