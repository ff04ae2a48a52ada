// Ending NCCL communicators that are in trouble, of all engines of this process.
//
// An abort may wait for the whole GPU, and so for the kernels of other communicators, which end
// only when those are aborted too. Hence nobody waits for an abort that it asks for, none keeps
// another from beginning, and those that are asked for at about the same time are one NCCL group.
#pragma once
#include <memory>
#include <mutex>

#include "engine/apart.h"
#include "transports/nccl/nccl_abi.h"

namespace foldcp::nccl {

using Calls = std::timed_mutex;  // held during each call of NCCL with a communicator

class Aborts {
 public:
  // Begins to abort and returns at once. `calls` is waited for, for a while: after it was free once
  // the caller must use the communicator no more. Done when the communicator is gone.
  static std::shared_ptr<Apart> begin(const Api& api, comm_t comm, std::shared_ptr<Calls> calls);
};

}  // namespace foldcp::nccl
