// The simulator's half of gpt/cuda/hopper.h. Asynchronous work is done as late as possible: boxes
// arrive when a thread waits for their barrier and no other can continue; products read their
// operands and write their accumulators at wgmma_wait. Until then their destinations are poisoned.
// Addresses in shared memory, matrix descriptors and swizzles are decoded as the PTX ISA defines
// them.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "dev/sim/sim.h"

namespace lns::cuda {

constexpr bool hopper_instructions = true;

template <class Kernel> bool has_hopper_code(Kernel*) {
    int major = 0, minor = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    return major == 9 && minor == 0;
}

// ---- Tensor maps

struct TensorMap {
    const unsigned char* array;
    uint64_t sizes[4], strides[4]; // elements, bytes
    uint32_t box[4];
};

inline TensorMap tensor_map(const __nv_bfloat16* array, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    // The requirements of cuTensorMapEncodeTiled.
    auto demand = [](bool met, const char* what) {
        if (!met) fail("tensor_map: ", what);
    };
    demand(reinterpret_cast<uintptr_t>(array) % 16 == 0, "the array is not aligned to 16 bytes");
    demand(box[0] * 2 == 128, "a row of the box is not 128 bytes, the swizzle's span");
    TensorMap map = {
        reinterpret_cast<const unsigned char*>(array), {}, {2}, {box[0], box[1], box[2], box[3]}};
    for (int i = 0; i < 4; i++) {
        demand(sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32, "a size is not in 1 … 2³²");
        demand(box[i] >= 1 && box[i] <= 256, "a box's size is not in 1 … 256");
        map.sizes[i] = sizes[i];
        if (i == 0) continue;
        demand(strides[i - 1] % 16 == 0, "a stride is not a multiple of 16 bytes");
        demand(strides[i - 1] < uint64_t(1) << 40, "a stride is not below 2⁴⁰");
        map.strides[i] = strides[i - 1];
    }
    return map;
}
inline void prefetch(const TensorMap&) {}

// ---- A block's pending work

} // namespace lns::cuda

namespace lns::sim::hopper {

using cuda::TensorMap;

struct Copy {
    TensorMap map;
    int at[4];
    unsigned char* shared;
    uint64_t* barrier;
};

struct Product {
    int n;            // columns of the accumulators
    float* sums[128]; // each thread's accumulator
    bool a_in_registers, b_transposed, add;
    uint64_t a, b;
    uint32_t registers[128][4];
};

// The contents of each thread's registers, by address, at wgmma_fence or after a product.
using Registers = std::map<const void*, std::vector<unsigned char>>;

struct Warpgroup {
    std::vector<std::vector<Product>> groups; // committed, the oldest first
    std::vector<Product> open;
    std::map<float*, std::vector<float>> sums; // pending, by thread 0's address: (128, n)
    Registers fenced[128];
    int registers = 0; // of each thread; 0: as launched
};

struct Block {
    std::vector<Copy> copies;
    Warpgroup warpgroups[max_threads / 128];
    int free_registers = 0;
};

inline Block& block() { return block_state<Block>(); }
inline Warpgroup& warpgroup() { return block().warpgroups[thread_rank() / 128]; }

// The 128-byte swizzle: bits 4-6 of an address are xored with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// An mbarrier's 64 bits are opaque, so the layout is ours.
struct Barrier {
    uint64_t expected : 20, pending : 20, phase : 1, unused : 1;
    int64_t bytes : 22;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier read(const uint64_t* barrier) {
    Barrier state;
    shared_offset(barrier); // fails if it is not in shared memory
    std::memcpy(&state, barrier, 8);
    if (state.expected == 0xFFFFF) fail_in_kernel("uses an mbarrier that was not initialized");
    return state;
}
inline void write(uint64_t* barrier, Barrier state) {
    if (state.pending == 0 && state.bytes == 0) {
        state.phase ^= 1, state.pending = state.expected;
        condition_met();
    }
    std::memcpy(barrier, &state, 8);
}

inline void land(const Copy& copy) {
    const TensorMap& map = copy.map;
    uint32_t to = shared_offset(copy.shared);
    for (uint32_t i3 = 0; i3 < map.box[3]; i3++)
        for (uint32_t i2 = 0; i2 < map.box[2]; i2++)
            for (uint32_t i1 = 0; i1 < map.box[1]; i1++)
                for (uint32_t i0 = 0; i0 < map.box[0]; i0++, to += 2) {
                    const int64_t index[4] = {int64_t(copy.at[0]) + i0, int64_t(copy.at[1]) + i1,
                                              int64_t(copy.at[2]) + i2, int64_t(copy.at[3]) + i3};
                    const unsigned char* from = map.array;
                    bool inside = true;
                    for (int d = 0; d < 4; d++) {
                        inside = inside && index[d] >= 0 && uint64_t(index[d]) < map.sizes[d];
                        from += index[d] * int64_t(map.strides[d]);
                    }
                    unsigned char* number = shared_pointer(swizzled(to));
                    if (inside)
                        std::memcpy(number, from, 2);
                    else
                        std::memset(number, 0, 2);
                }
    Barrier state = read(copy.barrier);
    state.bytes -= int64_t(to) - shared_offset(copy.shared);
    write(copy.barrier, state);
}

// A descriptor's fields (9.7.15.5.1.2.2).
struct Matrix {
    uint32_t start, leading, stride;

