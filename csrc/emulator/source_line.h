// From the address of an instruction to its place in the source.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

namespace emulator {

// "file.cu:12"; where the instruction was inlined from another file or function "helper.h:7 called in file.cu:12".
// "+1a2b", its offset in the library, where there is no debug information or no addr2line.
std::vector<std::string> source_lines(const std::vector<uintptr_t>& instructions);
std::string source_line(uintptr_t instruction);

}  // namespace emulator
