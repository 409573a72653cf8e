// A warpgroup's work on 64 queries: scores, softmax, product with the values, output.
#pragma once

#include <cuda_runtime.h>

#include "hopper_plan.cuh"
#include "hopper_softmax.cuh"

namespace tome::attention_ops::hopper {

// Consumers that pass over the same tiles at the same time issue their products in turns. Left alone they
// fall into step, all at the tensor cores and then all at their exponentials, and little overlaps. Where they
// work at different heads, turns would let one wait for a tile that another one's turn must free first.
template <class Plan>
struct Turn {
  static constexpr int kFirstBarrier = 1 + Plan::kGroups;  // after those within the groups
  int group;
  bool is_used;

  __device__ __forceinline__ void take() const {
    if (is_used) named_barrier(kFirstBarrier + group, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void give() const {
    if (is_used) named_arrive(kFirstBarrier + (group + 1) % Plan::kGroups, 2 * kWarpgroupThreads);
  }
};

// One warpgroup's view of its tile of queries.
template <class Plan>
struct Consumer {
  using T = typename Plan::T;
  using Keys = typename Plan::Keys;
  static constexpr int kTileKeys = Plan::kTileKeys;
  static constexpr bool kHasTail = Plan::kTail < kTileKeys;

  const HopperParams& p;
  const Shared<Plan>& shared;
  // All in registers, which is what the producer's were given away for.
  uint32_t q[Plan::Queries::kSteps][4];
  float s[kTileKeys / 2];
  uint32_t weights[kTileKeys / kProductDepth][4];
  float out[Plan::kDim / 2];
  Rows rows;
  Turn<Plan> turn;
  int thread;     // of the group; from a shuffle, or else the compiler reads it anew at each use, slowly
  bool has_rows;  // whether any query of this warp exists

  __device__ __forceinline__ Consumer(const HopperParams& p, const Shared<Plan>& shared)
      : p(p), shared(shared) {}

  // As left operands: of 64 rows a warp has 16. By hand, as the tile is known by its address only.
  __device__ __forceinline__ void read_queries(int group) {
    using Layout = typename Plan::Queries;
    const int lane = threadIdx.x % kWarpSize;
    const int row = threadIdx.x % kWarpgroupThreads / kWarpSize * kWarpRows + lane % 16;
#pragma unroll
    for (int step = 0; step < Layout::kSteps; ++step) {
      const uint32_t from = shared.queries(group) + Layout::offset(row, 2 * step + lane / 16);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(q[step][0]), "=r"(q[step][1]), "=r"(q[step][2]), "=r"(q[step][3])
                   : "r"(from)
                   : "memory");
    }
  }

  // Added to what the scores are started from: their biases.
  template <int kKeys>
  __device__ __forceinline__ void multiply_keys(uint64_t keys) {
    using Op = typename Product<T, kKeys>::ByKeys;
#pragma unroll
    for (int step = 0; step < Keys::kSteps; ++step) {
      multiply<Op, kKeys>(q[step], keys + Keys::columns_advance(step), s);
    }
    cute::warpgroup_commit_batch();
  }

  // The keys of a tile lie in the depth of this product, so a last tile that is short takes fewer of them.
  template <int kKeys>
  __device__ __forceinline__ void multiply_values(uint64_t values) {
    using Op = typename Product<T, Plan::kDim>::ByValues;
#pragma unroll
    for (int step = 0; step < kKeys / kProductDepth; ++step) {
      multiply<Op, Plan::kDim>(weights[step], values + Keys::rows_advance(step), out);
    }
    cute::warpgroup_commit_batch();
  }

  // This warp has read the stage, its products included. The barrier counts warps, not groups, so that none
  // waits for another here.
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (thread % kWarpSize == 0) barrier_arrive(shared.empty(stage));
  }

