// A strided piece of a tensor, and the messages that pieces are packed into.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace foldcp {

constexpr int kDims = 8;

enum class Type : int { other = 0, f64, f32, f16, bf16 };  // what the FP8 wire can encode

// Merged dimensions, outermost first; strides and data in units of elements of `item` bytes.
struct View {
  char* data = nullptr;
  int ndim = 0;
  int64_t size[kDims] = {};
  int64_t stride[kDims] = {};
  int item = 1;
  Type type = Type::other;

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
  bool contiguous() const { return ndim == 0 || (ndim == 1 && stride[0] == 1); }
  // Elements of the stretches of memory that it is made of.
  int64_t stretch() const { return ndim > 0 && stride[ndim - 1] == 1 ? size[ndim - 1] : 1; }
  // Whether it is so many equal parts, each within a stretch.
  bool in_runs(int64_t runs) const {
    int64_t n = count();
    return runs == 1 || n == 0 ? contiguous() : stretch() % (n / runs) == 0;
  }
};

// Drops dimensions of one element and merges neighbours that lie behind each other.
View merged(const View& v);

constexpr int64_t kSegment = 128;      // elements that share one float32 scale on the FP8 wire
constexpr size_t kAlign = 16;          // bytes; of each part in a message
constexpr size_t kStagingAlign = 256;  // bytes; of each message in a staging buffer

inline size_t aligned(size_t n, size_t to = kAlign) { return (n + to - 1) / to * to; }

// Layout of an encoded part: the scales, then from the next multiple of 16 the payload.
inline size_t scale_bytes(int64_t count) {
  return aligned(4 * static_cast<size_t>((count + kSegment - 1) / kSegment));
}

struct Part {
  View view;
  bool fp8 = false;
  size_t offset = 0;  // in the message

  size_t bytes() const {
    size_t n = static_cast<size_t>(view.count());
    return fp8 ? scale_bytes(view.count()) + n : n * view.item;
  }
};

// What travels between two ranks in one step and one direction: one transfer or, of a single part,
// several of equal size. There may be several messages to a peer; their order is that of its end.
struct Message {
  int peer = 0;
  std::vector<Part> parts;
  char* staging = nullptr;  // where it is packed; null: its transfers are contiguous
  int64_t runs = 1;         // transfers

  size_t bytes() const { return parts.empty() ? 0 : parts.back().offset + parts.back().bytes(); }
  bool direct() const { return parts.size() == 1 && !parts[0].fp8 && parts[0].view.in_runs(runs); }
};

// Gives a message the next place in a staging buffer; `at` moves on, to `end` at most.
void stage(Message& m, char*& at, const char* end);

// The messages of one step.
struct Group {
  std::vector<Message> sends, recvs;
  int64_t tag = 0;  // names the exchange and step; equal on both ends of a message
};

struct Transfer {
  bool send;
  int peer;
  char* data;
  size_t bytes;
};

std::vector<Transfer> transfers(const Group& g);

// CPU twins of the kernels in pack.cu.
void pack(const Part& part, char* message);
void unpack(const Part& part, const char* message);

}  // namespace foldcp
