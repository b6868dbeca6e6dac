// The simulated GPU computes what a GPU would, and detects faults that a GPU hides. Each fault has
// its own kernel.
#include "gpt/cuda/cuda.h"

#include <cublasLt.h>
#include <nccl.h>

#include "dev/sim/runtime.h"
#include "dev/sim/sim.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define LNS_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LNS_ASAN
#endif
#endif

namespace lns::cuda {
namespace {

using bf16 = __nv_bfloat16;
const unsigned all_lanes = 0xFFFFFFFFu;
const cudaStream_t no_stream = nullptr;

template <class T> struct OnDevice {
    T* data = nullptr;
    int64_t size = 0;

    explicit OnDevice(int64_t n) : size(n) { CUDA(cudaMalloc(&data, size_t(n) * sizeof(T))); }
    explicit OnDevice(const std::vector<T>& x) : OnDevice(int64_t(x.size())) {
        CUDA(cudaMemcpy(data, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    OnDevice(const OnDevice&) = delete;
    ~OnDevice() { cudaFree(data); }
    operator T*() const { return data; }
    std::vector<T> values() const {
        std::vector<T> x(static_cast<size_t>(size));
        CUDA(cudaMemcpy(x.data(), data, x.size() * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};

// The message of f's exception, "" if there is none.
template <class F> std::string error_of(F f) {
    try {
        f();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

testing::AssertionResult has(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        if (text.find(part) == std::string::npos)
            return testing::AssertionFailure() << "no \"" << part << "\" in \"" << text << "\"";
    return testing::AssertionSuccess();
}

struct Variable {
    const char* name;
    Variable(const char* n, const char* value) : name(n) { setenv(n, value, 1); }
    ~Variable() { unsetenv(name); }
};

// ---------------------------------------------------------------------------------------------
// Computation

__global__ static void indices_kernel(int* out) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] += 1000 * block + thread;
}

TEST(Simulator, every_thread_of_every_block_runs_once) {
    const OnDevice<int> out(std::vector<int>(24 * 30, 0));
    sim::in_every_order([&] {
        CUDA(cudaMemset(out, 0, out.size * sizeof(int)));
        launch(indices_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, no_stream, out.data);
        const std::vector<int> found = out.values();
        for (int block = 0; block < 24; block++)
            for (int thread = 0; thread < 30; thread++)
                ASSERT_EQ(found[block * 30 + thread], 1000 * block + thread);
    });
}

__global__ static void exchanges_kernel(int* out) {
    const int lane = threadIdx.x;
    int* o = out + lane;
    o[0 * 32] = __shfl_sync(all_lanes, 100 + lane, 5);
    o[1 * 32] = __shfl_sync(all_lanes, 100 + lane, lane + 1, 8);
    o[2 * 32] = __shfl_xor_sync(all_lanes, 100 + lane, 3);
    o[3 * 32] = __shfl_up_sync(all_lanes, 100 + lane, 2);
    o[4 * 32] = __shfl_down_sync(all_lanes, 100 + lane, 2, 16);
    o[5 * 32] = int(__ballot_sync(all_lanes, lane % 3 == 0));
    o[6 * 32] = __any_sync(all_lanes, lane == 7) + 2 * __all_sync(all_lanes, lane >= 0) +
                4 * __any_sync(all_lanes, lane > 40) + 8 * __all_sync(all_lanes, lane < 31);
    o[7 * 32] = __reduce_add_sync(all_lanes, lane);
    double wide = lane / 2.0;
    for (int offset = 16; offset > 0; offset /= 2) wide += __shfl_xor_sync(all_lanes, wide, offset);
    o[8 * 32] = int(wide);
    if (lane < 16)
        o[9 * 32] = __shfl_xor_sync(0x0000FFFFu, lane, 1);
    else
        o[9 * 32] = __shfl_xor_sync(0xFFFF0000u, -lane, 1);
}

TEST(Simulator, lanes_exchange_values) {
    sim::in_every_order([] {
        const OnDevice<int> out(10 * 32);
        launch(exchanges_kernel, dim3(1), dim3(32), 0, no_stream, out.data);
        const std::vector<int> o = out.values();
        for (int lane = 0; lane < 32; lane++) {
            EXPECT_EQ(o[0 * 32 + lane], 105);
            EXPECT_EQ(o[1 * 32 + lane], 100 + lane / 8 * 8 + (lane + 1) % 8);
            EXPECT_EQ(o[2 * 32 + lane], 100 + (lane ^ 3));
            EXPECT_EQ(o[3 * 32 + lane], 100 + (lane < 2 ? lane : lane - 2));
            EXPECT_EQ(o[4 * 32 + lane], 100 + (lane % 16 < 14 ? lane + 2 : lane));
            EXPECT_EQ(unsigned(o[5 * 32 + lane]), 0x49249249u);
            EXPECT_EQ(o[6 * 32 + lane], 3);
            EXPECT_EQ(o[7 * 32 + lane], 31 * 16);
            EXPECT_EQ(o[8 * 32 + lane], 31 * 8);
            EXPECT_EQ(o[9 * 32 + lane], lane < 16 ? lane ^ 1 : -(lane ^ 1));
        }
    });
}

__global__ static void block_sum_kernel(float* out, const float* in, int n) {
    SharedMemory shared;
    float* sums = shared.take<float>(32);
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(all_lanes, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int i = 0; i < int(blockDim.x) / 32; i++) total += sums[i];
        out[blockIdx.x] = total;
    }
    const int odd = __syncthreads_count(threadIdx.x % 2);
    const int any = __syncthreads_or(threadIdx.x == 3), all = __syncthreads_and(threadIdx.x == 3);
    if (threadIdx.x == 0) out[gridDim.x + blockIdx.x] = float(odd + 10000 * any + 100000 * all);
}

TEST(Simulator, a_block_adds_up) {
    std::vector<float> in(1000);
    std::iota(in.begin(), in.end(), 1.0f);
    const OnDevice<float> x(in), out(2 * 7);
    sim::in_every_order([&] {
        launch(block_sum_kernel, dim3(7), dim3(256), shared_bytes<float>(32), no_stream, out.data,
               x.data, 1000);
        const std::vector<float> found = out.values();
        for (int block = 0; block < 7; block++) {
            EXPECT_EQ(found[block], 500500);
            EXPECT_EQ(found[7 + block], 10128);
        }
    });
}

// a (16, 16), b (16, 8) in shared memory, by ldmatrix and mma.
__global__ static void product_kernel(float* out, const bf16* a, const bf16* b) {
    SharedMemory shared;
    bf16* sa = shared.take<bf16>(256);
    bf16* sb = shared.take<bf16>(128);
    const int lane = threadIdx.x;
    copy_async(sa + 8 * lane, a + 8 * lane);
    copy_async_commit();
    copy_async(sb + 8 * (lane % 16), b + 8 * (lane % 16), lane < 16 || true);
    copy_async_commit();
    copy_async_wait<1>();
    __syncwarp();
    uint32_t fa[4], fb[4];
    ldmatrix(fa, sa + lane % 16 * 16 + lane / 16 * 8);
    copy_async_wait<0>();
    __syncwarp();
    ldmatrix_transposed(fb, sb + lane % 16 * 8);
    float d[4] = {1, 2, 3, 4};
    mma(d, fa, fb[0], fb[1]);
    const int row = lane / 4, column = lane % 4 * 2;
    out[row * 8 + column] = d[0], out[row * 8 + column + 1] = d[1];
    out[(row + 8) * 8 + column] = d[2], out[(row + 8) * 8 + column + 1] = d[3];
}

TEST(Simulator, tensor_cores_multiply) {
    std::mt19937 random(1);
    std::vector<bf16> a(256), b(128);
    for (bf16& x : a) x = bf16(int(random() % 17) - 8);
    for (bf16& x : b) x = bf16(int(random() % 17) - 8);
    const OnDevice<bf16> da(a), db(b);
    sim::in_every_order([&] {
        const OnDevice<float> out(128);
        launch(product_kernel, dim3(1), dim3(32), shared_bytes<bf16>(256) + shared_bytes<bf16>(128),
               no_stream, out.data, da.data, db.data);
        const std::vector<float> found = out.values();
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                float sum = 1.0f + j % 2 + i / 8 * 2;
                for (int k = 0; k < 16; k++) sum += float(a[i * 16 + k]) * float(b[k * 8 + j]);
                EXPECT_EQ(found[i * 8 + j], sum) << i << ", " << j;
            }
    });
}

TEST(Simulator, bf16_rounds_to_nearest_even) {
    auto bits = [](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); };
    EXPECT_EQ(bits(1.0f), 0x3F80);
    EXPECT_EQ(bits(1.0f + 0x1p-8f), 0x3F80);           // a tie: the even one
    EXPECT_EQ(bits(1.0f + 0x1p-7f + 0x1p-8f), 0x3F82); // a tie: the even one
    EXPECT_EQ(bits(1.0f + 0x1p-8f + 0x1p-20f), 0x3F81);
    EXPECT_EQ(bits(std::numeric_limits<float>::max()), 0x7F80);
    EXPECT_EQ(bits(-INFINITY), 0xFF80);
    EXPECT_EQ(bits(NAN), 0x7FFF);
    EXPECT_EQ(pack_bf16(1.0f, -2.0f), 0xC0003F80u);
    EXPECT_EQ(fast_exp2(-150.0f), 0.0f);
    EXPECT_EQ(fast_exp2(3.0f), 8.0f);
}

__global__ static void count_kernel(unsigned* counts, float* most) {
    atomicAdd(&counts[threadIdx.x % 4], 1u);
    atomicMax(reinterpret_cast<int*>(most), __float_as_int(float(blockIdx.x)));
}

TEST(Simulator, atomics_count) {
    const OnDevice<unsigned> counts(std::vector<unsigned>(4, 0));
    const OnDevice<float> most(std::vector<float>(1, 0.0f));
    launch(count_kernel, dim3(50), dim3(128), 0, no_stream, counts.data, most.data);
    EXPECT_EQ(counts.values(), std::vector<unsigned>(4, 50 * 32));
    EXPECT_EQ(most.values()[0], 49);
}

// ---------------------------------------------------------------------------------------------
// Deadlocks

__global__ static void at_a_shuffle_kernel(float* out) {
    if (threadIdx.x != 3)
        __syncthreads();
    else
        out[0] = __shfl_sync(all_lanes, 1.0f, 0);
}
__global__ static void two_places_kernel(float*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ static void finished_kernel(float*) {
    if (threadIdx.x >= 60) return;
    __syncthreads();
}
__global__ static void half_warp_kernel(float*) {
    if (threadIdx.x < 16) __syncwarp();
}
__global__ static void half_product_kernel(float* out) {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x % 32 != 9) mma(d, a, 0, 0);
    out[threadIdx.x] = d[0];
}
__global__ static void foreign_mask_kernel(float*) {
    if (threadIdx.x == 20) __syncwarp(0x0000FFFFu);
}
__global__ static void absent_source_kernel(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFFu, 1.0f, 20);
}
__global__ static void outside_loop_kernel(float* out) {
    for (int i = 0; i <= int(threadIdx.x) / 40; i++) {
        __syncthreads();
        out[threadIdx.x] = 0;
    }
}

TEST(Simulator, says_who_waits_in_vain_and_where) {
    const OnDevice<float> out(64);
    auto error = [&](auto kernel) {
        return error_of([&] { launch(kernel, dim3(1), dim3(64), 0, no_stream, out.data); });
    };
    sim::in_every_order([&] {
        EXPECT_TRUE(has(error(at_a_shuffle_kernel),
                        {"kernel at_a_shuffle_kernel, block (0, 0, 0): ",
                         "no thread can continue: 63 threads, the first (0, 0, 0), wait at "
                         "__syncthreads (",
                         "sim_test.cpp:",
                         "thread (3, 0, 0) waits at __shfl_sync of lanes "
                         "0xffffffff ("}));
        EXPECT_TRUE(has(error(two_places_kernel),
                        {"32 threads, the first (0, 0, 0), wait at __syncthreads (",
                         "32 threads, the first (32, 0, 0), wait at __syncthreads ("}));
        EXPECT_TRUE(
            has(error(finished_kernel), {"60 threads, the first (0, 0, 0), wait at __syncthreads (",
                                         "4 threads, the first (60, 0, 0), have finished"}));
        EXPECT_TRUE(
            has(error(half_warp_kernel), {"16 threads, the first (0, 0, 0), wait at __syncwarp",
                                          "48 threads, the first (16, 0, 0), have finished"}));
        EXPECT_TRUE(has(error(half_product_kernel),
                        {"62 threads, the first (0, 0, 0), wait at mma of lanes 0xffffffff",
                         "2 threads, the first (9, 0, 0), have finished"}));
        EXPECT_TRUE(has(error(foreign_mask_kernel),
                        {"thread (20, 0, 0): ", "not among those of its own mask"}));
        EXPECT_TRUE(has(error(absent_source_kernel), {"a shuffle reads lane 20, which is not in"}));
        EXPECT_TRUE(has(error(outside_loop_kernel),
                        {"24 threads, the first (40, 0, 0), wait at __syncthreads",
                         "40 threads, the first (0, 0, 0), have finished"}));
    });
    // And works again afterwards.
    launch(indices_kernel, dim3(1), dim3(32), 0, no_stream, reinterpret_cast<int*>(out.data));
}

__global__ static void two_blocks_fail_kernel(float*) {
    if (blockIdx.x >= 5 && threadIdx.x == 0) __syncthreads();
}

TEST(Simulator, tells_of_one_block_if_many_fail) {
    const OnDevice<float> out(64);
    EXPECT_TRUE(has(error_of([&] {
                        launch(two_blocks_fail_kernel, dim3(200), dim3(64), 0, no_stream, out.data);
                    }),
                    {"two_blocks_fail_kernel, block ("}));
}

// ---------------------------------------------------------------------------------------------
// Waiting for conditions, warpgroups and named barriers, the basis of newer instructions

struct Flags {
    bool ready = false;
    int sum = 0;
};

__global__ static void producer_kernel(int* out) {
    Flags& flags = sim::block_state<Flags>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 10; i++) __nanosleep(20);
        flags.ready = true;
        sim::condition_met();
    }
    sim::wait_until("the producer", sim::here(), [&] { return flags.ready; });
    int mine = int(threadIdx.x);
    sim::meet_warpgroup("a sum", sim::here(), &mine, [](void** operands) {
        int sum = 0;
        for (int i = 0; i < 128; i++) sum += *static_cast<int*>(operands[i]);
        for (int i = 0; i < 128; i++) *static_cast<int*>(operands[i]) = sum;
    });
    if (threadIdx.x < 128)
        sim::arrive("bar.arrive", sim::here(), 1, 256);
    else
        sim::barrier("bar.sync", sim::here(), 1, 256);
    out[threadIdx.x] = mine;
}
__global__ static void never_ready_kernel(int*) {
    if (threadIdx.x == 5) sim::wait_until("a barrier's phase", sim::here(), [] { return false; });
    __syncthreads();
}

TEST(Simulator, waits_for_conditions_and_warpgroups) {
    const OnDevice<int> out(256);
    sim::in_every_order([&] {
        launch(producer_kernel, dim3(3), dim3(256), 0, no_stream, out.data);
        const std::vector<int> found = out.values();
        for (int i = 0; i < 256; i++)
            EXPECT_EQ(found[i], i < 128 ? 127 * 64 : 127 * 64 + 128 * 128);
        EXPECT_TRUE(
            has(error_of(
                    [&] { launch(never_ready_kernel, dim3(1), dim3(64), 0, no_stream, out.data); }),
                {"thread (5, 0, 0) waits at a barrier's phase (", "63 threads", "__syncthreads"}));
    });
}

// ---------------------------------------------------------------------------------------------
// Races show when the order changes, and data that has not arrived is NaN

__global__ static void no_barrier_kernel(float* out) {
    SharedMemory shared;
    float* x = shared.take<float>(64);
    x[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] = x[63 - threadIdx.x]; // __syncthreads() is missing
}
__global__ static void no_syncwarp_kernel(float* out) {
    SharedMemory shared;
    float* x = shared.take<float>(64);
    x[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] = x[threadIdx.x ^ 1]; // __syncwarp() is missing
}
__global__ static void overwritten_kernel(float* out) {
    SharedMemory shared;
    float* x = shared.take<float>(64);
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        x[threadIdx.x] = float(threadIdx.x + i);
        __syncthreads();
        sum += x[63 - threadIdx.x];
        // A second __syncthreads() is missing: the next round overwrites what others still read.
    }
    out[threadIdx.x] = sum;
}
__global__ static void order_of_blocks_kernel(float* out) {
    out[0] = float(blockIdx.x); // the last one wins
}
__global__ static void order_of_sums_kernel(float* out) {
    atomicAdd(out, blockIdx.x == 0 ? 1e8f : blockIdx.x == 1 ? -1e8f : 1.0f);
}

TEST(Simulator, an_order_shows_each_race) {
    auto results = [](auto kernel, int blocks) {
        std::vector<std::vector<float>> found;
        sim::in_every_order([&] {
            const OnDevice<float> out(std::vector<float>(64, 0.0f));
            launch(kernel, dim3(blocks), dim3(64), shared_bytes<float>(64), no_stream, out.data);
            found.push_back(out.values());
        });
        bool same = true;
        for (const auto& each : found)
            same = same && !std::memcmp(each.data(), found[0].data(), 64 * sizeof(float));
        return same;
    };
    EXPECT_FALSE(results(no_barrier_kernel, 1));
    EXPECT_FALSE(results(no_syncwarp_kernel, 1));
    EXPECT_FALSE(results(overwritten_kernel, 1));
    EXPECT_FALSE(results(order_of_blocks_kernel, 5));
    EXPECT_FALSE(results(order_of_sums_kernel, 5));
}

__global__ static void no_wait_kernel(float* out, const float* in, bool waits) {
    SharedMemory shared;
    float* x = shared.take<float>(128);
    copy_async(x + 4 * threadIdx.x, in + 4 * threadIdx.x);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    out[threadIdx.x] = x[4 * threadIdx.x];
}
__global__ static void zeros_kernel(float* out) {
    SharedMemory shared;
    float* x = shared.take<float>(128);
    copy_async(x + 4 * threadIdx.x, nullptr, false);
    copy_async_commit();
    copy_async_wait<0>();
    out[threadIdx.x] = x[4 * threadIdx.x];
}
__global__ static void two_groups_kernel(float* out, const float* in) {
    SharedMemory shared;
    float* x = shared.take<float>(256);
    copy_async(x + 4 * threadIdx.x, in + 4 * threadIdx.x);
    copy_async_commit();
    copy_async(x + 128 + 4 * threadIdx.x, in + 4 * threadIdx.x);
    copy_async_commit();
    copy_async_wait<1>();
    out[threadIdx.x] = x[4 * threadIdx.x];            // has arrived
    out[32 + threadIdx.x] = x[128 + 4 * threadIdx.x]; // has not
}

TEST(Simulator, copies_arrive_when_they_are_waited_for) {
    std::vector<float> in(128);
    std::iota(in.begin(), in.end(), 0.0f);
    const OnDevice<float> x(in), out(64);
    const size_t shared = shared_bytes<float>(256);
    launch(no_wait_kernel, dim3(1), dim3(32), shared, no_stream, out.data, x.data, true);
    for (int i = 0; i < 32; i++) EXPECT_EQ(out.values()[i], 4 * i);
    launch(no_wait_kernel, dim3(1), dim3(32), shared, no_stream, out.data, x.data, false);
    for (int i = 0; i < 32; i++) EXPECT_TRUE(std::isnan(out.values()[i]));
    launch(zeros_kernel, dim3(1), dim3(32), shared, no_stream, out.data);
    for (int i = 0; i < 32; i++) EXPECT_EQ(out.values()[i], 0);
    launch(two_groups_kernel, dim3(1), dim3(32), shared, no_stream, out.data, x.data);
    for (int i = 0; i < 32; i++) {
        EXPECT_EQ(out.values()[i], 4 * i);
        EXPECT_TRUE(std::isnan(out.values()[32 + i]));
    }
}

__global__ static void reads_fresh_kernel(float* out) {
    SharedMemory shared;
    out[threadIdx.x] = shared.take<float>(64)[threadIdx.x];
}

TEST(Simulator, fresh_memory_is_not_a_number) {
    const OnDevice<float> out(64);
    for (float x : out.values()) EXPECT_TRUE(std::isnan(x));
    for (int i = 0; i < 2; i++) {
        CUDA(cudaMemset(out, 0, 64 * sizeof(float)));
        launch(reads_fresh_kernel, dim3(1), dim3(64), shared_bytes<float>(64), no_stream, out.data);
        for (float x : out.values()) EXPECT_TRUE(std::isnan(x));
    }
    void* pinned = nullptr;
    CUDA(cudaMallocHost(&pinned, 8));
    EXPECT_EQ(*static_cast<uint64_t*>(pinned), ~uint64_t(0));
    CUDA(cudaFreeHost(pinned));
    EXPECT_TRUE(std::isnan(float(__ushort_as_bfloat16(0xFFFF))));
}

// ---------------------------------------------------------------------------------------------
// Out of bounds, and misaligned

__global__ static void writes_at_kernel(float* out, int64_t i) { out[i] = 1; }
__global__ static void reads_at_kernel(float* out, int64_t i) { out[0] = out[i]; }
__global__ static void shared_at_kernel(float* out, int i) {
    SharedMemory shared;
    float* a = shared.take<float>(6);
    float* b = shared.take<float>(8);
    b[0] = 5;
    volatile float* at = a + i;
    *at = 1;
    out[0] = b[0];
}

TEST(Simulator, finds_writes_beyond_the_end) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const OnDevice<float> out(10);
    auto writes_at = [&](int64_t i) {
        launch(writes_at_kernel, dim3(1), dim3(1), 0, no_stream, out.data, i);
    };
    auto shared_at = [&](int i) {
        const size_t shared = shared_bytes<float>(6) + shared_bytes<float>(8);
        launch(shared_at_kernel, dim3(1), dim3(1), shared, no_stream, out.data, i);
    };
    writes_at(9), shared_at(5);
#ifdef LNS_ASAN
    EXPECT_DEATH(writes_at(10), "use-after-poison.*writes_at_kernel|writes_at_kernel");
    EXPECT_DEATH(writes_at(-1), "use-after-poison");
    EXPECT_DEATH(launch(reads_at_kernel, dim3(1), dim3(1), 0, no_stream, out.data, int64_t(10)),
                 "use-after-poison");
    EXPECT_DEATH(shared_at(6), "use-after-poison");
    EXPECT_DEATH(shared_at(-1), "use-after-poison");
    EXPECT_DEATH(out.data[0] = 1, "use-after-poison"); // the host touches the device's memory
#else
    EXPECT_TRUE(has(error_of([&] { writes_at(10); }),
                    {"writes_at_kernel: something was written 0 bytes after the end of the 40 "
                     "bytes of device memory"}));
    EXPECT_TRUE(has(error_of([&] { writes_at(-1); }), {"writes_at_kernel: something was written 1 "
                                                       "bytes before the 40 bytes of device"}));
    EXPECT_TRUE(has(error_of([&] { shared_at(6); }),
                    {"shared_at_kernel, block (0, 0, 0): something was written 0 bytes after the "
                     "end of array 0 of shared memory (24 bytes)"}));
    (void)reads_at_kernel;
    float* pinned = nullptr;
    CUDA(cudaMallocHost(&pinned, 8));
    EXPECT_DEATH(
        {
            volatile float* at = pinned + 2;
            *at = 1;
            cudaFreeHost(pinned);
        },
        "on freeing: something was written 0 bytes after the end of the 8 bytes of host memory");
    cudaFreeHost(pinned);
#endif
}

