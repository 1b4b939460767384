// Many tensors in one launch: their addresses and sizes travel as the kernel's argument, and each block finds
// out which tensor its chunk belongs to. So nothing is copied to the device, nothing waits, and a captured
// graph keeps what it was captured with.
//
// A kernel takes 32,764 bytes of arguments on every GPU since CUDA 12.1.
#pragma once
#include "launch.h"

namespace fastbert::cuda {

constexpr int kArgumentBytes = 32764;
constexpr int kFewTensors = 8;  // lists of so many are a kernel's argument of their own, quicker to pass

// Entries have a field `first_chunk`, ascending. `Rest` is what the kernel takes besides.
template <class Entry, class Rest>
constexpr int kMostTensors =
    (kArgumentBytes - static_cast<int>(sizeof(Rest)) - 16) / static_cast<int>(sizeof(Entry));

template <class Entry, class Rest, int kMost>
struct TensorList {
  Entry tensors[kMost];
  Rest rest;
  int count;
  uint32_t chunks;  // of all tensors
};

// The entry whose chunks contain `chunk`.
template <class List>
DEVICE int tensor_of(const List& list, uint32_t chunk) {
  int first = 0, last = list.count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (list.tensors[middle].first_chunk <= chunk)
      first = middle;
    else
      last = middle - 1;
  }
  return first;
}

// The first entries of `list` as an argument of fewer bytes.
template <int kFew, class Entry, class Rest, int kMost>
TensorList<Entry, Rest, kFew> shortened(const TensorList<Entry, Rest, kMost>& list) {
  TensorList<Entry, Rest, kFew> few;
  for (int i = 0; i < list.count; ++i) few.tensors[i] = list.tensors[i];
  few.rest = list.rest, few.count = list.count, few.chunks = list.chunks;
  return few;
}

}  // namespace fastbert::cuda
