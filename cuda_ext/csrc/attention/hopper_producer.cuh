// The warps that stream keys and values, and their biases, through the ring of stages.
#pragma once

#include <cuda_runtime.h>

#include "../vector.cuh"
#include "hopper_plan.cuh"

namespace tome::attention_ops::hopper {

// The biases of a lane's pairs of keys of a tile. Keys past the end get -inf: no weight.
template <int kTileKeys>
struct LaneBias {
  static constexpr int kPairs = kTileKeys / 2;
  static constexpr int kCount = (kPairs + kWarpSize - 1) / kWarpSize;
  float size[kCount][2];

  __device__ __forceinline__ void load(const HopperParams& p, int b, int first_key) {
    const float* size_ptr = p.size_ptr + b * p.size_batch_stride;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const int pair = i / 2 * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
      const int key = first_key + 2 * pair + i % 2;
      size[i / 2][i % 2] = key >= p.keys           ? 0.0f
                           : p.size_ptr == nullptr ? 1.0f
                                                   : __ldg(size_ptr + key * p.size_stride);
    }
  }
  __device__ __forceinline__ void store(uint32_t barrier, uint32_t bias, float unit) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int pair = i * kWarpSize + threadIdx.x % kWarpSize;
      const float left = __log2f(size[i][0]) * unit;
      const float right = __log2f(size[i][1]) * unit;
      if (pair < kPairs) store_async(barrier, bias + pair * 16, left, right, left, right);
    }
  }
};

// One thread loads tiles, the second warp writes their biases: neither waits for the other.
template <class Plan>
__device__ __forceinline__ void produce(const HopperParams& p, const Shared<Plan>& shared) {
  using Layout = typename Plan::Keys;
  const int thread = threadIdx.x - Plan::kGroups * kWarpgroupThreads;
  const bool is_loader = thread == 0;
  if (!is_loader && thread / kWarpSize != 1) return;
  RingPlace<Plan> cursor(0);
  LaneBias<Plan::kTileKeys> bias;
  if (!is_loader && blockIdx.x < p.passes) bias.load(p, blockIdx.x / p.head_passes / p.heads, 0);
  for (int pass = blockIdx.x; pass < p.passes; pass += gridDim.x) {
    for (int tile = 0; tile < p.key_tiles; ++tile, cursor.advance()) {
      const int first_key = tile * Plan::kTileKeys;
      const uint32_t full = shared.full(cursor.stage);
      barrier_wait(shared.empty(cursor.stage), cursor.parity ^ 1);
      if (is_loader) {
        // The one arrival that the stage waits for, beside the bytes of the biases too.
        barrier_arrive_expecting(full, Plan::kStageBytes);
        load_tile<Layout>(p, p.k_map, full, shared.keys(cursor.stage), pass / p.head_passes, first_key);
        load_tile<Layout>(p, p.v_map, full, shared.values(cursor.stage), pass / p.head_passes, first_key);
        continue;
      }
      bias.store(full, shared.bias(cursor.stage), 1.0f / p.scale);
      // The next tile's sizes travel while its stage is still in use.
      const bool is_last = tile + 1 == p.key_tiles;
      const int next = is_last ? pass + static_cast<int>(gridDim.x) : pass;
      if (next < p.passes)
        bias.load(p, next / p.head_passes / p.heads, is_last ? 0 : first_key + Plan::kTileKeys);
    }
  }
}

}  // namespace tome::attention_ops::hopper
