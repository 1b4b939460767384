"""A model's copy in bfloat16 that computes training steps, beside float32 parameters that the optimizer moves.

Under autocast every step casts every weight to bfloat16 and every gradient back, which on a GPU takes half as long as
the optimizer's step. Here the optimizer writes each moved weight twice, in float32 and in bfloat16, in its one pass
over memory (`LazyAdam.keep_copy`), and reads gradients in the dtype in which they were computed.
"""

import copy

import torch
from torch import Tensor, nn

from fastbert.models.layers import Linear, LinearGELU, with_own_bias
from fastbert.models.pretraining import PreTrainingModel, padded_rows
from fastbert.optim.lazy_adam import LazyAdam


class WorkingCopy:
    """The copy of `model` that computes, and whose gradients go to the model's own parameters.

        working = WorkingCopy(model, optimizer)  # optimizer = fastbert.LazyAdam(model.parameters())
        working.model(**batch).loss.backward()   # without autocast
        working.hand_over_gradients()
        optimizer.step()

    Products and embeddings are computed by weights and biases in bfloat16, which `optimizer.keep_copy` keeps in step;
    what LayerNorm and GELU add and multiply by stays float32, and is the model's own. Checkpoints are of `model`;
    whoever changes it by other means than the optimizer makes a new working copy. Embeddings are rounded before they
    are added, where autocast adds them in float32; otherwise the numbers are those of autocast.

    Args:
        model: in float32, on its device.
        optimizer: of all of its parameters that are trained.
        micro_batches: whose gradients are added up for one step. Of one a gradient stays in bfloat16, in which products
            give it; those of several are added in float32.

    Attributes:
        model: the copy, in the training mode that the model was in.

    Raises:
        ValueError: as `LazyAdam.keep_copy`; a parameter that is computed with in bfloat16 and is not float32.
    """

    def __init__(self, model: PreTrainingModel, optimizer: LazyAdam, micro_batches: int = 1) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # the model's own, and its copy
        made, decoder = {}, (model.word_embeddings, model.predictions.bias)
        padded = [torch.zeros(padded_rows(p), *p.shape[1:], dtype=torch.bfloat16, device=p.device) for p in decoder]
        for param in _rounded(model):
            whole = next((whole for own, whole in zip(decoder, padded, strict=True) if own is param), None)
            kept = optimizer.keep_copy(param, out=None if whole is None else whole[: len(param)])
            made[param] = nn.Parameter(kept, requires_grad=param.requires_grad)
            made[param].grad_dtype = param.grad_dtype = torch.bfloat16 if micro_batches == 1 else torch.float32
            self._pairs.append((param, made[param]))
        memo = {id(param): made.get(param, param) for param in model.parameters()}
        memo |= {id(running): running for running in model.buffers()}  # statistics that a step moves
        self.model = copy.deepcopy(model, memo)
        self.model.predictions.padded = tuple(padded)
        self.model.base_model.embeddings.word_embeddings.is_tied = True

    def hand_over_gradients(self) -> None:
        """Moves the copy's gradients to the model's parameters; nothing is computed."""
        for param, own in self._pairs:
            param.grad, own.grad = own.grad, None


def _rounded(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are computed with in bfloat16: of products and embeddings, each once."""
    found: dict[Tensor, None] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Linear | LinearGELU | nn.Embedding):
            found[module.weight] = None
    for module in with_own_bias(model).values():
        if module.bias is not None:
            found[module.bias] = None
    found[model.predictions.bias] = None
    return list(found)