__global__ static void misaligned_kernel(float* out) {
    *reinterpret_cast<float4*>(out + threadIdx.x) = make_float4(1, 2, 3, 4);
}
__global__ static void misaligned_copy_kernel(float* out) {
    SharedMemory shared;
    copy_async(shared.take<float>(8), out + 1);
}
__global__ static void misaligned_matrix_kernel(float*) {
    SharedMemory shared;
    uint32_t out[4];
    ldmatrix(out, shared.take<float>(64) + threadIdx.x);
}

TEST(Simulator, finds_what_is_not_aligned) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const OnDevice<float> out(64);
    EXPECT_DEATH(launch(misaligned_kernel, dim3(1), dim3(2), 0, no_stream, out.data),
                 "misaligned address .* which requires 16 byte alignment");
    auto error = [&](auto kernel) {
        return error_of([&] {
            launch(kernel, dim3(1), dim3(32), shared_bytes<float>(64), no_stream, out.data);
        });
    };
    EXPECT_TRUE(has(error(misaligned_copy_kernel), {"cp.async from ", "not aligned to 16 bytes"}));
    EXPECT_TRUE(has(error(misaligned_matrix_kernel), {"ldmatrix: ", "not aligned to 16 bytes"}));
}

__global__ static void two_arrays_kernel(float*, bool differs) {
    SharedMemory shared;
    shared.take<float>(differs && threadIdx.x == 7 ? 16 : 8);
    shared.take<float>(8);
}

