"""What LazyAdam's dense step and the norm of gradients have on GPUs alone: many tensors in a launch, numbers a step
reads on the device, and traffic. That they are right in all cases is tests/ops/test_lazy_adam.py's.
"""

from collections.abc import Callable

import pytest
import torch
from emulated_backend import Module

from fastbert.backends import gradient_norm as norms
from fastbert.backends import lazy_adam as kernels
from fastbert.backends import native
from fastbert.ops.lazy_adam import Step

CHUNK, NORM_CHUNK = 4096, 16384
DTYPES = torch.float32, torch.bfloat16, torch.float16


def step_of(shape, dtype=torch.float32, m_dtype=torch.float32, amsgrad=False, lr=0.01, **options):
    state = [torch.randn(shape).to(dtype), torch.randn(shape).to(m_dtype), torch.rand(shape)]
    given = dict(
        max_exp_avg_sq=torch.rand(shape) if amsgrad else None, row_steps=None, rows=None,
        grad=torch.randn(shape).to(dtype), lr=torch.tensor(lr, dtype=torch.float64), step=torch.tensor(3.0), seed=None,
        beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, flags=0, padding_idx=-1, number=0,
    )  # fmt: skip
    return Step(*state, **(given | options))


def copied(steps):
    return [Step(*(x.clone() if isinstance(x, torch.Tensor) else x for x in s)) for s in steps]


def run(module, steps):
    """The steps by the emulated kernels, and on the CPU by the package's; both changed in place."""
    ours, theirs = copied(steps), copied(steps)
    with module.running():
        kernels.lazy_adam_steps(ours)
    if native.module is not None:
        kernels.lazy_adam_steps(theirs)
    return ours, theirs


def assert_near(ours, theirs):
    """Roots and quotients may differ in their last bit, and a bfloat16 that lies between two by its own."""
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.changed, b.changed, strict=True):
            rtol = 1e-5 if x.dtype == torch.float32 else 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-9
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6)


def mixture():
    """Every dtype of param, first moment and gradient, sizes about a vector and a chunk, several formulas."""
    sizes = [1, 3, 4, 1020, CHUNK - 1, CHUNK, CHUNK + 5, 0, 2 * CHUNK]
    steps = [step_of((size,), amsgrad=size % 2 == 0) for size in sizes]
    for number, dtype in enumerate(DTYPES):
        for m_dtype in DTYPES[:2]:
            steps.append(step_of((7, 40), dtype, m_dtype, lr=0.1 * number, grad=torch.randn(7, 40)))
    bf16 = torch.randn(9, 8).bfloat16()
    return [*steps, step_of((9, 8), grad=bf16), step_of((9, 8), padding_idx=4), step_of((5, 3), padding_idx=0)]


def test_many_tensors_of_any_mixture(module):
    steps = mixture()
    assert_near(*run(module, steps))


