#!/usr/bin/env bash
# Under TRITON_INTERPRET=1 a kernel that adds 1 and 1 in bfloat16 gives 1.7e38, and tl.dot of bfloat16 is off by 1e10.
#
# Guess: Triton's interpreter is slow and gives the compiled kernel's numbers, to rounding; what it cannot do raises.
# Seen, triton 3.9.0: numpy has no bfloat16, so the interpreter holds its bits as uint16, and arithmetic is done on these
# integers: 1 + 1 is the sum of two bit patterns. No error, no warning. float32 to bfloat16 cuts the low bits off where
# a GPU rounds to nearest. What is cast to float32 first, as most kernels do, is right but for that rounding.
# So: a kernel's tests in the interpreter are float32 and float16, or cast before each operation and allow a whole ULP.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.4.6
cd "$folder"
cat > interpreted.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, sum_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(sum_ptr + place, tl.load(x_ptr + place) + tl.load(y_ptr + place))


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(y_ptr + place, tl.load(x_ptr + place).to(tl.bfloat16))


@triton.jit
def product(a_ptr, b_ptr, c_ptr):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


ones, results = torch.ones(4).bfloat16(), torch.zeros(4).bfloat16()
add[(1,)](ones, ones, results, 4)
print("1 + 1 =", results[0].item())
assert results[0] > 1e38, "changed"

numbers = torch.tensor([1.0059, 2.01, 3.02, 4.03])
cast[(1,)](numbers, results, 4)
print("to bfloat16", results.tolist(), "where to nearest is", numbers.bfloat16().tolist())
assert (results <= numbers).all() and not torch.equal(results, numbers.bfloat16()), "changed"

torch.manual_seed(0)
a, b = torch.randn(2, 16, 16).bfloat16()
c = torch.zeros(16, 16)
product[(1,)](a, b, c)
off = (c - a.float() @ b.float()).abs().max().item()
print(f"tl.dot of 16 x 16 is off by {off:.1e}")
assert off > 1e6, "changed"
PYTHON
TRITON_INTERPRET=1 venv/bin/python interpreted.py
