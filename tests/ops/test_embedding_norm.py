"""Embeddings added, normalized and dropped in one op: against float64, and its gradients by torch's own ways."""

import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_same_for_threads, assert_solves, drawn, problem

from fastbert.ops import embedding_norm as op
from fastbert.ops import philox
from fastbert.ops.embedding_norm import Table, embedding_norm

SEED, EPS = torch.tensor([-(2**40) - 3]), 1e-5
ROWS = 50, 20, 2, 3
# Tokens, columns.
CASES = {
    "no tokens": (0, 8),
    "one column": (3, 1),
    "a tail alone": (4, 5),
    "vectors and a tail": (7, 81),
    "several groups": (6, 768),
    "more columns than are drawn at a time": (2, 1500),
}
# Which tables have ids (the others' first row is added), whether there are tasks, p. Kept elements are doubled, which
# rounds nothing: what dropout makes of dy is rounded before it is added up, unlike dy itself.
WAYS = [
    ("words positions types", False, 0.5),
    ("words positions", True, 0.0),
    ("words positions types tasks", True, 0.5),
]


def torchs(ids, p, *tensors):
    """PyTorch's own ops in the tables' dtype, with our mask."""
    *tables, weight, bias = tensors
    z = sum(table[0] if its is None else F.embedding(its, table) for its, table in zip(ids, tables, strict=True))
    y = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), EPS)
    keep = philox.lanes(y.shape[1], torch.arange(len(y)).unsqueeze(-1), 0, 0, SEED) >= philox.threshold(p)
    return y * keep * philox.scale(philox.threshold(p)) if p else y


def ours(ids, p, *tensors):
    *tables, weight, bias = tensors
    tables = [Table(table, its) for table, its in zip(tables, ids, strict=True)]
    return embedding_norm(tables, weight, bias, EPS, p, SEED)[0]


@functools.cache
def cases(case, dtype):
    tokens, columns = CASES[case]
    generator, made = drawn("embedding_norm", case, dtype), []
    for named, with_tasks, p in WAYS:
        names = op.NAMES if with_tasks else op.NAMES[:3]
        ids = [
            torch.randint(rows, (tokens,), generator=generator) if name in named.split() else None
            for name, rows in zip(names, ROWS, strict=False)
        ]
        for weight_dtype in dict.fromkeys((torch.float32, dtype)):
            tables = [torch.randn(rows, columns, generator=generator).to(dtype) for rows in ROWS[: len(names)]]
            weight, bias = (torch.randn(columns, generator=generator).to(weight_dtype) for _ in range(2))
            dy = torch.randn(tokens, columns, generator=generator).to(dtype)
            functions = (functools.partial(f, ids, p) for f in (ours, torchs))
            # With one column z's gradient is a difference that is 0.
            term = (dy * weight).abs().sum().item() * EPS**-0.5 if columns == 1 else 1e-30
            given = problem((*tables, weight, bias), dy, *functions)
            made.append((ids, p, term, ["y", *names, "dweight", "dbias"], given))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_close_to_truth(backend, nan_filled, case, dtype):
    for ids, p, term, names, given in cases(case, dtype):
        y, *_ = assert_solves(functools.partial(ours, ids, p), given, names, term)
        assert y.dtype == dtype


