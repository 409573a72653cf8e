// Every operation of the library, host side. Shapes and dtypes are in binding.cpp's schemas and in ops.py.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "activation/gelu.h"
#include "stable.h"

#define TOME_STRING(...) #__VA_ARGS__
#define TOME_EXPAND(...) TOME_STRING(__VA_ARGS__)

namespace tome {

// On other builds a GPU of compute capability 9.0 runs code for older ones.
constexpr bool kHasHopper = std::string_view(TOME_EXPAND(TOME_ARCHS)).find("90a") != std::string_view::npos;
inline bool runs_hopper(int device) {
  return kHasHopper && device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;
}

Tensor bipartite_match(const Tensor& keys, int64_t r, int64_t prefix);
Tensor kth_match(const Tensor& keys, int64_t k, int64_t prefix);
Tensor listed_match(const Tensor& keys, const Tensor& sources, const Tensor& targets, int64_t r,
                    int64_t prefix);

std::tuple<Tensor, Tensor> merge(const Tensor& x, const Tensor& slot, int64_t tokens,
                                 const std::optional<Tensor>& size);
Tensor merge_backward(const Tensor& grad, const Tensor& slot, const std::optional<Tensor>& size,
                      const Tensor& total);
Tensor unmerge(const Tensor& x, const Tensor& slot);
Tensor unmerge_backward(const Tensor& grad, const Tensor& slot, int64_t tokens);
// Where several merges, first to last, take the tokens before them; and these tokens from x + gamma * branch.
Tensor follow(const std::vector<Tensor>& steps);
Tensor restore(const Tensor& x, const std::optional<Tensor>& branch, const std::vector<Tensor>& steps,
               const std::optional<Tensor>& gamma);
// Queries and keys turned by the places of their tokens, [B, N, H, D] for [B, H, N, D]; or their gradients.
std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& table,
                                  const std::optional<Tensor>& home, int64_t prefix, bool is_half,
                                  bool is_back);
// In whose place each token stands behind a merge.
Tensor homes(const Tensor& slot, int64_t tokens, const std::optional<Tensor>& home,
             const std::optional<Tensor>& valid);

// The bias [H, N, N] of pairs for tokens that stand in the places home [B, M], and one of each key:
// [B, H, M, M], each row filled up to a multiple of eight.
Tensor pair_bias(const Tensor& bias, const Tensor& home, const std::optional<Tensor>& key_bias);

// gelu of a schema: 0 by erf, 1 by tanh, 2 quick.
using activation::GeluKind;
GeluKind gelu_kind(int64_t gelu);
// Of tokens [B, N, C]. in_place: x is its caller's own, and may be what is returned.
Tensor gelu(const Tensor& x, GeluKind kind, bool in_place);
Tensor quick_gelu(const Tensor& x);
Tensor swiglu(const Tensor& gate, const Tensor& x);
// The norm of its first `width` channels, and zeros behind them.
Tensor swiglu_norm(const Tensor& gate, const Tensor& x, int64_t width, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps);
// x weight^T + bias of [B, N, K]: by a product of ours where it takes less time than PyTorch's.
Tensor linear_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
// gelu(x weight^T + bias) of [B, N, K]. tile: -1, or for tests and benchmarks a number of
// product/product.cpp.
Tensor linear_with_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        GeluKind kind, int64_t tile);
Tensor linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool is_tanh,
                   int64_t tile);

// x merged, its norm, totals where there is a slot map, and for training mean and 1 / standard deviation of
// every row. Without a branch only the norm of x, and merged is empty.
struct Normed {
  Tensor merged, y;
  std::optional<Tensor> total, stats;
};
Normed merged_norm(const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& slot,
                   int64_t tokens, const std::optional<Tensor>& size, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& gamma,
                   ScalarType norm_dtype, bool training);
// The same as an operator returns it: empty tensors for what there is none of.
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm(
    const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& slot, int64_t tokens,
    const std::optional<Tensor>& size, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, const std::optional<Tensor>& gamma, ScalarType norm_dtype, bool training);
// [B, Nq, H, D] for q [B, H, Nq, D].
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& size,
                 double scale);
// The same, and for the way back float32 [B, H, Nq], the log-sum-exp of every row.
std::tuple<Tensor, Tensor> attention_training(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const std::optional<Tensor>& size, double scale);
// Of out [B, H, Nq, D] and its gradient: those of q, [B, Nq, H D], and of k and v, [B, N, 2 H D]; where Nq is
// N all three, [B, N, 3 H D], and the first is empty.
std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& out, const Tensor& lse,
                                              const std::optional<Tensor>& size, double scale);
