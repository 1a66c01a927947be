// The contract of ops/rotary.h on CUDA: float16 too.
#pragma once

#include "cuda/device.h"
#include "ops/rotary.h"

namespace llmengine::cuda {

struct RotaryForward : ops::RotaryForward {};
struct RotaryBackward : ops::RotaryBackward {};

void validate(const RotaryForward& p);
void validate(const RotaryBackward& p);
void run(const RotaryForward& p, Stream stream);
void run(const RotaryBackward& p, Stream stream);

}  // namespace llmengine::cuda
