// What tests ask of the emulator beside the operators. Built by tests/cuda_emulator.
#include "host.h"

#include <algorithm>

#include "product/cublaslt.h"

namespace tome {
alignas(16) char shared[emulator::kSharedBytes];

std::optional<Tensor> products::linear_by_cublaslt(const Tensor&, const Tensor&, const Tensor&) { return {}; }
}  // namespace tome

// Imagine a GPU: shared memory of a block and of a multiprocessor. With plan_only nothing runs.
extern "C" void emulated_gpu(int shared_bytes, int multiprocessor_bytes, int multiprocessors, int plan_only) {
  emulator::State& s = emulator::state();
  s.asked.clear();
  ++s.device;
  s.limit = shared_bytes;
  s.multiprocessor_bytes = multiprocessor_bytes;
  s.multiprocessors = multiprocessors;
  s.plan_only = plan_only != 0;
}

extern "C" void emulated_begin(unsigned seed, int block_outputs, int teams, int splits, int is_streamed) {
  emulator::State& s = emulator::state();
  s.random.seed(seed);
  s.launches = 0;
  s.refused[0] = 0;
  emulator::plan() = {block_outputs, teams, splits, is_streamed != 0};
  emulator::allocations().clear();
}

// How many kernels were launched since then, or -1 where one wrote beside what was allocated for it.
extern "C" int emulated_end() {
  emulator::State& s = emulator::state();
  const auto is_poison = [](unsigned char byte) { return byte == emulator::kPoison; };
  bool is_intact = true;
  for (const emulator::Allocation& a : emulator::allocations()) {
    const unsigned char* end = a.data + a.bytes;
    is_intact &= s.plan_only || (std::all_of(a.data, a.data + a.margin, is_poison) &&
                                 std::all_of(end - a.margin, end, is_poison));
  }
  emulator::allocations().clear();
  return is_intact ? s.launches : -1;
}
