// Matrices, q and k, activations, loss and AdamW of train_gpt.cu, run by the simulator, against
// straightforward sums in double; in every order of threads, with the same bits.
#include "train_gpt.cu"

#include "dev/sim/sim.h"
#include "gpt/base/files.h"
#include "gpt/base/random.h"
#include "gpt/cpu/bf16.h"
#include "gpt/cpu/sources.h"
#include "gpt/cpu/streams.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <unistd.h>

namespace lns::cuda {
namespace {

// The device's copy equals the host's, rounded to X.
template <class X> struct OnDevice {
    X* data = nullptr;
    int64_t size = 0;

    explicit OnDevice(int64_t n) : size(n) { CUDA(cudaMalloc(&data, size_t(n) * sizeof(X))); }
    template <class Y> explicit OnDevice(const std::vector<Y>& values) : OnDevice(values.size()) {
        write(values);
    }
    OnDevice(const OnDevice&) = delete;
    ~OnDevice() { cudaFree(data); }
    operator X*() const { return data; }
    const X* in() const { return data; }

    template <class Y> void write(const std::vector<Y>& values) {
        std::vector<X> x(values.size());
        for (size_t i = 0; i < x.size(); i++) x[i] = X(values[i]);
        CUDA(cudaMemcpy(data, x.data(), x.size() * sizeof(X), cudaMemcpyHostToDevice));
    }
    std::vector<X> raw() const {
        std::vector<X> x(static_cast<size_t>(size));
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaMemcpy(x.data(), data, x.size() * sizeof(X), cudaMemcpyDeviceToHost));
        return x;
    }
    std::vector<double> read() const {
        std::vector<double> values;
        for (X x : raw()) values.push_back(double(x));
        return values;
    }
};

using Doubles = std::vector<double>;

// Normally distributed numbers, rounded to X.
template <class X> Doubles numbers(int64_t n, const char* name, double std = 1) {
    Doubles x(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++)
        x[i] = double(X(float(std * random_normal(7, fnv1a(name), uint64_t(i)))));
    return x;
}

// ‖a − b‖ / ‖b‖
double distance(const Doubles& a, const Doubles& b) {
    EXPECT_EQ(a.size(), b.size());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < b.size(); i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return std::sqrt(difference) / std::max(1e-30, std::sqrt(norm));
}
template <class X> double tolerance() { return sizeof(X) == 2 ? 3e-3 : 3e-6; }

template <class X> void expect_near(const OnDevice<X>& got, const Doubles& wanted, double allowed) {
    EXPECT_LT(distance(got.read(), wanted), allowed);
}

// Runs body, which refills these, in every order of threads; the bits must be the same.
template <class... X>
void in_every_order(const std::function<void()>& body, const OnDevice<X>&... filled) {
    std::string first;
    sim::in_every_order([&] {
        body();
        std::string now;
        auto append = [&](const auto& values) {
            now.append(reinterpret_cast<const char*>(values.data()),
                       values.size() * sizeof(values[0]));
        };
        (append(filled.raw()), ...);
        if (first.empty()) first = now;
        EXPECT_TRUE(now == first) << "another order of threads gave other bits: "
                                  << sim::name_of(sim::order());
    });
}

// Sets an environment variable during a test.
struct Variable {
    std::string name;
    Variable(const char* name, const std::string& value) : name(name) {
        setenv(name, value.c_str(), 1);
    }
    ~Variable() { unsetenv(name.c_str()); }
};

// The name of a directory that does not exist yet and will be removed.
struct Directory {
    std::string path =
        (std::filesystem::temp_directory_path() / cat("lns-cuda-test-", getpid())).string();
    Directory() { std::filesystem::remove_all(path); }
    ~Directory() { std::filesystem::remove_all(path); }
};

struct Stream {
    cudaStream_t stream = nullptr;
    Stream() { CUDA(cudaStreamCreate(&stream)); }
    ~Stream() { cudaStreamDestroy(stream); }
    operator cudaStream_t() const { return stream; }
};

double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
}
double dgelu(double x) {
    const double t = std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.79788456080286536 * (1 + 3 * 0.044715 * x * x);
}

// a (n, k) · b (m, k)ᵀ + bias (m)
Doubles product(const Doubles& a, const Doubles& b, int64_t n, int64_t m, int64_t k,
                const Doubles& bias = {}) {
    Doubles c(static_cast<size_t>(n * m));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m; j++) {
            double sum = bias.empty() ? 0 : bias[j];
            for (int64_t l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
            c[i * m + j] = sum;
        }
    return c;
}
Doubles transpose(const Doubles& a, int64_t rows, int64_t columns) {
    Doubles t(a.size());
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) t[j * rows + i] = a[i * columns + j];
    return t;
}

// (rows, columns) with a row stride of `row`; elements between rows are `filling`.
Doubles widen(const Doubles& a, int64_t rows, int64_t columns, int64_t row, double filling) {
    Doubles wide(static_cast<size_t>(rows * row), filling);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) wide[i * row + j] = a[i * columns + j];
    return wide;
}

