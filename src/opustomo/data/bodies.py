"""Rigid bodies as users give them: masks, a multi-body STAR file, a pickle of ``dsdsh``, or a number of parts.

Owns: what is asked of body masks; what comes out is a signed distance to every body on the working grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from opustomo.data.inputs import read_mask
from opustomo.data.pickles import load_pickle, save_pickle
from opustomo.data.star import read_star, write_star
from opustomo.errors import UserError
from opustomo.physics.grid import Grid
from opustomo.physics.volume import centred_coordinates, sample_at

AUTO = "auto:"
SIGMA = (6.0, 5.0)  # degrees, Angstrom: motions looked for first, where RELION's STAR does not state them
MOST_BODIES = 12  # the covariance of their motions takes minutes a round
OVERLAP = 0.9  # of the smaller mask: beyond it two bodies are one


@dataclass(frozen=True)
class BodyMasks:
    """B bodies: signed distances (B, C, C, C) in working voxels, negative inside.

    relative: the body that each turns against (its own number: all others); sigma (B, 2): first guess of the motions,
    degrees and working voxels per axis.
    """

    names: tuple[str, ...]
    distance: Tensor
    relative: tuple[int, ...]
    sigma: Tensor


@dataclass(frozen=True)
class BodyFiles:
    """Masks of B bodies, whom each turns against (numbers from 0), and first guesses (degrees, Angstrom) per axis."""

    files: tuple[Path, ...]
    relative: tuple[int, ...]
    sigma: tuple[tuple[float, float], ...]


def mask_files(asked: str) -> BodyFiles:
    """``--masks``: MRC masks with commas between, a multi-body STAR file, or a pickle of ``dsdsh prepare_multi``."""
    paths = tuple(Path(name) for name in asked.split(",") if name)
    readers = {".star": multibody_star, ".pkl": load_bodies}
    if len(paths) == 1 and (reader := readers.get(paths[0].suffix.lower())) is not None:
        return reader(paths[0])
    return BodyFiles(paths, tuple(range(len(paths))), (SIGMA,) * len(paths))


def read_bodies(given: BodyFiles, grid: Grid) -> BodyMasks:
    """The bodies on the working grid.

    Raises UserError where a file is missing or does not fit, for fewer than two bodies, and for two that are one.
    """
    files = given.files
    if not 2 <= len(files) <= MOST_BODIES:
        raise UserError(
            f"--masks: names {len(files)} mask(s) of bodies; give 2 to {MOST_BODIES}: MRC files with commas between, a "
            f"multi-body STAR file, or {AUTO}N"
        )
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: no such mask of a body; check the names after --masks")
    masks = [read_mask(path, grid.box, grid.pixel_size).numpy() > 0.5 for path in files]
    for i, path in enumerate(files):
        if not masks[i].any():
            raise UserError(f"{path}: no voxel of this body is above 0.5; make the mask again")
        for j in range(i):
            shared = (masks[i] & masks[j]).sum() / min(masks[i].sum(), masks[j].sum())
            if shared > OVERLAP:
                raise UserError(f"{path}: {shared:.0%} of the smaller one lies in {files[j]}; give bodies apart")
    to_working = grid.working_box / grid.box
    coordinates = centred_coordinates(grid.crop) / to_working
    distance = [sample_at(torch.from_numpy(signed_distance(mask)), coordinates) * to_working for mask in masks]
    each = torch.tensor([[turn, shift / grid.working_pixel] for turn, shift in given.sigma])
    return BodyMasks(tuple(path.stem for path in files), torch.stack(distance), given.relative, each)


def signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance in voxels from the edge of a mask, negative inside."""
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    return (outside - inside).astype(np.float32)


