// How the score kernel for Hopper divides its work and its shared memory, and how targets stream through it.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "../attention/hopper_memory.cuh"
#include "block.cuh"

namespace tome::match {

constexpr int kGroupRows = 64;         // sources of a warpgroup
constexpr int kGroupThreads = 128;     // of a warpgroup
constexpr int kWideGroupColumns = 32;  // targets of a group: eight for each of the four threads of a row
constexpr int kSwizzleBytes = 1024;    // where the widest swizzle repeats
constexpr int kRowGroups = 4;          // of each row, on average, that can be listed
constexpr int kRowPairs = 8;           // likewise single targets

// How a tile of targets lies in shared memory: panels of 64 numbers, 128 bytes wide, then panels of 16, each
// swizzled so that neither copies nor products meet a bank twice.
template <int kSteps, int kColumns>
struct WideTile {
  static constexpr int kWide = kSteps / 4;
  static constexpr int kWideBytes = kColumns * 128;
  static constexpr int kNarrowBytes = kColumns * 32;
  static constexpr int kBytes = kWide * kWideBytes + kSteps % 4 * kNarrowBytes;
  static_assert(kNarrowBytes % kSwizzleBytes == 0);

  // Byte offset of the chunk-th 16 bytes of a target.
  __device__ static int offset(int target, int chunk) {
    if (chunk < 8 * kWide) {
      return chunk / 8 * kWideBytes + target * 128 + ((chunk ^ target) & 7) * 16;
    }
    const int narrow = chunk - 8 * kWide;
    return kWide * kWideBytes + narrow / 2 * kNarrowBytes + target * 32 + ((narrow ^ target >> 2) & 1) * 16;
  }

  // Of the k-th 16 numbers of the targets from `first` on, a multiple of 8: where a product finds them.
  // `low_word`: the tile's address in units of 16 bytes.
  __device__ static uint64_t descriptor(uint32_t low_word, int first, int k) {
    const bool is_wide = k < 4 * kWide;
    const int pitch = is_wide ? 128 : 32;
    const int panel =
        is_wide ? k / 4 * kWideBytes + k % 4 * 32 : kWide * kWideBytes + (k - 4 * kWide) * kNarrowBytes;
    const uint64_t mode = is_wide ? 1 : 3;
    return (low_word + static_cast<uint32_t>(panel + first * pitch) / 16) | static_cast<uint64_t>(1) << 16 |
           static_cast<uint64_t>(8 * pitch / 16) << 32 | mode << 62;
  }
};

// kColumnGroups warpgroups share the columns of a tile.
template <int kBlockRows, int kBlockColumns, int kColumnGroups, int kDepth, int kTiles, int kMinBlocks>
struct WideTraits {
  static constexpr int kRows = kBlockRows;
  static constexpr int kColumns = kBlockColumns;
  static constexpr int kGroupsN = kColumnGroups;
  static constexpr int kSteps = kDepth;
  static constexpr int kPadded = kSteps * kProductDepth;
  static constexpr int kStages = kTiles;
  static constexpr int kBlocks = kMinBlocks;
  static constexpr int kThreads = kRows / kGroupRows * kGroupsN * kGroupThreads;
  static constexpr int kRowLanes = kSteps <= 4 ? 8 : 16;  // of Stream
  static constexpr int kWarpsN = kThreads / kRows;        // of the last look, as of Traits
  static constexpr int kExactColumns = kWarpsN * kGroupColumns;

