// The module fastbert._cuda: addresses, sizes and a stream in, the kernels of csrc/cuda behind. A host
// compiler reads it; it includes nothing of CUDA, so importing the module needs neither a GPU nor a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"
#include "lazy_adam_plan.h"

namespace py = pybind11;

namespace fastbert {
namespace {

// ---- what kernels have found in earlier calls -------------------------------------------------------

struct Found {
  const char *what, *consequence;  // the place stands between them
};
const Found kFound[cuda::kFaults] = {
    {"cross_entropy was given a label that is neither in [0, V) nor ignore_index, in row ",
     ": loss and gradient of that row are NaN"},
    {"attention was given cu_seqlens that decrease, do not go from 0 to the number of tokens, or make a "
     "sequence longer than max_seqlen, at sequence ",
     ": its results are undefined"},
    {"lazy_adam was given a row id outside its table, at place ", " of rows: that step changed nothing"},
    {"lazy_adam_replay was given a row that stands before the recorded steps, at place ",
     " of rows: it brought none"},
    {"embedding_norm was given an id outside its table, for token ", ": the result of that token is NaN"},
};

// Throws what kernels have reported since it was last called, and forgets it. It waits for no kernel.
void check_faults() {
  volatile int32_t* words = cuda::fault_words();
  if (!words) return;
  std::string text;
  for (int fault = 0; fault < cuda::kFaults; ++fault) {
    if (words[fault] == 0) continue;
    const int place = words[fault] - 1;
    text +=
        (text.empty() ? "" : "; ") + (kFound[fault].what + std::to_string(place)) + kFound[fault].consequence;
    words[fault] = 0;
  }
  if (!text.empty()) throw std::invalid_argument("found by a GPU in an earlier call: " + text);
}

// ---- calls ------------------------------------------------------------------------------------------

// Calls a launcher. -1, as of the CPU's functions that look at ids: of this call nothing wrong is known yet.
template <typename Start>
int64_t checked(const Start& start) {
  check_faults();
  if (start() != 0) throw std::runtime_error(launch_error());
  return -1;
}

template <auto run>
struct Launcher;
template <typename Arguments, int (*run)(const Arguments&)>
struct Launcher<run> {
  static int64_t call(const Arguments& arguments) {
    return checked([&] { return run(arguments); });
  }
};

template <auto run>
void define_launcher(py::module_& m, const char* name) {
  define<Launcher<run>::call>(m, name);
}

// ---- lazy_adam --------------------------------------------------------------------------------------

int64_t lazy_adam_steps(const std::vector<py::tuple>& tuples, int64_t launch) {
  const std::vector<LazyAdamStep> steps = lazy_adam_steps_of(tuples);
  py::gil_scoped_release no_gil;
  return checked(
      [&] { return cuda::lazy_adam_steps(steps.data(), static_cast<int64_t>(steps.size()), launch); });
}

int64_t step_by_plan(const LazyAdamPlan& plan, const py::list& gradients, const py::list& formulas,
                     int64_t launch) {
  const std::vector<LazyAdamStep> steps = plan.next(gradients, formulas);
  py::gil_scoped_release no_gil;
  return checked(
      [&] { return cuda::lazy_adam_next_steps(steps.data(), static_cast<int64_t>(steps.size()), launch); });
}

// Each gradient is a tuple of the fields of cuda::Gradient.
std::vector<cuda::Gradient> gradients_of(const std::vector<py::tuple>& tuples) {
  std::vector<cuda::Gradient> gradients;
  for (const py::tuple& tuple : tuples)
    gradients.push_back(from_tuple<cuda::Gradient>("gradient_norm", tuple.ptr()));
  return gradients;
}

int64_t gradient_norm(const std::vector<py::tuple>& tuples, double max_norm, uintptr_t scratch,
                      uintptr_t norm, int64_t launch) {
  const std::vector<cuda::Gradient> gradients = gradients_of(tuples);
  py::gil_scoped_release no_gil;
  return checked([&] {
    return cuda::gradient_norm(gradients.data(), static_cast<int64_t>(gradients.size()), max_norm,
                               reinterpret_cast<double*>(scratch), reinterpret_cast<float*>(norm), launch);
  });
}

int64_t gradient_norm_scratch(const std::vector<py::tuple>& tuples) {
  const std::vector<cuda::Gradient> gradients = gradients_of(tuples);
  return cuda::gradient_norm_scratch(gradients.data(), static_cast<int64_t>(gradients.size()));
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_cuda, m) {
  using namespace fastbert;
  m.doc() = "fastbert's kernels for NVIDIA GPUs; called through fastbert.backends";
  m.def(
      "architectures", [] { return std::vector<int>{FASTBERT_CUDA_ARCHS}; },
      "Of the GPUs that it is compiled for, ascending: 90 is sm_90. Newer ones compile the last anew.");
  m.def(
      "report_faults_to", [](uintptr_t words) { cuda::report_faults_to(reinterpret_cast<int32_t*>(words)); },
      "The address of `faults` words that both host and devices can reach.");
  m.def(
      "report_faults",
      [] {
        if (cuda::report_faults() != 0) throw std::runtime_error(launch_error());
      },
      "Reports go to memory of the module's own.");
  m.def("check_faults", check_faults, "ValueError where a kernel has reported an id that it could not use.");
  m.attr("faults") = static_cast<int>(cuda::kFaults);
  m.attr("version") = cuda::cuda_version();

  // ---- gelu ----
  define_launcher<cuda::gelu_forward>(m, "gelu_forward");
  define_launcher<cuda::gelu_backward>(m, "gelu_backward");
  m.def("gelu_scratch", cuda::gelu_scratch, "Floats of scratch that gelu_backward needs.");

  // ---- layer_norm and dropout ----
  define_launcher<cuda::layer_norm_forward>(m, "layer_norm_forward");
  define_launcher<cuda::layer_norm_backward>(m, "layer_norm_backward");
  m.def("layer_norm_scratch", cuda::layer_norm_scratch, "Floats of scratch that layer_norm_backward needs.");
  define_launcher<cuda::dropout>(m, "dropout");

  // ---- embedding and embedding_norm ----
  define_launcher<cuda::embedding_backward>(m, "embedding_backward");
  define_launcher<cuda::embedding_norm_forward>(m, "embedding_norm_forward");
  define_launcher<cuda::embedding_norm_recompute>(m, "embedding_norm_recompute");

  // ---- cross_entropy ----
  define_launcher<cuda::cross_entropy_forward>(m, "cross_entropy_forward");
  define_launcher<cuda::cross_entropy_backward>(m, "cross_entropy_backward");

  // ---- attention ----
  define_launcher<cuda::attention_forward>(m, "attention_forward");
  define_launcher<cuda::attention_backward>(m, "attention_backward");
  m.def("attention_scratch", cuda::attention_scratch, "Floats of scratch that attention_backward needs.");

  // ---- hard_attention ----
  define_launcher<cuda::hard_attention_forward>(m, "hard_attention_forward");
  define_launcher<cuda::hard_attention_backward>(m, "hard_attention_backward");
  m.def("hard_attention_scratch", cuda::hard_attention_scratch,
        "Floats of scratch that hard_attention_backward needs.");

  // ---- attention_distillation ----
  define_launcher<cuda::attention_distillation>(m, "attention_distillation");
  m.def("attention_distillation_scratch", cuda::attention_distillation_scratch,
        "Floats of scratch that attention_distillation needs.");

  // ---- lazy_adam ----
  m.def("lazy_adam_steps", lazy_adam_steps);
  define_launcher<cuda::lazy_adam_replay>(m, "lazy_adam_replay");
  LazyAdamPlan::define(m, step_by_plan);
  m.def("gradient_norm", gradient_norm,
        "Takes the fields of each Gradient, max_norm, and the addresses of scratch and of norm [2].");
  m.def("gradient_norm_scratch", gradient_norm_scratch, "Doubles of scratch that gradient_norm needs.");
  m.def("lazy_adam_scratch", cuda::lazy_adam_scratch,
        "Numbers of int32 scratch for so many gradient rows and columns.");
  m.def("lazy_adam_replay_scratch", lazy_adam_replay_scratch,
        "Doubles of scratch for a catch-up over so many recorded steps.");
}
