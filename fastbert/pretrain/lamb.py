"""LAMB for very large batches (You et al., "Large batch optimization for deep learning", 2020), of `pytorch_optimizer`.

Adam's step of each matrix, weight decay included, is scaled to the norm of the matrix, so that batches of tens of
thousands of sequences train as small ones do. The library's options are set to what the paper has:

- `weight_decouple=False` adds weight decay to the step before its norm is taken, as the paper's algorithm does; the
  library's default decays weights beside it, unscaled.
- `adam_debias=True`: no bias correction, as in the paper's third version. The library's default divides the step, which
  has the norm of the matrix already, by 1 - 0.9 ** step: the first step would be ten times as long.
- Biases and LayerNorm have neither weight decay nor the scaling (`adam=True`), as in the paper's program for BERT.
- Gradients are clipped by us, before (`pre_norm=False`).
- The norm of a matrix counts as 10 at most, the library's bound, which is fixed; word embeddings reach it.
"""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastbert import extras
from fastbert.models.pretraining import PreTrainingModel
from fastbert.optim.gradients import norm_and_factor
from fastbert.optim.lazy_adam import decay_groups
from fastbert.pretrain.settings import PretrainConfig

# The paper's for BERT, which goes with the root of the batch: 5e-3 for 32,768 sequences.
HIGHEST_LR, ITS_BATCH = 5e-3, 32_768


def check_package(config: PretrainConfig) -> None:
    """Raises ImportError, which says what to install, where the run needs the library and it is missing."""
    if config.optimizer == "lamb" and (why := extras.missing("--optimizer lamb needs", "pytorch_optimizer")):
        raise ImportError(why)


def usual_lr(sequences: float) -> float:
    """The paper's learning rate for a batch of so many sequences."""
    return HIGHEST_LR * math.sqrt(sequences / ITS_BATCH)


def make_lamb(model: PreTrainingModel, weight_decay: float, lr: float, beta2: float) -> Optimizer:
    """LAMB over all parameters of the model, which a training step calls as it calls LazyAdam."""
    from pytorch_optimizer import Lamb

    class ClippedLamb(Lamb):
        def clip_factor(self, max_norm: float, *, rows: None = None) -> tuple[Tensor, Tensor]:
            """The norm of all gradients, and by what a step is to multiply them; scalars, which are not waited for."""
            return norm_and_factor(self._parameters(), max_norm)

        @torch.no_grad()
        def step(self, closure: None = None, *, rows: None = None, grad_factor: Tensor | None = None) -> None:
            """A step by the gradients, which become `grad_factor` times as large.

            Without one `torch.distributed.checkpoint` steps, to have the state made that it reads into.
            """
            if grad_factor is not None:
                gradients = [param.grad for param in self._parameters() if param.grad is not None]
                torch._foreach_mul_(gradients, grad_factor)
            super().step()

        def _parameters(self) -> list[Tensor]:
            return [param for group in self.param_groups for param in group["params"]]

    matrices, vectors = decay_groups(model, weight_decay)
    return ClippedLamb(
        [matrices, vectors | {"adam": True}], lr=lr, betas=(0.9, beta2), eps=1e-6, weight_decouple=False,
        adam_debias=True,
    )  # fmt: skip
