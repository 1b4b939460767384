// Faults of the processor while a kernel runs (an address that nobody may touch, a vector that is not
// aligned, a stack that is full, a division by zero) become errors instead of the end of the process.
#pragma once
#include <functional>
#include <string>

namespace emulator {

// Runs `work`; "" or what went wrong, with the source line where the library was compiled with -g1 or -g.
std::string run_guarded(const std::function<void()>& work);

}  // namespace emulator
