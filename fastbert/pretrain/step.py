"""One step of a run: forward and backward over its micro-batches, clipping, the optimizer; on a GPU captured."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastbert.backends.linear import use_linear
from fastbert.capture import WARMUP, Captured, capture
from fastbert.data.batch import Batch
from fastbert.models.elmo import ElmoForPreTrainingOutput
from fastbert.models.inputs import IGNORED
from fastbert.models.layers import MultiHeadAttention
from fastbert.models.pretraining import PreTrainingModel
from fastbert.models.working import WorkingCopy
from fastbert.ops.hard_attention import annealed_temperature
from fastbert.optim.lazy_adam import LazyAdam, decay_groups
from fastbert.pretrain.accuracy import PERPLEXITIES, named_hits
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.evaluate import forward
from fastbert.pretrain.lamb import make_lamb
from fastbert.pretrain.processes import ALONE, Processes
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.together import SOLO, Together


def train_step(
    model: PreTrainingModel,
    optimizer: LazyAdam,
    micro: list[Batch],
    lr: float | Tensor,
    config: PretrainConfig,
    watch: Watch | None = None,
    number: int | Tensor = 0,
    working: WorkingCopy | None = None,
    words: Tensor | None = None,
    together: Together = SOLO,
) -> dict[str, Tensor | float]:
    """Forward and backward over the micro-batches, one step of the optimizer; losses as device scalars.

    The MLM loss is the mean over all tokens of the step that are predicted, the NSP or SOP loss over all its sequences,
    however they are spread over micro-batches and, with `together`, over processes. A mean over nothing is 0: [UNK] is
    never predicted, so a step may have nothing to predict. Counts of right predictions come with the steps that are
    logged, and with all that are captured. `watch` sees the losses as step `number` before the optimizer does.
    `working` computes in place of the model. `words`, int64 [R], are the ids whose embeddings move, whatever config
    says. With micro-batches, lr and number on a GPU nothing waits for it, and the step can be captured.
    """
    computes = model if working is None else working.model
    computes.train()
    micro = [batch.to(config.device) for batch in micro]
    static = config.static_shapes
    word_shares = shares([batch.labels for batch in micro], static, together)
    pair_shares = [None] * len(micro)
    if pair(config):
        pair_shares = shares([batch.sentence_label for batch in micro], static, together)
    mlm_loss, sentence_loss, found, sides = [], [], [], []
    captured = isinstance(number, Tensor)  # then steps are all alike
    scored = captured or number % config.log_every == 0 or number == config.steps
    together.skip_before(computes, config.device)
    for batch, word_share, pair_share in zip(micro, word_shares, pair_shares, strict=True):
        with products(config, autocast=working is None):
            out = forward(computes, batch)
        if scored:
            found.append(out.hits)
            if isinstance(out, ElmoForPreTrainingOutput):
                sides.append(out.directions.detach() * (1.0 if word_share is None else word_share))
        losses = [out.mlm_loss if word_share is None else out.mlm_loss * word_share]
        mlm_loss += [losses[0].detach()]
        if pair(config):
            losses += [out.sentence_loss if pair_share is None else out.sentence_loss * pair_share]
            sentence_loss += [losses[1].detach()]
        is_all = word_share is pair_share is None and len(losses) == 1 + (out.sentence_loss is not None)
        with together.backward(batch is micro[-1]):
            (out.loss if is_all else total(losses)).backward()
    together.skip_behind(computes, config.device)
    sums = together.sums([total(losses) for losses in (mlm_loss, sentence_loss) if losses])
    if working is not None:
        working.hand_over_gradients()
    if words is None and config.embedding_update == "touched":
        words = together.ids(words_of(micro, model.config.pad_token_id, static), static)
    if words is not None:
        together.sum_rows(model.word_embeddings, words, static)
    rows = None if words is None else {model.word_embeddings: words}
    norm, factor = optimizer.clip_factor(config.clip, rows=rows)
    loss = out.loss.detach() if is_all else total(sums)  # the same sum
    record = {"loss": loss, "mlm_loss": sums[0], "lr": lr, "gradient_norm": norm}
    if sides:
        record |= dict(zip(PERPLEXITIES, together.sums([total(sides)])[0].exp().unbind(), strict=True))
    if scored and found[0]:  # a sampled softmax counts none
        record |= named_hits(together.sums([total(list(each)) for each in zip(*found, strict=True)]), pair(config))
    if watch is not None:
        watch.see(number, record["loss"], norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step(rows=rows, grad_factor=factor)
    optimizer.zero_grad()
    return record | ({f"{pair(config)}_loss": sums[1]} if pair(config) else {})


def train_words(
    words: Tensor, model: PreTrainingModel, optimizer: LazyAdam, micro: list[Batch], *others: Any, together: Together
) -> dict[str, Tensor | float]:
    """A `train_step` of `others` that moves nothing but the embeddings of `words`, int64 [R]."""
    _, config, _, number = others
    anneal(model, config, number)
    fixed = [parameter for parameter in model.parameters() if parameter is not model.word_embeddings]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        return train_step(model, optimizer, micro, *others, words=words, together=together)
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


def total(losses: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, losses)


def shares(labels: list[Tensor], static: bool, together: Together = SOLO) -> list[float] | list[Tensor] | list[None]:
    """Of each micro-batch in the step's labels; with static shapes of those that count, which the device counts.

    None is all of them.
    """
    alone = together.processes.count == 1
    if len(labels) == 1 and alone:
        return [None]
    if static:
        counts = torch.stack([(each != IGNORED).sum() for each in labels])
        return list(counts / together.sums([counts.sum()])[0].clamp(min=1))
    count = sum(len(each) for each in labels)
    count = max(1, count if alone else int(together.sums([torch.tensor(count)])[0]))
    return [len(each) / count for each in labels]


def words_of(micro: list[Batch], pad_id: int, static: bool) -> Tensor:
    """Ids of the input and the labels, any number of times each; with static shapes without those of empty places."""
    ids = torch.cat([ids for batch in micro for ids in (batch.input_ids, batch.labels)])
    return torch.where((ids == IGNORED) | (ids == pad_id), micro[0].input_ids[0], ids) if static else ids


def make_step(
    model: PreTrainingModel,
    optimizer: LazyAdam,
    config: PretrainConfig,
    watch: Watch | None = None,
    processes: Processes = ALONE,
) -> Callable[[list[Batch], float, int], dict[str, Tensor | float]]:
    """What takes a step of the run, of its micro-batches, learning rate and number.

    On a GPU, where batches have one shape, that is a captured `train_step`, or with --no-capture one that differs in
    being launched anew each time.
    """
    capturable = on_gpu(config) and config.static_shapes and config.optimizer != "lamb"
    if config.shard or not capturable:
        together = Together(processes, config.accumulate, summed(model, config), model if config.shard else None)

        def plain(micro: list[Batch], lr: float, number: int) -> dict[str, Tensor | float]:
            anneal(model, config, number)
            return train_step(model, optimizer, micro, lr, config, watch, number, together=together)

        return plain
    working = WorkingCopy(model, optimizer, config.accumulate) if config.bf16 else None
    computes = model if working is None else working.model
    together = Together(processes, config.accumulate, summed(computes, config))
    captured: dict[int, Captured] = {}  # by the longest sequence, which with the shapes is the phase's

    def step(inputs: tuple[list[Batch], Tensor]) -> dict[str, Tensor]:
        micro, numbers = inputs
        lr, number = numbers.unbind()
        return train_step(model, optimizer, micro, lr, config, watch, number, working, together=together)

    def call(micro: list[Batch], lr: float, number: int) -> dict[str, Tensor]:
        anneal(computes, config, number)
        # A captured step takes one number alone; no step reads how many tokens are filled.
        micro = [batch._replace(filled_tokens=0) for batch in micro]
        inputs = micro, torch.tensor([lr, number], dtype=torch.float64, device="cpu")
        longest = micro[0].max_seqlen
        if longest not in captured:
            captured.clear()  # the memory of the phase before
            captured[longest] = capture(step, inputs, warmup=WARMUP if config.capture else None, device=config.device)
        record = captured[longest](inputs)
        for group in optimizer.param_groups:
            group["lr"] = lr  # a snapshot keeps the number, not the memory of a batch
        return record

    return call


def anneal(model: PreTrainingModel, config: PretrainConfig, number: int) -> None:
    """Sets the temperature of hard attention's gradient for step `number`, the first being 1, where it falls."""
    if config.attention_temperature_rate == 0:
        return
    start = 1.0 if config.attention_temperature is None else config.attention_temperature
    temperature = annealed_temperature(
        number - 1, config.attention_temperature_rate, start, config.attention_temperature_end
    )
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.temperature = temperature


