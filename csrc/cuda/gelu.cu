// GELU of x + bias, [T, H] and [H]:
//
//   y = u * Phi(u),                    u = x + bias                       exact form
//   y = u * sigmoid(2w),               w = sqrt(2/pi) * (u + 0.044715 u^3)  tanh form
//
// Both are relu(u) - tail(|u|) with tail(a) = a * Phi(-a), or a * sigmoid(-2w): neither subtracts nearly
// equal numbers, and tail goes to 0 where u is infinite. The derivative is 1 - tail'(|u|) right of 0 and
// tail'(|u|) left of it, so forward and backward share one exp2. Hendrycks and Gimpel, "Gaussian error linear
// units" (2016).
//
// Arithmetic is float32 for every dtype. Backward reads x again rather than saving anything; dbias, the
// column sums of dx before it is rounded, is taken in the same pass: blocks leave parts of it in scratch, and
// the last one adds those in order. The 16-bit types take a shorter polynomial: with the long one
// arithmetic is the limit, not memory.
#include "launch.h"
//
#include "column_sums.h"
#include "kernels.h"
#include "ptx.h"

namespace fastbert::cuda {
namespace {

// A lane has an access's elements in each of kRows rows at a time, all of them loaded before the first is
// worked on; so a warp has 32 accesses of a row.
constexpr int kForwardWarps = 4, kForwardRows = 4;
constexpr int kBackwardWarps = kGeluBackwardWarps, kBackwardRows = 2;
constexpr int64_t kWarpsWanted = 132 * 32;  // that keep the largest GPUs' memory busy

// From here on tail and its derivative are 0 by the exponential, whose argument stays finite.
constexpr float kExactEnd = 30.f, kTanhEnd = 1e4f;

// ---- gelu and its derivative ------------------------------------------------------------------------

struct Tail {
  float value, slope;  // tail(a), tail'(a)
};

// exp(-a*a/2) within some ULP: a*a in two parts, as its rounding is multiplied by up to 100 in the result.
DEVICE float gauss(float a) {
  constexpr float k = 0.72134752f, kRest = 9.629815e-9f;  // 1 / (2 ln 2) in two parts
  const float high = a * a, low = fmaf(a, a, -high);
  const float exponent = high * k;
  const float rest = fmaf(high, k, -exponent) + (high * kRest + low * k);  // below 1e-5
  const float density = exp2_approximate(-exponent);
  return fmaf(density, rest * -0.6931472f, density);
}

// Phi(-a) = exp(-a*a/2) * s * Q(s), s = 1 / (a + k). Q is the minimax fit of exp(a*a/2) * Phi(-a) / s in
// relative error over 0 <= a <= 13.3: 8.8e-8 with degree 7 and k = 3.3, 4.5e-5 with degree 4 and k = 2.6.
template <bool kShort>
DEVICE Tail tail_exact(float a) {
  float density, q;  // the density without its factor 1 / sqrt(2 pi)
  if constexpr (kShort) {
    density = exp2_approximate(a * a * -0.72134752f);
    const float s = reciprocal_approximate(a + 2.6f);
    q = fmaf(s, -10.529969f, 8.111355f);
    q = fmaf(q, s, 1.756674f);
    q = fmaf(q, s, 1.06771f);
    q = fmaf(q, s, 0.3983456f);
    q *= s;
  } else {
    density = gauss(a);
    const float s = reciprocal_approximate(a + 3.3f);
    q = fmaf(s, 516.5728f, -666.5993f);
    q = fmaf(q, s, 253.97015f);
    q = fmaf(q, s, -18.224339f);
    q = fmaf(q, s, 14.850441f);
    q = fmaf(q, s, 3.6540864f);
    q = fmaf(q, s, 1.3269342f);
    q = fmaf(q, s, 0.39878547f);
    q *= s;
  }
  return {a * q * density, fmaf(a, -0.39894228f, q) * density};  // a first: density alone may be subnormal
}

DEVICE Tail tail_tanh(float a) {
  constexpr float k = 2.f * 0.79788456f, kCubic = k * 0.044715f;  // 2w = k * a + kCubic * a^3
  constexpr float kLog2e = 1.442695f;
  const float square = a * a;
  const float e = exp2_approximate(a * fmaf(square, -kCubic * kLog2e, -k * kLog2e));
  const float gate = e * reciprocal_approximate(1.f + e);  // sigmoid(-2w)
  const float turn = a * fmaf(square, 3.f * kCubic, k);    // a * d(2w)/da
  return {a * gate, gate - gate * (1.f - gate) * turn};
}

template <class T, bool kTanh>
DEVICE Tail tail(float u) {
  constexpr float end = kTanh ? kTanhEnd : kExactEnd;
  const float absolute = fabsf(u), a = absolute > end ? end : absolute;  // NaN stays
  if constexpr (kTanh)
    return tail_tanh(a);
  else
    return tail_exact<sizeof(T) == 2>(a);
}

template <class T, bool kTanh>
DEVICE float gelu(float u) {
  return fmaxf(u, 0.f) - tail<T, kTanh>(u).value;
}

template <class T, bool kTanh>
DEVICE float gelu_slope(float u) {
  const float slope = tail<T, kTanh>(u).slope;
  return u > 0 ? 1.f - slope : slope;
}

// ---- which lane has which elements -------------------------------------------------------------------

// x as rows of accesses of several elements; without bias, where columns do not matter, rows of one warp's.
struct Plane {
  int64_t accesses;      // of all of x
  int columns;           // accesses of a row
  int column_blocks;     // warps side by side
  int64_t rows;          // ceil(accesses / columns)
  int64_t rows_of_warp;  // forward: a multiple of kForwardRows
};

// Whether a row before `end` has such an access; without bias the last row is shorter.
DEVICE bool is_inside(const Plane& plane, int64_t row, int64_t end, int column) {
  return row < end && row * plane.columns + column < plane.accesses;
}

// The bias of a lane's columns. Each warp reads it once for all of its rows.
template <class T, int kCount>
DEVICE void load_bias(const void* bias, bool is_wide, int64_t column, float* values) {
  if (is_wide)
    load<kCount>(static_cast<const float*>(bias) + column, values);
  else
    load<kCount>(static_cast<const T*>(bias) + column, values);
}

// ---- forward ----------------------------------------------------------------------------------------

template <class T, int kCount, bool kTanh, bool kBias>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    gelu_forward_kernel(const T* __restrict__ x, const void* __restrict__ bias, bool is_wide,
                        T* __restrict__ y, Plane plane) {
  const int column = static_cast<int>(blockIdx.x % plane.column_blocks) * kWarp + lane_of_warp();
  if (column >= plane.columns) return;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x / plane.column_blocks) * kForwardWarps + warp_of_block()) *
      plane.rows_of_warp;
  const int64_t end = min(plane.rows, first + plane.rows_of_warp);
  float b[kCount] = {};
  if (kBias && first < end) load_bias<T, kCount>(bias, is_wide, static_cast<int64_t>(column) * kCount, b);

