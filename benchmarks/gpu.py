"""The ops on a GPU, by each backend that has kernels there, against torch eager and compiled, FlashAttention-2 and
Liger, with dropout 0.1, in bfloat16.

    python benchmarks/gpu.py [--only attention layer_norm ...] [--backends cuda triton] [--no-compile] [--quick]

"kernel" is the time on the GPU alone: a CUDA graph of calls on inputs that rotate through 300 MB, so that none lies in
the L2 cache, replayed; the median of nine windows. "launched" is the same calls from Python, one by one. Forward is
that of training, backward alone. "share" is the time that the bytes which must move (every input once, every output
once) take at the rate of an addition of 2 x 1 GB, over the kernel time. Values are checked before anything is timed:
against float64 where it fits, by the bound of the tests.

Peers: torch's ops; torch.compile of them, in the mode for the kernels of inductor; `aten::_flash_attention_forward`,
which is FlashAttention-2, whose gradients of q, k and v are then stacked, as a model with one projection needs them;
Liger's Triton kernels where `liger-kernel` is installed; torch's fused optimizers. What a graph cannot capture, because
it waits for the device, has no kernel time. --device cpu --quick runs it on a CPU, without graphs: does it run?
"""

import argparse
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch._functorch.config
from timing import gpu, results_path, write_csv
from torch import Tensor
from torch.nn import functional as F

import fastbert
from fastbert.bench.gpu_timing import Call, measure, rate
from fastbert.testing import assert_close

EPS, P = 1e-12, 0.1
ROTATED = 300e6  # bytes, several times the L2 cache


@dataclass
class Case:
    """One line of the table: `variants` make, by name, a call with inputs of its own."""

    op: str
    shape: str
    direction: str
    size: float  # bytes that must move
    copies: int  # of the inputs, that take turns
    variants: dict[str, Callable[[], Call]] = field(default_factory=dict)
    waits: tuple[str, ...] = ()  # the variants that wait for the device, which no graph can capture


# ---- inputs and calls ----------------------------------------------------------------------------------------------


