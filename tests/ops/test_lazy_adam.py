"""The op: every backend and instruction set against the twin in float64, which is held to torch.optim.AdamW."""

import functools
import os

import pytest
import torch
from lazy_adam_states import NAMES, copies, step, tables, torch_step
from op_cases import DTYPES, assert_same_for_threads, drawn

import fastbert
from fastbert.backends import requested, triton
from fastbert.ops.lazy_adam import (
    COUPLED_DECAY,
    EPS_UNCORRECTED,
    GRAD_BY_ROW,
    MAXIMIZE,
    NO_BIAS_CORRECTION,
    SKIP_ZERO,
    lazy_adam_step,
)
from fastbert.testing import assert_close

# rows V, columns D, gradient rows n
CASES = {
    "one column": (50, 1, 30),
    "a tail alone": (50, 7, 30),
    "vectors, few duplicates": (20, 48, 30),
    "columns of two tasks": (5, 1100, 9),
    "more duplicates than one thread adds up": (3, 40, 13000),
    "more digits than one pass sorts": (70000, 3, 20000),
    "one row": (1, 5, 4),
    "no row is touched": (9, 8, 0),
}
KINDS = ["sparse", "by_row", "dense"]


@functools.cache
def judged(case, dtype, kind, amsgrad):
    """State, rows, gradient and flags of a step, and the state after it by torch and by the twin in float64."""
    V, D, n = CASES[case]
    generator = drawn("lazy_adam", case, dtype, kind, amsgrad)
    state = tables(V, D, dtype, amsgrad, generator=generator)
    rows = None if kind == "dense" else torch.randint(0, V, (n,), generator=generator)
    grad = torch.randn(n if kind == "sparse" else V, D, generator=generator).to(dtype)
    flags = (GRAD_BY_ROW if kind == "by_row" else 0) | MAXIMIZE
    truth = step(copies(state, wide=True), rows, grad.double(), flags, backend="reference")
    return state, rows, grad, flags, torch_step(state, rows, grad, flags), truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, case, dtype, kind):
    if backend == "triton" and triton.interpreted and dtype == torch.float16 and kind != "sparse":
        pytest.skip("float16 is read and written alike in all kinds: left to a real GPU")
    for amsgrad in (False, True):
        state, rows, grad, flags, theirs, truth = judged(case, dtype, kind, amsgrad)
        ours = step(copies(state), rows, grad, flags)
        for name, a, b, c in zip(NAMES, ours, theirs, truth, strict=True):
            if a is not None and a.numel():
                assert_close(a, b, c, f"{name}, amsgrad {amsgrad}")
        if rows is not None:
            untouched = torch.ones(len(state[0]), dtype=torch.bool).index_fill(0, rows, False)
            for name, before, after in zip(NAMES, state, ours, strict=True):
                same = before is None or torch.equal(before[untouched], after[untouched])
                assert same, f"{name}: another row changed"


def test_truth_is_adamw():
    """The float64 twin against torch's AdamW in float64: all kinds of step, every option."""
    for amsgrad in (False, True):
        for maximize in (False, True):
            p = torch.randn(6, 4, dtype=torch.float64)
            other = p.clone().requires_grad_()
            optimizer = torch.optim.AdamW([other], lr=0.01, weight_decay=0.1, amsgrad=amsgrad, maximize=maximize)
            state = [p, *(torch.zeros_like(p) for _ in range(2)), torch.zeros_like(p) if amsgrad else None, None]
            for t in range(1, 6):
                other.grad = torch.randn_like(p)
                optimizer.step()
                step(state, None, other.grad, MAXIMIZE * maximize, "reference", t=float(t))
            torch.testing.assert_close(p, other.detach(), rtol=1e-12, atol=1e-12)


