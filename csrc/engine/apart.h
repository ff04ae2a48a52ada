// A task that may never end, in a thread of its own.
#pragma once
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace foldcp {

// Begins at once; copies stand for the same task. What the task uses must outlive it: nobody ends
// it, and whoever waits too long goes on without it.
class Apart {
 public:
  explicit Apart(std::function<void()> task) {
    std::thread([s = s_, task = std::move(task)]() mutable {
      task();
      task = nullptr;  // what it held is gone when it is said to be done
      std::lock_guard<std::mutex> lock(s->mutex);
      s->done = true;
      s->changed.notify_all();
    }).detach();
  }
  // False when it has not ended in time.
  bool wait(double seconds) const {
    std::unique_lock<std::mutex> lock(s_->mutex);
    return s_->changed.wait_for(lock, std::chrono::duration<double>(seconds),
                                [&] { return s_->done; });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
  };
  std::shared_ptr<State> s_ = std::make_shared<State>();
};

}  // namespace foldcp
