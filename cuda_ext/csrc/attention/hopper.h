// Which attention the kernel for Hopper takes.
#pragma once

#include "attention.h"

namespace tome::attention_ops {

// True on compute capability 9.0, for rows that the copy engine can read. That the library holds code for 90a
// is for the caller to know.
bool hopper_takes(const AttentionParams& params);

}  // namespace tome::attention_ops
