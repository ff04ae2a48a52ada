// When transfers ran, for the timeline; nanoseconds of the steady clock (Python's perf_counter_ns).
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace foldcp {

inline int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Rows of (tag, start, packed, moved, end).
class Trace {
 public:
  static constexpr int kColumns = 5;

  void enable(bool on) { on_.store(on); }
  bool enabled() const { return on_.load(); }
  void add(int64_t tag, int64_t start, int64_t packed, int64_t moved, int64_t end) {
    if (!on_.load()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    rows_.insert(rows_.end(), {tag, start, packed, moved, end});
  }
  std::vector<int64_t> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(rows_, {});
  }

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::vector<int64_t> rows_;
};

}  // namespace foldcp
