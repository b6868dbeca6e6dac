#include "dev/sim/sim.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <mutex>
#include <utility>

#include "dev/sim/fiber.h"
#include "dev/sim/parallel.h"

thread_local constinit uint3 threadIdx = {}, blockIdx = {};
thread_local constinit dim3 blockDim = {}, gridDim = {};

namespace lns::sim {

namespace {

// ---------------------------------------------------------------------------------------------
// Names of kernels, from the program's file: static functions are in no dynamic table.

std::string symbol_at(uintptr_t address) {
    uintptr_t base = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            *static_cast<uintptr_t*>(out) = info->dlpi_addr;
            return 1; // the program itself is first
        },
        &base);
    std::ifstream in("/proc/self/exe", std::ios::binary);
    const std::string file((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (file.size() < sizeof(Elf64_Ehdr) || file.compare(0, 4, ELFMAG)) return "";
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* symbols =
            reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
        const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
        for (size_t n = 0; n < sections[i].sh_size / sizeof(Elf64_Sym); n++)
            if (ELF64_ST_TYPE(symbols[n].st_info) == STT_FUNC &&
                base + symbols[n].st_value == address)
                return names + symbols[n].st_name;
    }
    return "";
}

} // namespace

std::string kernel_name(const void* kernel) {
    const std::string symbol = symbol_at(uintptr_t(kernel));
    if (symbol.empty()) return cat("at ", kernel);
    int status = 0;
    char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
    std::string name = status == 0 ? demangled : symbol;
    std::free(demangled);
    const std::string anonymous = "(anonymous namespace)::";
    for (size_t at; (at = name.find(anonymous)) != std::string::npos;)
        name.erase(at, anonymous.size());
    // Drops the return type, namespaces and parameters, and keeps template arguments.
    int depth = 0;
    size_t begin = 0, end = 0;
    for (; end < name.size() && !(depth == 0 && name[end] == '('); end++) {
        if (name[end] == '<') depth++;
        if (name[end] == '>') depth--;
        if (depth == 0 && (name[end] == ' ' || name[end] == ':')) begin = end + 1;
    }
    return name.substr(begin, end - begin);
}

