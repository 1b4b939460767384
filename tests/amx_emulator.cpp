// Runs the AMX instructions of csrc/cpu/amx.h on a processor without AMX: each raises SIGILL, and the handler
// here does what Intel's "Architecture Instruction Set Extensions Programming Reference" says it does, then
// goes on behind it. So it is the compiled kernel itself that is tested, operands and addresses included.
// Anything else that raises SIGILL, and a tile instruction before LDTILECFG or outside the configured tiles,
// ends the process as it would without the handler.
//
// A shared library to load before Python (LD_PRELOAD); the bindings look for its name. See tests/test_isa.py.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>

// Products of tiles so far, of every thread; by this name the bindings know that the emulator is there.
extern "C" {
__attribute__((visibility("default"))) std::atomic<int64_t> fastbert_amx_emulator;
}

namespace {

constexpr int kTiles = 8, kRows = 16, kWords = 16;

struct Tiles {
  bool configured;
  int rows[kTiles], words[kTiles];
  uint32_t values[kTiles][kRows][kWords];
};
thread_local Tiles tiles;

float low(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float high(uint32_t pair) {
  const uint32_t bits = pair & 0xFFFF0000u;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The three-byte VEX prefix, the opcode and the operands.
struct Instruction {
  int prefix;  // 0: none, 1: 66, 2: F3, 3: F2
  int opcode, reg, rm, vvvv, length;
  bool memory;
  char* base;      // of the memory operand, displacement included
  int64_t stride;  // its index register, scaled: bytes from row to row
};

int64_t general_register(const ucontext_t& context, int number) {
  static const int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

bool decode(const ucontext_t& context, Instruction* out) {
  const int64_t address = context.uc_mcontext.gregs[REG_RIP];
  const uint8_t* code = reinterpret_cast<const uint8_t*>(address);
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return false;  // VEX.128.0F38.W0
  const int extend_reg = code[1] & 0x80 ? 0 : 8, extend_index = code[1] & 0x40 ? 0 : 8,
            extend_base = code[1] & 0x20 ? 0 : 8;
  const int mod = code[4] >> 6, rm = code[4] & 7;
  Instruction i{};
  i.prefix = code[2] & 3, i.vvvv = ~(code[2] >> 3) & 15, i.opcode = code[3];
  i.reg = (code[4] >> 3 & 7) + extend_reg, i.rm = rm + extend_base, i.memory = mod != 3, i.length = 5;
  if (i.memory) {
    int base = i.rm;
    if (rm == 4) {
      const uint8_t sib = code[5];
      const int index = (sib >> 3 & 7) + extend_index;
      i.length = 6, base = (sib & 7) + extend_base;
      if (index != 4) i.stride = general_register(context, index) << (sib >> 6);
    }
    int64_t displacement = 0;
    const bool no_base = mod == 0 && (base & 7) == 5;  // relative to what follows, or absolute
    if (mod == 1) {
      displacement = static_cast<int8_t>(code[i.length]), i.length += 1;
    } else if (mod == 2 || no_base) {
      int32_t wide;
      memcpy(&wide, code + i.length, sizeof wide);
      displacement = wide, i.length += 4;
    }
    const int64_t start = !no_base ? general_register(context, base) : rm == 4 ? 0 : address + i.length;
    i.base = reinterpret_cast<char*>(start + displacement);
  }
  *out = i;
  return true;
}

bool configure(const char* memory) {
  if (memory[0] != 1 || memory[1] != 0) return false;
  for (int t = 0; t < kTiles; ++t) {
    uint16_t bytes;
    memcpy(&bytes, memory + 16 + 2 * t, sizeof bytes);
    const int rows = static_cast<uint8_t>(memory[48 + t]);
    if (bytes % 4 || bytes > 64 || rows > kRows) return false;
    tiles.rows[t] = rows, tiles.words[t] = bytes / 4;
  }
  memset(tiles.values, 0, sizeof tiles.values);
  return tiles.configured = true;
}

bool usable(int t) { return tiles.configured && t < kTiles && tiles.rows[t] > 0 && tiles.words[t] > 0; }

void load(int t, const char* base, int64_t stride) {
  memset(tiles.values[t], 0, sizeof tiles.values[t]);
  for (int m = 0; m < tiles.rows[t]; ++m) memcpy(tiles.values[t][m], base + m * stride, tiles.words[t] * 4);
}

void store(int t, char* base, int64_t stride) {
  for (int m = 0; m < tiles.rows[t]; ++m) memcpy(base + m * stride, tiles.values[t][m], tiles.words[t] * 4);
}

bool multiply(int c, int a, int b) {
  ++fastbert_amx_emulator;
  if (c == a || c == b || a == b || tiles.rows[c] != tiles.rows[a] || tiles.words[c] != tiles.words[b] ||
      tiles.words[a] != tiles.rows[b])
    return false;
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.words[c]; ++n) {
      float sum;
      memcpy(&sum, &tiles.values[c][m][n], sizeof sum);
      for (int k = 0; k < tiles.words[a]; ++k) {
        const uint32_t x = tiles.values[a][m][k], y = tiles.values[b][k][n];
        sum += low(x) * low(y);
        sum += high(x) * high(y);
      }
      memcpy(&tiles.values[c][m][n], &sum, sizeof sum);
    }
  return true;
}

bool emulate(const Instruction& i) {
  enum { kNone, k66, kF3, kF2 };
  if (i.opcode == 0x49 && i.prefix == kNone && i.reg == 0) {
    if (i.memory) return configure(i.base);
    tiles.configured = false;
    return true;
  }
  if (!usable(i.reg)) return false;
  if (i.opcode == 0x49 && i.prefix == kF2 && !i.memory) {
    memset(tiles.values[i.reg], 0, sizeof tiles.values[i.reg]);
    return true;
  }
  if (i.opcode == 0x4B && i.prefix == kF2 && i.memory) {
    load(i.reg, i.base, i.stride);
    return true;
  }
  if (i.opcode == 0x4B && i.prefix == kF3 && i.memory) {
    store(i.reg, i.base, i.stride);
    return true;
  }
  if (i.opcode == 0x5C && i.prefix == kF3 && !i.memory && usable(i.rm) && usable(i.vvvv))
    return multiply(i.reg, i.rm, i.vvvv);
  return false;
}

// The instruction that raised the signal and the tile instructions right behind it: a signal costs
// microseconds.
void on_illegal_instruction(int, siginfo_t*, void* state) {
  ucontext_t& context = *static_cast<ucontext_t*>(state);
  Instruction instruction;
  int done = 0;
  for (; decode(context, &instruction) && emulate(instruction); ++done)
    context.uc_mcontext.gregs[REG_RIP] += instruction.length;
  if (done == 0) signal(SIGILL, SIG_DFL);  // and the instruction is met again
}

__attribute__((constructor)) void install() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
