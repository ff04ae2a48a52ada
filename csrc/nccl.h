// NCCL as a carrier: a communicator per lane, made without blocking, every wait with a deadline.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "nccl_abi.h"
#include "view.h"

namespace foldcp {

class Nccl {
 public:
  static constexpr bool kDirect = false;  // see HostBackend
  struct Progress {};

  // A lane's communicator; no `id`: it has no peers and is not made.
  struct Lane {
    std::string id;  // 128 bytes
    int size = 1;
    int rank = 0;
  };

  // `ranks_of[lane][peer]` is the rank of a peer of the mesh in that communicator.
  Nccl(const nccl::Api& api, const std::vector<Lane>& lanes,
       std::vector<std::vector<int>> ranks_of, int max_ctas, double deadline);
  ~Nccl();
  Nccl(const Nccl&) = delete;

  // Enqueues on the stream; throws std::runtime_error and aborts when NCCL reports an error or
  // does not take the operations within the deadline.
  void run(int lane, const std::vector<Transfer>& transfers, int64_t tag, void* stream);
  // Looks for errors that NCCL found in the background; throws and aborts.
  void poll();
  void abort(const std::string& message);
  double deadline() const { return deadline_; }
  void set_deadline(double seconds) { deadline_ = seconds; }

 private:
  void make(int lane, const Lane& what, int max_ctas);
  // Gives the lock up between two looks: exchanges of other lanes must go on, for a peer may wait
  // for one of those before it comes to this one.
  void settle(std::unique_lock<std::mutex>& lock, int lane, nccl::result_t result,
              const char* what);
  [[noreturn]] void fail(int lane, nccl::result_t result, const char* what);
  void set_error(const std::string& message);
  [[noreturn]] void throw_aborted();

  const nccl::Api& api_;
  std::vector<std::vector<int>> ranks_of_;
  std::atomic<double> deadline_;
  nccl::comm_t comms_[kLanes] = {};
  std::mutex mutex_;        // of the communicators: NCCL takes one call at a time
  std::mutex error_mutex_;
  std::string error_;       // the first one
  std::atomic<bool> aborted_{false};
};

}  // namespace foldcp
