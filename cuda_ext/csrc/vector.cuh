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
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Pack {
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
  __device__ __forceinline__ static type round(float x, float y) { return __floats2half2_rn(x, y); }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  __device__ __forceinline__ static type round(float x, float y) { return __floats2bfloat162_rn(x, y); }
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

// A pack is 32, 16 or 8 bytes, or one element. kReadOnly: through the path for what the kernel doesn't write.
template <class T, int kCount, bool kReadOnly = true>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* ptr) {
  Pack<T, kCount> pack;
  constexpr int kBytes = sizeof(pack);
  if constexpr (kCount == 1) {
    pack.value[0] = kReadOnly ? __ldg(ptr) : *ptr;
  } else if constexpr (kBytes == 8) {
    const auto* from = reinterpret_cast<const uint2*>(ptr);
    *reinterpret_cast<uint2*>(&pack) = kReadOnly ? __ldg(from) : *from;
  } else {
    static_assert(kBytes % kAccessBytes == 0);
    const auto* from = reinterpret_cast<const uint4*>(ptr);
#pragma unroll
    for (int i = 0; i < kBytes / kAccessBytes; ++i) {
      reinterpret_cast<uint4*>(&pack)[i] = kReadOnly ? __ldg(from + i) : from[i];
    }
  }
  return pack;
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* ptr, const Pack<T, kCount>& pack) {
  constexpr int kBytes = sizeof(pack);
  if constexpr (kCount == 1) {
    *ptr = pack.value[0];
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(ptr) = *reinterpret_cast<const uint2*>(&pack);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / kAccessBytes; ++i) {
      reinterpret_cast<uint4*>(ptr)[i] = reinterpret_cast<const uint4*>(&pack)[i];
    }
  }
}

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> to_pack(const float (&x)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    auto* pairs = reinterpret_cast<typename Pair<T>::type*>(pack.value);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = Pair<T>::round(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.value[i] = from_float<T>(x[i]);
  }
  return pack;
}

// The same number, of which the compiler knows nothing: without, it would write a long loop once more for
// every outcome of a uniform condition in it.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 2^x in one instruction; results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x in one instruction, to the last bit or two.
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// Over the four threads that hold a row of a product.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

}  // namespace tome
