// 16-byte accesses, and their conversion to and from float32.
#pragma once

#include "dtype.h"

namespace tome {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// kCount elements that travel together: 16 bytes of T, or a single element where rows are not aligned.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

// Two at a time where there are two: single 16-bit values would each take a register of their own.
__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <class T>
struct Pair {
  using type = T;
};
template <>
struct Pair<__half> {
  using type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <class T, int kCount>
__device__ __forceinline__ void unpack(const Pack<T, kCount>& pack, float (&x)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(pack.value);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = to_float2(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(pack.value[i]);
  }
}

template <class T>
constexpr int kPackSize = kAccessBytes / static_cast<int>(sizeof(T));

// Through the read-only path: no kernel here reads what it writes.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* ptr) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(pack) == kAccessBytes) {
    *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(ptr));
  } else {
    static_assert(kCount == 1);
    pack.value[0] = __ldg(ptr);
  }
  return pack;
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* ptr, const Pack<T, kCount>& pack) {
  if constexpr (sizeof(pack) == kAccessBytes) {
    *reinterpret_cast<uint4*>(ptr) = *reinterpret_cast<const uint4*>(&pack);
  } else {
    *ptr = pack.value[0];
  }
}

}  // namespace tome
