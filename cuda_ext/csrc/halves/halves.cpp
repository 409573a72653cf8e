// The two halves of a transformer block, each in one call: from queries, keys and values to the normed input
// of the MLP, and from there to the normed input of the next block. What their parts launch in the same
// order, but for a GELU inside or right behind its product; what they save is the host's work of asking for
// them one by one, which takes longer than the GPU's where there are few images.
#include <vector>

#include "../matmul.h"
#include "../ops.h"
#include "heads.h"

namespace tome {

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

namespace {

// Three tensors as they are, or one that holds all three, or with a weight what they are projected from.
Heads heads_of(const std::vector<Tensor>& qkv, int64_t heads, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias) {
  if (qkv.size() == 3) {
    TOME_CHECK(!weight.has_value(), "q, k and v are projected already");
    check_tensor(qkv[0], "q", 4);
    TOME_CHECK(qkv[0].size(1) == heads, "q must have ", heads, " heads, got ", qkv[0].size(1));
    return {qkv[0], qkv[1], qkv[2]};
  }
  TOME_CHECK(qkv.size() == 1, "qkv must be one tensor or three, got ", qkv.size());
  return split_heads(weight.has_value() ? linear_product(qkv[0], *weight, bias) : qkv[0], heads);
}

// What attention adds to the tokens, and the slot map where some of them merge.
struct Attended {
  Tensor branch;
  std::optional<Tensor> slot;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_half(
    const Tensor& x, const std::vector<Tensor>& qkv, int64_t heads, const std::optional<Tensor>& size,
    const std::optional<Tensor>& slot, int64_t tokens, int64_t prefix, bool is_weighted, double scale,
    const std::optional<Tensor>& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight,
    const std::optional<Tensor>& proj_bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
    ScalarType norm_dtype) {
  check_tensor(x, "x", 3);
  const int64_t length = x.size(1);
  const DeviceScope scope(x);
  // A function of its own, so that qkv and the output of attention are free before what follows needs memory.
  const auto attend = [&]() -> Attended {
    const Heads in = heads_of(qkv, heads, qkv_weight, qkv_bias);
    std::optional<Tensor> map = slot;
    if (!map.has_value() && tokens < length) map = bipartite_match(in.k, length - tokens, prefix);
    const Tensor seen = attention(in.q, in.k, in.v, is_weighted ? size : std::nullopt, scale);
    const int64_t width = heads * in.q.size(3), queries = in.q.size(2);
    const Tensor rows = view_of(seen, {in.q.size(0), queries, width}, {queries * width, width, 1}, 0);
    return {linear_product(rows, proj_weight, proj_bias), map};
  };
  const Attended attended = attend();
  TOME_CHECK(attended.branch.size(1) == length, "qkv must have the tokens of x");
  const Normed out = merged_norm(x, attended.branch, attended.slot, tokens, size, norm_weight, norm_bias, eps,
                                 gamma, norm_dtype, false);
  const bool is_new = attended.slot.has_value() && !slot.has_value();
  return {out.merged, out.y,
          out.total.has_value() ? *out.total : new_empty(x, {0, tokens}, ScalarType::Float),
          is_new ? *attended.slot : new_empty(x, {0, length}, ScalarType::Int)};
}

std::tuple<Tensor, Tensor> mlp_half(const Tensor& x, const Tensor& y, const Tensor& fc1_weight,
                                    const std::optional<Tensor>& fc1_bias, int64_t gelu_code,
                                    const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias,
                                    const std::optional<Tensor>& gamma,
                                    const std::optional<Tensor>& norm_weight,
                                    const std::optional<Tensor>& norm_bias, double eps,
                                    ScalarType norm_dtype) {
  check_tensor(x, "x", 3);
  check_tensor(y, "y", 3);
  TOME_CHECK(y.size(1) == x.size(1), "y must have the tokens of x");
  const GeluKind kind = gelu_kind(gelu_code);
  const DeviceScope scope(x);
  const auto branch = [&] {  // whose wide input is free before the norm needs memory
    return linear(linear_with_gelu(y, fc1_weight, fc1_bias, kind, -1), fc2_weight, fc2_bias);
  };
  const Normed out = merged_norm(x, branch(), std::nullopt, x.size(1), std::nullopt, norm_weight, norm_bias,
                                 eps, gamma, norm_dtype, false);
  return {out.merged, out.y};
}

}  // namespace tome
