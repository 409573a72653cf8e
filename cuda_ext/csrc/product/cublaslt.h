// Linear layers by cuBLASLt itself, where asking PyTorch for them takes the host longer than the GPU.
#pragma once

#include "../stable.h"

namespace tome::products {

// x weight^T + bias of halves [B, N, K] and [J, K]. What PyTorch's addmm launches, so the same bits, but the
// algorithm is looked for once for each shape and thread, not in every call. Nothing where the library isn't
// loaded, where there are many rows, and for tensors that aren't plain: for PyTorch.
std::optional<Tensor> linear_by_cublaslt(const Tensor& x, const Tensor& weight, const Tensor& bias);

}  // namespace tome::products
