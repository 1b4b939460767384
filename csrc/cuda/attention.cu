// Attention of packed sequences with dropout on tensor cores, q, k, v and out [T, N, D], lse [T, N], forward
// and backward: for a query i and the keys j it sees, head by head,
//
//   s_ij = scale * q_i . k_j,   lse_i = log(sum_j exp(s_ij)),   P_ij = exp(s_ij - lse_i)
//   out_i = sum_j drop(P_ij) v_j
//
// Backward takes q, k, v, out and lse and computes P and the dropout mask again (attention_gradients.h).
// Inputs are bf16 or fp16, P and dS are rounded to that for their products; scores, P and all sums are
// float32. Each sum has one order, so the same call gives the same bits. Dao, "FlashAttention-2" (2023).
//
// What is float32, has a head size that is no multiple of 8 or above 128, rows that do not begin at multiples
// of 16 bytes, global tokens or ranks, or a GPU before sm_80, is attention_plain.cu's.
//
//   attention_work.h        arguments; which rows of which head a block takes
//   attention_tiles.h       tiles in shared memory and fragments; the order of keys
//   attention_dropout.h     masks in the layout of accumulators
//   attention_forward.h     attention_gradients.h  attention_backward.h
#include <algorithm>
#include <type_traits>

#include "attention_backward.h"
#include "attention_forward.h"
#include "device.h"
#include "kernels.h"
#include "launch.h"

