"""One self-contained HTML page about a run: what was done, what came out, what to do next.

Owns: the content of ``RUN/report.html`` (verb ``report``).  Missing analyses and class maps are made on the way.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opustomo import __version__
from opustomo.analysis import page, plots, report_map
from opustomo.analysis.class_page import quality_section
from opustomo.analysis.class_quality import read_quality
from opustomo.analysis.controls import tomogram_names
from opustomo.analysis.data_maps import contributing, read_fsc
from opustomo.analysis.latents import (
    CERTAIN,
    Analysis,
    analysis_folder,
    analyze,
    class_probability,
    in_use,
    pca_plane,
    principal_components,
    stored_analysis,
    traversal,
)
from opustomo.analysis.page import Section
from opustomo.analysis.report_classes import axes_section, classes_section
from opustomo.analysis.report_motion import motion_section
from opustomo.analysis.volumes import MapFiles, save_volumes
from opustomo.config import ReportConfig
from opustomo.data.atomic import write_text
from opustomo.errors import reading
from opustomo.monitor import METRIC_COLUMNS, NOTABLE, read_rows

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

DEFAULT_CLUSTERS = 16
TRAVERSED = 2  # components shown
STEPS = 5  # maps shown on each
OF_A_CLASS = r"\bclass(\d+)\b"
OTHER_CLASS = r"label-free class \1 (evaluate's own numbering)"
Volumes = NDArray[np.float32]


def main(config: ReportConfig) -> None:
    """Verb ``report``."""
    from opustomo.checkpoint import open_run

    path = write_report(open_run(config.run, config.epoch, needs_codes=False), config.clusters, config.output)
    log.info("report: %s", path)


def write_report(run: Run, clusters: int = 0, output: Path | None = None) -> Path:
    """Write the page (default RUN/report.html) and return its path; analyses and decodes what is missing.

    ``clusters``: K of the k-means shown (0: the largest analysed, else 16).  UserError: not writable.
    """
    if run.kind == "map":
        sections = [*report_map.sections(run), _settings(run)]
        return _save(run, "one map", [*report_map.tiles(run)], sections, output)
    analysis = stored_analysis(run, clusters) or _analyzed(run, clusters)
    metrics = read_metrics(run.path / "metrics.csv")
    truth = [*_truth(run.path / "evaluation.json")]  # before the slow parts: a damaged file fails at once
    sections = [
        *_training(metrics),
        _codes(run, analysis),
        *axes_section(run, analysis.folder),
        classes_section(analysis, class_volumes(run, analysis)),
        *_quality(analysis),
        *_tomograms(run, analysis),
        *_traversals(run),
        *motion_section(run),
        *_data_resolution(run, analysis),
        *truth,
        _next(run, analysis),
        _settings(run),
    ]
    found = f"{len(analysis.centre_index)} classes"
    return _save(run, found, [*_tiles(run, analysis, metrics)], sections, output)


STAGES = {"linear": "linear stage", "network": "network", "map": "poses and map"}


def _save(run: Run, found: str, tiles: list[str], sections: list[Section], output: Path | None) -> Path:
    text = page.assemble(
        f"{run.path.resolve().name}: {len(run.codes):,} particles, {found}",
        f"{STAGES[run.kind]}, epoch {run.epoch}, from {run.star}",
        tiles,
        sections,
        f"opustomo {__version__}, {datetime.now():%Y-%m-%d %H:%M}, {run.path}",
    )
    path = output or run.path / "report.html"
    write_text(path, text)
    return path


def _analyzed(run: Run, clusters: int) -> Analysis:
    k = min(clusters or DEFAULT_CLUSTERS, len(run.codes))
    log.info("epoch %d has no such analysis yet, so: opustomo analyze %s --clusters %d", run.epoch, run.path, k)
    return analyze(run, clusters=k, skip_umap=(analysis_folder(run) / "umap.pkl").is_file())


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of metrics.csv as (rows,) arrays, NaN where a cell is empty; {} without the file or rows."""
    rows = read_rows(path)
    columns = [name for name in METRIC_COLUMNS if rows and name in rows[0]]
    return {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in columns}


