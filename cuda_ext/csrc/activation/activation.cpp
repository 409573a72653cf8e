// Host side of the GELUs, swiglu and swiglu_norm: checks, outputs, launches.
#include "activation.h"

#include "../norm/host.h"
#include "../ops.h"

namespace tome {
namespace {

using activation::ActivationParams;

ActivationParams params_of(const Tensor& x, const std::optional<Tensor>& gate) {
  check_tensor(x, "x", 3);
  ActivationParams p{};
  p.x = view(x);
  if (gate.has_value()) {
    check_tensor(*gate, "gate", 3);
    check_like(*gate, "gate", x, x.scalar_type());
    for (int64_t i = 0; i < 3; ++i) TOME_CHECK(gate->size(i) == x.size(i), "gate must have the shape of x");
    p.gate = view(*gate);
  }
  p.batch = x.size(0);
  p.rows = to_int(x.size(1), "the number of tokens");
  p.channels = to_int(x.size(2), "the number of channels");
  return p;
}

Tensor activate(const Tensor& x, const std::optional<Tensor>& gate) {
  ActivationParams p = params_of(x, gate);
  const Dtype dtype = floating_dtype(x, "x");
  const DeviceScope scope(x);
  Tensor out = new_empty(x, {p.batch, x.size(1), x.size(2)}, x.scalar_type());
  p.out_ptr = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  const bool aligned = is_aligned_view(p.x, dtype, p.channels) &&
                       (!gate.has_value() || is_aligned_view(p.gate, dtype, p.channels));
  const int count = aligned ? static_cast<int>(kAccessBytes / element_size(dtype)) : 1;
  check_grid(activation::blocks_per_image(p, count) * p.batch);
  activation::launch_activation(p, dtype, aligned, current_stream(x));
  check_launch();
  return out;
}

bool is_aligned_list(const Tensor& x) {
  return is_aligned(x.const_data_ptr(), element_size(floating_dtype(x, "x")), 1, x.numel(), {});
}

}  // namespace

Tensor quick_gelu(const Tensor& x) { return activate(x, std::nullopt); }

Tensor swiglu(const Tensor& gate, const Tensor& x) { return activate(x, gate); }

GeluKind gelu_kind(int64_t gelu) {
  TOME_CHECK(gelu >= 0 && gelu <= 2, "gelu must be 0, 1 or 2, got ", gelu);
  return static_cast<GeluKind>(gelu);
}

Tensor gelu(const Tensor& given, GeluKind kind, bool in_place) {
  check_tensor(given, "x", 3);
  const Dtype dtype = floating_dtype(given, "x");
  if (dtype == Dtype::kFloat) {
    using torch::stable::detail::from;
    if (kind == GeluKind::kQuick) return quick_gelu(given);
    return call<2>("aten::gelu", "",
                   {from(given), from(std::string(kind == GeluKind::kTanh ? "tanh" : "none"))});
  }
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const DeviceScope scope(x);
  Tensor out = in_place ? x : new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const activation::GeluParams p{x.const_data_ptr(), out.mutable_data_ptr(), x.numel(),
                                 activation::gelu_of<activation::kManyTerms>(kind, dtype)};
  if (p.count == 0) return out;
  check_grid(p.count / activation::kThreads + 1);
  activation::launch_gelu(p, dtype, is_aligned_list(x), current_stream(x));
  check_launch();
  return out;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x, GeluKind kind) {
  check_tensor(x, "x", 3);
  check_like(grad, "grad", x, x.scalar_type());
  TOME_CHECK(x.is_contiguous() && grad.is_contiguous() && grad.numel() == x.numel(),
             "grad and x must be contiguous and of one shape");
  const Dtype dtype = floating_dtype(x, "x");
  const DeviceScope scope(x);
  Tensor out = new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const activation::GeluBackwardParams p{grad.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(),
                                         x.numel()};
  if (p.count == 0) return out;
  check_grid(p.count / activation::kThreads + 1);
  activation::launch_gelu_backward(p, kind, dtype, is_aligned_list(grad) && is_aligned_list(x),
                                   current_stream(x));
  check_launch();
  return out;
}

Tensor swiglu_norm(const Tensor& gate, const Tensor& x, int64_t width, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps) {
  activation::NormedParams p{params_of(x, gate)};
  const Dtype dtype = floating_dtype(x, "x");
  TOME_CHECK(width >= 1 && width <= p.rows_of.channels, "width must be in [1, ", p.rows_of.channels,
             "], got ", width);
  TOME_CHECK(eps > 0.0, "eps must be positive, got ", eps);
  p.width = static_cast<int>(width);
  p.share = 1.0f / static_cast<float>(width);
  p.eps = static_cast<float>(eps);
  p.weight = vector(weight, "weight", x, width);
  p.bias = vector(bias, "bias", x, width);
  const DeviceScope scope(x);
  Tensor out = new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  p.rows_of.out_ptr = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  check_grid(p.rows_of.batch * p.rows_of.rows);
  const bool aligned = is_aligned_view(p.rows_of.x, dtype, p.rows_of.channels) &&
                       is_aligned_view(p.rows_of.gate, dtype, p.rows_of.channels) &&
                       is_aligned_vector(p.weight) && is_aligned_vector(p.bias);
  activation::launch_normed(p, dtype, aligned, current_stream(x));
  check_launch();
  return out;
}

}  // namespace tome