template <class S, class G> void check_matrices(int64_t rows, int C, int OC) {
    SCOPED_TRACE(testing::Message() << rows << " rows, " << C << " to " << OC);
    Stream stream;
    CublasLt cublas(stream);
    const int64_t out_row = OC + 16;
    const double near = tolerance<S>();
    const Doubles in = numbers<S>(rows * C, "in"), w = numbers<S>(OC * C, "w", 1 / std::sqrt(C)),
                  bias = numbers<S>(OC, "bias"), dout = numbers<S>(rows * OC, "dout"),
                  dw = numbers<G>(OC * C, "dw"), dbias = numbers<G>(OC, "dbias");
    const OnDevice<S> in_(in), w_(w), bias_(bias), dout_(dout),
        dout_wide(widen(dout, rows, OC, out_row, 1000));

    for (const bool biased : {false, true}) {
        SCOPED_TRACE(biased ? "with bias" : "without bias");
        const Doubles wanted = product(in, w, rows, OC, C, biased ? bias : Doubles());
        const S* bias_or_none = biased ? bias_.in() : nullptr;
        OnDevice<S> out(widen(Doubles(rows * OC), rows, OC, out_row, 5));
        matmul_forward(cublas, out + 0, out_row, in_.in(), w_.in(), bias_or_none, rows, C, OC);
        expect_near(out, widen(wanted, rows, OC, out_row, 5), near);
        OnDevice<float> unrounded(rows * OC);
        matmul_forward(cublas, unrounded + 0, OC, in_.in(), w_.in(), bias_or_none, rows, C, OC);
        expect_near(unrounded, wanted, 3e-6);

        Doubles activated(wanted);
        for (double& x : activated) x = gelu(x);
        OnDevice<S> a(rows * OC), hidden(rows * OC);
        matmul_gelu_forward(cublas, a + 0, hidden + 0, in_.in(), w_.in(), bias_or_none, rows, C,
                            OC);
        expect_near(a, activated, 2 * near);
        expect_near(hidden, wanted, near);
    }
    {
        const Doubles wanted = product(dout, transpose(w, OC, C), rows, C, OC);
        OnDevice<S> din(rows * C);
        matmul_backward_input(cublas, din + 0, dout_wide.in(), out_row, w_.in(), rows, C, OC);
        expect_near(din, wanted, near);
        Doubles dhidden(wanted);
        for (size_t i = 0; i < in.size(); i++) dhidden[i] *= dgelu(in[i]);
        matmul_gelu_backward_input(cublas, din + 0, dout_.in(), in_.in(), w_.in(), rows, C, OC);
        expect_near(din, dhidden, 2 * near);
    }
    Doubles wanted = product(transpose(dout, rows, OC), transpose(in, rows, C), OC, C, rows);
    for (size_t i = 0; i < wanted.size(); i++) wanted[i] += dw[i];
    Doubles wanted_bias = dbias;
    for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < OC; j++) wanted_bias[j] += dout[i * OC + j];
    OnDevice<G> dw_(dw), dbias_(dbias);
    OnDevice<float> scratch(matmul_scratch(rows, OC));
    matmul_backward_weight(cublas, dw_ + 0, dbias_ + 0, dout_wide.in(), out_row, in_.in(), rows, C,
                           OC, scratch + 0);
    expect_near(dw_, wanted, tolerance<G>());
    in_every_order(
        [&] {
            dbias_.write(dbias);
            matmul_backward_weight(cublas, dw_ + 0, dbias_ + 0, dout_wide.in(), out_row, in_.in(),
                                   rows, C, OC, scratch + 0);
        },
        dbias_);
    expect_near(dbias_, wanted_bias, tolerance<G>());
}

void check_all_matrices() {
    const std::pair<int64_t, int> shapes[] = {{1, 8}, {1, 1000}, {7, 24}, {130, 8}, {130, 1000}};
    for (const auto& [rows, OC] : shapes) {
        check_matrices<bf16, bf16>(rows, 16, OC);
        check_matrices<bf16, float>(rows, 24, OC);
        check_matrices<float, float>(rows, 40, OC);
    }
}

TEST(CudaLayers, Matrices) {
    const Variable none("LNS_CACHE", "none");
    check_all_matrices();
}

TEST(CudaLayers, MatricesWithoutEpilogues) {
    const Variable none("LNS_CACHE", "none"), refused("LNS_SIM_NO_EPILOGUES", "1");
    check_all_matrices();
}

// Tuning damages nothing, not even the output that a product is added to.
TEST(CudaLayers, MeasuredMatrices) {
    const Directory cache;
    const Variable where("LNS_CACHE", cache.path);
    check_matrices<bf16, bf16>(7, 16, 24);
    check_matrices<float, float>(33, 40, 8);
    const Variable refused("LNS_SIM_NO_EPILOGUES", "1");
    check_matrices<bf16, float>(9, 24, 16);
}

// The head: V columns with a row stride of `row`.
TEST(CudaLayers, MatrixOfOddWidth) {
    const Variable none("LNS_CACHE", "none");
    const int64_t rows = 7, C = 16, V = 97, row = 104;
    Stream stream;
    CublasLt cublas(stream);
    const Doubles in = numbers<bf16>(rows * C, "in"), w = numbers<bf16>(V * C, "w");
    const OnDevice<bf16> in_(in), w_(w);
    OnDevice<float> out(widen(Doubles(rows * V), rows, V, row, 5));
    matmul_forward(cublas, out + 0, row, in_.in(), w_.in(), static_cast<const bf16*>(nullptr), rows,
                   C, V);
    expect_near(out, widen(product(in, w, rows, V, C), rows, V, row, 5), 3e-6);
}

// The same product by two CublasLt gives the same bits, since the second reads what the first has
// measured; where the file has other things in it, they are replaced.
TEST(CudaLayers, AlgorithmsAreRemembered) {
    namespace fs = std::filesystem;
    const Directory directory;
    const Variable where("LNS_CACHE", directory.path);
    const int64_t rows = 33, C = 264, OC = 24;
    const OnDevice<float> in(numbers<float>(rows * C, "in")), w(numbers<float>(OC * C, "w"));
    auto multiply = [&] {
        Stream stream;
        CublasLt cublas(stream);
        OnDevice<float> out(rows * OC);
        matmul_forward(cublas, out + 0, OC, in.in(), w.in(), static_cast<const float*>(nullptr),
                       rows, C, OC);
        return out.read();
    };
    auto lines = [](const std::string& text) { return std::count(text.begin(), text.end(), '\n'); };
    const Doubles first = multiply();
    const std::string file = directory.path + "/cublaslt.txt";
    ASSERT_TRUE(fs::exists(file));
    const std::string remembered = read_file(file);
    EXPECT_EQ(lines(remembered), 1);
    for (int i = 0; i < 5; i++) EXPECT_EQ(multiply(), first);
    EXPECT_EQ(read_file(file), remembered);

    std::string damaged = remembered;
    damaged[damaged.size() - 3] ^= 1;
    for (const std::string& text : {damaged, std::string("something else\n\xff\t\t\n"),
                                    remembered.substr(0, remembered.size() / 2)}) {
        write_file_atomic(file, text);
        const Doubles again = multiply();
        EXPECT_LT(distance(again, first), 3e-6);
        EXPECT_EQ(lines(read_file(file)), 1);
        EXPECT_EQ(multiply(), again);
    }
    // Without a cache, cuBLASLt's heuristic gives the same bits each time.
    fs::remove_all(directory.path);
    write_file_atomic(directory.path, "a file where the directory should be");
    const Doubles guessed = multiply();
    EXPECT_LT(distance(guessed, first), 3e-6);
    EXPECT_EQ(multiply(), guessed);
    const Variable none("LNS_CACHE", "none");
    EXPECT_EQ(multiply(), guessed);
}

// If two processes measure the same product, the second uses the first one's result.
TEST(CudaLayers, CacheKeepsTheFirst) {
    const Directory directory;
    const Variable where("LNS_CACHE", directory.path);
    Cache one("test.txt"), other("test.txt");
    EXPECT_EQ(one.find("key"), nullptr);
    EXPECT_EQ(one.find_or_insert("key", "first"), "first");
    EXPECT_EQ(other.find_or_insert("key", "second"), "first");
    EXPECT_EQ(other.find_or_insert("another key", "value"), "value");
    EXPECT_EQ(one.find_or_insert("third", "value"), "value");
    const Cache later("test.txt");
    for (const char* key : {"key", "another key", "third"}) ASSERT_NE(later.find(key), nullptr);
    EXPECT_EQ(*later.find("key"), "first");
    std::filesystem::remove_all(directory.path);
    const Variable none("LNS_CACHE", "none");
    Cache nothing("test.txt");
    EXPECT_EQ(nothing.find_or_insert("key", "value"), std::nullopt);
    EXPECT_EQ(nothing.find("key"), nullptr);
    EXPECT_FALSE(std::filesystem::exists(directory.path));
}

