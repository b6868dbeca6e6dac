#include "gpt/run/safetensors.h"

#include "dev/test/data_helpers.h"
#include "gpt/base/checksum.h"
#include "gpt/base/random.h"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

using namespace lns;
using namespace lns::test;

namespace {

std::string file_of(const std::string& header, const std::string& data) {
    uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

// The error of reading a file with these contents.
std::string error_of_file(const std::string& bytes) {
    TemporaryDirectory dir;
    write_bytes(dir / "x.safetensors", bytes);
    std::string error = error_of([&] { Safetensors file(dir / "x.safetensors"); });
    if (error.empty()) return error;
    EXPECT_TRUE(says(error, {dir / "x.safetensors"}));
    return error;
}
std::string error_of_header(const std::string& header, size_t data_bytes = 0) {
    return error_of_file(file_of(header, std::string(data_bytes, '\0')));
}

} // namespace

TEST(Safetensors, ReadsWhatItWrites) {
    TemporaryDirectory dir;
    std::string path = dir / "a.safetensors";
    std::vector<float> weights = {1, -2.5f, 3e-40f, INFINITY, 5, 6};
    std::vector<double> wide = {1.0 / 3, -0.0};
    int64_t step = -7;
    uint8_t byte = 9;
    write_safetensors(path,
                      std::vector<TensorView>{{"byte", "U8", {1}, &byte, 1},
                                              {"w", "F32", {2, 3}, weights.data(), 24},
                                              {"é \"quoted\"\n", "F64", {2, 1}, wide.data(), 16},
                                              {"empty", "F32", {0, 5}, nullptr, 0},
                                              {"step", "I64", {}, &step, 8}},
                      {{"format", "pt"}, {"note", "tab\there"}});
    Safetensors file(path);
    EXPECT_EQ(file.tensors().size(), 5u);
    EXPECT_EQ(file.metadata().at("note"), "tab\there");
    EXPECT_EQ(file.at("w").shape, (std::vector<int64_t>{2, 3}));
    EXPECT_TRUE(file.at("step").shape.empty());
    EXPECT_EQ(file.find("absent"), nullptr);
    EXPECT_TRUE(says(error_of([&] { file.at("absent"); }), {path, "'absent'"}));
    for (const TensorView& view : file.tensors()) // aligned, although the byte was written first
        EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % dtype_bytes(view.dtype), 0u)
            << view.name;

    std::vector<float> read(6);
    file.read_f32(file.at("w"), read.data());
    EXPECT_EQ(read, weights);
    std::vector<double> read_wide(2);
    file.read_f64(file.at("é \"quoted\"\n"), read_wide.data());
    EXPECT_EQ(std::memcmp(read_wide.data(), wide.data(), 16), 0);
    EXPECT_EQ(*static_cast<const int64_t*>(file.at("step").data), -7);
    EXPECT_TRUE(says(error_of([&] { file.read_f32(file.at("step"), read.data()); }),
                     {path, "'step'", "I64"}));
}

TEST(Safetensors, BytesFollowTheFormat) {
    TemporaryDirectory dir;
    float one = 1;
    write_safetensors(dir / "a", std::vector<TensorView>{{"x", "F32", {1}, &one, 4}});
    // From PyPI's xxhash: xxh3_64 of the data's xxh3_64, and of that of the description
    // "1 x 3 F32 3 [1] 16 b89f318a5a242140 ".
    std::string header =
        R"({"__metadata__":{"xxh3":"fbca32f9f37ababc","xxh3:x":"b89f318a5a242140"},)"
        R"("x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    EXPECT_EQ(read_bytes(dir / "a"), file_of(header, std::string("\0\0\x80\x3f", 4)));
    write_safetensors(dir / "a", std::vector<TensorOut>{});
    EXPECT_TRUE(Safetensors(dir / "a").tensors().empty());
}

