"""GELU's launches of more programs than the op tests interpret: several blocks of columns, several parts of dbias."""

import pytest
import torch
from op_cases import assert_solves, problem
from torch.nn import functional as F

import fastbert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_columns_and_parts_of_rows(interpreted, nan_filled, dtype):
    x, dy = torch.randn(13, 1100).mul(2).to(dtype), torch.randn(13, 1100).to(dtype)
    given = problem((x, torch.randn(1100)), dy, fastbert.gelu, lambda x, bias: F.gelu(x + bias.to(x.dtype)))
    assert_solves(fastbert.gelu, given, ("y", "dx", "dbias"))


def test_without_a_bias_any_rows_will_do(interpreted, nan_filled):
    for shape in ((5, 16), (3, 256), (7, 11)):  # taken as rows of 16, of 256, and as they are
        assert_solves(fastbert.gelu, problem((torch.randn(shape),), torch.randn(shape), fastbert.gelu), ("y", "dx"))
