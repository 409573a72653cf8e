// Images too large for one block, in two launches that stream tiles through shared memory.
//
// match_metric_kernel: keys -> split unit vectors [batch, rows, 2, padded], row_lanes threads per row.
// match_score_kernel: one block owns kRows sources of an image, keeps them in shared memory and walks over
// all targets in tiles of kColumns, two tiles in flight. The block that finishes an image last selects its
// pairs.
#include <cute/arch/copy_sm80.hpp>

#include "../launch.cuh"
#include "select.cuh"

namespace tome::match {
namespace {

constexpr int kMetricThreads = 256;

template <class T, bool kAligned>
__global__ __launch_bounds__(kMetricThreads) void match_metric_kernel(const Params p) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kMetricThreads + threadIdx.x) / p.row_lanes;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.rows();
  const int64_t row = min(first, rows - 1);  // the last warp stays whole for the shuffles
  const int b = static_cast<int>(row / p.rows());
  const int l = static_cast<int>(row % p.rows());
  const int channel = threadIdx.x % p.row_lanes * kLaneChannels;
  if (first < rows && l == 0 && channel == 0) p.done_ptr[b] = 0;
  float x[kLaneChannels];
  sum_heads<T, kAligned>(p, b, row_position(p, b, l), channel, x);
  normalise(x, p.row_lanes);
  if (first < rows && channel < p.padded) {
    store_split(p.metric_ptr + row * 2 * p.padded, channel, p.padded, x);
  }
}

// Each warp scores 32 x 32: two 16-row and four 8-column products share their operands.
constexpr int kTilesM = 2;
constexpr int kTilesN = 4;
constexpr int kWarpRows = kTilesM * kProductRows;
constexpr int kWarpColumns = kTilesN * kProductColumns;

template <int kBlockRows, int kBlockColumns>
struct Traits {
  static constexpr int kRows = kBlockRows;
  static constexpr int kColumns = kBlockColumns;
  static constexpr int kWarpsM = kRows / kWarpRows;
  static constexpr int kWarpsN = kColumns / kWarpColumns;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kStages = 2;
  static_assert(kRows % kWarpRows == 0 && kColumns % kWarpColumns == 0);
  static_assert((kRows + kStages * kColumns) * row_bytes(kProductDepth) >= sizeof(SelectStorage));
  static constexpr int shared_bytes(int padded) {
    return (kRows + kStages * kColumns) * row_bytes(padded) + kRows * 8;
  }
};

// Copy `count` rows of the metric, starting at `row`, to shared memory; rows past `last` repeat it.
template <int kThreads>
__device__ __forceinline__ void copy_rows(const __half* metric_ptr, int row, int last, int count, int padded,
                                          char* shared_ptr) {
  const int chunks = padded / 4;  // 16-byte pieces of a row
  const int shift = chunks <= 16 ? 4 : 5;
  const int stride = row_bytes(padded);
  for (int t = threadIdx.x; t < count << shift; t += kThreads) {
    const int local = t >> shift;
    const auto* from = reinterpret_cast<const cute::uint128_t*>(
        metric_ptr + static_cast<int64_t>(min(row + local, last)) * 2 * padded);
    auto* to = reinterpret_cast<cute::uint128_t*>(shared_ptr + local * stride);
    for (int c = t & ((1 << shift) - 1); c < chunks; c += 1 << shift) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(from[c], to[c]);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void score_block(const Params& p, int b, int first_row, char* shared,
                                            unsigned long long* block_best) {
  constexpr int kThreads = Traits::kThreads;
  const int stride = row_bytes(p.padded);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / Traits::kWarpsN * kWarpRows;
  const int warp_column = warp % Traits::kWarpsN * kWarpColumns;
  const __half* sources_ptr = p.metric_ptr + static_cast<int64_t>(b) * p.rows() * 2 * p.padded;
  const __half* targets_ptr = sources_ptr + static_cast<int64_t>(p.sources) * 2 * p.padded;
  char* tiles = shared + Traits::kRows * stride;
  const int tile_bytes = Traits::kColumns * stride;

  copy_rows<kThreads>(sources_ptr, first_row, p.sources - 1, Traits::kRows, p.padded, shared);
  copy_rows<kThreads>(targets_ptr, 0, p.targets - 1, Traits::kColumns, p.padded, tiles);
  cute::cp_async_fence();
  const char* source_ptr[kTilesM];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    source_ptr[m] = source_address(shared, warp_row + m * kProductRows, Traits::kRows - 1, stride);
  }
  Best<kTilesM> best;
  int stage = 0;
  for (int column = 0; column < p.targets; column += Traits::kColumns, stage ^= 1) {
    const int next = column + Traits::kColumns;
    if (next < p.targets) {
      copy_rows<kThreads>(targets_ptr, next, p.targets - 1, Traits::kColumns, p.padded,
                          tiles + (stage ^ 1) * tile_bytes);
    }
    cute::cp_async_fence();  // an empty group after the last tile keeps the count of groups the same
    cute::cp_async_wait<1>();
    __syncthreads();
    const char* target_ptr[kTilesN / 2];
#pragma unroll
    for (int n = 0; n < kTilesN / 2; ++n) {
      target_ptr[n] = target_address(tiles + stage * tile_bytes, warp_column + 2 * n * kProductColumns,
                                     Traits::kColumns - 1, stride);
    }
    score_tile<kTilesM, kTilesN>(source_ptr, target_ptr, p.padded, column + warp_column, p.targets, best);
    __syncthreads();  // everyone is done with this stage before the next round fills it
  }
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned long long packed = reduce_best(best, m, half);
      if (lane % 4 == 0) atomicMax(block_best + warp_row + m * kProductRows + half * 8 + lane / 4, packed);
    }
  }
}

