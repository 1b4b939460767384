"""LazyAdam by plans: whatever changes under one, the next step is that of an optimizer that has no plan yet."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastbert
from fastbert import LazyAdam
from fastbert.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason="plans are the C++ modules'"),
    pytest.mark.usefixtures("modules"),
]


def build(**options):
    """A table, a vector and a scalar in two groups, after two steps: all of them planned."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    optimizer = LazyAdam(groups, lr=0.05, **options)
    for _ in range(2):
        give_gradients(params)
        optimizer.step()
    return params, optimizer


def give_gradients(params):
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)


def rebuilt(params, optimizer):
    """The same parameters, state and options in an optimizer that has not taken a step."""
    copies = {param: nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format)) for param in params}
    groups = [{**g, "params": [copies[p] for p in g["params"]]} for g in optimizer.param_groups]
    fresh = LazyAdam(groups)
    for param in params:
        its = optimizer.state.get(param, {})
        fresh.state[copies[param]] = {name: copy.deepcopy(value) for name, value in its.items()}
    return list(copies.values()), fresh


def assert_next_steps_equal(params, optimizer, rows=None, grads=give_gradients):
    """Two more steps of both, bit by bit; `rows` are of the first parameter."""
    others, fresh = rebuilt(params, optimizer)
    for _ in range(2):
        grads(params)
        for param, other in zip(params, others, strict=True):
            other.grad = None if param.grad is None else param.grad.clone()
        optimizer.step(**({} if rows is None else {"rows": {params[0]: rows}}))
        fresh.step(**({} if rows is None else {"rows": {others[0]: rows}}))
        for param, other in zip(params, others, strict=True):
            assert torch.equal(param, other)
            for name, value in fresh.state[other].items():
                assert torch.equal(optimizer.state[param][name], value), name


def replaced(name, make):
    def change(params, optimizer):
        optimizer.state[params[0]][name] = make(optimizer.state[params[0]][name])

    return change


def loaded(params, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for its in saved["state"].values():
        its["exp_avg"] += 1
        its["step"] += 5
    optimizer.load_state_dict(saved)


def moved_in_place(params, optimizer):
    its = optimizer.state[params[0]]
    its["exp_avg"].data = its["exp_avg"] + 1
    its["step"].data = torch.tensor(7.0)


def without_state(params, optimizer):
    del optimizer.state[params[0]]


def new_memory(params, optimizer):
    params[0].data = params[0].detach() * 2


def another_shape(params, optimizer):
    """Of the same memory; the state is made anew."""
    params[0].data = params[0].detach().view(4, 6)
    params[0].grad = None
    del optimizer.state[params[0]]


def another_dtype(params, optimizer):
    params[0].data = params[0].detach().bfloat16()
    params[0].grad = None


def not_contiguous(params, optimizer):
    params[0].data = params[0].detach().t().contiguous().t()


def options_changed(**options):
    def change(params, optimizer):
        optimizer.param_groups[0].update(options)

    return change


def betas_in_place(params, optimizer):
    optimizer.param_groups[0]["betas"] = [0.8, 0.99]
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["betas"][0] = 0.5


def a_group_more(params, optimizer):
    params.append(nn.Parameter(torch.randn(3, 2)))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.5})


def a_group_less(params, optimizer):
    del optimizer.param_groups[0], params[0]


def groups_exchanged(params, optimizer):
    optimizer.param_groups.reverse()


def padding_attached(params, optimizer):
    embedding = nn.Embedding(6, 4, padding_idx=2)
    embedding.weight = params[0]
    optimizer.attach(embedding)
    optimizer.param_groups[0]["padding_idx"] = 2  # for `rebuilt`


CHANGES = {
    "load_state_dict": loaded,
    "a moment replaced": replaced("exp_avg", lambda x: x + 1),
    "a moment replaced by its equal": replaced("exp_avg_sq", torch.clone),
    "a moment in bfloat16": lambda params, optimizer: (
        replaced("exp_avg", lambda x: x.bfloat16())(params, optimizer),
        optimizer.param_groups[0].update(exp_avg_dtype="bfloat16"),
    ),
    "the count replaced": replaced("step", lambda x: torch.tensor(9.0)),
    "a count in float64": replaced("step", lambda x: x.double()),
    "state moved in place": moved_in_place,
    "state removed": without_state,
    "param.data": new_memory,
    "param.data of another shape": another_shape,
    "param.data in bfloat16": another_dtype,
    "param.data not contiguous": not_contiguous,
    "lr": options_changed(lr=0.3),
    "lr as a tensor": options_changed(lr=torch.tensor(0.3)),
    "betas": options_changed(betas=(0.5, 0.9)),
    "betas in place": betas_in_place,
    "eps and weight decay": options_changed(eps=0.1, weight_decay=0.5),
    "maximize": options_changed(maximize=True),
    "amsgrad": options_changed(amsgrad=True),
    "rows' own counts": options_changed(bias_correction="row"),
    "coupled decay": options_changed(decoupled_weight_decay=False),
    "a group more": a_group_more,
    "a group less": a_group_less,
    "groups exchanged": groups_exchanged,
    "padding attached": padding_attached,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_plan_that_no_longer_fits_is_made_anew(what):
    params, optimizer = build()
    CHANGES[what](params, optimizer)
    assert_next_steps_equal(params, optimizer)


def sparse(params):
    give_gradients(params)
    ids = torch.tensor([[4, 1, 4]])
    params[0].grad = torch.sparse_coo_tensor(ids, torch.randn(3, 4), (6, 4), check_invariants=True)


def empty(params):
    give_gradients(params)
    params[0].grad = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.long), torch.empty(0, 4), (6, 4), check_invariants=True
    )


