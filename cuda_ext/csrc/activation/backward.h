// The gradient of the GELUs.
#pragma once

#include <cuda_runtime.h>

#include "../dtype.h"

namespace tome::activation {

enum class GeluKind { kErf, kTanh, kQuick };

struct GeluBackwardParams {
  const void* grad_ptr;
  const void* x_ptr;
  void* out_ptr;
  int64_t count;  // elements, all contiguous
};

// aligned: 16 bytes can be accessed at a time, and `count` is a multiple of them.
void launch_gelu_backward(const GeluBackwardParams& params, GeluKind kind, Dtype dtype, bool aligned,
                          cudaStream_t stream);

}  // namespace tome::activation