TEST(Simulator, shared_memory_is_what_was_launched) {
    const OnDevice<float> out(1);
    auto error = [&](size_t shared, bool differs) {
        return error_of([&] {
            launch(two_arrays_kernel, dim3(1), dim3(32), shared, no_stream, out.data, differs);
        });
    };
    EXPECT_EQ(error(64, false), "");
    EXPECT_TRUE(has(error(60, false), {"array 1 of shared memory, 32 bytes behind 32, does not fit "
                                       "in the 60 bytes of the launch"}));
    EXPECT_TRUE(has(error(256, true),
                    {"thread (7, 0, 0): array 0 of shared memory has 64 bytes in this thread and "
                     "32 in another"}));
}

// ---------------------------------------------------------------------------------------------
// Launches, copies and memory that CUDA would refuse

__global__ static void empty_kernel(const float*) {}
template <int> __global__ void named_kernel(const float*) {}

TEST(Simulator, refuses_what_no_GPU_can_run) {
    auto error = [](dim3 grid, dim3 block, size_t shared) {
        return error_of([&] {
            cudaLaunchConfig_t config = {};
            config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
            CUDA(cudaLaunchKernelEx(&config, empty_kernel, static_cast<const float*>(nullptr)));
        });
    };
    EXPECT_EQ(error(dim3(1), dim3(1024), 48 * 1024), "");
    EXPECT_TRUE(has(error(dim3(1), dim3(1025), 0), {"cudaErrorInvalidConfiguration"}));
    EXPECT_TRUE(has(error(dim3(1), dim3(1, 1, 65), 0), {"cudaErrorInvalidConfiguration"}));
    EXPECT_TRUE(has(error(dim3(0), dim3(32), 0), {"cudaErrorInvalidConfiguration"}));
    EXPECT_TRUE(has(error(dim3(1, 65536), dim3(32), 0), {"cudaErrorInvalidConfiguration"}));
    EXPECT_TRUE(has(error(dim3(1), dim3(32), 48 * 1024 + 16), {"cudaErrorInvalidValue"}));
    const float* none = nullptr;
    launch(named_kernel<1>, dim3(1), dim3(32), 163 * 1024, no_stream, none);
    EXPECT_TRUE(has(
        error_of([&] { launch(named_kernel<1>, dim3(1), dim3(32), 164 * 1024, no_stream, none); }),
        {"cudaErrorInvalidValue"}));
    {
        const Variable hopper("LNS_SIM_ARCH", "90");
        launch(named_kernel<1>, dim3(1), dim3(32), 227 * 1024, no_stream, none);
    }
    cudaGetLastError();
    const std::vector<float> host(1);
    EXPECT_TRUE(has(
        error_of([&] { launch(named_kernel<2>, dim3(1), dim3(1), 0, no_stream, host.data()); }),
        {"named_kernel<2>: argument 0 (counted from 0) points to ", "not in the device's memory"}));
}

