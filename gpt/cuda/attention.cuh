// Causal attention by mma.sync, on Ampere GPUs and newer: FlashAttention-2 (arXiv 2307.08691). A
// block of 4 warps owns one tile of queries (in the backward pass also one of keys) and loops over
// the tiles of keys (queries) that it attends to. Shared memory holds two of those: one to compute
// with while the other is being copied. Scores exist a tile at a time, in registers.
#pragma once

#include <cmath>

// defines: bf16, warp, load8, store8, warp_sum, quad_sum, quad_max, OnlineSoftmax
#include "gpt/cuda/kernel.cuh"
#include "gpt/model/model.h" // defines: Branches

namespace lns::cuda {

// A row of qkv is NH heads of q, KVH of k, KVH of v; NH / KVH heads of q share one of k and v (GQA,
// arXiv 2305.13245).
struct AttentionShape {
    int B, T, NH, KVH, HS;
    int channels;  // of a head without padding; HS or a few less
    int first = 0; // the first position to compute: k and v before it are valid; 0 unless B is 1
    Branches branches = {};       // on the GPU
    int window = 0;               // a query sees so many keys, its own and those before it; 0: all
    int q_norms = 0, k_norms = 0; // RMSNorms, each of an equal part of q or k: 1 or their heads
    int v_norms = 0;              // of v's heads; 0 unless those of q and k are normed
    __host__ __device__ bool heads_normed() const { return q_norms == NH && k_norms == KVH; }
    // The heads that are normed or rotated: q's, k's and, with norms, v's.
    __host__ __device__ int prepared_heads() const { return NH + KVH + v_norms; }
    __host__ __device__ int prepared_width() const { return prepared_heads() * HS; }
    __host__ __device__ int64_t rows() const { return int64_t(B) * T; }
    __host__ __device__ int q_width() const { return NH * HS; }
    __host__ __device__ int kv_width() const { return KVH * HS; }
    __host__ __device__ int row() const { return (NH + 2 * KVH) * HS; }
    __device__ int64_t position(int64_t row) const {
        return branches.position ? branches.position[row] : row % T;
    }
    __host__ __device__ float scale() const { return 1.0f / sqrtf(float(channels)); }
    // Of an unbranched sequence: the first key that query t sees, and the end of the queries that
    // see key t.
    __device__ int window_begin(int t) const { return window ? max(0, t - window + 1) : 0; }
    __device__ int window_end(int t) const { return window ? min(T, t + window) : T; }
};

// cos and sin of position · θ^(−2i/channels), for rotary positions.
struct CosSin {
    float cos, sin;
};

const int attention_warps = 4, attention_threads = attention_warps * warp;

// Rows of D elements in shared memory, in chunks of 16 bytes. ldmatrix reads the same chunk of 8
// rows at once; to keep those in different banks, the chunks of a bf16 row are permuted by its
// index, and rows of float are padded.
template <class S, int D> struct Tile {
    static constexpr int per_chunk = 16 / sizeof(S);
    static constexpr int stride = sizeof(S) == 2 ? D : D + per_chunk;
    static __host__ __device__ constexpr int size(int rows) { return rows * stride; }

    S* at;

    __device__ S* chunk(int row, int c) const {
        const int permuted = sizeof(S) == 2 ? (c & ~7) | ((c ^ row) & 7) : c;
        return at + row * stride + permuted * per_chunk;
    }
    __device__ Tile from_row(int row) const { return {at + row * stride}; } // a multiple of 8

    // Starts to copy ROWS rows from global memory; those from `rows` on, and columns from
    // `columns` on, are zeroed.
    template <int ROWS>
    __device__ void load(const S* from, int from_stride, int rows, int columns) const {
        const int chunks = D / per_chunk, rows_at_once = attention_threads / chunks;
        static_assert(ROWS % rows_at_once == 0 && (rows_at_once % 8 == 0 || sizeof(S) > 2));
        const int first = threadIdx.x / chunks, c = threadIdx.x % chunks;
        const S* mine = from + first * from_stride + c * per_chunk;
        if (c * per_chunk >= columns) rows = 0;
#pragma unroll
        for (int row = 0; row < ROWS; row += rows_at_once)
            copy_async(from_row(row).chunk(first, c), mine + row * from_stride, first + row < rows);
    }
};

// Allocates tiles in a block's shared memory.
template <class S> struct TileMemory {
    S* at;
    template <int D> __device__ Tile<S, D> take(int rows) {
        const Tile<S, D> tile = {at};
        at += Tile<S, D>::size(rows);
        return tile;
    }
};

// 16·M rows of N floats, a warp's accumulator, distributed over its lanes' registers as by mma.
template <int M, int N> struct Accumulator {
    float x[M][N / 8][4];

    static __device__ int row(int m, int e) { return 16 * m + e / 2 * 8 + threadIdx.x % warp / 4; }
    static __device__ int column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }
};

