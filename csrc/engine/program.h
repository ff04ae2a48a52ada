// What an exchange sends and receives, told once and replayed with other memory.
//
// Numbers, as foldcp/fabric/transport/program.py writes them: the number of steps; per step whether
// it forwards and the number of its messages; per message whether it is sent, peer, runs and the
// number of its parts; per part base, offset in bytes, bytes of an element, type, whether it is
// FP8, and the dimensions, then sizes and strides.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "wire/view.h"

namespace foldcp {

class Program {
 public:
  explicit Program(const std::vector<int64_t>& numbers) : numbers_(numbers) {
    steps_.resize(next());
    for (auto& step : steps_) {
      step.forwards = next() != 0;
      step.messages.resize(next());
      for (auto& m : step.messages) read(m);
    }
  }

  struct Posted {
    std::vector<Message> sends, recvs;
    bool forwards;
  };

  // The messages of a step; `bases` are addresses of the memory that parts name.
  Posted at(int64_t step, const std::vector<int64_t>& bases, char* staging, int64_t room) const {
    const Step& s = steps_.at(step);
    Posted out{{}, {}, s.forwards};
    const char* end = staging + room;
    for (auto& planned : s.messages) {
      Message m = planned.message;
      for (size_t i = 0; i < m.parts.size(); ++i) {
        m.parts[i].view.data =
            reinterpret_cast<char*>(bases.at(planned.bases[i])) + planned.offsets[i];
      }
      if (planned.packed) stage(m, staging, end);
      (planned.send ? out.sends : out.recvs).push_back(std::move(m));
    }
    return out;
  }

 private:
  struct Planned {
    bool send = false, packed = false;
    Message message;
    std::vector<int64_t> bases, offsets;  // of its parts
  };
  struct Step {
    bool forwards = false;
    std::vector<Planned> messages;
  };

  int64_t next() { return numbers_.at(at_++); }

  void read(Planned& p) {
    p.send = next() != 0;
    p.message.peer = static_cast<int>(next());
    p.message.runs = next();
    for (int64_t parts = next(); parts > 0; --parts) {
      Part part;
      p.bases.push_back(next());
      p.offsets.push_back(next());
      part.view.item = static_cast<int>(next());
      part.view.type = static_cast<Type>(next());
      part.fp8 = next() != 0;
      if (part.fp8 && part.view.type == Type::other) {
        throw std::runtime_error("the FP8 wire takes float64, float32, float16 and bfloat16");
      }
      int64_t ndim = next();
      if (ndim > kDims) throw std::runtime_error("an exchange takes at most 8 dimensions");
      part.view.ndim = static_cast<int>(ndim);
      for (int i = 0; i < ndim; ++i) part.view.size[i] = next();
      for (int i = 0; i < ndim; ++i) part.view.stride[i] = next();
      part.view = merged(part.view);
      part.offset = aligned(p.message.bytes());
      p.message.parts.push_back(part);
    }
    p.packed = !p.message.direct();
  }

  std::vector<int64_t> numbers_;
  size_t at_ = 0;
  std::vector<Step> steps_;
};

}  // namespace foldcp
