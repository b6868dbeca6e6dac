// Several residual streams on a GPU, with maps between them (StreamShape in gpt/model/mixing.h has
// the equations). train_gpt.cu includes this after the matmuls.
#pragma once

#include <cstdint>
#include <type_traits>

// defines: StreamShape, sinkhorn, sinkhorn_backward
#include "gpt/model/mixing.h"

namespace lns::cuda {

// Of a junction, on `rows` tokens. A row of maps and the like has shape.row() elements: H_pre,
// H_post, H_res.
template <class S> struct StreamArguments {
    StreamShape shape;
    RowShape row_shape; // of C channels
    int64_t rows;

    // Before: X of the previous junction (rows, n, C), the maps of the sublayer after it and that
    // sublayer's output (rows, C). At junction 0: the embedding (rows, C), null, null.
    const float *before, *maps_before;
    const S* b;

    // Of the sublayer after this junction; null at the last one.
    const S *weight, *bias, *scale; // φ (maps, n·C), β (maps), α (3)
    float* weight_in_float;         // (maps, n·C), overwritten

    // Forward writes X, which may be `before`; h (rows, C); and, if there is φ, φ x and the maps,
    // which may be maps_before, and 1 / rms(X) (rows).
    float *X, *h, *projected, *maps, *rstd;

    __host__ __device__ int64_t units() const { return rows * (shape.C / 8); }
};

// What the backward pass adds to those; dX and dmaps are what the previous call, for the next
// junction, left: the gradients of X by later junctions and of H_post and H_res. They become the
// same of `before` and maps_before.
template <class S, class G> struct StreamGradients {
    const float* dh;
    float *dX, *dmaps;
    float* dprojected; // overwritten; after the maps, by how much X shrinks
    S* db;
    float* dembedded;         // written at junction 0
    G *weight, *bias, *scale; // added to, unless null
    float* weight_in_float;   // (maps, n·C), overwritten where G is not float
    float* scratch;           // matmul_scratch(rows, maps + 3)
};

const float stream_eps = 1e-20f; // of the norm of X

// X = H_res X_before + H_post ⊗ b, or copies of the embedding; and 1 / rms(X). MAX ≥ n.
template <int MAX, class S>
__global__ static __launch_bounds__(256) void mix_streams_kernel(
    const __grid_constant__ StreamArguments<S> a) {
    const int n = a.shape.n, C = a.shape.C;
    SharedMemory shared;
    RowPart<1> part{C, a.row_shape.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= a.rows) return; // the same for all threads of a row
    const float* post = a.maps_before ? a.maps_before + row * a.shape.row() + n : nullptr;
    float square = 0;
    for (int at = part.lane() * 8; at < C; at += part.warps * warp * 8) {
        float old[MAX][8], b[8];
        if (post) {
            load8(b, a.b + row * C + at);
#pragma unroll
            for (int j = 0; j < MAX; j++)
                if (j < n) load8(old[j], a.before + row * a.shape.width() + j * C + at);
        } else {
            load8(b, a.before + row * C + at);
        }
        for (int i = 0; i < n; i++) {
            float x[8];
#pragma unroll
            for (int c = 0; c < 8; c++) x[c] = post ? post[i] * b[c] : b[c];
            if (post)
#pragma unroll
                for (int j = 0; j < MAX; j++)
                    if (j < n)
                        for (int c = 0; c < 8; c++) x[c] += post[n + i * n + j] * old[j][c];
            store8(a.X + row * a.shape.width() + i * C + at, x);
#pragma unroll
            for (int c = 0; c < 8; c++) square += x[c] * x[c];
        }
    }
    square = part.sum(square);
    if (a.weight && part.lane() == 0)
        a.rstd[row] = rsqrtf(square / float(a.shape.width()) + stream_eps);
}

// exp of H_res's logits, relative to the largest of each column, which Sinkhorn cancels.
template <class S>
__device__ void exponentials(const StreamArguments<S>& a, const float* projected, float* m) {
    const int n = a.shape.n;
    for (int column = 0; column < n; column++) {
        float largest = -INFINITY;
        for (int i = column; i < n * n; i += n) {
            m[i] = float(a.scale[2]) * projected[2 * n + i] + float(a.bias[2 * n + i]);
            largest = fmaxf(largest, m[i]);
        }
        for (int i = column; i < n * n; i += n) m[i] = __expf(m[i] - largest);
    }
}

// The maps of a token, a thread each.
template <class S> __global__ static void maps_forward_kernel(StreamArguments<S> a) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const int n = a.shape.n;
    float *projected = a.projected + row * a.shape.row(), *maps = a.maps + row * a.shape.row();
    for (int i = 0; i < a.shape.maps(); i++) projected[i] *= a.rstd[row];
    for (int i = 0; i < 2 * n; i++)
        maps[i] =
            float(1 + i / n) * sigmoid(float(a.scale[i / n]) * projected[i] + float(a.bias[i]));
    float m[most_streams * most_streams], sums[sinkhorn_sums * most_streams];
    exponentials(a, projected, m);
    sinkhorn(m, n, sums);
    for (int i = 0; i < n * n; i++) maps[2 * n + i] = m[i];
}

