import json

from fastbert.report import Metrics, plot_loss, read_metrics


def test_a_resumed_run_drops_what_was_written_beyond_its_start(tmp_path):
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


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_plot_is_a_picture(tmp_path):
    records = [{"step": s, "mlm_loss": 8 - s / 10} for s in range(1, 20)]
    records.append({"step": 19, "held_out/mlm_loss": 6.3, "held_out/frequency_loss": 6.6})
    plot_loss(records, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
