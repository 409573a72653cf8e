// How one block of the score kernel divides its work, and how the targets of an image stream past its
// sources: tile by tile through shared memory, by cp.async, some tiles ahead.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "select.cuh"

namespace tome::match {

constexpr int kScanTiles = 2;  // 16-row products of one warp: 32 sources
constexpr int kScanRows = kScanTiles * kProductRows;
constexpr int kGroupColumns = 2 * kProductColumns;  // targets of one step of a warp

// One block's share of an image.
struct Share {
  const __half* sources_ptr;  // of the block
  const __half* targets_ptr;  // of the image
  int rows;                   // of the block; the last block may have fewer than others
  int image, block, blocks;   // of the image
};

// Rows in shared memory: the high halves, then one 16-byte step (see row_bytes).
constexpr int high_bytes(int padded) { return 2 * padded + 16; }

template <int kBlockRows, int kBlockColumns, int kBlockWarpsN, int kDepth, int kTiles, int kMinBlocks>
struct BlockTiling {
  static constexpr int kRows = kBlockRows;
  static constexpr int kColumns = kBlockColumns;
  static constexpr int kSteps = kDepth;  // products over all channels; 0: any number
  static constexpr int kRowLanes = kSteps <= 4 ? 8 : 16;
  static constexpr int kStages = kTiles;      // tiles of targets in shared memory
  static constexpr int kBlocks = kMinBlocks;  // per multiprocessor
  static constexpr int kWarpsN = kBlockWarpsN;
  static constexpr int kWarpColumns = kColumns / kWarpsN;
  static constexpr int kWarpGroups = kWarpColumns / kGroupColumns;  // of one tile
  static constexpr int kExactColumns = kWarpsN * kGroupColumns;
  static constexpr int kThreads = kRows / kScanRows * kWarpsN * kWarpSize;
  static_assert(kRows % kScanRows == 0 && kColumns % (kWarpsN * kGroupColumns) == 0);
  static_assert((kRows + kStages * kColumns) * high_bytes(kProductDepth) >= sizeof(SelectStorage));
  static constexpr int tile_bytes(int padded) {
    const int first = (kRows + kStages * kColumns) * high_bytes(padded);
    const int second = (kRows + 2 * kExactColumns) * row_bytes(padded);
    return first > second ? first : second;
  }
  static constexpr int shared_bytes(int padded) { return tile_bytes(padded) + kRows * (8 + 4); }
};

// All targets of an image, tile by tile through shared memory behind the block's sources: the high halves of
// their rows, or both halves.
template <class Tiling, bool kBoth>
struct Stream {
  static constexpr int kColumns = kBoth ? Tiling::kExactColumns : Tiling::kColumns;
  static constexpr int kStages = kBoth ? 2 : Tiling::kStages;
  const Share& share;
  char* shared;
  int targets, padded, lanes, stride;  // lanes: threads that share a row

  __device__ __forceinline__ Stream(const Params& p, const Share& from, char* to)
      : share(from), shared(to), targets(p.targets) {
    // Known while compiling where the depth is: the copies then need hardly any arithmetic.
    padded = Tiling::kSteps > 0 ? Tiling::kSteps * kProductDepth : p.padded;
    lanes = Tiling::kSteps > 0 ? Tiling::kRowLanes : p.row_lanes;
    stride = kBoth ? row_bytes(padded) : high_bytes(padded);
  }

  // Rows past `last` repeat it.
  template <int kCount>
  __device__ __forceinline__ void copy_rows(const __half* metric_ptr, int row, int last, char* to) const {
    const int channel = threadIdx.x % lanes * kLaneChannels;
    if (channel >= padded) return;
    const int step = Tiling::kThreads / lanes;
    const int first = threadIdx.x / lanes;
#pragma unroll
    for (int i = 0; i < (kCount + step - 1) / step; ++i) {
      const int local = first + i * step;
      if (kCount % step != 0 && local >= kCount) break;
      const __half* from = metric_ptr + static_cast<int64_t>(min(row + local, last)) * 2 * padded + channel;
#pragma unroll
      for (int half = 0; half < 1 + kBoth; ++half) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(from + half * padded),
            *reinterpret_cast<cute::uint128_t*>(to + local * stride + 2 * (channel + half * padded)));
      }
    }
  }

  __device__ __forceinline__ char* place(int tile) const {
    return shared + (Tiling::kRows + tile % kStages * kColumns) * stride;
  }

  __device__ __forceinline__ void copy_tile(int tile) const {
    const int column = tile * kColumns;
    if (column < targets) copy_rows<kColumns>(share.targets_ptr, column, targets - 1, place(tile));
    cute::cp_async_fence();  // an empty group after the last tile keeps the count of groups the same
  }

  __device__ __forceinline__ void begin() const {
    copy_rows<Tiling::kRows>(share.sources_ptr, 0, share.rows - 1, shared);
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) copy_tile(tile);
  }

  // Returns once the sources and the first tile have come.
  __device__ __forceinline__ void await() const {
    cute::cp_async_wait<kStages - 2>();
    __syncthreads();
  }

  // Wait for this tile, and fetch a later one into the place of the one before.
  __device__ __forceinline__ const char* next(int tile) const {
    if (tile > 0) await();
    copy_tile(tile + kStages - 1);
    return place(tile);
  }
};

}  // namespace tome::match