def transposed(params):
    give_gradients(params)
    params[0].grad = torch.randn(4, 6).t()


def negative(params):
    give_gradients(params)
    params[1].grad = torch._neg_view(torch.randn(5))


def left_out(params):
    give_gradients(params)
    params[1].grad = None


KINDS = {"sparse": sparse, "empty": empty, "transposed": transposed, "neg bit": negative, "none": left_out}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_another_kind(kind):
    params, optimizer = build()
    assert_next_steps_equal(params, optimizer, grads=KINDS[kind])
    assert_next_steps_equal(params, optimizer)
    assert_next_steps_equal(params, optimizer, rows=torch.tensor([3, 0, 3]))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_leaves_the_original_alone(way):
    params, optimizer = build()
    other = way(optimizer)
    copies = [param for group in other.param_groups for param in group["params"]]
    give_gradients(copies)
    before = [param.detach().clone() for param in params]
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not torch.equal(copies[0], params[0]) and optimizer.state[params[0]]["step"] == 2
    assert_next_steps_equal(copies, other)
    assert_next_steps_equal(params, optimizer)


def test_a_backend_chosen_between_two_steps():
    params, optimizer = build()
    with fastbert.use_backend("reference"):
        assert_next_steps_equal(params, optimizer)
    assert_next_steps_equal(params, optimizer)
    assert optimizer.state[params[0]]["step"] == 6


def test_steps_count_once_and_a_refused_one_not_at_all():
    params, optimizer = build()
    versions = [params[0]._version, optimizer.state[params[0]]["exp_avg"]._version]
    give_gradients(params)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [3, 3, 3]
    assert versions < [params[0]._version, optimizer.state[params[0]]["exp_avg"]._version]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"row ids must lie in \[0, 6\), got 6"):
        optimizer.step(rows={params[0]: torch.tensor([6])})
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert [float(optimizer.state[param]["step"]) for param in params] == [3, 3, 3]


def test_a_step_that_was_given_up_leaves_nothing_for_the_next():
    """The first parameter has been taken along when the second is refused."""
    params, optimizer = build()
    give_gradients(params)
    optimizer.param_groups[1]["lazy"] = "rows"
    with pytest.raises(ValueError, match="came without its rows"):
        optimizer.step()
    optimizer.param_groups[1]["lazy"] = None
    with fastbert.use_backend("reference"):
        assert_next_steps_equal(params, optimizer, grads=left_out)
    assert [float(optimizer.state[param]["step"]) for param in params] == [4, 2, 4]


def test_decay_that_does_not_go_with_rows_is_refused_later_too():
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    optimizer = LazyAdam([param], lazy="nonzero", decoupled_weight_decay=False)
    optimizer.step()
    before = param.tolist()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="an L2 penalty"):
        optimizer.step()
    assert param.tolist() == before and optimizer.state[param]["step"] == 1


def test_a_plan_keeps_no_state_alive():
    params, optimizer = build()
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.state.clear()
    assert moment() is None


def test_what_the_module_cannot_read_is_refused_or_read_otherwise():
    """After a step by plan too: a learning rate that is not on the CPU, a step count that is no number."""
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = fastbert.LazyAdam([param])
    param.grad = torch.ones(4, 3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device="meta")
    before = param.detach().clone()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 1
    optimizer.param_groups[0]["lr"] = 1e-3
    for steps in (torch.zeros(0), torch.tensor([5.0, 9.0])):
        optimizer.state[param]["step"] = steps
        before = param.detach().clone()
        with pytest.raises(ValueError, match="step must be a tensor of one number"):
            optimizer.step()
        assert torch.equal(param, before)


def test_a_lazily_negated_parameter_steps_downhill():
    negated, plain = (torch.nn.Parameter(x) for x in (torch._neg_view(-torch.ones(2)), torch.ones(2)))
    for param in (negated, plain):
        param.grad = torch.ones(2)
        fastbert.LazyAdam([param], lr=0.1).step()
    assert torch.equal(negated, plain) and negated[0] < 1


def test_a_copy_in_bfloat16_is_kept_by_steps():
    """By all arguments, by a plan, of named rows, and where the copy itself has moved."""
    params, optimizer = build()
    copies = [optimizer.keep_copy(param) for param in params]
    assert optimizer.keep_copy(params[0]) is copies[0]
    for step in range(4):
        give_gradients(params)
        versions = [copies[0]._version]
        optimizer.step(rows={params[0]: torch.tensor([1, 4])} if step == 2 else None)
        assert copies[0]._version > versions[0]
        for param, kept in zip(params, copies, strict=True):
            assert torch.equal(param.bfloat16(), kept)
        copies[1].data = copies[1].clone()
        if step == 1:  # from here on the first rows of a larger tensor
            rows = len(params[0])
            larger = torch.zeros(rows + 3, *params[0].shape[1:], dtype=torch.bfloat16)
            copies[0] = optimizer.keep_copy(params[0], out=larger[:rows])
            assert copies[0].data_ptr() == larger.data_ptr()
    assert not larger[rows:].any()
    with pytest.raises(ValueError, match="out must be contiguous bfloat16"):
        optimizer.keep_copy(params[0], out=larger)
    assert "bf16_copy" not in optimizer.state[params[0]]
    params[2].data = params[2].double()
    with pytest.raises(ValueError, match="contiguous float32"):
        optimizer.keep_copy(params[2])
