"""Which parts of a molecule move as one between two conformations, and about which axis.

Owns: the largest rigid core, the parts beside it, and their hinges.  Places are (J, 3) in Angstrom, x, y, z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RIGID = 3.0  # Angstrom from where its body takes it: an atom that belongs to it
SMALLEST = 0.08  # of the atoms: fewer are a loop, not a body
FEWEST = 6  # atoms that fix a rotation well enough
EXACT = 0.01  # Angstrom: no file tells more
FAR = 3.0  # times the median
LEAST_TURN = 5.0  # degrees
ROUNDS = 30


@dataclass(frozen=True)
class Part:
    """One body: its atoms, and the rotation (3, 3) and shift (3,) that take it from the first conformation to the last.

    Both conformations lie on the core, whose own rotation is none.
    """

    atoms: Ints
    rotation: Floats
    shift: Floats

    @property
    def angle(self) -> float:
        """Degrees."""
        return float(np.rad2deg(np.linalg.norm(Rotation.from_matrix(self.rotation).as_rotvec())))

    @property
    def axis(self) -> Floats:
        """(3,) unit direction, right-handed."""
        vector: Floats = Rotation.from_matrix(self.rotation).as_rotvec()
        return vector / float(np.linalg.norm(vector))

    @property
    def point(self) -> Floats:
        """(3,) the point of the axis that is nearest to the origin."""
        across = self.shift - (self.shift @ self.axis) * self.axis
        point = np.asarray(np.linalg.lstsq(np.eye(3) - self.rotation, across, rcond=1e-9)[0], np.float64)
        return point


def superposition(moving: Floats, fixed: Floats) -> tuple[Floats, Floats]:
    """Rotation R and shift t of the least squares ``moving @ R.T + t = fixed``."""
    middle, wanted = moving.mean(0), fixed.mean(0)
    rotation: Floats = Rotation.align_vectors(fixed - wanted, moving - middle)[0].as_matrix()
    return rotation, wanted - rotation @ middle


def rigid_core(first: Floats, last: Floats, among: Ints) -> Ints:
    """The most of the atoms ``among`` that one rotation and shift take to within RIGID of their place in ``last``.

    Atoms are in the order of the chain: the search begins at every stretch of it.
    """
    width = max(FEWEST, len(among) // 10)
    best = np.zeros(0, np.int64)
    for start in range(0, len(among) - width + 1, max(1, width // 2)):
        core = among[start : start + width]
        for _ in range(ROUNDS):
            rotation, shift = superposition(first[core], last[core])
            near = among[np.linalg.norm(first[among] @ rotation.T + shift - last[among], axis=1) < RIGID]
            if len(near) < width or np.array_equal(near, core):
                break
            core = near
        if len(core) > len(best):
            best = core
    return _without_edges(first, last, best)


def _without_edges(first: Floats, last: Floats, core: Ints) -> Ints:
    """The core without those that it takes much further off than most: by a hinge another body is never far away.

    Least trimmed squares: what the better half agrees on.
    """
    half = core
    off = np.zeros(0)
    for _ in range(ROUNDS if len(core) else 0):
        rotation, shift = superposition(first[half], last[half])
        off = np.linalg.norm(first[core] @ rotation.T + shift - last[core], axis=1)
        better = core[np.argsort(off, kind="stable")[: max(FEWEST, len(core) // 2)]]
        if np.array_equal(better, half):
            break
        half = better
    return core[off <= max(FAR * float(np.median(off)), EXACT)] if len(core) else core


def rigid_parts(first: Floats, last: Floats, core: Ints) -> list[Part]:
    """The bodies that turn against the core, the largest first; both conformations lie on the core."""
    return sorted(_parts(first, last, core), key=lambda part: -len(part.atoms))


def _parts(first: Floats, last: Floats, core: Ints) -> Iterator[Part]:
    least = max(FEWEST, round(SMALLEST * len(first)))
    left = np.setdiff1d(np.arange(len(first)), core)
    while len(left) >= least:
        atoms = rigid_core(first, last, left)
        if len(atoms) < least:
            return
        part = Part(atoms, *superposition(first[atoms], last[atoms]))
        if part.angle >= LEAST_TURN:
            yield part
        left = np.setdiff1d(left, atoms)


def membership(first: Floats, last: Floats, parts: list[Part]) -> Ints:
    """(J,) 0 for the core, i + 1 for part i: the body that takes each atom nearest to its place in ``last``."""
    taken = [first, *(first @ part.rotation.T + part.shift for part in parts)]
    return np.argmin([np.linalg.norm(place - last, axis=1) for place in taken], axis=0)


def turned(part: Part, first: Floats, places: Floats) -> float:
    """Degrees about the part's axis from ``first`` to ``places``, right-handed; all on the core."""
    rotation, _ = superposition(first[part.atoms], places[part.atoms])
    return float(np.rad2deg(Rotation.from_matrix(rotation).as_rotvec() @ part.axis))
