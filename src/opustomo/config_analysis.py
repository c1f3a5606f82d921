"""Options of the verbs that look at the codes and maps of a run: analyze, volumes, movie and quality.

Owns: the choice of maps that ``volumes`` and ``movie`` share; ``config.py`` has the options of all verbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from opustomo.config_data import Switch

Codes = Literal["composition", "conformation", "joint"]
Run = Annotated[Positional[Path], arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class OfEpoch:
    epoch: int = -1
    """Epoch (0-based; -1: the latest)."""


@dataclass(frozen=True, kw_only=True)
class OfAnalysis(OfEpoch):
    codes: Codes = "composition"
    """Which analysis: of composition, of the conformation of bodies (--masks), or of both together."""
    filtered: Switch = False
    """The second round of that analysis, of some classes only (analyze --within)."""


@dataclass(frozen=True, kw_only=True)
class MapChoice(OfAnalysis):
    """Which maps of a run: one of these, or --kmeans with --path or --between."""

    kmeans: int = 0
    """The centres of analyze.N/kmeansK."""
    pc: int = 0
    """The traversal of principal component number PC (1-based)."""
    axis: int = 0
    """Along independent axis number AXIS (1-based, as in axes.csv): its groups, or a traversal."""
    state: Annotated[tuple[int, ...], arg(metavar="K J")] = ()
    """With conformations: the composition at centre J of analyze.N/kmeansK, not the mean one."""
    conformation: int = 0
    """The bodies moved along conformation number J (1-based) of a run with --masks."""
    groups: Switch = False
    """The mean code of every group of particles (analyze.N/groups), where an axis is discrete."""
    zfile: Path | None = None
    """Every row of this text file of codes."""
    path: Annotated[tuple[int, ...], arg(metavar="A B ...")] = ()
    """From A to B and on through codes of particles, where there are many: classes of --kmeans, else rows from 0."""
    between: Annotated[tuple[int, ...], arg(metavar="A B ...")] = ()
    """Straight from A to B and on: classes of --kmeans, else rows of particles from 0."""
    points: int = 10
    """Maps along --path and --between."""


@dataclass(frozen=True)
class AnalyzeConfig(OfEpoch):
    """PCA, traversals, k-means and UMAP of the codes, with pictures."""

    run: Run
    """Run folder of train, linear or encode."""
    pcs: int = 4
    """Principal components to sample."""
    clusters: int = 16
    """K of k-means."""
    codes: Literal["all", "composition", "conformation", "joint"] = "all"
    """Which codes: composition, the conformation of bodies (--masks), or joint, both together; all: the first two."""
    within: Annotated[str | None, arg(metavar="K:2-5,8")] = None
    """A second round: only particles in these classes of analyze.N/kmeansK; writes analyze.filter.N."""
    selection: Annotated[str | None, arg(metavar="NAME")] = None
    """A second round of a selection made by hand with explore (RUN/selections/NAME.json) instead."""
    dynamics: Switch = False
    """Also fit two rigid parts to the maps along each component: which is a motion, about which axis (dynamics.csv)."""
    skip_umap: Switch = False
    """Skip the UMAP embedding (a stored umap.pkl is read)."""
    seed: int = 0
    """Random seed."""


@dataclass(frozen=True)
class VolumesConfig(MapChoice):
    """Decode volumes at cluster centres, along components and paths or at any list of codes."""

    run: Run
    """Run folder of train, linear or encode."""
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None
    """Output folder (default: the folder of that analysis)."""
    prefix: str = "reference"
    """Volumes are named PREFIX0.mrc, PREFIX1.mrc, ..."""
    angpix: Annotated[float | None, arg(aliases=("--Apix",))] = None
    """Pixel size of the written volumes (default: the working pixel size)."""
    box: int = 0
    """Pad to this box size at the written pixel size (0: the mask's crop)."""
    original: Switch = False
    """Box and pixel size of the subtomograms, in place of --box and --angpix."""
    lowpass: Annotated[float, arg(metavar="A")] = 0.0
    """Low-pass to this resolution in Angstrom, with a soft edge (0: no)."""
    sharpen: Annotated[float, arg(metavar="B")] = 0.0
    """Sharpen by this B-factor in square Angstrom: amplitudes times exp(+B s^2 / 4); below 0 it blurs."""
    fsc_weight: Switch = False
    """Weight decoded maps by the class's half-map FSC (fsc_data.csv of --from-data), cut where it is below 0.143."""
    flip: Switch = False
    """Mirror the volumes along z (other hand)."""
    from_data: Switch = False
    """Also write what the data say at each code, with half-map FSC, at the working pixel size of the run."""
    full: Switch = False
    """The same from the subtomograms at their own box and pixel size, with half maps for relion_postprocess."""


@dataclass(frozen=True)
class MovieConfig(MapChoice):
    """Movies of a series of maps, surface and slices at one contour level: GIF, MP4 and a ChimeraX script."""

    source: Annotated[Positional[Path], arg(metavar="MAPS|RUN")]
    """Folder of maps PREFIX0.mrc, PREFIX1.mrc, ..., or with a choice of maps a run, where missing maps are made."""
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None
    """Output folder (default: the folder of the maps): PREFIX.gif, PREFIX.mp4, PREFIX.cxc, PREFIX.png."""
    prefix: str = "reference"
    """Maps are named PREFIX0.mrc, PREFIX1.mrc, ..."""
    level: float | None = None
    """Contour level of all maps, in their density (default: one for all, by Otsu's method on their mean)."""
    rate: float = 6.0
    """Maps in a second."""
    size: int = 320
    """Edge of each view of the surface in pixels."""


@dataclass(frozen=True)
class QualityConfig(OfEpoch):
    """How good every class is, from the data alone: half maps, differences and random classes of the same size."""

    run: Run
    """Run folder of train or linear."""
    kmeans: int = 0
    """The classes of analyze.N/kmeansK."""
    labels: Annotated[Path | None, arg(metavar="PKL")] = None
    """Any other classes: a class for every particle, 0-based (pickle, as labels.pkl)."""
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None
    """Output folder (default: the folder of the classes)."""
    difference: Annotated[tuple[int, ...], arg(metavar="A B")] = ()
    """Instead: the difference map of classes A and B from the data, and where it is significant."""
    false_rate: float = 0.05
    """False discovery rate of the voxels called significant (with --difference)."""
    seed: int = 0
    """Random seed of the halves, of the random classes and of the permutations."""
