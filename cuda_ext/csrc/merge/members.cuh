// The members of a block's output rows: found in one pass over the slots of the image.
#pragma once

#include <climits>

#include "merge.h"
#include "packs.cuh"

namespace tome::merge_ops {

constexpr int kBlockWarps = 4;
constexpr int kBlockThreads = kBlockWarps * kWarpSize;
constexpr int kShortGroup = 16;  // members up to which a group is listed, and summed in plain float32

struct Member {
  int token;  // after order_members() kLastMember is added to an output's last
  float weight;
};
constexpr int kLastMember = INT_MIN;

struct Storage {
  int count[kMaxBlockOutputs];  // of members; the lists hold no more than the first kShortGroup that came
  Member list[kMaxBlockOutputs][kShortGroup + 1];  // an odd stride, for the banks' sake
};

// Some of the block's outputs, a bit and a lane for each.
using Outputs = unsigned;
static_assert(kMaxBlockOutputs == kWarpSize);

__device__ __forceinline__ int lane_output() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ bool has_lane(Outputs outputs) { return (outputs >> lane_output() & 1) != 0; }

__device__ __forceinline__ float token_size(const GatherParams& p, int64_t b, int token) {
  return p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, token));
}

__device__ __forceinline__ int token_slot(const GatherParams& p, int64_t b, int token) {
  return __ldg(p.slot.data_ptr + p.slot.offset(b, token));
}

// Calls visit(token, slot) for all tokens of the image, shared out among the block's threads. So many slots
// are under way at a time that it hardly takes more than one trip to memory.
template <class Visit>
__device__ __forceinline__ void scan_slots(const GatherParams& p, int64_t b, Visit&& visit) {
  const int* slots_ptr = p.slot.data_ptr + p.slot.offset(b, 0);
  const auto scan = [&](auto count, int length, auto&& load, auto&& see) {
    constexpr int kCount = decltype(count)::value;  // loads per thread
    decltype(load(0)) loaded[kCount];
#pragma unroll 1
    for (int base = 0; base < length; base += kCount * kBlockThreads) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int at = base + j * kBlockThreads + static_cast<int>(threadIdx.x);
        if (at < length) loaded[j] = load(at);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (base + j * kBlockThreads >= length) break;
        const int at = base + j * kBlockThreads + static_cast<int>(threadIdx.x);
        if (at < length) see(at, loaded[j]);
      }
    }
  };
  int first = 0;  // of the tokens whose slots go one by one
  if (p.slot.stride == 1 && reinterpret_cast<uintptr_t>(slots_ptr) % kAccessBytes == 0) {
    first = p.length / 4 * 4;
    scan(
        Constant<4>{}, p.length / 4,
        [&](int at) { return __ldg(reinterpret_cast<const int4*>(slots_ptr) + at); },
        [&](int at, const int4& four) {
          visit(4 * at, four.x);
          visit(4 * at + 1, four.y);
          visit(4 * at + 2, four.z);
          visit(4 * at + 3, four.w);
        });
  }
  scan(
      Constant<6>{}, p.length - first,
      [&](int at) { return __ldg(slots_ptr + (first + at) * p.slot.stride); },
      [&](int at, int slot) { visit(first + at, slot); });
}

// List the tokens with slots in [first, first + outputs), each output's in the order in which threads come.
// The counters are integers, so what is counted doesn't depend on that order.
__device__ __forceinline__ void list_members(const GatherParams& p, int64_t b, int first, int outputs,
                                             Storage& shared) {
  for (int output = threadIdx.x; output < outputs; output += kBlockThreads) shared.count[output] = 0;
  __syncthreads();
  scan_slots(p, b, [&](int token, int slot) {
    // In unsigned arithmetic, so that no slot, however bad, overflows.
    const unsigned output = static_cast<unsigned>(slot) - static_cast<unsigned>(first);
    if (output < static_cast<unsigned>(outputs)) {
      const int at = atomicAdd(&shared.count[output], 1);
      if (at < kShortGroup) shared.list[output][at].token = token;
    }
  });
  __syncthreads();
}

// Whether the list of an output holds all of its members, and there are any.
__device__ __forceinline__ bool is_listed(const Storage& shared, int output) {
  return static_cast<unsigned>(shared.count[output]) - 1u < static_cast<unsigned>(kShortGroup);
}

// The outputs that this warp sums: consecutive ones, with about as many members as those of any other warp,
// or one, if there are no more. `count(output)`: its members, or 0 for one that no warp is to have.
template <class Count>
__device__ __forceinline__ Outputs share_outputs(int outputs, Count&& count) {
  const int lane = lane_output();
  const int warp = threadIdx.x / kWarpSize;
  const int here = count(lane);
  if (outputs <= kBlockWarps) return __ballot_sync(kFullWarp, here > 0 && lane == warp);
  int end = here;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, end, step);
    if (lane >= step) end += other;
  }
  const int all = __shfl_sync(kFullWarp, end, kWarpSize - 1);
  const int start = kBlockWarps * (end - here);
  return __ballot_sync(kFullWarp, here > 0 && start >= warp * all && start < (warp + 1) * all);
}

// Without a map each of these outputs is its own only member.
__device__ __forceinline__ void list_identity(int first, Outputs mine, Storage& shared) {
  const int output = lane_output();
  if (has_lane(mine)) {
    shared.count[output] = 1;
    shared.list[output][0] = {(first + output) | kLastMember, 1.0f};
  }
  __syncwarp();
}

// Put the members of these outputs in ascending order, so that they are summed in the same order every time,
// whatever came first. A lane per output.
__device__ __forceinline__ void order_members(Outputs mine, Storage& shared) {
  const int output = lane_output();
  if (has_lane(mine)) {
    const int count = shared.count[output];
    Member* list = shared.list[output];
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const int moved = list[i].token;
      int at = i;
#pragma unroll 1
      for (; at > 0 && list[at - 1].token > moved; --at) list[at].token = list[at - 1].token;
      list[at].token = moved;
    }
    list[count - 1].token |= kLastMember;
  }
  __syncwarp();
}

// The weights of the members of these outputs, in order, and the totals. A lane per output. `meanwhile` is
// done while the first sizes are under way.
template <class Meanwhile>
__device__ __forceinline__ void weigh_members(const GatherParams& p, int64_t b, int first, Outputs mine,
                                              Storage& shared, Meanwhile&& meanwhile) {
  constexpr int kLoads = 4;  // sizes under way
  const int output = lane_output();
  const int count = has_lane(mine) ? shared.count[output] : 0;
  Member* list = shared.list[output];
  float size[kLoads];
  const auto load = [&](int base) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (base + i < count) size[i] = token_size(p, b, list[base + i].token & ~kLastMember);
    }
  };
  load(0);
  meanwhile();
  float total = 0.0f;
#pragma unroll 1
  for (int base = 0; base < count; base += kLoads) {
    if (base > 0) load(base);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (base + i >= count) break;
      total += size[i];
      list[base + i].weight = size[i];
    }
  }
  if (count > 0 && p.total_ptr != nullptr) p.total_ptr[b * p.tokens + first + output] = total;
  const bool is_plain = p.total_ptr == nullptr || count == 1;  // a lone token keeps its bits
#pragma unroll 1
  for (int i = 0; i < count; ++i) list[i].weight = is_plain ? 1.0f : list[i].weight / total;
  __syncwarp();
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
