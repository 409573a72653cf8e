// Keys and values of a head pass through shared memory in tiles: sequences of any length.
//
// A block owns 128 queries of one head (64 at head dimension 128), 32 per warp, and walks over the keys in
// tiles of 64 of which up to two are under way. The last tile is as short as its keys allow, to 16.
//
// Shared memory: per warp 32 queries; per stage keys, values, bias.
#include "../launch.cuh"
#include "plan.h"
#include "softmax.cuh"

namespace tome::attention_ops {
namespace {

constexpr int kStageKeys = 64;
constexpr int kStages = 3;

constexpr int kStageBlocks = kStageKeys / kBlockKeys;

template <int kHeadDim>
constexpr int streamed_bytes() {
  return queries_bytes<kHeadDim>() + kStages * kStageBlocks * key_block_bytes(kHeadDim);
}

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, Traits<kHeadDim>::kBlocks) void attention_streamed_kernel(
    const StreamedParams plan) {
  constexpr int kRowTiles = Traits<kHeadDim>::kRowTiles;
  constexpr int kWarpRows = kRowTiles * kTileRows;
  constexpr int kStageBytes = kStageBlocks * key_block_bytes(kHeadDim);
  static_assert(kStageKeys / 2 <= kThreads);
  const AttentionParams& p = plan.attention;
  const int warp = threadIdx.x / kWarpSize;
  const int head = blockIdx.x / plan.row_blocks;
  const int b = head / p.heads;
  const int h = head % p.heads;
  char* shared = dynamic_shared();
  char* queries = shared + warp * (queries_bytes<kHeadDim>() / kWarps);
  const int first_row = (blockIdx.x % plan.row_blocks * kWarps + warp) * kWarpRows;
  const int tiles = (p.keys + kStageKeys - 1) / kStageKeys;

  // The bias of a stage is read one round before it is written, so that nobody waits for it.
  float2 bias = make_float2(0.0f, 0.0f);
  const auto read_bias = [&](int tile) {
    if (threadIdx.x < kStageKeys / 2) bias = key_bias(p, b, tile * kStageKeys + 2 * threadIdx.x);
  };
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      char* stage = shared + queries_bytes<kHeadDim>() + tile % kStages * kStageBytes;
      const int first = tile * kStageKeys;
      const int count = min(kStageKeys, (p.keys - first + kKeyStep - 1) / kKeyStep * kKeyStep);
      copy_keys<T, kHeadDim, kThreads>(p, b, h, first, count, threadIdx.x, stage);
      if (threadIdx.x < kStageKeys / 2) store_bias<kHeadDim>(stage, 2 * threadIdx.x, bias);
      read_bias(tile + 1);
    }
    cute::cp_async_fence();  // an empty group behind the last tile keeps the count of groups the same
  };

  copy_queries<T, kHeadDim>(p, b, h, first_row, kWarpRows, queries);
  read_bias(0);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) fill(tile);

  const float c = p.scale * kLog2E;
  const float slack = kSlack / c;
  WarpState<T, kHeadDim, kRowTiles> state;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is full, and everyone is done with the one that is filled next
      fill(tile + kStages - 1);
      if constexpr (kActive > 0) {
        if (tile == 0) state.template start<kActive>(queries);
        state.template walk<kActive>(shared, queries_bytes<kHeadDim>() + tile % kStages * kStageBytes,
                                     min(kStageKeys, p.keys - tile * kStageKeys), c, slack);
      }
    }
    if constexpr (kActive > 0) state.template finish<kActive>(p, b, h, first_row);
  };
  if (kRowTiles > 1 && p.queries - first_row > kTileRows) {
    attend(Count<kRowTiles>{});
  } else if (p.queries > first_row) {
    attend(Count<1>{});
  } else {
    attend(Count<0>{});  // the warp only copies
  }
}

}  // namespace

void launch_streamed(const AttentionParams& p, Dtype dtype, int max_shared_bytes, cudaStream_t stream) {
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr int kBlockRows = kWarps * Traits<kHeadDim>::kRowTiles * kTileRows;
      const StreamedParams plan{p, (p.queries + kBlockRows - 1) / kBlockRows};
      launch_kernel(attention_streamed_kernel<T, kHeadDim>, p.batch * p.heads * plan.row_blocks, kThreads,
                    streamed_bytes<kHeadDim>(), max_shared_bytes, stream, plan);
    });
  });
}

}  // namespace tome::attention_ops
