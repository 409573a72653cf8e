#include "hopper_product.cuh"

namespace tome::gelu_ops {
bool launch_hopper_128x192_1x2(const GeluParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<128, 192, 1, 2>(params, dtype, stream);
}
}  // namespace tome::gelu_ops
