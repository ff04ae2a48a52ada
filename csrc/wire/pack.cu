#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cfloat>
#include <stdexcept>
#include <string>

#include "wire/pack.h"

namespace foldcp {

namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 2048;
constexpr size_t kMostPitch = INT32_MAX;  // bytes from line to line that copy engines take

// A view in units of one copied word, with 32-bit sizes: a piece has fewer than 2^32 elements.
struct Shape {
  int ndim;
  uint32_t size[kDims];
  int64_t stride[kDims];
};

__device__ inline int64_t offset_of(const Shape& shape, uint32_t index) {
  int64_t at = 0;
#pragma unroll
  for (int i = kDims - 1; i >= 0; --i) {
    if (i < shape.ndim) {
      uint32_t rest = index / shape.size[i];
      at += (index - rest * shape.size[i]) * shape.stride[i];
      index = rest;
    }
  }
  return at;
}

template <class Word, bool kGather>
__global__ void __launch_bounds__(kThreads)
    copy_words(const __grid_constant__ Shape shape, Word* strided, Word* packed, uint32_t count) {
  uint64_t step = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(kThreads) + threadIdx.x; i < count;
       i += step) {
    int64_t at = offset_of(shape, static_cast<uint32_t>(i));
    if (kGather) {
      packed[i] = strided[at];
    } else {
      strided[at] = packed[i];
    }
  }
}

__device__ inline float number(double x) { return static_cast<float>(x); }
__device__ inline float number(float x) { return x; }
__device__ inline float number(__half x) { return __half2float(x); }
__device__ inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
// The CPU's `finite` (e4m3.h).
__device__ inline float finite(float x, float largest) {
  return x > largest ? largest : x < -largest ? -largest : x;
}
__device__ inline void store(double* p, float x) { *p = finite(x, FLT_MAX); }
__device__ inline void store(float* p, float x) { *p = finite(x, FLT_MAX); }
__device__ inline void store(__half* p, float x) { *p = __float2half_rn(finite(x, 65504.0f)); }
__device__ inline void store(__nv_bfloat16* p, float x) {
  *p = __float2bfloat16_rn(finite(x, 0x1.fep127f));
}

// The CPU's segment_scale (e4m3.h), on bits: the smallest power of two that is at least most / 448.
__device__ inline float segment_scale(float most) {
  float ratio = __fdiv_rn(most, 448.0f);
  uint32_t bits = __float_as_uint(ratio);
  if (!(most <= FLT_MAX)) return __uint_as_float(0x7fc00000);
  if (most == 0.0f) return 1.0f;
  uint32_t exponent = bits >> 23;
  if (exponent != 0 && (bits & 0x7fffff)) ++exponent;
  return __uint_as_float(max(exponent, 1u) << 23);
}