// h = H_pre X, or the mean of the streams. A thread takes 8 channels.
template <class S> __global__ static void read_streams_kernel(StreamArguments<S> a) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= a.units()) return;
    const int n = a.shape.n, C = a.shape.C, at = unit % (C / 8) * 8;
    const int64_t row = unit / (C / 8);
    float h[8] = {};
    for (int i = 0; i < n; i++) {
        float x[8];
        load8(x, a.X + row * a.shape.width() + i * C + at);
        const float pre = a.weight ? a.maps[row * a.shape.row() + i] : 1 / float(n);
        for (int c = 0; c < 8; c++) h[c] += pre * x[c];
    }
    store8(a.h + row * C + at, h);
}

template <class S>
__global__ static void widen_kernel(float* out, const S* in, int64_t n) { // 8 elements a thread
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    float x[8];
    load8(x, in + at);
    store8(out + at, x);
}
// φ in float
template <class S> const float* stream_weight(const StreamArguments<S>& a, cudaStream_t stream) {
    if constexpr (std::is_same_v<S, float>) {
        return a.weight;
    } else {
        const int64_t n = a.shape.maps() * a.shape.width();
        launch(widen_kernel<S>, blocks_for(n, 256 * 8), 256, 0, stream, a.weight_in_float, a.weight,
               n);
        return a.weight_in_float;
    }
}

// launch(kernel, …) with a group of threads for each row; f(MAX) is the kernel.
template <class S, class F, class... More>
void launch_rows_of_streams(const StreamArguments<S>& a, const F& f, cudaStream_t stream,
                            const More&... more) {
    const int warps = a.row_shape.warps, block_rows = warps == 1 ? 4 : 1;
    auto with = [&](auto kernel) {
        launch(kernel, blocks_for(a.rows, block_rows), warp * warps * block_rows,
               shared_bytes<float>(16), stream, a, more...);
    };
    a.shape.n <= 4 ? with(f(std::integral_constant<int, 4>()))
                   : with(f(std::integral_constant<int, most_streams>()));
}

template <class S> void streams_forward(CublasLt& cublas, const StreamArguments<S>& a) {
    const cudaStream_t stream = cublas.stream;
    launch_rows_of_streams(
        a, [](auto MAX) { return mix_streams_kernel<decltype(MAX)::value, S>; }, stream);
    if (a.weight) {
        matmul_forward<float, float>(cublas, a.projected, a.shape.row(), a.X,
                                     stream_weight(a, stream), nullptr, a.rows,
                                     int(a.shape.width()), a.shape.maps());
        launch(maps_forward_kernel<S>, blocks_for(a.rows, 128), 128, 0, stream, a);
    }
    launch(read_streams_kernel<S>, blocks_for(a.units(), 256), 256, 0, stream, a);
}

// The gradient of H_pre.
template <int MAX, class S, class G>
__global__ static __launch_bounds__(256) void read_streams_backward_kernel(
    const __grid_constant__ StreamArguments<S> a, const __grid_constant__ StreamGradients<S, G> d) {
    const int n = a.shape.n, C = a.shape.C;
    SharedMemory shared;
    RowPart<1> part{C, a.row_shape.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= a.rows) return;
    float dot[MAX] = {};
    for (int at = part.lane() * 8; at < C; at += part.warps * warp * 8) {
        float dh[8];
        load8(dh, d.dh + row * C + at);
#pragma unroll
        for (int i = 0; i < MAX; i++) {
            if (i >= n) continue;
            float x[8];
            load8(x, a.X + row * a.shape.width() + i * C + at);
            for (int c = 0; c < 8; c++) dot[i] += x[c] * dh[c];
        }
    }
#pragma unroll
    for (int i = 0; i < MAX; i++) {
        if (i >= n) continue;
        const float sum = part.sum(dot[i]);
        if (part.lane() == 0) d.dmaps[row * a.shape.row() + i] = sum;
    }
}

