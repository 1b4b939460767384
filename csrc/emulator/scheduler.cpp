// Runs the threads of a block as fibers, one at a time, and blocks one after another.
//
//   for each block, in the chosen order
//     until all threads have returned
//       for each warp, in the chosen order
//         until none of its threads can go on: for each of its threads, in the chosen order, run it till it
//         waits
//
// So a warp runs as far ahead of the others as barriers let it, and a lane as far ahead of its warp: what is
// not synchronised is seen too early in one order or too late in another. Compiled without -fsanitize=thread.
#include "scheduler.h"

#include <string.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "faults.h"
#include "fiber.h"
#include "observer.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Observer* observer = nullptr;
bool tracing = false;

namespace {

enum class State { ready, at_barrier, in_collective, finished };
enum Order { kForward, kReverse, kShuffled };

struct Copy {
  char* target;
  const char* source;
  int bytes, source_bytes;
  Location from;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Location from;  // where it waits
  uint32_t mask;  // of the collective it waits in
  Collective collective;
  std::vector<Copy> open;                // cp.async not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, the oldest first
};

struct Launch {
  const char* kernel;
  unsigned threads;
  Body body;
};

std::mutex one_launch;
std::vector<Thread> threads;
Launch launch;
unsigned running;               // the thread that runs, where `tracing`
unsigned returned, at_barrier;  // how many threads of this block
int votes, vote_result;
Order order = kForward;
unsigned order_seed = 0;
double time_limit = 60;
bool listing = false;  // launches go into `launches`, and nothing runs
std::string launches;
std::string error;

// ---- errors ----

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string in_block() {
  return "kernel " + std::string(launch.kernel) + ", block " + triple(blockIdx.x, blockIdx.y, blockIdx.z);
}

std::string whose(unsigned thread) {
  const uint3 index = threads[thread].index;
  return in_block() + ", thread " + triple(index.x, index.y, index.z) + " (warp " +
         std::to_string(thread / kWarpSize) + ", lane " + std::to_string(thread % kWarpSize) + ")";
}

void record(const std::string& what) {
  if (error.empty()) error = what;
}

bool same_place(Location a, Location b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// ---- one thread ----

void leave() {
  tracing = false;
  threads[running].fiber.leave();
  tracing = true;
}

void thread_main() {
  tracing = true;
  launch.body.call(launch.body.arguments);
  tracing = false;
  threads[running].state = State::finished;
  leave();
}

void enter(unsigned thread) {
  running = thread;
  threadIdx = threads[thread].index;
  if (observer != nullptr) {
    const uintptr_t stack = reinterpret_cast<uintptr_t>(threads[thread].fiber.stack());
    observer->thread_runs(thread, {stack, stack + Fiber::kStackBytes});
  }
  threads[thread].fiber.enter();
}

// ---- barriers ----

// All threads that have not returned wait at the barrier, or the block cannot go on.
void release_barrier() {
  Location first;
  for (unsigned t = 0; t < launch.threads; ++t) {
    Thread& thread = threads[t];
    if (thread.state != State::at_barrier) continue;
    if (first.line == 0) first = thread.from;
    if (!same_place(thread.from, first))
      return record("divergent barrier: some threads of the block wait at " + described(first) +
                    ", others at " + described(thread.from) + "; " + whose(t));
  }
  if (returned > 0)
    return record("early return: " + std::to_string(returned) + " of " + std::to_string(launch.threads) +
                  " threads have returned, the others wait at the barrier in " + described(first) + "; " +
                  in_block());
  for (unsigned t = 0; t < launch.threads; ++t) threads[t].state = State::ready;
  at_barrier = 0;
  vote_result = votes;
  votes = 0;
  if (observer != nullptr) observer->block_synchronised();
}

void report_deadlock() {
  std::string waiting;
  Location last;
  for (unsigned t = 0; t < launch.threads; ++t) {
    const Thread& thread = threads[t];
    if (thread.state == State::finished || same_place(thread.from, last)) continue;
    last = thread.from;
    const bool barrier = thread.state == State::at_barrier;
    waiting += "a thread waits for " + std::string(barrier ? "the barrier" : thread.collective.name) +
               " in " + described(thread.from) + "; ";
  }
  record("deadlock: " + waiting + std::to_string(returned) + " threads have returned; " + in_block());
}

// ---- blocks ----

std::vector<unsigned> in_order(unsigned count, std::mt19937& random) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == kReverse) std::reverse(numbers.begin(), numbers.end());
  if (order == kShuffled) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

void prepare_block() {
  returned = at_barrier = 0;
  votes = 0;
  for (unsigned t = 0; t < launch.threads; ++t) {
    threads[t].state = State::ready;
    threads[t].open.clear();
    threads[t].groups.clear();
    threads[t].fiber.start(thread_main);
  }
}

void thread_returned(unsigned t) {
  ++returned;
  if (!threads[t].open.empty() || !threads[t].groups.empty())
    record("unfinished cp.async: a thread has returned without waiting for it; " + whose(t));
}

// Runs the threads of a warp till all wait or have returned; whether one ran at all.
bool run_warp(unsigned first, const std::vector<unsigned>& lanes) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned lane : lanes) {
      const unsigned t = first + lane;
      if (t >= launch.threads || threads[t].state != State::ready) continue;
      enter(t);
      ran = again = true;
      if (threads[t].state == State::finished) thread_returned(t);
      if (!error.empty()) return true;
    }
  }
  return ran;
}

