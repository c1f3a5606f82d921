"""Moved poses: units, sign and gauge of a move against numpy and scipy alone, and what the rows make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.config import GridOptions, InputOptions
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.observe import Noise, observe
from opustomo.data.particles import Particles
from opustomo.data.poses import move_poses, moved_from, same_poses
from opustomo.physics.fourier import band_frequencies, band_multiplicity
from opustomo.physics.observation import model_band
from small_set import PARTICLES, SmallSet, gaussians


@pytest.fixture(scope="module")
def inputs(small_set: SmallSet) -> Inputs:
    """Box 24, working box 16: a move of two working voxels is one of three pixels."""
    return read_inputs(small_set.star, InputOptions(), GridOptions(mask=small_set.mask, downfrac=0.7))


def moves(seed: int, turn: float = 0.1, shift: float = 0.8) -> torch.Tensor:
    """(P, 6) random moves without a common part, in radians and working voxels."""
    made = torch.randn((PARTICLES, 6), generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [turn] * 3 + [shift] * 3
    )
    return made - made.mean(0)


def positions(particles: Particles, points: np.ndarray) -> np.ndarray:
    """(P, n, 3) where points (n, 3) of the consensus lie in the subtomograms, pixels from N//2: ``A x - origin``."""
    return np.einsum("pij,nj->pni", particles.rotation, points) - particles.origin[:, None]


def test_move_is_that_of_the_density(inputs: Inputs) -> None:
    """``V'(x) = V(R^T (x - t))`` puts the bead at c on ``R c + t``: there the moved pose sees the bead of V."""
    beads = np.random.default_rng(2).normal(0, 4, (5, 3))
    move = moves(0)
    moved = move_poses(inputs.particles, move, inputs.grid)
    turn = Rotation.from_rotvec(move[:, :3].numpy())
    shift = move[:, 3:].numpy() * 24 / 16
    assert (inputs.grid.box, inputs.grid.working_box) == (24, 16)
    for i in range(PARTICLES):
        in_place = turn[i].apply(beads) + shift[i]
        expected = positions(inputs.particles, in_place)[i]
        assert np.allclose(positions(moved, beads)[i], expected, atol=1e-5)


def test_angles_follow_the_matrices(inputs: Inputs) -> None:
    moved = move_poses(inputs.particles, moves(1), inputs.grid)
    zyz = Rotation.from_euler("ZYZ", moved.euler, degrees=True).as_matrix().swapaxes(1, 2)
    assert np.allclose(zyz, moved.rotation, atol=1e-6)
    assert not np.allclose(moved.euler, inputs.particles.euler, atol=1.0)


@pytest.mark.parametrize(("turn", "shift"), [(0.03, 0.2), (0.8, 3.0)])
def test_distance_from_the_given_poses_is_the_move(inputs: Inputs, turn: float, shift: float) -> None:
    move = moves(2, turn, shift)
    moved = move_poses(inputs.particles, move, inputs.grid)
    assert torch.allclose(moved_from(moved, inputs.particles, inputs.grid), move, atol=1e-5)
    assert torch.equal(moved_from(inputs.particles, inputs.particles, inputs.grid)[:, 3:], torch.zeros(PARTICLES, 3))


def test_small_moves_add_up(inputs: Inputs) -> None:
    """Two rounds: the distance from the poses given is the sum of the moves, to first order."""
    first, second = moves(3, 0.01, 0.1), moves(4, 0.01, 0.1)
    twice = move_poses(move_poses(inputs.particles, first, inputs.grid), second, inputs.grid)
    total = moved_from(twice, inputs.particles, inputs.grid)
    assert torch.allclose(total, first + second, atol=0.015)
    assert float((total - first).abs().max()) > 0.2


def test_common_move_is_none(inputs: Inputs) -> None:
    common = torch.tensor([0.1, -0.2, 0.05, 1.0, 2.0, -1.0])
    alike = move_poses(inputs.particles, common.expand(PARTICLES, 6), inputs.grid)
    assert np.allclose(alike.rotation, inputs.particles.rotation, atol=1e-7)
    assert np.allclose(alike.origin, inputs.particles.origin, atol=1e-6)
    move = moves(5, 0.02, 0.3)
    found = moved_from(move_poses(inputs.particles, move + common, inputs.grid), inputs.particles, inputs.grid)
    assert torch.allclose(found, move, atol=1e-5)


def test_tables_of_other_poses_are_told_apart(inputs: Inputs) -> None:
    same = replace(inputs.particles, rotation=inputs.particles.rotation.copy())
    assert same_poses(same, inputs.particles)
    shifted = replace(inputs.particles, origin=inputs.particles.origin + np.eye(PARTICLES, 3) * 1e-6)
    assert not same_poses(shifted, inputs.particles)
    turned = move_poses(inputs.particles, moves(6) * torch.tensor([1.0, 1, 1, 0, 0, 0]), inputs.grid)
    assert not same_poses(turned, inputs.particles)


def test_moved_pose_sees_the_density_that_the_move_explains(inputs: Inputs) -> None:
    """``<V', B>`` and ``<V', W V'>`` at the poses given are those of V at the moved poses: the same likelihood."""
    grid, size = inputs.grid, inputs.grid.working_box
    noise = Noise(torch.ones(len(band_frequencies(size))), 1.0, False, torch.zeros(size // 2 + 1))
    beads = np.array([[3.0, 1, -3], [-3, -2, 1], [1, 3, 2]])
    density = gaussians(grid.crop, beads, 1.4)
    few = inputs.particles.subset(np.arange(8))
    move = moves(7, 0.3, 1.0)[:8]
    move = move - move.mean(0)
    moved = move_poses(few, move, grid)
    seen = []
    for i in range(8):
        at = Rotation.from_rotvec(move[i, :3].numpy()).apply(beads) + move[i, 3:].numpy()
        displaced = gaussians(grid.crop, at, 1.4)
        pairs = ((displaced, few), (density, moved), (density, few))
        seen.append([_overlap_and_power(v, *observe(p, i, grid, noise), size) for v, p in pairs])
    expected, found, unmoved = torch.tensor(seen).unbind(1)  # (8, 2) each
    error = ((found - expected).norm(dim=0) / expected.norm(dim=0)).tolist()
    assert max(error) < 0.05, error
    wrong = ((unmoved - expected).norm(dim=0) / expected.norm(dim=0)).tolist()
    assert wrong[0] > 10 * error[0] and wrong[1] > 2.5 * error[1], (wrong, error)


def _overlap_and_power(
    volume: torch.Tensor, numerator: torch.Tensor, weight: torch.Tensor, size: int
) -> tuple[float, float]:
    power = model_band(volume, size).abs().square() * weight * band_multiplicity(size)
    return float((volume * numerator).sum()), float(power.sum())
