"""The mini-ribosome: a 70S of about 500 Gaussian beads in states 50S, 70S, 70S+P and 70S+A,P,E, with a turning 30S.

Owns: the packaged bead file (from PDB 4V5D, CC0; made by ``tools/build_bead_model.py``), its states and how its 30S
turns.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.simulate.molecule import Beads, Molecule, together

# The domains of each state.  The mRNA is part of the 30S.
STATES: tuple[tuple[str, ...], ...] = (
    ("50S",),
    ("50S", "30S"),
    ("50S", "30S", "tRNA_P"),
    ("50S", "30S", "tRNA_A", "tRNA_P", "tRNA_E"),
)
STATE_NAMES = ("50S", "70S", "70S+P", "70S+A,P,E")
MOBILE = "30S"  # the domain that turns; the tRNAs stay with the 50S, which is a simplification


@cache
def domains() -> dict[str, Beads]:
    """Beads of every domain at rotation 0, by name: 50S, 30S, tRNA_A, tRNA_P, tRNA_E."""
    text = resources.files("opustomo.simulate").joinpath("beads_70s.json").read_text()
    table = {key: np.array(rows) for key, rows in json.loads(text).items() if isinstance(rows, list)}
    return {key: Beads(rows[:, :3], rows[:, 3], rows[:, 4]) for key, rows in table.items()}


@cache
def intersubunit_axis() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Point (3,) and unit direction (3,) of the axis about which the 30S turns.

    The line through both subunits' centres of mass, pointing from the 50S to the 30S: a positive angle turns the 30S
    counter-clockwise as seen from its solvent side, as it moves during translocation.
    """
    large, small = (np.average(domains()[name].centre, axis=0, weights=domains()[name].weight) for name in STATES[1])
    return (large + small) / 2, (small - large) / np.linalg.norm(small - large)


def subunits() -> dict[str, Beads]:
    """The two bodies that turn against each other by name, every domain in the one it moves with."""
    parts: dict[str, list[Beads]] = {"large": [], "small": []}
    for name, beads in domains().items():
        parts["small" if name == MOBILE else "large"].append(beads)
    return {body: together(beads) for body, beads in parts.items()}


def assemble(state: int, rotation_deg: float) -> Beads:
    """The ribosome in ``state`` (index into STATES) with the 30S turned by ``rotation_deg`` degrees.

    The frame is fixed by the 70S without tRNA at rotation 0, whatever the state: its centre is the origin.
    """
    point, axis = intersubunit_axis()
    turn = Rotation.from_rotvec(np.deg2rad(rotation_deg) * axis).as_matrix()
    parts = []
    for name in STATES[state]:
        beads = domains()[name]
        parts.append(beads.moved(turn, point - turn @ point) if name == MOBILE else beads)
    return together(parts)


def random_blob(rng: np.random.Generator) -> Beads:
    """A decoy: a shapeless particle with the mass and roughly the size of a ribosomal subunit or more."""
    count = int(rng.integers(60, 200))
    radii = rng.uniform(30, 80, 3)
    centre = rng.normal(size=(count, 3)) * radii / 1.5
    return Beads(centre - centre.mean(0), rng.uniform(4.5, 7, count), rng.uniform(2000, 4000, count))


RIBOSOME = Molecule(
    names=STATE_NAMES,
    moves=tuple(MOBILE in parts for parts in STATES),
    at=assemble,
    bodies=subunits,
    known=lambda _: {"hinge_axis": np.stack(intersubunit_axis()[::-1])},
    width=360.0,
)
