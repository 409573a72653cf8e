// The two halves of a block in training, each in one call each way. What they compute is what halves.cpp
// does; on top of it they keep what the way back reads, cast parameters themselves, all of a half by one
// launch, and multiply past torch's dispatcher: with many images on the GPU it is still the host that a step
// waits for.
#include <array>
#include <vector>

#include "../matmul.h"
#include "../norm/columns_host.h"
#include "../ops.h"
#include "cast.h"
#include "heads.h"

namespace tome {
namespace {

// Bits of `wanted`.
enum Wanted { kFirstWeight, kFirstBias, kSecondWeight, kSecondBias, kGamma, kNormWeight, kNormBias };

bool wants(int64_t wanted, Wanted what) { return wanted >> what & 1; }

constexpr int64_t kCastStep = 64;  // elements; where each parameter starts, for products that read 16 bytes

int64_t padded(int64_t count) { return (count + kCastStep - 1) / kCastStep * kCastStep; }

Tensor like(const Tensor& shape, const Tensor& memory, int64_t offset) {
  if (shape.dim() == 1) return view_of(memory, {shape.size(0)}, {1}, offset);
  return view_of(memory, {shape.size(0), shape.size(1)}, {shape.size(1), 1}, offset);
}

// Two linear layers as they are computed with.
struct Layers {
  Tensor first_weight, second_weight, cast;
  std::optional<Tensor> first_bias, second_bias;
};

// What has another dtype is cast into one tensor: weights first, which `weight_of` finds there again.
Layers layers_of(const std::optional<Tensor>& first_weight, const Tensor& second_weight,
                 const std::optional<Tensor>& first_bias, const std::optional<Tensor>& second_bias,
                 ScalarType dtype) {
  std::array<std::optional<Tensor>, 4> given{first_weight, second_weight, first_bias, second_bias};
  halves::CastParams p{};
  bool aligned = true;
  int64_t total = 0;
  for (std::optional<Tensor>& tensor : given) {
    if (!tensor.has_value() || tensor->scalar_type() == dtype) continue;
    TOME_CHECK(tensor->is_cuda() && (tensor->dim() == 1 || tensor->dim() == 2),
               "parameters must be vectors and matrices on the GPU");
    if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
    const Dtype from = floating_dtype(*tensor, "a parameter");
    const int64_t count = tensor->numel();
    p.jobs[p.count++] = {tensor->const_data_ptr(), count, total, from};
    aligned &= count % halves::kCastPack == 0 &&
               is_aligned(tensor->const_data_ptr(), element_size(from), 1, halves::kCastPack, {});
    total += padded(count);
  }
  Layers made;
  if (p.count > 0) {
    made.cast = new_empty(second_weight, {total}, dtype);
    p.dtype = floating_dtype(made.cast, "the cast");
    p.out_ptr = made.cast.mutable_data_ptr();
    halves::launch_cast(p, aligned, current_stream(second_weight));
    check_launch();
    int job = 0;
    for (std::optional<Tensor>& tensor : given) {
      if (tensor.has_value() && tensor->scalar_type() != dtype) {
        tensor = like(*tensor, made.cast, p.jobs[job++].offset);
      }
    }
  }
  if (given[0].has_value()) made.first_weight = *given[0];
  made.second_weight = *given[1];
  made.first_bias = given[2];
  made.second_bias = given[3];
  return made;
}

// A weight that was not cast, or from where it lies among those that were.
struct Weights {
  const std::optional<Tensor>& cast;
  int64_t used = 0;

