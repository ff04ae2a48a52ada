// The engine's backend on simulated streams; it can leave out one kind of wait.
#pragma once
#include <array>
#include <memory>
#include <string>

#include "carriers.h"
#include "engine/endpoint.h"
#include "engine/streams.h"

namespace foldcp::simulator {

// The wait that is left out, of the engine or of the carrier.
struct Mutant {
  bool engine = false;
  Why why = Why::sources;
  Ignored carrier = Ignored::none;
};

class Backend {
 public:
  using Stream = ThreadStream*;
  using Event = ThreadEvent;

  Backend(std::unique_ptr<Carrier> carrier, Mutant mutant, int jitter_us, unsigned seed)
      : carrier_(std::move(carrier)),
        mutant_(mutant),
        compute_(jitter_us, seed),
        comm_(jitter_us, seed + 1) {}

  Stream compute() { return &compute_; }
  Stream comm() { return &comm_; }

  void record(Event e, Stream s) { s->record(e); }
  void wait(Stream s, Event e, Why why) {
    ++waits[static_cast<int>(why)];
    if (mutant_.engine && why == mutant_.why) return;
    s->wait(e);
  }
  void exchange(Group group) {
    auto g = std::make_shared<Group>(std::move(group));
    comm_.push([g] { each_staged(g->sends, [](auto& part, char* at) { pack(part, at); }); });
    carrier_->run(transfers(*g), &comm_);
    comm_.push([g] { each_staged(g->recvs, [](auto& part, char* at) { unpack(part, at); }); });
  }

  bool idle() {
    bool idle = true;
    each_stream([&](ThreadStream& s) { idle = idle && s.idle(); });
    return idle;
  }
  // Every stream gets another speed, in its turn.
  void draw(unsigned seed) {
    each_stream(
        [&](ThreadStream& s) { s.push([seed = seed++ * 2654435761u] { pace.draw(seed); }); });
  }

  // What an endpoint asks for beside; the host of a rank never waits here.
  struct {
    void enable(bool) {}
    std::vector<int64_t> take() { return {}; }
  } trace;
  bool reached(const Event&, double) const { return true; }
  void abort(const std::string&) {}
  void close() {}
  void set_deadline(double) {}
  std::string error() const { return ""; }

  std::array<int64_t, 4> waits{};  // that the engine asked for

 private:
  template <class F>
  void each_stream(F f) {
    f(compute_);
    f(comm_);
    carrier_->each_stream(f);
  }
  template <class F>
  static void each_staged(const std::vector<Message>& messages, F f) {
    for (auto& m : messages) {
      for (auto& part : m.parts) {
        if (!m.staging) continue;
        f(part, m.staging);
        pause();
      }
    }
  }

  std::unique_ptr<Carrier> carrier_;
  Mutant mutant_;
  ThreadStream compute_, comm_;  // last: they end before the rest
};

}  // namespace foldcp::simulator
