// Errors of vector functions against double precision, over the floats there are: what vec_math_test.cpp and
// amx_math_test.cpp share. Each check prints its worst error.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "cpu/vec.h"

using namespace llmengine::cpu::LLMENGINE_ISA;

inline constexpr uint32_t kStep = 487;  // prime: visits every exponent with all kinds of mantissas
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kSmallestNormal = std::numeric_limits<float>::min();
inline int failures = 0;

inline void expect(bool holds, const char* what, float x, float y) {
  if (holds) return;
  std::printf("FAILED %s at x = %.9g: %.9g\n", what, x, y);
  ++failures;
}

inline double ulp(double value) {
  const float magnitude = std::fmax(std::fabs(static_cast<float>(value)), kSmallestNormal);
  return static_cast<double>(std::nextafter(magnitude, kInfinity)) - magnitude;
}
inline double in_ulps(float y, double exact) { return std::fabs(y - exact) / ulp(exact); }
inline double relative(float y, double exact) { return std::fabs(y - exact) / std::fabs(exact); }

// Calls body(x, y) for every kStep-th float x of [low, high], y = function(x).
template <class Function, class Body>
void sweep(Function function, float low, float high, Body body) {
  float x[kLanes], y[kLanes];
  int filled = 0;
  for (uint64_t pattern = 0; pattern <= 0xffffffff; pattern += kStep) {
    const float value = __builtin_bit_cast(float, static_cast<uint32_t>(pattern));
    if (!(value >= low && value <= high)) continue;
    x[filled++] = value;
    if (filled < kLanes) continue;
    filled = 0;
    store(y, function(load(x)));
    for (int i = 0; i < kLanes; ++i) body(x[i], y[i]);
  }
}

template <class Function, class Exact, class Measure>
void check(const char* what, double allowed, float low, float high, Function function, Exact exact, Measure measure) {
  double worst = 0.0;
  float where = 0.0f;
  long count = 0;
  sweep(function, low, high, [&](float x, float y) {
    const double error = measure(y, exact(static_cast<double>(x)));
    ++count;
    if (!(error <= worst)) worst = error, where = x;
  });
  const bool holds = worst <= allowed && count > 100000;
  std::printf("%s %s: worst error %.3g of %.3g allowed, at x = %.9g (%ld values)\n", holds ? "passed" : "FAILED", what,
              worst, allowed, where, count);
  failures += !holds;
}

template <class Function>
float at(Function function, float x) {
  return function(broadcast(x))[kLanes - 1];
}

// NaNs: the usual one, and those whose low bits a function must not take for a number's.
inline constexpr uint32_t kNaNs[] = {0x7fc00000, 0xffc00000, 0x7fc00001, 0x7fffffff, 0xffffffff, 0x7f800001};

template <class Function>
void expect_nan(const char* what, Function function) {
  for (uint32_t nan : kNaNs) {
    float x[kLanes], y[kLanes];
    for (float& lane : x) std::memcpy(&lane, &nan, sizeof nan);
    store(y, function(load(x)));
    for (float lane : y) {
      if (std::isnan(lane)) continue;
      std::printf("FAILED %s of the NaN %#x: %.9g\n", what, nan, lane);
      ++failures;
    }
  }
}