// The selection reads the scores five times; from device memory that would be five times its latency.
template <int kThreads>
__device__ __forceinline__ void copy_best(const unsigned long long* best_ptr, int sources,
                                          unsigned long long* copied) {
  constexpr int kInFlight = 4;
  for (int base = threadIdx.x; base < sources; base += kInFlight * kThreads) {
    unsigned long long best[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      best[j] = base + j * kThreads < sources ? best_ptr[base + j * kThreads] : 0;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (base + j * kThreads < sources) copied[base + j * kThreads] = best[j];
    }
  }
  __syncthreads();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 2) void match_score_kernel(const Params p) {
  static __shared__ bool is_last;
  char* shared = dynamic_shared();
  const int blocks = (p.sources + Traits::kRows - 1) / Traits::kRows;  // per image
  const int b = blockIdx.x / blocks;
  const int first_row = blockIdx.x % blocks * Traits::kRows;
  auto* block_best = reinterpret_cast<unsigned long long*>(
      shared + (Traits::kRows + Traits::kStages * Traits::kColumns) * row_bytes(p.padded));
  for (int i = threadIdx.x; i < Traits::kRows; i += Traits::kThreads) block_best[i] = 0;
  score_block<Traits>(p, b, first_row, shared, block_best);
  __syncthreads();
  unsigned long long* best_ptr = p.best_ptr + static_cast<int64_t>(b) * p.sources;
  for (int i = threadIdx.x; i < Traits::kRows && first_row + i < p.sources; i += Traits::kThreads) {
    best_ptr[first_row + i] = block_best[i];
  }
  // Every thread publishes its scores before the block counts itself as done; the last block sees them all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.done_ptr + b, 1) == blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // The tiles have served: their memory holds what the selection needs, and the scores where they fit.
  auto& storage = *reinterpret_cast<SelectStorage*>(shared);
  auto* copied = reinterpret_cast<unsigned long long*>(shared + kStorageBytes);
  const bool fits = kStorageBytes + static_cast<int64_t>(p.sources) * 8 <= Traits::shared_bytes(p.padded);
  if (fits) copy_best<Traits::kThreads>(best_ptr, p.sources, copied);
  write_slots<Traits::kThreads>(p, b, fits ? copied : best_ptr, storage);
}

template <class Traits>
bool try_score(const Params& p, int max_shared_bytes, cudaStream_t stream) {
  const int bytes = Traits::shared_bytes(p.padded);
  if (bytes + kAccessBytes > max_shared_bytes) return false;
  const int64_t blocks = (p.sources + Traits::kRows - 1) / Traits::kRows;
  launch_kernel(match_score_kernel<Traits>, blocks * p.batch, Traits::kThreads, bytes,
                max_shared_bytes - kAccessBytes, stream, p);
  return true;
}

}  // namespace

bool launch_tiled(const Params& p, Dtype dtype, bool aligned, int max_shared_bytes, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(p.batch) * p.rows() * p.row_lanes;
  const int64_t blocks = (threads + kMetricThreads - 1) / kMetricThreads;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_kernel(aligned ? match_metric_kernel<T, true> : match_metric_kernel<T, false>, blocks,
                  kMetricThreads, 0, 0, stream, p);
  });
  // The largest tile that fits: wide metrics on GPUs with little shared memory take the smaller ones.
  return try_score<Traits<128, 64>>(p, max_shared_bytes, stream) ||
         try_score<Traits<64, 64>>(p, max_shared_bytes, stream) ||
         try_score<Traits<64, 32>>(p, max_shared_bytes, stream) ||
         try_score<Traits<32, 32>>(p, max_shared_bytes, stream);
}

}  // namespace tome::match
