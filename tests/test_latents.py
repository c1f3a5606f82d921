"""The analysis of codes: known groups are found, files are what users' scripts expect, nothing becomes NaN."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fake_run import fake_run
from opustomo.analysis import latents, plots
from opustomo.data.pickles import load_labels, load_pickle, save_pickle
from opustomo.errors import UserError


def test_three_groups_become_three_classes_in_order_of_similarity(tmp_path: Path) -> None:
    run, group = fake_run(tmp_path)
    result = latents.analyze(run, pcs=2, clusters=3, skip_umap=True)
    assert adjusted_rand_score(group, result.labels) == 1.0
    # the centres are particles of their own class, and the middle group is numbered between the outer two
    assert (result.labels[result.centre_index] == np.arange(3)).all()
    assert group[result.centre_index[1]] == 1


def test_files_of_the_analysis(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    result = latents.analyze(run, pcs=2, clusters=3, skip_umap=True)
    folder = tmp_path / "analyze.3"
    assert result.folder == folder
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "explained_variance.png", "explained_variance.txt", "z_pca.png", "z_density.png",
        "pc1/z_pc.txt", "pc1/labels.pkl", "pc2/z_pc.txt", "pc2/labels.pkl",
        "kmeans3/labels.pkl", "kmeans3/centers.txt", "kmeans3/centers_ind.txt", "kmeans3/z_pca.png",
    }  # fmt: skip
    labels = load_pickle(folder / "kmeans3" / "labels.pkl")
    assert labels.shape == (240,) and labels.dtype.kind == "i"
    index = np.loadtxt(folder / "kmeans3" / "centers_ind.txt", dtype=int)
    # snapped to particles: the centres are codes of the run, exactly those whose rows are listed
    np.testing.assert_allclose(np.loadtxt(folder / "kmeans3" / "centers.txt"), run.codes[index], rtol=1e-6)


def test_traversal_is_a_straight_line_through_the_mean_from_5th_to_95th_percentile(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    codes = np.asarray(run.codes, float)
    latents.analyze(run, pcs=1, clusters=2, skip_umap=True)
    line = np.loadtxt(tmp_path / "analyze.3" / "pc1" / "z_pc.txt")
    axis = np.linalg.svd(codes - codes.mean(0), full_matrices=False)[2][0]
    score = (line - codes.mean(0)) @ axis
    np.testing.assert_allclose(line - codes.mean(0), score[:, None] * axis, atol=1e-5)
    expected = np.percentile((codes - codes.mean(0)) @ axis, [5, 95])
    assert len(line) == 10
    np.testing.assert_allclose(sorted(score[[0, -1]]), expected, rtol=1e-5)
    np.testing.assert_allclose(np.diff(score), np.diff(score)[0], rtol=1e-4)
    stops = load_labels(tmp_path / "analyze.3" / "pc1" / "labels.pkl")
    distance = np.abs(((codes - codes.mean(0)) @ axis)[:, None] - score)
    assert (distance[np.arange(len(codes)), stops] <= distance.min(1) + 1e-4).all() and set(stops) >= {0, 9}


def test_same_seed_same_classes(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    first, second = (latents.cluster(np.asarray(run.codes, float), 7, seed=5) for _ in range(2))
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all()


def test_more_classes_than_particles_is_one_line(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path, particles=9)
    with pytest.raises(UserError, match=r"--clusters 10: .* has 9 particles"):
        latents.analyze(run, clusters=10)
    assert not (tmp_path / "analyze.3").exists()


def test_codes_that_are_not_numbers_name_the_particle(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path, particles=9)
    run.codes[4, 1] = np.nan
    with pytest.raises(UserError, match="code of particle 5 is not a finite number"):
        latents.analyze(run, clusters=2)


@pytest.mark.parametrize("particles", [1, 2, 5])
def test_very_few_particles(tmp_path: Path, particles: int, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = fake_run(tmp_path, particles)
    with caplog.at_level(logging.WARNING, "opustomo"):
        result = latents.analyze(run, clusters=particles)
    assert np.isfinite(result.pca_scores).all() and np.isfinite(result.explained).all()
    assert sorted(result.centre_index) == list(range(particles))
    assert result.umap is None and "no UMAP: it needs at least 10 particles" in caplog.text


def test_collapsed_codes_give_one_class_and_no_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = fake_run(tmp_path, particles=30)
    run.codes[:] = 0.25
    with caplog.at_level(logging.WARNING, "opustomo"):
        result = latents.analyze(run, clusters=4)
    assert (result.labels == 0).all() and (result.explained == 0).all() and np.isfinite(result.pca_scores).all()
    assert "codes of all 30 particles are equal" in caplog.text
    assert np.isfinite(np.loadtxt(tmp_path / "analyze.3" / "pc1" / "z_pc.txt")).all()


def test_a_code_of_one_dimension_is_drawn_as_a_histogram(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = fake_run(tmp_path)
    run.codes[:, 1:] = 0  # columns that training left unused
    drawn = []
    monkeypatch.setattr(plots, "histogram", lambda *given: drawn.append(given) or plots.explained_variance([1.0]))
    monkeypatch.setattr(plots, "scatter", lambda *given: pytest.fail("a map of one dimension"))
    with caplog.at_level(logging.WARNING, "opustomo"):
        result = latents.analyze(run, pcs=2, clusters=3, skip_umap=True)
    assert latents.in_use(result.explained) == 1 and "pc2 and beyond stand still" in caplog.text
    assert [given[2] for given in drawn] == [1, 3]
    # scripts ask for the component all the same: it stays at the mean code
    still = np.loadtxt(tmp_path / "analyze.3" / "pc2" / "z_pc.txt")
    np.testing.assert_allclose(still, np.tile(run.codes.mean(0), (10, 1)), atol=1e-5)


@pytest.mark.usefixtures("drawn")
def test_histogram_stacks_every_particle_once() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    axes = plots.histogram(rng.normal(size=200) + 5 * labels, labels, 3).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 200
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2"]
    assert plots.png(plots.histogram(np.zeros(5), np.zeros(5, int), 1)).startswith(b"\x89PNG")
    # a few far away are counted, at the edge, and do not squeeze the others into one bar
    axes = plots.histogram(np.append(rng.normal(size=200), [500.0, 900.0]), np.zeros(202, int), 1).axes[0]
    heights = np.array([bar.get_height() for bar in axes.patches])
    assert heights.sum() == 202 and heights.max() < 150 and "2 farther out" in axes.get_xlabel()


def test_skip_umap_draws_the_stored_one_and_ignores_a_foreign_one(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    folder = tmp_path / "analyze.3"
    folder.mkdir()
    stored = np.random.default_rng(0).normal(size=(240, 2)).astype(np.float32)
    save_pickle(folder / "umap.pkl", stored)
    result = latents.analyze(run, clusters=3, skip_umap=True)
    assert result.umap is not None
    np.testing.assert_array_equal(result.umap, stored)
    assert all((folder / name).is_file() for name in ("umap.png", "umap_hexbin.png", "kmeans3/umap.png"))
    save_pickle(folder / "umap.pkl", stored[:-1])
    assert latents.analyze(run, clusters=3, skip_umap=True).umap is None


def test_stored_analysis_is_what_analyze_returned(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    assert latents.stored_analysis(run) is None
    latents.analyze(run, clusters=2, skip_umap=True)
    made = latents.analyze(run, clusters=5, skip_umap=True)
    read = latents.stored_analysis(run)
    assert read is not None and latents.stored_analysis(run, 4) is None
    np.testing.assert_array_equal(read.labels, made.labels)
    np.testing.assert_array_equal(read.centre_index, made.centre_index)
    np.testing.assert_allclose(read.explained, made.explained)
    # codes of another length: the stored classes belong to other particles
    run.codes = run.codes[:100]
    assert latents.stored_analysis(run) is None


def test_opposite_viewing_directions_have_different_colours() -> None:
    directions = np.concatenate([np.eye(3), -np.eye(3)])
    colours = plots.direction_colours(directions)
    assert ((colours >= 0) & (colours <= 1)).all()
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert apart[~np.eye(6, dtype=bool)].min() > 0.3
    # continuous at the poles, where the azimuth is not defined
    near = plots.direction_colours(np.array([[1e-4, 0, 1], [-1e-4, 0, 1]]))
    assert np.abs(near[0] - near[1]).max() < 0.01


@pytest.mark.parametrize("k", [1, 8, 9, 40])
def test_every_class_has_its_own_colour(k: int) -> None:
    assert len(np.unique(plots.class_colours(k), axis=0)) == k


@pytest.mark.slow
def test_umap_keeps_groups_apart_and_is_reproducible(tmp_path: Path) -> None:
    run, group = fake_run(tmp_path, particles=120)
    result = latents.analyze(run, clusters=3)
    xy = result.umap
    assert xy is not None and np.isfinite(xy).all()
    centres = np.stack([xy[group == g].mean(0) for g in range(3)])
    spread = max(xy[group == g].std() for g in range(3))
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 2 * spread
    again = latents.embed(np.asarray(run.codes, float), 0)
    assert again is not None and np.allclose(again, xy)
    # fewer particles than the usual number of neighbours
    few = latents.embed(np.asarray(run.codes[:12], float), 0)
    assert few is not None and few.shape == (12, 2) and np.isfinite(few).all()


def test_outliers_make_no_classes_of_their_own() -> None:
    """Three codes far away join the nearest class; classes and centres are those of the others."""
    rng = np.random.default_rng(0)
    far = [[400.0, 0], [350, 90], [0, 300]]
    codes = np.concatenate([rng.normal(0, 0.2, (50, 2)), rng.normal(3, 0.2, (50, 2)), far])
    typical = np.arange(103) < 100
    labels, centres = latents.cluster(codes, 2, 0, typical)
    alone, _ = latents.cluster(codes[:100], 2, 0)
    assert np.array_equal(labels[:100], alone) and sorted(np.bincount(labels[:100])) == [50, 50]
    assert set(labels[100:]) <= {0, 1} and (centres < 100).all()


def test_of_many_particles_a_sample_makes_classes_and_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others join the class, and stand in the part of the embedding, of the particles they are like."""
    rng = np.random.default_rng(3)
    group = np.arange(600) % 3
    codes = np.array([[0.0, 0, 0], [6, 0, 0], [0, 6, 0]])[group] + rng.normal(size=(600, 3))
    whole, _ = latents.cluster(codes, 3, seed=0)
    monkeypatch.setattr(latents, "SAMPLE", 100)
    monkeypatch.setattr(latents, "UMAP_SAMPLE", 120)
    labels, centre_index = latents.cluster(codes, 3, seed=0)
    assert adjusted_rand_score(labels, group) > 0.98 and adjusted_rand_score(labels, whole) > 0.98
    assert [labels[i] for i in centre_index] == [0, 1, 2]
    found = latents.embed(codes, seed=0)
    assert found is not None and found.shape == (600, 2)
    centres = np.stack([found[group == g].mean(0) for g in range(3)])
    nearest = np.linalg.norm(found[:, None] - centres, axis=2).argmin(1)
    assert (nearest == group).mean() > 0.98
    certain = latents.class_probability(codes, np.full_like(codes, 0.1), labels)
    assert certain.shape == (600,) and (certain > 0.9).mean() > 0.95
