// Scores of a tile of sources x targets on tensor cores, by one warp.
//
// The products of the high halves come first. The other two of a score's three products are at most
// kCorrection together (|low| <= 2^-11 |x|, by Cauchy-Schwarz, plus rounding), so a tile in which no score
// comes that close to the best known one of its row cannot change the result and is left unfinished. Whether
// a tile is skipped may depend on timing; what comes out never does.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../vector.cuh"
#include "metric.cuh"

namespace tome::match {

using Product = cute::SM80_16x8x16_F32F16F16F32_TN;

constexpr int kProductRows = 16;
constexpr int kProductColumns = 8;
constexpr int kMaxCorrected = 4;  // tiles of targets corrected at once, as many as registers allow
constexpr float kCorrection = 1.2e-3f * kMetricScale * kMetricScale;  // 2^-10 and the rounding of 48 products

__device__ __forceinline__ void load_matrices(const char* shared_ptr, uint32_t (&m)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(shared_ptr), m[0], m[1], m[2],
                                m[3]);
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// What a thread knows of the best target of each of its 2 * kTilesM rows.
template <int kTilesM>
struct Best {
  float score[kTilesM][2];
  int index[kTilesM][2];
  float known[kTilesM][2];  // a lower bound of the row's best over all threads, for skipping only

  __device__ __forceinline__ Best() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        score[m][half] = known[m][half] = -INFINITY;
        index[m][half] = 0;
      }
    }
  }
};

// A number's place among all, in an order that unsigned integers keep, and back.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 counts as 0
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

__device__ __forceinline__ float score_of(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) ? (order & 0x7fffffffu) : ~order);
}

// A packed best: the order of its score, then the lowest index.
__device__ __forceinline__ unsigned long long pack_best(float score, int index) {
  return (static_cast<unsigned long long>(order_of(score)) << 32) |
         (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ uint32_t best_order(unsigned long long best) {
  return static_cast<uint32_t>(best >> 32);
}

__device__ __forceinline__ int best_index(unsigned long long best) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
}

// Where a thread points ldmatrix: at row lane % 16, upper 8 channels for lanes 16..31 (sources), or row lane
// % 8 + 8 * (lane / 16), upper channels for odd lane / 8 (targets). Rows past the end repeat the last one.
__device__ __forceinline__ const char* source_address(const char* rows_ptr, int row, int last, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  return rows_ptr + min(row + lane % 16, last) * stride + lane / 16 * 16;
}

__device__ __forceinline__ const char* target_address(const char* rows_ptr, int row, int last, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  return rows_ptr + min(row + lane % 8 + lane / 16 * 8, last) * stride + lane / 8 % 2 * 16;
}

// Score 16 kTilesM sources with 8 kTilesN targets and update their best. `column` is the index of the first
// target of the tile, `columns` how many targets there are.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void score_tile(const char* const (&source_ptr)[kTilesM],
                                           const char* const (&target_ptr)[kTilesN / 2], int padded,
                                           int column, int columns, Best<kTilesM>& best) {
  constexpr int kCorrectedTiles = kTilesN < kMaxCorrected ? kTilesN : kMaxCorrected;
  static_assert(kTilesN % kCorrectedTiles == 0 && kCorrectedTiles % 2 == 0, "one ldmatrix reads two tiles");
  const int low = 2 * padded;  // bytes from the high to the low halves of a row
  float score[kTilesM][kTilesN][4];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
    }
  }
#pragma unroll 2
  for (int k = 0; k < 2 * padded; k += 2 * kProductDepth) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) load_matrices(source_ptr[m] + k, a[m]);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b[4];
      load_matrices(target_ptr[n / 2] + k, b);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply(score[m][n], a[m], b[0], b[1]);
        multiply(score[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  bool is_close = false;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) is_close |= score[m][n][i] >= best.known[m][i / 2] - kCorrection;
    }
  }
  if (!__any_sync(kFullWarp, is_close)) return;

  // The corrections have sums of their own, added once: they are small, and tensor cores cut off what lies
  // below the last bit of a running sum.
#pragma unroll
  for (int first = 0; first < kTilesN; first += kCorrectedTiles) {
    float correction[kTilesM][kCorrectedTiles][4] = {};
#pragma unroll 1
    for (int k = 0; k < 2 * padded; k += 2 * kProductDepth) {
      uint32_t a[kTilesM][4], a_low[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        load_matrices(source_ptr[m] + k, a[m]);
        load_matrices(source_ptr[m] + k + low, a_low[m]);
      }
#pragma unroll
      for (int n = 0; n < kCorrectedTiles; n += 2) {
        uint32_t b[4], b_low[4];
        load_matrices(target_ptr[(first + n) / 2] + k, b);
        load_matrices(target_ptr[(first + n) / 2] + k + low, b_low);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply(correction[m][n], a[m], b_low[0], b_low[1]);
          multiply(correction[m][n + 1], a[m], b_low[2], b_low[3]);
          multiply(correction[m][n], a_low[m], b[0], b[1]);
          multiply(correction[m][n + 1], a_low[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kCorrectedTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][first + n][i] += correction[m][n][i];
      }
    }
  }

  // Columns ascend within a thread, so a strict comparison keeps the lowest index; NaN never wins.
  const int first = column + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int index = first + kProductColumns * n + i % 2;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        if (index < columns && score[m][n][i] > best.score[m][i / 2]) {
          best.score[m][i / 2] = score[m][n][i];
          best.index[m][i / 2] = index;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float known = fmaxf(best.known[m][half], best.score[m][half]);
      known = fmaxf(known, __shfl_xor_sync(kFullWarp, known, 1));
      best.known[m][half] = fmaxf(known, __shfl_xor_sync(kFullWarp, known, 2));
    }
  }
}

// The best of each row over the four threads that share it, packed; valid in every thread.
template <int kTilesM>
__device__ __forceinline__ unsigned long long reduce_best(const Best<kTilesM>& best, int m, int half) {
  unsigned long long packed = pack_best(best.score[m][half], best.index[m][half]);
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const unsigned long long other = __shfl_xor_sync(kFullWarp, packed, step);
    packed = other > packed ? other : packed;
  }
  return packed;
}

}  // namespace tome::match
