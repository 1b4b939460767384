// What a tensor of Python is, read through DLPack's table of C functions, which every framework that has one
// hands out under one name: all of it in a twentieth of a microsecond, where asking for one attribute takes a
// tenth. Only the part of that standard's binary interface that is used here is declared
// (https://dmlc.github.io/dlpack).
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fastbert {

struct DLDevice {
  int32_t type, id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocate, *to_managed, *from_managed;
  int (*to_tensor)(void* object, DLTensor* out);  // 0, or a Python error is set
  void* current_stream;
};

inline bool operator==(const DLDevice& a, const DLDevice& b) { return a.type == b.type && a.id == b.id; }
inline bool operator==(const DLDataType& a, const DLDataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline bool is_contiguous(const DLTensor& x) {
  int64_t stride = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[i] == 0) return true;
    if (x.shape[i] != 1 && x.strides[i] != stride) return false;
    stride *= x.shape[i];
  }
  return true;
}

class Tensors {
 public:
  explicit Tensors(const pybind11::capsule& table)
      : table_(
            static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"))) {
    if (!table_) throw pybind11::error_already_set();
    if (table_->major != 1 || !table_->to_tensor)
      throw std::invalid_argument("DLPack's table of C functions must be of version 1 and have them all");
  }

  // False where the object is no tensor that lies in memory.
  bool read(PyObject* object, DLTensor* x) const {
    if (table_->to_tensor(object, x) == 0) {
      x->data = static_cast<char*>(x->data) + x->byte_offset;
      return true;
    }
    PyErr_Clear();
    return false;
  }

 private:
  const DLPackExchangeAPI* table_;
};

// A tensor as it was: what of it must be the same for what was made of it to hold.
class Layout {
 public:
  explicit Layout(const DLTensor& x)
      : data_(x.data),
        device_(x.device),
        dtype_(x.dtype),
        shape_(x.shape, x.shape + x.ndim),
        strides_(x.strides, x.strides + x.ndim) {}

  // Device, dtype and the axes from `first` on.
  bool is_like(const DLTensor& x, size_t first) const {
    if (!(x.device == device_) || !(x.dtype == dtype_) || static_cast<size_t>(x.ndim) != shape_.size())
      return false;
    for (size_t i = first; i < shape_.size(); ++i)
      if (x.shape[i] != shape_[i]) return false;
    return true;
  }

  bool is(const DLTensor& x) const {
    if (x.data != data_ || !is_like(x, 0)) return false;
    for (size_t i = 0; i < strides_.size(); ++i)
      if (x.strides[i] != strides_[i]) return false;
    return true;
  }

 private:
  void* data_;
  DLDevice device_;
  DLDataType dtype_;
  std::vector<int64_t> shape_, strides_;
};

}  // namespace fastbert