def copies(size: float) -> int:
    """How many inputs of a call that moves so many bytes make up ROTATED."""
    return int(min(64, max(2, ROTATED // size + 1)))


def directions(op: str, shape: str, sizes: tuple[float, float], ops: dict, inputs: Callable[[], tuple]) -> list[Case]:
    """Forward and backward of `ops`, functions of what `inputs` makes: leaves, other arguments, and dy."""

    def forward(function: Callable) -> Call:
        leaves, others, _ = inputs()
        return lambda: function(*leaves, *others)

    def backward(function: Callable) -> Call:
        leaves, others, dy = inputs()
        y = function(*leaves, *others)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return [
        Case(op, shape, name, size, copies(size), {key: lambda f=f, made=made: made(f) for key, f in ops.items()})
        for name, size, made in (("forward", sizes[0], forward), ("backward", sizes[1], backward))
    ]


def ours(options: argparse.Namespace, function: Callable, **named) -> dict[str, Callable]:
    return {f"fastbert {name}": (lambda *a, n=name: function(*a, **named, backend=n)) for name in options.backends}


def each(options: argparse.Namespace, make: Callable[[], Call]) -> dict[str, Callable[[], Call]]:
    """What `make` makes, and calls of it, on each backend: of what is given no `backend=`."""

    def made(name: str) -> Call:
        with fastbert.use_backend(name):
            call = make()

        def on_backend() -> object:
            with fastbert.use_backend(name):
                return call()

        return on_backend

    return {f"fastbert {name}": lambda name=name: made(name) for name in options.backends}


def compiled(options: argparse.Namespace, eager: Callable) -> dict[str, Callable]:
    return {} if options.no_compile else {"torch.compile": torch.compile(eager, dynamic=False)}


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def verify(options: argparse.Namespace, what: str, function: Callable, inputs: tuple, *others: object) -> None:
    """Stops where a backend's results are worse than the bound of the tests allows; the twin is the baseline."""
    leaves, dy = inputs
    results = {}
    for name in ("reference", *options.backends):
        y = function(*leaves, *others, backend=name)
        results[name] = [y, *torch.autograd.grad(y, leaves, dy)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y = function(*wide, *others, backend="reference")
    truth = [y, *torch.autograd.grad(y, wide, dy.double())]
    for name in options.backends:
        for i, values in enumerate(zip(results[name], results["reference"], truth, strict=True)):
            assert_close(*values, what=f"{what} on {name}, result {i}")


# ---- ops -----------------------------------------------------------------------------------------------------------


def layer_norm(options: argparse.Namespace) -> list[Case]:
    cases = []
    for rows, columns in [(64, 256)] if options.quick else [(5120, 768), (65536, 768)]:
        unit = 2 * rows * columns

        def inputs(rows=rows, columns=columns):
            vectors = (leaf(columns, dtype=torch.float32) for _ in range(2))
            return (leaf(rows, columns), leaf(rows, columns), *vectors), (), torch.randn(rows, columns).bfloat16()

        def plain_inputs(inputs=inputs):
            (x, _, *vectors), others, dy = inputs()
            return (x, *vectors), others, dy

        def eager(x, residual, weight, bias):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.layer_norm(residual + F.dropout(x, P), x.shape[-1:], weight, bias, EPS)

        def plain(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)

        leaves, _, dy = inputs()
        seed = torch.tensor([0])
        verify(options, "dropout_add_layer_norm", fastbert.dropout_add_layer_norm, (leaves, dy), EPS, P, seed)
        fused = ours(options, fastbert.dropout_add_layer_norm, eps=EPS, dropout_p=P)
        fused |= {"torch": eager} | compiled(options, eager)
        shape = f"{rows} x {columns}"
        cases += directions("dropout_add_layer_norm", shape, (4 * unit, 4 * unit), fused, inputs)
        alone = ours(options, fastbert.layer_norm, eps=EPS) | {"torch": plain} | compiled(options, plain)
        if liger := _liger("layer_norm", "LigerLayerNormFunction"):
            alone["Liger"] = lambda x, weight, bias: liger.apply(x, weight, bias, EPS)
        cases += directions("layer_norm", shape, (2 * unit, 3 * unit), alone, plain_inputs)
    return cases


def _liger(module: str, name: str):
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def gelu(options: argparse.Namespace) -> list[Case]:
    rows, columns = (64, 256) if options.quick else (5120, 3072)

    def inputs():
        return (leaf(rows, columns), leaf(columns)), (), torch.randn(rows, columns).bfloat16()

    def eager(x, bias):
        return F.gelu(x + bias)

    leaves, _, dy = inputs()
    verify(options, "gelu", fastbert.gelu, (leaves, dy), "none")
    ops = ours(options, fastbert.gelu) | {"torch": eager} | compiled(options, eager)
    unit = 2 * rows * columns
    return directions("gelu", f"{rows} x {columns}", (2 * unit, 3 * unit), ops, inputs)


def cross_entropy(options: argparse.Namespace) -> list[Case]:
    rows, columns, width = (16, 250, 256) if options.quick else (768, 30522, 30528)

    def inputs():
        labels = torch.randint(columns, (rows,))
        return (leaf(rows, width),), (labels,), torch.ones(())

    def eager(logits, labels):
        return F.cross_entropy(logits[:, :columns], labels)

    def op(logits, labels, backend):
        return fastbert.cross_entropy(logits[:, :columns], labels, backend=backend)

    leaves, (labels,), dy = inputs()
    verify(options, "cross_entropy", op, (leaves, dy), labels)
    ops = ours(options, op) | {"torch": eager} | compiled(options, eager)
    unit = 2 * rows * columns
    return directions("cross_entropy", f"{rows} x {columns} of {width}", (unit, 2 * unit), ops, inputs)


def attention(options: argparse.Namespace) -> list[Case]:
    heads, size, cases = 12, 64, []
    shapes = {
        "64 x 32..128": torch.linspace(32, 128, 64).round().long(),
        "64 x 128": torch.full((64,), 128),
        "32 x 512": torch.full((32,), 512),
    }
    if options.quick:
        shapes = {"3 x 5..20": torch.tensor([5, 20, 11])}
    for shape, lengths in shapes.items():
        cu_seqlens, longest, tokens = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()), int(lengths.sum())

        def inputs(tokens=tokens):
            return (leaf(tokens, 3, heads, size),), (), torch.randn(tokens, heads, size).bfloat16()

        named = {"cu_seqlens": cu_seqlens, "max_seqlen": longest, "dropout_p": P}

        def op(qkv, seed, backend, named=named):
            return fastbert.attention_qkv(qkv, **named, seed=seed, backend=backend)

        leaves, _, dy = inputs()
        if longest <= 128:  # the twin's scores take B N S^2 numbers of float64
            verify(options, "attention", op, (leaves, dy), torch.tensor([0]))
        elements = 2 * tokens * heads * size
        made = directions(
            "attention", shape, (4 * elements, 8 * elements), ours(options, fastbert.attention_qkv, **named), inputs
        )
        if torch.cuda.is_available():
            for case, call in zip(made, flash_attention(inputs, cu_seqlens, longest), strict=True):
                case.variants["FlashAttention-2"] = call
        cases += made
    return cases


def flash_attention(inputs: Callable, cu_seqlens: Tensor, longest: int) -> tuple[Callable, Callable]:
    """Forward, and backward to one gradient [T, 3, N, D], of FlashAttention-2 as torch carries it."""

    def run(qkv: Tensor) -> tuple:
        q, k, v = qkv.detach().unbind(1)
        return (q, k, v), torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, P, False, False
        )

    def forward() -> Call:
        (qkv,), _, _ = inputs()
        return lambda: run(qkv)

    def backward() -> Call:
        (qkv,), _, dout = inputs()
        (q, k, v), (out, lse, state, unused, _) = run(qkv)
        return lambda: torch.stack(
            torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest, P, False, state, unused
            ),
            1,
        )

    return forward, backward


def lazy_adam(options: argparse.Namespace) -> list[Case]:
    cases = []
    for table, columns, tokens in (
        [(1000, 8, 64)] if options.quick else [(1_000_000, 128, 65536), (10_000_000, 32, 4096)]
    ):
        ids = (torch.rand(tokens) * torch.tensor(float(table)).log()).exp().long().clamp(max=table - 1)  # Zipf's law
        rows = torch.randn(tokens, columns)
        size = 24.0 * columns * len(ids.unique()) + 4.0 * columns * tokens

        def lazy(table=table, columns=columns, ids=ids, rows=rows) -> Call:
            optimizer, _ = optimizer_of(fastbert.LazyAdam, table, columns, sparse=(ids, rows))
            return optimizer.step

        def sparse(table=table, columns=columns, ids=ids, rows=rows) -> Call:
            optimizer, _ = optimizer_of(torch.optim.SparseAdam, table, columns, sparse=(ids, rows))
            return optimizer.step

        def dense(table=table, columns=columns) -> Call:
            options = {"fused": True, "capturable": torch.cuda.is_available()}
            optimizer, param = optimizer_of(torch.optim.AdamW, table, columns, **options)
            param.grad = torch.zeros_like(param)
            return optimizer.step

        made = each(options, lazy) | {"SparseAdam": sparse, "AdamW fused": dense}
        cases.append(Case("lazy_adam", f"{table} x {columns}, {tokens} tokens", "step", size, 8, made, ("SparseAdam",)))
    return [*cases, bert_step(options)]


def optimizer_of(kind: Callable, table: int, columns: int, sparse: tuple | None = None, **named):
    param = torch.nn.Parameter(torch.randn(table, columns))
    if sparse is not None:
        param.grad = torch.sparse_coo_tensor(sparse[0][None], sparse[1], param.shape, check_invariants=False)
    return kind([param], lr=torch.tensor(1e-3) if kind is not torch.optim.SparseAdam else 1e-3, **named), param


def bert_step(options: argparse.Namespace) -> Case:
    """Clipping and the step of BERT's dense tensors."""
    config = fastbert.BertConfig.preset("tiny" if options.quick else "base")
    shapes = [p.shape for p in fastbert.BertForPreTraining(config).parameters()]

    def parameters() -> list[Tensor]:
        made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for param in made:
            param.grad = torch.randn_like(param)
        return made

    def lazy() -> Call:
        params = parameters()
        optimizer = fastbert.LazyAdam(params, lr=torch.tensor(1e-3))

        def call():
            fastbert.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return call

    def fused() -> Call:
        params = parameters()
        optimizer = torch.optim.AdamW(
            params, lr=torch.tensor(1e-3), fused=True, capturable=torch.cuda.is_available(), weight_decay=0.0
        )

        def call():
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()

        return call

    size = 32.0 * sum(shape.numel() for shape in shapes)  # gradients are read twice
    made = each(options, lazy) | {"AdamW fused": fused}
    return Case("clip_and_step", f"{len(shapes)} tensors", "step", size, copies(size), made)


# ---- table ---------------------------------------------------------------------------------------------------------

OPS = {f.__name__: f for f in (layer_norm, gelu, cross_entropy, attention, lazy_adam)}


@cache
def commit() -> str:
    """Of the checkout; "" in a copy of its files, or where there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--backends", nargs="+", default=None, help="all that run here but the reference, if not given")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small inputs, no CSV: does it run?")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # backward runs again and again
    runs = [
        name for name in ("cpu", "cuda", "triton") if name in fastbert.backends() and (name == "cpu") == (not gpu())
    ]
    options.backends = options.backends or runs
    moved = rate(options.quick)
    print(f"{gpu() or 'CPU, launched alone'}: an addition moves {moved / 1e12:.2f} TB/s")
    rows = []
    for name in options.only:
        for case in OPS[name](options):
            first = None
            for variant, make in case.variants.items():
                count = 2 if options.quick else case.copies
                kernel, launched = measure(make, count, variant in case.waits)
                first = first or (kernel, launched)
                row = {
                    "op": case.op, "shape": case.shape, "pass": case.direction, "variant": variant,
                    "kernel_us": kernel and round(1e6 * kernel, 2), "launched_us": round(1e6 * launched, 2),
                    "share": kernel and round(case.size / moved / kernel, 3),
                    "kernel_over_ours": kernel and first[0] and round(kernel / first[0], 2),
                    "launched_over_ours": round(launched / first[1], 2),
                }  # fmt: skip
                shown = " ".join(f"{x!s:>10}" for x in list(row.values())[4:])
                print(f"{case.op:24}{case.shape:26}{case.direction:10}{variant:20}{shown}", flush=True)
                rows.append(row | {"commit": commit()})
        if not options.quick:
            write_csv(results_path("ops"), rows)  # after each op, should the next one be cut off


if __name__ == "__main__":
    main()
