// All keys of a head in one pass, on warpgroup products: sequences of up to 256 tokens on Hopper.
//
// A block is one warpgroup. It loads keys and values of a head, then takes 64 queries after another: scores
// of all keys at once in registers, the softmax, the product with the values. There is no rescaling and no
// barrier between tiles. Three blocks share a multiprocessor: one loads or computes exponentials while the
// products of another run. Within a tile, the output of the tile before is written while the scores are
// computed, and half of the weights while the product with the other half runs. Keys are padded to 16.
//
// Shared memory: keys, values, bias, 16 queries per warp (then its output), what the warps exchange in a
// tail.
#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>

#include <algorithm>

#include "../launch.cuh"
#include "hopper_resident.cuh"

namespace tome::attention_ops {
namespace hopper {
namespace {

template <class T, int kKeys>
__device__ __forceinline__ void attend(const HopperResidentParams& plan) {
  using Plan = ResidentPlan<kKeys>;
  using Tile = typename Plan::Tile;
  using Layout = RowLayout<kDim>;
  using ByLeft = typename Product<T, Plan::kLeft>::ByKeys;
  using ByRight = typename Product<T, Plan::kRight>::ByKeys;
  using ByValues = typename Product<T, kDim>::ByValues;
  constexpr int kSteps = kKeys / kKeyStep;
  const AttentionParams& p = plan.attention;
  // Known to the compiler as the same for all threads, so that it keeps what follows in uniform registers.
  const auto uniform = [](int x) { return __shfl_sync(kFullWarp, x, 0); };
  const int warp = uniform(threadIdx.x / kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  const unsigned head = blockIdx.x / static_cast<unsigned>(plan.splits);
  const int b = uniform(head / static_cast<unsigned>(p.heads));
  const int h = uniform(head % static_cast<unsigned>(p.heads));
  const uint32_t unaligned = cute::cast_smem_ptr_to_uint(dynamic_shared());
  char* shared = dynamic_shared() + (-unaligned & (kAlignment - 1));
  const uint32_t base = cute::cast_smem_ptr_to_uint(shared);
  char* queries = shared + Plan::kQueries + warp * kTileRows * Layout::kBytes;

  // Sizes first: what becomes of them takes longest.
  constexpr int kSizes = (kKeys + kThreads - 1) / kThreads;
  float size[kSizes];
#pragma unroll
  for (int i = 0; i < kSizes; ++i) size[i] = key_size(p, b, threadIdx.x + i * kThreads);

  const int begin = (blockIdx.x % static_cast<unsigned>(plan.splits)) * kGroupRows;
  const int step = plan.splits * kGroupRows;
  const int rest = p.queries % kGroupRows;
  const int end = rest <= kTailRows ? p.queries - rest : p.queries;  // of the queries in full tiles
  const auto load_queries = [&](int first) {
    const int row = first < end ? first + warp * kTileRows : first;  // all warps take the same of a tail
    const int rows = p.queries - row;
    copy_tile<T, kWarpSize, kTileRows, kTileRows>(rows_address<T>(p.q, b, h, rows > 0 ? row : 0),
                                                  p.q.row_stride, rows, queries);
    cute::cp_async_fence();
  };
  const auto load_head = [&](const Heads& heads, char* to) {
    copy_tile<T, kThreads, kKeys, kTileRows>(rows_address<T>(heads, b, h, 0), heads.row_stride, p.keys, to);
    cute::cp_async_fence();
  };
  load_queries(begin);
  load_head(p.k, shared);
  load_head(p.v, shared + Plan::kValues);
#pragma unroll
  for (int i = 0; i < kSizes; ++i) {
    const int key = threadIdx.x + i * kThreads;
    if (key < kKeys) {
      *reinterpret_cast<uint4*>(shared + Plan::kBias + key * kBiasBytes) =
          split_bias<T>(__logf(size[i]) * plan.to_bias);
    }
  }
  const uint32_t unit_pair = pack_pair<T>(plan.unit / 2, lane % 4 == 0 ? plan.unit / 2 : 0.0f);
  // Made anew for every product instead of being kept: registers are scarce.
  const auto read_unit = [&](uint32_t (&unit)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unit[i] = forget(lane % 4 < 2 ? unit_pair : 0);
  };
  cute::cp_async_wait<1>();
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  const uint64_t by_keys = Tile::by_columns(base, 0);
  const uint64_t by_values = Tile::by_rows(base + Plan::kValues, 0);
  // Eight rows of 16 bytes after another, without a swizzle; no bytes to the next eight columns.
  const uint64_t by_bias =
      Tile::uniform_low_word(base + Plan::kBias) | static_cast<uint64_t>(8 * kBiasBytes >> 4) << 32;
  const float c = p.scale * kLog2E;
  const int64_t row_stride = static_cast<int64_t>(p.heads) * kDim;
  T* head_ptr = static_cast<T*>(p.out_ptr) + static_cast<int64_t>(b) * p.queries * row_stride + h * kDim;

  uint32_t q[kDim / 16][4];
  const auto read_queries = [&] {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      load_matrices(queries + Layout::offset(lane % 16, 2 * k + lane / 16), q[k]);
    }
    __syncwarp();
  };
  // Write the tile before `first`, which lies where its queries lay, and load the one behind.
  const auto pass_on = [&](int first) {
    if (first != begin) {
      const int row = first - step + warp * kTileRows;
      const int lane = forget(threadIdx.x) % kWarpSize;
#pragma unroll
      for (int i = 0; i < kTileRows; i += kWarpSize / Layout::kChunks) {
        const int at = i + lane / Layout::kChunks;
        const int chunk = lane % Layout::kChunks;
        const uint4 pack = *reinterpret_cast<const uint4*>(queries + Layout::offset(at, chunk));
        if (row + at < p.queries) {
          *reinterpret_cast<uint4*>(head_ptr + (row + at) * row_stride + chunk * kChunkChannels) = pack;
        }
      }
      __syncwarp();
    }
    if (first + step < p.queries) load_queries(first + step);
  };
  read_queries();
  int first = begin;
  const auto wait_for_values = [&] {
    if (first != begin) return;  // they are there
    if (begin + step < p.queries) {
      cute::cp_async_wait<1>();  // but for the next queries
    } else {
      cute::cp_async_wait<0>();
    }
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
  };
#pragma unroll 1
  for (; first < end; first += step) {
    if (Plan::kIsFull) pass_on(first);

    Scores<kKeys> score;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) score[i] = 0.0f;
    uint32_t unit[4];
    read_unit(unit);
    fence_registers(unit);
    fence_registers(score.left);
    fence_registers(score.right);
    cute::warpgroup_arrive();
    multiply<ByLeft, Plan::kLeft>(unit, by_bias, score.left);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply<ByLeft, Plan::kLeft>(q[k], advance(by_keys, k * kKeyStep * 2), score.left);
    }
    cute::warpgroup_commit_batch();
    multiply<ByRight, Plan::kRight>(unit, advance(by_bias, Plan::kLeft * kBiasBytes), score.right);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply<ByRight, Plan::kRight>(q[k], advance(by_keys, Plan::kLeft * Tile::kPitch + k * kKeyStep * 2),
                                      score.right);
    }
    cute::warpgroup_commit_batch();
    if (!Plan::kIsFull) pass_on(first);

