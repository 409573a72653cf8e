// How a row lies in the registers of a warp, and which kernel takes a row of so many channels.
#pragma once

#include <type_traits>

#include "../vector.cuh"

namespace tome::merge_ops {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// A row as it lies in a warp: pack k of lane l holds the channels from (32 * k + l) * kCount on.
template <int kPacks, int kCount>
using RowPart = float[kPacks][kCount];

// The kernels for rows in registers: how many packs they hold.
template <int kCount>
struct Widths {
  static constexpr int kPacks[] = {1, 2, 3,
                                   4, 5, 8};  // 16-bit: up to 256, 512, 768, 1024, 1280, 2048 channels
};
template <>
struct Widths<4> {
  static constexpr int kPacks[] = {2, 3, 4, 6, 8, 10};  // float32: up to 256, 384, 512, 768, 1024, 1280
};
constexpr int kWidths = 6;

// How many packs of a row are full, as narrower rows go to a narrower kernel.
template <int kCount, int kPacks>
constexpr int full_packs() {
  int full = 0;
  for (int i = 0; i < kWidths; ++i) {
    if (Widths<kCount>::kPacks[i] < kPacks) full = Widths<kCount>::kPacks[i];
  }
  return full;
}

// Whether pack k of this lane is in the row.
template <int kCount, int kPacks>
__device__ __forceinline__ bool is_inside(int k, int channel, int channels) {
  return k < full_packs<kCount, kPacks>() || channel + k * kWarpSize * kCount < channels;
}

template <int kCount>
__device__ __forceinline__ int lane_channel() {
  return static_cast<int>(threadIdx.x % kWarpSize) * kCount;
}

// Calls launch(kCount, kPacks) with the narrowest kernel that holds a row of T in registers, or kPacks = 0.
template <class T, class Launch>
void dispatch_packs(int channels, bool aligned, Launch&& launch) {
  constexpr int kCount = kPackSize<T>;
  if (!aligned) return launch(Constant<1>{}, Constant<0>{});
  bool is_launched = false;
  const auto try_width = [&](auto packs) {
    if (is_launched || channels > decltype(packs)::value * kWarpSize * kCount) return;
    is_launched = true;
    launch(Constant<kCount>{}, packs);
  };
  const auto try_widths = [&](auto... i) {
    (try_width(Constant<Widths<kCount>::kPacks[decltype(i)::value]>{}), ...);
  };
  try_widths(Constant<0>{}, Constant<1>{}, Constant<2>{}, Constant<3>{}, Constant<4>{}, Constant<5>{});
  if (!is_launched) launch(Constant<kCount>{}, Constant<0>{});
}

}  // namespace tome::merge_ops
