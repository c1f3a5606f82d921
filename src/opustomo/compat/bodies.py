"""The bodies' pickle of ``dsdsh prepare_multi``: written beside the STAR file, read by ``--masks``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opustomo.compat.legacy_files import load_pickle, save_pickle
from opustomo.data.bodies import BodyFiles
from opustomo.data.inputs import read_mask
from opustomo.errors import UserError
from opustomo.physics.volume import centred_coordinates


def save_bodies(path: Path, bodies: BodyFiles, box: int, pixel_size: float) -> None:
    """Which masks, what each turns against, first guesses of the motions; centres, principal axes and radii in pixels.

    axes: (B, 3, 3), rows (x, y, z), the longest first; radii (B, 3): of the ellipsoid with the mask's moments.
    """
    place = centred_coordinates(box).numpy().reshape(-1, 3).astype(np.float64)
    inside = [place[read_mask(file, box, pixel_size).numpy().ravel() > 0.5] for file in bodies.files]
    moments = [np.linalg.eigh(np.cov((points - points.mean(0)).T)) for points in inside]
    save_pickle(path, {
        "masks": [str(file.resolve()) for file in bodies.files], "relative": list(bodies.relative),
        "sigma": [list(pair) for pair in bodies.sigma], "box": box, "pixel_size": pixel_size,
        "centres": np.array([points.mean(0) for points in inside]),
        "axes": np.array([vectors[:, ::-1].T for _, vectors in moments]),
        "radii": np.array([np.sqrt(5.0 * values[::-1].clip(0)) for values, _ in moments]),
    })  # fmt: skip


def load_bodies(path: Path) -> BodyFiles:
    """The inverse of ``save_bodies``; UserError where it is something else."""
    found = load_pickle(path)
    try:
        files = tuple(Path(str(name)) for name in found["masks"])
        relative = tuple(int(number) for number in found["relative"])
        sigma = tuple((float(turn), float(shift)) for turn, shift in found["sigma"])
        if not len(files) == len(relative) == len(sigma) or not set(relative) <= set(range(len(files))):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: does not hold bodies; make it with `dsdsh prepare_multi STAR BOX APIX MASKS.star NBODIES`"
        ) from None
    return BodyFiles(files, relative, sigma)
