"""exp2, exp and 1 / x in as few instructions as a GPU has for them.

`tl.exp2`, `tl.exp` and `/` keep subnormal numbers, which costs three to six instructions more each; these may flush
them to zero. They are libdevice's, which Triton takes from NVIDIA or AMD as it compiles for one or the other. The
interpreter knows no libdevice, and computes them exactly.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def exp(x):
    return exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)
