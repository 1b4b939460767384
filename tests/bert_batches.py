"""A small BERT and its batch, padded and packed, for the tests of the model."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.models.bert import BertConfig
from fastbert.models.working import WorkingCopy
from fastbert.optim.lazy_adam import LazyAdam

B, S, V = 4, 12, 50
LENGTHS = [12, 7, 3, 1]
SMALL = BertConfig(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
    initializer_range=0.2,
)


def batch(seed: int = 0, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    """A padded batch with labels at every third token."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, V, (len(lengths), S), generator=generator) * mask
    labels = torch.where((torch.arange(S) % 3 == 0) & (mask == 1), ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(S) > 4).long().expand_as(ids) * mask,
        "labels": labels,
        "next_sentence_label": torch.arange(len(lengths)) % 2,
    }


def packed(padded: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """The same batch without padding, with its labelled positions."""
    real = padded["attention_mask"].bool()
    labels = padded["labels"][real]
    positions = (labels != -100).nonzero().squeeze(1)
    return {
        "input_ids": padded["input_ids"][real],
        "token_type_ids": padded["token_type_ids"][real],
        "cu_seqlens": F.pad(real.sum(1).cumsum(0), (1, 0)).int(),
        "max_seqlen": S,
        "masked_positions": positions,
        "labels": labels[positions],
        "next_sentence_label": padded["next_sentence_label"],
    }


def encoder_inputs(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if k not in ("labels", "next_sentence_label", "masked_positions")}


def unsettled(model):
    """`model` with noise on all parameters, biases and LayerNorms too: nothing must hide behind 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def training_step(model, inputs, dtype=torch.float32, seed: int = 7):
    """Loss and norm of the gradients of one step, with clipping and with dropout drawn from `seed`.

    `dtype` is autocast's, or "working copy" for a bfloat16 copy of the model beside it.
    """
    optimizer = LazyAdam(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    if dtype == "working copy":
        working = WorkingCopy(model, optimizer)
        loss = working.model(**inputs).loss
        loss.backward()
        working.hand_over_gradients()
    else:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
    norm, factor = optimizer.clip_factor(1.0)
    optimizer.step(grad_factor=factor)
    if dtype == "working copy":
        assert torch.equal(working.model.word_embeddings, model.word_embeddings.bfloat16())
    return loss.detach(), norm.detach()


def saved_bytes(model) -> int:
    """What autograd keeps for backward of 1,024 tokens in sequences of 128, 147 of them predicted of 2,000 words."""
    own, saved = {param.untyped_storage().data_ptr() for param in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    ids = torch.randint(5, 2000, (1024,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(
            ids, cu_seqlens=torch.arange(0, 1025, 128, dtype=torch.int32), max_seqlen=128,
            masked_positions=torch.arange(0, 1024, 7), labels=torch.randint(5, 2000, (147,)),
        )  # fmt: skip
    return sum(storage.nbytes() for storage in saved.values())
