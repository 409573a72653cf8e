// Scores of images too large for one block, by Hopper's warpgroup products: match_score_kernel (tiled.cu)
// with another first look. The 128 sources of a block stay in registers, the high halves of all targets
// stream through shared memory, and warps have only the maxima left to do. The metric kernel's end and this
// one's start overlap.
#include "../hopper/tensor_map.h"
#include "../launch.cuh"
#include "hopper_candidates.cuh"
#include "hopper_look.cuh"

namespace tome::match {
namespace {

constexpr int kLeastTargets = 1024;

#ifdef CUTE_ARCH_MMA_SM90A_ENABLED

// A row may list one group and one more for so many targets: beyond that a second look is cheaper.
constexpr int kTargetsPerGroup = 256;
// Tiles that come beside the sources; the others would only delay both.
constexpr int kFirstTiles = 2;

// Look at all targets and score what comes close. False where that is too much to be listed; `close` then
// tells how far below block_top the best of a row may lie.
template <class Tiling, bool kBoth>
__device__ __forceinline__ bool try_look(const WideParams& p, const Share& share, char* shared,
                                         unsigned long long* block_best, uint32_t* block_top, float& close) {
  using TheLook = Look<Tiling, kBoth>;
  static __shared__ int group_count;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warpgroup = threadIdx.x / sm90::kWarpgroupThreads;
  const int warp_row = warpgroup / Tiling::kGroupsN * sm90::kWarpgroupRows + warp % 4 * kProductRows;
  const int first_column = warpgroup % Tiling::kGroupsN * TheLook::kGroupColumns;
  static __shared__ __align__(8) unsigned long long barriers[2 * TheLook::kStages];
  const WideStream<Tiling, TheLook> stream{p, share, ring<Tiling>(shared), sm90::shared_address(barriers)};
  if (threadIdx.x == 0) stream.init();
  for (int i = threadIdx.x; i < Tiling::kRows; i += Tiling::kThreads) block_top[i] = 0;
  if (threadIdx.x == 0) group_count = 0;
  __syncthreads();
  if (!kBoth) {
    await_previous();
    Stream<Tiling, true>(p, share, shared)
        .template copy_rows<Tiling::kRows>(share.sources_ptr, 0, share.rows - 1, shared);
  }
  stream.begin(0, kFirstTiles);
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  __syncthreads();  // the sources have come
  stream.begin(kFirstTiles, TheLook::kStages);
  const WideSources<TheLook> sources(
      source_address(shared, warp_row, Tiling::kRows - 1, row_bytes(p.padded)));
  const int groups = stream.count() * TheLook::kSeenGroups;
  const uint32_t mask = group_mask(groups);
  Seen<2> seen;
  Looker<Tiling, TheLook>{stream, sources, first_column, mask, seen}.run();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (seen.best[i] < 0.75f * kNothing) seen.best[i] = -INFINITY;  // saw NaN alone
  }

