// FP8 numbers (e4m3fn: 4 exponent bits of bias 7, 3 mantissa bits, largest 448, no infinity).
//
// A segment's scale is a power of two, so that decoding is exact in bf16 and float32, and encoding
// what was decoded loses nothing more: a panel that a ring forwards is rounded once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "wire/view.h"

namespace foldcp {

// The smallest power of two that brings `most` to at most 448; NaN where `most` is not finite.
inline float segment_scale(float most) {
  if (!(most <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  if (most == 0.0f) return 1.0f;
  float ratio = most / 448.0f;  // = m * 2^exponent with m in [0.5, 1)
  int exponent = -126;
  if (ratio >= std::numeric_limits<float>::min()) {
    if (std::frexp(ratio, &exponent) == 0.5f) --exponent;
  }
  return std::ldexp(1.0f, exponent);
}

// Nearest, ties to even; 448 at most.
inline uint8_t to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  uint8_t sign = std::signbit(x) ? 0x80 : 0;
  float a = std::fabs(x);
  if (a >= 448.0f) return sign | 0x7e;
  if (a < 0.015625f) {  // below 2^-6: multiples of 2^-9
    return sign | static_cast<uint8_t>(std::nearbyint(a * 512.0f));
  }
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  bits += 0x7ffff + ((bits >> 20) & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - (120u << 3));
}

inline float from_e4m3(uint8_t b) {
  if ((b & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  int exponent = (b >> 3) & 15, mantissa = b & 7;
  float a = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
  return b & 0x80 ? -a : a;
}

inline float half_to_float(uint16_t h) {
  int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float a = exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN()
                                       : std::numeric_limits<float>::infinity())
            : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                           : std::ldexp(1.0f * mantissa, -24);
  return h & 0x8000 ? -a : a;
}

// Nearest, ties to even.
inline uint16_t float_to_half(float x) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  float a = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(a * 16777216.0f));
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

inline float load_number(const char* p, Type type) {
  uint16_t half;
  uint32_t word;
  float f;
  double d;
  switch (type) {
    case Type::f64: std::memcpy(&d, p, 8); return static_cast<float>(d);
    case Type::f32: std::memcpy(&f, p, 4); return f;
    case Type::f16: std::memcpy(&half, p, 2); return half_to_float(half);
    default:
      std::memcpy(&half, p, 2);
      word = static_cast<uint32_t>(half) << 16;
      std::memcpy(&f, &word, 4);
      return f;
  }
}

// The number next to the largest of a type may have been rounded up: it stays finite. NaN passes.
inline float finite(float f, Type type) {
  float largest = type == Type::f16    ? 65504.0f
                  : type == Type::bf16 ? 0x1.fep127f
                                       : std::numeric_limits<float>::max();
  return f > largest ? largest : f < -largest ? -largest : f;
}

inline void store_number(char* p, float f, Type type) {
  f = finite(f, type);
  uint16_t half;
  uint32_t word;
  double d = f;
  switch (type) {
    case Type::f64: std::memcpy(p, &d, 8); return;
    case Type::f32: std::memcpy(p, &f, 4); return;
    case Type::f16:
      half = float_to_half(f);
      std::memcpy(p, &half, 2);
      return;
    default:
      std::memcpy(&word, &f, 4);
      // Decoded numbers have four bits: only a NaN needs care, and rounding never carries.
      half = static_cast<uint16_t>(std::isnan(f) ? 0x7fc0
                                                 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
      std::memcpy(p, &half, 2);
  }
}

}  // namespace foldcp