// From the gradients of a token's maps to those of their logits, of α (the three numbers after
// them) and of φ x, a thread each.
template <class S, class G>
__global__ static void maps_backward_kernel(StreamArguments<S> a, StreamGradients<S, G> d) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const int n = a.shape.n, M = a.shape.maps();
    const int64_t at = row * a.shape.row();
    const float *projected = a.projected + at, *maps = a.maps + at;
    float *dmaps = d.dmaps + at, *dprojected = d.dprojected + at;
    for (int i = 0; i < 2 * n; i++) dmaps[i] *= maps[i] * (1 - maps[i] / float(1 + i / n));
    float m[most_streams * most_streams], dm[most_streams * most_streams],
        sums[sinkhorn_sums * most_streams];
    for (int i = 0; i < n * n; i++) dm[i] = dmaps[2 * n + i];
    exponentials(a, projected, m);
    sinkhorn(m, n, sums);
    sinkhorn_backward(m, dm, n, sums);
    for (int i = 0; i < n * n; i++) dmaps[2 * n + i] = dm[i] * m[i];
    float dscale[3] = {}, mean = 0; // mean: of x ⊙ dx
    for (int i = 0; i < M; i++) {
        const int kind = a.shape.kind(i);
        for (int of = 0; of < 3; of++) dscale[of] += of == kind ? dmaps[i] * projected[i] : 0;
        const float dlogit = float(a.scale[kind]) * dmaps[i];
        mean += dlogit * projected[i] / float(a.shape.width());
        dprojected[i] = a.rstd[row] * dlogit;
    }
    for (int of = 0; of < 3; of++) dmaps[M + of] = dscale[of];
    dprojected[M] = a.rstd[row] * a.rstd[row] * mean;
}

// dX from dh, but for what comes through φ. A thread takes 8 channels.
template <class S, class G>
__global__ static void streams_gradient_kernel(StreamArguments<S> a, StreamGradients<S, G> d) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= a.units()) return;
    const int n = a.shape.n, C = a.shape.C, at = unit % (C / 8) * 8;
    const int64_t row = unit / (C / 8);
    const float shrink = a.weight ? d.dprojected[row * a.shape.row() + a.shape.maps()] : 0;
    float dh[8];
    load8(dh, d.dh + row * C + at);
    for (int i = 0; i < n; i++) {
        const int64_t to = row * a.shape.width() + i * C + at;
        float x[8], dx[8] = {};
        if (a.weight) load8(x, a.X + to), load8(dx, d.dX + to);
        const float pre = a.weight ? a.maps[row * a.shape.row() + i] : 1 / float(n);
        for (int c = 0; c < 8; c++) dx[c] += pre * dh[c] - (a.weight ? shrink * x[c] : 0);
        store8(d.dX + to, dx);
    }
}

// From the gradient of X to those of b, H_post, H_res and X before.
template <int MAX, class S, class G>
__global__ static __launch_bounds__(256) void mix_streams_backward_kernel(
    const __grid_constant__ StreamArguments<S> a, const __grid_constant__ StreamGradients<S, G> d) {
    const int n = a.shape.n, C = a.shape.C;
    SharedMemory shared;
    RowPart<1> part{C, a.row_shape.warps, shared.take<float>(16)};
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (warp * part.warps);
    if (row >= a.rows) return;
    const float *post = a.maps_before + row * a.shape.row() + n, *res = post + n;
    float dpost[MAX] = {}, dres[MAX][MAX] = {};
    for (int at = part.lane() * 8; at < C; at += part.warps * warp * 8) {
        float dx[MAX][8], b[8], db[8] = {};
        load8(b, a.b + row * C + at);
#pragma unroll
        for (int i = 0; i < MAX; i++) {
            if (i >= n) continue;
            load8(dx[i], d.dX + row * a.shape.width() + i * C + at);
            for (int c = 0; c < 8; c++) {
                dpost[i] += dx[i][c] * b[c];
                db[c] += post[i] * dx[i][c];
            }
        }
        store8(d.db + row * C + at, db);
#pragma unroll
        for (int j = 0; j < MAX; j++) {
            if (j >= n) continue;
            const int64_t of = row * a.shape.width() + j * C + at;
            float old[8], dold[8] = {};
            load8(old, a.before + of);
#pragma unroll
            for (int i = 0; i < MAX; i++)
                if (i < n)
                    for (int c = 0; c < 8; c++) {
                        dres[i][j] += dx[i][c] * old[c];
                        dold[c] += res[i * n + j] * dx[i][c];
                    }
            store8(d.dX + of, dold);
        }
    }
    float* dmaps = d.dmaps + row * a.shape.row() + n;
#pragma unroll
    for (int i = 0; i < MAX; i++) {
        if (i >= n) continue;
        const float sum = part.sum(dpost[i]);
        if (part.lane() == 0) dmaps[i] = sum;
#pragma unroll
        for (int j = 0; j < MAX; j++) {
            if (j >= n) continue;
            const float sum = part.sum(dres[i][j]);
            if (part.lane() == 0) dmaps[n + i * n + j] = sum;
        }
    }
}

