// Host side of attention's gradient: checks, outputs, choice of the kernels.
#include "backward.h"

#include <limits>

#include "host.h"

namespace tome {
namespace {

using attention_ops::BackwardParams;
using attention_ops::Gradient;

// Places `first` and on of what lies packed as [batch, rows, places, heads, head_dim].
Gradient gradient_of(const Tensor& packed, int64_t places, int64_t place) {
  const int64_t width = packed.stride(1) / places;
  auto* data_ptr = static_cast<char*>(packed.mutable_data_ptr());
  return {data_ptr + 2 * place * width, packed.stride(0), packed.stride(1)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& out, const Tensor& lse,
                                              const std::optional<Tensor>& size, double scale) {
  BackwardParams params{};
  attention_ops::AttentionParams& p = params.forward;
  p = attention_ops::read_params(q, k, v, size, scale);
  params.out = attention_ops::heads_of(out, "out", q);
  params.grad = attention_ops::heads_of(grad, "grad", q);
  TOME_CHECK(out.size(2) == p.queries && grad.size(2) == p.queries,
             "out and grad must have as many rows as q");
  check_like(lse, "lse", q, ScalarType::Float);
  TOME_CHECK(lse.dim() == 3 && lse.size(0) == p.batch && lse.size(1) == p.heads && lse.size(2) == p.queries &&
                 lse.is_contiguous(),
             "lse must be [", p.batch, ", ", p.heads, ", ", p.queries, "] and contiguous");
  p.lse_ptr = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  p.is_aligned = p.is_aligned && attention_ops::is_aligned_view(out) && attention_ops::is_aligned_view(grad);

  const DeviceScope scope(q);
  // Of one packed tensor where queries and keys are as many: then the gradient of a packed projection is it.
  const bool is_packed = p.queries == p.keys;
  const int64_t width = static_cast<int64_t>(p.heads) * p.head_dim;
  Tensor grad_q = new_empty(q, {is_packed ? 0 : p.batch, p.queries, width}, q.scalar_type());
  Tensor packed = new_empty(q, {p.batch, p.keys, (is_packed ? 3 : 2) * width}, q.scalar_type());
  if (packed.numel() == 0) return {grad_q, packed};
  const int64_t places = is_packed ? 3 : 2;
  params.grad_q = is_packed ? gradient_of(packed, places, 0) : gradient_of(grad_q, 1, 0);
  params.grad_k = gradient_of(packed, places, places - 2);
  params.grad_v = gradient_of(packed, places, places - 1);
  const int64_t most_blocks = p.batch * p.heads * ((std::max(p.queries, p.keys) + 15) / 16);
  TOME_CHECK(most_blocks <= std::numeric_limits<int>::max(), "too many rows for one launch: ", most_blocks,
             " blocks");

  int device = 0;
  check_cuda(cudaGetDevice(&device));
  const int max_shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const Dtype dtype = floating_dtype(q, "q");
  const BackwardParams whole = attention_ops::plan_backward(params, true);
  if (attention_ops::fits_whole(whole, max_shared_bytes)) {
    attention_ops::launch_backward_keys(whole, dtype, true, max_shared_bytes, current_stream(q));
    check_launch();
    return {grad_q, packed};
  }
  const Tensor delta = new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  params.delta_ptr = static_cast<float*>(delta.mutable_data_ptr());
  if (p.queries > 0) {
    attention_ops::launch_backward_queries(params, dtype, max_shared_bytes, current_stream(q));
    check_launch();
  }
  attention_ops::launch_backward_keys(attention_ops::plan_backward(params, false), dtype, false,
                                      max_shared_bytes, current_stream(q));
  check_launch();
  return {grad_q, packed};
}

}  // namespace tome
