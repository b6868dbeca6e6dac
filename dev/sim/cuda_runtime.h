// Stands in for CUDA's header of this name when compiling for the simulator: the part of the
// language that kernels use, and of the runtime that the host uses. Names, values and semantics are
// CUDA's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dev/sim/sim.h"
#include "dev/sim/vector_types.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

const int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// Waiting

inline void __syncthreads(lns::sim::Site where = lns::sim::here()) {
    lns::sim::barrier("__syncthreads", where, 0, lns::sim::block_threads());
}
inline int __syncthreads_count(int predicate, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::barrier("__syncthreads_count", where, 0, lns::sim::block_threads(), predicate);
}
inline int __syncthreads_or(int predicate, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::barrier("__syncthreads_or", where, 0, lns::sim::block_threads(), predicate) >
           0;
}
inline int __syncthreads_and(int predicate, lns::sim::Site where = lns::sim::here()) {
    const int n = lns::sim::block_threads();
    return lns::sim::barrier("__syncthreads_and", where, 0, n, predicate) == n;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, lns::sim::Site where = lns::sim::here()) {
    char none = 0;
    lns::sim::meet("__syncwarp", where, mask, &none, [](const lns::sim::Lanes&) {});
}

inline void __nanosleep(unsigned, lns::sim::Site where = lns::sim::here()) {
    lns::sim::wait_round("__nanosleep", where);
    lns::sim::condition_met();
}

inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---------------------------------------------------------------------------------------------
// Exchange between the lanes of a warp

