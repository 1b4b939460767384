"""Tokens per second of a BERT encoder in evaluation: ours against transformers' BertModel, eager and compiled.

    python benchmarks/inference.py [--quick] [--layers 12] [--batch 32] [--seq-len 128] [--shortest 32] ...

A ragged batch, its lengths evenly spaced from `shortest` to `seq_len`, in float32 and in bfloat16 autocast, under
torch.inference_mode; only real tokens are counted. transformers gets it padded to [B, S] with a mask, which is what it
takes, and its shape never changes, so torch.compile specialises it fully. "fastbert" gets the same padded batch and
removes the padding itself, "fastbert packed" the real tokens alone, and so does "fastbert frozen", whose weights
`fastbert.freeze` has rearranged. All have the same random weights and memory allocator setting; the outputs at real
tokens are compared before anything is timed. Variants run in turn in one process.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from ragged import DTYPES, draw_lengths, parse, parser
from timing import interleaved, machine, results_path, write_csv
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert.models.bert import BertConfig, BertModel

VARIANTS = ("fastbert", "fastbert packed", "fastbert frozen", "transformers eager", "transformers compiled")


def make_batch(options: argparse.Namespace) -> tuple[dict, dict, Tensor]:
    """The same random words padded and packed, and where the real ones stand, [B, S]."""
    lengths = draw_lengths(options)
    real = torch.arange(options.seq_len) < lengths[:, None]
    ids = torch.randint(1, options.vocab_size, real.shape) * real
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed = {"input_ids": ids[real], "cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}
    return {"input_ids": ids, "attention_mask": real.long()}, packed, real


def calls(options: argparse.Namespace, padded: dict, packed: dict) -> tuple[dict, torch.nn.Module]:
    """Name -> one forward pass by dtype, whose last hidden state is [B, S, H] or packed [T, H]; and theirs."""
    config = BertConfig.preset(
        options.preset,
        num_hidden_layers=options.layers,
        vocab_size=options.vocab_size,
        max_position_embeddings=max(512, options.seq_len),
    )
    ours = BertModel(config).eval()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.BertModel.from_pretrained(folder, attn_implementation=options.attention).eval()
    compiled = torch.compile(theirs, dynamic=False)
    frozen = {dtype: fastbert.freeze(copy.deepcopy(ours), dtype) for dtype in DTYPES.values()}
    chosen = {
        "fastbert": lambda dtype: ours(**padded),
        "fastbert packed": lambda dtype: ours(**packed),
        "fastbert frozen": lambda dtype: frozen[dtype](**packed),
        "transformers eager": lambda dtype: theirs(**padded),
        "transformers compiled": lambda dtype: compiled(**padded),
    }
    return {name: chosen[name] for name in options.variants}, theirs


def under(dtype: torch.dtype, call: Callable[[torch.dtype], Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return call(dtype).last_hidden_state

    return run


def verify(chosen: dict, theirs: torch.nn.Module, padded: dict, dtype: torch.dtype, real: Tensor) -> None:
    """Stops the benchmark where a variant is further from transformers in float32 than its model cast to dtype is.

    Not than its autocast: that keeps LayerNorm's output, and so the residual stream, in float32; ours is in bfloat16.
    """
    with torch.inference_mode():
        truth, cast = (m(**padded).last_hidden_state[real] for m in (theirs, copy.deepcopy(theirs).to(dtype)))
    allowed = 2 * (cast.float() - truth).abs().max().item() + 1e-4
    for name, call in chosen.items():
        out = under(dtype, call)()
        error = ((out if out.dim() == 2 else out[real]).float() - truth).abs().max().item()
        if not error <= allowed:
            raise SystemExit(f"{dtype}: {name} is off by {error:.2e}, allowed {allowed:.2e}: nothing is timed")
        print(f"{dtype}: {name} is off by {error:.2e}, allowed {allowed:.2e}")


def main() -> None:
    arguments = parser(__doc__, VARIANTS, shortest=32, repeats=10)
    arguments.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers")
    options = parse(arguments)
    kept = fastbert.keep_memory()
    torch.manual_seed(0)
    padded, packed, real = make_batch(options)
    tokens = int(real.sum())
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, memory kept: {kept}")
    print(
        f"BERT {options.preset}, {options.layers} layers; {options.batch} x {options.seq_len}, "
        f"{tokens / real.numel():.0%} real tokens"
    )
    chosen, theirs = calls(options, padded, packed)
    rows = []
    for name in options.dtype:
        verify(chosen, theirs, padded, DTYPES[name], real)
        stats = interleaved({n: under(DTYPES[name], call) for n, call in chosen.items()}, options.repeats, warmup=2)
        slowest = stats.get("transformers eager", next(iter(stats.values())))
        print(f"\n{name:<24}{'p20':>9}{'median':>9}{'p80':>9} ms{'tokens/s':>12}{'x eager':>9}")
        for variant, s in stats.items():
            speed, ratio = tokens / s.median, slowest.median / s.median
            times = "".join(f"{1e3 * x:>9.1f}" for x in (s.p20, s.median, s.p80))
            print(f"{variant:<24}{times}   {speed:>12,.0f}{ratio:>9.2f}", flush=True)
            rows.append({
                "variant": variant, "dtype": name, "p20_s": s.p20, "median_s": s.median, "p80_s": s.p80,
                "tokens": tokens, "tokens_per_s": speed, "times_transformers_eager": ratio, "preset": options.preset,
                "layers": options.layers, "batch": options.batch, "seq_len": options.seq_len,
                "shortest": options.shortest, "vocab_size": options.vocab_size, "repeats": options.repeats,
                "attention": options.attention, "memory_kept": kept, "transformers": transformers.__version__,
            })  # fmt: skip
    if not options.quick:
        write_csv(results_path("inference", *options.dtype), rows)


if __name__ == "__main__":
    main()
