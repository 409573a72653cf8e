// Between the host code and the launches of kernels: where a test says how a launch is divided, that is how.
#include "host.h"
// The functions themselves, which host.h has the host code call by other names.
#undef launch_gather
#undef launch_norm
#undef launch_restore
#undef plan_resident
#undef fits_resident
#undef fits_whole

#include <algorithm>

#include "attention/backward.h"
#include "attention/plan.h"
#include "merge/merge.h"
#include "norm/norm.h"
#include "restore/restore.h"

using tome::Dtype;

namespace {

int divided(int planned, int most) {
  const int wanted = emulator::plan().block_outputs;
  return wanted > 0 ? std::min(wanted, most) : planned;
}

}  // namespace

namespace tome::merge_ops {
void emulated_launch_gather(const GatherParams& params, Dtype dtype, bool aligned, cudaStream_t stream) {
  GatherParams p = params;
  p.block_outputs = divided(p.block_outputs, kMaxBlockOutputs);
  launch_gather(p, dtype, aligned, stream);
}
}  // namespace tome::merge_ops

namespace tome::norm {
void emulated_launch_norm(const NormParams& params, Dtype dtype, Dtype branch_dtype, bool aligned,
                          cudaStream_t stream) {
  NormParams p = params;
  p.merge.block_outputs = divided(p.merge.block_outputs, merge_ops::kMaxBlockOutputs);
  launch_norm(p, dtype, branch_dtype, aligned, stream);
}
}  // namespace tome::norm

namespace tome::restoring {
void emulated_launch_restore(const RestoreParams& params, Dtype dtype, Dtype branch_dtype, bool aligned,
                             cudaStream_t stream) {
  RestoreParams p = params;
  p.block_rows = divided(p.block_rows, kMaxBlockRows);
  launch_restore(p, dtype, branch_dtype, aligned, stream);
}
}  // namespace tome::restoring

namespace tome::attention_ops {
ResidentParams emulated_plan_resident(const AttentionParams& params, int multiprocessors) {
  const ResidentParams planned = plan_resident(params, multiprocessors);
  ResidentParams wanted = planned;
  if (emulator::plan().teams > 0) wanted.team_bits = emulator::plan().teams / 2;  // of 1, 2, 4
  if (emulator::plan().splits > 0) wanted.splits = emulator::plan().splits;
  return resident_bytes(wanted) <= static_cast<int64_t>(emulator::state().limit) ? wanted : planned;
}

bool emulated_fits_resident(const ResidentParams& plan, int max_shared_bytes, int multiprocessor_bytes) {
  if (emulator::plan().is_streamed) return false;
  return emulator::plan().teams > 0 || fits_resident(plan, max_shared_bytes, multiprocessor_bytes);
}

bool emulated_fits_whole(const BackwardParams& plan, int max_shared_bytes) {
  return !emulator::plan().is_streamed && fits_whole(plan, max_shared_bytes);
}
}  // namespace tome::attention_ops
