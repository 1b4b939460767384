"""What tests/cuda/test_rehearsal.py rehearses, each in a process in which autograd has not run before.

Autograd's engine looks once for the devices that there are, so the stand-in for a GPU has to be there first.
"""

import inspect
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import rehearsal
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.capture import Captured
from fastbert.data.batch import Batch
from fastbert.models.auto import PRETRAINING
from fastbert.models.working import WorkingCopy
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.processes import Processes
from fastbert.pretrain.settings import PretrainConfig
from fastbert.pretrain.step import make_optimizer, summed, train_step
from fastbert.pretrain.together import Together


def pretraining_step(preset, tokens, sequences, masked, longest, *, model="bert", count=1, **settings):
    """The launches of a model's third step, and their table; those before make the optimizer's state and the buckets.

    With a `count` it is the first of so many processes, whose exchanges go nowhere.
    """
    if count > 1:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    objective = "mlm+sop" if model == "albert" else "mlm+nsp"
    config = PretrainConfig(
        output=Path("unused"), model=model, device="cuda", objective=objective, linear="torch", lr=1e-4, steps=10,
        static_shapes=True, **{"bf16": True} | settings,
    )  # fmt: skip
    kind = PRETRAINING[model]

    def ids(size, dtype=torch.int64):
        return torch.empty(size, dtype=dtype, device="cuda")

    with rehearsal.on_a_gpu() as rehearsed:
        with torch.device("cuda"):
            made = kind(kind.config_class.preset(preset, vocab_size=30522, hidden_dropout_prob=0.1))
        made.base_model.checkpoint_layers = config.checkpoint_layers
        optimizer, watch = make_optimizer(made, config), Watch(config)
        working = WorkingCopy(made, optimizer, config.accumulate) if config.bf16 else None
        together = Together(
            Processes(0, count), config.accumulate, summed(made if working is None else working.model, config)
        )
        batch = Batch(
            ids(tokens), ids(tokens), ids(tokens), ids(sequences + 1, torch.int32), longest, ids(masked), ids(masked),
            ids(sequences), 0,
        )  # fmt: skip
        lr, number = (ids((), torch.float64) for _ in range(2))
        for _ in range(3):
            rehearsed.launches.clear()
            micro = [batch] * len(together.own)
            train_step(made, optimizer, micro, lr, config, watch, number, working, together=together)
    if count > 1:
        dist.destroy_process_group()
    return rehearsed.launches, rehearsed.table()


def documented_lines(model):
    """What `fastbert.capture`'s docstring shows, as it stands there, around a model; then a parameter is added."""
    kind = PRETRAINING[model]
    text = inspect.getdoc(fastbert.capture)
    lines = textwrap.dedent(text[text.index("    model =") : text.index("The first calls")])
    lines = lines.replace("BertForPreTraining", kind.__name__).replace(".cuda()", "")  # they are made there
    ids, bounds = torch.zeros(100, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    masked = {"labels": ids[:16], "masked_positions": ids[:16]}
    inputs = {"input_ids": ids, "cu_seqlens": bounds, "max_seqlen": 30, **masked}
    if kind.sentence_label is not None:
        inputs[kind.sentence_label] = ids[:4]
    batches = [{"inputs": inputs, "lr": torch.zeros((), dtype=torch.float64)}] * 5
    names = {
        "fastbert": fastbert, "config": kind.config_class.preset("base" if model == "albert" else "tiny"),
        "first_batch": batches[0], "batches": batches,
    }  # fmt: skip
    there = "Stream", "Event", "CUDAGraph", "stream", "current_stream", "graph", "device", "is_available"
    with (
        mock.patch.multiple(torch.cuda, **{name: mock.MagicMock() for name in there}),  # played by test_capture.py
        mock.patch.object(Captured, "_bring"),
        rehearsal.on_a_gpu() as rehearsed,
        torch.device("cuda"),
    ):
        exec(lines, names)
        assert torch.cuda.CUDAGraph().replay.call_count == 2
        assert names["optimizer"]._is_captured
        with pytest.warns(UserWarning, match="goes on without the parameters"):
            names["optimizer"].add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    return len(rehearsed.launches)


def activations(preset, tokens, sequences, masked, longest, checkpoint_layers=False, layers=12):
    """Bytes that a forward pass of the pretraining step leaves for the backward pass, beside weights and the batch."""
    with rehearsal.on_a_gpu(), torch.device("cuda"):
        config = fastbert.BertConfig.preset(preset, vocab_size=30522, num_hidden_layers=layers)
        model = fastbert.BertForPreTraining(config)
        model.base_model.checkpoint_layers = checkpoint_layers
        working = WorkingCopy(model, fastbert.LazyAdam(model.parameters())).model.train()
        ids = torch.zeros(tokens, dtype=torch.int64)
        masked = torch.zeros(masked, dtype=torch.int64)
        cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
        with Storages() as made:
            out = working(
                ids, token_type_ids=ids, position_ids=ids, cu_seqlens=cu_seqlens, max_seqlen=longest, labels=masked,
                next_sentence_label=cu_seqlens[1:].long(), masked_positions=masked,
            )  # fmt: skip
            loss = out.loss
            del out
        kept = made.bytes()
        loss.backward()  # it is whole
    return kept


class Storages(TorchDispatchMode):
    """The memory of what is made within the block."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()).cdata for x in rehearsal.tensors((args, kwargs))}
        for x in rehearsal.tensors(result):
            storage = StorageWeakRef(x.untyped_storage())
            if storage.cdata not in given or storage.cdata in self._made:
                self._made[storage.cdata] = storage, x.untyped_storage().nbytes()
        return result

    def bytes(self):
        """Of what is still there."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


FORBIDDEN = [
    lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: (x > 0).nonzero(), lambda x: x[x > 0],
    lambda x: x.unique(), lambda x: x.cpu(), lambda x: x + torch.ones(4, device="cpu").to("cuda"),
]  # fmt: skip


def what_waits():
    with rehearsal.on_a_gpu() as rehearsed:
        x = torch.ones(4, device="cuda")
        y = x * 2.0 + torch.tensor(3.0)  # a number of the host is a kernel's argument
        assert y.is_cuda and [launch.op for launch in rehearsed.launches][-2:] == ["mul.Tensor", "add.Tensor"]
        for forbidden in FORBIDDEN:
            with pytest.raises(rehearsal.Waits):
                forbidden(x)


def a_padded_batch():
    with rehearsal.on_a_gpu(), torch.device("cuda"):
        model = fastbert.BertModel(fastbert.BertConfig.preset("tiny"))
        ids = torch.zeros(2, 8, dtype=torch.int64)
        model(ids)
        with pytest.raises(rehearsal.Waits, match="nonzero"):
            model(ids, attention_mask=torch.ones_like(ids))
