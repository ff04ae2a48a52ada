// Messages between processes of one machine through a shared, nameless memory segment.
//
// Rank 0 creates the segment (memfd), the others open it through /proc, so that nothing is left
// behind whatever ends the ranks. Every ordered pair of ranks has a ring of slots; a waiting rank
// sleeps on its doorbell (a futex). A rank holds a lock on its byte of the segment for as long as
// it lives: that is how the others notice that it is gone.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "wire/view.h"

namespace foldcp {

class SharedMemory {
 public:
  // `path` is empty on the rank that creates the segment.
  SharedMemory(int rank, int size, size_t slot_bytes, const std::string& path, double deadline);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;

  int descriptor() const { return fd_; }

  static constexpr bool kDirect = true;
  struct Progress {
    size_t done = 0;
    bool finished = false;
  };

  // Carries out sends and receives; throws std::runtime_error when a peer is gone, has aborted,
  // makes no progress for `deadline` seconds, or sends something else than what is expected.
  void run(const std::vector<Transfer>& transfers, int64_t tag, void* stream);
  // The same for some seconds at most: false when there is more to do.
  bool run_for(const std::vector<Transfer>& transfers, std::vector<Progress>& progress, int64_t tag,
               double seconds);
  // Aborts because the deadline has passed.
  [[noreturn]] void give_up();
  double deadline() const { return deadline_; }
  void set_deadline(double seconds) { deadline_ = seconds; }
  // True when these sends can be carried out without waiting for anybody.
  bool room(const std::vector<Transfer>& sends) const;
  // Makes every rank's `run` throw, now and later. The first message is kept.
  void abort(const std::string& message);
  std::string error() const;
  void close() {}  // nothing is under way once the comm stream has ended

 private:
  struct Header;
  struct Bell;
  struct Pipe;
  struct Slot;

  static constexpr int kSlots = 4;
  Header& header() const;
  Bell& bell(int rank) const;
  Pipe& pipe(int from, int to) const;
  Slot& slot(int from, int to, uint32_t index) const;
  bool advance(const Transfer& t, Progress& p, int64_t tag);
  bool send(const Transfer& t, Progress& p, int64_t tag);
  bool receive(const Transfer& t, Progress& p, int64_t tag);
  void ring(int rank) const;
  void sleep(uint32_t heard) const;
  void check(const std::vector<Transfer>& transfers, const std::vector<Progress>& progress);
  bool gone(int peer) const;

  int rank_, size_, fd_ = -1;
  size_t slot_bytes_, slot_stride_, length_ = 0;
  std::atomic<double> deadline_;
  char* base_ = nullptr;
};

}  // namespace foldcp