TEST(Safetensors, ATensorCanBeComputedWhileWriting) {
    TemporaryDirectory dir;
    float matrix[2][3] = {{1, 2, 3}, {4, 5, 6}};
    TensorOut transposed = {"t", "F32", {3, 2}, [&](const TensorSink& sink) {
                                for (int column = 0; column < 3; column++)
                                    for (int row = 0; row < 2; row++)
                                        sink(&matrix[row][column], sizeof(float));
                            }};
    write_safetensors(dir / "a", std::vector<TensorOut>{transposed});
    float read[6];
    Safetensors file(dir / "a");
    file.read_f32(file.at("t"), read);
    EXPECT_EQ(std::vector<float>(read, read + 6), (std::vector<float>{1, 4, 2, 5, 3, 6}));

    transposed.shape = {3, 3};
    EXPECT_TRUE(
        says(error_of([&] { write_safetensors(dir / "a", std::vector<TensorOut>{transposed}); }),
             {"'t'", "[3, 3]", "36 bytes", "24"}));
    EXPECT_EQ(Safetensors(dir / "a").tensors().size(), 1u); // the earlier file is unchanged
}

TEST(Safetensors, FailedWritesAreErrors) {
    TemporaryDirectory dir;
    float x = 0;
    auto error = [&](std::vector<TensorView> tensors) {
        return error_of([&] { write_safetensors(dir / "a", tensors); });
    };
    EXPECT_TRUE(says(error({{"x", "F31", {1}, &x, 4}}), {"'x'", "F31"}));
    EXPECT_TRUE(says(error({{"x", "F32", {-1}, &x, 4}}), {"'x'", "[-1]"}));
    EXPECT_TRUE(says(error({{"x", "F32", {1}, &x, 4}, {"x", "F32", {1}, &x, 4}}), {"two", "'x'"}));
    EXPECT_TRUE(says(error({{"__metadata__", "F32", {1}, &x, 4}}), {"__metadata__"}));
    EXPECT_TRUE(says(error({{"\xff", "F32", {1}, &x, 4}}), {"UTF-8"}));
    EXPECT_TRUE(std::filesystem::is_empty(dir.path));
}

TEST(Safetensors, HalfPrecisionBecomesFloat) {
    TemporaryDirectory dir;
    uint16_t half[] = {0x3C00, 0xC000, 0x0001, 0x8000, 0x03FF, 0x0400, 0x7BFF, 0xFC00, 0x7E00};
    uint16_t brain[] = {0x3F80, 0xC000, 0x0001, 0x8000, 0x7F80, 0x4049};
    write_safetensors(dir / "a",
                      std::vector<TensorView>{{"half", "F16", {9}, half, sizeof half},
                                              {"brain", "BF16", {6}, brain, sizeof brain}});
    Safetensors file(dir / "a");
    float h[9];
    double b[6];
    file.read_f32(file.at("half"), h);
    file.read_f64(file.at("brain"), b);
    EXPECT_EQ(std::vector<float>(h, h + 8), (std::vector<float>{1, -2, 0x1p-24f, 0, 1023 * 0x1p-24f,
                                                                0x1p-14f, 65504, -INFINITY}));
    EXPECT_TRUE(std::signbit(h[3]) && std::isnan(h[8]));
    EXPECT_EQ(std::vector<double>(b, b + 6),
              (std::vector<double>{1, -2, 0x1p-133, 0, INFINITY, 3.140625}));
}

TEST(Safetensors, ForeignTensorsMayBeUnaligned) {
    TemporaryDirectory dir;
    write_bytes(dir / "a", file_of(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},)"
                                   R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                   std::string("\1\0\0\x80\x3f", 5)));
    Safetensors file(dir / "a");
    float x = 0;
    file.read_f32(file.at("b"), &x);
    EXPECT_EQ(x, 1);
    EXPECT_EQ(file.tensors()[0].name, "a"); // in file order
}

