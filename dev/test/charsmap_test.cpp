// Normalization tables of SentencePiece models: intact ones pass, damaged ones are rejected before
// the library reads them.
#include "dev/test/data_helpers.h"
#include "gpt/data/charsmap.h"
#include "gpt/data/tokenizer.h"

#include <cstring>

using namespace lns;
using namespace lns::test;

namespace {

// A model with only a normalization table.
std::string model_of(const std::string& table) {
    auto field = [](int number, const std::string& bytes) {
        return std::string{char((number << 3) | 2), char((bytes.size() & 127) | 128),
                           char(bytes.size() >> 7)} +
               bytes;
    };
    return field(3, field(2, table));
}

// 256 units, all of which lead to nothing, but for the root and 'a', whose value is a place among
// the strings "x\0y\0".
struct Table {
    uint32_t units[256];
    uint32_t bytes = sizeof units;
    std::string strings = std::string("x\0y\0", 4);
    explicit Table(uint32_t value) {
        for (uint32_t i = 0; i < 256; i++) units[i] = (i ^ 1) & 255;
        units[0] = 0;                                  // its children are at their byte values
        units[size_t('a')] = 'a' | 1u << 8 | 3u << 10; // has a value, 3 units away
        units[size_t('a') ^ 3] = value | 1u << 31;
    }
    std::string text() const {
        std::string all(sizeof bytes + sizeof units, '\0');
        std::memcpy(all.data(), &bytes, sizeof bytes);
        std::memcpy(all.data() + sizeof bytes, units, sizeof units);
        return all + strings;
    }
    std::string fault() const { return charsmap_fault(model_of(text())); }
};

} // namespace

TEST(Charsmap, IntactTablesPass) {
    EXPECT_EQ(charsmap_fault(""), "");
    EXPECT_EQ(charsmap_fault(model_of("")), "");
    EXPECT_EQ(Table(2).fault(), "");
    for (const char* name : {"exact", "folding"})
        EXPECT_EQ(charsmap_fault(read_bytes(cat("dev/test/fixtures/tokenizers/", name, ".model"))),
                  "");
}

TEST(Charsmap, DamageIsFound) {
    EXPECT_TRUE(says(Table(4).fault(), {"beyond the last"}));
    EXPECT_TRUE(says(Table(0x7FFFFFFF).fault(), {"beyond the last"}));
    Table far(2);
    far.units[size_t('z')] = 'z' | 300u << 10;
    EXPECT_TRUE(says(far.fault(), {"beyond its end"}));
    far.units[size_t('z')] = 'z' | 1u << 9 | 1u << 10; // an offset in steps of 256
    EXPECT_TRUE(says(far.fault(), {"beyond its end"}));
    Table open(2);
    open.strings = "xyz";
    EXPECT_TRUE(says(open.fault(), {"not terminated"}));
    for (uint32_t bytes : {0u, 1023u, 1028u, 4000u, ~3u}) {
        Table other(2);
        other.bytes = bytes;
        EXPECT_NE(other.fault(), "") << bytes;
    }
    EXPECT_TRUE(says(charsmap_fault(model_of("abc")), {"truncated"}));
}

#ifdef LNS_SENTENCEPIECE
TEST(Charsmap, DamagedModelsAreRefused) {
    TemporaryDirectory dir;
    const std::string whole = read_bytes("dev/test/fixtures/tokenizers/folding.model");
    // Data appended to a protocol buffer is merged into it: a piece of one zero byte, and a table.
    write_bytes(dir / "piece.model", whole + std::string("\x0a\x08\x0a\x01\0\x15\0\0\0\0", 10));
    write_bytes(dir / "table.model", whole + model_of(Table(4).text()));
    for (const char* name : {"piece.model", "table.model"})
        EXPECT_TRUE(says(error_of([&] { load_tokenizer(dir / name); }), {name, "is damaged"}));
}
#endif
