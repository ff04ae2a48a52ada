// How fast the simulated streams are, and slow copies: accesses to the simulated memory are real
// and are ordered by nothing but streams, events, mailboxes and flags.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>

#include "wire/view.h"

namespace foldcp::simulator {

// Of one thread. Every trial draws it anew: a stream that is slow throughout lets the others run
// ahead of it, which pauses that are alike everywhere do not.
struct Pace {
  std::mt19937 random;
  unsigned slow = 0;  // microseconds that a pause takes at most

  void draw(unsigned seed) {
    random.seed(seed);
    constexpr unsigned kSlow[] = {0, 20, 80, 400};
    slow = kSlow[random() % 4];
  }
};

inline thread_local Pace pace;

inline void pause() {
  if (pace.slow == 0 || pace.random() % 2) return;
  std::this_thread::sleep_for(std::chrono::microseconds(pace.random() % pace.slow));
}

// Calls f(first, last) for neighbouring ranges, with pauses between them.
template <class F>
void in_pieces(int64_t count, F f) {
  int64_t most = std::max<int64_t>(1, count / 2);
  for (int64_t at = 0; at < count;) {
    int64_t end = std::min<int64_t>(count, at + 1 + pace.random() % most);
    f(at, end);
    at = end;
    pause();
  }
}

inline void copy_slowly(char* to, const char* from, size_t bytes) {
  in_pieces(static_cast<int64_t>(bytes / 4), [&](int64_t first, int64_t last) {
    std::memcpy(to + 4 * first, from + 4 * first, 4 * (last - first));
  });
}

// Element `i` of a view, in packed order.
inline uint32_t& element(const View& v, int64_t i) {
  int64_t at = 0;
  for (int d = v.ndim - 1; d >= 0; --d) {
    at += i % v.size[d] * v.stride[d];
    i /= v.size[d];
  }
  return reinterpret_cast<uint32_t*>(v.data)[at];
}

}  // namespace foldcp::simulator
