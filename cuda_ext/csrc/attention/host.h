// What the host code of attention's directions shares: checks of what both read.
#pragma once

#include "../ops.h"
#include "attention.h"

namespace tome::attention_ops {

inline Heads heads_of(const Tensor& tensor, const char* name, const Tensor& q) {
  check_tensor(tensor, name, 4);
  check_like(tensor, name, q, q.scalar_type());
  TOME_CHECK(tensor.size(0) == q.size(0) && tensor.size(1) == q.size(1) && tensor.size(3) == q.size(3), name,
             " must have the batch, heads and head dimension of q");
  TOME_CHECK(tensor.stride(3) == 1, name, " must have channels without gaps, got stride ", tensor.stride(3));
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline bool is_aligned_view(const Tensor& t) {
  return is_aligned(t.const_data_ptr(), 2, t.stride(3), t.size(3), {t.stride(0), t.stride(1), t.stride(2)});
}

AttentionParams read_params(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& size, double scale);

}  // namespace tome::attention_ops
