import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, Problem, assert_same_for_threads, assert_solves, drawn

import fastbert
from fastbert.ops import cross_entropy as op
from fastbert.testing import assert_close, run

CASES = {
    "nothing": (0, 8),
    "one word": (1, 1),
    "a tail alone": (5, 3),
    "vectors and a tail": (3, 81),
    "one block": (2, 4096),
    "one more than a block": (3, 4097),
    "bert's words": (4, 30_522),
}


def problem(rows, columns, dtype, spread=3.0, generator=None):
    """Logits, labels with every third row ignored, and the gradient of each row's loss."""
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[2::3] = -100
    logits = torch.randn(rows, columns, generator=generator)
    return (logits * spread).to(dtype), labels, torch.randn(rows, generator=generator)


def torch_loss(x, labels, reduction="none"):
    """What the op replaces: a float32 copy of 16-bit logits first."""
    return F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction=reduction)


@functools.cache
def judged(case, dtype):
    x, labels, dlosses = problem(*CASES[case], dtype, generator=drawn("cross_entropy", case, dtype))
    by_torch = [run(lambda x: torch_loss(x, labels), (each,), dlosses.to(each.dtype)) for each in (x, x.double())]
    return labels, Problem((x,), dlosses, *by_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, nan_filled, case, dtype):
    labels, given = judged(case, dtype)
    losses, dlogits = assert_solves(
        lambda x: fastbert.cross_entropy(x, labels, reduction="none"), given, ("losses", "dlogits")
    )
    assert losses.dtype == torch.float32 and dlogits.dtype == dtype


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_reductions_are_torchs(backend, reduction):
    x, labels, _ = problem(7, 50, torch.float32)
    dloss = torch.randn(7) if reduction == "none" else torch.tensor(2.0)
    ours = run(lambda x: fastbert.cross_entropy(x, labels, reduction=reduction), (x,), dloss)
    theirs = run(lambda x: torch_loss(x, labels, reduction), (x,), dloss)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [0, 1, 1100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_are_reduced_in_the_op(backend, nan_filled, reduction, rows):
    """More rows than a block adds up at a time; none at all give 0, divided by 1."""
    x, labels, _ = problem(rows, 5, torch.float32)
    losses, _, _, result, count, hits = op.functions[backend].cross_entropy_forward(x, labels, -100, reduction)
    kept = max(1, int((labels != -100).sum()))
    assert count.item() == kept and result.shape == count.shape == ()
    assert hits.tolist() == [(x.argmax(1) == labels).sum(), (labels != -100).sum()] and (rows < 1100 or hits[0] > 100)
    torch.testing.assert_close(result.double(), losses.double().sum() / (kept if reduction == "mean" else 1))


def test_the_twin_is_torchs_in_float64():
    x, labels, dlosses = problem(6, 40, torch.float64)
    ours = run(lambda x: fastbert.cross_entropy(x, labels, reduction="none"), (x,), dlosses)
    theirs = run(lambda x: torch_loss(x, labels), (x,), dlosses)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_reference_gradients(reduction):
    x, labels, _ = problem(4, 6, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fastbert.cross_entropy(x, labels, reduction=reduction), (x,))


@pytest.mark.parametrize("shift", [1e4, -1e4, 3e38])
def test_large_logits_keep_their_digits(backend, shift):
    """A logarithm of the sum rounded to the size of the logits would be off by 1e-3 here, and so every gradient."""
    x, labels, dlosses = problem(4, 5000, torch.float32)
    x = x + shift
    ours = run(lambda x: fastbert.cross_entropy(x, labels, reduction="none"), (x,), dlosses)
    truth = run(lambda x: torch_loss(x, labels), (x.double(),), dlosses.double())
    assert_close(ours[0], None, truth[0], what="losses")
    assert_close(ours[1], None, truth[1], what="dlogits")


@functools.cache
def extremes(dtype):
    """One such logit a row: the label's in the first row, another's in the second, and in an ignored one; by torch."""
    made, generator = [], drawn("extremes", dtype)
    for value in (torch.inf, -torch.inf, torch.nan, 6e4, -6e4):
        for place in (0, 17, 5000):
            x, _, dlosses = problem(3, 5001, dtype, generator=generator)
            x[:, place] = value
            labels = torch.tensor([place, 5000 - place + 1 if place else 1, -100])
            truth = run(lambda x, labels=labels: torch_loss(x, labels), (x.double(),), dlosses.double())
            truth[1][2] = 0  # torch lets NaN through rows that are ignored
            made.append((value, place, x, labels, dlosses, truth))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_as_torchs(backend, dtype):
    for value, place, x, labels, dlosses, truth in extremes(dtype):
        ours = run(lambda x, labels=labels: fastbert.cross_entropy(x, labels, reduction="none"), (x,), dlosses)
        for what, mine, true in zip(("losses", "dlogits"), ours, truth, strict=True):
            assert_close(mine, None, true, what=f"{what} with {value} at {place}")


@pytest.mark.parametrize("columns", [3, 9000])
def test_rows_of_nothing_but_infinity(backend, columns):
    x = torch.full((3, columns), -torch.inf)
    x[1, columns - 1] = 2.0  # the only possible word, behind whole blocks of -inf, and the label
    x[2, columns - 1] = 2.0  # likewise, but not the label
    labels = torch.tensor([0, columns - 1, 0])
    losses, dx = run(lambda x: fastbert.cross_entropy(x, labels, reduction="none"), (x,), torch.ones(3))
    assert losses[0].isnan() and dx[0].isnan().all()
    assert losses[1] == 0 and (dx[1] == 0).all()
    assert losses[2] == torch.inf and dx[2, 0] == -1 and dx[2, columns - 1] == 1


def test_worked_out_by_hand(backend):
    """softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8."""
    x = torch.tensor([1.0, 2.0, 5.0]).log().repeat(2, 1)
    labels = torch.tensor([1, 7])
    loss, dx = run(lambda x: fastbert.cross_entropy(x, labels, ignore_index=7), (x,), torch.ones(()))
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())
    torch.testing.assert_close(dx, torch.tensor([[0.125, -0.75, 0.625], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_predictions_by_hand(backend, dtype):
    """Of several greatest logits each is right; rows that are ignored, and those of NaN or +inf, are not."""
    x = torch.tensor([0.5, 3.0, -2.0, 3.0, 2.984375]).repeat(10, 1)
    x[5], x[6], x[7, 1], x[8, 1] = -300.0, torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([1, 3, 4, 0, -100, 2, 1, 1, 3, 1])
    x[9] = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf, -torch.inf])  # the loss is 0
    loss, hits = op.cross_entropy_with_hits(x.to(dtype).requires_grad_(), labels, reduction="sum")
    assert hits.tolist() == [5, 9] and hits.dtype == torch.float32 and not hits.requires_grad
    assert op.cross_entropy_with_hits(x.to(dtype), labels)[1].tolist() == [5, 9], "without a gradient"
    assert loss.isnan() and op.cross_entropy_with_hits(x, labels, reduction="none")[1].shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_label_at_all_is_zero(backend, reduction):
    x = torch.full((2, 5), torch.nan)
    labels = torch.tensor([-100, -100])
    loss, dx = run(lambda x: fastbert.cross_entropy(x, labels, reduction=reduction), (x,), torch.ones(()))
    assert loss == 0 and (dx == 0).all()


def test_not_contiguous(backend):
    x, labels, dlosses = problem(48, 64, torch.float32)
    strided = x.T.contiguous().T, torch.stack([labels, labels], 1)[:, 0], torch.stack([dlosses, dlosses], 1)[:, 0]
    for a, b in zip(
        run(lambda x: fastbert.cross_entropy(x, strided[1], reduction="none"), strided[:1], strided[2]),
        run(lambda x: fastbert.cross_entropy(x, labels, reduction="none"), (x,), dlosses),
        strict=True,
    ):
        torch.testing.assert_close(a, b)  # the twin adds in the order of memory


@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_padded_vocabulary_is_taken_as_it_is(backend, nan_filled, dtype, columns):
    """Logits that are the first columns of a wider product: what stands behind them counts for nothing, and the
    gradient lies in a tensor as wide, whose other columns are 0."""
    x, labels, dlosses = problem(5, columns, dtype)
    for wide in (
        torch.full((5, columns + 8), torch.inf, dtype=dtype),
        torch.full((5, columns + 3), torch.nan, dtype=dtype),
    ):
        view = wide[:, :columns].copy_(x)
        results = op.functions[backend].cross_entropy_forward(view, labels, -100, "mean")
        expected = op.functions[backend].cross_entropy_forward(x, labels, -100, "mean")
        dx = op.functions[backend].cross_entropy_backward(dlosses, view, labels, *expected[1:3], None, -100)
        dexpected = op.functions[backend].cross_entropy_backward(dlosses, x, labels, *expected[1:3], None, -100)
        for mine, true in zip((*results, dx), (*expected, dexpected), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-6, atol=0)
        assert dx.stride() == wide.stride()
        assert not dx.as_strided((5, wide.shape[1] - columns), wide.stride(), columns).any()


def test_a_padded_vocabulary_is_not_copied_through_autograd(best):
    wide, labels = torch.randn(6, 48), torch.arange(6)
    x = wide[:, :41].requires_grad_()
    (dx,) = torch.autograd.grad(fastbert.cross_entropy(x, labels), x)
    assert dx.stride() == (48, 1)
    # Rows further apart than padding explains: every other one.
    x = torch.randn(12, 200)[::2].requires_grad_()
    (dx,) = torch.autograd.grad(fastbert.cross_entropy(x, labels), x)
    assert dx.stride() == (200, 1)


def test_bits_do_not_depend_on_threads(kernels):
    x, labels, _ = problem(40, 1000, torch.float32)
    assert_same_for_threads(lambda: run(lambda x: fastbert.cross_entropy(x, labels), (x,), torch.ones(())))


def test_a_label_outside_is_refused(best):
    x, labels, _ = problem(6, 24, torch.float32)
    for label in (24, -1, -101, 2**40):
        labels[4] = label
        said = rf"labels must lie in \[0, 24\), or be .* \(-100\) .* got {label} in row 4"
        on_gpu = best in ("cuda", "triton")
        if on_gpu:  # nobody waits for a GPU: it gives NaN, and says so when it is asked
            assert fastbert.cross_entropy(x, labels).isnan()
            said = r"cross_entropy was given a label .*, in row 4: "
        with pytest.raises(ValueError, match=said):
            fastbert.check_device_errors() if on_gpu else fastbert.cross_entropy(x, labels)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_a_label_outside_is_refused_in_a_compiled_graph():
    compiled = torch.compile(fastbert.cross_entropy, fullgraph=True, backend="aot_eager")
    x, labels, _ = problem(6, 24, torch.float32)
    compiled(x, labels)
    with pytest.raises(ValueError, match="got 24 in row 4"):
        compiled(x, labels.index_fill(0, torch.tensor([4]), 24))


def test_autocast_leaves_the_logits_alone():
    x, labels, _ = problem(4, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastbert.cross_entropy(x, labels)
    assert torch.equal(loss, fastbert.cross_entropy(x, labels)) and loss.dtype == torch.float32


def test_bad_input():
    x, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'average'"):
        fastbert.cross_entropy(x, labels, reduction="average")
    with pytest.raises(ValueError, match=r"logits must be \[M, V\], got shape \[2, 2, 8\]"):
        fastbert.cross_entropy(x.view(2, 2, 8), labels)
    with pytest.raises(ValueError, match=r"labels must have shape \[4\], one a row, got \[3\]"):
        fastbert.cross_entropy(x, labels[:3])
    for bad in (1.0, None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match="ignore_index must be an int, got "):
            fastbert.cross_entropy(x, labels, bad)
    with pytest.raises(ValueError, match="ignore_index must be an int64"):
        fastbert.cross_entropy(x, labels, 2**63)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got None"):
        fastbert.cross_entropy(x, labels, reduction=None)
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        fastbert.cross_entropy(x, [0, 1, 2, 3])
    with pytest.raises(TypeError, match=r"labels must be int64, got torch\.int32"):
        fastbert.cross_entropy(x, labels.int())
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        fastbert.cross_entropy(torch.zeros(4, 8, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match="N >= 1"):
        fastbert.cross_entropy(torch.zeros(4, 0), labels)
