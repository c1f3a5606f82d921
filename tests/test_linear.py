"""The linear stage: planted components are found, the evidence rises, pose errors are seen, units do not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo import linear
from opustomo.analysis.independence import independent_components
from opustomo.config import GridOptions, InputOptions
from opustomo.data.inputs import read_inputs
from opustomo.linear import LinearModel
from opustomo.linear_fit import typical_particles, usual_range
from opustomo.linear_stage import outlier_score
from opustomo.mixture import Mixture, condition, reduce_statistics
from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    from_band,
    irfft3,
    rfft3,
    shell_mean,
    to_band,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, spherical_mask
from opustomo.pose_scale import USUAL_POSE, likeliest_pose_scale
from opustomo.preparation import RowMaker
from small_set import MemoryRows, SmallSet, even_weights, gaussians, observed

SIZE, CROP = 12, 10
GRID = Grid(SIZE, 4.0, SIZE, CROP, 16)
MASK = spherical_mask(CROP, 3.0, 2.0)
EVERY = torch.arange(200)


class Planted:
    """200 particles whose two parts are more or less occupied, each with a wedge of its own, and white noise."""

    def __init__(self) -> None:
        parts = [np.array([[2.0, 0.0, 0]]), np.array([[-1.5, 1.5, 0]])]
        present = torch.stack([gaussians(CROP, centres, 1.1) for centres in parts]) * MASK
        core = gaussians(CROP, np.array([[0, -1.0, 0], [0, -0.5, 1.5], [-0.5, 0, -1.5]]), 1.3) * MASK
        self.mean, self.components = 2 * core + 0.5 * present.sum(0), 0.5 * present
        generator = torch.Generator().manual_seed(1)
        self.code = torch.randn((200, 2), generator=generator)
        volumes = self.mean + torch.einsum("bk,kzyx->bzyx", self.code, self.components)
        self.rows = observed(volumes, even_weights(200, SIZE, 1, 100.0), SIZE, seed=2)

    def start(self, k: int = 2) -> LinearModel:
        return linear.add_components(linear.average(self.rows, EVERY, GRID, MASK), k, GRID, MASK, 0)

    def fit(self, k: int = 2, iterations: int = 12) -> LinearModel:
        return linear.fit(self.start(k), self.rows, EVERY, GRID, MASK, iterations)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def fitted(planted: Planted) -> LinearModel:
    return planted.fit()


def principal_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines of the angles between the spans of two sets of volumes, as far as the band goes."""
    full = [torch.view_as_real(model_band(v, SIZE) * band_multiplicity(SIZE).sqrt()).flatten(1) for v in (a, b)]
    qa, qb = (torch.linalg.qr(v.T.double())[0] for v in full)
    return torch.linalg.svdvals(qa.T @ qb)


def test_bright_objects_take_no_part_in_fits(planted: Planted) -> None:
    """Two particles of twelve times the contrast are left out."""
    rows = MemoryRows(planted.rows.numerators.clone(), planted.rows.weights)
    rows.numerators[[17, 90]] *= 12
    typical = typical_particles(rows, EVERY, GRID, MASK)
    assert torch.nonzero(~typical)[:, 0].tolist() == [17, 90]
    assert bool(typical_particles(planted.rows, EVERY, GRID, MASK).all())


def test_one_component_is_kept_where_none_is_found(caplog: pytest.LogCaptureFixture) -> None:
    """Identical particles: held-out evidence prefers the average, yet there has to be a code; and it is said.

    Ten held-out particles can be wrong by chance in one set (seed 4 is), so it is the mean over four that decides.
    """
    volume = gaussians(CROP, np.array([[0, -1.0, 0]]), 1.3) * MASK
    order, gains = torch.arange(30), []
    for seed in (4, 5, 6, 7):
        rows = observed(volume.expand(30, -1, -1, -1), even_weights(30, SIZE, 1, 30.0), SIZE, seed=seed)
        model, trail = linear.choose_components(rows, order[10:], order[:10], GRID, MASK, 3, 12, 0)
        assert model.size == 1
        gains.append(trail[1][1] - trail[0][1])
    assert np.mean(gains) < -0.1
    assert "average alone" in caplog.text


