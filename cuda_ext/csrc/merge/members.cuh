// The members of a block's output rows: found in one pass over the slots of the image.
#pragma once

#include "../vector.cuh"
#include "merge.h"

namespace tome::merge_ops {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kShortGroup = 16;  // members up to which a group is listed, and summed in plain float32

struct Storage {
  int count[kMaxBlockOutputs];  // of members; the lists hold no more than the first kShortGroup that came
  int token[kMaxBlockOutputs][kShortGroup];
  float weight[kMaxBlockOutputs][kShortGroup];  // sizes until order_members() has seen them
};

__device__ __forceinline__ float token_size(const GatherParams& p, int64_t b, int token) {
  return p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, token));
}

__device__ __forceinline__ int token_slot(const GatherParams& p, int64_t b, int token) {
  return __ldg(p.slot.data_ptr + p.slot.offset(b, token));
}

constexpr int kScanned = 4;  // slots per thread that are loaded before the first is looked at

// The slots of tokens base, base + kThreads, ...; a number that is no output's past the end.
__device__ __forceinline__ void load_slots(const GatherParams& p, int64_t b, int base,
                                           int (&slot)[kScanned]) {
#pragma unroll
  for (int j = 0; j < kScanned; ++j) {
    const int token = base + j * kThreads;
    slot[j] = token < p.length ? token_slot(p, b, token) : -1;
  }
}

// List the tokens with slots in [first, first + outputs), each output's in the order in which threads come.
// The counters are integers, so what is counted doesn't depend on that order. `prepare` is done while the
// first slots are under way, before the first barrier.
template <class Prepare>
__device__ __forceinline__ void list_members(const GatherParams& p, int64_t b, int first, int outputs,
                                             Storage& shared, Prepare&& prepare) {
  int slot[kScanned];
  int base = threadIdx.x;
  load_slots(p, b, base, slot);
  prepare();
  for (int output = threadIdx.x; output < outputs; output += kThreads) shared.count[output] = 0;
  __syncthreads();
  while (true) {
#pragma unroll
    for (int j = 0; j < kScanned; ++j) {
      // In unsigned arithmetic, so that no slot, however bad, overflows.
      const unsigned output = static_cast<unsigned>(slot[j]) - static_cast<unsigned>(first);
      if (output < static_cast<unsigned>(outputs)) {
        const int token = base + j * kThreads;
        const float size = token_size(p, b, token);
        const int at = atomicAdd(&shared.count[output], 1);
        if (at < kShortGroup) {
          shared.token[output][at] = token;
          shared.weight[output][at] = size;
        }
      }
    }
    base += kScanned * kThreads;
    if (base - static_cast<int>(threadIdx.x) >= p.length) break;
    load_slots(p, b, base, slot);
  }
  __syncthreads();
}

// Put the members of this warp's outputs (output % kWarps is the warp) in ascending order, so that they are
// summed in the same order every time; turn their sizes into weights and write the totals. A lane per output.
__device__ __forceinline__ void order_members(const GatherParams& p, int64_t b, int first, int outputs,
                                              Storage& shared) {
  const int output = threadIdx.x / kWarpSize + static_cast<int>(threadIdx.x % kWarpSize) * kWarps;
  if (output < outputs && shared.count[output] <= kShortGroup) {
    const int count = shared.count[output];
    int* token = shared.token[output];
    float* weight = shared.weight[output];
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const int moved = token[i];
      const float moved_weight = weight[i];
      int at = i;
#pragma unroll 1
      for (; at > 0 && token[at - 1] > moved; --at) {
        token[at] = token[at - 1];
        weight[at] = weight[at - 1];
      }
      token[at] = moved;
      weight[at] = moved_weight;
    }
    float total = 0.0f;
#pragma unroll 1
    for (int i = 0; i < count; ++i) total += weight[i];
    if (p.total_ptr != nullptr) p.total_ptr[b * p.tokens + first + output] = total;
    const bool is_plain = p.total_ptr == nullptr || count == 1;  // a lone token keeps its bits
#pragma unroll 1
    for (int i = 0; i < count; ++i) weight[i] = is_plain ? 1.0f : weight[i] / total;
  }
  __syncwarp();
}

// Whether the list of an output holds all of its members, and there are any.
__device__ __forceinline__ bool is_listed(const Storage& shared, int output) {
  return static_cast<unsigned>(shared.count[output]) - 1u < static_cast<unsigned>(kShortGroup);
}

// All members of an output in ascending order by a scan of the image's slots: any number of them.
// `visit` gets a base, and a bit for each of the 32 tokens from there on.
template <class Visit>
__device__ __forceinline__ void scan_members(const GatherParams& p, int64_t b, int output, Visit&& visit) {
#pragma unroll 1
  for (int base = 0; base < p.length; base += kWarpSize) {
    const int token = base + static_cast<int>(threadIdx.x % kWarpSize);
    const unsigned mask = __ballot_sync(kFullWarp, token < p.length && token_slot(p, b, token) == output);
    if (mask != 0) visit(base, mask);
  }
}

}  // namespace tome::merge_ops
