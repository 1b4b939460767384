"""What LazyAdam loads: state dicts of its own kind and of torch's, and pickles."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from fastbert.optim import state
from fastbert.optim.options import DEFAULTS
from fastbert.optim.shards import local, spread


class Loading:
    """The part of LazyAdam that copies are made by and checkpoints go through."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_padding": self._padding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._checked = []
        for name, usual in (("_copies", {}), ("_is_captured", False)):  # of one that is loaded into they stay
            self.__dict__.setdefault(name, usual)
        self._forget_plans()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self.defaults, **DEFAULTS}.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class or of `torch.optim.Adam`, `AdamW` or `SparseAdam` returned; a copy.

        Options that the saved groups do not name stay as they are here. Where a step was captured as a CUDA graph,
        state is put where the graph finds it; the graph's options stay those that it was captured with.

        Raises:
            ValueError: groups or state of another optimizer, or that do not fit or lack a part; options outside their
                range. Nothing was loaded.
            TypeError: not a dict, or an option of another type.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict takes the dict that state_dict() returned, got {type(state_dict)}")
        saved, in_graph = {}, dict(self.state) if self._is_captured else {}

        # torch casts state to the parameter's dtype while it loads, which would cost float32 moments of bfloat16
        # parameters their bits: the state is read again, after the users' hooks before and before those after.
        def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(state_dict, param_groups=state.check_saved(state_dict, self.param_groups))
            return saved

        def restore(_: Optimizer) -> None:
            self.state.clear()
            for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
                for key, param in zip(group["params"], own["params"], strict=True):
                    if its := saved["state"].get(key):
                        its = {name: local(value) for name, value in its.items()}
                        its = state.in_place(state.restored(its, local(param), own), in_graph.get(param, {}))
                        self.state[param] = spread(its, param)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
