// Host side of merge_add_norm: checks, shapes, outputs, launches.
//
// Views are read where they lie, so all that a kernel is told are pointers and strides. What is not checked
// here is not checked at all: a kernel that reads past a tensor's end says nothing.
#include "host.h"

#include "../ops.h"

namespace tome {

using norm::BackwardParams;
using norm::NormParams;
using norm::Vector;

Vector vector(const std::optional<Tensor>& tensor, const char* name, const Tensor& x, int64_t channels) {
  if (!tensor.has_value()) return {};
  if (channels < 0) channels = x.size(2);
  check_tensor(*tensor, name, 1);
  check_like(*tensor, name, x, tensor->scalar_type());
  TOME_CHECK(tensor->size(0) == channels, name, " must be [", channels, "]");
  return {tensor->const_data_ptr(), tensor->stride(0), floating_dtype(*tensor, name)};
}

bool is_aligned_vector(const Vector& v) {
  return v.data_ptr == nullptr ||
         (v.stride == 1 && reinterpret_cast<uintptr_t>(v.data_ptr) % kAccessBytes == 0);
}

bool is_aligned_like(const View& view, Dtype dtype, Dtype x_dtype, int64_t channels) {
  return is_aligned_view(view, dtype, channels, kAccessBytes * element_size(dtype) / element_size(x_dtype));
}

Dtype check_branch(const Tensor& branch, const Tensor& x) {
  check_tensor(branch, "branch", 3);
  TOME_CHECK(branch.size(0) == x.size(0) && branch.size(2) == x.size(2), "branch must be like x");
  check_like(branch, "branch", x,
             floating_dtype(x, "x") == Dtype::kFloat ? branch.scalar_type() : x.scalar_type());
  return floating_dtype(branch, "branch");
}

const float2* stats_of(const Tensor& stats, const Tensor& like, int64_t batch, int64_t rows) {
  check_like(stats, "stats", like, ScalarType::Float);
  TOME_CHECK(stats.dim() == 3 && stats.size(0) == batch && stats.size(1) == rows && stats.size(2) == 2,
             "stats must be [", batch, ", ", rows, ", 2]");
  TOME_CHECK(stats.is_contiguous(), "stats must be contiguous");
  return static_cast<const float2*>(stats.const_data_ptr());
}

Normed merged_norm(const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& slot,
                   int64_t tokens, const std::optional<Tensor>& size, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& gamma,
                   ScalarType norm_dtype, bool training) {
  check_tensor(x, "x", 3);
  check_tokens(x, tokens, slot.has_value());
  TOME_CHECK(eps > 0.0, "eps must be positive, got ", eps);
  TOME_CHECK(branch.has_value() || (!slot.has_value() && !gamma.has_value()),
             "without a branch there is nothing to merge and nothing to scale");
  const Dtype dtype = floating_dtype(x, "x");
  const Dtype branch_dtype = branch.has_value() ? check_branch(*branch, x) : dtype;
  const int64_t skip = branch.has_value() ? x.size(1) - branch->size(1) : 0;
  TOME_CHECK(skip >= 0, "branch must have no more tokens than x");
  const DeviceScope scope(x);
  const int64_t batch = x.size(0), channels = x.size(2);
  // Without a branch x stays what it is, and an operator may not return its own input.
  Tensor merged = new_empty(x, {branch.has_value() ? batch : 0, tokens, channels}, x.scalar_type());
  Tensor y = new_empty(x, {batch, tokens, channels}, norm_dtype);
  std::optional<Tensor> total, stats;
  if (slot.has_value()) total = new_empty(x, {batch, tokens}, ScalarType::Float);
  if (training) stats = new_empty(x, {batch, tokens, 2}, ScalarType::Float);
  NormParams p{};
  p.merge = gather_params(x, merged, slot, tokens, size);
  if (total.has_value()) p.merge.total_ptr = static_cast<float*>(total->mutable_data_ptr());
  if (branch.has_value()) p.branch = view(*branch);
  if (branch.has_value() && branch->size(1) == 0)
    p.branch.data_ptr = p.merge.x.data_ptr;  // of which nothing is read
  p.skip = static_cast<int>(skip);
  p.y_ptr = y.mutable_data_ptr();
  if (stats.has_value()) p.stats_ptr = static_cast<float2*>(stats->mutable_data_ptr());
  p.y_dtype = floating_dtype(y, "y");
  p.gamma = vector(gamma, "gamma", x);
  p.weight = vector(weight, "weight", x);
  p.bias = vector(bias, "bias", x);
  p.eps = static_cast<float>(eps);
  p.share = 1.0f / static_cast<float>(channels);  // a multiplication per row instead of a division
  if (batch > 0 && tokens > 0) {
    // One answer for all of them: a kernel for every mixture would be many more. What is new is aligned.
    const bool aligned = is_aligned_view(p.merge.x, dtype, channels) &&
                         (!branch.has_value() || is_aligned_like(p.branch, branch_dtype, dtype, channels)) &&
                         is_aligned_vector(p.gamma) && is_aligned_vector(p.weight) &&
                         is_aligned_vector(p.bias);
    norm::launch_norm(p, dtype, branch_dtype, aligned, current_stream(x));
    check_launch();
  }
  return {merged, y, total, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm(
    const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& slot, int64_t tokens,
    const std::optional<Tensor>& size, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, const std::optional<Tensor>& gamma, ScalarType norm_dtype, bool training) {
  // The schema has no optional outputs; an empty tensor costs less than a kernel that fills one.
  const Normed out =
      merged_norm(x, branch, slot, tokens, size, weight, bias, eps, gamma, norm_dtype, training);
  return {out.merged, out.y,
          out.total.has_value() ? *out.total : new_empty(x, {0, tokens}, ScalarType::Float),
          out.stats.has_value() ? *out.stats : new_empty(x, {0, tokens, 2}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> merge_add_norm_backward(
    const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y, const Tensor& merged,
    const Tensor& stats, const std::optional<Tensor>& slot, const std::optional<Tensor>& size,
    const std::optional<Tensor>& total, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& gamma, int64_t length, ScalarType branch_dtype) {
  check_tensor(merged, "merged", 3);
  TOME_CHECK(merged.is_contiguous(), "merged must be contiguous");
  const int64_t batch = merged.size(0), tokens = merged.size(1), channels = merged.size(2);
  for (const auto* grad : {&grad_x, &grad_y}) {
    if (!grad->has_value()) continue;
    check_tensor(**grad, "grad", 3);
    check_like(**grad, "grad", merged, (*grad)->scalar_type());
    for (int64_t dim = 0; dim < 3; ++dim) {
      TOME_CHECK((*grad)->size(dim) == merged.size(dim), "a gradient must be like its output");
    }
  }
  TOME_CHECK(slot.has_value() ? total.has_value() : length == tokens, "a merge needs its totals");
  const Dtype dtype = floating_dtype(merged, "merged");
  TOME_CHECK(!grad_x.has_value() || grad_x->scalar_type() == merged.scalar_type(),
             "grad_x has the wrong dtype");
  const DeviceScope scope(merged);
  // Without LayerScale, and in one dtype, the two gradients are the same: then the second is left empty.
  const bool has_branch = gamma.has_value() || branch_dtype != merged.scalar_type();
  Tensor x_out = new_empty(merged, {batch, length, channels}, merged.scalar_type());
  Tensor branch_out = new_empty(merged, {has_branch ? batch : 0, length, channels}, branch_dtype);
  BackwardParams p{};
  if (grad_x.has_value()) p.grad_x = view(*grad_x);
  if (grad_y.has_value()) {
    p.grad_y = view(*grad_y);
    p.grad_y_dtype = floating_dtype(*grad_y, "grad_y");
  }
  p.merged_ptr = merged.const_data_ptr();
  p.stats_ptr = stats_of(stats, merged, batch, tokens);
  p.x_out_ptr = x_out.mutable_data_ptr();
  p.branch_out_ptr = has_branch ? branch_out.mutable_data_ptr() : nullptr;
  p.branch_dtype = floating_dtype(branch_out, "branch");
  // Without a map every token is its own only member, of whatever size: its share of the gradient is all of
  // it.
  if (slot.has_value()) {
    p.slot = table<int32_t>(*slot, "slot", merged, ScalarType::Int, batch, length);
    p.total = table<float>(*total, "total", merged, ScalarType::Float, batch, tokens);
    if (size.has_value()) p.size = table<float>(*size, "size", merged, ScalarType::Float, batch, length);
  }
  p.weight = vector(weight, "weight", merged);
  p.gamma = vector(gamma, "gamma", merged);
  p.batch = batch;
  p.length = to_int(length, "the number of tokens");
  p.tokens = to_int(tokens, "tokens");
  p.channels = to_int(channels, "the number of channels");
  if (x_out.numel() > 0) {
    const View contiguous = view(x_out);
    const bool aligned =
        is_aligned_view(contiguous, dtype, channels) && is_aligned_view(view(merged), dtype, channels) &&
        (!grad_x.has_value() || is_aligned_view(p.grad_x, dtype, channels)) &&
        (!grad_y.has_value() || is_aligned_like(p.grad_y, p.grad_y_dtype, dtype, channels)) &&
        is_aligned_vector(p.weight) && is_aligned_vector(p.gamma);
    check_grid(batch * ((length + 7) / 8));  // eight warps of a block, a token each
    norm::launch_backward(p, dtype, aligned, current_stream(merged));
    check_launch();
  }
  return {x_out, branch_out};
}

}  // namespace tome
