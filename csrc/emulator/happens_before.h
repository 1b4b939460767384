// Which accesses of a launch are ordered by synchronisation, whatever the order they were executed in.
//
// Within a block: barriers count epochs; within a warp each lane has a vector clock, joined by __syncwarp.
// Between blocks the one way is a handoff: writes, __threadfence, an atomic operation; then an atomic
// operation on the same address by another block, and reads ordered after it.
#pragma once
#include <array>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace emulator {

struct Event {  // when and by whom
  static constexpr uint32_t kNever = ~0u;

  uint32_t block = kNever, thread = 0;
  uint32_t epoch = 0, clock = 0;

  bool happened() const { return block != kNever; }
  bool same_thread(const Event& other) const { return block == other.block && thread == other.thread; }
  bool same_warp(const Event& other) const {
    return block == other.block && thread / kWarpSize == other.thread / kWarpSize;
  }
};

class HappensBefore {
 public:
  void launch_begins();
  void block_begins(uint32_t block);
  void thread_runs(uint32_t thread) { thread_ = thread; }
  void block_synchronised() { ++epoch_; }
  void warp_synchronised(uint32_t first_thread, uint32_t mask);
  void fenced();
  void atomic(uintptr_t address);

  Event now() const { return {block_, thread_, epoch_, clock_of(thread_)}; }
  bool ordered(const Event& earlier) const;  // before now()

 private:
  using Clocks = std::array<uint32_t, kWarpSize>;  // what a lane knows of the lanes of its warp
  struct Release {                                 // an atomic operation after a fence
    Event by, fence;
    Clocks clocks;
    std::vector<Event> fences;  // the last of each thread of its block
    Event acquired;             // in the block that runs

    bool covers(const Event& access) const;
  };

  uint32_t clock_of(uint32_t thread) const { return clocks_[thread][thread % kWarpSize]; }

  uint32_t block_ = 0, thread_ = 0, epoch_ = 0;
  std::array<Clocks, kMaxThreads> clocks_;
  std::vector<Event> fences_;  // of each thread of the block that runs; empty where none fenced
  std::unordered_map<uintptr_t, std::unordered_map<uint32_t, Release>> releases_;  // by address and block
  std::unordered_map<uint32_t, Release> acquired_;  // by the block that released
};

}  // namespace emulator
