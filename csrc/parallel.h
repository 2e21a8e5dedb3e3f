// Threads, borrowed from the OpenMP runtime that PyTorch has loaded: a second pool would fight the first for the cores.
//
// The library is not linked to any OpenMP runtime. `cdas_use_openmp` receives the entry point of the one in the process:
// GOMP_parallel is what compiled OpenMP code calls, in GNU's runtime and, for compatibility, in LLVM's and Intel's.
#pragma once

#include <cstdint>

namespace cdas {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
};
extern OpenMP openmp;

// Calls body(part, slot) for every part in [0, parts) on at most `threads` threads, each taking the next part when it is done
// with one. What a part computes depends on its number alone: which thread takes it, and how many there are, changes nothing.
// The slot, in [0, threads), is the thread's own, for its scratch memory.
template <typename Body> static void parallel_in_slots(int64_t parts, int64_t threads, const Body& body) {
  if (threads > parts) threads = parts;
  if (threads <= 1 || openmp.parallel == nullptr) {
    for (int64_t part = 0; part < parts; ++part) body(part, int64_t(0));
    return;
  }
  struct Context {
    const Body* body;
    int64_t parts, next, slots;
  } context{&body, parts, 0, 0};
  openmp.parallel(
      [](void* data) {
        auto* c = static_cast<Context*>(data);
        const int64_t slot = __atomic_fetch_add(&c->slots, 1, __ATOMIC_RELAXED);
        for (;;) {
          const int64_t part = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
          if (part >= c->parts) return;
          (*c->body)(part, slot);
        }
      },
      &context, static_cast<unsigned>(threads), 0);
}

// The same for a body without scratch memory: body(part).
template <typename Body> static void parallel(int64_t parts, int64_t threads, const Body& body) {
  parallel_in_slots(parts, threads, [&](int64_t part, int64_t) { body(part); });
}

struct Range {
  int64_t begin, end;
};

// The part-th of `parts` nearly equal ranges of [0, count), each but the last a multiple of `grain` long.
static inline Range share(int64_t count, int64_t part, int64_t parts, int64_t grain = 1) {
  const int64_t blocks = (count + grain - 1) / grain;
  const int64_t begin = blocks * part / parts * grain, end = blocks * (part + 1) / parts * grain;
  return {begin, end < count ? end : count};
}

}  // namespace cdas
