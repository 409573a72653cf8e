// Rows that fit a warp's registers: their members stream through shared memory, some of them ahead.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "members.cuh"
#include "packs.cuh"

namespace tome::merge_ops {

// A pack of 8 or 16 bytes to shared memory, asynchronously; not through the L1 cache where that can be had.
template <class T, int kCount>
__device__ __forceinline__ void copy_pack(const T* from, Pack<T, kCount>* to) {
  constexpr int kBytes = sizeof(*to);
  if constexpr (kBytes == 8) {
    cute::SM80_CP_ASYNC_CACHEALWAYS<uint2>::copy(*reinterpret_cast<const uint2*>(from),
                                                 *reinterpret_cast<uint2*>(to));
  } else {
    static_assert(kBytes % kAccessBytes == 0);
#pragma unroll
    for (int i = 0; i < kBytes / kAccessBytes; ++i) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(reinterpret_cast<const uint4*>(from)[i],
                                                   reinterpret_cast<uint4*>(to)[i]);
    }
  }
}

// Where a warp is in the stream of its members.
struct MemberCursor {
  Outputs left;  // the outputs that it hasn't left behind
  int member = 0;

  __device__ __forceinline__ int output() const { return __ffs(left) - 1; }
  __device__ __forceinline__ void step(bool is_last) {
    if (is_last) left &= left - 1;
    member = is_last ? 0 : member + 1;
  }
};

// A warp's members under way at a time: some KiB, as many warps are to share a multiprocessor.
template <class Rows, int kPacks>
constexpr int ring_depth() {
  constexpr int kRingBytes = 6 << 10, kMostMembers = 8;
  constexpr int kFit = kPacks == 0 ? 1 : kRingBytes / (kPacks * Rows::kPackBytes);
  return kFit < 1 ? 1 : kFit > kMostMembers ? kMostMembers : kFit;
}

// Blocks of few outputs do not fill a multiprocessor: more members travel, as the largest group is waited
// for.
// The widest rows have no register left for the choice.
template <class Rows, int kPacks>
constexpr int few_times() {
  return kPacks * Rows::kPackBytes <= 5 << 10 ? 2 : 1;
}
__host__ __device__ inline bool is_few(const GatherParams& p) { return p.block_outputs <= kBlockWarps; }

template <class Rows, int kPacks>
__host__ __device__ constexpr int ring_bytes(bool is_few) {
  return kBlockWarps * ring_depth<Rows, kPacks>() * (is_few ? few_times<Rows, kPacks>() : 1) * kPacks *
         Rows::kPackBytes;
}

// Rows of up to kPacks packs. The members of a warp's rows form one stream through a ring in shared memory,
// where each lane reads what it has copied itself: while one of them is added and its row finished, the next
// are under way. `begin` is what is done behind the first copies.
template <int kPacks, class Rows, class Begin>
__device__ __forceinline__ void merge_stream(const GatherParams& p, const Rows& rows, const Storage& shared,
                                             Outputs mine, char* ring, Begin&& begin) {
  constexpr int kCount = Rows::kCount;
  constexpr int kDepth = ring_depth<Rows, kPacks>();
  constexpr int kFewDepth = kDepth * few_times<Rows, kPacks>();
  constexpr int kStageBytes = kPacks * Rows::kPackBytes;
  const auto ring_end = [&] { return (is_few(p) ? kFewDepth : kDepth) * kStageBytes; };
  const int channel = lane_channel<kCount>();
  char* const stages = ring + threadIdx.x / kWarpSize * ring_end();
  MemberCursor ahead{mine}, now{mine};
  const auto copy_next = [&](int at) {
    if (ahead.left != 0) {
      const int token = shared.list[ahead.output()][ahead.member].token;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (is_inside<kCount, kPacks>(k, channel, p.channels))
          rows.copy(token & ~kLastMember, channel + k * kWarpSize * kCount,
                    stages + at + k * Rows::kPackBytes);
      }
      ahead.step(token < 0);
    }
    cute::cp_async_fence();  // an empty group behind the last member keeps the count of groups the same
  };
#pragma unroll 1
  for (int at = 0; at < ring_end(); at += kStageBytes) copy_next(at);
  begin();
  RowPart<kPacks, kCount> sum;
  const auto reset = [&] {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[k][c] = -0.0f;  // what leaves the sign of a lone -0 alone
    }
  };
  reset();
  int at = 0;  // in the ring
#pragma unroll 1
  while (now.left != 0) {
    const int output = now.output();
    const Member member = shared.list[output][now.member];
    if (is_few(p)) {
      cute::cp_async_wait<kFewDepth - 1>();
    } else {
      cute::cp_async_wait<kDepth - 1>();
    }
    __syncwarp();  // nothing below is read before
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, p.channels)) {
        float x[kCount];
        rows.value(rows.arrived(stages + at + k * Rows::kPackBytes), channel + k * kWarpSize * kCount, x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[k][c] = fmaf(member.weight, x[c], sum[k][c]);
      }
    }
    __syncwarp();  // and nothing above later
    copy_next(at);
    at = at + kStageBytes == ring_end() ? 0 : at + kStageBytes;
    if (member.token < 0) {
      rows.template finish<kPacks>(output, sum);
      reset();
    }
    now.step(member.token < 0);
  }
}

}  // namespace tome::merge_ops