void run_block(std::mt19937& random) {
  prepare_block();
  const std::vector<unsigned> warps = in_order((launch.threads + kWarpSize - 1) / kWarpSize, random);
  while (returned < launch.threads && error.empty()) {
    bool ran = false;
    for (unsigned warp : warps) {
      ran |= run_warp(warp * kWarpSize, in_order(kWarpSize, random));
      if (!error.empty()) return;
    }
    if (at_barrier > 0 && at_barrier + returned == launch.threads)
      release_barrier();
    else if (!ran)
      report_deadlock();
  }
}

std::string wrong_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t block_threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (block_threads == 0 || block_threads > kMaxThreads || block.z > 64)
    return "a block of " + triple(block.x, block.y, block.z) + " threads; 1 to 1024 are possible, 64 in z";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return "a grid of " + triple(grid.x, grid.y, grid.z) +
           " blocks; 1 to 2147483647 x 65535 x 65535 are possible";
  if (shared_bytes > kMaxSharedBytes)
    return std::to_string(shared_bytes) + " bytes of dynamic shared memory; " +
           std::to_string(kMaxSharedBytes) + " are possible";
  return "";
}

void prepare_launch(const char* name, dim3 block, Body body) {
  launch = {name, block.x * block.y * block.z, body};
  if (threads.size() < launch.threads) threads.resize(launch.threads);
  for (unsigned t = 0; t < launch.threads; ++t)
    threads[t].index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
}

void run_blocks(size_t shared_bytes) {
  std::mt19937 random(order_seed);
  if (observer != nullptr) observer->launch_begins(launch.kernel, launch.threads);
  for (unsigned block : in_order(gridDim.x * gridDim.y * gridDim.z, random)) {
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
    shared_memory::fill(shared_bytes);
    if (observer != nullptr)
      observer->block_begins(block, shared_memory::variables(), shared_memory::dynamic(shared_bytes),
                             shared_memory::reserved());
    run_block(random);
    if (!error.empty()) break;
  }
  if (observer == nullptr) return;
  const std::string findings = observer->launch_ends();
  error += (error.empty() || findings.empty() ? "" : "\n") + findings;
}

}  // namespace

// ---- what kernels call ----

unsigned thread_in_block() { return running; }
void* dynamic_shared_memory() { return shared_memory::dynamic_address(); }

void fail(const std::string& what) {
  tracing = false;
  record(what + "; " + whose(running));
  for (;;) leave();
}

void fail(const char* what, Location from) { fail(what + std::string(" in ") + described(from)); }

void check_alignment(const void* address, size_t alignment, const char* what, Location from) {
  const size_t past = reinterpret_cast<uintptr_t>(address) % alignment;
  if (past != 0)
    fail("misaligned address: " + std::string(what) + " in " + described(from) + " needs a multiple of " +
         std::to_string(alignment) + " and got one " + std::to_string(past) + " past it");
}

void block_barrier(Location from) {
  threads[running].state = State::at_barrier;
  threads[running].from = from;
  ++at_barrier;
  leave();
}

int block_vote(bool predicate, Vote vote, Location from) {
  votes += predicate;
  block_barrier(from);
  switch (vote) {
    case Vote::count:
      return vote_result;
    case Vote::all:
      return vote_result == static_cast<int>(launch.threads);
    default:
      return vote_result > 0;
  }
}

void fence() {
  const Untraced untraced;
  if (observer != nullptr) observer->fenced();
}

