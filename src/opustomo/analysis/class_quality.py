"""How good each class is, measured on the data alone and ranked without a template (verb ``quality``).

Owns: quality.csv, quality_fsc.csv and their pictures beside the labels; what is compared is in ``class_halves``.
"""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis import class_page, plots
from opustomo.analysis.class_halves import (
    FEWEST,
    Agreement,
    Bools,
    Floats,
    agreement,
    averages,
    deal,
    draw,
    half_sums,
    independent_voxels,
)
from opustomo.analysis.controls import tomogram_names
from opustomo.analysis.difference import write_difference
from opustomo.analysis.latents import CERTAIN, analysis_folder, class_probability
from opustomo.analysis.made_from import open_rows, particle_of_rows
from opustomo.analysis.score_maps import resolution
from opustomo.analysis.selection import find_labels
from opustomo.config import QualityConfig
from opustomo.data.atomic import write_csv
from opustomo.data.pickles import load_labels
from opustomo.errors import UserError, reading
from opustomo.monitor import progress

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

RANDOM = 3  # random classes drawn for each class
SURE = 2.0  # standard errors by which a class must beat chance to be called distinct
WORTHS = np.exp(np.linspace(-5, 5, 501))
NAN = float("nan")


@dataclass(frozen=True)
class ClassQuality:
    """One row of quality.csv; NaN (an empty cell) where something is not known or cannot be measured."""

    number: int
    particles: int
    fraction: float
    worth: float = NAN
    worth_low: float = NAN
    worth_high: float = NAN
    resolution_half: float = NAN
    resolution: float = NAN
    resolution_random: float = NAN
    fsc_area: float = NAN
    fsc_area_random: float = NAN
    difference_cc: float = NAN
    difference_cc_random: float = NAN
    nats: float = NAN
    nats_error: float = NAN
    nats_random: float = NAN
    nats_chance: float = NAN
    distinct: str = ""
    certain: float = NAN
    sigma: float = NAN
    outlier: float = NAN
    tomograms: float = NAN
    tomogram_entropy: float = NAN
    tomogram_entropy_random: float = NAN
    note: str = ""


COLUMNS = tuple(
    {"number": "class", "resolution_half": "resolution_0.5", "resolution": "resolution_0.143"}.get(f.name, f.name)
    for f in fields(ClassQuality)
)


def main(config: QualityConfig) -> None:
    """Verb ``quality``."""
    from opustomo.checkpoint import open_run

    run = open_run(config.run, config.epoch)
    labels, folder = _chosen(run, config)
    if config.difference:
        write_difference(run, labels, config.difference, folder, config.false_rate, config.seed)
        return
    for row in write_quality(run, labels, folder, config.seed):
        log.info("%s", in_words(row))
    log.info("written: %s", folder / "quality.csv")


def _chosen(run: Run, config: QualityConfig) -> tuple[NDArray[np.int64], Path]:
    """The classes asked for and the folder of the results."""
    if bool(config.kmeans) == bool(config.labels):
        raise UserError("quality: give either --kmeans K or --labels FILE")
    path = config.labels or find_labels(config.run, run.epoch, f"kmeans{config.kmeans}")[0]
    labels = load_labels(path)
    if len(labels) != len(run.codes):
        raise UserError(f"{path}: has {len(labels)} labels where {run.path} has {len(run.codes)} particles")
    inside = path.resolve().is_relative_to(run.path.resolve())  # nothing is written beside a file of elsewhere
    return labels, config.output or (path.parent if inside else analysis_folder(run) / path.stem)


def write_quality(run: Run, labels: NDArray[np.integer], folder: Path, seed: int = 0) -> list[ClassQuality]:
    """Measure the classes ``labels`` (P,) and write quality.csv, quality_fsc.csv and pictures into ``folder``.

    Returns the rows of quality.csv, best first.  UserError: the run has no cache.
    """
    subsets, half = class_subsets(labels, particle_of_rows(run), run.typical, seed)
    measured = measure(run, subsets, half, seed)
    share = np.bincount(labels, minlength=int(labels.max()) + 1) / len(labels)
    known = _known(run, labels, seed)
    voxels, extent = independent_voxels(run.mask), run.grid.crop * run.grid.working_pixel
    spread = excess_spread(measured, voxels)
    rows = []
    for number in np.unique(labels).tolist():
        row = {"number": number, "particles": int((labels == number).sum()), "fraction": float(share[number])}
        row |= known[number]
        if number in measured:
            row |= _scores(measured[number], float(share[number]), voxels, spread, extent)
        else:
            row["note"] = f"fewer than {FEWEST} particles: no halves"
        rows.append(ClassQuality(**row))
    rows.sort(key=lambda row: (math.isnan(row.worth), -row.worth, row.number))
    _write(rows, measured, extent, folder)
    return rows


