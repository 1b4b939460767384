"""What benchmarks of a whole encoder share: their options, and the lengths of a ragged batch."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.models.bert import BertConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str, variants: Sequence[str], shortest: int, repeats: int) -> argparse.ArgumentParser:
    """With the size of the encoder and its batch, and what is timed; the last two are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    sizes = {"choices": list(BertConfig.presets), "help": "width, heads and feed-forward size"}
    parser.add_argument("--preset", default="base", **sizes)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--shortest", type=int, default=shortest, help="tokens of the shortest sequence")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--quick", action="store_true", help="tiny model, three repeats, no CSV: does it run?")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.quick:
        options.preset, options.layers, options.vocab_size, options.repeats = "tiny", 2, 2000, 3
    return options


def draw_lengths(options: argparse.Namespace) -> Tensor:
    """int64 [batch], evenly spaced from `shortest` to `seq_len`, in random order."""
    lengths = torch.linspace(options.shortest, options.seq_len, options.batch).round().long()
    return lengths[torch.randperm(options.batch)]
