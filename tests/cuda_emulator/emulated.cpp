// The kernels, unchanged, behind plain C functions that take host pointers. Built by tests/cuda_emulator.
#include <cuda_runtime.h>

#include "attention/plan.h"
#include "match/match.h"
#include "merge/merge.h"
#include "norm/norm.h"

namespace tome {
alignas(16) char shared[emulator::kSharedBytes];
}

using tome::Dtype;
using tome::match::Pairing;
using tome::match::Params;
using tome::merge_ops::GatherParams;
using tome::merge_ops::SpreadParams;

// strides: batch, head, token, channel. shared_bytes: the limit of the imagined GPU; 0 forces the tiled path.
extern "C" void emulated_match(const void* keys, const int64_t* strides, const int64_t* sources,
                               const int64_t* targets, int32_t* slot, void* metric, void* best, int* done,
                               int dtype, int batch, int heads, int tokens, int channels, int prefix,
                               int source_count, int target_count, int merged, int run, int pairing,
                               int aligned, int shared_bytes, int tiled, unsigned seed) {
  emulator::state().random.seed(seed);
  Params p{};
  p.keys_ptr = keys;
  p.batch_stride = strides[0];
  p.head_stride = strides[1];
  p.token_stride = strides[2];
  p.channel_stride = strides[3];
  p.sources_ptr = sources;
  p.targets_ptr = targets;
  p.slot_ptr = slot;
  p.metric_ptr = static_cast<__half*>(metric);
  p.best_ptr = static_cast<unsigned long long*>(best);
  p.done_ptr = done;
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.channels = channels;
  p.prefix = prefix;
  p.sources = source_count;
  p.targets = target_count;
  p.merged = merged;
  p.run = run;
  p.pairing = static_cast<Pairing>(pairing);
  tome::match::set_layout(p);
  if (tiled) {
    const int multiprocessors = seed % 2 == 0 ? 1 : 132;  // many sources for the GPU, or few
    tome::match::launch_metric(p, static_cast<Dtype>(dtype), aligned != 0, nullptr);
    if (!tome::match::launch_tiled(p, shared_bytes, multiprocessors, nullptr)) std::abort();
  } else {
    tome::match::launch_fused(p, static_cast<Dtype>(dtype), aligned != 0, shared_bytes, nullptr);
  }
}

// Plan, without running, every launch of bipartite matching for these shapes on a GPU with this much shared
// memory per block and per multiprocessor. Returns how many launches were planned; `why` tells of a refused
// one.
extern "C" int emulated_plan(int batch, int heads, int tokens, int channels, int prefix, int dtype,
                             int aligned, int shared_bytes, int multiprocessor_bytes, char* why,
                             int why_bytes) {
  emulator::State& s = emulator::state();
  s.asked.clear();
  ++s.device;
  s.plan_only = true;
  s.limit = shared_bytes;
  s.launches = 0;
  s.refused[0] = 0;
  Params p{};
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.channels = channels;
  p.prefix = prefix;
  const int free_tokens = tokens - prefix;
  p.sources = prefix % 2 == 0 ? (free_tokens + 1) / 2 : free_tokens / 2;
  p.targets = free_tokens - p.sources;
  p.merged = free_tokens / 2;
  tome::match::set_layout(p);
  if (p.merged > 0 && batch > 0) {  // as in match.cpp: everything else launches nothing
    const bool is_fused = tome::match::fits_one_block(p, shared_bytes, multiprocessor_bytes);
    if (is_fused) {
      tome::match::launch_fused(p, static_cast<Dtype>(dtype), aligned != 0, shared_bytes, nullptr);
    } else {
      tome::match::launch_metric(p, static_cast<Dtype>(dtype), aligned != 0, nullptr);
      if (!tome::match::launch_tiled(p, shared_bytes, 132, nullptr)) {
        std::snprintf(s.refused, sizeof(s.refused), "no tile fits %d bytes", shared_bytes);
      }
    }
  }
  std::snprintf(why, why_bytes, "%s", s.refused);
  s.plan_only = false;
  s.limit = emulator::kSharedBytes;
  s.refused[0] = 0;
  return s.launches;
}

