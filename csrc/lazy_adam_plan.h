// LazyAdam's steps by a plan: of many parameters, what stays as it is from one step to the next is kept here
// as the structs that the kernels take, and a step brings what changes. For both modules, the CPU's and
// CUDA's.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "tensors.h"

namespace fastbert {

template <typename Fields>
Fields from_tuple(const char* name, PyObject* tuple) {
  if (!PyTuple_Check(tuple)) throw pybind11::type_error(std::string(name) + " must be a tuple of numbers");
  return from_numbers<Fields>(name, PySequence_Fast_ITEMS(tuple), PyTuple_GET_SIZE(tuple));
}

// Each step is a tuple of the fields of LazyAdamStep.
inline std::vector<LazyAdamStep> lazy_adam_steps_of(const std::vector<pybind11::tuple>& tuples) {
  std::vector<LazyAdamStep> steps;
  for (const pybind11::tuple& tuple : tuples)
    steps.push_back(from_tuple<LazyAdamStep>("lazy_adam_steps", tuple.ptr()));
  return steps;
}

struct LazyAdamGradient {  // what a step brings for a parameter whose gradient comes with ids
  const void* grad;
  const int64_t* rows;
  int64_t touched;
  int32_t* scratch;
};

struct LazyAdamFormula {  // and for the parameters of a group, which stand one after the other
  int64_t parameters;
  const double* lr;
  double beta1, beta2, eps, weight_decay;
  const float *grad_factor, *found_inf;
};

class __attribute__((visibility("hidden"))) LazyAdamPlan {  // as what it has of pybind11 is
 public:
  // `table` is DLPack's; `names` are those that state has its tensors under.
  LazyAdamPlan(const pybind11::capsule& table, pybind11::tuple names)
      : tensors_(table), names_(std::move(names)) {}

  // Plans the parameter at `place` by the fields of its LazyAdamStep, and keeps how its tensors are. `kind`
  // tells gradients apart that take different flags: 0 for every row, 1 with ids and by row, 2 with a row for
  // each id.
  void set(size_t place, const pybind11::tuple& fields, const pybind11::object& param,
           const pybind11::dict& state, const pybind11::object& grad, int64_t kind) {
    Planned planned{from_tuple<LazyAdamStep>("LazyAdamPlan.set", fields.ptr()), kind, {}, {}};
    planned.tensors.emplace_back(nullptr, layout(param.ptr()));
    for (const pybind11::handle& name : names_)
      if (PyObject* tensor = PyDict_GetItem(state.ptr(), name.ptr()))
        planned.tensors.emplace_back(name.ptr(), layout(tensor));
    planned.grad = layout(grad.ptr());
    if (place >= planned_.size()) planned_.resize(place + 1);
    planned_[place] = std::move(planned);
  }

  // For which of `seen` the plans hold; five items each: place, param, state, grad and kind. None: the plan
  // is of other tensors. True: the address of grad has been put into `gradients`. False: it is yet to be
  // brought, by ids, or as it cannot be read where it is. The tensors that their steps change are appended to
  // `changed`.
  pybind11::list look(const pybind11::list& seen, pybind11::list& gradients, pybind11::list& changed) const {
    pybind11::list found;
    for (size_t i = 0; i + 5 <= seen.size(); i += 5) {
      PyObject** item = reinterpret_cast<PyListObject*>(seen.ptr())->ob_item + i;
      const auto place = static_cast<size_t>(PyLong_AsSsize_t(item[0]));
      DLTensor grad;
      if (place >= planned_.size() || !holds(planned_[place], item, &grad)) {
        found.append(pybind11::none());
        continue;
      }
      changed.append(pybind11::handle(item[1]));
      for (const auto& [name, unused] : planned_[place].tensors)
        if (name) changed.append(pybind11::handle(PyDict_GetItem(item[2], name)));
      const bool is_readable = planned_[place].kind == 0 && is_contiguous(grad) && !is_negated(item[3]);
      if (is_readable)
        gradients[place] = pybind11::reinterpret_steal<pybind11::object>(PyLong_FromVoidPtr(grad.data));
      found.append(pybind11::bool_(is_readable));
    }
    return found;
  }

