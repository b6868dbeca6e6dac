// Arrays in memory, and sums whose order does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lns {

// The accumulator of a scalar.
template <class S> using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Zeroed memory, aligned to a cache line; large arrays lie in huge pages where Linux has them.
template <class S> struct Array {
    Array() = default;
    explicit Array(int64_t n) : size(n) {
        if (n == 0) return;
        const size_t page = size_t(2) << 20, line = 64;
        const size_t alignment = size_t(n) * sizeof(S) < 8 * page ? line : page;
        const size_t bytes = (size_t(n) * sizeof(S) + line - 1) / line * line;
        data.reset(static_cast<S*>(
            std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
        if (!data) throw std::bad_alloc();
#ifdef __linux__
        if (alignment == page) madvise(data.get(), bytes, MADV_HUGEPAGE);
#endif
        std::memset(static_cast<void*>(data.get()), 0, bytes);
    }
    operator S*() const { return data.get(); }
    S* begin() const { return data.get(); }
    S* end() const { return data.get() + size; }

    struct Free {
        void operator()(S* p) const { std::free(p); }
    };
    std::unique_ptr<S, Free> data;
    int64_t size = 0;
};

// A buffer of the calling thread; it grows as needed.
template <class S> S* thread_scratch(int64_t n) {
    static thread_local std::vector<S> buffer;
    if (int64_t(buffer.size()) < n) buffer.resize(n);
    return buffer.data();
}

// A thread's scratch as several arrays, each aligned to a cache line.
struct ScratchArrays {
    char* next;

    explicit ScratchArrays(int64_t bytes) {
        next = thread_scratch<char>(bytes + 64);
        next += 64 - reinterpret_cast<uintptr_t>(next) % 64;
    }
    template <class X> static int64_t bytes(int64_t n) {
        return (n * int64_t(sizeof(X)) + 63) / 64 * 64;
    }
    template <class X> X* take(int64_t n) {
        X* taken = reinterpret_cast<X*>(next);
        next += bytes<X>(n);
        return taken;
    }
};

// Σ f(i) over i < n, in 32 lanes. (`omp simd reduction` adds its lanes one by one at the end, which
// takes longer than a short row.) A lane adds at most 32 numbers before it joins the total: one
// long sum in float made Σ eˣ over 50,000 tokens 7e-6 too low.
template <class A, class F> inline double sum_of(int64_t n, const F& f) {
    const int lanes = 32, most = 32;
    double total = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = std::min<int64_t>(n, i + lanes * most);
        A sums[lanes] = {};
        for (; i + lanes <= end; i += lanes)
#pragma omp simd
            for (int j = 0; j < lanes; j++) sums[j] += f(i + j);
        for (; i < end; i++) sums[i % lanes] += f(i);
        for (int half = lanes / 2; half > 0; half /= 2)
            for (int j = 0; j < half; j++) sums[j] += sums[j + half];
        total += sums[0];
    }
    return total;
}

template <class A> double sum_of_squares(const A* x, int64_t size) {
    const int64_t block = 1 << 12, blocks = (size + block - 1) / block;
    std::vector<double> sums(blocks);
#pragma omp parallel for
    for (int64_t i = 0; i < blocks; i++) {
        sums[i] = sum_of<A>(std::min(block, size - i * block),
                            [y = x + i * block](int64_t j) { return y[j] * y[j]; });
    }
    double sum = 0;
    for (double s : sums) sum += s;
    return sum;
}

template <class A> inline A largest_of(int64_t n, const A* x) {
    A largest = x[0];
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// A sum over rows adds the sums of parts of at most this many rows, in order: its rounding error
// grows with the rows of a part, not with all rows.
const int64_t part_rows = 256;

// The parts of a sum over rows that all threads share; enough of them for small batches too.
inline int64_t row_chunks(int64_t rows) {
    return std::max(std::min<int64_t>(rows, 32), (rows + part_rows - 1) / part_rows);
}

// out[i] += Σ row(r)[i] over r < rows, for i < n ≤ N.
template <int N, class A, class Row>
inline void add_rows(A* out, int n, int64_t rows, const Row& row) {
    A sum[N] = {};
    for (int64_t r = 0; r < rows;) {
        A part[N] = {};
        for (const int64_t end = std::min(rows, r + part_rows); r < end; r++) {
            const auto* x = row(r);
            for (int i = 0; i < n; i++) part[i] += A(x[i]);
        }
        for (int i = 0; i < n; i++) sum[i] += part[i];
    }
    for (int i = 0; i < n; i++) out[i] += sum[i];
}

} // namespace lns
