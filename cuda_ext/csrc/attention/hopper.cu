// Attention on Hopper's warpgroup products: out = softmax(q k^T scale + log(size)) v.
//
// One persistent block per multiprocessor. Warpgroups of consumers own 64 queries at a time; one more warp
// streams keys, values and biases through a ring of stages, tile by tile of kTileKeys keys. A pass is all key
// tiles of a head, seen by `pass_tiles` tiles of queries: as many as there are consumers, or, where a whole
// head fits into the ring, all tiles of the head, which the consumers take in turn without waiting for each
// other. Each consumer runs on its own: while one waits for its products another computes exponentials, and
// the product with the values of a tile runs during the softmax of the next.
#include "hopper.h"

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <type_traits>

#include "../launch.cuh"
#include "../vector.cuh"
#include "hopper_memory.cuh"
#include "hopper_products.cuh"
#include "hopper_softmax.cuh"

namespace tome::attention_ops {
namespace hopper {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kTileRows = 64;  // queries of a warpgroup's products
constexpr int kWarpRows = 16;
constexpr int kSharedBytes = 227 << 10;  // what a block may have on compute capability 9.0
constexpr int kAlignment = 1024;         // where the widest swizzle repeats

#ifndef TOME_KEYS
#define TOME_KEYS 96
#endif
#ifndef TOME_GROUPS
#define TOME_GROUPS 3
#endif

constexpr int tile_keys(int dim) { return dim == 72 || dim == 80 ? 80 : TOME_KEYS; }

template <class T_, int kDim_, int kTail_>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kTail = kTail_;  // keys that the last tile has room for
  static constexpr int kGroups = kDim <= 80 ? TOME_GROUPS : 2;
  static constexpr int kTileKeys = tile_keys(kDim);
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // The producer's warpgroup leaves most of its share of the registers to the consumers.
  static constexpr int kProducerRegisters = kGroups == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kGroups == 4 ? 112 : kGroups == 3 ? 160 : 240;
  using Queries = TileLayout<kDim, kTileRows>;
  using Keys = TileLayout<kDim, kTileKeys>;
  static constexpr int kBiasBytes = 2 * kTileKeys * static_cast<int>(sizeof(float));  // each for two rows
  static constexpr int kStageBytes = 2 * Keys::kBytes + kBiasBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages = std::min(
      12, (kSharedBytes - kAlignment - kBarrierBytes - kGroups * Queries::kBytes) / kStageBytes);
  static_assert(kStages >= 2, "a tile's values are in use while the next tile's keys are");
  static constexpr int kTilesEnd = kStages * 2 * Keys::kBytes + kGroups * Queries::kBytes;
  static constexpr int kUsedBytes = kAlignment + kTilesEnd + kStages * kBiasBytes + kBarrierBytes;
  static_assert((2 * kStages + kGroups) * 8 <= kBarrierBytes && kUsedBytes <= kSharedBytes);
  static_assert(Keys::kBytes % kAlignment == 0 || Keys::kPanel < 64);
};

struct HopperParams {
  CUtensorMap q_map, k_map, v_map;
  void* out_ptr;
  const float* size_ptr;
  int64_t size_batch_stride, size_stride;
  int heads, queries, keys, head_dim;
  float scale;  // of powers of two
  int query_tiles, key_tiles;
  int pass_tiles;   // tiles of queries that see each stage
  int head_passes;  // passes that a head's tiles of queries make
  int passes;       // of all heads
};

#ifdef CUTE_ARCH_MMA_SM90A_ENABLED

// Where everything lies in the block's shared memory, as addresses for the copy engine and the products.
template <class Traits>
struct Shared {
  char* base;
  uint32_t address;

  __device__ __forceinline__ explicit Shared(char* shared) {
    const uint32_t start = shared_address(shared);
    // From one lane: uniform, and held in a register rather than computed anew at each use.
    address = __shfl_sync(kFullWarp, (start + kAlignment - 1) & ~(kAlignment - 1), 0);
    base = shared + (address - start);
  }
  __device__ uint32_t keys(int stage) const { return address + stage * 2 * Traits::Keys::kBytes; }
  __device__ uint32_t values(int stage) const { return keys(stage) + Traits::Keys::kBytes; }
  __device__ uint32_t queries(int group) const {
    return address + Traits::kStages * 2 * Traits::Keys::kBytes + group * Traits::Queries::kBytes;
  }
  __device__ uint32_t bias(int stage) const { return address + Traits::kTilesEnd + stage * Traits::kBiasBytes; }
  __device__ uint32_t barriers() const {
    return address + Traits::kTilesEnd + Traits::kStages * Traits::kBiasBytes;
  }
  __device__ uint32_t full(int stage) const { return barriers() + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers() + 8 * (Traits::kStages + stage); }
  __device__ uint32_t queries_full(int group) const { return barriers() + 8 * (2 * Traits::kStages + group); }
};

// A stage of the ring and the parity of its current use.
template <class Traits>
struct Cursor {
  int stage;
  uint32_t parity;

  __device__ __forceinline__ explicit Cursor(int use) : stage(use % Traits::kStages), parity(use / Traits::kStages & 1) {}
  __device__ __forceinline__ void advance() {
    if (++stage == Traits::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The biases of a lane's keys of a tile. Keys past the end get -inf: no weight.
template <int kTileKeys>
struct LaneBias {
  static constexpr int kCount = (kTileKeys + kWarpSize - 1) / kWarpSize;
  float size[kCount];

  __device__ __forceinline__ void load(const HopperParams& p, int b, int first_key) {
    const float* size_ptr = p.size_ptr + b * p.size_batch_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = first_key + i * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
      size[i] = key >= p.keys ? 0.0f : p.size_ptr == nullptr ? 1.0f : __ldg(size_ptr + key * p.size_stride);
    }
  }
  __device__ __forceinline__ void store(uint32_t bias, float unit) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = i * kWarpSize + threadIdx.x % kWarpSize;
      const float value = __log2f(size[i]) * unit;
      const uint32_t to = bias + key / 2 * 16 + key % 2 * 4;
      if (key < kTileKeys) {
        asm volatile("st.shared.f32 [%0], %1;\n st.shared.f32 [%0 + 8], %1;" ::"r"(to), "f"(value) : "memory");
      }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void produce(const HopperParams& p, const Shared<Traits>& shared) {
  using Layout = typename Traits::Keys;
  const bool leads = threadIdx.x % kWarpSize == 0;
  Cursor<Traits> cursor(0);
  LaneBias<Traits::kTileKeys> bias;
  bias.load(p, blockIdx.x / p.head_passes / p.heads, 0);
  for (int pass = blockIdx.x; pass < p.passes; pass += gridDim.x) {
    const int head = pass / p.head_passes;
    for (int tile = 0; tile < p.key_tiles; ++tile, cursor.advance()) {
      barrier_wait(shared.empty(cursor.stage), cursor.parity ^ 1);
      const int first_key = tile * Traits::kTileKeys;
      const uint32_t full = shared.full(cursor.stage);
      if (leads) {
        barrier_expect(full, 2 * Layout::kBytes);
#pragma unroll
        for (int panel = 0; panel < Layout::kPanels; ++panel) {
          load_box(p.k_map, full, shared.keys(cursor.stage) + panel * Layout::kPanelBytes, panel * Layout::kPanel,
                   first_key, head % p.heads, head / p.heads);
        }
#pragma unroll
        for (int panel = 0; panel < Layout::kPanels; ++panel) {
          load_box(p.v_map, full, shared.values(cursor.stage) + panel * Layout::kPanelBytes,
                   panel * Layout::kPanel, first_key, head % p.heads, head / p.heads);
        }
      }
      bias.store(shared.bias(cursor.stage), 1.0f / p.scale);
      __syncwarp();
      if (leads) barrier_arrive(full);
      // The next tile's sizes travel while its stage is still in use.
      const bool is_last = tile + 1 == p.key_tiles;
      const int next = is_last ? pass + static_cast<int>(gridDim.x) : pass;
      if (next < p.passes) bias.load(p, next / p.head_passes / p.heads, is_last ? 0 : first_key + Traits::kTileKeys);
    }
  }
}

// A tile of queries of a head, and the pass in which its consumer sees it.
struct Item {
  int head, tile, round;
  bool exists;  // a block has no more items after one that doesn't
  bool is_used;  // the last pass of a head may have fewer tiles than the others

  __device__ __forceinline__ Item(const HopperParams& p, int item) {
    round = item / p.pass_tiles;
    const int64_t pass = blockIdx.x + static_cast<int64_t>(round) * gridDim.x;
    exists = pass < p.passes;
    head = static_cast<int>(pass) / p.head_passes;
    tile = static_cast<int>(pass) % p.head_passes * p.pass_tiles + item % p.pass_tiles;
    is_used = exists && tile < p.query_tiles;
  }
};

template <class Traits>
__device__ __forceinline__ void load_queries(const HopperParams& p, const Shared<Traits>& shared, int group,
                                             const Item& item) {
  using Layout = typename Traits::Queries;
  const uint32_t full = shared.queries_full(group);
  barrier_expect(full, Layout::kBytes);
  barrier_arrive(full);
#pragma unroll
  for (int panel = 0; panel < Layout::kPanels; ++panel) {
    load_box(p.q_map, full, shared.queries(group) + panel * Layout::kPanelBytes, panel * Layout::kPanel,
             item.tile * kTileRows, item.head % p.heads, item.head / p.heads);
  }
}

#ifndef TOME_TURN
#define TOME_TURN 1
#endif
// Consumers issue their products in turns. Left alone they fall into step, all at the tensor cores and then all
// at their exponentials, and nothing overlaps.
template <class Traits>
struct Turn {
  int group;
  uint32_t lock;

  __device__ __forceinline__ void start() const {
    if (TOME_TURN == 1 && group == Traits::kGroups - 1) give();
  }
  __device__ __forceinline__ void take() const {
    if (TOME_TURN == 1) named_barrier(1 + Traits::kGroups + group, 2 * kGroupThreads);
    if (TOME_TURN == 2) {
      if (threadIdx.x % kGroupThreads == 0) {
        uint32_t was;
        do {
          asm volatile("atom.shared.cta.cas.b32 %0, [%1], 0, 1;" : "=r"(was) : "r"(lock) : "memory");
        } while (was != 0);
      }
      named_barrier(1 + group, kGroupThreads);
    }
  }
  __device__ __forceinline__ void give() const {
    if (TOME_TURN == 1) named_arrive(1 + Traits::kGroups + (group + 1) % Traits::kGroups, 2 * kGroupThreads);
    if (TOME_TURN == 2 && threadIdx.x % kGroupThreads == 0) {
      asm volatile("st.shared.u32 [%0], 0;" ::"r"(lock) : "memory");
    }
  }
};

// One warpgroup's view of its tile of queries.
template <class Traits>
struct Consumer {
  using T = typename Traits::T;
  using Keys = typename Traits::Keys;
  static constexpr int kTileKeys = Traits::kTileKeys;
  static constexpr bool kHasTail = Traits::kTail < kTileKeys;

  const HopperParams& p;
  const Shared<Traits>& shared;
  uint32_t q[Traits::Queries::kSteps][4];
  float s[kTileKeys / 2];
  uint32_t weights[kTileKeys / kProductDepth][4];
  float out[Traits::kDim / 2];
  Rows rows;
  Turn<Traits> turn;
  int thread;  // of the group; from a shuffle, or else the compiler reads it anew at each use, slowly
  bool has_rows;  // whether any query of this warp exists

  __device__ __forceinline__ Consumer(const HopperParams& p, const Shared<Traits>& shared) : p(p), shared(shared) {}

  __device__ __forceinline__ void read_queries(int group) {
    using Layout = typename Traits::Queries;
    const int lane = threadIdx.x % kWarpSize;
    const int row = threadIdx.x % kGroupThreads / kWarpSize * kWarpRows + lane % 16;
#pragma unroll
    for (int step = 0; step < Layout::kSteps; ++step) {
      const uint32_t from = shared.queries(group) + Layout::offset(row, step * kProductDepth + lane / 16 * 8);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(q[step][0]), "=r"(q[step][1]), "=r"(q[step][2]), "=r"(q[step][3])
                   : "r"(from)
                   : "memory");
    }
  }

  template <int kKeys>
  __device__ __forceinline__ void multiply_keys(int stage) {
    using Op = typename Product<T, kKeys>::ByKeys;
    const uint64_t keys = Keys::by_columns(shared.keys(stage));
#pragma unroll
    for (int step = 0; step < Keys::kSteps; ++step) {
      multiply<Op, kKeys>(q[step], keys + Keys::columns_advance(step), s);
    }
    cute::warpgroup_commit_batch();
  }

  template <int kKeys>
  __device__ __forceinline__ void multiply_values(int stage) {
    using Op = typename Product<T, Traits::kDim>::ByValues;
    const uint64_t values = Keys::by_rows(shared.values(stage));
#pragma unroll
    for (int step = 0; step < kKeys / kProductDepth; ++step) {
      multiply<Op, Traits::kDim>(weights[step], values + Keys::rows_advance(step), out);
    }
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (thread % kWarpSize == 0) barrier_arrive(shared.empty(stage));
  }

  // The scores of this warp's rows once more, without the other warps.
  template <int kKeys>
  __device__ __forceinline__ void repeat_scores(int stage) {
    using Op = typename Product<T, 16>::OfWarp;
    load_bias<kKeys>(s, shared.bias(stage) + thread % 4 * 16);
    int lane = thread % kWarpSize;
    asm volatile("" : "+r"(lane));  // else the addresses below are computed ahead, for every tile
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int step = 0; step < Keys::kSteps; ++step) {
        const uint32_t from =
            shared.keys(stage) + Keys::offset(8 * j + lane % 8, step * kProductDepth + lane / 8 % 2 * 8);
        uint32_t b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(b[0]), "=r"(b[1])
                     : "r"(from)
                     : "memory");
        float* c = s + 4 * j;
        Op::fma(c[0], c[1], c[2], c[3], q[step][0], q[step][1], q[step][2], q[step][3], b[0], b[1], c[0], c[1],
                c[2], c[3]);
      }
    }
  }

  __device__ __forceinline__ void rescale(float2 factor) {
#pragma unroll
    for (int i = 0; i < Traits::kDim / 2; ++i) out[i] *= i / 2 % 2 == 0 ? factor.x : factor.y;
    rows.sum[0] *= factor.x;
    rows.sum[1] *= factor.y;
  }

  // Scores become weights relative to the highest score of the first tile. Later tiles don't look for theirs:
  // should one exceed that by so much that weights overflow, sums show it, and the tile is done again.
  template <int kKeys>
  __device__ __forceinline__ void soften_tile(int stage, bool is_first) {
    if (is_first) raise_base<kKeys>(s, p.scale, rows);
    float sum[2];
    soften<kKeys>(s, p.scale, rows, is_first, sum);
    const bool overflows = !(sum[0] <= kMostSum && sum[1] <= kMostSum);  // true for NaN as well
    if (__any_sync(kFullWarp, overflows)) {
      repeat_scores<kKeys>(stage);
      rescale(raise_base<kKeys>(s, p.scale, rows));
      soften<kKeys>(s, p.scale, rows, true, sum);
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
  }

  __device__ __forceinline__ void load_tile_bias(int stage) {
    load_bias<kTileKeys>(s, shared.bias(stage) + thread % 4 * 16);
  }

  // One tile of keys. Its product with the values is left running, until the next tile's scores are there.
  // The next tile's biases are taken while no product runs that could still need their registers.
  template <int kKeys>
  __device__ __forceinline__ void step(Cursor<Traits>& at, int previous, bool is_last) {
    const int stage = at.stage;
    fence_registers(s);
    cute::warpgroup_arrive();
    multiply_keys<kKeys>(stage);
    turn.give();
    if (!is_last) at.advance();
    cute::warpgroup_wait<0>();
    fence_registers(s);
    fence_registers(out);
    if (previous >= 0) release(previous);
    if (has_rows) soften_tile<kKeys>(stage, previous < 0);
    barrier_wait(shared.full(at.stage), at.parity);  // the last tile's own, which is there
    pack_weights<T, kKeys>(s, weights);
    load_tile_bias(at.stage);
#pragma unroll
    for (int i = 0; i < kKeys / kProductDepth; ++i) fence_registers(weights[i]);
    fence_registers(out);
    turn.take();
    cute::warpgroup_arrive();
    multiply_values<kKeys>(stage);
  }

  __device__ __forceinline__ void attend(Cursor<Traits> at) {
    rows.reset();
#pragma unroll
    for (int i = 0; i < Traits::kDim / 2; ++i) out[i] = 0.0f;
    int previous = -1;
    barrier_wait(shared.full(at.stage), at.parity);
    load_tile_bias(at.stage);
    turn.take();
    for (int tile = kHasTail ? 1 : 0; tile < p.key_tiles; ++tile) {
      const int stage = at.stage;
      step<kTileKeys>(at, previous, !kHasTail && tile + 1 == p.key_tiles);
      previous = stage;
    }
    if constexpr (kHasTail) {
      const int stage = at.stage;
      step<Traits::kTail>(at, previous, true);
      previous = stage;
    }
    turn.give();
    cute::warpgroup_wait<0>();
    fence_registers(out);
    release(previous);
  }

  __device__ __forceinline__ void store(const Item& item, int first_row) {
    constexpr int kBlocks = Traits::kDim / 8;
    const int lane = threadIdx.x % kWarpSize;
    T* out_ptr = static_cast<T*>(p.out_ptr);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float inverse = 1.0f / sum_of_four(rows.sum[row]);
      const int query = first_row + row * 8 + lane / 4;
      const int64_t position = static_cast<int64_t>(item.head / p.heads) * p.queries + query;
      T* row_ptr = out_ptr + (position * p.heads + item.head % p.heads) * Traits::kDim;
      uint32_t word[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        word[j] = pack_pair<T>(out[4 * j + 2 * row] * inverse, out[4 * j + 2 * row + 1] * inverse);
      }
#pragma unroll
      for (int j = 0; j + 4 <= kBlocks; j += 4) {
        uint32_t block[4] = {word[j], word[j + 1], word[j + 2], word[j + 3]};
        gather_block(block);
        if (query < p.queries) {
          *reinterpret_cast<uint4*>(row_ptr + (j + lane % 4) * 8) =
              make_uint4(block[0], block[1], block[2], block[3]);
        }
      }
#pragma unroll
      for (int j = kBlocks / 4 * 4; j < kBlocks; ++j) {
        if (query < p.queries) *reinterpret_cast<uint32_t*>(row_ptr + j * 8 + lane % 4 * 2) = word[j];
      }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void consume(const HopperParams& p, const Shared<Traits>& shared) {
  // Read from one lane, so that the compiler knows it, and all that follows from it, to be uniform in a warp.
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  const bool leads = threadIdx.x % kGroupThreads == 0;
  Consumer<Traits> consumer(p, shared);
  consumer.turn.group = group;
  consumer.thread = __shfl_sync(kFullWarp, threadIdx.x % kGroupThreads, threadIdx.x % kWarpSize);
  consumer.turn.lock = shared.barriers() + Traits::kBarrierBytes - 8;
  consumer.turn.start();
  const int passes = (p.passes - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  const int rounds = (passes * p.pass_tiles + Traits::kGroups - 1) / Traits::kGroups;
  uint32_t parity = 0;
  {
    const Item first(p, group);
    if (first.is_used && leads) load_queries(p, shared, group, first);
  }
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Item item(p, round * Traits::kGroups + group);
    if (item.is_used) {
      barrier_wait(shared.queries_full(group), parity);
      parity ^= 1;
      consumer.read_queries(group);
      named_barrier(1 + group, kGroupThreads);  // every warp has read: the next queries may come
    }
    if (leads) {
      const Item next(p, (round + 1) * Traits::kGroups + group);
      if (next.is_used) load_queries(p, shared, group, next);
    }
    Cursor<Traits> cursor(item.round * p.key_tiles);
    if (item.is_used) {
      const int first_row = item.tile * kTileRows + consumer.thread / kWarpSize * kWarpRows;
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
        if (TOME_TURN == 1) {
          consumer.turn.take();
          consumer.turn.give();
        }
      }
    }
  }
}

#endif  // CUTE_ARCH_MMA_SM90A_ENABLED

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_hopper_kernel(const __grid_constant__ HopperParams p) {
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
  const Shared<Traits> shared(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch_map(p.q_map);
    prefetch_map(p.k_map);
    prefetch_map(p.v_map);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), p.pass_tiles * (kGroupThreads / kWarpSize));
    }
    for (int group = 0; group < Traits::kGroups; ++group) barrier_init(shared.queries_full(group), 1);
    *reinterpret_cast<uint32_t*>(shared.base + Traits::kUsedBytes - kAlignment - 8) = 0;
    barrier_fence();
  }
  __syncthreads();
  if (threadIdx.x >= Traits::kGroups * kGroupThreads) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x < Traits::kGroups * kGroupThreads + kWarpSize) produce<Traits>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume<Traits>(p, shared);
  }
