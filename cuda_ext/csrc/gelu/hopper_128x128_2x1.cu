#include "hopper_product.cuh"

namespace tome::gelu_ops {
bool launch_hopper_128x128_2x1(const GeluParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<128, 128, 2, 1>(params, dtype, stream);
}
}  // namespace tome::gelu_ops
