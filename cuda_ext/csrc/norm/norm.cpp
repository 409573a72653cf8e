// Host side of merge_add_norm: checks, shapes, outputs, launches.
#include "norm.h"

#include "../merge/host.h"
#include "../ops.h"

namespace tome {
namespace {

using norm::NormParams;
using norm::Vector;

Vector vector(const std::optional<Tensor>& tensor, const char* name, const Tensor& like) {
  if (!tensor.has_value()) return {};
  check_tensor(*tensor, name, 1);
  check_like(*tensor, name, like, tensor->scalar_type());
  TOME_CHECK(tensor->size(0) == like.size(2), name, " must be [", like.size(2), "]");
  return {tensor->const_data_ptr(), tensor->stride(0), floating_dtype(*tensor, name)};
}

// Packs of as many channels as 16 bytes of x hold take 8, 16 or 32 bytes of the others.
bool is_aligned_vector(const Vector& v) {
  return v.data_ptr == nullptr ||
         (v.stride == 1 && reinterpret_cast<uintptr_t>(v.data_ptr) % kAccessBytes == 0);
}

bool is_aligned_like(const View& view, Dtype dtype, Dtype x_dtype, int64_t channels) {
  return is_aligned_view(view, dtype, channels, kAccessBytes * element_size(dtype) / element_size(x_dtype));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm(
    const Tensor& x, const Tensor& branch, const std::optional<Tensor>& slot, int64_t tokens,
    const std::optional<Tensor>& size, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, const std::optional<Tensor>& gamma, ScalarType norm_dtype) {
  check_tensor(x, "x", 3);
  check_tensor(branch, "branch", 3);
  check_tokens(x, tokens, slot.has_value());
  for (int64_t dim = 0; dim < 3; ++dim) TOME_CHECK(branch.size(dim) == x.size(dim), "branch must be like x");
  const Dtype dtype = floating_dtype(x, "x");
  const Dtype branch_dtype = floating_dtype(branch, "branch");
  check_like(branch, "branch", x, dtype == Dtype::kFloat ? branch.scalar_type() : x.scalar_type());
  const DeviceScope scope(x);
  const int64_t batch = x.size(0);
  Tensor merged = new_empty(x, {batch, tokens, x.size(2)}, x.scalar_type());
  Tensor y = new_empty(x, {batch, tokens, x.size(2)}, norm_dtype);
  Tensor total = new_empty(x, {slot.has_value() ? batch : 0, tokens}, ScalarType::Float);
  Tensor stats = new_empty(x, {batch, tokens, 2}, ScalarType::Float);
  NormParams p{};
  p.merge = gather_params(x, merged, slot, tokens, size);
  if (slot.has_value()) p.merge.total_ptr = static_cast<float*>(total.mutable_data_ptr());
  p.branch = view(branch);
  p.y_ptr = y.mutable_data_ptr();
  p.stats_ptr = static_cast<float2*>(stats.mutable_data_ptr());
  p.y_dtype = floating_dtype(y, "y");
  p.gamma = vector(gamma, "gamma", x);
  p.weight = vector(weight, "weight", x);
  p.bias = vector(bias, "bias", x);
  p.eps = static_cast<float>(eps);
  if (batch > 0 && tokens > 0) {
    const int64_t channels = x.size(2);
    const bool aligned = is_aligned_view(p.merge.x, dtype, channels) &&
                         is_aligned_like(p.branch, branch_dtype, dtype, channels) &&
                         is_aligned_vector(p.gamma) && is_aligned_vector(p.weight) && is_aligned_vector(p.bias);
    norm::launch_norm(p, dtype, branch_dtype, aligned, current_stream(x));
    check_launch();
  }
  return {merged, y, total, stats};
}

}  // namespace tome