TEST(Simulator, checks_copies) {
    const OnDevice<float> x(8);
    std::vector<float> host(16);
    EXPECT_TRUE(has(error_of([&] { cudaMemcpy(x, host.data(), 36, cudaMemcpyHostToDevice); }),
                    {"cudaMemcpy, to: 36 bytes from ", "exceed the end of the 32 bytes of device "
                                                       "memory there, of which it has 32"}));
    EXPECT_TRUE(has(error_of([&] { cudaMemcpy(host.data(), x + 4, 20, cudaMemcpyDeviceToHost); }),
                    {"cudaMemcpy, from: 20 bytes from ", "of which it has 16"}));
    EXPECT_TRUE(has(error_of([&] { cudaMemcpy(host.data(), x, 16, cudaMemcpyHostToDevice); }),
                    {"cudaMemcpy, to: the address ", " is not in the device's memory"}));
    EXPECT_TRUE(has(error_of([&] { cudaMemcpy(x, x + 4, 16, cudaMemcpyHostToDevice); }),
                    {"cudaMemcpy: the source ", " is in the device's memory"}));
    EXPECT_TRUE(has(error_of([&] { cudaMemset(x + 1, 0, 32); }), {"cudaMemsetAsync: 32 bytes"}));
}

TEST(Simulator, memory_can_be_short_and_the_GPU_absent) {
    {
        const Variable little("LNS_SIM_MEMORY", "1M");
        size_t free = 0, total = 0;
        CUDA(cudaMemGetInfo(&free, &total));
        EXPECT_EQ(total, size_t(1) << 20);
        void* p = nullptr;
        EXPECT_EQ(cudaMalloc(&p, (1 << 20) + 1), cudaErrorMemoryAllocation);
        EXPECT_EQ(p, nullptr);
        EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
        EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
    const Variable absent("LNS_SIM_ARCH", "0");
    int count = 5;
    EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorNoDevice);
    EXPECT_EQ(count, 0);
    cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------
// Streams and graphs

__global__ static void add_kernel(float* x, float y) { x[0] += y; }
__global__ static void double_kernel(float* x) { x[0] *= 2; }

struct Stream {
    cudaStream_t handle = nullptr;
    explicit Stream(unsigned flags = cudaStreamNonBlocking) {
        CUDA(cudaStreamCreateWithFlags(&handle, flags));
    }
    ~Stream() { cudaStreamDestroy(handle); }
};
struct Event {
    cudaEvent_t handle = nullptr;
    Event() { CUDA(cudaEventCreate(&handle)); }
    ~Event() { cudaEventDestroy(handle); }
};

TEST(Simulator, work_is_done_late) {
    const sim::LateStreams late;
    const Stream a, b;
    const Event event;
    const OnDevice<float> x(std::vector<float>(1, 1.0f));
    float* seen = nullptr;
    CUDA(cudaMallocHost(&seen, sizeof(float)));
    *seen = 0;
    launch(add_kernel, dim3(1), dim3(1), 0, a.handle, x.data, 2.0f);
    CUDA(cudaMemcpyAsync(seen, x, sizeof(float), cudaMemcpyDeviceToHost, a.handle));
    EXPECT_EQ(*seen, 0); // not synchronized yet
    CUDA(cudaStreamSynchronize(b.handle));
    EXPECT_EQ(*seen, 0); // only another stream was synchronized
    CUDA(cudaStreamSynchronize(a.handle));
    EXPECT_EQ(*seen, 3);

    launch(add_kernel, dim3(1), dim3(1), 0, a.handle, x.data, 4.0f); // 7
    CUDA(cudaEventRecord(event.handle, a.handle));
    launch(add_kernel, dim3(1), dim3(1), 0, a.handle, x.data, 100.0f); // too late for b
    CUDA(cudaStreamWaitEvent(b.handle, event.handle));
    launch(double_kernel, dim3(1), dim3(1), 0, b.handle, x.data);
    CUDA(cudaMemcpyAsync(seen, x, sizeof(float), cudaMemcpyDeviceToHost, b.handle));
    CUDA(cudaStreamSynchronize(b.handle));
    EXPECT_EQ(*seen, 14);
    CUDA(cudaDeviceSynchronize());
    EXPECT_EQ(x.values()[0], 114);
    CUDA(cudaFreeHost(seen));
}

TEST(Simulator, a_graph_records_and_repeats) {
    const Stream a, b;
    const Event fork, join;
    const OnDevice<float> x(std::vector<float>(1, 1.0f));
    CUDA(cudaStreamBeginCapture(a.handle, cudaStreamCaptureModeGlobal));
    launch(add_kernel, dim3(1), dim3(1), 0, a.handle, x.data, 2.0f);
    CUDA(cudaEventRecord(fork.handle, a.handle));
    CUDA(cudaStreamWaitEvent(b.handle, fork.handle));
    launch(double_kernel, dim3(1), dim3(1), 0, b.handle, x.data);
    CUDA(cudaEventRecord(join.handle, b.handle));
    CUDA(cudaStreamWaitEvent(a.handle, join.handle));
    cudaStreamCaptureStatus status;
    CUDA(cudaStreamIsCapturing(a.handle, &status));
    EXPECT_EQ(status, cudaStreamCaptureStatusActive);
    cudaGraph_t graph = nullptr;
    CUDA(cudaStreamEndCapture(a.handle, &graph));
    EXPECT_EQ(x.values()[0], 1); // nothing has run yet

    cudaGraphExec_t executable = nullptr;
    CUDA(cudaGraphInstantiate(&executable, graph));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaGraphLaunch(executable, a.handle));
    EXPECT_EQ(x.values()[0], 6);
    CUDA(cudaGraphLaunch(executable, a.handle));
    EXPECT_EQ(x.values()[0], 16);
    CUDA(cudaGraphExecDestroy(executable));
}

