"""What the presets cost: learning rate, parameters, memory and arithmetic of a training step, from sizes alone."""

import torch

from fastbert.models.bert import BertConfig, BertForPreTraining

# tiny: what the demo learns well with; mini and small: the same over their width, as the best learning rate of hidden
# layers goes with 1 / width (Yang et al., "Tensor programs V", 2022); base and large: Devlin et al., "BERT" (2019),
# which deep post-norm encoders stand without diverging. Batches far above the default's 4,096 tokens take more:
# Liu et al., "RoBERTa" (2019), has 6e-4 and 4e-4 at a million tokens and more.
LEARNING_RATES = {"tiny": 3e-3, "mini": 1.5e-3, "small": 7.5e-4, "base": 1e-4, "large": 1e-4}
MASKED = 0.15  # share of tokens to predict
FLOAT32 = 4  # bytes


def parameters(config: BertConfig) -> int:
    """Numbers that a `BertForPreTraining` of this configuration learns."""
    with torch.device("meta"):
        return sum(param.numel() for param in BertForPreTraining(config).parameters())


def saved_for_backward(config: BertConfig, tokens: int) -> int:
    """Bytes, about, that a float32 forward pass over a packed batch keeps for its backward pass; bfloat16 halves it.

    A token keeps 16 rows of the hidden size in a layer: query, key, value, attention's output, two sums, what LayerNorm
    makes of them, and GELU's input and output, four each. Of the last layer only attention's four are kept for every
    token, the rest where a word is to be predicted; there also the head's four, and its logits.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    everywhere = hidden * (16 * (layers - 1) + 4 + 2)  # 2: the embeddings' sum, and their LayerNorm
    predicted = 16 * hidden + config.vocab_size
    return round(FLOAT32 * tokens * (everywhere + MASKED * predicted))


def memory(config: BertConfig, tokens: int) -> int:
    """Bytes, about, of a float32 step: weights, gradients, Adam's two moments, activations, the logits' gradient."""
    logits = round(FLOAT32 * MASKED * tokens * config.vocab_size)
    return 4 * FLOAT32 * parameters(config) + saved_for_backward(config, tokens) + logits


def operations(config: BertConfig, tokens: int, seq_len: int) -> float:
    """Floating-point operations of a training step's matrix products, sequences as long as may be.

    Forward takes 2 for every weight of a matrix and token, and in attention 4 S H a token and layer; backward twice
    that.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = 3 * hidden * hidden + 2 * seq_len * hidden
    rest = hidden * hidden + 2 * hidden * config.intermediate_size
    head = hidden * hidden + hidden * config.vocab_size
    everywhere = layers * attention + (layers - 1) * rest
    return 6.0 * tokens * (everywhere + MASKED * (rest + head))


def table(vocab_size: int, batch_tokens: int, seq_len: int) -> str:
    """The presets, a line each, for a vocabulary and a batch of these sizes."""
    lines = [
        f"presets, with --vocab-size {vocab_size}, --batch-tokens {batch_tokens} and --seq-len {seq_len} in float32:",
        "",
        f"{'':<8}{'layers':>8}{'width':>8}{'heads':>8}{'parameters':>14}{'--lr':>10}{'memory':>10}{'a step':>14}",
    ]
    for name, lr in LEARNING_RATES.items():
        config = BertConfig.preset(name, vocab_size=vocab_size, max_position_embeddings=max(512, seq_len))
        lines.append(
            f"{name:<8}{config.num_hidden_layers:>8}{config.hidden_size:>8}{config.num_attention_heads:>8}"
            f"{parameters(config):>14,}{lr:>10g}{memory(config, batch_tokens) / 1e9:>7.2f} GB"
            f"{operations(config, batch_tokens, seq_len) / 1e9:>7,.0f} GFLOP"
        )
    return "\n".join([
        *lines,
        "",
        "Memory: weights, gradients, Adam's moments and one batch's activations, besides some 0.5 GB of Python and",
        "torch. Time: a step's GFLOP over the GFLOP that the machine multiplies in a second; with --minutes it is",
        "measured before the training starts. Larger batches take a higher --lr.",
    ])  # fmt: skip
