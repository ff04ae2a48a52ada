// The exchange engine: which stream waits for what. Nothing here knows how bytes travel.
//
// A rank has one compute stream (where the caller's math runs) and one comm stream with one
// communicator, on which the exchanges of all flights run in the order in which they were posted.
// All ranks post them in the same order: that is the total order without which transfers between
// more than two ranks can wait for each other in a circle. A flight is one exchange of several
// steps; its regions live in two slots that alternate. The caller keeps this order: post(0)
// [arrive(t) post(t+1) math(t)]... arrive(last) math(last) land(), with nothing between arrive(t)
// and post(t+1) but copies into the regions of step t.
//
// Backend B provides Stream, Event, compute(), comm(), record(Event, Stream),
// wait(Stream, Event, Why) and exchange(Group).
#pragma once
#include <stdexcept>
#include <utility>
#include <vector>

#include "wire/view.h"

namespace foldcp {

// Why a stream waits; the simulator leaves out one at a time to see that each is needed.
enum class Why : int { sources, buffers, arrived, landed };

template <class B>
class Engine {
 public:
  struct Flight {
    typename B::Event ready, used;
    typename B::Event arrived[2];
    bool posted[2] = {};
    int steps = 0;
  };

  explicit Engine(B& backend) : b_(backend) {}

  // Sends and receives of the next step, into `slot`. The first one waits for what the compute
  // stream was given so far: sources and buffers. A later one waits for the math that read this
  // slot two steps ago, and no more: that math was given before arrive(t), the math of the current
  // step is given later. A step that forwards regions of the last one, as in a ring, also waits for
  // what the compute stream copied into them after arrive(t). What was received needs no wait: the
  // transfers of the last step come before these on the comm stream.
  void post(Flight& f, int slot, Group group, bool forwards) {
    bool first = f.steps++ == 0;
    if (group.sends.empty() && group.recvs.empty()) return;
    bool all = first || forwards;
    if (all) b_.record(f.ready, b_.compute());
    b_.wait(b_.comm(), all ? f.ready : f.used, first ? Why::sources : Why::buffers);
    b_.exchange(std::move(group));
    b_.record(f.arrived[slot], b_.comm());
    f.posted[slot] = true;
  }

  // The compute stream waits for the transfers of a slot, sends included.
  void arrive(Flight& f, int slot) {
    b_.record(f.used, b_.compute());
    join(f, slot, Why::arrived);
  }

  // The compute stream waits for all that is still under way: memory may be reused after it.
  void land(Flight& f) {
    for (int slot = 0; slot < 2; ++slot) join(f, slot, Why::landed);
  }

 private:
  void join(Flight& f, int slot, Why why) {
    if (!f.posted[slot]) return;
    b_.wait(b_.compute(), f.arrived[slot], why);
    f.posted[slot] = false;
  }

  B& b_;
};

}  // namespace foldcp
