"""A loss that runs away is noticed, and training returns to the last checkpoint of an epoch, with a lower rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opustomo import checkpoint, cli
from opustomo import train as training
from opustomo.interruption import Asked
from opustomo.training.course import Course
from opustomo.training.guard import BLOCK, SETTLED, RanAway, Watch
from small_set import EPOCHS, SmallSet, copy_run, given_cache, hurry, metrics_of, tensors, train

ROWS = torch.arange(8)


def judge(blocks: list[float], worth: float = 40.0) -> int:
    """Blocks of steps with this mean excess until the watch calls; their number if it does not."""
    watch, course = Watch(Asked(), 0.0, lambda: None, worth, ""), Course()
    for number, value in enumerate(blocks):
        for step in range(BLOCK):
            watch.note(ROWS, value + torch.linspace(-30.0, 30.0, 8), 8)
            try:
                watch.look(course, last=step == 3)
            except RanAway as ran:
                assert not ran.lost and "nats per particle" in str(ran)
                return number
    return len(blocks)


def test_a_jump_is_judged_by_how_much_blocks_differ() -> None:
    quiet = [0.1, -0.2, 0.3, 0.0, -0.1, 0.2]
    assert judge([*quiet, 4.9, *quiet]) == 13  # less than any network loses by chance
    assert judge([*quiet, 6.0]) == 6
    assert judge([*quiet, 6.0], worth=100.0) == 7  # a tenth of what the particles are worth
    assert judge([20.0 * value for value in quiet] + [20.0]) == 7  # as blocks go here
    assert judge([0.0, 50.0, 0.0]) == 3  # nothing to compare with yet
    assert judge([-5.0 * number for number in range(20)]) == 20  # for the better
    assert len(quiet) > SETTLED


def test_what_is_not_finite_is_called_at_once_and_named() -> None:
    watch = Watch(Asked(), 0.0, lambda: None, 100.0, "")
    watch.note(ROWS, torch.zeros(8), 8)
    watch.look(Course(), last=False)
    watch.note(torch.arange(20, 40), torch.full((20,), math.nan), 20)
    with pytest.raises(RanAway, match=r"particle row\(s\) 21, 22, 23, 24, 25, 26, 27, 28 and 12 more$") as called:
        watch.look(Course(), last=False)
    assert called.value.lost


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, times: int) -> None:
    """The decoder's weights become nonsense at so many calls of a step from the ``first`` on."""
    step, calls = training.train_step, iter(range(1, 10_000))

    def spoiling(model: Any, *arguments: Any) -> training.Step:
        if first <= next(calls) < first + times:
            with torch.no_grad():
                next(iter(model.decoder.parameters())).fill_(math.inf)
        return step(model, *arguments)

    monkeypatch.setattr(training, "train_step", spoiling)


def test_training_returns_to_the_last_epoch(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch to the linear stage, in the third to the second; each time with half the rate."""
    hurry(monkeypatch)
    spoil(monkeypatch, 3, 1)
    assert train(small_set, tmp_path / "run", "-n", "1", "--cache", str(given_cache(finished_run))) == 0
    log = (tmp_path / "run" / "run.log").read_text()
    assert "epoch 0: the loss is not finite for particle row(s) " in log
    assert "back to the beginning of epoch 0 with 0.5 of the learning rate" in log

    run = copy_run(finished_run, tmp_path / "third", 1)
    (run / "cache").symlink_to(finished_run / "cache")
    spoil(monkeypatch, 5, 1)
    assert cli.main(["train", "--resume", str(run), "--workers", "1", "--device", "cpu"]) == 0
    assert "back to the beginning of epoch 2 with 0.5" in (run / "run.log").read_text()
    course = tensors(run / "weights.2.pkl")["course"]
    assert (course["epoch"], course["rate"], course["setbacks"]) == (3, 0.5, 1)
    mine, others = metrics_of(run), metrics_of(finished_run)
    assert len(mine) == len(others) and mine[:4] == others[:4]
    assert float(mine[4]["lr"]) == pytest.approx(float(others[4]["lr"]) / 2)
    assert checkpoint.epochs_of(run) == list(range(EPOCHS))


def test_a_run_that_cannot_be_saved_says_so(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = copy_run(finished_run, tmp_path / "run", 1)
    (run / "cache").symlink_to(finished_run / "cache")
    hurry(monkeypatch)
    spoil(monkeypatch, 1, 1000)
    assert cli.main(["train", "--resume", str(run), "--workers", "1", "--device", "cpu"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "not finite for particle row(s)" in message and "after 3 returns to a checkpoint; give a lower --lr" in message
    )
    assert checkpoint.epochs_of(run) == [0, 1] and checkpoint.open_run(run).epoch == 1


def test_checkpoints_to_keep(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    """The last one, and the one that explains held-out particles best, which is made to be the first."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    (run / "cache").symlink_to(finished_run / "cache")
    lines = (run / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    best = lines[2].split(",")
    best[columns.index("val_elbo")] = "1e6"
    (run / "metrics.csv").write_text("\n".join([*lines[:2], ",".join(best), *lines[3:]]) + "\n")
    assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest", "--keep", "1") == 0
    assert checkpoint.epochs_of(run) == [0, EPOCHS - 1]
    assert not list(run.glob("*.1.pkl"))
