// The exchange engine: which stream waits for what. Nothing here knows how bytes travel.
//
// A rank has one compute stream (where the caller's math runs) and three lanes, each a stream with
// a communicator of its own: peers of its mesh row, of its mesh column, and the others. A flight is
// one exchange of several steps; its regions live in two slots that alternate. The caller keeps
// this order: post(0) [arrive(t) post(t+1) math(t)]... arrive(last) math(last) land(), with nothing
// between arrive(t) and post(t+1).
//
// Backend B provides Stream, Event, compute(), lane(int), record(Event, Stream),
// wait(Stream, Event, Why) and exchange(int lane, Group).
#pragma once
#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "view.h"

namespace foldcp {

constexpr int kLanes = 3;

// Why a stream waits; the simulator leaves out one at a time to see that each is needed.
enum class Why : int { sources, buffers, arrived, landed };

template <class B>
class Engine {
 public:
  struct Flight {
    typename B::Event ready, used;
    typename B::Event arrived[2][kLanes];
    bool posted[2][kLanes] = {};
    int steps = 0;
    bool forwarded = false;  // the last step sent from the slot that the next one overwrites
  };

  Engine(B& backend, int rank, int cols) : b_(backend), row_(rank / cols), col_(rank % cols), cols_(cols) {}

  // The lane of the messages to and from a peer.
  int lane_of(int peer) const {
    if (peer / cols_ == row_) return 0;
    return peer % cols_ == col_ ? 1 : 2;
  }

  // Sends and receives of the next step, into `slot`. The first one waits for what the compute
  // stream was given so far: sources and buffers. A later one waits for the math that read this
  // slot two steps ago, and no more, so that one lane does not wait for another: that math was given
  // before arrive(t), the math of the current step is given later. Where this step or the last one
  // forwards what the one before it brought, as in a ring, it also waits for all transfers of the
  // last step: they bring what is sent now, or still read what is overwritten now.
  void post(Flight& f, int slot, std::array<Group, kLanes> groups, bool forwards) {
    bool any = false, first = f.steps++ == 0;
    bool all = first || forwards || f.forwarded;
    f.forwarded = forwards;
    for (auto& g : groups) any = any || !g.sends.empty() || !g.recvs.empty();
    if (!any) return;
    Why why = first ? Why::sources : Why::buffers;
    typename B::Event& since = all ? f.ready : f.used;
    if (all) b_.record(f.ready, b_.compute());
    for (int lane = 0; lane < kLanes; ++lane) {
      Group& g = groups[lane];
      if (g.sends.empty() && g.recvs.empty()) continue;
      b_.wait(b_.lane(lane), since, why);
      b_.exchange(lane, std::move(g));
      b_.record(f.arrived[slot][lane], b_.lane(lane));
      f.posted[slot][lane] = true;
    }
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
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!f.posted[slot][lane]) continue;
      b_.wait(b_.compute(), f.arrived[slot][lane], why);
      f.posted[slot][lane] = false;
    }
  }

  B& b_;
  int row_, col_, cols_;
};

}  // namespace foldcp
