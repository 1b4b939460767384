"""Memory that a training step keeps between its forward and its backward pass, counted without a GPU.

    python benchmarks/activations.py [--layers 12]

BERT base in bfloat16, both losses, dropout 0.1. These are counts of tensors' bytes, not measurements on a GPU: what the
allocator rounds up, temporary memory, weights, gradients and the optimizer's state are not in them.

Ours is the step of `fastbert pretrain --device cuda --bf16`, rehearsed (tests/cuda/rehearsal.py): what its forward pass
made and is still there when it ends. `transformers` is its model under autocast as torch.compile cuts it: the results
of the forward graph that AOTAutograd's partition hands to the backward graph, each memory once, without weights. It is
traced for the CPU and without dropout on attention's weights, of which a GPU's fused attention keeps nothing either.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.multiprocessing.reductions import StorageWeakRef

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/cuda"))
import rehearsed

# Name: sequences, tokens of the longest, tokens in all, of these predicted.
SHAPES = {"64 x 32 to 128": (64, 128, 5120, 768), "32 x 512": (32, 512, 16384, 2457)}


class Partitioned(Exception):  # no error: the graph has been seen, and need not run
    """The forward graph is there."""


def of_transformers(sequences: int, longest: int, layers: int) -> int:
    """Bytes that the forward graph of a compiled step hands to its backward graph, without weights."""
    config = transformers.BertConfig(attention_probs_dropout_prob=0.0, num_hidden_layers=layers)
    torch._dynamo.reset()
    model = transformers.BertForPreTraining(config).train()
    weights = {shape for weight in model.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept = {}

    def forward(graph: torch.fx.GraphModule, _: list) -> None:
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        for node in results:
            x = node.meta.get("val") if isinstance(node, torch.fx.Node) and node.op != "placeholder" else None
            if isinstance(x, torch.Tensor) and not (x.dim() == 2 and x.shape in weights):
                kept[StorageWeakRef(x.untyped_storage()).cdata] = x.untyped_storage().nbytes()
        raise Partitioned

    compiler = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition
    )
    ids, pairs = torch.zeros(sequences, longest, dtype=torch.int64), torch.zeros(sequences, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids, "labels": ids}
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(lambda: model(**batch, next_sentence_label=pairs).loss, backend=compiler, dynamic=False)()
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Partitioned):
            raise
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    print("| megabytes, counted | ours | --checkpoint-layers | transformers, compiled | ours of it |")
    print("|---|---|---|---|---|")
    for name, (sequences, longest, tokens, masked) in SHAPES.items():
        ours = []
        for checkpoint_layers in (False, True):
            arguments = tokens, sequences, masked, longest, checkpoint_layers, layers
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # before autograd has run in it
                ours.append(alone.submit(rehearsed.activations, "base", *arguments).result())
        theirs = of_transformers(sequences, longest, layers)
        numbers = " | ".join(f"{each / 1e6:,.0f}" for each in (*ours, theirs))
        print(f"| {name} | {numbers} | {ours[0] / theirs:.0%} |", flush=True)


if __name__ == "__main__":
    main()