namespace {

// ---------------------------------------------------------------------------------------------
// Order

std::string order_variable() {
    const char* value = std::getenv("LNS_SIM_ORDER");
    return value ? value : "forward";
}

Order parse_order(const std::string& text) {
    if (text.empty() || text == "forward") return {Direction::forward, 0};
    if (text == "reversed") return {Direction::reversed, 0};
    if (text.rfind("shuffled", 0) == 0) {
        const std::string seed = text.size() > 9 ? text.substr(9) : "1";
        return {Direction::shuffled, std::strtoull(seed.c_str(), nullptr, 10)};
    }
    fail("the simulator's order of threads is \"", text,
         "\" (LNS_SIM_ORDER), not forward, reversed or shuffled:SEED");
}

Order& current_order() {
    static Order order = parse_order(order_variable());
    return order;
}

struct RandomBits {
    uint64_t state;
    uint64_t next() { // SplitMix64
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
};

} // namespace

Order order() { return current_order(); }
void set_order(Order order) { current_order() = order; }
void set_order(const std::string& name) { current_order() = parse_order(name); }

std::string name_of(Order order) {
    switch (order.direction) {
    case Direction::forward:
        return "forward";
    case Direction::reversed:
        return "reversed";
    case Direction::shuffled:
        break;
    }
    return cat("shuffled:", order.seed);
}

std::vector<Order> every_order(int shuffles) {
    std::vector<Order> orders = {{Direction::forward, 0}, {Direction::reversed, 0}};
    for (int seed = 1; seed <= shuffles; seed++)
        orders.push_back({Direction::shuffled, uint64_t(seed)});
    return orders;
}

namespace {

// ---------------------------------------------------------------------------------------------
// A block

struct Copy {
    void* shared;
    const void* global;
    int bytes;
    bool valid;
};

enum class State { ready, waiting, spinning, finished };

struct Thread {
    uint3 index;
    Fiber* fiber = nullptr; // null before it starts
    State state = State::ready;
    const char* name = ""; // what it waits at, and where
    Site where = {};
    uint32_t mask = 0; // of a warp's instruction
    int barrier = -1, result = 0;
    std::vector<Copy> copies;   // of cp.async, not yet arrived
    std::vector<size_t> groups; // how many copies there were when each group was closed
};

struct Meeting {
    const char* name;
    Site where;
    uint32_t mask;
    int first, size, missing; // threads first … first + size - 1
    void* operands[128];
};

struct Barrier {
    const char* name = nullptr;
    Site where = {};
    int threads = 0, arrived = 0, predicates = 0;
};

struct SharedArray {
    size_t offset, bytes;
};

// Which bit of `mask` is next.
int choose(uint32_t mask, Direction direction, RandomBits& random) {
    switch (direction) {
    case Direction::forward:
        return __builtin_ctz(mask);
    case Direction::reversed:
        return 31 - __builtin_clz(mask);
    case Direction::shuffled:
        break;
    }
    const uint64_t bits = random.next();
    const int turn = int(bits & 31);
    const uint32_t turned = (mask >> turn) | (turn ? mask << (32 - turn) : 0);
    return ((bits & 32 ? __builtin_ctz(turned) : 31 - __builtin_clz(turned)) + turn) & 31;
}

const int barriers = 16;
// Addresses in wgmma's descriptors have 18 bits.
const size_t shared_arena = 256 * 1024, shared_red_zone = 1024;
const size_t shared_red_zones = 28; // later arrays have none: 227 KB and these are all there is
const unsigned char red_zone_byte = 0xFB;

struct Block {
    const Launch* launch = nullptr;
    Direction direction = Direction::forward;
    RandomBits random = {0};
    int threads = 0, finished = 0;
    std::vector<Thread> thread = std::vector<Thread>(max_threads);
    Thread* self = nullptr;

    uint32_t ready_warps = 0, ready[32] = {}, spinning[32] = {};
    uint64_t progress = 0, polled_at = 0; // counts fulfilled waits
    std::vector<Meeting*> meetings[32];   // of the warp, or of the warpgroup that begins there
    std::vector<std::unique_ptr<Meeting>> all_meetings;
    std::vector<Meeting*> free_meetings;
    Barrier barrier[barriers];

    Fiber host;
    std::vector<std::unique_ptr<Fiber>> all_fibers;
    std::vector<Fiber*> free_fibers;
    std::exception_ptr error;

    unsigned char* arena = nullptr;
    std::vector<SharedArray> arrays;
    size_t taken = 0; // bytes of the launch's shared memory
    std::vector<std::pair<const void*, std::shared_ptr<void>>> objects;

    Block() { arena = static_cast<unsigned char*>(std::aligned_alloc(1024, shared_arena)); }
    ~Block() {
        ASAN_UNPOISON_MEMORY_REGION(arena, shared_arena);
        std::free(arena);
    }

    int rank(const Thread* t) const { return int(t - thread.data()); }

    // -- which thread is next

    void make_ready(int rank) {
        thread[rank].state = State::ready;
        ready[rank / 32] |= 1u << rank % 32;
        ready_warps |= 1u << rank / 32;
    }

    // Unless shuffled, a warp runs as far as it can before the next one: results of another for
    // which it does not wait are then missing.
    Thread* pick() {
        if (!ready_warps) {
            poll_conditions();
            if (!ready_warps) return nullptr;
        }
        const int warp = choose(ready_warps, direction, random);
        const int lane = choose(ready[warp], direction, random);
        ready[warp] &= ~(1u << lane);
        if (!ready[warp]) ready_warps &= ~(1u << warp);
        return &thread[warp * 32 + lane];
    }

    // No thread can continue: those that wait for a condition poll again, if anything has changed.
    void poll_conditions() {
        if (finished == threads) return;
        if (polled_at != progress) {
            polled_at = progress;
            for (int warp = 0; warp < 32; warp++)
                for (; spinning[warp]; spinning[warp] &= spinning[warp] - 1)
                    make_ready(warp * 32 + __builtin_ctz(spinning[warp]));
        }
        if (!ready_warps) fail(prefix(), "no thread can continue: ", what_all_do());
    }

