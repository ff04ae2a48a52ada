// The part of NCCL's public C interface (2.18 and later) that the transport calls. The library is
// opened at run time and never linked: nothing is needed of it at build time or without a GPU.
#pragma once
#include <climits>
#include <cstddef>
#include <string>

namespace foldcp::nccl {

struct Comm;
using comm_t = Comm*;
using stream_t = void*;  // a cudaStream_t

struct UniqueId {
  char bytes[128];
};

enum result_t : int { kSuccess = 0, kInProgress = 7 };
enum datatype_t : int { kInt8 = 0 };

// ncclConfig_t as of 2.18: it only ever grows at its end, and `size` and `version` say how far ours
// reaches.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = INT_MIN, cga_cluster_size = INT_MIN, min_ctas = INT_MIN, max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

struct Api {
  result_t (*GetVersion)(int*);
  result_t (*GetUniqueId)(UniqueId*);
  result_t (*CommInitRankConfig)(comm_t*, int, UniqueId, int, Config*);
  result_t (*CommFinalize)(comm_t);
  result_t (*CommDestroy)(comm_t);
  result_t (*CommAbort)(comm_t);
  result_t (*CommGetAsyncError)(comm_t, result_t*);
  const char* (*GetErrorString)(result_t);
  const char* (*GetLastError)(comm_t);
  result_t (*GroupStart)();
  result_t (*GroupEnd)();
  result_t (*Send)(const void*, size_t, datatype_t, int, comm_t, stream_t);
  result_t (*Recv)(void*, size_t, datatype_t, int, comm_t, stream_t);
  int version;
};

// Opens the library once: `path`, else the one that this process has loaded already, else
// libnccl.so.2. Throws std::runtime_error.
const Api& load(const std::string& path);

}  // namespace foldcp::nccl
