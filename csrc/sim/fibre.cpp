#include "sim/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace llmengine::sim {

Fibre::Fibre() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  map_ = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map_ == MAP_FAILED || mprotect(map_, page, PROT_NONE) != 0) throw std::bad_alloc();
  low_ = reinterpret_cast<uintptr_t>(map_) + page;
}

Fibre::Fibre(Fibre&& other) noexcept
    : map_(std::exchange(other.map_, nullptr)),
      low_(other.low_),
      inside_(other.inside_),
      outside_(other.outside_),
      portable_(std::exchange(other.portable_, nullptr)) {}

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void llmengine_sim_switch(void** save, void* load);
extern "C" void llmengine_sim_enter();

Fibre::~Fibre() {
  if (map_) munmap(map_, low_ - reinterpret_cast<uintptr_t>(map_) + kStackBytes);
}

// Lays out what llmengine_sim_switch takes from a stack, so that it "returns" into llmengine_sim_enter.
void Fibre::prepare(void (*body)(void*), void* argument) {
  auto* top = reinterpret_cast<void**>(low_ + kStackBytes);
#if defined(__x86_64__)
  // r15 r14 r13 r12 rbx rbp, the return address, and two words that keep the stack aligned to 16 bytes at the call
  void** frame = top - 9;
  frame[3] = argument;
  frame[4] = reinterpret_cast<void*>(body);
  frame[5] = nullptr;
  frame[6] = reinterpret_cast<void*>(&llmengine_sim_enter);
  frame[7] = frame[8] = nullptr;
#else
  void** frame = top - 20;  // x19 x20 .. x29 x30, d8 .. d15
  frame[0] = reinterpret_cast<void*>(body);
  frame[1] = argument;
  frame[10] = nullptr;
  frame[11] = reinterpret_cast<void*>(&llmengine_sim_enter);
#endif
  inside_ = frame;
}

void Fibre::resume() { llmengine_sim_switch(&outside_, inside_); }
void Fibre::suspend() { llmengine_sim_switch(&inside_, outside_); }

#else

struct Fibre::Portable {
  ucontext_t inside, outside;
  void (*body)(void*);
  void* argument;

  static void enter(unsigned high, unsigned low) {  // makecontext passes ints only
    auto* self = reinterpret_cast<Portable*>((static_cast<uint64_t>(high) << 32) | low);
    self->body(self->argument);
  }
};

Fibre::~Fibre() {
  delete portable_;
  if (map_) munmap(map_, low_ - reinterpret_cast<uintptr_t>(map_) + kStackBytes);
}

void Fibre::prepare(void (*body)(void*), void* argument) {
  if (!portable_) portable_ = new Portable();
  portable_->body = body;
  portable_->argument = argument;
  getcontext(&portable_->inside);
  portable_->inside.uc_stack.ss_sp = reinterpret_cast<void*>(low_);
  portable_->inside.uc_stack.ss_size = kStackBytes;
  portable_->inside.uc_link = nullptr;
  const auto address = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(portable_));
  makecontext(&portable_->inside, reinterpret_cast<void (*)()>(&Portable::enter), 2,
              static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
}

void Fibre::resume() { swapcontext(&portable_->outside, &portable_->inside); }
void Fibre::suspend() { swapcontext(&portable_->inside, &portable_->outside); }

#endif

}  // namespace llmengine::sim