// strides: x batch, row, channel; slot batch, row; size batch, row.
extern "C" void emulated_gather(const void* x, void* out, float* total, const int32_t* slot,
                                const float* size, const int64_t* strides, int dtype, int batch, int length,
                                int tokens, int channels, int block_outputs, int aligned, unsigned seed) {
  emulator::state().random.seed(seed);
  GatherParams p{};
  p.x = {const_cast<void*>(x), strides[0], strides[1], strides[2]};
  p.out = {out, static_cast<int64_t>(tokens) * channels, channels, 1};
  p.total_ptr = total;
  p.slot = {slot, strides[3], strides[4]};
  p.size = {size, strides[5], strides[6]};
  p.batch = batch;
  p.length = length;
  p.tokens = tokens;
  p.channels = channels;
  p.block_outputs = block_outputs;
  tome::merge_ops::launch_gather(p, static_cast<Dtype>(dtype), aligned != 0, nullptr);
}

extern "C" void emulated_spread(const void* x, void* out, const float* total, const int32_t* slot,
                                const float* size, const int64_t* strides, int dtype, int batch, int length,
                                int tokens, int channels, int aligned, unsigned seed) {
  emulator::state().random.seed(seed);
  SpreadParams p{};
  p.x = {const_cast<void*>(x), strides[0], strides[1], strides[2]};
  p.out = {out, static_cast<int64_t>(length) * channels, channels, 1};
  p.slot = {slot, strides[3], strides[4]};
  p.size = {size, strides[5], strides[6]};
  p.total = {total, tokens, 1};
  p.batch = batch;
  p.length = length;
  p.tokens = tokens;
  p.channels = channels;
  tome::merge_ops::launch_spread(p, static_cast<Dtype>(dtype), aligned != 0, nullptr);
}

// strides: x batch, row, channel; branch the same; slot and size batch, row; gamma, weight, bias. dtypes: x,
// branch, y, gamma, weight, bias.
extern "C" void emulated_norm(const void* x, const void* branch, void* out, void* y, float* total,
                              float* stats, const int32_t* slot, const float* size, const void* gamma,
                              const void* weight, const void* bias, const int64_t* strides, const int* dtypes,
                              float eps, int batch, int length, int tokens, int channels, int block_outputs,
                              int aligned, unsigned seed) {
  emulator::state().random.seed(seed);
  tome::norm::NormParams p{};
  p.merge.x = {const_cast<void*>(x), strides[0], strides[1], strides[2]};
  p.merge.out = {out, static_cast<int64_t>(tokens) * channels, channels, 1};
  p.merge.total_ptr = total;
  p.merge.slot = {slot, strides[6], strides[7]};
  p.merge.size = {size, strides[8], strides[9]};
  p.merge.batch = batch;
  p.merge.length = length;
  p.merge.tokens = tokens;
  p.merge.channels = channels;
  p.merge.block_outputs = block_outputs;
  p.branch = {const_cast<void*>(branch), strides[3], strides[4], strides[5]};
  p.y_ptr = y;
  p.stats_ptr = reinterpret_cast<float2*>(stats);
  p.y_dtype = static_cast<Dtype>(dtypes[2]);
  p.gamma = {gamma, strides[10], static_cast<Dtype>(dtypes[3])};
  p.weight = {weight, strides[11], static_cast<Dtype>(dtypes[4])};
  p.bias = {bias, strides[12], static_cast<Dtype>(dtypes[5])};
  p.eps = eps;
  p.share = 1.0f / static_cast<float>(channels);
  tome::norm::launch_norm(p, static_cast<Dtype>(dtypes[0]), static_cast<Dtype>(dtypes[1]), aligned != 0,
                          nullptr);
}

