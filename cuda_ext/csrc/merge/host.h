// Host side of every operation that merges: how its tensors lie, and what they must be.
#pragma once

#include <optional>

#include "../stable.h"
#include "merge.h"

namespace tome {

using merge_ops::GatherParams;
using merge_ops::Table;
using merge_ops::View;

View view(const Tensor& tensor);
View mutable_view(const Tensor& tensor);

// Every row of the view starts on a boundary of `boundary` bytes, has no gaps and is a multiple of it.
bool is_aligned_view(const View& view, Dtype dtype, int64_t channels, int64_t boundary = kAccessBytes);

// Without a slot map every token stays.
void check_tokens(const Tensor& x, int64_t tokens, bool has_map);

void check_grid(int64_t blocks);

// A merge of x into out; the totals are the caller's. All of its blocks fit a grid.
GatherParams gather_params(const Tensor& x, const Tensor& out, const std::optional<Tensor>& slot,
                           int64_t tokens, const std::optional<Tensor>& size);

template <class T>
Table<T> table(const Tensor& tensor, const char* name, const Tensor& like, ScalarType dtype, int64_t batch,
               int64_t length) {
  check_like(tensor, name, like, dtype);
  TOME_CHECK(tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == length, name, " must be [",
             batch, ", ", length, "]");
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

}  // namespace tome
