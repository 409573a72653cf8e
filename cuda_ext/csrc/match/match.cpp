// Host side of matching: checks, shapes, scratch memory, choice of the path.
#include "match.h"

#include <limits>

#include "../ops.h"

namespace tome {
namespace {

using match::Pairing;
using match::Params;

int64_t round_up(int64_t bytes) { return (bytes + kAccessBytes - 1) / kAccessBytes * kAccessBytes; }

// Everything that follows from the keys alone.
Params key_params(const Tensor& keys, int64_t prefix) {
  const int64_t dims = keys.dim();
  TOME_CHECK(dims == 3 || dims == 4, "keys must be [B, N, D] or [B, H, N, D], got ", dims, " dimensions");
  check_tensor(keys, "keys", dims);
  Params p{};
  p.keys_ptr = keys.const_data_ptr();
  p.batch_stride = keys.stride(0);
  p.head_stride = dims == 4 ? keys.stride(1) : 0;
  p.token_stride = keys.stride(dims - 2);
  p.channel_stride = keys.stride(dims - 1);
  p.batch = to_int(keys.size(0), "the batch");
  p.heads = dims == 4 ? to_int(keys.size(1), "the number of heads") : 1;
  p.tokens = to_int(keys.size(dims - 2), "the number of tokens");
  p.channels = to_int(keys.size(dims - 1), "the head dimension");
  TOME_CHECK(p.channels >= 1 && p.channels <= match::kMaxChannels, "the head dimension must be in [1, ",
             match::kMaxChannels, "], got ", p.channels);
  TOME_CHECK(p.heads >= 1, "keys need at least one head");
  TOME_CHECK(prefix >= 0 && prefix <= p.tokens, "prefix must be in [0, ", p.tokens, "], got ", prefix);
  p.prefix = static_cast<int>(prefix);
  match::set_layout(p);
  return p;
}

Tensor run(Params p, const Tensor& keys) {
  const Dtype dtype = floating_dtype(keys, "keys");
  Tensor slot = new_empty(keys, {p.batch, p.tokens}, ScalarType::Int);
  if (p.batch == 0 || p.tokens == 0) return slot;
  const DeviceScope scope(keys);
  const cudaStream_t stream = current_stream(keys);
  p.slot_ptr = slot.mutable_data_ptr<int32_t>();
  const bool aligned = is_aligned(p.keys_ptr, element_size(dtype), p.channel_stride, p.channels,
                                  {p.batch_stride, p.head_stride, p.token_stride});
  const int device = keys.get_device_index();
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int multiprocessor_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  if (match::fits_one_block(p, limit, multiprocessor_bytes)) {
    const bool launched =
        runs_hopper(device) && match::launch_cluster(p, dtype, aligned, limit, multiprocessors, stream);
    if (!launched) match::launch_fused(p, dtype, aligned, limit, stream);
    check_launch();
    return slot;
  }
  const int64_t rows = p.rows();
  TOME_CHECK(p.batch * rows <= std::numeric_limits<int>::max(), "too many tokens: ", p.batch * rows);
  const int64_t metric_bytes = round_up(p.batch * rows * 2 * p.padded * static_cast<int64_t>(sizeof(__half)));
  const int64_t best_bytes = round_up(static_cast<int64_t>(p.batch) * p.sources * 8);
  const Tensor scratch = new_empty(keys, {metric_bytes + best_bytes + p.batch * 4}, ScalarType::Byte);
  char* scratch_ptr = static_cast<char*>(scratch.mutable_data_ptr());
  p.metric_ptr = reinterpret_cast<__half*>(scratch_ptr);
  p.best_ptr = reinterpret_cast<unsigned long long*>(scratch_ptr + metric_bytes);
  p.done_ptr = reinterpret_cast<int*>(scratch_ptr + metric_bytes + best_bytes);
  match::launch_metric(p, dtype, aligned, stream);
  const bool launched = (runs_hopper(device) && match::launch_hopper(p, stream)) ||
                        match::launch_tiled(p, limit, multiprocessors, stream);
  check_launch();
  TOME_CHECK(launched, "the GPU has too little shared memory per block (", limit, " bytes) for ", p.channels,
             " channels");
  return slot;
}

}  // namespace

Tensor bipartite_match(const Tensor& keys, int64_t r, int64_t prefix) {
  Params p = key_params(keys, prefix);
  const int free_tokens = p.tokens - p.prefix;
  // Behind an odd prefix the first free token stands at an odd position, so the B tokens may be one more.
  p.pairing = Pairing::kBipartite;
  p.sources = p.prefix % 2 == 0 ? (free_tokens + 1) / 2 : free_tokens / 2;
  p.targets = free_tokens - p.sources;
  TOME_CHECK(r >= 0 && r <= free_tokens / 2, "r must be in [0, ", free_tokens / 2, "], got ", r);
  TOME_CHECK(r > 0, "r = 0 has nothing to match");
  p.merged = static_cast<int>(r);
  return run(p, keys);
}

Tensor kth_match(const Tensor& keys, int64_t k, int64_t prefix) {
  Params p = key_params(keys, prefix);
  const int free_tokens = p.tokens - p.prefix;
  TOME_CHECK(k >= 2 && k <= free_tokens, "k must be in [2, ", free_tokens, "], got ", k);
  p.pairing = Pairing::kRuns;
  p.run = static_cast<int>(k);
  p.targets = free_tokens / p.run;
  p.sources = free_tokens - p.targets;
  p.merged = p.sources;
  return run(p, keys);
}

Tensor listed_match(const Tensor& keys, const Tensor& sources, const Tensor& targets, int64_t r,
                    int64_t prefix) {
  Params p = key_params(keys, prefix);
  for (const auto& [tensor, name] : {std::pair{&sources, "sources"}, std::pair{&targets, "targets"}}) {
    check_like(*tensor, name, keys, ScalarType::Long);
    TOME_CHECK(tensor->dim() == 2 && tensor->is_contiguous() && tensor->size(0) == p.batch, name,
               " must be contiguous int64 [B, S]");
    TOME_CHECK(tensor->size(1) >= 1, name, " must not be empty");
  }
  p.pairing = Pairing::kListed;
  p.sources_ptr = sources.const_data_ptr<int64_t>();
  p.targets_ptr = targets.const_data_ptr<int64_t>();
  p.sources = to_int(sources.size(1), "the number of sources");
  p.targets = to_int(targets.size(1), "the number of targets");
  TOME_CHECK(p.prefix + p.rows() == p.tokens, "sources and targets must cover the tokens behind the prefix");
  TOME_CHECK(r > 0 && r <= p.sources, "r must be in [1, ", p.sources, "], got ", r);
  p.merged = static_cast<int>(r);
  return run(p, keys);
}

}  // namespace tome
