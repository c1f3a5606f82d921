"""Owns: what all the files say before any of them is read: present, readable, box, pixel size, agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mrcfile.utils import dtype_from_mode

from opustomo.data.findings import Finding, listed, megabytes, span
from opustomo.data.mrc import MrcHeader, header_of
from opustomo.data.readers import relion
from opustomo.data.readers.sampling import differ, is_set
from opustomo.data.star import StarFile
from opustomo.errors import UserError
from opustomo.machine import usable_cores


class Survey(NamedTuple):
    """Headers of distinct files, in their order; None and a reason where one cannot be read."""

    names: list[str]
    headers: list[MrcHeader | None]
    reasons: list[str]

    @property
    def readable(self) -> list[tuple[str, MrcHeader]]:
        """Names with headers, of the files that have one."""
        return [(name, header) for name, header in zip(self.names, self.headers, strict=True) if header is not None]


def survey_headers(files: Sequence[Path], names: Sequence[str]) -> Survey:
    """Read the header of every distinct file; names are what the STAR file calls them."""
    distinct = dict(zip(files, names, strict=True))
    # threads hide the latency of network disks, where a header costs milliseconds
    with ThreadPoolExecutor(min(32, 8 * usable_cores())) as pool:
        found = list(pool.map(_header, distinct))
    reasons = [f"{reason}" for _, reason in found if reason]
    return Survey(list(distinct.values()), [header for header, _ in found], reasons)


def box_findings(survey: Survey, stacks: bool = False) -> list[Finding]:
    """Whether every subtomogram, or stack of images, can be read and has the box of the majority."""
    findings = []
    total, readable = len(survey.names), survey.readable
    if survey.reasons:
        found = f"{len(survey.reasons)} of {total} files cannot be read, first: {survey.reasons[0]}"
        findings.append(Finding("error", "files", found, "extract them again or remove their rows"))
    if not readable:
        return findings
    if stacks:
        return [*findings, *_image_findings(readable)]
    shapes = Counter(header.shape for _, header in readable)
    usual = shapes.most_common(1)[0][0]
    other = [f"{name} ({_size(header.shape)})" for name, header in readable if header.shape != usual]
    if other:
        found = f"{len(other)} of {total} subtomograms are not {_size(usual)}: {listed(other)}"
        findings.append(
            Finding("error", "box", found, "extract them with one box size or remove their rows", {"count": len(other)})
        )
    elif len(set(usual)) > 1 or usual[0] % 2:
        findings.append(Finding("error", "box", f"{_size(usual)} voxels", "extract with a cubic box of even size"))
    else:
        size = sum(_bytes(header) for _, header in readable)
        found = f"{usual[0]}^3 voxels in all {total} subtomograms, {megabytes(size)} in {_mode(readable[0][1])}"
        findings.append(Finding("ok", "box", found, values={"box": usual[0], "bytes": size}))
    return findings


def _image_findings(readable: list[tuple[str, MrcHeader]]) -> list[Finding]:
    shapes = Counter(header.shape[1:] for _, header in readable)
    (y, x), count = shapes.most_common(1)[0]
    other = [
        f"{name} ({header.shape[2]} x {header.shape[1]})" for name, header in readable if header.shape[1:] != (y, x)
    ]
    if other:
        found = f"{len(other)} of {len(readable)} stacks are not of {x} x {y} pixels: {listed(other)}"
        action = "extract them with one box size or remove their rows"
        return [Finding("error", "box", found, action, {"count": len(other)})]
    size = sum(_bytes(header) for _, header in readable)
    lengths = [header.shape[0] for _, header in readable]
    images = span(min(lengths), max(lengths))
    found = f"{x} x {y} pixels in all {count} stacks of {images} images, {megabytes(size)} in {_mode(readable[0][1])}"
    return [Finding("ok", "box", found, values={"box": x, "bytes": size})]


def pixel_findings(survey: Survey, star: StarFile, pixel_size: float) -> list[Finding]:
    """Whether every header and the tilt series' binning agree with the pixel size read (Angstrom)."""
    findings = []
    total = len(survey.readable)
    known = [(name, header) for name, header in survey.readable if is_set(header.pixel_size, pixel_size)]
    wrong = [f"{name} ({header.pixel_size:g} A)" for name, header in known if differ(header.pixel_size, pixel_size)]
    values = {"pixel_size": pixel_size, "headers_unset": total - len(known), "headers_wrong": len(wrong)}
    if wrong:
        found = f"{pixel_size:g} A, but {len(wrong)} of {total} headers say otherwise: {listed(wrong)}"
        action = "find out which is true; correct the STAR file or the headers"
        findings.append(Finding("error", "pixel size", found, action, values))
    elif len(known) < total:
        found = f"{pixel_size:g} A; {total - len(known)} of {total} headers do not state it (0 or 1 A)"
        findings.append(Finding("note", "pixel size", found, "the stated value is taken", values))
    else:
        found = f"{pixel_size:g} A, all {total} headers agree"
        findings.append(Finding("ok", "pixel size", found, values=values))
    return findings + _binning(star, pixel_size)


