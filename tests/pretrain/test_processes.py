"""Several processes of one run: they take the steps of one process, whichever of them computes what."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import together
from pretrain_runs import assert_same_run, places
from safetensors.torch import load_file
from torch.testing import assert_close

from fastbert.data.batch import Batch
from fastbert.models.bert import BertConfig, BertForPreTraining
from fastbert.optim.lazy_adam import LazyAdam
from fastbert.pretrain import shards, snapshot
from fastbert.pretrain.loop import pretrain
from fastbert.pretrain.processes import Processes, check_devices, joined
from fastbert.pretrain.report import read_metrics
from fastbert.pretrain.stream import Stream

CASES = {
    "plain": {},  # three micro-batches: one process has one of them, the other two
    "touched": {"embedding_update": "touched", "accumulate": 2, "seq_len": 128, "phases": ["16:0.5", "32:0.5"]},
    "static": {"static_shapes": True, "embedding_update": "touched", "model": "albert", "objective": "mlm+sop"},
    "shard": {"shard": True, "embedding_update": "touched", "accumulate": 6},  # of one process it is not split
    "words": {"init": "COUNT plain/model", "vocab_size": 8192, "add_words": "words.txt", "rows_first": 3, "steps": 6},
}

# Which run each goes on from, and by how many processes it is resumed.
RESUMED = {
    "broken, 2": ("broken", 2), "one, then two": ("one plain", 2), "shards, 1": ("shards", 1),
    "shards, 2": ("shards", 2), "shards of one, then two": ("shards of one", 2),
}  # fmt: skip


def run_together(folder, count, runs):
    """`runs` by so many processes, started; see tests/together.py."""
    return [
        subprocess.Popen(
            [sys.executable, together.__file__, folder, json.dumps(runs)], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for environment in places(count)
    ]  # fmt: skip


def end_well(processes):
    """What each of them printed."""
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes), said
        return said
    finally:
        for process in processes:  # they would wait for each other
            process.kill()
            process.wait()
            process.stdout.close()


def of_run(settings, count):
    return settings | ({"init": settings["init"].replace("COUNT", count)} if "init" in settings else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """Of runs by two processes, `two NAME`, the same by one, `one NAME`, and of some that were resumed."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "manual.txt").write_text(corpus.read_text()[:60_000])
    (folder / "words.txt").write_text("yields\nexpression\n")
    resumed = {by: [{"name": name, "resume": True} for name in RESUMED if RESUMED[name][1] == by] for by in (1, 2)}
    runs = [{"name": f"two {name}", "settings": of_run(settings, "two")} for name, settings in CASES.items()]
    clocked = {"name": "by the clock", "settings": {"steps": None, "minutes": 0.005}}
    broken = {"name": "broken", "broken_off": 8}, {"name": "shards", "broken_off": 8, "settings": CASES["shard"]}
    two = run_together(folder, 2, [*broken, *runs, clocked, *resumed[2]])
    try:
        with together.quick():
            for name, settings in CASES.items():
                alone = of_run(settings, "one") | {"shard": False}
                pretrain(together.settings_of(folder, {"name": f"one {name}", "settings": alone}))
            of_one = {"name": "shards of one", "settings": CASES["shard"]}
            together.broken_off(together.settings_of(folder, of_one), 8)
            for name, (origin, _) in RESUMED.items():
                if origin in ("broken", "shards"):
                    together.wait_for(folder / f"{origin} is there")
                shutil.copytree(folder / origin, folder / name)
                for step in (9, 12):
                    shutil.rmtree(folder / name / f"snapshots/step-{step:08d}", ignore_errors=True)
                (folder / f"{name} is there").touch()
            pretrain(together.settings_of(folder, *resumed[1]), resume=True)
    finally:
        said = end_well(two)
    assert "counting words" in said[0] and not said[1].strip(), "the first one speaks for all"
    (folder / "resumed.txt").write_text(said[0])
    return folder


