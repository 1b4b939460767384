"""LazyAdam on every backend: against torch's optimizers, by hand, and through a program's life."""

import copy
import io
import pickle

import pytest
import torch
from op_cases import assert_same_for_threads
from optim_state import bits
from torch import nn

from fastbert import LazyAdam, clip_grad_norm_
from fastbert.testing import assert_close

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.01},
    {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-4},
    {"betas": (0.0, 0.0), "eps": 1e-3},
    {"lr": torch.tensor(0.02)},
    {"foreach": True},
    {"fused": True, "lr": 0.1},
]


def table(rows=10, width=4, sparse=True):
    return nn.Embedding(rows, width, sparse=sparse)


def backward(embedding, ids, seed=0):
    """A gradient whose rows differ by token."""
    target = torch.randn(*ids.shape, embedding.embedding_dim, generator=torch.Generator().manual_seed(seed))
    embedding.weight.grad = None
    (embedding(ids) * target).sum().backward()


# ---- dense: AdamW --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense_is_adamw(best, options):
    shapes = [(5, 7), (33,), (), (2, 3, 4), (0, 3)]
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    truth = [p.detach().double().requires_grad_() for p in ours]
    plain = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
    optimizers = [
        LazyAdam(ours, **options),
        torch.optim.AdamW(theirs, **{"weight_decay": 0.0, **plain}),
        torch.optim.AdamW(truth, **{"weight_decay": 0.0, **plain}),
    ]
    for _ in range(5):
        for group in zip(ours, theirs, truth, strict=True):
            grad = torch.randn(group[0].shape)
            for p in group:
                p.grad = grad.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, theirs, truth, strict=True):
        if a.numel():
            assert_close(a.detach(), b.detach(), c.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_float32_state(best, dtype):
    param = torch.randn(6, 5).to(dtype).requires_grad_()
    wide = param.detach().float().requires_grad_()
    optimizer, reference = LazyAdam([param]), torch.optim.AdamW([wide], weight_decay=0.0)
    param.grad = torch.randn(6, 5).to(dtype)
    wide.grad = param.grad.float()
    optimizer.step()
    reference.step()
    assert torch.equal(param.detach(), wide.detach().to(dtype))
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[param][name].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[param][name], reference.state[wide][name])


def test_strided_parameters_are_not_left_behind(best):
    base = torch.randn(6, 8)
    for view in (lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:4, 2:5]):
        storage = base.clone()
        param = nn.Parameter(view(storage))
        assert not param.is_contiguous()
        other = nn.Parameter(view(base).clone(memory_format=torch.contiguous_format))
        param.grad = torch.randn(param.shape)
        other.grad = param.grad.clone()
        for p, rows in ((param, {param: torch.tensor([0, 2])}), (other, {other: torch.tensor([0, 2])})):
            optimizer = LazyAdam([p])
            optimizer.step()
            optimizer.step(rows=rows)
        assert torch.equal(param, other) and torch.equal(view(storage), param)


# ---- sparse and named rows -----------------------------------------------------------------------------------------


def test_two_steps_of_an_embedding_by_hand(best):
    """lr 0.5, betas 1/2 and 3/4, eps 1, decay 0.2: row 1 is looked up twice, row 0 never."""
    embedding = table(2, 1)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[7.0], [1.0]]))
    optimizer = LazyAdam(embedding.parameters(), lr=0.5, betas=(0.5, 0.75), eps=1.0, weight_decay=0.2)
    (embedding(torch.tensor([1, 1])) * torch.tensor([[1.0], [3.0]])).sum().backward()
    optimizer.step()  # g = 4: m = 2, v = 4, m_hat = 4, v_hat = 16; w = 1 * 0.9 - 0.5 * 4 / (4 + 1) = 0.5
    torch.testing.assert_close(embedding.weight.detach(), torch.tensor([[7.0], [0.5]]))
    optimizer.zero_grad()
    (embedding(torch.tensor([1])) * -2.0).sum().backward()
    optimizer.step()  # g = -2: m = 0, v = 4; w = 0.5 * 0.9
    torch.testing.assert_close(embedding.weight.detach(), torch.tensor([[7.0], [0.45]]))
    state = optimizer.state[embedding.weight]
    assert state["step"] == 2 and state["exp_avg"].tolist() == [[0], [0]] and state["exp_avg_sq"].tolist() == [[0], [4]]