TEST(Simulator, what_a_capture_forbids) {
    const Stream a, b, blocking(cudaStreamDefault);
    const Event event;
    const OnDevice<float> x(1);
    cudaGraph_t graph = nullptr;
    auto begin = [&](cudaStream_t stream) {
        CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    };
    void* p = nullptr;
    begin(a.handle);
    EXPECT_EQ(cudaMalloc(&p, 8), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
    begin(a.handle);
    EXPECT_EQ(cudaStreamSynchronize(a.handle), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorStreamCaptureInvalidated);
    begin(a.handle);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorStreamCaptureInvalidated);
    begin(a.handle);
    float host = 0;
    EXPECT_EQ(cudaMemcpy(&host, x, 4, cudaMemcpyDeviceToHost), cudaErrorStreamCaptureImplicit);
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorStreamCaptureInvalidated);
    begin(blocking.handle);
    EXPECT_EQ(cudaMemsetAsync(x, 0, 4), cudaErrorStreamCaptureImplicit);
    EXPECT_EQ(cudaStreamEndCapture(blocking.handle, &graph), cudaErrorStreamCaptureInvalidated);
    begin(a.handle);
    CUDA(cudaEventRecord(event.handle, a.handle));
    EXPECT_EQ(cudaEventSynchronize(event.handle), cudaErrorCapturedEvent);
    CUDA(cudaStreamWaitEvent(b.handle, event.handle));
    CUDA(cudaMemsetAsync(x, 0, 4, b.handle));
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorStreamCaptureUnjoined);
    EXPECT_EQ(cudaStreamEndCapture(a.handle, &graph), cudaErrorIllegalState);
    EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
              cudaErrorStreamCaptureUnsupported);
    cudaGetLastError();
    CUDA(cudaDeviceSynchronize());
}

