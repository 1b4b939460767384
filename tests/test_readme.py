"""Every example of the README and of docs/ runs as printed, and prints what it says it prints."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from fastbert import cli
from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.models.small import BiLSTM, SmallConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "patch.md")  # tests/patching/test_examples.py runs it
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """Where the reader stands: runs have left models, small here, in runs/reviews/model and runs/student/model."""
    monkeypatch.chdir(tmp_path)
    text = "a few words of a review that was written on a film seen with few others at night"
    save_tokenizer(train_tokenizer([text] * 2, 64), "tokenizer")
    size = load_tokenizer("tokenizer").get_vocab_size()
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=size))
    model.save_pretrained("runs/reviews/model", tokenizer="tokenizer")
    BiLSTM(SmallConfig(vocab_size=size), ["bad", "good"]).save_pretrained("runs/student/model", tokenizer="tokenizer")


def whats_there():
    """What an example may take from the reader: a model of transformers that has just got new tokens, and a batch."""
    import transformers

    import fastbert

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("runs/reviews/model")
    old_size = 64
    tokenizer.add_tokens([f"new{i}" for i in range(old_size + 2 - len(tokenizer))])
    ids = torch.tensor([[1, 64, 65]])
    return {
        "torch": torch, "fastbert": fastbert, "model": transformers.BertForMaskedLM(config), "tokenizer": tokenizer,
        "old_size": old_size, "batch": {"input_ids": ids, "labels": ids}, "input_ids": torch.tensor([[2, 7, 3]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_as_printed(page, readers_folder):
    blocks = BLOCK.findall(page.read_text())
    names = whats_there()
    for (language, code), (following, text) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page.name, "exec"), names)
            assert printed.getvalue() == (text if following == "text" else "")


def commands(*beginnings):
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", "").splitlines():
                if not language and line.startswith(beginnings):
                    yield pytest.param(line, id=f"{page.name}: {line[:40]}")


READ = {
    "finetune": "finetune.finetune", "predict": "finetune.predict", "embed": "embed.embed", "fill": "fill.fill",
    "attention": "attention_page.attention", "distill": "distill.distill", "bench": "bench.run.bench",
}  # fmt: skip


@pytest.mark.parametrize("command", list(commands(*(f"fastbert {name} " for name in READ))))
def test_other_commands_are_understood(command, monkeypatch):
    pytest.importorskip("sklearn")
    seen, words = [], shlex.split(command, comments=True)
    function = "distill.distill_general" if "--corpus" in words else READ[words[1]]
    monkeypatch.setattr(f"fastbert.{function}", lambda config, **resume: seen.append(config))
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.suppress(SystemExit):
        cli.main()
    values = [x if isinstance(x, tuple) else (x,) for x in vars(seen[0]).values()]
    given = {str(value) for some in values for value in some}
    assert given.issuperset(word for word in words[2:] if not word.startswith("--"))


@pytest.mark.parametrize("command", list(commands("fastbert pretrain ")))
def test_commands_are_understood(command, readers_folder, monkeypatch):
    seen = []
    monkeypatch.setattr("fastbert.pretrain.pretrain", lambda config, resume=False: seen.append((config, resume)))
    monkeypatch.setattr("fastbert.pretrain.run.read_config", lambda folder: seen[0][0])
    first = "fastbert pretrain --corpus reviews.csv --column text --output runs/reviews --steps 1"
    for line in (first, command):
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit):
            cli.main()
    config, resume = seen[-1]
    assert str(config.output) in command and resume == ("--resume" in command)
