"""TextCNN and BiLSTM against float64 worked from their definitions; padding, folders, ONNX."""

import json

import numpy as np
import pytest
import torch

from fastbert.models.small import SMALL, BiLSTM, SmallConfig, TextCNN

LENGTHS = (5, 2, 0, 9)


@pytest.fixture(params=SMALL.values(), ids=[cls.__name__ for cls in SMALL.values()])
def model(request):
    return request.param(SmallConfig(60, 8, 6, windows=(2, 3, 4), max_length=40), ["good", "poor", "so, so"]).eval()


@pytest.fixture
def batch():
    """Ids and mask, [4, 12]: the texts of LENGTHS and padding that holds other words."""
    ids = torch.randint(1, 60, (len(LENGTHS), 12))
    return ids, torch.arange(12) < torch.tensor(LENGTHS).unsqueeze(1)


def textcnn(model, ids):
    """Of one text: every window that touches the text's rows, by its definition, in float64."""
    x = model.word_embeddings.weight[ids].double()
    pooled = []
    for convolution, window in zip(model.convolutions, model.config.windows, strict=True):
        weight, before = convolution.weight.double(), (window - 1) // 2
        at = []
        for place in range(len(ids)):
            total = convolution.bias.double()
            for k in range(window):
                if 0 <= place - before + k < len(ids):
                    total = total + weight[:, :, k] @ x[place - before + k]
            at.append(total.clamp(min=0))
        pooled.append(torch.stack(at).amax(0))
    return torch.cat(pooled)


def bilstm(model, ids):
    """Of one text: torch's own bidirectional LSTM, in float64."""
    both = torch.nn.LSTM(model.config.embedding_size, model.config.width, bidirectional=True, batch_first=True).double()
    with torch.no_grad():
        for name, x in model.forth.named_parameters():
            getattr(both, name).copy_(x)
            getattr(both, f"{name}_reverse").copy_(getattr(model.back, name))
    return both(model.word_embeddings.weight[ids].double().unsqueeze(0))[0][0].amax(0)


def test_its_logits_are_those_of_the_definition_however_a_text_comes(model, batch):
    ids, mask = batch
    pooled = {TextCNN: textcnn, BiLSTM: bilstm}[type(model)]
    head = model.classifier
    with torch.no_grad():
        padded = model(ids, mask.long()).logits
        packed = model(ids[mask], cu_seqlens=torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)).logits
        for row, length in enumerate(LENGTHS):
            text = ids[row, :length]
            x = pooled(model, text) if length else torch.zeros(head.in_features, dtype=torch.float64)
            expected = head.weight.double() @ x + head.bias.double()
            for logits in (padded, packed):
                torch.testing.assert_close(logits[row].double(), expected, rtol=0, atol=1e-6)
            if length:  # a mask of ones is no mask
                assert torch.equal(model(text[None]).logits, model(text[None], torch.ones(1, length)).logits)


def test_only_words_that_were_read_get_a_gradient_and_none_comes_from_padding(model, batch):
    ids, mask = batch
    model(ids, mask, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    gradient = model.word_embeddings.weight.grad
    assert gradient.is_sparse
    touched = gradient.to_dense().abs().sum(1).nonzero().flatten().tolist()
    assert touched and set(touched) <= set(ids[mask].tolist())


def test_a_folder_gives_the_same_bits_and_a_damaged_one_is_refused(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and again.labels == model.labels
    assert torch.equal(again(*batch).logits, model(*batch).logits)
    other = next(cls for cls in SMALL.values() if cls is not type(model))
    with pytest.raises(ValueError, match=f'must say "model_type": "{other.model_type}", got "?\'{model.model_type}'):
        other.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 7}))
    with pytest.raises(ValueError, match=r"does not hold the \w+ that its config\.json names: .*\n.*size mismatch"):
        type(model).from_pretrained(tmp_path)


def test_what_does_not_hold_is_refused(model):
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding must stand behind a text"):
        model(ids, torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \[1, 3\], got \[1, 2\]"):
        model(ids, torch.ones(1, 2))
    for bounds in ([0, 2], [0, 5, 3]):
        with pytest.raises(ValueError, match=r"cu_seqlens must start at 0, never decrease and end at .*, 3"):
            model(ids[0], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for wrong, why in (({"width": 0}, "width must be an integer from 1 on, got 0"),
                       ({"pad_token_id": 10}, "pad_token_id must be None or an id")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            SmallConfig(10, **wrong)


@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_logits_whatever_the_padding(model, batch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from fastbert.distill.onnx import export

    model.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(export(tmp_path))
    ids, mask = batch
    for rows, columns in ((slice(None), slice(None)), (slice(1, 2), slice(2)), (slice(3, 4), slice(9))):
        some, its = ids[rows, columns], mask[rows, columns].long()
        (given,) = session.run(None, {"input_ids": some.numpy(), "attention_mask": its.numpy()})
        torch.testing.assert_close(torch.tensor(given), model(some, its).logits.detach(), rtol=0, atol=1e-6)


def test_a_weight_that_is_no_number_is_refused(model, tmp_path):
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.bias holds NaN or infinity: its training diverged"):
        type(model).from_pretrained(tmp_path)
