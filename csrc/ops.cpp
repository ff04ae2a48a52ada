// The operators of torch.ops.foldcp: engines, flights, packing. Strings that are bytes are in hex.
//
// Includes go one way (tests/unit/test_includes.py): wire (pieces of tensors as bytes) <- engine
// (which stream waits for what) <- transports (how bytes travel) <- the operators, which alone know
// torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>

#include "engine/endpoint.h"
#include "registry.h"
#include "transports/host_backend.h"
#include "transports/nccl/nccl.h"
#include "transports/shared_memory.h"
#ifdef FOLDCP_WITH_CUDA
#include "transports/cuda_backend.h"
#include "transports/cuda_carriers.h"
#include "wire/pack.h"
#endif

namespace foldcp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using HostEngine = EngineEndpoint<HostBackend<SharedMemory>>;
using Engines = Registry<Endpoint>;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) out.push_back(part);
  return out;
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: return Type::other;
  }
}

View view_of(const Tensor& t) {
  View v;
  v.data = static_cast<char*>(t.mutable_data_ptr());
  v.item = static_cast<int>(t.element_size());
  v.type = type_of(t);
  auto sizes = t.sizes();
  auto strides = t.strides();
  if (sizes.size() > kDims) throw std::runtime_error("an exchange takes at most 8 dimensions");
  v.ndim = static_cast<int>(sizes.size());
  for (int i = 0; i < v.ndim; ++i) {
    v.size[i] = sizes[i];
    v.stride[i] = strides[i];
  }
  return merged(v);
}

Part part_of(const Tensor& t, bool fp8, size_t offset) {
  Part p{view_of(t), fp8, offset};
  if (fp8 && p.view.type == Type::other) {
    throw std::runtime_error("the FP8 wire takes float64, float32, float16 and bfloat16");
  }
  return p;
}

// Neighbours with the same peer make up one message.
std::vector<Message> messages(const std::vector<Tensor>& views, const std::vector<int64_t>& peers,
                              const std::vector<int64_t>& fp8, char*& staging, const char* end) {
  std::vector<Message> out;
  for (size_t i = 0; i < views.size(); ++i) {
    int peer = static_cast<int>(peers[i]);
    if (out.empty() || out.back().peer != peer) out.push_back({peer, {}, nullptr});
    Message& m = out.back();
    m.parts.push_back(part_of(views[i], fp8[i] != 0, aligned(m.bytes())));
  }
  for (auto& m : out) {
    if (!m.direct()) stage(m, staging, end);
  }
  return out;
}

}  // namespace

std::string build_info() {
  std::string s = "foldcp " FOLDCP_VERSION;
#ifdef FOLDCP_WITH_CUDA
  s += " cuda " + std::to_string(CUDART_VERSION) + " for " FOLDCP_ARCHS;
#else
  s += " without cuda";
#endif
  return s;
}

int64_t host_open(int64_t rank, int64_t size, int64_t slot_bytes, std::string path,
                  double deadline) {
  auto memory = std::make_unique<SharedMemory>(rank, size, slot_bytes, path, deadline);
  auto backend = std::make_unique<HostBackend<SharedMemory>>(std::move(memory));
  return Engines::instance().add(std::make_shared<HostEngine>(std::move(backend)));
}

int64_t host_descriptor(int64_t engine) {
  auto host = std::dynamic_pointer_cast<HostEngine>(Engines::instance().get(engine));
  return host ? host->backend().carrier().descriptor() : -1;
}

int64_t nccl_version(std::string path) { return nccl::load(path).version; }

std::string nccl_unique_id(std::string path) {
  nccl::UniqueId id;
  if (nccl::load(path).GetUniqueId(&id) != nccl::kSuccess) {
    throw std::runtime_error("NCCL: no unique identifier");
  }
  return to_hex(std::string(id.bytes, sizeof(id.bytes)));
}

