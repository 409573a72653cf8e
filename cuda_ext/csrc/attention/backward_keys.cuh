// What a warp of the backward kernel does with its 16 or 32 keys: their weights for 16 queries at a time, and
// what these add to the gradients of keys and values, which stay in registers.
#pragma once

#include "backward_products.cuh"

namespace tome::attention_ops {

// Rows of queries, of the output's gradient and of the output that travel together.
constexpr int kStageRows = 32;
constexpr int kStages = 3;
constexpr int kCopyRows = 8;                          // that one warp copies at a time
constexpr int kTileBytes = kTileRows * kKeyStep * 2;  // of 16 x 16 numbers in half precision

// Shared memory of a block: which head it has, keys and values of its warps, dS of all its queries and keys
// where it computes the gradient of the queries too, stages. Where values are kept in registers dS takes
// their place.
template <int kHeadDim, bool kIsWhole>
struct KeysPlan {
  using Layout = RowLayout<kHeadDim>;
  static constexpr bool kKeepsKeys = kHeadDim == 32 || kHeadDim == 96;
  static constexpr bool kKeepsValues = kKeepsKeys;
  // Tiles of 16 queries that a warp takes at once, so that keys and values are read once for both.
  static constexpr int kParts = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kWarpKeys = KeysShape<kHeadDim>::kKeyTiles * kTileRows;
  static constexpr int kKeys =
      128;  // behind the place of the head; chunks are exchanged within so many bytes
  static constexpr int kRows = kStageRows * Layout::kBytes;
  static constexpr int kNumbers = 2 * kRows;  // log-sum-exps, then deltas
  static constexpr int kStageBytes = kNumbers + 2 * kStageRows * 4;

  __host__ __device__ static constexpr int slopes(int warps) {
    return kKeys + (kKeepsValues ? 1 : 2) * warps * kWarpKeys * Layout::kBytes;
  }
  __host__ __device__ static constexpr int stages(int warps, int queries) {
    const int tiles = (queries + kTileRows - 1) / kTileRows;
    const int values = warps * kWarpKeys * Layout::kBytes;
    const int slope_bytes = kIsWhole ? warps * KeysShape<kHeadDim>::kKeyTiles * tiles * kTileBytes : 0;
    const int at = slopes(warps);
    return at + (kKeepsValues && slope_bytes < values ? values : slope_bytes);
  }
  __host__ __device__ static constexpr int bytes(int warps, int queries) {
    return stages(warps, queries) + kStages * kStageBytes + (kIsWhole ? 2 * kRows : 0);
  }
};

template <class T, int kHeadDim>
struct KeyRows {
  static constexpr int kTiles = KeysShape<kHeadDim>::kKeyTiles;
  static constexpr int kTileStep = kTileRows * RowLayout<kHeadDim>::kBytes;
  static constexpr bool kKeepsKeys = KeysPlan<kHeadDim, true>::kKeepsKeys;
  static constexpr bool kKeepsValues = KeysPlan<kHeadDim, true>::kKeepsValues;

  Operand<kHeadDim> keys[kTiles], values[kTiles];
  float grad_k[kTiles][kHeadDim / 8][4], grad_v[kTiles][kHeadDim / 8][4];
  float bias[kTiles][2];  // of the rows lane / 4 and 8 below, in powers of two

  __device__ __forceinline__ void start(const char* keys_ptr, const char* values_ptr) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if constexpr (kKeepsKeys) keys[m].load(keys_ptr + m * kTileStep);
      if constexpr (kKeepsValues) values[m].load(values_ptr + m * kTileStep);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_k[m][j][i] = grad_v[m][j][i] = 0.0f;
      }
    }
  }

  // kParts times 16 queries; dS goes to `slope_ptr`, tiles of keys `slope_step` apart, such that ldmatrix
  // finds the operand of the product with the keys there.
  template <bool kIsWhole, int kParts>
  __device__ __forceinline__ void step(const char* keys_ptr, const char* values_ptr, const char* queries_ptr,
                                       const char* grads_ptr, const float* numbers_ptr, float c,
                                       char* slope_ptr, int slope_step) {
    const int lane = threadIdx.x % kWarpSize;
    float weight[kParts][kTiles][2][4] = {};
    multiply_rows<T, kHeadDim, kKeepsKeys>(weight, keys, keys_ptr, queries_ptr);
    float slope[kParts][kTiles][2][4] = {};
    multiply_rows<T, kHeadDim, kKeepsValues>(slope, values, values_ptr, grads_ptr);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t operand[kTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 lse =
            *reinterpret_cast<const float2*>(numbers_ptr + part * kTileRows + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = weight[part][m][n][i];
            x = fast_exp2(fmaf(x, c, fmaf(i % 2 == 0 ? lse.x : lse.y, -kLog2E, bias[m][i / 2])));
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) pack_operand<T>(weight[part][m], operand[m]);
      multiply_onto<T, kHeadDim>(grad_v, operand, grads_ptr + part * kTileStep);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(numbers_ptr + kStageRows + part * kTileRows +
                                                              n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = slope[part][m][n][i];
            x = weight[part][m][n][i] * (x - (i % 2 == 0 ? delta.x : delta.y));
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        pack_operand<T>(slope[part][m], operand[m]);
        if constexpr (kIsWhole) {
          auto* to = reinterpret_cast<uint32_t*>(slope_ptr + m * slope_step + part * kTileBytes) + lane;
          to[0] = operand[m][0];
          to[kWarpSize] = operand[m][2];
          to[2 * kWarpSize] = operand[m][1];
          to[3 * kWarpSize] = operand[m][3];
        }
      }
      multiply_onto<T, kHeadDim>(grad_k, operand, queries_ptr + part * kTileStep);
    }
  }
};

// 16 rows of a gradient, of which `rows` exist, from accumulators.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_gradient(const float (&value)[kHeadDim / 8][4], float factor,
                                               const Gradient& gradient, int b, int h, int first, int rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + threadIdx.x % kWarpSize / 4;
    store_row<T, kHeadDim>([&](int j, int i) { return value[j][2 * half + i]; }, factor,
                           gradient_row<T>(gradient, b, h, kHeadDim, first + row), row < rows);
  }
}

}  // namespace tome::attention_ops