// strides: q, k, v (batch, head, row each), size (batch, key). teams and splits: 0 for the plan's own.
extern "C" void emulated_attention(const void* q, const void* k, const void* v, const float* size, void* out,
                                   const int64_t* strides, int dtype, int batch, int heads, int queries,
                                   int keys, int head_dim, float scale, int aligned, int streamed, int teams,
                                   int splits, int shared_bytes, unsigned seed) {
  namespace ops = tome::attention_ops;
  emulator::state().random.seed(seed);
  ops::AttentionParams p{};
  p.q = {q, strides[0], strides[1], strides[2]};
  p.k = {k, strides[3], strides[4], strides[5]};
  p.v = {v, strides[6], strides[7], strides[8]};
  p.size_ptr = size;
  p.size_batch_stride = strides[9];
  p.size_stride = strides[10];
  p.out_ptr = out;
  p.batch = batch;
  p.heads = heads;
  p.queries = queries;
  p.keys = keys;
  p.head_dim = head_dim;
  p.scale = scale;
  p.is_aligned = aligned != 0;
  const int limit = shared_bytes;
  emulator::state().limit = shared_bytes;
  if (streamed) {
    ops::launch_streamed(p, static_cast<Dtype>(dtype), limit, nullptr);
  } else {
    ops::ResidentParams plan = ops::plan_resident(p, 132);
    if (teams > 0) plan.team_bits = teams / 2;  // of 1, 2, 4
    if (splits > 0) plan.splits = splits;
    ops::launch_resident(plan, static_cast<Dtype>(dtype), limit, nullptr);
  }
  emulator::state().limit = emulator::kSharedBytes;
}

// strides: grad_x and grad_y batch, row, channel; slot, size, total batch, row; weight, gamma. dtypes: x, y,
// branch, weight, gamma.
extern "C" void emulated_norm_backward(const void* grad_x, const void* grad_y, const void* merged,
                                       const float* stats, void* x_out, void* branch_out, const int32_t* slot,
                                       const float* size, const float* total, const void* weight,
                                       const void* gamma, const int64_t* strides, const int* dtypes,
                                       int batch, int length, int tokens, int channels, int aligned,
                                       unsigned seed) {
  emulator::state().random.seed(seed);
  tome::norm::BackwardParams p{};
  p.grad_x = {const_cast<void*>(grad_x), strides[0], strides[1], strides[2]};
  p.grad_y = {const_cast<void*>(grad_y), strides[3], strides[4], strides[5]};
  p.merged_ptr = merged;
  p.stats_ptr = reinterpret_cast<const float2*>(stats);
  p.x_out_ptr = x_out;
  p.branch_out_ptr = branch_out;
  p.slot = {slot, strides[6], strides[7]};
  p.size = {size, strides[8], strides[9]};
  p.total = {total, strides[10], strides[11]};
  p.weight = {weight, strides[12], static_cast<Dtype>(dtypes[3])};
  p.gamma = {gamma, strides[13], static_cast<Dtype>(dtypes[4])};
  p.grad_y_dtype = static_cast<Dtype>(dtypes[1]);
  p.branch_dtype = static_cast<Dtype>(dtypes[2]);
  p.batch = batch;
  p.length = length;
  p.tokens = tokens;
  p.channels = channels;
  tome::norm::launch_backward(p, static_cast<Dtype>(dtypes[0]), aligned != 0, nullptr);
}

// strides: a and b batch, row, channel. Returns how many slabs were written.
extern "C" int emulated_columns(const void* a, const void* b, const float* stats, float* out,
                                const int64_t* strides, const int* dtypes, int batch, int rows, int channels,
                                int aligned, unsigned seed) {
  emulator::state().random.seed(seed);
  tome::norm::ColumnParams p{};
  p.a = {const_cast<void*>(a), strides[0], strides[1], strides[2]};
  p.b = {const_cast<void*>(b), strides[3], strides[4], strides[5]};
  p.stats_ptr = reinterpret_cast<const float2*>(stats);
  p.out_ptr = out;
  p.a_dtype = static_cast<Dtype>(dtypes[0]);
  p.b_dtype = static_cast<Dtype>(dtypes[1]);
  p.batch = batch;
  p.rows = rows;
  p.channels = channels;
  p.slabs = tome::norm::slabs(static_cast<int64_t>(batch) * rows, channels);
  if (out != nullptr) tome::norm::launch_columns(p, aligned != 0, nullptr);
  return p.slabs;
}
