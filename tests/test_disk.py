"""A disk that fills up at any write, and two processes in one folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from opustomo import checkpoint, cli
from opustomo.data import atomic as atomic_module
from opustomo.data.atomic import HOST, atomic, exclusive, write_text
from opustomo.data.cache import open_cache
from opustomo.errors import UserError
from opustomo.monitor import Metrics, read_rows, setup_log
from small_set import SmallSet, copy_run, hurry, train_line
from star_sets import Set

LAST = 2


class FullAt:
    """Every file is brought to the disk once, at its end: the n-th time there is no space (n from 1; 0: always)."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        if self.calls == self.n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(monkeypatch: pytest.MonkeyPatch, work: Callable[[], int], n: int) -> tuple[int, int]:
    """Exit status of ``work`` and the writes it made when the n-th fails."""
    full = FullAt(n)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        return work(), full.calls


def no_leftovers(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]


def test_every_write_of_a_checkpoint(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """weights, poses, codes: an epoch of which one could not be written does not count, the one before does."""
    run = copy_run(finished_run, tmp_path / "run", LAST)
    opened = checkpoint.open_run(run)
    poses = opened.rotation, opened.origin / opened.grid.box, opened.euler

    def save(epoch: int) -> int:
        def work() -> None:
            codes = torch.from_numpy(opened.codes) + epoch
            checkpoint.save_epoch(run, epoch, opened.weights, codes, codes, poses)

        return cli.run("opustomo train", work)

    for n in (1, 2, 3):
        assert fill(monkeypatch, lambda: save(LAST + 1), n) == (2, n)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "No space left on device); free space" in message
        assert checkpoint.open_run(run).epoch == LAST
        no_leftovers(run)
    assert fill(monkeypatch, lambda: save(LAST), 3)[0] == 2  # over an old epoch: its files stay whole
    assert np.array_equal(checkpoint.open_run(run).codes, opened.codes)
    assert fill(monkeypatch, lambda: save(LAST + 1), 0) == (0, 3)
    assert checkpoint.open_run(run).epoch == LAST + 1


@pytest.mark.parametrize("verb", ["analyze", "select", "export", "cache", "volumes"])
def test_every_write_of_a_verb(
    verb: str,
    finished_run: Path,
    small_set: SmallSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each fails once: one line that names the file; what was there before is as it was; then it goes through."""
    hurry(monkeypatch)
    run, out = copy_run(finished_run, tmp_path / "run", LAST), tmp_path / "out"
    analyse: list[object] = ["analyze", run, "--clusters", 2, "--skip-umap"]
    made = Set(tmp_path / "set")
    made.write()
    line: list[object] = {
        "analyze": analyse,
        "select": ["select", small_set.star, "--run", run, "-o", out, "--kmeans", 2],
        "export": ["export", run, "-o", out, "--kmeans", 2],
        "cache": ["cache", made.star, "-o", out, "--workers", 1],
        "volumes": ["volumes", run, "--kmeans", 2, "-o", out],
    }[verb]
    if verb != "analyze":
        assert cli.main([str(word) for word in analyse]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    n, done = 1, 0
    while True:
        capsys.readouterr()
        status, done = fill(monkeypatch, lambda: cli.main([str(word) for word in line]), n)
        if done < n:
            break
        lines = [found for found in capsys.readouterr().err.splitlines() if "error:" in found]
        assert status == 2 and len(lines) == 1 and "No space left on device" in lines[0], lines
        assert all(path.read_bytes() == content for path, content in before.items())
        no_leftovers(tmp_path)
        n += 1
    assert status == 0 and done >= 1
    if verb == "cache":
        open_cache(out)


def test_a_row_of_metrics_that_was_cut_off(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.append(epoch=0, particles=1)
    with metrics.path.open("a") as file:
        file.write("1,2")  # where the disk was full
    Metrics(metrics.path, 1).append(epoch=1, particles=2)
    assert [row["epoch"] for row in read_rows(metrics.path)] == ["0", "1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_log_and_under_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    setup_log(tmp_path, False).info("the work goes on")
    assert capfd.readouterr().err == "the work goes on\n"
    made = Set(tmp_path / "set")
    made.write()
    command = [sys.executable, "-m", "opustomo", "check", str(made.star)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, env=buffered)
    assert done.returncode == 2
    assert done.stderr == "opustomo check: error: disk full; free space or choose another folder with -o\n"


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Whoever may write into /dev would lose /dev/null to `-o /dev/null`."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a device or pipe"):
        write_text(path, "a")
    assert path.is_fifo() and [*tmp_path.iterdir()] == [path]


# ------------------------------------------------------------------------------------------------ two processes

HOLDER = """
import sys, time
from pathlib import Path
from opustomo.monitor import setup_log
setup_log(Path(sys.argv[1]), False)
print("held", flush=True)
time.sleep(100)
"""


def test_two_runs_in_one_folder(small_set: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused and changes nothing; after the first was killed nothing is in the way."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = (run / "run.log").read_bytes()
        assert cli.main(train_line(small_set, run, "-n", "1")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another process is writing into this folder" in line and "choose another folder" in line
        assert [path.name for path in run.iterdir()] == ["run.log"] and (run / "run.log").read_bytes() == before
        (run / f".weights.0.pkl.{HOST}.1.2.tmp").touch()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    setup_log(run, False)
    assert [path.name for path in run.iterdir()] == ["run.log"]  # and what it had not finished is gone


def test_makers_of_one_cache_wait_for_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with exclusive(tmp_path / "cache"):
            inside.set()
            waiting.wait(20)
            order.append("first")

    def second() -> None:
        with exclusive(tmp_path / "cache"):
            order.append("second")
            (tmp_path / "cache" / "row").touch()

    waiting = threading.Event()
    caplog.set_level("INFO", "opustomo")
    atomic_module.log.addFilter(lambda record: waiting.set() or True)
    try:
        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        threads[0].start()
        inside.wait(20)
        threads[1].start()
        for thread in threads:
            thread.join(20)
    finally:
        atomic_module.log.filters.clear()
    assert order == ["first", "second"] and "waiting for another process" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["row"]


def test_a_folder_held_for_nothing_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(UserError), exclusive(tmp_path / "cache"):
        raise UserError("a mask that does not fit")
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a", []
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()))
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert seen == ["old"] and path.read_text() == "new"
    monkeypatch.setattr(os, "fsync", FullAt(1))
    with pytest.raises(UserError, match="a: cannot be written"):
        write_text(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
