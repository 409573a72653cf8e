// What one warp does with its 16 kRowTiles queries: scores of up to 32 keys, weights, weighted values.
//
// Accumulators of scores start from log(size) / scale, so the bias costs no arithmetic. Weights are
// 2^((score - reference) c) with c = scale log2(e); the reference of a row is one of its scores so far, not
// always the highest: it moves only when a score exceeds it by 2^8, so that most steps neither shuffle nor
// rescale. Weights up to 2^8 are as exact in half precision as those up to one.
#pragma once

#include "products.cuh"

namespace tome::attention_ops {

constexpr float kSlack = 8.0f;

// What the exponent of a weight adds to score * c. Where no key counts there is no inf - inf: weights are
// zero.
__device__ __forceinline__ float exponent_offset(float reference, float c) {
  return reference == -INFINITY ? 0.0f : -reference * c;
}

template <class T, int kHeadDim, int kRowTiles>
struct WarpState {
  using Layout = RowLayout<kHeadDim>;
  using Block = KeyBlock<kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kHasFlat = kHeadDim % 16 != 0;  // a last step of 8 channels
  static constexpr int kOutTiles = kHeadDim / 8;

  uint32_t q[kRowTiles][kSteps][4];
  uint32_t q_flat[kRowTiles][2];
  float out[kRowTiles][kOutTiles][4];
  float reference[kRowTiles][2], sum[kRowTiles][2];

  template <int kActive>
  __device__ __forceinline__ void start(const char* q_ptr) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
      const int row = m * kTileRows + lane % 16;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_matrices(q_ptr + Layout::offset(row, 2 * k + lane / 16), q[m][k]);
      if constexpr (kHasFlat) load_matrices(q_ptr + Layout::offset(row, Layout::kChunks - 1), q_flat[m]);
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][j][i] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = -INFINITY;
        sum[m][half] = 0.0f;
      }
    }
  }

  // The first 8 kKeyTiles keys of the block at this offset; c = scale log2(e).
  template <int kActive, int kKeyTiles>
  __device__ __forceinline__ void step(const char* shared, int offset, float c) {
    const int lane = threadIdx.x % kWarpSize;
    float score[kActive][kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const auto& bias = *reinterpret_cast<const float4*>(shared + offset + Block::kBias + n * kTileKeys * 8 +
                                                          lane % 4 * kAccessBytes);
#pragma unroll
      for (int m = 0; m < kActive; ++m) {
        score[m][n][0] = bias.x;
        score[m][n][1] = bias.y;
        score[m][n][2] = bias.z;
        score[m][n][3] = bias.w;
      }
    }
    const int keys = offset + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        load_matrices(shared + Layout::further(keys, 2 * k) + n * kTileKeys * Layout::kBytes, b);
#pragma unroll
        for (int m = 0; m < kActive; ++m) {
          multiply<T>(score[m][n], q[m][k], b[0], b[1]);
          multiply<T>(score[m][n + 1], q[m][k], b[2], b[3]);
        }
      }
    }
    if constexpr (kHasFlat) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[2];
        load_matrices(shared + offset + Layout::offset(n * kTileKeys + lane % 16, Layout::kChunks - 1), b);
