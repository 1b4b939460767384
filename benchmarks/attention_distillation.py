"""Comparing attention scores, forward and backward: ours, torch's products, attention, and a whole step.

    python benchmarks/attention_distillation.py [--sequences 32] [--shortest 16] [--length 128] [--repeats 20]
                                                [--dtypes float32 bfloat16] [--step] [--device cpu]

A packed batch of sequences of the shortest to the given length, a student with 12 heads of 26 numbers (TinyBERT's width
312) or of 64, and a teacher with 12 of 64 (BERT base). `plain PyTorch` is the twin: products of a head at a time on a
padded batch. `all heads` makes all scores [B, N, S, S] of a layer, which autograd keeps. `attention` is the op of a
student's layer in training. With --step, `step` is the loss on embeddings, states and scores of a 4-layer student of
width 312 with a 12-layer teacher, forward and backward, in which ours is called four times. Loss and gradients are
checked against float64 before anything is timed. All variants run in turn in one process.
"""

import argparse
import math
from collections.abc import Callable

import torch
from timing import interleaved, results_path, write_csv
from torch import Tensor

import fastbert
from fastbert.distill.intermediate import IntermediateLoss
from fastbert.models import BertConfig, BertModel
from fastbert.ops.attention import Padding
from fastbert.testing import assert_close, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS, SIZES, TEACHER_SIZE = 12, (26, 64), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--step", action="store_true", help="also a whole step, which takes seconds")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    fastbert.keep_memory()
    torch.manual_seed(0)
    lengths = torch.randint(args.shortest, args.length + 1, (args.sequences,))
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(args.device)
    torch.set_default_device(args.device)
    rows = []
    for size in SIZES:
        for dtype in args.dtypes:
            variants = compared(cu, args.length, size, DTYPES[dtype])
            if args.step and size == SIZES[0] and dtype == "float32":
                variants["step"] = whole_step(cu, args.length)
            stats = interleaved(variants, args.repeats)
            for name, taken in stats.items():
                ratio = taken.median / stats["ours"].median
                print(f"{size} of {TEACHER_SIZE}, {dtype:8}  {name:14} {1e3 * taken.median:8.2f} ms {ratio:6.2f}x")
                rows.append({
                    "op": "attention_distillation", "variant": name, "dtype": dtype, "head_size": size,
                    "teacher_head_size": TEACHER_SIZE, "sequences": args.sequences, "tokens": int(cu[-1]),
                    "length": f"{args.shortest} to {args.length}", "ms_p20": round(1e3 * taken.p20, 3),
                    "ms": round(1e3 * taken.median, 3), "ms_p80": round(1e3 * taken.p80, 3),
                    "time_over_ours": round(ratio, 2),
                })  # fmt: skip
    write_csv(results_path("attention_distillation"), rows)


def compared(cu: Tensor, longest: int, size: int, dtype: torch.dtype) -> dict[str, Callable]:
    """The variants for one student, checked."""
    tokens = int(cu[-1])
    q, k, v = torch.randn(tokens, 3, HEADS, size).to(dtype).unbind(1)
    teacher_q, teacher_k, _ = torch.randn(tokens, 3, HEADS, TEACHER_SIZE).to(dtype).unbind(1)
    layout, pairs = Padding(cu, longest, tokens), HEADS * cu.diff().double().square().sum().item()

    def ours(q: Tensor, k: Tensor, backend: str | None = None) -> Tensor:
        theirs = teacher_q.to(q.dtype), teacher_k.to(q.dtype)
        return fastbert.attention_distillation(q, k, *theirs, cu, longest, backend=backend)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return ours(q, k, "reference")

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return layout.pad(q) @ layout.pad(k).mT / math.sqrt(q.shape[-1])

    def all_heads(q: Tensor, k: Tensor) -> Tensor:
        return (scores(q, k) - scores(teacher_q, teacher_k)).square().sum() / pairs

    one = torch.ones(())
    wide = run(plain, [q.double(), k.double()], one.double())
    for function in (ours, all_heads):
        results = run(function, [q, k], one), run(plain, [q, k], one), wide
        for what, *values in zip(("loss", "dq", "dk"), *results, strict=True):
            assert_close(*values, what=what)
    dout = torch.randn(tokens, HEADS, size)
    return {
        "ours": lambda: run(ours, [q, k], one),
        "plain PyTorch": lambda: run(plain, [q, k], one),
        "all heads": lambda: run(all_heads, [q, k], one),
        "attention": lambda: run(lambda *x: fastbert.attention(*x, cu, longest), [q, k, v], dout),
    }


def whole_step(cu: Tensor, longest: int) -> Callable[[], None]:
    """Forward and backward of TinyBERT's loss; the models are BERT base and TinyBERT's 4 layers of width 312."""
    teacher = BertModel(BertConfig(vocab_size=1000), add_pooling_layer=False).eval().requires_grad_(False)
    small = BertConfig(vocab_size=1000, hidden_size=312, num_hidden_layers=4, intermediate_size=1200)
    student = BertModel(small, add_pooling_layer=False)
    inside = IntermediateLoss.between(student, teacher, "uniform")
    batch = {"input_ids": torch.randint(1000, (int(cu[-1]),)), "cu_seqlens": cu, "max_seqlen": longest}
    return lambda: inside.of_batch(student, teacher, batch).backward()


if __name__ == "__main__":
    main()