def summed(model: PreTrainingModel, config: PretrainConfig) -> list[Tensor]:
    """Parameters whose gradients processes add up while they are computed; of touched rows these alone are, behind."""
    if config.shard:
        return []
    by_row = [model.word_embeddings] if config.embedding_update == "touched" else []
    return [param for param in model.parameters() if all(param is not each for each in by_row)]


def pair(config: PretrainConfig) -> str:
    """What the run predicts of a pair, "nsp" or "sop"; "" for nothing."""
    return config.objective.partition("+")[2]


def make_optimizer(model: PreTrainingModel, config: PretrainConfig) -> LazyAdam | Optimizer:
    """BERT's own, with bias correction."""
    if config.optimizer == "lamb":
        return make_lamb(model, config.weight_decay, config.lr, config.beta2)
    return LazyAdam(decay_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, config.beta2), eps=1e-6)


@contextlib.contextmanager
def products(config: PretrainConfig, autocast: bool = True) -> Iterator[None]:
    """In which dtype and by which library the run computes its products; `autocast` is of float32 weights."""
    kind = torch.device(config.device).type
    casts = torch.autocast(kind, torch.bfloat16) if config.bf16 and autocast else contextlib.nullcontext()
    with use_linear(config.linear), casts:
        yield


def on_gpu(config: PretrainConfig) -> bool:
    return torch.device(config.device).type == "cuda"