def test_two_steps_by_hand(backend):
    """lr 0.5, betas 1/2 and 3/4, eps 1, no decay. Row 1 gets 1 and 3, so g = 4; then -2. Row 0 never moves."""
    w, m, v = torch.tensor([[7.0], [1.0]]), torch.zeros(2, 1), torch.zeros(2, 1)
    options = (None, 0.5, 0.75, 1.0, 0.0, 0, -1, 0, None, None, None, requested())
    lr = torch.tensor(0.5)
    lazy_adam_step(
        w, m, v, None, None, torch.tensor([1, 1]), torch.tensor([[1.0], [3.0]]), lr, torch.tensor(1.0), *options
    )
    # m = 2, v = 4; m_hat = 4, v_hat = 16; w = 1 - 0.5 * 4 / (4 + 1) = 0.6
    assert m.tolist() == [[0], [2]] and v.tolist() == [[0], [4]]
    torch.testing.assert_close(w, torch.tensor([[7.0], [0.6]]))
    lazy_adam_step(w, m, v, None, None, torch.tensor([1]), torch.tensor([[-2.0]]), lr, torch.tensor(2.0), *options)
    # m = 0, v = 4: no movement
    assert m.tolist() == [[0], [0]] and v.tolist() == [[0], [4]]
    torch.testing.assert_close(w, torch.tensor([[7.0], [0.6]]))


FLAGS = {
    "eps uncorrected": EPS_UNCORRECTED,
    "no bias correction": NO_BIAS_CORRECTION,
    "coupled decay": COUPLED_DECAY | MAXIMIZE,
    "all three": EPS_UNCORRECTED | NO_BIAS_CORRECTION | COUPLED_DECAY,
    "zero rows left alone": SKIP_ZERO | GRAD_BY_ROW,
}


@functools.cache
def judged_small(name, m_dtype, row_wise, kind):
    """Steps of tables that are narrow, wider than a task, and have more duplicates than one thread adds up."""
    flags, made = FLAGS[name] | (GRAD_BY_ROW if kind == "by_row" else 0), []
    if kind == "sparse":
        flags &= ~(SKIP_ZERO | GRAD_BY_ROW)
    generator = drawn("small state", name, m_dtype, row_wise, kind)
    for V, D, n in ((12, 5, 20), (3, 2100, 7), (3, 48, 5000)):
        for dtype, amsgrad in ((torch.float32, True), (torch.bfloat16, False)):
            state = tables(V, D, dtype, amsgrad, row_steps=True, generator=generator)
            state[1] = state[1].to(m_dtype)
            if row_wise:
                state[2:4] = [x if x is None else x[:, :1].contiguous() for x in state[2:4]]
            rows = None if kind == "dense" else torch.randint(0, V, (n,), generator=generator)
            grad = torch.randint(-3, 4, (n if kind == "sparse" else V, D), generator=generator).to(dtype)
            grad[1] = -0.0  # sums are exact
            truth = step(copies(state, wide=True), rows, grad.double(), flags, "reference", padding_idx=0, eps=1e-3)
            made.append((state, rows, grad, flags, truth))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_wise", [False, True], ids=["full v", "row-wise v"])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.bfloat16], ids=["float32 m", "bfloat16 m"])
@pytest.mark.parametrize("name", FLAGS)
def test_flags_and_small_state_are_close_to_truth(backend, name, m_dtype, row_wise, kind):
    if backend == "triton" and triton.interpreted and row_wise != (m_dtype == torch.bfloat16):
        pytest.skip("the first moment's dtype and the second's size do not meet: left to a real GPU")
    made = judged_small(name, m_dtype, row_wise, kind)
    for state, rows, grad, flags, truth in made[:2] if backend == "triton" else made:  # interpreted: the narrow table
        ours = step(copies(state), rows, grad, flags, padding_idx=0, eps=1e-3)
        for what, a, b, before in zip(NAMES, ours, truth, state, strict=True):
            if what == "row_steps":
                assert torch.equal(a, b) and not torch.equal(a, before)
            elif a is not None:
                assert_close(a, None, b, what, scale=1.0)
            if a is not None:
                assert torch.equal(a[0], before[0]), "padding moved"
                if flags & SKIP_ZERO:
                    assert torch.equal(a[1], before[1]), "a row without gradient moved"


def test_equals_sparse_adam_and_adam(backend):
    """Two steps of each of torch's optimizers whose formula a flag selects."""
    for make, flags, dense in (
        (lambda p: torch.optim.SparseAdam([p], lr=0.01, eps=1e-2), EPS_UNCORRECTED, False),
        (lambda p: torch.optim.Adam([p], lr=0.01, eps=1e-2, weight_decay=0.1), COUPLED_DECAY, True),
    ):
        state = [torch.randn(7, 9), torch.zeros(7, 9), torch.zeros(7, 9), None, None]
        other = state[0].clone().requires_grad_()
        optimizer = make(other)
        for t in (1.0, 2.0):
            rows, grad = torch.tensor([6, 2, 6]), torch.randn(3, 9)
            other.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad, (7, 9), check_invariants=True)
            if dense:
                other.grad = other.grad.to_dense()
            optimizer.step()
            lazy_adam_step(
                *state, None if dense else rows, other.grad if dense else grad, torch.tensor(0.01), torch.tensor(t),
                None, 0.9, 0.999, 1e-2, 0.1 if dense else 0.0, flags, -1, 0, None, None, None,
                requested(),
            )  # fmt: skip
        torch.testing.assert_close(state[0], other.detach())


