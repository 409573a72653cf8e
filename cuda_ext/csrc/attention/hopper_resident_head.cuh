// What a block of the kernel whose keys all lie in shared memory does: its head's keys and values in, then 64
// queries after another through scores, weights and output, then a tail of few queries.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>

#include "../launch.cuh"
#include "hopper_resident.cuh"

namespace tome::attention_ops::hopper {

template <class T, int kKeys>
struct ResidentHead {
  using Plan = ResidentPlan<kKeys>;
  using Tile = typename Plan::Tile;
  using Layout = RowLayout<kDim>;
  using ByLeft = typename Product<T, Plan::kLeft>::ByKeys;
  using ByRight = typename Product<T, Plan::kRight>::ByKeys;
  using ByValues = typename Product<T, kDim>::ByValues;
  static constexpr int kSteps = kKeys / kKeyStep;
  static constexpr int kSizes = (kKeys + kThreads - 1) / kThreads;  // of a thread

  const HopperResidentParams& plan;
  const AttentionParams& p;
  int warp, lane;
  int b, h;
  char* shared;          // from where the swizzle repeats
  char* queries;         // of this warp, then their output
  int begin, step, end;  // of the queries in full tiles
  int first;             // of the tile in work
  uint32_t unit_pair;
  uint64_t by_keys, by_values, by_bias;  // descriptors
  float c;
  int64_t row_stride;
  T* head_ptr;  // of the output
  uint32_t q[kDim / 16][4];

  __device__ __forceinline__ explicit ResidentHead(const HopperResidentParams& plan)
      : plan(plan), p(plan.attention) {
    warp = uniform(threadIdx.x / kWarpSize);
    lane = threadIdx.x % kWarpSize;
    const unsigned head = blockIdx.x / static_cast<unsigned>(plan.splits);
    b = uniform(head / static_cast<unsigned>(p.heads));
    h = uniform(head % static_cast<unsigned>(p.heads));
    const uint32_t unaligned = cute::cast_smem_ptr_to_uint(dynamic_shared());
    shared = dynamic_shared() + (-unaligned & (kSwizzleBytes - 1));
    queries = shared + Plan::kQueries + warp * kTileRows * Layout::kBytes;
  }

  // Queries, keys and values start to come; returns once the first two are there, with all biases.
  __device__ __forceinline__ void start() {
    await_previous();
    // Sizes first: what becomes of them takes longest.
    float size[kSizes];
#pragma unroll
    for (int i = 0; i < kSizes; ++i) size[i] = key_size(p, b, threadIdx.x + i * kThreads);
    begin = (blockIdx.x % static_cast<unsigned>(plan.splits)) * kWarpgroupRows;
    step = plan.splits * kWarpgroupRows;
    const int rest = p.queries % kWarpgroupRows;
    end = rest <= kTailRows ? p.queries - rest : p.queries;
    load_queries(begin);
    load_head(p.k, shared);
    load_head(p.v, shared + Plan::kValues);
#pragma unroll
    for (int i = 0; i < kSizes; ++i) {
      const int key = threadIdx.x + i * kThreads;
      if (key < kKeys) {
        *reinterpret_cast<uint4*>(shared + Plan::kBias + key * kBiasBytes) =
            split_bias<T>(__logf(size[i]) * plan.to_bias);
      }
    }
    unit_pair = pack_pair<T>(plan.unit / 2, lane % 4 == 0 ? plan.unit / 2 : 0.0f);
    cute::cp_async_wait<1>();
    cutlass::arch::fence_view_async_shared();
    __syncthreads();

    const uint32_t base = cute::cast_smem_ptr_to_uint(shared);
    by_keys = Tile::by_columns(base);
    by_values = Tile::by_rows(base + Plan::kValues);
    // Eight rows of 16 bytes after another, without a swizzle; no bytes to the next eight columns.
    by_bias = uniform_low_word(base + Plan::kBias) | static_cast<uint64_t>(8 * kBiasBytes >> 4) << 32;
    c = p.scale * kLog2E;
    row_stride = static_cast<int64_t>(p.heads) * kDim;
    head_ptr = static_cast<T*>(p.out_ptr) + static_cast<int64_t>(b) * p.queries * row_stride + h * kDim;
    read_queries();
    first = begin;
  }