def assert_close_runs(ours, theirs):
    """Records of every step and held-out scores, and the exported weights, to rounding."""
    pairs = list(zip(read_metrics(ours / "metrics.jsonl"), read_metrics(theirs / "metrics.jsonl"), strict=True))
    for one, other in pairs:
        for name in ("tokens_per_second", "padding", "waiting", "mfu"):  # of the clock, or of the first process
            one.pop(name, 0), other.pop(name, 0)
        assert one == pytest.approx(other, rel=1e-5)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (ours, theirs))
    for name, weight in ours.items():
        assert_close(weight, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(folder, case):
    """With dropout, whose numbers are those of one process."""
    assert_close_runs(folder / f"two {case}", folder / f"one {case}")


def test_broken_off_and_resumed_by_as_many_it_ends_in_the_same_bits(folder):
    assert sorted(path.name for path in (folder / "broken/snapshots").iterdir()) == ["step-00000003", "step-00000006"]
    assert_same_run(folder / "broken, 2", folder / "two plain")
    assert_same_run(folder / "shards, 2", folder / "two shard")


@pytest.mark.parametrize("name", ["one, then two", "shards, 1", "shards of one, then two"])
def test_resumed_by_more_or_fewer_it_takes_the_same_steps(folder, name):
    assert_close_runs(folder / name, folder / ("one shard" if "shards" in name else "one plain"))
    said = (folder / "resumed.txt").read_text()
    assert said.count("resumed elsewhere than it was stopped, so not bit for bit the unbroken run: ") == 2
    assert said.count("processes 1 -> 2") == 2


@pytest.mark.nested
def test_what_two_wrote_is_resumed_by_three(folder):
    runs = [{"name": f"{name}, 3", "resume": True} for name in ("broken", "shards")]
    for run in runs:
        shutil.copytree(folder / run["name"].removesuffix(", 3"), folder / run["name"])
        (folder / f"{run['name']} is there").touch()
    said = end_well(run_together(folder, 3, runs))
    assert said[0].count("processes 2 -> 3") == 2
    assert_close_runs(folder / "broken, 3", folder / "one plain")
    assert_close_runs(folder / "shards, 3", folder / "one shard")


def test_a_run_by_the_clock_ends_in_all_at_once(folder):
    assert read_metrics(folder / "by the clock/metrics.jsonl")[-1]["step"] > 0
    assert (folder / "by the clock/model").exists()


def test_damaged_shards_and_other_models_are_named(folder, tmp_path):
    shutil.copytree(folder / "broken/snapshots", tmp_path / "snapshots")
    newest = tmp_path / "snapshots/step-00000006"
    model = BertForPreTraining(BertConfig.preset("mini", vocab_size=500))
    with pytest.raises(ValueError, match=r"shards holds another model or optimizer: .*word_embeddings"):
        shards.load(model, LazyAdam(model.parameters()), newest / "shards")
    part = next((newest / "shards").glob("__1*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"shards/{part.name} does not match the checksum.* snapshot of step 3"):
        snapshot.load(tmp_path / "snapshots")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        shards.save(model, LazyAdam(model.parameters()), part)


class Numbers:
    """In place of batches: epochs of 5, 4 and 5 of them, each known by its number."""

    def __init__(self, epoch=0):
        self.epoch, self.first, self.size = epoch, [0, 5, 9][epoch], [5, 4, 5][epoch]

    def at_epoch(self, epoch):
        return Numbers(epoch)

    def numbers(self, first):
        return iter(range(first, self.size))

    def samples(self, i):
        return i

    def made_of(self, i):
        return Batch(*[None] * 8, filled_tokens=self.first + i)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_order_is_that_of_one_process(count):
    """Steps of 3 batches, also where an epoch ends within one or with one; and from any step on."""
    streams = [Stream(Numbers(), 0, 3, Processes(rank, count).share(3)) for rank in range(count)]
    steps, stands = [iter(stream) for stream in streams], []
    for expected in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]):
        assert [batch.filled_tokens for each in steps for batch in next(each)] == expected
        stands.append({(stream.epoch, stream.index) for stream in streams})
    assert stands == [{(0, 3)}, {(1, 1)}, {(1, 4)}, {(2, 3)}]
    resumed = Stream(Numbers(), 0, 3)
    resumed.epoch, resumed.index = 1, 1
    assert [batch.filled_tokens for batch in next(iter(resumed))] == [6, 7, 8]


def test_what_does_not_go_together_is_refused(monkeypatch):
    four = Processes(1, 4)
    check_devices("cpu", 4, four)
    with pytest.raises(ValueError, match="of 3 4 processes cannot: give --accumulate 4 or a multiple"):
        check_devices("cpu", 3, four)
    with pytest.raises(ValueError, match=r"with --shard each .* give a multiple of 4, got 6"):
        check_devices("cpu", 6, four, is_split=True)
    with pytest.raises(ValueError, match="expected device cuda, got cuda:1"):
        check_devices("cuda:1", 4, four)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"at most 0 processes on a machine .*, got 4"):
        check_devices("cuda", 4, four)
    for name, value, message in (("WORLD_SIZE", "two", "got 'two'"), ("RANK", "4", "expected 0 to 3, got 4")):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message), joined():
            pass
