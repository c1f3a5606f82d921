"""Maps at any codes: decoded, brought to an exact pixel size, and laid over the consensus map.

Owns: the verb ``volumes`` and resampling of the decoder's crop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opustomo.analysis import plots
from opustomo.analysis.filters import Gain, filtered, gain_of
from opustomo.analysis.latents import analysis_folder
from opustomo.analysis.paths import path_name, write_path
from opustomo.config import MapChoice, VolumesConfig
from opustomo.data.atomic import remove_dead
from opustomo.data.mrc import write_volume
from opustomo.errors import UserError
from opustomo.monitor import progress

if TYPE_CHECKING:
    from opustomo.checkpoint import Run
    from opustomo.physics.grid import Grid

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Volume = NDArray[np.float32]
BATCH, TRAVERSAL = 8, 10  # maps decoded at once; maps along a conformation
LARGEST_BOX = 1024
SHOWN = 64  # maps in a picture
CHOICES = ("kmeans", "pc", "axis", "conformation", "groups", "zfile", "path", "between")


def main(config: VolumesConfig) -> None:
    """Verb ``volumes``."""
    from opustomo.analysis.data_maps import write_data_volumes, write_full_volumes
    from opustomo.analysis.seen import along_conformation, chosen_view
    from opustomo.checkpoint import open_run

    check_choice(config, "volumes")
    if Path(config.prefix).name != config.prefix:
        raise UserError(f"--prefix {config.prefix}: is a name, not a path; -o chooses the folder")
    run = chosen_view(open_run(config.run, config.epoch), config)
    moving = config.codes != "composition" or config.conformation
    if moving and (config.from_data or config.full):
        raise UserError("conformations: the data are not averaged along them; leave --from-data and --full out")
    if config.filtered and (config.from_data or config.full):
        raise UserError("--filtered: maps from the data are of all particles; leave --from-data and --full out, or "
                        "train on these classes alone (opustomo select --filtered)")  # fmt: skip
    angpix, box = _sampling(run, config)
    folder = config.output or folder_of(run, config)
    files = MapFiles(folder, config.prefix, angpix, box, config.flip)
    remove_dead(folder)
    gain = gain_of(config.lowpass, config.sharpen) if config.lowpass or config.sharpen else None
    if config.conformation:
        codes = along_conformation(run, config.conformation)
    else:
        codes = read_codes(_source(run, config), run.codes.shape[1])
    data: list[Path] = []
    if config.full:
        data = write_full_volumes(run, codes, files, gain)
    elif config.from_data:
        data = write_data_volumes(run, codes, files, gain)
    gains = _by_fsc(config, folder, len(codes)) if config.fsc_weight else [gain] * len(codes)
    written = [*write_volumes(run, codes, files, gains), *data]
    log.info("written: %s ... %s", written[0], written[-1].name)


def check_choice(config: MapChoice, verb: str) -> None:
    """UserError unless one choice of maps is made, --kmeans with --path or --between being one."""
    chosen = [f"--{name}" for name in CHOICES if getattr(config, name)]
    if len(chosen) == 2 and config.kmeans and (config.path or config.between):
        return
    if len(chosen) != 1:
        raise UserError(
            f"{verb}: give one of --kmeans K, --pc I, --axis J, --conformation J, --groups, --zfile FILE, --path A B "
            f"or --between A B (--kmeans with either of the last two), not {' and '.join(chosen) or 'none'}"
        )


def _sampling(run: Run, config: VolumesConfig) -> tuple[float | None, int]:
    """(pixel size, box) asked for; UserError for filters and sizes that cannot be."""
    if config.original and (config.box or config.angpix is not None):
        raise UserError("--original is the subtomograms' own box and pixel size; leave --box and --angpix out")
    finest = 2 * (run.grid.pixel_size if config.full else run.grid.working_pixel)
    if config.lowpass and not config.lowpass > finest:
        raise UserError(
            f"--lowpass {config.lowpass:g}: the maps end at {finest:.4g} Angstrom; give more or leave it out"
        )
    if not math.isfinite(config.sharpen) or config.sharpen / finest**2 > 80:
        raise UserError(
            f"--sharpen {config.sharpen:g}: amplitudes at {finest:.4g} Angstrom would grow by exp(20) or more; give a "
            "smaller B-factor in square Angstrom"
        )
    if config.fsc_weight and config.conformation:
        raise UserError("--fsc-weight: there are no half maps along a --conformation; give --lowpass")
    return (run.grid.pixel_size, run.grid.box) if config.original else (config.angpix, config.box)


def _by_fsc(config: VolumesConfig, folder: Path, count: int) -> list[Gain | None]:
    """A gain for each map, from its own column of fsc_data.csv."""
    from opustomo.analysis.data_maps import read_fsc

    path, fix = folder / "fsc_data.csv", "make it with the same command and --from-data"
    if not path.is_file():
        raise UserError(f"--fsc-weight: {path}: not there; {fix}")
    frequency, curves = read_fsc(path)
    names = [f"{config.prefix}{i}" for i in range(count)]
    missing = [name for name in names if name not in curves]
    if missing:
        raise UserError(f"--fsc-weight: {path} has no column {missing[0]}; {fix}")
    return [gain_of(config.lowpass, config.sharpen, (frequency, curves[name])) for name in names]


def folder_of(run: Run, config: MapChoice) -> Path:
    """The folder below analyze.N that the maps of a choice belong to."""
    if config.conformation:
        name = f"conformation{config.conformation}"
    elif config.zfile:
        name = config.zfile.stem
    elif config.path or config.between:
        name = path_name(config)
    else:
        name = _source(run, config).parent.name
    return analysis_folder(run) / name


def _source(run: Run, config: MapChoice) -> Path:
    """The file of codes that was asked for; UserError with the command that makes it."""
    if config.zfile:
        return config.zfile
    if config.path or config.between:
        return write_path(run, config, analysis_folder(run))
    folder, fix = analysis_folder(run), f"opustomo analyze {run.path} --epoch {run.epoch}"
    fix += f" --codes {config.codes}" * (config.codes != "composition") + " --within K:CLASSES" * config.filtered
    if config.groups:
        path, fix = (
            folder / "groups" / "centers.txt",
            f"{fix}`, if an axis shows groups (axes.csv), or use `--kmeans K",
        )
    elif config.axis:
        path, present = folder / f"axis{config.axis}" / "z_axis.txt", len([*folder.glob("axis*/z_axis.txt")])
        if present and not path.is_file():
            raise UserError(f"--axis {config.axis}: {folder / 'axes.csv'} has axes 1 to {present}; give one of them")
    elif config.kmeans:
        path, fix = folder / f"kmeans{config.kmeans}" / "centers.txt", f"{fix} --clusters {config.kmeans}"
    else:
        path, fix = folder / f"pc{config.pc}" / "z_pc.txt", f"{fix} --pcs {config.pc}"
    if not path.is_file():
        # fewer distinct codes than classes make fewer classes than were asked for
        made = sorted(found.parent.name for found in folder.glob("kmeans*/centers.txt")) if config.kmeans else []
        there = f"; there are {', '.join(made)}" if made else ""
        raise UserError(f"{path}: not there; make it with `{fix}`{there}")
    return path


def read_codes(path: Path, zdim: int) -> Floats:
    """(n, zdim) codes of a text file, one row each, blanks or commas between, ``#`` starts a comment.

    UserError names the row that has another number of columns or something that is not a finite number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); give a list of codes, one row each") from None
    codes = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise UserError(f"{path}: row {number}: {error}; give {zdim} numbers") from None
        if len(row) != zdim or not np.isfinite(row).all():
            raise UserError(f"{path}: row {number} has {len(row)} columns or a value that is not finite; the codes of "
                            f"this run have {zdim} columns")  # fmt: skip
        codes.append(row)
    if not codes:
        raise UserError(f"{path}: has no codes; give one row of {zdim} numbers for each volume")
    return np.array(codes)


