// Host side of merging and unmerging: checks, shapes, outputs, launches.
#include "host.h"

#include <limits>

#include "../ops.h"

namespace tome {

using merge_ops::SpreadParams;

View view(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

View mutable_view(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

bool is_aligned_view(const View& view, Dtype dtype, int64_t channels, int64_t boundary) {
  return is_aligned(view.data_ptr, element_size(dtype), view.channel_stride, channels,
                    {view.batch_stride, view.row_stride}, boundary);
}

void check_tokens(const Tensor& x, int64_t tokens, bool has_map) {
  const int64_t least = !has_map ? x.size(1) : x.size(1) > 0 ? 1 : 0;
  TOME_CHECK(tokens >= least && tokens <= x.size(1), "tokens must be in [", least, ", ", x.size(1), "], got ",
             tokens);
}

void check_grid(int64_t blocks) {
  TOME_CHECK(blocks <= std::numeric_limits<int>::max(), "too many rows for one launch: ", blocks, " blocks");
}

namespace {

bool are_aligned(const View& x, const View& out, Dtype dtype, int64_t channels) {
  return is_aligned_view(x, dtype, channels) && is_aligned_view(out, dtype, channels);
}

}  // namespace

GatherParams gather_params(const Tensor& x, const Tensor& out, const std::optional<Tensor>& slot,
                           int64_t tokens, const std::optional<Tensor>& size) {
  const int64_t batch = x.size(0);
  GatherParams p{};
  p.x = view(x);
  p.out = mutable_view(out);
  if (slot.has_value()) p.slot = table<int32_t>(*slot, "slot", x, ScalarType::Int, batch, x.size(1));
  if (size.has_value()) p.size = table<float>(*size, "size", x, ScalarType::Float, batch, x.size(1));
  p.batch = batch;
  p.length = to_int(x.size(1), "the number of tokens");
  p.tokens = to_int(tokens, "tokens");
  p.channels = to_int(x.size(2), "the number of channels");
  p.block_outputs = merge_ops::block_outputs(batch, x.size(1), tokens, slot.has_value());
  check_grid((tokens + p.block_outputs - 1) / p.block_outputs * batch);
  return p;
}

namespace {

Tensor gather(const Tensor& x, const Tensor& slot, int64_t tokens, const std::optional<Tensor>& size,
              float* total_ptr) {
  const Dtype dtype = floating_dtype(x, "x");
  Tensor out = new_empty(x, {x.size(0), tokens, x.size(2)}, x.scalar_type());
  GatherParams p = gather_params(x, out, slot, tokens, size);
  p.total_ptr = total_ptr;
  // Without channels there are still sizes to sum.
  if (p.batch == 0 || tokens == 0 || (p.channels == 0 && total_ptr == nullptr)) return out;
  merge_ops::launch_gather(p, dtype, are_aligned(p.x, p.out, dtype, p.channels), current_stream(x));
  check_launch();
  return out;
}

Tensor spread(const Tensor& x, const Tensor& slot, const std::optional<Tensor>& size,
              const std::optional<Tensor>& total) {
  const Dtype dtype = floating_dtype(x, "x");
  const int64_t batch = x.size(0);
  TOME_CHECK(slot.dim() == 2, "slot must be [B, N]");
  const int64_t length = slot.size(1);
  Tensor out = new_empty(x, {batch, length, x.size(2)}, x.scalar_type());
  SpreadParams p{};
  p.x = view(x);
  p.out = mutable_view(out);
  p.slot = table<int32_t>(slot, "slot", x, ScalarType::Int, batch, length);
  if (size.has_value()) p.size = table<float>(*size, "size", x, ScalarType::Float, batch, length);
  if (total.has_value()) p.total = table<float>(*total, "total", x, ScalarType::Float, batch, x.size(1));
  p.batch = batch;
  p.length = to_int(length, "the number of tokens");
  p.tokens = to_int(x.size(1), "tokens");
  p.channels = to_int(x.size(2), "the number of channels");
  if (out.numel() == 0) return out;
  check_grid((batch * length + 7) / 8);
  merge_ops::launch_spread(p, dtype, are_aligned(p.x, p.out, dtype, p.channels), current_stream(x));
  check_launch();
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> merge(const Tensor& x, const Tensor& slot, int64_t tokens,
                                 const std::optional<Tensor>& size) {
  check_tensor(x, "x", 3);
  check_tokens(x, tokens, true);
  const DeviceScope scope(x);
  Tensor total = new_empty(x, {x.size(0), tokens}, ScalarType::Float);
  Tensor out = gather(x, slot, tokens, size, static_cast<float*>(total.mutable_data_ptr()));
  return {out, total};
}

Tensor merge_backward(const Tensor& grad, const Tensor& slot, const std::optional<Tensor>& size,
                      const Tensor& total) {
  check_tensor(grad, "grad", 3);
  const DeviceScope scope(grad);
  return spread(grad, slot, size, total);
}

Tensor unmerge(const Tensor& x, const Tensor& slot) {
  check_tensor(x, "x", 3);
  const DeviceScope scope(x);
  return spread(x, slot, std::nullopt, std::nullopt);
}

Tensor unmerge_backward(const Tensor& grad, const Tensor& slot, int64_t tokens) {
  check_tensor(grad, "grad", 3);
  const DeviceScope scope(grad);
  return gather(grad, slot, tokens, std::nullopt, nullptr);
}

}  // namespace tome
