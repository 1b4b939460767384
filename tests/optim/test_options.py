"""What LazyAdam has beyond AdamW, option by option."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from fastbert import LazyAdam, use_backend
from fastbert.models.bert import BertConfig, BertModel

V, D = 8, 6


def table(dtype=torch.float32, **options):
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D, sparse=True).to(dtype)
    return embedding, LazyAdam(embedding.parameters(), **{"lr": 0.1, **options})


def train(embedding, optimizer, steps, ids=None):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(0, V, (4,), generator=generator) if ids is None else torch.tensor(ids)
        target = torch.randn(len(chosen), D, generator=generator).to(embedding.weight.dtype)
        optimizer.zero_grad()
        (embedding(chosen) * target).sum().backward()
        optimizer.step()


def test_equals_sparse_adam(best):
    """With its own eps, large enough to matter, over steps that touch different rows."""
    ours, optimizer = table(eps_mode="sparse_adam", eps=1e-2)
    theirs, _ = table()
    train(ours, optimizer, range(8))
    train(theirs, torch.optim.SparseAdam(theirs.parameters(), lr=0.1, eps=1e-2), range(8))
    torch.testing.assert_close(ours.weight, theirs.weight)
    other, plain = table(eps=1e-2)
    train(other, plain, range(8))
    assert (other.weight - ours.weight).abs().max() > 1e-3, "the two eps should differ here"


def test_equals_tensorflows_lazy_adam(best):
    """Its update, written out: global step, eps 1e-7 beside sqrt(v), duplicates added up, other rows untouched."""
    embedding, optimizer = table(eps_mode="sparse_adam", eps=1e-7)
    w = embedding.weight.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(6):
        train(embedding, optimizer, [step])
        grad = embedding.weight.grad.coalesce()
        rows, g = grad.indices()[0], grad.values().double()
        m[rows] = 0.9 * m[rows] + 0.1 * g
        v[rows] = 0.999 * v[rows] + 0.001 * g * g
        rate = 0.1 * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        w[rows] -= rate * m[rows] / (v[rows].sqrt() + 1e-7)
    torch.testing.assert_close(embedding.weight.double(), w, rtol=1e-5, atol=1e-6)


def test_berts_own(best):
    """Groups by number of axes; the first step is lr * (0.1 g / (sqrt(0.001) |g| + eps) + decay * w)."""
    model = BertModel(BertConfig(V, 8, 1, 2, 16, max_position_embeddings=4))
    optimizer = LazyAdam.bert(model, lr=0.1, weight_decay=0.5)
    decayed, others = optimizer.param_groups
    names = {id(param): name for name, param in model.named_parameters()}
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    assert all("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in others["params"])
    assert not any("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-6 and group["bias_correction"] is None
        for param in group["params"]:
            before, param.grad = param.detach().clone(), torch.randn_like(param)
            group["before"] = [*group.get("before", []), before]
    optimizer.step()
    for group in optimizer.param_groups:
        for param, before in zip(group["params"], group["before"], strict=True):
            g = param.grad
            expected = before - 0.1 * (0.1 * g / (0.001**0.5 * g.abs() + 1e-6) + group["weight_decay"] * before)
            torch.testing.assert_close(param.detach(), expected)


def test_rows_count_their_own_steps(best):
    """A row's third step is the third, whenever it comes: as if its batches had been the only ones."""
    embedding, optimizer = table(bias_correction="row", weight_decay=0.1)
    alone, other = table(weight_decay=0.1)
    train(embedding, optimizer, [0], ids=[1, 2])
    train(embedding, optimizer, [1], ids=[5])
    for ours, stepper in ((embedding, optimizer), (alone, other)):
        train(ours, stepper, [7, 8, 9], ids=[4, 4])
    torch.testing.assert_close(embedding.weight[4], alone.weight[4])
    assert optimizer.state[embedding.weight]["row_steps"].tolist() == [0, 1, 1, 0, 3, 1, 0, 0]


def test_rows_without_gradient_are_left_alone(best):
    """lazy="nonzero" on a dense gradient is the sparse step; a row that named is steps with a gradient of zero."""
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    lazy, sparse = LazyAdam([ours], lazy="nonzero", weight_decay=0.1), LazyAdam([theirs], weight_decay=0.1)
    for seed in range(3):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        grad[seed] = 0.0
        ours.grad, theirs.grad = grad.clone(), grad.to_sparse(1)
        lazy.step()
        sparse.step()
    assert torch.equal(ours, theirs)
    ours.grad, before = torch.zeros(4, 3), ours.detach().clone()
    lazy.step()
    assert torch.equal(ours, before)
    lazy.step(rows={ours: torch.tensor([2])})
    assert (ours != before).any(1).tolist() == [False, False, True, False]


def test_rows_may_be_demanded(best):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = LazyAdam([param], lazy="rows")
    param.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="came without its rows"):
        optimizer.step()
    assert (param == 1).all() and not optimizer.state
    optimizer.step(rows={param: torch.tensor([1])})
    assert (param != 1).any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("known", ["option", "attached"])
