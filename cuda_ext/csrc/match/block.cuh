// What the blocks of the score kernels have in common: listing what comes close to the best target of its
// row, a second look at all targets where that is too much, and the selection by the block that ends last.
#pragma once

#include "scan.cuh"
#include "select.cuh"
#include "targets.cuh"

namespace tome::match {

// Which sources a block owns.
template <class Tiling>
__device__ __forceinline__ Share share_of_block(const Params& p) {
  const int blocks = (p.sources + Tiling::kRows - 1) / Tiling::kRows;  // per image
  const int b = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int first_row = block * Tiling::kRows;
  const __half* image_ptr = p.metric_ptr + static_cast<int64_t>(b) * p.rows() * 2 * p.padded;
  return {image_ptr + static_cast<int64_t>(first_row) * 2 * p.padded,
          image_ptr + static_cast<int64_t>(p.sources) * 2 * p.padded,
          min(Tiling::kRows, p.sources - first_row),
          b,
          block,
          blocks};
}

// Scoring a candidate takes about as long as scoring a row with this many targets in tiles does.
constexpr int kTargetsPerCandidate = 128;

template <class Tiling>
__device__ __forceinline__ int candidates_capacity(const Params& p, int bytes) {
  return min(bytes / static_cast<int>(sizeof(Candidate)),
             Tiling::kRows * (1 + p.targets / kTargetsPerCandidate));
}

// The largest product of each of a thread's rows, over all threads, into block_top.
template <int kRows, class RowOf>
__device__ __forceinline__ void publish_tops(const Seen<kRows>& seen, uint32_t* block_top, RowOf&& row_of) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float top = quad_max(seen.best[i]);
    if (threadIdx.x % 4 == 0) atomicMax(block_top + row_of(i), order_of(top));
  }
}

// List a thread's groups that come close to the largest product of their row. `count` may exceed `capacity`:
// then the list is of no use.
template <int kRows, class RowOf, class ColumnOf>
__device__ __forceinline__ void list_candidates(const Seen<kRows>& seen, const uint32_t* block_top, int rows,
                                                int groups, uint32_t mask, float close, int capacity,
                                                Candidate* candidates, int* count, RowOf&& row_of,
                                                ColumnOf&& column_of) {
  int listed[kRows];  // groups of each row
  int all = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = row_of(i);
    const float least = score_of(block_top[row]) - close;
    // Where a third is close, all may be.
    listed[i] = seen.third[i] >= least ? groups : (seen.second[i] >= least) + (seen.best[i] >= least);
    if (row >= rows || seen.best[i] == -INFINITY) listed[i] = 0;
    all += listed[i];
  }
  int at = all > 0 ? atomicAdd(count, all) : 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < listed[i]; ++j, ++at) {
      if (at >= capacity) break;
      const int group = listed[i] > 2 ? j : __float_as_uint(j == 0 ? seen.best[i] : seen.second[i]) & mask;
      candidates[at] = {row_of(i), column_of(group)};
    }
  }
}

// The second look where too many come close to be listed: all three products, except in tiles where nothing
// comes close.
template <class Tiling>
__device__ __forceinline__ void look_again(const Params& p, const Share& share, char* shared, int warp_row,
                                           int warp_column, const uint32_t* block_top, float close,
                                           unsigned long long* block_best) {
  const Stream<Tiling, true> stream(p, share, shared);
  stream.begin();
  stream.await();
  const char* const source_ptr[kScanTiles] = {
      source_address(shared, warp_row, Tiling::kRows - 1, stream.stride),
      source_address(shared, warp_row + kProductRows, Tiling::kRows - 1, stream.stride)};
  Best<kScanTiles> best;
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    // No best score is lower.
    best.known[i / 2][i % 2] =
        score_of(block_top[warp_row + i * 8 + threadIdx.x % kWarpSize / 4]) - close / 2;
  }
  for (int tile = 0; tile * stream.kColumns < p.targets; ++tile) {
    const char* const target_ptr[1] = {
        target_address(stream.next(tile), warp_column, stream.kColumns - 1, stream.stride)};
    score_tile<kScanTiles, 2>(source_ptr, target_ptr, stream.padded, tile * stream.kColumns + warp_column,
                              p.targets, best);
  }
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    const unsigned long long packed = reduce_best(best, i / 2, i % 2);
    const int lane = threadIdx.x % kWarpSize;
    if (lane % 4 == 0) atomicMax(block_best + warp_row + i * 8 + lane / 4, packed);
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

// Publish the block's best; the block that ends an image last selects its pairs.
template <class Tiling>
__device__ __forceinline__ void finish_block(const Params& p, const Share& share, char* shared,
                                             const unsigned long long* block_best) {
  static __shared__ bool is_last;
  const int b = share.image;
  const int first_row = share.block * Tiling::kRows;
  __syncthreads();
  if (p.merged == p.sources) {  // nothing to select
    for (int i = threadIdx.x; i < share.rows; i += Tiling::kThreads) {
      write_merged(p, b, first_row + i, block_best[i]);
    }
    return;
  }
  unsigned long long* best_ptr = p.best_ptr + static_cast<int64_t>(b) * p.sources;
  for (int i = threadIdx.x; i < share.rows; i += Tiling::kThreads) best_ptr[first_row + i] = block_best[i];
  // Every thread publishes its scores before the block counts itself as done; the last block sees them all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.done_ptr + b, 1) == share.blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // The tiles have served: their memory holds what the selection needs, and the scores where they fit.
  auto& storage = *reinterpret_cast<SelectStorage*>(shared);
  auto* copied = reinterpret_cast<unsigned long long*>(shared + kStorageBytes);
  const bool fits = kStorageBytes + static_cast<int64_t>(p.sources) * 8 <= Tiling::shared_bytes(p.padded);
  if (fits) copy_best<Tiling::kThreads>(best_ptr, p.sources, copied);
  write_sources<Tiling::kThreads>(p, b, fits ? copied : best_ptr, storage);
}

}  // namespace tome::match
