"""On a GPU, by the kernels in CUDA and by those in Triton: what the CPU gives, and no waiting for the device.

`make gpu-check` runs these, and measures. Elsewhere they are skipped.
"""

import contextlib
import dataclasses
import pydoc_data.topics
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from bert_batches import SMALL, batch, packed
from torch import nn
from torch.nn import functional as F

import fastbert
from fastbert.backends import fallbacks, why_not
from fastbert.models.bert import BertForPreTraining
from fastbert.ops import philox
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import read_metrics
from fastbert.pretrain.settings import PretrainConfig
from fastbert.testing import assert_close, run

GPU, ROOT = "cuda", Path(__file__).parents[1]
BACKENDS = import_module("fastbert.backends")  # `fastbert.backends` is the function of that name
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch 2.11 says so of sparse tensors made with check_invariants=False too
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def chosen(request):
    """The backend that tensors on a GPU run on unasked."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    with (
        mock.patch.dict(BACKENDS._AUTOMATIC, cuda=(request.param,)),
        mock.patch.dict(BACKENDS._on_gpu, clear=True),
    ):
        yield request.param


@contextlib.contextmanager
def never_waits():
    """Within the block, what would wait for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def everywhere(ours, baseline, inputs, dy, names):
    """Output and gradients of `ours` on the GPU against float64 on the CPU, judged by torch's own op on the GPU."""
    truth = run(ours, [x.double() if x.is_floating_point() else x for x in inputs], dy.double())
    on_gpu = [x.to(GPU) for x in inputs]
    results = run(ours, on_gpu, dy.to(GPU))
    theirs = [None] * len(truth) if baseline is None else run(baseline, on_gpu, dy.to(GPU))
    for name, result, other, true in zip(["output", *names], results, theirs, truth, strict=True):
        assert result.device.type == GPU
        assert_close(result.cpu(), None if other is None else other.cpu(), true, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(dtype, approximate):
    x, bias = 3 * torch.randn(77, 130).to(dtype), torch.randn(130).to(dtype)
    everywhere(
        lambda x, bias: fastbert.gelu(x, bias, approximate=approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [x, bias], torch.randn(77, 130).to(dtype), ["dx", "dbias"],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    x, residual, dy = (torch.randn(50, 768).to(dtype) for _ in range(3))
    weight, bias = torch.randn(768).to(dtype), torch.randn(768).to(dtype)
    everywhere(
        fastbert.layer_norm, lambda x, w, b: F.layer_norm(x, (768,), w, b, 1e-12), [x, weight, bias], dy,
        ["dx", "dweight", "dbias"],
    )  # fmt: skip
    seed = torch.tensor([2**40 + 17])
    everywhere(
        lambda x, r, w, b: fastbert.dropout_add_layer_norm(x, r, w, b, 1e-12, 0.1, seed.to(x.device)),
        lambda x, r, w, b: F.layer_norm(r + kept(x, seed) * x, (768,), w, b, 1e-12),
        [x, residual, weight, bias], dy, ["dx", "dresidual", "dweight", "dbias"],
    )  # fmt: skip


def kept(x, seed):
    """dropout's mask of a row-major x, times its scale, drawn on x's device."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    mask = philox.lanes(x.shape[1], rows, 0, 0, seed.to(x.device)) >= 6554
    return mask.to(x.dtype) * philox.scale(6554)


def test_random_numbers_are_the_cpus():
    seed, rows = torch.tensor([-(2**63) + 5]), torch.arange(1000).unsqueeze(-1)
    for bits in (16, 8):
        ours = philox.lanes(131, rows.to(GPU), 7, 1, seed.to(GPU), bits)
        assert torch.equal(ours.cpu(), philox.lanes(131, rows, 7, 1, seed, bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    labels = torch.randint(0, 1000, (64,))
    labels[::5] = -100
    everywhere(
        lambda logits: fastbert.cross_entropy(logits, labels.to(logits.device)),
        lambda logits: F.cross_entropy(logits.float(), labels.to(logits.device)),
        [5 * torch.randn(64, 1000).to(dtype)], torch.tensor(1.0), ["dlogits"],
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"causal": True}, {"window": (3, 5)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype, options):
    lengths = torch.tensor([5, 0, 64, 1, 33])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    qkv, dout = torch.randn(103, 3, 4, 32).to(dtype), torch.randn(103, 4, 32).to(dtype)

    def ours(qkv):
        seed = torch.tensor([3], device=qkv.device) if "dropout_p" in options else None
        return fastbert.attention_qkv(qkv, bounds.to(qkv.device), 64, seed=seed, **options)

    def torchs(qkv):
        each = [x.permute(1, 2, 0, 3) for x in qkv.split(lengths.tolist()) if len(x)]  # [3, N, S, D] of each sequence
        return torch.cat([F.scaled_dot_product_attention(*x).transpose(0, 1) for x in each])

    everywhere(ours, None if options else torchs, [qkv], dout, ["dqkv"])


# ---- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"amsgrad": True, "weight_decay": 0.1}, {"bias_correction": "row"}, {"row_wise": True},
        {"capturable": True}, {"missed": "replay"}, {"exp_avg_dtype": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sparse", "named", "dense"])
def test_lazy_adam_steps_as_on_the_cpu(kind, options):
    if kind == "dense" and options.get("bias_correction") == "row":
        options = options | {"lazy": "nonzero"}
    start, trained = torch.randn(100, 24), []
    for device in ("cpu", GPU):
        table = nn.Embedding(100, 24, sparse=kind == "sparse", _weight=start.to(device, copy=True))
        optimizer = fastbert.LazyAdam(table.parameters(), lr=0.1, **options)
        optimizer.attach(table)
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            ids = torch.randint(0, 100, (40,), generator=generator).to(device)
            target = torch.randn(40, 24, generator=generator).to(device)
            (table(ids) * target).sum().backward()
            rows = {table.weight: ids} if kind == "named" else None
            norm = fastbert.clip_grad_norm_(table.parameters(), 3.0, rows=rows)
            optimizer.step(rows=rows)
            optimizer.zero_grad()
        optimizer.flush()
        trained.append((table.weight.detach().cpu(), norm.cpu()))
    (ours, norm), (theirs, other) = trained[1], trained[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm, other)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("named", [False, True])
def test_a_step_never_waits(named):
    """Norm, clipping, and steps with a learning rate that changes, the first and those by a plan."""
    params = [nn.Parameter(torch.randn(shape, device=GPU)) for shape in ((30, 8), (8,), ())]
    optimizer = fastbert.LazyAdam(params, weight_decay=0.1, amsgrad=True)
    rows = {params[0]: torch.tensor([3, 7, 3], device=GPU)} if named else None
    for k in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        with never_waits():
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            fastbert.clip_grad_norm_(params, 1.0, rows=rows)
            _, factor = optimizer.clip_factor(0.5, rows=rows)
            optimizer.step(rows=rows, grad_factor=factor)


@pytest.mark.parametrize("with_rows", [False, True], ids=["dense", "rows"])
def test_a_captured_step_equals_eager_ones(with_rows):
    """Clipped, and with another learning rate at each step, which a graph reads where it lies."""

    def build():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device=GPU)) for shape in ((30, 8), (8,))]
        for param in params:
            param.grad = torch.randn_like(param)
        rate = torch.zeros((), dtype=torch.float64, device=GPU)
        return params, rate, fastbert.LazyAdam(params, lr=rate, weight_decay=0.1)

    def step(params, optimizer):
        rows = {params[0]: ids} if with_rows else None
        optimizer.step(rows=rows, grad_factor=optimizer.clip_factor(1.0, rows=rows)[1])

    ids = torch.tensor([3, 7, 3], device=GPU)
    (eager, rate, optimizer), (captured, other_rate, other) = build(), build()
    for k in range(5):
        rate.fill_(0.1 * k)
        step(eager, optimizer)
    with torch.cuda.stream(torch.cuda.Stream()):
        step(captured, other)  # makes the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, other)
    for k in range(1, 5):  # capturing does nothing
        other_rate.fill_(0.1 * k)
        graph.replay()
    assert other.state[captured[0]]["step"] == 5
    for ours, theirs in zip(captured, eager, strict=True):
        assert torch.equal(ours, theirs)


def test_a_captured_learning_rate_stays():
    """One that is a number is the graph's own, whatever the optimizer does later."""
    param = nn.Parameter(torch.zeros(1000, device=GPU))
    param.grad = torch.ones_like(param)
    optimizer = fastbert.LazyAdam([param], lr=0.5, betas=(0.0, 0.0), eps=0.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    torch.full((1000,), 7.0, dtype=torch.float64, device=GPU)  # takes memory that is free
    graph.replay()
    torch.testing.assert_close(param.detach(), torch.full_like(param, -1.25))


def test_steps_on_the_gpu_are_reproducible():
    def trained():
        torch.manual_seed(0)
        table = nn.Embedding(1000, 64, sparse=True, device=GPU, dtype=torch.bfloat16)
        optimizer = fastbert.LazyAdam(table.parameters(), lr=0.01, stochastic_rounding=True, seed=5)
        for _ in range(5):
            ids = torch.randint(0, 50, (4096,), device=GPU)  # each some eighty times
            (table(ids) * torch.randn(4096, 64, device=GPU)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return table.weight.detach()

    assert torch.equal(trained(), trained())


def test_grad_scaler():
    table = nn.Embedding(50, 8, device=GPU)
    optimizer, scaler = fastbert.LazyAdam(table.parameters(), lr=0.1), torch.amp.GradScaler(GPU)
    before = table.weight.detach().clone()
    for scale in (torch.inf, 1.0):  # the first step is left out
        scaler.scale(table(torch.arange(5, device=GPU)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(table.weight[:5], before[:5]) == (scale == torch.inf)
        optimizer.zero_grad()


# ---- the model -------------------------------------------------------------------------------------------------------


def to_gpu(inputs):
    return {name: x.to(GPU) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@pytest.mark.parametrize("form", [lambda x: x, packed], ids=["padded", "packed"])
def test_a_models_losses_and_gradients_are_the_cpus(form):
    config = dataclasses.replace(SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForPreTraining(config)
    model(**form(batch())).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model.to(GPU)(**to_gpu(form(batch()))).loss
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_step_never_waits(dtype):
    model, inputs = BertForPreTraining(SMALL).to(GPU), to_gpu(packed(batch()))
    with never_waits():
        with torch.autocast(GPU, dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        fastbert.clip_grad_norm_(model.parameters(), 1.0)


def test_a_step_of_the_library_is_captured():
    """Batches that come from the CPU or lie on the GPU."""

    def losses(warmup):
        torch.manual_seed(0)
        model = BertForPreTraining(SMALL).to(GPU)
        optimizer = fastbert.LazyAdam(model.parameters())

        def step(batch):
            for group in optimizer.param_groups:
                group["lr"] = batch["lr"]
            loss = model(**batch["inputs"]).loss
            loss.backward()
            norm, factor = optimizer.clip_factor(1.0)
            optimizer.step(grad_factor=factor)
            optimizer.zero_grad()
            return loss.detach(), norm

        batches = [
            {"inputs": packed(batch(seed)), "lr": torch.tensor(1e-3 * seed, dtype=torch.float64)} for seed in range(8)
        ]
        batches[5]["inputs"] = to_gpu(batches[5]["inputs"])
        captured = fastbert.capture(step, batches[0], warmup=warmup)
        return [tuple(x.item() for x in captured(each)) for each in batches], captured

    (ours, captured), (theirs, _) = losses(3), losses(None)
    assert ours == theirs
    with pytest.raises(ValueError, match=r"must be torch\.int64"):
        captured({"inputs": packed(batch(lengths=[3, 3, 3, 3])), "lr": torch.zeros((), dtype=torch.float64)})


def test_a_step_that_waits_is_not_captured():
    """In a process of its own: torch's allocator and its generator may stay as if the capture went on."""
    script = (
        "import torch, fastbert\n"
        "step = fastbert.capture(lambda x: x * x.sum().item() + torch.rand_like(x), torch.ones(3))\n"
        "for _ in range(4): step(torch.ones(3))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "RuntimeError: the step cannot be captured: it must not wait" in done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_the_packed_form_compiles_whole():
    model, inputs = BertForPreTraining(SMALL).to(GPU).eval(), to_gpu(packed(batch()))
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = call(**inputs).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)


def test_kernels_run_and_the_cpus_are_refused(chosen):
    fallbacks.clear()
    x = torch.randn(3, device=GPU)
    assert torch.equal(fastbert.gelu(x), fastbert.gelu(x, backend=chosen)) and not fallbacks
    with pytest.raises(RuntimeError, match="takes tensors on the cpu"):
        fastbert.gelu(x, backend="cpu")


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "manual.txt"
    corpus.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    return PretrainConfig(
        output=tmp_path / "run", corpus=corpus, vocab_size=1000, seq_len=32, batch_tokens=512, steps=40, lr=3e-3,
        held_out=0.1, evaluations=2, evaluation_batches=4, snapshot_every=20, log_every=1, device=GPU,
    )  # fmt: skip


def losses(config):
    return [r["loss"] for r in read_metrics(config.output / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_pretraining_has_the_cpus_loss_curve(config, bf16):
    config = dataclasses.replace(config, dropout=0.0, bf16=bf16, static_shapes=True)
    on_cpu = dataclasses.replace(config, device="cpu", output=config.output / "../cpu")
    pretrain(config)
    pretrain(on_cpu)
    assert losses(config) == pytest.approx(losses(on_cpu), rel=2e-2 if bf16 else 1e-3)


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "launched"])
def test_pretraining_resumes_in_the_same_bits(config, capture):
    config = dataclasses.replace(config, capture=capture, bf16=True)
    pretrain(config)
    unbroken = losses(config)
    shutil.rmtree(config.output / "snapshots/step-00000040")
    pretrain(config, resume=True)
    assert losses(config) == unbroken


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"accumulate": 2, "embedding_update": "touched"}, {"bf16": True, "model": "albert"}],
    ids=str,
)  # fmt: skip
def test_a_captured_run_is_the_launched_one(config, settings):
    """Bit for bit, dropout's random numbers too, and whether layers are computed again or not."""
    config, exported = dataclasses.replace(config, dropout=0.1, **settings), []
    for name, more in {"captured": {}, "launched": {"capture": False}, "again": {"checkpoint_layers": True}}.items():
        folder = pretrain(dataclasses.replace(config, output=config.output / ".." / name, **more))
        exported.append((folder / "model.safetensors").read_bytes())
    assert exported[0] == exported[1] == exported[2]
