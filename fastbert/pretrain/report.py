"""What a training run says about itself: a JSON-lines file, TensorBoard, the loss curve as a picture, a summary.

A number that is not finite, as a mean over nothing is, becomes null in files, None in records and "-" on the screen.
"""

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

from fastbert import files

_REST = "what was trained since the newest snapshot is lost: go on with --resume"
Record = dict[str, float | int | None]  # flat, with a "step"


class Metrics:
    """Appends each record to `metrics.jsonl` and, number by number, to TensorBoard's folder beside it.

    Of several processes one `writes`; in the others nothing happens.

    A resumed run continues both after `last_step`, dropping what the interrupted run wrote beyond it. Where its
    `metrics.jsonl` is gone, that is said and a new one begins.

    Raises:
        ValueError: a `metrics.jsonl` that cannot be read. OSError: one that cannot be written; the error names it.
    """

    def __init__(self, folder: Path, last_step: int, writes: bool = True):
        self._writes = writes
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path, self._board_folder = folder / "metrics.jsonl", folder / "tensorboard"
        if last_step and not self.path.exists():
            print(f"{self.path} is missing: training goes on, with records from step {last_step + 1} on alone")
        kept = [record for record in read_metrics(self.path) if record["step"] <= last_step]
        files.write(folder, {self.path.name: "".join(files.json_text(record) + "\n" for record in kept).encode()})
        with files.naming(self.path):
            self._file = self.path.open("a")
        with files.naming(self._board_folder):
            self._board = SummaryWriter(self._board_folder, purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        if not self._writes:
            return
        record = {name: None if not_a_number(value) else value for name, value in record.items()}
        with files.naming(self.path, _REST):
            self._file.write(files.json_text(record) + "\n")
            self._file.flush()
        with files.naming(self._board_folder, _REST):
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if not self._writes:
            return
        try:
            with files.naming(self.path):
                self._file.close()
        finally:
            with files.naming(self._board_folder):
                self._board.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; none where there is no file. A last line cut off by a kill is left out.

    Raises:
        ValueError: another line that is no record; the message names it.
    """
    if not path.exists():
        return []
    with files.naming(path):
        content = path.read_bytes()
    records = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN: not JSON, but once written
            if not (isinstance(record, dict) and isinstance(record["step"], int)):
                raise ValueError("it is no object with a step")
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}): remove that line, or move the file away to go on "
                "without it"
            ) from error
        records.append(record)
    return records


def last_scores(records: list[Record]) -> Record:
    """The held-out scores recorded last; empty where there are none."""
    held_out = [record for record in records if "held_out/mlm_loss" in record]
    return {n.removeprefix("held_out/"): v for n, v in held_out[-1].items() if n != "step"} if held_out else {}


def not_a_number(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def shown(value: float | None, form: str) -> str:
    """`value` formatted, or "-" of the same width where it is not finite."""
    width = form.split(".")[0].strip(",")
    return f"{'-':>{width or 1}}" if not_a_number(value) else f"{value:{form}}"


def summary(scores: Record) -> str:
    """The held-out scores beside what token frequencies reach, for the screen."""
    rows = [
        ("loss, always the frequencies", "frequency_loss", "8.3f"),
        ("loss, this model", "mlm_loss", "8.3f"),
        ("accuracy, this model", "mlm_accuracy", "8.1%"),
    ]
    lines = [f"\nheld-out, predicted tokens    {'all':>8} {'rare':>8}"]
    for title, name, form in rows:
        lines.append(f"{title:29} {shown(scores[name], form)} {shown(scores[f'rare_{name}'], form)}")
    for title, name in (("next sentence: accuracy", "nsp_accuracy"), ("sentence order: accuracy", "sop_accuracy")):
        if name in scores:
            lines.append(f"{title:29} {shown(scores[name], '8.1%')}")
    for side in ("forward", "backward"):
        if f"{side}_perplexity" in scores:
            lines.append(f"{f'perplexity, {side}':29} {shown(scores[f'{side}_perplexity'], '8.1f')}")
    if "seq_len" in scores:
        lines.append(f"{'sequences of up to':29} {scores['seq_len']:8} tokens")
    return "\n".join(lines)


def plot_loss(records: list[Record], path: Path, title: str) -> None:
    """Draws a run over its steps: losses beside that of always predicting token frequencies, accuracy, learning rate.

    A dotted line is where a phase of longer sequences begins. Panels that nothing was recorded for are left out.

    Raises:
        OSError: the picture could not be written; the error names it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    def points(name: str) -> list[tuple[int, float]]:
        return [(record["step"], record[name]) for record in records if not not_a_number(record.get(name))]

    accuracies = [name for name in ("mlm_accuracy", "nsp_accuracy", "sop_accuracy") if points(name)]
    panels = ["loss", *["accuracy"] * bool(accuracies), *["rate"] * bool(points("lr"))]
    figure = Figure(figsize=(8, 3.2 + 1.4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3.5, *[1.4] * (len(panels) - 1)]
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    axes = dict(zip(panels, drawn, strict=True))
    _curve(axes["loss"], points("mlm_loss"), points("held_out/mlm_loss"), "C0", "", ".2f")
    if frequencies := points("held_out/frequency_loss"):
        axes["loss"].axhline(frequencies[-1][1], color="0.4", linestyle="--", label="held-out, token frequencies")
    axes["loss"].set(ylabel="loss (nats per predicted token)", title=title)
    for number, name in enumerate(accuracies):
        what = {"mlm_accuracy": "words, ", "nsp_accuracy": "next sentence, ", "sop_accuracy": "sentence order, "}[name]
        _curve(axes["accuracy"], points(name), points(f"held_out/{name}"), f"C{2 * number}", what, ".0%")
    if "accuracy" in axes:
        axes["accuracy"].set(ylabel="accuracy", ylim=(0, None))
        axes["accuracy"].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2 * len(accuracies), "frameon": False}
        axes["accuracy"].legend(fontsize=8, **above)
    if "rate" in axes:
        axes["rate"].plot(*zip(*points("lr"), strict=True), color="0.3")
        axes["rate"].set(ylabel="learning rate", ylim=(0, None))
        axes["rate"].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if axes["loss"].get_legend_handles_labels()[0]:
        axes["loss"].legend()
    longer = [step for (_, before), (step, after) in itertools.pairwise(points("seq_len")) if after > before]
    for each in drawn:
        each.grid(alpha=0.3)
        for step in longer:
            each.axvline(step, color="0.4", linestyle=":")
    drawn[-1].set(xlabel="step")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    files.write(path.parent, {path.name: picture.getvalue()})


def _curve(
    axes: Any, training: list[tuple[int, float]], held_out: list[tuple[int, float]], color: str, what: str, form: str
) -> None:
    """Training, as it was and smoothed, and held-out values, of which the last one is written beside its point."""
    other = f"C{int(color[1:]) + 1}"
    if training:
        axes.plot(*zip(*training, strict=True), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(training), strict=True), color=color, label=f"{what}training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=other, markersize=4, label=f"{what}held-out")
        beside = (0, 6) if form.endswith("%") else (0, -14)  # losses fall, accuracies rise
        last = f"{held_out[-1][1]:{form}}"
        axes.annotate(last, held_out[-1], beside, color=other, ha="right", textcoords="offset points")


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean over about a fiftieth of the points, its start not pulled towards zero."""
    decay = 1 - 1 / max(1.0, len(points) / 50)
    mean = weight = 0.0
    smoothed = []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed
