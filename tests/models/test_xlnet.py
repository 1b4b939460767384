"""XLNet: the numbers of transformers, with and without an order, folders both ways, and what an order hides."""

import pytest
import torch
from bert_batches import unsettled
from torch import Tensor

from fastbert import XLNetConfig, XLNetLMHeadModel

B, S, P, V = 3, 12, 4, 50
CONFIG = XLNetConfig(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unsettled(XLNetLMHeadModel(CONFIG).eval())


@pytest.fixture
def theirs(transformers, model, tmp_path):
    model.save_pretrained(tmp_path)
    other, report = transformers.XLNetLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    return other


def batch(padding: str) -> dict[str, Tensor]:
    """Sequences of 12, 7 and 3 tokens in three segments, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, V, (B, S), generator=generator)
    mask = (torch.arange(S) < torch.tensor([[S], [7], [3]])).long()
    types = (torch.arange(S) // 5).expand(B, S)
    made = {"input_ids": torch.where(mask == 1, ids, 5), "attention_mask": mask, "token_type_ids": types}
    return {name: x.flip(1).contiguous() for name, x in made.items()} if padding == "left" else made


def order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation number for every third token of each sequence, -1 for the others; perm_mask [B, S, S]."""
    number = torch.full((B, S), -1)
    for row, real in enumerate(mask):
        aimed = real.nonzero().squeeze(1)[1::3]
        number[row, aimed] = torch.randperm(len(aimed), generator=torch.Generator().manual_seed(row))
    return number, ((number[:, :, None] <= number[:, None, :]) & (number[:, None, :] >= 0)).float()


def mapping(number: Tensor) -> Tensor:
    """A row for each of P queries; rows of zeros behind those that there are."""
    made = torch.zeros(B, P, S)
    for row, numbers in enumerate(number):
        places = (numbers >= 0).nonzero().squeeze(1)
        made[row, torch.arange(len(places)), places] = 1.0
    return made


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["plain", "order", "queries", "order and queries"])
@torch.no_grad()
def test_transformers_gives_the_same_numbers(model, theirs, padding, kind):
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    number, perm_mask = order(real)
    more = {"perm_mask": perm_mask} if "order" in kind else {}
    if "queries" in kind:
        more["target_mapping"] = mapping(number)
        real = more["target_mapping"].sum(2) > 0
        labels = torch.randint(6, V, (B, P)).masked_fill(~real, -100)
    else:
        labels = torch.where(real, inputs["input_ids"], -100)
    expected = theirs(**inputs, **more, labels=labels)
    logits = model(**inputs, **more).logits
    assert expected.logits[real].std() > 0.1, "the numbers are too alike to tell two models apart"
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**inputs, **more, labels=labels).loss, expected.loss, rtol=0, atol=1e-4)
    hidden = model.base_model(**inputs, **more).last_hidden_state
    wanted = theirs.transformer(**inputs, **more).last_hidden_state
    torch.testing.assert_close(hidden[real], wanted[real], rtol=0, atol=1e-4)
