// Which attention the kernel for Hopper takes.
#pragma once

#include "attention.h"

namespace tome::attention_ops {

// True on compute capability 9.0, when the library holds code for 90a, for rows that the copy engine can
// read.
bool hopper_takes(const AttentionParams& params);

}  // namespace tome::attention_ops