  const auto row_of = [&](int i) { return warp_row + i * 8 + lane / 4; };
  const auto column_of = [&](int g) {
    return g / TheLook::kSeenGroups * TheLook::kColumns + first_column +
           TheLook::group_column(g % TheLook::kSeenGroups);
  };
  publish_tops(seen, block_top, row_of);
  __syncthreads();
  auto* listed = reinterpret_cast<Candidate*>(shared + Tiling::kListsAt);
  Candidate* pairs = listed + Tiling::kRows * kRowGroups + warp * Tiling::kWarpPairs;
  const int capacity = Tiling::kRows * min(kRowGroups, 1 + p.targets / kTargetsPerGroup);
  close = closeness(mask, kBoth ? kSumError<Tiling::kSteps> : kLookError<Tiling::kSteps>);
  list_candidates(seen, block_top, share.rows, groups, mask, close, capacity, listed, &group_count, row_of,
                  column_of);
  __syncthreads();
  const int count = group_count;
  if (count > capacity) return false;
  constexpr int kWarps = Tiling::kThreads / kWarpSize;
  constexpr int kStep = 2 * kWideBatch<TheLook>;
  for (int i = kStep * warp; i < count; i += kStep * kWarps) {
    const int found = score_groups(stream, listed, i, count, shared, block_top, close, pairs, block_best);
    if constexpr (!kBoth) {
      __syncwarp();
      for (int j = 0; j < found; j += kPairs) {
        score_pairs<Tiling>(share, pairs, j, found, shared, block_best);
      }
      __syncwarp();
    }
  }
  return true;
}

template <class Tiling>
__device__ __forceinline__ void score_sources(const WideParams& p, const Share& share, char* shared,
                                              unsigned long long* block_best, uint32_t* block_top) {
  for (int i = threadIdx.x; i < Tiling::kRows; i += Tiling::kThreads) block_best[i] = pack_best(-INFINITY, 0);
  write_fixed(p, share.image, share.block * Tiling::kThreads + threadIdx.x, share.blocks * Tiling::kThreads);
  float close;
  if (try_look<Tiling, false>(p, share, shared, block_best, block_top, close)) return;
  __syncthreads();  // all have read the counts
  if (try_look<Tiling, true>(p, share, shared, block_best, block_top, close)) return;
  const int warp = threadIdx.x / kWarpSize;
  look_again<Tiling>(p, share, shared, warp / Tiling::kWarpsN * kScanRows,
                     warp % Tiling::kWarpsN * kGroupColumns, block_top, close, block_best);
}

#endif  // CUTE_ARCH_MMA_SM90A_ENABLED

template <class Tiling>
__global__ __launch_bounds__(Tiling::kThreads, Tiling::kBlocks) void match_score_hopper_kernel(
    const __grid_constant__ WideParams p) {
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
  char* shared = dynamic_shared();
  const Share share = share_of_block<Tiling>(p);
  auto* block_best = reinterpret_cast<unsigned long long*>(shared + Tiling::kBestAt);
  score_sources<Tiling>(p, share, shared, block_best,
                        reinterpret_cast<uint32_t*>(block_best + Tiling::kRows));
  finish_block<Tiling>(p, share, shared, block_best);
#endif
}

// Both halves of the targets of all images.
sm90::MappedTensor targets_of(const Params& p) {
  const int64_t row_bytes = 4 * p.padded;
  return {p.metric_ptr + int64_t{p.sources} * 2 * p.padded,
          2 * p.padded,
          p.targets,
          1,
          p.batch,
          row_bytes,
          row_bytes,
          row_bytes * p.rows(),
          CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
          CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA};
}

template <class Tiling>
bool try_score(const Params& params, cudaStream_t stream) {
  if (Tiling::kPadded != params.padded) return false;
  WideParams p{params, {}, {}};
  using Tile = WideTile<Tiling::kSteps, Tiling::kColumns>;
  const sm90::MappedTensor targets = targets_of(params);
  if (!sm90::make_map(p.wide, targets, Tile::kPanel, kBoxTargets)) return false;
  if (Tile::kRestPanels > 0 && !sm90::make_map(p.narrow, targets, Tile::kRest, kBoxTargets)) return false;
  const int64_t blocks = (p.sources + Tiling::kRows - 1) / Tiling::kRows;
  const int bytes = Tiling::shared_bytes(p.padded);
  launch_kernel(match_score_hopper_kernel<Tiling>, blocks * p.batch, Tiling::kThreads, bytes, bytes, stream,
                p, true);
  return true;
}

}  // namespace

bool launch_hopper(const Params& p, cudaStream_t stream) {
  // With fewer targets the other kernel is as fast, or faster.
  if (p.targets < kLeastTargets) return false;
  return try_score<WideTiling<128, 256, 2, 4, 5, 1>>(p, stream) ||
         try_score<WideTiling<128, 256, 2, 5, 4, 1>>(p, stream);
}

}  // namespace tome::match
