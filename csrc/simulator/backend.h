// The engine's backend on simulated streams; it can leave out one kind of wait of one lane.
#pragma once
#include <array>
#include <memory>
#include <string>

#include "../endpoint.h"
#include "../streams.h"
#include "carriers.h"

namespace foldcp::simulator {

// The wait that is left out; lane -1: none.
struct Mutant {
  Why why = Why::sources;
  int lane = -1;
  Ignored flags = Ignored::none;
};

class Backend {
 public:
  using Stream = ThreadStream*;
  struct Event {
    ThreadEvent event;
    std::shared_ptr<int> lane = std::make_shared<int>(-1);  // where it was recorded last
  };

  Backend(std::unique_ptr<Carrier> carrier, Mutant mutant, int jitter_us, unsigned seed)
      : carrier_(std::move(carrier)), mutant_(mutant) {
    for (auto& s : streams_) s = std::make_unique<ThreadStream>(jitter_us, seed++);
  }

  Stream compute() const { return streams_[kLanes].get(); }
  Stream lane(int i) const { return streams_[i].get(); }

  void record(Event e, Stream s) {
    *e.lane = index(s);
    s->record(e.event);
  }
  void wait(Stream s, Event e, Why why) {
    int lane = s == compute() ? *e.lane : index(s);
    ++waits[static_cast<int>(why)][lane];
    if (lane == mutant_.lane && why == mutant_.why) return;
    s->wait(e.event);
  }
  void exchange(int lane, Group group) {
    Stream s = this->lane(lane);
    auto g = std::make_shared<Group>(std::move(group));
    s->push([g] { each_staged(g->sends, [](auto& part, char* at) { pack(part, at); }); });
    carrier_->run(transfers(*g), s);
    s->push([g] { each_staged(g->recvs, [](auto& part, char* at) { unpack(part, at); }); });
  }

  bool idle() {
    for (auto& s : streams_) {
      if (!s->idle()) return false;
    }
    return true;
  }
  // Every stream gets another speed, in its turn.
  void draw(unsigned seed) {
    for (auto& s : streams_) s->push([seed = seed++ * 2654435761u] { pace.draw(seed); });
  }

  // What an endpoint asks for beside; the host of a rank never waits here.
  struct {
    void enable(bool) {}
    std::vector<int64_t> take() { return {}; }
  } trace;
  bool reached(const Event&, double) const { return true; }
  void abort(const std::string&) {}
  void set_deadline(double) {}
  std::string error() const { return ""; }

  std::array<std::array<int64_t, kLanes>, 4> waits{};  // that the engine asked for

 private:
  int index(Stream s) const {
    int i = 0;
    while (streams_[i].get() != s) ++i;
    return i;
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
  std::array<std::unique_ptr<ThreadStream>, kLanes + 1> streams_;  // last: they end before the rest
};

}  // namespace foldcp::simulator
