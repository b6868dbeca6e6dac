// Attention on Hopper GPUs (H100, H200), after FlashAttention-3 (arXiv 2407.08608). train_gpt.cu
// includes it behind AttentionShape.
//
// A block has 3 warpgroups. One copies tiles of q, k and v to shared memory (TMA), a ring of them
// ahead of their use. Two compute, 64 queries each, all products by wgmma: while one's products run
// the other computes its exponentials (ping-pong), and each has its next scores computed while it
// works on these.

const int hopper_tile = 128;        // queries of a block, and keys at once
const int hopper_box = 64;          // channels that a copy brings: a swizzled row of 128 bytes
const int hopper_threads = 3 * 128; // two warpgroups compute, the last one copies
const int hopper_stages = 2;        // tiles of k, and of v, in shared memory
const int hopper_few = 24, hopper_many = 240; // registers of a copying and a computing thread

// Which tile a ring's turn `i` uses, and how often that has been used before.
__device__ inline int hopper_stage(int i) { return i % hopper_stages; }
__device__ inline int hopper_phase(int i) { return i / hopper_stages; }

// Tiles (hopper_tile, HS) in shared memory: HS / 64 boxes behind each other. Copies one: the rows
// from t on of this head of sequence b.
template <int HS>
__device__ inline void copy_tile(bf16* tile, const TensorMap& heads, int head, int t, int b,
                                 uint64_t* arrived) {
    barrier_expect(arrived, hopper_tile * HS * int(sizeof(bf16)));
#pragma unroll
    for (int c = 0; c < HS; c += hopper_box)
        copy_box(tile + c * hopper_tile, heads, c, head, t, b, arrived);
}

// s (64, 128) = q kᵀ of 64 rows of a tile and a whole one, a group.
template <int HS> __device__ inline void scores_tile(float (&s)[64], const bf16* q, const bf16* k) {
    const uint64_t q_matrix = matrix(q), k_matrix = matrix(k);
    wgmma_fence(s);
#pragma unroll
    for (int c = 0; c < HS; c += 16) {
        const int bytes = (c / hopper_box * hopper_box * hopper_tile + c % hopper_box) * 2;
        wgmma(s, advanced(q_matrix, bytes), advanced(k_matrix, bytes), c > 0);
    }
    wgmma_commit();
}

// o (64, HS) += p (64, 128) · v, a group.
template <int HS>
__device__ inline void add_values(float (&o)[HS / 2], uint32_t (&p)[8][4], const bf16* v) {
    const uint64_t v_matrix = matrix(v, hopper_box * hopper_tile * int(sizeof(bf16)));
    wgmma_fence(o, p);
#pragma unroll
    for (int i = 0; i < 8; i++) // 16 keys
        wgmma_transposed(o, p[i], advanced(v_matrix, i * 16 * hopper_box * 2), true);
    wgmma_commit();
}

// The sums of a product (64, 128) as the first operand of the next, in bf16.
__device__ inline void pack_tile(uint32_t (&p)[8][4], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// Of the 4 lanes that share a row.
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// The softmax of a lane's two rows, over the tiles so far: the largest score, and this lane's part
// of the sum of 2^(scale · (score − largest)).
struct OnlineSoftmax {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    // s becomes 2^(scale · (s − largest)); `shrink` is by what all that came before it must be
    // multiplied since the largest has grown.
    __device__ void add(float (&s)[64], float (&shrink)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = largest[r];
#pragma unroll
            for (int n = 2 * r; n < 64; n += 4) top = fmaxf(top, fmaxf(s[n], s[n + 1]));
            top = row_max(top);
            shrink[r] = fast_exp2(scale * (largest[r] - top));
            largest[r] = top, sum[r] *= shrink[r];
#pragma unroll
            for (int n = 2 * r; n < 64; n += 4) {
                s[n] = fast_exp2(scale * s[n] - scale * top);
                s[n + 1] = fast_exp2(scale * s[n + 1] - scale * top);
                sum[r] += s[n] + s[n + 1];
            }
        }
    }
};

