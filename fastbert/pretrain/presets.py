"""What the presets cost: learning rate, parameters, memory and arithmetic of a training step, from sizes alone."""

import functools

import torch

from fastbert.models.auto import PRETRAINED
from fastbert.models.config import ModelConfig
from fastbert.models.elmo import ElmoConfig

# tiny: what the demo learns well with; mini and small: the same over their width, as the best learning rate of hidden
# layers goes with 1 / width (Yang et al., "Tensor programs V", 2022); base and large: Devlin et al., "BERT" (2019),
# which deep post-norm encoders stand without diverging. Batches far above the default's 4,096 tokens take more:
# Liu et al., "RoBERTa" (2019), has 6e-4 and 4e-4 at a million tokens and more.
# RoBERTa, ERNIE, ALBERT: the same at the same width; ALBERT on from there.
LEARNING_RATES = {"bert": {"tiny": 3e-3, "mini": 1.5e-3, "small": 7.5e-4, "base": 1e-4, "large": 1e-4}}
LEARNING_RATES |= dict.fromkeys(("roberta", "xlm-roberta", "ernie", "xlnet"), LEARNING_RATES["bert"])
LEARNING_RATES["albert"] = LEARNING_RATES["bert"] | {"xlarge": 5e-5, "xxlarge": 2.5e-5}
LEARNING_RATES["elmo"] = {"tiny": 3e-3, "mini": 2e-3, "small": 1e-3, "base": 5e-4, "large": 3e-4}  # not searched for
MASKED = 0.15  # share of tokens to predict; a causal model predicts next to all
FLOAT32 = 4  # bytes


@functools.cache  # the table asks three times
def parameters(config: ModelConfig) -> int:
    """Numbers that a pretraining model of this configuration learns."""
    kind = next(kind for kind in PRETRAINED.values() if kind.config_class is type(config))
    with torch.device("meta"):
        return sum(param.numel() for param in kind(config).parameters())


def layers_and_embedding(config: ModelConfig) -> tuple[int, int]:
    """How many layers a token passes, and how wide its embedding is."""
    depth = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    return depth, getattr(config, "embedding_size", config.hidden_size)


def saved_for_backward(config: ModelConfig, tokens: int, predicted: float = MASKED) -> int:
    """Bytes, about, that a float32 forward pass over a packed batch keeps for its backward pass; bfloat16 halves it.

    A token keeps 16 rows of the hidden size in a layer: query, key, value, attention's output, two sums, what LayerNorm
    makes of them, and GELU's input and output, four each. Of the last layer only query, key and value are kept for
    every token, the rest where a word is to be predicted; there also the head's four, an embedding wide, and its
    logits. `predicted` is the share of these tokens.
    """
    if isinstance(config, ElmoConfig):  # gates, cell and output of every LSTM; logits of both directions
        inside = 2 * config.num_hidden_layers * (6 * config.cell_size + 4 * config.width)
        return round(FLOAT32 * tokens * (inside + 2 * predicted * (config.width + config.vocab_size)))
    hidden, (layers, embedding) = config.hidden_size, layers_and_embedding(config)
    columns = config.attention_columns()  # of relative positions at most
    everywhere = hidden * 12 * (layers - 1) + columns * (4 * layers - 1) + embedding  # of LayerNorm
    there = 12 * hidden + columns + 4 * embedding + config.vocab_size
    return round(FLOAT32 * tokens * (everywhere + predicted * there))


def memory(config: ModelConfig, tokens: int, predicted: float = MASKED) -> int:
    """Bytes, about, of a float32 step: weights, gradients, Adam's two moments, activations, the logits' gradient."""
    logits = round(FLOAT32 * predicted * tokens * config.vocab_size) * (2 if isinstance(config, ElmoConfig) else 1)
    return 4 * FLOAT32 * parameters(config) + saved_for_backward(config, tokens, predicted) + logits


