// Attention residuals on a GPU: what sublayers read is a softmax over the embedding and all
// branches before (SourceShape in gpt/model/mixing.h has the equations). train_gpt.cu includes this
// after the junction, whose rows these kernels share.
#pragma once

#include <algorithm>
#include <cstdint>

// defines: SourceShape
#include "gpt/model/mixing.h"

namespace lns::cuda {

// Of junction k ≥ 1. Arrays are (rows, C).
template <class S> struct SourceArguments {
    SourceShape shape;
    RowShape row_shape;
    int k;
    int64_t rows;
    float eps; // of the keys' norm
    const float* embedded;
    const S* branches;   // that of sublayer 1; the others follow,
    int64_t stride;      // so many elements from one to the next
    const S* query;      // w (C)
    const S* key_weight; // of the keys' norm, (C); null: 1
    float* h;            // written by the forward pass
};

// What its backward pass adds to those.
template <class S, class G> struct SourceGradients {
    const float* dh;
    float* dsources; // gradients of the sources; written if this is the last junction, or added to
    int64_t stride;  // from one to the next
    bool last;
    S* db;                 // of branch k
    G *query, *key_weight; // added to, unless null
    float* scratch;        // sources_scratch
};

template <int N, class S>
__device__ void load_source(const SourceArguments<S>& a, int i, int64_t at, float (&v)[N][8],
                            const RowPart<N>& part) {
    if (i == 0) return part.load(v, a.embedded + at);
    for (int k = a.shape.begin(i); k <= a.shape.end(i, a.k); k++) {
        float b[N][8];
        part.load(b, a.branches + (k - 1) * a.stride + at);
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int c = 0; c < 8; c++)
                v[n][c] = k == a.shape.begin(i) ? b[n][c] : v[n][c] + b[n][c];
    }
}

// w ⊙ the keys' weight
template <int N, class S>
__device__ void load_query(const SourceArguments<S>& a, float (&query)[N][8],
                           const RowPart<N>& part) {
    part.load(query, a.query);
    if (!a.key_weight) return;
    float weight[N][8];
    part.load(weight, a.key_weight);
#pragma unroll
    for (int n = 0; n < N; n++)
        for (int c = 0; c < 8; c++) query[n][c] *= weight[n][c];
}

template <int N>
__device__ float row_dot(const float (&x)[N][8], const float (&y)[N][8], RowPart<N>& part) {
    float dot = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
        for (int c = 0; c < 8; c++) dot += x[n][c] * y[n][c];
    return part.sum(dot);
}

template <class S, int N>
__global__ static __launch_bounds__(256) void sources_forward_kernel(SourceArguments<S> a) {
    SharedMemory shared;
    RowPart<N> part{a.shape.C, a.row_shape.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= a.rows) return; // the same for all threads of a row
    const int64_t at = row * part.C;
    float query[N][8], h[N][8] = {}, largest = -INFINITY, sum = 0;
    load_query(a, query, part);
    for (int i = 0; i < a.shape.count(a.k); i++) {
        float v[N][8];
        load_source(a, i, at, v, part);
        const float rstd = rsqrtf(row_dot(v, v, part) / float(part.C) + a.eps);
        const float score = row_dot(v, query, part) * rstd;
        const float next = fmaxf(largest, score);
        const float kept = __expf(largest - next), added = __expf(score - next);
        largest = next, sum = kept * sum + added;
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int c = 0; c < 8; c++) h[n][c] = kept * h[n][c] + added * v[n][c];
    }
#pragma unroll
    for (int n = 0; n < N; n++)
        for (int c = 0; c < 8; c++) h[n][c] /= sum;
    part.store(a.h + at, h);
}

template <class S> void sources_forward(const SourceArguments<S>& a, cudaStream_t stream) {
    const RowShape& shape = a.row_shape;
    const int block_rows = shape.warps == 1 ? 4 : 1;
    with_vectors(shape, [&](auto N) {
        launch(sources_forward_kernel<S, decltype(N)::value>, blocks_for(a.rows, block_rows),
               warp * shape.warps * block_rows, shared_bytes<float>(16), stream, a);
    });
}

