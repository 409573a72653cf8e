// Linear layers by cuBLASLt itself, where asking PyTorch for them takes the host longer than the GPU.
#pragma once

#include "../stable.h"

namespace tome::products {

// x weight^T + bias of halves [B, N, K] and [J, K]. What PyTorch's addmm launches where it may not add parts
// of a sum in 16 bits, so the same bits, but the algorithm is looked for once for each shape and thread, not
// in every call. Nothing, and so PyTorch's product, where the library isn't loaded, of many rows, of tensors
// that aren't plain or start at no multiple of 256 bytes, and while a graph is captured before any such call.
std::optional<Tensor> linear_by_cublaslt(const Tensor& x, const Tensor& weight, const Tensor& bias);

}  // namespace tome::products
