"""A fine-tuning step and inference of transformers' BERT, patched by fastbert.patch and as it is.

    python benchmarks/patch.py [--quick] [--layers 12] [--batch 32] [--seq-len 128] [--shortest 16] [--device cuda] ...

BertForSequenceClassification with random weights, a ragged batch whose lengths are evenly spaced from `shortest` to
`seq_len`, padded with a mask as a collator pads it, in float32 and in bfloat16 autocast. A training step is forward,
backward and AdamW(fused=True) with dropout 0.1; "patched, LazyAdam" steps by this package's optimizer. Inference is a
forward pass in evaluation mode. All variants have the same weights and memory allocator setting. Before anything is
timed logits in evaluation mode and gradients without dropout are compared. Variants run in turn in one process.
"""

import argparse
import copy
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from ragged import DTYPES, draw_lengths, parse, parser
from timing import interleaved, machine, results_path, write_csv
from torch import Tensor, nn

import fastbert
from fastbert.models.bert import BertConfig

VARIANTS = ("transformers", "transformers compiled", "attention alone", "patched", "patched, LazyAdam")


def make_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Random words [B, S], 0 and masked out at padding, and labels [B]."""
    lengths = draw_lengths(options)
    mask = (torch.arange(options.seq_len) < lengths[:, None]).long()
    words = torch.randint(1000, options.vocab_size, mask.shape) * mask
    batch = {"input_ids": words, "attention_mask": mask, "labels": torch.randint(2, (options.batch,))}
    return {name: x.to(options.device) for name, x in batch.items()}


def make_model(options: argparse.Namespace) -> nn.Module:
    sizes = BertConfig.preset(options.preset)
    config = transformers.BertConfig(
        vocab_size=options.vocab_size, hidden_size=sizes.hidden_size, num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size, num_hidden_layers=options.layers,
        max_position_embeddings=max(512, options.seq_len), attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(options.device)


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    model = make_model(options)
    models = {name: copy.deepcopy(model) for name in options.variants}
    for name, each in models.items():
        if name.startswith("patched"):
            fastbert.patch(each)
        elif name == "attention alone":
            fastbert.register_attention()
            each.set_attn_implementation("fastbert")
        elif name == "transformers compiled":
            each.forward = torch.compile(each.forward, dynamic=False)
    return models


def forward(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> transformers.utils.ModelOutput:
    kind = batch["input_ids"].device.type
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return model(**batch)


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode all the same, so that gradients are those of training."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "attention_head_size"):  # attention asks its own mode
            module.eval()
    return model


def logits_and_gradients(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, dict]:
    model.eval()
    with torch.inference_mode():
        logits = forward(model, batch, dtype).logits.float()
    forward(without_dropout(model), batch, dtype).loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    return logits, gradients


def furthest(found: tuple[Tensor, dict], truth: tuple[Tensor, dict]) -> tuple[float, float]:
    """Of the logits, and of the gradients relative to the largest element of all."""
    largest = max(x.abs().max().item() for x in truth[1].values())
    gradients = max((found[1][name] - x).abs().max().item() / largest for name, x in truth[1].items())
    return (found[0] - truth[0]).abs().max().item(), gradients


def typical(found: tuple[Tensor, dict], truth: tuple[Tensor, dict]) -> tuple[float, float]:
    """The same by the root of the mean square; the furthest of a few rounded logits is chance."""
    off = [found[1][name] - x for name, x in truth[1].items()]
    gradients = [sum(x.square().sum().item() for x in each) for each in (off, truth[1].values())]
    return (found[0] - truth[0]).square().mean().sqrt().item(), (gradients[0] / gradients[1]) ** 0.5


def verify(options: argparse.Namespace, models: dict[str, nn.Module], batch: dict, dtype: torch.dtype) -> None:
    """Stops the benchmark where a variant is further from transformers than the bound.

    In float32 logits within 1e-4 and gradients within 1e-3 of the largest; in bfloat16 gradients typically twice as far
    from float32 as those of transformers' own model of bfloat16 weights are, and logits four times: those of a batch
    with random weights are much alike, so that one rounding moves all of them.
    """
    plain = make_model(options)
    plain.load_state_dict(models[options.variants[0]].state_dict())
    truth = logits_and_gradients(plain, batch, torch.float32)
    allowed, error_of = (1e-4, 1e-3), furthest
    if dtype != torch.float32:
        error_of = typical
        of_weights = error_of(logits_and_gradients(plain.to(dtype), batch, torch.float32), truth)
        allowed = (4 * of_weights[0], 2 * of_weights[1])
    for name, model in models.items():
        error = error_of(logits_and_gradients(model, batch, dtype), truth)
        line = f"{dtype}: {name} is off by {error[0]:.1e} (logits), {error[1]:.1e} (gradients)"
        if not (error[0] <= allowed[0] and error[1] <= allowed[1]):
            raise SystemExit(f"{line}, allowed {allowed}: nothing is timed")
        print(line)


def calls(models: dict[str, nn.Module], batch: dict, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """What is timed -> variant -> a call."""

    def step(name: str, model: nn.Module) -> Callable[[], None]:
        if name.endswith("LazyAdam"):
            optimizer = fastbert.LazyAdam(model.parameters(), lr=1e-5)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def run() -> None:
            model.train()
            forward(model, batch, dtype).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def infer(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.eval()
            with torch.inference_mode():
                forward(model, batch, dtype)

        return run

    return {
        "training step": {name: step(name, model) for name, model in models.items()},
        "inference": {name: infer(model) for name, model in models.items() if not name.endswith("LazyAdam")},
    }


def main() -> None:
    arguments = parser(__doc__, VARIANTS, shortest=16, repeats=7)
    arguments.add_argument("--device", default="cpu")
    options = parse(arguments)
    torch.set_default_device(options.device if options.device != "cpu" else None)
    kept = fastbert.keep_memory()
    torch.manual_seed(0)
    batch = make_batch(options)
    real = batch["attention_mask"].float().mean().item()
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, memory kept: {kept}")
    print(
        f"BERT {options.preset}, {options.layers} layers; {options.batch} x {options.seq_len}, {real:.0%} real tokens"
    )
    rows = []
    for dtype in options.dtype:
        torch.manual_seed(1)
        models = make_models(options)
        verify(options, models, batch, DTYPES[dtype])
        for what, timed in calls(models, batch, DTYPES[dtype]).items():
            stats = interleaved(timed, options.repeats, warmup=2)
            plain = next(iter(stats.values())).median
            print(f"\n{what}, {dtype:<18}{'p20':>9}{'median':>9}{'p80':>9} ms   times {next(iter(stats))}")
            for name, s in stats.items():
                times = "".join(f"{1e3 * x:>9.1f}" for x in (s.p20, s.median, s.p80))
                print(f"{name:<30}{times}{plain / s.median:>9.2f}", flush=True)
                rows.append({
                    "what": what, "variant": name, "dtype": dtype, "p20_s": s.p20, "median_s": s.median,
                    "p80_s": s.p80, "times_first": plain / s.median, "preset": options.preset,
                    "layers": options.layers, "batch": options.batch, "seq_len": options.seq_len,
                    "shortest": options.shortest, "real_tokens": real, "vocab_size": options.vocab_size,
                    "repeats": options.repeats, "memory_kept": kept, "transformers": transformers.__version__,
                })  # fmt: skip
    if not options.quick:
        write_csv(results_path("patch", *options.dtype), rows)


if __name__ == "__main__":
    main()
