// LazyAdam's steps by a plan: of many parameters, what stays as it is from one step to the next is kept here as
// the structs that the kernels take, and a step brings what changes. For both modules, the CPU's and CUDA's.
#pragma once
#include <vector>

#include "bindings.h"

namespace fastbert {

struct LazyAdamGradient {  // what a step brings for a parameter whose gradient is of rows
  const void* grad;
  const int64_t* rows;
  int64_t touched;
  int32_t* scratch;
};

struct LazyAdamFormula {  // and for the parameters of a group, which stand one after the other
  int64_t parameters;
  const double* lr;
  double beta1, beta2, eps, weight_decay;
};

class LazyAdamPlan {
 public:
  // Plans the parameter at `place` by the fields of its LazyAdamStep.
  void set(size_t place, const pybind11::tuple& fields) {
    const LazyAdamStep step = read<LazyAdamStep>("LazyAdamPlan.set", fields.ptr());
    if (place >= planned_.size()) planned_.resize(place + 1);
    planned_[place] = step;
  }

  // The next steps of those parameters that have a gradient. `gradients` holds one item for each parameter: None,
  // the address of a gradient by row, or the fields of LazyAdamGradient. `formulas` holds those of
  // LazyAdamFormula for each group.
  std::vector<LazyAdamStep> next(const pybind11::list& gradients, const pybind11::list& formulas) const {
    std::vector<LazyAdamStep> steps;
    size_t end = 0, place = 0;
    for (const pybind11::handle& item : formulas) {
      const LazyAdamFormula formula = read<LazyAdamFormula>("a LazyAdamFormula", item.ptr());
      for (end += formula.parameters; place < end; ++place) {
        if (place >= gradients.size()) throw std::invalid_argument("there are fewer gradients than parameters");
        PyObject* gradient = PyList_GET_ITEM(gradients.ptr(), place);
        if (gradient == Py_None) continue;
        if (place >= planned_.size()) throw std::invalid_argument("a parameter steps that was never planned");
        LazyAdamStep step = planned_[place];
        if (PyTuple_Check(gradient)) {
          const LazyAdamGradient its = read<LazyAdamGradient>("a LazyAdamGradient", gradient);
          step.grad = its.grad, step.rows = its.rows, step.touched = its.touched, step.scratch = its.scratch;
        } else {
          step.grad = Number{gradient};
          if (PyErr_Occurred()) throw pybind11::error_already_set();
        }
        step.lr = formula.lr, step.weight_decay = formula.weight_decay;
        step.beta1 = formula.beta1, step.beta2 = formula.beta2, step.eps = formula.eps;
        steps.push_back(step);
      }
    }
    return steps;
  }

 private:
  template <typename Fields>
  static Fields read(const char* name, PyObject* tuple) {
    if (!PyTuple_Check(tuple)) throw pybind11::type_error(std::string(name) + " must be a tuple of numbers");
    return from_numbers<Fields>(name, PySequence_Fast_ITEMS(tuple), PyTuple_GET_SIZE(tuple));
  }

  std::vector<LazyAdamStep> planned_;
};

}  // namespace fastbert
