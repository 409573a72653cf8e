// From each source's best target to the slot map of one image, by one block.
//
// The r-th largest score is found by its digits (four histograms of 8 bits), or where sources are few by what
// each of them is below; then one ordered pass counts the merged and the kept sources before each source.
// Integer counts only: the result depends on no timing.
#pragma once

#include "score.cuh"

namespace tome::match {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kMaxWarps = 32;

struct SelectStorage {
  int histogram[kDigits];
  int2 warp_counts[kMaxWarps];  // above and equal to the threshold
  int digit, above;
};
constexpr int kStorageBytes = (sizeof(SelectStorage) + kAccessBytes - 1) / kAccessBytes * kAccessBytes;

// The order of the r-th best source, and in `equal` how many sources of just that order merge. r >= 1.
template <int kThreads>
__device__ __forceinline__ uint32_t find_threshold(const unsigned long long* best, int sources, int r,
                                                   SelectStorage& shared, int& equal) {
  uint32_t threshold = 0;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = threadIdx.x; d < kDigits; d += kThreads) shared.histogram[d] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < sources; i += kThreads) {
      const uint32_t order = best_order(best[i]);
      // Shifted twice: a shift by 32 at the first digit would be undefined.
      if ((order >> shift >> kDigitBits) == (threshold >> shift >> kDigitBits)) {
        atomicAdd(&shared.histogram[(order >> shift) % kDigits], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      constexpr int kLaneDigits = kDigits / kWarpSize;
      const int lane = threadIdx.x;
      int count = 0;
      for (int d = 0; d < kLaneDigits; ++d) count += shared.histogram[lane * kLaneDigits + d];
      int above = count;  // a suffix sum over the lanes
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_down_sync(kFullWarp, above, step);
        if (lane + step < kWarpSize) above += other;
      }
      above -= count;
      for (int d = kLaneDigits - 1; d >= 0; --d) {
        const int here = shared.histogram[lane * kLaneDigits + d];
        if (above < r && r <= above + here) {
          shared.digit = lane * kLaneDigits + d;
          shared.above = above;
        }
        above += here;
      }
    }
    __syncthreads();
    threshold |= static_cast<uint32_t>(shared.digit) << shift;
    r -= shared.above;
  }
  equal = r;
  return threshold;
}

// The same where sources are at most half of the threads: two of them count who is before a source.
template <int kThreads>
__device__ __forceinline__ uint32_t count_to_threshold(const unsigned long long* best, int sources, int r,
                                                       SelectStorage& shared, int& equal) {
  const int i = min(static_cast<int>(threadIdx.x / 2), sources - 1);
  const uint32_t mine = best_order(best[i]);
  int above = 0, before = 0;
#pragma unroll 8
  for (int j = threadIdx.x % 2; j < sources; j += 2) {
    const uint32_t other = best_order(best[j]);
    above += other > mine;
    before += other == mine && j < i;
  }
  above += __shfl_xor_sync(kFullWarp, above, 1);
  before += __shfl_xor_sync(kFullWarp, before, 1);
  if (above + before == r - 1) {  // the last that merges; whoever else says so says the same
    shared.digit = static_cast<int>(mine);
    shared.above = before + 1;
  }
  __syncthreads();
  equal = shared.above;
  return static_cast<uint32_t>(shared.digit);
}

// Slots that no score decides: the prefix and the targets of image b. This thread does its share of them.
__device__ __forceinline__ void write_fixed(const Params& p, int b, int first, int step) {
  int32_t* slot_ptr = p.slot_ptr + static_cast<int64_t>(b) * p.tokens;
  for (int i = first; i < p.prefix; i += step) slot_ptr[i] = i;
  for (int j = first; j < p.targets; j += step) {
    slot_ptr[row_position(p, b, p.sources + j)] = p.first_target() + j;
  }
}

__device__ __forceinline__ void write_merged(const Params& p, int b, int i, unsigned long long best) {
  p.slot_ptr[static_cast<int64_t>(b) * p.tokens + row_position(p, b, i)] =
      p.first_target() + best_index(best);
}

// The slots of all sources of image b. `best` holds the packed best of every source, in shared or device
// memory. Every thread of the block takes part.
template <int kThreads>
__device__ __forceinline__ void write_sources(const Params& p, int b, const unsigned long long* best,
                                              SelectStorage& shared) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= kMaxWarps * kWarpSize);
  if (p.merged == p.sources) {
    for (int i = threadIdx.x; i < p.sources; i += kThreads) write_merged(p, b, i, best[i]);
    return;
  }

  int32_t* slot_ptr = p.slot_ptr + static_cast<int64_t>(b) * p.tokens;
  int equal = 0;
  const uint32_t threshold = p.sources <= kThreads / 2
                                 ? count_to_threshold<kThreads>(best, p.sources, p.merged, shared, equal)
                                 : find_threshold<kThreads>(best, p.sources, p.merged, shared, equal);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int2 before = make_int2(0, 0);
  for (int base = 0; base < p.sources; base += kThreads) {
    const int i = base + threadIdx.x;
    const unsigned long long mine = i < p.sources ? best[i] : 0;
    const bool is_above = i < p.sources && best_order(mine) > threshold;
    const bool is_equal = i < p.sources && best_order(mine) == threshold;
    const unsigned above_mask = __ballot_sync(kFullWarp, is_above);
    const unsigned equal_mask = __ballot_sync(kFullWarp, is_equal);
    if (lane == 0) shared.warp_counts[warp] = make_int2(__popc(above_mask), __popc(equal_mask));
    __syncthreads();
    int2 here = before;
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      const int2 count = shared.warp_counts[w];
      if (w < warp) here = make_int2(here.x + count.x, here.y + count.y);
      before = make_int2(before.x + count.x, before.y + count.y);
    }
    const unsigned lower_lanes = (1u << lane) - 1;
    const int above_before = here.x + __popc(above_mask & lower_lanes);
    const int equal_before = here.y + __popc(equal_mask & lower_lanes);
    if (i < p.sources) {
      const bool is_merged = is_above || (is_equal && equal_before < equal);
      const int merged_before = above_before + min(equal_before, equal);
      if (is_merged) {
        write_merged(p, b, i, mine);
      } else {
        slot_ptr[row_position(p, b, i)] = p.prefix + i - merged_before;
      }
    }
    __syncthreads();  // the counts are overwritten by the next round
  }
}

}  // namespace tome::match
