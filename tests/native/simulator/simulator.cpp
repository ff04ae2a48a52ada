// Simulates ranks on CPU threads to show, without a GPU, that the engine's waits are enough and
// that each of them is needed.
//
//   simulator TRIALS SEED CARRIER MUTANT PROGRAM...
//
// CARRIER is `mailbox` or `copy`. MUTANT leaves out a wait: `none`, `sources`, `buffers`,
// `arrived`, `landed` (of the engine), `flag-arrived`, `flag-free`, `fork` or `join` (of
// CopyProtocol). A program (see program.h) holds what the hosts of all ranks tell their streams. A
// trial runs it once; several trials run back to back with the same engine and memory, while nobody
// waits for a trial to end. Memory holds poison before and after a trial, and the numbers of every
// trial are its own. For each program a line is printed:
//   PROGRAM trials T wrong W stuck S waits (four kinds, in the order above)
// where W is the number of trials in which a rank read a wrong number.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "backend.h"
#include "program.h"

namespace foldcp::simulator {

constexpr uint32_t kPoison = 0xDEADBEEF;
constexpr int kBackToBack = 10;  // trials

struct Options {
  int trials = 1;
  unsigned seed = 1;
  bool copies = false;
  Mutant mutant;
};

struct Count {
  int trials = 0, wrong = 0, stuck = 0;
  std::array<int64_t, 4> waits{};
};

// All ranks with their memory and streams, for some trials.
class World {
  using Memory = std::vector<std::vector<uint32_t>>;  // by block

 public:
  World(const Programs& programs, const Options& options, unsigned seed)
      : programs_(programs), seed_(seed), wrong_(kBackToBack), boxes_(size() * size()) {
    constexpr size_t kSlots[] = {32, 96, 4096};  // messages take several rounds, a few, or one
    for (int r = 0; r < size(); ++r) windows_.push_back(window(kSlots[seed % 3]));
    for (int r = 0; r < size(); ++r) {
      int jitter_us = seed % 4 == 0 ? 40 : 0;
      ranks_.push_back(std::make_unique<EngineEndpoint<Backend>>(std::make_unique<Backend>(
          carrier(r, options, jitter_us), options.mutant, jitter_us, seed * 64 + 4 * r)));
      memory_.emplace_back();
      for (int64_t n : programs.ranks[r].blocks) memory_[r].emplace_back(n, kPoison);
    }
  }
  ~World() {
    ranks_.clear();
    for (auto& w : windows_) std::free(w.base);
  }

  void run(int trials, double patience, Count& count) {
    std::vector<std::thread> hosts;
    for (int r = 0; r < size(); ++r) {
      hosts.emplace_back([this, r, trials] {
        for (int t = 0; t < trials; ++t) host(r, t);
      });
    }
    for (auto& h : hosts) h.join();
    await(patience);
    count.trials += trials;
    count.stuck += !gate_.open();
    for (auto& w : wrong_) count.wrong += w.load() > 0;
    for (auto& r : ranks_) {
      for (int kind = 0; kind < 4; ++kind) {
        count.waits[kind] += r->backend().waits[kind];
      }
    }
  }

 private:
  int size() const { return programs_.rows * programs_.cols; }

  // All its `free` flags are set.
  Window window(size_t slot) const {
    Window w{nullptr, size(), slot};
    size_t bytes = aligned(Window::bytes(size(), slot), kFlagStride);
    w.base = static_cast<char*>(std::aligned_alloc(kFlagStride, bytes));
    std::memset(w.base, 0, bytes);
    for (int peer = 0; peer < size(); ++peer) {
      for (int s : {0, 1}) SlowCopies::flag_at(w.free(peer, s)).store(1);
    }
    return w;
  }

  std::unique_ptr<Carrier> carrier(int rank, const Options& options, int jitter_us) {
    if (!options.copies) return std::make_unique<MailboxCarrier>(boxes_, gate_, rank, size());
    SlowCopies ops(gate_, windows_[rank], options.mutant.carrier, jitter_us,
                   seed_ * 512 + 16 * rank);
    return std::make_unique<CopyCarrier>(std::move(ops), rank, windows_);
  }

  bool idle() const {
    return std::all_of(ranks_.begin(), ranks_.end(), [](auto& r) { return r->backend().idle(); });
  }

  // Returns when all streams are idle; stops them when nothing moves any more.
  void await(double patience) {
    uint64_t seen = 0;
    auto since = std::chrono::steady_clock::now();
    while (!idle()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      auto time = std::chrono::steady_clock::now();
      uint64_t now = gate_.progress.load(std::memory_order_relaxed);
      if (now != seen) since = time;
      seen = now;
      if (gate_.open() && std::chrono::duration<double>(time - since).count() > patience) stop();
    }
  }

  void stop() {
    gate_.stopped.store(true);
    for (auto& box : boxes_) box.wake();
    for (auto& w : windows_) {
      for (char* at = w.base; at < w.base + Window::flags(w.size); at += kFlagStride) {
        SlowCopies::flag_at(at).store(1);
        SlowCopies::flag_at(at).notify_all();
      }
    }
  }

