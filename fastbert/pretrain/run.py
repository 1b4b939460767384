"""A run's beginning and its folder: what is checked before anything is written, and config.json."""

import dataclasses
from pathlib import Path

import torch

from fastbert import files
from fastbert.backends import check_environment, linear
from fastbert.data.corpus import check_corpus
from fastbert.data.shards import is_store, read_tokenizer
from fastbert.models.auto import PRETRAINED
from fastbert.models.checkpoint import read_config as read_model_config
from fastbert.ops import linear_timing
from fastbert.pretrain.environment import environment
from fastbert.pretrain.lamb import check_package, usual_lr
from fastbert.pretrain.presets import LEARNING_RATES
from fastbert.pretrain.settings import CONTINUED_LR, OWN, PretrainConfig
from fastbert.pretrain.words import words_of


def new_run(config: PretrainConfig) -> PretrainConfig:
    """The settings of a new run, checked, before anything of it is written.

    Raises:
        ValueError, TypeError, OSError: a setting or the corpus does not hold. ImportError: an optimizer's package is
            missing.
    """
    config.check()
    check_environment()
    check_package(config)
    check_texts(config)
    refuse_a_second_run(config.output)
    words_of(config, resume=False)
    if config.store is None:
        print(check_corpus(config.corpus, config.column, separator=config.separator, quoting=config.quoting))
    else:
        read_tokenizer(config.store)
    if torch.device(config.device).type == "cuda":
        config = dataclasses.replace(config, static_shapes=True)  # for its step is captured, or as if it were
    return with_choices(config)


def check_texts(config: PretrainConfig) -> None:
    """Raises ValueError unless a new run has a corpus or a store, and of a store no setting that the store decides."""
    if config.store is None:
        if config.corpus is None:
            raise ValueError(
                "a new run needs a corpus: a text file, a table with --column, or a folder of such; or a token store "
                "of fastbert prepare (--store)"
            )
        if is_store(config.corpus):
            raise ValueError(f"{config.corpus} is a token store: give it as --store")
        return
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    if given := [name for name in _DECIDED_BY_A_STORE if getattr(config, name) != usual[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"with --store the store {config.store} decides {flags}: leave that out")


_DECIDED_BY_A_STORE = (
    "corpus", "column", "separator", "quoting", "words", "dictionary", "tokenizer", "vocab_size", "lowercase",
    "held_out",
)  # fmt: skip


def resumed_run(folder: Path) -> PretrainConfig:
    """The settings of the run in `folder`; raises as `check_environment`, `read_config` and `choose_linear`."""
    check_environment()
    config = read_config(folder)
    check_package(config)
    return with_choices(config)


def with_choices(config: PretrainConfig) -> PretrainConfig:
    """The settings with those filled in that are chosen here: the model's own, and the library of products."""
    own = {"lr": LEARNING_RATES[config.model][config.preset]} | OWN[config.model]
    if config.init is not None:
        own = {"lr": CONTINUED_LR, "objective": own["objective"]}
    if config.optimizer == "lamb":
        own["lr"] = usual_lr(config.batch_tokens * config.accumulate / config.all_phases()[0].seq_len)
    given = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    return dataclasses.replace(config, **(own | given), linear=choose_linear(config))


def refuse_a_second_run(folder: Path) -> None:
    """Raises ValueError where `folder` holds a run, what is left of one, or what a run would overwrite."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder, and {folder} is a file: choose another")
    for name in ("config.json", "snapshots", "metrics.jsonl"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} already holds a run ({name}): pass --resume to continue it, or choose another --output"
            )
    for name in ("model", "loss.png", "tensorboard"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is there already, and the run would write in its place: move it, or choose another "
                "--output"
            )


def choose_linear(config: PretrainConfig) -> str:
    """The library of the run's products: FASTBERT_LINEAR's, the setting's, or for a new run the fastest one."""
    name = config.linear if linear.requested() == "auto" else linear.requested()
    linear.check(name)
    if name != "auto":
        return name
    if torch.device(config.device).type != "cpu":
        return "torch"
    kind = PRETRAINED[config.model].config_class
    model = kind.preset(config.preset) if config.init is None else kind.from_fields(read_model_config(config.init))
    rows = min(config.batch_tokens, 512)  # more take longer and tell no more
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if config.model == "elmo":  # the softmax
        sides = model.width, model.vocab_size if config.init is not None else config.vocab_size
    else:
        sides = model.hidden_size, model.intermediate_size
    name, why = linear_timing.fastest(rows, *sides, dtype)
    print(f"linear products by {name}: {why}")
    return name


# Settings that runs did not have once, and what they did then.
_ADDED_LATER = {
    "linear": "torch", "separator": None, "quoting": "auto", "model": "bert", "tokenizer": "wordpiece",
    "masking": "token", "static_shapes": False, "inputs": "doc-sentences", "capture": False, "checkpoint_layers": False,
    "dictionary": None, "words": None, "init": None, "add_words": None, "rows_first": 0, "phases": None,
    "shard": False, "schedule": "linear", "decay": 0.2, "power": 1.0, "final_lr": 0.0, "task_type": None,
    "store": None, "optimizer": "lazy_adam", "attention_window": None, "norm": "layer",
    "attention_kind": "soft", "attention_temperature": None, "attention_temperature_rate": 0.0,
    "attention_temperature_end": 0.5, "sampled": None,
}  # fmt: skip
_NSP = {True: "mlm+nsp", False: "mlm"}  # the setting that was there before the objective


def read_config(folder: Path) -> PretrainConfig:
    """The settings of the run in `folder`.

    Raises:
        FileNotFoundError: there is no run. ValueError: its config.json is damaged; the message says where.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no run to resume: there is no {path}. A run that ended before its data was ready is "
            "started again without --resume, and reuses what is good"
        )
    try:
        stored = files.json_object(path)
        stored.pop("environment", None)
        if "nsp" in stored and "objective" not in stored:
            stored["objective"] = _NSP.get(stored.pop("nsp"))
        stored = _ADDED_LATER | stored | {"output": folder}
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        paths = {
            name: Path(stored[name])
            for name in ("corpus", "store", "dictionary", "init", "add_words")
            if stored[name] is not None
        }
        if isinstance(stored["phases"], list):
            stored["phases"] = tuple(map(str, stored["phases"]))
        config = PretrainConfig(**stored | paths)
        config.check()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run: {error}. Put it back as it was, or start a new run in "
            "another --output"
        ) from error
    return config


def write_config(config: PretrainConfig) -> None:
    """Writes config.json: the settings, and the environment, all that the run's weights depend on beside its corpus."""
    content = dataclasses.asdict(config) | {"environment": environment(config)}
    files.write(config.output, {"config.json": (files.json_text(content, indent=2) + "\n").encode()})