    float top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
    const auto look = [&](int n) {  // fmaxf skips NaN: it shows in the weights, not here
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half][n % 2] =
            fmaxf(top[half][n % 2], fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
      }
    };
    cute::warpgroup_wait<1>();
    fence_registers(score.left);
#pragma unroll
    for (int n = 0; n < Plan::kLeft / 8; ++n) look(n);
    fence_registers(top[0]);
    fence_registers(top[1]);
    cute::warpgroup_wait<0>();
    fence_registers(score.right);
#pragma unroll
    for (int n = Plan::kLeft / 8; n < kKeys / 8; ++n) look(n);
    float offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      offset[half] = exponent_offset(quad_max(fmaxf(top[half][0], top[half][1])), c);
    }

    float sum[2][2] = {};
    float out[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    uint32_t weight[kSteps][4];
#pragma unroll
    for (int part = 0; part < Plan::kParts; ++part) {
      if (first + warp * kTileRows < p.queries) {  // else what this warp multiplies is not stored
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          if (n * Plan::kParts / kSteps != part) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& x = score[8 * n + i];
            x = fast_exp2(fmaf(x, c, offset[i / 2 % 2]));
            sum[i / 2 % 2][i % 2] += x;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        if (n * Plan::kParts / kSteps != part) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[n][i] = pack_pair<T>(score[8 * n + 2 * i], score[8 * n + 2 * i + 1]);
        }
        fence_registers(weight[n]);
      }
      if (part == 0) {
        wait_for_values();
        fence_registers(out);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        if (n * Plan::kParts / kSteps != part) continue;
        multiply<ByValues, kDim>(weight[n], advance(by_values, n * kKeyStep * Tile::kPitch), out);
      }
      cute::warpgroup_commit_batch();
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      factor[half] = fast_reciprocal(quad_sum(sum[half][0] + sum[half][1]));
    cute::warpgroup_wait<0>();
    fence_registers(out);
    if (first + step < p.queries) {
      cute::cp_async_wait<0>();
      __syncwarp();
      read_queries();
    }
    // To where the queries lay, from where whole rows are written later.
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m[i] = pack_pair<T>(out[8 * j + 2 * i] * factor[i % 2], out[8 * j + 2 * i + 1] * factor[i % 2]);
      }
      cute::SM90_U32x4_STSM_N::copy(
          m[0], m[1], m[2], m[3],
          *reinterpret_cast<cute::uint128_t*>(queries + Layout::offset(lane % 16, 2 * j + lane / 16)));
    }
    __syncwarp();
  }
  pass_on(first);
  if (first >= p.queries) return;
  wait_for_values();
  uint32_t unit[4];
  read_unit(unit);
  const TailMemory memory{shared, shared + Plan::kValues, shared + Plan::kBias, shared + Plan::kQueries,
                          shared + Plan::kTail};
  attend_tail<T, kDim, kKeys>(q, unit, memory, warp, c, head_ptr + first * row_stride, row_stride,
                              p.queries - first);
}

