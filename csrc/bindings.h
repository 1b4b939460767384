// From a struct of contract.h to a Python function: the arguments are the struct's own fields in their order,
// so that they are written down once. Both modules, for the CPU and for CUDA, are bound by it. Addresses come
// as integers, and 0 is null.
//
// The functions are CPython's own kind (METH_FASTCALL): twenty numbers are read in a fraction of a
// microsecond, a quarter of what a function of pybind11 takes to look at them.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "contract.h"

namespace fastbert {

// A Python number that becomes whatever type the field has. Errors are left for whoever built the struct.
struct Number {
  PyObject* object;

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    if constexpr (std::is_pointer_v<T>)
      return static_cast<T>(PyLong_AsVoidPtr(object));
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(PyFloat_AsDouble(object));
    else
      return static_cast<T>(PyLong_AsLongLong(object));
  }
};

template <typename Arguments, typename Places, typename = void>
struct TakesSoMany : std::false_type {};
template <typename Arguments, size_t... kPlaces>
struct TakesSoMany<Arguments, std::index_sequence<kPlaces...>,
                   std::void_t<decltype(Arguments{Number{(void(kPlaces), nullptr)}...})>> : std::true_type {};

// How many fields a struct has: the most numbers that it can be made of.
template <typename Arguments, size_t kCount = 0>
constexpr size_t field_count() {
  if constexpr (TakesSoMany<Arguments, std::make_index_sequence<kCount + 1>>::value)
    return field_count<Arguments, kCount + 1>();
  else
    return kCount;
}

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wmissing-braces"  // a struct with a base takes the base's fields first
#endif

template <typename Arguments, size_t... kPlaces>
Arguments from_numbers(PyObject* const* numbers, std::index_sequence<kPlaces...>) {
  return Arguments{Number{numbers[kPlaces]}...};
}

// The struct made of `count` Python numbers; throws where there are more or fewer, or one is no number.
template <typename Arguments>
Arguments from_numbers(const char* name, PyObject* const* numbers, Py_ssize_t count) {
  constexpr size_t expected = field_count<Arguments>();
  if (count != static_cast<Py_ssize_t>(expected)) {
    PyErr_Format(PyExc_TypeError, "%s takes the %zu fields of its struct in contract.h, got %zd numbers",
                 name, expected, count);
    throw pybind11::error_already_set();
  }
  const Arguments arguments = from_numbers<Arguments>(numbers, std::make_index_sequence<expected>{});
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return arguments;
}

// The Python function of `run`, a plain function of a struct. It runs without the interpreter's lock.
template <auto run>
struct Function;
template <typename Result, typename Arguments, Result (*run)(const Arguments&)>
struct Function<run> {
  static inline const char* name;
  static inline PyMethodDef definition;

  static PyObject* call(PyObject*, PyObject* const* numbers, Py_ssize_t count) {
    try {
      const Arguments arguments = from_numbers<Arguments>(name, numbers, count);
      if constexpr (std::is_void_v<Result>) {
        pybind11::gil_scoped_release no_gil;
        run(arguments);
      } else {
        int64_t result;
        {
          pybind11::gil_scoped_release no_gil;
          result = run(arguments);
        }
        return PyLong_FromLongLong(result);
      }
    } catch (pybind11::error_already_set& error) {
      error.restore();
      return nullptr;
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }
};

template <auto run>
void define(pybind11::module_& m, const char* name) {
  using Its = Function<run>;
  Its::name = name;
  Its::definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Its::call)),
                     METH_FASTCALL, nullptr};
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(
                         PyCFunction_NewEx(&Its::definition, m.ptr(), nullptr)));
}

}  // namespace fastbert