def class_subsets(
    labels: NDArray[np.integer], particle: NDArray[np.int64], typical: Bools, seed: int
) -> tuple[dict[int, list[Bools]], Bools]:
    """For each class that can be halved its members and ``RANDOM`` random classes of the same size, and the halves.

    particle: (P,) which one each row is of.  Random classes are drawn from the typical rows, as many particles of
    either half, and as many copies of each, as the class has.
    """
    rng = np.random.default_rng(seed)
    half = deal(labels, particle, rng)
    candidates, subsets = np.flatnonzero(typical), {}
    for number in np.unique(labels).tolist():
        members = labels == number
        if min(len(np.unique(particle[members & side])) for side in (half, ~half)) >= FEWEST // 2:
            copies = np.sort(np.unique(particle[members], return_counts=True)[1])[::-1]
            random = (draw(copies, half, particle, rng.permutation(candidates)) for _ in range(RANDOM))
            subsets[number] = [members, *random]
    return subsets, half


def measure(run: Run, subsets: dict[int, list[Bools]], half: Bools, seed: int = 0) -> dict[int, list[Agreement]]:
    """The agreement of the halves of every subset, in the order given."""
    rows, grid, generator = open_rows(run), run.grid, torch.Generator().manual_seed(seed)
    everything = [run.typical, *(subset for group in subsets.values() for subset in group)]
    sums = half_sums(rows, everything, half, grid)
    average = averages(next(sums), run.mask, grid)
    told = progress(sums, len(everything) - 1, "quality of classes", "half maps")
    found = iter([agreement(part, average, run.mask, grid, generator) for part in told])
    return {number: [next(found) for _ in group] for number, group in subsets.items()}


def _scores(
    measured: list[Agreement], share: float, voxels: Floats, spread: float, extent: float
) -> dict[str, float | str]:
    """What a class has over the random classes of its size; spread: from ``excess_spread``."""
    own, random = measured[0], measured[1:]
    control = np.mean([r.fsc for r in random], 0)
    worth, low, high = relative_worth(own.fsc, control, voxels * RANDOM / (RANDOM + 1) / spread**2)
    scores: dict[str, float | str] = {
        "worth": worth, "worth_low": low, "worth_high": high,
        "resolution_half": seen_to(own.fsc, 0.5, voxels, extent),
        "resolution": seen_to(own.fsc, 0.143, voxels, extent),
        "resolution_random": seen_to(control, 0.143, voxels, extent),
        "fsc_area": float(own.fsc[1:].mean()), "fsc_area_random": float(control[1:].mean()),
    }  # fmt: skip
    if share == 1.0:
        return scores | {"note": "the only class: nothing to differ from"}
    chance = -math.log(share)
    distinct = own.nats - SURE * own.nats_error > chance
    return scores | {
        "difference_cc": own.correlation, "difference_cc_random": float(np.mean([r.correlation for r in random])),
        "nats": own.nats, "nats_error": own.nats_error, "nats_random": float(np.mean([r.nats for r in random])),
        "nats_chance": chance, "distinct": "yes" if distinct else "no",
    }  # fmt: skip


def relative_worth(own: Floats, control: Floats, voxels: Floats) -> tuple[float, float, float]:
    """How many typical particles one particle of a class is worth: the value, and one standard deviation either side.

    own, control: FSC (S,) of the class and of random classes of the same size; voxels: (S,) independent numbers in each
    shell.  Were a particle worth w others, its class would have w times their ratio of signal to noise in every shell.
    w is fitted on Fisher's scale atanh(FSC), where the error of every shell is 1 / sqrt(voxels), under the prior
    log w ~ N(0, 1): classes too small to tell stay near 1.
    """
    signal = np.clip(control, 0.0, 0.999)
    ratio = signal / (1 - signal)
    expected = WORTHS[:, None] * ratio / (1 + WORTHS[:, None] * ratio)
    apart = np.arctanh(np.clip(own, -0.999, 0.999)) - np.arctanh(np.clip(expected, 0.0, 0.999))
    log_worth = np.log(WORTHS)
    energy = 0.5 * (voxels * apart**2).sum(1) + 0.5 * log_worth**2
    share = np.exp(energy.min() - energy)
    share /= share.sum()
    mean = float(share @ log_worth)
    spread = float(share @ (log_worth - mean) ** 2) ** 0.5
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)


def excess_spread(measured: dict[int, list[Agreement]], voxels: Floats) -> float:
    """How much more the worth of random classes scatters than noise alone lets it, at least 1.

    Each is compared with the others of its size: those that differ in their share of a state or in their wedges agree
    less by that, in all shells at once.
    """
    found = []
    for _, *random in measured.values():
        for i, one in enumerate(random):
            others = np.mean([other.fsc for j, other in enumerate(random) if j != i], 0)
            worth, _, high = relative_worth(one.fsc, others, voxels * (RANDOM - 1) / RANDOM)
            found.append((math.log(worth) / math.log(high / worth)) ** 2)
    return max(1.0, math.sqrt(np.mean(found))) if found else 1.0


