// gamma, weight and bias in float32, in shared memory: converted once per block, and read without bank
// conflicts as 16 bytes of all lanes lie side by side.
#pragma once

#include "../merge/members.cuh"
#include "any_dtype.cuh"

namespace tome::norm {

constexpr int kThreads = merge_ops::kBlockThreads;

// One behind the other, at equal distances.
struct Staged {
  float* weight;
  float* bias;
  float* gamma;
};

// Four channels as they lie.
__device__ __forceinline__ uint4 load_raw(const void* ptr, Dtype dtype, int four) {
  if (dtype == Dtype::kFloat) return __ldg(static_cast<const uint4*>(ptr) + four);
  const uint2 half = __ldg(static_cast<const uint2*>(ptr) + four);
  return make_uint4(half.x, half.y, 0, 0);
}

__device__ __forceinline__ float4 converted(const uint4& raw, Dtype dtype) {
  float v[4];
  if (dtype == Dtype::kFloat) {
    unpack(*reinterpret_cast<const Pack<float, 4>*>(&raw), v);
  } else if (dtype == Dtype::kHalf) {
    unpack(*reinterpret_cast<const Pack<__half, 4>*>(&raw), v);
  } else {
    unpack(*reinterpret_cast<const Pack<__nv_bfloat16, 4>*>(&raw), v);
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

// All loads are issued before the first is used: where rows are few nothing else hides their latency.
template <int kCount>
__device__ __forceinline__ void stage(const NormParams& p, const Staged& to) {
  constexpr int kFours = kCount / 4;  // per pack
  constexpr int kInFlight = 6;        // 1024 channels of all three
  const int fours = p.merge.channels / 4;
  const int all = (p.gamma.data_ptr == nullptr ? 2 : 3) * fours;
  const auto which = [&](int at) { return (at >= fours) + (at >= 2 * fours); };
  const auto data_of = [&](int i) {
    return i == 0 ? p.weight.data_ptr : i == 1 ? p.bias.data_ptr : p.gamma.data_ptr;
  };
  const auto dtype_of = [&](int i) {
    return i == 0 ? p.weight.dtype : i == 1 ? p.bias.dtype : p.gamma.dtype;
  };
#pragma unroll 1
  for (int base = threadIdx.x; base < all; base += kInFlight * kThreads) {
    uint4 raw[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = base + j * kThreads;
      const int i = which(at);
      if (at < all && data_of(i) != nullptr) raw[j] = load_raw(data_of(i), dtype_of(i), at - i * fours);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = base + j * kThreads;
      if (at >= all) break;
      const int i = which(at);
      const int four = at - i * fours;
      const int pack = four / kFours;
      const float missing = i == 1 ? 0.0f : 1.0f;
      const int place = pack / kWarpSize * kFours * kWarpSize + four % kFours * kWarpSize + pack % kWarpSize;
      reinterpret_cast<float4*>(to.weight + i * (to.bias - to.weight))[place] =
          data_of(i) == nullptr ? make_float4(missing, missing, missing, missing)
                                : converted(raw[j], dtype_of(i));
    }
  }
}

template <int kCount>
__device__ __forceinline__ void load_staged(const float* from, int channel, float (&v)[kCount]) {
  static_assert(kCount % 4 == 0);
  const int step = channel / (kWarpSize * kCount) * (kWarpSize * kCount);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(from + step + (i * kWarpSize + lane) * 4);
    v[4 * i] = four.x;
    v[4 * i + 1] = four.y;
    v[4 * i + 2] = four.z;
    v[4 * i + 3] = four.w;
  }
}

}  // namespace tome::norm
