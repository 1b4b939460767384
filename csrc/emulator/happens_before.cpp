#include "happens_before.h"

#include <algorithm>

namespace emulator {

void HappensBefore::launch_begins() { releases_.clear(); }

void HappensBefore::block_begins(uint32_t block) {
  block_ = block;
  epoch_ = 0;
  fences_.clear();
  acquired_.clear();
  for (uint32_t thread = 0; thread < kMaxThreads; ++thread) {
    clocks_[thread].fill(0);
    clocks_[thread][thread % kWarpSize] = 1;
  }
}

void HappensBefore::warp_synchronised(uint32_t first_thread, uint32_t mask) {
  Clocks joined = {};
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    for (uint32_t of = 0; mask >> lane & 1 && of < kWarpSize; ++of)
      joined[of] = std::max(joined[of], clocks_[first_thread + lane][of]);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    clocks_[first_thread + lane] = joined;
    ++clocks_[first_thread + lane][lane];
  }
}

void HappensBefore::fenced() {
  fences_.resize(kMaxThreads);
  fences_[thread_] = now();
}

void HappensBefore::atomic(uintptr_t address) {
  if (!releases_.empty()) {
    const auto found = releases_.find(address);
    if (found != releases_.end())
      for (const auto& [block, release] : found->second) {
        if (block == block_ || acquired_.count(block) != 0) continue;
        acquired_[block] = release;
        acquired_[block].acquired = now();
      }
  }
  if (fences_.empty() || !fences_[thread_].happened()) return;
  releases_[address][block_] = {now(), fences_[thread_], clocks_[thread_], fences_, {}};
}

// Whether the access is visible to who sees the release: it came before the releaser's fence, or before a
// fence of its own thread and a barrier.
bool HappensBefore::Release::covers(const Event& access) const {
  if (access.epoch < fence.epoch || access.same_thread(by)) return true;
  if (access.same_warp(by) && clocks[access.thread % kWarpSize] >= access.clock) return true;
  return fences[access.thread].happened() && access.epoch <= fences[access.thread].epoch &&
         access.epoch < by.epoch;
}

bool HappensBefore::ordered(const Event& earlier) const {
  if (!earlier.happened()) return true;
  if (earlier.block != block_) {
    const auto found = acquired_.find(earlier.block);
    return found != acquired_.end() && found->second.covers(earlier) && ordered(found->second.acquired);
  }
  if (earlier.thread == thread_ || earlier.epoch < epoch_) return true;
  return earlier.thread / kWarpSize == thread_ / kWarpSize &&
         clocks_[thread_][earlier.thread % kWarpSize] >= earlier.clock;
}

}  // namespace emulator
