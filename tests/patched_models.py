"""Small models of every type that `fastbert.patch` takes, and a ragged batch, for the tests of patching."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

B, S, V = 4, 20, 100
LENGTHS = torch.tensor([9, 20, 1, 14])
MASK = (torch.arange(S) < LENGTHS[:, None]).long()
SIZES = {
    "vocab_size": V, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": V, "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 40,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "bert": lambda **more: transformers.BertConfig(**SIZES | more),
    "roberta": lambda **more: transformers.RobertaConfig(**SIZES | {"pad_token_id": 1} | more),
    "xlm-roberta": lambda **more: transformers.XLMRobertaConfig(**SIZES | {"pad_token_id": 1} | more),
    "albert": lambda **more: transformers.AlbertConfig(
        **SIZES | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2} | more
    ),
    "electra": lambda **more: transformers.ElectraConfig(**SIZES | {"embedding_size": 16} | more),
    "ernie": lambda **more: transformers.ErnieConfig(**SIZES | {"use_task_id": True, "task_type_vocab_size": 3} | more),
    "distilbert": lambda **more: transformers.DistilBertConfig(**DISTILBERT | more),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
NO_DROPOUT_DISTILBERT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


def make(kind: str, head: str = "AutoModel", dropout: bool = True, **more) -> nn.Module:
    """With random weights, biases too, in evaluation mode."""
    if not dropout:
        more |= NO_DROPOUT_DISTILBERT if kind == "distilbert" else NO_DROPOUT
    torch.manual_seed(7)
    model = getattr(transformers, head).from_config(CONFIGS[kind](**more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Padded on the right, with token types where the model has them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, V, (B, S), generator=generator)
    inputs = {"input_ids": torch.where(MASK == 1, ids, model.config.pad_token_id), "attention_mask": MASK}
    if model.config.model_type in ("bert", "albert", "electra", "ernie"):
        inputs["token_type_ids"] = (torch.arange(S) > 4).long() * MASK
    return inputs


def word_labels(inputs: dict[str, Tensor]) -> Tensor:
    return torch.where((torch.arange(S) % 3 == 0) & (MASK == 1), inputs["input_ids"], -100)


def real(x: Tensor) -> Tensor:
    """Rows at tokens of what is [B, S, ...]; anything else as it is."""
    return x[MASK.bool()] if x.shape[:2] == MASK.shape else x
