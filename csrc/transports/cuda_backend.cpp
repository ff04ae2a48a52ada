#include "transports/cuda_backend.h"

#include <dlfcn.h>

#include <chrono>
#include <stdexcept>

#include "engine/trace.h"
#include "wire/pack.h"

namespace foldcp {

namespace {

constexpr double kClosing = 10;  // seconds that what is under way gets to end by itself
constexpr double kAbort = 30;    // seconds to end once nothing waits for a peer any more

}  // namespace

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(result));
}

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current GPU");
  if (before_ == device) {
    before_ = -1;
  } else {
    check(cudaSetDevice(device), "choosing a GPU");
  }
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

cudaEvent_t CudaEvent::get(bool timed) const {
  if (!s_->event) {
    unsigned flags = timed ? cudaEventDefault : cudaEventDisableTiming;
    check(cudaEventCreateWithFlags(&s_->event, flags), "making an event");
  }
  return s_->event;
}

CudaEvent::State::~State() {
  if (event) cudaEventDestroy(event);
}

CudaBackend::CudaBackend(int device, std::unique_ptr<CudaCarrier> carrier, double deadline)
    : device_(device), carrier_(std::move(carrier)), deadline_(deadline) {
  OnDevice on(device);
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
  check(cudaStreamCreateWithPriority(&comm_, cudaStreamNonBlocking, greatest), "making a stream");
  watcher_ = std::thread([this] { watch(); });
}

// The watcher goes on until the carrier has closed: it keeps streams from waiting for ever.
void CudaBackend::close() {
  if (std::exchange(closed_, true)) return;
  OnDevice on(device_);
  if (carrier_->close(failed_.load() ? 0 : kClosing)) return;
  abort("closed while an exchange was under way");
  if (!carrier_->close(kAbort)) {
    throw std::runtime_error("the GPU does not finish its copies: end this process");
  }
}

CudaBackend::~CudaBackend() {
  try {
    close();
  } catch (const std::exception&) {
    // Told where it was closed; what the GPU may still use is left alone.
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  stopped_.notify_all();
  watcher_.join();
  OnDevice on(device_);
  carrier_.reset();
  cudaStreamDestroy(comm_);
}

// The symbol is torch's own C interface; a CPU build of torch has no such library.
CudaBackend::Stream CudaBackend::current(int device) {
  using Current = int32_t (*)(int32_t, void**);
  static auto find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Current>(found);
  }();
  void* stream = nullptr;
  if (!find || find(device, &stream) != 0) {
    throw std::runtime_error("this torch has no CUDA streams");
  }
  return static_cast<Stream>(stream);
}

void CudaBackend::record(const Event& e, Stream s) {
  OnDevice on(device_);
  check(cudaEventRecord(e.get(), s), "recording an event");
}

void CudaBackend::wait(Stream s, const Event& e, Why) {
  raise();
  OnDevice on(device_);
  check(cudaStreamWaitEvent(s, e.get(), 0), "waiting for an event");
}

void CudaBackend::exchange(Group g) {
  raise();
  OnDevice on(device_);
  Stream s = comm_;
  timeline_.mark(g.tag, 0, s);
  for (auto& m : g.sends) {
    if (!m.staging) continue;
    for (auto& p : m.parts) pack(p, m.staging, s);
  }
  timeline_.mark(g.tag, 1, s);
  try {
    carrier_->run(transfers(g), g.tag, s);
  } catch (const std::exception& e) {
    fail(e.what());
    throw;
  }
  timeline_.mark(g.tag, 2, s);
  for (auto& m : g.recvs) {
    if (!m.staging) continue;
    for (auto& p : m.parts) unpack(p, m.staging, s);
  }
  timeline_.mark(g.tag, 3, s);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(s, &capturing), "asking for a capture");
  if (capturing != cudaStreamCaptureStatusNone) return;  // runs later, and perhaps often
  std::lock_guard<std::mutex> lock(mutex_);
  CudaEvent done;
  if (!spare_.empty()) {
    done = spare_.back();
    spare_.pop_back();
  }
  check(cudaEventRecord(done.get(), s), "recording an event");
  watched_.emplace_back(done, now());
}

void CudaBackend::watch() {
  cudaSetDevice(device_);
  // Looking at events must not disturb a capture in another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  std::unique_lock<std::mutex> lock(mutex_);
  auto pause = [this] { return std::chrono::milliseconds(failed_.load() ? 10 : 100); };
  while (!stopped_.wait_for(lock, pause(), [this] { return stop_; })) {
    if (failed_.load()) {
      lock.unlock();
      carrier_->release();
      lock.lock();
      continue;
    }
    cudaError_t state = cudaSuccess;
    while (!watched_.empty() &&
           (state = cudaEventQuery(watched_.front().first.get())) == cudaSuccess) {
      spare_.push_back(watched_.front().first);
      watched_.pop_front();
    }
    bool late = !watched_.empty() && (now() - watched_.front().second) * 1e-9 > deadline_;
    lock.unlock();
    try {
      if (state != cudaSuccess && state != cudaErrorNotReady) check(state, "an exchange");
      if (late) {
        throw std::runtime_error("an exchange was not finished within " +
                                 std::to_string(static_cast<int>(deadline_.load())) + " s");
      }
      carrier_->poll();
    } catch (const std::exception& e) {
      abort(e.what());
    }
    lock.lock();
  }
}

void CudaBackend::set_deadline(double seconds) {
  deadline_ = seconds;
  carrier_->set_deadline(seconds);
}

void CudaBackend::abort(const std::string& message) {
  fail(message);
  carrier_->abort(message);
}

std::string CudaBackend::error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void CudaBackend::fail(const std::string& message) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_.empty()) error_ = message;
  failed_.store(true);
}

void CudaBackend::raise() const {
  if (failed_.load()) throw std::runtime_error(error());
}

void CudaBackend::Tracer::enable(bool on) {
  OnDevice device(b.device_);
  b.timeline_.enable(on, b.compute());
}

std::vector<int64_t> CudaBackend::Tracer::take() {
  OnDevice device(b.device_);
  return b.timeline_.take();
}

void CudaBackend::Timeline::enable(bool on, Stream compute) {
  on_ = on;
  if (!on) return;
  check(cudaStreamSynchronize(compute), "waiting for a stream");
  check(cudaEventRecord(origin_.get(true), compute), "recording an event");
  check(cudaEventSynchronize(origin_.get()), "waiting for an event");
  origin_ns_ = now();
}

void CudaBackend::Timeline::mark(int64_t tag, int column, Stream s) {
  if (!on_) return;
  if (column == 0) rows_.push_back({tag, {}});
  check(cudaEventRecord(rows_.back().at[column].get(true), s), "recording an event");
}

std::vector<int64_t> CudaBackend::Timeline::take() {
  std::vector<int64_t> out;
  for (auto& row : std::exchange(rows_, {})) {
    out.push_back(row.tag);
    for (auto& e : row.at) {
      float ms = 0;
      check(cudaEventSynchronize(e.get()), "waiting for an event");
      check(cudaEventElapsedTime(&ms, origin_.get(), e.get()), "timing an exchange");
      out.push_back(origin_ns_ + static_cast<int64_t>(ms * 1e6));
    }
  }
  return out;
}

}  // namespace foldcp
