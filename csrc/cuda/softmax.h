// The contract of ops/softmax.h on CUDA: float16 too; input and output have one dtype.
#pragma once

#include "cuda/device.h"
#include "ops/softmax.h"

namespace llmengine::cuda {

struct SoftmaxForward : ops::SoftmaxForward {};
struct SoftmaxBackward : ops::SoftmaxBackward {};

void validate(const SoftmaxForward& p);
void validate(const SoftmaxBackward& p);
void run(const SoftmaxForward& p, Stream stream);
void run(const SoftmaxBackward& p, Stream stream);

}  // namespace llmengine::cuda
