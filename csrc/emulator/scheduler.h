// What the intrinsics need of the scheduler (scheduler.cpp). A CUDA thread is a fiber: it runs alone, and
// gives way to the others only in block_barrier, block_vote and warp_collective.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <vector_types.h>

#include <string>

#include "location.h"

namespace emulator {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // dynamic, of one block, on the largest architectures
constexpr uint32_t kFullMask = 0xffffffffu;

// ---- the running thread ----

unsigned thread_in_block();  // x fastest
inline unsigned lane_in_warp() { return thread_in_block() % kWarpSize; }
void* dynamic_shared_memory();

// Ends the launch with an error that names the kernel, the block and the thread, and the place where it is
// given.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const char* what, Location from);
void check_alignment(const void* address, size_t alignment, const char* what, Location from);

// ---- block ----

enum class Vote { count, all, any };
void block_barrier(Location from);
int block_vote(bool predicate, Vote vote, Location from);
void fence();  // __threadfence

// ---- warp ----

// The arguments of the lanes that take part in a collective operation; each lies on its own lane's stack.
template <class Argument>
struct Lanes {
  void* const* arguments;
  uint32_t mask;

  Argument& operator[](unsigned lane) const { return *static_cast<Argument*>(arguments[lane]); }
  bool has(unsigned lane) const { return mask >> lane & 1; }
};

struct Collective {
  const char* name;
  bool orders_memory;  // as __syncwarp does; a shuffle does not
  void* argument;
  void (*operation)();
  void (*run)(void (*operation)(), void* const* arguments, uint32_t mask);
};
void meet(uint32_t mask, const Collective& collective, Location from);

// Every lane of `mask` arrives with its argument; the last to arrive runs `operation` for all of them.
template <class Argument>
void warp_collective(const char* name, uint32_t mask, Argument& mine, void (*operation)(Lanes<Argument>),
                     Location from, bool orders_memory = false) {
  using Typed = void (*)(Lanes<Argument>);
  meet(mask,
       {name, orders_memory, &mine, reinterpret_cast<void (*)()>(operation),
        [](void (*erased)(), void* const* arguments, uint32_t lanes) {
          reinterpret_cast<Typed>(erased)({arguments, lanes});
        }},
       from);
}

// ---- asynchronous copies ----

// Queued, and done no sooner than the wait that covers it; the target is NaN until then. Bytes past
// `source_bytes` become zero.
void copy_async(void* target, const void* source, int bytes, int source_bytes, Location from);
void commit_copies();
void wait_for_copies(int groups_left);

// ---- memory that the instrumentation does not see, or sees wrongly ----

// Relaxed accesses and atomic operations race with plain ones only.
enum class Access : uint8_t { read, write, atomic, relaxed_read, relaxed_write };
void note_access(const void* address, size_t bytes, Access access, Location from);

// Accesses within its scope are the emulator's own and are not traced. The emulator is not instrumented, but
// the linker may take an inline function that it shares with a kernel's source from there.
struct Untraced {
  Untraced();
  ~Untraced();
  bool before;
};

// ---- launch ----

// What a thread runs: `call(arguments)`, of the launcher's library but not the kernel's own code, so not
// instrumented.
struct Body {
  void (*call)(const void* arguments);
  const void* arguments;
};
// Runs `body` once per thread. 0, or 1 with the reason in emulator_error().
int run_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body);

}  // namespace emulator

extern "C" {
// Why the first launch that failed since the last emulator_clear() did; "" where none did. Later ones are
// refused.
const char* emulator_error();
void emulator_clear();
// How much time of the processor a launch may take; 60 seconds where nothing is said.
void emulator_time_limit(double seconds);
// In which order threads and blocks run: 0 forward, 1 reverse, 2 shuffled by the seed.
void emulator_order(int order, unsigned seed);
}
