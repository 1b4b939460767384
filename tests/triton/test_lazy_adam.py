"""LazyAdam in Triton alone: the order of sums, many tensors of one launch, the norm of gradients, the optimizer."""

import pytest
import torch
from lazy_adam_states import copies, step, tables

import fastbert
from fastbert.ops.lazy_adam import GRAD_BY_ROW, Step

pytest.importorskip("triton")
from fastbert.kernels import lazy_adam
from fastbert.kernels.gradient_norm import gradient_norm
from fastbert.kernels.lazy_adam import lazy_adam_steps, plan

pytestmark = pytest.mark.usefixtures("interpreted")


def tree_of(rows):
    """The sum of gradients [n, D] of one row: pieces of 16 in order, then 32 sums at a time in order, until one is."""
    width = 16
    while len(rows) > 1:
        sums = []
        for first in range(0, len(rows), width):
            total = rows[first].clone()
            for x in rows[first + 1 : first + width]:
                total += x
            sums.append(total)
        rows, width = torch.stack(sums), 32
    return rows[0]


@pytest.mark.parametrize("row_wise", [False, True], ids=["full v", "row-wise v"])
def test_sums_have_the_bits_of_the_tree(row_wise):
    """Rows of 1, 16, 17, 512, 513 and 600 gradients side by side, mixed; beta1 = 0 makes m the sum itself."""
    counts = [3, 16, 513, 17, 1, 600, 512, 0, 33]
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = rows[torch.randperm(len(rows))]
    grad = torch.randn(len(rows), 5) * 10.0 ** torch.randint(-3, 4, (len(rows), 1))
    w, m, v, *none = tables(len(counts), 5)
    v = v[:, :1].contiguous() if row_wise else v
    before = m.clone()
    number = torch.ones((), dtype=torch.float64)
    options = (None, 0.0, 0.5, 1e-8, 0.0, 0, -1, 0)
    lazy_adam_steps([Step(w, m, v, *none, rows, grad, 0.1 * number, torch.ones(()), *options)])
    for row, count in enumerate(counts):
        assert torch.equal(m[row], tree_of(grad[rows == row]) if count else before[row]), f"{count} gradients"


