// Every schema, and the kernels that implement it. Fakes and autograd: tome_cuda/registration.py.
#include <sstream>
#include <string>

#include "attention/attention.h"
#include "match/match.h"
#include "ops.h"
#include "product/product.h"
#include "restore/restore.h"

#ifndef TOME_ARCHS
#error "TOME_ARCHS names the architectures of this build"
#endif

STABLE_TORCH_LIBRARY(tome_cuda, m) {
  m.def("bipartite_match(Tensor keys, SymInt r, SymInt prefix) -> Tensor");
  m.def("kth_match(Tensor keys, SymInt k, SymInt prefix) -> Tensor");
  m.def("listed_match(Tensor keys, Tensor sources, Tensor targets, SymInt r, SymInt prefix) -> Tensor");
  m.def("merge(Tensor x, Tensor slot, SymInt tokens, Tensor? size) -> (Tensor, Tensor)");
  m.def("merge_backward(Tensor grad, Tensor slot, Tensor? size, Tensor total) -> Tensor");
  m.def("unmerge(Tensor x, Tensor slot) -> Tensor");
  m.def("unmerge_backward(Tensor grad, Tensor slot, SymInt tokens) -> Tensor");
  m.def("follow(Tensor[] steps) -> Tensor");
  m.def("restore(Tensor x, Tensor? branch, Tensor[] steps, Tensor? gamma) -> Tensor");
  m.def(
      "rotate(Tensor q, Tensor k, Tensor table, Tensor? home, SymInt prefix, bool is_half, bool is_back) -> "
      "(Tensor, Tensor)");
  m.def("homes(Tensor slot, SymInt tokens, Tensor? home, Tensor? valid) -> Tensor");
  m.def("pair_bias(Tensor bias, Tensor home, Tensor? key_bias) -> Tensor");
  m.def("quick_gelu(Tensor x) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor x) -> Tensor");
  m.def("linear_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool is_tanh, int tile) -> Tensor");
  m.def(
      "swiglu_norm(Tensor gate, Tensor x, SymInt width, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "merge_add_norm(Tensor x, Tensor? branch, Tensor? slot, SymInt tokens, Tensor? size, Tensor? weight, "
      "Tensor? bias, float eps, Tensor? gamma, ScalarType norm_dtype, bool training) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? size, float scale) -> Tensor");
  m.def("attention_training(Tensor q, Tensor k, Tensor v, Tensor? size, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? size, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "attend_half(Tensor x, Tensor[] qkv, int heads, Tensor? size, Tensor? slot, SymInt tokens, SymInt "
      "prefix, "
      "bool is_weighted, float scale, Tensor? qkv_weight, Tensor? qkv_bias, Tensor proj_weight, "
      "Tensor? proj_bias, Tensor? gamma, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "ScalarType norm_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_half(Tensor x, Tensor y, Tensor fc1_weight, Tensor? fc1_bias, int gelu, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor? gamma, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "ScalarType norm_dtype) -> (Tensor, Tensor)");
  m.def(
      "merge_add_norm_backward(Tensor? grad_x, Tensor? grad_y, Tensor merged, Tensor stats, Tensor? slot, "
      "Tensor? size, Tensor? total, Tensor? weight, Tensor? gamma, SymInt length, ScalarType branch_dtype)"
      " -> (Tensor, Tensor)");
  m.def(
      "attend_half_training(Tensor x, Tensor q, Tensor? k, Tensor? v, Tensor? qkv_weight, Tensor? qkv_bias, "
      "Tensor proj_weight, Tensor? proj_bias, Tensor? gamma, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? size, Tensor? slot, Tensor? drop, int heads, SymInt tokens, SymInt prefix, bool is_weighted, "
      "float scale, float eps, ScalarType norm_dtype, ScalarType dtype, bool keeps_branch) -> (Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attend_half_backward(Tensor? grad_x, Tensor? grad_y, Tensor merged, Tensor stats, Tensor? slot, "
      "Tensor? size, Tensor? total, Tensor? norm_weight, Tensor? gamma, Tensor? branch, Tensor? drop, "
      "Tensor? cast, Tensor? qkv_weight, Tensor? proj_weight, Tensor? y, Tensor q, Tensor? k, Tensor? v, "
      "Tensor seen, Tensor lse, int heads, SymInt length, bool is_weighted, float scale, int wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_half_training(Tensor x, Tensor y, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor? gamma, Tensor? norm_weight, Tensor? norm_bias, Tensor? drop, int gelu, "
      "float eps, ScalarType norm_dtype, ScalarType dtype, bool keeps_branch) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_half_backward(Tensor? grad_x, Tensor? grad_y, Tensor merged, Tensor stats, Tensor? norm_weight, "
      "Tensor? gamma, Tensor? branch, Tensor? drop, Tensor? cast, Tensor? fc1_weight, Tensor? fc2_weight, "
      "Tensor y, Tensor hidden, Tensor active, int gelu, int wanted) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def("column_sums(Tensor a, Tensor b, Tensor? stats) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tome_cuda, CUDA, m) {
  m.impl("bipartite_match", TORCH_BOX(&tome::bipartite_match));
  m.impl("kth_match", TORCH_BOX(&tome::kth_match));
  m.impl("listed_match", TORCH_BOX(&tome::listed_match));
  m.impl("merge", TORCH_BOX(&tome::merge));
  m.impl("merge_backward", TORCH_BOX(&tome::merge_backward));
  m.impl("unmerge", TORCH_BOX(&tome::unmerge));
  m.impl("unmerge_backward", TORCH_BOX(&tome::unmerge_backward));
  m.impl("follow", TORCH_BOX(&tome::follow));
  m.impl("restore", TORCH_BOX(&tome::restore));
  m.impl("rotate", TORCH_BOX(&tome::rotate));
  m.impl("homes", TORCH_BOX(&tome::homes));
  m.impl("pair_bias", TORCH_BOX(&tome::pair_bias));
  m.impl("quick_gelu", TORCH_BOX(&tome::quick_gelu));
  m.impl("swiglu", TORCH_BOX(&tome::swiglu));
  m.impl("swiglu_norm", TORCH_BOX(&tome::swiglu_norm));
  m.impl("linear_product", TORCH_BOX(&tome::linear_product));
  m.impl("linear_gelu", TORCH_BOX(&tome::linear_gelu));
  m.impl("merge_add_norm", TORCH_BOX(&tome::merge_add_norm));
  m.impl("attention", TORCH_BOX(&tome::attention));
  m.impl("attention_training", TORCH_BOX(&tome::attention_training));
  m.impl("attention_backward", TORCH_BOX(&tome::attention_backward));
  m.impl("attend_half", TORCH_BOX(&tome::attend_half));
  m.impl("mlp_half", TORCH_BOX(&tome::mlp_half));
  m.impl("merge_add_norm_backward", TORCH_BOX(&tome::merge_add_norm_backward));
  m.impl("attend_half_training", TORCH_BOX(&tome::attend_half_training));
  m.impl("attend_half_backward", TORCH_BOX(&tome::attend_half_backward));
  m.impl("mlp_half_training", TORCH_BOX(&tome::mlp_half_training));
  m.impl("mlp_half_backward", TORCH_BOX(&tome::mlp_half_backward));
  m.impl("column_sums", TORCH_BOX(&tome::column_sums));
}

namespace {

// What the Python side must know of the kernels too: here is where both have it from.
std::string build_info() {
  std::ostringstream json;
  json << "{\"torch\": \"2.11\", \"cuda\": \"" TOME_EXPAND(TOME_CUDA_VERSION) "\", \"cutlass\": \""
       << TOME_EXPAND(TOME_CUTLASS_VERSION) "\", \"archs\": \"" TOME_EXPAND(
              TOME_ARCHS) "\", \"head_dims\": [";
  for (const int head_dim : tome::attention_ops::kHeadDims) {
    json << (head_dim == tome::attention_ops::kHeadDims[0] ? "" : ", ") << head_dim;
  }
  json << "], \"max_channels\": " << tome::match::kMaxChannels
       << ", \"least_scale\": " << tome::attention_ops::kLeastScale
       << ", \"max_steps\": " << tome::restoring::kMaxSteps
       << ", \"least_rows\": " << tome::products::kLeastRows << "}";
  return json.str();
}

}  // namespace

// Read through ctypes before any operator runs, on machines with and without a GPU.
extern "C" __attribute__((visibility("default"))) const char* tome_cuda_build_info() {
  static const std::string info = build_info();
  return info.c_str();
}
