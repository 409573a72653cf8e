#pragma once
#include <cute/arch/copy_sm75.hpp>

namespace cute {
// An asynchronous copy lands when it is waited for, and no sooner.
template <class T>
struct SM80_CP_ASYNC_CACHEALWAYS {
  static void copy(const T& from, T& to) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if (reinterpret_cast<uintptr_t>(&from) % sizeof(T) != 0 ||
        reinterpret_cast<uintptr_t>(&to) % sizeof(T) != 0)
      std::abort();
    emulator::state().running->open.push_back({&from, &to, sizeof(T)});
  }
};
template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL : SM80_CP_ASYNC_CACHEALWAYS<T> {
  static_assert(sizeof(T) == 16);
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
    for (const emulator::Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}
}  // namespace cute
