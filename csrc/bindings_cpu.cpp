// The module fastbert._cpu: addresses and sizes in, the kernels of one instruction set behind.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

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

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void gelu_forward(uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int64_t columns, int dtype,
                  int bias_dtype, bool tanh_form, int threads) {
  Gelu a{};
  a.x = at<void>(x), a.bias = at<void>(bias), a.out = at<void>(y);
  a.rows = rows, a.columns = columns;
  a.dtype = DType(dtype), a.bias_dtype = DType(bias_dtype), a.tanh_form = tanh_form, a.threads = threads;
  selected->kernels->gelu_forward(a);
}

void gelu_backward(uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t dx, uintptr_t dbias,
                   uintptr_t scratch, int64_t rows, int64_t columns, int dtype, int bias_dtype,
                   bool tanh_form, int threads) {
  Gelu a{};
  a.dy = at<void>(dy), a.x = at<void>(x), a.bias = at<void>(bias), a.out = at<void>(dx),
  a.dbias = at<void>(dbias);
  a.scratch = at<float>(scratch);
  a.rows = rows, a.columns = columns;
  a.dtype = DType(dtype), a.bias_dtype = DType(bias_dtype), a.tanh_form = tanh_form, a.threads = threads;
  selected->kernels->gelu_backward(a);
}

void layer_norm_forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y,
                        uintptr_t z, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t columns,
                        double eps, uint32_t drop_below, uint64_t seed, int dtype, int weight_dtype,
                        int threads) {
  LayerNorm a{};
  a.x = at<void>(x), a.residual = at<void>(residual), a.weight = at<void>(weight), a.bias = at<void>(bias);
  a.y = at<void>(y), a.z = at<void>(z), a.mean = at<float>(mean), a.rstd = at<float>(rstd);
  a.rows = rows, a.columns = columns, a.eps = static_cast<float>(eps), a.drop_below = drop_below,
  a.seed = seed;
  a.dtype = DType(dtype), a.weight_dtype = DType(weight_dtype), a.threads = threads;
  selected->kernels->layer_norm_forward(a);
}

void layer_norm_backward(uintptr_t dy, uintptr_t z, uintptr_t weight, uintptr_t mean, uintptr_t rstd,
                         uintptr_t dz, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t scratch,
                         int64_t rows, int64_t columns, uint32_t drop_below, uint64_t seed, int dtype,
                         int weight_dtype, int threads) {
  LayerNorm a{};
  a.dy = at<void>(dy), a.x = at<void>(z), a.weight = at<void>(weight), a.mean = at<float>(mean);
  a.rstd = at<float>(rstd), a.y = at<void>(dz), a.z = at<void>(dx), a.dweight = at<void>(dweight);
  a.dbias = at<void>(dbias), a.scratch = at<float>(scratch);
  a.rows = rows, a.columns = columns, a.drop_below = drop_below, a.seed = seed;
  a.dtype = DType(dtype), a.weight_dtype = DType(weight_dtype), a.threads = threads;
  selected->kernels->layer_norm_backward(a);
}

void cross_entropy_forward(uintptr_t logits, uintptr_t labels, uintptr_t losses, uintptr_t maximum,
                           uintptr_t sum, int64_t rows, int64_t columns, int64_t ignore_index, int dtype,
                           int threads) {
  CrossEntropy a{};
  a.logits = at<void>(logits), a.labels = at<const int64_t>(labels), a.losses = at<float>(losses);
  a.maximum = at<float>(maximum), a.sum = at<float>(sum);
  a.rows = rows, a.columns = columns, a.ignore_index = ignore_index;
  a.dtype = DType(dtype), a.threads = threads;
  selected->kernels->cross_entropy_forward(a);
}

void cross_entropy_backward(uintptr_t dlosses, uintptr_t logits, uintptr_t labels, uintptr_t maximum,
                            uintptr_t sum, uintptr_t dlogits, int64_t rows, int64_t columns,
                            int64_t ignore_index, int dtype, int threads) {
  CrossEntropy a{};
  a.dlosses = at<const float>(dlosses), a.logits = at<void>(logits), a.labels = at<const int64_t>(labels);
  a.maximum = at<float>(maximum), a.sum = at<float>(sum), a.dlogits = at<void>(dlogits);
  a.rows = rows, a.columns = columns, a.ignore_index = ignore_index;
  a.dtype = DType(dtype), a.threads = threads;
  selected->kernels->cross_entropy_backward(a);
}