// `id`: the same on all ranks. `device`: -1 is the CPU, for a stand-in of the library.
int64_t nccl_open(std::string path, int64_t device, int64_t rank, int64_t size, std::string id,
                  int64_t max_ctas, double deadline) {
#ifndef FOLDCP_WITH_CUDA
  if (device >= 0) throw std::runtime_error("foldcp was built without CUDA");
#endif
  const auto& api = nccl::load(path);
#ifdef FOLDCP_WITH_CUDA
  if (device >= 0) {
    OnDevice on(device);
    auto nccl = std::make_unique<Nccl>(api, from_hex(id), size, rank, max_ctas, deadline);
    auto backend = std::make_unique<CudaBackend>(device, nccl_carrier(std::move(nccl)), deadline);
    return Engines::instance().add(
        std::make_shared<EngineEndpoint<CudaBackend>>(std::move(backend)));
  }
#endif
  auto nccl = std::make_unique<Nccl>(api, from_hex(id), size, rank, max_ctas, deadline);
  auto backend = std::make_unique<HostBackend<Nccl>>(std::move(nccl));
  return Engines::instance().add(
      std::make_shared<EngineEndpoint<HostBackend<Nccl>>>(std::move(backend)));
}

#ifdef FOLDCP_WITH_CUDA
using Windows = Registry<std::unique_ptr<CopyWindows>>;
#endif

int64_t copy_window(int64_t device, int64_t rank, int64_t size, int64_t slot_bytes) {
#ifdef FOLDCP_WITH_CUDA
  auto windows = std::make_unique<CopyWindows>(device, rank, size, slot_bytes);
  return Windows::instance().add(
      std::make_shared<std::unique_ptr<CopyWindows>>(std::move(windows)));
#else
  throw std::runtime_error("foldcp was built without CUDA");
#endif
}

std::string copy_handle(int64_t window) {
#ifdef FOLDCP_WITH_CUDA
  return to_hex((*Windows::instance().get(window))->handle());
#else
  throw std::runtime_error("foldcp was built without CUDA");
#endif
}

int64_t copy_open(int64_t window, std::string handles, double deadline) {
#ifdef FOLDCP_WITH_CUDA
  auto windows = std::move(*Windows::instance().remove(window));
  std::vector<std::string> raw;
  for (auto& h : split(handles)) raw.push_back(from_hex(h));
  windows->open(raw);
  int device = windows->device();
  auto backend = std::make_unique<CudaBackend>(device, copy_carrier(std::move(windows)), deadline);
  return Engines::instance().add(std::make_shared<EngineEndpoint<CudaBackend>>(std::move(backend)));
#else
  throw std::runtime_error("foldcp was built without CUDA");
#endif
}

void engine_close(int64_t engine) {
  auto closing = Engines::instance().remove(engine);
  if (closing) closing->close();
}
void engine_abort(int64_t engine, std::string message) {
  Engines::instance().get(engine)->abort(message);
}
std::string engine_error(int64_t engine) { return Engines::instance().get(engine)->error(); }
void engine_deadline(int64_t engine, double seconds) {
  Engines::instance().get(engine)->set_deadline(seconds);
}
void engine_trace(int64_t engine, bool on) { Engines::instance().get(engine)->trace(on); }
std::vector<int64_t> engine_take_trace(int64_t engine) {
  return Engines::instance().get(engine)->take_trace();
}
int64_t flight_open(int64_t engine) { return Engines::instance().get(engine)->open(); }

void flight_post(int64_t engine, int64_t flight, int64_t slot, std::vector<Tensor> sends,
                 std::vector<int64_t> send_peers, std::vector<int64_t> send_fp8,
                 std::vector<Tensor> recvs, std::vector<int64_t> recv_peers,
                 std::vector<int64_t> recv_fp8, Tensor staging, int64_t tag, bool forwards) {
  char* at = static_cast<char*>(staging.mutable_data_ptr());
  const char* end = at + staging.numel();
  auto out = messages(sends, send_peers, send_fp8, at, end);
  auto in = messages(recvs, recv_peers, recv_fp8, at, end);
  Engines::instance().get(engine)->post(flight, slot, std::move(out), std::move(in), tag, forwards);
}

bool flight_reached(int64_t engine, int64_t flight, int64_t slot, double seconds) {
  return Engines::instance().get(engine)->reached(flight, slot, seconds);
}
void flight_arrive(int64_t engine, int64_t flight, int64_t slot) {
  Engines::instance().get(engine)->arrive(flight, slot);
}
void flight_land(int64_t engine, int64_t flight) { Engines::instance().get(engine)->land(flight); }

