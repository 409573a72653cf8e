// Host side of attention: checks, output, choice of the kernel.
#include "attention.h"

#include <limits>

#include "host.h"
#include "plan.h"

namespace tome {

using attention_ops::AttentionParams;

namespace attention_ops {

void launch_attention(const AttentionParams& p, Dtype dtype, cudaStream_t stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  const auto attribute = [device](cudaDeviceAttr name) { return device_attribute(name, device); };
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  if (runs_hopper(device)) {
    if (hopper::fits_resident(p, multiprocessors)) {
      return hopper::launch_resident(p, dtype, multiprocessors, stream);
    }
    // A head of fewer keys leaves its consumers without work.
    const bool is_long = p.keys > 64;
    if (is_long && launch_attention_hopper(p, dtype, multiprocessors, stream)) return;
  }
  launch_mma(p, dtype, multiprocessors, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), stream);
}

}  // namespace attention_ops

AttentionParams attention_ops::read_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& size, double scale) {
  check_tensor(q, "q", 4);
  const Dtype dtype = floating_dtype(q, "q");
  TOME_CHECK(dtype != Dtype::kFloat, "q must be float16 or bfloat16");
  AttentionParams p{};
  p.q = heads_of(q, "q", q);
  p.k = heads_of(k, "k", q);
  p.v = heads_of(v, "v", q);
  p.batch = q.size(0);
  p.heads = to_int(q.size(1), "the number of heads");
  p.queries = to_int(q.size(2), "the number of queries");
  p.keys = to_int(k.size(2), "the number of keys");
  p.head_dim = to_int(q.size(3), "the head dimension");
  TOME_CHECK(v.size(2) == k.size(2), "v must have as many rows as k");
  TOME_CHECK(attention_ops::is_head_dim(p.head_dim), "no kernel for the head dimension ", p.head_dim);
  TOME_CHECK(p.keys >= 1, "there must be at least one key");
  p.scale = static_cast<float>(scale);
  TOME_CHECK(p.scale >= attention_ops::kLeastScale && p.scale <= std::numeric_limits<float>::max(),
             "scale must be positive, got ", scale);
  p.is_aligned = is_aligned_view(q) && is_aligned_view(k) && is_aligned_view(v);
  if (size.has_value()) {
    check_like(*size, "size", q, ScalarType::Float);
    TOME_CHECK(size->dim() == 2 && size->size(0) == p.batch && size->size(1) == p.keys, "size must be [",
               p.batch, ", ", p.keys, "]");
    p.size_ptr = static_cast<const float*>(size->const_data_ptr());
    p.size_batch_stride = size->stride(0);
    p.size_stride = size->stride(1);
  }
  return p;
}

namespace {

// The output, and for training the log-sum-exp of every row.
Tensor attend(AttentionParams& p, const Tensor& q, Tensor* lse) {
  const DeviceScope scope(q);
  Tensor out = new_empty(q, {p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type());
  if (lse != nullptr) *lse = new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  if (out.numel() == 0) return out;
  p.out_ptr = out.mutable_data_ptr();
  if (lse != nullptr) p.lse_ptr = static_cast<float*>(lse->mutable_data_ptr());
  const int64_t most_blocks = p.batch * p.heads * ((p.queries + 63) / 64);
  TOME_CHECK(most_blocks <= std::numeric_limits<int>::max(), "too many rows for one launch: ", most_blocks,
             " blocks");
  attention_ops::launch_attention(p, floating_dtype(q, "q"), current_stream(q));
  check_launch();
  return out;
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& size,
                 double scale) {
  AttentionParams p = attention_ops::read_params(q, k, v, size, scale);
  return attend(p, q, nullptr);
}

std::tuple<Tensor, Tensor> attention_training(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const std::optional<Tensor>& size, double scale) {
  AttentionParams p = attention_ops::read_params(q, k, v, size, scale);
  Tensor lse;
  Tensor out = attend(p, q, &lse);
  return {out, lse};
}

}  // namespace tome
