// What a launch asks for, and what becomes of a refusal.
#include <cuda_runtime.h>

#include <cstdio>

#include "launch.cuh"

namespace {

struct Nothing {};
void nothing_kernel(const Nothing) {}

}  // namespace

// Launch a kernel with so much shared memory on a GPU that grants less, then where it would be granted. How
// many launches there were; `why` tells of a refused one.
extern "C" int emulated_second_grant(int bytes, int granted, char* why, int why_bytes) {
  emulator::State& s = emulator::state();
  s.plan_only = true;
  s.launches = 0;
  for (const int limit : {granted, bytes}) {
    s.limit = limit;
    s.refused[0] = 0;
    tome::launch_kernel(nothing_kernel, 1, 32, bytes, bytes, nullptr, Nothing{});
  }
  std::snprintf(why, why_bytes, "%s", s.refused);
  s.plan_only = false;
  s.limit = emulator::kSharedBytes;
  s.refused[0] = 0;
  return s.launches;
}
