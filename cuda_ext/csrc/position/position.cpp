// Host side of rotate, homes and pair_bias: checks, outputs, how much can be accessed at a time.
#include "position.h"

#include "../merge/host.h"
#include "../ops.h"

namespace tome {
namespace {

using position::Heads;
using position::HomesParams;
using position::RotateParams;

Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// A table of two to four dimensions; what it has one of is for all.
Heads table_of(const Tensor& table, const RotateParams& p) {
  const int64_t dims = table.dim();
  TOME_CHECK(dims >= 2 && dims <= 4, "the table must have 2 to 4 dimensions, got ", dims);
  TOME_CHECK(table.size(dims - 1) == 2 * int64_t{p.dim}, "the table must have ", 2 * int64_t{p.dim},
             " channels, got ", table.size(dims - 1));
  const auto stride_of = [&](int64_t from_last, int64_t length, bool is_alone, const char* name) -> int64_t {
    const int64_t at = dims - from_last;
    if (at < 0 || table.size(at) == 1) return 0;
    TOME_CHECK(table.size(at) == length && is_alone, "the table must be of 1 or all ", name, ", got ",
               table.size(at));
    return table.stride(at);
  };
  return {table.const_data_ptr(), stride_of(4, p.batch, true, "images"),
          stride_of(3, p.q_heads, p.q_heads == p.k_heads, "heads"), table.stride(dims - 2),
          table.stride(dims - 1)};
}

// Whether `count` channels of either half of a head can be accessed at a time.
bool takes(const Heads& heads, int64_t element_bytes, int64_t channels, int count) {
  return is_aligned(heads.data_ptr, element_bytes, heads.channel_stride, channels,
                    {heads.batch_stride, heads.head_stride, heads.row_stride},
                    std::min<int64_t>(kAccessBytes, count * element_bytes));
}

}  // namespace

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& table,
                                  const std::optional<Tensor>& home, int64_t prefix, bool is_half,
                                  bool is_back) {
  check_tensor(q, "q", 4);
  check_tensor(k, "k", 4);
  const Dtype dtype = floating_dtype(q, "q");
  check_like(k, "k", q, q.scalar_type());
  TOME_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3),
             "k must have the batch, tokens and head dimension of q");
  RotateParams p{};
  p.batch = q.size(0);
  p.q_heads = to_int(q.size(1), "the number of heads");
  p.k_heads = to_int(k.size(1), "the number of heads");
  p.tokens = to_int(q.size(2), "the number of tokens");
  p.dim = to_int(q.size(3), "the head dimension");
  TOME_CHECK(p.dim % 2 == 0, "the head dimension must be even, got ", p.dim);
  TOME_CHECK(prefix >= 0 && prefix <= p.tokens, "prefix must be in [0, ", p.tokens, "], got ", prefix);
  p.prefix = static_cast<int>(prefix);
  check_like(table, "the table", q, table.scalar_type());
  p.table_dtype = floating_dtype(table, "the table");
  p.table = table_of(table, p);
  p.rows = to_int(table.size(table.dim() - 2), "the number of places");
  if (!home.has_value()) {
    TOME_CHECK(p.rows == p.tokens - p.prefix, "the table must be of ", p.tokens - p.prefix, " places, got ",
               p.rows);
  } else if (home->scalar_type() == ScalarType::Int) {
    p.short_home = tome::table<int32_t>(*home, "home", q, ScalarType::Int, p.batch, p.tokens);
  } else {
    p.home = tome::table<int64_t>(*home, "home", q, ScalarType::Long, p.batch, p.tokens);
  }
  p.is_half = is_half;
  p.is_back = is_back;
  p.q = heads_of(q);
  p.k = heads_of(k);
  const DeviceScope scope(q);
  Tensor q_out = new_empty(q, {p.batch, p.tokens, p.q_heads, p.dim}, q.scalar_type());
  Tensor k_out = new_empty(q, {p.batch, p.tokens, p.k_heads, p.dim}, q.scalar_type());
  if (q_out.numel() + k_out.numel() == 0) return {q_out, k_out};
  p.q_out_ptr = q_out.mutable_data_ptr();
  p.k_out_ptr = k_out.mutable_data_ptr();
  const int64_t bytes = element_size(dtype);
  const auto fits = [&](int count) {
    const int64_t half = p.dim / 2;
    return half % count == 0 && takes(p.q, bytes, half, count) && takes(p.k, bytes, half, count) &&
           takes(p.table, element_size(p.table_dtype), half, count);
  };
  const int most = static_cast<int>(kAccessBytes / bytes);
  const int count = fits(most) ? most : fits(position::kFewChannels) ? position::kFewChannels : 1;
  const int64_t units = position::rotate_units(p, count);
  to_int(units, "what a launch has to do for an image");
  check_grid((units + position::kRotateThreads - 1) / position::kRotateThreads * p.batch);
  position::launch_rotate(p, dtype, count, current_stream(q));
  check_launch();
  return {q_out, k_out};
}