TEST(Simulator, an_error_of_late_work_reaches_who_waits) {
    const sim::LateStreams late;
    const OnDevice<float> out(64);
    const Stream a;
    launch(half_warp_kernel, dim3(1), dim3(64), 0, a.handle, out.data);
    EXPECT_TRUE(has(error_of([&] { CUDA(cudaStreamSynchronize(a.handle)); }),
                    {"half_warp_kernel, block (0, 0, 0)", "__syncwarp"}));
    launch(half_warp_kernel, dim3(1), dim3(64), 0, a.handle, out.data);
    { const OnDevice<float> freed(1); } // must not throw
    EXPECT_TRUE(
        has(error_of([&] { CUDA(cudaStreamSynchronize(a.handle)); }), {"half_warp_kernel"}));
}

TEST(Simulator, events_measure_time) {
    const Event from, to;
    float milliseconds = -1;
    EXPECT_EQ(cudaEventElapsedTime(&milliseconds, from.handle, to.handle),
              cudaErrorInvalidResourceHandle);
    CUDA(cudaEventRecord(from.handle));
    CUDA(cudaEventRecord(to.handle));
    CUDA(cudaEventSynchronize(to.handle));
    CUDA(cudaEventElapsedTime(&milliseconds, from.handle, to.handle));
    EXPECT_GE(milliseconds, 0);
    cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------
// cuBLASLt

const cudaDataType_t float_type = CUDA_R_32F, bf16_type = CUDA_R_16BF;

struct Matrix {
    int64_t rows, cols, ld;
    cudaDataType_t type;
    std::vector<double> x; // column-major, ld rows
    void* device = nullptr;

    Matrix(int64_t r, int64_t c, int64_t l, cudaDataType_t t, unsigned seed)
        : rows(r), cols(c), ld(l), type(t), x(static_cast<size_t>(l * c)) {
        std::mt19937 random(seed);
        for (double& v : x) v = int(random() % 255 - 127) / 64.0; // exact in bf16
        CUDA(cudaMalloc(&device, x.size() * size()));
        write();
    }
    Matrix(const Matrix&) = delete;
    ~Matrix() { cudaFree(device); }
    size_t size() const { return type == float_type ? 4 : 2; }
    void write() {
        std::vector<float> f(x.begin(), x.end());
        std::vector<bf16> b(x.begin(), x.end());
        const void* from = type == float_type ? static_cast<void*>(f.data()) : b.data();
        CUDA(cudaMemcpy(device, from, x.size() * size(), cudaMemcpyHostToDevice));
    }
    std::vector<double> read() const {
        std::vector<float> f(x.size());
        std::vector<bf16> b(x.size());
        void* to = type == float_type ? static_cast<void*>(f.data()) : b.data();
        CUDA(cudaMemcpy(to, device, x.size() * size(), cudaMemcpyDeviceToHost));
        return type == float_type ? std::vector<double>(f.begin(), f.end())
                                  : std::vector<double>(b.begin(), b.end());
    }
};

struct Lt {
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    void* workspace = nullptr;
    static constexpr uint64_t workspace_bytes = 1 << 20;

    Lt() {
        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, float_type);
        cublasLtMatmulPreferenceCreate(&preference);
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace_bytes, sizeof workspace_bytes);
        CUDA(cudaMalloc(&workspace, workspace_bytes));
    }
    ~Lt() {
        cudaFree(workspace);
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(handle);
    }
    template <class T> cublasStatus_t set(cublasLtMatmulDescAttributes_t attribute, T value) {
        return cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value);
    }

    struct Layouts {
        cublasLtMatrixLayout_t a, b, d;
        Layouts(const Matrix& A, const Matrix& B, const Matrix& D) {
            cublasLtMatrixLayoutCreate(&a, A.type, A.rows, A.cols, A.ld);
            cublasLtMatrixLayoutCreate(&b, B.type, B.rows, B.cols, B.ld);
            cublasLtMatrixLayoutCreate(&d, D.type, D.rows, D.cols, D.ld);
        }
        ~Layouts() {
            cublasLtMatrixLayoutDestroy(a);
            cublasLtMatrixLayoutDestroy(b);
            cublasLtMatrixLayoutDestroy(d);
        }
    };
    std::vector<cublasLtMatmulHeuristicResult_t> algorithms(const Matrix& A, const Matrix& B,
                                                            const Matrix& D,
                                                            cublasStatus_t* status = nullptr) {
        const Layouts l(A, B, D);
        std::vector<cublasLtMatmulHeuristicResult_t> found(8);
        int n = 0;
        const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(handle, desc, l.a, l.b, l.d, l.d,
                                                                preference, 8, found.data(), &n);
        if (status) *status = s;
        found.resize(size_t(n));
        return found;
    }
    cublasStatus_t multiply(const Matrix& A, const Matrix& B, const Matrix& D, float alpha,
                            float beta, const cublasLtMatmulAlgo_t* algo,
                            cudaStream_t stream = nullptr) {
        const Layouts l(A, B, D);
        return cublasLtMatmul(handle, desc, &alpha, A.device, l.a, B.device, l.b, &beta, D.device,
                              l.d, D.device, l.d, algo, workspace, workspace_bytes, stream);
    }
};