// Each block loops over rows and accumulates Σ ds_i v_i / rms(v_i) (C) of all of them, from which
// both parameters' gradients follow.
template <class S, class G, int N>
__global__ static __launch_bounds__(256) void sources_backward_kernel(
    const __grid_constant__ SourceArguments<S> a, const __grid_constant__ SourceGradients<S, G> d) {
    const int C = a.shape.C, count = a.shape.count(a.k), row_threads = warp * a.row_shape.warps;
    const int groups = blockDim.x / row_threads, group = threadIdx.x / row_threads; // of a row
    SharedMemory shared;
    RowPart<N> part{C, a.row_shape.warps, shared.take<float>(16)};
    float* all_sums = shared.take<float>(groups * C);
    float* rstd = shared.take<float>(3 * groups * count) + 3 * group * count;
    float *score = rstd + count, *dweight = score + count; // of the row's sources
    float* sums = all_sums + group * C;
    for (int i = threadIdx.x; i < groups * C; i += blockDim.x) all_sums[i] = 0;
    __syncthreads();
    auto sync_row = [&] { part.warps == 1 ? __syncwarp() : __syncthreads(); };
    float query[N][8];
    load_query(a, query, part);

    for (int64_t row0 = int64_t(blockIdx.x) * groups; row0 < a.rows;
         row0 += int64_t(gridDim.x) * groups) {
        const int64_t row = row0 + group, at = row * C;
        if (row >= a.rows) break; // a group of one warp: groups of several are alone in a block
        float dh[N][8];
        part.load(dh, d.dh + at);
        for (int i = 0; i < count; i++) {
            float v[N][8];
            load_source(a, i, at, v, part);
            const float r = rsqrtf(row_dot(v, v, part) / float(C) + a.eps);
            const float s = row_dot(v, query, part) * r, dot = row_dot(v, dh, part);
            if (part.lane() == 0) rstd[i] = r, score[i] = s, dweight[i] = dot;
        }
        sync_row();
        float largest = -INFINITY, sum = 0, mean = 0;
        for (int i = 0; i < count; i++) largest = fmaxf(largest, score[i]);
        for (int i = 0; i < count; i++) {
            const float e = __expf(score[i] - largest);
            sum += e, mean += e * dweight[i];
        }
        mean /= sum;
        for (int i = 0; i < count; i++) {
            float v[N][8], dv[N][8] = {};
            load_source(a, i, at, v, part);
            float* to = d.dsources + i * d.stride + at;
            if (!d.last) part.load(dv, to);
            const float weight = __expf(score[i] - largest) / sum;
            const float ds = weight * (dweight[i] - mean) * rstd[i];
            const float slope = ds * rstd[i] * score[i] / float(C);
#pragma unroll
            for (int n = 0; n < N; n++) {
                float product[8];
                for (int c = 0; c < 8; c++) {
                    dv[n][c] += weight * dh[n][c] + ds * query[n][c] - slope * v[n][c];
                    product[c] = ds * v[n][c];
                }
                if (part.has(n)) add_to_sums(sums, product, part.at(n), C);
            }
            part.store(to, dv);
            if (i == count - 1) part.store(d.db + at, dv);
        }
        sync_row(); // before the next row's scores
    }
    __syncthreads();
    for (int i = threadIdx.x; i < C; i += blockDim.x) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += all_sums[g * C + index_of_sum(i, C)];
        d.scratch[int64_t(blockIdx.x) * C + i] = sum;
    }
}

template <class S, class G>
__global__ static void sources_gather_kernel(const __grid_constant__ SourceArguments<S> a,
                                             const __grid_constant__ SourceGradients<S, G> d,
                                             int partials) {
    SharedMemory shared;
    float* sums = shared.take<float>(8 * warp);
    const int C = a.shape.C, channel = blockIdx.x * warp + threadIdx.x % warp;
    const float sum = sum_parts(sums, d.scratch + channel, partials, C, channel < C);
    if (threadIdx.x >= warp || channel >= C) return;
    const float key = a.key_weight ? float(a.key_weight[channel]) : 1;
    d.query[channel] = G(float(d.query[channel]) + key * sum);
    if (d.key_weight)
        d.key_weight[channel] = G(float(d.key_weight[channel]) + float(a.query[channel]) * sum);
}

inline int64_t sources_scratch(int C, int multiprocessors) { // floats
    return int64_t(junction_blocks) * multiprocessors * C;
}

// Writes db; adds to, or writes, the sources' gradients; adds to the parameters'.
template <class S, class G>
void sources_backward(const SourceArguments<S>& a, const SourceGradients<S, G>& d,
                      int multiprocessors, cudaStream_t stream) {
    const RowShape& shape = a.row_shape;
    int groups = shape.warps == 1 ? 4 : 1;
    auto shared = [&] {
        return shared_bytes<float>(16) + shared_bytes<float>(size_t(groups) * shape.C) +
               shared_bytes<float>(3 * size_t(groups) * a.shape.count(a.k));
    };
    while (groups > 1 && shared() > 100 * 1024) groups /= 2;
    const int threads = warp * shape.warps * groups;
    int blocks = 0;
    with_vectors(shape, [&](auto N) {
        auto kernel = sources_backward_kernel<S, G, decltype(N)::value>;
        blocks = std::min(blocks_for(a.rows, groups),
                          multiprocessors *
                              std::min(junction_blocks, blocks_at_once(kernel, threads, shared())));
        launch(kernel, blocks, threads, shared(), stream, a, d);
    });
    if (d.query)
        launch(sources_gather_kernel<S, G>, blocks_for(shape.C, warp), 8 * warp,
               shared_bytes<float>(8 * warp), stream, a, d, blocks);
}

} // namespace lns::cuda
