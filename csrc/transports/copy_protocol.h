// Copies into memory of other ranks, kept in step by flags that streams wait for and write.
//
// Every rank has a window: for each peer, two slots that this peer copies into, with a flag
// `arrived` per slot, and for each peer two flags `free` that say that this peer's slots for us can
// be overwritten. Every flag goes 0 -> 1 -> 0 within one use, so that a captured graph can be
// replayed. Sends and receives of a group go round by round, one slot each: what a send waits for,
// its peer has done in an earlier round.
//
// Copies to and from several peers run at the same time, each peer's on a stream of its own that is
// forked from the caller's and joined again. They are issued round by round all the same: streams
// that share a queue of the device come to no order in which they wait for each other in a circle.
//
// Ops provides wait_set(stream, flag), write(stream, flag, value) and copy(stream, to, from,
// bytes), all in stream order, where flags of other ranks are written, never waited for; and
// fork(stream), side(peer), a stream that goes on from the last fork, and join(stream, peer).
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "wire/view.h"

namespace foldcp {

constexpr size_t kFlagStride = 64;  // bytes; a flag is a uint32

struct Window {
  char* base = nullptr;
  int size = 0;     // ranks
  size_t slot = 0;  // bytes

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
      : ops_(std::move(ops)),
        rank_(rank),
        windows_(std::move(windows)),
        sent_(windows_.size()),
        received_(windows_.size()) {}

  template <class Stream>
  void run(const std::vector<Transfer>& transfers, Stream stream) {
    std::vector<Line<Stream>> lines;
    for (auto& t : transfers) cut(t, line(lines, t.peer, stream));
    bool forks = lines.size() > 1;
    if (forks) ops_.fork(stream);
    size_t rounds = 0;
    for (auto& l : lines) {
      if (forks) l.stream = ops_.side(l.peer);
      rounds = std::max({rounds, l.out.size(), l.in.size()});
    }
    for (size_t round = 0; round < rounds; ++round) {
      for (auto& l : lines) {
        if (round < l.out.size()) put(l.peer, l.out[round], l.stream);
      }
      for (auto& l : lines) {
        if (round < l.in.size()) take(l.peer, l.in[round], l.stream);
      }
    }
    for (auto& l : lines) {
      if (forks) ops_.join(stream, l.peer);
    }
  }

  Ops& ops() { return ops_; }

 private:
  struct Piece {  // a slot's worth at most
    char* data;
    size_t bytes;
  };
  template <class Stream>
  struct Line {
    int peer;
    Stream stream;
    std::vector<Piece> out, in;
  };

  template <class Stream>
  static Line<Stream>& line(std::vector<Line<Stream>>& lines, int peer, Stream stream) {
    for (auto& l : lines) {
      if (l.peer == peer) return l;
    }
    return lines.emplace_back(Line<Stream>{peer, stream, {}, {}});
  }

  template <class Stream>
  void cut(const Transfer& t, Line<Stream>& l) const {
    size_t slot = windows_[rank_].slot;
    for (size_t at = 0; at < t.bytes; at += slot) {
      (t.send ? l.out : l.in).push_back({t.data + at, std::min(slot, t.bytes - at)});
    }
  }

  template <class Stream>
  void put(int peer, Piece piece, Stream stream) {
    int s = sent_[peer]++ & 1;
    const Window &mine = windows_[rank_], &theirs = windows_[peer];
    ops_.wait_set(stream, mine.free(peer, s));
    ops_.write(stream, mine.free(peer, s), 0);
    ops_.copy(stream, theirs.data(rank_, s), piece.data, piece.bytes);
    ops_.write(stream, theirs.arrived(rank_, s), 1);
  }

  template <class Stream>
  void take(int peer, Piece piece, Stream stream) {
    int s = received_[peer]++ & 1;
    const Window &mine = windows_[rank_], &theirs = windows_[peer];
    ops_.wait_set(stream, mine.arrived(peer, s));
    ops_.write(stream, mine.arrived(peer, s), 0);
    ops_.copy(stream, piece.data, mine.data(peer, s), piece.bytes);
    ops_.write(stream, theirs.free(rank_, s), 1);
  }

  Ops ops_;
  int rank_;
  std::vector<Window> windows_;
  std::vector<uint32_t> sent_, received_;
};

}  // namespace foldcp