# ------------------------------------------------------------------------------------------------ components


def test_planted_subspace_and_codes_are_found(planted: Planted, fitted: LinearModel) -> None:
    # the mean's own direction is every particle's contrast, not part of the code
    spans = [torch.cat([m.mean[None], m.components]) for m in (fitted, planted)]
    assert float(principal_cosines(*spans).min()) > 0.97
    code = linear.infer(fitted, planted.rows, EVERY, GRID).code
    explained = torch.linalg.lstsq(code - code.mean(0), planted.code - planted.code.mean(0))
    residual = planted.code - planted.code.mean(0) - (code - code.mean(0)) @ explained.solution
    assert float(residual.square().mean() / planted.code.var(0).mean()) < 0.15
    assert float(torch.corrcoef(torch.stack([fitted.mean.flatten(), planted.mean.flatten()]))[0, 1]) > 0.99


def test_codes_have_unit_variance_and_honest_errors(planted: Planted, fitted: LinearModel) -> None:
    """Mean square of code plus posterior variance is 1, and the errors scatter as the covariances say."""
    post = linear.infer(fitted, planted.rows, EVERY, GRID)
    second = post.code.square().mean(0) + post.covariance[:, :-6, :-6].diagonal(dim1=1, dim2=2).mean(0)
    assert second.numpy() == pytest.approx(1.0, abs=0.12)
    truth = replace(fitted, mean=planted.mean, components=planted.components, pose_scale=(1e-4, 1e-4))
    known = linear.infer(truth, planted.rows, EVERY, GRID, torch.ones(200))
    error = known.code - planted.code
    squared = torch.einsum("bi,bij,bj->b", error, torch.linalg.inv(known.covariance[:, :-6, :-6]), error)
    assert float(squared.mean()) == pytest.approx(2.0, abs=0.4)  # chi-square with two degrees of freedom


def test_evidence_rises_with_every_step(planted: Planted) -> None:
    trail: list[float] = []
    model = planted.start()
    for _ in range(12):
        trail.append(float(linear.infer(model, planted.rows, EVERY, GRID).evidence.mean()))
        model = linear.fit(model, planted.rows, EVERY, GRID, MASK, 1)
    assert all(later > earlier - 0.05 for earlier, later in pairwise(trail))
    assert trail[-1] > trail[0] + 1


def test_number_of_components_is_that_of_the_data(planted: Planted) -> None:
    best, trail = linear.choose_components(planted.rows, EVERY[:160], EVERY[160:], GRID, MASK, 6, 8, 0)
    # further ones may win by a hair on so few held-out particles, but then they are faint
    power = best.components.square().sum((1, 2, 3))
    assert best.size >= 2 and float(power[:2].sum()) > 0.9 * float(power.sum())
    gains = np.diff([evidence for _, evidence in trail])
    assert gains[:2].min() > 5 and np.abs(gains[2:]).max() < 0.5
    exact, _ = linear.choose_components(planted.rows, EVERY[:160], EVERY[160:], GRID, MASK, 3, 2, 0, exactly=True)
    assert exact.size == 3


def test_evidence_does_not_know_the_axes_of_the_code(planted: Planted, fitted: LinearModel) -> None:
    c, s = math.cos(0.7), math.sin(0.7)
    turned = torch.einsum("jk,kzyx->jzyx", torch.tensor([[c, s], [-s, c]]), fitted.components)
    before = linear.infer(fitted, planted.rows, EVERY, GRID)
    after = linear.infer(replace(fitted, components=turned), planted.rows, EVERY, GRID)
    assert torch.allclose(before.evidence, after.evidence, atol=1e-2)
    assert torch.allclose(before.code @ torch.tensor([[c, -s], [s, c]]), after.code, atol=1e-3)