def held_out_gain(metrics: dict[str, NDArray[np.float64]]) -> float | None:
    """Last held-out ELBO of the network minus that of the linear stage, nats per particle; None if not measured."""
    pair = [metrics.get(name, np.array([])) for name in ("val_elbo", "linear_val_elbo")]
    last = [column[np.isfinite(column)][-1:] for column in pair]
    return float(last[0][0] - last[1][0]) if all(column.size for column in last) else None


def _tiles(run: Run, analysis: Analysis, metrics: dict[str, NDArray[np.float64]]) -> Iterator[str]:
    grid, (train, held_out) = run.grid, run.split
    yield page.tile(f"{len(run.codes):,}", f"particles: {len(train):,} train, {len(held_out):,} held out")
    yield page.tile(f"{grid.box}³", f"voxels of {grid.pixel_size:.4g} Å")
    yield page.tile(f"{grid.working_pixel:.4g} Å", f"working pixel: {2 * grid.working_pixel:.3g} Å at best")
    yield page.tile(f"{grid.crop}³", "voxels decoded, the mask's crop")
    used, zdim = in_use(analysis.explained), run.codes.shape[1]
    yield page.tile(str(zdim) if used == zdim else f"{used} of {zdim}", "dimensions of the code in use")
    gain = held_out_gain(metrics)
    if gain is not None:
        kind = "good" if gain > NOTABLE else "warn" if gain < -NOTABLE else ""
        yield page.tile(f"{gain:+.4g}", "nats per held-out particle over the linear stage", kind)


def _training(metrics: dict[str, NDArray[np.float64]]) -> Iterator[Section]:
    if not metrics:
        return
    gain = held_out_gain(metrics)
    note = "The loss should fall and level off."
    if gain is not None:
        note += f" The network explains held-out particles {_verdict(gain)}"
    body = page.figure(plots.training_curves(metrics), "From metrics.csv", wide=True)
    yield Section("training", "Training", note, body)


def _verdict(gain: float) -> str:
    """What a difference of held-out ELBO means (HTML)."""
    if abs(gain) <= NOTABLE:
        return f"no different from the linear stage ({gain:+.2g} nats each)."
    if gain > 0:
        return f'<b class="good">better</b> than the linear stage, by {gain:.4g} nats each.'
    return (
        f'<b class="warn">worse</b> than the linear stage, by {-gain:.4g} nats each. '
        "Trust the linear stage's codes, or train longer or with a smaller --lr."
    )


def _codes(run: Run, analysis: Analysis) -> Section:
    used, note = in_use(analysis.explained), ""
    if used < 2:
        figures = _one_dimension(run, analysis)
        note = (
            "The codes vary along 1 dimension only: a histogram instead of maps. "
            if used
            else "The codes do not vary. "
        )
    else:
        figures = _planes(run, analysis)
    figures.append(page.figure(plots.explained_variance(analysis.explained), "Variance on each component"))
    sizes = plots.class_sizes(analysis.labels, len(analysis.centre_index))
    figures.append(page.figure(sizes, "Particles in each class"))
    note += (
        "One point is one particle. Colours should mix evenly in the viewing-direction pictures: groups of one colour "
        "mean that the missing wedge, not structure, separates the particles."
    )
    note += _certainty(run, analysis)
    return Section("codes", "Codes", note, page.row(figures))


def _certainty(run: Run, analysis: Analysis) -> str:
    """How many particles are sure of their class, as a sentence; nothing where the run has no uncertainties."""
    if run.sigma is None or len(analysis.centre_index) < 2:
        return ""
    sure = (class_probability(run.codes, run.sigma, analysis.labels) >= CERTAIN).mean()
    others = " The others lie near a border, of which fewer classes have fewer." if sure < 1 else ""
    return (
        f" <b>{_share(sure)} of the particles are certain of their class</b>: given how well their codes are known, "
        f"they belong there with probability {CERTAIN:g} or more.{others}"
    )


def _share(part: float) -> str:
    """A share in per cent; all is said of all alone."""
    return f"{part:.0%}" if part == 1 or part < 0.995 else "over 99%"


