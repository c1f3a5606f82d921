"""Poses that a run corrects: nearer the truth, consistent with the bound, and no concern of a shared cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from opustomo import checkpoint, cli
from opustomo.analysis.evaluate import evaluate
from opustomo.analysis.score_poses import pose_errors
from opustomo.config import InputOptions
from opustomo.data.cache import open_cache
from opustomo.data.pickles import Poses, load_poses
from opustomo.data.readers import read_particles
from opustomo.stored import read_config
from small_set import EPOCHS, SmallSet, given_cache, hurry, metrics_of, tensors, train


@dataclass(frozen=True)
class Untrained:
    """A run at learning rate 0 and corrected poses, and the shared cache before it: bytes and times of its files."""

    run: Path
    shared: dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def untrained(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    folder, shared = tmp_path_factory.mktemp("untrained") / "run", contents(given_cache(finished_run))
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        options = ("-n", "1", "--lr", "0", "--valfrac", "0.5", "--cache", str(given_cache(finished_run)))
        assert train(small_set, folder, *options) == 0
    return Untrained(folder, shared)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def errors_of(poses: Poses, truth: SmallSet) -> dict[str, float]:
    """Degrees and pixels; a common move is one of the map."""
    rotation, origin = np.asarray(poses.rotation, float), np.asarray(poses.origin, float) * 24
    return pose_errors(rotation, origin, truth.rotation, truth.origin)


def given_poses(small_set: SmallSet) -> Poses:
    given = read_particles(small_set.star, InputOptions())
    return Poses(given.rotation, given.origin / 24, given.euler)


def assert_nearer_the_truth(path: Path, small_set: SmallSet) -> None:
    after, before = errors_of(load_poses(path), small_set), errors_of(given_poses(small_set), small_set)
    assert after["shift_median"] < 0.5 * before["shift_median"]
    assert after["angle_p90"] < 0.8 * before["angle_p90"]


def assert_as_given(path: Path, small_set: SmallSet) -> None:
    for kept, given in zip(load_poses(path), given_poses(small_set), strict=True):
        assert np.allclose(kept, given, atol=1e-4)


def test_poses_are_corrected_by_default(small_set: SmallSet, finished_run: Path) -> None:
    for epoch in range(EPOCHS):
        assert_nearer_the_truth(finished_run / f"pose.{epoch}.pkl", small_set)


@pytest.mark.parametrize("option", ["--estpose", "--no-estpose"])
def test_linear_stage_alone_corrects_poses_too(
    option: str, small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    shutil.copytree(given_cache(finished_run), tmp_path / "run" / "cache")
    sizes = ["--downfrac", "0.7", "--components", "1", "--iterations", "2", "--clusters", "2", "--workers", "1"]
    line = ["linear", str(small_set.star), "-r", str(small_set.mask), "-o", str(tmp_path / "run"), *sizes]
    assert cli.main([*line, *([] if option == "--estpose" else [option])]) == 0
    check = assert_nearer_the_truth if option == "--estpose" else assert_as_given
    check(tmp_path / "run" / "pose.0.pkl", small_set)
    assert checkpoint.open_run(tmp_path / "run").config["estpose"] is (option == "--estpose")


def test_shared_cache_is_not_touched_by_corrected_poses(untrained: Untrained, finished_run: Path) -> None:
    """Two runs with --cache DIR: the rows at corrected poses are in each run's own folder."""
    assert contents(given_cache(finished_run)) == untrained.shared
    marks = {open_cache(path).fingerprint for path in (given_cache(finished_run), untrained.run / "cache")}
    assert len(marks) == 2
    # what the data say afterwards is said by the rows the run ended with
    assert read_config(untrained.run)["rows"] == str((untrained.run / "cache").resolve())


def test_untrained_network_has_the_bound_of_the_linear_stage(untrained: Untrained) -> None:
    """Also where poses have been moved: the rows' poses and the given ones, which the prior is about, differ."""
    (row,) = [row for row in metrics_of(untrained.run) if row["val_elbo"]]
    assert float(row["val_elbo"]) == pytest.approx(float(row["linear_val_elbo"]), abs=2e-3)
    stored = np.load(untrained.run / "linear" / "linear.npz")
    codes, used = tensors(untrained.run / "z.0.pkl"), stored["code"].shape[1]
    assert np.allclose(codes["mu"][:, :used], stored["code"], atol=1e-5)
    assert np.allclose(codes["sigma"][:, :used].square(), np.diagonal(stored["covariance"], 0, 1, 2), rtol=1e-4)


def test_evaluate_scores_the_linear_stage_of_a_network_beside_it(untrained: Untrained, small_set: SmallSet) -> None:
    """A network that has learned nothing has the scores of the linear stage it started from, in every figure."""
    scores = evaluate(checkpoint.open_run(untrained.run), small_set.folder)
    start = scores["linear_stage"]
    assert start["composition"]["auc"] == pytest.approx(scores["composition"]["auc"], abs=1e-6)
    for name in ("particle_fsc_area", "fsc_area_mean", "difference_cc_mean"):
        assert start["volumes"][name] == pytest.approx(scores["volumes"][name], abs=1e-4)
    alone = checkpoint.open_run(untrained.run).linear_stage()
    assert alone is not None and alone.linear_stage() is None and alone.codes.shape[1] <= 2
