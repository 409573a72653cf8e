// As much of CUDA as the kernels use, on a CPU: every thread of a block is a fibre, blocks run one after the
// other, both in a shuffled order. Fibres are switched at barriers and warp collectives, and warps are held
// back at random while others run ahead as far as barriers let them, so a missing barrier shows as a wrong
// result. Copies by cp.async happen as late as the program allows, shared memory starts as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess, cudaErrorInvalidValue };
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaSharedmemCarveoutMaxShared
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  struct cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 6;
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

namespace tome {
extern char shared[];
}

namespace emulator {

constexpr size_t kSharedBytes = 227 << 10;
// Shared memory that needs no asking, static and dynamic together, and what a kernel's static share may be:
// it is not known here, so tests/test_cuda_library.py holds every kernel below it.
constexpr size_t kGrantedBytes = 48 << 10;
constexpr size_t kStaticBytes = 9 << 10;
constexpr int kWarp = 32;
constexpr size_t kPayloadBytes = 64;  // of a lane

struct Copy {
  const void* from;
  void* to;
  size_t bytes;
};

struct Warp {
  // What lanes show each other, twice: who is past one collective may write for the next while others read.
  alignas(16) unsigned char payload[2][kWarp * kPayloadBytes];
  int arrived = 0, generation = 0;
};

struct Fibre {
  ucontext_t start;  // entered once; from then on a jump is enough, which asks nothing of the system
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
  const int* awaited = nullptr;  // a generation that must change before this one goes on
  int seen = 0;
  dim3 thread;
  std::vector<std::vector<Copy>> groups;  // committed groups of asynchronous copies
  std::vector<Copy> open;

  bool can_run() const { return !is_done && (awaited == nullptr || *awaited != seen); }
};

struct State {
  std::deque<Fibre> fibres;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  Fibre* running = nullptr;
  int live = 0, arrived = 0, generation = 0;
  dim3 block, threads;
  std::function<void()> body;
  std::mt19937 random{1};
  std::map<const void*, size_t> asked;  // dynamic shared memory that a kernel was promised
  int device = 0;                       // another one for each GPU that is imagined
  size_t limit = kSharedBytes;          // shared memory of one block of the imagined GPU
  int multiprocessor_bytes = 228 << 10;
  int multiprocessors = 132;
  bool plan_only = false;
  int launches = 0;
  char refused[200] = "";  // the last launch that CUDA would refuse
};

inline State& state() {
  static State instance;
  return instance;
}

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::abort();
}

inline void leave() {
  if (_setjmp(state().running->context) == 0) _longjmp(state().scheduler, 1);
}

// Until another fibre changes the generation.
inline void await(const int& generation) {
  Fibre& f = *state().running;
  f.awaited = &generation;
  f.seen = generation;
  leave();
  f.awaited = nullptr;
}

inline void pass_block_barrier() {
  state().arrived = 0;
  ++state().generation;
}

// A fibre serves block after block.
inline void serve() {
  State& s = state();
  for (;;) {
    s.body();
    s.running->is_done = true;
    if (--s.live > 0 && s.arrived == s.live)
      pass_block_barrier();  // a barrier waits for no thread that ended
    leave();
  }
}

// Not inlined: the caller's variables must not live in registers that a jump restores.
__attribute__((noinline)) inline void run_fibre(Fibre& f) {
  constexpr size_t kStackBytes = 128 << 10;
  state().running = &f;
  if (_setjmp(state().scheduler) != 0) return;
  if (f.stack != nullptr) _longjmp(f.context, 1);
  f.stack.reset(new char[kStackBytes]);
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, serve, 0);
  setcontext(&f.start);
}

inline void run_block(unsigned block, int threads) {
  State& s = state();
  s.block = dim3(block);
  s.threads = dim3(threads);
  s.fibres.resize(std::max<size_t>(s.fibres.size(), threads));
  s.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  s.live = threads;
  s.arrived = 0;
  std::memset(tome::shared, 0xff, kSharedBytes);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), s.random);
  for (int t = 0; t < threads; ++t) {
    Fibre& f = s.fibres[t];
    f.is_done = false;
    f.thread = dim3(t, 0, 0);
    f.groups.clear();
    f.open.clear();
  }
  unsigned held = s.random();                      // a bit for each warp that waits while others run ahead
  const unsigned patience = 1u << s.random() % 4;  // for about so many rounds
  while (s.live > 0) {
    bool has_run = false;
    for (const int t : order) {
      if ((held >> (t / kWarp) & 1) != 0 || !s.fibres[t].can_run()) continue;
      run_fibre(s.fibres[t]);
      has_run = true;
    }
    if (!has_run && held == 0) stop("a block never ends: not every thread comes to a barrier");
    if (!has_run) {
      held = 0;
    } else if (s.random() % patience == 0) {
      held = s.random();
    }
  }
}

