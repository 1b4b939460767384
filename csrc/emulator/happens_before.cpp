#include "happens_before.h"

#include <algorithm>

namespace emulator {

void HappensBefore::launch_begins() {
  releases_.clear();
  time_ = 0;
}

void HappensBefore::block_begins(uint32_t block) {
  block_ = block;
  epoch_ = 0;
  fences_.reset();
  acquisitions_.clear();
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
  ++time_;
  if (fences_ == nullptr)
    fences_ = std::make_shared<Fences>(kMaxThreads);
  else if (fences_.use_count() > 1)  // a release keeps them as they were
    fences_ = std::make_shared<Fences>(*fences_);
  (*fences_)[thread_] = now();
}

void HappensBefore::atomic(uintptr_t address) {
  ++time_;
  const auto found = releases_.find(address);
  if (found != releases_.end())
    for (const Release& release : found->second)
      if (!release.by.same_thread(now())) acquisitions_[release.by.block].push_back({release, now()});
  if (fences_ != nullptr && (*fences_)[thread_].happened())
    releases_[address].push_back({now(), clocks_[thread_], fences_});
}

// Whether who sees the release sees the access: it was ordered before the atomic operation, and fenced off by
// its own thread or by the releasing one.
bool HappensBefore::Release::covers(const Event& access) const {
  if (access.time >= by.time) return false;
  const bool fenced = (*fences)[access.thread].time > access.time || (*fences)[by.thread].time > access.time;
  const bool before = access.same_thread(by) || access.epoch < by.epoch ||
                      (access.same_warp(by) && clocks[access.thread % kWarpSize] >= access.clock);
  return fenced && before;
}

bool HappensBefore::ordered(const Event& earlier) const {
  if (!earlier.happened()) return true;
  if (earlier.block == block_) {
    if (earlier.thread == thread_ || earlier.epoch < epoch_) return true;
    const bool same_warp = earlier.thread / kWarpSize == thread_ / kWarpSize;
    if (same_warp && clocks_[thread_][earlier.thread % kWarpSize] >= earlier.clock) return true;
  }
  const auto found = acquisitions_.find(earlier.block);
  if (found == acquisitions_.end()) return false;
  return std::any_of(found->second.begin(), found->second.end(), [&](const Acquisition& acquisition) {
    return acquisition.release.covers(earlier) && ordered(acquisition.by);
  });
}

}  // namespace emulator
