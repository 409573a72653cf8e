// Reading keys where they lie and turning each token into a unit vector, split in two halves.
//
// A unit vector x in float32 is written as high + low, both float16, after scaling by 2^10:
//   high = fp16(x), low = fp16(x - high); |x - high - low| <= 2^-22 |x|.
// A score high*high' + high*low' + low*high' summed in float32 is then off by at most 3 * 2^-22 from the
// score of the float32 vectors, less than the worst case of a float32 dot product with 64 terms. The scale
// keeps the low halves of small entries out of float16's subnormal numbers.
#pragma once

#include "../vector.cuh"
#include "match.h"

namespace tome::match {

constexpr float kMetricScale = 1024.0f;

// The position of row l in the sequence of image b.
__device__ __forceinline__ int row_position(const Params& p, int b, int l) {
  const bool is_source = l < p.sources;
  const int i = is_source ? l : l - p.sources;
  switch (p.pairing) {
    case Pairing::kBipartite: {
      const int odd = p.prefix & 1;
      return p.prefix + 2 * i + (is_source ? odd : 1 - odd);
    }
    case Pairing::kRuns:
      if (!is_source) return p.prefix + p.run - 1 + p.run * i;
      return p.prefix + i + min(i / (p.run - 1), p.targets);
    default:
      break;
  }
  const int64_t position = is_source ? __ldg(p.sources_ptr + static_cast<int64_t>(b) * p.sources + i)
                                     : __ldg(p.targets_ptr + static_cast<int64_t>(b) * p.targets + i);
  // A bad list must not become a bad address.
  return static_cast<int>(min(max(position, int64_t{0}), static_cast<int64_t>(p.tokens - 1)));
}

constexpr int kHeadsInFlight = 8;
constexpr int kHeadsLeft = 4;
constexpr int kMostHeads = 10;  // in flight, where registers allow

// Add 8 channels of `count` heads, at most kHeads, or of just so many if kAll. kOnce: let the L2 cache keep
// other things than keys.
template <class T, int kHeads, bool kAll, bool kOnce>
__device__ __forceinline__ void add_heads(const T* row_ptr, int64_t head_stride, int count, bool is_whole,
                                          float (&sum)[kLaneChannels]) {
  constexpr int kPacks = kLaneChannels / kPackSize<T>;
  // All loads are issued before the first is used: this phase is bound by memory latency.
  Pack<T, kPackSize<T>> pack[kHeads][kPacks];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      // The second pack of float32 channels may lie behind the last channel.
      if ((kAll || h < count) && (i == 0 || is_whole)) {
        const T* from = row_ptr + i * kPackSize<T>;
        if constexpr (kOnce) {
          *reinterpret_cast<uint4*>(&pack[h][i]) = __ldcs(reinterpret_cast<const uint4*>(from));
        } else {
          pack[h][i] = load_pack<T, kPackSize<T>>(from);
        }
      } else {
        *reinterpret_cast<uint4*>(&pack[h][i]) = make_uint4(0, 0, 0, 0);
      }
    }
    row_ptr += head_stride;
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float x[kPackSize<T>];
      unpack(pack[h][i], x);
#pragma unroll
      for (int c = 0; c < kPackSize<T>; ++c) sum[i * kPackSize<T> + c] += x[c];
    }
  }
}

// Sum over heads of channels [channel, channel + 8) of one token; channels past the end count as zero.
template <class T, bool kAligned, bool kOnce, int kMost = kOnce ? kMostHeads : kHeadsInFlight>
__device__ __forceinline__ void sum_heads(const Params& p, int b, int position, int channel,
                                          float (&sum)[kLaneChannels]) {
  const T* row_ptr = static_cast<const T*>(p.keys_ptr) + b * p.batch_stride + position * p.token_stride;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) sum[c] = 0.0f;
  if constexpr (kAligned) {
    if (channel >= p.channels) return;
    row_ptr += channel;
    const bool is_whole = channel + kPackSize<T> < p.channels;
    int heads = p.heads;
    if constexpr (kMost > kHeadsInFlight && sizeof(T) == 2) {
      if (heads > kHeadsInFlight && heads <= kMost) {
        add_heads<T, kMost, false, kOnce>(row_ptr, p.head_stride, heads, is_whole, sum);
        return;
      }
    }
    for (; heads >= kHeadsInFlight; heads -= kHeadsInFlight, row_ptr += kHeadsInFlight * p.head_stride) {
      add_heads<T, kHeadsInFlight, true, kOnce>(row_ptr, p.head_stride, kHeadsInFlight, is_whole, sum);
    }
    for (; heads > 0; heads -= kHeadsLeft, row_ptr += kHeadsLeft * p.head_stride) {
      add_heads<T, kHeadsLeft, false, kOnce>(row_ptr, p.head_stride, heads, is_whole, sum);
    }
  } else {
    for (int head = 0; head < p.heads; ++head) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (channel + c < p.channels) {
          sum[c] += to_float(__ldg(row_ptr + head * p.head_stride + (channel + c) * p.channel_stride));
        }
      }
    }
  }
}

// x / y rounded to nearest, with y's reciprocal at hand: the quotient and one correction (Markstein). As
// exact as a division, so equal rows stay equal to what the definition gives, at a third of its cost.
__device__ __forceinline__ float divide(float x, float y, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, y, x), reciprocal, quotient);
}

// Divide a row by its largest entry, then by its norm; `lanes` neighbouring threads share the row. A row of
// zeros stays zero; one that holds NaN or infinity becomes NaN throughout.
__device__ __forceinline__ void normalise(float (&x)[kLaneChannels], int lanes) {
  float largest = 0.0f;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) largest = fmaxf(largest, fabsf(x[c]));
  for (int step = lanes / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  }
  // An exact change of scale, so that the reciprocal of the largest entry neither overflows nor vanishes.
  const float scale = largest < 0x1p-60f ? 0x1p100f : (largest > 0x1p60f ? 0x1p-60f : 1.0f);
  largest = largest == 0.0f ? 1.0f : largest * scale;
  const float per_largest = __frcp_rn(largest);
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    x[c] = divide(x[c] * scale, largest, per_largest);
    squares = fmaf(x[c], x[c], squares);
  }
  for (int step = lanes / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kFullWarp, squares, step);
  const float norm = squares == 0.0f ? 1.0f : __fsqrt_rn(squares);
  const float per_norm = __frcp_rn(norm);
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) x[c] = divide(x[c], norm, per_norm);
}

// 8 channels of a unit vector as two float16 halves.
struct Split {
  Pack<__half, kLaneChannels> high, low;

  __device__ __forceinline__ explicit Split(const float (&x)[kLaneChannels]) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const float scaled = x[c] * kMetricScale;
      high.value[c] = __float2half_rn(scaled);
      low.value[c] = __float2half_rn(scaled - __half2float(high.value[c]));
    }
  }
};

// Write them, the halves `padded` elements apart.
__device__ __forceinline__ void store_split(__half* row_ptr, int channel, int padded,
                                            const float (&x)[kLaneChannels]) {
  const Split split(x);
  store_pack(row_ptr + channel, split.high);
  store_pack(row_ptr + padded + channel, split.low);
}

}  // namespace tome::match