def test_principal_axes_are_orthogonal_ordered_and_the_same_model(planted: Planted, fitted: LinearModel) -> None:
    mixed = replace(fitted, components=torch.tensordot(torch.tensor([[1.0, 0.4], [-0.2, 1.3]]), fitted.components, 1))
    axes = linear.principal_axes(mixed).components.flatten(1)
    gram = axes @ axes.T
    assert float(gram[0, 1].abs()) < 1e-4 * float(gram[1, 1])
    assert float(gram[0, 0]) > float(gram[1, 1])
    evidence = [linear.infer(m, planted.rows, EVERY, GRID).evidence for m in (mixed, linear.principal_axes(mixed))]
    assert torch.allclose(evidence[0], evidence[1], atol=1e-2)


def test_rescaling_leaves_a_model_in_scale_alone_and_mends_one_out_of_scale(
    planted: Planted, fitted: LinearModel
) -> None:
    """Parameter expansion: components three times too small come back to scale in one step, their directions kept."""
    small = replace(fitted, components=fitted.components / 3)
    before = linear.infer(small, planted.rows, EVERY, GRID)
    mended = linear.rescale(small, before, small.pose_scale)
    after = linear.infer(mended, planted.rows, EVERY, GRID)
    assert float(after.evidence.mean()) > float(before.evidence.mean()) + 0.5
    assert float(principal_cosines(mended.components, fitted.components).min()) > 0.9999
    still = linear.rescale(fitted, linear.infer(fitted, planted.rows, EVERY, GRID), fitted.pose_scale)
    norms = still.components.flatten(1).norm(dim=1) / fitted.components.flatten(1).norm(dim=1)
    assert norms.numpy() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_codes_do_not_depend_on_the_units_of_the_files(planted: Planted, fitted: LinearModel, unit: float) -> None:
    """Signal and noise u times larger: mean and components u times larger, evidence and codes as they were."""
    scaled = Planted()
    scaled.rows = MemoryRows(planted.rows.numerators / unit, planted.rows.weights / unit**2)
    model = scaled.fit()
    assert torch.allclose(model.components / unit, fitted.components, atol=5e-3 * float(fitted.components.abs().max()))
    codes = [linear.infer(m, r, EVERY, GRID).code for m, r in ((fitted, planted.rows), (model, scaled.rows))]
    assert torch.allclose(codes[0], codes[1], atol=2e-2)


def test_contrast_of_a_particle_is_its_own_and_not_in_the_code(planted: Planted, fitted: LinearModel) -> None:
    """A particle 10 % fainter than the others has gain 0.9, not another code."""
    faint = MemoryRows(planted.rows.numerators.clone(), planted.rows.weights)
    # the same data with the signal 10 % smaller: noise is what is left after the true model
    volumes = planted.mean + torch.einsum("bk,kzyx->bzyx", planted.code, planted.components)
    clean = observed(volumes, planted.rows.weights, SIZE, seed=None)
    faint.numerators[:20] -= 0.1 * clean.numerators[:20]
    usual, less = (linear.infer(fitted, rows, EVERY, GRID) for rows in (planted.rows, faint))
    ratio = (less.gain / usual.gain)[:20]
    assert float(ratio.mean()) == pytest.approx(0.9, abs=0.03)
    assert torch.equal(less.gain[20:], usual.gain[20:])
    assert float((less.code - usual.code)[:20].abs().mean()) < 0.25


def test_outliers_stand_out() -> None:
    code = torch.randn((200, 3), generator=torch.Generator().manual_seed(0))
    code[7] += 12
    rest = torch.stack([torch.ones(200) + 0.01 * torch.randn(200), 50 + torch.randn(200), torch.rand(200)], 1)
    values = torch.cat([code, rest], 1)
    score = outlier_score(values, usual_range(values))
    assert int(score.argmax()) == 7 and float(score[7]) > 3 * float(score.median())