double element(const Matrix& m, bool transposed, int64_t i, int64_t j) {
    return transposed ? m.x[size_t(j + i * m.ld)] : m.x[size_t(i + j * m.ld)];
}
double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_gradient(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

TEST(SimulatedCublasLt, multiplies_in_every_way_that_it_knows) {
    const int64_t m = 24, n = 13, k = 40;
    for (cudaDataType_t in : {float_type, bf16_type})
        for (cudaDataType_t out : {float_type, bf16_type})
            for (int transposes = 0; transposes < 4; transposes++) {
                if (in == float_type && out == bf16_type) continue;
                const bool ta = transposes & 1, tb = transposes & 2;
                const Matrix A(ta ? k : m, ta ? m : k, 48, in, 1);
                const Matrix B(tb ? n : k, tb ? k : n, 41, in, 2);
                Lt lt;
                lt.set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t(ta ? CUBLAS_OP_T : CUBLAS_OP_N));
                lt.set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t(tb ? CUBLAS_OP_T : CUBLAS_OP_N));
                const auto algorithms = lt.algorithms(A, B, Matrix(m, n, 32, out, 3));
                ASSERT_EQ(algorithms.size(), 4u);
                for (const auto& each : algorithms) {
                    const Matrix D(m, n, 32, out, 3);
                    ASSERT_EQ(lt.multiply(A, B, D, 0.5f, 2.0f, &each.algo), CUBLAS_STATUS_SUCCESS);
                    const std::vector<double> found = D.read();
                    for (int64_t j = 0; j < n; j++)
                        for (int64_t i = 0; i < 32; i++) {
                            double sum = 2 * D.x[size_t(i + j * 32)];
                            for (int64_t l = 0; l < k; l++)
                                if (i < m) sum += 0.5 * element(A, ta, i, l) * element(B, tb, l, j);
                            if (i >= m) sum = D.x[size_t(i + j * 32)]; // padding is unchanged
                            ASSERT_NEAR(found[size_t(i + j * 32)], sum,
                                        out == bf16_type ? 0.004 * std::fabs(sum) : 1e-4);
                        }
                }
            }
}

TEST(SimulatedCublasLt, algorithms_differ_in_the_last_bits) {
    const Matrix A(16, 999, 16, float_type, 1), B(999, 8, 999, float_type, 2);
    Lt lt;
    std::vector<std::vector<double>> results;
    std::vector<uint32_t> reductions;
    Matrix D(16, 8, 16, float_type, 3);
    for (double& x : const_cast<Matrix&>(A).x) x /= 3;
    const_cast<Matrix&>(A).write();
    for (const auto& each : lt.algorithms(A, B, D))
        for (int again = 0; again < 2; again++) {
            ASSERT_EQ(lt.multiply(A, B, D, 1, 0, &each.algo), CUBLAS_STATUS_SUCCESS);
            results.push_back(D.read());
            uint32_t reduction = 9;
            EXPECT_EQ(cublasLtMatmulAlgoConfigGetAttribute(&each.algo,
                                                           CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                                           &reduction, sizeof reduction, nullptr),
                      CUBLAS_STATUS_SUCCESS);
            reductions.push_back(reduction);
        }
    ASSERT_EQ(results.size(), 8u);
    EXPECT_EQ(results[0], results[1]);
    EXPECT_NE(results[0], results[2]);
    EXPECT_NE(results[0], results[4]);
    EXPECT_NE(results[6], results[7]); // in place: depends on the order
    EXPECT_EQ(reductions[6], uint32_t(CUBLASLT_REDUCTION_SCHEME_INPLACE));

    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    cublasLtMatmulPreferenceSetAttribute(lt.preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                         &none, sizeof none);
    EXPECT_EQ(lt.algorithms(A, B, D).size(), 2u);
}

