"""Comparing attention scores, forward and backward: ours, all heads at once by autograd, attention, and a whole step.

    python benchmarks/attention_distillation.py [--sequences 16] [--length 128] [--repeats 20] [--device cpu]

The student has 12 heads of 26 numbers (TinyBERT's width 312) and the teacher 12 of 64 (BERT base). `all heads` makes
all scores [B, N, S, S] of a layer, which autograd keeps. `attention` is the op of a student's layer in training. `step`
is the loss on embeddings, states and scores of a 4-layer student with a 12-layer teacher, forward and backward, in
which ours is called four times. Loss and gradients are checked against float64 before anything is timed. All variants
run in turn in one process.
"""

import argparse
import math

import torch
from timing import interleaved, results_path, write_csv
from torch import Tensor

import fastbert
from fastbert.distill.intermediate import IntermediateLoss
from fastbert.models import BertConfig, BertModel
from fastbert.ops.attention_distillation import attention_distillation
from fastbert.testing import assert_close, run

HEADS, SIZE, TEACHER_SIZE = 12, 26, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    fastbert.keep_memory()
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    tokens = args.sequences * args.length
    cu = torch.arange(0, tokens + 1, args.length, dtype=torch.int32)

    def heads(size: int) -> list[Tensor]:
        return list(torch.randn(tokens, 3, HEADS, size).unbind(1))

    (q, k, v), (teacher_q, teacher_k, _) = heads(SIZE), heads(TEACHER_SIZE)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return attention_distillation(q, k, teacher_q.to(q.dtype), teacher_k.to(q.dtype), cu, args.length)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q, k = (x.unflatten(0, (-1, args.length)).transpose(1, 2) for x in (q, k))
        return q @ k.mT / math.sqrt(q.shape[-1])

    def all_heads(q: Tensor, k: Tensor) -> Tensor:
        return (scores(q, k) - scores(teacher_q.to(q.dtype), teacher_k.to(q.dtype))).square().mean()

    one = torch.ones(())
    wide = run(all_heads, [q.double(), k.double()], one.double())
    results = run(ours, [q, k], one), run(all_heads, [q, k], one), wide
    for what, *values in zip(("loss", "dq", "dk"), *results, strict=True):
        assert_close(*values, what=what)

    dout = torch.randn(tokens, HEADS, SIZE)
    step = whole_step(cu, args.length)
    variants = {
        "ours": lambda: run(ours, [q, k], one),
        "all heads": lambda: run(all_heads, [q, k], one),
        "attention": lambda: run(lambda *x: fastbert.attention(*x, cu, args.length), [q, k, v], dout),
        "step": step,
    }
    rows = []
    for name, stats in interleaved(variants, args.repeats).items():
        print(f"{name:10} {1e3 * stats.median:8.2f} ms")
        rows.append({
            "op": "attention_distillation", "variant": name, "sequences": args.sequences, "length": args.length,
            "ms_p20": 1e3 * stats.p20, "ms": 1e3 * stats.median, "ms_p80": 1e3 * stats.p80,
        })  # fmt: skip
    write_csv(results_path("attention_distillation"), rows)


def whole_step(cu: Tensor, length: int):
    """Forward and backward of TinyBERT's loss; the models are BERT base and TinyBERT's 4 layers of width 312."""
    teacher = BertModel(BertConfig(vocab_size=1000), add_pooling_layer=False).eval().requires_grad_(False)
    small = BertConfig(vocab_size=1000, hidden_size=312, num_hidden_layers=4, intermediate_size=1200)
    student = BertModel(small, add_pooling_layer=False)
    inside = IntermediateLoss.between(student, teacher, "uniform")
    batch = {"input_ids": torch.randint(1000, (int(cu[-1]),)), "cu_seqlens": cu, "max_seqlen": length}
    return lambda: inside.of_batch(student, teacher, batch).backward()


if __name__ == "__main__":
    main()