def test_independent_components_separate_two_states_from_a_motion() -> None:
    rng = np.random.default_rng(0)
    sources = np.stack([rng.choice([-1.0, 1.0], 400), rng.uniform(-1.7, 1.7, 400)], 1)
    code = (sources @ Rotation.from_euler("z", 40, degrees=True).as_matrix()[:2, :2]).astype(np.float32)
    turned, mixing = independent_components(code, 0)
    correlation = np.abs(np.corrcoef(turned.T, sources.T)[:2, 2:])
    assert correlation.max(0).min() > 0.95
    assert np.allclose(turned @ mixing.T, code - code.mean(0), atol=1e-2)


def test_normal_equations_are_the_expected_sums(planted: Planted, fitted: LinearModel) -> None:
    """``sum_i E(z~ z~^T) g^2 W_i(k)`` with the posterior's variance in it, and ``sum_i E(z~) g B_i``."""
    few = torch.tensor([3, 50, 120])
    post = linear.infer(fitted, planted.rows, few, GRID)
    system, right = linear.accumulate(planted.rows, few, GRID, post)
    q = 1 + post.mean.shape[1]
    by_hand, by_hand_right = torch.zeros_like(system), torch.zeros_like(right)
    for i, row in enumerate(few.tolist()):
        z = torch.cat([torch.ones(1), post.mean[i]])
        second = torch.outer(z, z)
        second[1:, 1:] += post.covariance[i]
        by_hand += planted.rows.weights[row][:, None, None] * second * post.gain[i] ** 2
        by_hand_right += z[:, None, None, None] * planted.rows.numerators[row] * post.gain[i]
    assert system.shape == (planted.rows.weights.shape[1], q, q)
    assert torch.allclose(system, by_hand, rtol=1e-3, atol=1e-3)
    assert torch.allclose(right, by_hand_right, rtol=1e-3, atol=1e-2)


def test_known_pose_errors_do_not_smear_the_mean(planted: Planted) -> None:
    """Every particle is moved alike and its posterior says so: the new mean is the density before the move."""
    scale = (0.05, 0.4)
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7), scale)
    move = linear.pose_modes(planted.mean, scale, GRID).sum(0)
    weights = even_weights(40, SIZE, 1, 100.0)
    rows = observed((planted.mean + move).expand(40, -1, -1, -1), weights, SIZE, seed=None)
    certain = linear.Posterior(
        torch.tensor([0.0, 0.0] + [1.0] * 6).expand(40, -1), 1e-6 * torch.eye(8).expand(40, -1, -1),
        torch.ones(40), torch.zeros(40),
    )  # fmt: skip
    model = replace(model, mean_power=1e3 * torch.ones(7))
    after = linear.maximise(model, rows, torch.arange(40), GRID, MASK, certain).mean
    inside = MASK > 0.5
    error, unmoved = (after - planted.mean)[inside].norm(), move[inside].norm()
    assert float(error) < 0.2 * float(unmoved)


# ------------------------------------------------------------------------------------------------ poses


def test_pose_modes_are_how_the_density_moves() -> None:
    """``V'(x) = V(R^T (x - t))`` puts the bead at c on ``R c + t``: differences of such maps, axis by axis."""
    size = 24
    grid = Grid(size, 4.0, size, 20, 32)
    centres = np.array([[4.0, 0, 0], [0, 3.0, -2], [-2, 1, 4]])
    scale, step = (0.03, 0.5), 1e-3
    modes = linear.pose_modes(gaussians(20, centres, 1.5), scale, grid)
    for axis in range(3):
        unit = np.eye(3)[axis]
        turned = [gaussians(20, Rotation.from_rotvec(s * unit).apply(centres), 1.5) for s in (step, -step)]
        moved = [gaussians(20, centres + s * unit, 1.5) for s in (step, -step)]
        for mode, pair, unit_scale in ((modes[axis], turned, scale[0]), (modes[3 + axis], moved, scale[1])):
            expected = unit_scale * (pair[0] - pair[1]) / (2 * step)
            assert torch.allclose(mode, expected, atol=2e-2 * float(expected.abs().max()))


