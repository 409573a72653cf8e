// Attention on Hopper's warpgroup products: out = softmax(q k^T scale + log(size)) v.
//
// One persistent block per multiprocessor. Warpgroups of consumers own 64 queries at a time; two more warps
// stream keys, values and biases through a ring of stages, tile by tile of kTileKeys keys. A pass is all key
// tiles of a head, seen by `pass_tiles` tiles of queries: as many as there are consumers, or, where a whole
// head fits into the ring, all tiles of the head, which the consumers take in turn without waiting for each
// other. Each consumer runs on its own: while one waits for its products another computes exponentials, and
// the product with the values of a tile runs during the softmax of the next.
#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <type_traits>

#include "../hopper/tensor_map.h"
#include "../launch.cuh"
#include "attention.h"
#include "hopper_consumer.cuh"
#include "hopper_plan.cuh"
#include "hopper_producer.cuh"

namespace tome::attention_ops {
namespace hopper {
namespace {

#ifdef CUTE_ARCH_MMA_SM90A_ENABLED

template <class Plan>
__device__ __forceinline__ void load_queries(const HopperParams& p, const Shared<Plan>& shared, int group,
                                             const Item& item) {
  using Layout = typename Plan::Queries;
  const uint32_t full = shared.queries_full(group);
  barrier_arrive_expecting(full, Layout::kBytes);
  load_tile<Layout>(p, p.q_map, full, shared.queries(group), item.head, item.tile * kWarpgroupRows);
}

template <class Plan>
__device__ __forceinline__ void consume(const HopperParams& p, const Shared<Plan>& shared) {
  const int group = uniform(threadIdx.x / kWarpgroupThreads);
  const bool leads = threadIdx.x % kWarpgroupThreads == 0;
  Consumer<Plan> consumer(p, shared);
  consumer.turn = {group, p.has_turns};
  consumer.thread = __shfl_sync(kFullWarp, threadIdx.x % kWarpgroupThreads, threadIdx.x % kWarpSize);
  if (group == Plan::kGroups - 1) consumer.turn.give();  // the first turn is the first group's
  const int passes = (p.passes - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  const int rounds = (passes * p.pass_tiles + Plan::kGroups - 1) / Plan::kGroups;
  uint32_t parity = 0;
  {
    const Item first(p, group);
    if (first.is_used && leads) load_queries(p, shared, group, first);
  }
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Item item(p, round * Plan::kGroups + group);
    if (item.is_used) {
      barrier_wait(shared.queries_full(group), parity);
      parity ^= 1;
      consumer.read_queries(group);
      named_barrier(1 + group, kWarpgroupThreads);  // every warp has read: the next queries may come
    }
    if (leads) {
      const Item next(p, (round + 1) * Plan::kGroups + group);
      if (next.is_used) load_queries(p, shared, group, next);
    }
    RingPlace<Plan> cursor(item.round * p.key_tiles);
    if (item.is_used) {
      const int first_row = item.tile * kWarpgroupRows + consumer.thread / kWarpSize * kWarpRows;
      consumer.has_rows = first_row < p.queries;
      consumer.attend(cursor);
      if (consumer.has_rows) consumer.store(item, first_row);
    } else {
      // The others count on this one's turns and releases.
      for (int tile = 0; tile <= p.key_tiles; ++tile, cursor.advance()) {
        if (item.exists && tile < p.key_tiles) {
          barrier_wait(shared.full(cursor.stage), cursor.parity);
          consumer.release(cursor.stage);
        }
        consumer.turn.take();
        consumer.turn.give();
      }
    }
  }
}

#endif  // CUTE_ARCH_MMA_SM90A_ENABLED

// Nothing passes between the blocks of a cluster. There are two because only then may they store
// asynchronously.
constexpr int kClusterBlocks = 2;
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
#define TOME_CLUSTER __cluster_dims__(kClusterBlocks)
#else
#define TOME_CLUSTER
#endif

template <class Plan>
__global__ __launch_bounds__(Plan::kThreads, 1) TOME_CLUSTER
    void attention_hopper_kernel(const __grid_constant__ HopperParams p) {
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
  const Shared<Plan> shared(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch_map(p.q_map);
    prefetch_map(p.k_map);
    prefetch_map(p.v_map);
    for (int stage = 0; stage < Plan::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), p.pass_tiles * (kWarpgroupThreads / kWarpSize));
    }
    for (int group = 0; group < Plan::kGroups; ++group) barrier_init(shared.queries_full(group), 1);
    barrier_fence();
  }
  await_previous();
  __syncthreads();
  if (threadIdx.x >= Plan::kGroups * kWarpgroupThreads) {
    cutlass::arch::warpgroup_reg_dealloc<Plan::kProducerRegisters>();
    produce<Plan>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Plan::kConsumerRegisters>();
    consume<Plan>(p, shared);
  }
#endif
}

MappedTensor mapped(const Heads& heads, const AttentionParams& params, int rows, bool is_half) {
  return {heads.data_ptr,
          params.head_dim,
          rows,
          params.heads,
          params.batch,
          2 * heads.row_stride,
          2 * heads.head_stride,
          2 * heads.batch_stride,
          is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE};
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tiles of queries share a pass. Few in all: one, so that every tile has a multiprocessor of its
// own. All of a head, where the ring holds the head and whole heads fill the multiprocessors about as evenly
// as passes of one tile per consumer do. Otherwise the latter.
void plan_passes(HopperParams& p, int64_t heads, int groups, int stages, int multiprocessors) {
  const int64_t split = divide_up(heads * divide_up(p.query_tiles, groups), multiprocessors) * groups;
  const int64_t whole = divide_up(heads, multiprocessors) * p.query_tiles;
  const bool is_few = heads * p.query_tiles <= multiprocessors;
  const bool is_whole = p.key_tiles <= stages && 5 * whole <= 6 * split;
  p.pass_tiles = is_few ? 1 : is_whole ? p.query_tiles : groups;
  p.has_turns = !is_few && !is_whole;
}

template <class T, int kDim, int kTail>
bool launch_tail(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  using Shape = RingPlan<T, kDim, kTail>;
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  HopperParams p{};
  const auto map = [&](CUtensorMap& to, const Heads& heads, int rows, int box_rows) {
    return make_map(to, mapped(heads, params, rows, kIsHalf), Shape::Keys::kPanel, box_rows);
  };
  if (!map(p.q_map, params.q, params.queries, kWarpgroupRows) ||
      !map(p.k_map, params.k, params.keys, Shape::kTileKeys) ||
      !map(p.v_map, params.v, params.keys, Shape::kTileKeys)) {
    return false;
  }
  p.out_ptr = params.out_ptr;
  p.lse_ptr = params.lse_ptr;
  p.size_ptr = params.size_ptr;
  p.size_batch_stride = params.size_batch_stride;
  p.size_stride = params.size_stride;
  p.heads = params.heads;
  p.queries = params.queries;
  p.keys = params.keys;
  p.scale = params.scale * kLog2E;
  p.query_tiles = (params.queries + kWarpgroupRows - 1) / kWarpgroupRows;
  p.key_tiles = (params.keys + Shape::kTileKeys - 1) / Shape::kTileKeys;
  plan_passes(p, params.batch * params.heads, Shape::kGroups, Shape::kStages, multiprocessors);
  p.head_passes = (p.query_tiles + p.pass_tiles - 1) / p.pass_tiles;
  p.passes = static_cast<int>(params.batch * params.heads * p.head_passes);
  const int64_t clusters = divide_up(std::min(p.passes, multiprocessors), kClusterBlocks);
  launch_kernel(attention_hopper_kernel<Shape>, clusters * kClusterBlocks, Shape::kThreads, Shape::kUsedBytes,
                Shape::kUsedBytes, stream, p, true);
  return true;
}

// A last tile with few keys takes narrower products and fewer exponentials.
template <class T, int kDim>
bool launch(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int kTileKeys = tile_keys(kDim);
  const int last = (params.keys - 1) % kTileKeys + 1;
  if (last <= 16) return launch_tail<T, kDim, 16>(params, multiprocessors, stream);
  if (last <= 32) return launch_tail<T, kDim, 32>(params, multiprocessors, stream);
  if (last <= 64) return launch_tail<T, kDim, 64>(params, multiprocessors, stream);
  return launch_tail<T, kDim, kTileKeys>(params, multiprocessors, stream);
}

}  // namespace
}  // namespace hopper

// What a tensor map can describe: strides are multiples of 16 bytes, below 2^40 bytes.
static bool has_map(const Heads& heads, const AttentionParams& params, int rows) {
  const int64_t sizes[3] = {rows, params.heads, params.batch};
  const int64_t strides[3] = {heads.row_stride, heads.head_stride, heads.batch_stride};
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = strides[i] * 2;
    if (sizes[i] > 1 && (bytes <= 0 || bytes % kAccessBytes != 0 || bytes >> 40 != 0)) return false;
  }
  return reinterpret_cast<uintptr_t>(heads.data_ptr) % kAccessBytes == 0;
}

bool launch_attention_hopper(const AttentionParams& params, Dtype dtype, int multiprocessors,
                             cudaStream_t stream) {
  if (!has_map(params.q, params, params.queries) || !has_map(params.k, params, params.keys) ||
      !has_map(params.v, params, params.keys)) {
    return false;
  }
  bool is_launched = false;
  dispatch_half(dtype, [&](auto tag) {
    dispatch_head_dim(params.head_dim, [&](auto dim) {
      is_launched =
          hopper::launch<typename decltype(tag)::type, decltype(dim)::value>(params, multiprocessors, stream);
    });
  });
  return is_launched;
}

}  // namespace tome::attention_ops
