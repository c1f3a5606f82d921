"""The log, progress lines, metrics table and memory figure of a running program."""

import csv
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from opustomo import cli, monitor
from opustomo.errors import UserError


def test_log_goes_to_stderr_and_dated_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = monitor.setup_log(tmp_path / "run", verbose=False)
    log.info("412 particles")
    log.debug("detail")
    logging.getLogger("opustomo.average").warning("no mask")
    captured = capsys.readouterr()
    assert captured.err == "412 particles\nwarning: no mask\n" and captured.out == ""
    lines = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert len(lines) == 3 and "opustomo 0." in lines[0]
    assert lines[1][:2] == "20" and lines[1].endswith("INFO    412 particles")


def test_verbose_shows_debug_lines(capsys: pytest.CaptureFixture[str]) -> None:
    monitor.setup_log(None, verbose=True).debug("detail")
    assert capsys.readouterr().err == "detail\n"


def test_a_resumed_run_appends_to_its_log_and_says_everything_once(tmp_path: Path) -> None:
    for word in ("first", "second"):
        monitor.setup_log(tmp_path, verbose=False).info(word)
    text = (tmp_path / "run.log").read_text()
    assert text.count("first") == text.count("second") == 1


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"-o .*file/run: cannot be written"):
        monitor.setup_log(tmp_path / "file" / "run", verbose=False)


def test_the_reason_of_a_failure_ends_the_log(tmp_path: Path) -> None:
    monitor.setup_log(tmp_path, verbose=False)
    cli.fail("opustomo train", "disk full", 2)
    assert (tmp_path / "run.log").read_text().endswith("opustomo train: error: disk full\n")


def clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    ticks = itertools.count(0, step)
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monitor.setup_log(None, verbose=False)
    clock(monkeypatch, 4.0)
    batches = [[0] * 8] * 5
    assert list(monitor.progress(batches, 40, "epoch 1", size=len)) == batches
    lines = capsys.readouterr().err.splitlines()
    # a step takes 4 s: the first line comes after 12 s, 24 particles at 2 a second, 16 to go
    assert lines[0] == "epoch 1: 24/40 particles (60%), 2 particles/s, 8.0 s left"
    assert lines[-1] == "epoch 1: 40 particles in 24.0 s (1.67 particles/s)" and len(lines) == 2


def test_quick_stages_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monitor.setup_log(None, verbose=False)
    clock(monkeypatch, 0.1)
    assert list(monitor.progress(range(20), 20, "cache")) == list(range(20))
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(monitor.progress([[0] * 8] * 2, 16, "cache", size=len)) == [[0] * 8] * 2
    assert "cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.24, "4.2 s"), (59.99, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert monitor.duration(seconds) == words


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_on_disk_at_once_with_empty_cells(tmp_path: Path) -> None:
    metrics = monitor.Metrics(tmp_path / "metrics.csv")
    metrics.append(epoch=0, particles=400, loss=-1234.5678, val_nll=None)
    [row] = rows(tmp_path / "metrics.csv")
    assert tuple(row) == monitor.METRIC_COLUMNS
    assert (row["epoch"], row["particles"], row["val_nll"], row["kl"]) == ("0", "400", "", "")
    assert float(row["loss"]) == pytest.approx(-1234.5678)


def test_resumed_metrics_drop_what_will_be_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = monitor.Metrics(path)
    for epoch in range(4):
        metrics.append(epoch=epoch, loss=epoch)
    with path.open("a") as file:
        file.write("4,100,7.")  # killed while writing
    monitor.Metrics(path, epoch=2).append(epoch=2, loss=20)
    assert [(row["epoch"], row["loss"]) for row in rows(path)] == [("0", "0"), ("1", "1"), ("2", "20")]


def test_a_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    metrics = monitor.Metrics(tmp_path / "metrics.csv")
    with pytest.raises(ValueError, match="los"):
        metrics.append(epoch=0, los=1.0)
    assert rows(tmp_path / "metrics.csv") == []


def test_peak_memory_counts_what_was_used() -> None:
    held = b"x" * 400_000_000  # a large parent must not count
    code = "from opustomo.monitor import peak_memory_gb as p; a = p(); x = b'x' * 300_000_000; print(p() - a)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert float(printed) == pytest.approx(0.3, abs=0.03)
    assert len(held) > 0
