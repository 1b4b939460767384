"""LazyAdam's row step for NVIDIA GPUs, emulated: every sort, the order of sums, ids outside, and what it moves."""

import pytest
import torch
from op_cases import drawn

from fastbert.ops import lazy_adam as op
from fastbert.ops.lazy_adam import GRAD_BY_ROW, Step
from fastbert.ops.lazy_adam_replay import lazy_adam_replay

PIECE, FAN = 16, 32  # of csrc/cuda/lazy_adam_scratch.h


def step_of(param, rows, grad, **changed):
    """A first step; with beta1 = 0 its first moment is the sum of a row's gradients."""
    given = {
        "param": param, "exp_avg": torch.zeros(param.shape), "exp_avg_sq": torch.zeros(param.shape),
        "max_exp_avg_sq": None, "row_steps": None, "rows": rows, "grad": grad,
        "lr": torch.tensor(0.01, dtype=torch.float64), "step": torch.tensor(1.0), "seed": None, "beta1": 0.0,
        "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "flags": 0, "padding_idx": -1, "number": 0, **changed,
    }  # fmt: skip
    return Step(**given)


def take(*steps):
    for s in steps:
        op.check(s)
    op.functions["cuda"].lazy_adam_steps(steps)


def in_order(x, group, fan):
    """Sums of neighbouring rows of x: `group` ascends, and each has its rows in runs of up to `fan`, added in order."""
    starts = torch.ones(len(group), dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    first = starts.nonzero().squeeze(1)
    rank = torch.arange(len(group)) - first[starts.cumsum(0) - 1]
    begins = rank % fan == 0
    run = begins.cumsum(0) - 1
    sums = x[begins].clone()
    for k in range(1, fan):
        chosen = rank % fan == k
        sums[run[chosen]] += x[chosen]
    return sums, group[begins]


def summed(rows, grad):
    """ids and sums: pieces of 16 in order of occurrence, then 32 neighbours at a time, float32."""
    ids, order = rows.sort(stable=True)
    sums, ids = in_order(grad[order].float(), ids, PIECE)
    while len(ids) > len(ids.unique()):
        sums, ids = in_order(sums, ids, FAN)
    return ids, sums


def skewed(V, n, generator):
    return (torch.rand(n, generator=generator, dtype=torch.float64) ** 3 * V).long()


# V, D, n: a sort each, by block or by tiles, of one digit or more; rows of one, two and three levels of the tree
SUMS = {
    "one gradient": (5, 3, 1),
    "two levels in every order of threads": (3, 2, 1500),
    "one item a thread": (9, 8, 1024),
    "four items a thread": (600, 4, 1025),
    "the last of four": (40, 4, 4096),
    "eight items a thread": (300_000, 1, 4097),
    "the last of one block": (2, 1, 8192),
    "tiles": (3, 1, 20_000),
    "tiles by two digits": (600_000, 1, 8193),
    "tiles by three digits": (1_100_000, 1, 9000),
    "large tiles": (5000, 1, 262_145),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_are_trees_over_the_order_of_occurrence(module, case):
    """A row of up to 16 gradients so has the bits of a plain sum, the CPU's."""
    V, D, n = SUMS[case]
    if module.library.trace and max(V, n) > 100_000:
        pytest.skip("too slow")
    generator = drawn("sums", case)
    rows, grad = skewed(V, n, generator), torch.randn(n, D, generator=generator)
    ids, sums = summed(rows, grad)
    if n > 1:
        assert len(ids) < n
    s = step_of(torch.ones(V, D), rows, grad)
    take(s)
    expected = torch.zeros(V, D)
    expected[ids] = sums
    assert torch.equal(s.exp_avg, expected)
    assert torch.equal(s.param != 1, (expected != 0) | torch.zeros(V, 1).index_fill(0, ids, 1.0).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 4, 6, 36, 60, 132, 1028])
def test_bits_do_not_depend_on_the_cut_into_slices(module, D, dtype):
    """Whole rows by one warp, as row-wise state wants them, and slices of 1 to 32 lanes; aligned or not."""
    n, generator = 70, drawn("slices", D)
    rows, grad = skewed(5, n, generator), torch.randn(n, D, generator=generator).to(dtype)
    moved = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(n, D)
    ids, sums = summed(rows, grad)
    results = []
    for gradient in (grad, moved):
        s = step_of(torch.ones(5, D, dtype=dtype), rows, gradient)
        take(s)
        results.append(s)
        assert torch.equal(s.exp_avg[ids], sums)
    for a, b in zip(results[0].changed, results[1].changed, strict=True):
        assert torch.equal(a, b)
    s = step_of(torch.ones(5, D, dtype=dtype), rows, grad, exp_avg_sq=torch.zeros(5, 1))
    take(s)
    assert torch.equal(s.exp_avg[ids], sums)
    torch.testing.assert_close(s.exp_avg_sq[ids], 0.001 * sums.square().mean(1, keepdim=True))


@pytest.mark.parametrize("n", [30, 9000], ids=["block", "tiles"])
def test_an_id_outside_changes_nothing(module, n):
    """In no parameter of the call, and the next call says so."""
    bad = torch.arange(n) % 7
    bad[n // 2] = 7
    for rows in (bad, torch.where(bad == 7, -1, bad)):
        counts = torch.zeros(7, dtype=torch.int32)
        steps = [
            step_of(torch.ones(9, 4), torch.tensor([1, 8]), torch.ones(2, 4), row_steps=torch.zeros(9).int()),
            step_of(torch.ones(7, 4), rows, torch.ones(n, 4), row_steps=counts),
            step_of(torch.ones(9, 4), torch.tensor([1, 8]), torch.ones(2, 4), row_steps=torch.zeros(9).int()),
            step_of(torch.ones(3, 4), None, torch.ones(3, 4)),
        ]
        before = [[x.clone() for x in s.changed] for s in steps]
        take(*steps)
        for s, its in zip(steps, before, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(s.changed, its, strict=True))
        with pytest.raises(ValueError, match=rf"row id outside its table, at place {n // 2} of rows"):
            take(steps[0])
        assert torch.equal(steps[0].param, before[0][0])
        take(steps[0])
        assert not torch.equal(steps[0].param, before[0][0])


def test_every_id_is_outside_an_empty_table(module):
    s = step_of(torch.ones(0, 4), torch.tensor([0]), torch.ones(1, 4))
    take(s)
    with pytest.raises(ValueError, match="row id outside its table, at place 0 of rows"):
        take(s)


@pytest.mark.parametrize("kind", ["sparse", "by row"])
@pytest.mark.parametrize(
    ("dtype", "m_dtype", "D"),
    [
        (torch.float32, torch.float32, 768),
        (torch.float32, torch.float32, 128),
        (torch.float32, torch.float32, 32),
        (torch.bfloat16, torch.bfloat16, 768),
        (torch.float16, torch.float32, 64),
    ],
    ids=str,
)
def test_touched_rows_move_once_in_whole_sectors(traced, dtype, m_dtype, D, kind):
    """The sorted ids in scratch, which come from caches, are counted by themselves."""
    V, n = 100, 24
    rows = torch.randperm(V)[:n].repeat(2)  # pairs of gradients
    by_row = kind == "by row"
    grad = torch.randn(V if by_row else len(rows), D).to(dtype)
    s = step_of(torch.ones(V, D, dtype=dtype), rows, grad, flags=GRAD_BY_ROW if by_row else 0)
    s = s._replace(exp_avg=s.exp_avg.to(m_dtype))
    take(s)
    accesses = [a for a in traced.library.accesses() if a.kernel == "lazy_adam update" and not a.shared]
    moved = {}
    for a in accesses:
        key = a.memory.split("[")[0], a.access
        moved[key] = moved.get(key, 0) + 32 * a.cost
    table = n * D * s.param.element_size()
    floor = {("grad", "read"): table if by_row else 2 * table}
    for name in ("param", "exp_avg", "exp_avg_sq"):
        floor[name, "read"] = floor[name, "write"] = n * D * getattr(s, name).element_size()
    assert {key: moved[key] for key in floor} == floor
    ideal = sum(a.ideal for a in accesses if a.memory.split("[")[0] in ("param", "exp_avg", "exp_avg_sq", "grad"))
    assert 32 * ideal == sum(floor.values()), traced.library.table()


def test_pieces_are_read_once_in_whole_sectors(traced):
    """A row of 700 gradients: 44 pieces' sums are written, and read by the nodes above them."""
    n, D = 700, 128
    s = step_of(torch.ones(3, D), torch.full((n,), 1), torch.randn(n, D))
    take(s)
    accesses = [a for a in traced.library.accesses() if a.kernel == "lazy_adam update" and not a.shared]
    assert sum(32 * a.cost for a in accesses if a.memory.startswith("grad")) == 4 * n * D
    costs, ideals = (sum(getattr(a, what) for a in accesses if a.bytes == 16) for what in ("cost", "ideal"))
    assert ideals == costs and 32 * costs <= 1.2 * 4 * n * D, traced.library.table()


@pytest.mark.parametrize(
    ("rows", "last_step", "message"),
    [
        ([0, 3, 1], [3, 3, 3], "row id outside its table, at place 1"),
        ([0, 2, 1], [3, 1, 3], "row that stands before the recorded steps, at place 2"),
        (None, [3, 1, 3], "row that stands before the recorded steps, at place 1"),
    ],
)
def test_rows_that_cannot_be_brought_move_none(module, rows, last_step, message):
    state = [torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4), torch.tensor(last_step).int()]
    before, lr = [x.clone() for x in state], torch.ones(2).double()
    rows = None if rows is None else torch.tensor(rows)

    def replay():
        lazy_adam_replay(*state, rows, lr, 0 * lr, 4, 0.9, 0.999, 1e-8, 0, -1, "cuda")

    replay()
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    with pytest.raises(ValueError, match=message):
        replay()