    explicit Matrix(uint64_t descriptor)
        : start(descriptor % (1 << 14) << 4), leading((descriptor >> 16) % (1 << 14) << 4),
          stride((descriptor >> 32) % (1 << 14) << 4) {
        if (descriptor & ~0xC00E'3FFF'3FFF'3FFFull)
            fail_in_kernel("wgmma: a matrix descriptor has bits that must be 0");
        if (descriptor >> 62 != 1) fail_in_kernel("wgmma: only the 128-byte swizzle is simulated");
        if ((descriptor >> 49) % 8 != 0 || start % 1024 >= 128)
            fail_in_kernel("wgmma: a matrix does not begin in the first row of a swizzle "
                           "pattern, which is aligned to 1,024 bytes");
    }
    // The address of row i (of M or N) at k, where K runs along the rows, or else across them
    // (canonical layouts, 9.7.15.5.1.2.1.3).
    float at(int i, int k, bool transposed) const {
        const uint32_t offset = transposed
                                    ? i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride
                                    : i % 8 * 128 + i / 8 * stride + k * 2;
        uint16_t number;
        std::memcpy(&number, shared_pointer(swizzled(start + offset)), 2);
        return __uint_as_float(uint32_t(number) << 16);
    }
};

// Row and column of a thread's i-th accumulator, and of its i-th element of operand a.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

inline void compute(const Product& product, std::vector<float>& sums) {
    float a[64][16], b[256][16];
    for (int t = 0; t < 128 && product.a_in_registers; t++)
        for (int i = 0; i < 8; i++) {
            const uint32_t word = product.registers[t][i / 2];
            a[row_of(t, i)][column_of(t, i)] =
                __uint_as_float(i % 2 ? word & 0xFFFF0000u : word << 16);
        }
    if (!product.a_in_registers)
        for (int m = 0; m < 64; m++)
            for (int k = 0; k < 16; k++) a[m][k] = Matrix(product.a).at(m, k, false);
    for (int n = 0; n < product.n; n++)
        for (int k = 0; k < 16; k++) b[n][k] = Matrix(product.b).at(n, k, product.b_transposed);
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < product.n / 2; i++) {
            const float *x = a[row_of(t, i)], *y = b[column_of(t, i)];
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            float& out = sums[t * (product.n / 2) + i];
            out = product.add ? out + sum : sum;
        }
}

inline bool under_way(const Warpgroup& group, const float* sums) {
    return group.sums.count(const_cast<float*>(sums));
}

// Executes the products of the oldest group. Accumulators to which no later one adds are written
// back to their threads.
inline void finish_group(Warpgroup& group) {
    const std::vector<Product> products = std::move(group.groups.front());
    group.groups.erase(group.groups.begin());
    for (const Product& product : products) compute(product, group.sums.at(product.sums[0]));
    auto used_by = [](const std::vector<Product>& others, const float* sums) {
        for (const Product& other : others)
            if (other.sums[0] == sums) return true;
        return false;
    };
    for (const Product& product : products) {
        float* const first = product.sums[0];
        bool later = !group.sums.count(first) || used_by(group.open, first);
        for (const auto& others : group.groups) later = later || used_by(others, first);
        if (later) continue;
        const size_t n = product.n / 2, bytes = n * sizeof(float);
        for (int t = 0; t < 128; t++) {
            const auto* at = reinterpret_cast<const unsigned char*>(product.sums[t]);
            for (size_t i = 0; i < bytes; i++)
                if (at[i] != poison_byte)
                    fail_in_kernel("wgmma: sums were written before wgmma_wait");
            std::memcpy(product.sums[t], &group.sums.at(first)[t * n], bytes);
            group.fenced[t][product.sums[t]].assign(at, at + bytes);
        }
        group.sums.erase(first);
    }
}

// A thread's operands of wgmma.
struct Operands {
    int thread, n;
    float* sums;
    const uint32_t* registers; // of a; null if that is a descriptor
    uint64_t a, b;
    bool b_transposed, add;
};

inline void check_fenced(const Registers& fenced, const void* registers, size_t bytes) {
    auto next = fenced.upper_bound(registers);
    if (next != fenced.begin()) {
        const auto& [begin, copy] = *--next;
        const size_t skip = static_cast<const char*>(registers) - static_cast<const char*>(begin);
        if (skip + bytes <= copy.size()) {
            if (std::memcmp(copy.data() + skip, registers, bytes) == 0) return;
            fail_in_kernel("wgmma: registers were written since wgmma_fence");
        }
    }
    fail_in_kernel("wgmma: registers that no wgmma_fence has named");
}

inline void issue(void** operands) {
    Warpgroup& group = warpgroup();
    const Operands& first = *static_cast<Operands*>(operands[0]);
    Product product = {};
    product.n = first.n, product.a = first.a, product.b = first.b, product.add = first.add;
    product.a_in_registers = first.registers, product.b_transposed = first.b_transposed;
    Matrix check_b(first.b);
    if (!first.registers) Matrix check_a(first.a);
    const bool continues = under_way(group, first.sums);
    std::vector<float>& sums = group.sums[first.sums];
    sums.resize(128 * size_t(first.n / 2));
    for (int t = 0; t < 128; t++) {
        const Operands& mine = *static_cast<Operands*>(operands[t]);
        if (mine.a != first.a || mine.b != first.b || mine.add != first.add)
            fail_in_kernel("wgmma: descriptors differ among the threads of a warpgroup");
        const size_t n = mine.n / 2, bytes = n * sizeof(float);
        product.sums[t] = mine.sums;
        if (mine.registers) {
            check_fenced(group.fenced[t], mine.registers, 16);
            std::memcpy(product.registers[t], mine.registers, 16);
        }
        if (!continues) {
            check_fenced(group.fenced[t], mine.sums, bytes);
            std::memcpy(&sums[t * n], mine.sums, bytes);
            poison(mine.sums, bytes);
        }
    }
    group.open.push_back(product);
}

template <class X> void note(Registers& fenced, const X& registers) {
    const auto* at = reinterpret_cast<const unsigned char*>(&registers);
    fenced[at].assign(at, at + sizeof(X));
}

// At launch a multiprocessor's 65,536 registers are divided evenly among the block's threads.
inline void set_registers(void** registers) {
    Warpgroup& group = warpgroup();
    const int wanted = *static_cast<int*>(registers[0]);
    if (group.registers == 0) group.registers = 65536 / block_threads() / 8 * 8;
    block().free_registers -= (wanted - group.registers) * 128;
    group.registers = wanted;
    condition_met();
}

} // namespace lns::sim::hopper

namespace lns::cuda {

// ---- Barriers in shared memory

inline void barrier_init(uint64_t* barrier, int arrivals) {
    sim::shared_offset(barrier);
    sim::hopper::Barrier state = {};
    state.expected = state.pending = arrivals;
    std::memcpy(barrier, &state, 8);
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier) {
    sim::hopper::Barrier state = sim::hopper::read(barrier);
    if (state.pending == 0) sim::fail_in_kernel("more arrivals at an mbarrier than it expects");
    state.pending--;
    sim::hopper::write(barrier, state);
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
    sim::hopper::Barrier state = sim::hopper::read(barrier);
    if (state.pending == 0) sim::fail_in_kernel("more arrivals at an mbarrier than it expects");
    state.pending--, state.bytes += bytes;
    sim::hopper::write(barrier, state);
}
inline void barrier_wait(uint64_t* barrier, int phase, sim::Site where = sim::here()) {
    bool polled = false;
    sim::wait_until("barrier_wait", where, [&] {
        if (polled) { // copies arrive when no other thread can continue
            std::vector<sim::hopper::Copy>& copies = sim::hopper::block().copies;
            std::vector<sim::hopper::Copy> others;
            for (const sim::hopper::Copy& copy : copies)
                if (copy.barrier != barrier) others.push_back(copy);
            std::swap(copies, others);
            for (const sim::hopper::Copy& copy : others)
                if (copy.barrier == barrier) sim::hopper::land(copy);
        }
        polled = true;
        return int(sim::hopper::read(barrier).phase) != (phase & 1);
    });
}

inline void copy_box(void* shared, const TensorMap& map, int c0, int c1, int c2, int c3,
                     uint64_t* barrier) {
    auto* to = static_cast<unsigned char*>(shared);
    const size_t bytes = size_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * 2;
    if (sim::shared_offset(to) % 1024 != 0)
        sim::fail_in_kernel("copy_box: the destination is not aligned to 1,024 bytes");
    sim::shared_offset(to + bytes - 1);
    sim::hopper::read(barrier);
    sim::poison(to, bytes);
    sim::hopper::block().copies.push_back({map, {c0, c1, c2, c3}, to, barrier});
}

// ---- Warp specialization

template <int registers> void release_registers(sim::Site where = sim::here()) {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    int wanted = registers;
    sim::meet_warpgroup("release_registers", where, &wanted, sim::hopper::set_registers);
}
template <int registers> void take_registers(sim::Site where = sim::here()) {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    int wanted = registers;
    sim::meet_warpgroup("take_registers", where, &wanted, sim::hopper::set_registers);
    sim::wait_until("take_registers", where,
                    [] { return sim::hopper::block().free_registers >= 0; });
}

inline void named_barrier_wait(int id, int threads, sim::Site where = sim::here()) {
    sim::barrier("named_barrier_wait", where, id, threads);
}
inline void named_barrier_arrive(int id, int threads, sim::Site where = sim::here()) {
    sim::arrive("named_barrier_arrive", where, id, threads);
}

// ---- wgmma

inline uint64_t matrix(const void* shared, int next = 16) {
    return uint64_t(shared_address(shared) >> 4) | uint64_t(next >> 4) << 16 |
           uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
inline uint64_t advanced(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

template <class... Each> void wgmma_fence(Each&... registers) {
    sim::hopper::Registers& fenced = sim::hopper::warpgroup().fenced[sim::thread_rank() % 128];
    (sim::hopper::note(fenced, registers), ...);
    sim::meet_warpgroup("wgmma_fence", sim::here(), &fenced, [](void**) {});
}
inline void wgmma_commit(sim::Site where = sim::here()) {
    sim::hopper::Warpgroup& mine = sim::hopper::warpgroup();
    sim::meet_warpgroup("wgmma_commit", where, &mine, [](void** operands) {
        auto& group = *static_cast<sim::hopper::Warpgroup*>(operands[0]);
        group.groups.push_back(std::move(group.open));
        group.open.clear();
    });
}
template <int N, class... Sums> void wgmma_wait(Sums&... sums) {
    void* first[] = {sums..., nullptr};
    sim::meet_warpgroup("wgmma_wait", sim::here(), first, [](void** operands) {
        sim::hopper::Warpgroup& group = sim::hopper::warpgroup();
        while (group.groups.size() > N) sim::hopper::finish_group(group);
        for (auto** each = static_cast<void**>(operands[0]); *each; each++)
            if (sim::hopper::under_way(group, static_cast<float*>(*each)))
                sim::fail_in_kernel("wgmma_wait names sums that may still be under way");
    });
}

template <int N>
void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool add, sim::Site where = sim::here()) {
    sim::hopper::Operands operands = {
        sim::thread_rank() % 128, 2 * N, d, nullptr, a, b, false, add};
    sim::meet_warpgroup("wgmma", where, &operands, sim::hopper::issue);
}
template <int N>
void wgmma_transposed(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add,
                      sim::Site where = sim::here()) {
    sim::hopper::Operands operands = {sim::thread_rank() % 128, 2 * N, d, a, 0, b, true, add};
    sim::meet_warpgroup("wgmma_transposed", where, &operands, sim::hopper::issue);
}

} // namespace lns::cuda
