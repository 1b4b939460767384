#include "shared_memory.h"

#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

namespace emulator::shared_memory {
namespace {

constexpr size_t kReservedBytes = 256 * 1024, kGuardBytes = 64 * 1024;
constexpr size_t kAlignment = 128;

thread_local volatile char anchor = 0;  // one variable of the library that is surely there

char* reserve() {
  void* memory = mmap(nullptr, kReservedBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* start = static_cast<char*>(memory);
  if (mprotect(start + kReservedBytes, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return start;
}

char* const memory = reserve();
char* dynamic_start = memory + kReservedBytes;

// The thread-local segment, of this thread, of the library that `anchor` is in.
int find_segment(dl_phdr_info* library, size_t, void* found) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(&anchor);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(library->dlpi_tls_data);
  for (int i = 0; i < library->dlpi_phnum && begin != 0; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    const MemoryRange segment{begin, begin + header.p_memsz};
    if (header.p_type != PT_TLS || !segment.contains(inside)) continue;
    *static_cast<MemoryRange*>(found) = segment;
    return 1;
  }
  return 0;
}

}  // namespace

MemoryRange variables() {
  anchor = 0;  // the first use allocates a thread's segment
  MemoryRange segment;
  dl_iterate_phdr(find_segment, &segment);
  return segment;
}

MemoryRange dynamic(size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(dynamic_start);
  return {begin, begin + bytes};
}

MemoryRange reserved() {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  return {begin, begin + kReservedBytes + kGuardBytes};
}

void* dynamic_address() { return dynamic_start; }

void fill(size_t dynamic_bytes) {
  const size_t rounded = (dynamic_bytes + kAlignment - 1) / kAlignment * kAlignment;
  dynamic_start = memory + kReservedBytes - rounded;
  memset(dynamic_start, 0xff, dynamic_bytes);
  const MemoryRange segment = variables();
  memset(reinterpret_cast<void*>(segment.begin), 0xff, segment.end - segment.begin);
}

}  // namespace emulator::shared_memory
