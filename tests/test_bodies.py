"""Rigid bodies: the motion of a volume, its derivatives, the frame, and a set whose subunit turns."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import small_set as sets
from opustomo import checkpoint, cli
from opustomo.analysis.evaluate import evaluate
from opustomo.bodies import BodyModel, BodyResult, at_rest, find_motions, refit, straightened, with_joints
from opustomo.body_division import divide
from opustomo.body_rows import refuse_without_room, straight_rows
from opustomo.body_stage import set_free
from opustomo.compat import dsdsh
from opustomo.data.bodies import BodyFiles, load_bodies, mask_files, parts_of, read_bodies, save_bodies
from opustomo.data.mrc import read_volume, write_volume
from opustomo.errors import UserError
from opustomo.motion_covariance import WIDEST, Told, likeliest_covariance
from opustomo.objective import differentiable_band
from opustomo.physics.bodies import left_jacobian, move_bodies, move_with_derivatives, soft_bodies
from opustomo.physics.fourier import band_frequencies, band_multiplicity, fourier_resize, irfft3, rfft3
from opustomo.physics.geometry import rotation_from_vector
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band, model_band_adjoint, negative_log_likelihood
from opustomo.physics.volume import centred_coordinates, rotate_volume, shell_numbers
from opustomo.reconstruct import AtGain, own_precision
from opustomo.simulate.bead_model import intersubunit_axis

SIZE = 20
AXES = torch.tensor([[2.0, 0.0, 1.0], [3.0, 1.0, 0.0]])  # joints


def smooth(seed: int, size: int = SIZE) -> torch.Tensor:
    """A density (size^3) in a sphere, band-limited to half of Nyquist."""
    noise = torch.randn((size,) * 3, generator=torch.Generator().manual_seed(seed))
    inside = torch.exp(-((centred_coordinates(size).norm(dim=-1) / (0.2 * size)) ** 2))
    return irfft3(rfft3(irfft3(rfft3(noise) * (shell_numbers(size) < size / 5)) * inside))


def halves(size: int = SIZE) -> torch.Tensor:
    """Weights of the halves left and right of x = 2."""
    x = centred_coordinates(size)[..., 0]
    return soft_bodies(torch.stack([x - 2.0, 2.0 - x]), 1.0)


def test_bodies_at_rest_are_the_volume_itself() -> None:
    volume = smooth(0)[None]
    assert torch.allclose(move_bodies(volume, halves(), AXES, torch.zeros(1, 2, 6)), volume, atol=1e-4)


def test_bodies_that_move_alike_are_one_rotation() -> None:
    volume, turn, shift = smooth(1), torch.tensor([0.2, -0.1, 0.3]), torch.tensor([0.7, -0.4, 1.1])
    motion = torch.cat([turn, shift]).expand(1, 2, 6)
    moved = move_bodies(volume[None], halves(), torch.zeros(2, 3), motion)[0]
    matrix = torch.from_numpy(Rotation.from_rotvec(turn.numpy()).as_matrix()).float()
    expected = rotate_volume(volume, matrix.T, -matrix.T @ shift)
    assert float((moved - expected).square().sum() / expected.square().sum()) < 0.003


def test_a_body_turns_about_its_joint_and_the_other_stands() -> None:
    """Far from the border between the bodies each is rigid."""
    volume, joint = smooth(2), torch.tensor([2.0, 1.0, -1.0])
    turn = torch.tensor([0.0, 0.15, 0.1])
    motion = torch.zeros(1, 2, 6)
    motion[0, 1, :3] = turn
    moved = move_bodies(volume[None], halves(), joint.expand(2, 3), motion)[0]
    matrix = rotation_from_vector(turn)
    turned = rotate_volume(volume, matrix.T, joint - matrix.T @ joint)
    x = centred_coordinates(SIZE)[..., 0]
    for side, expected in ((x < -3, volume), ((x > 5) & (x < 8), turned)):
        assert float((moved - expected)[side].square().sum() / expected[side].square().sum()) < 0.003


def test_densities_of_bodies_that_come_together_add_up() -> None:
    """As those of their atoms do; what they were apart stays, and so does the mass."""
    place = centred_coordinates(SIZE)

    def blob(x: float, y: float = 0.0) -> torch.Tensor:
        return torch.exp(-(place - torch.tensor([x, y, 0.0])).square().sum(-1) / 4.0)

    motion = torch.zeros(1, 2, 6)
    motion[0, 0, 3], motion[0, 1, 3:5] = 2.0, torch.tensor([-4.0, 1.0])
    volume = blob(-3.0) + blob(6.0)
    moved = move_bodies(volume[None], halves(), AXES, motion)[0]
    expected = blob(-1.0) + blob(2.0, 1.0)
    assert float((moved - expected).square().sum() / expected.square().sum()) < 0.003
    assert float(moved.sum()) == pytest.approx(float(volume.sum()), rel=1e-3)


def test_derivatives_are_those_of_the_motion() -> None:
    volume, weights, joints = smooth(3)[None].double(), halves().double(), AXES.double()
    motion = 0.2 * torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moved, slopes = move_with_derivatives(volume, weights, joints, motion)
    assert torch.allclose(moved, move_bodies(volume, weights, joints, motion))
    for j in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[j] = 0.02 if j % 6 < 3 else 0.3
        there, back = (move_bodies(volume, weights, joints, motion + s * step.view(1, 2, 6)) for s in (1, -1))
        expected, found = ((there - back) / (2 * step[j]))[0].flatten(), slopes[0, j].flatten()
        # the weights, read between voxels over which they change at once, are known no better
        assert float((found - expected).square().sum() / expected.square().sum()) < 0.09, j


def test_gradients_of_the_renderer_are_its_derivatives() -> None:
    volume, weights, joints = smooth(5)[None].double(), halves().double(), AXES.double()
    motion = (0.1 * torch.ones(1, 2, 6, dtype=torch.float64)).requires_grad_()
    probe = smooth(6).double()
    (gradient,) = torch.autograd.grad((move_bodies(volume, weights, joints, motion) * probe).sum(), motion)
    expected = (move_with_derivatives(volume, weights, joints, motion.detach())[1] * probe).sum((-3, -2, -1))
    assert torch.allclose(gradient.flatten(), expected.flatten(), atol=0.08 * float(expected.abs().max()))


def test_left_jacobian_is_the_change_of_a_rotation() -> None:
    vector, change = torch.tensor([0.4, -0.7, 0.2]).double(), 1e-5 * torch.tensor([1.0, 2.0, -1.5]).double()
    there = Rotation.from_rotvec((vector + change).numpy())
    turned = Rotation.from_rotvec((left_jacobian(vector) @ change).numpy()) * Rotation.from_rotvec(vector.numpy())
    assert (there * turned.inv()).magnitude() < 1e-9


def model_of(volume: torch.Tensor) -> BodyModel:
    """Half 1 stands nearly still, half 2 turns about z and shifts."""
    weights = halves()
    bodies = with_joints(weights, volume.abs(), (0, 1))
    spread = torch.tensor([0.01] * 3 + [0.1] * 3 + [0.01, 0.02, 0.3] + [0.1, 0.3, 0.1])
    ones = torch.ones(SIZE // 2 + 1)
    return BodyModel(
        bodies, volume, volume[None][:0], torch.diag((10 * spread).square()), ones, torch.ones_like(volume)
    )


def test_metric_is_the_mean_square_displacement() -> None:
    volume = smooth(7).abs()
    model = model_of(volume)
    motion = 0.02 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    place = centred_coordinates(SIZE)
    weights, total = model.bodies.weights, 0.0
    for b in range(2):
        turn = Rotation.from_rotvec(motion[6 * b : 6 * b + 3].numpy()).as_matrix()
        arm = (place - model.bodies.joints[b]).numpy()
        moved = arm @ turn.T - arm + motion[6 * b + 3 : 6 * b + 6].numpy()
        total += float(((weights[b] * volume).numpy() * (moved**2).sum(-1)).sum())
    expected = total / float(volume.sum())
    assert float(motion @ model.bodies.metric @ motion) == pytest.approx(expected, rel=0.02)


def test_what_all_bodies_do_is_a_pose_and_the_rest_is_not() -> None:
    model = model_of(smooth(8).abs())
    pose = torch.tensor([[0.02, -0.01, 0.03, 0.5, -0.2, 0.1]])
    together = pose @ model.bodies.together().T
    assert torch.allclose(model.common(together), pose, atol=1e-4)
    assert float(model.inner(together).abs().max()) < 1e-4
    # displacement at a joint: w x c + t
    c = model.bodies.joints[1]
    assert torch.allclose(together[0, 9:], torch.linalg.cross(pose[0, :3], c) + pose[0, 3:], atol=1e-5)
    drawn = torch.randn(4000, 12, generator=torch.Generator().manual_seed(2)) * model.covariance.diagonal().sqrt()
    mixed = torch.corrcoef(torch.cat([model.common(drawn), model.inner(drawn)[:, 6:]], 1).T)[:6, 6:]
    assert float(mixed.abs().max()) < 0.1


def test_conformation_has_unit_variance_and_its_loading_is_its_inverse() -> None:
    model = model_of(smooth(9).abs())
    loading, size = model.modes(3)
    code = torch.randn(50, 3, generator=torch.Generator().manual_seed(3))
    assert torch.allclose((code @ loading.T) @ model.projection(3).T, code, atol=1e-3)
    drawn = torch.randn(6000, 12, generator=torch.Generator().manual_seed(4)) * model.covariance.diagonal().sqrt()
    found = drawn @ model.projection(3).T
    assert torch.allclose(found.std(0), torch.ones(3), atol=0.05)
    # the largest is the turn of half 2 about z
    assert abs(float(loading[8, 0])) / float(loading[6:9, 0].norm()) > 0.95
    assert bool((size[:-1] >= size[1:]).all())


def test_covariance_of_motions_is_the_likeliest_one_at_once() -> None:
    """Particles that tell some motions well, some badly and one not at all, from a start ten times too large."""
    generator = torch.Generator().manual_seed(7)
    true, start = torch.diag(torch.tensor([1.0, 0.2, 0.0, 0.0])), 10.0 * torch.eye(4)
    told = torch.tensor([4.0, 4.0, 4.0, 0.2])
    precision = torch.diag(told).expand(3000, 4, 4)
    drawn = torch.randn(2, 3000, 4, generator=generator)
    pull = told * (drawn[0] * true.diagonal().sqrt()) + told.sqrt() * drawn[1]
    found = likeliest_covariance(start, Told(pull, precision)).float()
    assert torch.allclose(found.diagonal()[:2], true.diagonal()[:2], atol=0.06)
    assert float(found.diagonal()[2:].max()) < 0.5  # one step of EM leaves 3.4 of the 10
    assert float((found - found.diagonal().diag())[:3, :3].abs().max()) < 0.03

    def evidence(covariance: torch.Tensor) -> float:
        given = torch.distributions.MultivariateNormal(torch.zeros(4), covariance + precision[0].inverse())
        return float(given.log_prob(pull / told).sum())

    nearby = [found + 0.02 * (v + v.T) @ found @ (v + v.T) for v in torch.randn(20, 4, 4, generator=generator)]
    assert evidence(found) > max(evidence(other) for other in nearby)


def test_covariance_is_bounded_where_the_data_do_not_tell_it(caplog: pytest.LogCaptureFixture) -> None:
    """Far from where it is known a likelihood that is flat may as well rise."""
    told = Told(torch.tensor([[3.0, 0.5]]).repeat(200, 1), torch.diag(torch.tensor([1e-3, 4.0])).repeat(200, 1, 1))
    found = likeliest_covariance(torch.eye(2), told)
    assert float(torch.linalg.eigvalsh(found)[-1]) == pytest.approx(WIDEST) and float(found[1, 1]) < 1.0
    assert "the data do not tell how far" in caplog.text


def test_mean_is_the_likeliest_one_under_motions_codes_and_gains() -> None:
    """Energy falls, and its gradient goes: through the prior's amplitude, components and gains that are not 1."""
    generator, count = torch.Generator().manual_seed(0), 12
    whole, component = smooth(1), 0.3 * smooth(3)[None]
    code, motion = torch.randn(count, 1, generator=generator), 0.2 * torch.randn(count, 12, generator=generator)
    gain, amplitude = 1 + 0.2 * torch.randn(count, generator=generator), 0.5 + torch.rand(SIZE, SIZE, SIZE)
    start = dataclasses.replace(
        model_of(whole), components=component, mean=0.5 * whole, power=torch.linspace(1, 0.1, SIZE // 2 + 1),
        amplitude=amplitude,
    )  # fmt: skip
    moved = start.bodies.move(whole + torch.einsum("bk,kzyx->bzyx", code, component), motion)
    # rows that were seen without their gain: it is put in by AtGain alone
    rows = AtGain(Moved(moved * gain[:, None, None, None]), gain)
    grid, mask = Grid(SIZE, 10.0, SIZE, SIZE, 32), (centred_coordinates(SIZE).norm(dim=-1) < 8).float()
    found = dataclasses.replace(at_rest(count, start, 1), motion=motion, code=code)
    everyone, precision = torch.arange(count), own_precision(start.power, grid)[0]

    def gradient(mean: torch.Tensor) -> tuple[float, float]:
        whitened = torch.where(mask > 0, mean / amplitude, 0.0).requires_grad_()
        density = amplitude * mask * whitened + torch.einsum("bk,kzyx->bzyx", code, component)
        band = differentiable_band(start.bodies.move(density, motion), SIZE)
        square = (band.abs().square() * band_multiplicity(SIZE, "cpu")).sum(-1)
        seen = (start.bodies.move(density, motion) * rows.base.numerator(everyone)).sum((1, 2, 3))
        own = (
            differentiable_band(mask * whitened, SIZE).abs().square() * precision * band_multiplicity(SIZE, "cpu")
        ).sum()
        energy = (0.5 * gain.square() * square - gain * seen).sum() + 0.5 * own
        slope = torch.autograd.grad(energy, whitened)[0]
        return float(energy.detach()), float((mask * slope).norm())

    told = Told(torch.zeros(count, 12), torch.eye(12).repeat(count, 1, 1))
    states = [start.mean] + [
        refit(start, rows, everyone, grid, mask, found, told, start.covariance, steps).mean for steps in (2, 60)
    ]
    (first, slope), (second, _), (last, none) = map(gradient, states)
    assert last < second < first and none < 0.1 * slope


def test_what_is_told_of_motions_has_the_codes_integrated_out() -> None:
    """Against the Gaussian integral by determinants, at two motions."""
    generator = torch.Generator().manual_seed(8)
    root = torch.randn(1, 5, 5, generator=generator, dtype=torch.float64)
    curvature, place, slope = root @ root.mT, *torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    told = Told.of(slope, curvature, place, 3)

    def integrated(motion: torch.Tensor) -> torch.Tensor:
        away = torch.cat([motion, torch.zeros(2, dtype=torch.float64)]) - place[0]
        inner = curvature[0, 3:, 3:] + torch.eye(2, dtype=torch.float64)
        pull = (slope[0] - curvature[0] @ away)[3:]
        return slope[0] @ away - 0.5 * away @ curvature[0] @ away + 0.5 * pull @ inner.inverse() @ pull

    a, b = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    change = told.pull[0] @ (a - b) - 0.5 * (a @ told.precision[0] @ a - b @ told.precision[0] @ b)
    assert float(change) == pytest.approx(float(integrated(a) - integrated(b)), rel=1e-9)


def test_straightened_rows_have_the_likelihoods_slope_at_the_particles_density() -> None:
    """Against the likelihood of the moved volume, on a particle with a wedge-like weight."""
    mean, code = smooth(10), torch.tensor([[0.7]])
    model = dataclasses.replace(model_of(mean), components=smooth(13)[None])
    density = mean + 0.7 * model.components[0]
    generator = torch.Generator().manual_seed(5)
    k = band_frequencies(SIZE)
    weight = (0.2 + (k[:, 2].abs() < k[:, 0].abs() + 2).float())[None]
    motion = 0.1 * torch.randn(1, 12, generator=generator)
    numerator, gain = torch.randn(1, SIZE, SIZE, SIZE, generator=generator), torch.tensor([1.2])
    grid = Grid(SIZE, 10.0, SIZE, SIZE, 32)
    rest = straightened(model, numerator, weight, gain, motion, code, grid)
    for change in (smooth(11), smooth(12)):

        def exact(step: float, change: torch.Tensor = change) -> float:
            moved = model.bodies.move((density + step * change)[None], motion)
            return float(negative_log_likelihood(moved, 1.2 * numerator, 1.44 * weight, SIZE))

        def straight(step: float, change: torch.Tensor = change) -> float:
            volume = (density + step * change)[None]
            return float(negative_log_likelihood(volume, 1.2 * rest, 1.44 * weight, SIZE))

        slopes = [(value(0.05) - value(-0.05)) / 0.1 for value in (exact, straight)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.01, abs=0.02 * float(change.norm()))


def test_rows_that_will_not_fit_are_refused_first(tmp_path: Path) -> None:
    grid = Grid(256, 2.0, 256, 256, 256)
    for folder, words in ((tmp_path / "bodies", "are free; free space"), (None, "leave --no-cache out")):
        with pytest.raises(UserError, match=words):
            refuse_without_room(folder, 10**9, grid)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = model_of(smooth(16))
    rows = Moved(smooth(16)[None], fingerprint="known")
    found = at_rest(1, model, 1)
    result = BodyResult(("a", "b"), model, found, found.motion, torch.ones(1), 1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device"):
        straight_rows(tmp_path, result, rows, Grid(SIZE, 10.0, SIZE, SIZE, 32), torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


class Moved(NamedTuple):
    """Rows of volumes (P, SIZE^3) in which bodies moved, all of one weight everywhere."""

    volumes: torch.Tensor
    strength: float = 1.0
    fingerprint: str = ""

    @property
    def moved(self) -> torch.Tensor:
        return torch.zeros(len(self.volumes), 6)

    def __len__(self) -> int:
        return len(self.volumes)

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        band = model_band(self.volumes[index], SIZE) * band_multiplicity(SIZE, "cpu")
        return model_band_adjoint(self.strength * band, SIZE, SIZE)

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        return torch.full((len(index), len(band_multiplicity(SIZE, "cpu"))), self.strength)


def test_nothing_of_a_motion_is_left_in_rows_whose_bodies_are_put_back() -> None:
    """In noise that lets half of every motion be seen; a component of composition would take up what is left."""
    volume, count = smooth(15), 96
    model, generator = model_of(volume), torch.Generator().manual_seed(9)
    loading = 0.05 * model.modes(1)[0][:, 0]  # small: what is found is the truth, shrunk
    code = torch.randn(count, generator=generator)
    column = (model.bodies.move(volume[None], 0.1 * loading[None]) - volume) / 0.1
    noise = float(column.norm())  # a motion of unit size has a signal-to-noise ratio of 1
    rows = Moved(model.bodies.move(volume[None], code[:, None] * loading), noise**-2)
    rows = Moved(rows.volumes + noise * torch.randn(rows.volumes.shape, generator=generator), rows.strength)
    # only this motion is there: the others would add to the noise
    small = 1e-8 * model.covariance.diagonal().diag()
    known = dataclasses.replace(model, covariance=torch.outer(loading, loading) + small)
    grid, everyone, gain = Grid(SIZE, 10.0, SIZE, SIZE, 32), torch.arange(count), torch.ones(count)
    found = find_motions(known, rows, everyone, grid, at_rest(count, known, 1), 6, lambda parts, _: parts)
    shrunk = BodyResult(("a", "b"), known, found, found.motion, gain, 1)

    def left(result: BodyResult) -> float:
        """Of the motion in the rows, in units of the motion."""
        back = straight_rows(None, result, rows, grid, torch.device("cpu")).numerator(everyone)
        still = Moved(volume[None], rows.strength).numerator(torch.zeros(1, dtype=torch.long))
        seen = ((back - still) * column).sum((1, 2, 3)) / (column.square().sum() * rows.strength)
        return float(seen @ code / code.square().sum())

    freed = set_free(shrunk, rows, grid, torch.device("cpu"))
    assert left(shrunk) > 0.4 and abs(left(freed)) < 0.2
    # the poses are none of its business
    assert known.common(freed.free - found.motion).abs().max() < 1e-5 and torch.equal(
        freed.motions.motion, found.motion
    )


def test_which_part_moves_with_which_body_is_learned_from_the_data() -> None:
    """From a border four voxels away from the true one, at known motions."""
    volume = smooth(14)
    model, x = model_of(volume), centred_coordinates(SIZE)[..., 0]
    motion = torch.randn(48, 12, generator=torch.Generator().manual_seed(6)) * model.covariance.diagonal().sqrt()
    rows = Moved(model.bodies.move(volume[None], motion))
    wrong = soft_bodies(torch.stack([x + 2.0, -2.0 - x]), 1.0)
    true, found = model.bodies.weights, dataclasses.replace(at_rest(48, model, 2), motion=motion)
    model = dataclasses.replace(model, bodies=dataclasses.replace(model.bodies, weights=wrong))
    grid, everyone = Grid(SIZE, 10.0, SIZE, SIZE, 32), torch.arange(48)

    def astray(weights: torch.Tensor) -> float:
        return float(((weights[0] - true[0]).abs() * volume.abs()).sum() / volume.abs().sum())

    before = astray(wrong)
    for _ in range(6):
        model = divide(model, rows, everyone, grid, found, lambda parts, _: parts)
    assert torch.allclose(model.bodies.weights.sum(0), torch.ones(()), atol=1e-5)
    assert torch.equal(model.bodies.joints, model_of(volume).bodies.joints)
    assert astray(model.bodies.weights) < 0.4 * before


# ------------------------------------------------------------------------------------------------ files


def test_multibody_star_is_read_and_prepare_multi_keeps_it(tmp_path: Path) -> None:
    for i in (1, 2):
        mask = np.zeros((24,) * 3, np.float32)
        mask[6:18, 6:18, 4 + 8 * (i - 1) : 12 + 8 * (i - 1)] = 1.0
        write_volume(tmp_path / f"b{i}.mrc", mask, 10.0)
    columns = "_rlnBodyMaskName\n_rlnBodyRotateRelativeTo\n_rlnBodySigmaAngles\n_rlnBodySigmaOffset\n"
    star = tmp_path / "bodies.star"
    star.write_text(f"data_\n\nloop_\n{columns}b1.mrc 2 10 2\nb2.mrc 1 12 2\n")
    found = mask_files(str(star))
    assert [path.name for path in found.files] == ["b1.mrc", "b2.mrc"]
    assert found.relative == (1, 0) and [turn for turn, _ in found.sigma] == [10.0, 12.0]
    save_bodies(tmp_path / "mask_params.pkl", found, 24, 10.0)
    assert load_bodies(tmp_path / "mask_params.pkl") == dataclasses.replace(
        found, files=tuple(path.resolve() for path in found.files)
    )
    star.write_text(f"data_\n\nloop_\n{columns}b1.mrc 3 10 2\nb2.mrc 1 12 2\n")
    with pytest.raises(UserError, match=r"row 1: rlnBodyRotateRelativeTo 3 is no body"):
        mask_files(str(star))


def test_bodies_that_cannot_be_are_refused(tmp_path: Path) -> None:
    grid = Grid(24, 10.0, 24, 24, 32)
    mask = np.zeros((24,) * 3, np.float32)
    mask[6:18, 6:18, 6:18] = 1.0
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.mrc", mask, 10.0)
    one = str(tmp_path / "a.mrc")
    with pytest.raises(UserError, match="names 1 mask"):
        read_bodies(mask_files(one), grid)
    with pytest.raises(UserError, match="give bodies apart"):
        read_bodies(mask_files(f"{one},{tmp_path / 'b.mrc'}"), grid)
    with pytest.raises(UserError, match="no such mask"):
        read_bodies(BodyFiles((tmp_path / "a.mrc", tmp_path / "c.mrc"), (0, 1), ((1, 1), (1, 1))), grid)


def test_parts_share_the_density() -> None:
    density = smooth(13).abs()
    parts = parts_of(density, torch.ones_like(density), 3, 0, Grid(SIZE, 10.0, SIZE, SIZE, 32))
    inside = parts.distance < 0
    assert parts.distance.shape == (3, SIZE, SIZE, SIZE)
    assert bool((inside.sum(0) == 1).all())
    mass = (inside * density).sum((1, 2, 3)) / density.sum()
    assert float(mass.min()) > 0.15


# ------------------------------------------------------------------------------------------------ a set that turns


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> tuple[sets.SmallSet, Path, str]:
    """70S whose 30S turns by up to 20 degrees either way, with masks of both subunits, and a run of one epoch."""
    folder = tmp_path_factory.mktemp("turning")
    made = sets.make_set(folder / "set", states=(1,), rotation=(-20.0, 20.0), snr=2.0, rot_err=1.0)
    masks = str(made.folder / "bodies.star")
    assert sets.train(made, folder / "run", "-n", "1", "--masks", masks, "--encoderres", "0") == 0
    return made, folder / "run", masks


@pytest.mark.slow
def test_conformation_is_the_angle_of_every_particle(turning: tuple[sets.SmallSet, Path, str]) -> None:
    made, folder, _ = turning
    run = checkpoint.open_run(folder)
    hinge = np.load(made.folder / "labels.npz")["hinge"]
    assert run.conformation is not None and run.conformation.shape == (60, 4)
    assert abs(np.corrcoef(run.conformation[:, 0], hinge)[0, 1]) > 0.95
    # the composition code, such as it is, does not know of it
    assert abs(np.corrcoef(run.codes[:, 0], hinge)[0, 1]) < 0.5
    with (folder / "bodies" / "motions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    turn = np.array(
        [[float(r[f"{b}_r{a}"]) for a in "xyz"] for b in ("body_large", "body_small") for r in rows]
    ).reshape(2, 60, 3)
    relative = turn[1] - turn[0]
    assert np.polyfit(hinge, relative @ intersubunit_axis()[1], 1)[0] == pytest.approx(1.0, abs=0.15)
    axis = np.linalg.svd(relative - relative.mean(0))[2][0]
    assert math.degrees(math.acos(min(1.0, abs(float(axis @ intersubunit_axis()[1]))))) < 8.0
    assert "bodies: evidence of held-out particles" in (folder / "run.log").read_text()
    # a particle's own density is shown as it moves
    moving, still = (
        evaluate(seen, made.folder)["volumes"]["particle_fsc_area"]
        for seen in (run, dataclasses.replace(run, conformation=None))
    )
    assert moving > still + 0.02


@pytest.mark.slow
def test_a_run_with_bodies_goes_on_and_keeps_its_bodies(
    turning: tuple[sets.SmallSet, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, folder, _ = turning
    once = sets.copy_run(folder, tmp_path / "once", 0)
    before = checkpoint.open_run(once)
    assert cli.main(["train", "--resume", str(once), "-n", "2"]) == 0
    after = checkpoint.open_run(once)
    assert after.epoch == 1
    assert np.array_equal(after.conformation, before.conformation)
    assert torch.equal(after.bodies.model.mean, before.bodies.model.mean)
    # the rows that were kept are read, not made again
    assert len(list((once / "bodies").glob("straight.*.rows"))) == 1
    assert sets.train(made, tmp_path / "once", "--load", "latest", "--masks", "auto:3", "-n", "3") == 2
    assert "--masks auto:3" in capsys.readouterr().err
    rows = next((once / "bodies").glob("straight.*.rows"))
    content = bytearray(rows.read_bytes())
    content[20] ^= 1
    rows.write_bytes(content)
    assert cli.main(["train", "--resume", str(once), "-n", "3"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--masks auto:1", "give a number of parts from 2 to 12"),
        ("--masks auto:x", "give a number of parts from 2 to 12"),
        ("--masks none1.mrc,none2.mrc", "none1.mrc: no such mask of a body"),
        ("--masks auto:2 --zaffinedim 7", "2 bodies move against each other in 6 ways"),
        ("--masks auto:2 --encode-mode fixed", "makes one map without motions"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_fitted(
    options: str, words: str, small_set: sets.SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sets.train(small_set, tmp_path / "run", *options.split()) == 2
    said = capsys.readouterr().err
    assert words in said and "held-out evidence" not in said


@pytest.mark.slow
def test_parts_of_the_density_move_as_bodies(turning: tuple[sets.SmallSet, Path, str], tmp_path: Path) -> None:
    """auto:2, nobody having said where the subunits are."""
    made, _, _ = turning
    assert sets.train(made, tmp_path / "run", "-n", "1", "--masks", "auto:2", "--encoderres", "0") == 0
    run = checkpoint.open_run(tmp_path / "run")
    hinge = np.load(made.folder / "labels.npz")["hinge"]
    assert run.conformation is not None
    assert max(abs(np.corrcoef(code, hinge)[0, 1]) for code in run.conformation.T) > 0.95
    assert abs(np.corrcoef(run.codes[:, 0], hinge)[0, 1]) < 0.5
    # what it found, in the box of the subtomograms: each true body lies in one part
    parts = [read_volume(tmp_path / "run" / "bodies" / f"part{k}.mrc")[0] for k in (1, 2)]
    for body in ("large", "small"):
        inside = read_volume(made.folder / f"body_{body}.mrc")[0] > 0.5
        shares = [float(part[inside].mean()) for part in parts]
        assert max(shares) > 0.7 and min(shares) < 0.3


@pytest.mark.slow
def test_encode_finds_the_motions_of_other_particles(turning: tuple[sets.SmallSet, Path, str], tmp_path: Path) -> None:
    _, folder, _ = turning
    other = sets.make_set(tmp_path / "other", seed=8, states=(1,), rotation=(-20.0, 20.0), snr=2.0, rot_err=1.0)
    line = ["encode", str(folder), str(other.star), "-o", str(tmp_path / "more"), "--workers", "1", "--device", "cpu"]
    assert cli.main(line) == 0
    run, before = checkpoint.open_run(tmp_path / "more"), checkpoint.open_run(folder)
    hinge, trained = (np.load(of / "labels.npz")["hinge"] for of in (other.folder, turning[0].folder))
    assert run.conformation is not None and before.conformation is not None
    slope, start = np.polyfit(trained, before.conformation[:, 0], 1)
    # in the same units: the new code tells the angle by the line of those that were trained on
    assert np.sqrt(np.mean(((run.conformation[:, 0] - start) / slope - hinge) ** 2)) < 4.0
    assert (tmp_path / "more" / "bodies" / "motions.csv").is_file()
    assert cli.main(["evaluate", str(tmp_path / "more"), "--truth", str(other.folder)]) == 0
    motion = json.loads((tmp_path / "more" / "evaluation.json").read_text())["motion"]
    assert motion["angle_corr"] > 0.95 and motion["slope"] == pytest.approx(1.0, abs=0.15)
    assert motion["swept"] == pytest.approx(1.0, abs=0.15)
    assert motion["axis_degrees"] < 8.0 and motion["axis_voxels"] < 1.0


@pytest.mark.slow
def test_maps_along_the_conformation_turn_the_subunit(turning: tuple[sets.SmallSet, Path, str], tmp_path: Path) -> None:
    """The ends of the traversal are nearer to the truth's ends than its middle is."""
    made, folder, _ = turning
    assert cli.main(["volumes", str(folder), "--conformation", "1", "-o", str(tmp_path / "maps")]) == 0
    maps = [read_volume(tmp_path / "maps" / f"reference{i}.mrc")[0] for i in range(10)]
    code = checkpoint.open_run(folder).conformation
    assert code is not None
    hinge = np.load(made.folder / "labels.npz")["hinge"]
    ends = (-1, 0) if np.corrcoef(code[:, 0], hinge)[0, 1] > 0 else (0, -1)  # of the largest and the smallest angle
    truth = [read_volume(made.folder / "gt" / f"state1_hinge{angle}.mrc")[0] for angle in ("+20.0", "-20.0")]
    crop = maps[0].shape[0]
    change = torch.from_numpy(truth[0] - truth[1])
    small = fourier_resize(change, 16).numpy()
    assert crop == 16
    assert np.corrcoef((maps[ends[0]] - maps[ends[1]]).ravel(), small.ravel())[0, 1] > 0.7
    assert cli.main(["volumes", str(folder), "--conformation", "5", "-o", str(tmp_path / "none")]) == 2


def test_prepare_multi_leaves_poses_and_bodies(small_set: sets.SmallSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(small_set.folder, folder)
    for i in (1, 2):
        mask = np.zeros((24,) * 3, np.float32)
        mask[6:18, 6:18, 4 + 8 * (i - 1) : 12 + 8 * (i - 1)] = 1.0
        write_volume(folder / f"b{i}.mrc", mask, sets.PIXEL)
    (folder / "masks.star").write_text("data_\n\nloop_\n_rlnBodyMaskName\nb1.mrc\nb2.mrc\n")
    line = ["prepare_multi", str(folder / "particles.star"), "24", str(sets.PIXEL), str(folder / "masks.star")]
    assert dsdsh.main([*line, "3"]) == 2
    assert dsdsh.main([*line, "2"]) == 0
    assert (folder / "particles_pose_euler.pkl").is_file()
    found = load_bodies(folder / "mask_params.pkl")
    assert [path.name for path in found.files] == ["b1.mrc", "b2.mrc"]