def _planes(run: Run, analysis: Analysis) -> list[str]:
    """The codes on two components and in UMAP, by class and by viewing direction."""
    direction = np.asarray(run.rotation)[:, 2, :]
    maps = [(*pca_plane(analysis.pca_scores, analysis.explained), "Principal components")]
    if analysis.umap is not None:
        maps.append((analysis.umap, ("UMAP1", "UMAP2"), "UMAP"))
    figures = []
    for xy, names, what in maps:
        coloured = plots.classes(xy, analysis.labels, analysis.centre_index, names)
        figures.append(page.figure(coloured, f"{what}, coloured by class"))
        seen = plots.viewing_direction(xy, direction, names)
        figures.append(page.figure(seen, f"{what}, coloured by viewing direction"))
    return figures


def _one_dimension(run: Run, analysis: Analysis) -> list[str]:
    """A code of one dimension: its histogram by class, and over it the beam's angle to z."""
    direction = np.asarray(run.rotation)[:, 2, :]
    plane, names = pca_plane(analysis.pca_scores, analysis.explained)
    coloured = plots.histogram(plane[:, 0], analysis.labels, len(analysis.centre_index), names[0])
    angle = np.degrees(np.arccos(np.clip(direction[:, 2], -1, 1)))
    code, name = plots.without_tails(plane[:, 0], names[0])
    seen = plots.viewing_direction(np.stack([code, angle], axis=1), direction, (name, "beam axis to z (degrees)"))
    return [page.figure(coloured, "The code, by class"), page.figure(seen, "The code, coloured by viewing direction")]


def class_volumes(run: Run, analysis: Analysis) -> Volumes:
    """Decoded maps (K, C, C, C) at the class centres; also written as reference*.mrc where missing or outdated."""
    volumes = run.decode(np.asarray(run.codes)[analysis.centre_index])
    folder = analysis.clusters_folder
    written = [folder / f"reference{i}.mrc" for i in range(len(volumes))]
    made = (folder / "centers.txt").stat().st_mtime
    if not all(path.is_file() and path.stat().st_mtime >= made for path in written):
        save_volumes(volumes, run.grid, MapFiles(folder))
    return volumes


def _quality(analysis: Analysis) -> Iterator[Section]:
    """Left out where it has not been measured since the classes were made."""
    folder = analysis.clusters_folder
    if not (folder / "quality.csv").is_file():
        return
    if (folder / "quality.csv").stat().st_mtime < (folder / "labels.pkl").stat().st_mtime:
        log.warning("%s: older than the classes, left out; run `opustomo quality` again", folder / "quality.csv")
        return
    rows = read_quality(folder / "quality.csv")
    curves = folder / "quality_fsc.csv"
    yield quality_section(rows, *(read_fsc(curves) if curves.is_file() else (np.zeros(0), {})))


def _tomograms(run: Run, analysis: Analysis) -> Iterator[Section]:
    """Left out where the STAR file has gone, the run took a subset of it, or there is one tomogram."""
    names = tomogram_names(run)
    if names is None:
        return
    fig = plots.tomogram_fractions(analysis.labels, names, len(analysis.centre_index))
    note = (
        "Classes should not follow tomograms: a class from one tomogram often means thickness, defocus or false picks."
    )
    yield Section("tomograms", "Tomograms", note, page.row([page.figure(fig, "Share of every class")]))


def _traversals(run: Run) -> Iterator[Section]:
    """Only along components that carry variance."""
    components = principal_components(np.asarray(run.codes, np.float64))
    figures = []
    for pc in range(1, min(TRAVERSED, in_use(components.explained)) + 1):
        codes = traversal(components, pc, STEPS)
        score = (codes - components.mean) @ components.axes[pc - 1]
        fig = plots.montage(run.decode(codes.astype(np.float32)), [f"PC{pc} = {value:+.2f}" for value in score])
        figures.append(page.figure(fig, f"Along PC{pc}, from its 5th to its 95th percentile", wide=True))
    note = "Decoded maps along the principal components, through the mean code: front and side, and central slices."
    if figures:
        yield Section("traversals", "Along the components", note, page.row(figures))


def _data_resolution(run: Run, analysis: Analysis) -> Iterator[Section]:
    path = analysis.clusters_folder / "fsc_data.csv"
    if not path.is_file():
        return
    frequency, curves = read_fsc(path)
    counts = contributing(run.codes, np.asarray(run.codes)[analysis.centre_index], list(curves))
    fig = plots.fsc_curves(frequency, curves, "Half maps of the data at each class centre", counts)
    note = (
        "Averages of the particles around each class centre, made without the decoder, in two random disjoint halves. "
        "Dashed: the same for randomly chosen particles, which is what every subset shares."
    )
    yield Section("fsc", "What the data say", note, page.row([page.figure(fig, "From fsc_data.csv")]))


