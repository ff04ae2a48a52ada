#include "transports/nccl/nccl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace foldcp {

using Clock = std::chrono::steady_clock;

namespace {

constexpr double kClosing = 10;  // seconds; a peer that is gone does not hold up the end for long
constexpr double kAbort = 30;    // seconds that an abort may take

}  // namespace

Nccl::Nccl(const nccl::Api& api, const std::string& id, int size, int rank, int max_ctas,
           double deadline)
    : api_(api), deadline_(deadline) {
  nccl::UniqueId all;
  if (id.size() != sizeof(all.bytes)) throw std::runtime_error("NCCL: malformed identifier");
  std::memcpy(all.bytes, id.data(), sizeof(all.bytes));
  nccl::Config config;
  config.blocking = 0;
  if (max_ctas > 0) config.max_ctas = max_ctas;
  Lock lock(*calls_);
  nccl::result_t result = api_.CommInitRankConfig(&comm_, size, all, rank, &config);
  settle(lock, result, "forming the communicator");
}

Nccl::~Nccl() {
  try {
    close();
  } catch (const std::exception&) {
    // Told where it was closed; the communicator is left alone.
  }
}

void Nccl::close() {
  if (std::exchange(closed_, true) || !comm_) return;
  if (Lock lock(*calls_, std::chrono::seconds(1)); lock.owns_lock() && !aborted_.load()) {
    deadline_ = std::min(deadline_.load(), kClosing);
    try {
      settle(lock, api_.CommFinalize(comm_), "closing the communicator");
      api_.CommDestroy(comm_);
      return;
    } catch (const std::exception&) {
      // `settle` has begun to abort it.
    }
  }
  abort("NCCL: closed while a call was under way");
  double patience = std::min(deadline_.load(), kAbort);
  if (!abort_->wait(patience)) {
    throw std::runtime_error("NCCL: aborting the communicator has not ended within " +
                             std::to_string(static_cast<int>(patience)) +
                             " s; the GPU may be stuck: end this process");
  }
}

void Nccl::run(const std::vector<Transfer>& transfers, int64_t, void* stream) {
  Lock lock(*calls_);
  if (aborted_.load()) raise();
  api_.GroupStart();
  nccl::result_t result = nccl::kSuccess;
  for (auto& t : transfers) {
    if (t.bytes == 0) continue;
    result = t.send ? api_.Send(t.data, t.bytes, nccl::kInt8, t.peer, comm_, stream)
                    : api_.Recv(t.data, t.bytes, nccl::kInt8, t.peer, comm_, stream);
    if (result != nccl::kSuccess && result != nccl::kInProgress) break;
  }
  nccl::result_t end = api_.GroupEnd();
  if (result != nccl::kSuccess && result != nccl::kInProgress) fail(result, "an operation");
  settle(lock, end, "an exchange");
}

// Waits until a call that NCCL goes on with in the background is done.
void Nccl::settle(Lock& lock, nccl::result_t result, const char* what) {
  auto start = Clock::now();
  for (int round = 0; result == nccl::kInProgress; ++round) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(round > 64 ? 50 : 0));
    lock.lock();
    if (aborted_.load()) raise();
    if (std::chrono::duration<double>(Clock::now() - start).count() > deadline_) {
      abort(std::string("NCCL: ") + what + " took longer than " +
            std::to_string(static_cast<int>(deadline_.load())) +
            " s: a rank is missing or does something else");
      raise();
    }
    nccl::result_t state = nccl::kInProgress;
    nccl::result_t asked = api_.CommGetAsyncError(comm_, &state);
    result = asked == nccl::kSuccess ? state : asked;
  }
  if (result != nccl::kSuccess) fail(result, what);
}

void Nccl::fail(nccl::result_t result, const char* what) {
  const char* name = api_.GetErrorString(result);
  const char* last = comm_ ? api_.GetLastError(comm_) : nullptr;
  std::string message = std::string("NCCL: ") + what + " failed: ";
  message += name ? name : "unknown error";
  if (last && *last) message += std::string(" (") + last + ")";
  abort(message);
  raise();
}

void Nccl::raise() {
  std::lock_guard<std::mutex> lock(error_mutex_);
  throw std::runtime_error(error_);
}

void Nccl::poll() {
  Lock lock(*calls_, std::try_to_lock);
  if (!lock.owns_lock()) return;  // a call is being made, which looks for errors itself
  if (aborted_.load()) return;
  nccl::result_t state = nccl::kSuccess;
  nccl::result_t asked = api_.CommGetAsyncError(comm_, &state);
  if (asked != nccl::kSuccess) state = asked;
  if (state != nccl::kSuccess && state != nccl::kInProgress) fail(state, "an exchange");
}

void Nccl::abort(const std::string& message) {
  std::lock_guard<std::mutex> lock(error_mutex_);
  if (error_.empty()) error_ = message;
  aborted_.store(true);
  if (!abort_ && comm_) abort_ = nccl::Aborts::begin(api_, comm_, calls_);
}

}  // namespace foldcp
