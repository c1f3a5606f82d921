"""Rigid motion of one body against another: axis, angle, and how much of a movement is one rotation.

Owns: what is read off motions of bodies (see ``opustomo.bodies``), of particles or of a series of maps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from opustomo.bodies import DOF, Bodies
from opustomo.data.atomic import write_csv

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

Floats = NDArray[np.float64]
COLUMNS = ("series", "fixed", "moving", "axis_x", "axis_y", "axis_z", "point_x_A", "point_y_A", "point_z_A",
           "swept_deg", "coherence", "slide_A", "displacement_A")  # fmt: skip
POINTS = 10  # along a conformation
FEW = 0.05  # of the largest singular value: along what is smaller the turns say nothing about where the axis is


@dataclass(frozen=True)
class Hinge:
    """How body ``moving`` turns against body ``fixed`` over n motions, in the frame of the consensus map.

    axis: (3,) unit vector; point: (3,) of the axis, nearest to the middle of the moving body, voxels from C//2; angle:
    (n,) degrees about it, right-handed; coherence: share of the squared turns that is about the axis, 1 for a pure
    hinge; slide: standard deviation of the shift along the axis, voxels; displacement: root mean square of how far the
    density is moved by the two, voxels.
    """

    fixed: int
    moving: int
    axis: Floats
    point: Floats
    angle: Floats
    coherence: float
    slide: float
    displacement: float

    @property
    def swept(self) -> float:
        """Degrees from the 5th to the 95th percentile of the angles."""
        return float(np.subtract(*np.percentile(self.angle, [95, 5])))


def hinges(bodies: Bodies, motion: Tensor) -> list[Hinge]:
    """The hinge of every pair of bodies, those that move most first; motion (n, 6 B), n at least 2."""
    pairs = itertools.combinations(range(len(bodies)), 2)
    found = [_hinge(bodies, motion, fixed, moving) for fixed, moving in pairs]
    return sorted(found, key=lambda hinge: -hinge.displacement)


def spread_of(hinge: Hinge, covariance: Tensor) -> float:
    """Standard deviation in degrees of the angle in a set whose motions have this covariance (6 B, 6 B).

    That of the angles found of particles is smaller: noise draws each to the mean.
    """
    direction = np.zeros(len(covariance))
    direction[DOF * hinge.moving : DOF * hinge.moving + 3] = hinge.axis
    direction[DOF * hinge.fixed : DOF * hinge.fixed + 3] = -hinge.axis
    return math.degrees(math.sqrt(direction @ covariance.double().numpy() @ direction))


def write_dynamics(run: Run, folder: Path) -> None:
    """dynamics.csv: hinge of every pair of bodies in all motions, along every component and every conformation.

    A row of a series (``all``; ``pc1``, ... as traversed; ``y1``, ...) and a pair: axis in the consensus frame, a point
    on it in Angstrom from voxel N//2, degrees swept (5th to 95th percentile), coherence, slide and displacement in
    Angstrom.  The pair that moves most first.
    """
    bodies, pixel = run.bodies, run.grid.working_pixel
    loading, sizes = bodies.model.modes(bodies.dimensions)
    codes = torch.from_numpy(np.asarray(run.codes[:, -bodies.dimensions :], np.float32))
    series = {"all": bodies.motions.motion if run.rows is None else bodies.motions.motion[torch.from_numpy(run.rows)]}
    for path in sorted(folder.glob("pc*/z_pc.txt"), key=lambda path: int(path.parent.name[2:])):
        along = np.loadtxt(path, ndmin=2)[:, -bodies.dimensions :]
        series[path.parent.name] = torch.from_numpy(along).float() @ loading.T
    for number in torch.nonzero(sizes > 0)[:, 0].tolist():
        first, last = (float(codes[:, number].quantile(q)) for q in (0.05, 0.95))
        code = torch.linspace(first, last, POINTS)
        series[f"y{number + 1}"] = code[:, None] * loading[:, number]
    rows = []
    for name, motion in series.items():
        for hinge in hinges(bodies.model.bodies, motion):
            names = [name, bodies.names[hinge.fixed], bodies.names[hinge.moving]]
            rows.append([*names, *cells(hinge, pixel)])
    write_csv(folder / "dynamics.csv", COLUMNS, rows)


def cells(hinge: Hinge, pixel: float) -> list[str]:
    """The numbers of a hinge as in dynamics.csv; pixel: Angstrom of a voxel."""
    lengths = hinge.slide * pixel, hinge.displacement * pixel
    numbers = [*hinge.axis, *(hinge.point * pixel), hinge.swept, hinge.coherence, *lengths]
    return [f"{value:.4g}" for value in numbers]


def relative(bodies: Bodies, motion: Tensor, fixed: int, moving: int) -> tuple[Rotation, Floats]:
    """n rotations R and shifts t (n, 3), voxels: seen from ``fixed``, a point x of ``moving`` is at ``R x + t``.

    x from voxel C//2.
    """
    joints = bodies.joints.double().numpy()
    parts = motion.double().numpy().reshape(len(motion), -1, DOF)
    turns = [Rotation.from_rotvec(parts[:, b, :3]) for b in (fixed, moving)]
    shifts = [
        joints[b] + parts[:, b, 3:] - turn.apply(joints[b]) for b, turn in zip((fixed, moving), turns, strict=True)
    ]
    back = turns[0].inv()
    return back * turns[1], back.apply(shifts[1] - shifts[0])


def _hinge(bodies: Bodies, motion: Tensor, fixed: int, moving: int) -> Hinge:
    (mass, _), (other, middle) = mass_of(bodies, fixed), mass_of(bodies, moving)
    if mass < other:  # the heavier one is called fixed
        return _hinge(bodies, motion, moving, fixed)
    turn, shift = relative(bodies, motion, fixed, moving)
    vectors = turn.as_rotvec()
    # about their mean: what all share is where the map stands, not a movement
    _, strength, axes = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    axis: Floats = axes[0] * (1.0 if axes[0][np.abs(axes[0]).argmax()] > 0 else -1.0)
    # (1 - R) p = t for every point p of the axis, but for what slides along it
    system = (np.eye(3) - turn.as_matrix()).reshape(-1, 3)
    wanted = (shift - np.outer(shift @ axis, axis)).ravel() - system @ middle
    away = np.linalg.lstsq(system, wanted, rcond=FEW)[0]
    point: Floats = middle + away - (away @ axis) * axis
    pair = torch.zeros_like(motion)
    for body in (fixed, moving):
        pair[:, DOF * body : DOF * (body + 1)] = motion[:, DOF * body : DOF * (body + 1)]
    pair = (pair - pair.mean(0)).to(bodies.metric)
    square = float(torch.einsum("ni,ij,nj->n", pair, bodies.metric, pair).mean())
    share = float(strength[0] ** 2 / max(float((strength**2).sum()), 1e-20))
    slide = float((shift @ axis).std())
    return Hinge(fixed, moving, axis, point, np.rad2deg(vectors @ axis), share, slide, math.sqrt(max(square, 0.0)))


def mass_of(bodies: Bodies, body: int) -> tuple[float, Floats]:
    """Share of the density in a body, and the middle of it (3,) in voxels from C//2; both are in the metric."""
    start = DOF * body
    block = bodies.metric[start : start + DOF, start : start + DOF].double().numpy()
    mass = float(block[3:, 3:].diagonal().mean())
    crossed = block[:3, 3:] / max(mass, 1e-12)  # of the arm from the joint
    arm = np.array([crossed[2, 1], crossed[0, 2], crossed[1, 0]])
    return mass, bodies.joints[body].double().numpy() + arm
