#include "dev/sim/runtime.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "dev/sim/fiber.h"
#include "dev/sim/sim.h"
#include "dev/sim/simulated_gpu.h"

using lns::cat;
using lns::fail;

namespace {

using Clock = std::chrono::steady_clock;

cudaError_t last_error = cudaSuccess;
cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// ---------------------------------------------------------------------------------------------
// The device

uint64_t bytes_of(const char* variable, uint64_t otherwise) {
    const char* text = std::getenv(variable);
    if (!text || !*text) return otherwise;
    char* end = nullptr;
    const double number = std::strtod(text, &end);
    const std::string unit = end;
    double factor = 1;
    if (unit == "K")
        factor = 1 << 10;
    else if (unit == "M")
        factor = 1 << 20;
    else if (unit == "G")
        factor = 1 << 30;
    else if (!unit.empty() || end == text)
        fail(variable, " is \"", text, "\", not a number of bytes (K, M or G may follow)");
    return uint64_t(number * factor);
}

uint64_t device_memory() { return bytes_of("LNS_SIM_MEMORY", uint64_t(8) << 30); }

struct Limits {
    size_t shared_of_block, shared_of_multiprocessor;
    int threads_of_multiprocessor;
};
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
Limits limits() {
    switch (lns::sim::architecture()) {
    case 80:
        return {163 * 1024, 164 * 1024, 2048};
    case 86:
    case 89:
        return {99 * 1024, 100 * 1024, 1536};
    case 90:
    case 100:
        return {227 * 1024, 228 * 1024, 2048};
    }
    fail("LNS_SIM_ARCH is ", lns::sim::architecture(), ", not 80, 86, 89, 90, 100 or 0 (no GPU)");
}

// ---------------------------------------------------------------------------------------------
// Memory. Red zones surround each allocation; new memory is poisoned. AddressSanitizer also reports
// when the host touches device memory.

const size_t red_zone = 256;
const unsigned char red_zone_byte = 0xFB;

struct Piece {
    size_t bytes;
    bool host; // that the device can reach
};

struct Memory {
    std::map<uintptr_t, Piece> pieces; // by address
    size_t used = 0;                   // of the device
    int access = 0;                    // how many callers let the host touch device memory
    std::recursive_mutex mutex;
};
Memory& memory() {
    static auto* the_memory = new Memory; // never destroyed: others may free late
    return *the_memory;
}

const std::pair<const uintptr_t, Piece>* piece_at(const void* at) {
    auto& pieces = memory().pieces;
    auto after = pieces.upper_bound(uintptr_t(at));
    if (after == pieces.begin()) return nullptr;
    const auto& piece = *--after;
    return uintptr_t(at) <= piece.first + piece.second.bytes ? &piece : nullptr;
}

void mark([[maybe_unused]] uintptr_t at, [[maybe_unused]] const Piece& piece,
          [[maybe_unused]] bool reachable) {
    if (reachable)
        ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(at), piece.bytes);
    else
        ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(at), piece.bytes);
}

// Lets the host touch device memory while the device works.
struct DeviceAccess {
    DeviceAccess() {
        Memory& m = memory();
        const std::lock_guard lock(m.mutex);
        if (m.access++ == 0) mark_all(true);
    }
    ~DeviceAccess() {
        Memory& m = memory();
        const std::lock_guard lock(m.mutex);
        if (--m.access == 0) mark_all(false);
    }
    static void mark_all([[maybe_unused]] bool reachable) {
#ifdef LNS_ASAN
        if (memory().used > size_t(64) << 20) reachable = true; // marking takes too long
        for (const auto& [at, piece] : memory().pieces)
            if (!piece.host) mark(at, piece, reachable);
#endif
    }
};

void* allocate(size_t bytes, bool host) {
    Memory& m = memory();
    const std::lock_guard lock(m.mutex);
    const size_t whole = (bytes + red_zone - 1) / red_zone * red_zone + 2 * red_zone;
    auto* base = static_cast<unsigned char*>(std::aligned_alloc(red_zone, whole));
    if (!base) return nullptr;
    std::memset(base, red_zone_byte, red_zone);
    std::memset(base + red_zone, lns::sim::poison_byte, bytes);
    std::memset(base + red_zone + bytes, red_zone_byte, whole - red_zone - bytes);
    ASAN_POISON_MEMORY_REGION(base, whole);
    const auto at = uintptr_t(base + red_zone);
    const Piece piece{bytes, host};
    m.pieces.emplace(at, piece);
    if (!host) m.used += bytes;
    mark(at, piece, host || m.access > 0);
    return base + red_zone;
}

