// Streams and events on the CPU: a stream is a thread that runs its tasks in order.
//
// The host transport runs its transfers on them, and the simulator runs whole ranks on them, with
// jitter, to show that the engine's waits are enough and that each is needed.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

namespace foldcp {

// What a CUDA event does: a wait refers to the record that was issued last when it was called.
class ThreadEvent {
 public:
  uint64_t issue() {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return ++s_->issued;
  }
  uint64_t issued() const {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return s_->issued;
  }
  bool done() const {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return s_->reached >= s_->issued;
  }
  void reach(uint64_t generation) {
    {
      std::lock_guard<std::mutex> lock(s_->mutex);
      if (generation > s_->reached) s_->reached = generation;
    }
    s_->changed.notify_all();
  }
  // False when the time ran out first.
  bool await(uint64_t generation, double seconds) const {
    std::unique_lock<std::mutex> lock(s_->mutex);
    auto there = [&] { return s_->reached >= generation; };
    if (seconds < 0) {
      s_->changed.wait(lock, there);
      return true;
    }
    return s_->changed.wait_for(lock, std::chrono::duration<double>(seconds), there);
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t issued = 0, reached = 0;
  };
  std::shared_ptr<State> s_ = std::make_shared<State>();
};

class ThreadStream {
 public:
  explicit ThreadStream(int jitter_us = 0, unsigned seed = 1)
      : jitter_us_(jitter_us), random_(seed), thread_([this] { run(); }) {}
  ~ThreadStream() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    added_.notify_all();
    thread_.join();
  }

  void push(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      ++pending_;
    }
    added_.notify_one();
  }
  void record(ThreadEvent event) {
    uint64_t generation = event.issue();
    push([event, generation]() mutable { event.reach(generation); });
  }
  void wait(ThreadEvent event) {
    uint64_t generation = event.issued();
    push([event, generation] { event.await(generation, -1); });
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return pending_ == 0;
  }
  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    empty_.wait(lock, [&] { return pending_ == 0; });
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        added_.wait(lock, [&] { return stop_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (jitter_us_ > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random_() % jitter_us_));
      }
      task();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        --pending_;
      }
      empty_.notify_all();
    }
  }

  int jitter_us_;
  std::mt19937 random_;
  std::mutex mutex_;
  std::condition_variable added_, empty_;
  std::deque<std::function<void()>> tasks_;
  size_t pending_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace foldcp
