// Host side of quick_gelu and swiglu: checks, outputs, launches.
#include "activation.h"

#include "../merge/host.h"
#include "../ops.h"

namespace tome {
namespace {

using activation::ActivationParams;

Tensor activate(const Tensor& x, const std::optional<Tensor>& gate) {
  check_tensor(x, "x", 3);
  const Dtype dtype = floating_dtype(x, "x");
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

}  // namespace

Tensor quick_gelu(const Tensor& x) { return activate(x, std::nullopt); }

Tensor swiglu(const Tensor& gate, const Tensor& x) { return activate(x, gate); }

}  // namespace tome
