// Stands for CUDA's runtime, the driver's stream memory operations and torch's current streams, on
// host memory and threads: the copy-engine transport runs on it as it is. Streams and events belong
// to the GPU that is current when they are made, and do not mix; nothing hurries a waiting
// stream.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "engine/streams.h"

struct CUstream_st {
  int device;
  foldcp::ThreadStream thread;
};
struct CUevent_st {
  int device;
  foldcp::ThreadEvent event;
};

namespace {

thread_local int current = 0;
std::mutex mutex;
std::vector<cudaStream_t> streams;  // never destroyed: one that waits for ever could not be
std::map<int, cudaStream_t> torchs;
std::atomic<unsigned> wait_flags{0};

cudaStream_t made(int device) {
  auto* s = new CUstream_st{device, foldcp::ThreadStream()};
  streams.push_back(s);
  return s;
}

bool raised(CUdeviceptr at, uint32_t value) {
  std::atomic_ref<uint32_t> flag(*reinterpret_cast<uint32_t*>(at));
  return static_cast<int32_t>(flag.load() - value) >= 0;
}

CUresult wait_value(CUstream s, CUdeviceptr at, cuuint32_t value, unsigned flags) {
  wait_flags |= flags;
  s->thread.push([=] {
    while (!raised(at, value)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  });
  return CUDA_SUCCESS;
}

CUresult write_value(CUstream s, CUdeviceptr at, cuuint32_t value, unsigned) {
  s->thread.push([=] { std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(at)).store(value); });
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

unsigned stub_wait_flags() { return wait_flags; }

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** out) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& s = torchs[device];
  if (!s) s = made(device);
  *out = s;
  return 0;
}

const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorInvalidResourceHandle ? "invalid resource handle" : "an error";
}
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrCanFlushRemoteWrites && getenv("STUB_CUDA_FLUSHES") != nullptr;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  if (!strcmp(name, "cuStreamWaitValue32")) *out = reinterpret_cast<void*>(&wait_value);
  if (!strcmp(name, "cuStreamWriteValue32")) *out = reinterpret_cast<void*>(&write_value);
  return *status = cudaDriverEntryPointSuccess, cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  std::lock_guard<std::mutex> lock(mutex);
  return *out = made(current), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  return s->thread.wait(e->event), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return s->thread.synchronize(), cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* out) {
  return *out = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  std::vector<cudaStream_t> all;
  {
    std::lock_guard<std::mutex> lock(mutex);
    all = streams;
  }
  for (auto s : all) {
    if (s->device == current) s->thread.synchronize();
  }
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  return *out = new CUevent_st{current, {}}, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (e->device != s->device) return cudaErrorInvalidResourceHandle;
  return s->thread.record(e->event), cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  return e->event.done() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  return e->event.await(e->event.issued(), -1), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 0, cudaSuccess;
}

cudaError_t cudaMalloc(void** out, size_t bytes) {
  return *out = std::aligned_alloc(64, (bytes + 63) / 64 * 64), cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  cudaDeviceSynchronize();  // as a GPU does
  return std::free(p), cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t n) {
  return std::memset(p, value, n), cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return std::memcpy(to, from, n), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t s) {
  s->thread.push([=] { std::memset(p, value, n); });
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  s->thread.push([=] { std::memcpy(to, from, n); });
  return cudaSuccess;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* p) {
  return std::memcpy(out, &p, sizeof(p)), cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t handle, unsigned) {
  return std::memcpy(out, &handle, sizeof(*out)), cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }

}  // extern "C"
