#pragma once
#include <cute/arch/copy_sm75.hpp>

namespace cute {
// An asynchronous copy lands when it is waited for, and no sooner.
template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL {
  static void copy(const T& from, T& to) {
    if (reinterpret_cast<uintptr_t>(&from) % 16 != 0 || reinterpret_cast<uintptr_t>(&to) % 16 != 0)
      std::abort();
    emulator::state().running->open.push_back({&from, &to});
  }
};

inline void cp_async_fence() {
  emulator::Fibre& f = *emulator::state().running;
  f.groups.push_back(f.open);
  f.open.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::state().running->groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& c : groups.front()) std::memcpy(c.to, c.from, 16);
    groups.erase(groups.begin());
  }
}
}  // namespace cute
