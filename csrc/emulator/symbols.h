// What the debug information and the symbols of this library say, read by binutils.
#pragma once
#include <stdint.h>

#include <string>
#include <unordered_set>
#include <vector>

namespace emulator {

// "file.cu:12"; where the instruction was inlined from another file or function "helper.h:7 called in
// file.cu:12".
// "+1a2b", its offset in the library, where there is no debug information or no addr2line.
std::vector<std::string> source_lines(const std::vector<uintptr_t>& instructions);
std::string source_line(uintptr_t instruction);

// Of the compiler's own variables, which say whether a thread-local one is constructed: their offsets in the
// thread-local segment. GCC keeps such a flag for arrays of __half and __nv_bfloat16.
std::unordered_set<uintptr_t> guard_variables();

}  // namespace emulator
