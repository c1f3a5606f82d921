"""PDB files of a made-up protein: two domains on a hinge, written by hand from the description of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.data.atomic import write_text

RESIDUES, MOVING = 60, 22  # the last ones turn
NAMES = ("N", "CA", "C", "O", "CB", "SG")
AXIS, POINT = np.array([2.0, -1.0, 2.0]) / 3, np.array([6.0, 3.0, -2.0])
ATOMS = RESIDUES * len(NAMES)


def places(angle: float) -> NDArray[np.float64]:
    """(ATOMS, 3) in Angstrom: a walk within two balls, the second turned by ``angle`` degrees about AXIS at POINT."""
    rng = np.random.default_rng(3)
    still = RESIDUES - MOVING
    fixed = rng.uniform(-1, 1, (still, 3)) * [14, 11, 9]
    moving = rng.uniform(-1, 1, (MOVING, 3)) * [8, 9, 8] + [18.0, 4.0, 1.0]
    trace = np.concatenate([fixed, moving])
    atoms = trace[:, None] + rng.normal(0, 1.5, (RESIDUES, len(NAMES), 3)) * (np.array(NAMES) != "CA")[:, None]
    turn = Rotation.from_rotvec(np.deg2rad(angle) * AXIS)
    atoms[still:] = turn.apply((atoms[still:] - POINT).reshape(-1, 3)).reshape(MOVING, -1, 3) + POINT
    return atoms.reshape(-1, 3)


def pdb(atoms: NDArray[np.float64], *, elements: bool = True, bfactor: float = 20.0, chain: str = "A") -> str:
    """elements False: as programs of molecular dynamics write it, no columns 77-78 and names from the first column."""
    lines = []
    for i, (x, y, z) in enumerate(atoms):
        name = NAMES[i % len(NAMES)]
        word = f" {name:<3}" if elements else f"{name:<4}"
        head = f"ATOM  {i + 1:5d} {word} CYS {chain}{i // len(NAMES) + 1:4d}    "
        lines.append(
            f"{head}{x:8.3f}{y:8.3f}{z:8.3f}  1.00{bfactor:6.2f}" + (f"{'':10}{name[0]:>2}" if elements else "")
        )
    return "\n".join([*lines, "END", ""])


def two_models(*angles: float) -> str:
    """Conformations as models of one file."""
    models = [pdb(places(angle)).removesuffix("END\n") for angle in angles or (0.0, 32.0)]
    text = "".join(f"MODEL     {number:4d}\n{model}ENDMDL\n" for number, model in enumerate(models, 1))
    return text + "END\n"


def written(path: Path, angle: float = 0.0, **options: object) -> Path:
    """The file of one conformation."""
    write_text(path, pdb(places(angle), **options))  # type: ignore[arg-type]
    return path
