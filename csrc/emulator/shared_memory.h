// The shared memory of the block that runs: `__shared__` variables, which are this library's thread-local
// ones, and the dynamic part, whose end is the end of readable memory.
#pragma once
#include "observer.h"

namespace emulator::shared_memory {

MemoryRange variables();
MemoryRange dynamic(size_t bytes);
MemoryRange reserved();
void* dynamic_address();
// Both parts to NaN (all bits ones), before a block begins.
void fill(size_t dynamic_bytes);

}  // namespace emulator::shared_memory
