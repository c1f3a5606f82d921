"""A run that is killed again and again, at any moment, ends with the very bytes of one that never was; so do verbs.

A kill is a real SIGKILL, of a copy of this process that has armed a trap.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from opustomo import checkpoint, cli
from opustomo.analysis import latents
from opustomo.data.atomic import HOST
from small_set import SmallSet, assert_same_epoch, copy_run, hurry, metrics_of, train_line
from traps import Trap, half_of_it, in_a_copy

LAST = 7
OPTIONS = ("-n", str(LAST + 1), "--log-interval", "20", "--accum-step", "2", "--plot")


def arm(patch: pytest.MonkeyPatch, where: str, n: int) -> None:
    """A row of the cache, an EM step, a step of training, a file half written or not yet renamed."""
    from opustomo import linear, train
    from opustomo.data import cache

    trap = Trap(n)
    if where == "row":
        patch.setattr(cache.Cache, "write", trap(cache.Cache.write))
    elif where == "linear":
        patch.setattr(linear, "maximise", trap(linear.maximise))
    elif where == "step":
        patch.setattr(train, "train_step", trap(train.train_step))
    elif where == "held-out":
        patch.setattr(train, "evaluate", trap(train.evaluate))
    elif where == "write":
        patch.setattr(os, "fsync", trap(os.fsync, half_of_it))
    elif where == "rename":
        patch.setattr(Path, "replace", trap(Path.replace))


# in this order, each where the one before it has left the run; every row of the cache is written twice (poses)
MOMENTS = [
    ("write", 1), ("row", 1), ("row", 17), ("row", 60), ("write", 3), ("linear", 1), ("row", 30), ("linear", 4),
    ("write", 6), ("rename", 8),
    ("step", 1), ("step", 4), ("write", 2), ("rename", 2), ("step", 5), ("held-out", 1), ("write", 3), ("write", 4),
    ("write", 5), ("rename", 6), ("step", 8), ("write", 4), ("write", 7), ("rename", 4), ("step", 3), ("held-out", 2),
    ("rename", 9), ("step", 6), ("write", 8), ("write", 9),
]  # fmt: skip


@pytest.mark.slow
def test_thirty_kills(small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    assert len(MOMENTS) == 30
    # a state after every step, so that many a kill meets one that is being written
    minutes = ("--checkpoint-minutes", "1e-9")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(train_line(small_set, whole, *OPTIONS, "--checkpoint-minutes", "0")) == 0
    begin = train_line(small_set, run, *OPTIONS, *minutes)
    met: set[str] = set()  # what the next attempt finds
    for where, n in MOMENTS:
        go_on = ["train", "--resume", str(run), "--workers", "1", "--device", "cpu"]
        line = go_on if (run / "config.yaml").is_file() else begin

        def attempt(where: str = where, n: int = n, line: list[str] = line) -> int:
            with pytest.MonkeyPatch.context() as patch:
                arm(patch, where, n)
                return cli.main(line)

        status = in_a_copy(attempt)
        assert status == -signal.SIGKILL, (where, n, status)
        met.add(states[0].name if (states := checkpoint.states_of(run)) else "nothing")
    assert met >= {"nothing", "start.pkl", "state.pkl"} and any(name.startswith("weights.") for name in met)
    assert cli.main(go_on) == 0
    for epoch in range(LAST + 1):
        assert_same_epoch(run, whole, epoch)
    assert metrics_of(run) == metrics_of(whole)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


# ------------------------------------------------------------------------------------------------ verbs on a run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that has its own name; those that are being written have another."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".tmp")}


@pytest.mark.parametrize(
    ("verb", "options"),
    [("analyze", ["--clusters", "3", "--pcs", "2", "--skip-umap"]), ("volumes", ["--kmeans", "3", "--angpix", "11"])],
)
def test_a_verb_that_is_killed(
    verb: str, options: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a write, before a rename, and while it computes: what is there is whole; again, it is the same.

    The command line is the same, and so is the name of the run: both stand in the headers of maps.
    """
    hurry(monkeypatch)
    run = copy_run(finished_run, tmp_path / "run", 2)
    folder = run / "analyze.2"
    if verb == "volumes":
        assert cli.main(["analyze", str(run), "--clusters", "3", "--skip-umap"]) == 0
    given = contents(folder)
    line = [verb, str(run), *options]
    writes = Trap(0)  # counts below zero, and never kills
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", writes(os.fsync))
        assert cli.main(line) == 0
    whole, last = contents(folder), -writes.left
    for name in whole.keys() - given.keys():
        (folder / name).unlink()
    moments = [("compute", 1), *(("write", n) for n in {1, 2, last // 2, last}), ("rename", 1), ("rename", last)]
    for where, n in moments:

        def attempt(where: str = where, n: int = n) -> int:
            with pytest.MonkeyPatch.context() as patch:
                arm(patch, where, n)
                if where == "compute":
                    patch.setattr(latents, "write_axes", Trap(n)(latents.write_axes))
                    patch.setattr(checkpoint.Run, "decode", Trap(n)(checkpoint.Run.decode))
                return cli.main(line)

        assert in_a_copy(attempt) == -signal.SIGKILL, (where, n)
        left = contents(folder)
        assert all(whole[name] == content for name, content in left.items()), (where, n)
        if where == "write":
            assert len(list(folder.rglob(".*.tmp"))) == 1
        stored = latents.stored_analysis(checkpoint.open_run(run))
        assert stored is None or len(stored.centre_index) == 3
    alive = folder / f".kept.{HOST}.{os.getpid()}.{threading.get_ident()}.tmp"
    elsewhere = folder / ".kept.00000000.1.1.tmp"  # on a file system that machines share
    alive.touch(), elsewhere.touch()
    assert cli.main(line) == 0
    assert contents(folder) == whole
    left = {path for path in run.rglob("*") if path.name.endswith(".tmp")}
    assert left == {alive, elsewhere}  # of processes that still write
