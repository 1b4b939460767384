"""The model that a run starts from."""

import dataclasses

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.data.tokenizer import special_ids, vocab_size
from fastbert.models.auto import PRETRAINED
from fastbert.models.pretraining import PreTrainingModel
from fastbert.models.sampled_softmax import LogUniform
from fastbert.pretrain.evaluate import Frequencies
from fastbert.pretrain.init import read_copy
from fastbert.pretrain.settings import PretrainConfig


def starting_model(
    config: PretrainConfig, tokenizer: Tokenizer, frequencies: Frequencies
) -> tuple[PreTrainingModel, Tensor]:
    """A new model, or the run's copy of the folder that it goes on from; and ids of words new to it, int64 [words]."""
    new_rows = torch.empty(0, dtype=torch.int64)
    if config.init is not None:
        model, new_rows = read_copy(config)
    else:
        model = new_model(config, tokenizer, frequencies)
    if config.sampled is not None:
        model.sampling = LogUniform.of(frequencies.log_probability, config.sampled)
    return model, new_rows


def new_model(config: PretrainConfig, tokenizer: Tokenizer, frequencies: Frequencies) -> PreTrainingModel:
    """A model of the preset, drawn from torch's generator; its head predicts the words' frequencies."""
    kind = PRETRAINED[config.model]
    if config.model == "elmo":
        sizes = kind.config_class.preset(
            config.preset, vocab_size=vocab_size(tokenizer), dropout=config.dropout,
            max_length=config.max_position_embeddings, pad_token_id=special_ids(tokenizer).pad,
        )  # fmt: skip
        return with_frequencies(kind(sizes), frequencies)
    more = {} if config.task_type is None else {"use_task_id": True}
    if kind.config_class.has_position_table:
        more["max_position_embeddings"] = config.max_position_embeddings
    sizes = kind.config_class.preset(
        config.preset, vocab_size=vocab_size(tokenizer), hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout, pad_token_id=special_ids(tokenizer).pad,
        is_decoder=config.objective == "clm", attention_window=config.attention_window, norm=config.norm,
        attention_kind=config.attention_kind,
        attention_temperature=1.0 if config.attention_temperature is None else config.attention_temperature, **more,
    )  # fmt: skip
    rows = sizes.max_position_embeddings + sizes.first_position
    return with_frequencies(kind(dataclasses.replace(sizes, max_position_embeddings=rows)), frequencies)


def with_frequencies(model: PreTrainingModel, frequencies: Frequencies) -> PreTrainingModel:
    """The same model, whose biases predict the words' frequencies."""
    with torch.no_grad():  # what the first steps would spend on learning
        model.predictions.bias.copy_(frequencies.log_probability)
    return model