template <int M, int N> __device__ inline void scale_by(Accumulator<M, N>& acc, float factor) {
#pragma unroll
    for (int i = 0; i < M * N / 2; i++) acc.x[i / 4 / (N / 8)][i / 4 % (N / 8)][i % 4] *= factor;
}

// The left operand of a matmul: rows of a tile from `row` on, read as they are needed, …
template <class S, int D> struct TileRows {
    static constexpr int columns = D;
    Tile<S, D> tile;
    int row;

    __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
        const int lane = threadIdx.x % warp;
        ldmatrix(a, tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16));
    }
};
// … or 16·M rows of bf16 in registers, in mma's layout.
template <int M, int K> struct Fragments {
    static constexpr int columns = K;
    uint32_t x[M][K / 16][4];

    __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = x[m][k][i];
    }
};

template <bool IN_REGISTERS, int M, class S, int D>
__device__ inline auto left_operand(Tile<S, D> tile, int row) {
    const TileRows<S, D> rows = {tile, row};
    if constexpr (IN_REGISTERS) {
        Fragments<M, D> fragments;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < D / 16; k++) rows.fragment(fragments.x[m][k], m, k);
        return fragments;
    } else {
        return rows;
    }
}

// An accumulator, rounded to bf16: two adjacent groups of 8 columns form a fragment of 16. In float
// it is stored to `scratch`, a tile of the warp's own.
template <int M, int N>
__device__ inline Fragments<M, N> left_operand(const Accumulator<M, N>& acc, Tile<bf16, N>) {
    Fragments<M, N> rounded;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = acc.x[m][2 * k + i / 2] + i % 2 * 2;
                rounded.x[m][k][i] = pack_bf16(pair[0], pair[1]);
            }
    return rounded;
}
template <int M, int N>
__device__ inline TileRows<float, N> left_operand(const Accumulator<M, N>& acc,
                                                  Tile<float, N> scratch) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                scratch.at[acc.row(m, e) * scratch.stride + acc.column(n, e)] = acc.x[m][n][e];
    __syncwarp();
    return {scratch, 0};
}

