"""Every option of every verb, as frozen dataclasses.

Owns: names, defaults and help of the options: command line (via tyro), ``config.yaml`` and a checkpoint's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from opustomo.config_analysis import AnalyzeConfig as AnalyzeConfig
from opustomo.config_analysis import MapChoice as MapChoice
from opustomo.config_analysis import MovieConfig as MovieConfig
from opustomo.config_analysis import OfAnalysis as OfAnalysis
from opustomo.config_analysis import OfEpoch as OfEpoch
from opustomo.config_analysis import QualityConfig as QualityConfig
from opustomo.config_analysis import Run as Run
from opustomo.config_analysis import VolumesConfig as VolumesConfig
from opustomo.config_data import ExpandConfig as ExpandConfig
from opustomo.config_data import ExtractConfig as ExtractConfig
from opustomo.config_data import MaskConfig as MaskConfig
from opustomo.config_data import Output as Output
from opustomo.config_data import Switch as Switch

Star = Annotated[Positional[Path], arg(metavar="STAR")]
Mask = Annotated[Path | None, arg(aliases=("-r",), metavar="MRC")]


@dataclass(frozen=True)
class InputOptions:
    """How the STAR file is read; shared by every verb that reads particles."""

    datadir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder in front of the file names in the STAR file (default: the STAR's own folder)."""
    angpix: Annotated[float | None, arg(aliases=("--Apix",), metavar="A")] = None
    """Pixel size in Angstrom; only a cross-check, it is read from the data."""
    box: Annotated[int | None, arg(aliases=("-D",), metavar="N")] = None
    """Box size in voxels; only a cross-check, it is read from the data."""
    relion31: Switch = False
    """State that the STAR file is RELION 3.1 or later; only a cross-check, the version is detected."""
    contrast: Literal["auto", "white", "black"] = "auto"
    """Protein density in the subtomograms: white (bright), black (dark) or detected from the data."""
    normalisation: Literal["auto", "sum", "mean"] = "auto"
    """How tilts were combined in the subtomograms: summed, averaged over covering tilts, or detected."""
    format: Literal["auto", "relion3", "relion4", "relion5", "series"] = "auto"
    """Dialect, if not the one recognised: subtomograms, pseudo-subtomograms, stacks, or one row per tilt image."""
    damaged: Literal["stop", "skip"] = "stop"
    """Subtomograms that cannot be used (missing, cut off, NaN, one grey value, no tilt): stop, or go on without."""
    tilt_limit: Annotated[float | None, arg(metavar="DEG")] = None
    """Leave out tilts that are further than this from 0 degrees (default: all are used)."""


@dataclass(frozen=True)
class GridOptions:
    """Mask, resolution and crop; shared by every verb that works in the consensus frame."""

    mask: Mask = None
    """Solvent mask of the consensus map (soft, 0..1, same box as the subtomograms); without one a sphere is used."""
    downfrac: float = 0.5
    """Working box as a fraction of the subtomogram's: M = 2 floor(N downfrac / 2)."""


@dataclass(frozen=True)
class DoctorConfig:
    """Is this machine ready: packages, GPU, threads, memory, processes, and the disk of a folder; and what to mend."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")] = Path()
    """Where runs would write (default: here); a temporary file is written there and removed."""
    json: Switch = False
    """Print the findings as JSON."""


@dataclass(frozen=True)
class CheckConfig:
    """Look at a data set in seconds and say what will be done about every finding."""

    star: Star
    """STAR file of subtomograms or of tilt images, or an optimisation set."""
    input: InputOptions = InputOptions()
    grid: GridOptions = GridOptions()
    sample: int = 64
    """Number of subtomograms read for statistics (all headers are read always)."""
    json: Switch = False
    """Print the findings as JSON."""


@dataclass(frozen=True)
class CacheConfig:
    """Make the numerator/weight cache in the consensus frame (run by train when missing or stale)."""

    star: Star
    """STAR file of subtomograms or of tilt images, or an optimisation set."""
    output: Output
    """Folder of the cache."""
    input: InputOptions = InputOptions()
    grid: GridOptions = GridOptions()
    workers: int = 0
    """Threads used for the cache, not processes (0: all cores)."""


@dataclass(frozen=True)
class AverageConfig:
    """Consensus map with half maps and FSC, and a proposed solvent mask: the sanity check before training."""

    star: Star
    """STAR file of subtomograms or of tilt images, or an optimisation set."""
    output: Output
    """Output folder: average.mrc, half1.mrc, half2.mrc, fsc.csv, fsc.png, mask.mrc, average.png."""
    input: InputOptions = InputOptions()
    mask: Mask = None
    """Solvent mask used for the FSC; without one a mask is proposed from the map (mask.mrc)."""
    downfrac: float = 1.0
    """Working box as a fraction of the subtomogram's (1: full resolution)."""
    workers: int = 0
    """Threads, not processes (0: all cores)."""


