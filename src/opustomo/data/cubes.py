"""Cubes cut from one tomogram at the coordinates of a table, for looking at; ``extract`` makes sets to work with.

Owns: what ``dsdsh extract_tomo_cubes`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.extract import box_at
from opustomo.data.mrc import map_volume, write_stack, write_volume
from opustomo.data.star import StarFile, read_star, write_star
from opustomo.errors import UserError

ROUND = {"round": np.rint, "floor": np.floor, "ceil": np.ceil}


@dataclass(frozen=True)
class Cubes:
    """What to cut, where, and how the files are called."""

    tomogram: Path
    star: Path
    output: Path
    box: int
    columns: tuple[str, ...] = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
    block: str | None = None
    tomogram_column: str | None = None
    tomogram_name: str | None = None
    scale: float = 1.0  # of the coordinates
    one_based: bool = False
    rounding: str = "round"
    pad: bool = False  # zeros outside the tomogram
    out_star: Path | None = None
    prefix: str = "cube"
    first: int = 0
    stack: Path | None = None


def extract_cubes(wanted: Cubes) -> list[str]:
    """Write the cubes, and STAR and stack where asked for; returns what was done, in lines.

    The coordinate's voxel, rounded, is voxel N//2 of its cube; origins of the table are not used.  UserError: columns
    missing, no row of that tomogram, no cube inside it.
    """
    star = read_star(wanted.star)
    block = star.particle_block if wanted.block is None else wanted.block.removeprefix("data_")
    rows = _rows(star, block, wanted)
    place = _voxels(star, block, wanted, rows)
    volume, pixel_size = map_volume(wanted.tomogram)
    corner, size = place.astype(np.int64) - wanted.box // 2, np.array(volume.shape[::-1])
    inside = ((corner >= 0) & (corner + wanted.box <= size)).all(1)
    touching = ((corner + wanted.box > 0) & (corner < size)).all(1)
    kept = np.flatnonzero(touching if wanted.pad else inside)
    if len(kept) == 0:
        raise UserError(
            f"{wanted.star}: none of {len(place)} cubes of {wanted.box} voxels lies inside {wanted.tomogram} "
            f"(x, y, z = {size}), first place {place[0]}; correct --coord-scale or --box-size"
            f"{'' if wanted.pad else ', or give --pad-outside'}"
        )
    cubes = []
    for number, i in enumerate(kept, wanted.first):
        cube = box_at(volume, corner[i], wanted.box)
        write_volume(wanted.output / f"{wanted.prefix}_{number:06d}.mrc", cube, pixel_size or 1.0)
        if wanted.stack is not None:  # else one at a time is held
            cubes.append(cube)
    lines = [f"{len(kept)} cubes of {len(place)} places written to {wanted.output}"]
    if (names := _several(star, block, wanted)) is not None:
        lines.append(f"note: the table names several tomograms ({names}), all rows are taken for this one's; "
                     "--tomo-col and --tomo-id choose")  # fmt: skip
    if left := len(place) - len(kept):
        lines.append(f"{left} are {'outside the tomogram' if wanted.pad else 'not wholly inside it (--pad-outside)'}")
    if pixel_size == 0:
        lines.append(f"the header of {wanted.tomogram} states no pixel size: the cubes have 1 A")
    if wanted.stack is not None:
        write_stack(wanted.stack, np.stack(cubes), pixel_size or 1.0)
        lines.append(f"all of them in {wanted.stack}")
    if wanted.out_star is not None:
        table = star.table(block).iloc[rows[kept]].reset_index(drop=True)
        write_star(wanted.out_star, {**star.blocks, block: table})
        lines.append(f"their rows in {wanted.out_star}")
    return lines


def _voxels(star: StarFile, block: str, wanted: Cubes, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 3) whole voxels of the coordinates in these rows, x, y, z, counted from 0."""
    columns = [name.removeprefix("_") for name in wanted.columns]
    place = np.stack([star.numbers(block, name, "the places of the cubes") for name in columns], 1)[rows]
    place = ROUND[wanted.rounding](place * wanted.scale - wanted.one_based)
    if not (np.abs(place) < 1e6).all():
        raise UserError(
            f"{wanted.star}: column _{columns[0]} or its like has values that are no voxels; see --coord-scale"
        )
    return place


def _several(star: StarFile, block: str, wanted: Cubes) -> str | None:
    """The tomograms that the rows name where none was chosen and there is more than one."""
    column = next((name for name in ("rlnTomoName", "rlnMicrographName") if star.has(block, name)), None)
    if column is None or wanted.tomogram_column is not None:
        return None
    names = dict.fromkeys(map(str, star.text(block, column, "telling tomograms apart")))
    return f"{', '.join(list(names)[:3])}{' ...' if len(names) > 3 else ''}" if len(names) > 1 else None


def _rows(star: StarFile, block: str, wanted: Cubes) -> NDArray[np.int64]:
    """Rows of the tomogram; all without ``tomogram_column``."""
    if (wanted.tomogram_column is None) != (wanted.tomogram_name is None):
        raise UserError("--tomo-col and --tomo-id belong together: the column, and the tomogram's name in it")
    if wanted.tomogram_column is None:
        return np.arange(len(star.table(block)))
    column = wanted.tomogram_column.removeprefix("_")
    names = star.text(block, column, "telling tomograms apart")
    if len(rows := np.flatnonzero(names == wanted.tomogram_name)) == 0:
        raise UserError(
            f"--tomo-id {wanted.tomogram_name}: no row of {star.path} has it in _{column} "
            f"({', '.join(list(dict.fromkeys(map(str, names)))[:3])} ...); give one of these"
        )
    return rows
