// The members of a block's output rows: listed once per block, found by a ballot per row.
#pragma once

#include "../vector.cuh"
#include "merge.h"

namespace tome::merge_ops {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kCapacity = 512;  // tokens in a block's list; on average a list holds under 2 * 32

struct Storage {
  int token[kCapacity];
  int output[kCapacity];
  float size[kCapacity];
  int warp_count[kWarps];
};

__device__ __forceinline__ float token_size(const GatherParams& p, int64_t b, int token) {
  return p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, token));
}

__device__ __forceinline__ int token_slot(const GatherParams& p, int64_t b, int token) {
  return __ldg(p.slot.data_ptr + p.slot.offset(b, token));
}

// In unsigned arithmetic, so that no slot, however bad, overflows.
__device__ __forceinline__ bool is_between(int slot, int first, int count) {
  return static_cast<unsigned>(slot) - static_cast<unsigned>(first) < static_cast<unsigned>(count);
}

constexpr int kScanned = 4;  // slots per thread that are loaded before the first is looked at

// The slots of kScanned * 32 tokens from `base` on, one of each 32 per lane; -1 past the end.
__device__ __forceinline__ void load_slots(const GatherParams& p, int64_t b, int base, int end,
                                           int (&slot)[kScanned]) {
#pragma unroll
  for (int j = 0; j < kScanned; ++j) {
    const int token = base + j * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
    slot[j] = token < end ? token_slot(p, b, token) : -1;
  }
}

// List the tokens with slots in [first, first + outputs) in ascending order; returns how many there are.
__device__ __forceinline__ int list_members(const GatherParams& p, int64_t b, int first, int outputs,
                                            Storage& shared) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int segment = (p.length + kThreads - 1) / kThreads * kWarpSize;  // tokens per warp, consecutive
  const int begin = warp * segment;
  const int end = min(begin + segment, p.length);
  int slot[kScanned];
  int count = 0;
  for (int base = begin; base < end; base += kScanned * kWarpSize) {
    load_slots(p, b, base, end, slot);
#pragma unroll
    for (int j = 0; j < kScanned; ++j) {
      count += __popc(__ballot_sync(kFullWarp, is_between(slot[j], first, outputs)));
    }
  }
  if (lane == 0) shared.warp_count[warp] = count;
  __syncthreads();
  int offset = 0;
  int total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) offset += shared.warp_count[w];
    total += shared.warp_count[w];
  }
  if (total > kCapacity) return total;
  for (int base = begin; base < end; base += kScanned * kWarpSize) {
    load_slots(p, b, base, end, slot);
#pragma unroll
    for (int j = 0; j < kScanned; ++j) {
      const bool is_mine = is_between(slot[j], first, outputs);
      const unsigned mask = __ballot_sync(kFullWarp, is_mine);
      if (is_mine) {
        const int at = offset + __popc(mask & ((1u << lane) - 1));
        const int token = base + j * kWarpSize + lane;
        shared.token[at] = token;
        shared.output[at] = slot[j] - first;
        shared.size[at] = token_size(p, b, token);
      }
      offset += __popc(mask);
    }
  }
  __syncthreads();
  return total;
}

// Where a warp finds the members of its output row: in the block's list, or among all tokens.
struct Members {
  const GatherParams& p;
  const Storage& shared;
  int64_t b;
  int output, slot, count;
  bool listed;

  // One bit for each of the 32 candidates from `base` on; the whole warp asks together.
  __device__ __forceinline__ unsigned among(int base) const {
    const int i = base + static_cast<int>(threadIdx.x % kWarpSize);
    bool is_member = false;
    if (i < count) is_member = listed ? shared.output[i] == output : token_slot(p, b, i) == slot;
    return __ballot_sync(kFullWarp, is_member);
  }
  __device__ __forceinline__ int token(int i) const { return listed ? shared.token[i] : i; }
  __device__ __forceinline__ float size(int i) const { return listed ? shared.size[i] : token_size(p, b, i); }
  // How many members there are, and the sum of their sizes.
  __device__ __forceinline__ int measure(float& total) const {
    int group = 0;
    total = 0.0f;
#pragma unroll 1
    for (int base = 0; base < count; base += kWarpSize) {
      const unsigned mask = among(base);
      group += __popc(mask);
      for (unsigned rest = mask; rest != 0; rest &= rest - 1) total += size(base + __ffs(rest) - 1);
    }
    return group;
  }
  __device__ __forceinline__ float weight(int i, float total) const {
    return p.total_ptr == nullptr ? 1.0f : size(i) / total;
  }
};

}  // namespace tome::merge_ops
