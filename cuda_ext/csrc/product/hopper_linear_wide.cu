#include "hopper_product.cuh"

namespace tome::products {
bool launch_hopper_linear_wide(const ProductParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<kWide.rows, kWide.outputs, false>(params, dtype, stream);
}
}  // namespace tome::products
