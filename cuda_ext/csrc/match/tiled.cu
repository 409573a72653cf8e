// Scores of images too large for one block, from the metric in device memory.
//
// match_score_kernel: one block owns kRows sources of an image and streams the high halves of all targets
// through shared memory, in tiles of kColumns. What comes close to the best of its row is scored exactly,
// from device memory. The block that finishes an image last selects its pairs.
#include "../launch.cuh"
#include "block.cuh"

namespace tome::match {
namespace {

// The first look of a warp: at kWarpColumns of each tile.
template <class Tiling>
__device__ __forceinline__ void look(const Params& p, const Share& share, char* shared, int warp_row,
                                     int warp_column, uint32_t mask, Seen<2 * kScanTiles>& seen) {
  const Stream<Tiling, false> stream(p, share, shared);
  stream.begin();
  write_fixed(p, share.image, share.block * Tiling::kThreads + threadIdx.x, share.blocks * Tiling::kThreads);
  stream.await();
  const char* const source_ptr[kScanTiles] = {
      source_address(shared, warp_row, Tiling::kRows - 1, stream.stride),
      source_address(shared, warp_row + kProductRows, Tiling::kRows - 1, stream.stride)};
  const Sources<Tiling::kSteps> sources(source_ptr);
  for (int tile = 0; tile * Tiling::kColumns < p.targets; ++tile) {
    const char* target_ptr =
        target_address(stream.next(tile), warp_column, Tiling::kColumns - 1, stream.stride);
    // Targets past the end repeat the last one: they change no maximum, and are never listed.
    if (tile * Tiling::kColumns + warp_column >= p.targets) continue;
#pragma unroll
    for (int g = 0; g < Tiling::kWarpGroups; ++g) {
      float score[kScanTiles][2][4];
      score_high(sources, target_ptr + g * kGroupColumns * stream.stride, stream.padded / kProductDepth,
                 score);
      note_groups(seen, score, tile * Tiling::kWarpGroups + g, mask);
    }
  }
}

// The best targets of the block's sources, packed, into block_best.
template <class Tiling>
__device__ __forceinline__ void score_block(const Params& p, const Share& share, char* shared,
                                            unsigned long long* block_best, uint32_t* block_top) {
  static __shared__ int count;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / Tiling::kWarpsN * kScanRows;
  const int warp_column = warp % Tiling::kWarpsN * Tiling::kWarpColumns;
  for (int i = threadIdx.x; i < Tiling::kRows; i += Tiling::kThreads) {
    block_best[i] = pack_best(-INFINITY, 0);
    block_top[i] = 0;
  }
  if (threadIdx.x == 0) count = 0;
  const int groups = (p.targets + Tiling::kColumns - 1) / Tiling::kColumns * Tiling::kWarpGroups;
  const uint32_t mask = group_mask(groups);
  const auto row_of = [&](int i) { return warp_row + i * 8 + lane / 4; };
  const auto column_of = [&](int group) {
    return group / Tiling::kWarpGroups * Tiling::kColumns + warp_column +
           group % Tiling::kWarpGroups * kGroupColumns + lane % 4 * 2;
  };
  Seen<2 * kScanTiles> seen;
  look<Tiling>(p, share, shared, warp_row, warp_column, mask, seen);
  publish_tops(seen, block_top, row_of);
  __syncthreads();  // the tiles have served too: their memory takes both halves of the sources, and
                    // candidates
  const Stream<Tiling, true> stream(p, share, shared);
  stream.template copy_rows<Tiling::kRows>(share.sources_ptr, 0, share.rows - 1, shared);
  cute::cp_async_fence();
  const int sources_bytes = Tiling::kRows * stream.stride;
  auto* candidates = reinterpret_cast<Candidate*>(shared + sources_bytes);
  const int capacity = candidates_capacity<Tiling>(p, Tiling::tile_bytes(p.padded) - sources_bytes);
  const float close = closeness(mask, kCorrection);
  list_candidates(seen, block_top, share.rows, groups, mask, close, capacity, candidates, &count, row_of,
                  column_of);
  cute::cp_async_wait<0>();
  __syncthreads();
  if (count <= capacity) {
    for (int i = 2 * kBatch * warp; i < count; i += 2 * kBatch * Tiling::kThreads / kWarpSize) {
      score_candidates<Tiling::kSteps>(candidates, i, count, p, share, shared, block_best);
    }
    return;
  }
  look_again<Tiling>(p, share, shared, warp_row, warp % Tiling::kWarpsN * kGroupColumns, block_top, close,
                     block_best);
}

template <class Tiling>
__global__ __launch_bounds__(Tiling::kThreads, Tiling::kBlocks) void match_score_kernel(const Params p) {
  char* shared = dynamic_shared();
  const Share share = share_of_block<Tiling>(p);
  auto* block_best = reinterpret_cast<unsigned long long*>(shared + Tiling::tile_bytes(p.padded));
  score_block<Tiling>(p, share, shared, block_best, reinterpret_cast<uint32_t*>(block_best + Tiling::kRows));
  finish_block<Tiling>(p, share, shared, block_best);
}

template <class Tiling>
bool try_score(const Params& p, int max_shared_bytes, cudaStream_t stream) {
  const int bytes = Tiling::shared_bytes(p.padded);
  if (Tiling::kSteps > 0 && Tiling::kSteps * kProductDepth != p.padded) return false;
  if (bytes + kAccessBytes > max_shared_bytes) return false;
  const int64_t blocks = (p.sources + Tiling::kRows - 1) / Tiling::kRows;
  launch_kernel(match_score_kernel<Tiling>, blocks * p.batch, Tiling::kThreads, bytes,
                max_shared_bytes - kAccessBytes, stream, p);
  return true;
}

}  // namespace

bool launch_tiled(const Params& p, int max_shared_bytes, int multiprocessors, cudaStream_t stream) {
  // Where two blocks per multiprocessor hold all sources they get eight warps each, else four blocks four.
  // Head dimensions of 64 and 80 have kernels of their own; wide metrics on GPUs with little shared memory
  // take the smaller tiles.
  const bool is_wide = static_cast<int64_t>(p.batch) * ((p.sources + 63) / 64) <= 2 * multiprocessors;
  if (is_wide) {
    if (try_score<BlockTiling<64, 128, 4, 4, 3, 2>>(p, max_shared_bytes, stream)) return true;
    if (try_score<BlockTiling<64, 128, 4, 5, 3, 2>>(p, max_shared_bytes, stream)) return true;
  }
  return try_score<BlockTiling<64, 64, 2, 4, 3, 4>>(p, max_shared_bytes, stream) ||
         try_score<BlockTiling<64, 64, 2, 5, 3, 4>>(p, max_shared_bytes, stream) ||
         try_score<BlockTiling<64, 128, 4, 0, 2, 2>>(p, max_shared_bytes, stream) ||
         try_score<BlockTiling<64, 64, 2, 0, 2, 2>>(p, max_shared_bytes, stream) ||
         try_score<BlockTiling<32, 32, 2, 0, 2, 2>>(p, max_shared_bytes, stream);
}

}  // namespace tome::match