// Describes a write outside of the allocation; "" if there was none.
std::string damage(uintptr_t at, const Piece& piece) {
#ifndef LNS_ASAN
    const auto* first = reinterpret_cast<const unsigned char*>(at);
    const size_t behind = (piece.bytes + red_zone - 1) / red_zone * red_zone + red_zone;
    const char* kind = piece.host ? "host" : "device";
    for (size_t i = 1; i <= red_zone; i++)
        if (first[-int64_t(i)] != red_zone_byte)
            return cat("something was written ", i, " bytes before the ", piece.bytes, " bytes of ",
                       kind, " memory at ", static_cast<const void*>(first));
    for (size_t i = piece.bytes; i < behind; i++)
        if (first[i] != red_zone_byte)
            return cat("something was written ", i - piece.bytes, " bytes after the end of the ",
                       piece.bytes, " bytes of ", kind, " memory at ",
                       static_cast<const void*>(first));
#else
    (void)at, (void)piece;
#endif
    return "";
}

// Prints instead of throwing: memory may be freed by a destructor.
void release(void* pointer) {
    Memory& m = memory();
    const std::lock_guard lock(m.mutex);
    auto found = m.pieces.find(uintptr_t(pointer));
    const std::string damaged = damage(found->first, found->second);
    if (!damaged.empty()) {
        std::fprintf(stderr, "simulated GPU, on freeing: %s\n", damaged.c_str());
        std::abort();
    }
    if (!found->second.host) m.used -= found->second.bytes;
    auto* base = static_cast<unsigned char*>(pointer) - red_zone;
    ASAN_UNPOISON_MEMORY_REGION(base, found->second.bytes + 3 * red_zone);
    m.pieces.erase(found);
    std::free(base);
}

} // namespace

namespace lns::sim {

int architecture() {
    const char* value = std::getenv("LNS_SIM_ARCH");
    return value && *value ? std::atoi(value) : 80;
}

bool on_device(const void* at, size_t bytes) {
    const std::lock_guard lock(memory().mutex);
    const auto* piece = piece_at(at);
    return piece && uintptr_t(at) + bytes <= piece->first + piece->second.bytes;
}

void check_device_range(const std::string& what, const void* at, size_t bytes) {
    const std::lock_guard lock(memory().mutex);
    const auto* piece = piece_at(at);
    if (!piece && bytes) fail(what, ": the address ", at, " is not in the device's memory");
    if (bytes && uintptr_t(at) + bytes > piece->first + piece->second.bytes)
        fail(what, ": ", bytes, " bytes from ", at, " exceed the end of the ", piece->second.bytes,
             " bytes of device memory there, of which it has ",
             piece->first + piece->second.bytes - uintptr_t(at));
}

Allocated allocated() {
    const std::lock_guard lock(memory().mutex);
    Allocated out;
    for (const auto& [at, piece] : memory().pieces)
        if (!piece.host) out.bytes += piece.bytes, out.pieces++;
    return out;
}

namespace {
std::atomic<uint64_t> copied_to_host = 0;
}
uint64_t bytes_to_host() { return copied_to_host; }

} // namespace lns::sim

// ---------------------------------------------------------------------------------------------
// Streams, events and graphs

namespace {

using lns::sim::Work;

// Of one recording of an event.
struct Record {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr; // that captured it
    bool done = false;
    Clock::time_point time = {};
};

} // namespace

struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::shared_ptr<const std::vector<Work>> work;
};
struct CUstream_st {
    unsigned flags = 0;
    std::deque<Work> queue; // of late streams
    cudaGraph_t capture = nullptr;
    bool began = false;       // the capture, rather than joined it
    bool unjoined = false;    // work has been captured since the beginning waited for this stream
    bool invalidated = false; // the capture, by a forbidden call
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};
struct CUevent_st {
    unsigned flags = 0;
    std::shared_ptr<Record> record;
};