def operations(config: ModelConfig, tokens: float, pairs: float, predicted: float, sequences: float = 0) -> float:
    """Floating-point operations of a training step's matrix products and attention.

    Forward takes 2 for every weight of a matrix and token; in attention 4 H a layer for every pair of tokens of which
    one sees the other (with relative positions 4 `attention_columns` for every pair of a sequence); and backward takes
    twice as many. Only what is computed counts: of the last layer, behind its attention, the tokens to be predicted and
    the sequences' first ones, and of the head and its product with the vocabulary the tokens to be predicted.
    Embeddings, norms, GELU, dropout, the pooler and its head, and the optimizer are left out, which are no products or
    small ones.

    Args:
        config: the model's.
        tokens: of the batch. pairs: the sum over its sequences of S * S, or S * (S + 1) / 2 of a causal model.
        predicted: tokens that have a label. sequences: how many there are.
    """
    if isinstance(config, ElmoConfig):
        lstm = 8 * config.cell_size * config.width + config.cell_size * (config.projection_size or 0)
        return 6.0 * 2 * (tokens * config.num_hidden_layers * lstm + predicted * config.width * config.vocab_size)
    hidden, (layers, embedding) = config.hidden_size, layers_and_embedding(config)
    columns = config.attention_columns(pairs / max(tokens, 1))
    relative = tokens * hidden * (columns - hidden) / config.num_attention_heads  # of queries by positions
    projections = tokens * 3 * hidden * hidden + relative + pairs * 2 * columns
    rest = hidden * hidden + 2 * hidden * config.intermediate_size
    head = hidden * embedding + embedding * config.vocab_size
    widened = embedding * hidden if hasattr(config, "embedding_size") else 0
    everywhere = tokens * (widened + (layers - 1) * rest) + layers * projections
    return 6.0 * (everywhere + (predicted + sequences) * rest + predicted * head)


def table(vocab_size: int, batch_tokens: int, seq_len: int) -> str:
    """The presets, a line each, for a vocabulary and a batch of these sizes."""
    lines = [
        f"presets, with --vocab-size {vocab_size}, --batch-tokens {batch_tokens} and --seq-len {seq_len} in float32:",
        "",
        f"{'':<63}{'masked words':^25}{'--objective clm, bilm':^25}".rstrip(),
        f"{'':<18}{'layers':>7}{'width':>7}{'heads':>6}{'parameters':>13}{'--lr':>8}"
        + f"{'memory':>11}{'a step':>14}" * 2,
    ]
    for model, rates in LEARNING_RATES.items():
        kind = PRETRAINED[model].config_class
        longest = "max_length" if model == "elmo" else "max_position_embeddings"
        table_rows = {longest: max(512, seq_len)} if model == "elmo" or kind.has_position_table else {}
        for name, lr in rates.items():
            config = kind.preset(name, vocab_size=vocab_size, **table_rows)
            line = (
                f"{f'{model} {name}':<18}{config.num_hidden_layers:>7}{config.hidden_size:>7}"
                f"{getattr(config, 'num_attention_heads', '-'):>6}{parameters(config):>13,}{lr:>8g}"
            )
            for predicted, seen in ((MASKED, seq_len), (1.0, (seq_len + 1) / 2)):
                if predicted == 1.0 and model in ("albert", "xlnet"):  # there is no causal one
                    continue
                if predicted == MASKED and model == "elmo":  # it predicts every word, from both sides
                    line += " " * 25
                    continue
                step = operations(
                    config, batch_tokens, batch_tokens * seen, batch_tokens * predicted, batch_tokens / seq_len
                )
                line += f"{memory(config, batch_tokens, predicted) / 1e9:>8.2f} GB{step / 1e9:>8,.0f} GFLOP"
            lines.append(line)
    return "\n".join([
        *lines,
        "",
        "Memory: weights, gradients, Adam's moments and one batch's activations, besides some 0.5 GB of Python and",
        "torch. Time: a step's GFLOP over the GFLOP that the machine multiplies in a second, which is printed when a",
        "run starts, or some more. Larger batches take a higher --lr.",
    ])  # fmt: skip