def test_pose_prior_is_where_the_given_poses_are(planted: Planted) -> None:
    """A prior N(p0, 1) of the pose error is a model at V + D p0 with errors about zero."""
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7), (0.05, 0.3))
    few = torch.arange(20)
    first, second = linear.statistics(linear.columns(model, GRID), planted.rows, few, GRID)
    gain = torch.linspace(0.8, 1.2, 20, dtype=torch.float64)
    prior = torch.randn((20, 6), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = linear.posterior(first, second, gain, prior)
    # the same, with the mean of every particle moved by hand
    change = torch.eye(9, dtype=torch.float64).repeat(20, 1, 1)
    change[:, 0, 3:] = prior
    moved_first = (change @ first[..., None])[..., 0]
    moved_second = change @ second @ change.mT
    expected = linear.posterior(moved_first, moved_second, gain, torch.zeros(20, 6, dtype=torch.float64))
    assert torch.allclose(found.evidence, expected.evidence, atol=1e-6)
    assert torch.allclose(found.code, expected.code, atol=1e-8)
    assert torch.allclose(found.pose, expected.pose + prior, atol=1e-8)
    assert float((found.evidence - linear.posterior(first, second, gain, 0 * prior).evidence).abs().min()) > 1e-3


def test_posterior_under_a_mixture_is_that_of_its_parts_together(planted: Planted) -> None:
    """Two Gaussians with the same N(0, I): nothing changes.  Two others: evidence and codes of the closed form."""
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7), (0.05, 0.3))
    few = torch.arange(30)
    moments = linear.statistics(linear.columns(model, GRID), planted.rows, few, GRID)
    gain = torch.linspace(0.8, 1.2, 30, dtype=torch.float64)
    prior = 0.5 * torch.randn((30, 6), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one = linear.posterior(*moments, gain, prior)
    unit = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    twice = Mixture(torch.tensor([0.3, 0.7]).double(), torch.zeros(2, 2).double(), unit)
    same = linear.posterior(*moments, gain, prior, twice)
    for a, b in zip(vars(one).values(), vars(same).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-8)
    apart = Mixture(twice.share, torch.tensor([[1.0, 0.2], [-0.6, 0.5]]).double(), 0.2 * unit)
    found = linear.posterior(*moments, gain, prior, apart)
    codes = condition(apart, reduce_statistics(*moments, gain, prior))
    assert torch.allclose(found.evidence, codes.evidence, atol=1e-6)
    assert torch.allclose(found.code, codes.centre(), atol=1e-7)
    assert torch.allclose(found.covariance[:, :-6, :-6], codes.covariance(), atol=1e-7)
    # the pose goes with the code: poses of the mixture are those of its parts, weighted
    assert float((found.pose - one.pose).abs().max()) > 0.01


def seen_at(band: torch.Tensor, weights: torch.Tensor, shift: torch.Tensor) -> MemoryRows:
    """Rows of numerators ``band`` (P, n) at poses moved by ``shift`` (P, 3), working voxels: ``B(x + shift)``."""
    phase = torch.exp(2j * math.pi * (shift @ band_frequencies(SIZE).T) / SIZE)
    moved = torch.cat([torch.zeros_like(shift), shift], 1)
    return MemoryRows(centre_crop(irfft3(from_band(band * phase, SIZE)), CROP), weights, moved)


def test_second_look_at_moved_poses_finds_the_same_pose_and_evidence() -> None:
    """Particles 0.1 voxels off: half of the way moved, the same pose is found in all, and evidence is not gained."""
    body = gaussians(CROP, np.array([[0.5, -1.0, 0], [0, 1.0, 1.2]]), 1.3) * MASK
    generator = torch.Generator().manual_seed(6)
    truth = 0.1 * torch.randn((120, 3), generator=generator)
    weights = even_weights(120, SIZE, 1, 60.0)
    phase = torch.exp(-2j * math.pi * (truth @ band_frequencies(SIZE).T) / SIZE)
    white = to_band(rfft3(torch.randn((120, *(SIZE,) * 3), generator=generator)))
    band = weights * model_band(body, SIZE) * phase + weights.sqrt() * white
    rows = seen_at(band, weights, torch.zeros(120, 3))
    model = LinearModel(body, torch.zeros(0, CROP, CROP, CROP), torch.ones(7), torch.ones(7), (0.005, 0.1))
    every, gain, scale = torch.arange(120), torch.ones(120), torch.tensor([0.005] * 3 + [0.1] * 3)
    first = linear.infer(model, rows, every, GRID, gain)
    pose = first.pose * scale
    assert float((pose[:, 3:] - truth).square().mean()) < 0.5 * float(truth.square().mean())

    again = seen_at(band, weights, 0.5 * pose[:, 3:])
    second = linear.infer(model, again, every, GRID, gain)
    total = again.moved + second.pose * scale
    assert float((total - pose)[:, 3:].square().mean().sqrt()) < 0.15 * float(pose[:, 3:].square().mean().sqrt())
    change = second.evidence - first.evidence
    assert abs(float(change.mean())) < 0.05 and float(change.std()) < 0.4

    forgotten = linear.infer(model, MemoryRows(again.numerators, weights), every, GRID, gain)
    assert float((forgotten.evidence - second.evidence).mean()) > 0.3
    further = 0.5 * pose + forgotten.pose * scale  # the same evidence counted twice overshoots
    assert float((further * pose)[:, 3:].sum() / pose[:, 3:].square().sum()) > 1.02


def moved_rows(planted: Planted) -> MemoryRows:
    """At poses moved by all of their errors, of 0.04 radians and 0.35 voxels per axis."""
    moved = torch.randn((200, 6), generator=torch.Generator().manual_seed(8)) * torch.tensor([0.04] * 3 + [0.35] * 3)
    return MemoryRows(planted.rows.numerators, planted.rows.weights, moved)


def scale_of(model: LinearModel, rows: MemoryRows) -> tuple[float, float]:
    """The likeliest, at the model's density."""
    moments = linear.statistics(linear.columns(model, GRID), rows, EVERY, GRID)
    prior = linear.pose_prior(model, rows, EVERY)
    return likeliest_pose_scale(model.pose_scale, *moments, torch.ones(len(EVERY)), prior)


def test_scale_of_the_pose_errors_is_that_of_the_poses_given(planted: Planted) -> None:
    """The scale is that of the moves, not of what is left."""
    rows = moved_rows(planted)
    for start in ((0.04, 0.35), (0.2, 0.05)):  # whatever is thought of them first
        model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7), start)
        assert scale_of(model, rows) == pytest.approx((0.04, 0.35), rel=0.15)


