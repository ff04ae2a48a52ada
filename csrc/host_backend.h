// The engine's backend on the CPU: lanes are threads, the compute stream is the calling thread.
//
// Carrier C provides run(lane, transfers, tag, stream) and abort(message); with C::kDirect also
// room(sends), run_for(transfers, progress, tag, seconds) and deadline().
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "streams.h"
#include "trace.h"

namespace foldcp {

template <class C>
class HostBackend {
 public:
  using Event = ThreadEvent;
  using Stream = ThreadStream*;  // null: the calling thread, which has done all that it was given

  explicit HostBackend(std::unique_ptr<C> carrier) : carrier_(std::move(carrier)) {}

  Stream compute() const { return nullptr; }
  Stream lane(int i) {
    if (!lanes_[i]) lanes_[i] = std::make_unique<ThreadStream>();
    return lanes_[i].get();
  }

  void record(Event e, Stream s) {
    if (!s) return e.reach(e.issue());
    for (int i = 0; i < kLanes; ++i) {
      if (s != lanes_[i].get() || !halves_[i] || halves_[i]->generation) continue;
      halves_[i]->event = e;
      halves_[i]->generation = e.issue();
      return;
    }
    s->record(e);
  }

  void wait(Stream s, Event e, Why) {
    if (s) {
      // The caller's math is done when it records: mostly there is nothing to hand to the thread.
      if (!e.done()) s->wait(e);
      return;
    }
    while (!reached(e, 1.0)) {
    }
    raise();
  }

  bool reached(Event e, double seconds) {
    for (int i = 0; i < kLanes; ++i) {
      if (halves_[i] && !finish(*halves_[i], seconds)) return false;
      halves_[i].reset();
    }
    return e.await(e.issued(), seconds);
  }

  void exchange(int lane, Group group) {
    raise();
    Stream s = this->lane(lane);
    if (halves_[lane]) {  // the caller goes on before it has received: the thread does it
      s->push([this, half = std::move(halves_[lane])] { finish(*half, -1); });
    }
    if (begin(lane, s, group)) return;
    s->push([this, lane, g = std::move(group)] {
      guarded([&] {
        int64_t start = now();
        pack_all(g);
        int64_t packed = now();
        carrier_->run(lane, transfers(g), g.tag, nullptr);
        int64_t moved = now();
        unpack_all(g);
        trace.add(g.tag, lane, start, packed, moved, now());
      });
    });
  }

  void abort(const std::string& message) {
    carrier_->abort(message);
    fail(message);
  }
  std::string error() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return error_;
  }
  C& carrier() { return *carrier_; }
  void set_deadline(double seconds) { carrier_->set_deadline(seconds); }

  Trace trace;

 private:
  // An exchange whose sends are done, and whose receives are left to whom waits for it.
  struct Half {
    int lane;
    Group group;
    Event event;
    uint64_t generation = 0;  // of the event, once it is recorded
    int64_t start, packed;
    std::vector<typename C::Progress> progress;
  };

  // What is small and finds room is sent here and now: a hand-over to a thread takes longer.
  bool begin(int lane, Stream s, Group& group) {
    if constexpr (C::kDirect) {
      if (!s->idle() || !carrier_->room(group.sends)) return false;
      auto half = std::make_shared<Half>(Half{lane, {}, {}, 0, now(), 0, {}});
      guarded([&] {
        pack_all(group);
        half->packed = now();
        auto sends = transfers({group.sends, {}, group.tag});
        std::vector<typename C::Progress> progress(sends.size());
        carrier_->run_for(sends, progress, group.tag, 0);
      });
      raise();
      half->progress.resize(group.recvs.size());
      group.sends.clear();
      half->group = std::move(group);
      halves_[lane] = std::move(half);
      return true;
    } else {
      return false;
    }
  }

  // Receives for some seconds at most, -1: to the end; false when there is more to do.
  bool finish(Half& half, double seconds) {
    bool done = true;
    if constexpr (C::kDirect) {
      guarded([&] {
        auto recvs = transfers(half.group);
        double wait = seconds < 0 ? carrier_->deadline() : seconds;
        done = carrier_->run_for(recvs, half.progress, half.group.tag, wait);
        if (!done && (now() - half.start) * 1e-9 > carrier_->deadline()) carrier_->give_up();
        if (!done) return;
        int64_t moved = now();
        unpack_all(half.group);
        trace.add(half.group.tag, half.lane, half.start, half.packed, moved, now());
      });
    }
    done = done || failed_.load();
    if (done) half.event.reach(half.generation);
    return done;
  }

  static void pack_all(const Group& g) {
    for (auto& m : g.sends) {
      if (m.staging) for (auto& p : m.parts) pack(p, m.staging);
    }
  }
  static void unpack_all(const Group& g) {
    for (auto& m : g.recvs) {
      if (m.staging) for (auto& p : m.parts) unpack(p, m.staging);
    }
  }

  template <class F>
  void guarded(F f) {
    if (failed_.load()) return;  // the peers have been told
    try {
      f();
    } catch (const std::exception& e) {
      fail(e.what());
    }
  }
  void fail(const std::string& message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty()) error_ = message;
    failed_.store(true);
  }
  void raise() const {
    if (failed_.load()) throw std::runtime_error(error());
  }

  std::unique_ptr<C> carrier_;
  mutable std::mutex mutex_;
  std::string error_;
  std::atomic<bool> failed_{false};
  std::shared_ptr<Half> halves_[kLanes];
  std::unique_ptr<ThreadStream> lanes_[kLanes];  // last: they end before what they use
};

}  // namespace foldcp