  Tensor next(const std::optional<Tensor>& weight, int64_t outputs, int64_t inputs) {
    if (weight.has_value()) return *weight;
    TOME_CHECK(cast.has_value() && cast->numel() >= used + outputs * inputs, "a weight is missing");
    const int64_t at = used;
    used += padded(outputs * inputs);
    return view_of(*cast, {outputs, inputs}, {inputs, 1}, at);
  }
};

Tensor as(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// A branch times what each image has of it.
Tensor dropped(const Tensor& branch, const std::optional<Tensor>& drop) {
  if (!drop.has_value()) return branch;
  using torch::stable::detail::from;
  check_tensor(*drop, "drop", 1);
  const Tensor each = as(*drop, branch.scalar_type());
  const Tensor factor = view_of(each, {each.size(0), 1, 1}, {each.stride(0), 1, 1}, 0);
  return call<2>("aten::mul", "Tensor", {from(branch), from(factor)});
}

Tensor kept(const Tensor& tensor, bool is_kept) { return is_kept ? tensor : Tensor(); }

Tensor total_of(const Normed& out) { return out.total.has_value() ? *out.total : Tensor(); }

// Behind a branch: the gradients of x and of the branch, and the sums of those of norm and gamma.
struct Behind {
  Tensor x, branch;
};

Behind behind(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y, const Tensor& merged,
              const Tensor& stats, const std::optional<Tensor>& slot, const std::optional<Tensor>& size,
              const std::optional<Tensor>& total, const std::optional<Tensor>& norm_weight,
              const std::optional<Tensor>& gamma, const std::optional<Tensor>& branch,
              const std::optional<Tensor>& drop, int64_t length, ScalarType dtype, int64_t wanted,
              ColumnSums& sums) {
  const auto [x, other] = merge_add_norm_backward(grad_x, grad_y, merged, stats, slot, size, total,
                                                  norm_weight, gamma, length, dtype);
  const bool is_same = !gamma.has_value() && dtype == merged.scalar_type();
  if (grad_y.has_value()) {
    sums.add(*grad_y, merged, stats, wants(wanted, kNormBias), wants(wanted, kNormWeight));
  }
  if (wants(wanted, kGamma)) sums.add(x, branch, std::nullopt, false, true);
  return {x, dropped(is_same ? x : other, drop)};
}

// The gradient of a weight: float32 for one that was cast.
Tensor weight_grad_if(bool is_wanted, const Tensor& grad, const Tensor& x,
                      const std::optional<Tensor>& weight) {
  if (!is_wanted) return Tensor();
  return weight_grad(grad, x, weight.has_value() ? grad.scalar_type() : ScalarType::Float);
}

}  // namespace

AttendForward attend_half_training(const Tensor& x, const Tensor& q, const std::optional<Tensor>& k,
                                   const std::optional<Tensor>& v, const std::optional<Tensor>& qkv_weight,
                                   const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight,
                                   const std::optional<Tensor>& proj_bias, const std::optional<Tensor>& gamma,
                                   const std::optional<Tensor>& norm_weight,
                                   const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& size,
                                   const std::optional<Tensor>& slot, const std::optional<Tensor>& drop,
                                   int64_t heads, int64_t tokens, int64_t prefix, bool is_weighted,
                                   double scale, double eps, ScalarType norm_dtype, ScalarType dtype,
                                   bool keeps_branch) {
  check_tensor(x, "x", 3);
  const bool is_given = k.has_value() && v.has_value();
  TOME_CHECK(!is_given || !qkv_weight.has_value(), "q, k and v are projected already");
  const DeviceScope scope(x);
  const int64_t batch = x.size(0), length = x.size(1);
  const Layers layers = layers_of(qkv_weight, proj_weight, qkv_bias, proj_bias, dtype);
  Tensor packed;
  if (qkv_weight.has_value()) packed = linear_of(as(q, dtype), layers.first_weight, layers.first_bias);
  const Heads in = is_given ? Heads{q, *k, *v} : split_heads(qkv_weight.has_value() ? packed : q, heads);
  const auto [seen, lse] = attention_training(in.q, in.k, in.v, is_weighted ? size : std::nullopt, scale);
  std::optional<Tensor> map = slot;
  if (!map.has_value() && tokens < length) map = bipartite_match(in.k, length - tokens, prefix);
  const int64_t width = heads * in.q.size(3);
  const Tensor rows = as(view_of(seen, {batch, length, width}, {length * width, width, 1}, 0), dtype);
  const Tensor branch = dropped(linear_of(rows, layers.second_weight, layers.second_bias), drop);
  const Normed out =
      merged_norm(x, branch, map, tokens, size, norm_weight, norm_bias, eps, gamma, norm_dtype, true);
  const bool is_new = map.has_value() && !slot.has_value();
  return {out.merged, out.y, total_of(out), is_new ? *map : Tensor(),  *out.stats, packed,
          seen,       lse,   layers.cast,   kept(branch, keeps_branch)};
}

Gradients attend_half_backward(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y,
                               const Tensor& merged, const Tensor& stats, const std::optional<Tensor>& slot,
                               const std::optional<Tensor>& size, const std::optional<Tensor>& total,
                               const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& gamma,
                               const std::optional<Tensor>& branch, const std::optional<Tensor>& drop,
                               const std::optional<Tensor>& cast, const std::optional<Tensor>& qkv_weight,
                               const std::optional<Tensor>& proj_weight, const std::optional<Tensor>& y,
                               const Tensor& q, const std::optional<Tensor>& k,
                               const std::optional<Tensor>& v, const Tensor& seen, const Tensor& lse,
                               int64_t heads, int64_t length, bool is_weighted, double scale,
                               int64_t wanted) {
  check_tensor(merged, "merged", 3);
  check_tensor(seen, "seen", 4);
  const DeviceScope scope(merged);
  const int64_t batch = seen.size(0), dim = seen.size(3), width = heads * dim;
  Weights weights{cast};
  ColumnSums sums;
  Tensor first_weight;
  if (y.has_value()) first_weight = weights.next(qkv_weight, 3 * width, y->size(2));
  const Tensor second_weight = weights.next(proj_weight, merged.size(2), width);
  const ScalarType dtype = second_weight.scalar_type();
  const Behind grads = behind(grad_x, grad_y, merged, stats, slot, size, total, norm_weight, gamma, branch,
                              drop, length, dtype, wanted, sums);
  const Tensor rows = as(view_of(seen, {batch, length, width}, {length * width, width, 1}, 0), dtype);
  sums.add(grads.branch, std::nullopt, std::nullopt, wants(wanted, kSecondBias), false);
  const Tensor of_proj = weight_grad_if(wants(wanted, kSecondWeight), grads.branch, rows, proj_weight);
  const Tensor grad = as(linear_grad(grads.branch, second_weight), seen.scalar_type());
  const auto by_heads = [&](const Tensor& tokens) {
    return view_of(tokens, {batch, heads, length, dim}, {length * width, dim, width, 1}, 0);
  };
  const Heads in = k.has_value() && v.has_value() ? Heads{q, *k, *v} : split_heads(q, heads);
  const Tensor packed = std::get<1>(attention_backward(by_heads(grad), in.q, in.k, in.v, by_heads(seen), lse,
                                                       is_weighted ? size : std::nullopt, scale));
  if (!y.has_value()) return {grads.x, packed, Tensor(), of_proj, sums.run()};
  sums.add(packed, std::nullopt, std::nullopt, wants(wanted, kFirstBias), false);
  const Tensor of_qkv = weight_grad_if(wants(wanted, kFirstWeight), packed, as(*y, dtype), qkv_weight);
  return {grads.x, linear_grad(packed, first_weight), of_qkv, of_proj, sums.run()};
}

MlpForward mlp_half_training(const Tensor& x, const Tensor& y, const Tensor& fc1_weight,
                             const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight,
                             const std::optional<Tensor>& fc2_bias, const std::optional<Tensor>& gamma,
                             const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                             const std::optional<Tensor>& drop, int64_t gelu_code, double eps,
                             ScalarType norm_dtype, ScalarType dtype, bool keeps_branch) {
  check_tensor(x, "x", 3);
  check_tensor(y, "y", 3);
  const GeluKind kind = gelu_kind(gelu_code);
  const DeviceScope scope(x);
  const Layers layers = layers_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, dtype);
  const Tensor hidden = linear_of(as(y, dtype), layers.first_weight, layers.first_bias);
  const Tensor active = gelu(hidden, kind, false);
  const Tensor branch = dropped(linear_of(active, layers.second_weight, layers.second_bias), drop);
  const Normed out = merged_norm(x, branch, std::nullopt, x.size(1), std::nullopt, norm_weight, norm_bias,
                                 eps, gamma, norm_dtype, true);
  return {out.merged, out.y, *out.stats, hidden, active, layers.cast, kept(branch, keeps_branch)};
}

Gradients mlp_half_backward(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y,
                            const Tensor& merged, const Tensor& stats,
                            const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& gamma,
                            const std::optional<Tensor>& branch, const std::optional<Tensor>& drop,
                            const std::optional<Tensor>& cast, const std::optional<Tensor>& fc1_weight,
                            const std::optional<Tensor>& fc2_weight, const Tensor& y, const Tensor& hidden,
                            const Tensor& active, int64_t gelu_code, int64_t wanted) {
  check_tensor(merged, "merged", 3);
  check_tensor(hidden, "hidden", 3);
  check_tensor(y, "y", 3);
  const GeluKind kind = gelu_kind(gelu_code);
  const DeviceScope scope(merged);
  const ScalarType dtype = hidden.scalar_type();
  Weights weights{cast};
  ColumnSums sums;
  const Tensor first_weight = weights.next(fc1_weight, hidden.size(2), y.size(2));
  const Tensor second_weight = weights.next(fc2_weight, merged.size(2), hidden.size(2));
  const Behind grads = behind(grad_x, grad_y, merged, stats, std::nullopt, std::nullopt, std::nullopt,
                              norm_weight, gamma, branch, drop, merged.size(1), dtype, wanted, sums);
  sums.add(grads.branch, std::nullopt, std::nullopt, wants(wanted, kSecondBias), false);
  const Tensor of_fc2 = weight_grad_if(wants(wanted, kSecondWeight), grads.branch, active, fc2_weight);
  const Tensor grad = gelu_backward(linear_grad(grads.branch, second_weight), hidden, kind);
  sums.add(grad, std::nullopt, std::nullopt, wants(wanted, kFirstBias), false);
  const Tensor of_fc1 = weight_grad_if(wants(wanted, kFirstWeight), grad, as(y, dtype), fc1_weight);
  return {grads.x, linear_grad(grad, first_weight), of_fc1, of_fc2, sums.run()};
}

}  // namespace tome
