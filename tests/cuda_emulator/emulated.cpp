// The kernels, unchanged, behind plain C functions that take host pointers. Built by tests/cuda_emulator.
#include <cuda_runtime.h>

#include "match/match.h"
#include "merge/merge.h"

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
    if (!tome::match::launch_tiled(p, static_cast<Dtype>(dtype), aligned != 0, shared_bytes, multiprocessors,
                                   nullptr)) {
      std::abort();
    }
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
    if (is_fused)
      tome::match::launch_fused(p, static_cast<Dtype>(dtype), aligned != 0, shared_bytes, nullptr);
    if (!is_fused &&
        !tome::match::launch_tiled(p, static_cast<Dtype>(dtype), aligned != 0, shared_bytes, 132, nullptr)) {
      std::snprintf(s.refused, sizeof(s.refused), "no tile fits %d bytes", shared_bytes);
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
