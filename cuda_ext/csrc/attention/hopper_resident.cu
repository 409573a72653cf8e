// All keys of a head in one pass, on warpgroup products: sequences of up to 256 tokens on Hopper.
//
// A block is one warpgroup. It loads keys and values of a head, then takes 64 queries after another: scores
// of all keys at once in registers (accumulators start from the bias), the softmax, the product with the
// values. There is no rescaling and no barrier between tiles. Three blocks share a multiprocessor: one loads
// or computes exponentials while the products of another run. Keys are padded to 16.
//
// Shared memory: keys, values, 16 queries per warp, bias.
#include <cutlass/arch/barrier.h>

#include <algorithm>

#include "../launch.cuh"
#include "hopper_products.cuh"
#include "softmax.cuh"

namespace tome::attention_ops {
namespace hopper {

// A descriptor of what lies `bytes` further on. Addresses stay below 2^18, so only the low word changes: one
// instruction between products where making a new descriptor takes five, each waiting for the one before.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}

namespace {

constexpr int kDim = 64;
constexpr int kGroupRows = 64;    // queries of a warpgroup's product
constexpr int kAlignment = 1024;  // where the swizzle repeats

template <int kKeys>
struct Plan {
  using Tile = TileLayout<kDim, kKeys>;
  static constexpr int kBlocks = kKeys <= 240 ? 3 : 2;
  static constexpr int kValues = Tile::kBytes;
  static constexpr int kQueries = kValues + Tile::kBytes;
  static constexpr int kBias = kQueries + kGroupRows * kDim * 2;
  static constexpr int kSharedBytes = kBias + kKeys * 8 + kAlignment;
};

template <class T, int kKeys>
__device__ __forceinline__ void attend(const ResidentParams& plan) {
  using Plan = Plan<kKeys>;
  using Tile = typename Plan::Tile;
  using Scores = typename Product<T, kKeys>::ByKeys;
  using Values = typename Product<T, kDim>::ByValues;
  constexpr int kGroups = kKeys / kTileRows;  // of 16 rows, which a warp copies together
  const AttentionParams& p = plan.attention;
  const int warp =
      __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // the same for all, as the compiler sees
  const int lane = threadIdx.x % kWarpSize;
  const unsigned head = blockIdx.x / static_cast<unsigned>(plan.splits);
  const int b = head / static_cast<unsigned>(p.heads);
  const int h = head % static_cast<unsigned>(p.heads);
  const uint32_t unaligned = cute::cast_smem_ptr_to_uint(dynamic_shared());
  char* shared = dynamic_shared() + (-unaligned & (kAlignment - 1));
  const uint32_t keys = cute::cast_smem_ptr_to_uint(shared);
  char* queries = shared + Plan::kQueries + warp * kTileRows * kDim * 2;

  int row = (blockIdx.x % static_cast<unsigned>(plan.splits)) * kGroupRows + warp * kTileRows;
  const auto load_queries = [&] {
    copy_rows<T, kDim, kTileRows>(rows_address<T>(p.q, b, h, row), p.q.row_stride, p.queries - row, true,
                                  queries);
  };
  const auto load_keys = [&](const Heads& heads, char* to) {
    for (int i = warp; i < kGroups; i += kWarps) {
      copy_rows<T, kDim, kTileRows>(rows_address<T>(heads, b, h, i * kTileRows), heads.row_stride,
                                    p.keys - i * kTileRows, true, to + i * kTileRows * Tile::kPitch);
    }
    cute::cp_async_fence();
  };
  load_queries();
  load_keys(p.k, shared);
  load_keys(p.v, shared + Plan::kValues);
  auto* bias = reinterpret_cast<float*>(shared + Plan::kBias);
  for (int key = threadIdx.x; key < kKeys; key += kThreads) {
    float* to = bias + key / 2 * 4 + key % 2;
    to[0] = to[2] = __logf(key_size(p, b, key)) * __frcp_rn(p.scale);
  }
  cute::cp_async_wait<1>();
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  const uint64_t by_keys = Tile::by_columns(keys, 0);
  const uint64_t by_values = Tile::by_rows(keys + Plan::kValues, 0);
  const float c = p.scale * kLog2E;
  const int step = plan.splits * kGroupRows;
  bool has_values = false;
#pragma unroll 1
  for (int first = row - warp * kTileRows; first < p.queries; first += step) {
    uint32_t q[kDim / 16][4];
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      load_matrices(queries + RowLayout<kDim>::offset(lane % 16, 2 * k + lane / 16), q[k]);
    }
    float score[kKeys / 2];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float4 start = reinterpret_cast<const float4*>(bias)[n * 4 + lane % 4];
      score[4 * n] = start.x;
      score[4 * n + 1] = start.y;
      score[4 * n + 2] = start.z;
      score[4 * n + 3] = start.w;
    }
    fence_registers(score);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      multiply<Scores, kKeys>(q[k], advance(by_keys, k * kKeyStep * 2), score);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(score);
    __syncwarp();
    row = first + step + warp * kTileRows;
    if (first + step < p.queries) load_queries();  // the next ones travel during the softmax
    cute::cp_async_fence();