inline Warp& warp() { return state().warps[state().running->thread.x / kWarp]; }

inline void sync_warp() {
  Warp& w = warp();
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.generation;
  } else {
    await(w.generation);
  }
}

// Every lane shows a value; `read` then sees all of them.
template <class T, class F>
auto exchange(const T& mine, F&& read) {
  static_assert(sizeof(T) <= kPayloadBytes && std::is_trivially_copyable_v<T>);
  Warp& w = warp();
  unsigned char* payload = w.payload[w.generation % 2];
  std::memcpy(payload + state().running->thread.x % kWarp * sizeof(T), &mine, sizeof(T));
  sync_warp();
  return read(reinterpret_cast<const T*>(payload));
}

inline int lane() { return state().running->thread.x % kWarp; }

}  // namespace emulator

#define threadIdx (emulator::state().running->thread)
#define blockIdx (emulator::state().block)

inline void __syncthreads() {
  emulator::State& s = emulator::state();
  if (++s.arrived == s.live) {
    emulator::pass_block_barrier();
  } else {
    emulator::await(s.generation);
  }
}
inline void __syncwarp() { emulator::sync_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, [&](const T* all) { return all[emulator::lane() ^ mask]; });
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
  return emulator::exchange(value, [&](const T* all) {
    return emulator::lane() + step < 32 ? all[emulator::lane() + step] : value;
  });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  return emulator::exchange(
      value, [&](const T* all) { return emulator::lane() >= step ? all[emulator::lane() - step] : value; });
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, [&](const T* all) { return all[lane % 32]; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulator::exchange(value, [](const bool* all) {
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(all[lane]) << lane;
    return mask;
  });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <class T>
T __ldg(const T* ptr) {
  if (reinterpret_cast<uintptr_t>(ptr) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned load of %zu bytes\n", sizeof(T));
    std::abort();
  }
  return *ptr;
}
template <class T>
T __ldcs(const T* ptr) {
  return __ldg(ptr);
}
using std::max;
using std::min;
template <class T>
T atomicAdd(T* ptr, T value) {
  const T old = *ptr;
  *ptr += value;
  return old;
}
template <class T>
T atomicMax(T* ptr, T value) {
  const T old = *ptr;
  *ptr = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* ptr, T value) {
  const T old = *ptr;
  *ptr = std::min(old, value);
  return old;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::state().device;
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*, void*, void*, void*,
                                            void*, size_t*) {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  return emulator::state().refused[0] == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::State& s = emulator::state();
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(s.limit);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = s.multiprocessor_bytes;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = s.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  emulator::State& s = emulator::state();
  if (static_cast<size_t>(value) > s.limit) {
    std::snprintf(s.refused, sizeof(s.refused), "asked for %d bytes of %zu", value, s.limit);
    return cudaErrorInvalidValue;
  }
  s.asked[kernel] = value;
  return cudaSuccess;
}
// With plan_only a launch is judged as CUDA would and nothing runs.
template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& params) {
  emulator::State& s = emulator::state();
  const auto found = s.asked.find(reinterpret_cast<const void*>(kernel));
  const size_t asked = found == s.asked.end() ? 0 : found->second;
  const unsigned threads = config->blockDim.x;
  const size_t bytes = config->dynamicSmemBytes;
  const bool is_granted = bytes + emulator::kStaticBytes <= emulator::kGrantedBytes || bytes <= asked;
  const unsigned blocks = config->gridDim.x;
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > 1024 ||
      threads % emulator::kWarp != 0 || bytes > s.limit || !is_granted) {
    std::snprintf(s.refused, sizeof(s.refused), "grid %u, block %u, %zu bytes of %zu, asked for %zu", blocks,
                  threads, bytes, s.limit, asked);
  }
  ++s.launches;
  if (s.refused[0] != 0) return cudaErrorInvalidValue;
  if (s.plan_only) return cudaSuccess;
  s.body = [=] { kernel(params); };
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), s.random);
  for (const unsigned block : order) emulator::run_block(block, static_cast<int>(threads));
  return cudaSuccess;
}