    void resume(Thread* t) {
        self = t;
        threadIdx = t->index;
    }

    Fiber* new_fiber() {
        if (free_fibers.empty()) {
            all_fibers.push_back(std::make_unique<Fiber>());
            all_fibers.back()->allocate();
            free_fibers.push_back(all_fibers.back().get());
        }
        Fiber* fiber = free_fibers.back();
        free_fibers.pop_back();
        return fiber;
    }

    Fiber& fiber_of(Thread* t) {
        if (!t->fiber) {
            t->fiber = new_fiber();
            t->fiber->prepare([](void* block) { static_cast<Block*>(block)->run_threads(); }, this,
                              rank(t));
        }
        return *t->fiber;
    }

    // The others run until this thread is chosen again.
    void wait() {
        Thread* t = self;
        Thread* next = pick();
        if (next == t) return;
        self = next;
        Fiber::change(*t->fiber, fiber_of(next));
        resume(t);
    }

    // The main function of a fiber. A thread that has not started reuses the stack of the one that
    // has just finished.
    void run_threads() {
        Fiber* fiber = self->fiber;
        Fiber* next = &host;
        try {
            for (Thread* t = self; t;) {
                resume(t);
                launch->thread();
                t->state = State::finished;
                finished++, progress++;
                t = pick();
                if (t && t->fiber) {
                    self = t;
                    next = t->fiber;
                    break;
                }
                if (t) t->fiber = fiber;
            }
        } catch (...) {
            error = std::current_exception();
        }
        free_fibers.push_back(fiber);
        fiber->unmark();
        Fiber::change(*fiber, *next, true);
    }

    // -- a block from its beginning to its end

    void run(const Launch& what, dim3 index, uint64_t seed) {
        launch = &what;
        direction = current_order().direction;
        random = {seed};
        blockIdx = index, blockDim = what.block, gridDim = what.grid;
        threads = int(what.block.x * what.block.y * what.block.z);
        finished = 0, progress = 1, polled_at = 0, taken = 0;
        ready_warps = 0;
        for (int i = 0; i < threads; i++) {
            Thread& t = thread[i];
            t.index = {i % what.block.x, i / what.block.x % what.block.y,
                       i / (what.block.x * what.block.y)};
            t.fiber = nullptr;
            t.copies.clear(), t.groups.clear();
            make_ready(i);
        }
        ASAN_POISON_MEMORY_REGION(arena, shared_arena);
        self = pick();
        Fiber::change(host, fiber_of(self));
        self = nullptr;
        objects.clear();
        try {
            if (!error) check_red_zones();
        } catch (...) {
            error = std::current_exception();
        }
        if (error) forget();
        arrays.clear();
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }

    // After an error, threads stop where they are.
    void forget() {
        free_fibers.clear(), free_meetings.clear();
        for (auto& fiber : all_fibers) fiber->unmark(), free_fibers.push_back(fiber.get());
        for (auto& meeting : all_meetings) free_meetings.push_back(meeting.get());
        for (int warp = 0; warp < 32; warp++)
            ready[warp] = spinning[warp] = 0, meetings[warp].clear();
        for (Barrier& b : barrier) b = {};
    }

    // -- waiting

    void wait_at(const char* name, Site where, uint32_t mask, int id, State state) {
        self->name = name, self->where = where, self->mask = mask, self->barrier = id;
        self->state = state;
    }

