#include "transports/shared_memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>

namespace foldcp {

namespace {

using Clock = std::chrono::steady_clock;
constexpr long kLook = 100'000'000;  // nanoseconds between two looks at the peers while waiting
constexpr int kSpins = 100;          // looks at the slots before going to sleep

double since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

[[noreturn]] void fail_system(const char* what) {
  throw std::runtime_error(std::string("shared memory: ") + what + ": " + std::strerror(errno));
}

}  // namespace

struct alignas(64) SharedMemory::Header {
  std::atomic<uint32_t> aborted;  // 0 no, 1 message being written, 2 message there
  char message[1020];
};
struct alignas(64) SharedMemory::Bell {
  std::atomic<uint32_t> rung;  // a futex
  std::atomic<uint32_t> sleepers;
};
struct alignas(64) SharedMemory::Pipe {
  std::atomic<uint32_t> written;
  alignas(64) std::atomic<uint32_t> read;
};
struct SharedMemory::Slot {
  uint64_t total;  // bytes of the whole message
  int64_t tag;
  char* data() { return reinterpret_cast<char*>(this + 1); }
};

SharedMemory::SharedMemory(int rank, int size, size_t slot_bytes, const std::string& path,
                           double deadline)
    : rank_(rank), size_(size), slot_bytes_(aligned(slot_bytes, 64)), deadline_(deadline) {
  slot_stride_ = aligned(sizeof(Slot) + slot_bytes_, 64);
  size_t pairs = static_cast<size_t>(size) * size;
  length_ = sizeof(Header) + sizeof(Bell) * size + pairs * (sizeof(Pipe) + kSlots * slot_stride_);
  if (path.empty()) {
    fd_ = memfd_create("foldcp", MFD_CLOEXEC);
    if (fd_ < 0) fail_system("memfd_create");
    if (ftruncate(fd_, static_cast<off_t>(length_)) != 0) {
      ::close(fd_);
      fail_system("ftruncate");
    }
  } else {
    fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd_ < 0) fail_system(path.c_str());
  }
  void* base = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  struct flock mine{};
  mine.l_type = F_WRLCK;
  mine.l_whence = SEEK_SET;
  mine.l_start = rank;
  mine.l_len = 1;
  if (base == MAP_FAILED || fcntl(fd_, F_SETLK, &mine) != 0) {
    int reason = errno;
    if (base != MAP_FAILED) munmap(base, length_);
    ::close(fd_);
    errno = reason;
    fail_system(base == MAP_FAILED ? "mmap" : "lock");
  }
  base_ = static_cast<char*>(base);
}

SharedMemory::~SharedMemory() {
  munmap(base_, length_);
  ::close(fd_);  // and with it this rank's lock
}

SharedMemory::Header& SharedMemory::header() const { return *reinterpret_cast<Header*>(base_); }

SharedMemory::Bell& SharedMemory::bell(int rank) const {
  return reinterpret_cast<Bell*>(base_ + sizeof(Header))[rank];
}

SharedMemory::Pipe& SharedMemory::pipe(int from, int to) const {
  return reinterpret_cast<Pipe*>(base_ + sizeof(Header) + sizeof(Bell) * size_)[from * size_ + to];
}

SharedMemory::Slot& SharedMemory::slot(int from, int to, uint32_t index) const {
  size_t pairs = static_cast<size_t>(size_) * size_;
  char* first = base_ + sizeof(Header) + sizeof(Bell) * size_ + pairs * sizeof(Pipe);
  size_t number = static_cast<size_t>(from * size_ + to) * kSlots + index % kSlots;
  return *reinterpret_cast<Slot*>(first + number * slot_stride_);
}

