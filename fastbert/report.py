"""What a training run says about itself: a JSON-lines file, TensorBoard, and the loss curve as a picture."""

import json
from pathlib import Path

from fastbert import files


class Metrics:
    """Appends each record to `metrics.jsonl` and, number by number, to TensorBoard's folder beside it.

    A record is a flat dict with a "step"; a resumed run continues both after `last_step`, dropping what the interrupted
    run wrote beyond it.
    """

    def __init__(self, folder: Path, last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= last_step]
        files.write(folder, {self.path.name: "".join(json.dumps(record) + "\n" for record in kept).encode()})
        self._file = self.path.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)

    def write(self, record: dict[str, float | int]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """The records of a `metrics.jsonl`; none where there is no file. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def plot_loss(records: list[dict[str, float | int]], path: Path, title: str) -> None:
    """Draws training and held-out MLM loss over steps, beside the loss of always predicting token frequencies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(r["step"], r["mlm_loss"]) for r in records if "mlm_loss" in r]
    held_out = [r for r in records if "held_out/mlm_loss" in r]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), color="C0", alpha=0.3, linewidth=0.8, label="training, one step")
    axes.plot(*zip(*_smooth(training), strict=True), color="C0", label="training, smoothed")
    axes.plot(
        [r["step"] for r in held_out], [r["held_out/mlm_loss"] for r in held_out], "o-", color="C1", label="held-out"
    )
    axes.axhline(
        held_out[-1]["held_out/frequency_loss"], color="0.4", linestyle="--", label="held-out, token frequencies"
    )
    last = held_out[-1]
    axes.annotate(
        f"{last['held_out/mlm_loss']:.2f}", (last["step"], last["held_out/mlm_loss"]), (0, -14), color="C1", ha="right",
        textcoords="offset points",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="MLM loss (nats per masked token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean over about a fiftieth of the points, its start not pulled towards zero."""
    decay = 1 - 1 / max(1.0, len(points) / 50)
    mean = weight = 0.0
    smoothed = []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed
