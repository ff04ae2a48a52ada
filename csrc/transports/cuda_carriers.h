// What moves bytes between GPUs: NCCL, or copies into windows of peers on the same machine.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "transports/copy_protocol.h"
#include "transports/cuda_backend.h"
#include "transports/nccl/nccl.h"

namespace foldcp {

std::unique_ptr<CudaCarrier> nccl_carrier(std::unique_ptr<Nccl> nccl);

// Device memory that peers on this machine copy into. First every rank makes its own, then it opens
// those of the others by their handles.
class CopyWindows {
 public:
  CopyWindows(int device, int rank, int size, size_t slot);
  ~CopyWindows();
  CopyWindows(const CopyWindows&) = delete;

  std::string handle() const;  // for the other processes
  void open(const std::vector<std::string>& handles);
  const std::vector<Window>& windows() const { return windows_; }
  int device() const { return device_; }
  int rank() const { return rank_; }

 private:
  int device_, rank_;
  std::vector<Window> windows_;
};

std::unique_ptr<CudaCarrier> copy_carrier(std::unique_ptr<CopyWindows> windows);

}  // namespace foldcp
