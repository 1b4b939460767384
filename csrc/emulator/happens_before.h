// Which accesses of a launch are ordered by synchronisation, whatever the order they were executed in.
//
// Within a block: barriers count epochs; within a warp each lane has a vector clock, joined by __syncwarp.
// Across blocks and warps there is the handoff: a write, __threadfence, an atomic operation; then an atomic
// operation on the same address by another thread, and reads ordered after that.
#pragma once
#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace emulator {

struct Event {  // when and by whom
  static constexpr uint32_t kNever = ~0u;

  uint32_t block = kNever, thread = 0;
  uint32_t epoch = 0, clock = 0;
  uint32_t time = 0;  // of execution: fences and atomic operations before it

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

  Event now() const { return {block_, thread_, epoch_, clocks_[thread_][thread_ % kWarpSize], time_}; }
  bool ordered(const Event& earlier) const;  // before now()

 private:
  using Clocks = std::array<uint32_t, kWarpSize>;  // what a lane knows of the lanes of its warp
  using Fences = std::vector<Event>;               // the last of each thread of a block

  struct Release {  // an atomic operation of a thread that has fenced
    Event by;
    Clocks clocks;
    std::shared_ptr<const Fences> fences;

    bool covers(const Event& access) const;
  };
  struct Acquisition {
    Release release;
    Event by;
  };

  uint32_t block_ = 0, thread_ = 0, epoch_ = 0, time_ = 0;
  std::array<Clocks, kMaxThreads> clocks_;
  std::shared_ptr<Fences> fences_;  // of the block that runs; null where none fenced
  std::unordered_map<uintptr_t, std::vector<Release>> releases_;         // of the launch, by address
  std::unordered_map<uint32_t, std::vector<Acquisition>> acquisitions_;  // of this block, by who released
};

}  // namespace emulator
