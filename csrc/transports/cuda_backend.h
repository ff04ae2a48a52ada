// The engine's backend on a GPU: the comm stream has a high priority, waits are events; the host
// waits for nothing. A thread watches what was posted against a deadline.
//
// Whatever GPU is current where it is called, it works on its own.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace foldcp {

void check(cudaError_t result, const char* what);

// Makes a device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();

 private:
  int before_ = -1;
};

// A CUDA event that is made at its first use; copies are the same event.
class CudaEvent {
 public:
  cudaEvent_t get(bool timed = false) const;

 private:
  struct State {
    cudaEvent_t event = nullptr;
    ~State();
  };
  std::shared_ptr<State> s_ = std::make_shared<State>();
};

// Sends and receives, in stream order.
class CudaCarrier {
 public:
  virtual ~CudaCarrier() = default;
  virtual void run(const std::vector<Transfer>& transfers, int64_t tag, cudaStream_t stream) = 0;
  virtual void set_deadline(double) {}       // of what the host waits for
  virtual void poll() {}                     // throws what went wrong in the background
  virtual void abort(const std::string&) {}  // begins to end what is under way, returns at once
  virtual void release() {}  // again and again after a failure: ends waits of streams
  // Gives up what it holds, with nothing under way; false when that has not ended in time. Throws
  // when it never will.
  virtual bool close(double) { return true; }
};

class CudaBackend {
 public:
  using Stream = cudaStream_t;
  using Event = CudaEvent;

  CudaBackend(int device, std::unique_ptr<CudaCarrier> carrier, double deadline);
  ~CudaBackend();

  static Stream current(int device);  // torch's
  Stream compute() const { return current(device_); }
  Stream comm() const { return comm_; }
  void record(const Event& e, Stream s);
  void wait(Stream s, const Event& e, Why why);
  bool reached(const Event&, double) const { return true; }
  void exchange(Group group);

  void abort(const std::string& message);
  void close();
  std::string error() const;
  void set_deadline(double seconds);

  // As Trace: events in the comm stream, read when the rows are taken.
  class Timeline {
   public:
    void enable(bool on, Stream compute);
    void mark(int64_t tag, int column, Stream s);
    std::vector<int64_t> take();

   private:
    struct Row {
      int64_t tag;
      CudaEvent at[4];
    };
    bool on_ = false;
    CudaEvent origin_;
    int64_t origin_ns_ = 0;
    std::vector<Row> rows_;
  };
  struct Tracer {
    CudaBackend& b;
    void enable(bool on);
    std::vector<int64_t> take();
  } trace{*this};

 private:
  void watch();
  void raise() const;
  void fail(const std::string& message);

  int device_;
  std::unique_ptr<CudaCarrier> carrier_;
  std::atomic<double> deadline_;
  Timeline timeline_;
  cudaStream_t comm_ = nullptr;
  mutable std::mutex mutex_;
  std::condition_variable stopped_;
  std::deque<std::pair<CudaEvent, int64_t>> watched_;  // and the time when it was posted
  std::vector<CudaEvent> spare_;
  std::string error_;
  std::atomic<bool> failed_{false};
  bool stop_ = false, closed_ = false;
  std::thread watcher_;
};

}  // namespace foldcp
