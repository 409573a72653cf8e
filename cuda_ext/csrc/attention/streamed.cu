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

template <int kHeadDim>
constexpr int streamed_bytes() {
  return kWarps * Traits<kHeadDim>::kRowTiles * kTileRows * kHeadDim * 2 +
         kStages * head_bytes<kHeadDim>(kStageKeys);
}

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, Traits<kHeadDim>::kBlocks) void attention_streamed_kernel(
    const StreamedParams plan) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kRowTiles = Traits<kHeadDim>::kRowTiles;
  constexpr int kWarpRows = kRowTiles * kTileRows;
  constexpr int kWarpBytes = kWarpRows * Layout::kBytes;
  constexpr int kStageBytes = head_bytes<kHeadDim>(kStageKeys);
  static_assert(kStageKeys / 2 <= kThreads);
  const AttentionParams& p = plan.attention;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t head = blockIdx.x / plan.row_blocks;
  const int64_t b = head / p.heads;
  const int64_t h = head % p.heads;
  const T* k_ptr = head_address<T>(p.k, b, h);
  const T* v_ptr = head_address<T>(p.v, b, h);
  const float* size_ptr = p.size_ptr == nullptr ? nullptr : p.size_ptr + b * p.size_batch_stride;
  const float inverse_scale = 1.0f / p.scale;
  char* shared = dynamic_shared();
  char* my_queries = shared + warp * kWarpBytes;
  char* stages = shared + kWarps * kWarpBytes;

  const int first_row = (blockIdx.x % plan.row_blocks * kWarps + warp) * kWarpRows;
  const int rows = p.queries - first_row;  // none or less: the warp only copies
  const int tiles = (p.keys + kStageKeys - 1) / kStageKeys;
  // The bias of a stage is read one round before it is written, so that nobody waits for it.
  float2 bias = make_float2(0.0f, 0.0f);
  const auto read_bias = [&](int tile) {
    const int key = tile * kStageKeys + 2 * threadIdx.x;
    if (threadIdx.x < kStageKeys / 2) {
      bias = make_float2(key_bias(p, size_ptr, key, inverse_scale),
                         key_bias(p, size_ptr, key + 1, inverse_scale));
    }
  };
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      char* stage = stages + tile % kStages * kStageBytes;
      const int first = tile * kStageKeys;
      const int count = min(kStageKeys, (p.keys - first + kKeyStep - 1) / kKeyStep * kKeyStep);
      copy_rows<T, kHeadDim, kThreads, true>(k_ptr, p.k.row_stride, first, count, p.keys - 1, p.is_aligned,
                                             threadIdx.x, stage);
      copy_rows<T, kHeadDim, kThreads, true>(v_ptr, p.v.row_stride, first, count, p.keys - 1, p.is_aligned,
                                             threadIdx.x, stage + kStageKeys * Layout::kBytes);
      if (threadIdx.x < kStageKeys / 2) {
        store_bias(reinterpret_cast<float4*>(stage + 2 * kStageKeys * Layout::kBytes), threadIdx.x, bias.x,
                   bias.y);
      }
      read_bias(tile + 1);
    }
    cute::cp_async_fence();  // an empty group behind the last tile keeps the count of groups the same
  };

  copy_rows<T, kHeadDim, kWarpSize, false>(head_address<T>(p.q, b, h), p.q.row_stride, first_row, kWarpRows,
                                           p.queries - 1, p.is_aligned, threadIdx.x % kWarpSize, my_queries);
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
        if (tile == 0) state.template start<kActive>(my_queries);
        const char* stage = stages + tile % kStages * kStageBytes;
        const int steps = min(kStageKeys, p.keys - tile * kStageKeys + kKeyStep - 1) / kKeyStep;
        state.template walk<kActive>(stage, stage + kStageKeys * Layout::kBytes,
                                     reinterpret_cast<const float4*>(stage + 2 * kStageKeys * Layout::kBytes),
                                     steps, c, slack);
      }
    }
    if constexpr (kActive > 0) {
      const int64_t row_stride = static_cast<int64_t>(p.heads) * kHeadDim;
      T* out_ptr = static_cast<T*>(p.out_ptr) + (b * p.queries + first_row) * row_stride + h * kHeadDim;
      state.template finish<kActive>(out_ptr, lse_address(p, head, first_row), row_stride, rows, p.scale);
    }
  };
  if (kRowTiles > 1 && rows > kTileRows) {
    attend(Count<kRowTiles>{});
  } else if (rows > 0) {
    attend(Count<1>{});
  } else {
    attend(Count<0>{});
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