def test_equals_sparse_adam_without_eps(best):
    """eps apart, SparseAdam is the same: gradients uncoalesced, steps without any row counted."""
    ours, theirs = table(), table()
    theirs.load_state_dict(ours.state_dict())
    optimizers = LazyAdam(ours.parameters(), eps=0.0), torch.optim.SparseAdam(list(theirs.parameters()), eps=1e-30)
    for seed in range(6):
        ids = torch.randint(0, 6, (3, 4) if seed != 2 else (0,))
        for embedding, optimizer in zip((ours, theirs), optimizers, strict=True):
            backward(embedding, ids, seed)
            optimizer.step()
            assert seed == 2 or not embedding.weight.grad.is_coalesced()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    assert optimizers[0].state[ours.weight]["step"] == 6


@pytest.mark.parametrize("kind", ["sparse", "coalesced", "rows"])
def test_only_touched_rows_change(best, kind):
    embedding = table(sparse=kind != "rows")
    optimizer = LazyAdam(embedding.parameters(), weight_decay=0.1, amsgrad=True)
    weight = embedding.weight
    backward(embedding, torch.arange(10))
    optimizer.step()  # moments are not zero any more
    before = bits(optimizer, weight)
    backward(embedding, torch.tensor([[2, 7], [2, 2]]))
    if kind == "coalesced":
        weight.grad = weight.grad.coalesce()
    if kind == "rows":
        weight.grad[5] = torch.nan  # of a row that is not named
    optimizer.step(rows={weight: torch.tensor([2, 7, 7])} if kind == "rows" else None)
    after = bits(optimizer, weight)
    others = [0, 1, 3, 4, 5, 6, 8, 9]
    for a, b in zip(before, after, strict=True):
        if a.dim() == 2:
            assert torch.equal(a[others], b[others])
            assert (a[[2, 7]] != b[[2, 7]]).any(1).all()


def test_named_rows_equal_a_sparse_gradient(best):
    sparse, dense = table(), table(sparse=False)
    dense.load_state_dict(sparse.state_dict())
    optimizers = [LazyAdam(x.parameters(), weight_decay=0.1) for x in (sparse, dense)]
    for seed, dtype in enumerate((torch.int64, torch.int32, torch.uint8, torch.int16)):
        ids = torch.randint(0, 10, (2, 3))
        for embedding in (sparse, dense):
            backward(embedding, ids, seed)
        optimizers[0].step()
        optimizers[1].step(rows={dense.weight: ids.to(dtype)})
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-5, atol=1e-6)


def test_a_named_row_with_zero_gradient_takes_an_ordinary_step(best):
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = LazyAdam([param], lr=0.1, weight_decay=0.5, eps=1.0)
    param.grad = torch.ones(3, 2)
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.zeros(3, 2)
    optimizer.step(rows={param: torch.tensor([1])})
    state = optimizer.state[param]
    assert torch.equal(param[[0, 2]], before[[0, 2]]) and (param[1] < before[1]).all()
    torch.testing.assert_close(state["exp_avg"][1], torch.full((2,), 0.09))
    assert state["step"] == 2


def test_vectors_and_blocks_have_rows_too(best):
    for shape in ((7,), (7, 2, 3)):
        param = nn.Parameter(torch.randn(shape))
        flat = nn.Parameter(param.detach().clone().view(7, -1))
        values, ids = torch.randn(4, *shape[1:]), torch.tensor([[1, 5, 1, 0]])
        param.grad = torch.sparse_coo_tensor(ids, values, shape, check_invariants=True)
        flat.grad = torch.sparse_coo_tensor(ids, values.view(4, -1), flat.shape, check_invariants=True)
        LazyAdam([param]).step()
        LazyAdam([flat]).step()
        assert torch.equal(param.view(7, -1), flat)


def test_no_gradient_no_step(best):
    param, named = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LazyAdam([param, named])
    optimizer.step(rows={named: torch.tensor([0])})
    assert param.tolist() == named.tolist() == [1, 1, 1] and not optimizer.state
    param.grad = torch.ones(3)
    optimizer.step(rows={param: torch.zeros(0, dtype=torch.int64)})
    assert param.tolist() == [1, 1, 1] and optimizer.state[param]["step"] == 1


def test_bits_do_not_depend_on_threads():
    def run():
        torch.manual_seed(0)
        embedding, linear = table(500, 64), nn.Linear(64, 300)
        params = [*embedding.parameters(), *linear.parameters()]
        optimizer = LazyAdam(params, lr=0.01)
        for seed in range(2):
            backward(embedding, torch.randint(0, 500, (3000,)), seed)
            linear.weight.grad = torch.randn(300, 64)
            norm = clip_grad_norm_(params, 1.0)
            optimizer.step()
        return norm, embedding.weight.detach(), linear.weight.detach()

    assert_same_for_threads(run)


