// Matrix products by cuBLASLt, which picks and remembers the fastest of its algorithms for each.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <cublasLt.h>

#include "gpt/base/cache.h"
#include "gpt/cuda/memory.h"

namespace lns::cuda {

template <class X>
constexpr cudaDataType_t data_type = std::is_same_v<X, float> ? CUDA_R_32F : CUDA_R_16BF;

// d (m, n) = a · b + beta · d, column-major: a (m, k), b (k, n), or their transposes in memory; ld:
// elements from one column to the next. bf16 is accumulated in float, float without TF32. Every
// pointer is aligned to 16 bytes.
struct Matmul {
    cudaDataType_t in, out; // of a and b, of d
    bool a_transposed, b_transposed;
    int64_t m, n, k;
    const void *a, *b;
    void* d;
    int64_t lda, ldb, ldd;
    float beta = 0;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void* bias = nullptr; // (m), of d's type
    void* gelu_input = nullptr; // (m, n), of d's type: written by the forward pass for the backward
    bool timed = true;          // false: cuBLASLt's own first choice, the same in every process

    std::string key() const {
        auto name = [](cudaDataType_t type) { return type == CUDA_R_32F ? "float32" : "bf16"; };
        return cat(name(in), " to ", name(out), ", ", m, a_transposed ? " t" : " n", " x ", n,
                   b_transposed ? " t" : " n", " x ", k, ", columns every ", lda, " ", ldb, " ",
                   ldd, ", beta ", beta, ", epilogue ", int(epilogue), timed ? "" : ", not timed");
    }
};

inline void check_matmul(cublasStatus_t status, const Matmul& p, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("cuBLASLt cannot ", what, " (", p.key(), "): ", cublasLtGetStatusString(status),
             ". With CUDA_LAUNCH_BLOCKING=1 in the environment an error of an earlier kernel is "
             "reported where it happens");
}

struct MatmulDescriptors {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;

    explicit MatmulDescriptors(const Matmul& p) {
        const char* what = "describe a product";
        check_matmul(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), p, what);
        auto set = [&](cublasLtMatmulDescAttributes_t name, const auto& value) {
            check_matmul(cublasLtMatmulDescSetAttribute(operation, name, &value, sizeof(value)), p,
                         what);
        };
        const cublasOperation_t as_is = CUBLAS_OP_N, transposed = CUBLAS_OP_T;
        set(CUBLASLT_MATMUL_DESC_TRANSA, p.a_transposed ? transposed : as_is);
        set(CUBLASLT_MATMUL_DESC_TRANSB, p.b_transposed ? transposed : as_is);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
        if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        if (p.gelu_input) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.gelu_input);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ldd);
        }
        auto layout = [&](cublasLtMatrixLayout_t& made, cudaDataType_t type, bool transpose,
                          int64_t rows, int64_t columns, int64_t ld) {
            if (transpose) std::swap(rows, columns);
            check_matmul(
                cublasLtMatrixLayoutCreate(&made, type, uint64_t(rows), uint64_t(columns), ld), p,
                what);
        };
        layout(a, p.in, p.a_transposed, p.m, p.k, p.lda);
        layout(b, p.in, p.b_transposed, p.k, p.n, p.ldb);
        layout(d, p.out, false, p.m, p.n, p.ldd);
    }
    MatmulDescriptors(const MatmulDescriptors&) = delete;
    ~MatmulDescriptors() {
        for (cublasLtMatrixLayout_t layout : {a, b, d})
            if (layout) cublasLtMatrixLayoutDestroy(layout);
        if (operation) cublasLtMatmulDescDestroy(operation);
    }
};

// cuBLASLt with its workspace. The first time a product is met its algorithms are timed, and the
// fastest is cached (gpt/base/cache.h), so that the next run has the same bits. Without a cache, or
// while a stream is being captured, the algorithm is cuBLASLt's own first choice; run a graph's
// products once before capturing it.
class CublasLt {
  public:
    const cudaStream_t stream; // of all products, since they share the workspace

