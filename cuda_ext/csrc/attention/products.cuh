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

// 2^x in one instruction; results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Copy rows [first, first + count) of one head to shared memory, by kThreads threads of which this is number
// `thread`; rows past `last` are zero. Rows lie in runs of kRun, kRunBytes apart.
template <class T, int kHeadDim, int kThreads, int kRun, int kRunBytes>
__device__ __forceinline__ void copy_rows(const T* head_ptr, int64_t row_stride, int first, int count, int last,
                                          bool is_aligned, int thread, char* shared_ptr) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kRows = kThreads / Layout::kChunks;  // at a time; some threads are left over
  const int chunk = thread % Layout::kChunks;
  int row = thread / Layout::kChunks;
  if (row >= kRows) return;
  const T* from = head_ptr + (first + row) * row_stride + chunk * kChunkChannels;
  for (; row < count; row += kRows, from += kRows * row_stride) {
    char* to = shared_ptr + row / kRun * kRunBytes + Layout::offset(row % kRun, chunk);
    if (first + row > last) {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    } else if (is_aligned) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(as_chunk(reinterpret_cast<const char*>(from)),
                                                             *reinterpret_cast<cute::uint128_t*>(to));
    } else {
      Pack<T, kChunkChannels> pack;
#pragma unroll
      for (int c = 0; c < kChunkChannels; ++c) pack.value[c] = from[c];
      store_pack(reinterpret_cast<T*>(to), pack);
    }
  }
}

template <class T, int kHeadDim, int kThreads>
__device__ __forceinline__ void copy_keys(const AttentionParams& p, int b, int h, int first, int count, int thread,
                                          char* shared_ptr) {
  using Block = KeyBlock<kHeadDim>;
  copy_rows<T, kHeadDim, kThreads, kBlockKeys, Block::kBytes>(head_address<T>(p.k, b, h), p.k.row_stride, first,
                                                              count, p.keys - 1, p.is_aligned, thread, shared_ptr);
  copy_rows<T, kHeadDim, kThreads, kBlockKeys, Block::kBytes>(head_address<T>(p.v, b, h), p.v.row_stride, first,
                                                              count, p.keys - 1, p.is_aligned, thread,
                                                              shared_ptr + Block::kValues);
}

template <class T, int kHeadDim>
__device__ __forceinline__ void copy_queries(const AttentionParams& p, int b, int h, int first, int count,
                                             char* shared_ptr) {
  copy_rows<T, kHeadDim, kWarpSize, kMaxRows, 0>(head_address<T>(p.q, b, h), p.q.row_stride, first, count,
                                                 p.queries - 1, p.is_aligned, threadIdx.x % kWarpSize, shared_ptr);
}

// What the sizes of keys `key` and `key` + 1 add to their scores before the scale: log(size) / scale, and -inf
// behind the last key.
__device__ __forceinline__ float2 key_bias(const AttentionParams& p, int b, int key) {
  const float inverse_scale = __frcp_rn(p.scale);
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bias[i] = key + i < p.keys ? 0.0f : -INFINITY;
    if (p.size_ptr != nullptr && key + i < p.keys) {
      const float size = __ldg(p.size_ptr + b * p.size_batch_stride + (key + i) * p.size_stride);
      bias[i] = logf(size) * inverse_scale;
    }
  }
  return make_float2(bias[0], bias[1]);
}

// The bias of an even key and the next one, in the order in which accumulators start.
template <int kHeadDim>
__device__ __forceinline__ void store_bias(char* shared_ptr, int key, float2 bias) {
  using Block = KeyBlock<kHeadDim>;
  char* to = shared_ptr + key / kBlockKeys * Block::kBytes + Block::kBias + key % kBlockKeys * 8;
  *reinterpret_cast<float4*>(to) = make_float4(bias.x, bias.y, bias.x, bias.y);
}

}  // namespace tome::attention_ops