  __device__ __forceinline__ void load_queries(int first) const {
    const int row = first < end ? first + warp * kTileRows : first;  // all warps take the same of a tail
    const int rows = p.queries - row;
    copy_tile<T, kWarpSize, kTileRows, kTileRows>(rows_address<T>(p.q, b, h, rows > 0 ? row : 0),
                                                  p.q.row_stride, rows, queries);
    cute::cp_async_fence();
  }

  __device__ __forceinline__ void load_head(const Heads& heads, char* to) const {
    copy_tile<T, kThreads, kKeys, Plan::kPadded>(rows_address<T>(heads, b, h, 0), heads.row_stride, p.keys,
                                                 to);
    cute::cp_async_fence();
  }

  __device__ __forceinline__ void read_queries() {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      load_matrices(queries + Layout::offset(lane % 16, 2 * k + lane / 16), q[k]);
    }
    __syncwarp();
  }

  // Write the tile before this one, which lies where its queries lay, and load the one behind.
  __device__ __forceinline__ void pass_on() const {
    if (first != begin) {
      const int row = first - step + warp * kTileRows;
      const int lane = forget(threadIdx.x) % kWarpSize;
#pragma unroll
      for (int i = 0; i < kTileRows; i += kWarpSize / Layout::kChunks) {
        const int at = i + lane / Layout::kChunks;
        const int chunk = lane % Layout::kChunks;
        const uint4 pack = *reinterpret_cast<const uint4*>(queries + Layout::offset(at, chunk));
        if (row + at < p.queries) {
          *reinterpret_cast<uint4*>(head_ptr + (row + at) * row_stride + chunk * kChunkChannels) = pack;
        }
      }
      __syncwarp();
    }
    if (first + step < p.queries) load_queries(first + step);
  }

  __device__ __forceinline__ void wait_for_values() const {
    if (first != begin) return;  // they are there
    if (begin + step < p.queries) {
      cute::cp_async_wait<1>();  // but for the next queries
    } else {
      cute::cp_async_wait<0>();
    }
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
  }

