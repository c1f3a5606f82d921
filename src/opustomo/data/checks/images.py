"""Owns: what the voxels of a sample of subtomograms say: empty, not finite, odd contrast, cut off, masked."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo.data.findings import Finding, listed, span
from opustomo.data.mrc import read_slices, read_volume
from opustomo.data.particles import Particles
from opustomo.machine import usable_cores

OUTLIER = 5.0  # median absolute deviations, as standard deviations of a normal distribution
_REMOVE = "extract it again or remove its row: reading stops at such a box (not with --damaged skip)"


class Greys(NamedTuple):
    """Grey values of one subtomogram; flat: outer faces (of 6) that are constant."""

    mean: float
    std: float
    finite: bool
    empty: bool
    flat: int


class Sample(NamedTuple):
    """Grey values of the rows looked at, and the names of their files."""

    rows: NDArray[np.int64]
    greys: list[Greys]
    names: list[str]

    @property
    def usable(self) -> NDArray[np.int64]:
        """Rows that are finite and not empty."""
        keep = [greys.finite and not greys.empty for greys in self.greys]
        return self.rows[np.array(keep, bool)]

    def named(self, condition: Sequence[bool]) -> list[str]:
        """Files for which the condition holds, with their rows in the STAR file."""
        return [
            f"{name} (row {row + 1})" for name, row, yes in zip(self.names, self.rows, condition, strict=True) if yes
        ]


def read_sample(particles: Particles, rows: NDArray[np.int64], names: Sequence[str]) -> Sample:
    """Read the subtomograms at ``rows``; names are those in the STAR file, one per particle."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        greys = list(pool.map(_stack_greys if particles.stacks else _greys, *_places(particles, rows)))
    return Sample(rows, greys, [names[i] for i in rows])


def _places(particles: Particles, rows: NDArray[np.int64]) -> tuple[list[Any], ...]:
    files = [particles.image_files[i] for i in rows]
    return (files, [particles.slices[particles.tilt_index(i)] for i in rows]) if particles.stacks else (files,)


def _stack_greys(path: Path, slices: NDArray[np.int64]) -> Greys:
    """Of all images of a particle together; what is cut off is left out image by image."""
    data = read_slices(path, slices)
    return _summary(data, 0) if np.isfinite(data).all() else Greys(0.0, 0.0, False, False, 0)


def _greys(path: Path) -> Greys:
    data = read_volume(path)[0]
    if not np.isfinite(data).all():
        return Greys(0.0, 0.0, False, False, 0)
    faces = [np.take(data, index, axis) for axis in range(3) for index in (0, -1)]
    flat = sum(bool(face.min() == face.max()) for face in faces)
    return _summary(data, flat)


def _summary(data: NDArray[np.float32], flat: int) -> Greys:
    empty = bool(data.min() == data.max())
    return Greys(float(data.mean(dtype=np.float64)), float(data.std(dtype=np.float64)), True, empty, flat)


def grey_findings(sample: Sample, total: int) -> list[Finding]:
    """Empty boxes, NaNs, outlying contrast, cut-off or masked boxes, and the usual grey values."""
    read = len(sample.rows)
    where = f"of {read} read" if read < total else f"of all {read}"
    broken = sample.named([not greys.finite for greys in sample.greys])
    empty = sample.named([greys.empty for greys in sample.greys])
    findings = []
    for names, topic, words in (
        (broken, "NaN", "have NaN or infinite voxels"),
        (empty, "empty", "are empty (one grey value)"),
    ):
        if names:
            found = f"{len(names)} {where} {words}: {listed(names)}"
            findings.append(Finding("error", topic, found, _REMOVE, {"count": len(names), "read": read}))
    if len(sample.usable):
        findings += _spread(sample, where) + _cut_off(sample, where)
    return findings


def _spread(sample: Sample, where: str) -> list[Finding]:
    std = np.array([greys.std for greys in sample.greys if greys.finite and not greys.empty])
    median = float(np.median(std))
    # boxes normalised one by one differ by rounding alone: a fifth is the least difference worth a word
    limit = max(OUTLIER * 1.4826 * float(np.median(np.abs(std - median))), 0.2 * median)
    odd = [g.finite and not g.empty and abs(g.std - median) > limit for g in sample.greys]
    mean = float(np.median([g.mean for g in sample.greys if g.finite and not g.empty]))
    mean = mean if abs(mean) > 1e-3 * median else 0.0  # rounding of the extraction
    found = f"mean {mean:.3g}, standard deviation {span(std.min(), std.max(), '.3g')} ({len(sample.rows)} read)"
    values = {"mean": mean, "std_median": median, "std_min": float(std.min()), "std_max": float(std.max())}
    findings = [Finding("ok", "grey values", found, "used as they are; contrast is fitted per particle", values)]
    names = sample.named(odd)
    if names:
        found = f"{len(names)} {where} differ in standard deviation by far more than the others do: {listed(names)}"
        action = "used as they are; look at them: gold, the edge of the tomogram or partly empty boxes"
        findings.append(Finding("warning", "outliers", found, action, {"count": len(names)}))
    return findings


def _cut_off(sample: Sample, where: str) -> list[Finding]:
    flat = [g.flat > 0 and not g.empty for g in sample.greys]
    masked = [g.flat == 6 and not g.empty for g in sample.greys]
    if 2 * sum(masked) > len(masked):
        found = f"{sum(masked)} {where} are constant on all six faces: masked subtomograms"
        action = "extract without a mask: the noise outside is needed to weight the data"
        return [Finding("warning", "masked", found, action, {"count": sum(masked)})]
    names = sample.named(flat)
    if not names:
        return []
    found = f"{len(names)} {where} end in constant values: {listed(names)}"
    action = "they reach over the edge of the tomogram; used as they are, better removed"
    return [Finding("warning", "cut off", found, action, {"count": len(names)})]
