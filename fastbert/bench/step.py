"""A whole training step: ours on packed sequences beside transformers' model on the same ones padded."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert.bench import peers
from fastbert.bench.measure import Case
from fastbert.bench.problem import DTYPES, Verdict, VerificationError
from fastbert.models.auto import PRETRAINING
from fastbert.models.bert import BertConfig
from fastbert.models.config import ModelConfig
from fastbert.models.pretraining import PreTrainingModel
from fastbert.optim.lazy_adam import LazyAdam

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
THEIRS = "transformers"


@dataclass
class Batch:
    """The same tokens twice: padded for transformers, packed for us."""

    padded: dict[str, Tensor]
    packed: dict[str, Tensor | int]
    tokens: int

    def to(self, device: str) -> "Batch":
        padded, packed = (
            {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
            for inputs in (self.padded, self.packed)
        )
        return Batch(padded, packed, self.tokens)


def make_batch(
    size: int,
    seq_len: int,
    vocab_size: int,
    generator: torch.Generator,
    shortest: int = 1,
    sentence_label: str = "next_sentence_label",
) -> Batch:
    """Random words on the CPU; 15 % of each sequence's tokens, one at least, are to be predicted."""
    lengths = torch.linspace(shortest, seq_len, size, device="cpu").round().long()
    lengths = lengths[torch.randperm(size, generator=generator, device="cpu")]
    places = torch.arange(seq_len, device="cpu")
    real = places < lengths[:, None]  # [B, S]
    ids = torch.randint(1, vocab_size, real.shape, generator=generator, device="cpu") * real
    types = (places >= lengths[:, None] // 2).long() * real
    drawn = torch.rand(real.shape, generator=generator, device="cpu")
    order = drawn.masked_fill(~real, 2.0).argsort(1).argsort(1)
    masked = order < (0.15 * lengths).round().clamp(min=1)[:, None]
    of_pairs = torch.randint(2, (size,), generator=generator, device="cpu")
    padded = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": types,
        "labels": torch.where(masked, ids, -100),
        sentence_label: of_pairs,
    }
    packed = {
        "input_ids": ids[real],
        "token_type_ids": types[real],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
        "masked_positions": masked[real].nonzero().squeeze(1),
        "labels": ids[masked],
        sentence_label: of_pairs,
    }
    return Batch(padded, packed, int(lengths.sum()))


def models(config: ModelConfig, attention: str, device: str) -> tuple[PreTrainingModel, nn.Module]:
    """Ours and theirs with the same random weights."""
    import transformers

    kind = next(kind for kind in PRETRAINING.values() if kind.config_class is type(config))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):  # and moved then, whatever the default is
        ours = kind(config)
        ours.save_pretrained(folder)
        theirs = getattr(transformers, kind.__name__).from_pretrained(folder, attn_implementation=attention)
    return ours.to(device), theirs.to(device)


def verify(ours: nn.Module, theirs: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[float, float]:
    """The two losses without dropout.

    Raises:
        VerificationError: they differ by more than 1e-4, in 16 bits by more than 0.02.
    """
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    device = next(ours.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        a = ours.eval()(**batch.packed).loss.item()
        b = theirs.eval()(**batch.padded).loss.item()
    if not abs(a - b) < allowed:
        raise VerificationError(
            f"a training step in {dtype}: our loss is {a:.6f} and that of transformers {b:.6f}, more than {allowed} "
            "apart; nothing of it is timed"
        )
    return a, b


def step(model: nn.Module, run: Callable, inputs: Sequence[dict], dtype: torch.dtype, rows: str) -> Callable[[], None]:
    """One training step per call, on the next batch in turn.

    `rows` says the optimizer: "touched" or "all" is LazyAdam with these rows of the word embeddings, "" torch's AdamW.
    """
    lazy = LazyAdam if rows else partial(torch.optim.AdamW, fused=True)
    optimizer = lazy(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    device, taken = next(model.parameters()).device.type, 0

    def call() -> None:
        nonlocal taken
        batch = inputs[taken % len(inputs)]
        model.train()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = run(**batch).loss
        loss.backward()
        if rows:
            touched = torch.cat([batch["input_ids"], batch["labels"]]) if rows == "touched" else None
            named = None if touched is None else {model.word_embeddings: touched}
            _, factor = optimizer.clip_factor(CLIP, rows=named)
            optimizer.step(rows=named, grad_factor=factor)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        optimizer.zero_grad()
        taken += 1

    call.optimizer = optimizer
    return call


def cases(
    preset: str, size: int, seq_len: int, dtype: str, device: str, among: Collection[str], missing: dict[str, str]
) -> list[Case]:
    """A step of BERT with that preset's sizes, of `size` sequences of a quarter of `seq_len` to all of it.

    Forward, backward, clipping and the optimizer, with dropout 0.1; 16 bits by autocast. `among` names the peers:
    without transformers ours is timed alone, and there is no ratio. A compiled step that raises is left out, and gets a
    line in `missing`. A GPU's steps are launched from Python, not captured: that is what
    `benchmarks/pretrain.py --device cuda` measures.
    """
    config = BertConfig.preset(preset)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(size, seq_len, config.vocab_size, generator, max(1, seq_len // 4)).to(device)
    kind, variants, verdicts = DTYPES[dtype], {}, {}

    def add(name: str, model: nn.Module, run: Callable, inputs: dict, rows: str) -> None:
        call = step(model, run, [inputs], kind, rows)
        variants[name] = lambda _: call

    if peers.TRANSFORMERS in among:
        ours, theirs = models(config, "sdpa", device)
        a, b = verify(ours, theirs, batch, kind)
        verdicts["fastbert"] = Verdict(abs(a - b) / abs(b))
        add("fastbert", ours, ours, batch.packed, "all")
        add(THEIRS, theirs, theirs, batch.padded, "")
        if peers.COMPILED in among:
            _, compiled = models(config, "sdpa", device)
            name = f"{THEIRS} compiled"
            add(name, compiled, torch.compile(compiled), batch.padded, "")
            try:
                variants[name](0)()
            except Exception as error:  # torch's own classes, and the compiler's
                missing[f"{name}, {dtype}"] = peers.first_line(error)
                del variants[name]
    else:
        ours = PRETRAINING["bert"](config).to(device)
        add("fastbert", ours, ours, batch.packed, "all")
    case = Case(
        op="training step",
        shape=f"BERT {preset}, {size} x {seq_len // 4} to {seq_len}",
        dtype=dtype,
        direction="step",
        variants=variants,
        reference=THEIRS if THEIRS in variants else "",
        verdicts=verdicts,
        waits=tuple(variants),
    )
    return [case]
