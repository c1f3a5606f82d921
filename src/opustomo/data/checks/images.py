"""Owns: what the voxels of a sample of subtomograms say: empty, not finite, odd contrast, cut off, masked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo.config import InputOptions
from opustomo.data.findings import Finding, listed, span
from opustomo.data.mrc import read_volume
from opustomo.data.observe import Noise, estimate_noise
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask

OUTLIER = 5.0  # median absolute deviations, as standard deviations of a normal distribution
_REMOVE = "extract it again or remove its row: reading stops at such a box"


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
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        greys = list(pool.map(_greys, [particles.image_files[i] for i in rows]))
    return Sample(rows, greys, [names[i] for i in rows])


def _greys(path: Path) -> Greys:
    data = read_volume(path)[0]
    if not np.isfinite(data).all():
        return Greys(0.0, 0.0, False, False, 0)
    faces = [np.take(data, index, axis) for axis in range(3) for index in (0, -1)]
    flat = sum(bool(face.min() == face.max()) for face in faces)
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


def noise_model(particles: Particles, grid: Grid) -> Noise | UserError:
    """Contrast, normalisation and noise of these particles as ``train`` would find them without being told."""
    size = grid.working_box
    mask = spherical_mask(size, 0.4 * size, 0.08 * size)
    try:
        return estimate_noise(particles, grid, mask, contrast="auto", normalisation="auto", sample=len(particles))
    except UserError as error:
        return error


def noise_findings(noise: Noise, particles: Particles, grid: Grid, options: InputOptions) -> list[Finding]:
    """Contrast sign, normalisation and how much the consensus explains; n particles were averaged."""
    seen = "white" if noise.contrast > 0 else "black"
    looks = "bright" if noise.contrast > 0 else "dark"
    signal, strongest = _consensus(noise.explained, len(particles), grid)
    if options.contrast not in ("auto", seen):
        found = f"protein looks {looks}, but --contrast {options.contrast} was given"
        contrast = Finding("warning", "contrast", found, "the option is obeyed; leave it out unless you are sure")
    elif not strongest:
        found = f"no average stands out to tell; {looks} is the better guess"
        contrast = Finding("warning", "contrast", found, "look at `opustomo average`, then give --contrast")
    else:
        found = f"protein is {looks} in the average of {len(particles)} particles"
        action = "used as it is" if seen == "white" else "inverted while reading"
        contrast = Finding("ok", "contrast", found, action, {"contrast": seen})
    return [contrast, *_normalisation(noise, particles, options), signal]


def _normalisation(noise: Noise, particles: Particles, options: InputOptions) -> list[Finding]:
    if particles.transfer != "tilts":
        found = "as in the CTF volume" if particles.transfer == "ctf_volume" else "as in the weight volume"
        action = "noise is estimated per Fourier voxel from the data"
        return [Finding("ok", "normalisation", found, action)]
    seen, words = ("mean", "averaged over") if noise.mean_normalised else ("sum", "summed over")
    if options.normalisation not in ("auto", seen):
        found = f"noise looks {words} the tilts, but --normalisation {options.normalisation} was given"
        action = "the option is obeyed; leave it out unless you are sure"
        return [Finding("warning", "normalisation", found, action)]
    found = f"{words} the tilts, as the noise across Fourier space shows"
    return [Finding("ok", "normalisation", found, "weighted accordingly", {"normalisation": seen})]


def _consensus(explained: Tensor, count: int, grid: Grid) -> tuple[Finding, bool]:
    """How far the consensus of ``count`` particles is seen in their own power; averaging noise explains 1/count."""
    shells = torch.arange(1, len(explained))
    signal = explained[1:] > 2.0 / count
    values = {"explained": [round(float(value), 4) for value in explained[1:]]}
    if not bool(signal.any()):
        found = f"the average of {count} particles stands out from the noise at no resolution"
        action = "look at `opustomo average`: poses, CTF or pixel size may be wrong, or the signal is weak"
        return Finding("warning", "signal", found, action, values), False
    last = int(shells[signal].max())
    limit = ", as far as was looked" if last >= len(shells) - 1 else ""
    found = f"the average of {count} particles is seen to about {grid.extent / last:.0f} A{limit}"
    return Finding("ok", "signal", found, values=values), True
