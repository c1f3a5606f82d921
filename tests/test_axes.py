"""Axes of the code: discrete or continuous, decided through each particle's uncertainty; groups without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from sklearn.metrics import adjusted_rand_score

from fake_run import FakeRun
from opustomo.analysis import axes as axes_module
from opustomo.analysis.axes import Axis, Likelihood, find_axes, fit_groups, group_codes, joint_groups, write_axes
from opustomo.analysis.volumes import read_codes
from opustomo.data.pickles import load_labels

N = 600


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axes_module, "EM_STEPS", 90)


def seen(codes: NDArray[np.float64], noise: float, seed: int = 1) -> Likelihood:
    """Likelihoods of codes (P, K) measured with errors around ``noise``, correlated between the dimensions."""
    rng = np.random.default_rng(seed)
    count, size = codes.shape
    turn = Rotation.random(count, random_state=seed).as_matrix()[:, :size, :size] if size == 3 else np.eye(size)
    scale = np.clip(noise * rng.uniform(0.7, 1.4, (count, size)), 1e-3, None)
    covariance = np.einsum("...ij,...j,...kj->...ik", np.broadcast_to(turn, (count, size, size)), scale**2, turn)
    covariance += 1e-6 * np.eye(size)
    measured = codes + np.einsum("pij,pj->pi", np.linalg.cholesky(covariance), rng.normal(size=codes.shape))
    information = np.linalg.inv(covariance)
    return Likelihood(information, np.einsum("pij,pj->pi", information, measured))


def one_axis(values: NDArray[np.float64], noise: float) -> Axis:
    likelihood = seen(values[:, None], noise)
    return find_axes(likelihood, np.eye(1), values[:, None], np.ones(len(values), bool))[0]


RNG = np.random.default_rng(0)
STATES = RNG.integers(0, 2, N)
LAWS = {
    "two states": (2.0 * STATES - 1, 2),
    "a tenth": (3.3 * (RNG.random(N) < 0.1), 2),
    "three states": (1.8 * RNG.integers(0, 3, N), 3),
    "uniform motion": (RNG.uniform(-1.7, 1.7, N), 1),
    "saturating motion": (1.5 * np.sin(RNG.uniform(-1.5, 1.5, N)), 1),
    "motion that hardly leaves its ends": (1.5 * np.tanh(2 * np.sin(RNG.uniform(-1.5, 1.5, N))), 1),
    "motion piled up at one end": (3 * np.cos(RNG.uniform(-1.4, 1.4, N)), 1),
    "Gaussian": (RNG.normal(size=N), 1),
    "a long tail": (RNG.exponential(size=N), 1),
}


@pytest.mark.parametrize("name", LAWS)
def test_states_are_discrete_and_motions_are_not(name: str) -> None:
    """Noise of a fifth of the spread: the number of groups is that of the states, and no motion has groups."""
    values, count = LAWS[name]
    axis = one_axis(values, 0.35)
    assert (axis.discrete, len(axis.groups.share)) == (count > 1, count)


def test_noise_neither_makes_nor_hides_groups() -> None:
    """Groups that overlap by noise are found by their law, at the right places; one cloud stays one."""
    found = one_axis(2.0 * STATES - 1, 0.6)
    assert found.discrete
    np.testing.assert_allclose(found.groups.centre, [-1, 1], atol=0.12)
    assert found.groups.width.max() < 0.35  # of the errors of 0.6
    assert not one_axis(np.zeros(N) + 0.3 * RNG.normal(size=N), 0.6).discrete


def test_position_along_a_direction_is_what_the_data_say() -> None:
    """Integrating out the other directions and dividing by the prior gives back the measurement, and its error."""
    codes = RNG.normal(size=(N, 3))
    likelihood = seen(codes, 0.5)
    direction = np.array([0.6, 0.0, 0.8])
    place, error = likelihood.along(direction, np.zeros(3), np.eye(3))
    pull = (place - codes @ direction) / error
    assert abs(pull.mean()) < 0.15 and 0.85 < pull.std() < 1.15
    nothing = Likelihood(np.zeros((2, 1, 1)), np.zeros((2, 1)))
    place, error = nothing.along(np.ones(1), np.zeros(1), np.eye(1))
    assert np.isfinite(place).all() and (error > 100).all()


def test_composition_is_found_where_motion_varies_more() -> None:
    """Two states beside a motion of twice their spread: clustering all dimensions would follow the motion."""
    codes = np.stack([RNG.uniform(-4, 4, N), 2.0 * STATES - 1, RNG.normal(size=N)], 1)
    axes = find_axes(seen(codes, 0.4), np.eye(3), codes, np.ones(N, bool))
    assert [axis.discrete for axis in axes] == [True, False, False]
    np.testing.assert_array_equal(np.abs(axes[0].direction), [0, 1, 0])
    assert adjusted_rand_score(STATES, joint_groups(axes)) > 0.9


def test_two_factors_make_four_groups() -> None:
    other = RNG.integers(0, 2, N)
    codes = np.stack([2.0 * STATES, 2.0 * other], 1)
    labels = joint_groups(find_axes(seen(codes, 0.3), np.eye(2), codes, np.ones(N, bool)))
    assert labels.max() == 3 and adjusted_rand_score(2 * STATES + other, labels) > 0.95


def test_combinations_that_nobody_has_are_no_groups() -> None:
    """Three states at the corners of a square: two axes of two groups, but no particle at the fourth corner."""
    state = RNG.integers(0, 3, N)
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    codes = corners[state]
    labels = joint_groups(find_axes(seen(codes, 0.45), np.eye(2), codes, np.ones(N, bool)))
    assert labels.max() == 2 and adjusted_rand_score(state, labels) > 0.85


def test_shares_and_evidence_of_a_minority() -> None:
    values = 3.0 * (np.arange(N) < 0.1 * N) + 0.3 * RNG.normal(size=N)
    error = np.full(N, 0.3)
    groups = fit_groups(values, error, 2)
    assert groups.share[1] == pytest.approx(0.1, abs=0.02)
    assert groups.evidence > fit_groups(values, error, 1).evidence + 100


def test_group_codes_leave_out_outliers() -> None:
    codes = np.array([[0.0], [2.0], [100.0], [5.0]])
    means = group_codes(np.array([0, 0, 0, 1]), codes, np.array([True, True, False, False]))
    np.testing.assert_allclose(means, [[1.0], [5.0]])


@pytest.mark.usefixtures("drawn")
def test_files_of_the_axes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """axes.csv, one traversal for each axis and the groups with their mean codes; nothing without a linear stage.

    Groups along an axis that held-out particles do without are doubted.
    """
    values = np.stack([2.0 * STATES - 1, RNG.uniform(-1.7, 1.7, N)], 1)
    likelihood = seen(values, 0.3)
    codes = np.pad(values, ((0, 0), (0, 2))).astype(np.float32)  # two dimensions of the code stand still
    stored = {"code": values, "mixing": np.eye(2), "information": likelihood.information, "pull": likelihood.pull}
    run = FakeRun(tmp_path, codes, np.tile(np.eye(3), (N, 1, 1)), linear=stored)
    axes = write_axes(run, tmp_path)  # type: ignore[arg-type]
    lines = (tmp_path / "axes.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["kind", "groups", "continuous"]
    assert (tmp_path / "axes.png").is_file()
    labels = load_labels(tmp_path / "groups" / "labels.pkl")
    assert adjusted_rand_score(STATES, labels) > 0.98
    centres = read_codes(tmp_path / "groups" / "centers.txt", 4)
    np.testing.assert_allclose(centres[:, 0], [-1, 1], atol=0.05)
    assert np.ptp(centres[:, 1]) < 0.3  # what moves is averaged out
    assert read_codes(tmp_path / "axis1" / "z_axis.txt", 4).shape == (2, 4)
    motion = read_codes(tmp_path / "axis2" / "z_axis.txt", 4)
    assert motion.shape == (10, 4) and np.ptp(motion[:, 1]) > 2.5 and np.ptp(motion[:, 0]) < 0.3
    assert len(axes) == 2
    for trail, doubt in ([[0, 20.0], [1, 19.5]], True), ([[0, 20.0], [1, 20.5]], False):
        run.linear, _ = stored | {"trail": np.array(trail)}, caplog.clear()
        write_axes(run, tmp_path)  # type: ignore[arg-type]
        assert ("explained best by the average alone" in caplog.text) == doubt
    np.testing.assert_array_equal(load_labels(tmp_path / "axis1" / "labels.pkl"), labels)
    stops = load_labels(tmp_path / "axis2" / "labels.pkl")  # of the ten codes the one that is nearest along the axis
    distance = np.abs(values[:, 1, None] - motion[:, 1])
    assert set(stops) == set(range(10))
    assert (distance[np.arange(N), stops] <= distance.min(1) + 0.02).all()
    run.linear = stored | {"code": values[:, 1:], "mixing": np.eye(1), "pull": likelihood.pull[:, 1:],
                           "information": likelihood.information[:, 1:, 1:]}  # fmt: skip
    write_axes(run, tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "groups" / "labels.pkl").exists()  # no groups of an earlier analysis stay behind
    assert write_axes(FakeRun(tmp_path, codes, run.rotation), tmp_path) == []  # type: ignore[arg-type]