template <class T, int kKeys>
__global__ __launch_bounds__(kThreads, ResidentPlan<kKeys>::kBlocks) void attention_hopper_resident_kernel(
    const HopperResidentParams plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  attend<T, kKeys>(plan);
#endif
}

template <class T, int kKeys>
void launch(const HopperResidentParams& plan, cudaStream_t stream) {
  if constexpr (kKeys > kMostKeys) {
    return;
  } else {
    if (plan.attention.keys > kKeys) return launch<T, kKeys + kTileRows>(plan, stream);
    launch_kernel(attention_hopper_resident_kernel<T, kKeys>,
                  plan.attention.batch * plan.attention.heads * plan.splits, kThreads,
                  ResidentPlan<kKeys>::kSharedBytes, ResidentPlan<kKeys>::kSharedBytes, stream, plan);
  }
}

}  // namespace

bool fits_resident(const AttentionParams& p) {
  const float unit = unit_of(p.scale);
  return p.is_aligned && p.head_dim == kDim && p.keys > kLeastKeys && p.keys <= kMostKeys &&
         unit >= kLeastUnit && unit <= kMostUnit;
}

void launch_resident(const AttentionParams& p, Dtype dtype, int multiprocessors, cudaStream_t stream) {
  const int64_t tiles = (p.queries + kGroupRows - 1) / kGroupRows;
  const int64_t splits =
      std::max<int64_t>(1, std::min<int64_t>(tiles, multiprocessors / (p.batch * p.heads)));
  const float unit = unit_of(p.scale);
  const HopperResidentParams plan{p, static_cast<int>(splits), unit, 1.0f / (p.scale * unit)};
  dispatch_half(
      dtype, [&](auto tag) { launch<typename decltype(tag)::type, kLeastKeys + kTileRows>(plan, stream); });
}

}  // namespace hopper
}  // namespace tome::attention_ops