#pragma unroll
        for (int m = 0; m < kActive; ++m) {
          multiply_flat<T>(score[m][n], q_flat[m], b[0]);
          multiply_flat<T>(score[m][n + 1], q_flat[m], b[1]);
        }
      }
    }
    move_reference<kActive, kKeyTiles>(score, c);
    const int values = offset + Block::kValues + Layout::offset(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t weight[kActive][4];
#pragma unroll
      for (int m = 0; m < kActive; ++m) weigh(m, score[m][n], score[m][n + 1], c, weight[m]);
#pragma unroll
      for (int j = 0; j + 1 < kOutTiles; j += 2) {
        uint32_t b[4];
        load_transposed(shared + Layout::further(values, j) + n * kTileKeys * Layout::kBytes, b);
#pragma unroll
        for (int m = 0; m < kActive; ++m) {
          multiply<T>(out[m][j], weight[m], b[0], b[1]);
          multiply<T>(out[m][j + 1], weight[m], b[2], b[3]);
        }
      }
      if constexpr (kHasFlat) {
        uint32_t b[2];
        load_transposed(
            shared + offset + Block::kValues + Layout::offset(n * kTileKeys + lane % 16, kOutTiles - 1), b);
#pragma unroll
        for (int m = 0; m < kActive; ++m) multiply<T>(out[m][kOutTiles - 1], weight[m], b[0], b[1]);
      }
    }
  }

  // `keys` keys in blocks that follow each other.
  template <int kActive>
  __device__ __forceinline__ void walk(const char* shared, int offset, int keys, float c) {
#pragma unroll 1
    for (; keys > kKeyStep; keys -= kBlockKeys, offset += Block::kBytes) {
      step<kActive, kBlockKeys / kTileKeys>(shared, offset, c);
    }
    if (keys > 0) step<kActive, kKeyStep / kTileKeys>(shared, offset, c);
  }

  // Write the queries from `first` on. Where all keys have weight zero 0 / 0 is NaN, as softmax has it.
  template <int kActive>
  __device__ __forceinline__ void finish(const AttentionParams& p, int b, int h, int first) {
    const int lane = threadIdx.x % kWarpSize;
    const int rows = p.queries - first;
    const int64_t row_stride = static_cast<int64_t>(p.heads) * kHeadDim;
    T* out_ptr = static_cast<T*>(p.out_ptr) + (static_cast<int64_t>(b) * p.queries + first) * row_stride +
                 h * kHeadDim;
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[m][half]);
        const float factor = __frcp_rn(total);
        const int row = m * kTileRows + half * 8 + lane / 4;
        if (p.lse_ptr != nullptr && row < rows && lane % 4 == 0) {
          store_lse(p, b, h, first + row, reference[m][half] * (p.scale * kLog2E), total);
        }
        store_row<T, kHeadDim>([&](int j, int i) { return out[m][j][2 * half + i]; }, factor,
                               out_ptr + row * row_stride, row < rows);
      }
    }
  }

 private:
  template <int kActive, int kKeyTiles>
  __device__ __forceinline__ void move_reference(const float (&score)[kActive][kKeyTiles][4], float c) {
    const float slack = kSlack / c;
    float top[kActive][2];
    bool is_above = false;
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = score[m][0][2 * half];  // fmaxf skips NaN: it shows in the weights, not here
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          highest = fmaxf(highest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        }
        top[m][half] = highest;
        is_above |= highest > reference[m][half] + slack;
      }
    }
    if (!__any_sync(kFullWarp, is_above)) return;
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float highest = quad_max(fmaxf(top[m][half], reference[m][half]));
        // While every key so far has weight zero there is nothing to rescale, and inf - inf to avoid.
        const float factor = highest == -INFINITY ? 1.0f : fast_exp2((reference[m][half] - highest) * c);
        reference[m][half] = highest;
        sum[m][half] *= factor;
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) {
          out[m][j][2 * half] *= factor;
          out[m][j][2 * half + 1] *= factor;
        }
      }
    }
  }

  // The weights of 16 rows and 16 keys, as the left operand of the next product.
  __device__ __forceinline__ void weigh(int m, const float (&left)[4], const float (&right)[4], float c,
                                        uint32_t (&weight)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = exponent_offset(reference[m][half], c);
      const float w0 = fast_exp2(fmaf(left[2 * half], c, offset));
      const float w1 = fast_exp2(fmaf(left[2 * half + 1], c, offset));
      const float w2 = fast_exp2(fmaf(right[2 * half], c, offset));
      const float w3 = fast_exp2(fmaf(right[2 * half + 1], c, offset));
      sum[m][half] += (w0 + w1) + (w2 + w3);
      weight[half] = pack_pair<T>(w0, w1);
      weight[2 + half] = pack_pair<T>(w2, w3);
    }
  }
};

}  // namespace tome::attention_ops
