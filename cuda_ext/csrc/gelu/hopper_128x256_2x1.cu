#include "hopper_product.cuh"

namespace tome::gelu_ops {
bool launch_hopper_128x256_2x1(const GeluParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<128, 256, 2, 1, false>(params, dtype, stream);
}
}  // namespace tome::gelu_ops
