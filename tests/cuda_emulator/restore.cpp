// follow and restore, unchanged, behind plain C functions that take host pointers.
#include <cuda_runtime.h>

#include "restore/restore.h"

using tome::Dtype;

namespace {

// strides: batch, row of each map.
tome::restoring::Chain chain_of(const int32_t* const* slots, const int64_t* strides, const int* lengths,
                                int count) {
  tome::restoring::Chain chain{};
  for (int k = 0; k < count; ++k) {
    chain.slot[k] = {slots[k], strides[2 * k], strides[2 * k + 1]};
    chain.length[k] = lengths[k];
  }
  chain.count = count;
  return chain;
}

}  // namespace

extern "C" void emulated_follow(const int32_t* const* slots, const int64_t* strides, const int* lengths,
                                int count, int32_t* out, int batch, unsigned seed) {
  emulator::state().random.seed(seed);
  tome::restoring::FollowParams p{};
  p.chain = chain_of(slots, strides, lengths, count);
  p.out_ptr = out;
  p.batch = batch;
  tome::restoring::launch_follow(p, nullptr);
}

// row_strides: x batch, row, channel; branch the same; gamma. dtypes: x, branch, gamma.
extern "C" void emulated_restore(const int32_t* const* slots, const int64_t* strides, const int* lengths,
                                 int count, const void* x, const void* branch, const void* gamma,
                                 const int64_t* row_strides, const int* dtypes, void* out, int batch,
                                 int length, int tokens, int channels, int block_rows, int aligned,
                                 unsigned seed) {
  emulator::state().random.seed(seed);
  tome::restoring::RestoreParams p{};
  p.chain = chain_of(slots, strides, lengths, count);
  p.x = {const_cast<void*>(x), row_strides[0], row_strides[1], row_strides[2]};
  p.branch = {const_cast<void*>(branch), row_strides[3], row_strides[4], row_strides[5]};
  p.gamma = {gamma, row_strides[6], static_cast<Dtype>(dtypes[2])};
  p.out_ptr = out;
  p.batch = batch;
  p.length = length;
  p.tokens = tokens;
  p.channels = channels;
  p.block_rows = block_rows;
  tome::restoring::launch_restore(p, static_cast<Dtype>(dtypes[0]), static_cast<Dtype>(dtypes[1]),
                                  aligned != 0, nullptr);
}
