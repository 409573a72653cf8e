// Products that the backward kernels share: of 16 rows in registers with 16 rows in shared memory.
#pragma once

#include "backward.h"
#include "products.cuh"

namespace tome::attention_ops {

// 16 rows as the left operand of a product over channels.
template <int kHeadDim>
struct Operand {
  using Layout = RowLayout<kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kHasFlat = kHeadDim % 16 != 0;

  uint32_t deep[kSteps][4];
  uint32_t flat[2];

  __device__ __forceinline__ void load_step(const char* rows_ptr, int k) {
    const int lane = threadIdx.x % kWarpSize;
    load_matrices(rows_ptr + Layout::further(Layout::offset(lane % 16, lane / 16), 2 * k), deep[k]);
  }
  __device__ __forceinline__ void load_flat(const char* rows_ptr) {
    if constexpr (kHasFlat) {
      load_matrices(rows_ptr + Layout::offset(threadIdx.x % 16, Layout::kChunks - 1), flat);
    }
  }
  __device__ __forceinline__ void load(const char* rows_ptr) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_step(rows_ptr, k);
    load_flat(rows_ptr);
  }
};

// c += a b^T: kTiles times 16 rows `a` with kParts times 16 rows `b` in shared memory, over channels. Where a
// isn't kept in registers it comes from shared memory too.
template <class T, int kHeadDim, bool kIsKept, int kTiles, int kParts>
__device__ __forceinline__ void multiply_rows(float (&c)[kParts][kTiles][2][4],
                                              Operand<kHeadDim> (&a)[kTiles], const char* a_ptr,
                                              const char* b_ptr) {
  using Layout = RowLayout<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const int from = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < Operand<kHeadDim>::kSteps; ++k) {
    if constexpr (!kIsKept) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) a[m].load_step(a_ptr + m * kTileRows * Layout::kBytes, k);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t b[4];
      load_matrices(b_ptr + Layout::further(from, 2 * k) + part * kTileRows * Layout::kBytes, b);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply<T>(c[part][m][0], a[m].deep[k], b[0], b[1]);
        multiply<T>(c[part][m][1], a[m].deep[k], b[2], b[3]);
      }
    }
  }
  if constexpr (Operand<kHeadDim>::kHasFlat) {
    if constexpr (!kIsKept) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) a[m].load_flat(a_ptr + m * kTileRows * Layout::kBytes);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t b[2];
      load_matrices(b_ptr + Layout::offset(part * kTileRows + lane % 16, Layout::kChunks - 1), b);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply_flat<T>(c[part][m][0], a[m].flat, b[0]);
        multiply_flat<T>(c[part][m][1], a[m].flat, b[1]);
      }
    }
  }
}

// c += a b: a is kTiles times 16 x 16 in registers, b 16 rows in shared memory.
template <class T, int kHeadDim, int kTiles>
__device__ __forceinline__ void multiply_onto(float (&c)[kTiles][kHeadDim / 8][4],
                                              const uint32_t (&a)[kTiles][4], const char* b_ptr) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kColumns = kHeadDim / 8;
  const int lane = threadIdx.x % kWarpSize;
  const int from = Layout::offset(lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j + 1 < kColumns; j += 2) {
    uint32_t b[4];
    load_transposed(b_ptr + Layout::further(from, j), b);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      multiply<T>(c[m][j], a[m], b[0], b[1]);
      multiply<T>(c[m][j + 1], a[m], b[2], b[3]);
    }
  }
  if constexpr (kColumns % 2 != 0) {
    uint32_t b[2];
    load_transposed(b_ptr + Layout::offset(lane % 16, kColumns - 1), b);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) multiply<T>(c[m][kColumns - 1], a[m], b[0], b[1]);
  }
}

// Two products of 16 rows and 8 columns side by side, rounded, as the left operand of the next product.
template <class T>
__device__ __forceinline__ void pack_operand(const float (&c)[2][4], uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack_pair<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// The sum of products of two rows' chunks; four threads share a row.
template <class T, int kHeadDim, class F, class G>
__device__ __forceinline__ float dot_rows(F&& left, G&& right) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < (kHeadDim / kChunkChannels + 3) / 4; ++i) {
    const int chunk = i * 4 + threadIdx.x % 4;
    if (chunk >= kHeadDim / kChunkChannels) break;
    float x[kChunkChannels], y[kChunkChannels];
    unpack(left(chunk), x);
    unpack(right(chunk), y);
#pragma unroll
    for (int c = 0; c < kChunkChannels; ++c) sum = fmaf(x[c], y[c], sum);
  }
  return quad_sum(sum);
}

template <class T, int kHeadDim>
__device__ __forceinline__ Pack<T, kChunkChannels> shared_chunk(const char* rows_ptr, int row, int chunk) {
  return *reinterpret_cast<const Pack<T, kChunkChannels>*>(rows_ptr +
                                                           RowLayout<kHeadDim>::offset(row, chunk));
}

template <class T>
__device__ __forceinline__ T* gradient_row(const Gradient& gradient, int b, int h, int head_dim, int row) {
  return static_cast<T*>(gradient.data_ptr) + b * gradient.batch_stride + row * gradient.row_stride +
         h * head_dim;
}

}  // namespace tome::attention_ops
