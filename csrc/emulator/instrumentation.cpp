// What the compiler's instrumentation calls, and what tests ask of the trace. g++ -fsanitize=thread puts a
// call of a __tsan_* function before every load and store; instead of libtsan, which sees one thread of the
// operating system and finds nothing, these functions are linked.
#include "trace.h"

namespace emulator {
namespace {

Trace& trace() {
  static Trace only;
  return only;
}
const bool watching = (observer = &trace()) != nullptr;

}  // namespace
}  // namespace emulator

using emulator::Access;
using emulator::trace;

extern "C" {

void emulator_watch(const void* address, size_t bytes, int use, const char* name) {
  trace().watch(address, bytes, static_cast<emulator::Use>(use), name);
}
void emulator_forget() { trace().forget(); }
void emulator_sample(unsigned blocks) { trace().sample(blocks); }
const char* emulator_accesses() {
  static std::string text;
  text = trace().accesses();
  return text.c_str();
}

// The calls that the compiler puts before each load and store. A vector whose type promises alignment comes
// by its size, anything else as a range.
#define EMULATOR_TSAN(bytes)                                                                         \
  void __tsan_read##bytes(void* address) {                                                           \
    trace().instruction_accessed(address, bytes, Access::read, __builtin_return_address(0), true);   \
  }                                                                                                  \
  void __tsan_write##bytes(void* address) {                                                          \
    trace().instruction_accessed(address, bytes, Access::write, __builtin_return_address(0), true);  \
  }                                                                                                  \
  void __tsan_unaligned_read##bytes(void* address) {                                                 \
    trace().instruction_accessed(address, bytes, Access::read, __builtin_return_address(0), false);  \
  }                                                                                                  \
  void __tsan_unaligned_write##bytes(void* address) {                                                \
    trace().instruction_accessed(address, bytes, Access::write, __builtin_return_address(0), false); \
  }
EMULATOR_TSAN(1)
EMULATOR_TSAN(2)
EMULATOR_TSAN(4)
EMULATOR_TSAN(8)
EMULATOR_TSAN(16)
void __tsan_read_range(void* address, size_t bytes) {
  trace().instruction_accessed(address, bytes, Access::read, __builtin_return_address(0), false);
}
void __tsan_write_range(void* address, size_t bytes) {
  trace().instruction_accessed(address, bytes, Access::write, __builtin_return_address(0), false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// -fsanitize=bounds: the compiler's own descriptions of the place and the type.
struct UbsanPlace {
  const char* file;
  uint32_t line, column;
};
struct UbsanType {
  uint16_t kind, info;
  char name[1];
};
struct UbsanBounds {
  UbsanPlace place;
  const UbsanType* array;
  const UbsanType* index;
};
void __ubsan_handle_out_of_bounds(UbsanBounds* data, uintptr_t) {
  trace().index_out_of_array(data->array->name, data->place.file, static_cast<int>(data->place.line));
}
}