@dataclass(frozen=True)
class MapFiles:
    """Where maps are written, ``folder``/PREFIXi.mrc with i from 0, and how they are sampled.

    angpix: pixel size in Angstrom (None: the working pixel), exact in the header; box: pad to this even size (0: the
    smallest that holds the crop); flip: mirror along z about the centre voxel.
    """

    folder: Path
    prefix: str = "reference"
    angpix: float | None = None
    box: int = 0
    flip: bool = False

    def sampling(self, grid: Grid) -> tuple[float, int]:
        """Pixel size in Angstrom and even box; UserError where they do not fit a map of ``grid``."""
        pixel, box = grid.working_pixel if self.angpix is None else float(self.angpix), self.box
        if not (math.isfinite(pixel) and pixel > 0):
            raise UserError(f"--angpix {self.angpix}: a pixel size in Angstrom above 0 is needed")
        needed = 2 * math.ceil(grid.crop * grid.working_pixel / pixel / 2 - 1e-6)
        if not 4 <= needed <= LARGEST_BOX or box > LARGEST_BOX:
            raise UserError(f"--angpix {pixel:g} --box {box}: a box of {max(needed, box)} voxels (4 to {LARGEST_BOX} "
                            f"are allowed); the working pixel is {grid.working_pixel:g} Angstrom")  # fmt: skip
        if box and (box % 2 or box < needed):
            raise UserError(f"--box {box}: must be even and at least {needed} to hold the mask at {pixel:g} Angstrom")
        return pixel, box or needed

    def write(self, name: str, volume: Volume, grid: Grid) -> Path:
        """Write a map (C, C, C) of ``grid`` as NAME.mrc; the header's origin lays it over the consensus map."""
        pixel, size = self.sampling(grid)
        path = self.folder / f"{name}.mrc"
        resampled = resample(volume, grid.working_pixel, pixel, size, self.flip)
        write_volume(path, resampled, pixel, grid.start(pixel, size))
        return path


