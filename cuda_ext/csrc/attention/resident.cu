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

// The head of a team; none where there are fewer heads than teams.
struct Place {
  unsigned b, h;
  bool is_some;

  __device__ __forceinline__ Place(const ResidentParams& plan, unsigned team) {
    const unsigned all = plan.attention.heads;
    const unsigned heads = static_cast<unsigned>(plan.attention.batch) * all;
    const unsigned head = (forget(blockIdx.x) / static_cast<unsigned>(plan.splits) << plan.team_bits) + team;
    is_some = head < heads;
    b = min(head, heads - 1) / all;
    h = min(head, heads - 1) % all;
  }
};

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, WarpTiles<kHeadDim>::kBlocks) void attention_resident_kernel(
    const ResidentParams plan) {
  using Block = KeyBlock<kHeadDim>;
  constexpr int kRowTiles = WarpTiles<kHeadDim>::kRowTiles;
  const AttentionParams& p = plan.attention;
  const auto warp = [] { return forget(threadIdx.x) / kWarpSize; };
  const unsigned team_warps = kWarps >> plan.team_bits;  // each head of the block has a team of warps
  const auto team = [&] { return warp() >> (kWarpBits - plan.team_bits); };
  const auto member = [&] { return warp() & (team_warps - 1); };
  char* shared = dynamic_shared();
  const int keys = queries_bytes<kHeadDim>() + team() * plan.key_blocks * Block::kBytes;

  // This warp's share of the tiles, as even as can be.
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int split = blockIdx.x % plan.splits;
  const int first = tiles * split / plan.splits;
  const int count = tiles * (split + 1) / plan.splits - first;
  int tile = first + count * (member()) / team_warps;
  int end = first + count * (member() + 1) / team_warps;

  const auto queries = [&] { return shared + warp() * (queries_bytes<kHeadDim>() / kWarps); };
  const auto load_queries = [&] {
    const Place place(plan, team());
    const T* rows_ptr = rows_address<T>(p.q, place.b, place.h, tile * kTileRows);
    copy_rows<T, kHeadDim, kRowTiles * kTileRows>(rows_ptr, p.q.row_stride, p.queries - tile * kTileRows,
                                                  p.is_aligned, queries());
  };
  await_previous();
  load_queries();
  {
    const Place place(plan, team());
    if (!place.is_some) end = 0;
    for (int i = member(); i < 2 * plan.key_blocks; i += team_warps) {
      const Heads& heads = i % 2 == 0 ? p.k : p.v;
      const int first = i / 2 * kBlockKeys;
      const int to = i / 2 * Block::kBytes + (i % 2 == 0 ? 0 : Block::kValues);
      copy_rows<T, kHeadDim, kBlockKeys>(rows_address<T>(heads, place.b, place.h, first), heads.row_stride,
                                         p.keys - first, p.is_aligned, shared + keys + to);
    }
    cute::cp_async_fence();
    const int team_threads = team_warps * kWarpSize;
    for (int key = threadIdx.x % team_threads; key < plan.key_blocks * kBlockKeys; key += team_threads) {
      store_bias<kHeadDim>(p, shared + keys, key, key_size(p, place.b, key));
    }
  }
  cute::cp_async_wait<0>();
  __syncthreads();

  const float c = p.scale * kLog2E;
  WarpState<T, kHeadDim, kRowTiles> state;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
    state.template start<kActive>(queries());
    __syncwarp();
    tile += kActive;
    if (tile < end) load_queries();  // the next ones travel meanwhile
    cute::cp_async_fence();
    state.template walk<kActive>(shared, keys, p.keys, c);
    const Place place(plan, team());
    state.template finish<kActive>(p, place.b, place.h, (tile - kActive) * kTileRows);
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
  ResidentParams plan{p, 0, 1, (p.keys + kBlockKeys - 1) / kBlockKeys};
  const int tiles = (p.queries + kTileRows - 1) / kTileRows;
  const int64_t heads = p.batch * p.heads;
  // Every multiprocessor gets a block before one gets four heads.
  while (plan.team_bits < kWarpBits && tiles << plan.team_bits <= kWarps &&
         plan.key_blocks * kBlockKeys << plan.team_bits <= kTeamKeys &&
         heads > static_cast<int64_t>(multiprocessors) << plan.team_bits) {
    ++plan.team_bits;
  }
  if (plan.team_bits == 0) {
    plan.splits =
        std::max<int64_t>(1, std::min<int64_t>(multiprocessors / heads, (tiles + kWarps - 1) / kWarps));
  }
  return plan;
}

int64_t resident_bytes(const ResidentParams& plan) {
  int64_t bytes =
      (static_cast<int64_t>(plan.key_blocks) << plan.team_bits) * key_block_bytes(plan.attention.head_dim);
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
  const int64_t blocks = ((heads - 1 >> plan.team_bits) + 1) * plan.splits;
  const int bytes = static_cast<int>(resident_bytes(plan));
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(plan.attention.head_dim, [&](auto head_dim) {
      launch_kernel(attention_resident_kernel<T, decltype(head_dim)::value>, blocks, kThreads, bytes,
                    max_shared_bytes, stream, plan, true);
    });
  });
}

}  // namespace tome::attention_ops
