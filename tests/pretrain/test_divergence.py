import math

import pytest
import torch

from fastbert.pretrain import snapshot
from fastbert.pretrain.divergence import Watch
from fastbert.pretrain.settings import PretrainConfig


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(output=tmp_path, steps=40, lr=1e30, warmup=0.25, clip=2.0)


def scalars(*values):
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0), (2.0, math.inf)])
def test_on_a_cpu_a_step_that_is_not_finite_raises_before_it_is_taken(config, loss, norm):
    watch = Watch(config)
    watch.see(1, *scalars(2.0, 1.0))
    snapshot.save(config.output / "snapshots", 1, {"step": 1}, keep=2)
    with pytest.raises(ValueError) as diverged:
        watch.see(2, *scalars(loss, norm))
    said = f"the run diverged at step 2 of 40: its loss is {loss:g} and its gradient norm {norm:g}. "
    assert str(diverged.value).startswith(said)
    assert "the snapshot of step 1 is kept" in str(diverged.value)
    assert "lower --lr (now 1e+30), a longer --warmup (now 0.25) or a smaller --clip (now 2)" in str(diverged.value)


def test_elsewhere_the_first_bad_step_is_kept_until_somebody_looks(config):
    watch = Watch(config)
    watch.look()
    watch.every_step = False  # as on a GPU
    for step, loss in enumerate([3.0, 2.0, math.nan, 1.0, math.inf], 1):
        watch.see(step, *scalars(loss, 0.5))
        if step == 2:
            watch.look()
    with pytest.raises(ValueError, match=r"step 3 of 40: its loss is nan and its gradient norm 0\.5.*no snapshot was"):
        watch.look()


def test_scores_and_states_are_looked_at(config):
    watch = Watch(config)
    names = "mlm_loss", "frequency_loss", "rare_mlm_loss", "rare_frequency_loss"
    good = dict.fromkeys(names, 3.0)
    watch.scores(5, good)
    watch.scores(5, good | {"rare_mlm_loss": math.nan, "rare_frequency_loss": math.nan})  # no rare token at all
    for bad in ("mlm_loss", "rare_mlm_loss", "nsp_loss"):
        with pytest.raises(ValueError, match=f"step 5 of 40: the held-out {bad} after it is nan"):
            watch.scores(5, good | {bad: math.nan})
    watch.state(5, {"model": {"weight": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"step 5 of 40: model\.weight after it is not finite"):
        watch.state(5, {"model": {"weight": torch.tensor([1.0, math.inf])}})
