"""Folders of models that `transformers` has not: config.json and model.safetensors by this package's own names."""

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fastbert.models import checkpoint


class OwnFolder(nn.Module):
    """A model that is saved under its own kind, which `transformers` refuses, rather than take it for another.

    A subclass has `config_class`, a dataclass with `vocab_size` and `longest`, and `model_type`, as config.json says
    it.
    """

    config_class: ClassVar[type]
    model_type: ClassVar[str]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def fields(self) -> dict[str, Any]:
        """What config.json says of the model."""
        kind = {"architectures": [type(self).__name__], "model_type": self.model_type}
        return dataclasses.asdict(self.config) | kind

    @property
    def loaded_by(self) -> str:
        """Who loads its folder, as a sentence."""
        return f"{type(self).__module__}.{type(self).__name__}.from_pretrained loads it"

    def save_pretrained(self, folder: str | os.PathLike, tokenizer: Any = None) -> None:
        """Writes config.json, model.safetensors and the tokenizer's files; see `checkpoint.save`."""
        checkpoint.write(folder, self.fields(), self.state_dict(), self.config, tokenizer)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """A new model as config.json's fields describe it, of which others are left out."""
        return cls(cls.config_class.from_fields(fields), **cls.stored_options(fields))

    @classmethod
    def stored_options(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What the constructor takes beside the configuration and config.json's fields say."""
        return {}

    @classmethod
    def own_tensors(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a folder's tensors those of this class, by its names for them."""
        return tensors

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """The model in a folder that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder, or a file is missing from it.
            ValueError: another kind of model, files that are damaged or do not belong together, or a weight that is
                NaN or infinite.
        """
        fields = checkpoint.read_config(folder)
        if fields.get("model_type") != cls.model_type.removeprefix(checkpoint.OWN):
            raise ValueError(f'{folder} must say "model_type": "{cls.model_type}", got {fields.get("model_type")!r}')
        try:
            model = cls.from_fields(fields)
            tensors = cls.own_tensors(checkpoint.read_tensors(Path(folder)))
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{folder} does not hold the {cls.__name__} that its config.json names: {error}"
            ) from error
        for name, tensor in tensors.items():
            checkpoint.check_finite(name, tensor, folder)
        return model.eval()
