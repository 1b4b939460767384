"""A run whose numbers are no longer finite ends, before anything of it is written."""

import math
from typing import Any

import torch
from torch import Tensor

from fastbert.pretrain import snapshot
from fastbert.pretrain.processes import ALONE, Processes
from fastbert.pretrain.settings import PretrainConfig


class Watch:
    """Raises ValueError, which says step, numbers and what to lower, for what is not finite.

    On a CPU every step is looked at before the optimizer takes it. Any other device would have to be waited for: there
    the numbers of the first step that was not finite stay on the device until `look` fetches them, which the loop calls
    where it waits anyway, at log lines, and before it evaluates, takes a snapshot or ends. Steps in between are lost
    with the run; nothing of them is written.
    """

    def __init__(self, config: PretrainConfig):
        self.config = config
        self.every_step = torch.device(config.device).type == "cpu"
        # Step, loss and gradient norm of the latest step, or of the first bad one; in one place, for captured steps.
        self._numbers = torch.zeros(3, dtype=torch.float64, device=config.device)

    def see(self, step: int | Tensor, loss: Tensor, norm: Tensor) -> None:
        """Before step `step`, counted from 1: its loss and gradient norm, scalars of one device."""
        step = step if isinstance(step, Tensor) else torch.full_like(norm, step)
        numbers = torch.stack([step.double(), loss.double(), norm.double()])
        are_finite = self._numbers.sum() * 0 == 0  # in few kernels; float64 does not overflow here
        torch.where(are_finite, numbers, self._numbers, out=self._numbers)
        if self.every_step:
            self.look()

    def look(self) -> None:
        """Raises where a step seen so far was not finite; waits for the device."""
        step, loss, norm = self._numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(int(step), f"its loss is {loss:g} and its gradient norm {norm:g}")

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Held-out scores after step `step`; a mean over no token at all, NaN beside NaN, is none of the model's."""
        for name, other in (("mlm_loss", "frequency_loss"), ("rare_mlm_loss", "rare_frequency_loss")):
            if math.isfinite(scores[other]) and not math.isfinite(scores[name]):
                raise self._diverged(step, f"the held-out {name} after it is {scores[name]:g}")
        for name in ("nsp_loss", "sop_loss"):
            if not math.isfinite(scores.get(name, 0.0)):
                raise self._diverged(step, f"the held-out {name} after it is {scores[name]:g}")

    def state(self, step: int, state: dict[str, Any], processes: Processes = ALONE) -> None:
        """What a snapshot after step `step` is to hold; where processes hold different parts, all look at theirs."""
        name = next(filter(None, processes.gathered(snapshot.not_finite(state))), None)
        if name is not None:
            raise self._diverged(step, f"{name} after it is not finite")

    def _diverged(self, step: int, what: str) -> ValueError:
        config = self.config
        known = snapshot.steps(config.output / "snapshots")
        of = "" if config.steps is None else f" of {config.steps}"
        kept = f"the snapshot of step {known[-1]} is kept" if known else "no snapshot was taken before"
        return ValueError(
            f"the run diverged at step {step}{of}: {what}. Nothing of it was written, {kept}. Start a "
            f"new run in another --output with a lower --lr (now {config.lr:g}), a longer --warmup (now "
            f"{config.warmup:g}) or a smaller --clip (now {config.clip:g})"
        )
