"""New particles in a finished run: the run's own codes come back, new ones are as good, other things are named."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from opustomo import checkpoint, cli
from opustomo.analysis.score_poses import pose_errors
from opustomo.config import InputOptions
from opustomo.data.mrc import read_volume, write_volume
from opustomo.data.pickles import load_poses
from opustomo.data.readers import read_particles
from small_set import EPOCHS, PARTICLES, PIXEL, SmallSet, given_cache, hurry, make_set, tensors, train

JUNK = (3, 4, 20)


def encode(run: Path, star: Path, to: Path, *options: str) -> int:
    return cli.main(["encode", str(run), str(star), "-o", str(to), "--workers", "1", "--device", "cpu", *options])


def codes_of(run: Path) -> NDArray[np.float32]:
    return checkpoint.open_run(run).codes


@pytest.fixture(scope="module")
def other_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """Particles of the same two states that the runs have never seen."""
    return make_set(tmp_path_factory.mktemp("other") / "set", 11)


@pytest.fixture(scope="module")
def encoded(finished_run: Path, other_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "more"
    assert encode(finished_run, other_set.star, folder) == 0
    return folder


def probe(codes: NDArray[np.float32], state: NDArray[np.int64]) -> NDArray[np.float64]:
    """Least-squares weights with which the state is read from codes (P, K)."""
    return np.linalg.lstsq(with_one(codes), state, rcond=None)[0]


def with_one(codes: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.c_[codes, np.ones(len(codes))].astype(np.float64)


@pytest.mark.parametrize("verb", ["train", "linear"])
def test_own_particles_get_the_codes_of_the_run_where_poses_are_held(
    verb: str, small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    run, again = tmp_path / "run", tmp_path / "again"
    if verb == "train":
        shared = str(given_cache(finished_run))
        assert train(small_set, run, "-n", "1", "--no-estpose", "--zdim", "3", "--lr", "0.01", "--cache", shared) == 0
    else:
        shutil.copytree(given_cache(finished_run), run / "cache")
        sizes = ["--downfrac", "0.7", "--components", "1", "--iterations", "2", "--no-estpose", "--workers", "1"]
        assert cli.main(["linear", str(small_set.star), "-r", str(small_set.mask), "-o", str(run), *sizes]) == 0
    assert encode(run, small_set.star, again) == 0
    for name in ("mu", "sigma"):
        own, new = tensors(run / "z.0.pkl")[name], tensors(again / "z.0.pkl")[name]
        assert own.shape == new.shape and float((own - new).abs().max()) < 2e-3
    before, after = (np.load(folder / "linear" / "linear.npz") for folder in (run, again))
    assert np.allclose(before["evidence"], after["evidence"], atol=0.05)
    assert np.corrcoef(before["outlier"], after["outlier"])[0, 1] > 0.99
    assert np.allclose(load_poses(run / "pose.0.pkl").euler, load_poses(again / "pose.0.pkl").euler)


def test_codes_and_poses_of_new_particles_are_as_good_as_those_trained_on(
    small_set: SmallSet, other_set: SmallSet, finished_run: Path, encoded: Path
) -> None:
    weights = probe(codes_of(finished_run), small_set.state)
    trained = np.corrcoef(with_one(codes_of(finished_run)) @ weights, small_set.state)[0, 1]
    new = np.corrcoef(with_one(codes_of(encoded)) @ weights, other_set.state)[0, 1]
    assert trained > 0.95 and new > trained - 0.01
    given = read_particles(other_set.star, InputOptions())
    before = pose_errors(given.rotation, given.origin, other_set.rotation, other_set.origin)
    opened = checkpoint.open_run(encoded)
    after = pose_errors(opened.rotation, opened.origin, other_set.rotation, other_set.origin)
    assert after["angle_median"] < 0.8 * before["angle_median"]
    assert after["shift_median"] < 0.5 * before["shift_median"]


def test_encoded_folder_is_a_run_of_the_new_particles(
    finished_run: Path, other_set: SmallSet, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    opened, run = checkpoint.open_run(encoded), checkpoint.open_run(finished_run)
    assert opened.star == other_set.star.resolve() and opened.epoch == run.epoch == EPOCHS - 1
    assert len(opened.split[0]) == 0 and len(opened.split[1]) == PARTICLES
    assert np.array_equal(opened.decode(opened.codes[:2]), run.decode(opened.codes[:2]))
    folder = str(encoded)
    assert cli.main(["analyze", folder, "--clusters", "2", "--skip-umap"]) == 0
    assert cli.main(["volumes", folder, "--kmeans", "2", "--from-data", "-o", str(tmp_path / "maps")]) == 0
    chosen = ["--run", folder, "-o", str(tmp_path / "classes"), "--kmeans", "2", "--corrected"]
    assert cli.main(["select", str(other_set.star), *chosen]) == 0
    selected = [read_particles(tmp_path / "classes" / f"pre{i}.star", datadir(other_set)) for i in (0, 1)]
    assert sum(map(len, selected)) == PARTICLES
    number = [int(name.split("/")[-1][1:6]) for name in selected[0].names]
    assert np.allclose(selected[0].origin, opened.origin[number], atol=1e-3)


def datadir(of: SmallSet) -> InputOptions:
    return InputOptions(datadir=of.folder)


def test_an_encoded_folder_cannot_be_trained_on(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(encoded), "-n", "9"]) == 2
    assert "has no bank, course, optimizer, it is of no network or" in capsys.readouterr().err


def test_another_session_in_its_own_grey_values_and_what_is_no_molecule(
    finished_run: Path,
    other_set: SmallSet,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half the particles, negative and twice as strong, three of them only noise: named; the others' codes hold."""
    hurry(monkeypatch)
    shutil.copytree(other_set.folder, tmp_path / "set")
    noise = np.random.default_rng(0)
    for i, path in enumerate(sorted((tmp_path / "set" / "subtomo").glob("*.mrc"))):
        values, pixel = read_volume(path)
        values = noise.permutation(values.ravel()).reshape(values.shape) if i in JUNK else values
        write_volume(path, (-2.0 * values).astype(np.float32), pixel)
    star, to = tmp_path / "set" / "particles.star", tmp_path / "more"
    assert encode(finished_run, star, to) == 0
    named = ", ".join(str(i + 1) for i in JUNK)
    assert f"{len(JUNK)} particle(s) are like none of the run's (rows {named})" in capsys.readouterr().err
    rest = np.setdiff1d(np.arange(PARTICLES), JUNK)
    assert np.abs(codes_of(to) - codes_of(encoded))[rest].max() < 0.1
    assert np.array_equal(np.flatnonzero(~checkpoint.open_run(to).typical), JUNK)
    with (to / "linear" / "particles.csv").open(newline="") as file:
        score = np.array([float(row["outlier_score"]) for row in csv.DictReader(file)])
    assert score[list(JUNK)].min() > score[rest].max()
    assert encode(finished_run, star, tmp_path / "white", "--contrast", "white") == 2
    assert "leave out --contrast white" in capsys.readouterr().err


@pytest.mark.parametrize(("box", "pixel"), [(20, PIXEL), (24, 16.0)])
def test_another_box_or_pixel_size_is_refused(
    box: int, pixel: float, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_set(tmp_path / "set", n=2, box=box, pixel_size=pixel)
    assert encode(finished_run, other.star, tmp_path / "more") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert f"box {box} of {pixel:g} A where" in said[-1] and "24 of 15 A" in said[-1]


def test_a_finished_run_is_not_overwritten(
    finished_run: Path, small_set: SmallSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(finished_run, small_set.star, finished_run) == 2
    assert "holds a run already" in capsys.readouterr().err