def test_more_tensors_and_formulas_than_a_launch_takes(module):
    """282 tensors, 16 formulas: 20 groups of 15 tensors, each with its own weight decay."""
    if module.library.trace:
        pytest.skip("the same kernels as above")
    steps = [step_of((3,), weight_decay=0.01 * (i // 15)) for i in range(300)]
    ours, theirs = run(module, steps)
    assert_near(ours, theirs)


def test_unaligned_addresses(module):
    """Of which no 16 bytes can be read at once: a view that begins at the second number."""
    flat = [torch.rand(CHUNK + 9)[1:] for _ in range(4)]
    steps = [Step(*flat[:3], *step_of((CHUNK + 8,))[3:])._replace(grad=flat[3])]
    ours, theirs = copied(steps), copied(steps)
    ours = [s._replace(param=flat[0], exp_avg=flat[1], exp_avg_sq=flat[2], grad=flat[3]) for s in ours]
    assert ours[0].param.data_ptr() % 16 == 4
    with module.running():
        kernels.lazy_adam_steps(ours)
    kernels.lazy_adam_steps(theirs)
    assert_near(ours, theirs)


@pytest.mark.skipif(native.module is None, reason="compares with the C++ module")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_cpu(module, dtype):
    """Of numbers that no operation has to round: powers of two, whose roots and quotients are exact too.

    g is multiplied by -1/2, m = (m + g) / 2, v = g * g / 4, w = 3/4 w - 1/2 m / |g / 2|; w of bfloat16 is rounded by
    random numbers where it has too many bits.
    """
    n, sign = 2 * CHUNK + 40, torch.randint(0, 2, (2 * CHUNK + 40,)) * 2.0 - 1
    g, m = 2.0 ** torch.randint(-2, 3, (n,)) * sign, 2.0 ** torch.randint(-2, 3, (n,))
    w = torch.randint(-8, 9, (n,)).to(dtype)
    for seed in (None, torch.tensor([11])) if dtype == torch.bfloat16 else (None,):
        state = (x.view(-1, 8) for x in (w.clone(), m.clone(), torch.zeros(n)))
        step = Step(
            *state, None, None, None, g.to(dtype).view(-1, 8), torch.tensor(0.5, dtype=torch.float64),
            torch.tensor(3.0), seed, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.5, flags=2 | 8, padding_idx=2,
            number=1, grad_factor=torch.tensor(0.5),
        )  # fmt: skip
        ours, theirs = run(module, [step])
        assert all(torch.equal(a, b) for a, b in zip(ours[0].changed, theirs[0].changed, strict=True))
        assert not torch.equal(ours[0].param, step.param) and torch.equal(ours[0].param[2], step.param[2])


def test_the_bits_of_the_row_step(module):
    """The formula is one: a table all of whose rows are named moves as a dense one does."""
    for options in ({}, {"seed": torch.tensor([7]), "dtype": torch.bfloat16}, {"m_dtype": torch.bfloat16}):
        dense = step_of((6, 72), amsgrad=True, number=3, **options)
        (named,) = copied([dense])
        named = named._replace(rows=torch.tensor([3, 0, 5, 1, 4, 2]), flags=1)  # GRAD_BY_ROW
        with module.running():
            kernels.lazy_adam_steps([dense])
            kernels.lazy_adam_steps([named])
        assert all(torch.equal(a, b) for a, b in zip(dense.changed, named.changed, strict=True))


def test_a_factor_is_as_if_gradients_had_been_multiplied(module):
    factor, rows = torch.tensor(0.3), torch.tensor([2, 2, 5])
    for grad, ids in ((torch.randn(7, 9), None), (torch.randn(3, 9), rows)):
        plain = step_of((7, 9), rows=ids, grad=grad * factor)
        (scaled,) = copied([plain])
        scaled = scaled._replace(grad=grad, grad_factor=factor)
        with module.running():
            kernels.lazy_adam_steps([plain])
            kernels.lazy_adam_steps([scaled])
        for a, b in zip(plain.changed, scaled.changed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6) if ids is not None else assert_equal(a, b)


def assert_equal(a, b):
    assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 1, 3])], ids=["dense", "rows"])
def test_found_inf_leaves_everything(module, rows):
    counted = torch.ones(5, dtype=torch.int32)
    for row_steps in (None, counted):
        for flags in (0, 32) if rows is None else (0,):  # SKIP_ZERO
            given = dict(rows=rows, row_steps=row_steps, flags=flags, found_inf=torch.tensor(1.0))
            step = step_of((5, 8), **given, **({} if rows is None else {"grad": torch.randn(3, 8)}))
            (ours,), _ = run(module, [step])
            assert all(torch.equal(a, b) for a, b in zip(ours.changed, step.changed, strict=True))
    assert counted.tolist() == [1] * 5


def test_a_copy_in_bfloat16_is_written_with_the_weight(module):
    rows = torch.tensor([4, 1, 4])
    for step in (
        step_of((6, 20)),
        step_of((6, 20), rows=rows, grad=torch.randn(3, 20)),
        step_of((6, 7), padding_idx=2),
    ):
        shape = step.param.shape
        (ours,), (theirs,) = run(module, [step._replace(bf16_copy=torch.full(shape, 7.0).bfloat16())])
        moved = torch.zeros(6, dtype=torch.bool)
        moved[rows if step.rows is not None else slice(None)] = True
        if step.padding_idx >= 0:
            moved[step.padding_idx] = False
        for its in (ours, theirs):
            assert torch.equal(its.bf16_copy[moved], its.param.bfloat16()[moved])
            assert (its.bf16_copy[~moved] == 7).all()