    template <class Act>
    void meet(const char* name, Site where, uint32_t mask, int first, int size, void* operands,
              Act act) {
        const int me = rank(self);
        auto& pending = meetings[first / 32];
        size_t n = 0;
        while (n < pending.size() && !(pending[n]->name == name && pending[n]->where == where &&
                                       pending[n]->mask == mask && pending[n]->size == size))
            n++;
        if (n == pending.size()) {
            if (free_meetings.empty()) {
                all_meetings.push_back(std::make_unique<Meeting>());
                free_meetings.push_back(all_meetings.back().get());
            }
            Meeting* fresh = free_meetings.back();
            free_meetings.pop_back();
            fresh->name = name, fresh->where = where, fresh->mask = mask;
            fresh->first = first, fresh->size = size;
            fresh->missing = size == warp_size ? __builtin_popcount(mask) : size;
            std::fill_n(fresh->operands, size, nullptr);
            pending.push_back(fresh);
        }
        Meeting* m = pending[n];
        m->operands[me - first] = operands;
        wait_at(name, where, mask, -1, State::waiting);
        if (--m->missing == 0) {
            act(*m);
            for (int i = 0; i < size; i++)
                if (m->operands[i]) make_ready(first + i);
            progress++;
            pending[n] = pending.back(), pending.pop_back();
            free_meetings.push_back(m);
        }
        wait();
    }

    void arrive(const char* name, Site where, int id, int count, bool predicate, bool waits) {
        if (id < 0 || id >= barriers)
            fail(prefix(self), name, " of barrier ", id, ": barriers are 0 to ", barriers - 1);
        Barrier& b = barrier[id];
        if (b.arrived == 0) b = {name, where, count, 0, 0};
        if (waits) wait_at(name, where, 0, id, State::waiting);
        // At __syncthreads all must be in the same line: threads elsewhere never continue.
        const bool counts = id != 0 || (b.name == name && b.where == where);
        if (counts && b.threads != count)
            fail(prefix(self), name, " of barrier ", id, " for ", count,
                 " threads, where another thread waits for ", b.threads);
        if (counts) b.arrived++, b.predicates += predicate;
        if (counts && b.arrived == b.threads) {
            for (int i = 0; i < threads; i++) {
                Thread& t = thread[i];
                if (t.state != State::waiting || t.barrier != id) continue;
                if (id == 0 && !(t.name == name && t.where == where)) continue;
                t.result = b.predicates;
                make_ready(i);
            }
            b = {};
            progress++;
        }
        if (waits) wait();
    }

    void spin(const char* name, Site where) {
        const int me = rank(self);
        wait_at(name, where, 0, -1, State::spinning);
        spinning[me / 32] |= 1u << me % 32;
        wait();
    }

    // -- shared memory

    void* take(int n, size_t bytes) {
        if (size_t(n) < arrays.size()) {
            if (arrays[n].bytes != bytes)
                fail(prefix(self), "array ", n, " of shared memory has ", bytes,
                     " bytes in this thread and ", arrays[n].bytes,
                     " in another: all threads must declare the same arrays in the same order");
            return arena + arrays[n].offset;
        }
        const size_t begin = taken;
        if (begin + bytes > launch->shared)
            fail(prefix(self), "array ", n, " of shared memory, ", bytes, " bytes behind ", begin,
                 ", does not fit in the ", launch->shared, " bytes of the launch");
        taken = begin + (bytes + 15) / 16 * 16;
        const size_t zones = std::min(size_t(n) + 1, shared_red_zones);
        const size_t offset = begin + zones * shared_red_zone, end = offset + bytes;
        const size_t next = taken + std::min(zones + 1, shared_red_zones) * shared_red_zone;
        ASAN_UNPOISON_MEMORY_REGION(arena + end, next - end);
        std::memset(arena + end, red_zone_byte, next - end);
        ASAN_POISON_MEMORY_REGION(arena + end, next - end);
        ASAN_UNPOISON_MEMORY_REGION(arena + offset, bytes);
        std::memset(arena + offset, poison_byte, bytes);
        arrays.push_back({offset, bytes});
        return arena + offset;
    }