Attention attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t lse, uintptr_t cu_seqlens,
                    int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t tokens, int64_t sequences,
                    int64_t heads, int64_t head_dim, int64_t window_left, int64_t window_right, double scale,
                    uint32_t drop_below, uint64_t seed, int dtype, int threads) {
  Attention a{};
  a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.lse = at<float>(lse);
  a.cu_seqlens = at<const int32_t>(cu_seqlens), a.q_stride = q_stride, a.k_stride = k_stride,
  a.v_stride = v_stride;
  a.tokens = tokens, a.sequences = sequences, a.heads = heads, a.head_dim = head_dim;
  a.window_left = window_left, a.window_right = window_right, a.scale = static_cast<float>(scale);
  a.drop_below = drop_below, a.seed = seed, a.dtype = DType(dtype), a.threads = threads;
  return a;
}

void linear_product(uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t c, int64_t a_row, int64_t a_column,
                    int64_t b_row, int64_t b_column, int64_t rows, int64_t columns, int64_t depth,
                    int a_dtype, int b_dtype, int c_dtype, int bias_dtype, bool packed, int threads) {
  selected->kernels->linear_product({at<void>(a), at<void>(b), at<void>(bias), at<void>(c), a_row, a_column,
                                     b_row, b_column, rows, columns, depth, DType(a_dtype), DType(b_dtype),
                                     DType(c_dtype), DType(bias_dtype), packed, threads});
}

void linear_pack(uintptr_t b, uintptr_t packed, int64_t b_row, int64_t b_column, int64_t columns,
                 int64_t depth, int b_dtype, int threads) {
  LinearProduct p{};
  p.b = at<void>(b), p.c = at<void>(packed), p.b_row = b_row, p.b_column = b_column, p.columns = columns,
  p.depth = depth;
  p.b_dtype = DType(b_dtype), p.threads = threads;
  selected->kernels->linear_pack(p);
}

void transpose(uintptr_t source, uintptr_t target, int64_t rows, int64_t columns, int64_t row, int threads) {
  selected->kernels->transpose(
      {at<const uint32_t>(source), at<uint32_t>(target), rows, columns, row, threads});
}

void attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
                       uintptr_t cu_seqlens, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                       int64_t tokens, int64_t sequences, int64_t heads, int64_t head_dim,
                       int64_t window_left, int64_t window_right, double scale, uint32_t drop_below,
                       uint64_t seed, int dtype, int threads) {
  Attention a = attention(q, k, v, lse, cu_seqlens, q_stride, k_stride, v_stride, tokens, sequences, heads,
                          head_dim, window_left, window_right, scale, drop_below, seed, dtype, threads);
  a.result = at<void>(out);
  selected->kernels->attention_forward(a);
}

void attention_backward(uintptr_t dout, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
                        uintptr_t dqkv, uintptr_t cu_seqlens, int64_t q_stride, int64_t k_stride,
                        int64_t v_stride, int64_t tokens, int64_t sequences, int64_t heads, int64_t head_dim,
                        int64_t window_left, int64_t window_right, double scale, uint32_t drop_below,
                        uint64_t seed, int dtype, int threads) {
  Attention a = attention(q, k, v, lse, cu_seqlens, q_stride, k_stride, v_stride, tokens, sequences, heads,
                          head_dim, window_left, window_right, scale, drop_below, seed, dtype, threads);
  a.dout = at<void>(dout), a.out = at<void>(out), a.dqkv = at<void>(dqkv);
  selected->kernels->attention_backward(a);
}

