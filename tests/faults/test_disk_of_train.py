"""A disk that fills up while ``train`` writes, and two processes that write results into one folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opustomo import checkpoint, cli
from small_set import SmallSet, assert_same_epoch, copy_run, hurry, train_line
from test_disk import fill, no_leftovers

HOLDER = """
import sys
from pathlib import Path
from opustomo.data.atomic import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    print("left", flush=True)
"""
SHORT = ("-n", "2", "--no-estpose", "--width", "0.05", "--zdim", "1")  # rows are made once


def lines_with_error(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "error:" in line]


def test_every_write_of_train(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run meets a full disk again and again, each time some writes further on, and ends as if it never had."""
    hurry(monkeypatch)
    whole, run = tmp_path / "whole", tmp_path / "run"

    def work(folder: Path) -> Callable[[], int]:
        begun = (folder / "config.yaml").is_file()
        line = ["train", "--resume", str(folder)] if begun else train_line(small_set, folder, *SHORT)
        return lambda: cli.main(line)

    status, writes = fill(monkeypatch, work(whole), 0)
    assert status == 0 and writes > 20
    met, n = 0, 1
    while True:
        capsys.readouterr()
        status, done = fill(monkeypatch, work(run), n)
        if status == 0:
            break
        [line] = lines_with_error(capsys)
        assert status == 2 and done == n and "No space left on device" in line and "free space" in line
        no_leftovers(run)
        for epoch in checkpoint.epochs_of(run):
            checkpoint.open_run(run, epoch)
        met, n = met + 1, n + 3
        assert met < 60
    assert met >= 6
    assert_same_epoch(whole, run, 1)


@pytest.mark.parametrize("verb", ["select", "export", "simulate"])
def test_the_second_waits_for_the_first(
    verb: str, finished_run: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the whole of it, one after the other; a lock left by a dead process is in nobody's way."""
    hurry(monkeypatch)
    out = tmp_path / "out"
    if verb == "simulate":
        line = ["simulate", "-o", str(out), "--preset", "two-state", "--n", "4", "--box", "24", "--angpix", "15"]
    else:
        run = copy_run(finished_run, tmp_path / "run", 2)
        assert cli.main(["analyze", str(run), "--clusters", "2", "--skip-umap"]) == 0
        given = [str(small_set.star), "--run", str(run)] if verb == "select" else [str(run)]
        line = [verb, *given, "-o", str(out), "--kmeans", "2"]
    command = [sys.executable, "-c", HOLDER, str(out)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        waiting: list[str] = []

        def told(message: str, *arguments: object) -> None:
            waiting.append(message % arguments)
            assert not [path for path in out.iterdir() if path.name != ".lock"]
            assert holder.stdin is not None
            holder.stdin.write("\n")
            holder.stdin.flush()

        monkeypatch.setattr("opustomo.data.atomic.log.info", told)
        assert cli.main(line) == 0
        assert waiting and "waiting for another process" in waiting[0]
        assert holder.stdout.readline() == "left\n" and holder.wait(20) == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    monkeypatch.undo()
    assert len(list(out.rglob("*.star"))) >= 2 and not (out / ".lock").exists()
    (out / ".lock").touch()  # as a killed one leaves it
    assert cli.main(line) == 0 and not (out / ".lock").exists()
