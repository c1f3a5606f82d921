"""Rows of particles whose bodies are put back: what the linear stage and the network see where there are bodies.

Owns: the file of straightened numerators.  Weights are those of the rows they were made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opustomo.bodies import BodyResult, straightened
from opustomo.data.atomic import atomic
from opustomo.data.cache import HELD_SHARE, NOTHING, free_memory
from opustomo.errors import UserError
from opustomo.monitor import progress
from opustomo.physics.grid import Grid
from opustomo.reconstruct import Rows

AT_ONCE = 16  # rows that are made together, always the same ones: results do not depend on what is made when


@dataclass
class StraightRows:
    """``Rows`` with the weights of ``base``; file: of the numerators, None: they are in memory only."""

    base: Rows
    file: Path | None
    moved: Tensor
    fingerprint: str
    _stored: np.ndarray  # (P,) of ``_record``
    _crop: int
    _held: Tensor | None = None
    _compared: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._compared = np.zeros(len(self._stored), bool)

    def __len__(self) -> int:
        return len(self._stored)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as the file's name."""
        return _open, (self.base, self.file, self.moved, self.fingerprint, len(self), self._crop)

    def weight(self, index: Tensor) -> Tensor:
        """(b, n) float32."""
        return self.base.weight(index)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C) float32.  Raises UserError for rows that have been damaged since they were written."""
        if self._held is not None:
            return self._held[index]
        rows = self._stored[index.numpy()]
        for i in np.flatnonzero(~self._compared[index.numpy()]):
            if zlib.crc32(rows["value"][i].tobytes()) != rows["sum"][i]:
                raise UserError(f"{self.file}: row {int(index[i]) + 1} is damaged; delete the file and run again")
        self._compared[index.numpy()] = True
        values = torch.from_numpy(rows["value"]).float() * torch.from_numpy(rows["scale"])[:, None]
        return values.unflatten(1, (self._crop,) * 3)

    def hold(self) -> None:
        """Keep a small set in memory as float32: fits read it many times."""
        if 4 * len(self) * self._crop**3 <= HELD_SHARE * free_memory():
            self._held = self.numerator(torch.arange(len(self)))


def straight_rows(
    folder: Path | None, result: BodyResult, base: Rows, grid: Grid, device: torch.device
) -> StraightRows:
    """Rows of all particles with their bodies put back from ``result.free``.

    They are kept in ``folder``/straight.HASH.rows, the hash being of everything they depend on, and read from there
    where they are already; None: in memory.  ``moved`` counts what all bodies did together as part of the poses.
    """
    mark = _mark(result, base)
    moved = base.moved + result.model.common(result.free)
    on_disk = folder is not None and getattr(base, "fingerprint", "") != ""
    path = folder / f"straight.{mark[:16]}.rows" if folder is not None and on_disk else None
    if path is not None and path.is_file():
        return _open(base, path, moved, mark, len(base), grid.crop)
    if path is None:
        made = np.zeros(len(base), _record(grid.crop))
        _fill(made, result, base, grid, device)
        return StraightRows(base, None, moved, "", made, grid.crop)
    with atomic(path) as temporary:
        with temporary.open("wb") as handle:  # a disk that is full is met here, and not as a signal while it is filled
            os.posix_fallocate(handle.fileno(), 0, _size(len(base), grid))
        made = np.memmap(temporary, _record(grid.crop), "r+", shape=(len(base),))
        _fill(made, result, base, grid, device)
        made.flush()
        del made
    for old in path.parent.glob("straight.*.rows"):
        if old != path:
            old.unlink()
    return _open(base, path, moved, mark, len(base), grid.crop)


def refuse_without_room(folder: Path | None, count: int, grid: Grid) -> None:
    """UserError where the rows of ``count`` particles will not fit, said before the hours that come before them."""
    need = _size(count, grid)
    if folder is None and need > free_memory():
        raise UserError(
            f"--masks with --no-cache: the rows of bodies at rest are {need / 1e9:.1f} GB in memory and "
            f"{free_memory() / 1e9:.1f} GB are free; leave --no-cache out, or lower --downfrac"
        )
    place = next((p for p in (folder, *folder.parents) if p.exists()), Path()) if folder is not None else None
    if place is not None and need > (free := shutil.disk_usage(place).free):
        raise UserError(
            f"{folder}: the rows of bodies at rest need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free "
            "space, give another output folder, or lower --downfrac"
        )


def _size(count: int, grid: Grid) -> int:
    return count * _record(grid.crop).itemsize


def _record(crop: int) -> np.dtype[Any]:
    return np.dtype([("sum", "<u4"), ("scale", "<f4"), ("value", "<f2", (crop**3,))])


def _open(base: Rows, file: Path, moved: Tensor, mark: str, count: int, crop: int) -> StraightRows:
    kind = _record(crop)
    if not file.is_file() or file.stat().st_size != count * kind.itemsize:
        raise UserError(f"{file}: missing or cut off; delete it and run again")
    return StraightRows(base, file, moved, mark, np.memmap(file, kind, "r", shape=(count,)), crop)


def _fill(made: np.ndarray, result: BodyResult, base: Rows, grid: Grid, device: torch.device) -> None:
    model = result.model.to(device)
    for part in progress(torch.arange(len(base)).split(AT_ONCE), len(base), "bodies put back", size=len):
        numerator, weight = base.numerator(part).to(device), base.weight(part).to(device)
        gain, motion, code = (v[part].to(device) for v in (result.gain, result.free, result.motions.code))
        rows = straightened(model, numerator, weight, gain, motion, code, grid)
        for i, values in zip(part.tolist(), rows.flatten(1).cpu(), strict=True):
            scale = max(float(values.abs().max()), NOTHING)
            half = (values / scale).half().numpy()
            made[i] = (zlib.crc32(half.tobytes()), scale, half)


def _mark(result: BodyResult, base: Rows) -> str:
    digest = hashlib.sha256(getattr(base, "fingerprint", "").encode())
    model = result.model
    for tensor in (
        model.mean, model.components, model.covariance, *vars(model.bodies).values(),
        result.gain, result.free, result.motions.code, base.moved,
    ):  # fmt: skip
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()
