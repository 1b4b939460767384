// What an attention kernel is given, and which part of it a block takes: a head of a sequence, and some of
// its rows.
#pragma once
#include "launch.h"
//
#include "faults.h"
#include "ptx.h"
#include "reduce.h"

namespace fastbert::attention {

template <class T>
struct Arguments {     // of both directions, as contract.h has them
  const T *q, *k, *v;  // [T, N, D], heads D apart, all rows at multiples of 16 bytes
  int q_stride, k_stride, v_stride;
  const int32_t* cu_seqlens;
  const uint64_t* seed;
  int tokens, sequences, heads, head_size, longest, left, right;
  int32_t* faults;
  float scale;
  float exponent;      // exp(scale q.k) is 2^(exponent q.k), where q has the scale's sign
  uint32_t sign;       // flips the signs of two elements where the scale is negative
  uint32_t threshold;  // t of the dropout contract
  float bias;          // see factor()
  float keep, unkeep;  // 1 / (1 - p), 0 where p is 1; 1 - p
};

template <class T>
struct Forward : Arguments<T> {
  T* out;
  float* lse;
};

template <class T>
struct Backward : Arguments<T> {
  const T *dout, *out;
  const float* lse;
  T* dqkv;
  float2* rows;  // [N, T]: lse and delta, see RowStatistics
};

// ---- the longest first -------------------------------------------------------------------------------
//
// Blocks start in the order of their numbers, and the last to start should be short. A warp ranks 128
// sequences at a time by the quarter of the longest length that theirs lies in; more sequences keep a GPU
// busy anyway.

constexpr int kRanked = 128, kPerLane = kRanked / kWarp;

struct Sequence {
  int index, start, length;
};

// The sequence that comes in place `place` of all; the same in all lanes, which read cu_seqlens once.
template <class T>
DEVICE Sequence ranked_sequence(const Arguments<T>& a, int place, int lane) {
  const int first = place / kRanked * kRanked, quarter = (a.longest + 3) / 4;
  int start[kPerLane] = {}, length[kPerLane] = {};
  int shift[kPerLane];  // 8 times the class of a sequence: 0 the longest
  uint32_t own = 0;     // sequences of each class, a byte each
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    const int index = first + n * kWarp + lane;
    shift[n] = -1;
    if (index >= a.sequences) continue;
    start[n] = a.cu_seqlens[index], length[n] = a.cu_seqlens[index + 1] - start[n];
    shift[n] = 8 * ((length[n] <= 3 * quarter) + (length[n] <= 2 * quarter) + (length[n] <= quarter));
    own += 1u << shift[n];
  }
  uint32_t up_to_here = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, up_to_here, distance);
    if (lane >= distance) up_to_here += before;
  }
  const uint32_t total = __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
  uint32_t next =
      (total << 8) * 0x01010101u + up_to_here - own;  // the place of the lane's next of each class
  Sequence found = {-1, 0, 0};
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    if (shift[n] < 0) continue;
    if (static_cast<int>(next >> shift[n] & 0xff) == place - first)
      found = {first + n * kWarp + lane, start[n], length[n]};
    next += 1u << shift[n];
  }
  const int finder = __ffs(static_cast<int>(__ballot_sync(kAllLanes, found.index >= 0))) - 1;
  return {__shfl_sync(kAllLanes, found.index, finder), __shfl_sync(kAllLanes, found.start, finder),
          __shfl_sync(kAllLanes, found.length, finder)};
}

constexpr int kGridSequences = 1024;  // of the grid's second axis; the third takes 65,535 times as many

// A block's head and sequence, and its first row there. `length` is 0 where there is nothing to do: behind
// the sequence, or where cu_seqlens cannot be used.
struct Work {
  int head, row;      // row: of the sequence
  int start, length;  // of the sequence, in tokens

  template <class T>
  DEVICE Work(const Arguments<T>& a, int rows, int lane) : head(0), row(0), start(0), length(0) {
    const int place = blockIdx.z * kGridSequences + blockIdx.y;
    if (place >= a.sequences) return;
    const int tiles = (a.longest + rows - 1) / rows;
    head = blockIdx.x / tiles, row = (blockIdx.x - head * tiles) * rows;
    const Sequence sequence = ranked_sequence(a, place, lane);
    start = sequence.start;
    // A token of no sequence would leave its results as nobody wrote them.
    const bool is_covered = (sequence.index > 0 || start == 0) &&
                            (sequence.index + 1 < a.sequences || sequence.length == a.tokens - start);
    const bool holds = start >= 0 && sequence.length >= 0 && sequence.length <= a.longest &&
                       sequence.length <= a.tokens - start && is_covered;
    if (holds)
      length = row < sequence.length ? sequence.length : 0;
    else if (row == 0 && head == 0 && threadIdx.x == 0)
      cuda::raise_fault(a.faults, cuda::kFaultSequence, sequence.index);
  }
};

// For what follows a main loop: x, or the block's head, worked out again rather than kept in a register.
DEVICE int again(int x) {
  uint32_t same = x;
  keep_in_place(same);
  return same;
}
template <class T>
DEVICE int head_again(const Arguments<T>& a, int rows) {
  return blockIdx.x / ((again(a.longest) + rows - 1) / rows);
}

template <class T>
dim3 grid_of(const Arguments<T>& a, int rows) {
  const int tiles = (a.longest + rows - 1) / rows;
  return dim3(a.heads * tiles, min(a.sequences, kGridSequences),
              (a.sequences + kGridSequences - 1) / kGridSequences);
}

// The same in all lanes, and known to the compiler to be so: branches on it need no reconvergence.
DEVICE int uniform_warp_index() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0); }

}  // namespace fastbert::attention
