// Scores of images too large for one block, by Hopper's warpgroup products: match_score_kernel (tiled.cu)
// with another first look. The 128 sources of a block stay in registers, the high halves of all targets
// stream through shared memory, and warps have only the maxima left to do. The metric kernel's end and this
// one's start overlap.
#include "../launch.cuh"
#include "../tensor_map.h"
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
template <class Traits, bool kBoth>
__device__ __forceinline__ bool try_look(const WideParams& p, const Share& share, char* shared,
                                         unsigned long long* block_best, uint32_t* block_top, float& close) {
  using TheLook = Look<Traits, kBoth>;
  static __shared__ int group_count;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warpgroup = threadIdx.x / kGroupThreads;
  const int warp_row = warpgroup / Traits::kGroupsN * kGroupRows + warp % 4 * kProductRows;
  const int first_column = warpgroup % Traits::kGroupsN * TheLook::kGroupColumns;
  static __shared__ __align__(8) unsigned long long barriers[2 * TheLook::kStages];
  const WideStream<Traits, TheLook> stream{p, share, ring<Traits>(shared), async::shared_address(barriers)};
  if (threadIdx.x == 0) stream.init();
  for (int i = threadIdx.x; i < Traits::kRows; i += Traits::kThreads) block_top[i] = 0;
  if (threadIdx.x == 0) group_count = 0;
  __syncthreads();
  if (!kBoth) {
    await_previous();
    Stream<Traits, true>(p, share, shared)
        .template copy_rows<Traits::kRows>(share.sources_ptr, 0, share.rows - 1, shared);
  }
  stream.begin(0, kFirstTiles);
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  __syncthreads();  // the sources have come
  stream.begin(kFirstTiles, TheLook::kStages);
  const WideSources<TheLook> sources(
      source_address(shared, warp_row, Traits::kRows - 1, row_bytes(p.padded)));
  const int groups = stream.count() * TheLook::kSeenGroups;
  const uint32_t mask = group_mask(groups);
  Seen<2> seen;
  Looker<Traits, TheLook>{stream, sources, first_column, mask, seen}.run();
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
  auto* listed = reinterpret_cast<Candidate*>(shared + Traits::kListsAt);
  Candidate* pairs = listed + Traits::kRows * kRowGroups + warp * Traits::kWarpPairs;
  const int capacity = Traits::kRows * min(kRowGroups, 1 + p.targets / kTargetsPerGroup);
  close = closeness(mask, kBoth ? kSumError<Traits::kSteps> : kLookError<Traits::kSteps>);
  list_candidates(seen, block_top, share.rows, groups, mask, close, capacity, listed, &group_count, row_of,
                  column_of);
  __syncthreads();
  const int count = group_count;
  if (count > capacity) return false;
  constexpr int kWarps = Traits::kThreads / kWarpSize;
  constexpr int kStep = 2 * kWideBatch<TheLook>;
  for (int i = kStep * warp; i < count; i += kStep * kWarps) {
    const int found = score_groups(stream, listed, i, count, shared, block_top, close, pairs, block_best);
    if constexpr (!kBoth) {
      __syncwarp();
      for (int j = 0; j < found; j += kPairs) {
        score_pairs<Traits>(share, pairs, j, found, shared, block_best);
      }
      __syncwarp();
    }
  }
  return true;
}

template <class Traits>
__device__ __forceinline__ void score_sources(const WideParams& p, const Share& share, char* shared,
                                              unsigned long long* block_best, uint32_t* block_top) {
  for (int i = threadIdx.x; i < Traits::kRows; i += Traits::kThreads) block_best[i] = pack_best(-INFINITY, 0);
  write_fixed(p, share.image, share.block * Traits::kThreads + threadIdx.x, share.blocks * Traits::kThreads);
  float close;
  if (try_look<Traits, false>(p, share, shared, block_best, block_top, close)) return;
  __syncthreads();  // all have read the counts
  if (try_look<Traits, true>(p, share, shared, block_best, block_top, close)) return;
  const int warp = threadIdx.x / kWarpSize;
  look_again<Traits>(p, share, shared, warp / Traits::kWarpsN * kScanRows,
                     warp % Traits::kWarpsN * kGroupColumns, block_top, close, block_best);
}

#endif  // CUTE_ARCH_MMA_SM90A_ENABLED

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocks) void match_score_hopper_kernel(
    const __grid_constant__ WideParams p) {
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
  char* shared = dynamic_shared();
  const Share share = share_of_block<Traits>(p);
  auto* block_best = reinterpret_cast<unsigned long long*>(shared + Traits::kBestAt);
  score_sources<Traits>(p, share, shared, block_best,
                        reinterpret_cast<uint32_t*>(block_best + Traits::kRows));
  finish_block<Traits>(p, share, shared, block_best);
#endif
}

bool make_map(CUtensorMap& map, const Params& p, int panel) {
  if (encode_tiled() == nullptr) return false;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(2 * p.padded), static_cast<cuuint64_t>(p.targets), 1,
                               static_cast<cuuint64_t>(p.batch)};
  const cuuint64_t row = 4 * static_cast<cuuint64_t>(p.padded);
  const cuuint64_t strides[3] = {row, row, row * p.rows()};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(panel), kBoxTargets, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                        p.metric_ptr + int64_t{p.sources} * 2 * p.padded, sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        panel == kWidePanel ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA) == CUDA_SUCCESS;
}

template <class Traits>
bool try_score(const Params& params, cudaStream_t stream) {
  if (Traits::kPadded != params.padded) return false;
  WideParams p{params, {}, {}};
  const bool has_narrow = Traits::kSteps % 4 != 0;
  if (!make_map(p.wide, params, kWidePanel) || (has_narrow && !make_map(p.narrow, params, kNarrowPanel))) {
    return false;
  }
  const int64_t blocks = (p.sources + Traits::kRows - 1) / Traits::kRows;
  const int bytes = Traits::shared_bytes(p.padded);
  launch_kernel(match_score_hopper_kernel<Traits>, blocks * p.batch, Traits::kThreads, bytes, bytes, stream,
                p, true);
  return true;
}

}  // namespace

bool launch_hopper(const Params& p, cudaStream_t stream) {
  // With fewer targets the other kernel is as fast, or faster.
  if (p.targets < kLeastTargets) return false;
  return try_score<WideTraits<128, 256, 2, 4, 5, 1>>(p, stream) ||
         try_score<WideTraits<128, 256, 2, 5, 4, 1>>(p, stream);
}

}  // namespace tome::match
