// The operators of torch.ops.foldcp that replay programs of exchanges.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "engine/endpoint.h"
#include "engine/program.h"
#include "registry.h"

namespace foldcp {

using Engines = Registry<Endpoint>;
using Programs = Registry<const Program>;

namespace {

// What a machine without links and GPUs can time: an engine whose streams and links do nothing.
struct Nothing {
  using Stream = int;
  using Event = int;
  Stream compute() const { return 0; }
  Stream comm() const { return 0; }
  void record(Event, Stream) {}
  void wait(Stream, Event, Why) {}
  bool reached(Event, double) const { return true; }
  void exchange(Group) {}
  void close() {}
  void abort(const std::string&) {}
  std::string error() const { return ""; }
  void set_deadline(double) {}
  struct {
    void enable(bool) {}
    std::vector<int64_t> take() { return {}; }
  } trace;
};

}  // namespace

int64_t nothing_open(int64_t, int64_t) {
  return Engines::instance().add(
      std::make_shared<EngineEndpoint<Nothing>>(std::make_unique<Nothing>()));
}

int64_t program_add(std::vector<int64_t> numbers) {
  return Programs::instance().add(std::make_shared<const Program>(numbers));
}
void program_drop(int64_t program) { Programs::instance().remove(program); }

void flight_begin(int64_t engine, int64_t flight) {
  Engines::instance().get(engine)->begin(flight);
}

void flight_replay(int64_t engine, int64_t flight, int64_t slot, int64_t program, int64_t step,
                   std::vector<int64_t> bases, int64_t staging, int64_t room, int64_t tag,
                   bool fresh) {
  auto e = Engines::instance().get(engine);
  auto posted =
      Programs::instance().get(program)->at(step, bases, reinterpret_cast<char*>(staging), room);
  if (fresh) e->begin(flight);
  e->post(flight, slot, std::move(posted.sends), std::move(posted.recvs), tag, posted.forwards);
}

// False when it has not arrived within the time.
bool flight_await(int64_t engine, int64_t flight, int64_t slot, double seconds) {
  auto e = Engines::instance().get(engine);
  if (!e->reached(flight, slot, seconds)) return false;
  e->arrive(flight, slot);
  return true;
}

}  // namespace foldcp

STABLE_TORCH_LIBRARY_FRAGMENT(foldcp, m) {
  m.def("nothing_open(int rank, int cols) -> int");
  m.def("program_add(int[] numbers) -> int");
  m.def("program_drop(int program) -> ()");
  m.def("flight_begin(int engine, int flight) -> ()");
  m.def(
      "flight_replay(int engine, int flight, int slot, int program, int step, int[] bases, "
      "int staging, int room, int tag, bool fresh) -> ()");
  m.def("flight_await(int engine, int flight, int slot, float seconds) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(foldcp, CompositeExplicitAutograd, m) {
  using namespace foldcp;
  m.impl("nothing_open", TORCH_BOX(&nothing_open));
  m.impl("program_add", TORCH_BOX(&program_add));
  m.impl("program_drop", TORCH_BOX(&program_drop));
  m.impl("flight_begin", TORCH_BOX(&flight_begin));
  m.impl("flight_replay", TORCH_BOX(&flight_replay));
  m.impl("flight_await", TORCH_BOX(&flight_await));
}
