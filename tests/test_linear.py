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
from opustomo.analysis.score_poses import pose_errors
from opustomo.config import GridOptions, InputOptions
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.linear import LinearModel
from opustomo.linear_stage import (
    LinearResult,
    corrected_poses,
    fit_linear,
    independent_components,
    outlier_score,
    typical_particles,
)
from opustomo.physics.fourier import band_multiplicity, shell_mean
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import spherical_mask
from opustomo.preparation import rows_of
from opustomo.reconstruct import Rows
from small_set import PIXEL, MemoryRows, SmallSet, even_weights, gaussians, observed

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


def test_bright_objects_take_no_part_in_fits(planted: Planted, caplog: pytest.LogCaptureFixture) -> None:
    """Two particles of twelve times the contrast: named, left out, and the fit is that of the others."""
    rows = MemoryRows(planted.rows.numerators.clone(), planted.rows.weights)
    rows.numerators[[17, 90]] *= 12
    typical = typical_particles(rows, EVERY, GRID, MASK)
    assert torch.nonzero(~typical)[:, 0].tolist() == [17, 90]
    assert "2 particle(s)" in caplog.text and "rows 18, 91" in caplog.text
    assert bool(typical_particles(planted.rows, EVERY, GRID, MASK).all())


def test_one_component_is_kept_where_none_is_found(caplog: pytest.LogCaptureFixture) -> None:
    """Identical particles: held-out evidence prefers the average, yet there has to be a code; and it is said."""
    volume = gaussians(CROP, np.array([[0, -1.0, 0]]), 1.3) * MASK
    rows = observed(volume.expand(60, -1, -1, -1), even_weights(60, SIZE, 1, 30.0), SIZE, seed=4)
    order = torch.arange(60)
    model, trail = linear.choose_components(rows, order[20:], order[:20], GRID, MASK, 3, 12, 0)
    assert model.size == 1 and trail[0][1] > trail[1][1]
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
    second = post.code.square().mean(0) + post.code_covariance.diagonal(dim1=1, dim2=2).mean(0)
    assert second.numpy() == pytest.approx(1.0, abs=0.12)
    truth = replace(fitted, mean=planted.mean, components=planted.components, pose_scale=(1e-4, 1e-4))
    known = linear.infer(truth, planted.rows, EVERY, GRID, torch.ones(200))
    error = known.code - planted.code
    squared = torch.einsum("bi,bij,bj->b", error, torch.linalg.inv(known.code_covariance), error)
    assert float(squared.mean()) == pytest.approx(2.0, abs=0.4)  # chi-square with two degrees of freedom


def test_evidence_rises_with_every_step(planted: Planted) -> None:
    trail: list[float] = []
    linear.fit(planted.start(), planted.rows, EVERY, GRID, MASK, 12, lambda step, value: trail.append(value))
    assert len(trail) == 12
    assert all(later > earlier - 0.05 for earlier, later in pairwise(trail))
    assert trail[-1] > trail[0] + 1


def test_number_of_components_is_that_of_the_data(planted: Planted) -> None:
    best, trail = linear.choose_components(planted.rows, EVERY[:160], EVERY[160:], GRID, MASK, 6, 8, 0)
    assert best.size in (2, 3)  # a third may win by a hair on so few held-out particles, never a fourth
    assert [k for k, _ in trail] == [0, 1, 2, 3, 4]
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
    mended = linear.rescale(small, before)
    after = linear.infer(mended, planted.rows, EVERY, GRID)
    assert float(after.evidence.mean()) > float(before.evidence.mean()) + 0.5
    assert float(principal_cosines(mended.components, fitted.components).min()) > 0.9999
    still = linear.rescale(fitted, linear.infer(fitted, planted.rows, EVERY, GRID))
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
    score = outlier_score(code, torch.ones(200) + 0.01 * torch.randn(200), 50 + torch.randn(200))
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


@pytest.fixture(scope="module")
def small_inputs(small_set: SmallSet) -> tuple[Inputs, Rows]:
    inputs = read_inputs(small_set.star, InputOptions(), GridOptions(mask=small_set.mask, downfrac=0.7))
    rows = rows_of(inputs, None, InputOptions(), 1)
    index = torch.arange(len(rows))
    return inputs, MemoryRows(rows.numerator(index), rows.weight(index))


@pytest.fixture(scope="module")
def small_result(small_inputs: tuple[Inputs, Rows]) -> LinearResult:
    inputs, rows = small_inputs
    return fit_linear(rows, torch.arange(54), torch.arange(54, 60), inputs.grid, inputs.mask, 1, 12, 0)


def test_two_states_are_told_apart(small_set: SmallSet, small_result: LinearResult) -> None:
    code = small_result.posterior.code[:, 0].numpy()
    low, high = (code[small_set.state == s] for s in (0, 1))
    assert low.max() < high.min() or high.max() < low.min()
    gap = abs(high.mean() - low.mean())
    assert gap > 3 * max(low.std(), high.std())


def test_pose_errors_of_the_set_are_measured(small_result: LinearResult) -> None:
    """2 degrees about a random axis is 1.15 per axis; 0.3 pixels of 15 A is 4.5 A per axis."""
    turn, shift = small_result.model.pose_scale
    assert math.degrees(turn) == pytest.approx(2.0 / math.sqrt(3.0), rel=0.35)
    assert shift * PIXEL * 24 / 16 == pytest.approx(0.3 * PIXEL, rel=0.25)


def test_corrected_poses_are_nearer_to_the_truth(
    small_set: SmallSet, small_inputs: tuple[Inputs, Rows], small_result: LinearResult
) -> None:
    inputs, _ = small_inputs
    given = pose_errors(inputs.particles.rotation, inputs.particles.origin, small_set.rotation, small_set.origin)
    rotation, origin, euler = corrected_poses(inputs.particles, small_result, inputs.grid)
    after = pose_errors(rotation, origin, small_set.rotation, small_set.origin)
    assert after["shift_median"] < 0.4 * given["shift_median"]
    assert after["shift_p90"] < 0.5 * given["shift_p90"]
    assert after["angle_p90"] < 0.8 * given["angle_p90"]
    zyz = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().swapaxes(1, 2)
    assert np.allclose(zyz, rotation, atol=1e-5)


def test_corrections_do_not_move_the_map(small_inputs: tuple[Inputs, Rows], small_result: LinearResult) -> None:
    """A move common to all particles is none: the mean of the corrections in the consensus frame is zero."""
    inputs, _ = small_inputs
    rotation, origin, _ = corrected_poses(inputs.particles, small_result, inputs.grid)
    given = inputs.particles
    relative = given.rotation.swapaxes(1, 2) @ rotation
    shift = -np.einsum("pji,pj->pi", given.rotation, origin - given.origin)
    assert np.abs(Rotation.from_matrix(relative).as_rotvec().mean(0)).max() < 1e-3
    assert np.abs(shift.mean(0)).max() < 1e-4


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
        made.append((inputs, rows_of(inputs, None, InputOptions(), 1)))
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


def test_new_components_start_small_smooth_and_inside_the_mask(planted: Planted) -> None:
    model = planted.start(3)
    assert model.size == 3
    assert float(model.components[:, MASK == 0].abs().max()) == 0.0
    power = shell_mean(model_band(model.components, SIZE).abs().square().mean(0), SIZE)
    mean = shell_mean(model_band(model.mean, SIZE).abs().square(), SIZE)
    assert 0 < float(power.sum()) < 0.2 * float(mean.sum())
