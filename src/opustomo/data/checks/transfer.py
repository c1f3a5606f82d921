"""Owns: the numbers of the tilt series: how many tilts, which angles, and CTF parameters in believable units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo.data.findings import Finding, Level, span
from opustomo.data.particles import SCALE, TILT_COLUMNS, Particles

_DEFOCUS = (
    1_000.0,
    150_000.0,
)  # Angstrom; outside lie micrometres (2.5) and nanometres (2500 would pass: 250 does not)
_DOSE = 300.0  # e/A^2: more was never put on a cell


def transfer_findings(particles: Particles) -> list[Finding]:
    """Tilt counts, angles, defocus, microscope and dose; one line for CTF and weight volumes."""
    if particles.transfer != "tilts":
        kind = "weight volume" if particles.transfer == "weight_volume" else "CTF volume"
        number = len(set(particles.ctf_files))
        shared = " shared by all particles" if number == 1 and len(particles) > 1 else ""
        data = "CTF-premultiplied" if particles.premultiplied else "not CTF-premultiplied"
        found = f"{number} {kind}{'s' if number > 1 else ''}{shared}; the data are {data}"
        return [Finding("ok", "CTF", found, "tilt angles and defocus are not needed", {"volumes": number})]
    rows = particles.tilts[particles.tilts[:, SCALE] != 0]
    table = dict(zip(TILT_COLUMNS, rows.T, strict=True))
    return [
        _counts(particles),
        *_angles(table),
        _defocus(table, particles),
        *_microscope(table),
        _dose(table["bfactor"], table["dose"], particles),
    ]


def _counts(particles: Particles) -> Finding:
    listed = np.diff(particles.tilt_offsets)
    kept = np.array([len(particles.tilts_of(i)) for i in range(len(particles))])
    excluded = int((listed - kept).sum())
    values = {"min": int(kept.min()), "median": float(np.median(kept)), "max": int(kept.max()), "excluded": excluded}
    found = f"{kept.min()} for every particle"
    if kept.min() < kept.max():
        found = f"{kept.min()} to {kept.max()} per particle, median {np.median(kept):g}"
    if excluded:
        found += f"; {excluded / listed.sum():.1%} are excluded (scale 0)"
    if kept.min() < 5:
        poor = int((kept < 5).sum())
        found += f"; {poor} particles have fewer than 5"
        return Finding("warning", "tilts", found, "remove those particles: they say almost nothing", values)
    action = "every particle keeps its own tilts" if kept.min() < kept.max() else ""
    return Finding("ok", "tilts", found, action, values)


def _angles(table: dict[str, NDArray[np.float64]]) -> list[Finding]:
    angles = table["tilt"]
    low, high = float(angles.min()), float(angles.max())
    steps = np.diff(np.unique(angles.round(1)))
    step = float(np.median(steps)) if len(steps) else 0.0
    values = {"low": low, "high": high, "step": round(step, 2)}
    found = f"{low:.4g} to {high:.4g} degrees" + (f", step {step:.3g}" if step else "")
    findings = []
    level: Level = "ok"
    action = ""
    if max(-low, high) > 90:
        level, action = "warning", "no stage tilts beyond 90 degrees: check rlnAngleTilt"
    elif high - low < 60:
        level, action = "warning", "a narrow range: expect maps stretched along the beam"
    elif abs(low + high) > 20:
        found += f"; centred at {(low + high) / 2:.3g} (pre-tilted lamella)"
    findings.append(Finding(level, "tilt angles", found, action, values))
    turned = float(max(np.abs(table["rot"]).max(), np.abs(table["psi"]).max()))
    if turned > 1e-3:
        found = "three Euler angles per tilt (levelled volumes or refined tilts)"
        findings.append(Finding("ok", "tilt frames", found, "all three are used, nothing is rounded"))
    return findings


def _defocus(table: dict[str, NDArray[np.float64]], particles: Particles) -> Finding:
    defocus = 0.5 * (table["defocus_u"] + table["defocus_v"])
    spread = np.abs(table["defocus_u"] - table["defocus_v"])
    values = {
        "low": float(defocus.min()),
        "median": float(np.median(defocus)),
        "high": float(defocus.max()),
        "astigmatism": float(np.median(spread)),
    }
    found = f"{defocus.min() / 1e4:.3g} to {defocus.max() / 1e4:.3g} um underfocus"
    if spread.max() > 1:
        found += f", astigmatism {np.median(spread):.0f} A (median)"
    outside = (defocus < _DEFOCUS[0]) | (defocus > _DEFOCUS[1])
    if not outside.any():
        return Finding("ok", "defocus", found, values=values)
    what = f"{np.abs(defocus).min():g} to {np.abs(defocus).max():g} in the file"
    if outside.mean() > 0.5:
        unit = _unit(float(np.median(defocus)))
        found = f"{what} is no defocus in Angstrom{unit}"
        return Finding("error", "defocus", found, "write Angstrom, underfocus positive", values)
    found = f"{outside.mean():.1%} of the tilts lie outside 0.1 to 15 um ({what})"
    return Finding("warning", "defocus", found, "check the CTF fits of these tilts or exclude them (scale 0)", values)


def _unit(value: float) -> str:
    if value < 0:
        return " (negative: overfocus, or the sign is turned)"
    return " (micrometres?)" if value < 20 else " (nanometres?)" if value < _DEFOCUS[0] else ""


class _Range(NamedTuple):
    column: str
    name: str
    unit: str
    low: float
    high: float
    hint: str


_MICROSCOPE = (
    _Range("voltage", "voltage", "kV", 60, 400, "write kV, not V"),
    _Range("cs", "Cs", "mm", 0, 10, "write millimetres"),
    _Range("amplitude", "amplitude contrast", "", 0, 0.5, "write a fraction, e.g. 0.07"),
)


def _microscope(table: dict[str, NDArray[np.float64]]) -> list[Finding]:
    wrong, words = [], []
    for column, name, unit, low, high, hint in _MICROSCOPE:
        values = table[column]
        text = f"{name} {span(values.min(), values.max())} {unit}".strip()
        words.append(text)
        if values.min() < low or values.max() > high:
            wrong.append(Finding("error", "microscope", f"{text}: not believable", hint))
    phase = table["phase_shift"]
    if phase.any():
        words.append(f"phase plate {span(phase.min(), phase.max())} degrees")
    values_found = {name: float(np.median(table[name])) for name in ("voltage", "cs", "amplitude", "phase_shift")}
    return wrong or [Finding("ok", "microscope", ", ".join(words), values=values_found)]


def _dose(bfactor: NDArray[np.float64], dose: NDArray[np.float64], particles: Particles) -> Finding:
    """The B-factor is 4 x dose in both dialects that write it; tilt images may be filtered by dose instead."""
    if dose.any():
        found = f"{span(dose.min(), dose.max(), '.3g')} e/A^2 before the images"
        if dose.max() > _DOSE:
            action = "far more than a tilt series takes: check rlnMicrographPreExposure"
            return Finding("warning", "dose", found, action, {"dose_high": float(dose.max())})
        return Finding("ok", "dose", found, "damped as by the dose filter of RELION", {"dose_high": float(dose.max())})
    low, high = float(bfactor.min()), float(bfactor.max())
    values = {"bfactor_low": low, "bfactor_high": high}
    found = f"B-factor {span(low, high, '.4g')} A^2"
    if high == 0:
        return Finding("note", "dose", "no B-factors in the CTF files", "all tilts count alike up to Nyquist", values)
    found += f", as after {span(low / 4, high / 4, '.3g')} e/A^2"
    if high / 4 > _DOSE:
        return Finding("warning", "dose", found, "far more than a tilt series takes: check rlnCtfBfactor", values)
    nyquist = np.exp(-high / 4 / (2 * particles.pixel_size) ** 2)
    return Finding("ok", "dose", found, f"the last tilt is damped to {nyquist:.0%} at Nyquist", values)
