"""MRC volumes: headers read fast, data as float32 (z, y, x), files written atomically with an exact pixel size.

Owns: the MRC2014 header as far as the program uses it.  Header fields and modes come from ``mrcfile``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import dtype_from_mode
from numpy.typing import NDArray

from opustomo.data.atomic import atomic, provenance
from opustomo.errors import UserError

_MODES = (0, 1, 2, 6, 12)  # int8, int16, float32, uint16, float16
_HEADER_BYTES = 1024
LARGEST = 1e12  # of a grey value: beyond, squares and sums in single precision come to nothing


class MrcHeader(NamedTuple):
    """What the header says: shape (z, y, x), pixel size along x in Angstrom (0 when unset) and MRC mode."""

    shape: tuple[int, int, int]
    pixel_size: float
    mode: int


def header_of(path: Path) -> MrcHeader:
    """Read the header alone (microseconds).  UserError: missing, not an MRC volume, another mode, truncated."""
    return _header(path)[0]


def read_volume(path: Path) -> tuple[NDArray[np.float32], float]:
    """Read a volume as float32 (z, y, x) and its pixel size in Angstrom.  NaNs pass through; errors of header_of."""
    header, dtype, offset = _header(path)
    if header.shape[0] < 2:
        raise UserError(f"{path}: is not a 3-D volume (z, y, x = {header.shape}); give 3-D subtomograms, not images")
    data = np.fromfile(path, dtype, count=int(np.prod(header.shape)), offset=offset)
    if data.size != np.prod(header.shape):
        raise UserError(f"{path}: became shorter while it was read; copy or write it again")
    return data.reshape(header.shape).astype(np.float32), header.pixel_size


def read_slices(path: Path, index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images of a stack, (len(index), y, x) float32; index from 0.  UserError: those of header_of, no such image."""
    header, dtype, offset = _header(path)
    if index.max() >= header.shape[0] or index.min() < 0:
        raise UserError(
            f"{path}: has {header.shape[0]} images, number {index.max() + 1} is asked for; extract the particle again, "
            "or give the STAR file that belongs to these stacks"
        )
    return np.asarray(np.memmap(path, dtype, "r", offset, header.shape)[index], np.float32)


def map_volume(path: Path) -> tuple[NDArray[Any], float]:
    """A volume (z, y, x) of any size, not read but mapped, and its pixel size in Angstrom (0: unset)."""
    header, dtype, offset = _header(path)
    return np.memmap(path, dtype, "r", offset, header.shape), header.pixel_size


def write_volume(
    path: Path,
    array: NDArray[Any],
    pixel_size: float,
    origin_angstrom: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Write a (z, y, x) volume: float16 stays float16 (mode 12), all else becomes float32 (mode 2).

    pixel_size: Angstrom; the header's cell is ``n * pixel_size`` per axis, so that cell / n gives it back.
    origin_angstrom: (x, y, z) position of the first voxel, as ChimeraX reads it.  The labels hold version and command.
    UserError: cannot be written.
    """
    if array.ndim != 3 or array.size == 0 or not pixel_size > 0:
        raise ValueError(f"a volume needs three axes and a pixel size > 0, not {array.shape} and {pixel_size}")
    data = np.ascontiguousarray(array, np.float16 if array.dtype == np.float16 else np.float32)
    with atomic(path) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(data)
        mrc.header.cella = _cell(data.shape, pixel_size)
        mrc.header.origin = tuple(np.float32(value) for value in origin_angstrom)
        _label(mrc)


def write_stack(path: Path, images: NDArray[np.float32], pixel_size: float) -> None:
    """Write images (n, y, x), or volumes (n, z, y, x), as a stack, float32; pixel_size in Angstrom.

    UserError: not written.
    """
    with atomic(path) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(images, np.float32))
        if images.ndim == 3:
            mrc.set_image_stack()
        depth = 1 if images.ndim == 3 else images.shape[1]
        mrc.header.cella = _cell((depth, *images.shape[-2:]), pixel_size)
        _label(mrc)


def _label(mrc: mrcfile.mrcfile.MrcFile) -> None:
    """In place of the library's own label; a header has ten of 80 characters."""
    text = provenance().encode("ascii", "replace")
    parts = [text[i : i + 80] for i in range(0, min(len(text), 800), 80)]
    mrc.header.label = [part.ljust(80) for part in parts] + [b""] * (10 - len(parts))
    mrc.header.nlabl = len(parts)


def _cell(shape: tuple[int, ...], pixel_size: float) -> tuple[np.float32, ...]:
    """Cell (x, y, z) from the product: mrcfile's voxel_size setter rounds the pixel size to float32 first."""
    return tuple(np.float32(n * float(pixel_size)) for n in shape[::-1])


def _header(path: Path) -> tuple[MrcHeader, np.dtype[Any], int]:
    """Header, data type in file byte order, offset of the data."""
    try:
        # a named pipe, which a folder from elsewhere may hold, would wait for ever
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            raw = file.read(_HEADER_BYTES)
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise UserError(f"{path}: no such volume; check the name and --datadir") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give an MRC file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and permissions") from error
    if len(raw) < _HEADER_BYTES:
        raise UserError(f"{path}: is not an MRC volume ({size} bytes); the file is empty or cut off: write it again")
    record, order = _decode(raw, path)
    shape = (int(record["nz"]), int(record["ny"]), int(record["nx"]))
    mode = int(record["mode"])
    if min(shape[1:]) < 2:
        raise UserError(f"{path}: is neither a volume nor a stack of images (z, y, x = {shape}); check the name")
    if mode not in _MODES:
        raise UserError(f"{path}: MRC mode {mode} is not supported (0, 1, 2, 6, 12 are); convert it to float32")
    dtype = dtype_from_mode(mode).newbyteorder(order)
    offset = _HEADER_BYTES + max(int(record["nsymbt"]), 0)
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size < expected:
        raise UserError(f"{path}: is truncated ({size} of {expected} bytes); copy or write it again")
    cell = float(record["cella"]["x"]) / (int(record["mx"]) or shape[2])
    # a float32 cell holds seven digits: more would show 1.699 as 1.69899998
    pixel_size = float(f"{cell:.7g}") if np.isfinite(cell) and cell > 0 else 0.0
    return MrcHeader(shape, pixel_size, mode), dtype, offset


def _decode(raw: bytes, path: Path) -> tuple[np.void, str]:
    """The header record in whichever byte order makes the sizes and the mode sensible."""
    for order in "<>":
        record = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        sizes = [int(record[name]) for name in ("nx", "ny", "nz")]
        if 0 <= int(record["mode"]) < 128 and all(0 <= n < 65536 for n in sizes):
            if min(sizes) == 0:
                raise UserError(f"{path}: has zero size (x, y, z = {tuple(sizes)}); write it again")
            return record, order
    raise UserError(f"{path}: is not an MRC volume (its header makes no sense); check the name")
