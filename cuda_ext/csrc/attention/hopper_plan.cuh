// What the kernel for Hopper is made of: tile sizes, shared memory, the ring of stages, the order of work.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "../hopper/async.cuh"
#include "hopper_products.cuh"

namespace tome::attention_ops::hopper {

constexpr int kWarpRows = 16;
constexpr int kSharedBytes = 227 << 10;  // what a block may have on compute capability 9.0

constexpr int tile_keys(int dim) { return dim == 72 || dim == 80 ? 80 : 96; }

template <class T_, int kDim_, int kTail_>
struct RingPlan {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kTail = kTail_;  // keys that the last tile has room for
  static constexpr int kGroups = kDim <= 80 ? 3 : 2;
  static constexpr int kTileKeys = tile_keys(kDim);
  static constexpr int kThreads = (kGroups + 1) * kWarpgroupThreads;
  // The producer's warpgroup leaves most of its share of the registers to the consumers.
  static constexpr int kProducerRegisters = kGroups == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 240;
  using Queries = Tile<kDim, kWarpgroupRows>;
  using Keys = Tile<kDim, kTileKeys>;
  static constexpr int kBiasBytes = 2 * kTileKeys * static_cast<int>(sizeof(float));  // each for two rows
  static constexpr int kStageBytes = 2 * Keys::kBytes + kBiasBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages =
      std::min(12, (kSharedBytes - kSwizzleBytes - kBarrierBytes - kGroups * Queries::kBytes) / kStageBytes);
  static_assert(kStages >= 2, "a tile's values are in use while the next tile's keys are");
  static constexpr int kTilesEnd = kStages * 2 * Keys::kBytes + kGroups * Queries::kBytes;
  static constexpr int kUsedBytes = kSwizzleBytes + kTilesEnd + kStages * kBiasBytes + kBarrierBytes;
  static_assert((2 * kStages + kGroups) * 8 <= kBarrierBytes && kUsedBytes <= kSharedBytes);
  static_assert(Keys::kBytes % kSwizzleBytes == 0 || Keys::kPanel < 64);
};

struct HopperParams {
  CUtensorMap q_map, k_map, v_map;
  void* out_ptr;
  float* lse_ptr;
  const float* size_ptr;
  int64_t size_batch_stride, size_stride;
  int heads, queries, keys;
  float scale;  // of powers of two
  int query_tiles, key_tiles;
  int pass_tiles;   // tiles of queries that see each stage
  bool has_turns;   // whether consumers issue products in turns
  int head_passes;  // passes that a head's tiles of queries make
  int passes;       // of all heads
};

// Where everything lies in the block's shared memory, as addresses for the copy engine and the products.
template <class Plan>
struct Shared {
  uint32_t address;

  __device__ __forceinline__ explicit Shared(char* shared) {
    const uint32_t start = shared_address(shared);
    // Held in a register, too, rather than computed anew at each use.
    address = uniform((start + kSwizzleBytes - 1) & ~(kSwizzleBytes - 1));
  }
  __device__ uint32_t keys(int stage) const { return address + stage * 2 * Plan::Keys::kBytes; }
  __device__ uint32_t values(int stage) const { return keys(stage) + Plan::Keys::kBytes; }
  __device__ uint32_t queries(int group) const {
    return address + Plan::kStages * 2 * Plan::Keys::kBytes + group * Plan::Queries::kBytes;
  }
  __device__ uint32_t bias(int stage) const { return address + Plan::kTilesEnd + stage * Plan::kBiasBytes; }
  __device__ uint32_t barriers() const {
    return address + Plan::kTilesEnd + Plan::kStages * Plan::kBiasBytes;
  }
  __device__ uint32_t full(int stage) const { return barriers() + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers() + 8 * (Plan::kStages + stage); }
  __device__ uint32_t queries_full(int group) const { return barriers() + 8 * (2 * Plan::kStages + group); }
};

// Ask the copy engine for the rows of a tile, panel by panel, and for all columns.
template <class Layout>
__device__ __forceinline__ void load_tile(const HopperParams& p, const CUtensorMap& map, uint32_t barrier,
                                          uint32_t shared, int head, int first_row) {
#pragma unroll
  for (int panel = 0; panel < Layout::kPanels; ++panel) {
    load_box(map, barrier, shared + panel * Layout::Main::kBytes, panel * Layout::kPanel, first_row,
             head % p.heads, head / p.heads);
  }
}

// A stage of the ring and the parity of its current use.
template <class Plan>
struct RingPlace {
  int stage;
  uint32_t parity;

  __device__ __forceinline__ explicit RingPlace(int use)
      : stage(use % Plan::kStages), parity(use / Plan::kStages & 1) {}
  __device__ __forceinline__ void advance() {
    if (++stage == Plan::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile of queries of a head, and the pass in which its consumer sees it.
struct Item {
  int head, tile, round;
  bool exists;   // a block has no more items after one that doesn't
  bool is_used;  // the last pass of a head may have fewer tiles than the others

  __device__ __forceinline__ Item(const HopperParams& p, int item) {
    round = item / p.pass_tiles;
    const int64_t pass = blockIdx.x + static_cast<int64_t>(round) * gridDim.x;
    exists = pass < p.passes;
    head = static_cast<int>(pass) / p.head_passes;
    tile = static_cast<int>(pass) % p.head_passes * p.pass_tiles + item % p.pass_tiles;
    is_used = exists && tile < p.query_tiles;
  }
};

}  // namespace tome::attention_ops::hopper