// During capture, when nothing can be measured, a new product works too.
TEST(CudaLayers, ProductsAreCaptured) {
    const Variable none("LNS_CACHE", "none");
    const int64_t rows = 7, C = 16, OC = 24;
    const Doubles in = numbers<bf16>(rows * C, "in"), w = numbers<bf16>(OC * C, "w");
    const OnDevice<bf16> in_(in), w_(w);
    OnDevice<bf16> out(rows * OC);
    Stream stream;
    CublasLt cublas(stream);
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    matmul_forward(cublas, out + 0, OC, in_.in(), w_.in(), static_cast<const bf16*>(nullptr), rows,
                   C, OC);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    CUDA(cudaGraphLaunch(executable, stream));
    CUDA(cudaStreamSynchronize(stream));
    expect_near(out, product(in, w, rows, OC, C), tolerance<bf16>());
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
}

struct QkCase {
    AttentionShape a;
    bool norm, table;
};
const QkCase qk_cases[] = {
    {{2, 3, 2, 1, 16, 16}, true, true},
    {{1, 7, 4, 2, 32, 32}, false, true},
    {{2, 2, 3, 3, 8, 6}, true, true},
    {{1, 5, 2, 1, 56, 52}, true, true},
    {{1, 5, 2, 2, 24, 24}, false, true},
    {{1, 9, 2, 1, 8, 5}, true, false},
    {{1, 6, 2, 1, 16, 16, 4}, true, true},
    {{1, 2, 40, 20, 128, 128}, true, true},
    {{2, 260, 2, 1, 96, 96}, true, true}, // more rows than blocks
    // Norms of heads: their numbers are those of heads.
    {{2, 3, 4, 2, 16, 16, 0, {}, 0, 4, 2}, true, true},
    {{1, 5, 6, 3, 8, 6, 0, {}, 0, 6, 3}, true, true},
    {{1, 9, 2, 1, 8, 5, 0, {}, 0, 2, 1}, true, false},
    {{1, 6, 2, 2, 56, 52, 4, {}, 0, 2, 2}, true, true},
    {{2, 260, 16, 8, 128, 128, 0, {}, 0, 16, 8}, true, true},
    // And of v's.
    {{2, 3, 4, 2, 16, 16, 0, {}, 0, 4, 2, 2}, true, true},
    {{1, 9, 2, 1, 8, 5, 3, {}, 0, 2, 1, 1}, true, false},
    {{1, 35, 6, 3, 64, 64, 0, {}, 0, 6, 3, 3}, true, true},
};

// c.a, with norms of the whole of q and k unless it has norms of heads.
AttentionShape shape_of(const QkCase& c) {
    AttentionShape a = c.a;
    if (c.norm && !a.q_norms) a.q_norms = a.k_norms = 1;
    return a;
}
// The norms of a row: where each begins, its width, its real channels, and of which tensor it is.
struct NormPart {
    int begin, width, real, tensor;
};
std::vector<NormPart> norm_parts(const AttentionShape& a) {
    std::vector<NormPart> parts;
    int tensor = 0, begin = 0;
    for (auto [norms, all] : {std::pair{a.q_norms, a.q_width()},
                              {a.k_norms, a.kv_width()},
                              {a.v_norms, a.kv_width()}}) {
        for (int n = 0; n < norms; n++) {
            const int width = all / norms;
            parts.push_back({begin + n * width, width, width / a.HS * a.channels, tensor});
        }
        begin += all, tensor++;
    }
    return parts;
}
// Weights of q's norms, k's and v's, each as wide as a norm.
std::array<Doubles, 3> norm_weights(const AttentionShape& a,
                                    const std::function<Doubles(int)>& make) {
    return {make(a.q_norms ? a.q_width() / a.q_norms : 1),
            make(a.k_norms ? a.kv_width() / a.k_norms : 1), make(a.v_norms ? a.HS : 1)};
}
std::string name_of(const QkCase& c) {
    return cat("B ", c.a.B, ", T ", c.a.T, ", NH ", c.a.NH, ", KVH ", c.a.KVH, ", HS ", c.a.HS,
               ", channels ", c.a.channels, ", first ", c.a.first, c.norm ? ", norm" : "",
               c.a.v_norms   ? " of heads, v's too"
               : c.a.q_norms ? " of heads"
                             : "",
               c.table ? ", rope" : "");
}

// Zero where a channel of a head is padding.
Doubles mask_padding(Doubles x, const AttentionShape& a) {
    for (size_t i = 0; i < x.size(); i++)
        if (int(i) % a.HS >= a.channels) x[i] = 0;
    return x;
}

std::vector<CosSin> turns(const AttentionShape& a) {
    std::vector<CosSin> table;
    for (int t = 0; t < a.T; t++)
        for (int i = 0; i < a.channels / 2; i++) {
            const double angle = t * std::pow(10000.0, -2.0 * i / a.channels);
            table.push_back({float(std::cos(angle)), float(std::sin(angle))});
        }
    return table;
}

