"""Box and pixel size: what the STAR, the MRC headers and the options say, and whether they agree.

Owns: the rule that a wrong box or pixel size is never accepted silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opustomo.config import InputOptions
from opustomo.data.mrc import MrcHeader, header_of
from opustomo.data.particles import refuse_most
from opustomo.data.readers import relion
from opustomo.data.readers.source import Source
from opustomo.errors import UserError

_TOLERANCE = 0.005  # relative difference of pixel sizes that users' rounding explains
_LOOKED_AT = 8  # headers read here; `check` reads all


def readable(images: Sequence[Path], source: Source) -> tuple[list[Path], dict[str, str]]:
    """Files to read sizes from with ``--damaged skip``, and why those of the other particles, by name, are none.

    From all headers, as ``check`` does; UserError where most cannot be read.
    """
    good, faults = [], {}
    for path, name in zip(images, relion.identities(source.table), strict=True):
        try:
            header_of(path)
            good.append(path)
        except UserError as error:
            faults[name] = str(error)
    refuse_most(len(images) - len(good), len(images), source.table.path, faults)
    return good, faults


def agreed(star: Path, source: Source, files: Sequence[Path], options: InputOptions) -> tuple[int, float, list[str]]:
    """Box N, pixel size in Angstrom, and a note on each, of the particles in ``files`` that ``star`` names.

    UserError: those of ``box_size`` and ``pixel_size``.
    """
    box, box_note = box_size(files, star, relion.image_size(source.table), options, source.stacks)
    size, size_note = pixel_size(files, star, relion.pixel_size(source.table), options)
    return box, size, [box_note, size_note]


def box_size(
    files: Sequence[Path], star: Path, stated: int | None, options: InputOptions, stacks: bool
) -> tuple[int, str]:
    """Box N of the subtomograms, or of the images of stacks, from their headers, and a note.

    stated: box in the STAR's optics.  UserError: not cubic (not square), odd, mixed, unlike the STAR or ``-D``.
    """
    first, *others = _sample(files)
    box = check_box(first, header_of(first), stacks)
    for path in others:
        size = check_box(path, header_of(path), stacks)
        if size != box:
            raise UserError(
                f"{path}: box {size} but {first} has box {box}; all subtomograms must have one size: extract them again"
            )
    if stated is not None and stated != box:
        raise UserError(
            f"{star}: rlnImageSize says {stated} but {first} has box {box}; correct the optics table or extract again"
        )
    if options.box is not None and options.box != box:
        raise UserError(f"-D {options.box}: the subtomograms have box {box} ({first}); give -D {box} or leave it out")
    return (
        box,
        f"box {box} from the headers of {1 + len(others)} of {len(files)} {'stacks' if stacks else 'subtomograms'}",
    )


def check_box(path: Path, header: MrcHeader, stack: bool) -> int:
    """Box of one subtomogram or of the images of a stack; UserError when it is not cubic (not square) or odd."""
    z, y, x = header.shape
    if stack and x != y:
        raise UserError(f"{path}: its images are not square (x, y = {x}, {y}); extract them with a square box")
    if not stack and not x == y == z:
        raise UserError(f"{path}: subtomogram is not cubic (x, y, z = {x}, {y}, {z}); extract it with a cubic box")
    if x % 2:
        raise UserError(f"{path}: box {x} is odd; extract the subtomograms with an even box, e.g. {x + 1}")
    return x


def pixel_size(
    files: Sequence[Path], star: Path, stated: tuple[float, str] | None, options: InputOptions
) -> tuple[float, str]:
    """Pixel size a0 in Angstrom, and a note on its origin.

    stated: value in the STAR and its columns.  A header of 0, or of 1 against a STAR (or ``--angpix``) that says
    otherwise, counts as unset.  UserError naming both values: STAR and headers, headers among each other, or
    ``--angpix`` disagree by more than 0.5 %; or nothing states it.
    """
    reference = stated[0] if stated is not None else options.angpix
    headers = [(path, header_of(path).pixel_size) for path in _sample(files)]
    found = [(path, size) for path, size in headers if is_set(size, reference)]
    value, source, note = _choose(found, star, stated, options.angpix)
    for path, size in found:
        if differ(size, value):
            raise UserError(
                f"pixel size: {source} says {value:g} A but the header of {path} says {size:g} A; find out which is "
                "true, then correct the STAR file or the headers"
            )
    if options.angpix is not None and differ(options.angpix, value):
        raise UserError(
            f"--angpix {options.angpix:g}: {source} says {value:g} A; give --angpix {value:g} or leave it out, "
            "or correct the STAR file"
        )
    return value, note


def is_set(header: float, reference: float | None) -> bool:
    """Whether a header's pixel size means anything: 0 never does, 1 not against a reference that says otherwise."""
    return header != 0 and not (header == 1 and reference is not None and differ(header, reference))


def differ(a: float, b: float) -> bool:
    """Whether two pixel sizes differ by more than rounding explains (0.5 %)."""
    return abs(a - b) > _TOLERANCE * abs(b)


def _choose(
    found: list[tuple[Path, float]], star: Path, stated: tuple[float, str] | None, angpix: float | None
) -> tuple[float, str, str]:
    """Pixel size, what says so (for messages), note."""
    if stated is not None:
        value, columns = stated
        if not value > 0:
            raise UserError(f"{star}: the pixel size from {columns} is {value:g} A; correct it")
        words = "the headers agree" if found else "the headers are unset (0 or 1 A)"
        return value, f"{star} ({columns})", f"pixel size {value:g} A from {columns}; {words}"
    if found:
        path, value = found[0]
        return value, f"the header of {path}", f"pixel size {value:g} A from the headers; the STAR file has none"
    if angpix is not None and angpix > 0:
        return angpix, "--angpix", f"pixel size {angpix:g} A as given; neither STAR file nor headers state it"
    raise UserError(f"{star}: neither the STAR file nor the headers state the pixel size; give it with --angpix")


def _sample(files: Sequence[Path]) -> list[Path]:
    index = np.unique(np.linspace(0, len(files) - 1, _LOOKED_AT).astype(int))
    return list(dict.fromkeys(files[i] for i in index))