namespace {

std::vector<cudaStream_t>& streams() {
    static auto* all = new std::vector<cudaStream_t>{new CUstream_st}; // the first: the default one
    return *all;
}
cudaStream_t stream_of(cudaStream_t handle) { return handle ? handle : streams()[0]; }
bool known(cudaStream_t handle) {
    return !handle || std::find(streams().begin(), streams().end(), handle) != streams().end();
}

// An error of asynchronous work, returned by the next call.
std::exception_ptr kept_error;

void run_work(const Work& work) {
    const DeviceAccess access;
    work.run();
#ifndef LNS_ASAN
    for (const auto& [at, piece] : memory().pieces) {
        const std::string damaged = damage(at, piece);
        if (damaged.empty()) continue;
        std::memset(reinterpret_cast<void*>(at - red_zone), red_zone_byte, red_zone);
        std::memset(reinterpret_cast<void*>(at + piece.bytes), red_zone_byte, red_zone);
        fail(work.kernel ? "kernel " + lns::sim::kernel_name(work.kernel) : work.what, ": ",
             damaged);
    }
#endif
}

void run_next(cudaStream_t stream) {
    const Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    run_work(work);
}
void drain(cudaStream_t stream) {
    while (!stream->queue.empty()) run_next(stream);
}
void drain_all() {
    for (size_t i = 0; i < streams().size(); i++) drain(streams()[i]);
    if (kept_error) std::rethrow_exception(std::exchange(kept_error, nullptr));
}
// The default stream waits for all others but non-blocking ones.
void drain_blocking() {
    for (cudaStream_t stream : std::vector(streams()))
        if (!(stream->flags & cudaStreamNonBlocking)) drain(stream);
}
// For calls that must not throw.
void drain_all_quietly() {
    try {
        drain_all();
    } catch (...) {
        kept_error = std::current_exception();
        for (cudaStream_t stream : streams()) stream->queue.clear();
    }
}

// Calls that wait or allocate invalidate a capture.
bool spoils_capture() {
    bool spoiled = false;
    for (cudaStream_t stream : streams())
        if (stream->capture && stream->mode != cudaStreamCaptureModeRelaxed)
            stream->invalidated = spoiled = true;
    return spoiled;
}

bool& late() {
    static const char* value = std::getenv("LNS_SIM_STREAMS");
    static bool is_late = value && std::string(value) == "late";
    return is_late;
}

} // namespace

namespace lns::sim {

bool late_streams() { return late(); }
void set_late_streams(bool is_late) {
    drain_all();
    late() = is_late;
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
    if (!known(handle)) return result(cudaErrorInvalidResourceHandle);
    cudaStream_t stream = stream_of(handle);
    if (stream->capture) {
        if (stream->invalidated) return result(cudaErrorStreamCaptureInvalidated);
        stream->capture->work.push_back(std::move(work));
        stream->unjoined = true;
        return cudaSuccess;
    }
    if (!handle) {
        for (cudaStream_t other : streams())
            if (other->capture && !(other->flags & cudaStreamNonBlocking)) {
                other->invalidated = true;
                return result(cudaErrorStreamCaptureImplicit);
            }
        drain_blocking();
    } else if (!(stream->flags & cudaStreamNonBlocking)) {
        drain(streams()[0]); // which such a stream waits for
    }
    if (late())
        stream->queue.push_back(std::move(work));
    else
        run_work(work);
    return cudaSuccess;
}

void check_argument(const void* kernel, int index, const void* pointer) {
    if (!pointer || on_device(pointer, 0)) return;
    fail("kernel ", kernel_name(kernel), ": argument ", index, " (counted from 0) points to ",
         pointer, ", which is not in the device's memory");
}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                          std::function<void()> thread);

} // namespace lns::sim

// ---------------------------------------------------------------------------------------------
// Launches

