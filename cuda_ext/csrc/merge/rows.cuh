// The rows of a merge, one warp per output row: shared by merge and merge_add_norm, which differ in what a
// token's row is (x, or x + gamma * branch) and in what happens to a finished row.
//
// A Rows type supplies, for packs of kCount channels:
//   Fetched                      what is loaded for a pack of a token
//   fetch(token, channel)        -> Fetched
//   value(fetched, channel, v)   the pack of the token's row, in float32
//   finish(output, row)          a finished row that lies in registers
//   store(output, channel, v), finish_stored(output)   a finished row, pack by pack
//   prepare()                    what the block does before its first row, up to its first barrier
#pragma once

#include <type_traits>

#include "members.cuh"

namespace tome::merge_ops {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// A row as it lies in a warp: pack k of lane l holds the channels from (32 * k + l) * kCount on.
template <int kPacks, int kCount>
using RowPart = float[kPacks][kCount];

// The kernels for rows in registers: how many packs they hold.
template <int kCount>
struct Widths {
  static constexpr int kPacks[] = {1, 2, 3,
                                   4, 5, 8};  // 16-bit: up to 256, 512, 768, 1024, 1280, 2048 channels
};
template <>
struct Widths<4> {
  static constexpr int kPacks[] = {2, 3, 4, 6, 8, 10};  // float32: up to 256, 384, 512, 768, 1024, 1280
};
constexpr int kWidths = 6;

// How many packs of a row are full, as narrower rows go to a narrower kernel.
template <int kCount, int kPacks>
constexpr int full_packs() {
  int full = 0;
  for (int i = 0; i < kWidths; ++i) {
    if (Widths<kCount>::kPacks[i] < kPacks) full = Widths<kCount>::kPacks[i];
  }
  return full;
}

// Whether pack k of this lane is in the row.
template <int kCount, int kPacks>
__device__ __forceinline__ bool is_inside(int k, int channel, int channels) {
  return k < full_packs<kCount, kPacks>() || channel + k * kWarpSize * kCount < channels;
}

template <int kCount>
__device__ __forceinline__ int lane_channel() {
  return static_cast<int>(threadIdx.x % kWarpSize) * kCount;
}

// Rows that take too many registers, long groups and empty ones: pack by pack over all members. Long groups by
// compensated (Kahan) addition, as hundreds of plain float32 additions would lose bits that the definition's
// tree of additions keeps.
template <int kWidth, class Rows>
__device__ __forceinline__ void merge_slowly(const GatherParams& p, const Rows& rows, const Storage& shared,
                                             int64_t b, int first, int output) {
  constexpr int kCount = Rows::kCount;
  constexpr int kStep = kWarpSize * kCount;
  constexpr int kPacks = kWidth;  // packs of a member in flight
  constexpr int kInFlight = 2;    // members
  const bool has_map = p.slot.data_ptr != nullptr;
  const int count = has_map ? shared.count[output] : 1;
  const bool listed = count <= kShortGroup;
  float total = 0.0f;
  if (!listed) {
    scan_members(p, b, first + output, [&](int base, unsigned mask) {
      for (; mask != 0; mask &= mask - 1) total += token_size(p, b, base + __ffs(mask) - 1);
    });
    if (p.total_ptr != nullptr && threadIdx.x % kWarpSize == 0)
      p.total_ptr[b * p.tokens + first + output] = total;
  }
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
          if (has_map && listed) {
            token = shared.token[output][i];
            weight[j] = shared.weight[output][i];
          } else if (!has_map) {
            token = first + output;
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

// Rows of up to kPacks packs. The members of a warp's rows form one stream: while one of them is added and
// its row finished, the next is under way. Returns whether that was all of the warp's rows.
template <int kPacks, class Rows>
__device__ __forceinline__ bool merge_stream(const GatherParams& p, const Rows& rows, const Storage& shared,
                                             int first, int outputs) {
  constexpr int kCount = Rows::kCount;
  constexpr int kStep = kWarpSize * kCount;
  const int channel = lane_channel<kCount>();
  const bool has_map = p.slot.data_ptr != nullptr;
  bool is_all = true;
  const auto next_listed = [&](int output) {
    while (output < outputs && has_map && !is_listed(shared, output)) {
      is_all = false;
      output += kWarps;
    }
    return output;
  };
  typename Rows::Fetched fetched[kPacks];
  const auto fetch = [&](int output, int member) {
    const int token = has_map ? shared.token[output][member] : first + output;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, p.channels))
        fetched[k] = rows.fetch(token, channel + k * kStep);
    }
  };
  RowPart<kPacks, kCount> sum;
  const auto reset = [&] {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[k][c] = -0.0f;  // what leaves the sign of a lone -0 alone
    }
  };
  reset();
  int output = next_listed(threadIdx.x / kWarpSize);
  int member = 0;
  if (output < outputs) fetch(output, 0);
  if (!has_map) __syncthreads();  // for prepare(); a map has barriers of its own