// Each step is a tuple in the order of this function.
LazyAdam lazy_adam_step(const py::tuple& step) {
  size_t i = 0;
  const auto address = [&] { return step[i++].cast<uintptr_t>(); };
  const auto integer = [&] { return step[i++].cast<int64_t>(); };
  const auto real = [&] { return step[i++].cast<double>(); };
  LazyAdam a{};
  a.param = at<void>(address()), a.exp_avg = at<void>(address()), a.exp_avg_sq = at<float>(address());
  a.max_exp_avg_sq = at<float>(address()), a.row_steps = at<int32_t>(address());
  a.rows = at<const int64_t>(address()), a.grad = at<void>(address()), a.scratch = at<int32_t>(address());
  a.table_rows = integer(), a.touched = integer(), a.columns = integer();
  a.dtype = DType(integer()), a.exp_avg_dtype = DType(integer()), a.grad_dtype = DType(integer());
  a.row_wise = integer(), a.stochastic = integer(), a.seed = address(), a.number = integer();
  a.padding_idx = integer();
  a.lr = real(), a.step = real(), a.beta1 = real(), a.beta2 = real(), a.eps = real();
  a.weight_decay = real(), a.flags = integer();
  return a;
}

int64_t lazy_adam_steps(const std::vector<py::tuple>& tuples, int threads) {
  std::vector<LazyAdam> steps;
  for (const py::tuple& tuple : tuples) steps.push_back(lazy_adam_step(tuple));
  py::gil_scoped_release no_gil;
  return selected->kernels->lazy_adam_steps(steps.data(), steps.size(), threads);
}

int64_t lazy_adam_replay(uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t last_step,
                         uintptr_t rows, uintptr_t lr, uintptr_t decay, uintptr_t scratch, int64_t table_rows,
                         int64_t named, int64_t columns, int64_t steps, int64_t step, int64_t padding_idx,
                         double beta1, double beta2, double eps, int64_t flags, int threads) {
  LazyAdamReplay a{};
  a.param = at<float>(param), a.exp_avg = at<float>(exp_avg), a.exp_avg_sq = at<float>(exp_avg_sq);
  a.last_step = at<int32_t>(last_step), a.rows = at<const int64_t>(rows);
  a.lr = at<const double>(lr), a.decay = at<const double>(decay), a.scratch = at<double>(scratch);
  a.table_rows = table_rows, a.named = named, a.columns = columns, a.steps = steps, a.step = step;
  a.padding_idx = padding_idx, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.flags = flags;
  a.threads = threads;
  return selected->kernels->lazy_adam_replay(a);
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
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.doc() = "fastbert's kernels for the CPU; called through fastbert.native";
  m.def("instruction_sets", instruction_sets, "Compiled in and able to run on this machine, worst first.");
  m.def("selected", [] { return std::string(selected->name); }, "The instruction set in use.");
  m.def("use", use, "Use this instruction set from now on; ValueError where it cannot run.");
  m.def("reduction_chunks", reduction_chunks, "Rows of scratch that column sums over so many rows need.");
  m.def("lazy_adam_scratch", lazy_adam_scratch, "Numbers of int32 scratch for so many gradient rows.");
  m.def("philox", philox, "Four words of one counter, through the vectors that dropout uses.");
  m.def("gelu_forward", gelu_forward, no_gil);
  m.def("gelu_backward", gelu_backward, no_gil);
  m.def("layer_norm_forward", layer_norm_forward, no_gil);
  m.def("layer_norm_backward", layer_norm_backward, no_gil);
  m.def("cross_entropy_forward", cross_entropy_forward, no_gil);
  m.def("cross_entropy_backward", cross_entropy_backward, no_gil);
  m.def("attention_forward", attention_forward, no_gil);
  m.def("attention_backward", attention_backward, no_gil);
  m.def("linear_product", linear_product, no_gil);
  m.def("linear_pack", linear_pack, no_gil);
  m.def(
      "linear_packed",
      [](int64_t depth, int64_t columns) { return selected->kernels->linear_packed(depth, columns); },
      "Words of a packed right operand of linear_product.");
  m.def("transpose", transpose, no_gil);
  m.def("lazy_adam_steps", lazy_adam_steps);
  m.def("lazy_adam_replay_scratch", lazy_adam_replay_scratch,
        "Doubles of scratch for so many recorded steps.");
  m.def("lazy_adam_replay", lazy_adam_replay, no_gil);
}