  // The next steps of those parameters that have a gradient. `gradients` holds one item for each parameter:
  // None, the address of a gradient for every row, or the fields of LazyAdamGradient. `formulas` holds those
  // of LazyAdamFormula for each group.
  std::vector<LazyAdamStep> next(const pybind11::list& gradients, const pybind11::list& formulas) const {
    std::vector<LazyAdamStep> steps;
    size_t end = 0, place = 0;
    for (const pybind11::handle& item : formulas) {
      const LazyAdamFormula formula = from_tuple<LazyAdamFormula>("a LazyAdamFormula", item.ptr());
      for (end += formula.parameters; place < end; ++place) {
        if (place >= gradients.size())
          throw std::invalid_argument("there are fewer gradients than parameters");
        PyObject* gradient = PyList_GET_ITEM(gradients.ptr(), place);
        if (gradient == Py_None) continue;
        if (place >= planned_.size()) throw std::invalid_argument("a parameter steps that was never planned");
        LazyAdamStep step = planned_[place].step;
        if (PyTuple_Check(gradient)) {
          const LazyAdamGradient its = from_tuple<LazyAdamGradient>("a LazyAdamGradient", gradient);
          step.grad = its.grad, step.rows = its.rows, step.touched = its.touched, step.scratch = its.scratch;
        } else {
          step.grad = Number{gradient};
          if (PyErr_Occurred()) throw pybind11::error_already_set();
        }
        step.lr = formula.lr, step.weight_decay = formula.weight_decay;
        step.beta1 = formula.beta1, step.beta2 = formula.beta2, step.eps = formula.eps;
        step.grad_factor = formula.grad_factor, step.found_inf = formula.found_inf;
        steps.push_back(step);
      }
    }
    return steps;
  }

  template <typename Step>  // the module's function that takes gradients, formulas and the launch argument
  static void define(pybind11::module_& m, Step step) {
    pybind11::class_<LazyAdamPlan>(m, "LazyAdamPlan", pybind11::module_local())
        .def(pybind11::init<const pybind11::capsule&, pybind11::tuple>())
        .def("set", &LazyAdamPlan::set, "Plans the parameter at a place by the fields of its LazyAdamStep.")
        .def("look", &LazyAdamPlan::look, "Whether plans hold for the tensors that there are now.")
        .def("step", step,
             "Takes gradients, formulas and the launch argument; -1, or which step names a row outside.");
  }

 private:
  struct Planned {
    LazyAdamStep step;
    int64_t kind;
    std::vector<std::pair<PyObject*, Layout>> tensors;  // param, and state by name
    std::optional<Layout> grad;                         // none where nothing is planned
  };

  Layout layout(PyObject* tensor) const {
    DLTensor x;
    if (!tensors_.read(tensor, &x)) throw pybind11::type_error("a plan is made of tensors");
    return Layout(x);
  }

  bool holds(const Planned& planned, PyObject* const* item, DLTensor* grad) const {
    if (!planned.grad || PyLong_AsLongLong(item[4]) != planned.kind) return false;
    for (const auto& [name, layout] : planned.tensors) {
      PyObject* tensor = name ? PyDict_GetItem(item[2], name) : item[1];
      DLTensor x;
      if (!tensor || !tensors_.read(tensor, &x) || !layout.is(x)) return false;
    }
    return tensors_.read(item[3], grad) && planned.grad->is_like(*grad, planned.kind == 2);
  }

  // Whether torch is yet to change the signs of what lies in memory.
  static bool is_negated(PyObject* tensor) {
    static PyObject* name = PyUnicode_InternFromString("is_neg");
    const auto answer =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() == Py_True;
  }

  Tensors tensors_;
  pybind11::tuple names_;
  std::vector<Planned> planned_;
};

}  // namespace fastbert
