// Neighbouring elements of float, bf16 or fp16 in accesses of up to 16 bytes, as float registers:
//
//   float v[8];
//   load<8>(x + column, v);   // bf16 or fp16: one access of 16 bytes; float: two
//   store<8>(y + column, v);  // rounded to nearest
//
// An address is a multiple of the access's bytes, which `are_aligned` finds out on the host. What is read
// long before it is worked on stays as it lies in memory, in half the registers: `load_packed`, later
// `unpack`.
#pragma once
#include <string.h>

#include <type_traits>

#include "launch.h"
//
#include "../contract.h"

namespace fastbert {

constexpr int kAccessBytes = 16;  // the widest

enum class Cache {
  read_only,  // nobody writes it while the kernel runs
  plain,      // shared memory, or what the kernel writes as well
  streaming,  // read or written once, and the first to leave the caches; a load's as read_only
  whole,      // a store to global memory that stays one instruction, whatever stands beside it
};

template <class To, class From>
DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// ---- between types, to nearest -----------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// Two neighbours of 16 bits, the first in the low half of a word.
template <class T>
DEVICE void unpack_pair(uint32_t word, float* values) {
  if constexpr (std::is_same_v<T, __half>) {
    const float2 pair = __half22float2(same_bits<__half2>(word));
    values[0] = pair.x, values[1] = pair.y;
  } else {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
}
template <class T>
DEVICE uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>)
    return same_bits<uint32_t>(__floats2half2_rn(first, second));
  else
    return same_bits<uint32_t>(__floats2bfloat162_rn(first, second));
}

// ---- one access --------------------------------------------------------------------------------------

namespace vectors {
template <int kBytes>
struct Access;
// clang-format off
template <> struct Access<2> { using Type = unsigned short; };
template <> struct Access<4> { using Type = unsigned int; };
template <> struct Access<8> { using Type = uint2; };
template <> struct Access<16> { using Type = uint4; };
// clang-format on
}  // namespace vectors

// kCount elements as they lie in memory: 2, 4, 8 or 16 bytes.
template <class T, int kCount>
using Packed = typename vectors::Access<static_cast<int>(sizeof(T)) * kCount>::Type;

template <int kCount, Cache kCache = Cache::read_only, class T>
DEVICE Packed<T, kCount> load_packed(const T* address) {
  const auto* source = reinterpret_cast<const Packed<T, kCount>*>(address);
  if constexpr (kCache == Cache::read_only)
    return __ldg(source);
  else if constexpr (kCache == Cache::streaming)
    return __ldcs(source);
  else
    return *source;
}

template <int kCount, Cache kCache = Cache::plain, class T>
DEVICE void store_packed(T* address, Packed<T, kCount> packed) {
  auto* target = reinterpret_cast<Packed<T, kCount>*>(address);
  if constexpr (kCache == Cache::streaming)
    __stcs(target, packed);
  else if constexpr (kCache == Cache::whole)
    __stwb(target, packed);
  else
    *target = packed;
}

template <class T, int kCount>
DEVICE void unpack(Packed<T, kCount> packed, float* values) {
  if constexpr (sizeof packed == 2) {
    values[0] = to_float(same_bits<T>(packed));
  } else {
    uint32_t words[sizeof packed / 4];
    memcpy(words, &packed, sizeof packed);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof packed / 4); ++i)
      if constexpr (sizeof(T) == 4)
        values[i] = __uint_as_float(words[i]);
      else
        unpack_pair<T>(words[i], values + 2 * i);
  }
}

template <class T, int kCount>
DEVICE Packed<T, kCount> pack(const float* values) {
  if constexpr (sizeof(Packed<T, kCount>) == 2) {
    return same_bits<Packed<T, kCount>>(from_float<T>(values[0]));
  } else {
    constexpr int kWords = sizeof(Packed<T, kCount>) / 4;
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 4)
        words[i] = __float_as_uint(values[i]);
      else
        words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    Packed<T, kCount> packed;
    memcpy(&packed, words, sizeof packed);
    return packed;
  }
}

// ---- any power of two of elements --------------------------------------------------------------------

namespace vectors {
// Elements of one access.
template <class T, int kCount>
constexpr int kStep =
    kCount * static_cast<int>(sizeof(T)) <= kAccessBytes ? kCount
                                                         : kAccessBytes / static_cast<int>(sizeof(T));
}  // namespace vectors

template <int kCount, Cache kCache = Cache::read_only, class T>
DEVICE void load(const T* address, float* values) {
  constexpr int kStep = vectors::kStep<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep)
    unpack<T, kStep>(load_packed<kStep, kCache>(address + i), values + i);
}

template <int kCount, Cache kCache = Cache::plain, class T>
DEVICE void store(T* address, const float* values) {
  constexpr int kStep = vectors::kStep<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep)
    store_packed<kStep, kCache>(address + i, pack<T, kStep>(values + i));
}

// ---- on the host -------------------------------------------------------------------------------------

// Whether all addresses are multiples of so many bytes, a power of two; null is.
template <class... Pointers>
bool are_aligned(int bytes, const Pointers*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) | ...) & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// ---- from a type's number to the type ----------------------------------------------------------------

// call(a value of the type), on the host.
template <class Call>
int with_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::bf16:
      return call(__nv_bfloat16{});
    default:
      return call(__half{});
  }
}

}  // namespace fastbert