TEST(SimulatedCublasLt, epilogues) {
    const int64_t m = 24, n = 13, k = 40, ld = 32;
    for (cudaDataType_t type : {float_type, bf16_type}) {
        const double tolerance = type == float_type ? 1e-4 : 1e-2;
        const Matrix A(m, k, m, type, 1), B(k, n, k, type, 2);
        auto product = [&](int64_t i, int64_t j) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += element(A, false, i, l) * element(B, false, l, j);
            return 0.125 * sum;
        };
        for (uint32_t epilogue :
             {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_AUX,
              CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
              CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
            SCOPED_TRACE(epilogue);
            const Matrix D(m, n, ld, type, 3), aux(m, n, ld, type, 4), bias(m, 1, m, type, 5);
            Lt lt;
            ASSERT_EQ(lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue), CUBLAS_STATUS_SUCCESS);
            lt.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.device);
            lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.device);
            lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(ld));
            const auto algorithms = lt.algorithms(A, B, D);
            ASSERT_GE(algorithms.size(), 2u);
            ASSERT_EQ(lt.multiply(A, B, D, 0.125f, 0, &algorithms[1].algo), CUBLAS_STATUS_SUCCESS);
            const auto d = D.read(), kept = aux.read(), b = bias.read();
            std::vector<double> sums(size_t(m), 0.0);
            for (int64_t j = 0; j < n; j++)
                for (int64_t i = 0; i < m; i++) {
                    const size_t at = size_t(i + j * ld);
                    double x = product(i, j);
                    if (epilogue & CUBLASLT_EPILOGUE_BIAS) x += bias.x[size_t(i)];
                    if ((epilogue & CUBLASLT_EPILOGUE_GELU) && (epilogue & 128)) {
                        ASSERT_NEAR(kept[at], x, tolerance * (1 + std::fabs(x)));
                    }
                    if (epilogue & CUBLASLT_EPILOGUE_GELU) x = gelu(x);
                    if (epilogue & 64) x *= gelu_gradient(aux.x[at]);
                    sums[size_t(i)] += x;
                    ASSERT_NEAR(d[at], x, tolerance * (1 + std::fabs(x)));
                }
            for (int64_t i = 0; i < m; i++) {
                double expected = bias.x[size_t(i)];
                if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD) expected = sums[size_t(i)];
                if (epilogue == CUBLASLT_EPILOGUE_BGRADA) {
                    expected = 0;
                    for (int64_t l = 0; l < k; l++) expected += element(A, false, i, l);
                }
                if (epilogue == CUBLASLT_EPILOGUE_BGRADB && i < n) {
                    expected = 0;
                    for (int64_t l = 0; l < k; l++) expected += element(B, false, l, i);
                }
                ASSERT_NEAR(b[size_t(i)], expected, tolerance * (1 + std::fabs(expected)));
            }
        }
    }
}

TEST(SimulatedCublasLt, refuses_what_cuBLASLt_would) {
    const Matrix A(16, 8, 16, bf16_type, 1), B(8, 8, 8, bf16_type, 2), D(16, 8, 16, bf16_type, 3);
    const Matrix wrong(16, 9, 16, bf16_type, 3), other(8, 8, 8, float_type, 3);
    Lt lt;
    EXPECT_EQ(lt.multiply(A, B, wrong, 1, 0, nullptr), CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(lt.multiply(A, other, D, 1, 0, nullptr), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(lt.set(CUBLASLT_MATMUL_DESC_TRANSA, int64_t(0)), CUBLAS_STATUS_INVALID_VALUE);

    auto found = lt.algorithms(A, B, D);
    cublasLtMatmulAlgo_t foreign = found[0].algo;
    foreign.data[0] = 77;
    EXPECT_EQ(lt.multiply(A, B, D, 1, 0, &foreign), CUBLAS_STATUS_INVALID_VALUE);
    lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_GELU_AUX));
    EXPECT_EQ(lt.multiply(A, B, D, 1, 0, nullptr), CUBLAS_STATUS_INVALID_VALUE); // no leading dim.
    {
        const Variable refused("LNS_SIM_NO_EPILOGUES", "1");
        lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(16));
        cublasStatus_t status;
        EXPECT_TRUE(lt.algorithms(A, B, D, &status).empty());
        EXPECT_EQ(status, CUBLAS_STATUS_NOT_SUPPORTED);
        lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_DEFAULT));
        EXPECT_FALSE(lt.algorithms(A, B, D, &status).empty());
    }
    // An algorithm chosen for pointers aligned to 256 bytes.
    Matrix moved(16, 8, 16, bf16_type, 3);
    void* begin = moved.device;
    moved.device = static_cast<char*>(begin) + 32;
    EXPECT_EQ(lt.multiply(moved, B, D, 1, 0, &found[0].algo), CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_TRUE(has(error_of([&] { lt.multiply(moved, B, D, 1, 0, nullptr); }),
                    {"cublasLtMatmul, A: 256 bytes from ", "of which it has 224"}));
    moved.device = begin;
    EXPECT_TRUE(has(error_of([&] {
                        Lt::Layouts l(D, B, D);
                        const float one = 1, zero = 0;
                        cublasLtMatmul(lt.handle, lt.desc, &one, D.device, l.a, B.device, l.b,
                                       &zero, D.device, l.d, D.device, l.d, nullptr, nullptr, 0,
                                       nullptr);
                    }),
                    {"D overlaps A or B"}));
}

TEST(SimulatedCublasLt, products_are_captured) {
    const Matrix A(16, 8, 16, float_type, 1), B(8, 8, 8, float_type, 2);
    const Matrix D(16, 8, 16, float_type, 3), E(16, 8, 16, float_type, 3);
    Lt lt;
    const Stream stream;
    CUDA(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeGlobal));
    ASSERT_EQ(lt.multiply(A, B, D, 1, 1, nullptr, stream.handle), CUBLAS_STATUS_SUCCESS);
    cudaGraph_t graph = nullptr;
    CUDA(cudaStreamEndCapture(stream.handle, &graph));
    EXPECT_EQ(D.read(), D.x);
    cudaGraphExec_t executable = nullptr;
    CUDA(cudaGraphInstantiate(&executable, graph));
    for (int i = 0; i < 2; i++) {
        CUDA(cudaGraphLaunch(executable, stream.handle));
        ASSERT_EQ(lt.multiply(A, B, E, 1, 1, nullptr), CUBLAS_STATUS_SUCCESS);
        EXPECT_EQ(D.read(), E.read());
    }
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
}

// ---------------------------------------------------------------------------------------------

TEST(SimulatedNccl, one_rank_alone) {
    ncclUniqueId id;
    ncclComm_t comm = nullptr;
    ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
    ASSERT_EQ(ncclCommInitRank(&comm, 1, id, 0), ncclSuccess);
    const OnDevice<float> x(std::vector<float>{1, 2, 3});
    EXPECT_EQ(ncclAllReduce(x, x, 3, ncclFloat32, ncclSum, comm, nullptr), ncclSuccess);
    EXPECT_EQ(x.values(), (std::vector<float>{1, 2, 3}));
    EXPECT_TRUE(has(error_of([&] { ncclAllReduce(x, x, 4, ncclFloat32, ncclSum, comm, nullptr); }),
                    {"ncclAllReduce, from: 16 bytes"}));
    EXPECT_EQ(ncclCommDestroy(comm), ncclSuccess);
    EXPECT_EQ(ncclCommInitRank(&comm, 2, id, 2), ncclInvalidArgument);
}

} // namespace
} // namespace lns::cuda
