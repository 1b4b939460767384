"""How good predictions are, by scikit-learn and SciPy; and a picture of them."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn import metrics


def class_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 as the mean over classes, and Matthews' correlation; of classes int64 [N] each."""
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "f1": float(metrics.f1_score(truth, predicted, average="macro")),
        "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
    }


def number_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, NaN where either is constant, and the root of the mean squared error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        pearson, spearman = stats.pearsonr(truth, predicted)[0], stats.spearmanr(truth, predicted)[0]
    rmse = metrics.root_mean_squared_error(truth, predicted)
    return {"pearson": float(pearson), "spearman": float(spearman), "rmse": float(rmse)}


def better(score: float, than: float | None, metric: str) -> bool:
    """Whether a score is better than the best so far, if any; NaN is worse than any number."""
    if than is None or math.isnan(than):
        return than is None or not math.isnan(score)
    return score < than if metric == "rmse" else score > than


def confusion_picture(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """A PNG: rows are true classes, columns predicted ones; coloured by the share of the row."""
    counts = metrics.confusion_matrix(truth, predicted, labels=range(len(classes)))
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    size = 2.5 + 0.6 * len(classes)
    figure, axes = _figure(size + 1, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(len(classes)), yticks=range(len(classes)), xticklabels=classes, yticklabels=classes)
    axes.tick_params(axis="x", rotation=45 if len(classes) > 3 else 0)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for (row, column), count in np.ndenumerate(counts) if len(classes) <= 20 else ():
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label="share of the true class")
    return _png(figure)


def scatter_picture(truth: np.ndarray, predicted: np.ndarray, title: str) -> bytes:
    """A PNG of predicted over true numbers, and the line on which both are equal."""
    figure, axes = _figure(5, 5)
    axes.scatter(truth, predicted, s=8, alpha=0.4)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="0.4", linestyle="--")
    axes.set(xlabel="true", ylabel="predicted", title=title)
    axes.grid(alpha=0.3)
    return _png(figure)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()