#endif
}

// cuTensorMapEncodeTiled belongs to the driver's library, which a machine without a GPU doesn't have: asking
// for it at run time keeps the extension loadable there.
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                             cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                       : nullptr;
}
Encode encode() {
  static const Encode function = find_encode();
  return function;
}

template <class Layout>
bool make_map(CUtensorMap& map, const Heads& heads, const AttentionParams& params, int rows, int box_rows,
              bool is_half) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(params.head_dim), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(params.heads), static_cast<cuuint64_t>(params.batch)};
  cuuint64_t strides[3] = {static_cast<cuuint64_t>(heads.row_stride), static_cast<cuuint64_t>(heads.head_stride),
                           static_cast<cuuint64_t>(heads.batch_stride)};
  // The stride of a dimension of one may be anything; the map wants a multiple of 16 bytes.
  for (int i = 0; i < 3; ++i) strides[i] = sizes[i + 1] == 1 ? kAccessBytes : strides[i] * 2;
  const cuuint32_t box[4] = {Layout::kPanel, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = Layout::kPanel == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : Layout::kPanel == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                            : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode()(&map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                  const_cast<void*>(heads.data_ptr), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int current_multiprocessors() {
  int device = 0;
  int count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class T, int kDim, int kTail>
bool launch_tail(const AttentionParams& params, cudaStream_t stream) {
  using Shape = Traits<T, kDim, kTail>;
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  HopperParams p{};
  if (!make_map<typename Shape::Queries>(p.q_map, params.q, params, params.queries, kTileRows, kIsHalf) ||
      !make_map<typename Shape::Keys>(p.k_map, params.k, params, params.keys, Shape::kTileKeys, kIsHalf) ||
      !make_map<typename Shape::Keys>(p.v_map, params.v, params, params.keys, Shape::kTileKeys, kIsHalf)) {
    return false;
  }
  p.out_ptr = params.out_ptr;
  p.size_ptr = params.size_ptr;
  p.size_batch_stride = params.size_batch_stride;
  p.size_stride = params.size_stride;
  p.heads = params.heads;
  p.queries = params.queries;
  p.keys = params.keys;
  p.head_dim = params.head_dim;
  p.scale = params.scale * 1.4426950408889634f;
  p.query_tiles = (params.queries + kTileRows - 1) / kTileRows;
  p.key_tiles = (params.keys + Shape::kTileKeys - 1) / Shape::kTileKeys;
  const bool fits = p.key_tiles <= Shape::kStages;
#ifdef TOME_ENV
  const char* whole = getenv("TOME_WHOLE");
  p.pass_tiles = whole != nullptr && atoi(whole) == 0 ? Shape::kGroups : fits ? p.query_tiles : Shape::kGroups;
#else
  p.pass_tiles = fits ? p.query_tiles : Shape::kGroups;
#endif
  p.head_passes = (p.query_tiles + p.pass_tiles - 1) / p.pass_tiles;
  p.passes = static_cast<int>(params.batch * params.heads * p.head_passes);
  launch_kernel(attention_hopper_kernel<Shape>, std::min(p.passes, current_multiprocessors()), Shape::kThreads,
                Shape::kUsedBytes, Shape::kUsedBytes, stream, p);
  return true;
}

// A last tile with few keys takes narrower products and fewer exponentials.
template <class T, int kDim>
bool launch(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kTileKeys = tile_keys(kDim);
  const int last = (params.keys - 1) % kTileKeys + 1;
  if (last <= 16) return launch_tail<T, kDim, 16>(params, stream);
  if (last <= 32) return launch_tail<T, kDim, 32>(params, stream);
  if (last <= 64) return launch_tail<T, kDim, 64>(params, stream);
  return launch_tail<T, kDim, kTileKeys>(params, stream);
}

template <class T>
bool launch_dim(const AttentionParams& params, cudaStream_t stream) {
#ifdef TOME_ONLY
  if (params.head_dim == TOME_ONLY) return launch<T, TOME_ONLY>(params, stream);
#else
  switch (params.head_dim) {
    case 32:
      return launch<T, 32>(params, stream);
    case 64:
      return launch<T, 64>(params, stream);
    case 72:
      return launch<T, 72>(params, stream);
    case 80:
      return launch<T, 80>(params, stream);
    case 96:
      return launch<T, 96>(params, stream);
    case 128:
      return launch<T, 128>(params, stream);
  }
#endif
  return false;
}

}  // namespace
}  // namespace hopper

void launch_attention_hopper(const AttentionParams& params, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kHalf) {
    hopper::launch_dim<__half>(params, stream);
  } else {
    hopper::launch_dim<__nv_bfloat16>(params, stream);
  }
}

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

bool hopper_takes(const AttentionParams& params) {
#ifdef TOME_HOPPER
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0 && has_map(params.q, params, params.queries) &&
         has_map(params.k, params, params.keys) && has_map(params.v, params, params.keys);
#else
  return false;
#endif
}

}  // namespace tome::attention_ops
