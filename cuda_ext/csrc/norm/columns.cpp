// Host side of sums over rows: checks, output, launches.
#include "columns_host.h"

#include "../ops.h"
#include "host.h"

namespace tome {

using norm::ColumnJob;

void ColumnSums::add(const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& stats,
                     bool wants_sums, bool wants_products) {
  if (!wants_sums && !wants_products) return;
  TOME_CHECK(params_.count < norm::kMostJobs, "at most ", norm::kMostJobs, " tensors are summed at a time");
  check_tensor(a, "a", 3);
  ColumnJob job{};
  job.a = view(a);
  job.a_dtype = floating_dtype(a, "a");
  job.batch = a.size(0);
  job.rows = to_int(a.size(1), "the number of rows");
  job.channels = to_int(a.size(2), "the number of channels");
  check_grid(2 * job.batch * job.rows);  // the kernel counts rows in 32 bits, and rounds them up to slabs
  aligned_ &= job.channels % norm::kColumnPack == 0 && is_aligned_view(job.a, job.a_dtype, job.channels);
  if (b.has_value()) {
    check_tensor(*b, "b", 3);
    check_like(*b, "b", a, b->scalar_type());
    for (int64_t i = 0; i < 3; ++i) TOME_CHECK(a.size(i) == b->size(i), "a and b must have one shape");
    job.b = view(*b);
    job.b_dtype = floating_dtype(*b, "b");
    aligned_ &= is_aligned_view(job.b, job.b_dtype, job.channels);
    if (stats.has_value()) job.stats_ptr = stats_of(*stats, a, job.batch, job.rows);
  }
  job.slabs = norm::slabs(job.batch * job.rows, job.channels);
  is_wanted_[params_.count][0] = wants_sums;
  is_wanted_[params_.count][1] = wants_products;
  params_.jobs[params_.count++] = job;
  kept_.push_back(a);
  if (b.has_value()) kept_.push_back(*b);
  if (stats.has_value()) kept_.push_back(*stats);
}

Tensor ColumnSums::run() {
  if (params_.count == 0) return Tensor();
  int64_t partials = 0, sums = 0;
  for (int job = 0; job < params_.count; ++job) {
    const int64_t channels = params_.jobs[job].channels;
    partials += 2 * channels * params_.jobs[job].slabs;
    sums += channels * (is_wanted_[job][0] + is_wanted_[job][1]);
  }
  const Tensor& like = kept_.front();
  const Tensor partial = new_empty(like, {partials}, ScalarType::Float);
  const Tensor out = new_empty(like, {sums}, ScalarType::Float);
  auto* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
  auto* out_ptr = static_cast<float*>(out.mutable_data_ptr());
  for (int i = 0; i < params_.count; ++i) {
    ColumnJob& job = params_.jobs[i];
    job.partial_ptr = partial_ptr;
    partial_ptr += 2 * static_cast<int64_t>(job.channels) * job.slabs;
    for (int k = 0; k < 2; ++k) {
      if (!is_wanted_[i][k]) continue;
      job.out_ptr[k] = out_ptr;
      out_ptr += job.channels;
    }
  }
  norm::launch_columns(params_, aligned_, current_stream(like));
  check_launch();
  return out;
}

Tensor column_sums(const Tensor& a, const Tensor& b, const std::optional<Tensor>& stats) {
  const DeviceScope scope(a);
  ColumnSums sums;
  sums.add(a, b, stats, true, true);
  return view_of(sums.run(), {2, a.size(2)}, {a.size(2), 1}, 0);
}

}  // namespace tome
