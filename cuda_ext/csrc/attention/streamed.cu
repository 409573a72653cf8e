// Keys and values of a head pass through shared memory in tiles: sequences of any length.
//
// A block owns 128 queries of one head (64 at head dimension 128), 32 per warp, and walks over the keys in
// tiles of 64, of which up to two are under way while one is in use. The last tile is as short as its keys
// allow, to 16.
//
// Shared memory: per warp 32 queries; per stage keys, values, bias.
#include "../launch.cuh"
#include "plan.h"
#include "softmax.cuh"

namespace tome::attention_ops {
namespace {

constexpr int kStageKeys = 64;

constexpr int kStageBlocks = kStageKeys / kBlockKeys;

// As many as 99 KiB hold, which is what the smallest GPUs grant a block.
template <int kHeadDim>
constexpr int kStages = kHeadDim <= 96 ? 3 : 2;

template <int kHeadDim>
constexpr int streamed_bytes() {
  return queries_bytes<kHeadDim>() + kStages<kHeadDim> * kStageBlocks * key_block_bytes(kHeadDim);
}

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, WarpTiles<kHeadDim>::kBlocks) void attention_streamed_kernel(
    const StreamedParams plan) {
  using Block = KeyBlock<kHeadDim>;
  constexpr int kStages = attention_ops::kStages<kHeadDim>;
  constexpr int kRowTiles = WarpTiles<kHeadDim>::kRowTiles;
  constexpr int kStageBytes = kStageBlocks * Block::kBytes;
  constexpr int kFirstStage = queries_bytes<kHeadDim>();
  constexpr int kBehindStages = kFirstStage + kStages * kStageBytes;
  static_assert(kStageKeys <= kThreads && 2 * kStageBlocks == kWarps);
  const AttentionParams& p = plan.attention;
  const auto warp = [] { return forget(threadIdx.x) / kWarpSize; };
  const auto head = [&] { return forget(blockIdx.x) / static_cast<unsigned>(plan.row_blocks); };
  const auto first_row = [&] {
    const unsigned block = forget(blockIdx.x) % static_cast<unsigned>(plan.row_blocks);
    return static_cast<int>(block * kWarps + warp()) * kRowTiles * kTileRows;
  };
  char* shared = dynamic_shared();
  char* queries = shared + warp() * (queries_bytes<kHeadDim>() / kWarps);

  // Each warp copies the keys or the values of one block of a stage.
  const bool is_values = warp() % 2 != 0;
  const int64_t row_stride = is_values ? p.v.row_stride : p.k.row_stride;
  const unsigned now = head();
  const unsigned heads = p.heads;
  const T* rows_ptr =
      rows_address<T>(is_values ? p.v : p.k, now / heads, now % heads, warp() / 2 * kBlockKeys);
  // A size is read one round before its logarithm is taken, so that nobody waits for it.
  float size = 0.0f;
  const auto read_size = [&](int key) {
    if (threadIdx.x < kStageKeys) size = key_size(p, head() / heads, key + threadIdx.x);
  };
  int filled = kFirstStage;  // the stage that is filled next
  const auto fill = [&](int key) {
    if (key < p.keys) {
      const int block = warp() / 2;
      char* to = shared + filled + block * Block::kBytes + (warp() % 2 != 0 ? Block::kValues : 0);
      copy_rows<T, kHeadDim, kBlockKeys>(rows_ptr, row_stride, p.keys - key - block * kBlockKeys,
                                         p.is_aligned, to);
      rows_ptr += kStageKeys * row_stride;
      if (threadIdx.x < kStageKeys) store_bias<kHeadDim>(p, shared + filled, threadIdx.x, size);
      read_size(key + kStageKeys);
      filled += kStageBytes;
      if (filled == kBehindStages) filled = kFirstStage;
    }
    cute::cp_async_fence();  // an empty group behind the last tile keeps the count of groups the same
  };

  copy_rows<T, kHeadDim, kRowTiles * kTileRows>(rows_address<T>(p.q, now / heads, now % heads, first_row()),
                                                p.q.row_stride, p.queries - first_row(), p.is_aligned,
                                                queries);
  read_size(0);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fill(stage * kStageKeys);

  const float c = p.scale * kLog2E;
  WarpState<T, kHeadDim, kRowTiles> state;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
    int stage = kFirstStage;
    cute::cp_async_wait<kStages - 2>();
    __syncthreads();
    if constexpr (kActive > 0) state.template start<kActive>(queries);
#pragma unroll 1
    for (int key = 0; key < p.keys;) {
      fill(key + (kStages - 1) * kStageKeys);
      if constexpr (kActive > 0)
        state.template walk<kActive>(shared, stage, min(kStageKeys, p.keys - key), c);
      key += kStageKeys;
      stage += kStageBytes;
      if (stage == kBehindStages) stage = kFirstStage;
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();  // the next stage is full, and everyone is done with the one that is filled next
    }
    if constexpr (kActive > 0) state.template finish<kActive>(p, head() / heads, head() % heads, first_row());
  };
  const int rows = p.queries - first_row();
  if (kRowTiles > 1 && rows > kTileRows) {
    attend(Count<kRowTiles>{});
  } else if (rows > 0) {
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
      constexpr int kBlockRows = kWarps * WarpTiles<kHeadDim>::kRowTiles * kTileRows;
      const StreamedParams plan{p, (p.queries + kBlockRows - 1) / kBlockRows};
      launch_kernel(attention_streamed_kernel<T, kHeadDim>, p.batch * p.heads * plan.row_blocks, kThreads,
                    streamed_bytes<kHeadDim>(), max_shared_bytes, stream, plan);
    });
  });
}

}  // namespace tome::attention_ops
