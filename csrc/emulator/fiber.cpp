#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include <new>

namespace emulator {
namespace {

constexpr size_t kGuardBytes = 4096;

char* new_stack() {
  const size_t bytes = kGuardBytes + Fiber::kStackBytes;
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory) + kGuardBytes;
}

}  // namespace

#if defined(EMULATOR_UCONTEXT)

void Fiber::start(void (*function)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  makecontext(&own_, function, 0);
}
void Fiber::enter() { swapcontext(&scheduler_, &own_); }
void Fiber::leave() { swapcontext(&own_, &scheduler_); }

#else

// Saves the registers that a called function must keep, and the stack pointer in *from; then the same
// backwards for `to`. ucontext saves the signal mask too, by a system call
// each way; kernels change none.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

void Fiber::start(void (*function)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  constexpr int kSavedRegisters = 6;
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes);
  *--top = 0;  // where `function` would return to
  *--top = reinterpret_cast<uintptr_t>(function);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
  own_ = top;
}
void Fiber::enter() { emulator_switch(&scheduler_, own_); }
void Fiber::leave() { emulator_switch(&own_, scheduler_); }

#endif

}  // namespace emulator
