// Every line of inline PTX, each instruction a function with its twin for the emulator.
//
// sm_75 has no cp.async, no m16n8k16 and no bf16: there copies are plain and fp16 products are made of two
// m16n8k8; what cannot be made traps, so that a kernel still compiles whole.
#pragma once
#include "launch.h"

namespace fastbert {

// ---- addresses in shared memory: 32 bits on the device, where a pointer takes twice the registers ----

#if defined(__CUDACC__)
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#else
using SharedAddress = char*;
DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<char*>(const_cast<void*>(pointer));
}
#endif

// ---- 4 bytes that several threads read and write at once: as plain accesses they would be a race, and the
// compiler might keep a value for later ----

template <class T>
DEVICE T load_relaxed(const T* address CALLED_FROM) {
  static_assert(sizeof(T) == 4, "load_relaxed reads 4 bytes");
#if defined(__CUDACC__)
  uint32_t bits;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
  return reinterpret_cast<const T&>(bits);
#else
  return emulator::load_relaxed(address, from);
#endif
}

template <class T>
DEVICE void store_relaxed(T* address, T value CALLED_FROM) {
  static_assert(sizeof(T) == 4, "store_relaxed writes 4 bytes");
#if defined(__CUDACC__)
  asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(address), "r"(reinterpret_cast<const uint32_t&>(value))
               : "memory");
#else
  emulator::store_relaxed(address, value, from);
#endif
}

// Asks for the sector at an address, to be in L2 when it is read.
DEVICE void prefetch_l2(const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// ---- numbers ----

// Within 1 ULP or so: the IEEE one calls a slow path, whose registers every caller has to keep free.
DEVICE float sqrt_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}

// 2^x within 2 ULP; results below 2^-126 are 0.
DEVICE float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
#endif
}

// All ones in each half of a word where the fp16 in that half of x is at least that of bound, else 0.
DEVICE uint32_t halves_at_least(uint32_t x, uint32_t bound) {
#if defined(__CUDACC__)
  uint32_t mask;
  asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(bound));
  return mask;
#else
  return emulator::halves_at_least(x, bound);
#endif
}

// Keeps the compiler from moving what computes x past this place, out of a loop or into a later branch.
DEVICE void keep_in_place(uint32_t& x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#else
  (void)x;
#endif
}

// 1 / x within 1 ULP; results below 2^-126, and of x below it, are 0 and infinite.
DEVICE float reciprocal_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = 1 / x;
  return fabsf(x) < 0x1p-126f ? copysignf(INFINITY, x) : fabsf(y) < 0x1p-126f ? copysignf(0, y) : y;
#endif
}

// ---- matrix products of a warp: c[16 x 8] += a[16 x 16] b[16 x 8], sums in float32 ----
// With g = lane / 4 and i = lane % 4, a lane holds two neighbouring elements in each word, the first in the
// low half:
//   a[0] (g, 2i), a[1] (g + 8, 2i), a[2] (g, 2i + 8), a[3] (g + 8, 2i + 8); b[0] (2i, g), b[1] (2i + 8, g);
//   c[0], c[1] (g, 2i), c[2], c[3] (g + 8, 2i)

template <class T>  // __nv_bfloat16 or __half
DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALLED_FROM);

#if !defined(__CUDACC__)

template <class T>
DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Location from) {
  emulator::mma_m16n8k16<T>(c, a, b, from);
}

#else

template <>
DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

template <>
DEVICE void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; ++half)  // the left and the right 8 columns of a
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

#endif

// c[16 x 8] += a[16 x 8] b[8 x 8] of float32 rounded to tf32, one element in a word:
//   a[0] (g, i), a[1] (g + 8, i), a[2] (g, i + 4), a[3] (g + 8, i + 4); b[0] (i, g), b[1] (i + 4, g)
DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALLED_FROM) {
#if !defined(__CUDACC__)
  emulator::mma_m16n8k8_tf32(c, a, b, from);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8, 16-byte aligned, and receives of matrix j the elements (g, 2i) and (g, 2i + 1), transposed (2i, g)
// and (2i + 1, g).
template <bool kTransposed = false>
DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], SharedAddress row CALLED_FROM) {
#if !defined(__CUDACC__)
  emulator::ldmatrix_x4<kTransposed>(fragment, row, from);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
#endif
}

// ---- copies from global to shared memory that do not pass through registers ----

// kBytes (4, 8 or 16) to an address that is a multiple of it; zeros where it is not valid, and then nothing
// is read.
template <int kBytes>
DEVICE void copy_async(SharedAddress target, const void* source, bool valid CALLED_FROM) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if !defined(__CUDACC__)
  emulator::copy_async(target, source, kBytes, valid ? kBytes : 0, from);
#elif __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16)  // .cg: not through L1, which 16 bytes alone may pass by
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
                 : "memory");
#else
  if constexpr (kBytes == 16) {
    const uint4 v = valid ? *static_cast<const uint4*>(source) : uint4{};
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    const uint2 v = valid ? *static_cast<const uint2*>(source) : uint2{};
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(target), "r"(v.x), "r"(v.y) : "memory");
  } else {
    const uint32_t v = valid ? *static_cast<const uint32_t*>(source) : 0;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(v) : "memory");
  }
#endif
}

// Closes the group of the copies since the last commit.
DEVICE void commit_copies() {
#if !defined(__CUDACC__)
  emulator::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits till at most kGroupsLeft of this thread's groups, the newest, are unfinished; other threads see the
// copies only after a barrier.
template <int kGroupsLeft>
DEVICE void wait_for_copies() {
#if !defined(__CUDACC__)
  emulator::wait_for_copies(kGroupsLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

}  // namespace fastbert