    // On this GPU; without one, on a new one.
    static int64_t workspace_bytes() {
        int device = 0, major = 9;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) !=
                cudaSuccess)
            cudaGetLastError();
        return int64_t(major >= 9 ? 64 : 32) << 20;
    }

    explicit CublasLt(cudaStream_t stream) : stream(stream), cache("cublaslt.txt") {
        int device = 0;
        cudaDeviceProp properties;
        CUDA(cudaGetDevice(&device));
        CUDA(cudaGetDeviceProperties(&properties, device));
        machine = cat(properties.name, ", ", properties.multiProcessorCount,
                      " multiprocessors, cuBLASLt ", cublasLtGetVersion(), ", workspace ",
                      workspace.size, ": ");
        if (const cublasStatus_t status = cublasLtCreate(&handle); status != CUBLAS_STATUS_SUCCESS)
            fail("cuBLASLt cannot start: ", cublasLtGetStatusString(status),
                 ". Its version must fit the GPU's driver");
    }
    CublasLt(const CublasLt&) = delete;
    ~CublasLt() { cublasLtDestroy(handle); }

    int64_t bytes() const { return workspace.size; }

    // False, and nothing is done, where cuBLASLt has no algorithm for such a product.
    bool try_matmul(const Matmul& p) {
        const MatmulDescriptors descriptors(p);
        const std::string key = machine + p.key();
        auto known = algorithms.find(key);
        if (known == algorithms.end())
            known = algorithms.emplace(key, choose(p, descriptors, key)).first;
        if (!known->second) return false;
        check_matmul(run(p, descriptors, *known->second), p, "multiply");
        return true;
    }

    void matmul(const Matmul& p) {
        if (!try_matmul(p)) check_matmul(CUBLAS_STATUS_NOT_SUPPORTED, p, "multiply");
    }

  private:
    // A named type: nvcc 13.0 fails on a vector of cuBLASLt's unnamed one.
    struct Algorithm : cublasLtMatmulAlgo_t {};

    cublasLtHandle_t handle = nullptr;
    Array<char> workspace{workspace_bytes()};
    StopWatch stop_watch;
    std::string machine;
    Cache cache;
    std::map<std::string, std::optional<Algorithm>> algorithms; // by key; none if unsupported

    cublasStatus_t run(const Matmul& p, const MatmulDescriptors& q, const Algorithm& algorithm) {
        const float one = 1;
        return cublasLtMatmul(handle, q.operation, &one, p.a, q.a, p.b, q.b, &p.beta, p.d, q.d, p.d,
                              q.d, &algorithm, workspace, size_t(workspace.size), stream);
    }

    std::optional<Algorithm> choose(const Matmul& p, const MatmulDescriptors& q,
                                    const std::string& key) {
        if (const std::string* text = p.timed ? cache.find(key) : nullptr)
            if (const std::optional<Algorithm> known = from_text(*text);
                known && is_usable(q, *known))
                return known;
        const std::vector<Algorithm> candidates = candidates_for(p, q);
        if (candidates.empty()) return std::nullopt;
        cudaStreamCaptureStatus capture;
        CUDA(cudaStreamIsCapturing(stream, &capture));
        if (!p.timed || capture != cudaStreamCaptureStatusNone || cache.path().empty())
            return candidates[0];
        const std::optional<std::string> text =
            cache.find_or_insert(key, to_text(fastest(p, q, candidates)));
        const std::optional<Algorithm> settled = text ? from_text(*text) : std::nullopt;
        return settled && is_usable(q, *settled) ? *settled : candidates[0];
    }

    // cuBLASLt's suggestions, best first. Split-K sums must go through the workspace in float; in
    // place they would be rounded in between.
    std::vector<Algorithm> candidates_for(const Matmul& p, const MatmulDescriptors& q) {
        const char* what = "suggest algorithms";
        cublasLtMatmulPreference_t preference;
        check_matmul(cublasLtMatmulPreferenceCreate(&preference), p, what);
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
            check_matmul(
                cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value)), p,
                what);
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace.size));
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
               uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        for (const cublasLtMatmulPreferenceAttributes_t alignment :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(alignment, uint32_t(16));
        const int most = 8;
        cublasLtMatmulHeuristicResult_t found[most];
        int count = 0;
        const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            handle, q.operation, q.a, q.b, q.d, q.d, preference, most, found, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
        check_matmul(status, p, what);
        std::vector<Algorithm> candidates;
        for (int i = 0; i < count; i++)
            if (found[i].state == CUBLAS_STATUS_SUCCESS && is_usable(q, {found[i].algo}))
                candidates.push_back({found[i].algo});
        return candidates;
    }

    // Whether the algorithm fits this product and GPU, and gives the same bits each time.
    bool is_usable(const MatmulDescriptors& q, const Algorithm& algorithm) {
        cublasLtMatmulHeuristicResult_t result = {};
        uint32_t reduction = 0;
        size_t written = 0;
        return cublasLtMatmulAlgoCheck(handle, q.operation, q.a, q.b, q.d, q.d, &algorithm,
                                       &result) == CUBLAS_STATUS_SUCCESS &&
               result.workspaceSize <= size_t(workspace.size) &&
               (cublasLtMatmulAlgoConfigGetAttribute(
                    &algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                    sizeof(reduction), &written) != CUBLAS_STATUS_SUCCESS || // no split-K
                reduction == CUBLASLT_REDUCTION_SCHEME_NONE ||
                reduction == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    }

    // Times each candidate on the real operands. d is overwritten by the product that follows, or
    // saved and restored where that adds to it. A later candidate must be 2% faster to be chosen.
    Algorithm fastest(const Matmul& p, const MatmulDescriptors& q,
                      const std::vector<Algorithm>& candidates) {
        if (candidates.size() == 1) return candidates[0];
        const size_t bytes =
            size_t((p.n - 1) * p.ldd + p.m) * (p.out == CUDA_R_32F ? sizeof(float) : 2);
        void* saved = nullptr;
        if (p.beta != 0) {
            if (cudaMalloc(&saved, bytes) != cudaSuccess) {
                cudaGetLastError(); // no memory left to time in
                return candidates[0];
            }
            CUDA(cudaMemcpyAsync(saved, p.d, bytes, cudaMemcpyDeviceToDevice, stream));
        }
        std::vector<float> times(candidates.size(), std::numeric_limits<float>::infinity());
        for (int round = 0; round < 3; round++)
            for (size_t i = 0; i < candidates.size(); i++) {
                bool ran = true;
                const float time = stop_watch.time(stream, [&] {
                    for (int repeat = 0; repeat < 3; repeat++)
                        ran = ran && run(p, q, candidates[i]) == CUBLAS_STATUS_SUCCESS;
                });
                if (ran) times[i] = std::min(times[i], time);
            }
        size_t best = 0;
        for (size_t i = 1; i < times.size(); i++)
            if (times[i] < 0.98f * times[best]) best = i;
        if (saved) {
            CUDA(cudaMemcpyAsync(p.d, saved, bytes, cudaMemcpyDeviceToDevice, stream));
            CUDA(cudaStreamSynchronize(stream));
            CUDA(cudaFree(saved));
        }
        return candidates[best];
    }

    static std::string to_text(const Algorithm& algorithm) {
        std::ostringstream text;
        for (uint64_t word : algorithm.data) text << std::hex << word << " ";
        return text.str();
    }
    static std::optional<Algorithm> from_text(const std::string& text) {
        Algorithm algorithm = {};
        std::istringstream words(text);
        for (uint64_t& word : algorithm.data)
            if (!(words >> std::hex >> word)) return std::nullopt;
        return algorithm;
    }
};

} // namespace lns::cuda
