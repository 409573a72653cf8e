#include "hopper_product.cuh"

namespace tome::products {
bool launch_hopper_gelu_wide(const ProductParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<kWide.rows, kWide.outputs, true>(params, dtype, stream);
}
}  // namespace tome::products