  // The scores of this warp's rows once more, without the other warps.
  template <int kKeys>
  __device__ __forceinline__ void repeat_scores(int stage) {
    using Op = typename Product<T, 16>::OfWarp;
    load_bias<kKeys>(s, shared.bias(stage) + thread % 4 * 16);
    int lane = thread % kWarpSize;
    asm volatile("" : "+r"(lane));  // else the addresses below are computed ahead, for every tile
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int step = 0; step < Keys::kSteps; ++step) {
        const uint32_t from = shared.keys(stage) + Keys::offset(8 * j + lane % 8, 2 * step + lane / 8 % 2);
        uint32_t b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(b[0]), "=r"(b[1])
                     : "r"(from)
                     : "memory");
        float* c = s + 4 * j;
        Op::fma(c[0], c[1], c[2], c[3], q[step][0], q[step][1], q[step][2], q[step][3], b[0], b[1], c[0],
                c[1], c[2], c[3]);
      }
    }
  }

  // What was summed relative to a lower base. Rows alternate in pairs of accumulators.
  __device__ __forceinline__ void rescale(float2 factor) {
#pragma unroll
    for (int i = 0; i < Plan::kDim / 2; ++i) out[i] *= i / 2 % 2 == 0 ? factor.x : factor.y;
    rows.sum[0] *= factor.x;
    rows.sum[1] *= factor.y;
  }

  // Scores become weights relative to the highest score of the first tile. Later tiles don't look for theirs:
  // should one exceed that by so much that weights overflow, sums show it, and the tile is done again.
  template <int kKeys>
  __device__ __forceinline__ void soften_tile(int stage, bool is_first) {
    if (is_first) raise_base<kKeys>(s, p.scale, rows);
    float sum[2];
    soften<kKeys>(s, p.scale, rows, is_first, sum);
    const bool overflows = !(sum[0] <= kMostSum && sum[1] <= kMostSum);  // true for NaN as well
    if (__any_sync(kFullWarp, overflows)) {
      repeat_scores<kKeys>(stage);
      rescale(raise_base<kKeys>(s, p.scale, rows));
      soften<kKeys>(s, p.scale, rows, true, sum);
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
  }

  __device__ __forceinline__ void load_tile_bias(int stage) {
    load_bias<kTileKeys>(s, shared.bias(stage) + thread % 4 * 16);
  }

  // One tile of keys. Its product with the values is left running, until the next tile's scores are there.
  // The next tile's biases are taken while no product runs that could still need their registers.
  template <int kKeys>
  __device__ __forceinline__ void step(RingPlace<Plan>& at, int previous, bool is_last) {
    const int stage = at.stage;
    const uint64_t keys = Keys::by_columns(shared.keys(stage));
    fence_registers(s);
    cute::warpgroup_arrive();
    multiply_keys<kKeys>(keys);
    turn.give();  // what this one had to issue is issued
    const uint64_t values = Keys::by_rows(shared.values(stage));
    if (!is_last) at.advance();
    cute::warpgroup_wait<0>();  // the product with the values of the tile before is done, too
    fence_registers(s);
    fence_registers(out);
    if (previous >= 0) release(previous);
    if (has_rows) soften_tile<kKeys>(stage, previous < 0);
    barrier_wait(shared.full(at.stage), at.parity);  // the last tile's own, which is there
    pack_weights<T, kKeys>(s, weights);
    load_tile_bias(at.stage);
#pragma unroll
    for (int i = 0; i < kKeys / kProductDepth; ++i) fence_registers(weights[i]);
    fence_registers(out);
    turn.take();
    cute::warpgroup_arrive();
    multiply_values<kKeys>(values);
  }

  // All keys of a head. The short tile comes last, as a step of its own: its products are other instructions.
  __device__ __forceinline__ void attend(RingPlace<Plan> at) {
    rows.reset();
#pragma unroll
    for (int i = 0; i < Plan::kDim / 2; ++i) out[i] = 0.0f;
    int previous = -1;
    barrier_wait(shared.full(at.stage), at.parity);
    load_tile_bias(at.stage);
    turn.take();
    for (int tile = kHasTail ? 1 : 0; tile < p.key_tiles; ++tile) {
      const int stage = at.stage;
      step<kTileKeys>(at, previous, !kHasTail && tile + 1 == p.key_tiles);
      previous = stage;
    }
    if constexpr (kHasTail) {
      const int stage = at.stage;
      step<Plan::kTail>(at, previous, true);
      previous = stage;
    }
    turn.give();
    cute::warpgroup_wait<0>();
    fence_registers(out);
    release(previous);
  }

  // Four lanes hold a row in pairs of columns; exchanged among them they become 16 bytes per lane.
  __device__ __forceinline__ void store(const Item& item, int first_row) {
    constexpr int kBlocks = Plan::kDim / 8;
    const int lane = threadIdx.x % kWarpSize;
    T* out_ptr = static_cast<T*>(p.out_ptr);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = quad_sum(rows.sum[row]);
      const float inverse = 1.0f / sum;
      const int query = first_row + row * 8 + lane / 4;
      if (p.lse_ptr != nullptr && query < p.queries && lane % 4 == 0) {
        store_lse(p, item.head / p.heads, item.head % p.heads, query, rows.base[row], sum);
      }
      const int64_t position = static_cast<int64_t>(item.head / p.heads) * p.queries + query;
      T* row_ptr = out_ptr + (position * p.heads + item.head % p.heads) * Plan::kDim;
      uint32_t word[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        word[j] = pack_pair<T>(out[4 * j + 2 * row] * inverse, out[4 * j + 2 * row + 1] * inverse);
      }
#pragma unroll
      for (int j = 0; j + 4 <= kBlocks; j += 4) {
        uint32_t block[4] = {word[j], word[j + 1], word[j + 2], word[j + 3]};
        gather_block(block);
        if (query < p.queries) {
          *reinterpret_cast<uint4*>(row_ptr + (j + lane % 4) * 8) =
              make_uint4(block[0], block[1], block[2], block[3]);
        }
      }
#pragma unroll
      for (int j = kBlocks / 4 * 4; j < kBlocks; ++j) {
        if (query < p.queries) *reinterpret_cast<uint32_t*>(row_ptr + j * 8 + lane % 4 * 2) = word[j];
      }
    }
  }
};

}  // namespace tome::attention_ops::hopper