template <class S> void check_qkv_forward(const QkCase& c) {
    SCOPED_TRACE(name_of(c));
    const AttentionShape a = shape_of(c);
    const std::vector<NormPart> parts = norm_parts(a);
    const int width = a.prepared_width(), norms = int(parts.size());
    const double eps = 1e-3;
    const Doubles qkv = mask_padding(numbers<S>(a.rows() * a.row(), "qkv"), a);
    const auto weight = norm_weights(
        a, [&](int n) { return mask_padding(numbers<S>(n, cat("weight ", n).c_str()), a); });
    const std::vector<CosSin> table = turns(a);
    Doubles wanted = qkv, rstds(a.rows() * norms), raws(a.rows() * width);
    for (int64_t row = a.first; row < a.rows(); row++) {
        double* x = &wanted[row * a.row()];
        std::copy(x, x + width, &raws[row * width]);
        for (int n = 0; n < norms; n++) {
            const NormPart& part = parts[n];
            double *y = x + part.begin, square = 0;
            for (int i = 0; i < part.width; i++) square += y[i] * y[i];
            const double rstd = 1 / std::sqrt(square / part.real + eps);
            rstds[row * norms + n] = rstd;
            for (int i = 0; i < part.width; i++)
                y[i] *= rstd * weight[size_t(part.tensor)][size_t(i)];
        }
        const int half = a.channels / 2;
        for (int head = 0; head < a.NH + a.KVH && c.table; head++)
            for (int i = 0; i < half; i++) {
                const CosSin turn = table[row % a.T * half + i];
                double &x0 = x[head * a.HS + i], &x1 = x[head * a.HS + i + half];
                const double y0 = x0 * turn.cos - x1 * turn.sin;
                x1 = x1 * turn.cos + x0 * turn.sin, x0 = y0;
            }
    }
    OnDevice<S> out(qkv), raw(Doubles(a.rows() * width));
    OnDevice<NormStats> stats(std::vector<NormStats>(std::max<int64_t>(1, a.rows() * norms)));
    const OnDevice<S> q(weight[0]), k(weight[1]), v(weight[2]);
    const OnDevice<CosSin> table_(table.empty() ? std::vector<CosSin>(1) : table);
    Stream stream;
    in_every_order(
        [&] {
            out.write(qkv);
            qkv_forward<S, S>(out, out + int64_t(a.first) * a.row(), c.norm ? raw + 0 : nullptr,
                              stats + 0, {q.in(), k.in(), v.in()}, eps,
                              c.table ? table_.in() : nullptr, a, stream);
        },
        out);
    expect_near(out, wanted, tolerance<S>());
    if (!c.norm) return;
    const std::vector<NormStats> got = stats.raw();
    const Doubles kept = raw.read();
    for (int64_t row = a.first; row < a.rows(); row++) {
        for (int64_t i = row * norms; i < (row + 1) * norms; i++) {
            EXPECT_NEAR(got[i].rstd, rstds[i], 1e-5 * rstds[i]);
            EXPECT_EQ(got[i].mean, 0);
        }
        for (int i = 0; i < width; i++) EXPECT_EQ(kept[row * width + i], raws[row * width + i]);
    }
}

TEST(CudaLayers, QkvForward) {
    for (const QkCase& c : qk_cases) check_qkv_forward<bf16>(c), check_qkv_forward<float>(c);
}

template <class S, class G> void check_qkv_norm_backward(const QkCase& c) {
    SCOPED_TRACE(name_of(c));
    const AttentionShape a = shape_of(c);
    const std::vector<NormPart> parts = norm_parts(a);
    const int width = a.prepared_width(), norms = int(parts.size());
    const Doubles dqkv = mask_padding(numbers<S>(a.rows() * a.row(), "dqkv"), a),
                  raw = mask_padding(numbers<S>(a.rows() * width, "raw"), a);
    const auto weight = norm_weights(
        a, [&](int n) { return mask_padding(numbers<S>(n, cat("weight ", n).c_str()), a); });
    const auto ones = norm_weights(a, [](int n) { return Doubles(size_t(n), 1.0); });
    std::vector<NormStats> stats(a.rows() * norms);
    Doubles wanted = dqkv;
    auto dweight = ones;
    for (int64_t row = 0; row < a.rows(); row++)
        for (int n = 0; n < norms; n++) {
            const NormPart& part = parts[n];
            const double* x = &raw[row * width + part.begin];
            double* dy = &wanted[row * a.row() + part.begin];
            const Doubles& w = weight[size_t(part.tensor)];
            double square = 0, dot = 0;
            for (int i = 0; i < part.width; i++) square += x[i] * x[i];
            const float rstd = float(1 / std::sqrt(square / part.real + 1e-3));
            stats[row * norms + n] = {0, rstd};
            for (int i = 0; i < part.width; i++) {
                dweight[size_t(part.tensor)][size_t(i)] += dy[i] * x[i] * rstd;
                dot += w[i] * dy[i] * x[i] * rstd;
            }
            for (int i = 0; i < part.width; i++)
                dy[i] = rstd * (w[i] * dy[i] - x[i] * rstd * dot / part.real);
        }
    OnDevice<S> out(dqkv);
    // raw's padding is not read.
    Doubles raw_of_any_padding = raw;
    for (size_t i = 0; i < raw.size(); i++)
        if (int(i) % a.HS >= a.channels) raw_of_any_padding[i] = NAN;
    const OnDevice<S> raw_(raw_of_any_padding), q(weight[0]), k(weight[1]), v(weight[2]);
    const OnDevice<NormStats> stats_(stats);
    OnDevice<G> dq(ones[0]), dk(ones[1]), dv(ones[2]);
    OnDevice<float> scratch(qkv_norm_scratch(a));
    Stream stream;
    auto backward = [&] {
        out.write(dqkv), dq.write(ones[0]), dk.write(ones[1]), dv.write(ones[2]);
        qkv_norm_backward<S, G>(out + 0, raw_.in(), stats_.in(), {q.in(), k.in(), v.in()},
                                {dq + 0, dk + 0, a.v_norms ? dv + 0 : nullptr}, scratch + 0, a,
                                stream);
    };
    in_every_order(backward, out, dq, dk, dv);
    expect_near(out, wanted, tolerance<S>());
    expect_near(dq, dweight[0], tolerance<G>());
    expect_near(dk, dweight[1], tolerance<G>());
    expect_near(dv, dweight[2], tolerance<G>());
}

TEST(CudaLayers, QkvNormBackward) {
    for (const QkCase& c : qk_cases) {
        if (!c.norm || c.a.first > 0) continue;
        check_qkv_norm_backward<bf16, bf16>(c);
        check_qkv_norm_backward<bf16, float>(c);
        check_qkv_norm_backward<float, float>(c);
    }
}

// A later layer mixes its v with the first layer's; X is the scalar of the matmul's output.
template <class S, class X> void check_mix_values(const AttentionShape& a) {
    SCOPED_TRACE(testing::Message() << "B " << a.B << ", T " << a.T << ", first " << a.first);
    const int KV = a.kv_width(), before = a.q_width() + KV;
    const int64_t rows = a.rows() - a.first;
    const Doubles qkv = numbers<X>(rows * a.row(), "qkv"), v1 = numbers<S>(rows * KV, "v1");
    const double m = double(S(0.3f));
    Doubles wanted = qkv, kept(rows * KV);
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < KV; i++) {
            double& v = wanted[row * a.row() + before + i];
            kept[row * KV + i] = v;
            v = (1 - m) * v + m * v1[row * KV + i];
        }
    Stream stream;
    OnDevice<X> out(qkv);
    OnDevice<S> own(rows * KV);
    const OnDevice<S> v1_(v1), m_(Doubles{m});
    in_every_order(
        [&] {
            out.write(qkv);
            mix_values<S, X>(out, own, v1_.in(), m_.in(), a, stream);
        },
        out, own);
    expect_near(out, wanted, tolerance<X>());
    expect_near(own, kept, tolerance<S>());
    out.write(qkv);
    mix_values<S, X>(out, nullptr, v1_.in(), m_.in(), a, stream);
    expect_near(out, wanted, tolerance<X>());
    out.write(qkv), own.write(Doubles(rows * KV));
    mix_values<S, X>(out, own, nullptr, nullptr, a, stream); // the first layer
    EXPECT_EQ(out.read(), qkv);
    expect_near(own, kept, tolerance<S>());
}

