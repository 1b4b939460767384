"""LazyAdam against torch.optim.SparseAdam and AdamW(fused=True) on embedding tables, and on BERT base's dense tensors.

    python benchmarks/lazy_adam.py [--case 30522,768,4096] [--compile] [--repeats 20]

Token ids follow Zipf's law. Two measurements per table: `step()` alone on a gradient that is there, and forward +
backward + step from a loss. GB/s are of the bytes that must move at least: weight and both moments of the R touched
rows in and out, 24*R*D, and n gradient rows in, 4*n*D. All variants run in one process that keeps freed memory
(`fastbert.keep_memory`), each on its own table, and are checked against float64 before they are timed.
"""

import argparse

import torch
from timing import Stats, interleaved, results_path, write_csv
from torch import Tensor, nn

import fastbert

CASES = ["30522,768,4096", "30522,768,16384", "1000000,128,65536", "119547,768,8192"]  # vocabulary, width, tokens
LR = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"vocabulary,width,tokens; default: {' '.join(CASES)}")
    parser.add_argument("--compile", action="store_true", help="also torch.compile'd AdamW (compiles for a while)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-bert", action="store_true", help="leave out the dense tensors of BERT base")
    args = parser.parse_args()
    if not fastbert.keep_memory():
        print("the allocator's setting could not be changed: steps that allocate pay for fresh pages")
    torch.manual_seed(0)
    rows = []
    for case in args.case or CASES:
        vocabulary, width, tokens = (int(number) for number in case.split(","))
        rows += table_case(vocabulary, width, tokens, args)
    if not args.no_bert:
        rows += bert_case(args)
    write_csv(results_path("lazy_adam"), rows)


# ---- embedding tables ----------------------------------------------------------------------------------------------


def zipf_ids(vocabulary: int, tokens: int) -> Tensor:
    """Ids whose frequency falls as 1 / rank, the ranks scattered over the table."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    places = torch.searchsorted(weights.cumsum(0) / weights.sum(), torch.rand(tokens, dtype=torch.float64))
    return torch.randperm(vocabulary)[places.clamp(max=vocabulary - 1)]


def table_case(vocabulary: int, width: int, tokens: int, args: argparse.Namespace) -> list[dict[str, object]]:
    ids = zipf_ids(vocabulary, tokens)
    touched = ids.unique().numel()
    floor = (24 * touched + 4 * tokens) * width
    name = f"{vocabulary:,} x {width}, {tokens:,} tokens, {touched:,} rows, at least {floor / 1e6:.0f} MB"
    verify(vocabulary, width, ids)

    # Loss weights that differ by token: gradient rows of one id are not equal.
    target = torch.randn(tokens, width)
    makers = {
        "SparseAdam": (True, lambda p: torch.optim.SparseAdam(p, lr=LR)),
        "AdamW fused": (False, lambda p: torch.optim.AdamW(p, lr=LR, fused=True)),
        "LazyAdam": (True, lambda p: fastbert.LazyAdam(p, lr=LR)),
    }
    if args.compile:
        makers["AdamW compiled"] = (False, lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR)))
    alone, whole = {}, {}
    for label, (sparse, make) in makers.items():
        table = nn.Embedding(vocabulary, width, sparse=sparse)
        optimizer = make(table.parameters())
        step = torch.compile(optimizer.step) if label == "AdamW compiled" else optimizer.step

        def backward(table: nn.Embedding = table) -> None:
            (table(ids) * target).sum().backward()

        def train(table: nn.Embedding = table, step=step, backward=backward) -> None:
            table.zero_grad()
            backward(table)
            step()

        backward()
        alone[label], whole[label] = step, train
    return report(f"{name}: step()", interleaved(alone, args.repeats), floor) + report(
        f"{name}: forward + backward + step", interleaved(whole, args.repeats), None
    )


def verify(vocabulary: int, width: int, ids: Tensor) -> None:
    """One step of LazyAdam against AdamW in float64 on the touched rows alone; the others must keep their bits."""
    table = nn.Embedding(vocabulary, width, sparse=True)
    before = table.weight.detach().clone()
    touched, place = ids.unique(return_inverse=True)
    truth = before[touched].double().requires_grad_()
    target = torch.randn(ids.numel(), width)
    (table(ids) * target).sum().backward()
    (truth[place] * target.double()).sum().backward()
    fastbert.LazyAdam(table.parameters(), lr=LR, weight_decay=0.1).step()
    torch.optim.AdamW([truth], lr=LR, weight_decay=0.1).step()
    after = table.weight.detach()
    # The first step is lr * g / (|g| + eps): where a sum of duplicates nearly cancels it depends on its last bits.
    off = (after[touched].double() - truth.detach()).abs()
    assert off.mean() < 1e-6 and off.max() < 2 * LR, f"LazyAdam is off by {off.max():.1e}"
    after[touched] = before[touched]
    assert torch.equal(after, before), "rows that were not touched changed"


# ---- dense tensors -------------------------------------------------------------------------------------------------


def bert_case(args: argparse.Namespace) -> list[dict[str, object]]:
    layer = [(768, 768), (768,)] * 4 + [(768,)] * 4 + [(3072, 768), (3072,), (768, 3072), (768,)]
    shapes = [(30522, 768), (512, 768), (2, 768), (768,), (768,), *layer * 12, (768, 768), (768,)]
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    elements = sum(param.numel() for param in params)
    variants = {
        "AdamW fused": torch.optim.AdamW(params, lr=LR, fused=True).step,
        "LazyAdam": fastbert.LazyAdam(params, lr=LR, weight_decay=1e-2).step,
    }
    name = f"BERT base, {len(params)} dense tensors, {elements / 1e6:.0f} M numbers: step()"
    return report(name, interleaved(variants, min(args.repeats, 10), 2), 28 * elements)


def report(name: str, measured: dict[str, Stats], floor: int | None) -> list[dict[str, object]]:
    """Prints a table and returns its rows."""
    print(f"\n{name}\n{'':16}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'ours is':>10}")
    ours, rows = measured["LazyAdam"].median, []
    for label, stats in measured.items():
        rate = f"{floor / stats.median / 1e9:.1f}" if floor else ""
        times = "".join(f"{1e3 * seconds:9.2f}" for seconds in (stats.median, stats.p20, stats.p80))
        print(f"{label:16}{times}{rate:>8}{stats.median / ours:>9.1f}x")
        row = {"case": name, "variant": label, "median_s": stats.median, "p20_s": stats.p20, "p80_s": stats.p80}
        rows.append({**row, "floor_bytes": floor or "", "times_ours": round(stats.median / ours, 2)})
    return rows


if __name__ == "__main__":
    main()
