// Copies into memory of other ranks, kept in step by flags that streams wait for and write.
//
// Every rank has a window: for each peer, two slots that this peer copies into, with a flag
// `arrived` per slot, and for each peer two flags `free` that say that this peer's slots for us can
// be overwritten. Every flag goes 0 -> 1 -> 0 within one use, so that a captured graph can be
// replayed. Sends and receives of a group go round by round, one slot each: what a send waits for,
// its peer has done in an earlier round.
//
// Ops provides wait_set(stream, flag), write(stream, flag, value) and copy(stream, to, from, bytes),
// all in stream order; flags of other ranks are written, never waited for.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "view.h"

namespace foldcp {

constexpr size_t kFlagStride = 64;  // bytes; a flag is a uint32

struct Window {
  char* base = nullptr;
  int size = 0;        // ranks
  size_t slot = 0;     // bytes

  static size_t bytes(int size, size_t slot) { return flags(size) + 2 * slot * size; }
  static size_t flags(int size) { return 4 * kFlagStride * size; }
  char* arrived(int peer, int s) const { return base + (4 * peer + s) * kFlagStride; }
  char* free(int peer, int s) const { return base + (4 * peer + 2 + s) * kFlagStride; }
  char* data(int peer, int s) const { return base + flags(size) + (2 * peer + s) * slot; }
};

template <class Ops>
class CopyProtocol {
 public:
  // `windows[r]` is rank r's window as this rank addresses it. All its `free` flags start at 1.
  CopyProtocol(Ops ops, int rank, std::vector<Window> windows)
      : ops_(ops), rank_(rank), windows_(std::move(windows)), sent_(windows_.size()), received_(windows_.size()) {}

  template <class Stream>
  void run(const std::vector<Transfer>& transfers, Stream stream) {
    size_t slot = windows_[rank_].slot, rounds = 0;
    for (auto& t : transfers) rounds = std::max(rounds, (t.bytes + slot - 1) / slot);
    for (size_t round = 0; round < rounds; ++round) {
      for (bool send : {true, false}) {
        for (auto& t : transfers) {
          size_t at = round * slot;
          if (t.send != send || at >= t.bytes) continue;
          size_t n = std::min(slot, t.bytes - at);
          send ? put(t.peer, t.data + at, n, stream) : take(t.peer, t.data + at, n, stream);
        }
      }
    }
  }

  Ops& ops() { return ops_; }

 private:
  template <class Stream>
  void put(int peer, const char* from, size_t n, Stream stream) {
    int s = sent_[peer]++ & 1;
    const Window &mine = windows_[rank_], &theirs = windows_[peer];
    ops_.wait_set(stream, mine.free(peer, s));
    ops_.write(stream, mine.free(peer, s), 0);
    ops_.copy(stream, theirs.data(rank_, s), from, n);
    ops_.write(stream, theirs.arrived(rank_, s), 1);
  }

  template <class Stream>
  void take(int peer, char* to, size_t n, Stream stream) {
    int s = received_[peer]++ & 1;
    const Window &mine = windows_[rank_], &theirs = windows_[peer];
    ops_.wait_set(stream, mine.arrived(peer, s));
    ops_.write(stream, mine.arrived(peer, s), 0);
    ops_.copy(stream, to, mine.data(peer, s), n);
    ops_.write(stream, theirs.free(rank_, s), 1);
  }

  Ops ops_;
  int rank_;
  std::vector<Window> windows_;
  std::vector<uint32_t> sent_, received_;
};

}  // namespace foldcp