    void check_red_zones() {
#ifndef LNS_ASAN
        for (size_t n = 0; n < arrays.size(); n++) {
            const unsigned char* at = arena + arrays[n].offset + arrays[n].bytes;
            const unsigned char* end =
                n + 1 < arrays.size() ? arena + arrays[n + 1].offset : at + shared_red_zone;
            if (end > arena + shared_arena) end = arena + shared_arena;
            for (const unsigned char* p = at; p < end; p++)
                if (*p != red_zone_byte)
                    fail(prefix(), "something was written ", p - at,
                         " bytes after the end of array ", n, " of shared memory (",
                         arrays[n].bytes, " bytes)");
        }
#endif
    }

    // -- messages

    static std::string triple(uint3 i) { return cat("(", i.x, ", ", i.y, ", ", i.z, ")"); }

    std::string prefix(const Thread* t = nullptr) const {
        return cat("kernel ", kernel_name(launch->kernel), ", block ", triple(blockIdx),
                   t ? cat(", thread ", triple(t->index)) : "", ": ");
    }

    // "31 threads, the first (1, 0, 0), wait at __syncthreads (model.cu:12); …"
    std::string what_all_do() const {
        struct Group {
            std::string what;
            int count;
            uint3 first;
        };
        std::vector<Group> groups;
        for (int i = 0; i < threads; i++) {
            const Thread& t = thread[i];
            std::string what = "finished";
            if (t.state != State::finished) {
                what = t.name;
                if (t.mask) {
                    char lanes[32];
                    std::snprintf(lanes, sizeof lanes, " of lanes 0x%08x", t.mask);
                    what += lanes;
                }
                if (t.barrier > 0) what += cat(" of barrier ", t.barrier);
                what += cat(" (", t.where.file, ":", t.where.line, ")");
            }
            auto same = std::find_if(groups.begin(), groups.end(),
                                     [&](const Group& g) { return g.what == what; });
            if (same == groups.end())
                groups.push_back({what, 1, t.index});
            else
                same->count++;
        }
        std::string out;
        for (const Group& g : groups) {
            const bool one = g.count == 1;
            out += out.empty() ? "" : "; ";
            out += one ? cat("thread ", triple(g.first))
                       : cat(g.count, " threads, the first ", triple(g.first), ",");
            if (g.what == "finished")
                out += one ? " has finished" : " have finished";
            else
                out += cat(one ? " waits at " : " wait at ", g.what);
        }
        return out;
    }
};

thread_local Block* running = nullptr; // on this host thread

Block& block() {
    if (!running || !running->self)
        fail("the simulator was asked for a GPU's instruction outside a kernel");
    return *running;
}

} // namespace

// ---------------------------------------------------------------------------------------------

void meet(const char* name, Site where, uint32_t mask, void* operands, void (*act)(const Lanes&)) {
    Block& b = block();
    const int me = b.rank(b.self), first = me / 32 * 32;
    if (!(mask >> me % 32 & 1))
        fail_in_kernel(cat(name, ": the lane is not among those of its own mask (", where.file, ":",
                           where.line, ")"));
    b.meet(name, where, mask, first, 32, operands, [&](Meeting& m) {
        act(Lanes{m.mask, m.operands});
    });
}

void meet_warpgroup(const char* name, Site where, void* operands, void (*act)(void** operands)) {
    Block& b = block();
    const int first = b.rank(b.self) / 128 * 128;
    b.meet(name, where, 0, first, 128, operands, [&](Meeting& m) { act(m.operands); });
}

int barrier(const char* name, Site where, int id, int threads, bool predicate) {
    Block& b = block();
    b.arrive(name, where, id, threads, predicate, true);
    return b.self->result;
}
void arrive(const char* name, Site where, int id, int threads) {
    block().arrive(name, where, id, threads, false, false);
}

void wait_round(const char* name, Site where) { block().spin(name, where); }
void condition_met() { block().progress++; }

bool in_kernel() { return running && running->self; }
int thread_rank() { return block().rank(block().self); }
int block_threads() { return block().threads; }

void fail_in_kernel(const std::string& sentence) { fail(block().prefix(block().self), sentence); }

void* take_shared(int n, size_t bytes) { return block().take(n, bytes); }

bool in_shared(const void* pointer) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    return p >= block().arena && p < block().arena + shared_arena;
}
uint32_t shared_offset(const void* pointer) {
    if (!in_shared(pointer))
        fail_in_kernel(cat("the address ", pointer, " is not in this block's shared memory"));
    return uint32_t(static_cast<const unsigned char*>(pointer) - block().arena);
}
unsigned char* shared_pointer(uint32_t offset) {
    if (offset >= shared_arena)
        fail_in_kernel(cat("the shared address ", offset, " is beyond shared memory"));
    return block().arena + offset;
}

