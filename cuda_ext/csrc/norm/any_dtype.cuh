// Packs of a dtype that is known at run time only: parameters and results, a uniform switch per pack.
#pragma once

#include "../vector.cuh"
#include "norm.h"

namespace tome::norm {

template <int kCount>
__device__ __forceinline__ void load_as(Dtype stored, const void* ptr, int64_t at, float (&v)[kCount]) {
  const auto dtype = static_cast<Dtype>(opaque(static_cast<int>(stored)));
  if (dtype == Dtype::kFloat) {
    unpack(load_pack<float, kCount>(static_cast<const float*>(ptr) + at), v);
  } else if (dtype == Dtype::kHalf) {
    unpack(load_pack<__half, kCount>(static_cast<const __half*>(ptr) + at), v);
  } else {
    unpack(load_pack<__nv_bfloat16, kCount>(static_cast<const __nv_bfloat16*>(ptr) + at), v);
  }
}

// Channels from `channel` on. Where kCount is not 1 the caller has seen to it that the stride is.
template <int kCount>
__device__ __forceinline__ void load_vector(const Vector& from, int channel, float (&v)[kCount]) {
  load_as(from.dtype, from.data_ptr, kCount == 1 ? channel * from.stride : channel, v);
}

template <int kCount>
__device__ __forceinline__ void store_as(Dtype stored, void* ptr, int64_t at, const float (&v)[kCount]) {
  const auto dtype = static_cast<Dtype>(opaque(static_cast<int>(stored)));
  if (dtype == Dtype::kFloat) {
    store_pack(static_cast<float*>(ptr) + at, to_pack<float>(v));
  } else if (dtype == Dtype::kHalf) {
    store_pack(static_cast<__half*>(ptr) + at, to_pack<__half>(v));
  } else {
    store_pack(static_cast<__nv_bfloat16*>(ptr) + at, to_pack<__nv_bfloat16>(v));
  }
}

}  // namespace tome::norm