namespace {
std::map<const void*, int>& allowed_shared() {
    static std::map<const void*, int> allowed;
    return allowed;
}
} // namespace

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || size_t(value) > limits().shared_of_block)
            return result(cudaErrorInvalidValue);
        allowed_shared()[kernel] = value;
    }
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared) {
    if (threads < 1 || threads > lns::sim::max_threads) return result(cudaErrorInvalidValue);
    const Limits limit = limits();
    const size_t of_block = shared + 1024; // with what the system reserves
    *blocks = std::min({limit.threads_of_multiprocessor / ((threads + 31) / 32 * 32),
                        int(limit.shared_of_multiprocessor / of_block), 2});
    return cudaSuccess;
}

cudaError_t lns::sim::launch_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                                    std::function<void()> thread) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > max_threads || block.z > 64 || grid.x == 0 || grid.y == 0 ||
        grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
        return result(cudaErrorInvalidConfiguration);
    const auto allowed = allowed_shared().find(kernel);
    if (config.dynamicSmemBytes > 48 * 1024 &&
        (allowed == allowed_shared().end() || config.dynamicSmemBytes > size_t(allowed->second)))
        return result(cudaErrorInvalidValue);
    const Launch launch{kernel, grid, block, config.dynamicSmemBytes, std::move(thread)};
    return enqueue(config.stream, {"", kernel, [launch] { run(launch); }});
}

// ---------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define LNS_SIM_NAME(name)                                                                         \
    case name:                                                                                     \
        return #name
        LNS_SIM_NAME(cudaSuccess);
        LNS_SIM_NAME(cudaErrorInvalidValue);
        LNS_SIM_NAME(cudaErrorMemoryAllocation);
        LNS_SIM_NAME(cudaErrorInvalidConfiguration);
        LNS_SIM_NAME(cudaErrorInvalidPitchValue);
        LNS_SIM_NAME(cudaErrorInvalidDevicePointer);
        LNS_SIM_NAME(cudaErrorInvalidMemcpyDirection);
        LNS_SIM_NAME(cudaErrorInsufficientDriver);
        LNS_SIM_NAME(cudaErrorInvalidDeviceFunction);
        LNS_SIM_NAME(cudaErrorNoDevice);
        LNS_SIM_NAME(cudaErrorInvalidDevice);
        LNS_SIM_NAME(cudaErrorNoKernelImageForDevice);
        LNS_SIM_NAME(cudaErrorECCUncorrectable);
        LNS_SIM_NAME(cudaErrorInvalidResourceHandle);
        LNS_SIM_NAME(cudaErrorIllegalState);
        LNS_SIM_NAME(cudaErrorNotReady);
        LNS_SIM_NAME(cudaErrorIllegalAddress);
        LNS_SIM_NAME(cudaErrorMisalignedAddress);
        LNS_SIM_NAME(cudaErrorLaunchFailure);
        LNS_SIM_NAME(cudaErrorNotSupported);
        LNS_SIM_NAME(cudaErrorStreamCaptureUnsupported);
        LNS_SIM_NAME(cudaErrorStreamCaptureInvalidated);
        LNS_SIM_NAME(cudaErrorStreamCaptureMerge);
        LNS_SIM_NAME(cudaErrorStreamCaptureUnmatched);
        LNS_SIM_NAME(cudaErrorStreamCaptureUnjoined);
        LNS_SIM_NAME(cudaErrorStreamCaptureIsolation);
        LNS_SIM_NAME(cudaErrorStreamCaptureImplicit);
        LNS_SIM_NAME(cudaErrorCapturedEvent);
        LNS_SIM_NAME(cudaErrorStreamCaptureWrongThread);
        LNS_SIM_NAME(cudaErrorGraphExecUpdateFailure);
        LNS_SIM_NAME(cudaErrorUnknown);
#undef LNS_SIM_NAME
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidPitchValue:
        return "invalid pitch argument";
    case cudaErrorInvalidDevicePointer:
        return "invalid device pointer";
    case cudaErrorInvalidMemcpyDirection:
        return "invalid copy direction for memcpy";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
        return "invalid device function";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorECCUncorrectable:
        return "uncorrectable ECC error encountered";
    case cudaErrorInvalidResourceHandle:
        return "invalid resource handle";
    case cudaErrorIllegalState:
        return "the operation cannot be performed in the present state";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorIllegalAddress:
        return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress:
        return "misaligned address";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    case cudaErrorNotSupported:
        return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge:
        return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched:
        return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined:
        return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
        return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
        return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent:
        return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
        return "attempt to terminate a thread-local capture sequence from another thread";
    case cudaErrorGraphExecUpdateFailure:
        return "the graph update was not performed because it included changes which violated "
               "constraints specific to instantiated graph update";
    case cudaErrorUnknown:
        break;
    }
    return "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// ---------------------------------------------------------------------------------------------