namespace lns::sim {

template <class T> struct Exchanged {
    T value, received;
    int source; // lane
};

template <class T>
T shuffle(const char* name, Site where, uint32_t mask, T value, int source, int width) {
    static_assert(std::is_trivially_copyable_v<T> &&
                  (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8));
    if (width < 1 || width > warp_size || (width & (width - 1)))
        fail_in_kernel(cat(name, " of width ", width, ", which is not a power of 2 up to 32"));
    Exchanged<T> mine = {value, value, source};
    meet(name, where, mask, &mine, [](const Lanes& lanes) {
        for (int i = 0; i < warp_size; i++) {
            if (!lanes.operands[i]) continue;
            auto& lane = *static_cast<Exchanged<T>*>(lanes.operands[i]);
            const auto* from = static_cast<Exchanged<T>*>(lanes.operands[lane.source]);
            if (!from)
                fail_in_kernel(
                    cat("a shuffle reads lane ", lane.source, ", which is not in its mask"));
            lane.received = from->value;
        }
    });
    return mine.received;
}

struct Vote {
    bool predicate;
    uint32_t ballot;
};
inline uint32_t vote(const char* name, Site where, uint32_t mask, bool predicate) {
    Vote mine = {predicate, 0};
    meet(name, where, mask, &mine, [](const Lanes& lanes) {
        uint32_t ballot = 0;
        for (int i = 0; i < warp_size; i++)
            if (lanes.operands[i] && static_cast<Vote*>(lanes.operands[i])->predicate)
                ballot |= 1u << i;
        for (int i = 0; i < warp_size; i++)
            if (lanes.operands[i]) static_cast<Vote*>(lanes.operands[i])->ballot = ballot;
    });
    return mine.ballot;
}

inline int lane() { return thread_rank() % warp_size; }

} // namespace lns::sim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              lns::sim::Site where = lns::sim::here()) {
    const int lane = lns::sim::lane(), first = lane / width * width;
    return lns::sim::shuffle("__shfl_sync", where, mask, value, first + (source & (width - 1)),
                             width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  lns::sim::Site where = lns::sim::here()) {
    const int lane = lns::sim::lane(), other = lane ^ bits;
    const int end = lane / width * width + width;
    return lns::sim::shuffle("__shfl_xor_sync", where, mask, value, other < end ? other : lane,
                             width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 lns::sim::Site where = lns::sim::here()) {
    const int lane = lns::sim::lane(), other = lane - int(delta);
    return lns::sim::shuffle("__shfl_up_sync", where, mask, value,
                             other < lane / width * width ? lane : other, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   lns::sim::Site where = lns::sim::here()) {
    const int lane = lns::sim::lane(), other = lane + int(delta);
    return lns::sim::shuffle("__shfl_down_sync", where, mask, value,
                             other >= lane / width * width + width ? lane : other, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              lns::sim::Site where = lns::sim::here()) {
    return lns::sim::vote("__ballot_sync", where, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::vote("__any_sync", where, mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::vote("__all_sync", where, mask, predicate) == mask;
}

namespace lns::sim {
template <class T>
T reduce(const char* name, Site where, uint32_t mask, T value, void (*add)(T&, const T&)) {
    struct Operand {
        T value;
        void (*add)(T&, const T&);
    } mine = {value, add};
    meet(name, where, mask, &mine, [](const Lanes& lanes) {
        Operand* first = nullptr;
        for (int i = 0; i < warp_size; i++) {
            auto* lane = static_cast<Operand*>(lanes.operands[i]);
            if (lane && first)
                first->add(first->value, lane->value);
            else if (lane)
                first = lane;
        }
        for (int i = 0; i < warp_size; i++)
            if (lanes.operands[i]) static_cast<Operand*>(lanes.operands[i])->value = first->value;
    });
    return mine.value;
}
} // namespace lns::sim

template <class T>
T __reduce_add_sync(unsigned mask, T value, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::reduce<T>("__reduce_add_sync", where, mask, value,
                               [](T& a, const T& b) { a += b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::reduce<T>("__reduce_max_sync", where, mask, value,
                               [](T& a, const T& b) { a = std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, lns::sim::Site where = lns::sim::here()) {
    return lns::sim::reduce<T>("__reduce_min_sync", where, mask, value,
                               [](T& a, const T& b) { a = std::min(a, b); });
}

// ---------------------------------------------------------------------------------------------
// Numbers

template <class To, class From> inline To lns_sim_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned x) { return lns_sim_bits<float>(x); }
inline float __int_as_float(int x) { return lns_sim_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return lns_sim_bits<unsigned>(x); }
inline int __float_as_int(float x) { return lns_sim_bits<int>(x); }
inline long long __double_as_longlong(double x) { return lns_sim_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return lns_sim_bits<double>(x); }

// The C library has declared some of these names for itself, but does not define them.
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __sincosf sincosf
#define __powf powf
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) {
    return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return int(static_cast<long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ using uint128 = unsigned __int128;
    return static_cast<unsigned long long>(uint128(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++)
        out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return out;
}

inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

// ---------------------------------------------------------------------------------------------
// Memory: the kinds of loads and stores differ only in what they do to caches.

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldca(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldlu(const T* at) { return *at; }
template <class T> T __ldcv(const T* at) { return *at; }
template <class T> void __stwb(T* at, T x) { *at = x; }
template <class T> void __stcg(T* at, T x) { *at = x; }
template <class T> void __stcs(T* at, T x) { *at = x; }
template <class T> void __stwt(T* at, T x) { *at = x; }

inline size_t __cvta_generic_to_shared(const void* pointer) {
    return lns::sim::shared_offset(pointer);
}

// T is deduced from the address alone, as if there were an overload for each type.
template <class T, class Change> T lns_sim_atomic(T* at, Change change) {
    T before, after;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    do after = change(before);
    while (
        !__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return before;
}
template <class T> T atomicAdd(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return T(old + x); });
}
template <class T> T atomicSub(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return T(old - x); });
}
template <class T> T atomicMax(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return old > x ? old : x; });
}
template <class T> T atomicMin(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return old < x ? old : x; });
}
template <class T> T atomicOr(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return T(old | x); });
}
template <class T> T atomicAnd(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T old) { return T(old & x); });
}
template <class T> T atomicExch(T* at, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [x](T) { return x; });
}
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
    return lns_sim_atomic(at, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
    return lns_sim_atomic(at, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// ---------------------------------------------------------------------------------------------
// The runtime

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidPitchValue = 12,
    cudaErrorInvalidDevicePointer = 17,
    cudaErrorInvalidMemcpyDirection = 21,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorECCUncorrectable = 214,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorIllegalState = 401,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureMerge = 902,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorCapturedEvent = 907,
    cudaErrorStreamCaptureWrongThread = 908,
    cudaErrorGraphExecUpdateFailure = 910,
    cudaErrorUnknown = 999,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// Devices. LNS_SIM_ARCH is the compute capability (80, 86, 89, 90 or 100; 0: no GPU),
// LNS_SIM_MEMORY the memory in bytes (with K, M or G), LNS_SIM_GPUS their number; a process uses
// one.

struct cudaUUID_t {
    char bytes[16];
};
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalConstMem;
    int major, minor;
    int multiProcessorCount, integrated, canMapHostMemory, concurrentKernels, ECCEnabled;
    int pciBusID, pciDeviceID, pciDomainID, asyncEngineCount, unifiedAddressing, memoryBusWidth;
    int l2CacheSize, persistingL2CacheMaxSize, maxThreadsPerMultiProcessor;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, managedMemory, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int maxBlocksPerMultiProcessor;
    size_t reservedSharedMemPerBlock;
    int memoryPoolsSupported, clusterLaunch;
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrGlobalMemoryBusWidth = 37,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceReset();

// Memory

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
};
const unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2,
               cudaHostAllocWriteCombined = 4;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags = 1);
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags);
cudaError_t cudaMallocHost(void** pointer, size_t bytes, unsigned flags = 0);
cudaError_t cudaFreeHost(void* pointer);
template <class T> cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
template <class T> cudaError_t cudaMallocManaged(T** pointer, size_t bytes, unsigned flags = 1) {
    return cudaMallocManaged(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <class T> cudaError_t cudaHostAlloc(T** pointer, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <class T> cudaError_t cudaMallocHost(T** pointer, size_t bytes, unsigned flags = 0) {
    return cudaMallocHost(reinterpret_cast<void**>(pointer), bytes, flags);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* at, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream = nullptr);

// Streams and events

const unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
const unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);
using cudaHostFn_t = void (*)(void*);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument);

// Graphs

enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2,
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2,
};
using cudaGraphNode_t = struct CUgraphNode_st*;
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

// Launches

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Limited by threads and shared memory, and to 2, since registers are not simulated.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared);
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T* kernel, int threads,
                                                          size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace lns::sim {
// Throws if a pointer argument of a kernel is not to memory that the device can reach.
void check_argument(const void* kernel, int index, const void* pointer);
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                          std::function<void()> thread);
} // namespace lns::sim

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's parameters are 4 KB at most");
    const auto* address = reinterpret_cast<const void*>(kernel);
    std::tuple<std::decay_t<Parameters>...> values{std::forward<Arguments>(arguments)...};
    int index = 0;
    auto check = [&](const auto& value) {
        if constexpr (std::is_pointer_v<std::decay_t<decltype(value)>>)
            lns::sim::check_argument(address, index, value);
        index++;
    };
    std::apply([&](const auto&... value) { (check(value), ...); }, values);
    return lns::sim::launch_kernel(*config, address,
                                   [kernel, values] { std::apply(kernel, values); });
}
