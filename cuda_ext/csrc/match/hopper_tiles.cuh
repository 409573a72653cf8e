// How the score kernel for Hopper divides its work and its shared memory, and how targets stream through it.
#pragma once

#include "../hopper/async.cuh"
#include "../hopper/tile.cuh"
#include "../hopper/warpgroup.cuh"
#include "block.cuh"

namespace tome::match {

constexpr int kWideGroupColumns = 32;  // targets of a group: eight for each of the four threads of a row
constexpr int kRowGroups = 4;          // of each row, on average, that can be listed

// A tile of targets: panels of 64 numbers, then panels of 16.
template <int kSteps, int kColumns>
using WideTile = sm90::Tile<kSteps * kProductDepth, kColumns, 64>;

// kColumnGroups warpgroups share the columns of a tile.
template <int kBlockRows, int kBlockColumns, int kColumnGroups, int kDepth, int kTiles, int kMinBlocks>
struct WideTiling {
  static constexpr int kRows = kBlockRows;
  static constexpr int kColumns = kBlockColumns;
  static constexpr int kGroupsN = kColumnGroups;
  static constexpr int kSteps = kDepth;
  static constexpr int kPadded = kSteps * kProductDepth;
  static constexpr int kStages = kTiles;
  static constexpr int kBlocks = kMinBlocks;
  static constexpr int kThreads = kRows / sm90::kWarpgroupRows * kGroupsN * sm90::kWarpgroupThreads;
  static constexpr int kRowLanes = kSteps <= 4 ? 8 : 16;  // of Stream
  static constexpr int kWarpsN = kThreads / kRows;        // of the last look, as of BlockTiling
  static constexpr int kExactColumns = kWarpsN * kGroupColumns;

  // Shared memory: sources, the ring of tiles, groups and pairs listed, and what is known of each row.
  static constexpr int kSourcesBytes = kRows * row_bytes(kPadded);
  static constexpr int kRingBytes = kStages * WideTile<kSteps, kColumns>::kBytes;
  static constexpr int kListsAt = kSourcesBytes + sm90::kSwizzleBytes + kRingBytes;
  static constexpr int kWarpPairs = kSteps > 4 ? 48 : 80;
  static constexpr int kBestAt = kListsAt + (kRows * kRowGroups + kThreads / kWarpSize * kWarpPairs) *
                                                static_cast<int>(sizeof(Candidate));
  static constexpr int shared_bytes(int) { return kBestAt + kRows * (8 + 4); }
  static_assert(kListsAt >= (kRows + 2 * kExactColumns) * row_bytes(kPadded));
};

// How far one warpgroup may run ahead of another: while one waits for products another takes maxima.
constexpr int kDrift = 2;

// A look at all targets: at their high halves, or at both halves, in tiles with half as many columns.
template <class Tiling, bool kBothHalves>
struct Look {
  static constexpr bool kBoth = kBothHalves;
  static constexpr int kSteps = Tiling::kSteps;
  static constexpr int kColumns = kBoth ? Tiling::kColumns / 2 : Tiling::kColumns;
  static constexpr int kGroupColumns = kColumns / Tiling::kGroupsN;      // of a warpgroup in a tile
  static constexpr int kPart = kGroupColumns / 2;                        // columns of a product
  static constexpr int kSeenGroups = kGroupColumns / kWideGroupColumns;  // groups of one tile
  static constexpr int kPartGroups = kSeenGroups / 2;
  static constexpr int kStages = Tiling::kStages;
  using Tile = WideTile<(1 + kBoth) * kSteps, kColumns>;
  static_assert(Tile::Last::kBytes % sm90::kSwizzleBytes == 0);
  static_assert(kPart == (kBoth ? 32 : 64) && kStages > 1 + kDrift);
  static_assert(kStages * Tile::kBytes <= Tiling::kRingBytes);

