// A place in a source file, taken where a function with a default argument `Location from = Location::here()`
// is called.
#pragma once
#include <string>

namespace emulator {

struct Location {
  const char* file = "";
  int line = 0;

  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline std::string described(Location place) {  // "file.cu:12"
  const std::string file = place.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line);
}

}  // namespace emulator