// One warp per segment of 128 elements, four neighbours per thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    encode(const __grid_constant__ Shape shape, const T* strided, float* scales, uint32_t* payload,
           uint32_t count) {
  constexpr int kWarps = kThreads / 32;
  uint32_t lane = threadIdx.x % 32, segments = (count + kSegment - 1) / kSegment;
  for (uint32_t s = blockIdx.x * kWarps + threadIdx.x / 32; s < segments; s += gridDim.x * kWarps) {
    uint32_t first = s * static_cast<uint32_t>(kSegment) + lane * 4;
    float x[4], most = 0.0f;
    bool bad = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = first + i < count ? number(strided[offset_of(shape, first + i)]) : 0.0f;
      bad = bad || isnan(x[i]);
      most = fmaxf(most, fabsf(x[i]));
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    if (__any_sync(~0u, bad)) most = __uint_as_float(0x7fffffff);
    float scale = segment_scale(most);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word |= static_cast<uint32_t>(__nv_cvt_float_to_fp8(x[i] / scale, __NV_SATFINITE, __NV_E4M3))
              << 8 * i;
    }
    if (lane == 0) scales[s] = scale;
    if (first < count && count - first >= 4) {
      payload[first / 4] = word;
    } else {
      for (int i = 0; i < 4 && first + i < count; ++i) {
        reinterpret_cast<uint8_t*>(payload)[first + i] = static_cast<uint8_t>(word >> 8 * i);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    decode(const __grid_constant__ Shape shape, T* strided, const float* scales,
           const uint8_t* payload, uint32_t count) {
  uint64_t step = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(kThreads) + threadIdx.x; i < count;
       i += step) {
    __half_raw half = __nv_cvt_fp8_to_halfraw(payload[i], __NV_E4M3);
    float x = __half2float(__half(half)) * scales[i / kSegment];
    store(strided + offset_of(shape, static_cast<uint32_t>(i)), x);
  }
}

void launched() {
  cudaError_t result = cudaGetLastError();
  if (result != cudaSuccess) {
    throw std::runtime_error(std::string("packing for an exchange: ") + cudaGetErrorString(result));
  }
}

Shape shape_of(const View& v) {
  if (v.count() >= int64_t{1} << 32) {
    throw std::runtime_error("an exchange moves more than 2^32 elements at once: take more chunks");
  }
  Shape out{v.ndim, {}, {}};
  for (int i = 0; i < v.ndim; ++i) {
    out.size[i] = static_cast<uint32_t>(v.size[i]);
    out.stride[i] = v.stride[i];
  }
  return out;
}

int blocks_for(int64_t threads) {
  return static_cast<int>(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMostBlocks));
}

// The widest word that all lines of the view, and the packed side, can be copied in.
int word_bytes(const View& v, const char* packed) {
  bool lines = v.ndim > 0 && v.stride[v.ndim - 1] == 1;
  uint64_t all = reinterpret_cast<uint64_t>(v.data) | reinterpret_cast<uint64_t>(packed);
  if (lines) all |= v.size[v.ndim - 1] * v.item;
  for (int i = 0; i + 1 < v.ndim; ++i) all |= v.stride[i] * v.item;
  int word = v.item;
  while (lines && word < 16 && all % (2 * word) == 0) word *= 2;
  return word;
}

template <bool kGather>
void copy_raw(const View& v, char* packed, cudaStream_t stream) {
  int word = word_bytes(v, packed);
  Shape shape = shape_of(v);
  if (word > v.item) {
    int inner = v.ndim - 1;
    shape.size[inner] = shape.size[inner] * v.item / word;
    for (int i = 0; i < inner; ++i) shape.stride[i] = v.stride[i] * v.item / word;
  }
  uint32_t count = static_cast<uint32_t>(v.count() * v.item / word);
  int blocks = blocks_for(count);
  auto go = [&](auto sample) {
    using Word = decltype(sample);
    copy_words<Word, kGather><<<blocks, kThreads, 0, stream>>>(
        shape, reinterpret_cast<Word*>(v.data), reinterpret_cast<Word*>(packed), count);
  };
  word == 16  ? go(uint4{})
  : word == 8 ? go(uint64_t{})
  : word == 4 ? go(uint32_t{})
  : word == 2 ? go(uint16_t{})
              : go(uint8_t{});
  launched();
}

// One and two dimensions go through the copy engines.
bool copied(const View& v, char* packed, bool gather, cudaStream_t stream) {
  bool lines = v.ndim == 2 && v.stride[1] == 1 && v.stride[0] >= v.size[1];
  if (!v.contiguous() && !lines) return false;
  size_t width = (v.ndim ? v.size[v.ndim - 1] : 1) * v.item;
  size_t height = v.ndim == 2 ? v.size[0] : 1;
  size_t pitch = v.ndim == 2 ? v.stride[0] * v.item : width;
  if (height > 1 && pitch > kMostPitch) return false;
  char *to = gather ? packed : v.data, *from = gather ? v.data : packed;
  cudaError_t result =
      height == 1 ? cudaMemcpyAsync(to, from, width, cudaMemcpyDeviceToDevice, stream)
                  : cudaMemcpy2DAsync(to, gather ? width : pitch, from, gather ? pitch : width,
                                      width, height, cudaMemcpyDeviceToDevice, stream);
  if (result != cudaSuccess) {
    throw std::runtime_error(std::string("packing for an exchange: ") + cudaGetErrorString(result));
  }
  return true;
}

template <class F>
void with_type(Type type, F f) {
  type == Type::f64   ? f(double{})
  : type == Type::f32 ? f(float{})
  : type == Type::f16 ? f(__half{})
                      : f(__nv_bfloat16{});
}

}  // namespace

void pack(const Part& part, char* message, cudaStream_t stream) {
  const View& v = part.view;
  char* to = message + part.offset;
  if (v.count() == 0) return;
  if (!part.fp8) {
    if (!copied(v, to, true, stream)) copy_raw<true>(v, to, stream);
    return;
  }
  uint32_t count = static_cast<uint32_t>(v.count());
  with_type(v.type, [&](auto sample) {
    encode<<<blocks_for((v.count() + 3) / 4), kThreads, 0, stream>>>(
        shape_of(v), reinterpret_cast<decltype(sample)*>(v.data), reinterpret_cast<float*>(to),
        reinterpret_cast<uint32_t*>(to + scale_bytes(v.count())), count);
  });
  launched();
}

void unpack(const Part& part, const char* message, cudaStream_t stream) {
  const View& v = part.view;
  char* from = const_cast<char*>(message) + part.offset;
  if (v.count() == 0) return;
  if (!part.fp8) {
    if (!copied(v, from, false, stream)) copy_raw<false>(v, from, stream);
    return;
  }
  uint32_t count = static_cast<uint32_t>(v.count());
  with_type(v.type, [&](auto sample) {
    decode<<<blocks_for(v.count()), kThreads, 0, stream>>>(
        shape_of(v), reinterpret_cast<decltype(sample)*>(v.data), reinterpret_cast<float*>(from),
        reinterpret_cast<const uint8_t*>(from + scale_bytes(v.count())), count);
  });
  launched();
}

}  // namespace foldcp
