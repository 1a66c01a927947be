// Philox 4x32-10 (csrc/ops/philox.h) has the answers that its authors publish beside it (Random123, kat_vectors): the
// compiler works them out.
#include "ops/philox.h"

using llmengine::ops::philox;
using llmengine::ops::Philox4;

constexpr bool gives(const Philox4& found, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return found.word[0] == a && found.word[1] == b && found.word[2] == c && found.word[3] == d;
}

static_assert(gives(philox(0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
static_assert(gives(philox(~uint64_t{0}, ~0u, ~0u, ~0u, ~0u), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
static_assert(gives(philox(0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),  // digits of pi
                    0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));

int main() {}
