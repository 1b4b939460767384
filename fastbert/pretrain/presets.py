"""What the presets cost: learning rate, parameters, memory and arithmetic of a training step, from sizes alone."""

import torch

from fastbert.models.auto import PRETRAINING
from fastbert.models.config import ModelConfig

# tiny: what the demo learns well with; mini and small: the same over their width, as the best learning rate of hidden
# layers goes with 1 / width (Yang et al., "Tensor programs V", 2022); base and large: Devlin et al., "BERT" (2019),
# which deep post-norm encoders stand without diverging. Batches far above the default's 4,096 tokens take more:
# Liu et al., "RoBERTa" (2019), has 6e-4 and 4e-4 at a million tokens and more.
# RoBERTa, ERNIE, ALBERT: the same at the same width; ALBERT on from there.
LEARNING_RATES = {"bert": {"tiny": 3e-3, "mini": 1.5e-3, "small": 7.5e-4, "base": 1e-4, "large": 1e-4}}
LEARNING_RATES |= dict.fromkeys(("roberta", "xlm-roberta", "ernie"), LEARNING_RATES["bert"])
LEARNING_RATES["albert"] = LEARNING_RATES["bert"] | {"xlarge": 5e-5, "xxlarge": 2.5e-5}
MASKED = 0.15  # share of tokens to predict
FLOAT32 = 4  # bytes


def parameters(config: ModelConfig) -> int:
    """Numbers that a pretraining model of this configuration learns."""
    kind = next(kind for kind in PRETRAINING.values() if kind.config_class is type(config))
    with torch.device("meta"):
        return sum(param.numel() for param in kind(config).parameters())


def layers_and_embedding(config: ModelConfig) -> tuple[int, int]:
    """How many layers a token passes, and how wide its embedding is."""
    depth = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    return depth, getattr(config, "embedding_size", config.hidden_size)


def saved_for_backward(config: ModelConfig, tokens: int) -> int:
    """Bytes, about, that a float32 forward pass over a packed batch keeps for its backward pass; bfloat16 halves it.

    A token keeps 16 rows of the hidden size in a layer: query, key, value, attention's output, two sums, what LayerNorm
    makes of them, and GELU's input and output, four each. Of the last layer only attention's four are kept for every
    token, the rest where a word is to be predicted; there also the head's four, an embedding wide, and its logits.
    """
    hidden, (layers, embedding) = config.hidden_size, layers_and_embedding(config)
    everywhere = hidden * (16 * (layers - 1) + 4) + 2 * embedding  # 2: the embeddings' sum, and their LayerNorm
    predicted = 12 * hidden + 4 * embedding + config.vocab_size
    return round(FLOAT32 * tokens * (everywhere + MASKED * predicted))


def memory(config: ModelConfig, tokens: int) -> int:
    """Bytes, about, of a float32 step: weights, gradients, Adam's two moments, activations, the logits' gradient."""
    logits = round(FLOAT32 * MASKED * tokens * config.vocab_size)
    return 4 * FLOAT32 * parameters(config) + saved_for_backward(config, tokens) + logits


def operations(config: ModelConfig, tokens: int, seq_len: int) -> float:
    """Floating-point operations of a training step's matrix products, sequences as long as may be.

    Forward takes 2 for every weight of a matrix and token, and in attention 4 S H a token and layer; backward twice
    that.
    """
    hidden, (layers, embedding) = config.hidden_size, layers_and_embedding(config)
    attention = 3 * hidden * hidden + 2 * seq_len * hidden
    rest = hidden * hidden + 2 * hidden * config.intermediate_size
    head = hidden * embedding + embedding * config.vocab_size
    projection = embedding * hidden if hasattr(config, "embedding_size") else 0
    everywhere = projection + layers * attention + (layers - 1) * rest
    return 6.0 * tokens * (everywhere + MASKED * (rest + head))


def table(vocab_size: int, batch_tokens: int, seq_len: int) -> str:
    """The presets, a line each, for a vocabulary and a batch of these sizes."""
    lines = [
        f"presets, with --vocab-size {vocab_size}, --batch-tokens {batch_tokens} and --seq-len {seq_len} in float32:",
        "",
        f"{'':<16}{'layers':>8}{'width':>8}{'heads':>8}{'parameters':>14}{'--lr':>10}{'memory':>10}{'a step':>14}",
    ]
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": max(512, seq_len)}
    for model, rates in LEARNING_RATES.items():
        for name, lr in rates.items():
            config = PRETRAINING[model].config_class.preset(name, **sizes)
            lines.append(
                f"{f'{model} {name}':<16}{config.num_hidden_layers:>8}{config.hidden_size:>8}"
                f"{config.num_attention_heads:>8}{parameters(config):>14,}{lr:>10g}"
                f"{memory(config, batch_tokens) / 1e9:>7.2f} GB"
                f"{operations(config, batch_tokens, seq_len) / 1e9:>7,.0f} GFLOP"
            )
    return "\n".join([
        *lines,
        "",
        "Memory: weights, gradients, Adam's moments and one batch's activations, besides some 0.5 GB of Python and",
        "torch. Time: a step's GFLOP over the GFLOP that the machine multiplies in a second; with --minutes it is",
        "measured before the training starts. Larger batches take a higher --lr.",
    ])  # fmt: skip
