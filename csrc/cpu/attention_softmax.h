// Attention's softmax of one query, or two, against a block of keys, forward and backward, with what is
// visible and what dropout keeps. A row of scores lies along the lanes: [kKeys] floats.
#pragma once
#include "attention_visible.h"
#include "dropout.h"
#include "exp.h"
#include "matmul.h"
#include "reduce.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int kDrawn = 4;  // queries for which dropout is drawn at a time; some may stand behind the last

// Which of up to so many keys these queries keep: a byte is drawn for each weight.
template <int kKeys>
using WeightDropout = DropoutMask<uint8_t, kKeys, kDrawn>;
using KeptWeights = Kept<uint8_t>;

// e^(score * scale - base), where base is at least the score less 11 (log of dropout's factor); as exact as
// the words that it is rounded to.
template <typename Words>
FASTBERT_INLINE vfloat weight(vfloat score, float scale, float base) {
  constexpr float log2e = 1.44269504f;
  if constexpr (Words::kDepth == 2)
    return exp2_short(score * (scale * log2e) - base * log2e);
  else
    return exp_below(score * scale - base);
}

// ---- forward -----------------------------------------------------------------------------------------

// Scores of one query against a block become dropped, unnormalised weights, in place (as bf16 in the row's
// first half where words are pairs). `highest` and `sum` run over the blocks; returns what earlier sums must
// be multiplied by.
template <typename Words>
FASTBERT_INLINE float softmax_block(const Attention& p, float* scores, Visible s, int64_t width,
                                    const KeptWeights* kept, float* highest, float* sum) {
  if (s.last < s.first && !s.global) {
    memset(scores, 0, width * sizeof(float));
    return 1.f;
  }
  const float scale = p.scale;  // stores could alias what stands in p
  vfloat most[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  over_keys(s, width, [&](int64_t j, auto seen, int i) FASTBERT_LAMBDA {
    most[i] = max(seen.pick(s, j, load(scores + j) * scale, -__builtin_inff()), most[i]);
  });
  const float before = *highest, block = reduce_max(max(most[0], most[1])),
              now = before > block ? before : block;
  const float base = now == -__builtin_inff() ? 0.f : now;  // where all seen scores are -inf
  vfloat total[2] = {};
  over_keys(s, width, [&](int64_t j, auto seen, int i) FASTBERT_LAMBDA {
    vfloat e = seen.pick(s, j, weight<Words>(load(scores + j), scale, base), 0.f);
    total[i] += e;
    if (kept) e = drop(kept, j, e);
    if constexpr (Words::kDepth == 2)
      store(reinterpret_cast<bf16*>(scores) + j, e);
    else
      store(scores + j, e);
  });
  const bool same = before == now || before == -__builtin_inff();
  const float shrink = same ? 1.f : exp(splat(before - base))[0];
  *highest = now;
  *sum = *sum * shrink + reduce_add(total[0] + total[1]);
  return shrink;
}

// ---- backward ----------------------------------------------------------------------------------------

// One query against a block. Dropout's factor is in `lse` and `delta`: with c = 1 / (1 - p),
// c P = exp(s - (lse - log c)) and dS = c P * (kept(dout . v) - delta / c).
struct Query {
  float *scores, *products;  // q . k and dout . v
  Visible visible;
  float lse, delta;
  const KeptWeights* kept;  // of the block; null where nothing is dropped
};

// Scores of two queries become drop(P) and their products dS: in place, or, where words are pairs, side by
// side in `weights` and `dscores`, and dS also by rows in the first half of the products.
template <typename Words>
FASTBERT_INLINE void gradients(const Attention& p, const Query (&queries)[2], int64_t width,
                               uint32_t* weights, uint32_t* dscores) {
  const Visible both = {
      max(queries[0].visible.first, queries[1].visible.first),
      min(queries[0].visible.last, queries[1].visible.last), nullptr,
      queries[0].visible.key_ranks ? queries[0].visible.key_ranks : queries[1].visible.key_ranks};
  const Query a = queries[0], b = queries[1];
  const float scale = p.scale;  // stores could alias what stands in p
  over_keys(both, width, [&](int64_t j, auto seen, int) FASTBERT_LAMBDA {
    vfloat w[2], ds[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Query& q = i == 0 ? a : b;
      const vfloat full = seen.pick(q.visible, j, weight<Words>(load(q.scores + j), scale, q.lse), 0.f);
      vfloat dw = load(q.products + j);
      w[i] = full;
      if (q.kept) {
        w[i] = drop(q.kept, j, full);
        dw = drop(q.kept, j, dw);
      }
      ds[i] = seen.pick(q.visible, j, full * (dw - q.delta), 0.f);
    }
    if constexpr (Words::kDepth == 2) {
      const vuint rows = Words::round(ds[0], ds[1]);
      const vuint pairs = Words::join(Words::round(w[0], w[1])), dpairs = Words::join(rows);
      memcpy(weights + j, &pairs, sizeof pairs);
      memcpy(dscores + j, &dpairs, sizeof dpairs);
      memcpy(a.products + j / 2, &rows, sizeof rows / 2);
      memcpy(b.products + j / 2, reinterpret_cast<const char*>(&rows) + sizeof rows / 2, sizeof rows / 2);
    } else {
      for (int i = 0; i < 2; ++i)
        store((i == 0 ? a : b).scores + j, w[i]), store((i == 0 ? a : b).products + j, ds[i]);
    }
  });
}

}  // namespace

}  // namespace FASTBERT_ISA
}  // namespace fastbert
