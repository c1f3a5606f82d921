"""Series of maps: a hinge is told from density that comes and goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.analysis.series_motion import rigid_motion
from opustomo.physics.grid import Grid
from opustomo.physics.volume import centred_coordinates
from opustomo.simulate.bead_model import assemble, intersubunit_axis
from opustomo.simulate.molecule import gaussian_volume

BOX, PIXEL = 24, 15.0
GRID = Grid(BOX, PIXEL, BOX, BOX, 32)
MASK = (centred_coordinates(BOX).norm(dim=-1) < 11).float()


def ribosomes(state: int, angles: np.ndarray) -> torch.Tensor:
    maps = [gaussian_volume(assemble(state, angle), BOX, PIXEL) for angle in angles]
    return torch.from_numpy(np.stack(maps)) * MASK


def test_a_subunit_that_turns_is_found_with_its_axis() -> None:
    hinge, explained = rigid_motion(ribosomes(1, np.linspace(-12, 12, 7)), MASK, GRID)
    point, axis = intersubunit_axis()
    assert explained > 0.8 and hinge.coherence > 0.95
    assert math.degrees(math.acos(min(1.0, abs(float(hinge.axis @ axis))))) < 10
    assert np.ptp(hinge.angle) == pytest.approx(24.0, rel=0.2)
    away = hinge.point * PIXEL - point
    assert np.linalg.norm(away - (away @ axis) * axis) < 2 * PIXEL


def test_density_that_comes_and_goes_is_no_motion() -> None:
    with_it, without = ribosomes(1, np.zeros(1))[0], ribosomes(0, np.zeros(1))[0]
    share = torch.linspace(0, 1, 7)[:, None, None, None]
    _, explained = rigid_motion(share * with_it + (1 - share) * without, MASK, GRID)
    assert explained < 0.5


def test_the_motion_is_that_of_the_parts_not_of_the_frame() -> None:
    """Turned as a whole, the same series has its axis turned along."""
    turn = Rotation.from_euler("z", 90, degrees=True)
    series = ribosomes(1, np.linspace(-12, 12, 5))
    # voxels (z, y, x): 90 degrees about z takes x to y
    turned = torch.rot90(series, 1, (3, 2)).roll(1, 3)
    first, second = (rigid_motion(maps, MASK, GRID)[0] for maps in (series, turned))
    assert abs(float(turn.apply(first.axis) @ second.axis)) > 0.97
