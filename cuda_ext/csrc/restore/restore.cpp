// Host side of follow and restore: checks, the chain of maps, launches.
#include "restore.h"

#include <vector>

#include "../norm/host.h"
#include "../ops.h"

namespace tome {
namespace {

using restoring::Chain;
using restoring::FollowParams;
using restoring::RestoreParams;

// A map of no tokens has no pointer, and none is followed into it: every slot is past its end.
Chain chain_of(const std::vector<Tensor>& steps, const Tensor& like, int64_t batch) {
  TOME_CHECK(steps.size() <= restoring::kMaxSteps, "at most ", restoring::kMaxSteps,
             " slot maps can be followed at once, got ", steps.size());
  Chain chain{};
  for (const Tensor& step : steps) {
    check_tensor(step, "a slot map", 2);
    const int64_t length = step.size(1);
    chain.slot[chain.count] = table<int32_t>(step, "a slot map", like, ScalarType::Int, batch, length);
    chain.length[chain.count++] = to_int(length, "the number of tokens");
  }
  return chain;
}

}  // namespace

Tensor follow(const std::vector<Tensor>& steps) {
  TOME_CHECK(!steps.empty(), "there must be at least one slot map");
  const Tensor& first = steps[0];
  check_tensor(first, "a slot map", 2);
  FollowParams p{};
  p.batch = first.size(0);
  p.chain = chain_of(steps, first, p.batch);
  const DeviceScope scope(first);
  Tensor out = new_empty(first, {p.batch, first.size(1)}, ScalarType::Int);
  p.out_ptr = static_cast<int32_t*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  check_grid((out.numel() + restoring::kFollowThreads - 1) / restoring::kFollowThreads);
  restoring::launch_follow(p, current_stream(first));
  check_launch();
  return out;
}

Tensor restore(const Tensor& x, const std::optional<Tensor>& branch, const std::vector<Tensor>& steps,
               const std::optional<Tensor>& gamma) {
  check_tensor(x, "x", 3);
  // A chain of no maps leaves the tokens where they are: then this is the addition alone.
  TOME_CHECK(branch.has_value() || !gamma.has_value(), "without a branch there is nothing to scale");
  const Dtype dtype = floating_dtype(x, "x");
  const Dtype branch_dtype = branch.has_value() ? check_branch(*branch, x) : dtype;
  TOME_CHECK(!branch.has_value() || branch->size(1) == x.size(1), "branch must be like x");
  const int64_t batch = x.size(0), channels = x.size(2);
  RestoreParams p{};
  p.chain = chain_of(steps, x, batch);
  p.x = view(x);
  if (branch.has_value()) p.branch = view(*branch);
  p.gamma = vector(gamma, "gamma", x);
  p.batch = batch;
  p.length = steps.empty() ? to_int(x.size(1), "the number of tokens") : p.chain.length[0];
  p.tokens = to_int(x.size(1), "tokens");
  p.channels = to_int(channels, "the number of channels");
  p.block_rows = restoring::block_rows(batch * p.length);
  const DeviceScope scope(x);
  Tensor out = new_empty(x, {batch, p.length, channels}, x.scalar_type());
  p.out_ptr = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  check_grid((batch * p.length + p.block_rows - 1) / p.block_rows);
  const bool aligned = is_aligned_view(p.x, dtype, channels) && is_aligned_view(view(out), dtype, channels) &&
                       (!branch.has_value() || is_aligned_like(p.branch, branch_dtype, dtype, channels)) &&
                       is_aligned_vector(p.gamma);
  restoring::launch_restore(p, dtype, branch_dtype, aligned, current_stream(x));
  check_launch();
  return out;
}

}  // namespace tome