  // Shared memory: sources, the ring of tiles, groups and pairs listed, and what is known of each row.
  static constexpr int kSourcesBytes = kRows * row_bytes(kPadded);
  static constexpr int kRingBytes = kStages * WideTile<kSteps, kColumns>::kBytes;
  static constexpr int kListsAt = kSourcesBytes + kSwizzleBytes + kRingBytes;
  static constexpr int kBestAt =
      kListsAt + kRows * (kRowGroups + kRowPairs) * static_cast<int>(sizeof(Candidate));
  static constexpr int shared_bytes(int) { return kBestAt + kRows * (8 + 4); }
  static_assert(kListsAt >= (kRows + 2 * kExactColumns) * row_bytes(kPadded));
};

// How far one warpgroup may run ahead of another: while one waits for products another takes maxima.
constexpr int kDrift = 2;

// A look at all targets: at their high halves, or at both halves, in tiles with half as many columns.
template <class Traits, bool kBothHalves>
struct Look {
  static constexpr bool kBoth = kBothHalves;
  static constexpr int kSteps = Traits::kSteps;
  static constexpr int kColumns = kBoth ? Traits::kColumns / 2 : Traits::kColumns;
  static constexpr int kGroupColumns = kColumns / Traits::kGroupsN;  // of a warpgroup in a tile
  static constexpr int kParts = kGroupColumns > kWideGroupColumns ? 2 : 1;
  static constexpr int kPart = kGroupColumns / kParts;                   // columns of a product
  static constexpr int kSeenGroups = kGroupColumns / kWideGroupColumns;  // groups of one tile
  static constexpr int kStages = Traits::kStages;
  using Tile = WideTile<(1 + kBoth) * kSteps, kColumns>;
  static_assert(kPart % kWideGroupColumns == 0 && kStages > 1 + kDrift);
  static_assert(kStages * Tile::kBytes <= Traits::kRingBytes);
};

// The ring of tiles starts where the widest swizzle repeats.
template <class Traits>
__device__ __forceinline__ char* ring(char* shared) {
  char* const from = shared + Traits::kSourcesBytes;
  return from + (-static_cast<uint32_t>(__cvta_generic_to_shared(from)) & (kSwizzleBytes - 1));
}

// All targets of an image, tile by tile, as Stream has them, but laid out for wgmma. A place of the ring has
// two barriers: all threads' copies have come, and all warps' products have been.
template <class Traits, class Look>
struct WideStream {
  using Tile = typename Look::Tile;
  const Share& share;
  char* tiles;
  uint32_t barriers;  // address of kStages that count copies, then kStages that count warps
  int targets;

  __device__ __forceinline__ int count() const { return (targets + Look::kColumns - 1) / Look::kColumns; }
  __device__ __forceinline__ char* place(int tile) const {
    return tiles + tile % Look::kStages * Tile::kBytes;
  }
  __device__ __forceinline__ uint32_t full(int tile) const { return barriers + tile % Look::kStages * 8; }
  __device__ __forceinline__ uint32_t empty(int tile) const { return full(tile) + Look::kStages * 8; }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < Look::kStages; ++i) {
      attention_ops::hopper::barrier_init(full(i), Traits::kThreads);
      attention_ops::hopper::barrier_init(empty(i), Traits::kThreads / kWarpSize);
    }
  }

  __device__ __forceinline__ void copy_tile(int tile) const {
    constexpr int kChunks = 2 * Look::kSteps * (1 + Look::kBoth);
    constexpr int kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    constexpr int kStep = Traits::kThreads / kLanes;
    static_assert(Look::kColumns % kStep == 0 && kChunks <= kLanes);
    const int chunk = threadIdx.x % kLanes;
    if (chunk < kChunks) {
      char* const to = place(tile);
#pragma unroll
      for (int i = 0; i < Look::kColumns / kStep; ++i) {
        const int target = threadIdx.x / kLanes + i * kStep;
        // Targets past the end repeat the last one.
        const int column = min(tile * Look::kColumns + target, targets - 1);
        const __half* from =
            share.targets_ptr + static_cast<int64_t>(column) * 2 * Traits::kPadded + chunk * 8;
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(from),
            *reinterpret_cast<cute::uint128_t*>(to + Tile::offset(target, chunk)));
      }
    }
    // Arrives once this thread's copies have come.
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full(tile)) : "memory");
  }

  __device__ __forceinline__ void begin() const {
    for (int tile = 0; tile < min(Look::kStages, count()); ++tile) copy_tile(tile);
  }

  // Wait for this tile, after a copy into the place of one that all have left by now, or nearly. The fence
  // puts what was copied before the tensor cores' own reads.
  __device__ __forceinline__ void next(int tile) const {
    const int old = tile - 1 - kDrift;
    if (old >= 0 && old + Look::kStages < count()) {
      attention_ops::hopper::barrier_wait(empty(old), old / Look::kStages % 2);
      copy_tile(old + Look::kStages);
    }
    attention_ops::hopper::barrier_wait(full(tile), tile / Look::kStages % 2);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  // This warp's products of a tile are done.
  __device__ __forceinline__ void release(int tile) const {
    if (threadIdx.x % kWarpSize == 0) attention_ops::hopper::barrier_arrive(empty(tile));
  }
};

}  // namespace tome::match
