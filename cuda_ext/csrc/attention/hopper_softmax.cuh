// The softmax of a warpgroup's tile of scores, in the registers in which the matrix products leave them: a
// thread holds, of each 8 columns, two neighbouring ones of row lane / 4 and of the row 8 below.
#pragma once

#include "softmax.cuh"

namespace tome::attention_ops::hopper {

// A thread's part of a row's sum that makes it look at the scores again. Single weights are below it and so
// fit into float16.
constexpr float kMostSum = 16384.0f;

// What is known of a thread's two rows so far: weights are 2^(score * scale - base).
struct Rows {
  float base[2];
  float sum[2];  // this thread's columns only

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      base[row] = -INFINITY;
      sum[row] = 0.0f;
    }
  }
};

// A tile's biases, as scores: products are added to them. Shared memory holds each pair of them twice, for a
// thread's two rows.
template <int kKeys, int kSize>
__device__ __forceinline__ void load_bias(float (&s)[kSize], uint32_t bias) {
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(s[4 * j]), "=f"(s[4 * j + 1]), "=f"(s[4 * j + 2]), "=f"(s[4 * j + 3])
                 : "r"(bias + j * 64)
                 : "memory");
  }
}

// Raises the bases to the tile's highest scores; returns by what sums must be multiplied.
template <int kKeys, int kSize>
__device__ __forceinline__ float2 raise_base(const float (&s)[kSize], float scale, Rows& rows) {
  float factor[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float highest[2] = {s[2 * row], s[2 * row + 1]};
#pragma unroll
    for (int j = 1; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) highest[i] = fmaxf(highest[i], s[4 * j + 2 * row + i]);
    }
    const float base = fmaxf(rows.base[row], quad_max(fmaxf(highest[0], highest[1])) * scale);
    // A row without a finite score keeps base -inf, and nothing to multiply.
    factor[row] = base == -INFINITY ? 1.0f : fast_exp2(rows.base[row] - base);
    rows.base[row] = base;
  }
  return make_float2(factor[0], factor[1]);
}

// Scores become weights; `sum` is this thread's part of the rows' sums. A base of -inf, from a tile of absent
// keys, makes sums overflow or NaN, unless the tile itself has just raised the base: then it has no weights.
template <int kKeys, int kSize>
__device__ __forceinline__ void soften(float (&s)[kSize], float scale, const Rows& rows, bool is_raised,
                                       float (&sum)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float base = is_raised && rows.base[row] == -INFINITY ? 0.0f : rows.base[row];
    float part[2];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * row + i];
        x = fast_exp2(fmaf(x, scale, -base));
        part[i] = j == 0 ? x : part[i] + x;
      }
    }
    sum[row] = part[0] + part[1];
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