def test_a_bad_id_leaves_dense_parameters_too(module):
    """What is found by a kernel is found before anything moves."""
    steps = [step_of((9,)), step_of((5, 4), rows=torch.tensor([1, 5]), grad=torch.randn(2, 4))]
    ours = copied(steps)
    with module.running():
        kernels.lazy_adam_steps(ours)
    assert all(
        torch.equal(a, b) for s, t in zip(ours, steps, strict=True) for a, b in zip(s.changed, t.changed, strict=True)
    )
    with pytest.raises(ValueError, match="lazy_adam was given a row id outside its table"):
        module.compiled.check_faults()


# ---- norm ------------------------------------------------------------------------------------------------


def measured(module, gradients, max_norm=1.0):
    with module.running():
        return norms.gradient_norm(gradients, max_norm)


def test_norm_of_any_mixture(module):
    sizes = [1, 5, NORM_CHUNK - 1, NORM_CHUNK, NORM_CHUNK + 3, 0]
    gradients = [(torch.randn(size).to(dtype), None) for size in sizes for dtype in DTYPES]
    gradients.append((torch.randn(40)[1:], None))  # no 16 bytes of which can be read at once
    named = torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8)
    gradients += [(torch.randn(5, columns), named) for columns in (7, 64)]
    counted = [(x if rows is None else x[rows.bool()]).double().flatten() for x, rows in gradients]
    truth = torch.linalg.vector_norm(torch.cat(counted))
    norm, factor = measured(module, gradients, 2.5)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)
    assert factor == (2.5 / (norm.double() + 1e-6)).float()


def test_norm_of_more_tensors_than_a_launch_takes(module):
    if module.library.trace:
        pytest.skip("the same kernels as above")
    assert measured(module, [(torch.full((1,), 2.0), None)] * 900)[0] == 60


def test_factors(module):
    """At most 1, 0 where a gradient is infinite, NaN where one is."""
    for value, max_norm, expected in ((3.0, 4.0, 1.0), (3.0, 1.5, 0.5), (torch.inf, 1.0, 0.0), (0.0, 0.0, 0.0)):
        norm, factor = measured(module, [(torch.tensor([value]), None)], max_norm)
        assert norm == value and factor == pytest.approx(expected, abs=1e-6)
    assert measured(module, [(torch.tensor([torch.nan]), None)]).isnan().all()


# ---- traffic ---------------------------------------------------------------------------------------------


def assert_moves_little_more_than(traced: Module, call: Callable[[], object], floor: int):
    with traced.running():
        call()
    library = traced.library
    bytes_of = {key: n for key, n in library.traffic().items() if not key[0].startswith(("lr", "step", "faults"))}
    total = sum(bytes_of.values())
    assert floor <= total <= 1.1 * floor, library.table()
    for row in library.accesses():
        if not row.shared and row.requests > 8:  # all but what a block reads once, by one thread
            assert row.efficiency >= 0.9, library.table()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "with_copy", "bytes_of_element"),
    [
        (torch.float32, torch.float32, False, 28),
        (torch.float32, torch.bfloat16, True, 28),  # the gradient 2 less, the copy 2 more
        (torch.bfloat16, torch.bfloat16, False, 22),
    ],
    ids=["float32", "bfloat16 gradient and copy", "bfloat16"],
)
def test_a_dense_step_moves_each_byte_once(traced, dtype, grad_dtype, with_copy, bytes_of_element):
    n = 4 * CHUNK
    step = step_of((n,), dtype, grad=torch.randn(n).to(grad_dtype))
    if with_copy:
        step = step._replace(bf16_copy=torch.empty(n, dtype=torch.bfloat16))
    assert_moves_little_more_than(traced, lambda: kernels.lazy_adam_steps([step]), n * bytes_of_element)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_norm_reads_each_byte_once(traced, dtype):
    grad = torch.randn(2 * NORM_CHUNK).to(dtype)
    size = grad.numel() * grad.element_size()
    assert_moves_little_more_than(traced, lambda: norms.gradient_norm([(grad, None)], 1.0), size)
