"""The table of many tensors' addresses, and the memory of the host that a captured graph copies it from."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
from fastbert.kernels import tensor_table
from fastbert.kernels.tensor_table import MOST, make_tables

LAUNCHES = [[(9, 70, 71), (4, 80, 81)], [(5, 90, 91)]]
DEVICE = torch.device("cuda", 0)


def test_a_table_has_a_column_for_each_tensor():
    (first, of_first), (second, of_second) = make_tables(LAUNCHES, 4, torch.device("cpu"))
    assert (of_first, of_second) == (4, 2)  # chunks of 4 elements
    assert first[:, :3].tolist() == [[0, 3, 1 << 62], [9, 4, 1 << 62], [70, 80, 1 << 62], [71, 81, 1 << 62]]
    assert second[:, 0].tolist() == [0, 5, 90, 91] and bool((second[:, 1:] == 1 << 62).all())
    assert first.shape == second.shape == (4, MOST)


def test_what_a_captured_graph_copies_from_was_pinned_before_and_is_kept(monkeypatch):
    """Replays copy from it again, so nobody else may get it, not even a second graph."""
    monkeypatch.setattr(tensor_table, "_spare", {})
    monkeypatch.setattr(tensor_table, "_captured", [])
    is_capturing, pinned, empty = [False], [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])

    def noted(*size, pin_memory=False, **options):
        pinned.extend([is_capturing[0]] if pin_memory else [])
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    with FakeTensorMode():
        for _ in range(2):
            is_capturing[0] = False
            make_tables(LAUNCHES, 4, DEVICE)
            make_tables(LAUNCHES, 4, DEVICE)
            is_capturing[0] = True
            make_tables(LAUNCHES, 4, DEVICE)
    assert pinned and not any(pinned), "nothing is pinned while a graph is captured"
    first, second = tensor_table._captured
    assert first is not second and not any(x is first or x is second for x in tensor_table._spare.values())
