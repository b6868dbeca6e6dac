#include "gpt/gemm.h"

#include "gpt/error.h"

#ifdef LNS_ONEDNN

#include <oneapi/dnnl/dnnl.hpp>

#include <map>
#include <tuple>

namespace lns {

namespace {

using dnnl::memory;

// A matmul primitive is made once for each shape (that takes milliseconds: it compiles code) and
// kept for the life of the process.
struct Matmul {
    dnnl::matmul primitive;
    memory a, b, out, bias;
};

using Shape = std::tuple<bool, bool, int64_t, int64_t, int64_t, bool, bool>;

dnnl::engine& engine() {
    static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
}

Matmul make_matmul(const Shape& shape) {
    auto [a_transposed, b_transposed, m, n, k, accumulate, has_bias] = shape;
    const auto f32 = memory::data_type::f32;
    memory::desc a({m, k}, f32, a_transposed ? memory::dims{1, m} : memory::dims{k, 1});
    memory::desc b({k, n}, f32, b_transposed ? memory::dims{1, k} : memory::dims{n, 1});
    memory::desc out({m, n}, f32, memory::dims{n, 1});
    memory::desc bias({1, n}, f32, memory::dims{n, 1});

    dnnl::primitive_attr attributes;
    if (accumulate) {
        dnnl::post_ops sum;
        sum.append_sum(1.0f);
        attributes.set_post_ops(sum);
    }
#if DNNL_VERSION_MAJOR >= 3
    auto descriptor = has_bias ? dnnl::matmul::primitive_desc(engine(), a, b, bias, out, attributes)
                               : dnnl::matmul::primitive_desc(engine(), a, b, out, attributes);
#else
    auto operation = has_bias ? dnnl::matmul::desc(a, b, bias, out) : dnnl::matmul::desc(a, b, out);
    dnnl::matmul::primitive_desc descriptor(operation, attributes, engine());
#endif
    auto at = [](const memory::desc& d) { return memory(d, engine(), nullptr); };
    return {dnnl::matmul(descriptor), at(a), at(b), at(out), at(bias)};
}

} // namespace

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float* a,
          const float* b, float* out, bool accumulate, const float* bias) {
    static std::map<Shape, Matmul> matmuls;
    static dnnl::stream stream(engine());
    Shape shape{a_transposed, b_transposed, m, n, k, accumulate, bias != nullptr};
    try {
        auto it = matmuls.find(shape);
        if (it == matmuls.end()) it = matmuls.emplace(shape, make_matmul(shape)).first;
        Matmul& matmul = it->second;
        matmul.a.set_data_handle(const_cast<float*>(a));
        matmul.b.set_data_handle(const_cast<float*>(b));
        matmul.out.set_data_handle(out);
        std::unordered_map<int, memory> arguments = {
            {DNNL_ARG_SRC, matmul.a}, {DNNL_ARG_WEIGHTS, matmul.b}, {DNNL_ARG_DST, matmul.out}};
        if (bias) {
            matmul.bias.set_data_handle(const_cast<float*>(bias));
            arguments.insert({DNNL_ARG_BIAS, matmul.bias});
        }
        matmul.primitive.execute(stream, arguments);
        stream.wait();
    } catch (const dnnl::error& error) {
        fail("oneDNN failed on a matrix product of ", m, " x ", k, " and ", k, " x ", n, ": ",
             error.what(), ". Build with ONEDNN=0 to use the plain loops.");
    }
}

} // namespace lns

#else

namespace lns {

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float* a,
          const float* b, float* out, bool accumulate, const float* bias) {
    plain_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias);
}

} // namespace lns

#endif
