"""The norm and the clipping of mixed gradients."""

import pytest
import torch
from torch import nn

from fastbert import LazyAdam, clip_grad_norm_


def test_clips_dense_as_torch(best):
    for max_norm in (0.5, 1e6):
        ours = [nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (70000,), (), (5000,))]
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        norm, expected = clip_grad_norm_(ours, max_norm), nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(norm, expected)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_norm_is_over_what_is_applied(best):
    """Sparse rows 3 + 0 and, twice, (4, 0): norm of (3, 8); dense rows named 1 and 1: 6 alone, not 100."""
    sparse, dense = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(3, 1))
    plain = nn.Parameter(torch.zeros(()))
    values = torch.tensor([[4.0], [3.0], [4.0]])
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), values, (4, 1), check_invariants=True)
    dense.grad = torch.tensor([[100.0], [6.0], [100.0]])
    plain.grad = torch.tensor(-6.0)
    rows = {dense: torch.tensor([1, 1])}
    norm = clip_grad_norm_([sparse, dense, plain], 145**0.5 / 2, rows=rows)
    torch.testing.assert_close(norm, torch.tensor(145.0).sqrt())  # 9 + 64 + 36 + 36
    torch.testing.assert_close(sparse.grad.to_dense(), torch.tensor([[1.5], [0.0], [4.0], [0.0]]))
    torch.testing.assert_close(dense.grad, torch.tensor([[100.0], [3.0], [100.0]]))
    torch.testing.assert_close(plain.grad, torch.tensor(-3.0))
    torch.testing.assert_close(clip_grad_norm_([sparse, dense, plain], 1e3, rows=rows), norm / 2)
    assert torch.equal(values, torch.tensor([[4.0], [3.0], [4.0]])), "another tensor's memory was scaled"


def test_clip_sums_duplicates_in_float32_and_takes_expanded_values(best):
    param = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    ids, ones = torch.ones(1, 4096, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bfloat16)
    param.grad = torch.sparse_coo_tensor(ids, ones.expand(4096, 1), (2, 1), check_invariants=True)
    norm = clip_grad_norm_(param, 1.0)
    assert norm == 4096 and norm.dtype == torch.float32 and param.grad.dtype == torch.bfloat16
    assert param.grad._values().unique().tolist() == [2**-12]


def test_clip_takes_a_dense_gradient_whose_elements_share_memory():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 4)]
    params[0].grad, params[1].grad = torch.full((2,), 3.0), torch.full((1,), 0.5).expand(4)
    norm = clip_grad_norm_(params, 1.0)
    assert norm.item() == pytest.approx(19**0.5)  # 2 * 9 + 4 / 4
    for param, before in zip(params, (3.0, 0.5), strict=True):
        assert param.grad.tolist() == pytest.approx([before / 19**0.5] * len(param), rel=1e-5)


def test_clip_when_not_finite_or_empty(best):
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([torch.nan, 1.0])
    with pytest.raises(RuntimeError, match="norm of the gradients is nan"):
        clip_grad_norm_(param, 1.0, error_if_nonfinite=True)
    assert param.grad[1] == 1
    assert clip_grad_norm_(param, 1.0).isnan() and param.grad.isnan().all()
    empty = nn.Parameter(torch.ones(3, 2))
    empty.grad = torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, 2), (3, 2), check_invariants=True)
    assert clip_grad_norm_(empty, 1.0) == 0


def test_the_optimizer_knows_its_norm(best):
    """Twice 3 in a sparse row, 8 in a named row: 10; 100 in rows that are not named."""
    sparse, dense = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(3, 1))
    sparse.grad = torch.sparse_coo_tensor(
        torch.tensor([[2, 2]]), torch.full((2, 1), 3.0), (4, 1), check_invariants=True
    )
    dense.grad = torch.tensor([[100.0], [8.0], [100.0]])
    optimizer = LazyAdam([{"params": [sparse]}, {"params": [dense]}])
    assert optimizer.grad_norm(rows={dense: torch.tensor([1])}) == 10
    dense.grad[0] = torch.inf
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        optimizer.grad_norm(error_if_nonfinite=True)
    assert optimizer.grad_norm().isinf()


def test_grad_scaler(best):
    """A scaled loss takes the same steps; one whose gradient overflows takes none."""
    embedding, other = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3, sparse=True)
    other.load_state_dict(embedding.state_dict())
    ours, plain = LazyAdam(embedding.parameters(), lr=0.1), LazyAdam(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, 2.0, torch.inf, 3.0):
        ids = torch.tensor([1, 4, 4])
        ours.zero_grad()
        scaler.scale((embedding(ids) * factor).sum()).backward()
        scaler.unscale_(ours)
        if factor < torch.inf:
            clip_grad_norm_(embedding.parameters(), 1.0)
        scaler.step(ours)
        scaler.update()
        if factor < torch.inf:
            plain.zero_grad()
            (other(ids) * factor).sum().backward()
            clip_grad_norm_(other.parameters(), 1.0)
            plain.step()
    torch.testing.assert_close(embedding.weight, other.weight)
    assert ours.state[embedding.weight]["step"] == 3
