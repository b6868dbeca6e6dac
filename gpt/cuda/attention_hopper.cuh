// Causal attention on Hopper GPUs (H100, H200), after FlashAttention-3 (arXiv 2407.08608), but with
// gradients that do not depend on the order of blocks.
//
// A block has 3 warpgroups. The last one, the producer, copies tiles of q, k, v and dO to shared
// memory (TMA) ahead of their use. The other two, the consumers, compute 64 rows of a tile each,
// all products by wgmma: while one's products run, the other computes its exponentials.
#pragma once

// defines: AttentionShape, CosSin, Work; bf16, warp, OnlineSoftmax, quad_sum, …
#include "gpt/cuda/attention.cuh"
// defines: TensorMap, copy_box, barrier_wait, wgmma, …
#include "gpt/cuda/hopper.h"

namespace lns::cuda {
namespace hopper {

const int box_size = 64;           // rows and channels of one copy
const int block_rows = 128;        // of a block's own tiles, 64 for each consumer
const int block_threads = 3 * 128; // of a block
const int producer = 2;            // the index of that warpgroup

// A tile (rows, HS) in shared memory is HS / 64 consecutive boxes (rows, 64). The offset of channel
// c in bytes, as wgmma's descriptors count.
__device__ constexpr int channel_offset(int rows, int c) {
    return (c / box_size * box_size * rows + c % box_size) * int(sizeof(bf16));
}

// A sequence of tiles in `stages` buffers of shared memory: some arrive while earlier ones are in
// use. The producer calls copy(i); a consumer warp uses tile i from await(i) to release(i). Both
// handle all i in order. A buffer's `full` barrier ends a phase when the tile has arrived, `empty`
// when all consumers have released it.
template <int rows, int HS, int stages> struct TileRing {
    static constexpr int size = rows * HS, memory = stages * size, barriers = 2 * stages;
    bf16* tiles;
    uint64_t *full, *empty;

    // Allocates from the remaining memory.
    __device__ TileRing(bf16*& tiles_left, uint64_t*& barriers_left)
        : tiles(tiles_left), full(barriers_left), empty(barriers_left + stages) {
        tiles_left += memory, barriers_left += barriers;
    }
    // Called by one thread. `arrivals`: threads that must arrive before a tile is full.
    __device__ void init(int arrivals = 1) {
        for (int i = 0; i < stages; i++)
            barrier_init(&full[i], arrivals), barrier_init(&empty[i], 8); // consumer warps
    }
    __device__ void await_empty(int i) { barrier_wait(&empty[i % stages], i / stages - 1); }
    // Copies rows t … of a head of sequence b; rows beyond T are 0.
    __device__ void copy(int i, const TensorMap& heads, int head, int t, int b) {
        const int at = i % stages;
        await_empty(i);
        barrier_expect(&full[at], size * int(sizeof(bf16)));
#pragma unroll
        for (int c = 0; c < HS; c += box_size)
#pragma unroll
            for (int row = 0; row < rows; row += box_size)
                copy_box(tiles + at * size + c * rows + row * box_size, heads, c, head, t + row, b,
                         &full[at]);
    }
    __device__ const bf16* await(int i) {
        barrier_wait(&full[i % stages], i / stages);
        return tiles + i % stages * size;
    }
    __device__ void release(int i) {
        __syncwarp();
        if (threadIdx.x % warp == 0) barrier_arrive(&empty[i % stages]);
    }
};

// Starts s (64, N) = a bᵀ, with 64 rows of a tile of a_rows, from `a` on, and a whole tile of N
// rows; a wgmma group.
template <int HS, int a_rows, int N>
__device__ inline void start_scores(float (&s)[N / 2], const bf16* a, const bf16* b) {
    const uint64_t a_matrix = matrix(a), b_matrix = matrix(b);
    wgmma_fence(s);
#pragma unroll
    for (int c = 0; c < HS; c += 16)
        wgmma(s, advanced(a_matrix, channel_offset(a_rows, c)),
              advanced(b_matrix, channel_offset(N, c)), c > 0);
    wgmma_commit();
}

// Starts o (64, HS) += p (64, N) · b, with a tile of N rows; a wgmma group.
template <int HS, int N>
__device__ inline void start_product(float (&o)[HS / 2], uint32_t (&p)[N / 16][4], const bf16* b) {
    const uint64_t b_matrix = matrix(b, channel_offset(N, box_size));
    wgmma_fence(o, p);
#pragma unroll
    for (int row = 0; row < N; row += 16)
        wgmma_transposed(o, p[row / 16], advanced(b_matrix, row * box_size * 2), true);
    wgmma_commit();
}

// Rounds the accumulator of one product to bf16, as the first operand of another.
template <int N>
__device__ inline void pack_tile(uint32_t (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// The position of a lane's n-th accumulator in a tile: in the lane's first row or its second, 8
// further; and its column.
__device__ inline int second_row(int n) { return n / 2 % 2; }
__device__ inline int column_of(int n) { return n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2; }

// Exchanges w[i] of lane j with w[j] of lane i, of each 4 lanes.
__device__ inline void transpose_words(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = other;
    }
}

// Stores a lane's part of an accumulator (64, HS): rows t and t + 8, if below T, `stride` apart.
template <int HS>
__device__ inline void store_rows(bf16* rows, int64_t stride, const float (&o)[HS / 2], int t,
                                  int T) {
#pragma unroll
    for (int second = 0; second < 2; second++) {
#pragma unroll
        for (int c = 0; c < HS; c += 32) { // 4 lanes store 64 bytes at once
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = (c + 8 * i) / 2 + 2 * second;
                words[i] = pack_bf16(o[n], o[n + 1]);
            }
            transpose_words(words);
            if (t + 8 * second < T)
                *reinterpret_cast<uint4*>(rows + (t + 8 * second) * stride + c +
                                          threadIdx.x % 4 * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// The softmax of a lane's two rows, `sum` being this lane's share.
struct RowsSoftmax {
    OnlineSoftmax rows[2];

    // Turns the scores s into exponentials; `rescale` is the factor by which earlier sums shrink.
    template <int N> __device__ void add(float (&s)[N], float (&rescale)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            OnlineSoftmax& row = rows[r];
            float top = row.largest;
#pragma unroll
            for (int n = 2 * r; n < N; n += 4) top = fmaxf(top, fmaxf(s[n], s[n + 1]));
            rescale[r] = row.raise(quad_max(top), scale);
#pragma unroll
            for (int n = 2 * r; n < N; n += 4) {
                s[n] = row.exponential(s[n], scale);
                s[n + 1] = row.exponential(s[n + 1], scale);
                row.sum += s[n] + s[n + 1];
            }
        }
    }
};

inline int heads_in_l2_cache(const AttentionShape& a) {
    const int64_t cache = 32 << 20, each = int64_t(a.T) * a.HS * 2 * int(sizeof(bf16));
    return int(std::clamp<int64_t>(cache / each, 8, 1 << 12));
}

template <int HS> struct ForwardTiles {
    static const int keys = 128; // of a tile
    using Own = TileRing<block_rows, HS, 1>;
    using Others = TileRing<keys, HS, 2>;
    static const int memory = Own::memory + 2 * Others::memory;
    static const int barriers = Own::barriers + 2 * Others::barriers;
    static size_t shared() { return shared_bytes<bf16>(memory) + shared_bytes<uint64_t>(barriers); }
};

template <int HS>
__global__ static void __launch_bounds__(hopper_instructions ? block_threads : warp, 1)
    forward_kernel(bf16* out, float* lse, const __grid_constant__ TensorMap heads, AttentionShape a,
                   int heads_at_once) {
    if constexpr (hopper_instructions) {
        using Tiles = ForwardTiles<HS>;
        const int keys = Tiles::keys;
        SharedMemory shared;
        bf16* memory = shared.take<bf16>(Tiles::memory);
        uint64_t* barriers = shared.take<uint64_t>(Tiles::barriers);
        typename Tiles::Own q_tile(memory, barriers);
        typename Tiles::Others k_tiles(memory, barriers), v_tiles(memory, barriers);
        if (threadIdx.x == 0) {
            prefetch(heads);
            q_tile.init(), k_tiles.init(), v_tiles.init();
            barrier_init_done();
        }
        __syncthreads();

        // Persistent blocks: a block takes one tile of queries after the other, and copies the next
        // one's data ahead. Every second round is in reverse, which balances the work.
        const int rows = (a.T + block_rows - 1) / block_rows, all = a.B * a.NH * rows;
        auto work_of = [&](int round) {
            return round * int(gridDim.x) +
                   (round % 2 == 0 ? int(blockIdx.x) : int(gridDim.x) - 1 - int(blockIdx.x));
        };
        // From lane 0, so that the compiler knows it to be uniform in a warp.
        const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
        int tile = 0; // of keys, counted over all rounds

        if (warpgroup == producer) {
            release_registers<24>();
            if (threadIdx.x == producer * 128) {
#pragma unroll 1
                for (int round = 0; work_of(round) < all; round++) {
                    const Work work(work_of(round), a.B * a.NH, rows, heads_at_once);
                    const int t0 = (rows - 1 - work.tile) * block_rows, b = work.head / a.NH,
                              h = work.head % a.NH, kv = a.NH + h / (a.NH / a.KVH);
                    q_tile.copy(round, heads, h, t0, b);
#pragma unroll 1
                    for (int t = t0; t >= 0; t -= keys, tile++) {
                        k_tiles.copy(tile, heads, kv, t, b);
                        v_tiles.copy(tile, heads, kv + a.KVH, t, b);
                    }
                }
            }
        } else {
            take_registers<240>();
            const int lane = threadIdx.x % warp, row = threadIdx.x / warp * 16 + lane / 4;
            const float scale = a.scale() * log2_e;
            float o[HS / 2], s[keys / 2], rescale[2];
            uint32_t p[keys / 16][4];

            // The two consumers enqueue their products of a tile in turns, 0 first.
            auto await_turn = [&] {
                if (warpgroup == 1 || tile > 0) named_barrier_wait(1 + warpgroup, 2 * 128);
            };
            auto pass_turn = [&](bool last) {
                if (warpgroup == 0 || !last) named_barrier_arrive(2 - warpgroup, 2 * 128);
            };

#pragma unroll 1
            for (int round = 0; work_of(round) < all; round++) {
                const Work work(work_of(round), a.B * a.NH, rows, heads_at_once);
                const int t0 = (rows - 1 - work.tile) * block_rows, b = work.head / a.NH,
                          h = work.head % a.NH;
                const int t = t0 + row; // this lane's rows: t and t + 8
                const bool last = work_of(round + 1) >= all;
                RowsSoftmax softmax;

                // From the queries' own keys, which need the causal mask, back to the first.
                const bf16* const q = q_tile.await(round) + warpgroup * 64 * box_size;
                const bf16* k = k_tiles.await(tile);
                await_turn();
                start_scores<HS, block_rows, keys>(s, q, k);
                pass_turn(last && t0 == 0);
#pragma unroll
                for (int n = 0; n < HS / 2; n++) o[n] = 0;
                wgmma_wait<0>(s);
                k_tiles.release(tile++);
                if (t0 == 0) q_tile.release(round);
#pragma unroll
                for (int n = 0; n < keys / 2; n++)
                    if (column_of(n) > row + 8 * second_row(n)) s[n] = -INFINITY;
                softmax.add(s, rescale, scale);
                pack_tile<keys>(p, s);

                // The next tile's scores overlap with this one's product with v.
#pragma unroll 1
                for (int to_go = t0 / keys; to_go > 0; to_go--, tile++) {
                    k = k_tiles.await(tile);
                    await_turn();
                    start_scores<HS, block_rows, keys>(s, q, k);
                    start_product<HS, keys>(o, p, v_tiles.await(tile - 1));
                    pass_turn(last && to_go == 1);
                    wgmma_wait<1>(s);
                    k_tiles.release(tile);
                    if (to_go == 1) q_tile.release(round);
                    softmax.add(s, rescale, scale);
                    wgmma_wait<0>(o);
                    v_tiles.release(tile - 1);
#pragma unroll
                    for (int n = 0; n < HS / 2; n++) o[n] *= rescale[second_row(n)];
                    pack_tile<keys>(p, s);
                }
                start_product<HS, keys>(o, p, v_tiles.await(tile - 1));
                const float sum[2] = {quad_sum(softmax.rows[0].sum), quad_sum(softmax.rows[1].sum)};
                const float inverse[2] = {1 / sum[0], 1 / sum[1]};
                wgmma_wait<0>(o);
                v_tiles.release(tile - 1);

#pragma unroll
                for (int n = 0; n < HS / 2; n++) o[n] *= inverse[second_row(n)];
                store_rows<HS>(out + int64_t(b) * a.T * a.q_width() + h * HS, a.q_width(), o, t,
                               a.T);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (lane % 4 == 0 && t + 8 * r < a.T)
                        lse[int64_t(work.head) * a.T + t + 8 * r] =
                            softmax.rows[r].log_sum(sum[r], scale);
            }
        }
    }
}

// The heads of an array (B, T, heads, HS).
inline TensorMap heads_map(const bf16* array, int heads, const AttentionShape& a) {
    const uint64_t head = a.HS * sizeof(bf16), row = head * heads;
    return tensor_map(array, {uint64_t(a.HS), uint64_t(heads), uint64_t(a.T), uint64_t(a.B)},
                      {head, row, row * a.T}, {box_size, 1, box_size, 1});
}

inline int multiprocessors() {
    int device = 0, count = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

template <int HS>
bool launch_forward(bf16* out, float* lse, const bf16* qkv, const AttentionShape& a,
                    cudaStream_t stream) {
    if (!has_hopper_code(forward_kernel<HS>)) return false;
    const int work = a.B * a.NH * blocks_for(a.T, block_rows);
    launch(forward_kernel<HS>, std::min(work, multiprocessors()), block_threads,
           ForwardTiles<HS>::shared(), stream, out, lse, heads_map(qkv, a.NH + 2 * a.KVH, a), a,
           heads_in_l2_cache(a));
    return true;
}

// The backward pass is two kernels with the same tiles: own tiles of 128 rows, which stay, and two
// rings of 64 rows. One owns queries (q and dO) and loops over keys (k and v), the other owns keys
// and loops over queries. Each recomputes the scores and their gradient.
template <int HS> struct BackwardTiles {
    static const int others = 64, stages = 3;
    using Own = TileRing<block_rows, HS, 1>;
    using Others = TileRing<others, HS, stages>;
    static const int memory = 2 * Own::memory + 2 * Others::memory;
    static const int barriers = 2 * Own::barriers + 2 * Others::barriers;
    static size_t shared() {
        return shared_bytes<bf16>(memory) + shared_bytes<uint64_t>(barriers) +
               2 * shared_bytes<float>(stages * others); // the queries' lse and delta
    }
};

// delta (B, NH, T) = dO · O of each row and head; HS / 8 threads each.
template <int HS>
__global__ static void output_dot_kernel(float* delta, const bf16* dout, const bf16* out,
                                         AttentionShape a) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, at = i / (HS / 8);
    const bool inside = at < a.rows() * a.NH;
    float sum = 0;
    if (inside) {
        float x[8], y[8];
        load8(x, dout + i * 8), load8(y, out + i * 8);
#pragma unroll
        for (int c = 0; c < 8; c++) sum += x[c] * y[c];
    }
    sum = warp_sum<HS / 8>(sum);
    if (inside && i % (HS / 8) == 0) {
        const int64_t row = at / a.NH;
        delta[(row / a.T * a.NH + at % a.NH) * a.T + row % a.T] = sum;
    }
}

// Applies the inverse rotation to a lane's part of (64, HS), rows t and t + 8. A lane has both
// channels of each pair.
template <int HS>
__device__ inline void rotate_back(float (&d)[HS / 2], const CosSin* table, int t, int T) {
#pragma unroll
    for (int n = 0; n < HS / 4; n++) {
        const int row = t + 8 * second_row(n);
        if (row >= T) continue;
        const CosSin turn = table[int64_t(row) * (HS / 2) + column_of(n)];
        const float x = d[n], y = d[n + HS / 4];
        d[n] = x * turn.cos + y * turn.sin;
        d[n + HS / 4] = y * turn.cos - x * turn.sin;
    }
}

// dQ of 128 queries: dS = P ⊙ (dO Vᵀ − delta), dQ = dS K · scale.
template <int HS>
__global__ static void __launch_bounds__(hopper_instructions ? block_threads : warp, 1)
    dq_kernel(bf16* dqkv, const float* lse, const float* delta, const CosSin* table,
              const __grid_constant__ TensorMap heads, const __grid_constant__ TensorMap dout_heads,
              AttentionShape a, int heads_at_once) {
    if constexpr (hopper_instructions) {
        using Tiles = BackwardTiles<HS>;
        const int keys = Tiles::others;
        SharedMemory shared;
        bf16* memory = shared.take<bf16>(Tiles::memory);
        uint64_t* barriers = shared.take<uint64_t>(Tiles::barriers);
        typename Tiles::Own q_tile(memory, barriers), dout_tile(memory, barriers);
        typename Tiles::Others k_tiles(memory, barriers), v_tiles(memory, barriers);
        if (threadIdx.x == 0) {
            prefetch(heads), prefetch(dout_heads);
            q_tile.init(), dout_tile.init(), k_tiles.init(), v_tiles.init();
            barrier_init_done();
        }
        __syncthreads();

        const int rows = (a.T + block_rows - 1) / block_rows;
        const Work work(blockIdx.x, a.B * a.NH, rows, heads_at_once);
        const int t0 = (rows - 1 - work.tile) * block_rows;
        const int b = work.head / a.NH, h = work.head % a.NH, kv = h / (a.NH / a.KVH);
        const int tiles = t0 / keys + block_rows / keys; // of keys, from the last to the first
        const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);

        if (warpgroup == producer) {
            release_registers<24>();
            if (threadIdx.x == producer * 128) {
                q_tile.copy(0, heads, h, t0, b);
                dout_tile.copy(0, dout_heads, h, t0, b);
#pragma unroll 1
                for (int i = 0; i < tiles; i++) {
                    k_tiles.copy(i, heads, a.NH + kv, (tiles - 1 - i) * keys, b);
                    v_tiles.copy(i, heads, a.NH + a.KVH + kv, (tiles - 1 - i) * keys, b);
                }
            }
        } else {
            take_registers<240>();
            const int t = t0 + threadIdx.x / warp * 16 + threadIdx.x % warp / 4; // and t + 8
            const float scale = a.scale() * log2_e;
            const float *lses = lse + (int64_t(b) * a.NH + h) * a.T,
                        *deltas = delta + (int64_t(b) * a.NH + h) * a.T;
            float my_lse[2], my_delta[2];
            for (int r = 0; r < 2; r++) {
                const bool inside = t + 8 * r < a.T;
                my_lse[r] = inside ? lses[t + 8 * r] * log2_e : 0;
                my_delta[r] = inside ? deltas[t + 8 * r] : 0;
            }
            float dq[HS / 2] = {}, s[keys / 2], ds[keys / 2];
            uint32_t packed[keys / 16][4];

            const bf16* const q = q_tile.await(0) + warpgroup * 64 * box_size;
            const bf16* const dout = dout_tile.await(0) + warpgroup * 64 * box_size;
            // All of the first tile's keys are masked for consumer 0.
            const int begin = 1 - warpgroup;
            for (int i = 0; i < begin; i++) {
                k_tiles.await(i), k_tiles.release(i);
                v_tiles.await(i), v_tiles.release(i);
            }
#pragma unroll 1
            for (int i = begin; i < tiles; i++) {
                const bf16* k = k_tiles.await(i);
                start_scores<HS, block_rows, keys>(s, q, k);
                start_scores<HS, block_rows, keys>(ds, dout, v_tiles.await(i));
                wgmma_wait<1>(s);
                if (i > begin) k_tiles.release(i - 1);
                if (i == begin) {
#pragma unroll
                    for (int n = 0; n < keys / 2; n++)
                        if ((tiles - 1 - i) * keys + column_of(n) > t + 8 * second_row(n))
                            s[n] = -INFINITY;
                }
#pragma unroll
                for (int n = 0; n < keys / 2; n++)
                    s[n] = fast_exp2(scale * s[n] - my_lse[second_row(n)]);
                wgmma_wait<0>(ds);
                v_tiles.release(i);
#pragma unroll
                for (int n = 0; n < keys / 2; n++) s[n] *= ds[n] - my_delta[second_row(n)];
                pack_tile<keys>(packed, s);
                start_product<HS, keys>(dq, packed, k);
            }
            wgmma_wait<0>(dq);

#pragma unroll
            for (int n = 0; n < HS / 2; n++) dq[n] *= a.scale();
            if (table) rotate_back<HS>(dq, table, t, a.T);
            store_rows<HS>(dqkv + int64_t(b) * a.T * a.row() + h * HS, a.row(), dq, t, a.T);
        }
    }
}

// dK and dV of 128 keys, from all queries of all heads that share them: dV = Pᵀ dO, dK = dSᵀ Q ·
// scale. Scores are transposed here: a row is a key, so Pᵀ and dSᵀ are operands as they are.
template <int HS>
__global__ static void __launch_bounds__(hopper_instructions ? block_threads : warp, 1)
    dkv_kernel(bf16* dqkv, const float* lse, const float* delta, const CosSin* table,
               const __grid_constant__ TensorMap heads,
               const __grid_constant__ TensorMap dout_heads, AttentionShape a, int heads_at_once) {
    if constexpr (hopper_instructions) {
        using Tiles = BackwardTiles<HS>;
        const int queries = Tiles::others;
        SharedMemory shared;
        bf16* memory = shared.take<bf16>(Tiles::memory);
        uint64_t* barriers = shared.take<uint64_t>(Tiles::barriers);
        float* const lses = shared.take<float>(Tiles::stages * queries);
        float* const deltas = shared.take<float>(Tiles::stages * queries);
        typename Tiles::Own k_tile(memory, barriers), v_tile(memory, barriers);
        typename Tiles::Others q_tiles(memory, barriers), dout_tiles(memory, barriers);
        if (threadIdx.x == 0) {
            prefetch(heads), prefetch(dout_heads);
            k_tile.init(), v_tile.init(), dout_tiles.init();
            q_tiles.init(1 + warp); // a producer warp writes lse and delta
            barrier_init_done();
        }
        __syncthreads();

        const int rows = (a.T + block_rows - 1) / block_rows;
        const Work work(blockIdx.x, a.B * a.KVH, rows, heads_at_once);
        const int t0 = work.tile * block_rows; // the first keys have the most work
        const int b = work.head / a.KVH, kv = work.head % a.KVH, group = a.NH / a.KVH;
        const int first = t0 / queries,
                  each = (a.T + queries - 1) / queries - first; // tiles of a head
        const int tiles = group * each;
        const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);

        if (warpgroup == producer) {
            release_registers<24>();
            if (threadIdx.x == producer * 128) {
                k_tile.copy(0, heads, a.NH + kv, t0, b);
                v_tile.copy(0, heads, a.NH + a.KVH + kv, t0, b);
#pragma unroll 1
                for (int i = 0; i < tiles; i++) {
                    const int h = kv * group + i / each, t = (first + i % each) * queries;
                    q_tiles.copy(i, heads, h, t, b);
                    dout_tiles.copy(i, dout_heads, h, t, b);
                }
            } else if (threadIdx.x / warp == producer * 4 + 1) {
#pragma unroll 1
                for (int i = 0; i < tiles; i++) {
                    const int h = kv * group + i / each, at = i % Tiles::stages;
                    q_tiles.await_empty(i);
                    for (int n = threadIdx.x % warp; n < queries; n += warp) {
                        const int t = (first + i % each) * queries + n;
                        const int64_t from = (int64_t(b) * a.NH + h) * a.T + t;
                        // Probabilities beyond the last query are 0.
                        lses[at * queries + n] = t < a.T ? lse[from] * log2_e : INFINITY;
                        deltas[at * queries + n] = t < a.T ? delta[from] : 0;
                    }
                    barrier_arrive(&q_tiles.full[at]);
                }
            }
        } else {
            take_registers<240>();
            const int t = t0 + threadIdx.x / warp * 16 + threadIdx.x % warp / 4; // and t + 8
            const float scale = a.scale() * log2_e;
            float dk[HS / 2] = {}, dv[HS / 2] = {}, s[queries / 2], ds[queries / 2];
            uint32_t p_packed[queries / 16][4], ds_packed[queries / 16][4];

            const bf16* const k = k_tile.await(0) + warpgroup * 64 * box_size;
            const bf16* const v = v_tile.await(0) + warpgroup * 64 * box_size;
            int in_use = -1; // the tile whose products may still be running
            auto release = [&](int i) {
                if (i >= 0) q_tiles.release(i), dout_tiles.release(i);
            };
            int column = 0; // i % each
#pragma unroll 1
            for (int i = 0; i < tiles; i++, column = column + 1 < each ? column + 1 : 0) {
                const bf16* q = q_tiles.await(i);
                const bf16* dout = dout_tiles.await(i);
                if (column < warpgroup) { // all masked for consumer 1
                    release(i);
                    continue;
                }
                start_scores<HS, block_rows, queries>(s, k, q);
                start_scores<HS, block_rows, queries>(ds, v, dout);
                wgmma_wait<1>(s);
                release(in_use);
                in_use = i;

                const float* my_lse = lses + i % Tiles::stages * queries;
                const float* my_delta = deltas + i % Tiles::stages * queries;
                if (column == warpgroup) {
#pragma unroll
                    for (int n = 0; n < queries / 2; n++)
                        if ((first + column) * queries + column_of(n) < t + 8 * second_row(n))
                            s[n] = -INFINITY;
                }
#pragma unroll
                for (int n = 0; n < queries / 2; n++)
                    s[n] = fast_exp2(scale * s[n] - my_lse[column_of(n)]);
                pack_tile<queries>(p_packed, s);
                start_product<HS, queries>(dv, p_packed, dout);
                wgmma_wait<1>(ds);
#pragma unroll
                for (int n = 0; n < queries / 2; n++) s[n] *= ds[n] - my_delta[column_of(n)];
                pack_tile<queries>(ds_packed, s);
                start_product<HS, queries>(dk, ds_packed, q);
                wgmma_wait<1>(dv); // to reuse its operand's registers
            }
            wgmma_wait<0>(dk);

#pragma unroll
            for (int n = 0; n < HS / 2; n++) dk[n] *= a.scale();
            if (table) rotate_back<HS>(dk, table, t, a.T);
            bf16* const to = dqkv + int64_t(b) * a.T * a.row() + (a.NH + kv) * HS;
            store_rows<HS>(to, a.row(), dk, t, a.T);
            store_rows<HS>(to + a.KVH * HS, a.row(), dv, t, a.T);
        }
    }
}

template <int HS>
bool launch_backward(bf16* dqkv, const bf16* dout, const bf16* out, const bf16* qkv,
                     const float* lse, const CosSin* table, float* delta, const AttentionShape& a,
                     cudaStream_t stream) {
    if (!has_hopper_code(dkv_kernel<HS>)) return false;
    launch(output_dot_kernel<HS>, blocks_for(a.rows() * a.q_width(), 8 * 256), 256, 0, stream,
           delta, dout, out, a);
    const TensorMap heads = heads_map(qkv, a.NH + 2 * a.KVH, a),
                    dout_heads = heads_map(dout, a.NH, a);
    const int rows = blocks_for(a.T, block_rows), heads_at_once = heads_in_l2_cache(a);
    const size_t shared = BackwardTiles<HS>::shared();
    launch(dkv_kernel<HS>, a.B * a.KVH * rows, block_threads, shared, stream, dqkv, lse, delta,
           table, heads, dout_heads, a, heads_at_once);
    launch(dq_kernel<HS>, a.B * a.NH * rows, block_threads, shared, stream, dqkv, lse, delta, table,
           heads, dout_heads, a, heads_at_once);
    return true;
}

} // namespace hopper

// As attention_forward of train_gpt.cu. Returns false, and does nothing, if this GPU or shape is
// not supported: heads have 64 or 128 channels, positions start at 0, and there is no window.
inline bool hopper_attention_forward(bf16* out, float* lse, const bf16* qkv,
                                     const AttentionShape& a, cudaStream_t stream) {
    if (a.first != 0 || a.branches.branch || a.window) return false;
    if (a.HS == 64) return hopper::launch_forward<64>(out, lse, qkv, a, stream);
    if (a.HS == 128) return hopper::launch_forward<128>(out, lse, qkv, a, stream);
    return false;
}

// As attention_backward of train_gpt.cu. Supports what the forward pass does, if rotated heads have
// no padding.
inline bool hopper_attention_backward(bf16* dqkv, const bf16* dout, const bf16* out,
                                      const bf16* qkv, const float* lse, const CosSin* table,
                                      float* delta, const AttentionShape& a, cudaStream_t stream) {
    if (a.first != 0 || a.window || (table && a.channels != a.HS)) return false;
    if (a.HS == 64)
        return hopper::launch_backward<64>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
    if (a.HS == 128)
        return hopper::launch_backward<128>(dqkv, dout, out, qkv, lse, table, delta, a, stream);
    return false;
}

} // namespace lns::cuda
