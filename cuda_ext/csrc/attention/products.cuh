// Rows in shared memory, and what tensor cores read of them.
//
// A row is kHeadDim channels in 16-byte chunks without padding. ldmatrix reads one chunk of eight rows at a
// time; chunks are exchanged within a row so that these eight fall into different banks.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../vector.cuh"
#include "plan.h"

namespace tome::attention_ops {

constexpr int kTileKeys = 8;  // keys of one product of queries and keys
constexpr int kChunkChannels = 8;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

template <int kHeadDim>
struct RowLayout {
  static constexpr int kChunks = kHeadDim / kChunkChannels;
  static constexpr int kBytes = kHeadDim * 2;
  // Of eight rows this many start at the same bank.
  static constexpr int kClash = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;

  __device__ static __forceinline__ int offset(int row, int chunk) {
    return row * kBytes + (chunk ^ (row / (8 / kClash) % kClash)) * kAccessBytes;
  }
  // From the offset of a row's chunk 0 or 1 to the chunk `even` further on: one register serves all.
  __device__ static __forceinline__ int further(int offset, int even) {
    return (offset ^ even % kClash * kAccessBytes) + even / kClash * kClash * kAccessBytes;
  }
};

// Keys lie in blocks of 32: their rows, the rows of their values, their bias.
template <int kHeadDim>
struct KeyBlock {
  using Layout = RowLayout<kHeadDim>;
  static constexpr int kValues = kBlockKeys * Layout::kBytes;
  static constexpr int kBias = 2 * kValues;
  static constexpr int kBytes = key_block_bytes(kHeadDim);
  static_assert(kBytes % (Layout::kClash * kAccessBytes) == 0, "chunks are exchanged within aligned groups");
};

template <class T>
struct Product;
template <>
struct Product<__half> {
  using Deep = cute::SM80_16x8x16_F32F16F16F32_TN;
  using Flat = cute::SM80_16x8x8_F32F16F16F32_TN;
  __device__ static __forceinline__ __half2 round(float x, float y) { return __floats2half2_rn(x, y); }
};
template <>
struct Product<__nv_bfloat16> {
  using Deep = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  using Flat = cute::SM80_16x8x8_F32BF16BF16F32_TN;
  __device__ static __forceinline__ __nv_bfloat162 round(float x, float y) {
    return __floats2bfloat162_rn(x, y);
  }
};

// Two numbers, rounded, in one register.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
  const auto pair = Product<T>::round(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product<T>::Deep::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

template <class T>
__device__ __forceinline__ void multiply_flat(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  Product<T>::Flat::fma(c[0], c[1], c[2], c[3], a[0], a[1], b, c[0], c[1], c[2], c[3]);
}

__device__ __forceinline__ const cute::uint128_t& as_chunk(const char* ptr) {
  return *reinterpret_cast<const cute::uint128_t*>(ptr);
}
__device__ __forceinline__ void load_matrices(const char* ptr, uint32_t (&m)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(as_chunk(ptr), m[0], m[1], m[2], m[3]);
}
__device__ __forceinline__ void load_matrices(const char* ptr, uint32_t (&m)[2]) {
  cute::SM75_U32x2_LDSM_N::copy(as_chunk(ptr), m[0], m[1]);
}
__device__ __forceinline__ void load_transposed(const char* ptr, uint32_t (&m)[4]) {
  cute::SM75_U16x8_LDSM_T::copy(as_chunk(ptr), m[0], m[1], m[2], m[3]);
}
__device__ __forceinline__ void load_transposed(const char* ptr, uint32_t (&m)[2]) {
  cute::SM75_U16x4_LDSM_T::copy(as_chunk(ptr), m[0], m[1]);
}

// The same number, but the compiler can't know: what follows from it is computed anew instead of being kept
// in a register, or spilled, through the loops over the keys.
__device__ __forceinline__ unsigned forget(unsigned x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// One warp copies kCount rows of a head to shared memory, of which the first `valid` exist; the others become
// zero.
template <class T, int kHeadDim, int kCount>
__device__ __forceinline__ void copy_rows(const T* rows_ptr, int64_t row_stride, int valid, bool is_aligned,
                                          char* shared_ptr) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kRows = kWarpSize / Layout::kChunks;  // at a time; some threads are left over
  const int lane = threadIdx.x % kWarpSize;
  const int chunk = lane % Layout::kChunks;
  const int first = lane / Layout::kChunks;
  if (first >= kRows) return;
  const T* from = rows_ptr + first * row_stride + chunk * kChunkChannels;
  const auto copy = [&](int row) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        as_chunk(reinterpret_cast<const char*>(from)),
        *reinterpret_cast<cute::uint128_t*>(shared_ptr + Layout::offset(row, chunk)));
  };
  if (is_aligned && valid >= kCount) {
#pragma unroll
    for (int i = 0; i < (kCount + kRows - 1) / kRows; ++i, from += kRows * row_stride) {
      if (kCount % kRows == 0 || first + i * kRows < kCount) copy(first + i * kRows);
    }
    return;
  }
#pragma unroll 1
  for (int row = first; row < kCount; row += kRows, from += kRows * row_stride) {
    if (row < valid && is_aligned) {
      copy(row);
      continue;
    }
    Pack<T, kChunkChannels> pack{};
#pragma unroll
    for (int c = 0; c < kChunkChannels; ++c) {
      if (row < valid) pack.value[c] = from[c];
    }
    store_pack(reinterpret_cast<T*>(shared_ptr + Layout::offset(row, chunk)), pack);
  }
}