def _binning(star: StarFile, pixel_size: float) -> list[Finding]:
    try:
        series = relion.constant(star, "rlnTomoTiltSeriesPixelSize")
        binning = relion.constant(star, "rlnTomoSubtomogramBinning")
    except UserError:
        return []  # tilt series of several pixel sizes, each with its own binning: nothing to compare
    if series is None or binning is None or not differ(series * binning, pixel_size):
        return []
    found = f"tilt series {series:g} A x binning {binning:g} = {series * binning:g} A, not {pixel_size:g} A"
    action = f"{pixel_size:g} A is used; correct whichever is wrong (resolutions in A depend on it)"
    return [Finding("warning", "binning", found, action)]


def transfer_file_findings(files: Sequence[Path], box: int) -> list[Finding]:
    """Whether every distinct CTF or weight volume can be read and fits the box."""
    survey = survey_headers(files, [path.name for path in files])
    fitting = {(box, box, box), (box, box, box // 2 + 1), (2 * box, box, box // 2 + 1)}
    wrong = [f"{name} ({_size(header.shape)})" for name, header in survey.readable if header.shape not in fitting]
    findings = []
    if survey.reasons:
        found = f"{len(survey.reasons)} CTF volumes cannot be read, first: {survey.reasons[0]}"
        findings.append(Finding("error", "CTF volumes", found, "make them again or remove these particles"))
    if wrong:
        found = f"{len(wrong)} CTF volumes do not fit the box {box}: {listed(wrong)}"
        findings.append(Finding("error", "CTF volumes", found, "make them at the box of the subtomograms"))
    return findings


def missing_findings(names: Sequence[str], absent: Sequence[int], what: str) -> list[Finding]:
    """One finding that counts and names missing files; absent are rows, 0-based."""
    if not absent:
        return []
    found = f"{len(absent)} of {len(names)} {what} missing: {listed([f'{names[i]} (row {i + 1})' for i in absent])}"
    return [
        Finding(
            "error",
            "missing files",
            found,
            "give their folder with --datadir or remove their rows",
            {"count": len(absent)},
        )
    ]


def _header(path: Path) -> tuple[MrcHeader | None, str]:
    try:
        return header_of(path), ""
    except UserError as error:
        return None, str(error)


def _size(shape: tuple[int, int, int]) -> str:
    z, y, x = shape
    return f"{x}^3" if x == y == z else f"{x} x {y} x {z}"


def _bytes(header: MrcHeader) -> int:
    return int(np.prod(header.shape)) * dtype_from_mode(header.mode).itemsize


def _mode(header: MrcHeader) -> str:
    return str(np.dtype(dtype_from_mode(header.mode)).name)