  // What one rank's host does in a trial: it only gives its streams work.
  void host(int rank, int trial) {
    auto& endpoint = *ranks_[rank];
    unsigned seed = seed_ * 1000003u + trial * 8191u + rank * 64u;
    pace.draw(seed);
    endpoint.backend().draw(seed + 1);
    uint32_t salt = (seed_ * kBackToBack + trial) * 2 + 1;  // odd: keeps numbers apart
    std::vector<int64_t> flights;
    for (auto& s : programs_.ranks[rank].steps) {
      if (s.kind == "open") {
        flights.resize(std::max<size_t>(flights.size(), s.flight + 1));
        flights[s.flight] = endpoint.open();
      } else if (s.kind == "post") {
        post(rank, s, flights[s.flight]);
      } else if (s.kind == "arrive") {
        endpoint.arrive(flights[s.flight], s.slot);
      } else if (s.kind == "land") {
        endpoint.land(flights[s.flight]);
      } else {
        endpoint.backend().compute()->push([this, rank, &s, salt, trial] {
          compute(s, memory_[rank], salt, wrong_[trial]);
          gate_.step();
        });
      }
      pause();
    }
    endpoint.backend().compute()->push([this, rank] {
      for (auto& block : memory_[rank]) std::fill(block.begin(), block.end(), kPoison);
    });
  }

  // Cuts messages as ops.cpp does: staging only where a message is not one contiguous piece.
  void post(int rank, const Step& s, int64_t flight) {
    Memory& memory = memory_[rank];
    std::vector<Message> out[2];
    char *staging = nullptr, *end = nullptr;
    if (s.staging >= 0) {
      staging = reinterpret_cast<char*>(memory[s.staging].data());
      end = staging + memory[s.staging].size() * sizeof(uint32_t);
    }
    for (auto& p : s.parcels) {
      Message m;
      m.peer = p.peer;
      m.runs = p.runs;
      for (auto& piece : p.pieces) {
        m.parts.push_back({piece.in(memory), false, aligned(m.bytes())});
      }
      if (!m.direct()) stage(m, staging, end);
      out[p.send].push_back(std::move(m));
    }
    ranks_[rank]->post(flight, s.slot, std::move(out[1]), std::move(out[0]), 0, s.forwards != 0);
  }

  // What the compute stream does, slowly.
  void compute(const Step& s, Memory& memory, uint32_t salt, std::atomic<int>& wrong) {
    View to = s.to.in(memory);
    View from = s.kind == "copy" || s.kind == "add" ? s.from.in(memory) : View{};
    if (s.kind == "check") {
      for (int again = 0; again < 2; ++again) {
        in_pieces(to.count(), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            bool found = element(to, i) == s.numbers[i] * salt || !gate_.open();
            if (!found) wrong.fetch_add(1, std::memory_order_relaxed);
          }
        });
      }
      return;
    }
    in_pieces(to.count(), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        uint32_t& x = element(to, i);
        if (s.kind == "write") x = s.numbers[i] * salt;
        if (s.kind == "copy") x = element(from, i);
        if (s.kind == "add") x += element(from, i);
        if (s.kind == "zero") x = 0;
      }
    });
  }

  const Programs& programs_;
  unsigned seed_;
  Gate gate_;
  std::vector<std::atomic<int>> wrong_;  // by trial
  std::vector<Mailbox> boxes_;
  std::vector<Window> windows_;
  std::vector<Memory> memory_;  // by rank
  std::vector<std::unique_ptr<EngineEndpoint<Backend>>> ranks_;
};

Mutant mutant_of(const std::string& text) {
  if (text == "none") return {};
  const char* waits[] = {"sources", "buffers", "arrived", "landed"};
  for (int i = 0; i < 4; ++i) {
    if (text == waits[i]) return {true, static_cast<Why>(i), Ignored::none};
  }
  const char* ignored[] = {"flag-arrived", "flag-free", "fork", "join"};
  for (int i = 0; i < 4; ++i) {
    if (text == ignored[i]) return {false, Why::sources, static_cast<Ignored>(i + 1)};
  }
  throw std::runtime_error("unknown mutant " + text);
}

Count simulate(const Programs& programs, const Options& options) {
  bool mutated = options.mutant.engine || options.mutant.carrier != Ignored::none;
  Count count;
  for (unsigned i = 0; count.trials < options.trials; ++i) {
    World world(programs, options, options.seed * 4001 + i);
    world.run(std::min(kBackToBack, options.trials - count.trials), mutated ? 0.2 : 20, count);
  }
  return count;
}

}  // namespace foldcp::simulator

int main(int argc, char** argv) {
  using namespace foldcp::simulator;
  if (argc < 6) return std::fprintf(stderr, "simulator TRIALS SEED CARRIER MUTANT PROGRAM...\n"), 2;
  Options options{std::atoi(argv[1]), static_cast<unsigned>(std::atoi(argv[2])),
                  std::string(argv[3]) == "copy", mutant_of(argv[4])};
  for (int i = 5; i < argc; ++i) {
    Count c = simulate(Reader(argv[i]).read(), options);
    std::printf("%s trials %d wrong %d stuck %d waits", argv[i], c.trials, c.wrong, c.stuck);
    for (int64_t n : c.waits) std::printf(" %lld", static_cast<long long>(n));
    std::printf("\n");
    std::fflush(stdout);
  }
}
