// 1 / (1 + exp(-x)), as exact as a result of type T can tell.
#pragma once

namespace tome::activation {

// For 16-bit results a quotient and a power to a few units of float32 are more than enough, and several times
// as fast, without which arithmetic and not memory would set the pace.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

}  // namespace tome::activation