    float factor[2] = {0.0f, 0.0f};
    if (first + warp * kTileRows < p.queries) {  // else what this warp multiplies is not stored
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top[2] = {-INFINITY, -INFINITY};  // fmaxf skips NaN: it shows in the weights, not here
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          top[n % 2] = fmaxf(top[n % 2], fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
        }
        float highest = fmaxf(top[0], top[1]);
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
        const float offset = highest == -INFINITY ? 0.0f : -highest * c;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            score[4 * n + i] = fast_exp2(fmaf(score[4 * n + i], c, offset));
            sum[i % 2] += score[4 * n + i];
          }
        }
        float total = sum[0] + sum[1];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        factor[half] = __frcp_rn(total);
      }
    }
    uint32_t weight[kKeys / 16][4];
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[n][i] = pack_pair<T>(score[8 * n + 2 * i], score[8 * n + 2 * i + 1]);
      fence_registers(weight[n]);
    }

    if (!has_values) {
      has_values = true;
      cute::cp_async_wait<1>();
      cutlass::arch::fence_view_async_shared();
      __syncthreads();
    }
    float out[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    fence_registers(out);
    cute::warpgroup_arrive();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      multiply<Values, kDim>(weight[n], advance(by_values, n * kKeyStep * Tile::kPitch), out);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(out);
    const int row_now = first + warp * kTileRows;
    const int64_t row_stride = static_cast<int64_t>(p.heads) * kDim;
    T* out_ptr =
        static_cast<T*>(p.out_ptr) + (static_cast<int64_t>(b) * p.queries + row_now) * row_stride + h * kDim;
    if (row_now < p.queries) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_row<T, kDim>([&](int j, int i) { return out[4 * j + 2 * half + i]; }, factor[half],
                           out_ptr + (half * 8 + lane / 4) * row_stride,
                           half * 8 + lane / 4 < p.queries - row_now);
      }
    }
    cute::cp_async_wait<0>();
    __syncwarp();
  }
}

template <class T, int kKeys>
__global__ __launch_bounds__(kThreads, Plan<kKeys>::kBlocks) void attention_hopper_resident_kernel(
    const ResidentParams plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  attend<T, kKeys>(plan);
#endif
}

template <class T, int kKeys>
void launch(const ResidentParams& plan, cudaStream_t stream) {
  if constexpr (kKeys > kMostKeys) {
    return;
  } else {
    if (plan.attention.keys > kKeys) return launch<T, kKeys + kTileRows>(plan, stream);
    launch_kernel(attention_hopper_resident_kernel<T, kKeys>,
                  plan.attention.batch * plan.attention.heads * plan.splits, kThreads,
                  Plan<kKeys>::kSharedBytes, Plan<kKeys>::kSharedBytes, stream, plan);
  }
}

}  // namespace

bool fits_resident(const AttentionParams& p) {
  return p.is_aligned && p.head_dim == kDim && p.keys > kLeastKeys && p.keys <= kMostKeys;
}

void launch_resident(const AttentionParams& p, Dtype dtype, int multiprocessors, cudaStream_t stream) {
  ResidentParams plan{p, 0, 1, 0};
  const int64_t tiles = (p.queries + kGroupRows - 1) / kGroupRows;
  plan.splits =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tiles, multiprocessors / (p.batch * p.heads))));
  dispatch_half(
      dtype, [&](auto tag) { launch<typename decltype(tag)::type, kLeastKeys + kTileRows>(plan, stream); });
}

}  // namespace hopper
}  // namespace tome::attention_ops
