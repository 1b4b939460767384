import errno
import json
import math

import matplotlib.figure
import pytest

from fastbert.pretrain.report import Metrics, last_scores, plot_loss, read_metrics, summary


def strict(line):
    """JSON as the standard has it: no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_resumed_run_drops_what_was_written_beyond_its_start(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    resumed = Metrics(tmp_path, 3)
    resumed.write({"step": 4, "loss": 40.0})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [{"step": 4, "loss": 40.0}]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert "missing" not in capsys.readouterr().out


def test_what_is_not_a_number_is_null_in_the_file_and_a_dash_on_the_screen(tmp_path):
    nothing = {"held_out/mlm_loss": 3.25, "held_out/rare_mlm_loss": math.nan, "held_out/rare_frequency_loss": math.inf}
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, **nothing})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')  # as it was written once
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, **nothing, "held_out/rare_mlm_loss": None, "held_out/rare_frequency_loss": None}
    assert second == {"step": 2, "loss": None}
    assert last_scores([first, second]) == {"mlm_loss": 3.25, "rare_mlm_loss": None, "rare_frequency_loss": None}
    Metrics(tmp_path, 2).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [first, second]

    scores = {"mlm_loss": 3.25, "frequency_loss": 4.5, "mlm_accuracy": 0.5, "nsp_accuracy": None}
    assert summary(scores | {f"rare_{name}": math.nan for name in scores}).splitlines() == [
        "",
        "held-out, predicted tokens         all     rare",
        "loss, always the frequencies     4.500        -",
        "loss, this model                 3.250        -",
        "accuracy, this model             50.0%        -",
        "next sentence: accuracy              -",
    ]


def test_no_file_is_no_records_and_a_resumed_run_says_so(tmp_path, capsys):
    assert read_metrics(tmp_path / "metrics.jsonl") == [] and last_scores([]) == {}
    Metrics(tmp_path, 7).close()
    said = capsys.readouterr().out
    assert f"{tmp_path / 'metrics.jsonl'} is missing: training goes on, with records from step 8 on alone" in said


@pytest.mark.parametrize("line", ["\0\0\0", "[]", "{}", '{"step": "3"}', '{"step": 3, "loss"', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n' + line + '\n{"step": 4}\n'
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .*: remove that line, or move the file"):
        Metrics(tmp_path, 4)
    assert path.read_text(errors="surrogateescape") == content, "nothing may be lost"


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match="the disk is full") as full:
        metrics.write({"step": 1, "loss": 2.0})
    assert full.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        metrics.close()

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = Metrics(tmp_path, 0)
    monkeypatch.setattr(metrics._board, "add_scalar", no_space)
    with pytest.raises(OSError, match="the disk is full") as full:
        metrics.write({"step": 1, "loss": 2.0})
    assert full.value.filename == str(tmp_path / "tensorboard")
    metrics.close()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures, figure = [], matplotlib.figure.Figure
    monkeypatch.setattr(
        matplotlib.figure, "Figure", lambda *given, **named: figures.append(figure(*given, **named)) or figures[-1]
    )
    return figures


@pytest.mark.parametrize("gaps", [False, True])
def test_plot_is_a_picture(tmp_path, drawn, gaps):
    """A panel for all that was recorded, each value where it belongs, and lines where phases begin."""
    records = [
        {
            "step": s, "mlm_loss": None if gaps and s % 3 else 8 - s / 10, "mlm_accuracy": s / 100, "sop_accuracy": 0.5,
            "lr": 0.1 / s, "seq_len": 64 if 12 <= s < 19 else 32,
        }
        for s in range(1, 20)
    ]  # fmt: skip
    records.append({"step": 19, "held_out/mlm_loss": None if gaps else 6.3, "held_out/frequency_loss": 6.6})
    plot_loss(records, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    loss, accuracy, rate = drawn[0].axes
    labels = ["loss (nats per predicted token)", "accuracy", "learning rate"]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == labels
    seen = [s for s in range(1, 20) if not (gaps and s % 3)]
    assert list(loss.lines[0].get_xdata()) == seen and list(loss.lines[0].get_ydata()) == [8 - s / 10 for s in seen]
    assert list(rate.lines[0].get_ydata()) == [0.1 / s for s in range(1, 20)]
    names = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert names == ["words, training, smoothed", "sentence order, training, smoothed"]
    assert all(list(axes.lines[-1].get_xdata()) == [12, 12] for axes in drawn[0].axes), "longer sequences from there on"
    assert [text.get_text() for text in loss.texts] == ([] if gaps else ["6.30"])

    plot_loss([], tmp_path / "loss.png", "nothing was recorded")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG" and len(drawn[1].axes) == 1
