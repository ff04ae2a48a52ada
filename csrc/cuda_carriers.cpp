#include "cuda_carriers.h"

#include <cuda.h>

#include <cstring>
#include <stdexcept>

namespace foldcp {

namespace {

class NcclCarrier : public CudaCarrier {
 public:
  explicit NcclCarrier(std::unique_ptr<Nccl> nccl) : nccl_(std::move(nccl)) {}
  void run(int lane, const std::vector<Transfer>& t, int64_t tag, cudaStream_t s) override {
    nccl_->run(lane, t, tag, s);
  }
  void set_deadline(double seconds) override { nccl_->set_deadline(seconds); }
  void poll() override { nccl_->poll(); }
  void abort(const std::string& message) override { nccl_->abort(message); }

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

struct CudaCopies {
  Driver driver;

  void wait_set(cudaStream_t s, char* flag) const {
    done(driver.wait(s, address(flag), 1, CU_STREAM_WAIT_VALUE_GEQ));
  }
  void write(cudaStream_t s, char* flag, uint32_t value) const {
    done(driver.write(s, address(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT));
  }
  void copy(cudaStream_t s, char* to, const char* from, size_t n) const {
    check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, s), "copying to a peer");
  }
  static CUdeviceptr address(char* p) { return reinterpret_cast<CUdeviceptr>(p); }
  static void done(CUresult result) {
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("a stream memory operation failed (CUDA driver error " +
                               std::to_string(static_cast<int>(result)) + ")");
    }
  }
};

class CopyCarrier : public CudaCarrier {
 public:
  explicit CopyCarrier(std::unique_ptr<CopyWindows> windows)
      : windows_(std::move(windows)),
        protocol_(CudaCopies{}, windows_->rank(), windows_->windows()) {
    OnDevice on(windows_->device());
    check(cudaStreamCreateWithFlags(&rescue_, cudaStreamNonBlocking), "making a stream");
  }
  ~CopyCarrier() override { cudaStreamDestroy(rescue_); }

  void run(int, const std::vector<Transfer>& t, int64_t, cudaStream_t s) override {
    protocol_.run(t, s);
  }
  void poll() override {}
  // Streams that wait for a flag cannot be cancelled: raise all flags, what arrives is thrown away.
  void abort(const std::string&) override {
    OnDevice on(windows_->device());
    const Window& mine = windows_->windows()[windows_->rank()];
    cudaMemsetAsync(mine.base, 1, Window::flags(mine.size), rescue_);
  }

 private:
  std::unique_ptr<CopyWindows> windows_;
  CopyProtocol<CudaCopies> protocol_;
  cudaStream_t rescue_ = nullptr;
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