  for (int64_t row = first; row < end; row += kForwardRows) {
    Packed<T, kCount> packed[kForwardRows];
    const int64_t place = (row * plane.columns + column) * kCount, step = int64_t{plane.columns} * kCount;
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i)
      if (is_inside(plane, row + i, end, column))
        packed[i] = load_packed<kCount, Cache::streaming>(x + place + i * step);
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      if (!is_inside(plane, row + i, end, column)) break;
      float u[kCount];
      unpack<T, kCount>(packed[i], u);
#pragma unroll
      for (int j = 0; j < kCount; ++j) u[j] = gelu<T, kTanh>(kBias ? u[j] + b[j] : u[j]);
      store<kCount>(y + place + i * step, u);
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------------

// dy and x of a lane in the rows of a warp that follow `row`, as they lie in memory.
template <class T, int kCount>
struct Loaded {
  Packed<T, kCount> dy[kBackwardRows], x[kBackwardRows];
};

template <class T, int kCount>
DEVICE void load_rows(const T* dy, const T* x, const Plane& plane, int64_t row, int64_t end, int column,
                      Loaded<T, kCount>& loaded) {
#pragma unroll
  for (int i = 0; i < kBackwardRows; ++i) {
    const int64_t its = row + i * kBackwardWarps, place = (its * plane.columns + column) * kCount;
    if (!is_inside(plane, its, end, column)) continue;
    loaded.dy[i] = load_packed<kCount, Cache::streaming>(dy + place);
    loaded.x[i] = load_packed<kCount, Cache::streaming>(x + place);
  }
}

// The sum of a block's warps for column threadIdx.x of its kWarp * kCount, where there is one.
template <int kCount>
DEVICE float sum_of_warps(const float (&own)[kCount]) {
  constexpr int kColumns = kWarp * kCount;
  __shared__ __align__(16) float sums[kBackwardWarps][kColumns];
  store<kCount>(&sums[warp_of_block()][lane_of_warp() * kCount], own);
  __syncthreads();
  float sum = 0;
  if (threadIdx.x < kColumns)
#pragma unroll
    for (int warp = 0; warp < kBackwardWarps; ++warp) sum += sums[warp][threadIdx.x];
  return sum;
}

// dbias of a block's columns: each block leaves a part, scratch [parts, stride], and the last adds them up, a
// warp every kBackwardWarps-th.
template <class T, int kCount>
DEVICE void sum_columns(const float (&dbias)[kCount], int part, int parts, int64_t first_column,
                        int64_t columns, int64_t stride, float* scratch, uint32_t* counter, void* result,
                        bool is_wide) {
  const int64_t own = first_column + threadIdx.x, lanes = first_column + lane_of_warp() * kCount;
  const bool has_column = threadIdx.x < kWarp * kCount;
  const float of_part = sum_of_warps(dbias);
  if (has_column && own < stride) scratch[part * stride + own] = of_part;
  if (!is_last_block(counter, parts)) return;
  float sums[kCount] = {};
  if (lanes < stride) add_parts(scratch + lanes, warp_of_block(), parts, kBackwardWarps, stride, sums);
  const float total[1] = {sum_of_warps(sums)};
  if (has_column && own < columns) store_sums<T>(result, is_wide, own, total);
}

// A block has a part of the rows, one more in the first `longer_parts`, and its warps take them in turn. The
// next rows are asked for before these are worked on.
template <class T, int kCount, bool kTanh, bool kBias>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    gelu_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, const void* __restrict__ bias,
                         bool is_wide, T* __restrict__ dx, void* dbias_result, float* scratch, int64_t stride,
                         Plane plane, int64_t rows_of_part, int longer_parts, const Counters counters) {
  constexpr int kStep = kBackwardRows * kBackwardWarps;
  const int column_block = blockIdx.x % plane.column_blocks, part = blockIdx.x / plane.column_blocks;
  const int column = column_block * kWarp + lane_of_warp();
  const int64_t first = part * rows_of_part + min(part, longer_parts);
  int64_t row = first + warp_of_block();
  const int64_t end = column < plane.columns ? first + rows_of_part + (part < longer_parts) : 0;
  float b[kCount] = {}, dbias[kCount] = {};
  if (kBias && row < end) load_bias<T, kCount>(bias, is_wide, static_cast<int64_t>(column) * kCount, b);

  Loaded<T, kCount> now = {}, next = {};
  load_rows(dy, x, plane, row, end, column, now);
  for (; row < end; row += kStep) {
    load_rows(dy, x, plane, row + kStep, end, column, next);
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      const int64_t its = row + i * kBackwardWarps;
      if (!is_inside(plane, its, end, column)) continue;
      float u[kCount], d[kCount];
      unpack<T, kCount>(now.x[i], u);
      unpack<T, kCount>(now.dy[i], d);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        d[j] *= gelu_slope<T, kTanh>(kBias ? u[j] + b[j] : u[j]);
        if (kBias) dbias[j] += d[j];
      }
      store<kCount>(dx + (its * plane.columns + column) * kCount, d);
    }
    now = next;
  }
  if (kBias)
    sum_columns<T>(dbias, part, gridDim.x / plane.column_blocks, int64_t{column_block} * kWarp * kCount,
                   int64_t{plane.columns} * kCount, stride, scratch, counters.at(column_block), dbias_result,
                   is_wide);
}