// A piece to and from its form on the wire; what the engine does, for tests and benches.
void convert_piece(const Tensor& view, bool fp8, const Tensor& message, bool there) {
  Part part = part_of(view, fp8, 0);
  char* bytes = static_cast<char*>(message.mutable_data_ptr());
  if (part.bytes() > static_cast<size_t>(message.numel()) * message.element_size()) {
    throw std::runtime_error("the message of a piece is too small");
  }
  if (!view.is_cuda()) return there ? pack(part, bytes) : unpack(part, bytes);
#ifdef FOLDCP_WITH_CUDA
  OnDevice on(view.get_device_index());
  cudaStream_t stream = CudaBackend::current(view.get_device_index());
  there ? pack(part, bytes, stream) : unpack(part, bytes, stream);
#else
  throw std::runtime_error("foldcp was built without CUDA");
#endif
}

void pack_piece(Tensor view, bool fp8, Tensor message) { convert_piece(view, fp8, message, true); }
void unpack_piece(Tensor message, bool fp8, Tensor view) {
  convert_piece(view, fp8, message, false);
}

}  // namespace foldcp

STABLE_TORCH_LIBRARY(foldcp, m) {
  m.def("build_info() -> str");
  m.def("host_open(int rank, int size, int slot_bytes, str path, float deadline) -> int");
  m.def("host_descriptor(int engine) -> int");
  m.def("nccl_version(str path) -> int");
  m.def("nccl_unique_id(str path) -> str");
  m.def(
      "nccl_open(str path, int device, int rank, int size, str id, int max_ctas, float deadline) "
      "-> int");
  m.def("copy_window(int device, int rank, int size, int slot_bytes) -> int");
  m.def("copy_handle(int window) -> str");
  m.def("copy_open(int window, str handles, float deadline) -> int");
  m.def("engine_close(int engine) -> ()");
  m.def("engine_abort(int engine, str message) -> ()");
  m.def("engine_error(int engine) -> str");
  m.def("engine_deadline(int engine, float seconds) -> ()");
  m.def("engine_trace(int engine, bool on) -> ()");
  m.def("engine_take_trace(int engine) -> int[]");
  m.def("flight_open(int engine) -> int");
  m.def(
      "flight_post(int engine, int flight, int slot, Tensor[] sends, int[] send_peers, "
      "int[] send_fp8, Tensor[] recvs, int[] recv_peers, int[] recv_fp8, Tensor staging, int tag, "
      "bool forwards=False) "
      "-> ()");
  m.def("flight_reached(int engine, int flight, int slot, float seconds) -> bool");
  m.def("flight_arrive(int engine, int flight, int slot) -> ()");
  m.def("flight_land(int engine, int flight) -> ()");
  m.def("pack_piece(Tensor view, bool fp8, Tensor(a!) message) -> ()");
  m.def("unpack_piece(Tensor message, bool fp8, Tensor(a!) view) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(foldcp, CompositeExplicitAutograd, m) {
  using namespace foldcp;
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("host_open", TORCH_BOX(&host_open));
  m.impl("host_descriptor", TORCH_BOX(&host_descriptor));
  m.impl("nccl_version", TORCH_BOX(&nccl_version));
  m.impl("nccl_unique_id", TORCH_BOX(&nccl_unique_id));
  m.impl("nccl_open", TORCH_BOX(&nccl_open));
  m.impl("copy_window", TORCH_BOX(&copy_window));
  m.impl("copy_handle", TORCH_BOX(&copy_handle));
  m.impl("copy_open", TORCH_BOX(&copy_open));
  m.impl("engine_close", TORCH_BOX(&engine_close));
  m.impl("engine_abort", TORCH_BOX(&engine_abort));
  m.impl("engine_error", TORCH_BOX(&engine_error));
  m.impl("engine_deadline", TORCH_BOX(&engine_deadline));
  m.impl("engine_trace", TORCH_BOX(&engine_trace));
  m.impl("engine_take_trace", TORCH_BOX(&engine_take_trace));
  m.impl("flight_open", TORCH_BOX(&flight_open));
  m.impl("flight_post", TORCH_BOX(&flight_post));
  m.impl("flight_reached", TORCH_BOX(&flight_reached));
  m.impl("flight_arrive", TORCH_BOX(&flight_arrive));
  m.impl("flight_land", TORCH_BOX(&flight_land));
  m.impl("pack_piece", TORCH_BOX(&pack_piece));
  m.impl("unpack_piece", TORCH_BOX(&unpack_piece));
}
