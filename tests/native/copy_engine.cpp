// The copy-engine transport on stub_cuda.cpp, ranks as threads, for
// tests/fabric/test_copy_engine.py.
//
//   copy_engine exchange|gone|closed
//
// `exchange`: three ranks send each other messages of many slots, one GPU each, while another GPU
// is current; prints the flags of all waits. `gone`: the other ranks never take part, and the
// watcher finds out. `closed`: likewise, but the transport is closed before.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "engine/endpoint.h"
#include "transports/cuda_carriers.h"

extern "C" unsigned stub_wait_flags();

namespace foldcp {

void pack(const Part&, char*, cudaStream_t) { std::abort(); }  // messages are contiguous here
void unpack(const Part&, const char*, cudaStream_t) { std::abort(); }

namespace {

constexpr int kRanks = 3;
constexpr size_t kSlot = 256, kBytes = 5 * kSlot + 8;

using Rank = EngineEndpoint<CudaBackend>;

std::vector<std::unique_ptr<Rank>> ranks(double deadline) {
  std::vector<std::unique_ptr<CopyWindows>> windows;
  std::vector<std::string> handles;
  for (int r = 0; r < kRanks; ++r) {
    windows.push_back(std::make_unique<CopyWindows>(r, r, kRanks, kSlot));
    handles.push_back(windows.back()->handle());
  }
  std::vector<std::unique_ptr<Rank>> out;
  for (int r = 0; r < kRanks; ++r) {
    windows[r]->open(handles);
    out.push_back(std::make_unique<Rank>(
        std::make_unique<CudaBackend>(r, copy_carrier(std::move(windows[r])), deadline)));
  }
  return out;
}

Message message(int peer, std::vector<char>& data) {
  View v;
  v.data = data.data();
  v.ndim = 1;
  v.size[0] = static_cast<int64_t>(data.size());
  v.stride[0] = 1;
  return {peer, {{v, false, 0}}, nullptr};
}

char number(int from, int step, size_t i) {
  return static_cast<char>(from * 100 + step * 31 + i * 7);
}

struct Traffic {
  std::vector<std::vector<char>> out, in;

  // Two messages for each peer: one may be cut in several transfers.
  void post(Rank& engine, int64_t flight, int rank, int step) {
    std::vector<Message> sends, recvs;
    out.assign(2 * kRanks, std::vector<char>(kBytes));
    in.assign(2 * kRanks, std::vector<char>(kBytes));
    for (int k = 0; k < 2 * kRanks; ++k) {
      if (k / 2 == rank) continue;
      for (size_t i = 0; i < kBytes; ++i) out[k][i] = number(rank, step + k % 2, i);
      sends.push_back(message(k / 2, out[k]));
      recvs.push_back(message(k / 2, in[k]));
    }
    engine.post(flight, step % 2, sends, recvs, step, false);
  }
  bool right(int rank, int step) const {
    for (int k = 0; k < 2 * kRanks; ++k) {
      for (size_t i = 0; i < kBytes && k / 2 != rank; ++i) {
        if (in[k][i] != number(k / 2, step + k % 2, i)) return false;
      }
    }
    return true;
  }
};

int exchange() {
  auto all = ranks(60);
  std::atomic<int> wrong{0};
  std::vector<std::thread> hosts;
  for (int r = 0; r < kRanks; ++r) {
    hosts.emplace_back([&, r] {
      Traffic traffic;
      int64_t flight = all[r]->open();
      for (int step = 0; step < 4; ++step) {
        traffic.post(*all[r], flight, r, step);
        all[r]->arrive(flight, step % 2);
        cudaStreamSynchronize(all[r]->backend().compute());
        wrong += !traffic.right(r, step);
      }
      all[r]->land(flight);
    });
  }
  for (auto& h : hosts) h.join();
  for (auto& r : all) r->close();
  std::printf("wrong %d flags %u\n", wrong.load(), stub_wait_flags());
  return wrong;
}

int gone(bool closed) {
  auto all = ranks(closed ? 60 : 0.3);
  Traffic traffic;
  int64_t flight = all[0]->open();
  traffic.post(*all[0], flight, 0, 0);
  all[0]->arrive(flight, 0);
  if (closed) {
    all[0]->abort("another rank drops this input");
    all[0]->close();
  }
  cudaStreamSynchronize(all[0]->backend().compute());
  std::printf("%s\n", all[0]->error().c_str());
  all[0].reset();
  std::printf("gone\n");
  return 0;
}

}  // namespace
}  // namespace foldcp

int main(int argc, char** argv) {
  std::string what = argc > 1 ? argv[1] : "";
  int code = what == "exchange" ? foldcp::exchange() : foldcp::gone(what == "closed");
  std::fflush(stdout);
  std::_Exit(code);
}
