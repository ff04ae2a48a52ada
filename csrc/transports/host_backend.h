// The engine's backend on the CPU: the comm stream is a thread, the compute stream is the calling
// thread.
//
// Carrier C provides run(transfers, tag, stream), abort(message) and close(); with C::kDirect also
// room(transfers), run_for(transfers, progress, tag, seconds) and deadline().
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "engine/engine.h"
#include "engine/streams.h"
#include "engine/trace.h"

namespace foldcp {

template <class C>
class HostBackend {
 public:
  using Event = ThreadEvent;
  using Stream = ThreadStream*;  // null: the calling thread, which has done all that it was given

  explicit HostBackend(std::unique_ptr<C> carrier) : carrier_(std::move(carrier)) {}

  Stream compute() const { return nullptr; }
  Stream comm() { return &comm_; }

  void record(Event e, Stream s) {
    if (!s) return e.reach(e.issue());
    if (!half_ || half_->generation) return s->record(e);
    half_->event = e;
    half_->generation = e.issue();
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
    if (e.done()) return true;
    if (half_ && !finish(*half_, seconds)) return false;
    half_.reset();
    return e.await(e.issued(), seconds);
  }

  void exchange(Group group) {
    raise();
    if (half_) {  // the caller goes on before it has received: the thread does it
      comm_.push([this, half = std::move(half_)] { finish(*half, -1); });
    }
    if (begin(group)) return;
    comm_.push([this, g = std::move(group)] {
      guarded([&] {
        int64_t start = now();
        pack_all(g);
        int64_t packed = now();
        carrier_->run(transfers(g), g.tag, nullptr);
        int64_t moved = now();
        unpack_all(g);
        trace.add(g.tag, start, packed, moved, now());
      });
    });
  }

  void abort(const std::string& message) {
    carrier_->abort(message);
    fail(message);
  }
  void close() {
    comm_.synchronize();  // not for longer than the deadline
    carrier_->close();
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
    Group group;
    Event event;
    uint64_t generation = 0;  // of the event, once it is recorded
    int64_t start, packed;
    std::vector<typename C::Progress> progress;
  };

  // What is small and finds room is sent here and now: a hand-over to a thread takes longer.
  bool begin(Group& group) {
    if constexpr (C::kDirect) {
      auto sends = transfers({group.sends, {}, group.tag});
      if (!comm_.idle() || !carrier_->room(sends)) return false;
      auto half = std::make_shared<Half>(Half{{}, {}, 0, now(), 0, {}});
      guarded([&] {
        pack_all(group);
        half->packed = now();
        std::vector<typename C::Progress> progress(sends.size());
        carrier_->run_for(sends, progress, group.tag, 0);
      });
      raise();
      group.sends.clear();
      half->group = std::move(group);
      half->progress.resize(transfers(half->group).size());
      half_ = std::move(half);
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
        trace.add(half.group.tag, half.start, half.packed, moved, now());
      });
    }
    done = done || failed_.load();
    if (done) half.event.reach(half.generation);
    return done;
  }

  static void pack_all(const Group& g) {
    for (auto& m : g.sends) {
      if (!m.staging) continue;
      for (auto& p : m.parts) pack(p, m.staging);
    }
  }
  static void unpack_all(const Group& g) {
    for (auto& m : g.recvs) {
      if (!m.staging) continue;
      for (auto& p : m.parts) unpack(p, m.staging);
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
  std::shared_ptr<Half> half_;
  ThreadStream comm_;  // last: it ends before what it uses
};

}  // namespace foldcp