// acc += left · rightᵀ, with N rows of right.
template <int M, int N, class Left, int D>
__device__ inline void matmul_transposed(Accumulator<M, N>& acc, const Left& left,
                                         Tile<bf16, D> right) {
    const int lane = threadIdx.x % warp;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.fragment(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4]; // 16 rows, 16 columns
            ldmatrix(b, right.chunk(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(acc.x[m][n], a[m], b[0], b[1]);
                mma(acc.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
template <int M, int N, int D>
__device__ inline void matmul_transposed(Accumulator<M, N>& acc, const TileRows<float, D>& left,
                                         Tile<float, D> right) {
    const int stride = right.stride;
    for (int k = 0; k < D; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc.x[m][n][e] += left.tile.at[(left.row + acc.row(m, e)) * stride + k] *
                                      right.at[acc.column(n, e) * stride + k];
}

// acc += left · right, which has a row for each column of left.
template <int M, int N, class Left>
__device__ inline void matmul(Accumulator<M, N>& acc, const Left& left, Tile<bf16, N> right) {
    const int lane = threadIdx.x % warp;
#pragma unroll
    for (int k = 0; k < Left::columns / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.fragment(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4]; // 16 rows, 16 columns
            ldmatrix_transposed(b, right.chunk(16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(acc.x[m][n], a[m], b[0], b[1]);
                mma(acc.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
template <int M, int N, int K>
__device__ inline void matmul(Accumulator<M, N>& acc, const TileRows<float, K>& left,
                              Tile<float, N> right) {
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc.x[m][n][e] +=
                        left.tile.at[(left.row + acc.row(m, e)) * left.tile.stride + k] *
                        right.at[k * right.stride + acc.column(n, e)];
}

// Each warp's floats of shared memory through which `store` passes 16 rows at a time, padded to
// avoid bank conflicts.
template <int D> const int store_stride = D + 8;
template <int D> const int store_size = attention_warps * 16 * store_stride<D>;

// Stores the first `rows` rows, `columns` of each. With a table, which begins at the first row's
// position, applies the inverse rotation to channels i and i + channels/2.
template <class S, int M, int D>
__device__ inline void store(S* to, int64_t stride, int rows, int columns,
                             const Accumulator<M, D>& acc, float* staging,
                             const CosSin* table = nullptr, int channels = 0) {
    const int half = channels / 2, chunks = D / 8;
    float* own = staging + threadIdx.x / warp * 16 * store_stride<D>;
#pragma unroll
    for (int m = 0; m < M; m++) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<float2*>(own + acc.row(0, e) * store_stride<D> +
                                           acc.column(n, e)) =
                    make_float2(acc.x[m][n][e], acc.x[m][n][e + 1]);
        __syncwarp();
        for (int i = threadIdx.x % warp; i < 16 * chunks; i += warp) {
            const int row = 16 * m + i / chunks, column = i % chunks * 8;
            if (row >= rows || column >= columns) continue;
            const float* from = own + i / chunks * store_stride<D>;
            float x[8];
            load8(x, from + column);
            for (int j = 0; j < 8 && table; j++) {
                const int channel = column + j;
                if (channel >= channels) break;
                const bool first = channel < half;
                const CosSin turn = table[int64_t(row) * half + (first ? channel : channel - half)];
                x[j] = x[j] * turn.cos +
                       (first ? from[channel + half] : -from[channel - half]) * turn.sin;
            }
            store8(to + row * stride + column, x);
        }
    }
}

// Tile sizes: a warp owns 16·M rows and loops over STEP others at a time; whether its own rows stay
// in registers (in the backward pass keys and values never do). Chosen so that nothing spills and
// at least two blocks fit on a multiprocessor.
template <class S, int D> struct AttentionTiles { // float
    static constexpr int step = D == 64 ? 32 : 8;
    static constexpr int forward_m = 1, forward_step = step, dq_m = 1, dq_step = step, dkv_m = 1,
                         dkv_step = step;
    static constexpr bool forward_in_registers = false, dq_in_registers = false;
};
template <> struct AttentionTiles<bf16, 64> {
    static constexpr int forward_m = 2, forward_step = 64, dq_m = 2, dq_step = 32, dkv_m = 2,
                         dkv_step = 32;
    static constexpr bool forward_in_registers = true, dq_in_registers = true;
};
template <> struct AttentionTiles<bf16, 128> {
    static constexpr int forward_m = 2, forward_step = 32, dq_m = 1, dq_step = 32, dkv_m = 1,
                         dkv_step = 32;
    static constexpr bool forward_in_registers = false, dq_in_registers = true;
};

// The n-th piece of work in the order in which blocks start: a tile of a head. The tiles of
// heads_at_once heads come together, so that what they share stays in the L2 cache; among them the
// tiles with the most work, whose index is lowest, come first.
struct Work {
    int head, tile; // head: b · heads + h

    __device__ Work(int n, int heads, int tiles, int heads_at_once) {
        const int begin = n / (heads_at_once * tiles) * heads_at_once; // the first of these heads
        const int count = min(heads_at_once, heads - begin), rest = n - begin * tiles;
        head = begin + rest % count, tile = rest / count;
    }
};
// bytes_each: what all blocks of a head read.
inline int heads_in_cache(int heads, int64_t bytes_each) {
    return int(std::clamp<int64_t>((int64_t(16) << 20) / bytes_each, 1, heads));
}

// Elements of a block's shared memory: tiles of `rows` rows in all, reused to store the result, and
// each warp's scratch (empty in bf16).
template <class S, int D> __host__ __device__ constexpr int attention_tiles(int rows) {
    const int to_store = store_size<D> * int(sizeof(float) / sizeof(S));
    return Tile<S, D>::size(rows) > to_store ? Tile<S, D>::size(rows) : to_store;
}
template <class S, int M, int STEP>
constexpr int attention_scratch = sizeof(S) == 2 ? 0
                                                 : Tile<S, STEP>::size(16 * M) * attention_warps;
template <int M, class S, int STEP> __device__ inline Tile<S, STEP> own_scratch(S* scratch) {
    return {scratch + attention_scratch<S, M, STEP> / attention_warps * (threadIdx.x / warp)};
}

// The softmax of 16·M rows. Its reference is a recent maximum, raised once a score exceeds it by a
// factor of 2⁸: that is rare, and the result is exact all the same.
template <int M> struct TileSoftmax {
    OnlineSoftmax rows[M][2];

    // Turns the scores s into exponentials; o: the output accumulated so far.
    template <int N, int D>
    __device__ void step(Accumulator<M, N>& s, Accumulator<M, D>& o, float c) {
        float largest[M][2];
        bool outgrown = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = -INFINITY;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
                    x = fmaxf(x, fmaxf(s.x[m][n][2 * i], s.x[m][n][2 * i + 1]));
                largest[m][i] = quad_max(x);
                outgrown |= c * (largest[m][i] - rows[m][i].largest) > 8;
            }
        if (__any_sync(0xFFFFFFFFu, outgrown)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    OnlineSoftmax& row = rows[m][i];
                    const float factor = row.raise(fmaxf(row.largest, largest[m][i]), c);
#pragma unroll
                    for (int n = 0; n < D / 8; n++)
                        o.x[m][n][2 * i] *= factor, o.x[m][n][2 * i + 1] *= factor;
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    OnlineSoftmax& row = rows[m][e / 2];
                    s.x[m][n][e] = row.exponential(s.x[m][n][e], c);
                    row.sum += s.x[m][n][e];
                }
    }

    // Divides o by the denominators, and stores their logarithms to lse, which begins at the warp's
    // first row.
    template <int D> __device__ void finish(Accumulator<M, D>& o, float* lse, int count, float c) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float sum = quad_sum(rows[m][i].sum);
                const int row = o.row(m, 2 * i);
                if (threadIdx.x % 4 == 0 && row < count) lse[row] = rows[m][i].log_sum(sum, c);
                const float inverse = 1.0f / sum;
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    o.x[m][n][2 * i] *= inverse, o.x[m][n][2 * i + 1] *= inverse;
            }
    }
};

// The score of a key that a query does not see, although one after it may. It is finite, for a
// whole tile may be hidden: what it adds to the softmax is then rescaled to 0.
const float hidden_score = -1e6f;

// Gives `score` to the keys (rows or columns) that are hidden(query − key) positions before the
// query.
template <bool keys_are_rows, int M, int N, class Hidden>
__device__ inline void mask(Accumulator<M, N>& s, int first_row, int first_column, float score,
                            const Hidden& hidden) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = first_row + s.row(m, e), column = first_column + s.column(n, e);
                if (hidden(keys_are_rows ? column - row : row - column)) s.x[m][n][e] = score;
            }
}
// Those after the query.
template <bool keys_are_rows, int M, int N>
__device__ inline void causal_mask(Accumulator<M, N>& s, int first_row, int first_column) {
    mask<keys_are_rows>(s, first_row, first_column, -INFINITY,
                        [](int before) { return before < 0; });
}
// Those before its window.
template <bool keys_are_rows, int M, int N>
__device__ inline void window_mask(Accumulator<M, N>& s, int first_row, int first_column,
                                   int window) {
    mask<keys_are_rows>(s, first_row, first_column, hidden_score,
                        [=](int before) { return before >= window; });
}

// Hides the keys, the columns, of other branches and before the window from queries of sequence b,
// the rows.
template <int M, int N>
__device__ inline void branch_mask(Accumulator<M, N>& s, int b, int first_row, int first_column,
                                   const AttentionShape& a) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = first_row + s.row(m, 2 * i);
            if (t >= a.T) continue;
            const int own = a.branches.branch[int64_t(b) * a.T + t];
            const int others = t - a.branches.position[int64_t(b) * a.T + t], begin = own - others;
            const int window = a.window_begin(t), first = window < own ? window - others : window;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    const int column = first_column + s.column(n, e);
                    if ((column >= begin && column < own) || column < first)
                        s.x[m][n][e] = hidden_score;
                }
        }
}

template <class S, int D, int M, int STEP, bool IN_REGISTERS>
__global__ static void __launch_bounds__(attention_threads)
    attention_forward_kernel(S* out, float* lse, const S* qkv, AttentionShape a,
                             int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* tiles_memory = shared.take<S>(attention_tiles<S, D>(ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    TileMemory<S> memory = {tiles_memory};
    const auto q_tile = memory.template take<D>(ROWS);
    const auto k_tiles = memory.template take<D>(2 * STEP);
    const auto v_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T - a.first + ROWS - 1) / ROWS;
    const Work work(blockIdx.x, a.B * a.NH, tiles, heads_at_once);
    const int b = work.head / a.NH, h = work.head % a.NH, kv = h / (a.NH / a.KVH);
    const S* rows = qkv + int64_t(b * a.T) * a.row();
    const S* keys = rows + (a.NH + kv) * a.HS;
    const int t0 = a.first + (tiles - 1 - work.tile) * ROWS, key_end = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    auto load = [&](int key, int buffer) {
        const S* row = keys + int64_t(key) * a.row();
        k_tiles.from_row(buffer).template load<STEP>(row, a.row(), a.T - key, a.HS);
        v_tiles.from_row(buffer).template load<STEP>(row + a.kv_width(), a.row(), a.T - key, a.HS);
        copy_async_commit();
    };
    q_tile.template load<ROWS>(rows + int64_t(t0) * a.row() + h * a.HS, a.row(), a.T - t0, a.HS);
    copy_async_commit();
    const int key_begin = a.branches.branch ? 0 : a.window_begin(t0) / STEP * STEP;
    load(key_begin, 0);
    copy_async_wait<1>();
    __syncthreads();
    const auto q = left_operand<IN_REGISTERS, M>(q_tile, warp_row);

    const float c = a.scale() * log2_e;
    Accumulator<M, D> o = {};
    TileSoftmax<M> softmax;
    for (int key = key_begin, buffer = 0; key < key_end; key += STEP, buffer ^= STEP) {
        copy_async_wait<0>();
        __syncthreads(); // the tile has arrived, and nobody reads the previous one any more
        if (key + STEP < key_end) load(key + STEP, buffer ^ STEP);
        if (t >= a.T || key >= t + 16 * M) continue; // all masked
        const auto k = k_tiles.from_row(buffer);
        const auto v = v_tiles.from_row(buffer);
        Accumulator<M, STEP> s = {};
        matmul_transposed(s, q, k);
        if (key + STEP > t + 1) causal_mask<false>(s, t, key);
        if (a.branches.branch)
            branch_mask(s, b, t, key, a);
        else if (key < a.window_begin(t + 16 * M - 1))
            window_mask<false>(s, t, key, a.window);
        softmax.step(s, o, c);
        matmul(o, left_operand(s, own_scratch<M, S, STEP>(scratch)), v);
    }
    softmax.finish(o, lse + int64_t(b * a.NH + h) * a.T + t, a.T - t, c);
    __syncthreads();
    store(out + int64_t(b * a.T + t) * a.q_width() + h * a.HS, a.q_width(), a.T - t, a.HS, o,
          reinterpret_cast<float*>(tiles_memory));
}

template <class S, int D>
void launch_mma_forward(S* out, float* lse, const S* qkv, const AttentionShape& a,
                        cudaStream_t stream) {
    using Tiles = AttentionTiles<S, D>;
    const int M = Tiles::forward_m, STEP = Tiles::forward_step;
    const int ROWS = attention_warps * 16 * M, group = a.NH / a.KVH, heads = a.B * a.NH;
    const size_t shared = shared_bytes<S>(attention_tiles<S, D>(ROWS + 4 * STEP)) +
                          shared_bytes<S>(attention_scratch<S, M, STEP>);
    launch(attention_forward_kernel<S, D, M, STEP, Tiles::forward_in_registers>,
           blocks_for(a.T - a.first, ROWS) * heads, attention_threads, shared, stream, out, lse,
           qkv, a, heads_in_cache(heads, 2 * int64_t(sizeof(S)) * a.T * a.HS / group));
}
// Stores dO · O of a warp's 16·M rows to shared memory.
template <int M, int D, class S>
__device__ inline void output_dot(float* dots, const S* dout, const S* out, int64_t stride,
                                  int rows, int columns) {
    const int lanes = D / 8, lane = threadIdx.x % warp; // `lanes` of a row
#pragma unroll
    for (int i = 0; i < 16 * M; i += warp / lanes) {
        const int row = i + lane / lanes, column = lane % lanes * 8;
        float sum = 0;
        if (row < rows && column < columns) {
            float x[8], dx[8];
            load8(x, out + row * stride + column);
            load8(dx, dout + row * stride + column);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += x[j] * dx[j];
        }
        sum = warp_sum<lanes>(sum);
        if (column == 0) dots[row] = sum;
    }
}

template <class S, int D, int M, int STEP, bool IN_REGISTERS>
__global__ static void __launch_bounds__(attention_threads)
    attention_dq_kernel(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                        const CosSin* table, float* delta, AttentionShape a, int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* tiles_memory = shared.take<S>(attention_tiles<S, D>(2 * ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    float* dots = shared.take<float>(ROWS);
    TileMemory<S> memory = {tiles_memory};
    const auto q_tile = memory.template take<D>(ROWS), do_tile = memory.template take<D>(ROWS);
    const auto k_tiles = memory.template take<D>(2 * STEP);
    const auto v_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T + ROWS - 1) / ROWS;
    const Work work(blockIdx.x, a.B * a.NH, tiles, heads_at_once);
    const int b = work.head / a.NH, h = work.head % a.NH, kv = h / (a.NH / a.KVH);
    const S* rows = qkv + int64_t(b * a.T) * a.row();
    const S* keys = rows + (a.NH + kv) * a.HS;
    const int t0 = (tiles - 1 - work.tile) * ROWS, key_end = min(t0 + ROWS, a.T);
    const int warp_row = threadIdx.x / warp * 16 * M, t = t0 + warp_row; // the warp's first row
    const int64_t at = int64_t(work.head) * a.T;                         // in lse and delta
    const int64_t o_at = int64_t(b) * a.T * a.q_width() + h * a.HS;      // in out and dout
    auto load = [&](int key, int buffer) {
        const S* row = keys + int64_t(key) * a.row();
        k_tiles.from_row(buffer).template load<STEP>(row, a.row(), a.T - key, a.HS);
        v_tiles.from_row(buffer).template load<STEP>(row + a.kv_width(), a.row(), a.T - key, a.HS);
        copy_async_commit();
    };
    q_tile.template load<ROWS>(rows + int64_t(t0) * a.row() + h * a.HS, a.row(), a.T - t0, a.HS);
    do_tile.template load<ROWS>(dout + o_at + int64_t(t0) * a.q_width(), a.q_width(), a.T - t0,
                                a.HS);
    copy_async_commit();
    const int key_begin = a.window_begin(t0) / STEP * STEP;
    load(key_begin, 0);
    output_dot<M, D>(dots + warp_row, dout + o_at + int64_t(t) * a.q_width(),
                     out + o_at + int64_t(t) * a.q_width(), a.q_width(), a.T - t, a.HS);
    copy_async_wait<1>();
    __syncthreads();
    const auto q = left_operand<IN_REGISTERS, M>(q_tile, warp_row);
    const auto dO = left_operand<IN_REGISTERS, M>(do_tile, warp_row);

    const float c = a.scale() * log2_e;
    Accumulator<M, D> dq = {};
    float row_lse[M][2], dot[M][2], sum[M][2]; // lse in base 2, dO · O, the sum over a row of dS
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = dq.row(i / 2, i % 2 * 2);
        row_lse[i / 2][i % 2] = t + row < a.T ? log2_e * lse[at + t + row] : INFINITY;
        dot[i / 2][i % 2] = dots[warp_row + row], sum[i / 2][i % 2] = 0;
    }
    for (int key = key_begin, buffer = 0; key < key_end; key += STEP, buffer ^= STEP) {
        copy_async_wait<0>();
        __syncthreads();
        if (key + STEP < key_end) load(key + STEP, buffer ^ STEP);
        if (t >= a.T || key >= t + 16 * M) continue;
        const auto k = k_tiles.from_row(buffer);
        const auto v = v_tiles.from_row(buffer);
        Accumulator<M, STEP> s = {}, ds = {};
        matmul_transposed(s, q, k);
        matmul_transposed(ds, dO, v); // dP, which becomes dS below
        if (key + STEP > t + 1) causal_mask<false>(s, t, key);
        if (key < a.window_begin(t + 16 * M - 1)) window_mask<false>(s, t, key, a.window);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float p = fast_exp2(c * s.x[m][n][e] - row_lse[m][e / 2]);
                    ds.x[m][n][e] = p * (ds.x[m][n][e] - dot[m][e / 2]);
                    sum[m][e / 2] += ds.x[m][n][e];
                }
        matmul(dq, left_operand(ds, own_scratch<M, S, STEP>(scratch)), k);
    }
    // A row of dS adds up to 0; what it adds up to here is the rounding error of dO · O.
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = dq.row(i / 2, i % 2 * 2);
        const float exact = dot[i / 2][i % 2] + quad_sum(sum[i / 2][i % 2]);
        if (threadIdx.x % 4 == 0 && t + row < a.T) delta[at + t + row] = exact;
    }
    __syncthreads();
    scale_by(dq, a.scale());
    store(dqkv + int64_t(b * a.T + t) * a.row() + h * a.HS, a.row(), a.T - t, a.HS, dq,
          reinterpret_cast<float*>(tiles_memory),
          table ? table + int64_t(t) * (a.channels / 2) : table, a.channels);
}

