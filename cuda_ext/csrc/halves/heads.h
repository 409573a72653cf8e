// Queries, keys and values as the halves of a block find them.
#pragma once

#include "../stable.h"

namespace tome {

struct Heads {
  Tensor q, k, v;  // [B, H, N, D]
};

// Slices of one tensor [B, N, 3 H D].
Heads split_heads(const Tensor& qkv, int64_t heads);

}  // namespace tome