template <class S, class G> void check_mix_values_backward(const AttentionShape& a) {
    SCOPED_TRACE(testing::Message() << "B " << a.B << ", T " << a.T);
    const int KV = a.kv_width(), before = a.q_width() + KV;
    const Doubles dqkv = numbers<S>(a.rows() * a.row(), "dqkv"),
                  dvalues = numbers<float>(a.rows() * KV, "dvalues"),
                  v = numbers<S>(a.rows() * KV, "v"), v1 = numbers<S>(a.rows() * KV, "v1");
    const double m = double(S(0.3f));
    Doubles wanted = dqkv, wanted_first = dqkv, wanted_values = dvalues, dmix = {1};
    for (int64_t row = 0; row < a.rows(); row++)
        for (int i = 0; i < KV; i++) {
            const int64_t at = row * a.row() + before + i, value = row * KV + i;
            wanted_values[value] += m * dqkv[at];
            dmix[0] += dqkv[at] * (v1[value] - v[value]);
            wanted[at] *= 1 - m;
            wanted_first[at] += dvalues[value];
        }
    Stream stream;
    OnDevice<S> out(dqkv);
    OnDevice<float> values(dvalues);
    OnDevice<G> dmix_(Doubles{1});
    OnDevice<double> scratch(mix_values_scratch(a) / int64_t(sizeof(double)));
    const OnDevice<S> v_(v), v1_(v1), m_(Doubles{m});
    in_every_order(
        [&] {
            out.write(dqkv), values.write(dvalues), dmix_.write(Doubles{1});
            mix_values_backward<S, G>(out, values, v_.in(), v1_.in(), m_.in(), dmix_, scratch, a,
                                      stream);
        },
        out, values, dmix_);
    expect_near(out, wanted, tolerance<S>());
    expect_near(values, wanted_values, tolerance<float>());
    expect_near(dmix_, dmix, tolerance<G>());
    out.write(dqkv), values.write(dvalues); // the first layer
    mix_values_backward<S, G>(out, values, v1_.in(), v1_.in(), nullptr, nullptr, scratch, a,
                              stream);
    expect_near(out, wanted_first, tolerance<S>());
    EXPECT_EQ(values.read(), dvalues);
}

TEST(CudaLayers, MixValues) {
    for (const AttentionShape& a : {AttentionShape{2, 3, 4, 2, 16, 16},
                                    {1, 9, 2, 1, 8, 5, 4},
                                    {1, 1, 1, 1, 8, 8},
                                    {2, 130, 6, 3, 64, 64}}) {
        check_mix_values<bf16, bf16>(a);
        check_mix_values<bf16, float>(a);
        check_mix_values<float, float>(a);
        if (a.first > 0) continue;
        check_mix_values_backward<bf16, bf16>(a);
        check_mix_values_backward<bf16, float>(a);
        check_mix_values_backward<float, float>(a);
    }
}

template <class S> void check_activations(int64_t rows, int H) {
    SCOPED_TRACE(testing::Message() << rows << " rows of " << H);
    const double near = 2 * tolerance<S>();
    Stream stream;
    const Doubles h = numbers<S>(rows * 2 * H, "h", 3), da = numbers<S>(rows * 2 * H, "da");
    const OnDevice<S> h_(h), da_(da);
    {
        Doubles forward(h), backward(da);
        for (size_t i = 0; i < h.size(); i++) {
            forward[i] = gelu(h[i]);
            backward[i] *= dgelu(h[i]);
        }
        OnDevice<S> out(rows * 2 * H);
        gelu_forward(out + 0, h_.in(), out.size, stream);
        expect_near(out, forward, near);
        gelu_backward(out + 0, da_.in(), h_.in(), out.size, stream);
        expect_near(out, backward, near);
        out.write(da);
        gelu_backward(out + 0, out.in(), h_.in(), out.size, stream);
        expect_near(out, backward, near);
    }
    Doubles forward(rows * H), backward(rows * 2 * H);
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < H; i++) {
            const double g = h[row * 2 * H + i], up = h[row * 2 * H + H + i], d = da[row * H + i];
            const double s = 1 / (1 + std::exp(-g));
            forward[row * H + i] = g * s * up;
            backward[row * 2 * H + i] = d * up * s * (1 + g * (1 - s));
            backward[row * 2 * H + H + i] = d * g * s;
        }
    OnDevice<S> out(rows * H), dh(rows * 2 * H);
    swiglu_forward(out + 0, h_.in(), rows, H, stream);
    expect_near(out, forward, near);
    swiglu_backward(dh + 0, da_.in(), h_.in(), rows, H, stream);
    expect_near(dh, backward, near);
}

TEST(CudaLayers, Activations) {
    for (const int64_t rows : {1, 7, 130})
        for (const int H : {8, 24, 1000, 1368})
            check_activations<bf16>(rows, H), check_activations<float>(rows, H);
}

// Activations of large values are 0 or x, never NaN.
TEST(CudaLayers, LargeActivations) {
    const Doubles h = {-1e30, -1e4, -100, -20, 20, 100, 1e4, 1e30};
    const OnDevice<float> h_(h), ones(Doubles(8, 1.0));
    OnDevice<float> out(8);
    Stream stream;
    gelu_forward(out + 0, h_.in(), 8, stream);
    for (int i = 0; i < 8; i++) EXPECT_EQ(out.read()[i], i < 4 ? 0 : double(float(h[i])));
    swiglu_forward(
        out + 0,
        OnDevice<float>(Doubles{-1e30, -1e4, -100, -90, 90, 100, 1e4, 1e30, 1, 1, 1, 1, 1, 1, 1, 1})
            .in(),
        1, 8, stream);
    for (const double x : out.read()) EXPECT_TRUE(std::isfinite(x));
}

