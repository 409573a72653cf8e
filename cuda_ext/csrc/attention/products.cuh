// Rows in shared memory, and what tensor cores read of them.
//
// A row is kHeadDim channels in 16-byte chunks without padding. ldmatrix reads one chunk of eight rows at a
// time; chunks are exchanged within a row so that these eight fall into different banks.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../vector.cuh"
#include "attention.h"

namespace tome::attention_ops {

constexpr int kTileRows = 16;  // queries of one product
constexpr int kTileKeys = 8;   // keys of one product of queries and keys
constexpr int kKeyStep = 16;   // keys of one product of weights and values
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

// Copy rows first, first + 1, ... of one head to shared memory, by kThreads threads of which this is number
// `thread`. Rows past `last` repeat it, or where kZeros are zero.
template <class T, int kHeadDim, int kThreads, bool kZeros>
__device__ __forceinline__ void copy_rows(const T* head_ptr, int64_t row_stride, int first, int count, int last,
                                          bool is_aligned, int thread, char* shared_ptr) {
  using Layout = RowLayout<kHeadDim>;
  for (int i = thread; i < count * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks;
    const int chunk = i % Layout::kChunks;
    const T* from = head_ptr + min(first + row, last) * row_stride + chunk * kChunkChannels;
    char* to = shared_ptr + Layout::offset(row, chunk);
    if (kZeros && first + row > last) {
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

// What size adds to the scores of two neighbouring keys, in the order in which accumulators start:
// log(size) / scale, and -inf behind the last key.
__device__ __forceinline__ float key_bias(const AttentionParams& p, const float* size_ptr, int key,
                                          float inverse_scale) {
  if (key >= p.keys) return -INFINITY;
  return size_ptr == nullptr ? 0.0f : logf(__ldg(size_ptr + key * p.size_stride)) * inverse_scale;
}

__device__ __forceinline__ void store_bias(float4* bias_ptr, int pair, float even, float odd) {
  bias_ptr[pair] = make_float4(even, odd, even, odd);
}

}  // namespace tome::attention_ops
