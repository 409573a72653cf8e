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
  constexpr int kRowTiles = Traits<kHeadDim>::kRowTiles;
  const AttentionParams& p = plan.attention;
  const int warp = threadIdx.x / kWarpSize;
  const int team_warps = kWarps / plan.teams;  // each head of the block has a team of warps
  const int team = warp / team_warps;
  const int heads = static_cast<int>(p.batch) * p.heads;
  const int wanted = blockIdx.x / plan.splits * plan.teams + team;
  const int head = min(wanted, heads - 1);
  const int b = head / p.heads;
  const int h = head % p.heads;

  // This warp's share of the tiles, as even as can be.
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int split = blockIdx.x % plan.splits;
  const int first = tiles * split / plan.splits;
  const int count = tiles * (split + 1) / plan.splits - first;
  int tile = first + count * (warp % team_warps) / team_warps;
  const int end = wanted < heads ? first + count * (warp % team_warps + 1) / team_warps : 0;

  char* shared = dynamic_shared();
  char* queries = shared + warp * (queries_bytes<kHeadDim>() / kWarps);
  const int keys = queries_bytes<kHeadDim>() + team * plan.key_blocks * key_block_bytes(kHeadDim);
  const int padded = (p.keys + kKeyStep - 1) / kKeyStep * kKeyStep;
  const auto load_queries = [&] {
    copy_queries<T, kHeadDim>(p, b, h, tile * kTileRows, min(kRowTiles, end - tile) * kTileRows, queries);
  };
  load_queries();
  if (plan.teams == 1) {
    copy_keys<T, kHeadDim, kThreads>(p, b, h, 0, padded, threadIdx.x, shared + keys);
  } else {  // a warp at a time, a block of keys at a time
    for (int i = warp % team_warps; i < plan.key_blocks; i += team_warps) {
      copy_keys<T, kHeadDim, kWarpSize>(p, b, h, i * kBlockKeys, min(kBlockKeys, padded - i * kBlockKeys),
                                        threadIdx.x % kWarpSize, shared + keys + i * key_block_bytes(kHeadDim));
    }
  }
  cute::cp_async_fence();
  const int team_threads = team_warps * kWarpSize;
  for (int key = threadIdx.x % team_threads * 2; key < padded; key += 2 * team_threads) {
    store_bias<kHeadDim>(shared + keys, key, key_bias(p, b, key));
  }
  cute::cp_async_wait<0>();
  __syncthreads();

  const float c = p.scale * kLog2E;
  const float slack = kSlack / c;
  WarpState<T, kHeadDim, kRowTiles> state;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
    const int row = tile * kTileRows;
    state.template start<kActive>(queries);
    __syncwarp();
    tile += kActive;
    if (tile < end) load_queries();  // the next ones travel meanwhile
    cute::cp_async_fence();
    state.template walk<kActive>(shared, keys, padded, c, slack);
    state.template finish<kActive>(p, b, h, row);
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
  ResidentParams plan{p, 1, 1, (p.keys + kBlockKeys - 1) / kBlockKeys};
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int64_t heads = p.batch * p.heads;
  // Every multiprocessor gets a block before one gets four heads.
  while (plan.teams < kWarps && tiles * plan.teams <= kWarps &&
         plan.key_blocks * kBlockKeys * plan.teams <= kTeamKeys && heads > plan.teams * multiprocessors) {
    plan.teams *= 2;
  }
  if (plan.teams == 1) {
    plan.splits = std::max<int64_t>(1, std::min<int64_t>(multiprocessors / heads, (tiles + kWarps - 1) / kWarps));
  }
  return plan;
}

int64_t resident_bytes(const ResidentParams& plan) {
  int64_t bytes = static_cast<int64_t>(plan.teams) * plan.key_blocks * key_block_bytes(plan.attention.head_dim);
  dispatch_head_dim(plan.attention.head_dim,
                    [&](auto head_dim) { bytes += queries_bytes<decltype(head_dim)::value>(); });
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