def test_many_dense_tensors_step_in_one_launch_for_each_kind(monkeypatch):
    """Those of a launch are float32 with a copy, or bfloat16 with amsgrad; one is cut into chunks, some have a tail."""
    launches = []
    launch = lazy_adam.launch
    monkeypatch.setattr(
        lazy_adam, "launch", lambda *given, **constants: [launches.append(1), launch(*given, **constants)]
    )
    rate, one = torch.tensor(0.01, dtype=torch.float64), torch.tensor(3.0)
    made = []
    for shape in ((7, 1), (50, 100), (1, 8), (3, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            state = tables(*shape, dtype, amsgrad=dtype == torch.bfloat16)
            made.append((state, torch.randn(shape).to(dtype)))
    steps, expected, kept = [], [], []
    for state, grad in made:
        expected.append(step(copies(state), None, grad, backend="reference"))
        kept.append(torch.zeros_like(grad).bfloat16() if grad.dtype == torch.float32 else None)
        options = (None, 0.9, 0.999, 1e-8, 0.1, 0, -1, 0, None, None, kept[-1])
        steps.append(Step(*state, None, grad, rate, one, *options))
    lazy_adam_steps(steps)
    assert len(launches) == 2
    for (state, _), theirs, copy in zip(made, expected, kept, strict=True):
        for a, b in zip(state, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert copy is None or torch.equal(copy, state[0].bfloat16())


def test_a_found_infinite_gradient_changes_nothing():
    for rows, flags in ((None, 0), (torch.tensor([1, 1]), 0), (torch.tensor([1]), GRAD_BY_ROW)):
        state = tables(4, 3, row_steps=rows is not None)
        before = copies(state)
        grad = torch.randn(2, 3) if rows is not None and not flags else torch.randn(4, 3)
        rate, options = torch.tensor(0.1, dtype=torch.float64), (None, 0.9, 0.999, 1e-8, 0.1, flags, -1, 0, None)
        lazy_adam_steps([Step(*state, rows, grad, rate, torch.ones(()), *options, torch.ones(1), None)])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_row_outside_its_table_changes_no_parameter_of_the_call():
    """It is found before any is updated, the one before it in the call included."""
    states = [tables(4, 3), tables(4, 3), tables(2, 2)]
    before = [copies(state) for state in states]
    rate, options = torch.tensor(0.1, dtype=torch.float64), (None, 0.9, 0.999, 1e-8, 0.1, 0, -1, 0)
    ids = [torch.tensor([0, 1]), torch.tensor([1, 4]), None]
    steps = [
        Step(*state, rows, torch.randn(2, state[0].shape[1]), rate, torch.ones(()), *options)
        for state, rows in zip(states, ids, strict=True)
    ]
    with pytest.raises(ValueError, match="a row id outside its table, at place 1 of rows"):
        lazy_adam_steps(steps)
    for state, its in zip(states, before, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, its, strict=True))


def test_norm_of_gradients_of_any_dtype_and_alignment():
    """3 and 4 make 5 wherever they stand; rows that are not named do not count."""
    spread = torch.zeros(20_001)
    spread[0], spread[-1] = 3.0, 4.0
    norm, factor = gradient_norm([(spread, None)], 1.0).tolist()
    assert norm == 5.0 and factor == pytest.approx(0.2, rel=1e-6)
    named = torch.tensor([1, 0, 1], dtype=torch.uint8)
    by_row = torch.tensor([[3.0] + 6 * [0.0], 7 * [9.0], 6 * [0.0] + [4.0]])
    wide = torch.zeros(3, 16).bfloat16()
    wide[0, 15], wide[1, 0], wide[1, 15], wide[2, 0] = 2.0, 9.0, 9.0, 4.0
    unaligned = torch.zeros(9)[1:]
    unaligned[7] = 2.0
    gradients = [(by_row, named), (wide, named), (unaligned, None), (torch.ones(3, 3).half(), None), (by_row[:0], None)]
    norm, factor = gradient_norm(gradients, 100.0).tolist()
    assert norm == pytest.approx((25 + 20 + 4 + 9) ** 0.5, rel=1e-6) and factor == 1.0
    norm, factor = gradient_norm([(torch.tensor([torch.nan, 1.0]), None)], 1.0)
    assert norm.isnan() and factor.isnan()


OPTIONS = {
    "sparse, clipped": {"weight_decay": 0.1},
    "row counts, row-wise v, bfloat16 m": {"bias_correction": "row", "row_wise": True, "exp_avg_dtype": torch.bfloat16},
    "named rows, clipped": {"amsgrad": True},
    "missed steps": {"missed": "replay", "weight_decay": 0.1},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_optimizer_trains_as_the_reference(kind):
    """An embedding, a matrix and a vector, with a copy kept, by steps that sum duplicates and leave rows out."""

    def trained(backend):
        torch.manual_seed(0)
        with fastbert.use_backend(backend):
            table, linear = torch.nn.Embedding(9, 4, sparse=kind != "named rows, clipped"), torch.nn.Linear(4, 3)
            groups = [{"params": table.parameters(), **OPTIONS[kind]}, {"params": linear.parameters()}]
            optimizer = fastbert.LazyAdam(groups, lr=0.05)
            optimizer.attach(table)
            copy = optimizer.keep_copy(linear.weight)
            for ids in ([1, 5, 1], [5, 7, 7], [0, 1, 2]):
                ids = torch.tensor(ids)
                linear(table(ids)).square().sum().backward()
                rows = {table.weight: ids} if kind.startswith("named") else {}
                factor = optimizer.clip_factor(0.5, rows=rows)[1] if kind.endswith("clipped") else None
                optimizer.step(rows=rows, grad_factor=factor)
                optimizer.zero_grad()
            optimizer.flush()
            assert torch.equal(copy, linear.weight.bfloat16())
            return [table.weight, linear.weight, linear.bias]

    for ours, theirs in zip(trained("triton"), trained("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_plans_cover_every_column_and_fill_a_program(whole):
    for columns in (0, 1, 7, 8, 64, 100, 128, 300, 768, 1100, 4096):
        its = plan(columns, whole)
        assert its.block * its.blocks * its.slices >= max(columns, 8) and its.places * its.block == 512
        assert its.slices == 1 if whole else its.blocks == 1