  // The left operand of the product that adds the bias. Made anew for every product instead of being kept:
  // registers are scarce.
  __device__ __forceinline__ void read_unit(uint32_t (&unit)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) unit[i] = forget(lane % 4 < 2 ? unit_pair : 0);
  }

  // Two products of queries and keys, each with its biases, under way one after the other.
  __device__ __forceinline__ void multiply_keys(Scores<kKeys>& score) const {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) score[i] = 0.0f;
    uint32_t unit[4];
    read_unit(unit);
    fence_registers(unit);
    fence_registers(score.left);
    fence_registers(score.right);
    cute::warpgroup_arrive();
    multiply<ByLeft, Plan::kLeft>(unit, by_bias, score.left);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply<ByLeft, Plan::kLeft>(q[k], advance(by_keys, k * kKeyStep * 2), score.left);
    }
    cute::warpgroup_commit_batch();
    multiply<ByRight, Plan::kRight>(unit, advance(by_bias, Plan::kLeft * kBiasBytes), score.right);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply<ByRight, Plan::kRight>(
          q[k], advance(by_keys, Plan::kLeft * Tile::Main::kPitch + k * kKeyStep * 2), score.right);
    }
    cute::warpgroup_commit_batch();
  }

  // The highest scores of a thread's two rows as offsets of their exponents: those of the first product are
  // looked at while the second runs.
  __device__ __forceinline__ void find_highest(Scores<kKeys>& score, float (&offset)[2]) const {
    float top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
    cute::warpgroup_wait<1>();
    fence_registers(score.left);
#pragma unroll
    for (int n = 0; n < Plan::kLeft / 8; ++n) score.look(n, top);
    fence_registers(top[0]);
    fence_registers(top[1]);
    cute::warpgroup_wait<0>();
    fence_registers(score.right);
#pragma unroll
    for (int n = Plan::kLeft / 8; n < kKeys / 8; ++n) score.look(n, top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      offset[half] = exponent_offset(quad_max(fmaxf(top[half][0], top[half][1])), c);
    }
  }

  // Which part of the product with the values takes the n-th 16 keys.
  static constexpr int part_of(int n) { return n * Plan::kParts / kSteps; }

  // The weights of a part of the keys, from their scores, as left operands; and the sums of the rows.
  __device__ __forceinline__ void weigh(int part, Scores<kKeys>& score, const float (&offset)[2],
                                        uint32_t (&weight)[kSteps][4], float (&sum)[2][2]) const {
    if (first + warp * kTileRows < p.queries) {  // else what this warp multiplies is not stored
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        if (part_of(n) != part) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = score[8 * n + i];
          x = fast_exp2(fmaf(x, c, offset[i / 2 % 2]));
          sum[i / 2 % 2][i % 2] += x;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      if (part_of(n) != part) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[n][i] = pack_pair<T>(score[8 * n + 2 * i], score[8 * n + 2 * i + 1]);
      }
      fence_registers(weight[n]);
    }
  }

  // Weights and values: a part's product runs while the weights of the next are computed.
  __device__ __forceinline__ void multiply_values(int part, const uint32_t (&weight)[kSteps][4],
                                                  float (&out)[kDim / 2]) const {
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      if (part_of(n) != part) continue;
      multiply<ByValues, kDim>(weight[n], advance(by_values, n * kKeyStep * Tile::Main::kPitch), out);
    }
    cute::warpgroup_commit_batch();
  }

  // To where the queries lay, from where whole rows are written later.
  __device__ __forceinline__ void keep_output(const float (&out)[kDim / 2], const float (&factor)[2]) const {
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m[i] = pack_pair<T>(out[8 * j + 2 * i] * factor[i % 2], out[8 * j + 2 * i + 1] * factor[i % 2]);
      }
      cute::SM90_U32x4_STSM_N::copy(
          m[0], m[1], m[2], m[3],
          *reinterpret_cast<cute::uint128_t*>(queries + Layout::offset(lane % 16, 2 * j + lane / 16)));
    }
    __syncwarp();
  }

  // 64 queries.
  __device__ __forceinline__ void attend_tile() {
    if (Plan::kIsFull) pass_on();
    Scores<kKeys> score;
    multiply_keys(score);
    if (!Plan::kIsFull) pass_on();
    float offset[2];
    find_highest(score, offset);
    float sum[2][2] = {};
    float out[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    uint32_t weight[kSteps][4];
#pragma unroll
    for (int part = 0; part < Plan::kParts; ++part) {
      weigh(part, score, offset, weight, sum);
      if (part == 0) {
        wait_for_values();
        fence_registers(out);
      }
      multiply_values(part, weight, out);
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[half][0] + sum[half][1]);
      factor[half] = fast_reciprocal(total);
      const int query = first + warp * kTileRows + half * 8 + lane / 4;
      if (p.lse_ptr != nullptr && query < p.queries && lane % 4 == 0) {
        store_lse(p, b, h, query, -offset[half], total);
      }
    }
    cute::warpgroup_wait<0>();
    fence_registers(out);
    if (first + step < p.queries) {
      cute::cp_async_wait<0>();
      __syncwarp();
      read_queries();
    }
    keep_output(out, factor);
  }

  __device__ __forceinline__ void attend() {
    start();
#pragma unroll 1
    for (; first < end; first += step) attend_tile();
    pass_on();
    if (first >= p.queries) return;
    wait_for_values();
    uint32_t unit[4];
    read_unit(unit);
    const TailMemory memory{shared, shared + Plan::kValues, shared + Plan::kBias, shared + Plan::kQueries,
                            shared + Plan::kTail};
    attend_tail<T, kDim, kKeys>(q, unit, memory, warp, c, head_ptr + first * row_stride, row_stride,
                                p.queries - first, [&](int row, float base, float sum) {
                                  if (p.lse_ptr != nullptr) store_lse(p, b, h, first + row, base, sum);
                                });
  }
};

}  // namespace tome::attention_ops::hopper