template <class X> void check_loss(int64_t rows, int V, int64_t row) {
    SCOPED_TRACE(testing::Message() << rows << " rows of " << V << " in " << row);
    const Doubles logits = numbers<X>(rows * V, "logits", 4);
    std::vector<int> targets;
    for (int64_t i = 0; i < rows; i++)
        targets.push_back(i % 5 == 3 ? -1 : i == 0 ? V - 1 : int(i * 31 % V));
    const double scale = 0.125;
    Doubles losses, gradients = logits;
    double total = 1;
    for (int64_t i = 0; i < rows; i++) {
        const double* x = &logits[i * V];
        double* d = &gradients[i * V];
        double sum = 0;
        for (int j = 0; j < V; j++) sum += std::exp(x[j]);
        for (int j = 0; j < V; j++)
            d[j] = targets[i] < 0 ? 0 : scale * (std::exp(x[j]) / sum - (j == targets[i]));
        losses.push_back(targets[i] < 0 ? 0 : std::log(sum) - x[targets[i]]);
        total += losses.back();
    }
    const Doubles wide = widen(logits, rows, V, row, NAN);
    OnDevice<X> x(wide);
    const OnDevice<int> targets_(targets);
    const OnDevice<float> scale_(Doubles{scale});
    OnDevice<float> losses_(rows);
    Stream stream;
    cross_entropy<X>(losses_ + 0, x + 0, false, targets_.in(), nullptr, rows, V, row, stream);
    expect_near(losses_, losses, 1e-6);
    const std::vector<X> before = OnDevice<X>(wide).raw(), after = x.raw();
    EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * sizeof(X)), 0);

    auto run = [&] {
        x.write(wide);
        cross_entropy<X>(losses_ + 0, x + 0, true, targets_.in(), scale_.in(), rows, V, row,
                         stream);
    };
    in_every_order(run, x, losses_);
    expect_near(losses_, losses, 1e-6);
    const Doubles got = x.read(), wanted = widen(gradients, rows, V, row, 0);
    EXPECT_LT(distance(got, wanted), tolerance<X>());
    for (size_t i = 0; i < got.size(); i++)
        if (wanted[i] == 0) { // columns of padding, ignored rows
            EXPECT_EQ(got[i], 0);
        }

    OnDevice<double> sum(Doubles{1});
    in_every_order(
        [&] {
            sum.write(Doubles{1});
            add_losses(sum + 0, losses_.in(), rows, stream);
        },
        sum);
    EXPECT_NEAR(sum.read()[0], total, 1e-6 * total);
}

TEST(CudaLayers, Loss) {
    for (const int64_t rows : {1, 7, 130}) {
        check_loss<bf16>(rows, 97, 104), check_loss<float>(rows, 97, 104);
        check_loss<bf16>(rows, 97, 128), check_loss<float>(rows, 8, 8);
    }
    check_loss<bf16>(3, 5003, 5008), check_loss<float>(3, 1, 8);
    // A row that exceeds shared memory, and one that leaves no room for a second block.
    check_loss<float>(4, 59999, 60000), check_loss<float>(4, 39999, 40000);
    check_loss<bf16>(4, 119999, 120000);
}

TEST(CudaLayers, LossOfNonFiniteLogits) {
    Stream stream;
    const OnDevice<int> target(std::vector<int>{3});
    const OnDevice<float> scale(Doubles{1});
    OnDevice<float> loss(1);
    for (const double bad : {double(NAN), double(INFINITY)}) {
        Doubles logits = numbers<float>(104, "logits");
        logits[50] = bad;
        OnDevice<float> x(logits);
        cross_entropy<float>(loss + 0, x + 0, true, target.in(), scale.in(), 1, 97, 104, stream);
        EXPECT_FALSE(std::isfinite(loss.read()[0]));
    }
    // The loss is finite, if large, when probabilities are 0.
    Doubles logits(104, -200.0);
    logits[7] = 300;
    OnDevice<float> x(logits);
    cross_entropy<float>(loss + 0, x + 0, true, target.in(), scale.in(), 1, 97, 104, stream);
    EXPECT_NEAR(loss.read()[0], 500, 1e-3);
    EXPECT_NEAR(x.read()[3], -1, 1e-6);
    EXPECT_NEAR(x.read()[7], 1, 1e-4);
}

// Two junctions of n streams and the last one: everything that they compute, against the CPU's
// functions in double.
template <class S, class G> void check_streams(int n, int64_t rows, int C) {
    SCOPED_TRACE(cat(sizeof(S), " ", sizeof(G), ", ", n, " streams, ", rows, " rows, width ", C));
    const int junctions = 3;
    const StreamShape shape{n, C};
    const int64_t M = shape.maps(), width = shape.width(), row = shape.row();
    auto named = [](const char* name, int k) { return cat(name, " ", k); };
    struct Numbers {
        Doubles b, weight, bias, scale, dh, dweight, X, h, projected, maps, rstd, db, dbias, dscale;
    };
    std::vector<Numbers> cpu(junctions);
    const Doubles embedding = numbers<float>(rows * C, "embedding");
    for (int k = 0; k < junctions; k++) {
        Numbers& a = cpu[k];
        auto drawn = [&](int64_t size, const char* name, double std) {
            return numbers<S>(size, named(name, k).c_str(), std);
        };
        a.b = drawn(rows * C, "b", 1), a.weight = drawn(M * width, "weight", 1);
        a.bias = drawn(M, "bias", 1), a.scale = drawn(3, "scale", 0.3);
        a.dh = numbers<float>(rows * C, named("dh", k).c_str());
        a.dweight = numbers<G>(M * width, "dweight"), a.dbias = numbers<G>(M, "dbias");
        a.dscale = numbers<G>(3, "dscale");
        a.X.resize(rows * width), a.h.resize(rows * C), a.db.resize(rows * C);
        a.projected.resize(rows * M), a.maps.resize(rows * M), a.rstd.resize(rows);
    }
    const std::vector<Numbers> given = cpu;
    Doubles dX(rows * width), dmaps(rows * M), dprojected(rows * M), dembedded(rows * C),
        partial(streams_scratch(rows, shape));
    auto of_cpu = [&](int k) {
        Numbers& a = cpu[k];
        lns::StreamArguments<double> x;
        x.shape = shape, x.rows = rows;
        x.before = k ? cpu[k - 1].X.data() : embedding.data();
        if (k) x.maps_before = cpu[k - 1].maps.data(), x.b = a.b.data();
        x.X = a.X.data(), x.h = a.h.data();
        x.dh = a.dh.data(), x.dX = dX.data(), x.dmaps = dmaps.data();
        x.dprojected = dprojected.data(), x.db = a.db.data(), x.dembedded = dembedded.data();
        if (k + 1 == junctions) return x;
        x.weight = a.weight.data(), x.bias = a.bias.data(), x.scale = a.scale.data();
        x.projected = a.projected.data(), x.maps = a.maps.data(), x.rstd = a.rstd.data();
        x.dweight = a.dweight.data(), x.dbias = a.dbias.data(), x.dscale = a.dscale.data();
        return x;
    };
    for (int k = 0; k < junctions; k++) lns::streams_forward(of_cpu(k));
    for (int k = junctions - 1; k >= 0; k--) lns::streams_backward(of_cpu(k), partial.data());

    Stream stream;
    CublasLt cublas(stream);
    struct OfGpu {
        OnDevice<S> b, weight, bias, scale;
        OnDevice<float> dh, X, h, projected, maps, rstd;
        OnDevice<G> dweight, dbias, dscale;
        OnDevice<S> db;
    };
    std::vector<std::unique_ptr<OfGpu>> gpu;
    for (const Numbers& a : given)
        gpu.emplace_back(
            new OfGpu{OnDevice<S>(a.b), OnDevice<S>(a.weight), OnDevice<S>(a.bias),
                      OnDevice<S>(a.scale), OnDevice<float>(a.dh), OnDevice<float>(rows * width),
                      OnDevice<float>(rows * C), OnDevice<float>(rows * row),
                      OnDevice<float>(rows * row), OnDevice<float>(rows), OnDevice<G>(a.dweight),
                      OnDevice<G>(a.dbias), OnDevice<G>(a.dscale), OnDevice<S>(rows * C)});
    const OnDevice<float> embedding_(embedding), dX_(rows * width), dmaps_(Doubles(rows * row)),
        dprojected_(rows * row), dembedded_(rows * C), weight(M * width),
        scratch(matmul_scratch(rows, int(M) + 3));
    auto arguments = [&](int k) {
        OfGpu& a = *gpu[k];
        const bool maps = k + 1 < junctions;
        StreamArguments<S> x = {};
        x.shape = shape, x.row_shape = row_shape(C), x.rows = rows;
        x.before = k ? gpu[k - 1]->X.in() : embedding_.in();
        if (k) x.maps_before = gpu[k - 1]->maps, x.b = a.b;
        if (maps) x.weight = a.weight, x.bias = a.bias, x.scale = a.scale, x.maps = a.maps;
        x.weight_in_float = weight, x.X = a.X, x.h = a.h, x.projected = a.projected;
        x.rstd = a.rstd;
        return x;
    };
    in_every_order(
        [&] {
            for (int k = 0; k < junctions; k++) {
                gpu[k]->dweight.write(given[k].dweight), gpu[k]->dbias.write(given[k].dbias);
                gpu[k]->dscale.write(given[k].dscale);
                streams_forward(cublas, arguments(k));
            }
            for (int k = junctions - 1; k >= 0; k--) {
                OfGpu& a = *gpu[k];
                streams_backward(cublas, arguments(k),
                                 StreamGradients<S, G>{a.dh, dX_, dmaps_, dprojected_, a.db,
                                                       dembedded_, a.dweight, a.dbias, a.dscale,
                                                       weight, scratch});
            }
        },
        gpu[1]->h, gpu[1]->db, gpu[0]->dweight, gpu[0]->dbias, gpu[0]->dscale, dembedded_);
    const double near = 1e-5;
    for (int k = 0; k < junctions; k++) {
        SCOPED_TRACE(k);
        expect_near(gpu[k]->h, cpu[k].h, near);
        if (k) expect_near(gpu[k]->db, cpu[k].db, std::max(near, tolerance<S>()));
        if (k + 1 == junctions) break;
        expect_near(gpu[k]->dweight, cpu[k].dweight, std::max(near, tolerance<G>()));
        expect_near(gpu[k]->dbias, cpu[k].dbias, std::max(near, tolerance<G>()));
        expect_near(gpu[k]->dscale, cpu[k].dscale, std::max(near, tolerance<G>()));
    }
    expect_near(dembedded_, dembedded, near);
}

