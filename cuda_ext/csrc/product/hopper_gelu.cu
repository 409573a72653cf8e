#include "hopper_product.cuh"

namespace tome::products {
bool launch_hopper_gelu(const ProductParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<kTall.rows, kTall.outputs, true>(params, dtype, stream);
}
}  // namespace tome::products