namespace {
int device_count() {
    const char* value = std::getenv("LNS_SIM_GPUS");
    return lns::sim::architecture() == 0 ? 0 : value ? std::atoi(value) : 1;
}
int current_device = 0;
} // namespace

cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return *count ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return device_count() ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
    if (!device_count()) return result(cudaErrorNoDevice);
    if (device < 0 || device >= device_count()) return result(cudaErrorInvalidDevice);
    if (memory().used > 0 && device != current_device)
        fail("cudaSetDevice: the simulator's process has memory on GPU ", current_device,
             " already; a process uses only one");
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (!device_count()) return result(cudaErrorNoDevice);
    if (device < 0 || device >= device_count()) return result(cudaErrorInvalidDevice);
    const Limits limit = limits();
    *p = {};
    std::strcpy(p->name, "simulated GPU");
    p->uuid.bytes[0] = char(device + 1);
    p->totalGlobalMem = device_memory();
    p->sharedMemPerBlock = 48 * 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7FFFFFFF, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = lns::sim::architecture() / 10, p->minor = lns::sim::architecture() % 10;
    p->multiProcessorCount = 6; // few, and an uneven divisor
    p->unifiedAddressing = 1, p->concurrentKernels = 1, p->asyncEngineCount = 2;
    p->memoryBusWidth = 5120;
    p->l2CacheSize = 40 << 20;
    p->maxThreadsPerMultiProcessor = limit.threads_of_multiprocessor;
    p->sharedMemPerMultiprocessor = limit.shared_of_multiprocessor;
    p->sharedMemPerBlockOptin = limit.shared_of_block;
    p->maxBlocksPerMultiProcessor = 32;
    p->reservedSharedMemPerBlock = 1024;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = p.maxThreadsPerBlock;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = int(p.sharedMemPerBlock);
        break;
    case cudaDevAttrWarpSize:
        *value = p.warpSize;
        break;
    case cudaDevAttrClockRate:
        *value = 1410000;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        break;
    case cudaDevAttrMemoryClockRate:
        *value = 1215000;
        break;
    case cudaDevAttrGlobalMemoryBusWidth:
        *value = p.memoryBusWidth;
        break;
    case cudaDevAttrL2CacheSize:
        *value = p.l2CacheSize;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = p.maxThreadsPerMultiProcessor;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = int(p.sharedMemPerMultiprocessor);
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = int(p.sharedMemPerBlockOptin);
        break;
    default:
        return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
    if (device < 0 || device >= device_count()) return result(cudaErrorInvalidDevice);
    std::snprintf(id, size_t(length), "0000:%02x:00.0", unsigned(device) & 0xFF);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = lns::sim::architecture() ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = device_memory();
    *free = *total - std::min(*total, memory().used);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
    drain_all();
    return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }

// ---------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = nullptr;
    if (!lns::sim::architecture()) return result(cudaErrorNoDevice);
    if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    if (memory().used + bytes > device_memory()) return result(cudaErrorMemoryAllocation);
    *pointer = allocate(bytes, false);
    return *pointer ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = nullptr;
    if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    *pointer = allocate(bytes, true);
    return *pointer ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes, unsigned flags) {
    return cudaHostAlloc(pointer, bytes, flags);
}
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
    return cudaHostAlloc(pointer, bytes, 0);
}

