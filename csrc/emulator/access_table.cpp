#include "access_table.h"

#include <algorithm>
#include <set>
#include <tuple>

namespace emulator {
namespace {

constexpr uintptr_t kSectorBytes = 32, kBankBytes = 4;
constexpr unsigned kBanks = 32;

void add_units(std::set<uintptr_t>& units, uintptr_t address, uint32_t bytes, uintptr_t unit_bytes) {
  for (uintptr_t unit = address / unit_bytes; unit <= (address + bytes - 1) / unit_bytes; ++unit)
    units.insert(unit);
}

}  // namespace

bool AccessKey::operator<(const AccessKey& other) const {
  return std::tie(site, access, shared, tensor, bytes) <
         std::tie(other.site, other.access, other.shared, other.tensor, other.bytes);
}

void AccessTable::add(const AccessKey& key, uint32_t thread, uintptr_t address) {
  Block& block = block_[key];
  if (block.executions.empty()) {
    block.executions.resize(kMaxThreads);
    block.requests.resize(kMaxThreads / kWarpSize);
  }
  const uint32_t execution = block.executions[thread]++;
  std::vector<Request>& requests = block.requests[thread / kWarpSize];
  if (requests.size() <= execution) requests.resize(execution + 1);
  requests[execution].addresses[thread % kWarpSize] = address;
  requests[execution].mask |= 1u << thread % kWarpSize;
}

void AccessTable::block_ends(const std::string& kernel) {
  for (const auto& [key, block] : block_) {
    AccessTotals& totals = totals_[{kernel, key}];
    for (const std::vector<Request>& requests : block.requests)
      for (const Request& request : requests) count(request, key, totals);
  }
  block_.clear();
}

void AccessTable::count(const Request& request, const AccessKey& key, AccessTotals& totals) {
  if (request.mask == 0) return;
  ++totals.requests;
  totals.lanes += __builtin_popcount(request.mask);
  // A request for shared memory serves 32 lanes of up to 4 bytes, 16 of 8 or 8 of 16 at a time.
  const unsigned served = !key.shared || key.bytes <= 4 ? 32 : key.bytes <= 8 ? 16 : 8;
  for (unsigned first = 0; first < kWarpSize; first += served) {
    std::set<uintptr_t> units, addresses;
    for (unsigned lane = first; lane < first + served; ++lane) {
      if (!(request.mask >> lane & 1)) continue;
      addresses.insert(request.addresses[lane]);
      add_units(units, request.addresses[lane], key.bytes, key.shared ? kBankBytes : kSectorBytes);
    }
    if (!key.shared) {
      totals.cost += units.size();
      totals.ideal += (addresses.size() * key.bytes + kSectorBytes - 1) / kSectorBytes;
      continue;
    }
    unsigned words_of_bank[kBanks] = {};
    for (uintptr_t word : units) ++words_of_bank[word % kBanks];
    totals.cost += *std::max_element(words_of_bank, words_of_bank + kBanks);
    totals.ideal += (units.size() + kBanks - 1) / kBanks;
  }
}

void AccessTable::clear() {
  block_.clear();
  totals_.clear();
}

}  // namespace emulator
