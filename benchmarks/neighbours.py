"""A training step on a machine that others use too: how threads wait for each other, beside 0, 1 and 2 busy processes.

    python benchmarks/neighbours.py [--rounds 5] [--quick]

OpenMP reads how threads wait when torch is loaded, so every way of waiting is a process of its own: as the runtime has
it, and as the commands of `fastbert` set it (`fastbert_main.WAITING`). Each trains a tiny BERT (2 layers of 128, 2,048
tokens, vocabulary 8,192, float32, dropout 0.1) by the step of `benchmarks/pretrain.py`: ours, or transformers' eager
one. The processes start once, and take their turns within every round; one that is not measured sleeps. A neighbour is
a process that counts for ever. Their number goes from 0 up, so that nothing of one is left when fewer are wanted.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from fastbert_main import INTELS, WAITING

OURS, THEIRS = "fastbert", "transformers"
NEIGHBOURS = 0, 1, 2
UNSET = "as the runtime has it"
WAYS = {UNSET: {}, " ".join(f"{name}={value}" for name, value in WAITING.items()): WAITING}


def serve(name: str) -> None:
    """Answers each line of standard input, a number of seconds, with the seconds of the steps that it took in them."""
    import torch
    from pretrain import make_batch, models, step, verify

    import fastbert
    from fastbert.models.bert import BertConfig

    fastbert.keep_memory()
    torch.manual_seed(0)
    config = BertConfig.preset("tiny", vocab_size=8192)
    batch = make_batch(32, 64, 8192, torch.Generator().manual_seed(0), shortest=64)
    ours, theirs = models(config, "sdpa", "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        verify(ours, theirs, batch, torch.float32)
    model, inputs, rows = (ours, batch.packed, "all") if name == OURS else (theirs, batch.padded, "")
    call = step(model, model, [inputs], torch.float32, rows)
    for _ in range(3):
        call()
    print(batch.tokens, flush=True)
    for line in sys.stdin:
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < float(line):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        print(json.dumps(taken), flush=True)


@contextlib.contextmanager
def server(name: str, waiting: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process that trains, its threads waiting as these variables say."""
    environment = {key: value for key, value in os.environ.items() if key not in (*WAITING, *INTELS)}
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", name], env=environment | waiting, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with ended(process):
        yield process


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended that was to train: {' '.join(process.args)} says why")
    return line


def measure(seconds: float, rounds: int) -> tuple[int, dict[tuple[str, str, int], list[float]]]:
    """Tokens of a step, and its seconds by (implementation, how threads wait, neighbours)."""
    taken: dict[tuple[str, str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {
            (name, way): stack.enter_context(server(name, waiting))
            for way, waiting in WAYS.items()
            for name in (OURS, THEIRS)
        }
        tokens = {int(answer(process)) for process in servers.values()}
        for neighbours in NEIGHBOURS:
            if neighbours:
                stack.enter_context(ended(subprocess.Popen([sys.executable, "-c", "while True: pass"])))
            for round_ in range(rounds):
                order = list(servers.items())
                for key, process in order[round_ % len(order) :] + order[: round_ % len(order)]:
                    process.stdin.write(f"{seconds}\n")
                    process.stdin.flush()
                    taken.setdefault((*key, neighbours), []).extend(json.loads(answer(process)))
    return tokens.pop(), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn; two steps at least")
    parser.add_argument("--quick", action="store_true", help="one short round, no CSV: does it run?")
    parser.add_argument("--serve", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.quick:
        options.rounds, options.seconds = 1, 0.1
    tokens, taken = measure(options.seconds, options.rounds)
    rows = []
    print(f"{'':<14}{'neighbours':>11}{'p20':>9}{'median':>9}{'p80':>9} ms{'x unset':>9}  threads wait")
    for neighbours, name, way in itertools.product(NEIGHBOURS, (OURS, THEIRS), WAYS):
        seconds = taken[name, way, neighbours]
        p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        median = statistics.median(seconds)
        unset = statistics.median(taken[name, UNSET, neighbours])
        times = "".join(f"{1e3 * x:>9.1f}" for x in (p20, median, p80))
        print(f"{name:<14}{neighbours:>11}{times}   {unset / median:>9.2f}  {way}")
        rows.append({
            "implementation": name, "neighbours": neighbours, "waiting": way, "p20_s": p20, "median_s": median,
            "p80_s": p80, "steps": len(seconds), "tokens": tokens, "times_unset": unset / median,
        })  # fmt: skip
    if not options.quick:
        from timing import results_path, write_csv

        write_csv(results_path("neighbours"), rows)


if __name__ == "__main__":
    main()
