#include "faults.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <sys/time.h>
#include <ucontext.h>

#include "symbols.h"

namespace emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
constexpr int kSignalCount = 5;

sigjmp_buf before_work;
int caught;
uintptr_t instruction, touched;

void catch_fault(int signal, siginfo_t* info, void* context) {
  const mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  instruction = machine.gregs[REG_RIP];
#else
  instruction = machine.pc;
#endif
  caught = signal;
  touched = reinterpret_cast<uintptr_t>(info->si_addr);
  siglongjmp(before_work, 1);
}

// A full stack has no room for the handler, so it has a stack of its own.
struct Handlers {
  struct sigaction old[kSignalCount];
  stack_t old_stack;

  Handlers() {
    static char memory[64 * 1024];
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = catch_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &old[i]);
  }
  ~Handlers() {
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

// SIGVTALRM after so much time of this process in its own code.
struct TimeLimit {
  itimerval old;

  explicit TimeLimit(double seconds) {
    const itimerval timer = {
        {0, 0}, {static_cast<time_t>(seconds), static_cast<suseconds_t>(fmod(seconds, 1) * 1e6)}};
    setitimer(ITIMER_VIRTUAL, &timer, &old);
  }
  ~TimeLimit() { setitimer(ITIMER_VIRTUAL, &old, nullptr); }
};

std::string what_happened() {
  if (caught == SIGVTALRM) return "no end: the time limit has passed, and a thread still runs";
  if (caught == SIGFPE) return "integer division by zero";
  if (caught == SIGILL) return "trap";
  if (touched == 0)
    return "invalid address: null, or a 16-byte vector at an address that is no multiple of 16,";
  return touched < 4096 ? "invalid address: null" : "invalid address: memory that is nobody's";
}

}  // namespace

std::string run_guarded(double seconds, const std::function<void()>& work) {
  const Handlers handlers;
  const TimeLimit limit(seconds);
  if (sigsetjmp(before_work, 1) == 0) {
    work();
    return "";
  }
  return what_happened() + " in " + source_line(instruction);
}

}  // namespace emulator
