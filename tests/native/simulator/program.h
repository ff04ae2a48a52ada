// What every rank's host tells its streams, step by step; tests/support/simulator_input.py writes
// it.
//
// Lines: `mesh ROWS COLS`; then per rank `rank N BLOCK...` (elements of each block of memory), and
// its steps:
//   write VIEW N NUMBER...    check VIEW N NUMBER...    copy VIEW VIEW    add VIEW VIEW
//   zero VIEW    open FLIGHT    arrive FLIGHT SLOT    land FLIGHT
//   post FLIGHT SLOT FORWARDS BLOCK N (SEND PEER RUNS N VIEW...)...   with BLOCK the staging buffer
// A VIEW is `BLOCK OFFSET NDIM SIZE... STRIDE...` in elements of four bytes.
#pragma once
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "wire/view.h"

namespace foldcp::simulator {

struct Place {
  int block = 0;
  int64_t offset = 0;
  View view;

  View in(std::vector<std::vector<uint32_t>>& memory) const {
    View v = view;
    v.data = reinterpret_cast<char*>(memory[block].data() + offset);
    return v;
  }
};

struct Parcel {
  int send = 0, peer = 0, runs = 1;
  std::vector<Place> pieces;
};

struct Step {
  std::string kind;
  Place to, from;
  std::vector<uint32_t> numbers;
  int flight = 0, slot = 0, staging = 0, forwards = 0;
  std::vector<Parcel> parcels;
};

struct Program {
  std::vector<int64_t> blocks;
  std::vector<Step> steps;
};

struct Programs {
  int rows = 0, cols = 0;
  std::vector<Program> ranks;
};

class Reader {
 public:
  explicit Reader(const std::string& path) : in_(path) {
    if (!in_) throw std::runtime_error("cannot read " + path);
  }

  Programs read() {
    Programs out;
    for (std::string word; in_ >> word;) {
      if (word == "mesh") {
        out.rows = number<int>();
        out.cols = number<int>();
      } else if (word == "rank") {
        out.ranks.emplace_back();
        out.ranks.back().blocks = list<int64_t>([&] { return number<int64_t>(); });
      } else {
        out.ranks.back().steps.push_back(step(word));
      }
    }
    return out;
  }

 private:
  template <class T>
  T number() {
    T n;
    if (!(in_ >> n)) throw std::runtime_error("the program of a rank ends too early");
    return n;
  }

  template <class T, class F>
  std::vector<T> list(F f) {
    std::vector<T> out(number<size_t>());
    for (auto& x : out) x = f();
    return out;
  }

  Place place() {
    Place p;
    p.block = number<int>();
    p.offset = number<int64_t>();
    p.view.item = 4;
    p.view.ndim = number<int>();
    for (int d = 0; d < p.view.ndim; ++d) p.view.size[d] = number<int64_t>();
    for (int d = 0; d < p.view.ndim; ++d) p.view.stride[d] = number<int64_t>();
    p.view = merged(p.view);
    return p;
  }

  Parcel parcel() {
    Parcel p{number<int>(), number<int>(), number<int>(), {}};
    p.pieces = list<Place>([&] { return place(); });
    return p;
  }

  Step step(const std::string& kind) {
    Step s;
    s.kind = kind;
    if (kind == "write" || kind == "check") {
      s.to = place();
      s.numbers = list<uint32_t>([&] { return number<uint32_t>(); });
      if (static_cast<int64_t>(s.numbers.size()) != s.to.view.count()) {
        throw std::runtime_error("a view and its numbers differ in length");
      }
    } else if (kind == "copy" || kind == "add") {
      s.to = place();
      s.from = place();
    } else if (kind == "zero") {
      s.to = place();
    } else {
      s.flight = number<int>();
      if (kind == "arrive" || kind == "post") s.slot = number<int>();
      if (kind == "post") {
        s.forwards = number<int>();
        s.staging = number<int>();
        s.parcels = list<Parcel>([&] { return parcel(); });
      } else if (kind != "open" && kind != "arrive" && kind != "land") {
        throw std::runtime_error("unknown step " + kind);
      }
    }
    return s;
  }

  std::ifstream in_;
};

}  // namespace foldcp::simulator
