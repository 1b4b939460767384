"""Norms beside LayerNorm: packed batches beside a loop over sequences in float64, running statistics, folders."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastbert import AlbertConfig, AutoModel, BertConfig, BertForPreTraining
from fastbert.models.config import WITH_RUNNING
from fastbert.models.norms import EPS, NORMS, Tokens
from fastbert.models.working import WorkingCopy
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.pretrain.processes import Processes, check_devices

LENGTHS = [5, 1, 0, 9, 2]  # and 3 of padding
PAD, H, GROUPS = 0, 8, 2


def config(norm, **others):
    sizes = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(
        vocab_size=50, max_position_embeddings=16, norm=norm, norm_groups=GROUPS, initializer_range=0.5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes, **others,
    )  # fmt: skip


def batch(padding=3):
    """Packed ids of sequences of `LENGTHS`, and one of padding behind them."""
    ids = torch.randint(1, 50, (sum(LENGTHS),))
    lengths = torch.tensor(LENGTHS + [padding] * bool(padding))
    return torch.cat([ids, torch.full((padding,), PAD)]), F.pad(lengths.cumsum(0), (1, 0)).int()


def module(norm):
    """One in float64 whose parameters and running statistics are all different."""
    made = NORMS[norm](config(norm)).double()
    for name, x in made.state_dict().items():
        x.copy_(torch.rand(x.shape) + 0.5 if name == "running_variance" else torch.randn(x.shape))
    return made


def by_hand(norm, z, ids, cu_seqlens, made):
    """A loop over sequences, tokens and features; z [T, H] in float64."""
    real = [t for t, i in enumerate(ids.tolist()) if i != PAD]
    of_batch = z[real].mean(0), z[real].var(0, correction=0)
    if not made.training and norm in WITH_RUNNING:
        of_batch = made.running_mean, made.running_variance
    y = torch.empty_like(z)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for t in range(start, end):
            own = z[start:end]
            instance = own.mean(0), own.var(0, correction=0)
            layer = z[t].mean().expand(H), z[t].var(correction=0).expand(H)
            if norm == "group":
                halves = z[t].view(GROUPS, -1)
                mean, variance = (
                    x.repeat_interleave(H // GROUPS) for x in (halves.mean(1), halves.var(1, correction=0))
                )
            elif norm == "switchable":
                weights = made.mean_weight.softmax(0), made.variance_weight.softmax(0)
                mean, variance = (
                    sum(w * x for w, x in zip(weights[i], (instance[i], layer[i], of_batch[i]), strict=True))
                    for i in (0, 1)
                )
            else:
                mean, variance = instance if norm == "instance" else of_batch
            y[t] = (z[t] - mean) / (variance + EPS).sqrt() * made.weight + made.bias
    return y


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padding", [0, 3], ids=["all real", "padding"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_packed_batch_is_normalised_as_sequence_by_sequence(norm, padding, training):
    torch.manual_seed(0)
    ids, cu_seqlens = batch(padding)
    made = module(norm).train(training)
    x, residual = torch.randn(2, len(ids), H, dtype=torch.float64)
    expected = by_hand(norm, x + residual, ids, cu_seqlens, made)
    before = {name: running.clone() for name, running in made.named_buffers()}
    y, twin = made(x, residual, None, Tokens.of(ids, cu_seqlens, PAD))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, twin)
    z = (x + residual)[ids != PAD]
    newest = {"running_mean": z.mean(0), "running_variance": z.var(0)} if training else before
    assert set(before) == (set(newest) if norm in WITH_RUNNING else set())
    for name, running in made.named_buffers():
        torch.testing.assert_close(running, 0.9 * before[name] + 0.1 * newest[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_in_float64(norm):
    torch.manual_seed(0)
    for padding in (0, 3):
        ids, cu_seqlens = batch(padding)
        made, tokens = module(norm).train(), Tokens.of(ids, cu_seqlens, PAD)
        names, values = zip(*made.named_parameters(), strict=True)
        x, residual = (torch.randn(len(ids), H, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def call(x, residual, *values, made=made, names=names, tokens=tokens):
            given = dict(zip(names, values, strict=True)) | {name: b.clone() for name, b in made.named_buffers()}
            y, _ = torch.func.functional_call(made, given, (x, residual, None, tokens))
            return y[: sum(LENGTHS)]

        assert torch.autograd.gradcheck(call, (x, residual, *values))


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_takes_packed_and_padded_batches_alike(norm):
    """In training, with places to predict: statistics of the last layer are of all tokens too."""
    torch.manual_seed(0)
    ids, cu_seqlens = batch()
    lengths = [n for n in LENGTHS if n]
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    padded = torch.zeros(real.shape, dtype=torch.int64).masked_scatter(real, ids[: sum(lengths)])
    model = BertForPreTraining(config(norm)).double().train()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    places = torch.tensor([0, 3, 6, 14])
    packed = model(ids, cu_seqlens=cu_seqlens, max_seqlen=9, labels=ids[places], masked_positions=places)
    packed.loss.backward()
    packed_grads, after = [p.grad.clone() for p in model.parameters() if p.grad is not None], model.state_dict()
    after = {name: x.clone() for name, x in after.items()}
    model.load_state_dict(start)
    model.zero_grad()
    labels = torch.full((sum(lengths),), -100)
    labels[places] = ids[places]
    whole = model(padded, real, labels=torch.full(real.shape, -100).masked_scatter(real, labels))
    whole.loss.backward()
    torch.testing.assert_close(packed.loss, whole.loss, rtol=0, atol=1e-10)
    for x, y in zip(packed_grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(after[name], x, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_a_folder_keeps_the_norm_and_transformers_refuses_it(norm, tmp_path, transformers):
    torch.manual_seed(0)
    ids, cu_seqlens = batch(0)
    model = BertForPreTraining(config(norm))
    with torch.no_grad():
        model(ids, cu_seqlens=cu_seqlens)  # moves running statistics
    model.save_pretrained(tmp_path)
    loaded, encoder = BertForPreTraining.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    model.eval()
    with torch.no_grad():
        expected = model(ids, cu_seqlens=cu_seqlens).prediction_logits
        assert torch.equal(loaded(ids, cu_seqlens=cu_seqlens).prediction_logits, expected)
        assert torch.equal(encoder(ids, cu_seqlens=cu_seqlens)[0], model.bert(ids, cu_seqlens=cu_seqlens)[0])
    with pytest.raises(ValueError, match="fastbert-bert"):
        transformers.AutoModel.from_pretrained(tmp_path)
    assert model.loaded_by == f"fastbert loads it; transformers cannot, as it has no {norm} norm"
    assert not {"norm", "norm_groups"} & set(BertForPreTraining(config("layer")).fields())


def test_bfloat16_and_float32_agree_and_running_statistics_stay_whole():
    torch.manual_seed(0)
    ids, cu_seqlens = batch()
    for norm in NORMS:
        made = NORMS[norm](config(norm)).train()
        other = NORMS[norm](config(norm)).bfloat16().train()
        x, residual = torch.randn(2, len(ids), H).bfloat16().float()
        tokens = Tokens.of(ids, cu_seqlens, PAD)
        y = made(x, residual, None, tokens)[0]
        low = other(x.bfloat16(), residual, None, tokens)[0]
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), y, rtol=0.02, atol=0.05)
        for x, low in zip(made.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(low.float(), x, rtol=0.01, atol=0.01)


def test_a_working_copy_moves_the_models_running_statistics():
    model = BertForPreTraining(config("batch"))
    working = WorkingCopy(model, LazyAdam(model.parameters()))
    ids, cu_seqlens = batch()
    working.model.train()(ids, cu_seqlens=cu_seqlens)
    end = model.bert.encoder["layer"][1].output.norm
    assert end.running_mean.abs().min() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_statistics_over_tokens_compile():
    """Whole, with padding reckoned with: the one norm that has all statistics."""
    torch.manual_seed(0)
    model = BertForPreTraining(dataclasses.replace(config("switchable"), num_hidden_layers=1)).train()
    ids, cu_seqlens = batch()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    expected = model(ids, cu_seqlens=cu_seqlens, max_seqlen=9).prediction_logits
    model.load_state_dict(start)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(ids, cu_seqlens=cu_seqlens, max_seqlen=9).prediction_logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="norm must be one of layer, batch, instance, group, switchable, got 'rms'"):
        config("rms")
    with pytest.raises(ValueError, match=r"multiple of norm_groups.*got 8 and 3"):
        BertConfig(hidden_size=8, num_attention_heads=2, norm="group", norm_groups=3)
    with pytest.raises(ValueError, match="tells a token of those behind it"):
        config("instance", is_decoder=True)
    with pytest.raises(ValueError, match="pad_token_id must say"):
        config("batch", pad_token_id=None)
    with pytest.raises(ValueError, match="ALBERT's layers, which differ in them, are one"):
        AlbertConfig(norm="switchable")
    with pytest.raises(ValueError, match="here are 2: start one process"):
        check_devices("cpu", 2, Processes(0, 2), norm="batch")
    model = BertForPreTraining(config("batch")).train()
    model.base_model.checkpoint_layers = True
    with pytest.raises(ValueError, match="count a batch twice"):
        model(torch.ones(1, 4, dtype=torch.int64))
