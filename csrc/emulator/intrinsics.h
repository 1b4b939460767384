// Synchronisation, shuffles, votes and atomics, by CUDA's names. Each takes as a last argument the place it
// is called from.
#pragma once
#include <string.h>

#include <type_traits>

#include "scheduler.h"

#define EMULATOR_FROM emulator::Location from = emulator::Location::here()

// ---- barriers and fences ----

inline void __syncthreads(EMULATOR_FROM) { emulator::block_barrier(from); }
inline int __syncthreads_count(int predicate, EMULATOR_FROM) {
  return emulator::block_vote(predicate != 0, emulator::Vote::count, from);
}
inline int __syncthreads_and(int predicate, EMULATOR_FROM) {
  return emulator::block_vote(predicate != 0, emulator::Vote::all, from);
}
inline int __syncthreads_or(int predicate, EMULATOR_FROM) {
  return emulator::block_vote(predicate != 0, emulator::Vote::any, from);
}
inline void __syncwarp(unsigned mask = emulator::kFullMask, EMULATOR_FROM) {
  char nothing = 0;
  emulator::warp_collective<char>("__syncwarp", mask, nothing, [](emulator::Lanes<char>) {}, from, true);
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() {}  // blocks run one thread at a time
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap(EMULATOR_FROM) { emulator::fail("__trap", from); }
// The smallest set that CUDA allows: code that takes it for the whole warp goes wrong here.
inline unsigned __activemask() { return 1u << emulator::lane_in_warp(); }

// ---- shuffles ----

namespace emulator {

template <class T>
struct Shuffled {
  T value, result;
  unsigned source;
};

// What a lane outside of the mask holds is undefined; here all bits are ones, a NaN.
template <class T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source, Location from) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8,
                "shuffles take scalars of up to 8 bytes");
  Shuffled<T> mine{value, value, source};
  warp_collective<Shuffled<T>>(
      name, mask, mine,
      [](Lanes<Shuffled<T>> lanes) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          if (!lanes.has(lane)) continue;
          Shuffled<T>& to = lanes[lane];
          if (lanes.has(to.source))
            to.result = lanes[to.source].value;
          else
            memset(static_cast<void*>(&to.result), 0xff, sizeof(T));
        }
      },
      from);
  return mine.result;
}

// Shuffles work within segments of `width` lanes.
inline int segment_start(int width) { return static_cast<int>(lane_in_warp()) & ~(width - 1); }

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_FROM) {
  const int lane = emulator::segment_start(width) + (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, lane, from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_FROM) {
  const int own = emulator::lane_in_warp(), lane = own - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, lane < emulator::segment_start(width) ? own : lane,
                           from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_FROM) {
  const int own = emulator::lane_in_warp(), lane = own + static_cast<int>(delta);
  const int end = emulator::segment_start(width) + width;
  return emulator::shuffle("__shfl_down_sync", mask, value, lane >= end ? own : lane, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_FROM) {
  const int own = emulator::lane_in_warp(), lane = own ^ bits;
  const int end = emulator::segment_start(width) + width;
  return emulator::shuffle("__shfl_xor_sync", mask, value, lane >= end ? own : lane, from);
}

// ---- votes, reductions and matches over a warp ----

namespace emulator {

template <class T>
struct Reduced {
  T value, result;
};

// Combine::of(result so far, a lane's value) over the lanes in order; every lane gets the result.
template <class T, class Combine>
T reduce(const char* name, uint32_t mask, T value, Location from, Combine) {
  Reduced<T> mine{value, {}};
  warp_collective<Reduced<T>>(
      name, mask, mine,
      [](Lanes<Reduced<T>> lanes) {
        bool first = true;
        T result{};
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          if (!lanes.has(lane)) continue;
          result = first ? lanes[lane].value : Combine::of(result, lanes[lane].value);
          first = false;
        }
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
          if (lanes.has(lane)) lanes[lane].result = result;
      },
      from);
  return mine.result;
}

// clang-format off
struct Sum { template <class T> static T of(T a, T b) { return a + b; } };
struct Smaller { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct Larger { template <class T> static T of(T a, T b) { return a < b ? b : a; } };
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
// clang-format on

}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_FROM) {
  const unsigned bit = predicate ? 1u << emulator::lane_in_warp() : 0;
  return emulator::reduce("__ballot_sync", mask, bit, from, emulator::Or{});
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_FROM) {
  return emulator::reduce("__any_sync", mask, predicate != 0 ? 1 : 0, from, emulator::Or{});
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_FROM) {
  return emulator::reduce("__all_sync", mask, predicate != 0 ? 1 : 0, from, emulator::And{});
}

#define EMULATOR_REDUCE(name, Type, Combine)                                \
  inline Type name(unsigned mask, Type value, EMULATOR_FROM) {              \
    return emulator::reduce(#name, mask, value, from, emulator::Combine{}); \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, Sum)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, Smaller)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, Larger)
EMULATOR_REDUCE(__reduce_add_sync, int, Sum)
EMULATOR_REDUCE(__reduce_min_sync, int, Smaller)
EMULATOR_REDUCE(__reduce_max_sync, int, Larger)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, And)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, Or)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, Xor)
#undef EMULATOR_REDUCE

template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_FROM) {
  struct Matched {
    T value;
    unsigned peers;
  } mine{value, 0};
  emulator::warp_collective<Matched>(
      "__match_any_sync", mask, mine,
      [](emulator::Lanes<Matched> lanes) {
        for (unsigned lane = 0; lane < emulator::kWarpSize; ++lane)
          for (unsigned other = 0; lanes.has(lane) && other < emulator::kWarpSize; ++other)
            if (lanes.has(other) && lanes[other].value == lanes[lane].value) lanes[lane].peers |= 1u << other;
      },
      from);
  return mine.peers;
}

// ---- atomics: one thread runs at a time, so that a plain read and write are one step ----

namespace emulator {

template <class T, class Change>
T read_modify_write(const char* name, T* address, Location from, Change change) {
  check_alignment(address, sizeof(T), name, from);
  note_access(address, sizeof(T), Access::atomic, from);
  Untraced untraced;
  const T old = *address;
  *address = change(old);
  return old;
}

// ld.relaxed and st.relaxed: may meet each other and atomic operations of other threads.
template <class T>
T load_relaxed(const T* address, Location from) {
  check_alignment(address, sizeof(T), "ld.relaxed", from);
  note_access(address, sizeof(T), Access::relaxed_read, from);
  const Untraced untraced;
  return *address;
}
template <class T>
void store_relaxed(T* address, T value, Location from) {
  check_alignment(address, sizeof(T), "st.relaxed", from);
  note_access(address, sizeof(T), Access::relaxed_write, from);
  const Untraced untraced;
  *address = value;
}

template <class T>
struct Same {  // keeps an argument out of deduction: atomicAdd(float*, 1)
  using type = T;
};

}  // namespace emulator

#define EMULATOR_ATOMIC(name, new_value)                                                             \
  template <class T>                                                                                 \
  T name(T* address, typename emulator::Same<T>::type value, EMULATOR_FROM) {                        \
    return emulator::read_modify_write(#name, address, from, [=](T old) -> T { return new_value; }); \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
#undef EMULATOR_ATOMIC

template <class T>
T atomicCAS(T* address, typename emulator::Same<T>::type expected, typename emulator::Same<T>::type value,
            EMULATOR_FROM) {
  return emulator::read_modify_write("atomicCAS", address, from,
                                     [=](T old) -> T { return old == expected ? value : old; });
}