@dataclass(frozen=True)
class LinearConfig:
    """Mean, components and the posterior of every particle, in closed form: an answer before any network."""

    star: Star
    """STAR file of subtomograms or of tilt images, or an optimisation set."""
    output: Output
    """Output folder: mean.mrc, component maps, z.0.pkl, linear.npz, pictures."""
    input: InputOptions = InputOptions()
    grid: GridOptions = GridOptions()
    components: int = 0
    """Number of components K (0: chosen by held-out likelihood)."""
    iterations: int = 8
    """EM iterations for every added component."""
    estpose: bool = True
    """Correct every particle's pose (pose.0.pkl); the STAR file is never changed."""
    clusters: int = 4
    """Number of clusters whose volumes are written."""
    seed: int = 0
    """Random seed."""
    workers: int = 0
    """Threads, not processes (0: all cores)."""


@dataclass(frozen=True)
class TrainConfig:
    """Train the convolutional VAE, started from the linear stage; ends with a full encode pass."""

    star: Star
    """STAR file of subtomograms or of tilt images, or an optimisation set."""
    output: Output
    """Run folder: config.yaml, run.log, metrics.csv, weights.N.pkl, z.N.pkl, pose.N.pkl, previews."""
    input: InputOptions = InputOptions()
    grid: GridOptions = GridOptions()
    poses: Annotated[Path | None, arg(metavar="FILE")] = None
    """Pose pickle of `dsdsh prepare`, or a species' particles of M (.star); default: the poses of the STAR file."""
    ind: Annotated[Path | None, arg(metavar="PKL")] = None
    """Train on these row numbers only (pickle or text)."""
    epochs: Annotated[int, arg(aliases=("-n",))] = 10
    """Number of epochs in total."""
    batch: Annotated[int, arg(aliases=("-b",))] = 8
    """Particles per step on each GPU; where it is not given and does not fit in memory, fewer."""
    zdim: int = 12
    """Dimension of the composition code."""
    masks: Annotated[str | None, arg(metavar="FILES|auto:N")] = None
    """Rigid bodies that move: masks with commas between, a multi-body STAR, a pickle of prepare_multi, or N parts."""
    zaffinedim: int = 4
    """Dimension of the conformation code, which there is only with --masks."""
    encode_mode: Literal["grad", "fixed"] = "grad"
    """fixed: no codes and no network, one map of all particles, each half's poses corrected against its own map."""
    lr: float = 1e-3
    """Initial learning rate of AdamW."""
    wd: float = 0.0
    """Weight decay."""
    accum_step: int = 1
    """Steps over which gradients are accumulated."""
    beta: Literal["cos", "constant"] = "constant"
    """Schedule of the KL weight: constant 1 or cyclic annealing."""
    beta_control: float = 1.0
    """Strength of the KL term; the likelihood is in nats, so 1 is the evidence lower bound."""
    prior: float = 10.0
    """Strength of the spectral prior on what the decoder adds to the linear model (0: none)."""
    tv: float = 0.0
    """Total variation of what the decoder adds: nats per voxel with a step of the components' density (0: none)."""
    l1: float = 0.0
    """Magnitude of what the decoder adds: nats per voxel as dense as the components (0: none)."""
    lamb: float = 0.0
    """Strength of the structural disentanglement prior (OPUS-TOMO's range 0.1-3)."""
    bfactor: float = 0.0
    """B0 of the decaying envelope exp(-pi^2 B0 s^2) on the model during training (OPUS-TOMO's range 3-5)."""
    valfrac: float = 0.1
    """Fraction of particles held out for validation."""
    split: Annotated[Path | None, arg(metavar="PKL")] = None
    """File that holds (or receives) the train/validation split; default RUN/split.pkl."""
    templateres: int = 0
    """Size of the decoder's volume, a multiple of 16 (0: the multiple of 16 at or above the crop)."""
    width: float = 0.0
    """Channel multiplier; 1 is OPUS-TOMO's network (0: 1 on a GPU, 0.25 on CPUs)."""
    encoderres: int = 0
    """Size of the encoder's features (0: with --lamb 12, OPUS-TOMO's, on a GPU, 6 on CPUs; without it no encoder)."""
    estpose: bool = True
    """Correct every particle's pose by what the linear stage finds (pose.N.pkl); the STAR file is never changed."""
    num_gpus: int = 1
    """GPUs asked for, one process each; fewer present: those are used and the global batch b * N is kept."""
    multigpu: Switch = False
    """Use several GPUs of this machine; several machines: docs/clusters.md."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the cache (default RUN/cache)."""
    no_cache: Switch = False
    """Keep no cache on disk: numerators and weights are made on the fly."""
    plot: Switch = False
    """Write the picture rows at every log interval instead of once per epoch."""
    tmp_prefix: str = "tmp"
    """Prefix of the running volume and picture in RUN."""
    log_interval: int = 0
    """Particles between two lines of metrics (0: once per epoch)."""
    checkpoint: int = 1
    """Epochs between two checkpoints; the last epoch is always written."""
    checkpoint_minutes: float = 10.0
    """Minutes between two states kept within an epoch, for --resume (0: only when asked to stop)."""
    keep: int = 0
    """Checkpoints to keep: the last so many, and the one that explains held-out particles best (0: all)."""
    load: Annotated[str | None, arg(metavar="latest|PKL")] = None
    """Continue from RUN's latest checkpoint, or start warm from a weights file."""
    latents: Annotated[Path | None, arg(metavar="PKL")] = None
    """Codes of the checkpoint given by --load (checked against it)."""
    seed: int = 0
    """Random seed."""
    workers: int = 0
    """Threads, not processes (0: all cores)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    deterministic: Switch = False
    """The same numbers in every run also on a GPU, where that is slower; refused where something has no such way."""
    compile: Switch = False
    """Compile the decoder's layers on large grids (torch.compile): a minute or two first; for GPUs, slower on CPUs."""
    profile: Switch = False
    """Measure a few steps and write profile.txt and profile.json.gz, which name no path and can be sent."""
    verbose: Switch = False
    """More lines in the log."""