void SharedMemory::ring(int rank) const {
  Bell& b = bell(rank);
  b.rung.fetch_add(1);
  if (b.sleepers.load() > 0) syscall(SYS_futex, &b.rung, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sleeps unless the bell was rung since it stood at `heard`.
void SharedMemory::sleep(uint32_t heard) const {
  Bell& b = bell(rank_);
  timespec look{0, kLook};
  b.sleepers.fetch_add(1);
  syscall(SYS_futex, &b.rung, FUTEX_WAIT, heard, &look, nullptr, 0);
  b.sleepers.fetch_sub(1);
}

bool SharedMemory::send(const Transfer& t, Progress& p, int64_t tag) {
  Pipe& way = pipe(rank_, t.peer);
  uint32_t written = way.written.load(std::memory_order_relaxed);
  if (written - way.read.load() >= kSlots) return false;
  Slot& s = slot(rank_, t.peer, written);
  size_t n = std::min(slot_bytes_, t.bytes - p.done);
  s.total = t.bytes;
  s.tag = tag;
  std::memcpy(s.data(), t.data + p.done, n);
  way.written.store(written + 1);
  p.done += n;
  ring(t.peer);
  return true;
}

bool SharedMemory::receive(const Transfer& t, Progress& p, int64_t tag) {
  Pipe& way = pipe(t.peer, rank_);
  uint32_t read = way.read.load(std::memory_order_relaxed);
  if (way.written.load(std::memory_order_acquire) == read) return false;
  Slot& s = slot(t.peer, rank_, read);
  if (s.total != t.bytes || s.tag != tag) {
    abort("the ranks run different plans: rank " + std::to_string(t.peer) + " sent " +
          std::to_string(s.total) + " bytes (step " + std::to_string(s.tag & 0xffff) +
          " of exchange " + std::to_string(s.tag >> 16) + ") where rank " + std::to_string(rank_) +
          " expected " + std::to_string(t.bytes) + " (step " + std::to_string(tag & 0xffff) +
          " of exchange " + std::to_string(tag >> 16) + ")");
    throw std::runtime_error(error());
  }
  size_t n = std::min(slot_bytes_, t.bytes - p.done);
  std::memcpy(t.data + p.done, s.data(), n);
  way.read.store(read + 1);
  p.done += n;
  // The sender may wait for room: it has seen all slots full, or it will see this one free.
  if (way.written.load() - read >= kSlots) ring(t.peer);
  return true;
}

bool SharedMemory::advance(const Transfer& t, Progress& p, int64_t tag) {
  bool moved = false;
  while (!p.finished && (t.send ? send(t, p, tag) : receive(t, p, tag))) {
    moved = true;
    p.finished = p.done >= t.bytes;
  }
  return moved;
}

bool SharedMemory::room(const std::vector<Transfer>& sends) const {
  std::vector<uint32_t> wanted(size_);
  for (auto& t : sends) {
    Pipe& way = pipe(rank_, t.peer);
    uint32_t used =
        way.written.load(std::memory_order_relaxed) - way.read.load(std::memory_order_acquire);
    if (t.bytes > slot_bytes_ || used + wanted[t.peer]++ >= kSlots) return false;
  }
  return true;
}

void SharedMemory::run(const std::vector<Transfer>& transfers, int64_t tag, void*) {
  std::vector<Progress> progress(transfers.size());
  if (!run_for(transfers, progress, tag, deadline_)) give_up();
}

void SharedMemory::give_up() {
  abort("rank " + std::to_string(rank_) + " waited " +
        std::to_string(static_cast<int>(deadline_.load())) +
        " s for an exchange that made no progress");
  throw std::runtime_error(error());
}

bool SharedMemory::run_for(const std::vector<Transfer>& transfers, std::vector<Progress>& progress,
                           int64_t tag, double seconds) {
  auto last = Clock::now();
  auto looked = last;
  // Transfers between two ranks keep their order: one is begun when those before it are done.
  std::vector<char> blocked(2 * size_);
  for (int idle = 0;;) {
    if (header().aborted.load(std::memory_order_acquire)) throw std::runtime_error(error());
    uint32_t heard = bell(rank_).rung.load();
    bool moved = false, all = true;
    std::fill(blocked.begin(), blocked.end(), 0);
    for (size_t i = 0; i < transfers.size(); ++i) {
      if (progress[i].finished) continue;
      char& held_up = blocked[2 * transfers[i].peer + transfers[i].send];
      if (!held_up) moved = advance(transfers[i], progress[i], tag) || moved;
      held_up = held_up || !progress[i].finished;
      all = all && progress[i].finished;
    }
    if (all) return true;
    if (moved) {
      idle = 0;
      last = Clock::now();
    } else if (++idle <= kSpins) {
      sched_yield();  // with more ranks than cores the peer may need this one
    } else {
      sleep(heard);
      if (since(looked) * 1e9 > kLook) {
        looked = Clock::now();
        check(transfers, progress);
      }
      if (since(last) > seconds) return false;
    }
  }
}

void SharedMemory::check(const std::vector<Transfer>& transfers,
                         const std::vector<Progress>& progress) {
  for (size_t i = 0; i < transfers.size(); ++i) {
    const Transfer& t = transfers[i];
    if (progress[i].finished || !gone(t.peer)) continue;
    // What it wrote before it ended is still there and may be all that is needed.
    Pipe& way = pipe(t.peer, rank_);
    if (!t.send && way.written.load() != way.read.load()) continue;
    abort("rank " + std::to_string(t.peer) + " is gone (its process has ended)");
  }
}

bool SharedMemory::gone(int peer) const {
  struct flock theirs{};
  theirs.l_type = F_WRLCK;
  theirs.l_whence = SEEK_SET;
  theirs.l_start = peer;
  theirs.l_len = 1;
  return fcntl(fd_, F_GETLK, &theirs) == 0 && theirs.l_type == F_UNLCK;
}

void SharedMemory::abort(const std::string& message) {
  uint32_t no = 0;
  if (header().aborted.compare_exchange_strong(no, 1)) {
    std::strncpy(header().message, message.c_str(), sizeof(header().message) - 1);
    header().aborted.store(2, std::memory_order_release);
  }
  for (int rank = 0; rank < size_; ++rank) ring(rank);
}

std::string SharedMemory::error() const {
  // Another rank may be at writing the message, or have died there: do not wait long.
  for (int i = 0; i < 100; ++i) {
    uint32_t state = header().aborted.load(std::memory_order_acquire);
    if (state != 1) return state == 0 ? "" : header().message;
    usleep(1000);
  }
  return "another rank has aborted";
}

}  // namespace foldcp
