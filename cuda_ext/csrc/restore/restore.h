// Back to the tokens before several merges: their slot maps, one after the other, without writing what lies
// between them.
#pragma once

#include "../norm/norm.h"

namespace tome::restoring {

using merge_ops::Table;
using merge_ops::View;
using norm::Vector;

constexpr int kMaxSteps = 64;  // maps in a chain: they travel with the launch, which holds 4 KiB

// From token i of the first map's to slot[count - 1][... slot[1][slot[0][i]]].
struct Chain {
  Table<int32_t> slot[kMaxSteps];  // [batch, length[k]], onto [0, length[k + 1])
  int length[kMaxSteps];
  int count;
};

struct FollowParams {
  Chain chain;
  int32_t* out_ptr;  // [batch, length[0]], contiguous
  int64_t batch;
};

struct RestoreParams {
  Chain chain;
  View x;         // [batch, tokens, channels]
  View branch;    // likewise; data_ptr null where there is none
  Vector gamma;   // [channels]
  void* out_ptr;  // [batch, length, channels], contiguous
  int64_t batch;
  int length, tokens, channels;
  int block_rows;  // output rows of one block, at most kMaxBlockRows
};

constexpr int kMaxBlockRows = 32;
constexpr int kFollowThreads = 256;  // and tokens of a block

void launch_follow(const FollowParams& params, cudaStream_t stream);
// aligned: 16 bytes of x and as many channels of everything else can be accessed at a time.
void launch_restore(const RestoreParams& params, Dtype dtype, Dtype branch_dtype, bool aligned,
                    cudaStream_t stream);

}  // namespace tome::restoring