#pragma unroll 1
  while (output < outputs) {
    const bool has_map = opaque(p.slot.data_ptr != nullptr);
    const float weight = has_map ? shared.weight[output][member] : 1.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, p.channels)) {
        float x[kCount];
        pin(fetched[k]);
        rows.value(fetched[k], channel + k * kStep, x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[k][c] = fmaf(weight, x[c], sum[k][c]);
      }
    }
    const int done = output;
    ++member;
    const bool is_last = !has_map || member == shared.count[output];
    if (is_last) {
      output = next_listed(output + kWarps);
      member = 0;
    }
    if (output < outputs) fetch(output, member);
    if (is_last) {
      rows.template finish<kPacks>(done, sum);
      reset();
    }
  }
  return is_all;
}

// All output rows of the block; kPacks = 0 for rows of any width.
template <int kPacks, class Rows>
__device__ __forceinline__ void merge_rows(const GatherParams& p, const Rows& rows, Storage& shared,
                                           int64_t b, int first, int outputs) {
  const bool has_map = p.slot.data_ptr != nullptr;
  if (has_map) {
    list_members(p, b, first, outputs, shared, [&] { rows.prepare(); });
    order_members(p, b, first, outputs, shared);
  } else {
    rows.prepare();
  }
  if constexpr (kPacks > 0) {
    if (merge_stream<kPacks>(p, rows, shared, first, outputs)) return;
  }
  // In a loop of their own: together the two would need half as many registers again.
#pragma unroll 1
  for (int output = threadIdx.x / kWarpSize; output < outputs; output += kWarps) {
    if (kPacks == 0 || !is_listed(shared, output)) {
      merge_slowly<kPacks == 0 ? (Rows::kCount == 1 ? 8 : 2) : 1>(p, rows, shared, b, first, output);
    }
  }
}

// Calls launch(kCount, kPacks) with the narrowest kernel that holds a row of T in registers, or kPacks = 0.
template <class T, class Launch>
void dispatch_packs(int channels, bool aligned, Launch&& launch) {
  constexpr int kCount = kPackSize<T>;
  if (!aligned) return launch(Constant<1>{}, Constant<0>{});
  bool is_launched = false;
  const auto try_width = [&](auto packs) {
    if (is_launched || channels > decltype(packs)::value * kWarpSize * kCount) return;
    is_launched = true;
    launch(Constant<kCount>{}, packs);
  };
  const auto try_widths = [&](auto... i) {
    (try_width(Constant<Widths<kCount>::kPacks[decltype(i)::value]>{}), ...);
  };
  try_widths(Constant<0>{}, Constant<1>{}, Constant<2>{}, Constant<3>{}, Constant<4>{}, Constant<5>{});
  if (!is_launched) launch(Constant<kCount>{}, Constant<0>{});
}

}  // namespace tome::merge_ops