TEST(Safetensors, DamageIsAnErrorThatNamesTheFile) {
    EXPECT_TRUE(says(error_of([] { Safetensors file("/nonexistent/x"); }),
                     {"/nonexistent/x", "No such file"}));
    EXPECT_TRUE(says(error_of([] { Safetensors file("/tmp"); }), {"/tmp", "not a file"}));
    EXPECT_TRUE(says(error_of_file(""), {"0 bytes", "truncated"}));
    EXPECT_TRUE(says(error_of_file(std::string(8, '\xff')), {"not a safetensors file"}));
    EXPECT_TRUE(says(error_of_file(std::string(8, '\0')), {"not a safetensors file"}));
    EXPECT_TRUE(says(error_of_file(std::string("\x64\0\0\0\0\0\0\0{}", 10)), {"truncated"}));
    EXPECT_TRUE(says(error_of_header("[]"), {"does not begin with '{'"}));
    EXPECT_TRUE(says(error_of_header("{\"x\""), {"not valid JSON"}));
    EXPECT_TRUE(says(error_of_header("{\"\xff\":{}}"), {"not valid JSON"}));
    EXPECT_TRUE(says(error_of_header("{\"x\":3}"), {"'x'", "not an object"}));
    EXPECT_TRUE(says(error_of_header(R"({"__metadata__":{"k":3}})"), {"'k'", "not a string"}));
    EXPECT_EQ(error_of_header("{}"), "");
    EXPECT_TRUE(says(error_of_header("{}", 4), {"4 bytes of data", "account for 0"}));

    auto tensor = [](const std::string& fields, size_t data_bytes) {
        return error_of_header("{\"x\":{" + fields + "}}", data_bytes);
    };
    EXPECT_EQ(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 8), "");
    EXPECT_TRUE(says(tensor(R"("dtype":"F32","shape":[2])", 8), {"'x'", "no data_offsets"}));
    EXPECT_TRUE(says(tensor(R"("dtype":"F31","shape":[2],"data_offsets":[0,8])", 8), {"F31"}));
    EXPECT_TRUE(says(tensor(R"("dtype":7,"shape":[2],"data_offsets":[0,8])", 8), {"type 7"}));
    EXPECT_TRUE(says(tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", 8),
                     {"'x'", "[3]", "12 bytes", "8"}));
    EXPECT_TRUE(
        says(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 7), {"truncated"}));
    EXPECT_TRUE(says(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", 8), {"8 to 0"}));
    EXPECT_TRUE(
        says(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])", 8), {"two numbers"}));
    EXPECT_TRUE(
        says(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])", 8), {"two numbers"}));
    EXPECT_TRUE(says(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1)", 8),
                     {"other fields"}));
    EXPECT_TRUE(says(tensor(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])", 8),
                     {"\"dtype\"", "twice"}));
    for (const char* shape : {"[-2]", "[2.0]", "2", "[4611686018427387904,8]", "[\"2\"]",
                              "[18446744073709551615]", "[99999999999999999999999]"})
        EXPECT_TRUE(
            says(tensor(std::string(R"("dtype":"F32","data_offsets":[0,8],"shape":)") + shape, 8),
                 {"impossible shape"}))
            << shape;

    auto two = [](int a0, int a1, int b0, int b1, size_t data_bytes,
                  const std::string& second = "b") {
        auto entry = [](int from, int to) {
            return cat("{\"dtype\":\"U8\",\"shape\":[", to - from, "],\"data_offsets\":[", from,
                       ",", to, "]}");
        };
        return error_of_header(
            "{\"a\":" + entry(a0, a1) + ",\"" + second + "\":" + entry(b0, b1) + "}", data_bytes);
    };
    EXPECT_EQ(two(4, 8, 0, 4, 8), "");
    EXPECT_EQ(two(0, 4, 4, 4, 4), "");
    EXPECT_TRUE(says(two(0, 4, 3, 7, 7), {"'b'", "byte 3", "expected 4"}));
    EXPECT_TRUE(says(two(0, 4, 5, 8, 8), {"'b'", "byte 5", "expected 4"}));
    EXPECT_TRUE(says(two(0, 4, 4, 8, 9), {"9 bytes of data", "account for 8"}));
    EXPECT_TRUE(says(two(0, 4, 0, 4, 4), {"overlap"}));
    EXPECT_TRUE(says(two(0, 4, 4, 8, 8, "a"), {"\"a\"", "twice"}));
}

