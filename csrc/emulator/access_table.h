// How well the accesses of each source line use the memory. The n-th executions of an instruction by the
// lanes of a warp are taken for one request, which is right where they go through a loop together.
//   global: 32-byte sectors touched, ideally the bytes of distinct addresses / 32
//   shared: wavefronts, ideally the distinct words / 32; more are bank conflicts
#pragma once
#include <map>
#include <string>
#include <vector>

#include "scheduler.h"

namespace emulator {

struct AccessKey {
  uint32_t site;  // the trace's number of the instruction
  Access access;
  bool shared;
  int tensor;  // which watched range, or -1
  uint32_t bytes;

  bool operator<(const AccessKey& other) const;
};

struct AccessTotals {
  uint64_t requests = 0, lanes = 0, cost = 0, ideal = 0;
};

class AccessTable {
 public:
  // Accesses of a thread of the running block; counted at the block's end.
  void add(const AccessKey& key, uint32_t thread, uintptr_t address);
  void block_ends(const std::string& kernel);

  const std::map<std::pair<std::string, AccessKey>, AccessTotals>& totals() const { return totals_; }
  void clear();

 private:
  struct Request {
    uintptr_t addresses[kWarpSize];
    uint32_t mask = 0;
  };
  struct Block {
    std::vector<uint32_t> executions;            // by thread
    std::vector<std::vector<Request>> requests;  // by warp
  };

  static void count(const Request& request, const AccessKey& key, AccessTotals& totals);

  std::map<AccessKey, Block> block_;
  std::map<std::pair<std::string, AccessKey>, AccessTotals> totals_;
};

}  // namespace emulator
