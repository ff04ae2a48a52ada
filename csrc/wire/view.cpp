// Packing of strided pieces on the CPU, raw or as FP8 (e4m3) with one scale per segment.
#include "wire/view.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "wire/e4m3.h"

namespace foldcp {

View merged(const View& v) {
  View out = v;
  out.ndim = 0;
  for (int i = 0; i < v.ndim; ++i) {
    if (v.size[i] == 1) continue;
    int last = out.ndim - 1;
    if (last >= 0 && out.stride[last] == v.size[i] * v.stride[i]) {
      out.size[last] *= v.size[i];
      out.stride[last] = v.stride[i];
    } else {
      out.size[out.ndim] = v.size[i];
      out.stride[out.ndim++] = v.stride[i];
    }
  }
  return out;
}

namespace {

// Calls f(pointer, elements, stride) for every innermost line, in packed order.
template <class F>
void lines(const View& v, F f) {
  if (v.count() == 0) return;
  if (v.ndim == 0) return f(v.data, int64_t{1}, int64_t{1});
  int outer = v.ndim - 1;
  int64_t index[kDims] = {};
  for (;;) {
    int64_t at = 0;
    for (int i = 0; i < outer; ++i) at += index[i] * v.stride[i];
    f(v.data + at * v.item, v.size[outer], v.stride[outer]);
    int i = outer - 1;
    while (i >= 0 && ++index[i] == v.size[i]) index[i--] = 0;
    if (i < 0) return;
  }
}

template <class Unit>
void gather_line(char* to, const char* from, int64_t n, int64_t stride) {
  auto* out = reinterpret_cast<Unit*>(to);
  auto* in = reinterpret_cast<const Unit*>(from);
  for (int64_t i = 0; i < n; ++i) out[i] = in[i * stride];
}

template <class Unit>
void scatter_line(char* to, const char* from, int64_t n, int64_t stride) {
  auto* out = reinterpret_cast<Unit*>(to);
  auto* in = reinterpret_cast<const Unit*>(from);
  for (int64_t i = 0; i < n; ++i) out[i * stride] = in[i];
}

struct Wide {
  uint64_t halves[2];
};

void copy_raw(const View& v, char* packed, bool gather) {
  lines(v, [&](char* p, int64_t n, int64_t stride) {
    size_t bytes = static_cast<size_t>(n) * v.item;
    if (stride == 1) {
      std::memcpy(gather ? packed : p, gather ? p : packed, bytes);
    } else if (gather) {
      v.item == 16  ? gather_line<Wide>(packed, p, n, stride)
      : v.item == 8 ? gather_line<uint64_t>(packed, p, n, stride)
      : v.item == 4 ? gather_line<uint32_t>(packed, p, n, stride)
      : v.item == 2 ? gather_line<uint16_t>(packed, p, n, stride)
                    : gather_line<uint8_t>(packed, p, n, stride);
    } else {
      v.item == 16  ? scatter_line<Wide>(p, packed, n, stride)
      : v.item == 8 ? scatter_line<uint64_t>(p, packed, n, stride)
      : v.item == 4 ? scatter_line<uint32_t>(p, packed, n, stride)
      : v.item == 2 ? scatter_line<uint16_t>(p, packed, n, stride)
                    : scatter_line<uint8_t>(p, packed, n, stride);
    }
    packed += bytes;
  });
}

// Walks segments of 128 elements that may span lines: f(element pointers, how many, which).
template <class F>
void segments(const View& v, F f) {
  char* held[kSegment];
  int filled = 0;
  int64_t index = 0;
  lines(v, [&](char* p, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) {
      held[filled++] = p + i * stride * v.item;
      if (filled == kSegment) {
        f(held, filled, index++);
        filled = 0;
      }
    }
  });
  if (filled) f(held, filled, index);
}

void encode(const View& v, char* message) {
  auto* scales = reinterpret_cast<float*>(message);
  auto* payload = reinterpret_cast<uint8_t*>(message + scale_bytes(v.count()));
  segments(v, [&](char** at, int n, int64_t index) {
    float values[kSegment], most = 0;
    for (int i = 0; i < n; ++i) {
      values[i] = load_number(at[i], v.type);
      float a = std::fabs(values[i]);
      if (a > most || std::isnan(a)) most = std::isnan(most) ? most : a;
    }
    float scale = segment_scale(most);
    scales[index] = scale;
    for (int i = 0; i < n; ++i) payload[index * kSegment + i] = to_e4m3(values[i] / scale);
  });
}

void decode(const View& v, const char* message) {
  auto* scales = reinterpret_cast<const float*>(message);
  auto* payload = reinterpret_cast<const uint8_t*>(message + scale_bytes(v.count()));
  segments(v, [&](char** at, int n, int64_t index) {
    for (int i = 0; i < n; ++i) {
      store_number(at[i], from_e4m3(payload[index * kSegment + i]) * scales[index], v.type);
    }
  });
}

void append(std::vector<Transfer>& out, bool send, const Message& m) {
  size_t each = m.bytes() / m.runs;
  const View& v = m.parts[0].view;
  if (m.staging || v.contiguous()) {
    char* at = m.staging ? m.staging : v.data;
    for (int64_t i = 0; i < m.runs; ++i) out.push_back({send, m.peer, at + i * each, each});
    return;
  }
  lines(v, [&](char* p, int64_t n, int64_t stride) {
    int64_t elements = each / v.item;
    for (int64_t i = 0; i < n; i += elements) {
      out.push_back({send, m.peer, p + i * stride * v.item, each});
    }
  });
}

}  // namespace

std::vector<Transfer> transfers(const Group& g) {
  std::vector<Transfer> out;
  for (auto& m : g.sends) append(out, true, m);
  for (auto& m : g.recvs) append(out, false, m);
  return out;
}

void stage(Message& m, char*& at, const char* end) {
  m.staging = at;
  at += aligned(m.bytes(), kStagingAlign);
  if (at > end) throw std::runtime_error("the staging buffer of an exchange is too small");
}

void pack(const Part& part, char* message) {
  char* to = message + part.offset;
  part.fp8 ? encode(part.view, to) : copy_raw(part.view, to, true);
}

void unpack(const Part& part, const char* message) {
  char* from = const_cast<char*>(message) + part.offset;
  part.fp8 ? decode(part.view, from) : copy_raw(part.view, from, false);
}

}  // namespace foldcp
