// oneDNN's matmuls. Making a primitive takes milliseconds (it compiles code), so each shape's is
// made once and kept.
#include "gpt/cpu/gemm_kernel.h"

#ifdef LNS_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>

#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "gpt/base/error.h"
#endif

namespace lns {

#ifdef LNS_ONEDNN

namespace {

using dnnl::memory;

struct Matmul {
    dnnl::matmul primitive;
    memory a, b, out, bias;
    std::unordered_map<int, memory> arguments;
};

using Shape = std::tuple<bool, bool, int64_t, int64_t, int64_t, bool, bool>;

dnnl::engine& engine() {
    static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
}

template <class T>
const memory::data_type type_of =
    std::is_same_v<T, bf16> ? memory::data_type::bf16 : memory::data_type::f32;

template <class T, class OUT> Matmul make_matmul(const Shape& shape) {
    auto [a_transposed, b_transposed, m, n, k, accumulate, has_bias] = shape;
    memory::desc a({m, k}, type_of<T>, a_transposed ? memory::dims{1, m} : memory::dims{k, 1});
    memory::desc b({k, n}, type_of<T>, b_transposed ? memory::dims{1, k} : memory::dims{n, 1});
    memory::desc out({m, n}, type_of<OUT>, memory::dims{n, 1});
    memory::desc bias({1, n}, type_of<OUT>, memory::dims{n, 1});

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
    Matmul matmul{dnnl::matmul(descriptor), at(a), at(b), at(out), at(bias), {}};
    matmul.arguments = {
        {DNNL_ARG_SRC, matmul.a}, {DNNL_ARG_WEIGHTS, matmul.b}, {DNNL_ARG_DST, matmul.out}};
    if (has_bias) matmul.arguments.insert({DNNL_ARG_BIAS, matmul.bias});
    return matmul;
}

} // namespace

template <class T, class OUT>
bool onednn_gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const T* a,
                 const T* b, OUT* out, bool accumulate, const OUT* bias) {
    static std::map<Shape, Matmul> matmuls;
    static dnnl::stream stream(engine());
    static std::mutex mutex; // a primitive owns its scratchpad
    const std::lock_guard lock(mutex);
    const Shape shape{a_transposed, b_transposed, m, n, k, accumulate, bias != nullptr};
    try {
        auto it = matmuls.find(shape);
        if (it == matmuls.end()) it = matmuls.emplace(shape, make_matmul<T, OUT>(shape)).first;
        Matmul& matmul = it->second;
        matmul.a.set_data_handle(const_cast<T*>(a));
        matmul.b.set_data_handle(const_cast<T*>(b));
        matmul.out.set_data_handle(out);
        if (bias) matmul.bias.set_data_handle(const_cast<OUT*>(bias));
        matmul.primitive.execute(stream, matmul.arguments);
        stream.wait();
    } catch (const dnnl::error& error) {
        fail("oneDNN failed on a matmul of ", m, " x ", k, " and ", k, " x ", n, ": ", error.what(),
             ". Build with ONEDNN=0 to avoid oneDNN.");
    }
    return true;
}

#else

template <class T, class OUT>
bool onednn_gemm(bool, bool, int64_t, int64_t, int64_t, const T*, const T*, OUT*, bool,
                 const OUT*) {
    return false;
}

#endif

template bool onednn_gemm(bool, bool, int64_t, int64_t, int64_t, const float*, const float*, float*,
                          bool, const float*);
template bool onednn_gemm(bool, bool, int64_t, int64_t, int64_t, const bf16*, const bf16*, float*,
                          bool, const float*);
template bool onednn_gemm(bool, bool, int64_t, int64_t, int64_t, const bf16*, const bf16*, bf16*,
                          bool, const bf16*);

} // namespace lns
