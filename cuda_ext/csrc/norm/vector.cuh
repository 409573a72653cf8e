// Packs of a dtype that is known at run time only: parameters and results, a uniform switch per pack.
#pragma once

#include "../vector.cuh"
#include "norm.h"

namespace tome::norm {

// Channels from `channel` on. Of an unaligned kernel kCount is 1, and only there does the stride matter.
template <int kCount>
__device__ __forceinline__ void load_vector(const Vector& from, int channel, float (&v)[kCount]) {
  const int64_t at = kCount == 1 ? channel * from.stride : channel;
  if (from.dtype == Dtype::kFloat) {
    unpack(load_pack<float, kCount>(static_cast<const float*>(from.data_ptr) + at), v);
  } else if (from.dtype == Dtype::kHalf) {
    unpack(load_pack<__half, kCount>(static_cast<const __half*>(from.data_ptr) + at), v);
  } else {
    unpack(load_pack<__nv_bfloat16, kCount>(static_cast<const __nv_bfloat16*>(from.data_ptr) + at), v);
  }
}

template <int kCount>
__device__ __forceinline__ void store_as(Dtype dtype, void* ptr, int64_t at, const float (&v)[kCount]) {
  if (dtype == Dtype::kFloat) {
    store_pack(static_cast<float*>(ptr) + at, to_pack<float>(v));
  } else if (dtype == Dtype::kHalf) {
    store_pack(static_cast<__half*>(ptr) + at, to_pack<__half>(v));
  } else {
    store_pack(static_cast<__nv_bfloat16*>(ptr) + at, to_pack<__nv_bfloat16>(v));
  }
}

}  // namespace tome::norm
