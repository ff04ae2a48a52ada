#include "transports/nccl/nccl_abi.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>

namespace foldcp::nccl {

namespace {

void* open_library(const std::string& path) {
  if (!path.empty()) return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* found = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
  return found ? found : dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
}

template <class F>
void look_up(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("NCCL has no function ") + name);
}

}  // namespace

const Api& load(const std::string& path) {
  static std::mutex mutex;
  static Api api;
  static bool loaded = false;
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded) return api;
  void* library = open_library(path);
  if (!library) {
    const char* why = dlerror();
    throw std::runtime_error(std::string("NCCL cannot be loaded: ") + (why ? why : "not found"));
  }
  look_up(library, "ncclGetVersion", api.GetVersion);
  look_up(library, "ncclGetUniqueId", api.GetUniqueId);
  look_up(library, "ncclCommInitRankConfig", api.CommInitRankConfig);
  look_up(library, "ncclCommFinalize", api.CommFinalize);
  look_up(library, "ncclCommDestroy", api.CommDestroy);
  look_up(library, "ncclCommAbort", api.CommAbort);
  look_up(library, "ncclCommGetAsyncError", api.CommGetAsyncError);
  look_up(library, "ncclGetErrorString", api.GetErrorString);
  look_up(library, "ncclGetLastError", api.GetLastError);
  look_up(library, "ncclGroupStart", api.GroupStart);
  look_up(library, "ncclGroupEnd", api.GroupEnd);
  look_up(library, "ncclSend", api.Send);
  look_up(library, "ncclRecv", api.Recv);
  api.GetVersion(&api.version);
  if (api.version < 21800) {
    throw std::runtime_error("NCCL " + std::to_string(api.version) + " is too old, 2.18 is needed");
  }
  loaded = true;
  return api;
}

}  // namespace foldcp::nccl