def test_padding_never_moves(best, known):
    embedding = nn.Embedding(4, 3, padding_idx=2)
    with torch.no_grad():
        embedding.weight[2] = 5.0
    option = {"padding_idx": 2} if known == "option" else {}
    optimizer = LazyAdam(embedding.parameters(), weight_decay=0.5, **option)
    if known == "attached":
        optimizer.attach(embedding)
    for rows in (None, {embedding.weight: torch.arange(4)}):
        embedding.weight.grad = torch.ones(4, 3)
        optimizer.step(rows=rows)
    embedding.weight.grad = torch.ones(4, 3).to_sparse(1)
    pickle.loads(pickle.dumps(optimizer))  # keeps what it knows
    copy.deepcopy(optimizer).step()
    optimizer.step()
    assert (embedding.weight[2] == 5).all() and (embedding.weight[[0, 1, 3]] != 5).all()
    assert not optimizer.state[embedding.weight]["exp_avg"][2].any()


def test_l2_penalty_is_adams_and_not_for_rows(best):
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    options = {"weight_decay": 0.3, "amsgrad": True, "maximize": True}
    optimizer, other = LazyAdam([ours], decoupled_weight_decay=False, **options), torch.optim.Adam([theirs], **options)
    for seed in range(3):
        ours.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs)
    before = ours.detach().clone()
    with pytest.raises(ValueError, match="L2 penalty"):
        optimizer.step(rows={ours: torch.tensor([0])})
    ours.grad = ours.grad.to_sparse(1)
    with pytest.raises(ValueError, match="L2 penalty"):
        optimizer.step()
    assert torch.equal(ours, before)


def test_stochastic_rounding_moves_what_rounding_to_nearest_cannot(best):
    """1,000 steps of 1e-5 from 1: nearest stays at 1, where bfloat16's next number is 0.996; on average it is 0.99."""
    ends = []
    for is_stochastic in (False, True):
        param = nn.Parameter(torch.ones(256, 8, dtype=torch.bfloat16))
        optimizer = LazyAdam([param], lr=1e-5, stochastic_rounding=is_stochastic, seed=3)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends.append(param.detach().double())
    assert (ends[0] == 1).all()
    assert abs(ends[1].mean() - 0.99) < 1e-3 and ends[1].std() > 1e-3


def test_rounding_depends_on_seed_and_parameter_and_is_resumed(best):
    def run(seed, resume):
        params = [nn.Parameter(torch.ones(5, 8, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = LazyAdam(params, lr=1e-3, stochastic_rounding=True, seed=seed)
        for step in range(6):
            if resume and step == 3:
                state, optimizer = optimizer.state_dict(), LazyAdam(params)
                optimizer.load_state_dict(copy.deepcopy(state))
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        return params

    a, b = run(1, resume=False)
    assert not torch.equal(a, b) and not torch.equal(a, run(2, resume=False)[0])
    assert all(torch.equal(x, y) for x, y in zip((a, b), run(1, resume=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_state_is_near_the_large(best, dtype):
    small, optimizer = table(dtype, exp_avg_dtype=torch.bfloat16, row_wise=True, amsgrad=True, lr=0.01)
    large, other = table(dtype, amsgrad=True, lr=0.01)
    start = large.weight.detach().clone()
    train(small, optimizer, range(40))
    train(large, other, range(40))
    state = optimizer.state[small.weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].shape == state["max_exp_avg_sq"].shape == (V, 1)
    moved, expected = (small.weight - start).float().flatten(), (large.weight - start).float().flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.9
    assert 0.5 < moved.norm() / expected.norm() < 2

    again, loaded = table(dtype)
    again.load_state_dict(small.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    train(small, optimizer, [40])
    train(again, loaded, [40])
    assert torch.equal(small.weight, again.weight)
    with pytest.raises(ValueError, match=r"must have shape \[8, 1\], and was saved with \[8, 6\]"):
        optimizer.load_state_dict({**other.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})


def test_capturable_keeps_the_count_with_the_parameter(best):
    embedding, optimizer = table(capturable=True)
    train(embedding, optimizer, range(2))
    assert optimizer.state[embedding.weight]["step"].device == embedding.weight.device
    plain, other = table()
    train(plain, other, range(2))
    assert torch.equal(embedding.weight, plain.weight)


def test_only_new_tokens_learn(best):
    """Rows added to a trained table: the others keep their bits, weight decay included."""
    embedding = nn.Embedding(10, 4)
    new = torch.tensor([8, 9])
    optimizer = LazyAdam(embedding.parameters(), weight_decay=0.1)
    before = embedding.weight.detach().clone()
    for _ in range(5):
        embedding(torch.arange(10)).square().sum().backward()
        optimizer.step(rows={embedding.weight: new})
    assert torch.equal(embedding.weight[:8], before[:8]) and (embedding.weight[8:] != before[8:]).all()
    assert not optimizer.state[embedding.weight]["exp_avg"][:8].any()


def test_a_step_needs_little_memory():
    """Beside the tensors that are there: less than 1 MB, 8 bytes per row of the table and 8 per token."""
    V, n = 30_000, 50_000
    weight = nn.Parameter(torch.zeros(V, 24))
    weight.grad = torch.sparse_coo_tensor(
        torch.randint(0, V, (1, n)), torch.randn(n, 24), weight.shape, check_invariants=True
    )
    optimizer = LazyAdam([weight])
    optimizer.step()  # makes the state
    with use_backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(changes, initial=0))
    assert 8 * n <= peak < 1_000_000 + 8 * V + 8 * n, f"{peak:,} bytes"
