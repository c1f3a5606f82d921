"""Options of the verbs that take a particle list or a map instead of a data set.

Owns: as ``config.py``, which has them too: names, defaults and help.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

Output = Annotated[Path, arg(aliases=("-o",), metavar="DIR")]
Switch = Annotated[bool, FlagCreatePairsOff]  # off unless typed; a bool that is on by default has a --no- twin


@dataclass(frozen=True)
class ExtractConfig:
    """Cut subtomograms from tomograms at the places of a particle list, for data of which nothing else is there."""

    list: Annotated[Positional[Path], arg(metavar="LIST")]
    """Particle list: .star (RELION, Warp, M, pytom-match-pick, STOPGAP, ArtiaX), Dynamo .tbl, PyTom .xml, .ndjson."""
    output: Output
    """Output folder: particles.star (RELION 3.1), subtomo/, wedge.mrc."""
    tomogram: Annotated[tuple[Path, ...], arg(metavar="FILE")]
    """Tomograms (MRC), named as in the list, or a text file with a name of the list and a tomogram in each line."""
    box: Annotated[int, arg(aliases=("-D",), metavar="N")]
    """Box size in voxels of the tomogram, even."""
    tilt_range: Annotated[tuple[float, float], arg(metavar="DEG")]
    """Lowest and highest tilt angle in degrees: what the missing wedge leaves."""
    tilt_axis: Literal["x", "y"] = "y"
    """Tilt axis in the tomograms."""
    angpix: Annotated[float | None, arg(aliases=("--Apix",), metavar="A")] = None
    """Pixel size of the tomograms in Angstrom, where their headers do not state it."""
    coords_angpix: Annotated[float | None, arg(metavar="A")] = None
    """Pixel size that the coordinates in the list count, in Angstrom (default: as it states, else the tomograms')."""


@dataclass(frozen=True)
class ExpandConfig:
    """Repeat every particle in each pose that a symmetric map cannot tell from its own, to see what breaks symmetry."""

    star: Annotated[Positional[Path], arg(metavar="STAR")]
    """Particle STAR file or optimisation set of a refinement with symmetry."""
    output: Annotated[Path, arg(aliases=("-o",), metavar="STAR")]
    """STAR file to write (of an optimisation set also the set that names it, STAR_optimisation_set.star)."""
    symmetry: Annotated[str, arg(metavar="GROUP")]
    """Point group of the refinement, as RELION names and orients it: Cn, Dn, T, O, I1 to I4 (I is I2)."""
    datadir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder that file names of an optimisation set are relative to (default: found)."""


@dataclass(frozen=True)
class MaskConfig:
    """Solvent mask from a map: threshold, largest part, holes filled, dilated, soft edge. Lengths are in Angstrom."""

    map: Annotated[Positional[Path], arg(metavar="MAP")]
    """Map (MRC), protein bright: average.mrc, or any other."""
    output: Output
    """Output folder: mask.mrc, mask.png."""
    threshold: Annotated[float | None, arg(metavar="LEVEL")] = None
    """Grey value of the map, smoothed by --smooth, above which it is molecule (default: what divides it best)."""
    sigma: Annotated[float | None, arg(metavar="S")] = None
    """The threshold as so many standard deviations above the mean of the smoothed map."""
    percentile: Annotated[float | None, arg(metavar="P")] = None
    """The threshold as a percentile of the smoothed map's voxels, 0 to 100."""
    smooth: Annotated[float | None, arg(metavar="A")] = None
    """Gaussian (standard deviation) the map is smoothed by before; 0: not (default: 12, at least 1 voxel)."""
    largest: bool = True
    """Keep only the largest connected part."""
    fill: bool = True
    """Fill holes that the mask encloses."""
    dilate: Annotated[float | None, arg(metavar="A")] = None
    """Grow the mask by this before the edge; below 0: shrink it (default: 10, at least 2 voxels)."""
    edge: Annotated[float | None, arg(metavar="A")] = None
    """Width of the cosine edge outside (default: 20, at least 3 voxels)."""
    radius: Annotated[float | None, arg(metavar="A")] = None
    """Look for molecule only so far from the centre of the box (default: 0.48 of the box's edge)."""
    invert: Switch = False
    """Protein is dark in the map."""
    angpix: Annotated[float | None, arg(aliases=("--Apix",), metavar="A")] = None
    """Pixel size of the map in Angstrom, where its header does not state it."""
    box: Annotated[int | None, arg(aliases=("-D",), metavar="N")] = None
    """Box of the subtomograms, where the map shows the same region on another grid (average --downfrac)."""
