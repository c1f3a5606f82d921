"""Going on with a run: bit for bit after an interruption, warm with other options, refused where it cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from opustomo import checkpoint, cli
from opustomo import train as training
from opustomo.config import TrainConfig
from opustomo.data.pickles import save_split
from opustomo.errors import UserError
from opustomo.objective import learning_rate
from opustomo.physics.fourier import fourier_resize, from_band, irfft3
from opustomo.physics.observation import model_band
from opustomo.training import start
from opustomo.training.resume import Continuation, resolve
from small_set import (
    EPOCHS,
    SmallSet,
    assert_same_epoch,
    copy_run,
    given_cache,
    hurry,
    metrics_of,
    tensors,
    train,
    train_line,
)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def cached(finished_run: Path) -> tuple[str, str]:
    """The options that use the rows of the finished run."""
    return "--cache", str(given_cache(finished_run))


def interrupt(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ctrl-C at the end of ``epoch``, before its checkpoint."""
    evaluate = training.evaluate

    def at(*arguments: object) -> dict[str, float]:
        if arguments[-1] == epoch:
            raise KeyboardInterrupt
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "evaluate", at)


def resumed(small_set: SmallSet, run: Path, *options: str) -> tuple[TrainConfig, Continuation]:
    """What ``opustomo train`` makes of its command line before any work."""
    config, continuation = resolve(*cli.parse_verb(train_line(small_set, run, *options)))
    assert continuation is not None
    return config, continuation


def steps_taken(run: Path, epoch: int) -> int:
    """Steps of the optimiser that a checkpoint has seen."""
    return int(tensors(run / f"weights.{epoch}.pkl")["optimizer"]["state"][0]["step"])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------ exactly