def write_volumes(
    run: Run, codes: NDArray[np.floating], files: MapFiles, gains: Sequence[Gain | None] = ()
) -> list[Path]:
    """Decode ``codes`` (n, zdim) into ``files``; the paths written.  PREFIX.png shows the first 64.

    gains: of each map's spectrum (none: as decoded).  UserError: a pixel size or box that does not fit.
    """
    decoded = progress(_decoded(run, codes), len(codes), "volumes", "volumes")
    return save_volumes(decoded, run.grid, files, gains)


def save_volumes(
    volumes: Iterable[Volume], grid: Grid, files: MapFiles, gains: Sequence[Gain | None] = ()
) -> list[Path]:
    """Write maps (C, C, C) of the working grid; files and errors as in ``write_volumes``."""
    files.sampling(grid)  # wrong sizes are told before the first map is decoded
    paths: list[Path] = []
    shown: list[Volume] = []
    for volume, gain in zip_longest(volumes, gains):
        ready = volume if gain is None else filtered(volume, grid.working_pixel, gain)
        paths.append(files.write(f"{files.prefix}{len(paths)}", ready, grid))
        if len(shown) < SHOWN:
            shown.append(ready[::-1] if files.flip else ready)
    picture = plots.montage(np.stack(shown), [path.stem for path in paths[:SHOWN]])
    plots.save(picture, files.folder / f"{files.prefix}.png")
    return paths


def _decoded(run: Run, codes: NDArray[np.floating]) -> Iterator[Volume]:
    for start in range(0, len(codes), BATCH):
        yield from run.decode(np.asarray(codes[start : start + BATCH], np.float32))


def resample(volume: Volume, pitch: float, pixel: float, size: int, flip: bool = False) -> Volume:
    """(C, C, C) sampled every ``pitch`` Angstrom, read every ``pixel`` Angstrom: (size, size, size).

    Centre voxel C//2 becomes size//2.  Exact for any ratio: the band-limited function through the samples,
    zero beyond the crop, one small matrix product per axis; coarser pixels are low-passed to their own Nyquist
    first.  Density is kept.  ``flip`` mirrors along z about the centre voxel.
    """
    box = volume.shape[0]
    if size == box and pixel == pitch and not flip:
        return np.asarray(volume, np.float32)
    place = (np.arange(size) - size // 2) * (pixel / pitch)
    band = min(1.0, pitch / pixel)

    def reading(at: NDArray[np.floating]) -> Floats:
        matrix = band * np.sinc(band * (at[:, None] - (np.arange(box) - box // 2)))
        # padding is padding: the tails of the interpolation do not run on into the added voxels
        matrix[np.abs(at) > box / 2] = 0
        return np.asarray(matrix, np.float64)

    along, depth = reading(place), reading(-place if flip else place)
    turned = np.einsum("zc,cyx->zyx", depth, volume, optimize=True)
    turned = np.einsum("yc,zcx->zyx", along, turned, optimize=True)
    return np.einsum("xc,zyc->zyx", along, turned, optimize=True).astype(np.float32)
