// How bytes travel between simulated ranks: mailboxes, which do what NCCL may do, and the protocol
// of the copy engine on simulated flags.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/streams.h"
#include "pace.h"
#include "transports/copy_protocol.h"

namespace foldcp::simulator {

// Sends and receives, in the order of a stream.
class Carrier {
 public:
  virtual ~Carrier() = default;
  virtual void run(std::vector<Transfer> transfers, ThreadStream* stream) = 0;
  virtual void each_stream(const std::function<void(ThreadStream&)>&) {}  // of its own
};

// What waits between ranks look at. Once stopped, nothing waits and nothing arrives any more.
struct Gate {
  std::atomic<bool> stopped{false};
  std::atomic<uint64_t> progress{0};

  bool open() const { return !stopped.load(std::memory_order_relaxed); }
  void step() { progress.fetch_add(1, std::memory_order_relaxed); }
};

// Messages from one rank to another.
class Mailbox {
 public:
  struct Offer {
    const char* data = nullptr;
    size_t bytes = 0;
    std::vector<char> kept;
    bool taken = false;
  };

  void put(std::shared_ptr<Offer> offer) {
    std::lock_guard<std::mutex> lock(mutex_);
    offers_.push_back(std::move(offer));
    changed_.notify_all();
  }
  // Null when the simulation was stopped.
  std::shared_ptr<Offer> first(const Gate& gate) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !offers_.empty() || !gate.open(); });
    return offers_.empty() ? nullptr : offers_.front();
  }
  void take() {
    std::lock_guard<std::mutex> lock(mutex_);
    offers_.front()->taken = true;
    offers_.pop_front();
    changed_.notify_all();
  }
  void await(const Offer& offer, const Gate& gate) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return offer.taken || !gate.open(); });
  }
  void wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Offer>> offers_;
};

// A send reads its source when it runs: early, into a buffer of the carrier, or late, when the
// receiver is there. All sends of a group are under way before its first receive.
class MailboxCarrier : public Carrier {
 public:
  MailboxCarrier(std::vector<Mailbox>& boxes, Gate& gate, int rank, int size)
      : boxes_(boxes), gate_(gate), rank_(rank), size_(size) {}

  void run(std::vector<Transfer> transfers, ThreadStream* stream) override {
    stream->push([this, t = std::move(transfers)] { deliver(t); });
  }

 private:
  void deliver(const std::vector<Transfer>& transfers) {
    std::vector<std::pair<Mailbox*, std::shared_ptr<Mailbox::Offer>>> late;
    for (auto& t : transfers) {
      if (!t.send) continue;
      auto offer = std::make_shared<Mailbox::Offer>();
      offer->data = t.data;
      offer->bytes = t.bytes;
      Mailbox& box = boxes_[rank_ * size_ + t.peer];
      if (pace.random() % 2) {
        offer->kept.resize(t.bytes);
        copy_slowly(offer->kept.data(), t.data, t.bytes);
        offer->data = offer->kept.data();
      } else {
        late.emplace_back(&box, offer);
      }
      box.put(offer);
    }
    for (auto& t : transfers) {
      if (t.send) continue;
      Mailbox& box = boxes_[t.peer * size_ + rank_];
      auto offer = box.first(gate_);
      if (!offer) return;
      if (offer->bytes != t.bytes) throw std::logic_error("messages of different length");
      copy_slowly(t.data, offer->data, t.bytes);
      box.take();
      gate_.step();
    }
    for (auto& [box, offer] : late) box->await(*offer, gate_);
  }

  std::vector<Mailbox>& boxes_;
  Gate& gate_;
  int rank_, size_;
};

// What a stream does not wait for, to see that it must: a kind of flag, the caller's stream at a
// fork, or the peers' streams at a join.
enum class Ignored { none, arrived, free, fork, join };

// Ops of CopyProtocol. A flag of the simulated memory is an atomic with what a device grants: who
// sees it set sees what was written before it.
class SlowCopies {
 public:
  SlowCopies(Gate& gate, Window mine, Ignored ignored, int jitter_us, unsigned seed)
      : gate_(&gate), mine_(mine), ignored_(ignored), joined_(mine.size) {
    for (int peer = 0; peer < mine.size; ++peer) {
      sides_.push_back(std::make_unique<ThreadStream>(jitter_us, seed + peer));
    }
  }

  using Flag = std::atomic_ref<uint32_t>;
  static Flag flag_at(char* p) { return Flag(*reinterpret_cast<uint32_t*>(p)); }

  void wait_set(ThreadStream* s, char* at) const {
    bool arrived = (at - mine_.base) / kFlagStride % 4 < 2;
    if (ignored_ == (arrived ? Ignored::arrived : Ignored::free)) return;
    s->push([gate = gate_, at] {
      Flag flag = flag_at(at);
      while (gate->open() && flag.load(std::memory_order_acquire) == 0) {
        flag.wait(0, std::memory_order_acquire);
      }
      gate->step();
    });
  }
  void write(ThreadStream* s, char* at, uint32_t value) const {
    s->push([at, value] {
      flag_at(at).store(value, std::memory_order_release);
      flag_at(at).notify_all();
    });
  }
  void copy(ThreadStream* s, char* to, const char* from, size_t bytes) const {
    s->push([to, from, bytes] { copy_slowly(to, from, bytes); });
  }
  void fork(ThreadStream* s) { s->record(forked_); }
  ThreadStream* side(int peer) {
    if (ignored_ != Ignored::fork) sides_[peer]->wait(forked_);
    return sides_[peer].get();
  }
  void join(ThreadStream* s, int peer) {
    sides_[peer]->record(joined_[peer]);
    if (ignored_ != Ignored::join) s->wait(joined_[peer]);
  }
  void each_stream(const std::function<void(ThreadStream&)>& f) {
    for (auto& s : sides_) f(*s);
  }

 private:
  Gate* gate_;
  Window mine_;
  Ignored ignored_;
  ThreadEvent forked_;
  std::vector<ThreadEvent> joined_;
  std::vector<std::unique_ptr<ThreadStream>> sides_;
};

class CopyCarrier : public Carrier {
 public:
  CopyCarrier(SlowCopies ops, int rank, std::vector<Window> windows)
      : protocol_(std::move(ops), rank, std::move(windows)) {}
  void run(std::vector<Transfer> transfers, ThreadStream* stream) override {
    protocol_.run(transfers, stream);
  }
  void each_stream(const std::function<void(ThreadStream&)>& f) override {
    protocol_.ops().each_stream(f);
  }

 private:
  CopyProtocol<SlowCopies> protocol_;
};

}  // namespace foldcp::simulator
