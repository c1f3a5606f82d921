"""Training on some of the particles: a class that ``select`` wrote, and row numbers (``--ind``), which are the same."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opustomo import checkpoint, cli
from opustomo.analysis.evaluate import evaluate
from opustomo.analysis.score_poses import pose_errors
from opustomo.config import InputOptions
from opustomo.data.cache import open_cache
from opustomo.data.export import write_subset
from opustomo.data.readers import read_particles
from opustomo.data.readers.source import read_source
from opustomo.data.star import read_star
from small_set import EPOCHS, SMALL, SmallSet, copy_run, hurry, tensors

QUICK = (*SMALL, "-n", "1", "--no-estpose")


def train(star: Path, mask: Path, run: Path, *options: str) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert cli.main(["train", str(star), "-r", str(mask), "-o", str(run), *QUICK, *options]) == 0
    return run


@pytest.fixture(scope="module")
def rows() -> NDArray[np.int64]:
    """Two thirds of the particles, of both states."""
    return np.flatnonzero(np.arange(60) % 3 != 1)


@pytest.fixture(scope="module")
def by_rows(small_set: SmallSet, rows: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    np.savetxt(folder / "rows.txt", rows, fmt="%d")
    where = ["--ind", str(folder / "rows.txt"), "--cache", str(folder / "cache")]
    return train(small_set.star, small_set.mask, folder / "run", *where)


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("mu", "sigma"):
        assert torch.equal(tensors(a / "z.0.pkl")[name], tensors(b / "z.0.pkl")[name])
    first, second = (tensors(run / "weights.0.pkl")["model"] for run in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_pickle_and_star_of_the_same_rows_give_the_same_run(
    small_set: SmallSet, rows: NDArray[np.int64], by_rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(rows.tolist()))
    write_subset(read_source(small_set.star), rows, tmp_path / "some.star")
    cache = by_rows.parent / "cache"
    marked, of_others = open_cache(cache).fingerprint, ["--cache", str(cache)]
    rows_too, there = ["--ind", str(tmp_path / "rows.pkl")], ["--datadir", str(small_set.folder)]
    pickled = train(small_set.star, small_set.mask, tmp_path / "pickled", *rows_too, *of_others)
    written = train(tmp_path / "some.star", small_set.mask, tmp_path / "written", *there, *of_others)
    assert open_cache(cache).fingerprint == marked  # the same images, poses and tilts
    assert_same_run(by_rows, pickled)
    assert_same_run(by_rows, written)


def test_a_class_that_select_wrote_trains(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 1)
    assert cli.main(["analyze", str(run), "--clusters", "3", "--skip-umap"]) == 0
    chosen = ["--kmeans", "3", "--classes", "0", "1", "-o", str(tmp_path / "classes"), "--corrected"]
    assert cli.main(["select", str(small_set.star), "--run", str(run), *chosen]) == 0
    star = tmp_path / "classes" / "selected.star"
    trained = train(star, small_set.mask, tmp_path / "again", "--datadir", str(small_set.folder))
    assert len(checkpoint.open_run(trained).codes) == len(read_star(star).particles) < 60


def test_evaluate_scores_the_rows_of_the_run(small_set: SmallSet, rows: NDArray[np.int64], by_rows: Path) -> None:
    scores = evaluate(checkpoint.open_run(by_rows), small_set.folder)
    assert scores["run"]["particles"] == len(rows) and scores["composition"]["auc"] > 0.95
    given = read_particles(small_set.star, InputOptions()).subset(rows)
    known = pose_errors(given.rotation, given.origin, small_set.rotation[rows], small_set.origin[rows])
    assert scores["poses"]["before"] == pytest.approx(known, rel=1e-3)


def test_classes_of_some_rows_are_those_rows(
    small_set: SmallSet, rows: NDArray[np.int64], by_rows: Path, tmp_path: Path
) -> None:
    assert cli.main(["analyze", str(by_rows), "--clusters", "2", "--skip-umap"]) == 0
    assert cli.main(["select", str(small_set.star), "--run", str(by_rows), "--kmeans", "2", "-o", str(tmp_path)]) == 0
    known, every = read_star(small_set.star).particles["rlnImageName"].to_numpy(), []
    for i in (0, 1):
        names = read_star(tmp_path / f"pre{i}.star").particles["rlnImageName"]
        number = np.flatnonzero(np.isin(known, names.to_numpy()))
        assert len(set(small_set.state[number])) == 1  # both classes are pure: labels met the right rows
        every.append(number)
    assert np.array_equal(np.sort(np.concatenate(every)), rows)
