// The accuracy that csrc/cpu/vec_math.h states, against double precision: every kStep-th float there is, and specials.
// Compiled once per instruction set by tests/test_vec_math.py. Prints each worst error; the exit code counts failures.
#include "cpu/vec_math.h"

#include "accuracy.h"

namespace vec = llmengine::cpu::LLMENGINE_ISA;

namespace {

void check_exponentials() {
  const auto exact = [](double x) { return std::exp(x); };
  const auto whole = [](F x) { return vec::exp(x); };
  const auto nonpositive = [](F x) { return exp_of_nonpositive(x); };
  check("exp, ulp", 2.0, -87.33654f, 88.72283f, whole, exact, in_ulps);
  check("exp_of_nonpositive, ulp", 2.0, -87.33654f, 88.0f, nonpositive, exact, in_ulps);
  for (float x : {-87.34f, -104.0f, -1e30f, -kInfinity}) {
    expect(at(whole, x) == 0.0f, "exp is 0", x, at(whole, x));
    expect(at(nonpositive, x) == 0.0f, "exp_of_nonpositive is 0", x, at(nonpositive, x));
  }
  for (float x : {88.73f, 1e30f, kInfinity}) expect(at(whole, x) == kInfinity, "exp overflows", x, at(whole, x));
  for (float x : {0.0f, -0.0f}) {
    expect(at(whole, x) == 1.0f, "exp is 1", x, at(whole, x));
    expect(at(nonpositive, x) == 1.0f, "exp_of_nonpositive is 1", x, at(nonpositive, x));
  }
  expect_nan("exp", whole);
  expect_nan("exp_of_nonpositive", nonpositive);
}

void check_log() {
  const auto function = [](F x) { return log_of_normal(x); };
  check(
      "log, ulp", 2.0, kSmallestNormal, std::numeric_limits<float>::max(), function,
      [](double x) { return std::log(x); }, in_ulps);
  expect(at(function, 1.0f) == 0.0f, "log of 1", 1.0f, at(function, 1.0f));
  expect_nan("log", function);
}

void check_tanh() {
  const auto function = [](F x) { return vec::tanh(x); };
  check("tanh, ulp", 3.0, -kInfinity, kInfinity, function, [](double x) { return std::tanh(x); }, in_ulps);
  for (float sign : {1.0f, -1.0f}) {
    for (float x : {20.0f, 1e30f, kInfinity}) {
      expect(at(function, sign * x) == sign, "tanh saturates", sign * x, at(function, sign * x));
    }
    expect(at(function, sign * 0.0f) == 0.0f, "tanh of 0", sign * 0.0f, at(function, sign * 0.0f));
  }
  expect_nan("tanh", function);
}

void check_normal() {
  const auto cdf = [](F x) { return normal(x).cdf; };
  const auto density = [](F x) { return normal(x).density; };
  const auto exact_cdf = [](double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); };
  const auto exact_density = [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(8.0 * std::atan(1.0)); };
  check("normal cdf, relative, |x| <= 4", 2e-6, -4.0f, 4.0f, cdf, exact_cdf, relative);
  check("normal density, relative, |x| <= 4", 2e-6, -4.0f, 4.0f, density, exact_density, relative);
  check("normal cdf, relative, |x| <= 13", 2e-5, -13.0f, 13.0f, cdf, exact_cdf, relative);
  check("normal density, relative, |x| <= 13", 2e-5, -13.0f, 13.0f, density, exact_density, relative);
  for (float x : {-14.0f, -1e30f, -kInfinity}) expect(at(cdf, x) == 0.0f, "normal cdf ends", x, at(cdf, x));
  for (float x : {14.0f, 1e30f, kInfinity}) {
    expect(at(cdf, x) == 1.0f, "normal cdf saturates", x, at(cdf, x));
    expect(at(density, x) == 0.0f && at(density, -x) == 0.0f, "normal density ends", x, at(density, x));
  }
  expect(at(cdf, 0.0f) == 0.5f, "normal cdf of 0", 0.0f, at(cdf, 0.0f));
  expect_nan("normal cdf", cdf);
  expect_nan("normal density", density);
}

// By absolute error, which stands in for both beyond the polynomials' ends.
void check_near_normal() {
  const auto cdf = [](F x) { return near_cdf(x); };
  const auto slope = [](F x) { return near_gelu_slope(x); };
  const auto absolute = [](float y, double exact) { return std::fabs(y - exact); };
  const auto exact_cdf = [](double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); };
  const auto exact_slope = [&](double x) {
    return exact_cdf(x) + x * std::exp(-0.5 * x * x) / std::sqrt(8.0 * std::atan(1.0));
  };
  check("near cdf, absolute", 1e-6, -1e30f, 1e30f, cdf, exact_cdf, absolute);
  check("near slope of gelu, absolute, |x| <= 5", 1e-6, -5.0f, 5.0f, slope, exact_slope, absolute);
  check("near slope of gelu, absolute", 8e-6, -1e30f, 1e30f, slope, exact_slope, absolute);
  for (float x : {-5.01f, -1e30f, -kInfinity}) {
    expect(at(cdf, x) == 0.0f && at(slope, x) == 0.0f, "near normal ends", x, at(cdf, x));
  }
  expect_nan("near cdf", cdf);
  expect_nan("near slope of gelu", slope);
}

void check_bf16() {
  for (uint32_t upper = 0; upper <= 0xffff; ++upper) {
    for (uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float x = __builtin_bit_cast(float, upper << 16 | lower);
      llmengine::bf16 rounded[kLanes], single;
      store(rounded, broadcast(x));
      narrow(x, &single);
      const float y = widen(rounded[kLanes - 1]);
      if (std::isnan(x)) {
        expect(std::isnan(y) && std::isnan(widen(single)), "bf16 keeps NaN", x, y);
        continue;
      }
      // to nearest, ties to even: the upper half's neighbour is one more
      const uint32_t up = lower > 0x8000 || (lower == 0x8000 && (upper & 1));
      expect(rounded[kLanes - 1].bits == upper + up && single.bits == upper + up, "bf16 rounding", x, y);
    }
  }
}

}  // namespace

int main() {
  check_exponentials();
  check_log();
  check_tanh();
  check_normal();
  check_near_normal();
  check_bf16();
  return failures != 0;
}