// The same transposed: a block owns a tile of keys, and loops over the queries that attend to them.
template <class S, int D, int M, int STEP>
__global__ static void __launch_bounds__(attention_threads)
    attention_dkv_kernel(S* dqkv, const S* dout, const S* qkv, const float* lse,
                         const CosSin* table, const float* delta, AttentionShape a,
                         int heads_at_once) {
    const int ROWS = attention_warps * 16 * M;
    SharedMemory shared;
    S* tiles_memory = shared.take<S>(attention_tiles<S, D>(2 * ROWS + 4 * STEP));
    S* scratch = shared.take<S>(attention_scratch<S, M, STEP>);
    float* lses = shared.take<float>(2 * STEP);
    float* dots = shared.take<float>(2 * STEP);
    TileMemory<S> memory = {tiles_memory};
    const auto k_tile = memory.template take<D>(ROWS), v_tile = memory.template take<D>(ROWS);
    const auto q_tiles = memory.template take<D>(2 * STEP);
    const auto do_tiles = memory.template take<D>(2 * STEP);

    const int tiles = (a.T + ROWS - 1) / ROWS, group = a.NH / a.KVH;
    const Work work(blockIdx.x, a.B * a.KVH, tiles, heads_at_once);
    const int b = work.head / a.KVH, kv = work.head % a.KVH;
    const int key0 = work.tile * ROWS;
    const int warp_row = threadIdx.x / warp * 16 * M, key = key0 + warp_row;
    int next_h = kv * group, next_t = key0; // the tile of queries to copy next
    const int query_end = a.window_end(key0 + ROWS - 1);
    auto load = [&](int buffer) {
        const int64_t row = b * a.T + next_t;
        const S* q = qkv + row * a.row() + next_h * a.HS;
        const S* dO = dout + row * a.q_width() + next_h * a.HS;
        q_tiles.from_row(buffer).template load<STEP>(q, a.row(), a.T - next_t, a.HS);
        do_tiles.from_row(buffer).template load<STEP>(dO, a.q_width(), a.T - next_t, a.HS);
        const int t = next_t + threadIdx.x;
        const int64_t at = int64_t(b * a.NH + next_h) * a.T + t;
        if (threadIdx.x < STEP) { // zeros beyond T, as in q and dO
            copy_async<sizeof(float)>(lses + buffer + threadIdx.x, lse + at, t < a.T);
            copy_async<sizeof(float)>(dots + buffer + threadIdx.x, delta + at, t < a.T);
        }
        copy_async_commit();
    };
    const S* kv_rows = qkv + int64_t(b * a.T + key0) * a.row() + (a.NH + kv) * a.HS;
    k_tile.template load<ROWS>(kv_rows, a.row(), a.T - key0, a.HS);
    v_tile.template load<ROWS>(kv_rows + a.kv_width(), a.row(), a.T - key0, a.HS);
    copy_async_commit();
    load(0);
    copy_async_wait<1>();
    __syncthreads();
    const auto k = left_operand<false, M>(k_tile, warp_row);
    const auto v = left_operand<false, M>(v_tile, warp_row);

    const float c = a.scale() * log2_e;
    Accumulator<M, D> dk = {}, dv = {};
    bool more = true;
    for (int buffer = 0; more; buffer ^= STEP) {
        const int t = next_t;
        copy_async_wait<0>();
        __syncthreads();
        next_t += STEP;
        if (next_t >= query_end) next_t = key0, next_h++;
        more = next_h < (kv + 1) * group;
        if (more) load(buffer ^ STEP);
        if (key >= a.T || t + STEP <= key) continue; // all masked
        const auto q = q_tiles.from_row(buffer), dO = do_tiles.from_row(buffer);
        Accumulator<M, STEP> p = {},
                             ds = {}; // (keys, queries); scores and dP until they are P and dS
        matmul_transposed(p, k, q);
        matmul_transposed(ds, v, dO);
        if (t + 1 < key + 16 * M) causal_mask<true>(p, key, t);
        if (a.window && t + STEP > key + a.window) window_mask<true>(p, key, t, a.window);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int query = p.column(n, e);
                    float& x = p.x[m][n][e];
                    x = fast_exp2(c * x - log2_e * lses[buffer + query]);
                    ds.x[m][n][e] = x * (ds.x[m][n][e] - dots[buffer + query]);
                }
        const auto own = own_scratch<M, S, STEP>(scratch);
        matmul(dv, left_operand(p, own), dO);
        matmul(dk, left_operand(ds, own), q);
    }
    __syncthreads();
    scale_by(dk, a.scale());
    S* drows = dqkv + int64_t(b * a.T + key) * a.row() + (a.NH + kv) * a.HS;
    store(drows, a.row(), a.T - key, a.HS, dk, reinterpret_cast<float*>(tiles_memory),
          table ? table + int64_t(key) * (a.channels / 2) : table, a.channels);
    store(drows + a.kv_width(), a.row(), a.T - key, a.HS, dv,
          reinterpret_cast<float*>(tiles_memory));
}