namespace {
cudaError_t free_piece(void* pointer, bool host) {
    if (!pointer) return cudaSuccess;
    if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
    const auto found = memory().pieces.find(uintptr_t(pointer));
    if (found == memory().pieces.end() || (found->second.host != host && host))
        return result(cudaErrorInvalidValue);
    drain_all_quietly();
    release(pointer);
    return cudaSuccess;
}

bool is_device(const void* at) {
    const auto* piece = piece_at(at);
    return piece && !piece->second.host;
}

// Checks both ends of a copy and says whether it must be done before the call returns.
bool check_copy(const char* name, const void* to, const void* from, size_t bytes,
                cudaMemcpyKind kind) {
    if (bytes == 0) return false;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (piece_at(to) || to_device) lns::sim::check_device_range(cat(name, ", to"), to, bytes);
    if (piece_at(from) || from_device)
        lns::sim::check_device_range(cat(name, ", from"), from, bytes);
    if (kind != cudaMemcpyDefault && !to_device && is_device(to))
        fail(name, ": the destination ", to, " is in the device's memory, not in the host's");
    if (kind != cudaMemcpyDefault && !from_device && is_device(from))
        fail(name, ": the source ", from, " is in the device's memory, not in the host's");
    return !piece_at(to) || !piece_at(from); // pageable memory
}

cudaError_t copy(const char* name, void* to, size_t to_pitch, const void* from, size_t from_pitch,
                 size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
    if (width > to_pitch || width > from_pitch) return result(cudaErrorInvalidPitchValue);
    if (width == 0 || height == 0) return cudaSuccess;
    if (wait && spoils_capture()) return result(cudaErrorStreamCaptureImplicit);
    const size_t to_bytes = (height - 1) * to_pitch + width;
    const size_t from_bytes = (height - 1) * from_pitch + width;
    bool now = check_copy(name, to, from, std::min(to_bytes, from_bytes), kind);
    if (is_device(from) && !is_device(to)) lns::sim::copied_to_host += width * height;
    auto work_from = [=](const void* source) {
        return [=] {
            for (size_t row = 0; row < height; row++)
                std::memmove(static_cast<char*>(to) + row * to_pitch,
                             static_cast<const char*>(source) + row * from_pitch, width);
        };
    };
    // A copy from pageable memory returns when the source has been staged, not when it has arrived.
    if (now && late() && is_device(to) && !stream_of(stream)->capture) {
        std::shared_ptr<char[]> aside(new char[from_bytes]);
        for (size_t row = 0; row < height; row++)
            std::memcpy(aside.get() + row * from_pitch,
                        static_cast<const char*>(from) + row * from_pitch, width);
        return lns::sim::enqueue(
            stream, {name, nullptr, [aside, work = work_from(aside.get())] { work(); }});
    }
    if (const cudaError_t error = lns::sim::enqueue(stream, {name, nullptr, work_from(from)}))
        return error;
    if (stream_of(stream)->capture) now = false;
    if (wait || now) drain(stream_of(stream));
    return cudaSuccess;
}
} // namespace

