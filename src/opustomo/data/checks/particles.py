"""Owns: the particle table itself: counts, half sets, duplicates, origins and the spread of orientations."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from opustomo.data.findings import Finding, listed, span
from opustomo.data.particles import Particles

CHANCE = 1e-3  # a gap this unlikely for random orientations is no accident
_FEW_FOR_GAPS, _FEW_FOR_AREA = 40, 192  # particles


def count_findings(particles: Particles) -> list[Finding]:
    """Dialect, particles, tomograms and half sets."""
    total = len(particles)
    findings = [Finding("ok", "read as", particles.notes[0] if particles.stacks else particles.dialect)]
    per_tomogram = Counter(particles.tomogram)
    if set(per_tomogram) == {""}:
        found = f"{total} particles; the file names no tomograms"
        findings.append(Finding("note", "count", found, "all are treated as one tomogram", {"particles": total}))
    else:
        number = len(per_tomogram)
        spread = f" ({span(min(per_tomogram.values()), max(per_tomogram.values()))} in each)" if number > 1 else ""
        found = f"{total} particles in {number} tomogram{'s' if number > 1 else ''}{spread}"
        findings.append(Finding("ok", "count", found, values={"particles": total, "tomograms": number}))
    if total < 50:
        found = f"{total} particles are few"
        findings.append(Finding("warning", "few", found, "expect the average and at most one or two components"))
    return findings + _half_sets(particles)


def _half_sets(particles: Particles) -> list[Finding]:
    first, second, none = (int((particles.half == value).sum()) for value in (1, 2, 0))
    values = {"half1": first, "half2": second, "none": none}
    if none == len(particles):
        return [
            Finding("note", "half sets", "none in the file", "alternate particles make the halves for the FSC", values)
        ]
    found = f"{first} and {second}" + (f", {len(particles) - first - second} without" if none else "")
    if none or min(first, second) < 0.8 * max(first, second):
        return [Finding("warning", "half sets", f"{found}: uneven", "make rlnRandomSubset anew for a fair FSC", values)]
    return [Finding("ok", "half sets", found, values=values)]


def duplicate_findings(particles: Particles) -> list[Finding]:
    """Subtomograms used twice, and particles of one tomogram within one pixel of each other."""
    # tilt images of many particles may share one file
    stacks = (
        zip(particles.image_files, particles.slices[particles.tilt_offsets[:-1]], strict=True)
        if particles.stacks
        else ()
    )
    uses = Counter([f"{path}@{number}" for path, number in stacks] or [str(path) for path in particles.image_files])
    repeated = [path for path, number in uses.items() if number > 1]
    if repeated and len(set(uses.values())) == 1:
        times = uses[repeated[0]]
        found = f"every subtomogram is used {times} times: symmetry-expanded by the look of it"
        action = (
            "every row gets its own code, held-out particles are held out with all copies; select and export take "
            "--unique"
        )
        return [Finding("note", "duplicates", found, action, {"files": len(repeated), "times": times})]
    if repeated:
        found = (
            f"{len(repeated)} subtomograms are used more than once: {listed([Path(path).name for path in repeated])}"
        )
        return [Finding("warning", "duplicates", found, "remove the extra rows: they count twice and leak into "
                        "validation", {"files": len(repeated)})]  # fmt: skip
    return _neighbours(particles)


def _neighbours(particles: Particles) -> list[Finding]:
    if particles.coordinates is None or len(particles) < 2:
        return []
    if np.ptp(particles.coordinates, 0).max() == 0:
        found = "all coordinates are the same"
        return [Finding("note", "duplicates", found, "duplicates are only looked for by file name: none")]
    close: list[int] = []
    for name in np.unique(particles.tomogram.astype(str)):
        rows = np.flatnonzero(particles.tomogram == name)
        if len(rows) > 1:
            nearest = KDTree(particles.coordinates[rows]).query(particles.coordinates[rows], k=2)[0][:, 1]
            close += rows[nearest < 1.0].tolist()
    if not close:
        return [Finding("ok", "duplicates", "none: no file twice, no two particles within one pixel")]
    labels = [f"row {row + 1}" for row in sorted(close)]
    found = f"{len(close)} particles lie within one pixel of another one: {listed(labels)}"
    action = "remove duplicate picks: they count twice and leak into validation"
    return [Finding("warning", "duplicates", found, action, {"rows": len(close)})]


def origin_findings(particles: Particles) -> list[Finding]:
    """How far the particles lie from the centres of their boxes."""
    length = np.linalg.norm(particles.origin, axis=1)
    if not length.any():
        return [Finding("ok", "origins", "all zero: particles are taken to be centred in their boxes")]
    far = np.flatnonzero(length > particles.box / 4)
    values = {"median": round(float(np.median(length)), 3), "largest": round(float(length.max()), 3), "far": len(far)}
    found = f"{np.median(length):.1f} pixels off the centre (median), {length.max():.1f} at most"
    if len(far) == 0:
        return [Finding("ok", "origins", found, "shifted while reading", values)]
    labels = [f"{particles.names[i]} (row {i + 1})" for i in far]
    found += f"; {len(far)} beyond a quarter of the box: {listed(labels)}"
    action = "extract again at the refined positions, or check the unit (pixels or Angstrom)"
    return [Finding("warning", "origins", found, action, values)]


def orientation_findings(particles: Particles) -> list[Finding]:
    """Whether the viewing directions fill the sphere or only the asymmetric unit of a point group."""
    rot, tilt = particles.euler[:, 0], particles.euler[:, 1] % 360
    tilt = np.where(tilt > 180, 360 - tilt, tilt)
    values: dict[str, Any] = {
        name: _ends(angles) for name, angles in zip(("rot", "tilt", "psi"), particles.euler.T, strict=True)
    }
    if not np.ptp(particles.euler, 0).any() and len(particles) > 1:
        found = "all particles have the same Euler angles"
        return [Finding("warning", "orientations", found, "give the STAR file after alignment", values)]
    if len(particles) < _FEW_FOR_GAPS:
        found = "too few particles to tell whether they fill the sphere"
        return [Finding("note", "orientations", found, values=values)]
    symmetry = _rotational_symmetry(rot, tilt)
    star, group = shlex.quote(str(particles.source)), symmetry or "GROUP"
    action = (
        f"nothing is changed; to see what breaks it: opustomo expand {star} --symmetry {group} -o expanded.star; "
        "or ignore this if views are preferred"
    )
    if symmetry:
        found = f"the angles fill only the asymmetric unit of {symmetry}: aligned with that symmetry by the look of it"
        return [Finding("warning", "orientations", found, action, {**values, "symmetry": symmetry})]
    if len(particles) < _FEW_FOR_AREA:
        return [Finding("ok", "orientations", "no sign of an imposed symmetry", values=values)]
    filled = _filled_fraction(rot, tilt)
    found = f"the viewing directions fill {filled:.0%} of the sphere"
    values["filled"] = round(filled, 3)
    if filled < 0.62:
        found += ": preferred views, or an imposed symmetry (such as T, O, I)"
        return [Finding("warning", "orientations", found, action, values)]
    return [Finding("ok", "orientations", found, values=values)]


def _rotational_symmetry(rot: NDArray[np.float64], tilt: NDArray[np.float64]) -> str:
    """Cn or Dn whose asymmetric unit (360/n in rot; for Dn one hemisphere) the angles just fill, "" if none.

    RELION samples and stores orientations inside the unit: rot covers one interval of 360/n, evenly.
    """
    clear = (tilt > 10) & (tilt < 170)  # rot means nothing at the poles
    angles = np.sort(rot[clear] % 360)
    if len(angles) < _FEW_FOR_GAPS:
        return ""
    width = 360.0 - float(np.diff(angles, append=angles[0] + 360).max())
    if len(angles) * (width / 360) ** (len(angles) - 1) > CHANCE or width == 0:
        return ""
    fold = round(360 / width)
    # angles that stop just short of the unit by chance and those nudged over its edge by local searches
    if fold < 2 or abs(width * fold / 360 - 1) > 0.12 or not _even(angles, width):
        return ""
    one_side = len(tilt) * 0.5 ** len(tilt) < CHANCE and (tilt.max() < 92 or tilt.min() > 88)
    return f"{'D' if one_side else 'C'}{fold}"


def _even(angles: NDArray[np.float64], width: float) -> bool:
    """Whether angles fill their interval evenly (an imposed symmetry) rather than as a peak (preferred views)."""
    gaps = np.diff(angles, append=angles[0] + 360)
    start = angles[(int(gaps.argmax()) + 1) % len(angles)]
    position = np.sort(((angles - start) % 360) / width)
    distance = np.abs(position - np.linspace(0, 1, len(position))).max()
    # the Kolmogorov-Smirnov bound at about 0.3 %, and some room for angles nudged over the edges
    return bool(distance < min(0.2, max(0.06, 1.8 / len(position) ** 0.5)))


def _filled_fraction(rot: NDArray[np.float64], tilt: NDArray[np.float64]) -> float:
    """Fraction of equal patches of the sphere that hold a viewing direction (rot, tilt); 8 are expected in each."""
    count = min(len(rot) // 8, 192)
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index  # Fibonacci lattice
    radius = np.sqrt(1 - height**2)
    patches = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], 1)
    a, b = np.deg2rad(rot), np.deg2rad(tilt)
    directions = np.stack([np.sin(b) * np.cos(a), np.sin(b) * np.sin(a), np.cos(b)], 1)
    return len(np.unique(KDTree(patches).query(directions)[1])) / count


def _ends(values: NDArray[np.float64]) -> list[float]:
    return [round(float(values.min()), 3), round(float(values.max()), 3)]
