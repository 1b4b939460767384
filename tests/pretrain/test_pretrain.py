"""The whole path on a small corpus: Python's own manual, which comes with the standard library."""

import dataclasses
import json
import math
import os
import pydoc_data.topics
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from fastbert.backends import linear
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.ops import linear_timing
from fastbert.pretrain import lock, snapshot
from fastbert.pretrain import loop as loop
from fastbert.pretrain import run as runs
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.report import last_scores, read_metrics, summary
from fastbert.pretrain.run import PretrainConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "manual.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    return path


@pytest.fixture(scope="module")
def settings(corpus):
    return PretrainConfig(
        output=corpus, corpus=corpus, vocab_size=1000, seq_len=32, batch_tokens=512, steps=40, lr=3e-3, held_out=0.1,
        evaluations=2, evaluation_batches=4, snapshot_every=7, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """An unbroken run."""
    config = dataclasses.replace(settings, output=tmp_path_factory.mktemp("run") / "whole")
    pretrain(config)
    return config.output


def start(config, *extra, code="from fastbert.cli import main; main()"):
    """The run as a process of its own, so that it can be killed."""
    arguments = ["pretrain", *extra]
    for name, value in dataclasses.asdict(config).items():
        if "--resume" not in extra and isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif value is not None and (name == "output" or "--resume" not in extra):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | threads, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def assert_same_run(folder, finished):
    """Bit for bit: losses of every step, held-out scores, and the exported weights."""
    assert losses(folder) == losses(finished)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (folder, finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_everything(finished):
    names = {"config.json", "tokenizer", "data", "snapshots", "metrics.jsonl", "tensorboard", "loss.png", "model"}
    assert names <= {path.name for path in finished.iterdir()}
    curve = losses(finished)
    assert list(curve) == list(range(1, 41))
    scores = [r for r in read_metrics(finished / "metrics.jsonl") if "held_out/mlm_loss" in r]
    assert [r["step"] for r in scores] == [20, 40]
    assert scores[1]["held_out/mlm_loss"] < math.log(1000)
    assert snapshot.steps(finished / "snapshots") == [35, 40]
    assert any((finished / "tensorboard").iterdir())
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((finished / "config.json").read_text())
    assert stored["environment"] == snapshot.load(finished / "snapshots")["environment"], "all that a seed depends on"


@pytest.mark.parametrize("bf16", [False, True])
def test_it_learns_from_context(settings, tmp_path, bf16):
    """Every document repeats one word: frequencies know nothing, the neighbours everything."""
    words = ["cat", "dog", "bird", "fish", "horse", "sheep", "goat", "mouse", "lion", "bear", "wolf", "deer"]
    draw = random.Random(0)
    corpus = tmp_path / "animals.txt"
    corpus.write_text("\n\n".join(" ".join([draw.choice(words)] * 25) + "." for _ in range(2000)))
    config = dataclasses.replace(
        settings,
        corpus=corpus,
        output=tmp_path / "run",
        vocab_size=100,
        steps=150,
        dropout=0.0,
        objective="mlm",
        bf16=bf16,
    )
    pretrain(config)
    scores = [r for r in read_metrics(config.output / "metrics.jsonl") if "held_out/mlm_loss" in r][-1]
    assert scores["held_out/frequency_loss"] > 2.0 and scores["held_out/mlm_loss"] < 0.5


def test_the_export_is_the_trained_model(finished):
    exported = BertForPreTraining.from_pretrained(finished / "model")
    trained = snapshot.load(finished / "snapshots")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in exported.state_dict().items())
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    batch = tokenizer(["The yield expression is used when defining a generator.", "A class."], padding=True)
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    theirs = transformers.BertForPreTraining.from_pretrained(finished / "model").eval()(**batch).prediction_logits
    ours = exported.eval()(**batch).prediction_logits
    seen = batch["attention_mask"].bool()
    assert (ours - theirs)[seen].abs().max() < 1e-4


INSIDE_WRITING = """
import os, signal, sys, torch
from fastbert.cli import main
save, count = torch.save, 0

def save_half(state, file):
    global count
    count += 1
    if count == 2:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)

torch.save = save_half
main()
"""


def test_killed_five_times_it_ends_in_the_same_bits(settings, finished, tmp_path):
    config = dataclasses.replace(settings, output=tmp_path / "killed", workers=1)  # outlives a kill for a moment
    draw = random.Random(1)
    for attempt in range(5):
        process = start(
            config, *(["--resume"] if attempt else []),
            **({"code": INSIDE_WRITING} if attempt in (1, 3) else {}),
        )  # fmt: skip
        if attempt not in (1, 3):
            until = draw.randrange(6 * attempt + 1, 6 * attempt + 6)
            while process.poll() is None and max(losses(config.output), default=0) < until:
                time.sleep(0.002)
            process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    process = start(config, "--resume")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert_same_run(config.output, finished)
    assert not list((config.output / "snapshots").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_saves_and_ends_cleanly(settings, finished, tmp_path, number):
    """What a terminal, systemd, SLURM and containers send reaches the workers too."""
    config = dataclasses.replace(settings, output=tmp_path / "stopped", snapshot_every=1000, workers=2)
    process = start(config)
    while process.poll() is None and max(losses(config.output), default=0) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    step = snapshot.steps(config.output / "snapshots")[-1]
    assert f"stopped by {number.name} after step {step} of 40; go on with: fastbert pretrain --output" in output
    assert "Traceback" not in output
    pretrain(config, resume=True)
    assert_same_run(config.output, finished)


def test_workers_end_with_a_killed_parent(settings, tmp_path):
    config = dataclasses.replace(settings, output=tmp_path / "killed", steps=100_000, workers=2)
    process = start(config)
    while process.poll() is None and not losses(config.output):
        time.sleep(0.002)
    process.kill()
    process.wait()
    ended = time.monotonic() + 3  # by itself a worker of torch looks for its parent every five seconds
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < ended:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    process.stdout.close()


def test_a_run_that_diverges_stops_and_keeps_its_snapshots(settings, finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(settings, output=tmp_path / "diverged", snapshot_every=5, keep=1)
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 1e-3 if step < 11 else 1e30)
    with pytest.raises(ValueError, match=r"diverged at step 1[34] of 40: its loss .* the snapshot of step 10 is kept"):
        pretrain(config)
    assert snapshot.steps(config.output / "snapshots") == [10]
    assert max(losses(config.output)) <= 13 and not (config.output / "model").exists()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "diverged at step" in text and "lower --lr (now 0.003)" in text

    # weights that are finite and good for nothing: the held-out scores tell, before a snapshot and the export
    last = dataclasses.replace(config, output=tmp_path / "last", steps=12)
    with pytest.raises(ValueError, match=r"diverged at step 12 of 12: .* the snapshot of step 10 is kept"):
        pretrain(last)
    assert not (last.output / "model").exists()


@pytest.mark.parametrize("name", ["model", "loss.png", "tensorboard", "."])
def test_nothing_that_is_there_is_written_over(settings, tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(exist_ok=True)
    mine = tmp_path / "file" if name == "." else mine
    mine.write_text("precious")
    output = mine if name == "." else mine.parent
    with pytest.raises(ValueError, match=r"is a file: choose another|is there already"):
        pretrain(dataclasses.replace(settings, output=output))
    assert mine.read_text() == "precious"


def test_a_run_exists_once_its_data_does(settings, tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one document alone, of a single sentence.")
    config = dataclasses.replace(settings, output=tmp_path / "run", corpus=corpus, steps=1)
    with pytest.raises(ValueError, match="document"):
        pretrain(config)
    assert not (config.output / "config.json").exists()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "holds no run to resume" in text and "is started again without --resume" in text
    corpus.write_text("\n\n".join(f"giraffes eat leaves, {i} a day. so they grow." for i in range(60)))
    pretrain(config)
    assert "giraffes" in (config.output / "tokenizer/vocab.txt").read_text()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--corpus", corpus, "--steps", 5)
    assert "already holds a run (config.json): pass --resume" in text
    (config.output / "config.json").unlink()
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--corpus", corpus, "--steps", 5)
    assert "already holds a run (snapshots)" in text, "a new run must not go on from an old one's snapshots"


def test_resume_on_another_text_is_refused(settings, finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace(str(settings.corpus), str(tmp_path / "manual.txt"))
    )
    shutil.rmtree(run / "data")
    shutil.copy(settings.corpus, tmp_path / "manual.txt")
    pretrain(dataclasses.replace(settings, output=run), resume=True)  # elsewhere, the same text: its data is made again
    for name in ("train", "held_out"):
        assert (run / f"data/{name}/meta.json").read_bytes() == (finished / f"data/{name}/meta.json").read_bytes()

    shutil.rmtree(run / "data")
    (tmp_path / "manual.txt").write_text("\n\n".join("quite another text." for _ in range(100)))
    assert "is not known to be the one that the run began with" in bad(
        capsys, monkeypatch, "pretrain", "--output", run, "--resume"
    )
    shutil.copytree(finished / "data", run / "data")
    shutil.rmtree(run / "data/held_out")
    shutil.copytree(run / "data/train", run / "data/held_out")
    assert "was trained with another held-out text than" in bad(
        capsys, monkeypatch, "pretrain", "--output", run, "--resume"
    )


def test_one_process_trains_in_a_folder(finished, tmp_path, capsys, monkeypatch):
    with lock.hold(finished):
        text = bad(capsys, monkeypatch, "pretrain", "--output", finished, "--resume")
        assert f"is in use: process {os.getpid()} on" in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = bad(capsys, monkeypatch, "pretrain", "--output", tmp_path / "new", "--corpus", finished, "--steps", 5)
    assert "trains in one process, and WORLD_SIZE=4 says that this is one of several" in text
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_without_its_metrics(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").unlink()
    pretrain(runs.read_config(run), resume=True)
    said = capsys.readouterr().out
    assert "metrics.jsonl is missing: training goes on, with records from step 41 on alone" in said
    before = last_scores(read_metrics(finished / "metrics.jsonl"))
    assert summary(before) in said, "the held-out scores are measured again"


def test_batches_do_not_depend_on_workers(settings, finished, tmp_path):
    config = dataclasses.replace(settings, output=tmp_path / "workers", workers=2, steps=40)
    pretrain(config)
    assert losses(config.output) == losses(finished)


def test_minutes_become_steps_once(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "steps_in_time", lambda steps, *_: steps)  # whatever else this machine does
    config = dataclasses.replace(settings, output=tmp_path / "timed", steps=None, minutes=0.05)
    began = time.perf_counter()
    pretrain(config)
    steps = runs.read_config(config.output).steps
    assert steps is not None and f"{steps} steps of" in capsys.readouterr().out
    assert max(losses(config.output)) == steps
    assert time.perf_counter() - began < 60
    # A fixed number of steps gives the same run: the measurement left no trace.
    fixed = dataclasses.replace(settings, output=tmp_path / "fixed", steps=steps)
    pretrain(fixed)
    assert losses(fixed.output) == losses(config.output)


def test_a_run_that_falls_behind_its_minutes_ends_early_and_whole(settings, tmp_path, capsys, monkeypatch):
    """Steps and minutes together: as many steps, and fewer once the machine has become slower."""
    config = dataclasses.replace(settings, output=tmp_path / "late", steps=30, minutes=30.0, log_every=5, warmup=0.0)
    monkeypatch.setattr(loop, "steps_in_time", lambda steps, step, *_: 14 if step >= 10 else steps)
    pretrain(config)
    said = capsys.readouterr()
    assert "30 steps of" in said.out and "30 allowed" in said.out
    assert "30 minutes have become too short: 14 steps, not 30" in said.out + said.err
    assert runs.read_config(config.output).steps == 14 and snapshot.steps(config.output / "snapshots") == [7, 14]
    records = read_metrics(config.output / "metrics.jsonl")
    rates = {r["step"]: r["lr"] / settings.lr for r in records if "lr" in r}
    assert rates == pytest.approx({5: 26 / 30, 10: 21 / 30, 14: 1 / 14})  # the schedule ends with the run
    assert [r["step"] for r in records if "held_out/mlm_loss" in r] == [14]
    assert (config.output / "model").is_dir()


def test_elsewhere_is_named(finished, capsys):
    state = snapshot.load(finished / "snapshots")
    config = runs.read_config(finished)
    runs.name_differences(state["environment"], config)
    assert capsys.readouterr().out == ""
    runs.name_differences(state["environment"] | {"threads": 77, "torch": "1.0"}, config)
    said = capsys.readouterr().out
    assert f"threads 77 -> {torch.get_num_threads()}" in said and "torch 1.0 ->" in said and "fastbert" not in said


def test_the_library_of_products_is_chosen_once(settings, finished, tmp_path, monkeypatch, capsys):
    timed = []

    def fastest(*shape):
        timed.append(shape)
        return "onednn", "a test says so"

    monkeypatch.setattr(linear_timing, "fastest", fastest)
    monkeypatch.setattr(linear, "onednn_missing", None)
    monkeypatch.setattr(linear, "_requested", "auto")
    config = runs.new_run(dataclasses.replace(settings, output=tmp_path / "new"))
    assert config.linear == "onednn" and timed == [(512, 128, 512, torch.float32)]
    assert "linear products by onednn: a test says so" in capsys.readouterr().out
    with loop.products(config):
        assert linear.chosen() == "onednn"
    assert runs.environment(config)["linear products"] == "onednn"
    config.output.mkdir()
    runs.write_config(config)
    assert runs.resumed_run(config.output) == config and len(timed) == 1, "a resumed run was timed again"

    # FASTBERT_LINEAR forces it, which a resumed run says
    monkeypatch.setattr(linear, "_requested", "torch")
    forced = runs.resumed_run(config.output)
    assert forced.linear == "torch"
    runs.name_differences(runs.environment(config), forced)
    assert "linear products onednn -> torch" in capsys.readouterr().out
    monkeypatch.setattr(linear, "_requested", "auto")
    in_bf16 = dataclasses.replace(settings, output=tmp_path / "bf16", bf16=True)
    assert runs.new_run(in_bf16).linear == "onednn" and timed[1:] == [(512, 128, 512, torch.bfloat16)]

    monkeypatch.setattr(linear, "onednn_missing", "it is gone")
    with pytest.raises(ValueError, match=r"it is gone\. FASTBERT_LINEAR=torch"):
        runs.resumed_run(config.output)
    assert snapshot.load(finished / "snapshots")["environment"]["linear products"] == runs.read_config(finished).linear


def small(config, **overrides):
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", vocab_size=1000, hidden_dropout_prob=0.0, **overrides))
    return model, loop.make_optimizer(model, config)


def batches(finished, config):
    from fastbert.data.batches import PretrainBatches
    from fastbert.data.store import TokenStore
    from fastbert.data.tokenizer import load_tokenizer, special_ids

    special = special_ids(load_tokenizer(finished / "tokenizer"))
    store = TokenStore.open(finished / "data/train")
    return PretrainBatches(store, special, seq_len=32, batch_tokens=config.batch_tokens, seed=0)


def test_accumulated_is_one_large_batch(settings, finished):
    """Gradients over two micro-batches are those of the mean over all their masked tokens and pairs."""
    config = dataclasses.replace(settings, steps=10, clip=1e9, embedding_update="all", objective="mlm+nsp")
    micro = [batches(finished, config)[i] for i in (0, 1)]
    model, optimizer = small(config, attention_probs_dropout_prob=0.0)
    optimizer.step = optimizer.zero_grad = lambda **_: None
    record = loop.train_step(model, optimizer, micro, 0.0, config)
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    outputs = [
        model(
            b.input_ids, token_type_ids=b.token_type_ids, cu_seqlens=b.cu_seqlens, max_seqlen=b.max_seqlen,
            masked_positions=b.masked_positions,
        )
        for b in micro
    ]  # fmt: skip
    words = torch.nn.functional.cross_entropy(
        torch.cat([o.prediction_logits for o in outputs]), torch.cat([b.labels for b in micro])
    )
    pairs = torch.nn.functional.cross_entropy(
        torch.cat([o.seq_relationship_logits for o in outputs]), torch.cat([b.sentence_label for b in micro])
    )
    (words + pairs).backward()
    assert record["loss"].item() == pytest.approx((words + pairs).item(), rel=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_touched_moves_the_words_of_the_step_and_no_other(settings, finished):
    config = dataclasses.replace(settings, steps=10, embedding_update="touched", objective="mlm+nsp")
    micro = [batches(finished, config)[i] for i in (0, 1)]
    model, optimizer = small(config)
    words = model.bert.embeddings.word_embeddings.weight
    before = words.detach().clone()
    loop.train_step(model, optimizer, micro, 1e-3, config)
    touched = torch.zeros(len(words), dtype=torch.bool)
    for batch in micro:
        touched[batch.input_ids] = touched[batch.labels] = True
    assert 0 < touched.sum() < len(words)
    moved = (words != before).any(1)
    assert not moved[~touched].any() and moved[touched].float().mean() > 0.9

    all_rows = dataclasses.replace(config, embedding_update="all")
    model, optimizer = small(all_rows)
    loop.train_step(model, optimizer, micro, 1e-3, all_rows)
    assert (model.bert.embeddings.word_embeddings.weight != before).any(1).float().mean() > 0.99


def fastbert(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from fastbert.cli import main; main()", *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def bad(capsys, monkeypatch, *arguments):
    """What the program says when it refuses; it must not be a traceback."""
    from fastbert.cli import main

    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return str(ended.value)


def test_bad_input_gets_a_sentence(tmp_path, corpus, finished, capsys, monkeypatch):
    def said(*arguments, output=tmp_path / "new"):
        text = bad(capsys, monkeypatch, "pretrain", "--output", output, *arguments)
        assert not (tmp_path / "new").exists(), "something was written before the input was checked"
        return text

    empty, folder = tmp_path / "empty.txt", tmp_path / "folder"
    empty.touch()
    folder.mkdir()
    assert "needs a corpus" in said("--steps", 5)
    assert "missing.txt" in said("--steps", 5, "--corpus", tmp_path / "missing.txt")
    assert "empty.txt" in said("--steps", 5, "--corpus", empty)
    assert "folder" in said("--steps", 5, "--corpus", folder)
    assert "so many steps or minutes: give --steps" in said("--corpus", corpus)
    assert "position table, max_position_embeddings=512, got 600" in said(
        "--corpus", corpus, "--steps", 5, "--seq-len", 600, "--batch-tokens", 6000
    )
    assert "lr must be a number above 0, got nan" in said("--corpus", corpus, "--steps", 5, "--lr", "nan")
    for setting, value, message in (
        ("batch-tokens", 64, "batch_tokens must be at least one sample's, seq_len=128, got 64"),
        ("vocab-size", 10, "vocab_size must be an integer from 64 to"),
        ("held-out", 0.7, "held_out must be a share above 0 and at most 0.5, got 0.7"),
        ("device", "gpu", "device must be one that torch has here, got 'gpu'"),
    ):
        new = tmp_path / setting
        assert message in said("--corpus", corpus, "--steps", 5, f"--{setting}", value, output=new)
        assert not new.exists()
    damaged = tmp_path / "config.json"
    good = json.loads((finished / "config.json").read_text())
    for content, problem in (
        (b"{", "Expecting"), (b"\xff", "utf-8"), (b"[]", "it is no JSON object"), (b"{}", "it lacks corpus"),
        (good | {"colour": 1}, "colour"), ({k: v for k, v in good.items() if k != "lr"}, "it lacks lr"),
        (good | {"steps": "5"}, ""), (good | {"corpus": 3}, ""), (good | {"lr": math.nan}, "lr must be"),
    ):  # fmt: skip
        damaged.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        ended = said("--resume", output=tmp_path)
        assert "config.json does not hold the settings of a run: " in ended and problem in ended
    damaged.write_text(json.dumps(good | {"preset": "mini"}))
    for name in ("tokenizer", "data", "snapshots"):
        shutil.copytree(finished / name, tmp_path / name)
    assert "config.json describes another model than the snapshot" in said("--resume", output=tmp_path)
    damaged.unlink()
    assert "holds no run to resume" in said("--resume")
    assert "already holds a run (config.json): pass --resume" in said("--corpus", corpus, "--steps", 5, output=finished)
    changed = said("--resume", "--lr", 0.5, output=finished)
    assert "a resumed run keeps its settings; lr was 0.003, now 0.5" in changed
    assert "there is no command 'train'" in bad(capsys, monkeypatch, "train")


def test_a_damaged_store_is_named(settings, finished, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(settings, output=tmp_path / "damaged", steps=3)
    pretrain(config)
    tokens = config.output / "data/train/tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    text = bad(capsys, monkeypatch, "pretrain", "--output", config.output, "--resume")
    assert "tokens.bin" in text


def test_info():
    ended = fastbert("info")
    assert ended.returncode == 0 and "instruction set" in ended.stdout and "attention" in ended.stdout
    for name, why in (("cuda", "no cuda kernels yet"), ("gpu", "no backend is called 'gpu'")):
        refused = fastbert("info", FASTBERT_BACKEND=name)
        assert refused.returncode == 1 and why in refused.stderr and "Traceback" not in refused.stderr


def test_help_names_every_setting():
    text = fastbert("pretrain", "--help", COLUMNS="200").stdout
    for field in dataclasses.fields(PretrainConfig):
        assert field.name.replace("_", "-") in text
    assert "resume" in text
    said = " ".join(text.replace("│", " ").split())
    assert "The same corpus, settings and seed give the same weights, bit for bit, where" in said
