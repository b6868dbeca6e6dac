#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dev/sim/cublasLt.h"
#include "dev/sim/products.h"
#include "dev/sim/runtime.h"

using lns::cat;

struct cublasLtContext {};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t order = CUBLASLT_ORDER_COL, batch_count = 1;
    int64_t batch_offset = 0;
};
struct cublasLtMatmulDescOpaque_t {
    int32_t compute, scale;
    int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    int32_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N, transc = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_ld = 0;
    int32_t aux_type = -1, bias_type = -1;
    int8_t fast_accumulation = 0;
};
struct cublasLtMatmulPreferenceOpaque_t {
    uint32_t search = 0;
    uint64_t workspace = 0;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
    uint32_t alignment[4] = {256, 256, 256, 256}; // of A, B, C, D
    float waves = 0;
    uint64_t implementations = ~uint64_t(0);
};

namespace {

using Desc = cublasLtMatmulDescOpaque_t;
using Layout = cublasLtMatrixLayoutOpaque_t;

// ---------------------------------------------------------------------------------------------
// Attributes, checked by size

cublasStatus_t set(void* attribute, size_t size, const void* value, size_t bytes) {
    if (!attribute || !value || bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(attribute, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t get(const void* attribute, size_t size, void* value, size_t bytes, size_t* written) {
    if (!attribute) return CUBLAS_STATUS_INVALID_VALUE;
    if (bytes == 0 && written) {
        *written = size;
        return CUBLAS_STATUS_SUCCESS;
    }
    if (!value || bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(value, attribute, size);
    if (written) *written = size;
    return CUBLAS_STATUS_SUCCESS;
}

struct Attribute {
    void* at = nullptr;
    size_t size = 0;
};
template <class T> Attribute of(T& x) { return {&x, sizeof x}; }

Attribute attribute_of(Layout& l, cublasLtMatrixLayoutAttribute_t attribute) {
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
        return of(l.type);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
        return of(l.order);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
        return of(l.rows);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
        return of(l.cols);
    case CUBLASLT_MATRIX_LAYOUT_LD:
        return of(l.ld);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return of(l.batch_count);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return of(l.batch_offset);
    }
    return {};
}
Attribute attribute_of(Desc& d, cublasLtMatmulDescAttributes_t attribute) {
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
        return of(d.compute);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
        return of(d.scale);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
        return of(d.pointer_mode);
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return of(d.transa);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return of(d.transb);
    case CUBLASLT_MATMUL_DESC_TRANSC:
        return of(d.transc);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return of(d.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return of(d.bias);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return of(d.aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return of(d.aux_ld);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
        return of(d.aux_type);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
        return of(d.fast_accumulation);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return of(d.bias_type);
    }
    return {};
}
Attribute attribute_of(cublasLtMatmulPreferenceOpaque_t& p,
                       cublasLtMatmulPreferenceAttributes_t attribute) {
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
        return of(p.search);
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return of(p.workspace);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return of(p.reductions);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        return of(p.alignment[0]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        return of(p.alignment[1]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        return of(p.alignment[2]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return of(p.alignment[3]);
    case CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT:
        return of(p.waves);
    case CUBLASLT_MATMUL_PREF_IMPL_MASK:
        return of(p.implementations);
    }
    return {};
}

// ---------------------------------------------------------------------------------------------
// Products and their algorithms

// op(A) is (m, k), op(B) (k, n), D (m, n).
struct Sizes {
    int64_t m, n, k;
};

bool transposed(int32_t operation) { return operation != CUBLAS_OP_N; }
bool with_bias(const Desc& d) { return d.epilogue & CUBLASLT_EPILOGUE_BIAS; }
bool with_aux(const Desc& d) { return d.epilogue & 128; }
bool bias_gradient(const Desc& d) {
    return d.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD || d.epilogue == CUBLASLT_EPILOGUE_BGRADA ||
           d.epilogue == CUBLASLT_EPILOGUE_BGRADB;
}
int32_t bias_type(const Desc& d, const Layout& D) { return d.bias_type < 0 ? D.type : d.bias_type; }
int32_t aux_type(const Desc& d, const Layout& D) { return d.aux_type < 0 ? D.type : d.aux_type; }
size_t size_of(int32_t type) { return type == CUDA_R_16BF ? 2 : 4; }

cublasStatus_t check(const Desc& d, const Layout& A, const Layout& B, const Layout& C,
                     const Layout& D, Sizes& sizes) {
    for (const Layout* l : {&A, &B, &C, &D}) {
        if (l->rows == 0 || l->cols == 0 || l->ld < int64_t(l->rows))
            return CUBLAS_STATUS_INVALID_VALUE;
        if (l->order != CUBLASLT_ORDER_COL || l->batch_count != 1)
            return CUBLAS_STATUS_NOT_SUPPORTED;
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const bool ta = transposed(d.transa), tb = transposed(d.transb);
    sizes = {int64_t(D.rows), int64_t(D.cols), int64_t(ta ? A.rows : A.cols)};
    if (int64_t(ta ? A.cols : A.rows) != sizes.m || int64_t(tb ? B.rows : B.cols) != sizes.n ||
        int64_t(tb ? B.cols : B.rows) != sizes.k || C.rows != D.rows || C.cols != D.cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    const bool known_compute = d.compute == CUBLAS_COMPUTE_32F ||
                               d.compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
                               (d.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && A.type == CUDA_R_32F);
    if (!known_compute || d.scale != CUDA_R_32F || d.transc != CUBLAS_OP_N || A.type != B.type ||
        C.type != D.type || (A.type == CUDA_R_32F && D.type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    switch (d.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
        break;
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB:
        if (const char* none = std::getenv("LNS_SIM_NO_EPILOGUES"); none && *none == '1')
            return CUBLAS_STATUS_NOT_SUPPORTED;
        break;
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (with_aux(d) && (d.aux_ld < sizes.m || d.aux_ld % 8)) return CUBLAS_STATUS_INVALID_VALUE;
    if (with_aux(d) && aux_type(d, D) != D.type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((with_bias(d) || bias_gradient(d)) && bias_type(d, D) != D.type)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

// Orders of summation over k. As with cuBLASLt, "in place" does not repeat to the bit.
struct Algorithm {
    int32_t id, splits;
    uint32_t reduction;
    bool backwards;
};
const Algorithm algorithms[] = {
    {1, 1, CUBLASLT_REDUCTION_SCHEME_NONE, false},
    {2, 1, CUBLASLT_REDUCTION_SCHEME_NONE, true},
    {3, 2, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, false},
    {4, 3, CUBLASLT_REDUCTION_SCHEME_INPLACE, false},
};

const Algorithm* algorithm_of(const cublasLtMatmulAlgo_t& algo) {
    for (const Algorithm& a : algorithms)
        if (algo.data[0] == uint64_t(a.id)) return &a;
    return nullptr;
}

size_t workspace_of(const Algorithm& a, const Sizes& s) {
    if (a.reduction == CUBLASLT_REDUCTION_SCHEME_INPLACE) return 256; // counters
    return a.splits > 1 ? size_t(a.splits) * size_t(s.m * s.n) * sizeof(float) : 0;
}

// An algorithm is valid for the types, operations and epilogue for which it was requested.
uint64_t kind_of(const Desc& d, const Layout& A, const Layout& B, const Layout& C,
                 const Layout& D) {
    uint64_t kind = 0;
    for (int32_t part : {d.compute, d.transa, d.transb, int32_t(d.epilogue), int32_t(A.type),
                         int32_t(B.type), int32_t(C.type), int32_t(D.type)})
        kind = kind * 0x9E3779B97F4A7C15u + uint64_t(part) + 1;
    return kind;
}

cublasLtMatmulAlgo_t made(const Algorithm& a, uint64_t kind, const uint32_t (&alignment)[4]) {
    cublasLtMatmulAlgo_t algo = {};
    algo.data[0] = uint64_t(a.id), algo.data[1] = kind;
    for (int i = 0; i < 4; i++) algo.data[2] |= uint64_t(alignment[i]) << 16 * i;
    return algo;
}

// ---------------------------------------------------------------------------------------------
// Elements

float load(const void* at, int64_t i, int32_t type) {
    if (type == CUDA_R_32F) return static_cast<const float*>(at)[i];
    return std::bit_cast<float>(uint32_t(static_cast<const uint16_t*>(at)[i]) << 16);
}
void store(void* at, int64_t i, int32_t type, float x) {
    if (type == CUDA_R_32F) {
        static_cast<float*>(at)[i] = x;
        return;
    }
    uint32_t bits = std::bit_cast<uint32_t>(x);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    bits = nan ? 0x7FFF0000 : bits + 0x7FFF + (bits >> 16 & 1);
    static_cast<uint16_t*>(at)[i] = uint16_t(bits >> 16);
}

// GELU by tanh: arXiv 1606.08415, section 2.
const float gelu_scale = 0.79788456f, gelu_cube = 0.044715f; // √(2/π)
float gelu(float x) { return 0.5f * x * (1 + std::tanh(gelu_scale * (x + gelu_cube * x * x * x))); }
float gelu_gradient(float x) {
    const float t = std::tanh(gelu_scale * (x + gelu_cube * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * gelu_scale * (1 + 3 * gelu_cube * x * x);
}

// ---------------------------------------------------------------------------------------------
// The product

struct Product {
    Desc d;
    Layout A, B, C, D;
    const void *a, *b, *c;
    void* out;
    Sizes s;
    Algorithm algorithm;
    const void *alpha, *beta; // on the device; null: the values are here
    float alpha_value, beta_value;
    void* workspace;
};

void run(const Product& p) {
    const auto [m, n, k] = p.s;
    if (const size_t bytes = workspace_of(p.algorithm, p.s)) lns::sim::poison(p.workspace, bytes);
    const float alpha = p.alpha ? *static_cast<const float*>(p.alpha) : p.alpha_value;
    const float beta = p.beta ? *static_cast<const float*>(p.beta) : p.beta_value;

    // In row-major order b is (n, k), a is (k, m), and the sums (n, m) are D's columns.
    const int64_t width = lns::sim::padded_width(m);
    std::vector<float> a(size_t(k * width)), b(size_t(n * k)), sums(size_t(n * width));
    for (int64_t l = 0; l < k; l++)
        for (int64_t i = 0; i < m; i++)
            a[size_t(l * width + i)] =
                load(p.a, transposed(p.d.transa) ? l + i * p.A.ld : i + l * p.A.ld, p.A.type);
    for (int64_t j = 0; j < n; j++)
        for (int64_t l = 0; l < k; l++)
            b[size_t(j * k + l)] =
                load(p.b, transposed(p.d.transb) ? j + l * p.B.ld : l + j * p.B.ld, p.B.type);

    const int splits = int(std::min<int64_t>(p.algorithm.splits, k));
    std::vector<int> order(static_cast<size_t>(splits));
    for (int i = 0; i < splits; i++) order[size_t(i)] = i;
    if (p.algorithm.reduction == CUBLASLT_REDUCTION_SCHEME_INPLACE) { // in the order of arrival
        static std::atomic<int> calls = 0;
        std::rotate(order.begin(), order.begin() + calls++ % splits, order.end());
    }
    std::vector<float> part;
    for (int i : order) {
        const int64_t from = k * i / splits, to = k * (i + 1) / splits;
        part.assign(sums.size(), 0);
        lns::sim::product(part.data(), b.data() + from, k, a.data() + from * width, n, width,
                          to - from, p.algorithm.backwards);
        for (size_t e = 0; e < sums.size(); e++) sums[e] += part[e];
    }

    std::vector<float> bias_sums(size_t(m), 0.0f);
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            float x = alpha * sums[size_t(j * width + i)];
            if (beta != 0) x += beta * load(p.c, i + j * p.C.ld, p.C.type);
            const int64_t aux = i + j * p.d.aux_ld;
            if (with_bias(p.d)) x += load(p.d.bias, i, bias_type(p.d, p.D));
            if (p.d.epilogue & CUBLASLT_EPILOGUE_GELU) {
                if (with_aux(p.d)) store(p.d.aux, aux, aux_type(p.d, p.D), x);
                x = gelu(x);
            } else if (with_aux(p.d)) {
                x *= gelu_gradient(load(p.d.aux, aux, aux_type(p.d, p.D)));
                bias_sums[size_t(i)] += x;
            }
            store(p.out, i + j * p.D.ld, p.D.type, x);
        }

    if (p.d.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
        for (int64_t i = 0; i < m; i++)
            store(p.d.bias, i, bias_type(p.d, p.D), bias_sums[size_t(i)]);
    if (p.d.epilogue == CUBLASLT_EPILOGUE_BGRADA)
        for (int64_t i = 0; i < m; i++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++) sum += a[size_t(l * width + i)];
            store(p.d.bias, i, bias_type(p.d, p.D), sum);
        }
    if (p.d.epilogue == CUBLASLT_EPILOGUE_BGRADB)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++) sum += b[size_t(j * k + l)];
            store(p.d.bias, j, bias_type(p.d, p.D), sum);
        }
}

size_t bytes_of(const Layout& l) {
    return size_t(l.ld * int64_t(l.cols - 1) + int64_t(l.rows)) * size_of(l.type);
}
bool overlap(const void* x, size_t x_bytes, const void* y, size_t y_bytes) {
    return uintptr_t(x) < uintptr_t(y) + y_bytes && uintptr_t(y) < uintptr_t(x) + x_bytes;
}

} // namespace

// ---------------------------------------------------------------------------------------------

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!lns::sim::architecture()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return 130000; }
size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
        return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
        return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
        return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR:
        return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
        return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_LICENSE_ERROR:
        return "CUBLAS_STATUS_LICENSE_ERROR";
    }
    return "unknown status";
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
const char* cublasGetStatusName(cublasStatus_t status) { return cublasLtGetStatusName(status); }
const char* cublasGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = new Layout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
    const Attribute a = attribute_of(*layout, attribute);
    return set(a.at, a.size, value, bytes);
}
cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                void* value, size_t bytes, size_t* written) {
    const Attribute a = attribute_of(*layout, attribute);
    return get(a.at, a.size, value, bytes, written);
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    *desc = new Desc{compute, scale};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
    const Attribute a = attribute_of(*desc, attribute);
    return set(a.at, a.size, value, bytes);
}
cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute, void* value,
                                              size_t bytes, size_t* written) {
    const Attribute a = attribute_of(*desc, attribute);
    return get(a.at, a.size, value, bytes, written);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new cublasLtMatmulPreferenceOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    const Attribute a = attribute_of(*preference, attribute);
    return set(a.at, a.size, value, bytes);
}
cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    void* value, size_t bytes, size_t* written) {
    const Attribute a = attribute_of(*preference, attribute);
    return get(a.at, a.size, value, bytes, written);
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void* value, size_t bytes, size_t* written) {
    const Algorithm* a = algorithm_of(*algo);
    if (!a) return CUBLAS_STATUS_INVALID_VALUE;
    const uint32_t zero = 0;
    switch (attribute) {
    case CUBLASLT_ALGO_CONFIG_ID:
        return get(&a->id, sizeof a->id, value, bytes, written);
    case CUBLASLT_ALGO_CONFIG_SPLITK_NUM:
        return get(&a->splits, sizeof a->splits, value, bytes, written);
    case CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME:
        return get(&a->reduction, sizeof a->reduction, value, bytes, written);
    case CUBLASLT_ALGO_CONFIG_TILE_ID:
    case CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING:
    case CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION:
    case CUBLASLT_ALGO_CONFIG_STAGES_ID:
        return get(&zero, sizeof zero, value, bytes, written);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                              cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* returned) {
    *returned = 0;
    if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    Sizes sizes;
    if (const cublasStatus_t status = check(*desc, *A, *B, *C, *D, sizes)) return status;
    const uint64_t kind = kind_of(*desc, *A, *B, *C, *D);
    for (const Algorithm& a : algorithms) {
        const size_t workspace = workspace_of(a, sizes);
        if (*returned == requested || workspace > preference->workspace ||
            (a.reduction && !(a.reduction & preference->reductions)) || a.splits > sizes.k)
            continue;
        results[(*returned)++] = {
            made(a, kind, preference->alignment), workspace, CUBLAS_STATUS_SUCCESS, 1.0f, {}};
    }
    return *returned ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                       cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
    Sizes sizes;
    if (const cublasStatus_t status = check(*desc, *A, *B, *C, *D, sizes)) return status;
    const Algorithm* a = algorithm_of(*algo);
    if (!a || algo->data[1] != kind_of(*desc, *A, *B, *C, *D) || a->splits > sizes.k)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    *result = {*algo, workspace_of(*a, sizes), CUBLAS_STATUS_SUCCESS, 1.0f, {}};
    return CUBLAS_STATUS_SUCCESS;
}

// Refuses what cuBLASLt would, with its status; what cuBLASLt would not notice, such as memory that
// is too small, is an Error.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t Adesc, const void* B,
                              cublasLtMatrixLayout_t Bdesc, const void* beta, const void* C,
                              cublasLtMatrixLayout_t Cdesc, void* D, cublasLtMatrixLayout_t Ddesc,
                              const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!desc || !Adesc || !Bdesc || !Cdesc || !Ddesc || !alpha || !beta || !A || !B || !D)
        return CUBLAS_STATUS_INVALID_VALUE;
    Sizes sizes;
    if (const cublasStatus_t status = check(*desc, *Adesc, *Bdesc, *Cdesc, *Ddesc, sizes))
        return status;
    const Algorithm* algorithm = algo ? algorithm_of(*algo) : &algorithms[0];
    if (!algorithm || algorithm->splits > sizes.k ||
        (algo && algo->data[1] != kind_of(*desc, *Adesc, *Bdesc, *Cdesc, *Ddesc)))
        return CUBLAS_STATUS_INVALID_VALUE;
    const size_t needed = workspace_of(*algorithm, sizes);
    if (needed > workspace_bytes || (needed && !workspace) || uintptr_t(workspace) % 256)
        return CUBLAS_STATUS_INVALID_VALUE;

    Product p = {*desc, *Adesc, *Bdesc,     *Cdesc, *Ddesc, A, B, C,
                 D,     sizes,  *algorithm, alpha,  beta,   0, 0, workspace};
    const bool host = desc->pointer_mode == CUBLASLT_POINTER_MODE_HOST;
    if (host) {
        p.alpha_value = *static_cast<const float*>(alpha);
        p.beta_value = *static_cast<const float*>(beta);
        p.alpha = p.beta = nullptr;
    }
    const bool reads_c = !host || p.beta_value != 0;
    if (reads_c && !C) return CUBLAS_STATUS_INVALID_VALUE;
    const void* pointers[4] = {A, B, reads_c ? C : D, D};
    for (int i = 0; i < 4; i++) {
        const Layout& layout = *(i == 0 ? Adesc : i == 1 ? Bdesc : i == 2 ? Cdesc : Ddesc);
        const uint64_t alignment =
            algo ? algo->data[2] >> 16 * i & 0xFFFF : uint64_t(size_of(layout.type));
        if (alignment == 0 || uintptr_t(pointers[i]) % alignment)
            return CUBLAS_STATUS_INVALID_VALUE;
    }
    const bool bias = with_bias(*desc) || bias_gradient(*desc);
    if ((bias && !desc->bias) || (with_aux(*desc) && (!desc->aux || uintptr_t(desc->aux) % 16)))
        return CUBLAS_STATUS_INVALID_VALUE;

    using lns::sim::check_device_range;
    check_device_range("cublasLtMatmul, A", A, bytes_of(*Adesc));
    check_device_range("cublasLtMatmul, B", B, bytes_of(*Bdesc));
    if (reads_c) check_device_range("cublasLtMatmul, C", C, bytes_of(*Cdesc));
    check_device_range("cublasLtMatmul, D", D, bytes_of(*Ddesc));
    if (needed) check_device_range("cublasLtMatmul, workspace", workspace, workspace_bytes);
    if (bias) {
        const int64_t n = desc->epilogue == CUBLASLT_EPILOGUE_BGRADB ? sizes.n : sizes.m;
        check_device_range("cublasLtMatmul, bias", desc->bias,
                           size_t(n) * size_of(bias_type(*desc, *Ddesc)));
    }
    if (with_aux(*desc))
        check_device_range("cublasLtMatmul, epilogue's auxiliary matrix", desc->aux,
                           size_t(desc->aux_ld * (sizes.n - 1) + sizes.m) *
                               size_of(aux_type(*desc, *Ddesc)));
    if (overlap(D, bytes_of(*Ddesc), A, bytes_of(*Adesc)) ||
        overlap(D, bytes_of(*Ddesc), B, bytes_of(*Bdesc)))
        lns::fail("cublasLtMatmul: D overlaps A or B");
    if (reads_c && overlap(D, bytes_of(*Ddesc), C, bytes_of(*Cdesc)) &&
        (C != D || Cdesc->ld != Ddesc->ld))
        lns::fail("cublasLtMatmul: D overlaps C, and is not the same matrix");

    const cudaError_t error =
        lns::sim::enqueue(stream, {"cublasLtMatmul", nullptr, [p] { run(p); }});
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
