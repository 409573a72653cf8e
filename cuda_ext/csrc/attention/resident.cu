// All keys and values of a head in shared memory at once: sequences of a few hundred tokens.
//
// A block owns one head (short ones: two or four), or a share of the queries of one where heads are few. Its
// warps take 16-row tiles of queries in turn, 32 rows at a time. Several blocks share a multiprocessor, so
// that one loads while the others compute. Keys are padded to 16 and no further.
//
// Shared memory: per warp 32 queries; per head keys, values, bias.
#include <algorithm>

#include "../launch.cuh"
#include "plan.h"
#include "softmax.cuh"

namespace tome::attention_ops {
namespace {

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, Traits<kHeadDim>::kBlocks) void attention_resident_kernel(
    const ResidentParams plan) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kRowTiles = Traits<kHeadDim>::kRowTiles;
  constexpr int kWarpBytes = kRowTiles * kTileRows * Layout::kBytes;
  const AttentionParams& p = plan.attention;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int team_warps = kWarps / plan.teams;  // each head has a team of warps
  const int team = warp / team_warps;
  const int team_thread = threadIdx.x - team * team_warps * kWarpSize;
  const int64_t heads = p.batch * p.heads;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x / plan.splits) * plan.teams + team;
  const int64_t head = wanted < heads ? wanted : heads - 1;
  const int64_t b = head / p.heads;
  const int64_t h = head % p.heads;
  const T* q_ptr = head_address<T>(p.q, b, h);
  const T* k_ptr = head_address<T>(p.k, b, h);
  const T* v_ptr = head_address<T>(p.v, b, h);

  char* shared = dynamic_shared();
  char* my_queries = shared + warp * kWarpBytes;
  char* keys = shared + kWarps * kWarpBytes + team * head_bytes<kHeadDim>(plan.padded);
  char* values = keys + plan.padded * Layout::kBytes;
  auto* bias = reinterpret_cast<float4*>(values + plan.padded * Layout::kBytes);

  // This warp's share of the tiles, as even as can be.
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int split = blockIdx.x % plan.splits;
  const int first = tiles * split / plan.splits;
  const int count = tiles * (split + 1) / plan.splits - first;
  const int part = warp - team * team_warps;
  int tile = first + count * part / team_warps;
  const int end = wanted < heads ? first + count * (part + 1) / team_warps : 0;
  const auto copy_queries = [&](int from) {
    const int rows = min(kRowTiles, end - from) * kTileRows;
    copy_rows<T, kHeadDim, kWarpSize, false>(q_ptr, p.q.row_stride, from * kTileRows, rows, p.queries - 1,
                                             p.is_aligned, lane, my_queries);
  };

  copy_queries(tile);
  if (plan.teams == 1) {  // the number of threads as a constant
    copy_rows<T, kHeadDim, kThreads, true>(k_ptr, p.k.row_stride, 0, plan.padded, p.keys - 1, p.is_aligned,
                                           threadIdx.x, keys);
    copy_rows<T, kHeadDim, kThreads, true>(v_ptr, p.v.row_stride, 0, plan.padded, p.keys - 1, p.is_aligned,
                                           threadIdx.x, values);
  } else {
    for (int row = team_thread / kWarpSize * kTileKeys; row < plan.padded; row += team_warps * kTileKeys) {
      copy_rows<T, kHeadDim, kWarpSize, true>(k_ptr, p.k.row_stride, row, kTileKeys, p.keys - 1, p.is_aligned,
                                              lane, keys + row * Layout::kBytes);
      copy_rows<T, kHeadDim, kWarpSize, true>(v_ptr, p.v.row_stride, row, kTileKeys, p.keys - 1, p.is_aligned,
                                              lane, values + row * Layout::kBytes);
    }
  }
  cute::cp_async_fence();
  const float* size_ptr = p.size_ptr == nullptr ? nullptr : p.size_ptr + b * p.size_batch_stride;
  const float inverse_scale = 1.0f / p.scale;
  for (int i = team_thread; i < plan.padded / 2; i += team_warps * kWarpSize) {
    store_bias(bias, i, key_bias(p, size_ptr, 2 * i, inverse_scale),
               key_bias(p, size_ptr, 2 * i + 1, inverse_scale));
  }
  cute::cp_async_wait<0>();
  __syncthreads();

  const float c = p.scale * kLog2E;
  const float slack = kSlack / c;
  const int64_t row_stride = static_cast<int64_t>(p.heads) * kHeadDim;
  T* out_ptr = static_cast<T*>(p.out_ptr) + b * p.queries * row_stride + h * kHeadDim;
  WarpState<T, kHeadDim, kRowTiles> state;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
    state.template start<kActive>(my_queries);
    __syncwarp();
    const int from = tile;
    tile += kActive;
    if (tile < end) copy_queries(tile);  // the next queries travel meanwhile
    cute::cp_async_fence();
    state.template walk<kActive>(keys, values, bias, plan.padded / kKeyStep, c, slack);
    const int row = from * kTileRows;
    state.template finish<kActive>(out_ptr + row * row_stride, lse_address(p, head, row), row_stride,
                                   p.queries - row, p.scale);
    cute::cp_async_wait<0>();
    __syncwarp();
  };
  while (tile < end) {
    if (kRowTiles > 1 && end - tile > 1) {
      attend(Count<kRowTiles>{});
    } else {
      attend(Count<1>{});
    }
  }
}

}  // namespace

ResidentParams plan_resident(const AttentionParams& p, int multiprocessors) {
  ResidentParams plan{p, 1, 1, (p.keys + kKeyStep - 1) / kKeyStep * kKeyStep};
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int64_t heads = p.batch * p.heads;
  // Every multiprocessor gets a block before one gets four heads.
  while (plan.teams < kWarps && tiles * plan.teams <= kWarps && plan.padded * plan.teams <= kTeamKeys &&
         heads > plan.teams * multiprocessors) {
    plan.teams *= 2;
  }
  if (plan.teams == 1) {
    plan.splits = std::max<int64_t>(1, std::min<int64_t>(multiprocessors / heads, (tiles + kWarps - 1) / kWarps));
  }
  return plan;
}

int64_t resident_bytes(const ResidentParams& plan) {
  int64_t bytes = 0;
  dispatch_head_dim(plan.attention.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    bytes = static_cast<int64_t>(kWarps) * Traits<kHeadDim>::kRowTiles * kTileRows * kHeadDim * 2 +
            plan.teams * static_cast<int64_t>(head_bytes<kHeadDim>(plan.padded));
  });
  return bytes;
}

bool fits_resident(const ResidentParams& plan, int max_shared_bytes, int multiprocessor_bytes) {
  constexpr int kReservedBytes = 1024;  // that CUDA takes for itself per block
  return resident_bytes(plan) <= std::min(max_shared_bytes, multiprocessor_bytes / 2 - kReservedBytes);
}

void launch_resident(const ResidentParams& plan, Dtype dtype, int max_shared_bytes, cudaStream_t stream) {
  const int64_t heads = plan.attention.batch * plan.attention.heads;
  const int64_t blocks = (heads + plan.teams - 1) / plan.teams * plan.splits;
  const int bytes = static_cast<int>(resident_bytes(plan));
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(plan.attention.head_dim, [&](auto head_dim) {
      launch_kernel(attention_resident_kernel<T, decltype(head_dim)::value>, blocks, kThreads, bytes,
                    max_shared_bytes, stream, plan);
    });
  });
}

}  // namespace tome::attention_ops
