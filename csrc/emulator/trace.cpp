// Watches every load and store of a kernel, which instrumentation.cpp hands on.
//
// Found: races in shared and global memory, reads of shared memory that nothing wrote or whose cp.async is
// unfinished, reads of outputs before they are written, accesses outside of the watched tensors, writes to
// inputs, misaligned vectors; with -fsanitize=bounds indices outside of arrays. And the table of
// access_table.h.
//
// Not watched: a thread's own stack, constants and the library's other variables. Compiled without
// instrumentation.
#include "trace.h"

#include <link.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "symbols.h"

namespace emulator {
namespace {

const char* const kAccessNames[] = {"read", "write", "atomic", "relaxed read", "relaxed write"};

// The memory of the library that this function is in.
int find_library(dl_phdr_info* library, size_t, void* found) {
  MemoryRange range{~uintptr_t{0}, 0};
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    range.begin = std::min<uintptr_t>(range.begin, library->dlpi_addr + header.p_vaddr);
    range.end = std::max<uintptr_t>(range.end, library->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  if (!range.contains(reinterpret_cast<uintptr_t>(&find_library))) return 0;
  *static_cast<MemoryRange*>(found) = range;
  return 1;
}

std::string by(const Event& event) {
  return "block " + std::to_string(event.block) + " thread " + std::to_string(event.thread);
}

}  // namespace

// ---- from the scheduler ----

void Trace::launch_begins(const char* kernel, unsigned) {
  if (library_.end == 0) {
    dl_iterate_phdr(find_library, &library_);
    guards_ = guard_variables();
  }
  kernel_ = kernel;
  findings_.clear();
  order_.launch_begins();
  launch_ = ++generation_;
  blocks_begun_ = 0;
}

void Trace::block_begins(unsigned block, MemoryRange variables, MemoryRange dynamic, MemoryRange reserved) {
  table_.block_ends(kernel_);
  order_.block_begins(block);
  block_ = ++generation_;
  ++blocks_begun_;
  variables_ = variables;
  dynamic_ = dynamic;
  reserved_ = reserved;
}

void Trace::thread_runs(unsigned thread, MemoryRange stack) {
  order_.thread_runs(thread);
  stack_ = stack;
}

void Trace::accessed(const void* address, size_t bytes, Access access, Location from) {
  see(reinterpret_cast<uintptr_t>(address), bytes, access, site({0, from}));
}

void Trace::copy_begins(const void* target, size_t bytes, Location from) {
  accessed(target, bytes, Access::write, from);
  for_memory(reinterpret_cast<uintptr_t>(target), bytes,
             [](Memory& memory) { memory.content = Content::copying; });
}

std::string Trace::launch_ends() {
  table_.block_ends(kernel_);
  std::vector<uint32_t> sites;
  for (const auto& [finding, detail] : findings_) {
    sites.push_back(finding.site);
    sites.push_back(finding.earlier_site);
  }
  const std::vector<std::string> lines = described_sites(sites);
  std::string text;
  std::set<std::tuple<std::string, std::string, std::string>> told;  // one per kind and pair of lines
  size_t i = 0;
  for (const auto& [finding, detail] : findings_) {
    const std::string line = lines[i++], earlier_line = lines[i++];
    if (!told.emplace(finding.kind, std::min(line, earlier_line), std::max(line, earlier_line)).second)
      continue;
    text += text.empty() ? "" : "\n";
    text += finding.kind + ": " + detail.before + line + detail.between;
    if (!detail.after.empty()) text += earlier_line + detail.after;
    text += "; kernel " + kernel_;
  }
  return text;
}

// ---- from the instrumentation ----

void Trace::instruction_accessed(const void* address, size_t bytes, Access access, void* returns_to,
                                 bool aligned) {
  if (!tracing) return;
  const Untraced untraced;
  const uintptr_t where = reinterpret_cast<uintptr_t>(address);
  if (stack_.contains(where) || library_.contains(where)) return;
  if (bytes == 1 && variables_.contains(where) && guards_.count(where - variables_.begin) != 0) return;
  const uint32_t at = site({reinterpret_cast<uintptr_t>(returns_to) - 1, {}});  // - 1: in the call
  if (aligned && where % bytes != 0)
    find({"misaligned address", at, at},
         {std::to_string(bytes) + "-byte " + kAccessNames[static_cast<int>(access)] + " in ",
          ", " + std::to_string(where % bytes) + " bytes past a multiple; " + by(order_.now()), ""});
  see(where, bytes, access, at);
}

void Trace::index_out_of_array(const char* type, const char* file, int line) {
  if (!tracing) return;
  tracing = false;
  fail("index out of bounds: of " + std::string(type) + " in " + described({file, line}));
}

// ---- one access ----

void Trace::see(uintptr_t address, size_t bytes, Access access, uint32_t site) {
  if (library_.contains(address)) {  // a __device__ variable, whose atomic operations order other accesses
    if (access == Access::atomic) order_.atomic(address);
    return;
  }
  const bool shared = variables_.contains(address) || dynamic_.contains(address, bytes);
  int tensor = -1;
  if (!shared) {
    if (reserved_.contains(address))
      out_of_bounds("dynamic shared memory", dynamic_, address, bytes, access, site);
    tensor = find_tensor(address, bytes, access, site);
  }
  if (access == Access::atomic && !shared) order_.atomic(address);
  const Event now = order_.now();
  for_memory(address, bytes, [&](Memory& memory) {
    renew(memory, shared);
    check_content(memory, shared, tensor, access, site);
    check_order(memory, shared, access, site);
    remember(memory, {now, site, access});
  });
  if (blocks_begun_ <= sampled_blocks_)
    table_.add({site, access, shared, tensor, static_cast<uint32_t>(bytes)}, now.thread, address);
}

int Trace::find_tensor(uintptr_t address, size_t bytes, Access access, uint32_t site) {
  if (tensors_.empty()) return -1;
  size_t nearest = 0;
  uintptr_t distance = ~uintptr_t{0};
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    if (tensor.range.contains(address, bytes)) {
      if (!reads(access) && tensor.use == Use::input)
        find({"write to an input", site, site}, {"", " writes " + tensor.name + "; " + by(order_.now()), ""});
      return static_cast<int>(i);
    }
    const uintptr_t away =
        address < tensor.range.begin ? tensor.range.begin - address : address + bytes - tensor.range.end;
    if (away < distance) {
      distance = away;
      nearest = i;
    }
  }
  out_of_bounds(tensors_[nearest].name, tensors_[nearest].range, address, bytes, access, site);
}

void Trace::out_of_bounds(const std::string& name, MemoryRange range, uintptr_t address, size_t bytes,
                          Access access, uint32_t site) {
  constexpr intptr_t kNear = 1 << 20;
  const intptr_t offset = static_cast<intptr_t>(address - range.begin), size = range.end - range.begin;
  const bool near = offset > -kNear && offset < size + kNear;
  fail("out of bounds: " + std::string(kAccessNames[static_cast<int>(access)]) + " of " +
       std::to_string(bytes) + " bytes " +
       (near ? "at byte " + std::to_string(offset) + " of " + name + ", which has " + std::to_string(size)
             : "far from every tensor") +
       ", in " + described_sites({site})[0]);
}

Trace::Word& Trace::word(uintptr_t address) {
  const uintptr_t number = address / (kPageWords * kWordBytes);
  if (number != page_number_) {
    std::unique_ptr<Page>& page = pages_[number];
    if (page == nullptr) page = std::make_unique<Page>();
    page_number_ = number;
    page_ = page.get();
  }
  return (*page_)[address / kWordBytes % kPageWords];
}

template <class Function>
void Trace::for_memory(uintptr_t address, size_t bytes, Function function) {
  for (const uintptr_t end = address + bytes; address < end;) {
    const size_t first = address % kWordBytes, last = std::min<size_t>(kWordBytes, first + (end - address));
    Word& memory = word(address);
    address += last - first;
    if (last - first == kWordBytes && memory.bytes == nullptr) {
      function(memory.whole);
      continue;
    }
    if (memory.bytes == nullptr) {
      memory.bytes = std::make_unique<std::array<Memory, kWordBytes>>();
      memory.bytes->fill(memory.whole);
    }
    for (size_t i = first; i < last; ++i) function((*memory.bytes)[i]);
  }
}

// A launch orders all accesses to global memory of those before it; a block has shared memory of its own.
void Trace::renew(Memory& memory, bool shared) {
  const uint32_t generation = shared ? block_ : launch_;
  if (memory.generation == generation) return;
  const Content content = shared ? Content::unwritten : memory.content;
  memory = {};
  memory.content = content;
  memory.generation = generation;
}

void Trace::check_content(const Memory& memory, bool shared, int tensor, Access access, uint32_t site) {
  if (writes_only(access) || memory.content == Content::written) return;
  if (memory.content == Content::copying)
    find({"unfinished cp.async", site, site},
         {"", " reads what no wait_for_copies covers yet; " + by(order_.now()), ""});
  else if (shared)
    find({"uninitialised shared memory", site, site}, {"", " reads it; " + by(order_.now()), ""});
  else if (tensor >= 0 && tensors_[tensor].use == Use::output)
    find({"uninitialised output", site, site},
         {"", " reads " + tensors_[tensor].name + " before it is written; " + by(order_.now()), ""});
}

void Trace::check_order(const Memory& memory, bool shared, Access access, uint32_t site) {
  const auto check = [&](const Past& past) {
    if (order_.ordered(past.when) || (!plain(past.access) && !plain(access))) return;
    find({shared ? "race in shared memory" : "race in global memory", site, past.site},
         {std::string(kAccessNames[static_cast<int>(access)]) + " in ",
          " by " + by(order_.now()) + " and " + kAccessNames[static_cast<int>(past.access)] + " in ",
          " by " + by(past.when) + " are not ordered"});
  };
  check(memory.write);
  if (reads(access)) return;
  for (const Past& read : memory.reads) check(read);
}

void Trace::remember(Memory& memory, const Past& access) {
  if (!reads(access.access)) {
    memory.write = access;
    memory.content = Content::written;
    return;
  }
  Past& last = memory.reads[0];
  if (last.when.happened() && !last.when.same_thread(access.when))
    memory.reads[last.when.same_warp(access.when) ? 1 : 2] = last;
  last = access;
}

void Trace::find(const Finding& finding, const Detail& detail) {
  constexpr size_t kMostFindings = 20;
  if (findings_.size() < kMostFindings)
    findings_.emplace(finding, detail);  // the first of its kind and place
}

// ---- sites ----

uint32_t Trace::site(const Site& place) {
  const uint64_t key =
      place.instruction != 0
          ? place.instruction
          : reinterpret_cast<uintptr_t>(place.from.file) * 0x9e3779b97f4a7c15u + place.from.line;
  const auto [found, is_new] = site_numbers_.emplace(key, static_cast<uint32_t>(sites_.size()));
  if (is_new) sites_.push_back(place);
  return found->second;
}

std::vector<std::string> Trace::described_sites(const std::vector<uint32_t>& numbers) {
  std::vector<uintptr_t> instructions;
  for (uint32_t number : numbers)
    if (sites_[number].instruction != 0) instructions.push_back(sites_[number].instruction);
  const std::vector<std::string> lines = source_lines(instructions);
  std::vector<std::string> all;
  size_t next = 0;
  for (uint32_t number : numbers)
    all.push_back(sites_[number].instruction != 0 ? lines[next++] : described(sites_[number].from));
  return all;
}

// ---- what a test asks for ----

void Trace::watch(const void* address, size_t bytes, Use use, const std::string& name) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  tensors_.push_back({{begin, begin + bytes}, use, name});
}

void Trace::forget() {
  tensors_.clear();
  table_.clear();
  pages_.clear();
  page_number_ = ~uintptr_t{0};
}

std::string Trace::accesses() {
  std::vector<uint32_t> sites;
  for (const auto& [key, totals] : table_.totals()) sites.push_back(key.second.site);
  const std::vector<std::string> lines = described_sites(sites);
  std::ostringstream text;
  size_t i = 0;
  for (const auto& [key, totals] : table_.totals()) {
    const AccessKey& access = key.second;
    text << key.first << '\t' << lines[i++] << '\t' << kAccessNames[static_cast<int>(access.access)] << '\t'
         << (access.shared       ? "shared"
             : access.tensor < 0 ? "global"
                                 : tensors_[access.tensor].name)
         << '\t' << access.shared << '\t' << access.bytes << '\t' << totals.requests << '\t' << totals.lanes
         << '\t' << totals.cost << '\t' << totals.ideal << '\n';
  }
  return text.str();
}

}  // namespace emulator
