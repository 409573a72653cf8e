// Host side of merging and unmerging: checks, shapes, outputs, launches.
#include "merge.h"

#include <limits>

#include "../ops.h"

namespace tome {
namespace {

using merge_ops::GatherParams;
using merge_ops::SpreadParams;
using merge_ops::Table;
using merge_ops::View;

View view(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

View mutable_view(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
Table<T> table(const Tensor& tensor, const char* name, const Tensor& like, ScalarType dtype, int64_t batch,
               int64_t length) {
  check_like(tensor, name, like, dtype);
  TOME_CHECK(tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == length, name, " must be [",
             batch, ", ", length, "]");
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

int to_int(int64_t value, const char* name) {
  TOME_CHECK(value >= 0 && value <= std::numeric_limits<int>::max() / 8, name, " is out of range: ", value);
  return static_cast<int>(value);
}

bool is_aligned_view(const View& x, const View& out, Dtype dtype, int64_t channels) {
  const int64_t bytes = element_size(dtype);
  return is_aligned(x.data_ptr, bytes, x.channel_stride, channels, {x.batch_stride, x.row_stride}) &&
         is_aligned(out.data_ptr, bytes, out.channel_stride, channels, {out.batch_stride, out.row_stride});
}

// Few rows: small blocks, so that a single image still reaches many multiprocessors. Many rows: large blocks,
// so that the scan of the slots is shared by more of them.
int block_outputs(int64_t rows) {
  constexpr int64_t kManyRows = 8192;
  return rows < kManyRows ? 8 : merge_ops::kMaxBlockOutputs;
}

void check_grid(int64_t blocks) {
  TOME_CHECK(blocks <= std::numeric_limits<int>::max(), "too many rows for one launch: ", blocks, " blocks");
}

Tensor gather(const Tensor& x, const Tensor& slot, int64_t tokens, const std::optional<Tensor>& size,
              float* total_ptr) {
  const Dtype dtype = floating_dtype(x, "x");
  const int64_t batch = x.size(0);
  Tensor out = new_empty(x, {batch, tokens, x.size(2)}, x.scalar_type());
  GatherParams p{};
  p.x = view(x);
  p.out = mutable_view(out);
  p.total_ptr = total_ptr;
  p.slot = table<int32_t>(slot, "slot", x, ScalarType::Int, batch, x.size(1));
  if (size.has_value()) p.size = table<float>(*size, "size", x, ScalarType::Float, batch, x.size(1));
  p.batch = batch;
  p.length = to_int(x.size(1), "the number of tokens");
  p.tokens = to_int(tokens, "tokens");
  p.channels = to_int(x.size(2), "the number of channels");
  p.block_outputs = block_outputs(batch * tokens);
  // Without channels there are still sizes to sum.
  if (batch == 0 || tokens == 0 || (p.channels == 0 && total_ptr == nullptr)) return out;
  check_grid((tokens + p.block_outputs - 1) / p.block_outputs * batch);
  merge_ops::launch_gather(p, dtype, is_aligned_view(p.x, p.out, dtype, p.channels), current_stream(x));
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
  merge_ops::launch_spread(p, dtype, is_aligned_view(p.x, p.out, dtype, p.channels), current_stream(x));
  check_launch();
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> merge(const Tensor& x, const Tensor& slot, int64_t tokens,
                                 const std::optional<Tensor>& size) {
  check_tensor(x, "x", 3);
  TOME_CHECK(tokens >= (x.size(1) > 0 ? 1 : 0) && tokens <= x.size(1), "tokens must be in [1, ", x.size(1),
             "], got ", tokens);
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