@functools.cache
def rounded(kind):
    """State, rows, gradient and the twin's w: odd widths, several blocks, a row with many gradients."""
    made, generator = [], drawn("rounded", kind)
    for V, D, n in ((9, 37, 20), (3, 2100, 7), (2, 70, 5000)):
        w = torch.randn(V, D, generator=generator).bfloat16()
        w[1, :3] = torch.tensor([torch.inf, torch.nan, 3.3895e38])
        rows = torch.randint(0, V, (n,), generator=generator) if kind == "sparse" else None
        state = [w, torch.ones(V, D), torch.full((V, D), 4.0), None, None]
        given = state, rows, torch.zeros(n if kind == "sparse" else V, D)
        made.append((*given, rounding(*given, "reference")))
    return made


def rounding(state, rows, grad, backend):
    seed = torch.tensor([-(2**62) + 17])
    return step(copies(state), rows, grad, backend=backend, t=5.0, seed=seed, number=3, eps=0.0)[0]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_stochastic_rounding_is_the_same_everywhere(backend, kind):
    for *given, twins in rounded(kind):
        ours = rounding(*given, backend)
        difference = (twins != ours) & ~twins.isnan()
        # w in float32 may differ in its last bit, which once in 2**16 decides
        assert difference.float().mean() < 1e-3 and torch.equal(twins.isnan(), ours.isnan())


def test_stochastic_rounding_is_right_on_average(backend):
    """w = 1 moves half the way to bfloat16's next number: so half of the elements go there, others for each number."""
    state = [torch.ones(4, 8192, dtype=torch.bfloat16), torch.ones(4, 8192), torch.ones(4, 8192), None, None]
    zero, rate = torch.zeros(4, 8192), torch.tensor(2.0**-9)
    outcomes = []
    for number in (0, 1):
        w = copies(state)
        lazy_adam_step(
            *w, None, zero, rate, torch.tensor(1.0), torch.tensor([5]), 0.5, 0.25, 0.0, 0.0, NO_BIAS_CORRECTION, -1,
            number, None, None, None, requested(),
        )  # fmt: skip
        outcomes.append(w[0])  # m = 1/2, sqrt(v) = 1/2: the step is lr
    for w in outcomes:
        moved = (w != 1).double().mean()
        assert abs(moved - 0.5) < 0.02 and set(w.unique().tolist()) == {1.0, 1 - 2.0**-8}
    assert not torch.equal(*outcomes)


