#include "nccl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace foldcp {

using Clock = std::chrono::steady_clock;

Nccl::Nccl(const nccl::Api& api, const std::vector<Lane>& lanes,
           std::vector<std::vector<int>> ranks_of, int max_ctas, double deadline)
    : api_(api), ranks_of_(std::move(ranks_of)), deadline_(deadline) {
  // One after the other, in the same order on every rank.
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!lanes[lane].id.empty()) make(lane, lanes[lane], max_ctas);
  }
}

void Nccl::make(int lane, const Lane& what, int max_ctas) {
  nccl::UniqueId id;
  std::unique_lock<std::mutex> lock(mutex_);
  if (what.id.size() != sizeof(id.bytes)) {
    set_error("NCCL: malformed identifier");
    throw_aborted();
  }
  std::memcpy(id.bytes, what.id.data(), sizeof(id.bytes));
  nccl::Config config;
  config.blocking = 0;
  if (max_ctas > 0) config.max_ctas = max_ctas;
  nccl::result_t result =
      api_.CommInitRankConfig(&comms_[lane], what.size, id, what.rank, &config);
  settle(lock, lane, result, "forming the communicator");
}

Nccl::~Nccl() {
  std::unique_lock<std::mutex> lock(mutex_);
  deadline_ = std::min(deadline_.load(), 10.0);  // a peer that is gone does not hold up the end for long
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!comms_[lane]) continue;  // aborted, or never made
    try {
      settle(lock, lane, api_.CommFinalize(comms_[lane]), "closing the communicator");
      api_.CommDestroy(comms_[lane]);
    } catch (const std::exception&) {
      // `settle` has aborted them all.
    }
  }
}

void Nccl::run(int lane, const std::vector<Transfer>& transfers, int64_t, void* stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  nccl::comm_t comm = comms_[lane];
  if (!comm || aborted_.load()) throw_aborted();
  api_.GroupStart();
  nccl::result_t result = nccl::kSuccess;
  for (auto& t : transfers) {
    int peer = ranks_of_[lane][t.peer];
    if (t.bytes == 0) continue;
    result = t.send ? api_.Send(t.data, t.bytes, nccl::kInt8, peer, comm, stream)
                    : api_.Recv(t.data, t.bytes, nccl::kInt8, peer, comm, stream);
    if (result != nccl::kSuccess && result != nccl::kInProgress) break;
  }
  nccl::result_t end = api_.GroupEnd();
  if (result != nccl::kSuccess && result != nccl::kInProgress) fail(lane, result, "an operation");
  settle(lock, lane, end, "an exchange");
}

// Waits until a call that NCCL goes on with in the background is done.
void Nccl::settle(std::unique_lock<std::mutex>& lock, int lane, nccl::result_t result,
                  const char* what) {
  auto start = Clock::now();
  for (int round = 0; result == nccl::kInProgress; ++round) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(round > 64 ? 50 : 0));
    lock.lock();
    if (aborted_.load()) throw_aborted();
    if (std::chrono::duration<double>(Clock::now() - start).count() > deadline_) {
      set_error(std::string("NCCL: ") + what + " took longer than " +
                std::to_string(static_cast<int>(deadline_.load())) + " s (lane " + std::to_string(lane) +
                "): a rank is missing or does something else");
      throw_aborted();
    }
    nccl::result_t state = nccl::kInProgress;
    nccl::result_t asked = api_.CommGetAsyncError(comms_[lane], &state);
    result = asked == nccl::kSuccess ? state : asked;
  }
  if (result != nccl::kSuccess) fail(lane, result, what);
}

void Nccl::fail(int lane, nccl::result_t result, const char* what) {
  const char* name = api_.GetErrorString(result);
  const char* last = comms_[lane] ? api_.GetLastError(comms_[lane]) : nullptr;
  std::string message = std::string("NCCL: ") + what + " failed: ";
  message += name ? name : "unknown error";
  if (last && *last) message += std::string(" (") + last + ")";
  set_error(message);
  throw_aborted();
}

void Nccl::set_error(const std::string& message) {
  std::lock_guard<std::mutex> lock(error_mutex_);
  if (error_.empty()) error_ = message;
  aborted_.store(true);
}

// Called with `mutex_` held: an aborted communicator is of no more use, and its kernels end.
void Nccl::throw_aborted() {
  for (auto& comm : comms_) {
    if (comm) api_.CommAbort(comm);
    comm = nullptr;
  }
  std::lock_guard<std::mutex> lock(error_mutex_);
  throw std::runtime_error(error_.empty() ? "NCCL: the lane has no communicator" : error_);
}

void Nccl::poll() {
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;  // a call is being made, which looks for errors itself
  for (int lane = 0; lane < kLanes; ++lane) {
    nccl::result_t state = nccl::kSuccess;
    if (!comms_[lane]) continue;
    nccl::result_t asked = api_.CommGetAsyncError(comms_[lane], &state);
    if (asked != nccl::kSuccess) state = asked;
    if (state != nccl::kSuccess && state != nccl::kInProgress) fail(lane, state, "an exchange");
  }
}

void Nccl::abort(const std::string& message) {
  set_error(message);
  // A call that is being made sees it and gives way.
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    throw_aborted();
  } catch (const std::runtime_error&) {
  }
}

}  // namespace foldcp
