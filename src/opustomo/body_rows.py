"""Rows of particles whose bodies are put back: what the linear stage and the network see where there are bodies.

Owns: the file of straightened numerators.  Weights are those of the rows they were made from.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opustomo.bodies import BodyModel, straightened
from opustomo.data.atomic import atomic
from opustomo.data.cache import HELD_SHARE, NOTHING, free_memory
from opustomo.errors import UserError
from opustomo.physics.grid import Grid
from opustomo.reconstruct import Rows

AT_ONCE = 16  # rows that are made together, always the same ones: results do not depend on what is made when
Bar = Callable[[Iterable[Tensor], int], Iterable[Tensor]]


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
    folder: Path | None, model: BodyModel, base: Rows, gain: Tensor, motion: Tensor, grid: Grid, bar: Bar
) -> StraightRows:
    """Rows of all particles with their bodies put back from ``motion`` (P, 6 B); gain (P,).

    They are kept in ``folder``/straight.HASH.rows, the hash being of everything they depend on, and read from there
    where they are already; None: in memory.  ``moved`` counts what all bodies did together as part of the poses.
    """
    mark = _mark(model, base, gain, motion)
    moved = base.moved + model.common(motion.to(model.mean)).cpu()
    on_disk = folder is not None and getattr(base, "fingerprint", "") != ""
    path = folder / f"straight.{mark[:16]}.rows" if folder is not None and on_disk else None
    if path is not None and path.is_file():
        return _open(base, path, moved, mark, len(base), grid.crop)
    if path is None:
        made = np.zeros(len(base), _record(grid.crop))
        _fill(made, model, base, gain, motion, grid, bar)
        return StraightRows(base, None, moved, "", made, grid.crop)
    with atomic(path) as temporary:
        made = np.memmap(temporary, _record(grid.crop), "w+", shape=(len(base),))
        _fill(made, model, base, gain, motion, grid, bar)
        made.flush()
        del made
    for old in path.parent.glob("straight.*.rows"):
        if old != path:
            old.unlink()
    return _open(base, path, moved, mark, len(base), grid.crop)


def _record(crop: int) -> np.dtype[Any]:
    return np.dtype([("sum", "<u4"), ("scale", "<f4"), ("value", "<f2", (crop**3,))])


def _open(base: Rows, file: Path, moved: Tensor, mark: str, count: int, crop: int) -> StraightRows:
    kind = _record(crop)
    if not file.is_file() or file.stat().st_size != count * kind.itemsize:
        raise UserError(f"{file}: missing or cut off; delete it and run again")
    return StraightRows(base, file, moved, mark, np.memmap(file, kind, "r", shape=(count,)), crop)


def _fill(made: np.ndarray, model: BodyModel, base: Rows, gain: Tensor, motion: Tensor, grid: Grid, bar: Bar) -> None:
    device = model.mean.device
    for part in bar(torch.arange(len(base)).split(AT_ONCE), len(base)):
        numerator, weight = base.numerator(part).to(device), base.weight(part).to(device)
        rows = straightened(model, numerator, weight, gain[part].to(device), motion[part].to(device), grid)
        for i, values in zip(part.tolist(), rows.flatten(1).cpu(), strict=True):
            scale = max(float(values.abs().max()), NOTHING)
            half = (values / scale).half().numpy()
            made[i] = (zlib.crc32(half.tobytes()), scale, half)


def _mark(model: BodyModel, base: Rows, gain: Tensor, motion: Tensor) -> str:
    digest = hashlib.sha256(getattr(base, "fingerprint", "").encode())
    bodies = model.bodies
    for tensor in (model.mean, model.covariance, *vars(bodies).values(), gain, motion, base.moved):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()