def test_row_steps_correct_each_row_by_its_own_count(backend):
    for rows in (torch.tensor([4, 0, 4]), None):
        grad = torch.randn(6 if rows is None else 3, 5)
        state = tables(6, 5, row_steps=True)
        ours = step(copies(state), rows, grad)
        for row in range(6) if rows is None else (0, 4):
            alone = step([*copies(state)[:4], None], rows, grad, t=float(state[4][row]) + 1)
            torch.testing.assert_close(ours[0][row], alone[0][row])
        touched = torch.ones(6) if rows is None else torch.tensor([1, 0, 0, 0, 1, 0])
        assert torch.equal(ours[4], (state[4] + touched).int())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_duplicates_are_summed_in_float32(backend, dtype):
    """torch's coalesce makes 256 of this in bfloat16."""
    state = [torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3), torch.zeros(2, 3), None, None]
    step(state, torch.ones(4096, dtype=torch.int64), torch.ones(4096, 3, dtype=dtype))
    torch.testing.assert_close(state[1], torch.tensor([[0.0], [409.6]]).expand(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kernels, kind):
    """Sorting, rows and the columns of rows with many gradients are shared; dense tensors are cut into chunks."""
    for V, D, n in ((3000, 24, 33000), (2, 100, 10000)):
        for with_row_steps in (True, False):
            state = tables(V, D, torch.float32, amsgrad=True, row_steps=with_row_steps)
            rows = None if kind == "dense" else torch.randint(0, V, (n,)) ** 2 // V
            grad = torch.randn(n if kind == "sparse" else V, D)
            flags = GRAD_BY_ROW if kind == "by_row" else 0
            assert_same_for_threads(lambda given=(state, rows, grad, flags): step(copies(given[0]), *given[1:]))


def test_a_step_starts_no_threads():
    """A region of fewer threads than the pool has would end the others, their memory with them."""
    if "cpu" not in fastbert.backends():
        pytest.skip("no kernels here")

    def ours():
        step(tables(1000, 2), torch.randint(0, 1000, (40000,)), torch.randn(40000, 2), backend="cpu")
        return set(os.listdir("/proc/self/task"))

    count = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        before = ours()
        assert ours() == before and len(before) >= 4
    finally:
        torch.set_num_threads(count)


def test_rows_without_columns_step(best):
    param = torch.nn.Parameter(torch.zeros(5, 0))
    param.grad = torch.zeros(5, 0)
    optimizer = fastbert.LazyAdam([param], row_wise=True, bias_correction="row", lazy="nonzero")
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_order_of_duplicates_is_the_order_they_stand_in(backend):
    """1e8 + 1 - 1e8 in float32 is 0 from left to right, 1 with the large ones first."""
    for values, total in (((1e8, 1.0, -1e8), 0.0), ((1e8, -1e8, 1.0), 1.0)):
        state = [torch.zeros(9, 17), torch.zeros(9, 17), torch.zeros(9, 17), None, None]
        rows = torch.tensor([8, 5, 5, 1, 5])
        step(state, rows, torch.tensor([2.0, values[0], values[1], 3.0, values[2]]).unsqueeze(1).expand(5, 17))
        torch.testing.assert_close(state[1][5], torch.full((17,), 0.1 * total))


def test_inf_and_nan_flow_as_in_torch(backend):
    grad = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 1.0]])
    for amsgrad in (False, True):
        state = tables(1, 5, amsgrad=amsgrad)
        ours, theirs = step(copies(state), None, grad), torch_step(state, None, grad, 0)
        for a, b in zip(ours[:4], theirs, strict=False):
            if a is not None:
                torch.testing.assert_close(a, b, equal_nan=True)


def test_gradient_of_another_dtype_and_stride(backend):
    state, rows = tables(6, 20), torch.tensor([3, 3, 0, 5])
    grad = torch.randn(20, 4).bfloat16().T
    for a, b in zip(step(copies(state), rows, grad), step(copies(state), rows, grad.float().contiguous()), strict=True):
        assert a is b is None or torch.equal(a, b)
    spread = torch.stack([rows, rows], 1)[:, 0]
    assert not spread.is_contiguous() and torch.equal(
        step(copies(state), spread, grad)[0], step(copies(state), rows, grad)[0]
    )


def test_a_float64_gradient_of_a_float32_parameter(backend):
    state, rows, grad = tables(9, 5), torch.tensor([2, 7, 2]), torch.randn(3, 5)
    expected = step(copies(state), rows, grad)
    for ours, theirs in zip(step(state, rows, grad.double()), expected, strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs)


@pytest.mark.parametrize("missed", ["leave", "replay"])
def test_the_default_device_is_of_no_account(best, missed):
    """Scratch memory is where the table is."""

    def trained(device):
        torch.manual_seed(0)
        table = torch.nn.Embedding(20, 4, sparse=True)
        optimizer = fastbert.LazyAdam(table.parameters(), missed=missed)
        optimizer.attach(table)
        for ids in (torch.tensor([1, 2, 1]), torch.tensor([2, 3, 4])):
            table(ids).square().sum().backward()
            with torch.device(device):
                optimizer.step()
                optimizer.flush()
            optimizer.zero_grad()
        return table.weight

    assert torch.equal(trained("meta"), trained("cpu"))


def test_a_bfloat16_first_moment_beside_float64():
    """The twin's: rounded where it is stored, and float64 where it is used."""
    w, m, v = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2).bfloat16(), torch.zeros(3, 2).double()
    step([w, m, v, None, None], None, torch.full((3, 2), 0.5).double(), backend="reference")
    assert m[0, 0] == torch.tensor(0.05).bfloat16() and v[0, 0] == pytest.approx(0.001 * 0.25, rel=1e-12)


