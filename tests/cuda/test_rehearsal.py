"""A pretraining step waits for nothing on a GPU, and launches few kernels: rehearsed without one."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import emulated
import pytest
import rehearsed

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@pytest.fixture(scope="module")
def alone():
    """Calls a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()


@pytest.mark.parametrize(
    "settings",
    [{"embedding_update": "touched", "accumulate": 2, "checkpoint_layers": True}, {"bf16": False}, {"model": "albert"}],
    ids=str,
)
def test_a_step_waits_for_nothing(alone, settings):
    preset = "base" if settings.get("model") == "albert" else "tiny"
    launches, _ = alone(rehearsed.pretraining_step, preset, 100, 4, 16, 30, **settings)
    assert len(launches) > 100


@pytest.mark.parametrize("model", ["bert", "albert", "roberta", "ernie"])
def test_the_documented_lines_can_be_captured(alone, model):
    assert alone(rehearsed.documented_lines, model) > 400


def test_a_step_of_two_processes_waits_for_nothing(alone):
    """They exchange counts of labels, one bucket of gradients, losses, ids of rows, the rows, right predictions."""
    launches, _ = alone(
        rehearsed.pretraining_step, "tiny", 100, 4, 16, 30, embedding_update="touched", accumulate=2, count=2
    )
    exchanges = [(launch.op, launch.bytes) for launch in launches if launch.kernel == "exchange"]
    parameters = 526_652  # but for the table; in float32
    ids = 100 + 16  # of each process: input and labels; of a gathering its own and those of both
    assert exchanges == [
        *[("allreduce_", 8)] * 2, ("allreduce_", 4 * parameters), ("allreduce_", 2 * 4), ("allgather_", 3 * ids * 8),
        ("allreduce_", 2 * ids * 128 * 4), ("allreduce_", 4 * 4),
    ]  # fmt: skip


def test_the_launches_of_bert_base(alone):
    """64 sequences of 32 to 128 tokens."""
    launches, table = alone(rehearsed.pretraining_step, "base", 5120, 64, 768, 128)
    print(table)
    ops = [launch.op for launch in launches]
    layer, heads = 4 + 8, 3 * 4 + 1  # products, forward and backward; of heads and of the token types' gradient
    assert ops.count("mm") + ops.count("addmm") == 12 * layer + heads
    assert ops.count("attention_forward") == ops.count("attention_backward") == 12
    assert ops.count("randint.low") == 1  # the seeds of 37 dropouts
    assert ops.count("_to_copy") <= 5  # no weight is cast
    step = sum(launch.bytes for launch in launches if launch.op == "lazy_adam_steps")
    assert 1.70e9 < step < 1.80e9  # 109.5 M weights and two moments read and written, a gradient, and a bfloat16 copy
    assert len(ops) <= 325


def test_a_second_micro_batch_costs_hardly_more_than_its_passes(alone):
    """Gradients are added up by lists; autograd would cast or add each of 200 parameters' in each micro-batch."""
    once, _ = alone(rehearsed.pretraining_step, "base", 5120, 64, 768, 128)
    twice, _ = alone(rehearsed.pretraining_step, "base", 5120, 64, 768, 128, accumulate=2)
    assert len(twice) <= 2 * len(once) + 40
    assert sum(launch.op in ("_to_copy", "add.Tensor", "add_.Tensor") for launch in twice) < 30
    exchanged, _ = alone(rehearsed.pretraining_step, "base", 5120, 64, 768, 128, accumulate=4, count=2)
    assert len(exchanged) <= len(twice) + 100  # of 18 buckets of 25 MB, put together and sent


def test_what_a_step_keeps_for_its_backward_pass(alone):
    """Of BERT base, 64 x 32 to 128 tokens, counted. In bfloat16 a layer keeps of each token query, key, value and the
    heads' output, twice what LayerNorm read and gave, and four vectors before and behind GELU: 16. No mask."""
    kept = alone(rehearsed.activations, "base", 5120, 64, 768, 128)
    vectors, vocabulary = 12 * 16 * 2 * 5120 * 768, 2 * 768 * 30_528
    assert kept <= vectors + vocabulary
    assert alone(rehearsed.activations, "base", 5120, 64, 768, 128, True) < 0.25 * kept


def test_what_waits_is_refused(alone):
    alone(rehearsed.what_waits)


def test_a_padded_batch_waits_for_its_mask_alone(alone):
    alone(rehearsed.a_padded_batch)