// The halves of a block, inference only. x merged, its norm, and what there is of new sizes and a new slot
// map: empty where nothing merged, the map also where it was given.
std::tuple<Tensor, Tensor, Tensor, Tensor> attend_half(
    const Tensor& x, const std::vector<Tensor>& qkv, int64_t heads, const std::optional<Tensor>& size,
    const std::optional<Tensor>& slot, int64_t tokens, int64_t prefix, bool is_weighted, double scale,
    const std::optional<Tensor>& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight,
    const std::optional<Tensor>& proj_bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
    ScalarType norm_dtype);
// x with the MLP's output added, and its norm. gelu: 0 by erf, 1 by tanh, 2 quick.
std::tuple<Tensor, Tensor> mlp_half(const Tensor& x, const Tensor& y, const Tensor& fc1_weight,
                                    const std::optional<Tensor>& fc1_bias, int64_t gelu,
                                    const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias,
                                    const std::optional<Tensor>& gamma,
                                    const std::optional<Tensor>& norm_weight,
                                    const std::optional<Tensor>& norm_bias, double eps,
                                    ScalarType norm_dtype);
// The gradients of x and branch; the second is empty where it equals the first.
std::tuple<Tensor, Tensor> merge_add_norm_backward(
    const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y, const Tensor& merged,
    const Tensor& stats, const std::optional<Tensor>& slot, const std::optional<Tensor>& size,
    const std::optional<Tensor>& total, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& gamma, int64_t length, ScalarType branch_dtype);
// [2, C]: sums over rows of a, and of a * b or a * (b - mean) / standard deviation.
Tensor column_sums(const Tensor& a, const Tensor& b, const std::optional<Tensor>& stats);

// From the gradient of gelu(x) to that of x.
Tensor gelu_backward(const Tensor& grad, const Tensor& x, GeluKind kind);

// The halves in training: what attend_half and mlp_half return, and behind it what the way back reads.
// Undefined tensors stand for what there is none of. Linear layers compute in `dtype`; `cast` holds the
// parameters that have another one. drop [B]: what each image's branch is multiplied by. keeps_branch: gamma
// wants a gradient.
//   merged, y, total, slot, stats, packed, seen, lse, cast, branch
using AttendForward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
AttendForward attend_half_training(const Tensor& x, const Tensor& q, const std::optional<Tensor>& k,
                                   const std::optional<Tensor>& v, const std::optional<Tensor>& qkv_weight,
                                   const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight,
                                   const std::optional<Tensor>& proj_bias, const std::optional<Tensor>& gamma,
                                   const std::optional<Tensor>& norm_weight,
                                   const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& size,
                                   const std::optional<Tensor>& slot, const std::optional<Tensor>& drop,
                                   int64_t heads, int64_t tokens, int64_t prefix, bool is_weighted,
                                   double scale, double eps, ScalarType norm_dtype, ScalarType dtype,
                                   bool keeps_branch);
//   merged, y, stats, hidden, active, cast, branch
using MlpForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
MlpForward mlp_half_training(const Tensor& x, const Tensor& y, const Tensor& fc1_weight,
                             const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight,
                             const std::optional<Tensor>& fc2_bias, const std::optional<Tensor>& gamma,
                             const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                             const std::optional<Tensor>& drop, int64_t gelu, double eps,
                             ScalarType norm_dtype, ScalarType dtype, bool keeps_branch);
// The gradients of x, of q (as packed, or of the y that it was projected from), of the two weights, and one
// behind the other float32 of norm bias and weight, gamma, the second and the first layer's bias. wanted: a
// bit for each of the first layer's weight and bias, the second's, gamma, norm weight and bias. A weight that
// was cast is not given again.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients attend_half_backward(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y,
                               const Tensor& merged, const Tensor& stats, const std::optional<Tensor>& slot,
                               const std::optional<Tensor>& size, const std::optional<Tensor>& total,
                               const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& gamma,
                               const std::optional<Tensor>& branch, const std::optional<Tensor>& drop,
                               const std::optional<Tensor>& cast, const std::optional<Tensor>& qkv_weight,
                               const std::optional<Tensor>& proj_weight, const std::optional<Tensor>& y,
                               const Tensor& q, const std::optional<Tensor>& k,
                               const std::optional<Tensor>& v, const Tensor& seen, const Tensor& lse,
                               int64_t heads, int64_t length, bool is_weighted, double scale, int64_t wanted);
Gradients mlp_half_backward(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y,
                            const Tensor& merged, const Tensor& stats,
                            const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& gamma,
                            const std::optional<Tensor>& branch, const std::optional<Tensor>& drop,
                            const std::optional<Tensor>& cast, const std::optional<Tensor>& fc1_weight,
                            const std::optional<Tensor>& fc2_weight, const Tensor& y, const Tensor& hidden,
                            const Tensor& active, int64_t gelu, int64_t wanted);

}  // namespace tome