@dataclass(frozen=True)
class StatusConfig:
    """What a run is doing, how far it is and what is kept of it, or why it ended and how to go on."""

    run: Run
    """Run folder of train, linear or encode."""
    json: Switch = False
    """Print JSON."""


@dataclass(frozen=True)
class EncodeConfig:
    """Give other particles of the same molecule codes, poses and evidence in a finished run, fitting nothing."""

    run: Run
    """Run folder of train or linear."""
    star: Star
    """STAR file of the new particles: same box and pixel size, aligned to the same consensus map."""
    output: Output
    """Run folder for the new particles; analyze, volumes, select and report work on it."""
    input: InputOptions = InputOptions()
    epoch: int = -1
    """Epoch of the run (0-based; -1: the latest)."""
    workers: int = 0
    """Threads, not processes (0: all cores)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class ClassChoice(OfAnalysis):
    """Which classes of a run and which poses: shared by the verbs that hand particles back."""

    kmeans: int = 16
    """K of the k-means analysis."""
    groups: Switch = False
    """The groups along the discrete axes (analyze.N/groups) instead of k-means classes."""
    axis: int = 0
    """Along independent axis AXIS (1-based) instead: its groups, or which map of its traversal is nearest."""
    pc: int = 0
    """Along principal component PC (1-based) instead: which map of its traversal is nearest."""
    corrected: Switch = False
    """Poses as the run has corrected them instead of those of the STAR file."""
    unique: Switch = False
    """Of a particle's copies (expand) only the first in each file."""


