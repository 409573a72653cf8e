// The softmax of a warpgroup's tile of scores, in the registers in which the matrix products leave them: a
// thread holds, of each 8 columns, two neighbouring ones of row lane / 4 and of the row 8 below.
#pragma once

#include <cuda_runtime.h>

#include "../vector.cuh"

namespace tome::attention_ops::hopper {

// How far, as a power of two, a new maximum may exceed the one that weights are relative to before sums are
// rescaled. Weights then reach 2^8, which is nothing to float16 or to sums in float32.
constexpr float kSlack = 8.0f;

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two of a row's weights as a register of a matrix product.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  typename Pair<T>::type pair;
  if constexpr (std::is_same_v<T, __half>) {
    pair = __floats2half2_rn(low, high);
  } else {
    pair = __floats2bfloat162_rn(low, high);
  }
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float max_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// What is known of a thread's two rows so far: weights are 2^(score - base).
struct Rows {
  float base[2];
  float sum[2];     // this thread's columns only
  float factor[2];  // by which sums of values must be rescaled, if `rescale`
  bool rescale;

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      base[row] = -INFINITY;
      sum[row] = 0.0f;
    }
  }
};

// Scores (products) become weights; `bias` holds the tile's, as powers of two like the scaled scores.
template <int kKeys, int kSize>
__device__ __forceinline__ void soften(float (&s)[kSize], const float* bias, float scale, Rows& rows) {
  float highest[2][2];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& x = s[4 * j + 2 * row];
      float& y = s[4 * j + 2 * row + 1];
      x = fmaf(x, scale, b.x);
      y = fmaf(y, scale, b.y);
      highest[row][0] = j == 0 ? x : fmaxf(highest[row][0], x);
      highest[row][1] = j == 0 ? y : fmaxf(highest[row][1], y);
    }
  }
  float tile[2];
  bool exceeds = false;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    tile[row] = max_of_four(fmaxf(highest[row][0], highest[row][1]));
    exceeds |= tile[row] > rows.base[row] + kSlack;
  }
  rows.rescale = __any_sync(kFullWarp, exceeds);
  if (rows.rescale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float base = fmaxf(rows.base[row], tile[row]);
      // A row without a finite score keeps base -inf, and nothing to rescale.
      rows.factor[row] = base == -INFINITY ? 1.0f : exp2_approximate(rows.base[row] - base);
      rows.sum[row] *= rows.factor[row];
      rows.base[row] = base;
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float base = rows.base[row] == -INFINITY ? 0.0f : rows.base[row];
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * row + i];
        x = exp2_approximate(x - base);
        sum[i] += x;
      }
    }
    rows.sum[row] += sum[0] + sum[1];
  }
}

// Weights in the layout in which the next product reads them: 16 keys a step.
template <class T, int kKeys, int kSize, int kSteps>
__device__ __forceinline__ void pack_weights(const float (&s)[kSize], uint32_t (&weights)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[step][i] = pack_pair<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
  }
}

// The four threads of a row hold, of four blocks of 8 columns, two columns each; afterwards thread i holds
// block i. A 4 x 4 transposition: pairs of threads first, then pairs of pairs.
__device__ __forceinline__ void gather_block(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1;
  const bool high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kFullWarp, odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kFullWarp, high ? word[i] : word[i + 2], 2);
    (high ? word[i] : word[i + 2]) = got;
  }
}

}  // namespace tome::attention_ops::hopper