template <class S, int D>
void launch_mma_backward(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                         const CosSin* table, float* delta, const AttentionShape& a,
                         cudaStream_t stream) {
    using Tiles = AttentionTiles<S, D>;
    const int group = a.NH / a.KVH;
    const int64_t head_bytes = 2 * int64_t(sizeof(S)) * a.T * a.HS; // k and v, or q and dout
    {
        const int M = Tiles::dq_m, STEP = Tiles::dq_step, ROWS = attention_warps * 16 * M;
        const int heads = a.B * a.NH;
        const size_t shared = shared_bytes<S>(attention_tiles<S, D>(2 * ROWS + 4 * STEP)) +
                              shared_bytes<S>(attention_scratch<S, M, STEP>) +
                              shared_bytes<float>(ROWS);
        launch(attention_dq_kernel<S, D, M, STEP, Tiles::dq_in_registers>,
               blocks_for(a.T, ROWS) * heads, attention_threads, shared, stream, dqkv, dout, out,
               qkv, lse, table, delta, a, heads_in_cache(heads, head_bytes / group));
    }
    {
        const int M = Tiles::dkv_m, STEP = Tiles::dkv_step, ROWS = attention_warps * 16 * M;
        const int heads = a.B * a.KVH;
        const size_t shared = shared_bytes<S>(attention_tiles<S, D>(2 * ROWS + 4 * STEP)) +
                              shared_bytes<S>(attention_scratch<S, M, STEP>) +
                              2 * shared_bytes<float>(2 * STEP);
        launch(attention_dkv_kernel<S, D, M, STEP>, blocks_for(a.T, ROWS) * heads,
               attention_threads, shared, stream, dqkv, dout, qkv, lse, table, delta, a,
               heads_in_cache(heads, head_bytes * group));
    }
}

inline void check_head_size(const AttentionShape& a) {
    if (a.HS > 128)
        fail("attention on a GPU has heads of at most 128 channels, this model's have " +
             std::to_string(a.channels) + ": train it with more heads, or with --device cpu");
}

// As attention_forward and attention_backward of train_gpt.cu.
template <class S>
void mma_attention_forward(S* out, float* lse, const S* qkv, const AttentionShape& a,
                           cudaStream_t stream) {
    check_head_size(a);
    if (a.HS <= 64)
        launch_mma_forward<S, 64>(out, lse, qkv, a, stream);
    else
        launch_mma_forward<S, 128>(out, lse, qkv, a, stream);
}
template <class S>
void mma_attention_backward(S* dqkv, const S* dout, const S* out, const S* qkv, const float* lse,
                            const CosSin* table, float* delta, const AttentionShape& a,
                            cudaStream_t stream) {
    check_head_size(a);
    if (a.HS <= 64)
        launch_mma_backward<S, 64>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
    else
        launch_mma_backward<S, 128>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
}

} // namespace lns::cuda
