#include "hopper_product.cuh"

namespace tome::products {
bool launch_hopper_gelu_flat(const ProductParams& params, Dtype dtype, cudaStream_t stream) {
  return launch_product<kFlat.rows, kFlat.outputs, true>(params, dtype, stream);
}
}  // namespace tome::products
