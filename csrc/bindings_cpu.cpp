// The module fastbert._cpu: addresses and sizes in, the kernels of one instruction set behind.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "lazy_adam_plan.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(FASTBERT_EMULATE)  // these in AVX2's instructions, see tests/avx512_emulator.h
#undef FASTBERT_FOR_EACH_ISA
#define FASTBERT_FOR_EACH_ISA(X) X(avx512) X(avx512_bf16)
#endif

namespace py = pybind11;

namespace fastbert {

#define FASTBERT_DECLARE(isa)   \
  namespace isa {               \
  extern const Kernels kernels; \
  }
FASTBERT_FOR_EACH_ISA(FASTBERT_DECLARE)

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// Worst first.
const InstructionSet kCompiled[] = {
#define FASTBERT_ENTRY(isa) {#isa, &isa::kernels},
    FASTBERT_FOR_EACH_ISA(FASTBERT_ENTRY)};

#if defined(__x86_64__)
// Linux grants a process AMX's registers on request, and refuses where it does not know them (before 5.16).
// tests/amx_emulator.cpp, loaded before Python, stands in for a processor that has them.
bool amx_bf16() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (dlsym(RTLD_DEFAULT, "fastbert_amx_emulator")) return true;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // clang 14 does not know it by name
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c &&
                    __builtin_cpu_supports("bmi2");
#if defined(FASTBERT_EMULATE)
  return avx2;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512_bf16") return avx512_bf16;
  if (name == "amx_bf16") return avx512_bf16 && amx_bf16();
#endif
  return name == "sse2" || name == "baseline";
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kCompiled)
    if (runs_here(set.name)) names.emplace_back(set.name);
  return names;
}

const InstructionSet* find(const std::string& name) {
  for (const InstructionSet& set : kCompiled)
    if (name == set.name && runs_here(name)) return &set;
  return nullptr;
}

// The kernels for AMX have run on an emulator alone so far: they are there for whoever asks for them by name.
const InstructionSet* best() {
  std::vector<std::string> names = instruction_sets();
  if (names.back() == "amx_bf16") names.pop_back();
  return find(names.back());
}

const InstructionSet* selected = best();

void use(const std::string& name) {
  const InstructionSet* set = find(name);
  if (!set) {
    std::string known;
    for (const std::string& each : instruction_sets()) known += (known.empty() ? "" : ", ") + each;
    bool compiled = false;
    for (const InstructionSet& each : kCompiled) compiled |= name == each.name;
    throw std::invalid_argument((compiled ? "this processor lacks the instruction set '"
                                          : "there are no kernels for an instruction set '") +
                                name + "': expected one of " + known);
  }
  selected = set;
}

#define FASTBERT_RUN(Result, name, Arguments) \
  Result name(const Arguments& arguments) { return selected->kernels->name(arguments); }
FASTBERT_FOR_EACH_KERNEL(FASTBERT_RUN)
#undef FASTBERT_RUN

int64_t lazy_adam_steps(const std::vector<py::tuple>& tuples, int64_t launch) {
  const std::vector<LazyAdamStep> steps = lazy_adam_steps_of(tuples);
  py::gil_scoped_release no_gil;
  return selected->kernels->lazy_adam_steps(steps.data(), static_cast<int64_t>(steps.size()), launch);
}

// The planned parameters' next step, counted: the kernels read the number of the step that they are taking,
// and state has it once they have taken it. Where found_inf is set, nobody counts.
int64_t step_by_plan(const LazyAdamPlan& plan, const py::list& gradients, const py::list& formulas,
                     int64_t launch) {
  const std::vector<LazyAdamStep> steps = plan.next(gradients, formulas);
  std::vector<LazyAdamStep> running;
  py::gil_scoped_release no_gil;
  std::vector<float> numbers(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool counts = !steps[i].found_inf || *steps[i].found_inf == 0.f;
    numbers[i] = *steps[i].step + static_cast<float>(counts);
    if (!is_empty(steps[i])) running.push_back(steps[i]), running.back().step = &numbers[i];
  }
  const auto count = static_cast<int64_t>(running.size());
  const int64_t bad = selected->kernels->lazy_adam_steps(running.data(), count, launch);
  for (size_t i = 0; i < steps.size() && bad < 0; ++i) *const_cast<float*>(steps[i].step) = numbers[i];
  return bad;
}

std::array<uint32_t, 4> philox(uint64_t seed, std::array<uint32_t, 4> counter) {
  std::array<uint32_t, 4> words;
  selected->kernels->philox(seed, counter.data(), words.data());
  return words;
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_cpu, m) {
  using namespace fastbert;
  m.doc() = "fastbert's kernels for the CPU; called through fastbert.backends";
  m.def("instruction_sets", instruction_sets, "Compiled in and able to run on this machine, worst first.");
  m.def("selected", [] { return std::string(selected->name); }, "The instruction set in use.");
  m.def("use", use, "Use this instruction set from now on; ValueError where it cannot run.");
  m.def(
      "gelu_scratch", [](int64_t rows, int64_t columns) { return reduction_chunks(rows) * columns; },
      "Floats of scratch that gelu_backward needs.");
  m.def(
      "layer_norm_scratch",
      [](int64_t rows, int64_t columns, bool with_x_bias) {
        return (with_x_bias ? 3 : 2) * reduction_chunks(rows) * columns;
      },
      "Floats of scratch that layer_norm_backward needs.");
  m.def(
      "attention_scratch", [](int64_t, int64_t, int64_t) { return 0; },
      "Floats of scratch that attention_backward needs.");
  m.def(
      "hard_attention_scratch", [](int64_t, int64_t) { return 0; },
      "Floats of scratch that hard_attention_backward needs.");
  m.def(
      "attention_distillation_scratch", [](int64_t tokens, int64_t heads) { return tokens * heads; },
      "Floats of scratch that attention_distillation needs.");
  m.def(
      "lazy_adam_scratch", [](int64_t touched, int64_t) { return lazy_adam_scratch(touched); },
      "Numbers of int32 scratch for so many gradient rows and columns.");
  m.def("philox", philox, "Four words of one counter, through the vectors that dropout uses.");
#define FASTBERT_DEFINE(Result, name, Arguments) define<fastbert::name>(m, #name);
  FASTBERT_FOR_EACH_KERNEL(FASTBERT_DEFINE)
#undef FASTBERT_DEFINE
  m.def(
      "linear_packed",
      [](int64_t depth, int64_t columns) { return selected->kernels->linear_packed(depth, columns); },
      "Words of a packed right operand of linear_product.");
  m.def("lazy_adam_steps", lazy_adam_steps);
  LazyAdamPlan::define(m, step_by_plan);
  m.def("lazy_adam_replay_scratch", lazy_adam_replay_scratch,
        "Doubles of scratch for so many recorded steps.");
}