// ---- launchers --------------------------------------------------------------------------------------

template <class T>
constexpr int kWidest = kAccessBytes / static_cast<int>(sizeof(T));

template <int kCount>
Plane plane_of(int64_t rows, int64_t columns, bool has_bias) {
  const int64_t accesses = rows * columns / kCount;
  const int64_t across = has_bias ? columns / kCount : kWarp, blocks = (across + kWarp - 1) / kWarp;
  const int64_t down = (accesses + across - 1) / across;
  const int64_t each = down * blocks / kWarpsWanted / kForwardRows * kForwardRows;
  return {accesses, static_cast<int>(across), static_cast<int>(blocks), down,
          min(max(each, int64_t{2 * kForwardRows}), int64_t{4 * kForwardRows})};
}

template <class T, int kCount, bool kTanh, bool kBias>
int start(const GeluForward& a) {
  const Plane plane = plane_of<kCount>(a.rows, a.columns, kBias);
  const int64_t rows_of_block = plane.rows_of_warp * kForwardWarps;
  const int64_t blocks = (plane.rows + rows_of_block - 1) / rows_of_block * plane.column_blocks;
  if (blocks == 0) return 0;
  return launch("gelu_forward", gelu_forward_kernel<T, kCount, kTanh, kBias>, dim3(blocks),
                dim3(kForwardWarps * kWarp), 0, reinterpret_cast<void*>(a.launch), a.x, a.bias,
                a.bias_dtype == DType::f32, a.y, plane);
}

template <class T, int kCount, bool kTanh, bool kBias>
int start(const GeluBackward& a) {
  const Plane plane = plane_of<kCount>(a.rows, a.columns, kBias);
  constexpr int64_t kRowsOfPart = 4 * kBackwardRows * kBackwardWarps;  // where parts cost nothing
  const int64_t parts = kBias ? gelu_parts(a.rows, a.columns) : (plane.rows + kRowsOfPart - 1) / kRowsOfPart;
  const int64_t blocks = parts * plane.column_blocks, stride = part_stride(a.columns);
  if (blocks == 0) return 0;
  void* stream = reinterpret_cast<void*>(a.launch);
  Counters counters = {};
  if (kBias)
    if (const int error = take_counters("gelu_backward", plane.column_blocks, a.scratch + parts * stride,
                                        stream, &counters))
      return error;
  return launch("gelu_backward", gelu_backward_kernel<T, kCount, kTanh, kBias>, dim3(blocks),
                dim3(kBackwardWarps * kWarp), 0, stream, a.dy, a.x, a.bias, a.bias_dtype == DType::f32, a.dx,
                a.dbias, a.scratch, stride, plane, plane.rows / parts, plane.rows % parts, counters);
}

bool is_aligned(const GeluForward& a) { return are_aligned(kAccessBytes, a.x, a.bias, a.y); }
bool is_aligned(const GeluBackward& a) { return are_aligned(kAccessBytes, a.dy, a.x, a.bias, a.dx); }

// From the element at `place` on, without bias.
template <class T>
GeluForward from(GeluForward a, int64_t place) {
  a.x = static_cast<const T*>(a.x) + place, a.y = static_cast<T*>(a.y) + place;
  return a;
}
template <class T>
GeluBackward from(GeluBackward a, int64_t place) {
  a.dy = static_cast<const T*>(a.dy) + place, a.x = static_cast<const T*>(a.x) + place;
  a.dx = static_cast<T*>(a.dx) + place;
  return a;
}

// In accesses of 16 bytes, where every row begins with one; without bias there is but one row, and what is
// left at its end has a launch of its own.
template <class T, bool kTanh, class Arguments>
int start_widest(const Arguments& a) {
  const bool aligned = is_aligned(a);
  if (a.bias)
    return aligned && a.columns % kWidest<T> == 0 ? start<T, kWidest<T>, kTanh, true>(a)
                                                  : start<T, 1, kTanh, true>(a);
  const int64_t all = a.rows * a.columns, whole = aligned ? all / kWidest<T> * kWidest<T> : 0;
  Arguments most = a, rest = from<T>(a, whole);
  most.rows = rest.rows = 1, most.columns = whole, rest.columns = all - whole;
  const int error = start<T, kWidest<T>, kTanh, false>(most);
  return error ? error : start<T, 1, kTanh, false>(rest);
}

template <class Arguments>
int start_typed(const Arguments& a) {
  return with_type(a.dtype, [&](auto x) {
    using T = decltype(x);
    return a.tanh_form ? start_widest<T, true>(a) : start_widest<T, false>(a);
  });
}

}  // namespace

int gelu_forward(const GeluForward& a) { return start_typed(a); }

int gelu_backward(const GeluBackward& a) {
  if (!a.bias || a.rows > 0) return start_typed(a);
  return with_type(a.bias_dtype, [&](auto bias) {
    return zero("gelu_backward", static_cast<decltype(bias)*>(a.dbias), a.columns,
                reinterpret_cast<void*>(a.launch));
  });
}

}  // namespace fastbert::cuda
