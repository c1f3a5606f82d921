"""Asked to stop, training keeps what it has and says how to go on; other work ends at once in one line."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from opustomo import cli
from opustomo import train as training
from opustomo.data import cache
from opustomo.errors import Interrupted
from opustomo.interruption import SIGNALS, Asked, on_signal, stop_at_once
from small_set import EPOCHS, SmallSet, assert_same_epoch, copy_run, metrics_of, train_line
from traps import Trap


@pytest.fixture
def begun(finished_run: Path, tmp_path: Path) -> Path:
    """A run that has finished its first epoch."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    (run / "cache").symlink_to(finished_run / "cache")
    return run


def resume(run: Path) -> int:
    return cli.main(["train", "--resume", str(run), "--workers", "1", "--device", "cpu"])


@pytest.mark.parametrize(
    ("where", "n", "number"),
    [
        ("train_step", 3, signal.SIGINT),
        ("train_step", 7, signal.SIGUSR1),
        ("evaluate", 1, signal.SIGTERM),
        ("encode_all", 2, signal.SIGTERM),
    ],
)
def test_training_keeps_its_state(
    where: str,
    n: int,
    number: signal.Signals,
    begun: Path,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the midst of an epoch, at its last step, and while its particles are judged or encoded."""
    with monkeypatch.context() as patch:
        patch.setattr(training, where, Trap(n, number)(getattr(training, where)))
        assert resume(begun) == 128 + number
    by = "" if number == signal.SIGINT else f" by {number.name}"
    line = f"interrupted{by}: everything learned so far is kept; go on with `opustomo train --resume {begun}`"
    assert capsys.readouterr().err.splitlines()[-1] == f"opustomo train: {line}"
    assert (begun / "run.log").read_text().splitlines()[-1].endswith(line)
    assert (begun / "state.pkl").is_file()
    assert resume(begun) == 0
    assert not (begun / "state.pkl").exists()
    for epoch in range(EPOCHS):
        assert_same_epoch(begun, finished_run, epoch)
    assert metrics_of(begun) == metrics_of(finished_run)


def test_ctrl_c_again_stops_at_once(
    begun: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(*arguments: object) -> training.Step:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", twice)
        assert resume(begun) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "opustomo train: interrupted"
    assert not (begun / "state.pkl").exists()
    assert resume(begun) == 0
    assert_same_epoch(begun, finished_run, EPOCHS - 1)


def test_other_work_ends_at_once(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache.Cache, "write", Trap(5, signal.SIGTERM)(cache.Cache.write))
    assert cli.main(train_line(small_set, tmp_path / "run")) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "opustomo train: interrupted by SIGTERM"
    assert not (tmp_path / "run" / "cache" / ".lock").exists()


def test_handlers_are_put_back_and_belong_to_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    asked = Asked()
    with on_signal(asked):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.number == signal.SIGUSR1
        with pytest.raises(Interrupted), on_signal(stop_at_once):
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in SIGNALS] == before
    seen: list[int] = []

    def elsewhere() -> None:
        with on_signal(stop_at_once):
            seen.append(1)

    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
    assert seen == [1]