TEST(CudaLayers, Streams) {
    const Variable none("LNS_CACHE", "none");
    check_streams<bf16, bf16>(4, 7, 24), check_streams<bf16, float>(4, 130, 8);
    check_streams<float, float>(1, 3, 40), check_streams<float, float>(3, 5, 264);
    check_streams<bf16, float>(8, 3, 16), check_streams<float, float>(2, 2, 1032);
}

// The junctions of a model whose embedding and branches are given, against the CPU's functions.
template <class S, class G> void check_sources(int branches, int block, int64_t rows, int C) {
    SCOPED_TRACE(cat(sizeof(S), " ", sizeof(G), ", ", branches, " branches in blocks of ", block,
                     ", ", rows, " rows, width ", C));
    const SourceShape shape{C, block};
    const int64_t n = rows * C;
    const Doubles embedding = numbers<float>(n, "embedding"), b = numbers<S>(branches * n, "b"),
                  query = numbers<S>(C, "query", 1 / std::sqrt(C)), key = numbers<S>(C, "key"),
                  dh = numbers<float>(branches * n, "dh"), dquery = numbers<G>(C, "dquery"),
                  dkey = numbers<G>(C, "dkey");
    Doubles h(branches * n), dsources(shape.count(branches) * n), db(branches * n),
        partial(lns::sources_scratch(rows, C)), wanted_query = dquery, wanted_key = dkey;
    auto of_cpu = [&](int k) {
        lns::SourceArguments<double> x;
        x.shape = shape, x.k = k, x.rows = rows, x.eps = 1e-5;
        x.embedded = embedding.data(), x.branches = b.data(), x.stride = n;
        x.query = query.data(), x.key_weight = key.data(), x.h = &h[(k - 1) * n];
        x.dh = &dh[(k - 1) * n], x.dsources = dsources.data(), x.dstride = n;
        x.last = k == branches, x.db = &db[(k - 1) * n];
        x.dquery = wanted_query.data(), x.dkey_weight = wanted_key.data();
        return x;
    };
    for (int k = 1; k <= branches; k++) lns::sources_forward(of_cpu(k));
    for (int k = branches; k >= 1; k--) lns::sources_backward(of_cpu(k), partial.data());

    Stream stream;
    const int multiprocessors = 2;
    const OnDevice<float> embedding_(embedding), h_(branches * n), dh_(dh),
        dsources_(shape.count(branches) * n), scratch(sources_scratch(C, multiprocessors));
    const OnDevice<S> b_(b), query_(query), key_(key), db_(branches * n);
    OnDevice<G> dquery_(dquery), dkey_(dkey);
    auto arguments = [&](int k) {
        return SourceArguments<S>{shape, row_shape(C),    k, rows, 1e-5f, embedding_, b_, n, query_,
                                  key_,  h_ + (k - 1) * n};
    };
    in_every_order(
        [&] {
            dquery_.write(dquery), dkey_.write(dkey);
            for (int k = 1; k <= branches; k++) sources_forward(arguments(k), stream);
            for (int k = branches; k >= 1; k--)
                sources_backward(arguments(k),
                                 SourceGradients<S, G>{dh_ + (k - 1) * n, dsources_, n,
                                                       k == branches, db_ + (k - 1) * n, dquery_,
                                                       dkey_, scratch},
                                 multiprocessors, stream);
        },
        h_, db_, dsources_, dquery_, dkey_);
    const double near = 1e-5;
    expect_near(h_, h, near), expect_near(dsources_, dsources, near);
    expect_near(db_, db, std::max(near, tolerance<S>()));
    expect_near(dquery_, wanted_query, std::max(near, 2 * tolerance<G>()));
    expect_near(dkey_, wanted_key, std::max(near, 2 * tolerance<G>()));
}