cudaError_t cudaFree(void* pointer) { return free_piece(pointer, false); }
cudaError_t cudaFreeHost(void* pointer) { return free_piece(pointer, true); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return copy("cudaMemcpy", to, bytes, from, bytes, bytes, 1, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy("cudaMemcpyAsync", to, bytes, from, bytes, bytes, 1, kind, stream, false);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
    return copy("cudaMemcpy2D", to, to_pitch, from, from_pitch, width, height, kind, nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
    return copy("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, height, kind, stream,
                false);
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
    lns::sim::check_device_range("cudaMemsetAsync", at, bytes);
    return lns::sim::enqueue(stream, {"cudaMemsetAsync", nullptr, [=] {
                                          if (bytes) std::memset(at, value, bytes);
                                      }});
}
cudaError_t cudaMemset(void* at, int value, size_t bytes) {
    if (spoils_capture()) return result(cudaErrorStreamCaptureImplicit);
    return cudaMemsetAsync(at, value, bytes, nullptr);
}

// ---------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    if (!lns::sim::architecture()) return result(cudaErrorNoDevice);
    *stream = new CUstream_st;
    (*stream)->flags = flags;
    streams().push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream || !known(stream)) return result(cudaErrorInvalidResourceHandle);
    drain_all_quietly();
    std::erase(streams(), stream);
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    if (!known(handle)) return result(cudaErrorInvalidResourceHandle);
    cudaStream_t stream = stream_of(handle);
    if (stream->capture) {
        stream->invalidated = true;
        return result(cudaErrorStreamCaptureUnsupported);
    }
    if (!handle) drain_blocking();
    drain(stream);
    drain(streams()[0]); // in the meantime
    if (kept_error) std::rethrow_exception(std::exchange(kept_error, nullptr));
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    if (!known(handle)) return result(cudaErrorInvalidResourceHandle);
    cudaStream_t stream = stream_of(handle);
    const std::shared_ptr<Record> record = event->record;
    if (!record) return cudaSuccess; // never recorded: nothing to wait for
    if (record->graph) {
        if (stream->capture && stream->capture != record->graph)
            return result(cudaErrorStreamCaptureMerge);
        if (!stream->capture) { // joins
            stream->capture = record->graph, stream->began = false, stream->unjoined = false;
            stream->mode = record->stream->mode;
        } else {
            record->stream->unjoined = false;
        }
        return cudaSuccess;
    }
    if (stream->capture) return result(cudaErrorStreamCaptureIsolation);
    return lns::sim::enqueue(handle, {"cudaStreamWaitEvent", nullptr, [record] {
                                          while (!record->done) run_next(record->stream);
                                          drain(streams()[0]); // in the meantime
                                      }});
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = new CUevent_st;
    (*event)->flags = flags;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    if (!known(handle)) return result(cudaErrorInvalidResourceHandle);
    cudaStream_t stream = stream_of(handle);
    auto record = event->record = std::make_shared<Record>();
    record->stream = stream, record->graph = stream->capture;
    if (record->graph) return cudaSuccess;
    return lns::sim::enqueue(handle, {"cudaEventRecord", nullptr, [record] {
                                          record->done = true, record->time = Clock::now();
                                      }});
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (!event->record) return cudaSuccess;
    if (event->record->graph) return result(cudaErrorCapturedEvent);
    while (!event->record->done) run_next(event->record->stream);
    drain(streams()[0]); // in the meantime
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->record || !to->record || ((from->flags | to->flags) & cudaEventDisableTiming))
        return result(cudaErrorInvalidResourceHandle);
    if (from->record->graph || to->record->graph) return result(cudaErrorCapturedEvent);
    if (!from->record->done || !to->record->done) return result(cudaErrorNotReady);
    const std::chrono::duration<float, std::milli> elapsed = to->record->time - from->record->time;
    *milliseconds = elapsed.count();
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
    return lns::sim::enqueue(stream, {"cudaLaunchHostFunc", nullptr, [=] { function(argument); }});
}

// ---------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (!stream) return result(cudaErrorStreamCaptureUnsupported);
    if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
    if (stream->capture) return result(cudaErrorIllegalState);
    stream->capture = new CUgraph_st;
    stream->began = true, stream->unjoined = stream->invalidated = false, stream->mode = mode;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!stream || !known(stream)) return result(cudaErrorInvalidResourceHandle);
    if (!stream->capture) return result(cudaErrorIllegalState);
    if (!stream->began) return result(cudaErrorStreamCaptureUnmatched);
    bool unjoined = false, invalidated = false;
    cudaGraph_t captured = stream->capture;
    for (cudaStream_t each : streams())
        if (each->capture == captured) {
            unjoined |= each != stream && each->unjoined;
            invalidated |= each->invalidated;
            each->capture = nullptr, each->invalidated = false;
        }
    if (unjoined || invalidated) {
        delete captured;
        return result(invalidated ? cudaErrorStreamCaptureInvalidated
                                  : cudaErrorStreamCaptureUnjoined);
    }
    *graph = captured;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    if (!known(handle)) return result(cudaErrorInvalidResourceHandle);
    cudaStream_t stream = stream_of(handle);
    *status = !stream->capture      ? cudaStreamCaptureStatusNone
              : stream->invalidated ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
    *executable = new CUgraphExec_st{std::make_shared<const std::vector<Work>>(graph->work)};
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    return lns::sim::enqueue(stream, {"cudaGraphLaunch", nullptr, [work = executable->work] {
                                          for (const Work& each : *work) run_work(each);
                                      }});
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    if (!nodes) *count = graph->work.size();
    return nodes ? result(cudaErrorNotSupported) : cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

namespace lns {

const SimulatedGpu* simulated_gpu() {
    static const SimulatedGpu gpu = {
        [](const std::function<void()>& body) { sim::in_every_order(body); }, sim::set_late_streams,
        sim::bytes_to_host};
    return &gpu;
}

} // namespace lns
