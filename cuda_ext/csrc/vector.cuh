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
