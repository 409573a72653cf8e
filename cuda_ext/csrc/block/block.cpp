// A transformer block in one call. It launches what its parts launch, in the same order; what it saves is the
// host's work of asking for them one by one, which takes longer than the GPU's where there are few images.
#include "../ops.h"

namespace tome {
namespace {

struct Heads {
  Tensor q, k, v;  // [B, H, N, D]
};

Heads split_heads(const Tensor& qkv, int64_t heads) {
  TOME_CHECK(qkv.dim() == 3, "qkv must be [B, N, 3 * H * D]");
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2);
  TOME_CHECK(heads > 0 && width % (3 * heads) == 0, "qkv of ", width, " channels can't be split into 3 * ",
             heads, " heads");
  const int64_t dim = width / (3 * heads);
  const auto part = [&](int64_t i) {
    return view_of(qkv, {batch, heads, tokens, dim},
                   {qkv.stride(0), dim * qkv.stride(2), qkv.stride(1), qkv.stride(2)},
                   i * heads * dim * qkv.stride(2));
  };
  return {part(0), part(1), part(2)};
}

// What attention adds to the tokens, and the slot map where some of them merge.
struct Attended {
  Tensor branch;
  std::optional<Tensor> slot;
};

// A function of its own, so that qkv and the output of attention are free before the MLP needs memory.
Attended attend(const Tensor& normed, const std::optional<Tensor>& size, int64_t r, int64_t prefix,
                int64_t heads, double scale, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                const Tensor& proj_weight, const std::optional<Tensor>& proj_bias) {
  const Heads in = split_heads(linear(normed, qkv_weight, qkv_bias), heads);
  const int64_t batch = in.q.size(0), length = in.q.size(2), width = heads * in.q.size(3);
  std::optional<Tensor> slot;
  if (r > 0) slot = bipartite_match(in.k, r, prefix);
  const Tensor seen = attention(in.q, in.k, in.v, size, scale);
  const Tensor rows = view_of(seen, {batch, length, width}, {length * width, width, 1}, 0);
  return {linear(rows, proj_weight, proj_bias), slot};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> block(
    const Tensor& x, const Tensor& normed, const std::optional<Tensor>& size, int64_t r, int64_t prefix,
    bool is_weighted, int64_t heads, double scale, const Tensor& qkv_weight,
    const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias,
    const std::optional<Tensor>& gamma1, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, double norm_eps, ScalarType norm_dtype, const Tensor& fc1_weight,
    const std::optional<Tensor>& fc1_bias, bool is_tanh, const Tensor& fc2_weight,
    const std::optional<Tensor>& fc2_bias, const std::optional<Tensor>& gamma2,
    const std::optional<Tensor>& next_weight, const std::optional<Tensor>& next_bias, double next_eps,
    ScalarType next_dtype) {
  check_tensor(x, "x", 3);
  check_tensor(normed, "normed", 3);
  TOME_CHECK(r >= 0 && r < x.size(1), "r must be in [0, ", x.size(1), "), got ", r);
  const DeviceScope scope(x);
  const int64_t tokens = x.size(1) - r;
  const auto merged = [&] {
    const Attended attended = attend(normed, is_weighted ? size : std::nullopt, r, prefix, heads, scale,
                                     qkv_weight, qkv_bias, proj_weight, proj_bias);
    return merged_norm(x, attended.branch, attended.slot, tokens, size, norm_weight, norm_bias, norm_eps,
                       gamma1, norm_dtype, false);
  };
  const Normed middle = merged();
  const Tensor hidden = gelu(linear(middle.y, fc1_weight, fc1_bias), is_tanh);
  const Normed out = merged_norm(middle.merged, linear(hidden, fc2_weight, fc2_bias), std::nullopt, tokens,
                                 std::nullopt, next_weight, next_bias, next_eps, gamma2, next_dtype, false);
  return {out.merged, out.y,
          middle.total.has_value() ? *middle.total : new_empty(x, {0, tokens}, ScalarType::Float)};
}

}  // namespace tome
