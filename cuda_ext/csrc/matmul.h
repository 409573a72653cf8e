// Products of matrices by torch's functions for CUDA, past its dispatcher: no autocast, no autograd, and half
// of the host's time. The caller has seen to devices and, but for linear(), to dtypes.
#pragma once

#include "product/cublaslt.h"
#include "stable.h"

namespace tome {

inline Tensor transposed(const Tensor& matrix) {
  return view_of(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)}, 0);
}

// x [B, N, C] as [B N, C]; a copy only where it has gaps.
inline Tensor rows_of(const Tensor& x) {
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const int64_t channels = dense.size(2);
  return view_of(dense, {dense.size(0) * dense.size(1), channels}, {channels, 1}, 0);
}

// a b in the dtype of both, or of halves in float32.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    return;
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(out.scalar_type()));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), code));
}

// x weight^T + bias of tokens [B, N, C].
inline Tensor linear_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t outputs = weight.size(0);
  const Tensor out = new_empty(x, {x.size(0), x.size(1), outputs}, x.scalar_type());
  const Tensor rows = rows_of(out), from = rows_of(x), matrix = transposed(weight);
  if (bias.has_value()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(rows.get(), bias->get(), from.get(), matrix.get(), 1.0, 1.0));
  } else {
    multiply(rows, from, matrix);
  }
  return out;
}

// The same in inference: of few rows by cuBLASLt, and by torch's dispatcher where autocast has yet to cast.
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type();
  const bool is_alike = weight.scalar_type() == dtype && (!bias.has_value() || bias->scalar_type() == dtype);
  if (is_alike && weight.dim() == 2) {
    std::optional<Tensor> out;
    if (bias.has_value()) out = products::linear_by_cublaslt(x, weight, *bias);
    return out.has_value() ? *out : linear_of(x, weight, bias);
  }
  using torch::stable::detail::from;
  return call<3>("aten::linear", "", {from(x), from(weight), from(bias)});
}

// grad [B, N, O] weight: the gradient of x.
inline Tensor linear_grad(const Tensor& grad, const Tensor& weight) {
  const Tensor out = new_empty(grad, {grad.size(0), grad.size(1), weight.size(1)}, grad.scalar_type());
  multiply(rows_of(out), rows_of(grad), weight);
  return out;
}

// grad^T x: that of the weight.
inline Tensor weight_grad(const Tensor& grad, const Tensor& x, ScalarType dtype) {
  Tensor out = new_empty(grad, {grad.size(2), x.size(2)}, dtype);
  multiply(out, transposed(rows_of(grad)), rows_of(x));
  return out;
}

}  // namespace tome