def test_any_shape(backend):
    for shape in ((), (0, 4), (3,), (2, 3, 5)):
        w, grad = torch.randn(shape), torch.randn(shape)
        state = [w, torch.zeros(shape), torch.zeros(shape), None, None]
        expected = torch_step(
            [x if x is None else x.reshape(-1, 1) for x in copies(state)], None, grad.reshape(-1, 1), 0
        )
        torch.testing.assert_close(step(state, None, grad)[0], expected[0].view(shape))
    state, rows = [torch.randn(4, 3, 5), *(torch.zeros(4, 3, 5) for _ in range(2)), None, None], torch.tensor([2, 2])
    flat = [x if x is None else x.flatten(1).clone() for x in state]
    grad = torch.randn(2, 3, 5)
    assert torch.equal(step(state, rows, grad)[0].flatten(1), step(flat, rows, grad.flatten(1))[0])


BAD = {
    "an id beyond the table": (ValueError, r"row ids must lie in \[0, 6\), got 6", dict(rows=torch.tensor([0, 6]))),
    "a negative id": (ValueError, r"row ids must lie in \[0, 6\), got -1", dict(rows=torch.tensor([-1, 0]))),
    "int32 ids": (ValueError, "rows must be int64", dict(rows=torch.tensor([0, 1], dtype=torch.int32))),
    "a gradient of other rows": (ValueError, r"grad must have shape \[2, 4\]", dict(grad=torch.randn(3, 4))),
    "an integer gradient": (TypeError, "floating", dict(grad=torch.ones(2, 4, dtype=torch.int64))),
    "state of another shape": (ValueError, "must be torch.float32 or bfloat16 of its", dict(m=torch.zeros(6, 5))),
    "state in float16": (ValueError, "must be torch.float32", dict(m=torch.zeros(6, 4).half())),
    "v of other rows": (ValueError, r"of its shape \[6, 4\] or of \[6, 1\]", dict(v=torch.zeros(6))),
    "strided state": (ValueError, "contiguous", dict(m=torch.zeros(4, 6).T)),
    "an unknown flag": (ValueError, "flags must be", dict(flags=64)),
    "a float32 param to round": (ValueError, "takes a bfloat16 param", dict(seed=torch.tensor([1]))),
    "zeros of a sparse gradient": (ValueError, "gradient by row", dict(flags=SKIP_ZERO)),
    "row steps of another shape": (ValueError, r"row_steps must be int32 \[6\]", dict(row_steps=torch.zeros(5).int())),
    "strided row steps": (ValueError, "contiguous", dict(row_steps=torch.zeros(12).int()[::2])),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(best, what):
    error, message, given = BAD[what]
    if best == "cuda" and what in ("an id beyond the table", "a negative id"):
        message = "row id outside its table"  # which the kernels find, and nobody waits for
    state = tables(6, 4)
    state[1], state[2], state[4] = given.get("m", state[1]), given.get("v", state[2]), given.get("row_steps")
    before = copies(state)
    with pytest.raises(error, match=message):
        step(state, given.get("rows", torch.tensor([0, 1])), given.get("grad", torch.randn(2, 4)),
             given.get("flags", 0), seed=given.get("seed"))  # fmt: skip
        fastbert.check_device_errors()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "flags", "options"),
    [
        (torch.float32, GRAD_BY_ROW, {"amsgrad": True, "row_steps": True}),
        (torch.bfloat16, 0, {}),
        (torch.float16, 0, {}),
    ],
    ids=str,
)
def test_custom_op_is_sound(dtype, flags, options):
    grad = torch.randn(4 if flags else 3, 8, dtype=dtype)
    numbers = (torch.tensor(0.01), torch.tensor(2.0), None, 0.9, 0.999, 1e-8, 0.1)
    state = tables(4, 8, dtype, **options)
    torch.library.opcheck(
        lazy_adam_step, (*state, torch.tensor([1, 1, 3]), grad, *numbers, flags, -1, 0, None, None, None, "")
    )


def test_an_explicit_backend_that_cannot_run_raises():
    state, grad = copies(tables(3, 4), wide=True), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cannot run"):
        step(state, None, grad, backend="cuda")
    if "cpu" in fastbert.backends():
        with pytest.raises(RuntimeError, match=r"got torch\.float64"):
            step(state, None, grad, backend="cpu")
