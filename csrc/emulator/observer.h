// What the scheduler tells whoever watches a kernel. trace.cpp is the one there is; a value build links none.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "scheduler.h"

namespace emulator {

struct MemoryRange {
  uintptr_t begin = 0, end = 0;

  bool contains(uintptr_t address, size_t bytes = 1) const {
    return begin <= address && address + bytes <= end;
  }
};

class Observer {
 public:
  virtual void launch_begins(const char* kernel, unsigned threads) = 0;
  // Shared memory: of `__shared__` variables, of this launch's size, and all that a launch could ask for.
  virtual void block_begins(unsigned block, MemoryRange variables, MemoryRange dynamic,
                            MemoryRange reserved) = 0;
  virtual void thread_runs(unsigned thread, MemoryRange stack) = 0;
  virtual void block_synchronised() = 0;
  virtual void warp_synchronised(unsigned first_thread, uint32_t mask) = 0;
  virtual void fenced() = 0;
  virtual void accessed(const void* address, size_t bytes, Access access, Location from) = 0;
  virtual void copy_begins(const void* target, size_t bytes, Location from) = 0;
  virtual std::string launch_ends() = 0;  // what was found, a line each

 protected:
  ~Observer() = default;
};

extern Observer* observer;  // null where nobody watches
extern bool tracing;        // whether what runs now is the kernel's own code

}  // namespace emulator
