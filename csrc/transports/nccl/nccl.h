// NCCL as a carrier: one communicator, made without blocking, every wait with a deadline.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transports/nccl/nccl_abi.h"
#include "transports/nccl/nccl_aborts.h"
#include "wire/view.h"

namespace foldcp {

class Nccl {
 public:
  static constexpr bool kDirect = false;  // see HostBackend
  struct Progress {};

  // `id`: 128 bytes, of all ranks of the mesh.
  Nccl(const nccl::Api& api, const std::string& id, int size, int rank, int max_ctas,
       double deadline);
  ~Nccl();
  Nccl(const Nccl&) = delete;

  // Enqueues on the stream; throws std::runtime_error and aborts when NCCL reports an error or
  // does not take the operations within the deadline.
  void run(const std::vector<Transfer>& transfers, int64_t tag, void* stream);
  // Looks for errors that NCCL found in the background; throws and aborts.
  void poll();
  // Returns at once, whatever the GPU and other calls do.
  void abort(const std::string& message);
  // Ends the communicator, together with the other ranks or by the abort that has begun; throws
  // when that does not end: the GPU may still be at work for it.
  void close();
  double deadline() const { return deadline_; }
  void set_deadline(double seconds) { deadline_ = seconds; }

 private:
  using Lock = std::unique_lock<nccl::Calls>;

  // Gives the lock up between two looks: an abort need not wait then.
  void settle(Lock& lock, nccl::result_t result, const char* what);
  [[noreturn]] void fail(nccl::result_t result, const char* what);
  [[noreturn]] void raise();

  const nccl::Api& api_;
  std::atomic<double> deadline_;
  nccl::comm_t comm_ = nullptr;
  std::shared_ptr<nccl::Calls> calls_ = std::make_shared<nccl::Calls>();
  std::mutex error_mutex_;
  std::string error_;                 // the first one
  std::shared_ptr<Apart> abort_;      // once it has begun; guarded by error_mutex_
  std::atomic<bool> aborted_{false};  // then nobody but the abort uses the communicator
  bool closed_ = false;
};

}  // namespace foldcp