// The size of a key; none, whose logarithm is -inf, behind the last one.
__device__ __forceinline__ float key_size(const AttentionParams& p, int b, int key) {
  if (key >= p.keys) return 0.0f;
  return p.size_ptr == nullptr ? 1.0f : __ldg(p.size_ptr + b * p.size_batch_stride + key * p.size_stride);
}

// What a size adds to a score before the scale, log(size) / scale, twice: accumulators start with the bias of
// an even key, the next one's, and both again.
template <int kHeadDim>
__device__ __forceinline__ void store_bias(const AttentionParams& p, char* shared_ptr, int key, float size) {
  using Block = KeyBlock<kHeadDim>;
  auto* to = reinterpret_cast<float*>(shared_ptr + key / kBlockKeys * Block::kBytes + Block::kBias +
                                      key % kBlockKeys / 2 * kAccessBytes);
  to[key % 2] = to[2 + key % 2] = __logf(size) * __frcp_rn(p.scale);
}

// Four threads write a row of the output: number i = 0, 1 of tile j is value(j, i). Neighbours exchange
// halves, so that 32 bytes of a row are written together.
template <class T, int kHeadDim, class F>
__device__ __forceinline__ void store_row(F&& value, float factor, T* row_ptr, bool is_some) {
  constexpr int kTiles = kHeadDim / 8;
  const int column = 2 * (threadIdx.x % 4);
  const bool is_odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int j = 0; j + 1 < kTiles; j += 2) {
    const uint32_t left = pack_pair<T>(value(j, 0) * factor, value(j, 1) * factor);
    const uint32_t right = pack_pair<T>(value(j + 1, 0) * factor, value(j + 1, 1) * factor);
    const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? left : right, 1);
    const int channel = is_odd ? 8 * (j + 1) + column - 2 : 8 * j + column;
    if (is_some) {
      *reinterpret_cast<uint2*>(row_ptr + channel) =
          is_odd ? make_uint2(other, right) : make_uint2(left, other);
    }
  }
  if constexpr (kTiles % 2 != 0) {
    const uint32_t last = pack_pair<T>(value(kTiles - 1, 0) * factor, value(kTiles - 1, 1) * factor);
    if (is_some) *reinterpret_cast<uint32_t*>(row_ptr + 8 * (kTiles - 1) + column) = last;
  }
}

// What training keeps of a row: its weights are 2^(score c - base) / sum.
template <class Params>
__device__ __forceinline__ void store_lse(const Params& p, int b, int h, int query, float base, float sum) {
  p.lse_ptr[(static_cast<int64_t>(b) * p.heads + h) * p.queries + query] = (base + __log2f(sum)) * kLn2;
}

// Where the rows of one head start.
template <class T>
__device__ __forceinline__ const T* rows_address(const Heads& heads, int b, int h, int row) {
  return static_cast<const T*>(heads.data_ptr) + b * heads.batch_stride + h * heads.head_stride +
         row * heads.row_stride;
}

}  // namespace tome::attention_ops