// Words w of 4 lanes become rows: what lane j has in w[i], lane i has in w[j] afterwards.
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

template <int HS>
__global__ static void __launch_bounds__(hopper_instructions ? hopper_threads : warp, 1)
    hopper_attention_forward_kernel(bf16* out, float* lse, const __grid_constant__ TensorMap heads,
                                    AttentionShape a) {
    if constexpr (hopper_instructions) {
        const int size = hopper_tile * HS;
        SharedMemory shared;
        bf16* const q = shared.take<bf16>((1 + 2 * hopper_stages) * size);
        bf16 *const k = q + size, *const v = k + hopper_stages * size;
        uint64_t* const barriers = shared.take<uint64_t>(1 + 4 * hopper_stages);
        uint64_t *const q_there = barriers, *const k_there = q_there + 1,
                        *const v_there = k_there + hopper_stages,
                        *const k_free = v_there + hopper_stages,
                        *const v_free = k_free + hopper_stages;
        if (threadIdx.x == 0) {
            barrier_init(q_there, 1);
            for (int i = 0; i < hopper_stages; i++) {
                barrier_init(&k_there[i], 1), barrier_init(&v_there[i], 1);
                barrier_init(&k_free[i], 8), barrier_init(&v_free[i], 8); // computing warps
            }
            barrier_init_done();
        }
        __syncthreads();

        // The last queries have most to do: their blocks come first.
        const int t0 = (gridDim.y - 1 - blockIdx.y) * hopper_tile;
        const int b = blockIdx.x / a.NH, h = blockIdx.x % a.NH, kv = h / (a.NH / a.KVH);
        const int tiles = t0 / hopper_tile + 1; // of keys, from the queries' own back to the first
        // From lane 0, so that the compiler sees that it is the same in all of a warp.
        const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);

        if (warpgroup == 2) {
            release_registers<hopper_few>();
            if (threadIdx.x == 2 * 128) {
                copy_tile<HS>(q, heads, h, t0, b, q_there);
                for (int i = 0; i < tiles; i++) {
                    const int at = hopper_stage(i), t = t0 - i * hopper_tile;
                    barrier_wait(&k_free[at], hopper_phase(i) - 1);
                    copy_tile<HS>(k + at * size, heads, a.NH + kv, t, b, &k_there[at]);
                    barrier_wait(&v_free[at], hopper_phase(i) - 1);
                    copy_tile<HS>(v + at * size, heads, a.NH + a.KVH + kv, t, b, &v_there[at]);
                }
            }
        } else {
            take_registers<hopper_many>();
            const int lane = threadIdx.x % warp;
            const int row = t0 + threadIdx.x / warp * 16 + lane / 4; // and row + 8
            const bf16* const my_q = q + warpgroup * 64 * hopper_box;
            const float scale = a.scale() * 1.44269504f; // for powers of 2

            float o[HS / 2] = {}, s[64];
            uint32_t p[8][4];
            OnlineSoftmax softmax;
            float shrink[2];

            // Products of the two warpgroups are enqueued in turns, first 0's.
            auto await_turn = [&](int i) {
                if (warpgroup == 1 || i > 0) named_barrier_wait(1 + warpgroup, 2 * 128);
            };
            auto pass_turn = [&](int i) {
                if (warpgroup == 0 || i < tiles - 1) named_barrier_arrive(2 - warpgroup, 2 * 128);
            };
            auto release = [&](uint64_t* barrier) {
                if (lane == 0) barrier_arrive(barrier);
            };

            barrier_wait(q_there, 0);
            barrier_wait(&k_there[0], 0);
            await_turn(0);
            scores_tile<HS>(s, my_q, k);
            pass_turn(0);
            wgmma_wait<0>(s);
            release(&k_free[0]);
#pragma unroll
            for (int n = 0; n < 64; n++) { // this tile alone has keys behind its queries
                const int key = t0 + n / 4 * 8 + lane % 4 * 2 + n % 2;
                if (key > row + (n / 2 % 2) * 8) s[n] = -INFINITY;
            }
            softmax.add(s, shrink, scale);
            pack_tile(p, s);

            for (int i = 1; i < tiles; i++) {
                const int at = hopper_stage(i), before = hopper_stage(i - 1);
                barrier_wait(&k_there[at], hopper_phase(i));
                await_turn(i);
                scores_tile<HS>(s, my_q, k + at * size);
                barrier_wait(&v_there[before], hopper_phase(i - 1));
                add_values<HS>(o, p, v + before * size);
                pass_turn(i);
                wgmma_wait<1>(s);
                release(&k_free[at]);
                softmax.add(s, shrink, scale);
                wgmma_wait<0>(o);
                release(&v_free[before]);
#pragma unroll
                for (int n = 0; n < HS / 2; n++) o[n] *= shrink[n / 2 % 2];
                pack_tile(p, s);
            }
            const int last = hopper_stage(tiles - 1);
            barrier_wait(&v_there[last], hopper_phase(tiles - 1));
            add_values<HS>(o, p, v + last * size);
            wgmma_wait<0>(o);

#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int t = row + 8 * r;
                const float sum = row_sum(softmax.sum[r]), inverse = 1.0f / sum;
                bf16* to = out + (int64_t(b) * a.T + t) * a.q_width() + h * HS;
#pragma unroll
                for (int n = 0; n < HS; n += 32) { // 4 lanes store 64 bytes at once
                    uint32_t words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* pair = &o[(n + 8 * i) / 2 + 2 * r];
                        words[i] = pack_bf16(pair[0] * inverse, pair[1] * inverse);
                    }
                    transpose_words(words);
                    if (t < a.T)
                        *reinterpret_cast<uint4*>(to + n + lane % 4 * 8) =
                            make_uint4(words[0], words[1], words[2], words[3]);
                }
                if (lane % 4 == 0 && t < a.T)
                    lse[(int64_t(b) * a.NH + h) * a.T + t] =
                        (scale * softmax.largest[r] + fast_log2(sum)) * 0.693147181f;
            }
        }
    }
}