@dataclass(frozen=True)
class SelectConfig(ClassChoice):
    """Write the particles of one or more classes as STAR files in the dialect that came in."""

    star: Star
    """The STAR file the run was trained on."""
    run: Annotated[Path, arg(metavar="RUN")]
    """Run folder."""
    output: Output
    """Output folder."""
    classes: tuple[int, ...] = ()
    """Classes to join into selected.star (default: one file per class)."""
    selection: Annotated[str | None, arg(metavar="NAME")] = None
    """Instead of classes the particles of a selection made by hand with explore (RUN/selections/NAME.json)."""


@dataclass(frozen=True)
class ExportConfig(ClassChoice):
    """Hand a run's classes back: STAR files as they came in or lists for other programs, and map-back scripts."""

    run: Run
    """Run folder of train, linear or encode."""
    output: Output
    """Output folder: particles.star, preI.star of each class, particles.csv, manifest.json, mapback/."""
    star: Annotated[Path | None, arg(metavar="STAR")] = None
    """The STAR file the run was made from (default: as config.yaml of the run names it)."""
    format: Literal["same", "artiax", "warp", "m"] = "same"
    """STAR files in the dialect that came in, or particle lists for ArtiaX, Warp (picks) or M (species)."""
    coords_angpix: Annotated[float | None, arg(metavar="A")] = None
    """Pixel size that the coordinates in the STAR file count, in Angstrom (default: as it states, else its images')."""
    m_source: Annotated[Path | None, arg(metavar="SOURCE")] = None
    """M's data source (NAME.source), needed for --format m: M knows its tilt series by the hashes in it."""


@dataclass(frozen=True)
class ReportConfig(OfEpoch):
    """One self-contained HTML page about a run."""

    run: Run
    """Run folder."""
    clusters: int = 0
    """K of the k-means analysis shown (0: the largest present)."""
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="HTML")] = None
    """Page to write (default RUN/report.html)."""


@dataclass(frozen=True)
class ExploreConfig:
    """Look at runs in a browser: codes, maps, particles, selections, and training while it goes on."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Run folders of train, linear or encode."""
    port: int = 0
    """Port of 127.0.0.1 (default: 8642, or the next one that is free)."""
    no_browser: Switch = False
    """Only print the link."""


@dataclass(frozen=True)
class SimulateConfig:
    """Make a data set with known truth in the RELION 3.0 layout."""

    output: Output
    """Output folder: particles.star, mask.mrc, subtomo/, labels.npz, gt/, sim.json, stacks/."""
    preset: Literal["demo", "two-state", "hinge", "junk", "few"] | None = None
    """demo (the default): four states and a rotation; two-state; hinge: rotation only; junk: decoys; few: 263."""
    atoms: Annotated[tuple[Path, ...], arg(metavar="FILE")] = ()
    """Atoms instead of the ribosome (PDB, mmCIF; needs gemmi): one rigid structure, or conformations along a path."""
    align: bool = True
    """Lay the conformations of --atoms on their largest rigid core."""
    n: int = 0
    """Number of particles (0: the preset's)."""
    box: int = 0
    """Box size (0: the preset's)."""
    angpix: float = 0.0
    """Pixel size in Angstrom (0: the preset's)."""
    snr: float = -1.0
    """var(signal) / var(noise) in the central sphere (-1: the preset's; 0: no noise)."""
    rot_err: float = -1.0
    """Pose error in degrees (-1: the preset's)."""
    shift_err: float = -1.0
    """Origin error in pixels (-1: the preset's)."""
    stacks: Switch = False
    """Also write the tilt images the subtomograms are made of, as a RELION 5 optimisation set in stacks/."""
    seed: int = 1
    """Random seed."""


@dataclass(frozen=True)
class EvaluateConfig(OfEpoch):
    """Compare a run with the truth of a simulated set: every metric of the benchmark."""

    run: Run
    """Run folder of train or linear."""
    truth: Path
    """Folder of the simulated set (labels.npz, gt/)."""
    json: Switch = False
    """Print JSON."""


@dataclass(frozen=True)
class DemoConfig:
    """Simulate, check, average, train, analyse, select, evaluate and report on a small ribosome set."""

    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")] = Path("demo")
    """Output folder."""
    seed: int = 1
    """Random seed."""
