// The accuracy that cpu/attention_amx.h states of its exponentials, against double precision. Compiled by
// tests/test_vec_math.py, with AMX's tiles in emulation, by the vector instructions that the machine has.
#include "accuracy.h"
#include "cpu/attention_amx.h"

int main() {
  const auto exact = [](double x) { return std::exp2(x); };
  const auto power = [](F x) { return power_of_2(x); };
  const auto near_power = [](F x) { return near_power_of_2(x); };
  check("power_of_2, relative", 2e-7, -125.0f, 127.0f, power, exact, relative);
  check("near_power_of_2, relative", 3.5e-6, -125.0f, 127.0f, near_power, exact, relative);
  for (float x : {-kInfinity, -1e30f, -200.0f}) {
    expect(at(power, x) == 0.0f && at(near_power, x) == 0.0f, "a power of 2 ends", x, at(power, x));
  }
  expect(at(power, 0.0f) == 1.0f && at(near_power, 0.0f) == 1.0f, "2 to the 0", 0.0f, at(power, 0.0f));
  expect_nan("power_of_2", power);
  expect_nan("near_power_of_2", near_power);
  return failures != 0;
}
