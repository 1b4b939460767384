// A function that runs on a stack of its own and can be left and entered again: 30 ns a switch where it is
// written in assembler (x86-64), some six times that by ucontext elsewhere.
#pragma once
#include <stddef.h>

#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;

  // The next enter() runs `function`, which never returns, from its start.
  void start(void (*function)());
  // From the scheduler into the fiber; returns at the fiber's leave().
  void enter();
  // From the fiber back to the scheduler; returns at the next enter().
  void leave();

  const char* stack() const { return stack_; }

 private:
  char* stack_ = nullptr;  // below it a page that must not be touched
#if defined(EMULATOR_UCONTEXT)
  ucontext_t own_, scheduler_;
#else
  void* own_ = nullptr;  // the stack pointers of who is not running
  void* scheduler_ = nullptr;
#endif
};

}  // namespace emulator