def test_the_scale_of_the_pose_errors_is_where_the_evidence_is_highest(planted: Planted) -> None:
    """Against the evidence of ``infer`` itself, on a grid about it, the prior of the scale taken into account."""
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7))
    rows, ones = moved_rows(planted), torch.ones(len(EVERY))
    found = scale_of(model, rows)

    def worth(scale: tuple[float, float]) -> float:
        evidence = linear.infer(replace(model, pose_scale=scale), rows, EVERY, GRID, ones).evidence
        return float(evidence.double().sum()) - sum(s / u for s, u in zip(scale, USUAL_POSE, strict=True))

    best = worth(found)
    for other in ((1.3, 1.0), (0.7, 1.0), (1.0, 1.3), (1.0, 0.7)):
        assert worth((found[0] * other[0], found[1] * other[1])) < best


def test_pose_errors_that_the_data_do_not_show_are_taken_for_small(planted: Planted) -> None:
    """A hundredth of the information: EM would stay where it began, and move poses by what noise says."""
    faint = MemoryRows(planted.rows.numerators * 1e-4, planted.rows.weights * 1e-4)
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7))
    turn, move = scale_of(model, faint)
    assert turn < 0.1 * USUAL_POSE[0] and move < 0.1 * USUAL_POSE[1]


def test_doubling_signal_and_noise_leaves_the_codes(small_set: SmallSet, tmp_path: Path) -> None:
    """Files with every voxel doubled: B is halved, W quartered, codes and evidence are what they were."""
    (tmp_path / "subtomo").mkdir()
    for path in (small_set.folder / "subtomo").iterdir():
        if path.suffix == ".star":
            (tmp_path / "subtomo" / path.name).symlink_to(path)
            continue
        with mrcfile.open(path) as old, mrcfile.new(tmp_path / "subtomo" / path.name) as new:
            new.set_data(2 * old.data)
            new.voxel_size = old.voxel_size
    (tmp_path / "particles.star").write_text(small_set.star.read_text())
    made = []
    for star in (small_set.star, tmp_path / "particles.star"):
        inputs = read_inputs(star, InputOptions(), GridOptions(mask=small_set.mask, downfrac=0.7))
        inputs = replace(inputs, particles=inputs.particles.subset(np.arange(24)))
        made.append((inputs, RowMaker(inputs, None, InputOptions(), 1)(inputs.particles)))
    few = torch.arange(8)
    b, w = [[rows.numerator(few) for _, rows in made], [rows.weight(few) for _, rows in made]]
    assert torch.allclose(2 * b[1], b[0], atol=1e-4 * float(b[0].abs().max()))
    assert torch.allclose(4 * w[1], w[0], rtol=1e-3)
    inputs = made[0][0]
    codes = []
    for numerator, weight in zip(b, w, strict=True):
        rows = MemoryRows(numerator, weight)
        model = linear.add_components(
            linear.average(rows, few, inputs.grid, inputs.mask), 1, inputs.grid, inputs.mask, 0
        )
        model = linear.fit(model, rows, few, inputs.grid, inputs.mask, 4)
        codes.append(linear.infer(model, rows, few, inputs.grid))
    assert torch.allclose(codes[0].code, codes[1].code, atol=1e-2)
    assert torch.allclose(codes[0].evidence, codes[1].evidence, rtol=1e-3)


