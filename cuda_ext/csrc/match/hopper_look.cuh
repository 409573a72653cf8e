// A warpgroup's look at all targets by wgmma: 64 sources in registers, targets in shared memory. Products run
// while the maxima of the ones before are taken. Products of the high halves are summed in float16, so that
// one instruction takes the maxima of two scores and another's products find registers.
#pragma once

#include "../hopper/warpgroup.cuh"
#include "hopper_tiles.cuh"

namespace tome::match {

// How far the sum of all three products may be off, here (one float32 accumulator) and where scores are
// exact.
template <int kSteps>
constexpr float kSumError = (3 * kSteps + 3) * 0x1p-21f * kMetricScale * kMetricScale;

// How far a product of high halves, summed in float16, may be off a score. Every step rounds a sum of at most
// one (by Cauchy-Schwarz) to nearest: by 2^-12, or by 2^-11 where the halves' own rounding lifts it above.
template <int kSteps>
constexpr float kLookError = kCorrection + kSteps * 0x1p-11f * kMetricScale * kMetricScale;
// Of the sources in that look, exact but for numbers below 2^-19 of their row: scores must not overflow.
constexpr float kLookScale = 0x1p-5f;

// Less than any score, even in float16.
constexpr float kNothing = -2.0f * kMetricScale * kMetricScale + 0x1p12f;

template <bool kBoth>
struct WideProduct;
template <>
struct WideProduct<true>
    : cute::SM90::GMMA::MMA_64x32x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K> {
  using Sum = float;
};
template <>
struct WideProduct<false>
    : cute::SM90::GMMA::MMA_64x64x16_F16F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K> {
  using Sum = uint32_t;  // of two neighbours
};

// The sources of a warpgroup, in registers.
template <class Look>
struct WideSources {
  uint32_t value[(1 + Look::kBoth) * Look::kSteps][4];

  __device__ __forceinline__ explicit WideSources(const char* source_ptr) {
#pragma unroll
    for (int k = 0; k < (1 + Look::kBoth) * Look::kSteps; ++k) {
      load_matrices(source_ptr + k * 2 * kProductDepth, value[k]);
      if constexpr (!Look::kBoth) {
#pragma unroll
        for (uint32_t& pair : value[k]) {
          auto& halves = reinterpret_cast<__half2&>(pair);
          halves = __hmul2(halves, __float2half2_rn(kLookScale));
        }
      }
    }
  }
};

template <class Tiling, class Look>
struct Looker {
  using Tile = typename Look::Tile;
  using Product = WideProduct<Look::kBoth>;
  using Sum = typename Product::Sum;
  static constexpr int kSize = Look::kPart / (Look::kBoth ? 2 : 4);
  const WideStream<Tiling, Look>& stream;
  const WideSources<Look>& sources;
  int first;  // this warpgroup's first column in a tile
  uint32_t mask;
  Seen<2>& seen;

  // Start the products of one part of a tile: of the high halves, or all three.
  __device__ __forceinline__ void start(int tile, int part, Sum (&score)[kSize]) const {
    constexpr int kSteps = Look::kSteps;
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(stream.place(tile))) / 16;
    const uint32_t wide = sm90::uniform(place + first * 8);
    const uint32_t narrow = sm90::uniform(place + first * 2);
    sm90::fence_registers(score);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < (Look::kBoth ? 3 : 1) * kSteps; ++i) {
      const int source = i < 2 * kSteps ? i : i - 2 * kSteps;  // high, low, high
      const int target = i < kSteps ? i : i - kSteps;          // high, high, low
      sm90::warpgroup_multiply<Product>(
          sources.value[source],
          Tile::by_columns(target < Tile::kMainSteps ? wide : narrow, part * Look::kPart, target), score,
          i == 0 ? sm90::ScaleOut::Zero : sm90::ScaleOut::One, std::make_integer_sequence<int, kSize>{});
    }
    cute::warpgroup_commit_batch();
  }

  // The maxima of one part, once all products but kPending are done. Maxima pass over NaN, as which targets
  // past the end come; a group of nothing else counts as kNothing. Leaving a part of such by a branch also
  // keeps the compiler from taking the maxima of the first part only when those of the second are due.
  template <int kPending>
  __device__ __forceinline__ void finish(int tile, int part, Sum (&score)[kSize]) const {
    cute::warpgroup_wait<kPending>();
    sm90::fence_registers(score);
    if (tile * Look::kColumns + first + part * Look::kPart >= stream.p.targets) return;
    const uint32_t group = tile * Look::kSeenGroups + part * Look::kPartGroups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Look::kBoth) {
        float largest = kNothing;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          largest = fmaxf(largest, fmaxf(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
        }
        seen.note(i, largest, group, mask);
      } else {
        __half2 largest = __float2half2_rn(kNothing * kLookScale);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          largest = __hmax2(largest, reinterpret_cast<__half2&>(score[2 * n + i]));
        }
        const float2 both = __half22float2(largest);
        seen.note(i, both.x * (1.0f / kLookScale), group, mask);
        seen.note(i, both.y * (1.0f / kLookScale), group + 1, mask);
      }
    }
  }

  // The sources have come.
  __device__ __forceinline__ void run() const {
    const int tiles = stream.count();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      stream.await(tile);
      Sum score[2][kSize];
      start(tile, 0, score[0]);
      start(tile, 1, score[1]);
      stream.refill(tile);
      finish<1>(tile, 0, score[0]);
      cute::warpgroup_wait<0>();
      stream.release(tile);
      finish<0>(tile, 1, score[1]);
    }
  }
};

}  // namespace tome::match
