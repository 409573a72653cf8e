// A block copies consecutive packs of one tensor, a thread every 256th of them.
#include "cast.h"

#include "../launch.cuh"
#include "../norm/any_dtype.cuh"

namespace tome::halves {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of a thread

__host__ __device__ inline unsigned blocks_of(const CastJob& job, int count) {
  const int64_t each = static_cast<int64_t>(kThreads) * kPacks * count;
  return static_cast<unsigned>((job.count + each - 1) / each);
}

template <int kCount>
__global__ __launch_bounds__(kThreads) void cast_kernel(const CastParams p) {
  unsigned block = blockIdx.x;
  int i = 0;
  while (i + 1 < p.count && block >= blocks_of(p.jobs[i], kCount)) block -= blocks_of(p.jobs[i++], kCount);
  const CastJob& job = p.jobs[i];
  const int64_t first = (static_cast<int64_t>(block) * kThreads * kPacks + threadIdx.x) * kCount;
  float x[kPacks][kCount];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = first + k * kThreads * kCount;
    if (at < job.count) norm::load_as(job.dtype, job.from_ptr, at, x[k]);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = first + k * kThreads * kCount;
    if (at < job.count) norm::store_as(p.dtype, p.out_ptr, job.offset + at, x[k]);
  }
}

}  // namespace

void launch_cast(const CastParams& p, bool aligned, cudaStream_t stream) {
  const int count = aligned ? kCastPack : 1;
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) blocks += blocks_of(p.jobs[i], count);
  if (blocks == 0) return;
  launch_kernel(aligned ? cast_kernel<kCastPack> : cast_kernel<1>, blocks, kThreads, 0, 0, stream, p);
}

}  // namespace tome::halves
