// The warp that streams keys, values and biases through the ring of stages.
#pragma once

#include <cuda_runtime.h>

#include "../vector.cuh"
#include "hopper_plan.cuh"

namespace tome::attention_ops::hopper {

// The biases of a lane's keys of a tile. Keys past the end get -inf: no weight.
template <int kTileKeys>
struct LaneBias {
  static constexpr int kCount = (kTileKeys + kWarpSize - 1) / kWarpSize;
  float size[kCount];

  __device__ __forceinline__ void load(const HopperParams& p, int b, int first_key) {
    const float* size_ptr = p.size_ptr + b * p.size_batch_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = first_key + i * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
      size[i] = key >= p.keys ? 0.0f : p.size_ptr == nullptr ? 1.0f : __ldg(size_ptr + key * p.size_stride);
    }
  }
  __device__ __forceinline__ void store(uint32_t bias, float unit) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = i * kWarpSize + threadIdx.x % kWarpSize;
      const float value = __log2f(size[i]) * unit;
      const uint32_t to = bias + key / 2 * 16 + key % 2 * 4;
      if (key < kTileKeys) {
        asm volatile("st.shared.f32 [%0], %1;\n st.shared.f32 [%0 + 8], %1;" ::"r"(to), "f"(value)
                     : "memory");
      }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void produce(const HopperParams& p, const Shared<Traits>& shared) {
  using Layout = typename Traits::Keys;
  const bool leads = threadIdx.x % kWarpSize == 0;
  Cursor<Traits> cursor(0);
  LaneBias<Traits::kTileKeys> bias;
  bias.load(p, blockIdx.x / p.head_passes / p.heads, 0);
  for (int pass = blockIdx.x; pass < p.passes; pass += gridDim.x) {
    const int head = pass / p.head_passes;
    for (int tile = 0; tile < p.key_tiles; ++tile, cursor.advance()) {
      barrier_wait(shared.empty(cursor.stage), cursor.parity ^ 1);
      const int first_key = tile * Traits::kTileKeys;
      const uint32_t full = shared.full(cursor.stage);
      if (leads) {
        barrier_expect(full, 2 * Layout::kBytes);
#pragma unroll
        for (int panel = 0; panel < Layout::kPanels; ++panel) {
          load_box(p.k_map, full, shared.keys(cursor.stage) + panel * Layout::kPanelBytes,
                   panel * Layout::kPanel, first_key, head % p.heads, head / p.heads);
        }
#pragma unroll
        for (int panel = 0; panel < Layout::kPanels; ++panel) {
          load_box(p.v_map, full, shared.values(cursor.stage) + panel * Layout::kPanelBytes,
                   panel * Layout::kPanel, first_key, head % p.heads, head / p.heads);
        }
      }
      bias.store(shared.bias(cursor.stage), 1.0f / p.scale);
      __syncwarp();
      if (leads) barrier_arrive(full);
      // The next tile's sizes travel while its stage is still in use.
      const bool is_last = tile + 1 == p.key_tiles;
      const int next = is_last ? pass + static_cast<int>(gridDim.x) : pass;
      if (next < p.passes)
        bias.load(p, next / p.head_passes / p.heads, is_last ? 0 : first_key + Traits::kTileKeys);
    }
  }
}

}  // namespace tome::attention_ops::hopper
