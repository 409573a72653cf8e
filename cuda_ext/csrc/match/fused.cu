// A whole image in one block: metric into shared memory, scores, selection, slots. One launch, grid = batch.
//
// Shared memory: rows x row_bytes of split unit vectors, then one packed best per source.
#include <algorithm>

#include "../launch.cuh"
#include "select.cuh"

namespace tome::match {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTilesM = 1;  // 16 sources x 64 targets per warp and step: small images still feed every warp
constexpr int kTilesN = 8;
static_assert(kTilesM == 1);
constexpr int kUnitRows = kProductRows;
constexpr int kUnitColumns = kTilesN * kProductColumns;

int64_t shared_bytes(const Params& p) {
  return static_cast<int64_t>(p.rows()) * row_bytes(p.padded) + static_cast<int64_t>(p.sources) * 8;
}

template <class T, bool kAligned>
__device__ __forceinline__ void load_metric(const Params& p, int b, char* rows_ptr) {
  const int stride = row_bytes(p.padded);
  const int warp_rows = kWarpSize / p.row_lanes;
  const int lane = threadIdx.x % kWarpSize;
  const int channel = lane % p.row_lanes * kLaneChannels;
  for (int base = threadIdx.x / kWarpSize * warp_rows; base < p.rows(); base += kWarps * warp_rows) {
    // A warp stays together for the shuffles: threads behind the last row redo it and store nothing.
    const int row = base + lane / p.row_lanes;
    float x[kLaneChannels];
    sum_heads<T, kAligned, false>(p, b, row_position(p, b, min(row, p.rows() - 1)), channel, x);
    normalise(x, p.row_lanes);
    if (row < p.rows() && channel < p.padded) {
      store_split(reinterpret_cast<__half*>(rows_ptr + row * stride), channel, p.padded, x);
    }
  }
}

// Each warp takes 16 sources and walks over the targets; where sources are few, several warps share them.
__device__ __forceinline__ void score_image(const Params& p, const char* rows_ptr, unsigned long long* best) {
  const int stride = row_bytes(p.padded);
  const char* targets_ptr = rows_ptr + p.sources * stride;
  const int row_units = (p.sources + kUnitRows - 1) / kUnitRows;
  const int parts = max(1, kWarps / row_units);
  const int lane = threadIdx.x % kWarpSize;
  for (int unit = threadIdx.x / kWarpSize; unit < row_units * parts; unit += kWarps) {
    const int row = unit / parts * kUnitRows;
    const char* const source_ptr[kTilesM] = {source_address(rows_ptr, row, p.sources - 1, stride)};
    Best<kTilesM> found;
    for (int column = unit % parts * kUnitColumns; column < p.targets; column += parts * kUnitColumns) {
      const char* target_ptr[kTilesN / 2];
#pragma unroll
      for (int n = 0; n < kTilesN / 2; ++n) {
        target_ptr[n] = target_address(targets_ptr, column + 2 * n * kProductColumns, p.targets - 1, stride);
      }
      score_tile<kTilesM, kTilesN>(source_ptr, target_ptr, p.padded, column, p.targets, found);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned long long packed = reduce_best(found, 0, half);
      const int source = row + half * 8 + lane / 4;
      // An integer maximum: the order in which warps arrive can't be seen.
      if (lane % 4 == 0 && source < p.sources) atomicMax(best + source, packed);
    }
  }
}

template <class T, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void match_fused_kernel(const Params p) {
  static __shared__ SelectStorage storage;
  char* shared = dynamic_shared();
  auto* best = reinterpret_cast<unsigned long long*>(shared + p.rows() * row_bytes(p.padded));
  const int b = blockIdx.x;
  await_previous();
  for (int i = threadIdx.x; i < p.sources; i += kThreads) best[i] = pack_best(-INFINITY, 0);
  write_fixed(p, b, threadIdx.x, kThreads);
  load_metric<T, kAligned>(p, b, shared);
  __syncthreads();
  score_image(p, shared, best);
  __syncthreads();
  write_sources<kThreads>(p, b, best, storage);
}

template <class T, bool kAligned>
void launch(const Params& p, int max_shared_bytes, cudaStream_t stream) {
  const int bytes = static_cast<int>(shared_bytes(p));
  const int most = max_shared_bytes - kStorageBytes;
  launch_kernel(match_fused_kernel<T, kAligned>, p.batch, kThreads, bytes, most, stream, p, true);
}

}  // namespace

bool fits_one_block(const Params& p, int max_shared_bytes, int multiprocessor_bytes) {
  const int available = std::min(max_shared_bytes, multiprocessor_bytes / 2 - kReservedBytes);
  return shared_bytes(p) + kStorageBytes <= available;
}

void launch_fused(const Params& p, Dtype dtype, bool aligned, int max_shared_bytes, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    aligned ? launch<T, true>(p, max_shared_bytes, stream) : launch<T, false>(p, max_shared_bytes, stream);
  });
}

}  // namespace tome::match
