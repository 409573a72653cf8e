// columns_kernel: of several tensors the sums over slabs of rows. slabs_kernel: of all of them over the
// slabs.
#include "../launch.cuh"
#include "any_dtype.cuh"
#include "columns.h"

namespace tome::norm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

int tiles(int channels, int step) { return (channels + step - 1) / step; }

// Whose block this is, and the how manieth of it; `blocks` tells how many a job has.
template <class F>
__device__ __forceinline__ int job_of(const ColumnParams& p, unsigned& block, F&& blocks) {
  int job = 0;
  while (job + 1 < p.count && block >= blocks(p.jobs[job])) block -= blocks(p.jobs[job++]);
  return job;
}

// A block takes 32 packs of channels and one slab of rows, a warp every eighth of them.
template <int kCount>
__global__ __launch_bounds__(kThreads) void columns_kernel(const ColumnParams params) {
  constexpr int kStep = kWarpSize * kCount;
  static __shared__ float partial[2][kWarps / 2][kStep];
  unsigned block = blockIdx.x;
  const ColumnJob& p = params.jobs[job_of(params, block, [](const ColumnJob& job) {
    return static_cast<unsigned>((job.channels + kStep - 1) / kStep * job.slabs);
  })];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int slab = block % p.slabs;
  const int channel = static_cast<int>(block / p.slabs) * kStep + lane * kCount;
  const unsigned rows = static_cast<unsigned>(p.batch) * p.rows;  // an int's worth at most
  const unsigned slab_rows = (rows + p.slabs - 1) / p.slabs;
  const unsigned end = min(rows, (slab + 1) * slab_rows);
  const bool has_products = p.b.data_ptr != nullptr;
  float sum[2][kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) sum[0][c] = sum[1][c] = 0.0f;
  if (channel < p.channels) {
#pragma unroll 4
    for (unsigned row = slab * slab_rows + warp; row < end; row += kWarps) {
      const int64_t i = row / p.rows, j = row % p.rows;
      const int64_t a_stride = kCount == 1 ? p.a.channel_stride : 1;
      float a[kCount];
      load_as(p.a_dtype, p.a.data_ptr, i * p.a.batch_stride + j * p.a.row_stride + channel * a_stride, a);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[0][c] += a[c];
      if (has_products) {
        const int64_t b_stride = kCount == 1 ? p.b.channel_stride : 1;
        float b[kCount];
        load_as(p.b_dtype, p.b.data_ptr, i * p.b.batch_stride + j * p.b.row_stride + channel * b_stride, b);
        const float2 stats = p.stats_ptr == nullptr ? make_float2(0.0f, 1.0f) : __ldg(p.stats_ptr + row);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[1][c] = fmaf(a[c], (b[c] - stats.x) * stats.y, sum[1][c]);
      }
    }
  }
#pragma unroll 1
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        partial[0][warp - half][c * kWarpSize + lane] = sum[0][c];
        partial[1][warp - half][c * kWarpSize + lane] = sum[1][c];
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sum[0][c] += partial[0][warp][c * kWarpSize + lane];
        sum[1][c] += partial[1][warp][c * kWarpSize + lane];
      }
    }
    __syncthreads();
  }
  if (warp > 0 || channel >= p.channels) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    Pack<float, kCount> pack;
#pragma unroll
    for (int c = 0; c < kCount; ++c) pack.value[c] = sum[k][c];
    store_pack(p.partial_ptr + (static_cast<int64_t>(slab) * 2 + k) * p.channels + channel, pack);
  }
}

// A block takes 32 channels of one of the two sums, a warp every eighth slab.
__global__ __launch_bounds__(kThreads) void slabs_kernel(const ColumnParams params) {
  static __shared__ float partial[kWarps][kWarpSize];
  unsigned block = blockIdx.x;
  const ColumnJob& p = params.jobs[job_of(params, block, [](const ColumnJob& job) {
    return 2u * static_cast<unsigned>((job.channels + kWarpSize - 1) / kWarpSize);
  })];
  const int k = block % 2;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int channel = static_cast<int>(block / 2) * kWarpSize + lane;
  float* out_ptr = p.out_ptr[k];
  if (out_ptr == nullptr) return;
  float sum = 0.0f;
  if (channel < p.channels) {
#pragma unroll 4
    for (int slab = warp; slab < p.slabs; slab += kWarps) {
      sum += __ldg(p.partial_ptr + (static_cast<int64_t>(slab) * 2 + k) * p.channels + channel);
    }
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || channel >= p.channels) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += partial[other][lane];
  out_ptr[channel] = sum;
}

}  // namespace

void launch_columns(const ColumnParams& p, bool aligned, cudaStream_t stream) {
  const int step = kWarpSize * (aligned ? kColumnPack : 1);
  int64_t blocks = 0, last_blocks = 0;
  for (int job = 0; job < p.count; ++job) {
    blocks += static_cast<int64_t>(tiles(p.jobs[job].channels, step)) * p.jobs[job].slabs;
    last_blocks += 2 * tiles(p.jobs[job].channels, kWarpSize);
  }
  if (blocks == 0) return;
  launch_kernel(aligned ? columns_kernel<kColumnPack> : columns_kernel<1>, blocks, kThreads, 0, 0, stream, p);
  launch_kernel(slabs_kernel, last_blocks, kThreads, 0, 0, stream, p);
}

}  // namespace tome::norm
