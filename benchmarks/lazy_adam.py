"""LazyAdam against torch.optim.SparseAdam, AdamW(fused=True) and FBGEMM on embedding tables, and on dense tensors.

    python benchmarks/lazy_adam.py [--case 30522,768,4096] [--allocator default] [--repeats 20] [--device cuda]

Token ids follow Zipf's law; every step has another batch and a gradient fresh from backward, for every variant.
Measured are `step()` alone and forward + backward + step; one plot has the cost of `step()` over the vocabulary. GB/s
are of the bytes that must move at least: weight and both moments of the R touched rows in and out, 24*R*D, and n
gradient rows in, 4*n*D. All variants run in turn in one process under one setting of the allocator: "keep", as
`fastbert.keep_memory` sets it, or "default". Each has its own table; LazyAdam is checked against float64 first.

FBGEMM's CPU backend has no Adam; the nearest is row-wise Adagrad, fused into backward, which moves less than half the
bytes. It takes part where it is installed (`pip install fbgemm-gpu-cpu`, in the version that goes with torch).
"""

import argparse

import matplotlib.pyplot as plt
import torch
from timing import Stats, interleaved, results_path, write_csv
from torch import nn

import fastbert
from fastbert.bench import peers, tables
from fastbert.bench.tables import ADAGRAD, LR, OPTIMIZERS, Fbgemm, Training, trainings, zipf_batches

CASES = ["30522,768,4096", "30522,768,16384", "1000000,128,65536", "119547,768,8192"]  # vocabulary, width, tokens
VOCABULARIES = [30_522, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]  # of the plot,
WIDTH, TOKENS = 32, 4096  # with these
REPLAY = "LazyAdam replay"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"vocabulary,width,tokens; default: {' '.join(CASES)}")
    parser.add_argument("--allocator", choices=["keep", "default"], default="keep")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU")
    parser.add_argument("--no-plot", action="store_true", help="leave out the vocabularies up to ten million (15 GB)")
    parser.add_argument("--no-bert", action="store_true", help="leave out the dense tensors of BERT base")
    args = parser.parse_args()
    if args.allocator == "keep" and not fastbert.keep_memory():
        raise SystemExit("the allocator's setting could not be changed here: pass --allocator default")
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    rows = []
    for case in args.case or CASES:
        rows += table_case(*(int(number) for number in case.split(",")), args.repeats)
    if not args.no_bert:
        rows += dense_case(torch.float32, args.repeats) + dense_case(torch.bfloat16, args.repeats)
    path = results_path("lazy_adam", *([] if args.allocator == "keep" else ["default-allocator"]))
    if not args.no_plot:
        measured = {vocabulary: vocabulary_case(vocabulary, args.repeats) for vocabulary in VOCABULARIES}
        rows += [row for its in measured.values() for row in its]
        plot(measured, path.with_suffix(".png"))
    write_csv(path, [{**row, "allocator": args.allocator} for row in rows])


# ---- embedding tables ------------------------------------------------------------------------------------------------


def table_case(vocabulary: int, width: int, tokens: int, repeats: int) -> list[dict[str, object]]:
    batches = zipf_batches(vocabulary, tokens)
    made, floor = trainings(vocabulary, width, batches), tables.touched_bytes(width, batches)
    touched = sum(ids.unique().numel() for ids in batches) // len(batches)
    name = f"{vocabulary:,} x {width}, {tokens:,} tokens, {touched:,} rows, at least {floor / 1e6:.0f} MB"
    tables.verify(vocabulary, width, batches[0])
    rows = step_alone(name, made, repeats, floor)

    table, target = nn.Embedding(vocabulary, width, sparse=True), made["LazyAdam"].target
    made[REPLAY] = Training(table, batches, target)
    made[REPLAY].optimizer = replaying = fastbert.LazyAdam(table.parameters(), lr=LR, missed="replay")
    replaying.attach(table)
    why = peers.why_not(peers.FBGEMM, torch.get_default_device().type)
    if why is None:
        made[ADAGRAD] = Fbgemm(vocabulary, width, batches, target)
    else:
        print(f"FBGEMM is left out: {why}")
    return rows + report(f"{name}: forward + backward + step", interleaved(made, repeats), None)


def step_alone(name: str, made: dict[str, Training], repeats: int, floor: int | None) -> list[dict[str, object]]:
    steps = {label: training.step for label, training in made.items()}
    fresh = {label: training.backward for label, training in made.items()}
    return report(f"{name}: step()", interleaved(steps, repeats, before=fresh), floor)


# ---- cost over the size of the vocabulary ----------------------------------------------------------------------------


def vocabulary_case(vocabulary: int, repeats: int) -> list[dict[str, object]]:
    name = f"{vocabulary:,} x {WIDTH}, {TOKENS:,} tokens"
    made = trainings(vocabulary, WIDTH, zipf_batches(vocabulary, TOKENS))
    rows = step_alone(name, made, min(repeats, 10), None)
    return [{**row, "vocabulary": vocabulary} for row in rows]


def plot(measured: dict[int, list[dict[str, object]]], path: str) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for label in OPTIMIZERS:
        points = [row for rows in measured.values() for row in rows if row["variant"] == label]
        middle, low, high = ([1e3 * row[key] for row in points] for key in ("median_s", "p20_s", "p80_s"))
        (line,) = axes.loglog(list(measured), middle, marker="o", label=label)
        axes.fill_between(list(measured), low, high, alpha=0.2, color=line.get_color())
    axes.set(
        xlabel="rows of the table",
        ylabel="step(), milliseconds",
        title=f"Cost of a step over the vocabulary: {TOKENS:,} tokens, width {WIDTH}",
    )
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


# ---- dense tensors ---------------------------------------------------------------------------------------------------


def dense_case(dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """All of BERT base. In bfloat16 torch keeps its state in bfloat16 too: 14 bytes per number against our 22."""
    layer = [(768, 768), (768,)] * 4 + [(768,)] * 4 + [(3072, 768), (3072,), (768, 3072), (768,)]
    shapes = [(30522, 768), (512, 768), (2, 768), (768,), (768,), *layer * 12, (768, 768), (768,)]
    params = [nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    elements = sum(param.numel() for param in params)
    variants = {
        "AdamW fused": torch.optim.AdamW(params, lr=LR, fused=True).step,
        "LazyAdam": fastbert.LazyAdam(params, lr=LR, weight_decay=1e-2).step,
    }
    kind = f"{dtype}".removeprefix("torch.")
    name = f"BERT base, {len(params)} dense {kind} tensors, {elements / 1e6:.0f} M numbers: step()"
    return report(name, interleaved(variants, repeats, 2), (28 if dtype == torch.float32 else 22) * elements)


def report(name: str, measured: dict[str, Stats], floor: int | None) -> list[dict[str, object]]:
    """Prints a table and returns its rows."""
    print(f"\n{name}\n{'':16}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'ours is':>10}")
    ours, rows = measured["LazyAdam"].median, []
    for label, stats in measured.items():
        rate = f"{floor / stats.median / 1e9:.1f}" if floor else ""
        times = "".join(f"{1e3 * seconds:9.2f}" for seconds in (stats.median, stats.p20, stats.p80))
        print(f"{label:16}{times}{rate:>8}{stats.median / ours:>9.1f}x", flush=True)
        row = {"case": name, "variant": label, "median_s": stats.median, "p20_s": stats.p20, "p80_s": stats.p80}
        rows.append({**row, "floor_bytes": floor or "", "times_ours": round(stats.median / ours, 2)})
    return rows


if __name__ == "__main__":
    main()