Tensor homes(const Tensor& slot, int64_t tokens, const std::optional<Tensor>& home,
             const std::optional<Tensor>& valid) {
  check_tensor(slot, "slot", 2);
  HomesParams p{};
  p.batch = slot.size(0);
  p.length = to_int(slot.size(1), "the number of tokens");
  p.tokens = to_int(tokens, "tokens");
  TOME_CHECK(p.tokens <= p.length, "tokens must be in [0, ", p.length, "], got ", tokens);
  p.slot = table<int32_t>(slot, "slot", slot, ScalarType::Int, p.batch, p.length);
  if (home.has_value()) {
    p.home = table<int64_t>(*home, "home", slot, ScalarType::Long, p.batch, p.length);
  }
  if (valid.has_value()) {
    p.valid = table<uint8_t>(*valid, "valid", slot, ScalarType::Bool, p.batch, p.length);
  }
  const DeviceScope scope(slot);
  Tensor out = new_empty(slot, {p.batch, tokens}, ScalarType::Long);
  p.out_ptr = static_cast<int64_t*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  check_grid(p.batch * ((tokens + position::kHomesOutputs - 1) / position::kHomesOutputs));
  position::launch_homes(p, current_stream(slot));
  check_launch();
  return out;
}

Tensor pair_bias(const Tensor& bias, const Tensor& home, const std::optional<Tensor>& key_bias) {
  check_tensor(bias, "bias", 3);
  const Dtype dtype = floating_dtype(bias, "bias");
  check_tensor(home, "home", 2);
  TOME_CHECK(bias.size(1) == bias.size(2), "bias must be [H, N, N]");
  position::PairParams p{};
  p.bias_ptr = bias.const_data_ptr();
  p.head_stride = bias.stride(0);
  p.row_stride = bias.stride(1);
  p.column_stride = bias.stride(2);
  p.batch = home.size(0);
  p.heads = to_int(bias.size(0), "the number of heads");
  p.places = to_int(bias.size(1), "the number of places");
  p.tokens = to_int(home.size(1), "the number of tokens");
  p.padded = (p.tokens + position::kPairMultiple - 1) / position::kPairMultiple * position::kPairMultiple;
  p.home = table<int64_t>(home, "home", bias, ScalarType::Long, p.batch, p.tokens);
  if (key_bias.has_value()) {
    p.key_bias = table<float>(*key_bias, "key_bias", bias, ScalarType::Float, p.batch, p.tokens);
  }
  const DeviceScope scope(bias);
  Tensor out = new_empty(bias, {p.batch, p.heads, p.tokens, p.padded}, bias.scalar_type());
  p.out_ptr = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  check_grid(position::pair_blocks(p) * p.batch);
  position::launch_pairs(p, dtype, current_stream(bias));
  check_launch();
  return out;
}

}  // namespace tome
