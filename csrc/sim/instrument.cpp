// The calls that the compiler's thread instrumentation (-fsanitize=thread) puts before every memory access of a kernel.
// The sanitizer's own library is not linked: the checks are ours. Host code of the same files is instrumented too, and
// passes; atomic operations of its standard library are carried out here.
#include <cstdint>
#include <cstring>

#include "sim/device.h"

using llmengine::sim::touch;
using llmengine::sim::Touch;

#pragma GCC visibility push(hidden)
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

void __tsan_read1(void* p) { touch(p, 1, Touch::read, __builtin_return_address(0)); }
void __tsan_read2(void* p) { touch(p, 2, Touch::read, __builtin_return_address(0)); }
void __tsan_read4(void* p) { touch(p, 4, Touch::read, __builtin_return_address(0)); }
void __tsan_read8(void* p) { touch(p, 8, Touch::read, __builtin_return_address(0)); }
void __tsan_read16(void* p) { touch(p, 16, Touch::read, __builtin_return_address(0)); }
void __tsan_write1(void* p) { touch(p, 1, Touch::write, __builtin_return_address(0)); }
void __tsan_write2(void* p) { touch(p, 2, Touch::write, __builtin_return_address(0)); }
void __tsan_write4(void* p) { touch(p, 4, Touch::write, __builtin_return_address(0)); }
void __tsan_write8(void* p) { touch(p, 8, Touch::write, __builtin_return_address(0)); }
void __tsan_write16(void* p) { touch(p, 16, Touch::write, __builtin_return_address(0)); }

// What the compiler does not know to be aligned: a GPU would fault, so the same checks hold.
void __tsan_unaligned_read2(void* p) { touch(p, 2, Touch::read, __builtin_return_address(0)); }
void __tsan_unaligned_read4(void* p) { touch(p, 4, Touch::read, __builtin_return_address(0)); }
void __tsan_unaligned_read8(void* p) { touch(p, 8, Touch::read, __builtin_return_address(0)); }
void __tsan_unaligned_read16(void* p) { touch(p, 16, Touch::read, __builtin_return_address(0)); }
void __tsan_unaligned_write2(void* p) { touch(p, 2, Touch::write, __builtin_return_address(0)); }
void __tsan_unaligned_write4(void* p) { touch(p, 4, Touch::write, __builtin_return_address(0)); }
void __tsan_unaligned_write8(void* p) { touch(p, 8, Touch::write, __builtin_return_address(0)); }
void __tsan_unaligned_write16(void* p) { touch(p, 16, Touch::write, __builtin_return_address(0)); }

void __tsan_read_range(void* p, unsigned long n) { touch(p, n, Touch::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { touch(p, n, Touch::write, __builtin_return_address(0)); }

uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
uint32_t __tsan_atomic32_fetch_sub(volatile uint32_t* p, uint32_t v, int) {
  return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);
}

}  // extern "C"
#pragma GCC visibility pop