def parts_of(density: Tensor, mask: Tensor, count: int, seed: int, grid: Grid) -> BodyMasks:
    """``auto:N``: ``count`` parts of like mass, by k-means of the places of the density (C, C, C) inside the mask."""
    from sklearn.cluster import KMeans

    mass = (density.clamp(min=0) * mask).numpy()
    place = np.argwhere(mass > 0)
    if count > len(place):
        raise UserError(f"--masks {AUTO}{count}: the density has {len(place)} voxels; give fewer parts")
    weights = mass[tuple(place.T)]
    fitted = KMeans(count, n_init=4, random_state=seed).fit(place, sample_weight=weights)
    everywhere = np.argwhere(np.ones(mass.shape, bool))
    labels = fitted.predict(everywhere.astype(place.dtype)).reshape(mass.shape)
    distance = torch.from_numpy(np.stack([signed_distance(labels == k) for k in range(count)]))
    sigma = torch.tensor([[SIGMA[0], SIGMA[1] / grid.working_pixel]]).repeat(count, 1)
    return BodyMasks(tuple(f"part{k + 1}" for k in range(count)), distance, tuple(range(count)), sigma)


def auto_count(asked: str) -> int | None:
    """N of ``auto:N``; None for files.  Raises UserError where N is no number of parts."""
    if not asked.startswith(AUTO):
        return None
    count = asked.removeprefix(AUTO)
    if not (count.isdecimal() and 2 <= int(count) <= MOST_BODIES):
        raise UserError(f"--masks {asked}: give a number of parts from 2 to {MOST_BODIES}, as in {AUTO}4")
    return int(count)


def absolute(asked: str) -> str:
    """The same with absolute paths, so that it can be read again from elsewhere."""
    return asked if auto_count(asked) is not None else ",".join(str(Path(name).resolve()) for name in asked.split(","))


def multibody_star(path: Path) -> BodyFiles:
    """RELION's body STAR: rlnBodyMaskName, rlnBodyRotateRelativeTo (from 1), rlnBodySigmaAngles, rlnBodySigmaOffset.

    Masks are looked for from the current folder, as RELION does, then beside the STAR file.  Offsets are in pixels of
    the mask in RELION and are not used: five Angstrom are looked for first.
    """
    star = read_star(path)
    block = next((name for name in star.blocks if star.has(name, "rlnBodyMaskName")), None)
    if block is None:
        raise UserError(f"{path}: has no column rlnBodyMaskName; give the STAR file of bodies that RELION's multi-body "
                        "refinement takes")  # fmt: skip
    names = star.text(block, "rlnBodyMaskName", "the bodies of --masks")
    files = [Path(str(name)) if Path(str(name)).is_file() else path.parent / str(name) for name in names]
    relative = list(range(len(files)))
    if star.has(block, "rlnBodyRotateRelativeTo"):
        given = star.numbers(block, "rlnBodyRotateRelativeTo", "the bodies of --masks")
        for row, value in enumerate(given):
            if not (value.is_integer() and 1 <= value <= len(files)):
                raise UserError(
                    f"{path}: row {row + 1}: rlnBodyRotateRelativeTo {value:g} is no body; give 1 to {len(files)}"
                )
        relative = [int(value) - 1 for value in given]
    sigma = [SIGMA[0]] * len(files)
    if star.has(block, "rlnBodySigmaAngles"):
        sigma = [float(v) or SIGMA[0] for v in star.numbers(block, "rlnBodySigmaAngles", "the bodies of --masks")]
    return BodyFiles(tuple(files), tuple(relative), tuple((turn, SIGMA[1]) for turn in sigma))


def write_multibody_star(path: Path, files: Sequence[str], relative: Sequence[int]) -> None:
    """Write such a STAR file; relative: the body that each turns against, from 0.

    First guesses of the motions: 10 degrees and 2 pixels.
    """
    columns = {
        "rlnBodyMaskName": list(files),
        "rlnBodyRotateRelativeTo": [str(number + 1) for number in relative],
        "rlnBodySigmaAngles": ["10"] * len(files),
        "rlnBodySigmaOffset": ["2"] * len(files),
    }
    write_star(path, {"": pd.DataFrame(columns)})


def save_bodies(path: Path, bodies: BodyFiles, box: int, pixel_size: float) -> None:
    """The bodies' pickle of ``dsdsh prepare_multi``, for ``--masks``.

    Which masks, what each turns against, first guesses of the motions; centres, principal axes and radii in pixels.

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