TEST(CudaLayers, Sources) {
    check_sources<bf16, bf16>(5, 1, 7, 24), check_sources<float, float>(6, 4, 130, 8);
    check_sources<bf16, float>(3, 2, 5, 1032), check_sources<float, float>(1, 1, 1, 2056);
}

template <class G> void check_norm(int64_t n) {
    const Doubles g = numbers<G>(n, "g");
    double square = 0;
    for (double x : g) square += x * x;
    const OnDevice<G> g_(g);
    OnDevice<double> norm(1), scratch(norm_blocks);
    Stream stream;
    in_every_order([&] { gradient_norm(norm + 0, g_.in(), n, scratch + 0, stream); }, norm);
    EXPECT_NEAR(norm.read()[0], std::sqrt(square), 1e-6 * std::sqrt(square)) << n;
}

TEST(CudaLayers, GradientNorm) {
    for (const int64_t n : {8, 2048, 40000, 300008}) check_norm<bf16>(n), check_norm<float>(n);
}

struct AdamCase {
    bool with_master, stochastic;
    double grad_clip; // −1: no norm
};

template <class S, class M, class G> void check_adamw(const AdamCase& c) {
    SCOPED_TRACE(cat(sizeof(S), " ", sizeof(M), " ", sizeof(G), ", master ", c.with_master,
                     ", stochastic ", c.stochastic, ", clip ", c.grad_clip));
    const int64_t n = 8 * 333;
    const Doubles w = numbers<S>(n, "w"), g = numbers<G>(n, "g"), m = numbers<M>(n, "m", 0.1);
    Doubles v = numbers<M>(n, "v", 0.1), exact = w;
    for (double& x : v) x = std::abs(x);
    if (c.with_master)
        for (size_t i = 0; i < exact.size(); i++) exact[i] = double(float(exact[i] * 1.0001));
    std::vector<uint32_t> decays(n / 8 / 32 + 1);
    for (int64_t i = 0; i < n / 8; i += 3) decays[i / 32] |= 1u << i % 32;
    const double norm = 50;
    const UpdateStep o = {1e-2f,
                          0.9f,
                          0.95f,
                          1e-8f,
                          0.1f,
                          1.5f,
                          2.5f,
                          float(c.grad_clip),
                          0.25f,
                          /*muon_lr=*/0,
                          /*momentum=*/0,
                          /*cautious=*/c.grad_clip == 0,
                          /*step=*/17};
    const float lr_scale = 0.5f, decay_scale = 3, eps_scale = 1e6f;
    const double scale = c.grad_clip < 0                         ? 0.25
                         : c.grad_clip > 0 && norm > c.grad_clip ? c.grad_clip / norm
                                                                 : 1;
    OnDevice<S> w_(w);
    OnDevice<float> master(exact);
    OnDevice<M> m_(m), v_(v);
    const OnDevice<G> g_(g);
    const OnDevice<uint32_t> decays_(decays);
    const OnDevice<UpdateStep> o_(std::vector<UpdateStep>{o});
    const OnDevice<double> norm_(Doubles{norm}), loss(Doubles{3}), bad(Doubles{NAN});
    Stream stream;
    auto step = [&](const double* norm, const double* loss) {
        adamw_update(AdamWBuffers<S, M, G>{w_, c.with_master ? master + 0 : nullptr, g_, m_, v_,
                                           decays_, o_, norm, loss, n, 0, lr_scale, decay_scale,
                                           eps_scale},
                     c.stochastic, stream);
    };
    step(norm_.in(), bad.in());
    step(bad.in(), loss.in());
    EXPECT_EQ(w_.read(), w);
    EXPECT_EQ(m_.read(), m);
    EXPECT_EQ(v_.read(), v);
    EXPECT_EQ(master.read(), exact);
    in_every_order(
        [&] {
            w_.write(w), m_.write(m), v_.write(v), master.write(exact);
            step(c.grad_clip < 0 ? nullptr : norm_.in(), loss.in());
        },
        w_, m_, v_, master);
    const Doubles got_w = w_.read(), got_m = m_.read(), got_v = v_.read(), got_x = master.read();
    double drift = 0;
    int different = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = scale * g[i];
        const double m1 = 0.9f * m[i] + (1 - 0.9f) * d, v1 = 0.95f * v[i] + (1 - 0.95f) * d * d;
        const double step = m1 * 1.5 / (std::sqrt(v1 * 2.5) + double(1e-8f) * double(eps_scale));
        const bool decays = i / 8 % 3 == 0 && !(o.cautious && exact[i] * step < 0);
        const double decay = decays ? double(0.1f) * double(decay_scale) : 0;
        const double x = exact[i] - double(1e-2f) * double(lr_scale) * (step + decay * exact[i]);
        auto near = [&](double value, double size, bool rounded) {
            // In bf16 half a unit in the last place to nearest, a whole one at random.
            return 1e-6 * size + (rounded ? std::abs(value) / (c.stochastic ? 127 : 255) : 0);
        };
        EXPECT_NEAR(got_m[i], m1, near(m1, std::abs(m[i]) + std::abs(d), sizeof(M) == 2));
        EXPECT_NEAR(got_v[i], v1, near(v1, v1, sizeof(M) == 2));
        EXPECT_NEAR(got_w[i], x, near(x, 1 + std::abs(x), sizeof(S) == 2));
        if (c.with_master) {
            EXPECT_NEAR(got_x[i], x, near(x, 1 + std::abs(x), false));
        }
        drift += (got_w[i] - x) / std::max(std::abs(x), 1e-3);
        if (!c.stochastic) continue;
        // The same random rounding as on the CPU, except where the sums differ by rounding.
        const uint32_t random = lns::mix_bits(uint32_t(i) * 0x9E3779B9u + o.step);
        const uint16_t cpu = round_stochastically(float(m1), random);
        different += got_m[i] != double(std::bit_cast<float>(uint32_t(cpu) << 16));
    }
    if (c.stochastic && sizeof(M) == 2) {
        EXPECT_LT(different, n / 100);
    }
    EXPECT_LT(std::abs(drift / n), 3e-4); // no bias
}

TEST(CudaLayers, AdamW) {
    for (const double clip : {-1.0, 0.0, 1.0}) {
        for (const bool stochastic : {false, true}) {
            check_adamw<bf16, bf16, bf16>({false, stochastic, clip});
            check_adamw<bf16, float, float>({true, stochastic, clip});
            check_adamw<bf16, bf16, float>({true, stochastic, clip});
            check_adamw<float, bf16, float>({false, stochastic, clip});
        }
        check_adamw<float, float, float>({false, false, clip});
    }
}

} // namespace
} // namespace lns::cuda