# ---- a program's life ----------------------------------------------------------------------------------------------


def training(dtype=torch.float32, **options):
    torch.manual_seed(0)
    embedding, linear = table().to(dtype), nn.Linear(4, 3).to(dtype)
    groups = [{"params": embedding.parameters()}, {"params": linear.parameters(), "lr": 0.1, "weight_decay": 0.1}]
    return embedding, linear, LazyAdam(groups, lr=0.01, amsgrad=True, **options)


def train(embedding, linear, optimizer, seeds):
    for seed in seeds:
        ids = torch.randint(0, 10, (6,), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        linear(embedding(ids)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_resumed_equals_unbroken(best, how, dtype):
    unbroken = training(dtype)
    train(*unbroken, range(5))
    first = training(dtype)
    train(*first, range(3))
    if how in ("state_dict", "file"):
        resumed = training(dtype)
        for ours, saved in zip(resumed, first, strict=True):
            state = saved.state_dict()
            if how == "file":
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file)
            ours.load_state_dict(state)
    elif how == "deepcopy":
        resumed = copy.deepcopy(first)
    else:
        resumed = pickle.loads(pickle.dumps(first))
    train(*first, (99,))  # what is loaded shares nothing with where it came from
    train(*resumed, (3, 4))
    for a, b in zip(resumed[:2], unbroken[:2], strict=True):
        assert torch.equal(a.weight, b.weight)
    for p, q in zip(resumed[0].parameters(), unbroken[0].parameters(), strict=True):
        for name, value in unbroken[2].state[q].items():
            assert resumed[2].state[p][name].dtype == torch.float32
            assert torch.equal(resumed[2].state[p][name], value), name


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_goes_to_adamw_and_back(best, amsgrad):
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizers = [LazyAdam([ours], **options), torch.optim.AdamW([theirs], **options)]
    for exchange in range(4):
        grad = torch.randn(4, 3)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = grad
            optimizer.step()
        state = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        if exchange == 1:
            optimizers[0].load_state_dict(state[1])
            optimizers[1].load_state_dict(state[0])
    torch.testing.assert_close(ours, theirs)
    plain = torch.optim.Adam([theirs], lr=0.01)
    plain.load_state_dict(state[0])
    plain.step()  # decoupled, as ours was
    assert plain.param_groups[0]["decoupled_weight_decay"]


def test_load_from_sparse_adam_and_refuse_what_does_not_fit(best):
    param = nn.Parameter(torch.ones(4, 3))
    sparse = torch.optim.SparseAdam([param], lr=0.5)
    param.grad = torch.eye(4, 3).to_sparse(1)
    sparse.step()
    optimizer = LazyAdam([param], weight_decay=0.25)
    optimizer.load_state_dict(sparse.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.25
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    before = bits(optimizer, param)
    assert not LazyAdam([param], decoupled_weight_decay=False).param_groups[0]["decoupled_weight_decay"]
    other = nn.Parameter(torch.ones(2, 2))
    other.grad = torch.ones(2, 2)
    wrong = LazyAdam([other])
    wrong.step()
    with pytest.raises(ValueError, match=r"saved with \[2, 2\]"):
        optimizer.load_state_dict(wrong.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert all(torch.equal(a, b) for a, b in zip(before, bits(optimizer, param), strict=True))


def test_closures_schedules_groups_and_hooks(best):
    embedding, linear, optimizer = training()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[1]["lr"]))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    loaded = []
    optimizer.register_load_state_dict_post_hook(lambda o: loaded.append(o.state[embedding.weight]["exp_avg"].dtype))

    def closure():
        optimizer.zero_grad()
        loss = linear(embedding(torch.tensor([1, 2]))).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[0] > losses[1] and seen == pytest.approx([0.05, 0.075, 0.1])
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "betas": (0.5, 0.5)})
    extra.grad = torch.ones(2)
    optimizer.step()
    assert (extra < 1).all()
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == [torch.float32]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_step_equals_eager(best):
    def build():
        torch.manual_seed(0)
        param, other = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))
        param.grad, other.grad = torch.randn(5, 3), torch.randn(4)
        return param, other, LazyAdam([param, other], lr=0.1)

    torch.compiler.reset()
    eager, compiled = build(), build()
    step = torch.compile(compiled[2].step, backend="aot_eager")
    for _ in range(3):
        eager[2].step()
        step()
    for a, b in zip(eager[:2], compiled[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert compiled[2].state[compiled[0]]["step"] == 3