// Damaged files are read or refused; the sanitizers check that nothing outside the file is
// accessed.
TEST(Safetensors, AnyDamageIsAtMostAnError) {
    TemporaryDirectory dir;
    float w[6] = {1, 2, 3, 4, 5, 6};
    write_safetensors(dir / "good",
                      std::vector<TensorView>{{"weight", "F32", {2, 3}, w, 24},
                                              {"half", "BF16", {2, 2}, w, 8},
                                              {"scalar", "F64", {}, w, 8}},
                      {{"format", "pt"}});
    const std::string good = read_bytes(dir / "good"), digits = "0123456789-{}[]\",:.e \xff";
    auto contents = [](const Safetensors& file) {
        std::map<std::string, std::vector<double>> values;
        for (const TensorView& view : file.tensors())
            file.read_f64(view, (values[view.name + view.dtype].resize(6),
                                 values[view.name + view.dtype].data()));
        return values;
    };
    const auto written = contents(Safetensors(dir / "good"));
    int refused = 0;
    for (uint64_t seed = 0; seed < 2000; seed++) {
        std::string bytes = good;
        uint64_t draws = 0;
        auto below = [&](size_t n) { return random_below(uint32_t(n), seed, 1, draws++); };
        for (uint32_t edits = 1 + below(3); edits > 0 && !bytes.empty(); edits--) {
            size_t at = below(bytes.size());
            switch (below(5)) {
            case 0:
                bytes[at] = char(below(256));
                break;
            case 1:
                bytes[at] = digits[below(digits.size())];
                break;
            case 2:
                bytes.resize(at);
                break;
            case 3:
                bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(40)));
                break;
            case 4:
                bytes.erase(at, 1 + below(10));
                break;
            }
        }
        write_bytes(dir / "bad", bytes);
        try {
            Safetensors file(dir / "bad");
            ASSERT_EQ(contents(file), written) << "accepted with another result: seed " << seed;
            ASSERT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
        } catch (const Error& error) {
            ASSERT_TRUE(says(error.what(), {dir / "bad"})) << "seed " << seed;
            refused++;
        }
    }
    EXPECT_GT(refused, 1900);
}

TEST(Safetensors, NoBitOfAFileCanFlipUnnoticed) {
    TemporaryDirectory dir;
    float w[6] = {1, 2, 3, 4, 5, 6};
    write_safetensors(dir / "good",
                      std::vector<TensorView>{{"a", "F32", {3}, w, 12}, {"b", "F32", {3}, w, 12}});
    const std::string good = read_bytes(dir / "good");
    for (size_t bit = 0; bit < 8 * good.size(); bit++) {
        std::string bytes = good;
        bytes[bit / 8] ^= char(1 << bit % 8);
        write_bytes(dir / "bad", bytes);
        float read[3];
        EXPECT_NE(error_of([&] {
                      Safetensors file(dir / "bad");
                      for (const char* name : {"a", "b"}) file.read_f32(file.at(name), read);
                  }),
                  "")
            << "bit " << bit % 8 << " of byte " << bit / 8;
    }
}

TEST(Safetensors, OthersMayRewriteTheFile) {
    // The order of entries and the metadata do not matter; the data does.
    TemporaryDirectory dir;
    float w[2] = {1, 2};
    write_safetensors(dir / "a", std::vector<TensorView>{{"x", "F32", {2}, w, 8}});
    const std::string ours = read_bytes(dir / "a");
    const std::string data = ours.substr(ours.size() - 8);
    auto header = nlohmann::json::parse(ours.substr(8, ours.size() - 16));
    write_bytes(dir / "b", file_of(header.dump(1), data));
    float read[2];
    Safetensors b(dir / "b");
    b.read_f32(b.at("x"), read);
    EXPECT_EQ(read[1], 2);
    EXPECT_TRUE(b.checksum());
    write_bytes(dir / "c", file_of(header.dump(), std::string(8, 'x')));
    Safetensors c(dir / "c");
    EXPECT_TRUE(
        says(error_of([&] { c.read_f32(c.at("x"), read); }), {dir / "c", "'x'", "damaged"}));
    EXPECT_TRUE(says(error_of([&] { c.check(c.at("x")); }), {dir / "c", "'x'", "damaged"}));
    header.erase("__metadata__");
    write_bytes(dir / "d", file_of(header.dump(), std::string(8, 'x')));
    Safetensors d(dir / "d");
    d.read_f32(d.at("x"), read);
    EXPECT_FALSE(d.checksum());
}

TEST(Checksum, MatchesItsDefinition) {
    // From PyPI's xxhash 4.1.0: 0, 5 and 600,000 bytes i mod 251.
    std::string bytes;
    for (int i = 0; i < 600000; i++) bytes += char(i % 251);
    EXPECT_EQ(checksum_text(checksum(bytes.substr(0, 0))), "2d06800538d394c2");
    EXPECT_EQ(checksum_text(checksum(bytes.substr(0, 5))), "4d27a030ea8e4334");
    EXPECT_EQ(checksum_text(checksum(bytes)), "27c21f71b5e57ba7");
    for (size_t step : {1000, 262144, 262145, 3}) {
        Checksum sum;
        for (size_t at = 0; at < bytes.size(); at += step)
            sum.add(bytes.data() + at, std::min(step, bytes.size() - at));
        EXPECT_EQ(sum.value(), checksum(bytes)) << step;
    }
}
