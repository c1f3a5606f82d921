"""``opustomo status``: of runs that go on, have ended, and were killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from opustomo import cli
from opustomo import train as training
from opustomo.data.atomic import hold
from opustomo.errors import UserError
from opustomo.status import in_words, status_of
from small_set import EPOCHS, SmallSet, copy_run, hurry, train
from traps import Trap, in_a_copy


def test_a_finished_run(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(finished_run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{finished_run}: done\n") and "epochs with codes: 0, 1, 2" in said
    assert "go on" not in said and f"epoch {EPOCHS - 1} of {EPOCHS}" in said
    assert cli.main(["status", str(finished_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "done" and found["checkpoints"] == [0, 1, 2]
    assert found["held_out"] == pytest.approx(found["linear"], abs=1.0)


def test_a_run_that_goes_on(finished_run: Path, tmp_path: Path) -> None:
    """Known by the lock on its log; looking does not take the lock away, nor keep it from the next run."""
    run = copy_run(finished_run, tmp_path / "run", 1)
    with (run / "run.log").open("a") as log:
        hold(log, run)
        found = status_of(run)
        assert found.state == "running" and found.next == ""
        assert found.seconds_left is not None and found.seconds_left >= 0
        assert "particles/s, about" in in_words(run, found)
        with pytest.raises(UserError, match="another process"), (run / "run.log").open("a") as other:
            hold(other, run)
    assert status_of(run).state == "done"


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGKILL, "died"), (signal.SIGTERM, "interrupted")], ids=["killed", "asked"]
)
def test_a_run_that_was_ended(
    number: signal.Signals, state: str, small_set: SmallSet, finished_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = copy_run(finished_run, tmp_path / "run", 0)
    (run / "cache").symlink_to(finished_run / "cache")
    hurry(monkeypatch)
    monkeypatch.setattr(training, "train_step", Trap(3, number)(training.train_step))
    line = ("-n", str(EPOCHS), "--load", "latest")
    assert in_a_copy(lambda: train(small_set, run, *line)) in (-number, 128 + number)
    found = status_of(run)
    assert found.state == state and found.next == f"opustomo train --resume {run}"
    assert f"go on     {found.next}" in in_words(run, found)


def test_a_run_that_failed(small_set: SmallSet, tmp_path: Path) -> None:
    assert train(small_set, tmp_path / "run", "--valfrac", "2") == 2
    found = status_of(tmp_path / "run")
    assert found.state == "failed" and "--valfrac 2: must lie in [0, 1)" in found.last


def test_no_run(tmp_path: Path) -> None:
    for what, words in ((tmp_path / "none", "is no folder"), (tmp_path, "has no run.log")):
        with pytest.raises(UserError, match=words):
            status_of(what)
    (tmp_path / "run.log").write_bytes(b"\xff\x00 nothing\n" * 3)
    with pytest.raises(UserError, match="no line of this program"):
        status_of(tmp_path)
