"""The gradient of an embedding table: the twin by hand, the kernel against it, and both uses of a tied table."""

import emulated_backend
import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import embedding as op

# Tokens, rows of the table, columns.
CASES = {
    "no tokens": (0, 5, 8),
    "one word": (300, 1, 24),
    "several slabs, a few words twice": (70, 3000, 8),
    "one word nearly always": (600, 40, 264),
    "odd columns": (50, 33, 7),
    "more tokens than a list holds": (5000, 20, 4),
}
LIST = 4096


def given(case, dtype):
    tokens, rows, columns = CASES[case]
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(rows, (tokens,), generator=generator)
    if "nearly always" in case:
        ids = torch.where(torch.rand(tokens, generator=generator) < 0.9, 17, ids)
    dx, dtable = (torch.randn(n, columns, generator=generator).to(dtype) for n in (tokens, rows))
    return ids, dx, dtable


def test_worked_out_by_hand():
    dtable = torch.tensor([[1.0], [2.0], [3.0]])
    ids, dx = torch.tensor([2, 0, 2, 1]), torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    op.reference.embedding_backward(dtable, dx, ids, 1, False)
    assert dtable.tolist() == [[21.0], [2.0], [43.0]]
    op.reference.embedding_backward(dtable, dx, ids, -1, True)
    assert dtable.tolist() == [[20.0], [40.0], [40.0]]


@pytest.fixture(params=["values", "trace"])
def kernel(request):
    emulated = emulated_backend.module(trace=request.param == "trace")
    with emulated_backend.installed(emulated):
        yield op.functions["cuda"].embedding_backward


@pytest.mark.parametrize("fills", [True, False], ids=["fills", "adds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_twin(kernel, case, dtype, fills):
    """A place that a filling kernel does not write shows as NaN; each list of 4,096 tokens is one rounding."""
    ids, dx, dtable = given(case, dtype)
    truth = torch.zeros_like(dtable, dtype=torch.float64) if fills else dtable.double()
    bound = torch.full_like(truth, 2e-5)  # of sums in float32
    for some_ids, some in zip(ids.split(LIST), dx.double().split(LIST), strict=True):
        truth.index_add_(0, some_ids, some)
        bound += 1.01 * torch.finfo(dtype).eps / 2 * truth.abs()
    ours = torch.full_like(dtable, torch.nan) if fills else dtable.clone()
    kernel(ours, dx, ids, -1, fills)
    assert ((ours.double() - truth).abs() <= bound).all()


def test_a_padding_row_and_ids_outside_are_left_out(kernel):
    ids = torch.tensor([3, 1, 3, 40, -1, 0])
    dx, dtable = torch.ones(6, 8), torch.zeros(40, 8)
    kernel(dtable, dx, ids, 3, False)
    assert dtable.sum(1).tolist() == [8.0, 8.0, *[0.0] * 38]


def test_its_op_says_what_it_changes():
    """By torch's own checks, but for those that compile, whose tensors the emulator is not told of."""
    ids, dx, dtable = given("odd columns", torch.float32)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    with emulated_backend.module(trace=False).running():
        op_itself = torch.ops.fastbert.embedding_backward.default
        torch.library.opcheck(op_itself, (dtable, dx, ids, -1, False), test_utils=checks)


def test_more_tokens_than_can_be_listed_are_refused():
    module = emulated_backend.module(trace=False)
    with pytest.raises(RuntimeError, match=r"embedding_backward: at most 67108864 tokens, got 67108865"):
        module.compiled.embedding_backward(0, 0, -1, True, 0, 2**26 + 1, 8, 5, 0, 0)


def test_through_autograd_as_torch_does_it(kernel):
    """Of a table that is looked up and decodes, and of one that is looked up alone."""
    ids, dx, table = given("several slabs, a few words twice", torch.float32)
    hidden = torch.randn(4, 8)

    def gradient(look_up):
        leaf = table.clone().requires_grad_()
        x, decoder = look_up(leaf)
        loss = (x * dx).sum() + (hidden @ decoder.t()).pow(2).sum()
        return torch.autograd.grad(loss, leaf)[0]

    expected = gradient(lambda leaf: (F.embedding(ids, leaf, padding_idx=1), leaf))
    torch.testing.assert_close(gradient(lambda leaf: op.tied_embedding(ids, leaf, 1)), expected)
    leaf = table.clone().requires_grad_()
    (alone,) = torch.autograd.grad(op.embedding(ids, leaf), leaf, dx)
    (expected,) = torch.autograd.grad(F.embedding(ids, leaf), leaf, dx)
    torch.testing.assert_close(alone, expected)
