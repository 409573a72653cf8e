// The rows of a merge, one warp per output row: shared by merge and merge_add_norm, which differ in what a
// token's row is (x, or x + gamma * branch) and in what happens to a finished row.
//
// A Rows type supplies, for packs of kCount channels:
//   Fetched                      what is loaded for a pack of a token
//   fetch(token, channel)        -> Fetched
//   kPackBytes, copy(token, channel, to), arrived(from) -> Fetched    the same through shared memory, at
//                                the lane's place in a warp's pack; channel is the lane's
//   value(fetched, channel, v)   the pack of the token's row, in float32
//   finish(output, row)          a finished row that lies in registers
//   store(output, channel, v), finish_stored(output)   a finished row, pack by pack
//   prepare()                    what the block does before its first row is finished, with a barrier if it
//   needs one
#pragma once

#include "ring.cuh"

namespace tome::merge_ops {

// Rows that take too many registers, long groups and empty ones: pack by pack over all members. Long groups
// by compensated (Kahan) addition, as hundreds of plain float32 additions would lose bits that the
// definition's tree of additions keeps.
template <int kWidth, class Rows>
__device__ __forceinline__ void merge_slowly(const GatherParams& p, const Rows& rows, const Storage& shared,
                                             int64_t b, int first, int output) {
  constexpr int kCount = Rows::kCount;
  constexpr int kStep = kWarpSize * kCount;
  constexpr int kPacks = kWidth;  // packs of a member in flight
  constexpr int kInFlight = 2;    // members
  const int count = shared.count[output];
  const bool listed = count <= kShortGroup;
  float total = 0.0f;
  if (!listed) {
    scan_members(p, b, first + output, [&](int base, unsigned mask) {
      for (; mask != 0; mask &= mask - 1) total += token_size(p, b, base + __ffs(mask) - 1);
    });
  }
  if (!is_listed(shared, output) && p.total_ptr != nullptr && threadIdx.x % kWarpSize == 0)
    p.total_ptr[b * p.tokens + first + output] = total;
#pragma unroll 1
  for (int channel = lane_channel<kCount>(); channel - lane_channel<kCount>() < p.channels;
       channel += kPacks * kStep) {
    float sum[kPacks][kCount], lost[kPacks][kCount];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sum[k][c] = -0.0f;  // what leaves the sign of a lone -0 alone
        lost[k][c] = 0.0f;
      }
    }
    const auto add = [&](int base, unsigned mask) {
#pragma unroll 1
      while (mask != 0) {
        typename Rows::Fetched fetched[kInFlight][kPacks];
        float weight[kInFlight];
        const int members = min(__popc(mask), kInFlight);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (j >= members) break;
          const int i = base + __ffs(mask) - 1;
          mask &= mask - 1;
          int token = i;
          weight[j] = 1.0f;
          if (listed) {
            token = shared.list[output][i].token & ~kLastMember;
            weight[j] = shared.list[output][i].weight;
          } else if (p.total_ptr != nullptr) {
            weight[j] = token_size(p, b, token) / total;
          }
#pragma unroll
          for (int k = 0; k < kPacks; ++k) {
            if (channel + k * kStep < p.channels) fetched[j][k] = rows.fetch(token, channel + k * kStep);
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (j >= members) break;
#pragma unroll
          for (int k = 0; k < kPacks; ++k) {
            if (channel + k * kStep >= p.channels) break;
            float x[kCount];
            rows.value(fetched[j][k], channel + k * kStep, x);
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              if (listed) {  // as merge_stream does it: how rows lie changes no bit
                sum[k][c] = fmaf(weight[j], x[c], sum[k][c]);
                continue;
              }
              const float term = fmaf(weight[j], x[c], -lost[k][c]);
              const float next = sum[k][c] + term;
              lost[k][c] = (next - sum[k][c]) - term;
              sum[k][c] = next;
            }
          }
        }
      }
    };
    if (listed) {
      add(0, (1u << count) - 1);
    } else {
      scan_members(p, b, first + output, add);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (channel + k * kStep < p.channels) rows.store(output, channel + k * kStep, sum[k]);
    }
  }
  rows.finish_stored(output);
}

// All output rows of the block; kPacks = 0 for rows of any width. `ring`: ring_bytes() of shared memory.
template <int kPacks, class Rows>
__device__ __forceinline__ void merge_rows(const GatherParams& p, const Rows& rows, Storage& shared,
                                           int64_t b, int first, int outputs, char* ring) {
  const bool has_map = p.slot.data_ptr != nullptr;
  if (has_map) list_members(p, b, first, outputs, shared);
  const Outputs mine = share_outputs(outputs, [&](int output) {
    if (!has_map) return output < outputs ? 1 : 0;
    return output < outputs && is_listed(shared, output) ? shared.count[output] : 0;
  });
  if (has_map) {
    order_members(mine, shared);
  } else {
    list_identity(first, mine, shared);
  }
  const auto begin = [&] { weigh_members(p, b, first, has_map ? mine : 0, shared, [&] { rows.prepare(); }); };
  if constexpr (kPacks > 0) {
    merge_stream<kPacks>(p, rows, shared, mine, ring, begin);
  } else {
    begin();
  }
  if constexpr (kPacks == 0) {
    __syncthreads();
  } else {
    if (!has_map) return;
  }
  // In a loop of their own: together the two would need half as many registers again.
#pragma unroll 1
  for (int output = threadIdx.x / kWarpSize; output < outputs; output += kBlockWarps) {
    if (kPacks == 0 || !is_listed(shared, output)) {
      merge_slowly<kPacks == 0 ? (Rows::kCount == 1 ? 8 : 2) : 1>(p, rows, shared, b, first, output);
    }
  }
}

}  // namespace tome::merge_ops
