// A warpgroup's look at all targets by wgmma: 64 sources in registers, targets in shared memory. Products run
// while the maxima of the ones before are taken.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include <utility>

#include "hopper_tiles.cuh"

namespace tome::match {

// How far the sum of all three products may be off, here (one float32 accumulator) and where scores are
// exact.
template <int kSteps>
constexpr float kSumError = (3 * kSteps + 3) * 0x1p-21f * kMetricScale * kMetricScale;

constexpr float kNothing = -3e38f;

template <int kColumns>
struct WideProduct;
#define TOME_WIDE_PRODUCT(COLUMNS)                                                       \
  template <>                                                                            \
  struct WideProduct<COLUMNS>                                                            \
      : cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, \
                                                             cute::SM90::GMMA::Major::K> {};
TOME_WIDE_PRODUCT(32)
TOME_WIDE_PRODUCT(64)
#undef TOME_WIDE_PRODUCT

template <class Op, int kSize, int... kI>
__device__ __forceinline__ void multiply_wide(const uint32_t (&a)[4], uint64_t b, float (&c)[kSize],
                                              cute::SM90::GMMA::ScaleOut scale,
                                              std::integer_sequence<int, kI...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, c[kI]..., scale);
}

template <int kSize>
__device__ __forceinline__ void fence_registers(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(registers[i]);
}

// The sources of a warpgroup, in registers.
template <class Look>
struct WideSources {
  uint32_t value[(1 + Look::kBoth) * Look::kSteps][4];

  __device__ __forceinline__ explicit WideSources(const char* source_ptr) {
#pragma unroll
    for (int k = 0; k < (1 + Look::kBoth) * Look::kSteps; ++k) {
      load_matrices(source_ptr + k * 2 * kProductDepth, value[k]);
    }
  }
};

template <class Traits, class Look>
struct Looker {
  using Tile = typename Look::Tile;
  static constexpr int kSize = Look::kPart / 2;
  const WideStream<Traits, Look>& stream;
  const WideSources<Look>& sources;
  int first;  // this warpgroup's first column in a tile
  uint32_t mask;
  Seen<2>& seen;

  // Start the products of one part of a tile: of the high halves, or all three.
  __device__ __forceinline__ void start(int tile, int part, float (&score)[kSize]) const {
    using Scale = cute::SM90::GMMA::ScaleOut;
    constexpr int kSteps = Look::kSteps;
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(stream.place(tile))) / 16;
    // From one lane, so that the compiler knows them to be uniform in a warp.
    const uint32_t wide = __shfl_sync(kFullWarp, place + first * 8, 0);
    const uint32_t narrow = __shfl_sync(kFullWarp, place + first * 2, 0);
    fence_registers(score);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < (Look::kBoth ? 3 : 1) * kSteps; ++i) {
      const int source = i < 2 * kSteps ? i : i - 2 * kSteps;  // high, low, high
      const int target = i < kSteps ? i : i - kSteps;          // high, high, low
      multiply_wide<WideProduct<Look::kPart>>(
          sources.value[source],
          Tile::descriptor(target < 4 * Tile::kWide ? wide : narrow, part * Look::kPart, target), score,
          i == 0 ? Scale::Zero : Scale::One, std::make_integer_sequence<int, kSize>{});
    }
    cute::warpgroup_commit_batch();
  }

  // The maxima of one part, once all products but kPending are done.
  template <int kPending>
  __device__ __forceinline__ void finish(int tile, int part, float (&score)[kSize]) const {
    constexpr int kGroups = Look::kPart / kWideGroupColumns;
    cute::warpgroup_wait<kPending>();
    fence_registers(score);
    const int left = stream.targets - tile * Look::kColumns - first - part * Look::kPart;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // Targets past the end repeat the last one and change no maximum. Groups of nothing else don't count; a
      // number, since NaN or infinity with a number in its lowest bits would put the best in second place
      // too.
      const bool is_past = g * kWideGroupColumns >= left;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          largest[n] = fmaxf(score[16 * g + 4 * n + 2 * i], score[16 * g + 4 * n + 2 * i + 1]);
        }
        const float all = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
        seen.note(i, is_past ? kNothing : all, tile * Look::kSeenGroups + part * kGroups + g, mask);
      }
    }
  }

  // The sources have come.
  __device__ __forceinline__ void run() const {
    const int tiles = stream.count();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      stream.next(tile);
      float score[Look::kParts][kSize];
      start(tile, 0, score[0]);
      if constexpr (Look::kParts == 2) {
        start(tile, 1, score[1]);
        finish<1>(tile, 0, score[0]);
      }
      cute::warpgroup_wait<0>();
      stream.release(tile);
      finish<0>(tile, Look::kParts - 1, score[Look::kParts - 1]);
    }
  }
};

}  // namespace tome::match