// The gradient of the embedding, of which every stream is a copy. A thread takes 8 channels.
template <class S, class G>
__global__ static void copies_backward_kernel(StreamArguments<S> a, StreamGradients<S, G> d) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= a.units()) return;
    const int C = a.shape.C, at = unit % (C / 8) * 8;
    const int64_t row = unit / (C / 8);
    float sum[8] = {};
    for (int i = 0; i < a.shape.n; i++) {
        float dx[8];
        load8(dx, d.dX + row * a.shape.width() + i * C + at);
        for (int c = 0; c < 8; c++) sum[c] += dx[c];
    }
    store8(d.dembedded + row * C + at, sum);
}

template <class G>
__global__ static void add_kernel(G* sum, const float* x, int64_t n) { // 8 elements a thread
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    float old[8], added[8];
    load8(old, sum + at), load8(added, x + at);
    for (int i = 0; i < 8; i++) old[i] += added[i];
    store8(sum + at, old);
}

// Adds to the gradients of φ, β and α.
template <class S, class G>
void stream_parameters_backward(CublasLt& cublas, const StreamArguments<S>& a,
                                const StreamGradients<S, G>& d) {
    const int M = a.shape.maps(), row = a.shape.row(), parts = bias_parts(a.rows);
    float* none = nullptr;
    auto add_product = [&](float* to) {
        matmul_backward_weight<float, float>(cublas, to, none, d.dprojected, row, a.X, a.rows,
                                             int(a.shape.width()), M, none);
    };
    if constexpr (std::is_same_v<G, float>) {
        add_product(d.weight);
    } else {
        const int64_t n = M * a.shape.width();
        CUDA(cudaMemsetAsync(d.weight_in_float, 0, size_t(n) * sizeof(float), cublas.stream));
        add_product(d.weight_in_float);
        launch(add_kernel<G>, blocks_for(n, 256 * 8), 256, 0, cublas.stream, d.weight,
               d.weight_in_float, n);
    }
    launch(column_sums_kernel<float>, dim3(blocks_for(M + 3, 256), parts), 256,
           shared_bytes<float>(8 * 256), cublas.stream, d.scratch, d.dmaps, row, a.rows, M + 3);
    add_partial_sums(d.bias, d.scratch, parts, M + 3, M, cublas.stream);
    add_partial_sums(d.scale, d.scratch + M, parts, M + 3, 3, cublas.stream);
}

template <class S, class G>
void streams_backward(CublasLt& cublas, const StreamArguments<S>& a,
                      const StreamGradients<S, G>& d) {
    const cudaStream_t stream = cublas.stream;
    // 1. h = H_pre X and the maps, from X.
    if (a.weight) {
        launch_rows_of_streams(
            a, [](auto MAX) { return read_streams_backward_kernel<decltype(MAX)::value, S, G>; },
            stream, d);
        launch(maps_backward_kernel<S, G>, blocks_for(a.rows, 128), 128, 0, stream, a, d);
    }
    launch(streams_gradient_kernel<S, G>, blocks_for(a.units(), 256), 256, 0, stream, a, d);
    if (a.weight) {
        Matmul p =
            backward_matmul<float>(d.dX, d.dprojected, a.shape.row(), stream_weight(a, stream),
                                   a.rows, int(a.shape.width()), a.shape.maps());
        p.beta = 1;
        cublas.matmul(p);
        if (d.weight) stream_parameters_backward(cublas, a, d);
    }
    // 2. X, from what was before.
    if (a.maps_before)
        launch_rows_of_streams(
            a, [](auto MAX) { return mix_streams_backward_kernel<decltype(MAX)::value, S, G>; },
            stream, d);
    else
        launch(copies_backward_kernel<S, G>, blocks_for(a.units(), 256), 256, 0, stream, a, d);
}

} // namespace lns::cuda
