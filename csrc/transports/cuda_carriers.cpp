#include "transports/cuda_carriers.h"

#include <cuda.h>

#include <cstring>
#include <mutex>
#include <stdexcept>

#include "engine/apart.h"

namespace foldcp {

namespace {

class NcclCarrier : public CudaCarrier {
 public:
  explicit NcclCarrier(std::unique_ptr<Nccl> nccl) : nccl_(std::move(nccl)) {}
  void run(const std::vector<Transfer>& t, int64_t tag, cudaStream_t s) override {
    nccl_->run(t, tag, s);
  }
  void set_deadline(double seconds) override { nccl_->set_deadline(seconds); }
  void poll() override { nccl_->poll(); }
  void abort(const std::string& message) override { nccl_->abort(message); }
  bool close(double) override {
    nccl_->close();
    return true;
  }

 private:
  std::unique_ptr<Nccl> nccl_;
};

// Driver functions, found at run time: the library must load on a machine without a driver.
struct Driver {
  CUresult (*wait)(CUstream, CUdeviceptr, cuuint32_t, unsigned) = nullptr;
  CUresult (*write)(CUstream, CUdeviceptr, cuuint32_t, unsigned) = nullptr;

  Driver() {
    find("cuStreamWaitValue32", wait);
    find("cuStreamWriteValue32", write);
  }
  template <class F>
  static void find(const char* name, F& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status), name);
#else  // finds the functions of the toolkit's own release, 12.0 to 12.4: the same ones
    check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status), name);
#endif
    if (!found) throw std::runtime_error(std::string("this CUDA driver has no ") + name);
    function = reinterpret_cast<F>(found);
  }
};

// What the copies of a rank use: its windows, and streams and events of its GPU.
class Copies {
 public:
  explicit Copies(std::unique_ptr<CopyWindows> windows) : windows_(std::move(windows)) {
    int device = windows_->device();
    OnDevice on(device);
    int least = 0, greatest = 0, flushes = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
    // Streams of one priority may share a queue, where this one would stand behind what it is to
    // end: where there are more priorities than two, this one is neither the comm streams' nor the
    // math's.
    make(rescue_, greatest + (least - greatest > 1));
    for (auto& s : sides_) make(s, greatest);
    check(cudaDeviceGetAttribute(&flushes, cudaDevAttrCanFlushRemoteWrites, device),
          "asking a GPU");
    // Data and flag come as two remote writes: who sees the second is to see the first.
    if (flushes) wait_flags_ |= CU_STREAM_WAIT_VALUE_FLUSH;
  }
  ~Copies() {
    cudaStreamDestroy(rescue_);
    for (auto s : sides_) cudaStreamDestroy(s);
  }

  const CopyWindows& windows() const { return *windows_; }

  void wait_set(cudaStream_t s, char* flag) const {
    done(driver_.wait(s, address(flag), 1, wait_flags_));
  }
  void write(cudaStream_t s, char* flag, uint32_t value) const {
    done(driver_.write(s, address(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT));
  }
  void fork(cudaStream_t s) const {
    check(cudaEventRecord(forked_.get(), s), "recording an event");
  }
  cudaStream_t side(int peer) const {
    check(cudaStreamWaitEvent(sides_[peer], forked_.get(), 0), "waiting for an event");
    return sides_[peer];
  }
  void join(cudaStream_t s, int peer) const {
    check(cudaEventRecord(joined_[peer].get(), sides_[peer]), "recording an event");
    check(cudaStreamWaitEvent(s, joined_[peer].get(), 0), "waiting for an event");
  }

  // Streams that wait for a flag cannot be cancelled, and each wait lowers its flag: raises them
  // all. What arrives is thrown away.
  void raise() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (freed_) return;
    OnDevice on(windows_->device());
    const Window& mine = windows_->windows()[windows_->rank()];
    cudaMemsetAsync(mine.base, 1, Window::flags(mine.size), rescue_);
  }
  // Frees the windows once nothing uses them any more, which it waits for.
  void free() {
    cudaSetDevice(windows_->device());
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // a capture elsewhere goes on
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaDeviceSynchronize();
    std::lock_guard<std::mutex> lock(mutex_);
    freed_ = true;
    cudaStreamSynchronize(rescue_);
    windows_.reset();
  }

 private:
  static void make(cudaStream_t& s, int priority) {
    check(cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, priority), "making a stream");
  }
  static CUdeviceptr address(char* p) { return reinterpret_cast<CUdeviceptr>(p); }
  static void done(CUresult result) {
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("a stream memory operation failed (CUDA driver error " +
                               std::to_string(static_cast<int>(result)) + ")");
    }
  }

  std::unique_ptr<CopyWindows> windows_;
  Driver driver_;
  unsigned wait_flags_ = CU_STREAM_WAIT_VALUE_GEQ;
  cudaStream_t rescue_ = nullptr;
  std::vector<cudaStream_t> sides_ = std::vector<cudaStream_t>(windows_->windows().size());
  CudaEvent forked_;
  std::vector<CudaEvent> joined_ = std::vector<CudaEvent>(sides_.size());
  std::mutex mutex_;  // of `freed_`: nothing writes into memory that is gone
  bool freed_ = false;
};

struct CudaCopies {
  std::shared_ptr<Copies> c;

  void wait_set(cudaStream_t s, char* flag) const { c->wait_set(s, flag); }
  void write(cudaStream_t s, char* flag, uint32_t value) const { c->write(s, flag, value); }
  void copy(cudaStream_t s, char* to, const char* from, size_t n) const {
    check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, s), "copying to a peer");
  }
  void fork(cudaStream_t s) const { c->fork(s); }
  cudaStream_t side(int peer) const { return c->side(peer); }
  void join(cudaStream_t s, int peer) const { c->join(s, peer); }
};

class CopyCarrier : public CudaCarrier {
 public:
  explicit CopyCarrier(std::unique_ptr<CopyWindows> windows)
      : copies_(std::make_shared<Copies>(std::move(windows))),
        protocol_({copies_}, copies_->windows().rank(), copies_->windows().windows()) {}

  void run(const std::vector<Transfer>& t, int64_t, cudaStream_t s) override {
    protocol_.run(t, s);
  }
  void release() override { copies_->raise(); }
  // Memory is freed apart: that waits for the GPU, where something else may hang.
  bool close(double seconds) override {
    if (!freeing_) freeing_ = std::make_unique<Apart>([c = copies_] { c->free(); });
    return freeing_->wait(seconds);
  }

 private:
  std::shared_ptr<Copies> copies_;
  CopyProtocol<CudaCopies> protocol_;
  std::unique_ptr<Apart> freeing_;
};

}  // namespace

std::unique_ptr<CudaCarrier> nccl_carrier(std::unique_ptr<Nccl> nccl) {
  return std::make_unique<NcclCarrier>(std::move(nccl));
}

std::unique_ptr<CudaCarrier> copy_carrier(std::unique_ptr<CopyWindows> windows) {
  return std::make_unique<CopyCarrier>(std::move(windows));
}

CopyWindows::CopyWindows(int device, int rank, int size, size_t slot)
    : device_(device), rank_(rank), windows_(size) {
  OnDevice on(device);
  Window& mine = windows_[rank];
  mine = {nullptr, size, aligned(slot, 256)};
  check(cudaMalloc(reinterpret_cast<void**>(&mine.base), Window::bytes(size, mine.slot)),
        "memory for exchanges");
  check(cudaMemset(mine.base, 0, Window::flags(size)), "clearing the flags");
  uint32_t one = 1;
  for (int peer = 0; peer < size; ++peer) {
    for (int s : {0, 1}) {
      check(cudaMemcpy(mine.free(peer, s), &one, sizeof(one), cudaMemcpyHostToDevice), "a flag");
    }
  }
  check(cudaDeviceSynchronize(), "clearing the flags");
}

CopyWindows::~CopyWindows() {
  for (int r = 0; r < static_cast<int>(windows_.size()); ++r) {
    if (!windows_[r].base) continue;
    r == rank_ ? cudaFree(windows_[r].base) : cudaIpcCloseMemHandle(windows_[r].base);
  }
}

std::string CopyWindows::handle() const {
  OnDevice on(device_);
  cudaIpcMemHandle_t handle;
  check(cudaIpcGetMemHandle(&handle, windows_[rank_].base), "sharing memory with other processes");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

void CopyWindows::open(const std::vector<std::string>& handles) {
  OnDevice on(device_);
  for (int r = 0; r < static_cast<int>(handles.size()); ++r) {
    if (r == rank_) continue;
    cudaIpcMemHandle_t handle;
    if (handles[r].size() != sizeof(handle)) throw std::runtime_error("malformed memory handle");
    std::memcpy(&handle, handles[r].data(), sizeof(handle));
    windows_[r] = {nullptr, windows_[rank_].size, windows_[rank_].slot};
    check(cudaIpcOpenMemHandle(reinterpret_cast<void**>(&windows_[r].base), handle,
                               cudaIpcMemLazyEnablePeerAccess),
          ("opening the memory of rank " + std::to_string(r)).c_str());
  }
}

}  // namespace foldcp