def test_interrupted_run_ends_as_the_uninterrupted_one(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(finished_run, tmp_path / "run", 0)
    (run / "cache").symlink_to(finished_run / "cache")
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest") == 130
    assert checkpoint.epochs_of(run) == [0]
    assert any(row["epoch"] == "1" for row in metrics_of(run))  # begun, to be dropped

    made: list[int] = []
    monkeypatch.setattr("opustomo.data.filling.observe_all", lambda particles, rows, *_: made.extend(rows) or iter(()))
    assert cli.main(["train", "--resume", str(run), "--workers", "1", "--device", "cpu"]) == 0
    assert made == []  # the cache is still good
    for epoch in range(EPOCHS):
        assert_same_epoch(run, finished_run, epoch)
    assert metrics_of(run) == metrics_of(finished_run)
    assert "exact continuation" in (run / "run.log").read_text()


def test_a_continuation_reads_what_is_known_of_every_particle(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go through all rows for it; where the file is of another model or damaged, it does."""
    run, known = copy_run(finished_run, tmp_path / "run", 0), tmp_path / "run" / "linear" / "posterior.pkl"
    (run / "cache").symlink_to(finished_run / "cache")
    infer, asked = start.infer, []

    def counting(*arguments: object) -> object:
        asked.append(arguments)
        return infer(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(start, "infer", counting)
    kept = (finished_run / "linear" / "posterior.pkl").read_bytes()
    known.parent.mkdir(exist_ok=True)
    for content, expected in ((kept, 0), (kept[:1000], 1), (None, 1)):
        asked.clear()
        known.unlink(missing_ok=True)
        if content is not None:
            known.write_bytes(content)
        for path in run.glob("*.[1-9].pkl"):
            path.unlink()
        assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest") == 0
        assert len(asked) == expected
        assert_same_epoch(run, finished_run, 1)
        assert known.is_file()


@pytest.mark.slow
def test_memory_bank_gains_and_corrected_poses_go_on_too(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --lamb remembers of every particle, the estimated contrasts and the poses of --estpose are in the file."""
    options = ("-n", "2", "--lamb", "1", "-b", "1", "--zdim", "1", "--no-cache", "--valfrac", "0.5")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(small_set, whole, *options) == 0
    copy_run(whole, cut, 0)
    assert train(small_set, cut, *options, "--load", "latest") == 0
    assert_same_epoch(cut, whole, 1)


def test_more_epochs_go_on_from_the_last(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, cached: tuple[str, str]
) -> None:
    """The optimiser goes on where it was, but the learning rate is that of the longer run: said, not called exact."""
    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 1)
    (run / "cache").symlink_to(finished_run / "cache")
    assert train(small_set, run, "-n", str(EPOCHS + 1), "--load", "latest") == 0
    assert checkpoint.epochs_of(run) == list(range(EPOCHS + 1))
    rows = metrics_of(run)
    assert rows[: len(metrics_of(finished_run))] == metrics_of(finished_run)
    log = (run / "run.log").read_text()
    assert f"with the optimiser's state, but schedules stretch to {EPOCHS + 1} epochs" in log
    assert "exact continuation" not in log
    assert steps_taken(run, EPOCHS) == 7 * (EPOCHS + 1)  # 54 particles in batches of 8
    last = [float(row["lr"]) for row in rows if row["lr"]][-1]
    assert last == pytest.approx(learning_rate(1e-3, (EPOCHS + 6 / 7) / (EPOCHS + 1)), rel=1e-3)


@pytest.mark.parametrize("options", [(), ("--no-cache",)], ids=["lost", "no-cache"])
def test_rows_are_made_anew_from_poses_and_noise_of_the_checkpoint(
    options: tuple[str, ...], small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN/cache has gone, or is not wanted: what is learned is the same to the last bit."""

    def unwanted(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the noise was estimated again")

    monkeypatch.setattr("opustomo.preparation.estimate_noise", unwanted)
    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 2)
    assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest", *options) == 0
    assert (run / "cache").exists() == (not options)
    assert_same_epoch(run, finished_run, EPOCHS - 1)
    assert metrics_of(run) == metrics_of(finished_run)
    assert "exact continuation" in (run / "run.log").read_text()


# ------------------------------------------------------------------------------------------------ warm


def test_weights_of_another_run_start_warm_with_other_options(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, cached: tuple[str, str]
) -> None:
    run = tmp_path / "run"
    options = ("--load", f"{finished_run}/weights.0.pkl", "--latents", f"{finished_run}/z.0.pkl", "--lr", "2e-3")
    assert train(small_set, run, "-n", "2", *cached, *options) == 0
    log = (run / "run.log").read_text()
    assert "warm start" in log and "lr 0.001 -> 0.002" in log
    assert checkpoint.epochs_of(run) == [1]  # epoch 0 was the other run's
    assert steps_taken(run, 1) == 7
    opened = checkpoint.open_run(run)
    assert opened.config["lr"] == 2e-3 and opened.decode(opened.codes[:1]).shape == (1, 16, 16, 16)
    cold = tensors(finished_run / "weights.1.pkl")["model"]["decoder.first.weight"]
    assert not torch.equal(opened.weights["model"]["decoder.first.weight"], cold)


def test_warm_start_on_a_finer_grid_keeps_what_was_learned(
    small_set: SmallSet, finished_run: Path, tmp_path: Path
) -> None:
    """Coarse to fine: the same density at another sampling; at learning rate 0 the decoded maps agree on the band."""
    run = tmp_path / "run"
    options = ("--load", f"{finished_run}/weights.{EPOCHS - 1}.pkl", "--downfrac", "0.84", "--lr", "0")
    assert train(small_set, run, "-n", str(EPOCHS + 1), "--cache", f"{tmp_path}/cache", *options) == 0
    fine, coarse = checkpoint.open_run(run), checkpoint.open_run(finished_run)
    assert fine.grid.working_box == 20 and fine.grid.templateres == coarse.grid.templateres
    code = coarse.codes[:1]
    a, b = (torch.from_numpy(opened.decode(code))[0] for opened in (fine, coarse))
    resized = fourier_resize(irfft3(from_band(model_band(b, 16), 16)), 20)
    inside = fine.mask > 0.9
    assert float(torch.corrcoef(torch.stack([a[inside], resized[inside]]))[0, 1]) > 0.995
    assert float(a[inside].norm() / resized[inside].norm()) == pytest.approx(1.0, abs=0.01)


# ------------------------------------------------------------------------------------------------ paths


def test_files_are_known_by_where_they_lead(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file by another spelling is no change, whatever folder the command is typed in."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    monkeypatch.chdir(small_set.folder)
    config, continuation = resumed(small_set, run, "-r", "./mask.mrc", "--split", "split.pkl", "--load", "latest")
    assert continuation.optimiser and "exact continuation from epoch 0" in continuation.notes[-1]
    assert config.grid.mask == small_set.mask  # as stored: it may be a link to elsewhere
    monkeypatch.chdir(tmp_path)
    _, continuation = resumed(small_set, run, "--split", "run/split.pkl", "--load", "latest")
    assert "exact continuation" in continuation.notes[-1]


def test_a_moved_run_reads_its_own_files(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run", 0)
    for typed in ((), ("--split", "split.pkl"), ("--split", f"{run}/split.pkl")):
        config, continuation = resumed(small_set, run, *typed, "--load", "latest")
        assert config.split == run / "split.pkl" and "exact" in continuation.notes[-1]
    with pytest.raises(UserError, match=r"--split .* \(was "):  # of another run by now
        resumed(small_set, run, "--split", f"{finished_run}/split.pkl", "--load", "latest")


def test_another_file_of_the_same_name_is_a_change(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = copy_run(finished_run, tmp_path / "run", 0), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"--mask mask.mrc \(was /.*/mask.mrc\)"):  # nowhere but in the run, not it
        resumed(small_set, run, "-r", "mask.mrc", "--load", "latest")
    resumed(small_set, run, "--split", "split.pkl", "--load", "latest")
    save_split(here / "split.pkl", np.arange(60)[::-1].copy())
    with pytest.raises(UserError, match=r"--split split.pkl \(was /.*/run/split.pkl\)"):
        resumed(small_set, run, "--split", "split.pkl", "--load", "latest")
    config, continuation = resumed(small_set, run, "--split", "split.pkl", "--load", f"{run}/weights.0.pkl")
    assert config.split == Path("split.pkl") and not continuation.optimiser
    assert "warm start" in continuation.notes[-1] and "-> split.pkl" in continuation.notes[-1]


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", "2e-3"), "--lr 0.002 (was 0.001)"),
        (("--seed", "4"), "--seed 4 (was 0)"),
        (("--bfactor", "4"), "--bfactor 4"),
        (("--downfrac", "0.9"), "--downfrac 0.9"),
        (("--zdim", "5"), "--zdim 5"),
        (("--templateres", "32"), "--templateres 32"),
        (("--no-estpose",), "--no-estpose where"),
        (("-n", "3"), "larger -n"),
    ],
    ids=lambda value: "",
)
def test_exact_continuation_refuses_other_options_by_name(
    options: tuple[str, ...],
    words: str,
    small_set: SmallSet,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 1)
    before = sorted((path.name, path.read_bytes()) for path in run.glob("*.*"))
    assert train(small_set, run, "-n", "4", *options, "--load", "latest") == 2
    assert words in error_of(capsys)
    assert sorted((path.name, path.read_bytes()) for path in run.glob("*.*")) == before


def test_codes_of_another_epoch_are_refused(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--load", f"{finished_run}/weights.0.pkl", "--latents", f"{finished_run}/z.2.pkl")
    assert train(small_set, tmp_path / "run", *options) == 2
    message = error_of(capsys)
    assert "z.2.pkl" in message and "give z.0.pkl" in message
    assert not (tmp_path / "run").exists()


def test_codes_without_weights_have_no_effect_and_are_refused(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_set, tmp_path / "run", "--latents", f"{finished_run}/z.0.pkl") == 2
    assert "--load" in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights.9.pkl", "no such checkpoint"),
        ("z.0.pkl", "is not a weights file"),
        ("nowhere", "no such checkpoint"),
        ("", "is a folder"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    name: str, words: str, small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_set, tmp_path / "run", "--load", f"{finished_run}/{name}") == 2
    assert name in (message := error_of(capsys)) and words in message


def test_nothing_to_resume(small_set: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_set, tmp_path / "run", "--load", "latest") == 2
    assert "--load latest: " in (message := error_of(capsys)) and "no run of train there" in message
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2


def test_a_run_that_had_learned_nothing_begins_again(finished_run: Path, tmp_path: Path) -> None:
    """Interrupted in the linear stage: --resume knows the options, and ends where the run would have."""
    run = copy_run(finished_run, tmp_path / "run", -1)
    assert cli.main(["train", "--resume", str(run), "--workers", "1", "--device", "cpu"]) == 0
    assert_same_epoch(run, finished_run, EPOCHS - 1)
    assert metrics_of(run) == metrics_of(finished_run)
    assert "begins again with the options it had" in (run / "run.log").read_text()


def test_messages_speak_of_resume_where_it_was_typed(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 1)
    assert cli.main(["train", "--resume", str(run), "--lr", "2e-3"]) == 2
    message = error_of(capsys)
    assert "--resume continues exactly, but options changed: --lr 0.002" in message and "--load latest" not in message
    assert cli.main(["train", "--resume", str(run), "--zdim", "5"]) == 2
    assert "start a new run without --resume" in error_of(capsys)
    (run / "config.yaml").unlink()
    assert cli.main(["train", "--resume", str(run)]) == 2
    message = error_of(capsys)
    assert "not begun (no config.yaml yet); repeat the original command" in message and "--load" not in message


def test_damaged_weights_are_named_and_those_before_them_used(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(finished_run, tmp_path / "run", 1)
    (run / "cache").symlink_to(finished_run / "cache")
    weights = run / "weights.1.pkl"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert train(small_set, run, "-n", str(EPOCHS), "--load", f"{weights}") == 2
    message = error_of(capsys)
    assert str(weights) in message and "another epoch" in message
    assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest") == 0
    assert f"{weights}: cannot be read" in (log := (run / "run.log").read_text()) and "from epoch 0 of" in log
    assert_same_epoch(run, finished_run, EPOCHS - 1)
    for path in run.glob("weights.*.pkl"):
        path.write_bytes(b"")
    assert train(small_set, run, "-n", str(EPOCHS), "--load", "latest") == 2


def test_weights_for_another_set_are_refused(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.star"
    lines = small_set.star.read_text().splitlines()
    other.write_text("\n".join(line for line in lines if "p00007" not in line) + "\n")
    line = train_line(small_set, tmp_path / "run", "--load", f"{finished_run}/weights.0.pkl")
    line[1] = str(other)
    assert cli.main([*line, "--datadir", str(small_set.folder)]) == 2
    assert "other.star" in error_of(capsys)
    assert not list((tmp_path / "run").glob("*.pkl"))


@pytest.mark.parametrize("load", ["latest", "{run}/weights.0.pkl"])
def test_poses_are_corrected_as_before_or_not_at_all(
    load: str, small_set: SmallSet, finished_run: Path, tmp_path: Path
) -> None:
    """The stored poses are those of one way only; an option left out keeps what is stored."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    where = ("--load", load.format(run=run))
    assert resumed(small_set, run, *where)[0].estpose is True
    with pytest.raises(UserError, match=r"--no-estpose where .* was trained with True"):
        resumed(small_set, run, "--no-estpose", *where)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("estpose: true", "estpose: false"))
    assert resumed(small_set, run, *where)[0].estpose is False
    with pytest.raises(UserError, match=r"--estpose where .* was trained with False"):
        resumed(small_set, run, "--estpose", *where)


def test_weights_of_an_earlier_version_are_refused(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run", 0)
    weights = tensors(run / "weights.0.pkl")
    del weights["noise"], weights["mixture"]
    torch.save(weights, run / "weights.0.pkl")
    with pytest.raises(UserError, match=r"weights.0.pkl: has no mixture, noise.*earlier version; start a new run"):
        resumed(small_set, run, "--load", "latest")
