// Parameters in the dtype that a product computes in, all of them by one launch.
#pragma once

#include <cuda_runtime.h>

#include "../dtype.h"

namespace tome::halves {

struct CastJob {
  const void* from_ptr;
  int64_t count;
  int64_t offset;  // in `out`, elements
  Dtype dtype;
};

constexpr int kMostCasts = 4;

struct CastParams {
  CastJob jobs[kMostCasts];
  void* out_ptr;
  Dtype dtype;
  int count;
};

constexpr int64_t kCastPack = 8;  // elements of an access where aligned

// aligned: so many elements can be accessed at a time, and every tensor is a multiple of them.
void launch_cast(const CastParams& params, bool aligned, cudaStream_t stream);

}  // namespace tome::halves
