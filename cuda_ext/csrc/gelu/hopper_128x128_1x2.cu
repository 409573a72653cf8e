#include "hopper_product.cuh"

namespace tome::gelu_ops {
bool launch_hopper_128x128_1x2(const GeluParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<128, 128, 1, 2, true>(params, dtype, stream);
}
}  // namespace tome::gelu_ops