def test_pose_errors_are_those_of_the_particles_own_density(planted: Planted) -> None:
    """A particle of an unusual state, moved by hand: with the modes of its own density the move is found exactly."""
    model = LinearModel(planted.mean, planted.components, torch.ones(7), torch.ones(7), (0.05, 0.4))
    code, gain = torch.tensor([[2.5, -2.5]]), torch.tensor([0.9])
    density = 0.9 * model.decode(code)
    move = torch.tensor([0.5, -0.4, 0.3, 0.2, -0.6, 0.4])
    moved = density + torch.einsum("j,jzyx->zyx", move, linear.pose_modes(density[0], model.pose_scale, GRID))
    rows = observed(moved, even_weights(1, SIZE, 1, 1e6), SIZE, seed=None)
    only = torch.zeros(1, dtype=torch.long)
    found = linear.own_pose_error(model, rows, only, GRID, code, gain)[0]
    assert torch.allclose(found, move, atol=1e-3)
    of_the_mean = torch.einsum("j,jzyx->zyx", move, linear.pose_modes(planted.mean, model.pose_scale, GRID))
    assert float((moved - density - of_the_mean).norm() / of_the_mean.norm()) > 0.2  # which the mean's modes are not
    # the prior pulls back to the pose given
    held = MemoryRows(rows.numerators, rows.weights / 1e9, moved=torch.tensor([[0.05, 0, 0, 0, 0, 0.4]]))
    held.numerators = rows.numerators / 1e9
    back = linear.own_pose_error(model, held, only, GRID, code, gain)[0]
    assert torch.allclose(back, torch.tensor([-1.0, 0, 0, 0, 0, -1.0]), atol=1e-2)


def test_new_components_start_small_smooth_and_inside_the_mask(planted: Planted) -> None:
    model = planted.start(3)
    assert model.size == 3
    assert float(model.components[:, MASK == 0].abs().max()) == 0.0
    power = shell_mean(model_band(model.components, SIZE).abs().square().mean(0), SIZE)
    mean = shell_mean(model_band(model.mean, SIZE).abs().square(), SIZE)
    assert 0 < float(power.sum()) < 0.2 * float(mean.sum())
