// Faults of the processor while a kernel runs (an address that nobody may touch, a vector that is not
// aligned, a stack that is full, a division by zero) become errors instead of the end of the process. So does
// a kernel without end: a thread that waits for what another would do, where only one runs at a time.
#pragma once
#include <functional>
#include <string>

namespace emulator {

// Runs `work`, for so many seconds of processor time at most; "" or what went wrong, with the source line
// where the library was compiled with -g1 or -g.
std::string run_guarded(double seconds, const std::function<void()>& work);

}  // namespace emulator