void poison(void* at, size_t bytes) { std::memset(at, poison_byte, bytes); }

void copy_later(void* shared, const void* global, int bytes, bool valid) {
    Block& b = block();
    shared_offset(shared);
    if (uintptr_t(shared) % bytes)
        fail_in_kernel(cat("cp.async to ", shared, ", which is not aligned to ", bytes, " bytes"));
    if (valid && uintptr_t(global) % bytes)
        fail_in_kernel(
            cat("cp.async from ", global, ", which is not aligned to ", bytes, " bytes"));
    if (valid && in_shared(global)) fail_in_kernel("cp.async from shared, not from global memory");
    poison(shared, size_t(bytes));
    b.self->copies.push_back({shared, global, bytes, valid});
}
void copy_commit() { block().self->groups.push_back(block().self->copies.size()); }
void copy_wait(int but_last_groups) {
    Thread& t = *block().self;
    const int arriving = int(t.groups.size()) - but_last_groups;
    if (arriving <= 0) return;
    const size_t n = t.groups[size_t(arriving - 1)];
    for (size_t i = 0; i < n; i++) {
        const Copy& c = t.copies[i];
        if (c.valid)
            std::memcpy(c.shared, c.global, size_t(c.bytes));
        else
            std::memset(c.shared, 0, size_t(c.bytes));
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + int64_t(n));
    t.groups.erase(t.groups.begin(), t.groups.begin() + arriving);
    for (size_t& end : t.groups) end -= n;
}

void* block_object(const void* key, std::shared_ptr<void> (*make)()) {
    auto& objects = block().objects;
    for (auto& [k, object] : objects)
        if (k == key) return object.get();
    objects.emplace_back(key, make());
    return objects.back().second.get();
}

void run(const Launch& launch) {
    static std::atomic<uint64_t> launches = 0;
    const uint64_t seed = current_order().seed * 0x100000001B3u + launches++;
    const int64_t blocks = int64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    std::vector<int64_t> sequence(static_cast<size_t>(blocks));
    for (int64_t i = 0; i < blocks; i++) sequence[size_t(i)] = i;
    if (current_order().direction == Direction::reversed)
        std::reverse(sequence.begin(), sequence.end());
    if (current_order().direction == Direction::shuffled) {
        RandomBits random{seed};
        for (int64_t i = blocks - 1; i > 0; i--)
            std::swap(sequence[size_t(i)], sequence[random.next() % uint64_t(i + 1)]);
    }

    std::atomic<bool> failed = false;
    std::mutex mutex;
    std::exception_ptr error;
    int64_t error_at = blocks;
    auto run_block = [&](int64_t n) {
        if (failed) return;
        static thread_local std::unique_ptr<Block> mine;
        if (!mine) mine = std::make_unique<Block>();
        running = mine.get();
        const int64_t i = sequence[size_t(n)];
        const dim3 index(unsigned(i % launch.grid.x), unsigned(i / launch.grid.x % launch.grid.y),
                         unsigned(i / (int64_t(launch.grid.x) * launch.grid.y)));
        try {
            mine->run(launch, index, seed ^ uint64_t(i) << 20);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            failed = true;
            if (n < error_at) error = std::current_exception(), error_at = n;
        }
        running = nullptr;
    };
    const int64_t small = 1024; // threads, too few to wake another host thread
    if (blocks * launch.block.x * launch.block.y * launch.block.z <= small)
        for (int64_t n = 0; n < blocks; n++) run_block(n);
    else
        parallel_for(blocks, run_block);
    if (error) std::rethrow_exception(error);
}

} // namespace lns::sim