  // Of a thread's g-th group in a tile: the first column, and how far behind it the n-th is. Two groups share
  // a product of the high halves, one of even columns and one of odd ones.
  __device__ static int group_column(int g) {
    return threadIdx.x % 4 * 2 + (kBoth ? g * kPart : g / 2 * kPart + g % 2);
  }
  __device__ static int target_column(int n) {
    return kBoth ? n % 2 + n / 2 * kProductColumns : n * kProductColumns;
  }
};

// The ring of tiles starts where the widest swizzle repeats.
template <class Tiling>
__device__ __forceinline__ char* ring(char* shared) {
  char* const from = shared + Tiling::kSourcesBytes;
  return from + (-static_cast<uint32_t>(__cvta_generic_to_shared(from)) & (sm90::kSwizzleBytes - 1));
}

constexpr int kBoxTargets = 128;  // of one copy: a tile of either look is a multiple

// Both halves of the targets as the copy engine sees them, in panels of either width. Targets past the end
// arrive as NaN.
struct WideParams : Params {
  CUtensorMap wide, narrow;
};

// All targets of an image, tile by tile, by the tensor copy engine: nothing waits for copies but those who
// multiply. A place of the ring has two barriers: a tile has come, and all warps' products have been.
template <class Tiling, class Look>
struct WideStream {
  using Tile = typename Look::Tile;
  const WideParams& p;
  const Share& share;
  char* tiles;
  uint32_t barriers;  // address of kStages that count bytes, then kStages that count warps

  __device__ __forceinline__ int count() const { return (p.targets + Look::kColumns - 1) / Look::kColumns; }
  __device__ __forceinline__ char* place(int tile) const {
    return tiles + tile % Look::kStages * Tile::kBytes;
  }
  __device__ __forceinline__ uint32_t full(int tile) const { return barriers + tile % Look::kStages * 8; }
  __device__ __forceinline__ uint32_t empty(int tile) const { return full(tile) + Look::kStages * 8; }

  __device__ __forceinline__ void init() const {
    sm90::prefetch_map(p.wide);
    for (int i = 0; i < Look::kStages; ++i) {
      sm90::barrier_init(full(i), 1);
      sm90::barrier_init(empty(i), Tiling::kThreads / kWarpSize);
    }
    sm90::barrier_fence();
  }

  // By one thread.
  __device__ __forceinline__ void copy_tile(int tile) const {
    using namespace sm90;
    barrier_arrive_expecting(full(tile), Tile::kBytes);
    const uint32_t to = shared_address(place(tile));
#pragma unroll
    for (int first = 0; first < Look::kColumns; first += kBoxTargets) {
      const int column = tile * Look::kColumns + first;
#pragma unroll
      for (int i = 0; i < Tile::kPanels; ++i) {
        load_box(p.wide, full(tile), to + i * Tile::Main::kBytes + first * Tile::Main::kPitch,
                 i * Tile::kPanel, column, 0, share.image);
      }
#pragma unroll
      for (int i = 0; i < Tile::kRestPanels; ++i) {
        load_box(p.narrow, full(tile),
                 to + Tile::kRestAt + i * Tile::Last::kBytes + first * Tile::Last::kPitch,
                 Tile::kPanels * Tile::kPanel + i * Tile::kRest, column, 0, share.image);
      }
    }
  }

  __device__ __forceinline__ void begin(int first, int last) const {
    if (threadIdx.x != 0) return;
    for (int tile = first; tile < min(last, count()); ++tile) copy_tile(tile);
  }

  __device__ __forceinline__ void await(int tile) const {
    sm90::barrier_wait(full(tile), tile / Look::kStages % 2);
  }

  // Copy into the place of a tile that all have left by now, or nearly.
  __device__ __forceinline__ void refill(int tile) const {
    const int old = tile - 1 - kDrift;
    if (threadIdx.x == 0 && old >= 0 && old + Look::kStages < count()) {
      sm90::barrier_wait(empty(old), old / Look::kStages % 2);
      copy_tile(old + Look::kStages);
    }
    __syncwarp();
  }

  // This warp's products of a tile are done.
  __device__ __forceinline__ void release(int tile) const {
    if (threadIdx.x % kWarpSize == 0) sm90::barrier_arrive(empty(tile));
  }
};

}  // namespace tome::match
