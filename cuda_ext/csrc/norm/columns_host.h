// Host side of sums over rows: what is wanted is collected, and computed in two launches.
#pragma once

#include <optional>
#include <vector>

#include "../stable.h"
#include "columns.h"

namespace tome {

class ColumnSums {
 public:
  // Of a [B, N, C], and of a * b or a * (b - mean) / standard deviation; in this order, what is wanted of
  // them.
  void add(const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& stats,
           bool wants_sums, bool wants_products);
  // float32, all that was wanted one behind the other; undefined where nothing was.
  Tensor run();

 private:
  norm::ColumnParams params_{};
  bool is_wanted_[norm::kMostJobs][2] = {};
  bool aligned_ = true;
  std::vector<Tensor> kept_;  // for as long as their addresses are here
};

}  // namespace tome