// Whether this GPU has Hopper's instructions and this build has code with them.
template <class Kernel> bool has_hopper_code(Kernel* kernel) {
    int device = 0, major = 0, minor = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0) return false;
    cudaFuncAttributes code; // of other architectures it allows one warp only
    CUDA(cudaFuncGetAttributes(&code, kernel));
    return code.maxThreadsPerBlock >= hopper_threads;
}

// Heads of an array (B, T, heads, HS), for copies of tiles.
inline TensorMap heads_map(const bf16* array, int heads, const AttentionShape& a) {
    const uint64_t row = uint64_t(heads) * a.HS * sizeof(bf16);
    return tensor_map(array, {uint64_t(a.HS), uint64_t(heads), uint64_t(a.T), uint64_t(a.B)},
                      {a.HS * sizeof(bf16), row, row * a.T}, {hopper_box, 1, hopper_tile, 1});
}

template <int HS>
bool hopper_forward(bf16* out, float* lse, const bf16* qkv, const AttentionShape& a,
                    cudaStream_t stream) {
    auto* const kernel = hopper_attention_forward_kernel<HS>;
    if (!has_hopper_code(kernel)) return false;
    const size_t shared = shared_bytes<bf16>((1 + 2 * hopper_stages) * hopper_tile * HS) +
                          shared_bytes<uint64_t>(1 + 4 * hopper_stages);
    const dim3 grid(a.B * a.NH, blocks_for(a.T, hopper_tile));
    launch(kernel, grid, hopper_threads, shared, stream, out, lse,
           heads_map(qkv, a.NH + 2 * a.KVH, a), a);
    return true;
}

// As attention_forward; false, and nothing done, where it is not for this GPU or shape: heads of 64
// or 128 channels, from position 0 on.
inline bool hopper_attention_forward(bf16* out, float* lse, const bf16* qkv,
                                     const AttentionShape& a, cudaStream_t stream) {
    if (a.first != 0) return false;
    if (a.HS == 64) return hopper_forward<64>(out, lse, qkv, a, stream);
    if (a.HS == 128) return hopper_forward<128>(out, lse, qkv, a, stream);
    return false;
}
