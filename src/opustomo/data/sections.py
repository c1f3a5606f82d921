"""A look at one particle as it is in its file: sections through a subtomogram, or some images of a stack.

Owns: finding and reading the file of a single particle, without those of all others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.mrc import header_of, read_slices, read_volume
from opustomo.data.readers import DIALECTS
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import Source

Pictures = list[tuple[str, NDArray[np.float32]]]


def sections_of(source: Source, row: int, datadir: Path | None) -> Pictures:
    """Titles and pictures (N, N) of the particle in ``row`` (from 0): its central sections, y upwards, x to the right.

    Of tilt images: a quarter in, the middle, and a quarter from the end.  UserError: the file is not there, or damaged.
    """
    names = DIALECTS[source.format].image_files(source.subset(np.array([row])))
    path = Locator(source.table.path, datadir).require(names, "subtomograms")[0]
    if source.stacks:
        count = header_of(path).shape[0]
        chosen = np.unique([count // 4, count // 2, count - 1 - count // 4]).astype(np.int64)
        images = read_slices(path, chosen)
        return [(f"image {i + 1} of {count}", image[::-1]) for i, image in zip(chosen, images, strict=True)]
    return sections(read_volume(path)[0], "subtomogram")


def sections(volume: NDArray[np.float32], what: str) -> Pictures:
    """Sections (N, N) of a volume (z, y, x) through voxel N//2, across z, y and x, the second axis upwards."""
    c = volume.shape[0] // 2
    cut = {"z": volume[c], "y": volume[:, c], "x": volume[:, :, c]}
    return [(f"{what} across {axis}", np.asarray(image[::-1], np.float32)) for axis, image in cut.items()]