def given(tokens=9, columns=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    tables = [torch.randn(rows, columns, generator=generator).to(dtype) for rows in ROWS[:3]]
    ids = [torch.randint(rows, (tokens,), generator=generator) for rows in ROWS[:3]]
    return tables, ids, torch.randn(columns, generator=generator), torch.randn(columns, generator=generator)


def test_y_is_rounded_once_where_float32_tables_meet_autocast(backend):
    tables, ids, weight, bias = given()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(ids, 0.0, *tables, weight, bias)
    assert y.dtype == torch.bfloat16
    z = sum(table[its] for table, its in zip(tables, ids, strict=True)).bfloat16()
    expected = F.layer_norm(z.float(), z.shape[-1:], weight, bias, EPS)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_masks_are_dropouts_and_nothing_depends_on_threads(kernels):
    tables, ids, weight, bias = given(tokens=200, columns=300)
    y = ours(ids, 0.5, *tables, weight, bias)
    keep = philox.lanes(300, torch.arange(200).unsqueeze(-1), 0, 0, SEED) >= philox.threshold(0.5)
    assert torch.equal(y != 0, keep)
    leaves = [each.requires_grad_() for each in (*tables, weight, bias)]

    def results():
        y = ours(ids, 0.5, *leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    assert_same_for_threads(results)


def test_gradients_by_padding_row_sparse_rows_and_int32_ids():
    tables, ids, weight, bias = given()
    ids[0][:3] = 7
    words = tables[0].requires_grad_()
    dy = torch.randn(9, 24)

    def gradient(padding_idx, sparse, its):
        others = (Table(*each) for each in zip(tables[1:], ids[1:], strict=True))
        all_of_them = [Table(words, its, padding_idx, sparse), *others]
        y, again = embedding_norm(all_of_them, weight, bias, EPS)
        assert again.data_ptr() == words.data_ptr()
        return torch.autograd.grad((y * dy).sum() + (again.sum() if not sparse else 0.0), words)[0]

    dense = gradient(None, False, ids[0])
    assert torch.equal(gradient(None, False, ids[0].int()), dense)
    padded = gradient(7, False, ids[0])
    assert torch.equal(padded[7], torch.ones(24)) and torch.equal(padded[:7], dense[:7])
    sparse = gradient(None, True, ids[0])
    assert sparse.is_sparse and sparse._indices().shape == (1, 9)
    torch.testing.assert_close(sparse.to_dense() + 1, dense)


def test_a_frozen_table_takes_no_gradient():
    tables, ids, weight, bias = given()
    tables[1].requires_grad_()
    ours(ids, 0.1, *tables, weight, bias).sum().backward()
    assert tables[0].grad is None and tables[1].grad is not None


def test_gradcheck_of_the_twin():
    tables, ids, weight, bias = given(tokens=5, columns=6)
    leaves = [each.double().requires_grad_() for each in (*tables, weight, bias)]
    assert torch.autograd.gradcheck(lambda *leaves: ours(ids, 0.3, *leaves), leaves)


def test_bad_input(kernels):
    tables, ids, weight, bias = given()

    def call(change=None, place=0, **options):
        changed = [Table(*each) for each in zip(tables, ids, strict=True)]
        if change is not None:
            changed[place] = changed[place]._replace(**change)
        return embedding_norm(changed, options.get("weight", weight), bias, options.get("eps", EPS), 0.1, SEED)

    for wrong in (-1, 20):
        with pytest.raises(ValueError, match=rf"ids of positions must lie in \[0, 20\).*got {wrong} for token 4"):
            its = ids[1].clone()
            its[4] = wrong
            call({"ids": its}, 1)
    with pytest.raises(ValueError, match=r"positions must be a table \[V, 24\]"):
        call({"weight": torch.ones(3, 23)}, 1)
    with pytest.raises(ValueError, match=r"types must be like words, torch.float32"):
        call({"weight": tables[2].bfloat16()}, 2)
    with pytest.raises(ValueError, match="positions need ids"):
        call({"ids": None}, 1)
    with pytest.raises(ValueError, match=r"ids of types must be int64 or int32 \[T\].*torch.float32"):
        call({"ids": ids[2].float()}, 2)
    with pytest.raises(ValueError, match="weight must have shape"):
        call(weight=torch.ones(3))
    with pytest.raises(ValueError, match="eps is added"):
        call(eps=-1.0)
    with pytest.raises(ValueError, match="three or four tables"):
        embedding_norm([Table(tables[0], ids[0])], weight, bias)