namespace fastbert::cuda {

namespace {

using namespace attention;

constexpr int kLeastShared = 99 * 1024;  // of a GPU with bf16 products and asynchronous copies

bool on_tensor_cores(const Attention& a) {
  const bool whole_chunks = (a.head_size | a.q_stride | a.k_stride | a.v_stride) % 8 == 0;
  const bool fits_int = std::max({a.q_stride, a.k_stride, a.v_stride, 3 * a.heads * a.head_size}) < int64_t{1}
                                                                                                        << 31;
  return a.dtype != DType::f32 && a.head_size <= 128 && whole_chunks && fits_int && !a.global_tokens &&
         !a.query_ranks && are_aligned(16, a.q, a.k, a.v) && shared_memory_limit() >= kLeastShared;
}

template <class T>
void set_arguments(Arguments<T>& to, const Attention& a) {
  to.q = static_cast<const T*>(a.q), to.k = static_cast<const T*>(a.k), to.v = static_cast<const T*>(a.v);
  to.q_stride = static_cast<int>(a.q_stride), to.k_stride = static_cast<int>(a.k_stride);
  to.v_stride = static_cast<int>(a.v_stride);
  to.cu_seqlens = a.cu_seqlens, to.seed = reinterpret_cast<const uint64_t*>(a.seed);
  to.tokens = static_cast<int>(a.tokens), to.faults = fault_words();
  to.sequences = static_cast<int>(a.sequences), to.heads = static_cast<int>(a.heads);
  to.head_size = static_cast<int>(a.head_size);
  to.longest = static_cast<int>(std::min(a.max_seqlen, a.tokens));  // else what rounds it up may pass 2^31
  to.left = static_cast<int>(std::min(a.window_left, a.tokens));
  to.right = static_cast<int>(std::min(a.window_right, a.tokens));
  to.scale = a.scale;
  to.exponent = std::max((a.scale < 0 ? -a.scale : a.scale) * kLog2e, 1e-30f);  // -inf times 0 would be NaN
  to.sign = a.scale < 0 ? 0x80008000u : 0;
  to.threshold = a.t, to.bias = factor_bias(a.t);
  to.keep = dropout_scale(a.t, kAttentionLaneBits);
  to.unkeep = static_cast<float>(256 - a.t) / 256;
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// run(T(), Int<kD>(), std::bool_constant<kDrop>()) for the dtype, the next head size, and whether anything is
// dropped.
template <class Run>
int choose(const Attention& a, Run run) {
  const auto by_dropout = [&](auto type, auto head_size) {
    return a.t > 0 ? run(type, head_size, std::true_type()) : run(type, head_size, std::false_type());
  };
  const auto by_head_size = [&](auto type) {
    if (a.head_size <= 32) return by_dropout(type, Int<32>());
    if (a.head_size <= 64) return by_dropout(type, Int<64>());
    return by_dropout(type, Int<128>());
  };
  return a.dtype == DType::f16 ? by_head_size(__half()) : by_head_size(__nv_bfloat16());
}

bool is_empty(const Attention& a) {
  return a.tokens == 0 || a.sequences == 0 || a.heads == 0 || a.head_size == 0 || a.max_seqlen == 0;
}

void* stream_of(const Attention& a) { return reinterpret_cast<void*>(a.launch); }

template <class T, int kD, int kM, bool kDrop, int kBlocks>
int run_forward(const attention::Forward<T>& args, void* stream) {
  constexpr int kWarps = 4, kRows = kWarps * kM * 16;
  return launch("attention_forward", attention_forward_kernel<T, kD, kWarps, kM, kDrop, kBlocks>,
                grid_of(args, kRows), kWarps * kWarp, kForwardBytes<kD, kRows>, stream, args);
}

template <class T, int kD, bool kDrop>
int run_backward(const attention::Backward<T>& args, void* stream) {
  constexpr int kWarps = 4,
                kBlocks = kD == 32   ? 4
                          : kD == 64 ? 3
                                     : 2,
                kM = kD == 128 ? 1 : 2, kRows = kWarps * 16;
  if (args.longest <= kWholeRows && kWholeBytes<kD> <= shared_memory_limit())
    return launch("attention_backward", attention_backward_whole_kernel < T, kD, kDrop,
                  kD == 128 ? 1 : kBlocks >, grid_of(args, kWholeRows), kWholeWarps<kD> * kWarp,
                  kWholeBytes<kD>, stream, args);
  const int error =
      launch("attention_backward_queries", attention_backward_queries_kernel<T, kD, kWarps, kM, kDrop, 2>,
             grid_of(args, kRows * kM), kWarps * kWarp, kQueriesBytes<kD, kRows * kM>, stream, args);
  if (error != 0) return error;
  return launch("attention_backward_keys", attention_backward_keys_kernel<T, kD, kWarps, kDrop, kBlocks>,
                grid_of(args, kRows), kWarps * kWarp, kKeysBytes<kD, kRows>, stream, args);
}

}  // namespace

int attention_forward(const AttentionForward& a) {
  if (is_empty(a)) return 0;
  if (!on_tensor_cores(a) || !are_aligned(16, a.out)) return attention_plain_forward(a);
  return choose(a, [&](auto type, auto head_size, auto drop) {
    using T = decltype(type);
    constexpr int kD = head_size();
    attention::Forward<T> args;
    set_arguments(args, a);
    args.out = static_cast<T*>(a.out), args.lse = a.lse;
    if constexpr (kD == 64)  // 32 queries a warp read shared memory half as often, and leave fewer blocks
      if (a.max_seqlen > 256) return run_forward<T, kD, 2, drop(), 2>(args, stream_of(a));
    return run_forward<T, kD, 1, drop(), kD == 128 ? 2 : 4>(args, stream_of(a));
  });
}

int attention_backward(const AttentionBackward& a) {
  if (is_empty(a)) return 0;
  if (!on_tensor_cores(a) || !are_aligned(16, a.dout, a.out, a.dqkv)) return attention_plain_backward(a);
  return choose(a, [&](auto type, auto head_size, auto drop) {
    using T = decltype(type);
    attention::Backward<T> args;
    set_arguments(args, a);
    args.dout = static_cast<const T*>(a.dout), args.out = static_cast<const T*>(a.out), args.lse = a.lse;
    args.dqkv = static_cast<T*>(a.dqkv), args.rows = reinterpret_cast<float2*>(a.scratch);
    return run_backward<T, head_size(), drop()>(args, stream_of(a));
  });
}

}  // namespace fastbert::cuda