def _truth(path: Path) -> Iterator[Section]:
    if not path.is_file():
        return
    with reading(path, "write it again with `opustomo evaluate`"):
        found = json.loads(path.read_text())
    note = "The data are simulated: the benchmark's metrics against what was put in."
    of_set = {name: value for name, value in page.leaves(found) if not re.search(OF_A_CLASS, name)}
    of_classes = {
        re.sub(OF_A_CLASS, OTHER_CLASS, name): value for name, value in page.leaves(found) if name not in of_set
    }
    body = page.table(of_set)
    if of_classes:
        body += f"<details><summary>Every class by itself</summary>{page.table(of_classes)}</details>"
    yield Section("truth", "Against the truth", note, body)


def _next(run: Run, analysis: Analysis) -> Section:
    k = len(analysis.centre_index)
    sizes = np.bincount(analysis.labels, minlength=k)
    largest = " ".join(str(c) for c in sorted(np.argsort(-sizes, kind="stable")[:2]))
    where, star = shlex.quote(str(run.path)), shlex.quote(str(run.star))
    again = _options(run.config, "mask", "downfrac", "contrast", "normalisation")
    datadir = _options(run.config, "datadir")
    # names in selected.star are relative to the folder of the STAR file that it was taken from
    source = datadir or f" --datadir {shlex.quote(str(run.star.parent))}"
    fewer = max(2, k // 2)
    steps = {
        "Keep the classes that look right (here the two largest: edit the numbers) as a STAR file with every column": (
            f"opustomo select {star} --run {where} --kmeans {k} --classes {largest} -o selected"
        ),
        "Train again on those particles alone": f"opustomo train selected/selected.star{source}{again} -o selected-run",
        "Class maps at the pixel size and box of the subtomograms": (
            f"opustomo volumes {where} --kmeans {k} --angpix {run.grid.pixel_size:g} --box {run.grid.box} -o maps"
        ),
        "What the data, not the decoder, show at every class, with half-map FSC": (
            f"opustomo volumes {where} --kmeans {k} --from-data"
        ),
        "How good every class is: half maps of its members against random classes of its size, shown on this page": (
            f"opustomo quality {where} --kmeans {k}\nopustomo report {where} --clusters {k}"
        ),
        "All ten maps along the first component": f"opustomo volumes {where} --pc 1",
        "Another number of classes, and this page again": (
            f"opustomo analyze {where} --clusters {fewer} --skip-umap\nopustomo report {where} --clusters {fewer}"
        ),
    }
    if (analysis.folder / "groups" / "labels.pkl").is_file():
        steps = {
            "Keep one of the groups along the discrete axes (edit the number)": (
                f"opustomo select {star} --run {where} --groups --classes 0 -o selected"
            ),
            "Maps of the groups from the data, full size, with half maps for relion_postprocess": (
                f"opustomo volumes {where} --groups --full"
            ),
        } | steps
    if run.kind == "linear":
        steps = {
            "Train the network, which starts from this stage": f"opustomo train {star}{datadir}{again} -o network"
        } | steps
    body = "".join(page.command(purpose, line) for purpose, line in steps.items())
    return Section("next", "What to do next", "", body)


def _options(config: dict[str, Any], *names: str) -> str:
    """The named options of a run as typed on a command line; those not set or left to detection are left out."""
    values = {name: str(config.get(name) or "") for name in names}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in values.items() if value not in ("", "auto"))


def _settings(run: Run) -> Section:
    lines = _log_lines(run.path / "run.log")
    body = page.command("Command", lines[-1]) if lines else ""
    entries = page.table(dict(page.leaves(run.config)))
    body += f"<details><summary>Every option and resolved value (config.yaml)</summary>{entries}</details>"
    return Section("settings", "What was run", "", body)


def _log_lines(path: Path) -> list[str]:
    """The command lines that run.log records ("... opustomo VERSION, Python X: COMMAND")."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split(": ", 1)[1] for line in lines if " opustomo " in line and ", Python " in line and ": " in line]