def seen_to(fsc: Floats, level: float, voxels: Floats, extent: float) -> float:
    """Resolution in Angstrom where ``fsc`` falls below ``level``; NaN where what is before could be noise.

    The shells up to there, taken together, must correlate by more than three standard errors of no correlation.
    """
    below = np.flatnonzero(fsc[1:] < level) + 1
    before = slice(1, int(below[0]) if below.size else len(fsc))
    count = float(voxels[before].sum())
    if count == 0 or float(voxels[before] @ fsc[before]) / count < 3 / math.sqrt(count):
        return NAN
    return resolution(fsc, level, extent)


def _known(run: Run, labels: NDArray[np.integer], seed: int) -> dict[int, dict[str, float]]:
    """Means over the members of every class of what the run knows about single particles; its tomograms."""
    values: dict[str, Floats] = {}
    if run.sigma is not None:
        values["certain"] = (class_probability(run.codes, run.sigma, labels, seed) >= CERTAIN).astype(float)
        spread = run.codes.std(0)
        used = spread > 0
        if used.any():
            values["sigma"] = np.sqrt(np.mean((run.sigma[:, used] / spread[used]) ** 2, axis=1))
    outlier = (run.linear_results() or {}).get("outlier")
    if outlier is not None and len(outlier) == len(run.codes):
        values["outlier"] = outlier.astype(np.float64)
    names, rng = tomogram_names(run), np.random.default_rng(seed)
    found = {}
    for number in np.unique(labels).tolist():
        members = np.flatnonzero(labels == number)
        found[number] = {name: float(value[members].mean()) for name, value in values.items()}
        if names is not None:
            random = [entropy(names[rng.permutation(len(names))[: len(members)]]) for _ in range(10)]
            found[number] |= {
                "tomograms": float(len(np.unique(names[members]))),
                "tomogram_entropy": entropy(names[members]),
                "tomogram_entropy_random": float(np.mean(random)),
            }
    return found


def entropy(names: NDArray[np.str_]) -> float:
    """Of the distribution over names, in nats: 0 for one name, log n for n equally frequent ones."""
    share = np.unique(names, return_counts=True)[1] / len(names)
    return float(-(share * np.log(share)).sum()) + 0.0


def in_words(row: ClassQuality) -> str:
    """One line for the log."""
    start = f"class {row.number}: {row.particles} particles"
    if math.isnan(row.worth):
        return f"{start}, {row.note}"
    reach = "no resolution" if math.isnan(row.resolution) else f"{row.resolution:.1f} A"
    line = f"{start}, each worth {row.worth:.2f} ({row.worth_low:.2f} to {row.worth_high:.2f}) typical ones, {reach}"
    verdict = {"yes": "distinct", "no": "not distinct"}.get(row.distinct)
    return f"{line}, {verdict} ({row.nats:.1f} nats each; by chance at most {row.nats_chance:.1f})" if verdict else line


def _write(rows: list[ClassQuality], measured: dict[int, list[Agreement]], extent: float, folder: Path) -> None:
    cells = [[_cell(getattr(row, f.name)) for f in fields(ClassQuality)] for row in rows]
    write_csv(folder / "quality.csv", COLUMNS, cells)
    curves: dict[str, Floats] = {}
    for number, (own, *random) in sorted(measured.items()):
        for name, column in (("fsc", ""), ("difference_fsc", "_difference")):
            curves[f"class{number}{column}"] = getattr(own, name)
            curves[f"class{number}{column}_random"] = np.mean([getattr(r, name) for r in random], 0)
    if not curves:
        return
    frequency = np.arange(len(next(iter(curves.values())))) / extent
    table = np.stack([frequency, *curves.values()], 1)
    write_csv(folder / "quality_fsc.csv", ("frequency", *curves), [[f"{v:.6f}" for v in line] for line in table])
    plots.save(class_page.quality_figure(rows), folder / "quality.png")
    plots.save(class_page.agreement_figure(frequency, curves, rows), folder / "quality_fsc.png")


def _cell(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.5g}"


QUALITY_AGAIN = "write it again with `opustomo quality`"


def read_quality(path: Path) -> list[ClassQuality]:
    """The rows of quality.csv, best first; UserError when it is not one."""
    with reading(path, QUALITY_AGAIN), path.open(newline="") as file:
        table = list(csv.reader(file))
    if not table or tuple(table[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in table):
        raise UserError(f"{path}: is not a table of `opustomo quality`; {QUALITY_AGAIN}")
    found = []
    with reading(path, QUALITY_AGAIN):
        for row in table[1:]:
            values: dict[str, Any] = {
                f.name: _value(f.type, cell) for f, cell in zip(fields(ClassQuality), row, strict=True)
            }
            found.append(ClassQuality(**values))
    return found


def _value(kind: object, cell: str) -> float | int | str:
    return cell if kind == "str" else int(cell) if kind == "int" else float(cell or "nan")