void meet(uint32_t mask, const Collective& collective, Location from) {
  tracing = false;
  Thread& own = threads[running];
  const unsigned first = running / kWarpSize * kWarpSize, lane = running % kWarpSize;
  const auto here = [&] { return std::string(collective.name) + " in " + described(from); };
  if (!(mask >> lane & 1)) fail("missing lane: " + here() + " is called by a lane that its mask leaves out");
  own.state = State::in_collective;
  own.mask = mask;
  own.collective = collective;
  own.from = from;
  void* arguments[kWarpSize] = {};
  for (unsigned other = 0; other < kWarpSize; ++other) {
    if (!(mask >> other & 1)) continue;
    const auto waits = [&] { return "missing lane: " + here() + " waits for lane " + std::to_string(other); };
    if (first + other >= launch.threads) fail(waits() + ", which is beyond the block");
    const Thread& thread = threads[first + other];
    if (thread.state == State::finished) fail(waits() + ", which has returned");
    if (thread.state != State::in_collective) return leave();
    if (thread.mask != mask || strcmp(thread.collective.name, collective.name) != 0) {
      if (!(thread.mask >> lane & 1)) return leave();  // it waits for others, and comes here later
      fail("different operations: " + here() + " meets " + thread.collective.name + " in " +
           described(thread.from) + (thread.mask != mask ? ", of another mask" : ""));
    }
    arguments[other] = thread.collective.argument;
  }
  collective.run(collective.operation, arguments, mask);
  for (unsigned other = 0; other < kWarpSize; ++other)
    if (mask >> other & 1) threads[first + other].state = State::ready;
  if (collective.orders_memory && observer != nullptr) observer->warp_synchronised(first, mask);
  tracing = true;
}

void copy_async(void* target, const void* source, int bytes, int source_bytes, Location from) {
  const Untraced untraced;
  check_alignment(target, bytes, "cp.async to shared memory", from);
  if (source_bytes > 0) check_alignment(source, bytes, "cp.async from global memory", from);
  if (observer != nullptr) observer->copy_begins(target, bytes, from);
  memset(target, 0xff, bytes);
  threads[running].open.push_back(
      {static_cast<char*>(target), static_cast<const char*>(source), bytes, source_bytes, from});
}

void commit_copies() {
  const Untraced untraced;
  Thread& own = threads[running];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait_for_copies(int groups_left) {
  const Untraced untraced;
  std::deque<std::vector<Copy>>& groups = threads[running].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (copy.source_bytes > 0) note_access(copy.source, copy.source_bytes, Access::read, copy.from);
      note_access(copy.target, copy.bytes, Access::write, copy.from);
      memcpy(copy.target, copy.source, copy.source_bytes);
      memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    }
    groups.pop_front();
  }
}

void note_access(const void* address, size_t bytes, Access access, Location from) {
  const Untraced untraced;
  if (observer != nullptr) observer->accessed(address, bytes, access, from);
}

Untraced::Untraced() : before(tracing) { tracing = false; }
Untraced::~Untraced() { tracing = before; }

int run_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (!error.empty()) return 1;
  const std::string wrong = wrong_limits(grid, block, shared_bytes);
  if (!wrong.empty()) {
    record("launch limits: kernel " + std::string(name) + " asks for " + wrong);
    return 1;
  }
  if (listing) {
    launches += std::string(name) + '\t' + std::to_string(grid.x * grid.y * grid.z) + '\n';
    return 0;
  }
  blockDim = block;
  gridDim = grid;
  prepare_launch(name, block, body);
  const std::string fault = run_guarded(time_limit, [&] { run_blocks(shared_bytes); });
  tracing = false;
  if (!fault.empty()) record(fault + "; " + whose(running));
  return error.empty() ? 0 : 1;
}

}  // namespace emulator

extern "C" {
const char* emulator_error() { return emulator::error.c_str(); }
// Launches are listed from here on, a line "kernel<tab>blocks" each, instead of run; or run again. Gives the
// list that there was till now.
const char* emulator_list(int on) {
  static std::string listed;
  listed.swap(emulator::launches);
  emulator::launches.clear();
  emulator::listing = on != 0;
  return listed.c_str();
}
void emulator_clear() { emulator::error.clear(); }
void emulator_time_limit(double seconds) { emulator::time_limit = seconds; }
void emulator_order(int order, unsigned seed) {
  emulator::order = static_cast<emulator::Order>(order);
  emulator::order_seed = seed;
}
}
