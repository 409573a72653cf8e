// Linear layers by cuBLASLt itself, where asking PyTorch for them takes the host longer than the GPU.
#pragma once

#include "../stable.h"

namespace tome::products {

// out [B, N, J] = x weight^T + bias of halves. What PyTorch's addmm launches, so the same bits, but the
// algorithm is looked for once for each shape and thread, not in every call. False where the library isn't
// loaded, where there are many rows, and for tensors that aren't plain: for PyTorch.
bool launch_cublaslt(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias);

}  // namespace tome::products
