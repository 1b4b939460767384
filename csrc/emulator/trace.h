// The observer of a trace build; see trace.cpp.
#pragma once
#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "access_table.h"
#include "happens_before.h"
#include "observer.h"

namespace emulator {

// What a kernel may do with a tensor; an output holds nothing at first.
enum class Use { input, output, both };

class Trace final : public Observer {
 public:
  void launch_begins(const char* kernel, unsigned threads) override;
  void block_begins(unsigned block, MemoryRange variables, MemoryRange dynamic,
                    MemoryRange reserved) override;
  void thread_runs(unsigned thread, MemoryRange stack) override;
  void block_synchronised() override { order_.block_synchronised(); }
  void warp_synchronised(unsigned first, uint32_t mask) override { order_.warp_synchronised(first, mask); }
  void fenced() override { order_.fenced(); }
  void accessed(const void* address, size_t bytes, Access access, Location from) override;
  void copy_begins(const void* target, size_t bytes, Location from) override;
  std::string launch_ends() override;

  void instruction_accessed(const void* address, size_t bytes, Access access, void* returns_to, bool aligned);
  void index_out_of_array(const char* type, const char* file, int line);

  // Where tensors are watched, no other global memory may be touched.
  void watch(const void* address, size_t bytes, Use use, const std::string& name);
  void forget();
  void sample(unsigned blocks) {
    sampled_blocks_ = blocks;
  }  // of each launch, the first so many go into the table
  std::string accesses();  // the table, a line each: kernel, place, access, tensor, shared, bytes, ...

 private:
  struct Site {  // an instruction, or for what the emulator does itself the line that called it
    uintptr_t instruction;
    Location from;
  };
  struct Past {
    Event when;
    uint32_t site = 0;
    Access access = Access::read;
  };
  enum class Content : uint8_t { unwritten, copying, written };
  struct Memory {  // of a byte, or of four that have always been accessed together
    Past write;
    Past reads[3];  // the last; the last by another lane of its warp; the last by another warp
    uint32_t generation = 0;
    Content content = Content::unwritten;
  };
  static constexpr size_t kWordBytes = 4, kPageWords = 256;
  struct Word {
    Memory whole;
    std::unique_ptr<std::array<Memory, kWordBytes>>
        bytes;  // once a part of it was accessed, instead of `whole`
  };
  using Page = std::array<Word, kPageWords>;
  struct Tensor {
    MemoryRange range;
    Use use;
    std::string name;
  };
  struct Finding {
    std::string kind;
    uint32_t site, earlier_site;

    bool operator<(const Finding& other) const {
      return std::tie(kind, site, earlier_site) < std::tie(other.kind, other.site, other.earlier_site);
    }
  };
  struct Detail {
    std::string before, between, after;  // the one place and the earlier one
  };

  void see(uintptr_t address, size_t bytes, Access access, uint32_t site);
  int find_tensor(uintptr_t address, size_t bytes, Access access, uint32_t site);
  [[noreturn]] void out_of_bounds(const std::string& name, MemoryRange range, uintptr_t address, size_t bytes,
                                  Access access, uint32_t site);
  Word& word(uintptr_t address);
  template <class Function>
  void for_memory(uintptr_t address, size_t bytes, Function function);
  void renew(Memory& memory, bool shared);
  void check_content(const Memory& memory, bool shared, int tensor, Access access, uint32_t site);
  void check_order(const Memory& memory, bool shared, Access access, uint32_t site);
  static bool reads(Access access) { return access == Access::read || access == Access::relaxed_read; }
  static bool writes_only(Access access) {
    return access == Access::write || access == Access::relaxed_write;
  }
  static bool plain(Access access) { return access == Access::read || access == Access::write; }
  void remember(Memory& memory, const Past& access);
  void find(const Finding& finding, const Detail& detail);
  uint32_t site(const Site& place);
  std::vector<std::string> described_sites(const std::vector<uint32_t>& numbers);

  std::string kernel_;
  HappensBefore order_;
  AccessTable table_;
  std::map<Finding, Detail> findings_;
  std::vector<Tensor> tensors_;
  std::unordered_set<uintptr_t> guards_;
  MemoryRange library_, stack_, variables_, dynamic_, reserved_;
  uint32_t generation_ = 0, launch_ = 0, block_ = 0;
  unsigned blocks_begun_ = 0, sampled_blocks_ = 4;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t page_number_ = ~uintptr_t{0};
  Page* page_ = nullptr;
  std::vector<Site> sites_;
  std::unordered_map<uint64_t, uint32_t> site_numbers_;
};

}  // namespace emulator
