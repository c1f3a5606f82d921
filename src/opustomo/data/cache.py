"""The numerator/weight cache: every particle's row in the consensus frame, made once, read many times.

Owns: the files of the cache folder (docs/outputs.md), their fingerprint and checksums.  Rows are float16 with a
float32 scale each; the numerator is cropped by the mask, the weight covers the band of the working box.

Opening a finished cache reads none of its rows, so that a start does not wait for them: a row's checksum is compared
when it is read for the first time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opustomo.data.atomic import LOCK, exclusive, is_leftover, remove_leftovers, write_text
from opustomo.data.filling import fill
from opustomo.data.observe import Noise, observe
from opustomo.data.particles import Particles
from opustomo.data.tensors import read_arrays, save_arrays
from opustomo.errors import UserError
from opustomo.machine import free_memory
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.grid import Grid

FORMAT = 3
HELD_SHARE = 0.1  # of the free memory
NOTHING = 1e-30  # scale of a row of zeros
CTF_PACK = "ctf.npy"  # kept in the folder by the reader of CTF STARs
_MANIFEST, _NOISE = "cache.json", "noise.npz"
_FINISHED = "finished"  # in the manifest: every row was written and has reached the disk
Row = tuple[int, Tensor, Tensor]
Progress = Callable[[Iterable[Row], int], Iterable[Row]]


def hash_mask(mask: Tensor) -> str:
    """A hash of a mask's voxels as they were read, for ``fingerprint``."""
    return hashlib.sha256(mask.numpy().tobytes()).hexdigest()


def fingerprint(particles: Particles, grid: Grid, mask_mark: str, options: tuple[str, ...]) -> str:
    """Everything a row depends on, as one hash; subtomograms by path, size and time of change.

    mask_mark: ``hash_mask`` of the mask's source.  With the grid it says what the mask on the working grid is, whose
    own voxels are rounded differently by another kind of processor.
    """
    digest = hashlib.sha256(repr((FORMAT, tuple(grid)[:4], mask_mark, options)).encode())
    for path in (*particles.image_files, *dict.fromkeys(particles.ctf_files)):
        digest.update(os.fsencode(path))
        with nullcontext() if particles.faults is None else suppress(FileNotFoundError):
            status = path.stat()
            digest.update(f"{status.st_size}{status.st_mtime_ns}".encode())
    digest.update(str(particles.premultiplied).encode())
    geometry = (particles.tilts, particles.tilt_offsets, particles.slices, particles.tilt_shifts)
    # made of sines and cosines, whose last bits depend on the processor, too; + 0.0: no negative zero
    for array in (particles.rotation.round(6) + 0.0, particles.origin, *geometry):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Stored(NamedTuple):
    """The rows as they are kept, in the order of ``_ROW_FILES``."""

    numerator: np.ndarray  # (P, C^3) float16
    weight: np.ndarray  # (P, n) float16
    scale: np.ndarray  # (P, 2) float32, what the two are multiplied by
    checksum: np.ndarray  # (P, 2) uint32, 1 and the checksum of a row that was written


@dataclass
class Cache:
    """An opened cache: a ``Rows`` with its grid, mask and noise model."""

    folder: Path
    grid: Grid
    noise: Noise
    fingerprint: str
    _stored: Stored
    moved: Tensor  # (P, 6) from the poses given: see data.poses
    _held: tuple[Tensor, Tensor] | None = None  # all rows as float32
    _compared: np.ndarray = field(init=False)  # (P,) bool: rows known to have their checksum

    def __post_init__(self) -> None:
        self._compared = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._stored.scale)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its folder: that opens the files itself."""
        return _opened_elsewhere, (self.folder, self.grid, self.noise, self.fingerprint, self.moved)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C) float32 numerators of the rows at ``index``."""
        return self._read(0, index).unflatten(1, (self.grid.crop,) * 3)

    def weight(self, index: Tensor) -> Tensor:
        """(b, n) float32 weights of the rows at ``index``, on the band."""
        return self._read(1, index)

    def hold(self) -> None:
        """Keep the rows of a small set in memory as float32: reading float16 is two thirds of an EM step's time."""
        if 2 * len(self) * row_bytes(self.grid) > HELD_SHARE * free_memory():
            return
        held = torch.empty(self._stored.numerator.shape), torch.empty(self._stored.weight.shape)
        for part in torch.arange(len(self)).split(1024):  # in parts: as a whole it would take twice as much meanwhile
            for which in (0, 1):
                held[which][part] = self._read(which, part)
        self._held = held

    def _read(self, which: int, index: Tensor) -> Tensor:
        """Numerators (0) or weights (1), flat."""
        if self._held is not None:
            return self._held[which][index]
        where = index.numpy()
        self._compare(where)
        values = torch.from_numpy(np.asarray(self._stored[which][where])).float()
        return values * torch.from_numpy(np.asarray(self._stored.scale[where, which]))[:, None]

    def _compare(self, where: np.ndarray) -> None:
        """Raise UserError for damaged rows, each looked at once; the next `prepare_cache` then looks at all."""
        new = np.unique(where[~self._compared[where]])
        damaged = [i for i in new.tolist() if not self._intact(i)]
        if damaged:
            with suppress(UserError):  # a folder that is only read
                _mark_finished(self.folder, False)
            raise _damage(self.folder, np.array(damaged), len(self))
        self._compared[new] = True

    def absent(self) -> np.ndarray:
        """Rows not written yet."""
        return np.flatnonzero(self._stored.checksum[:, 0] != 1)

    def silent(self) -> list[int]:
        """Rows without any weight: of particles that could not be used."""
        return np.flatnonzero(self._stored.scale[:, 1] <= NOTHING).tolist()

    def missing(self) -> np.ndarray:
        """Rows not written yet or damaged: those whose bytes do not have the stored checksum.  Reads every row."""
        return np.array([i for i in range(len(self)) if not self._intact(i)], np.int64)

    def _intact(self, i: int) -> bool:
        written, checksum = self._stored.checksum[i]
        return bool(written == 1 and checksum == self._sum(i))

    def _sum(self, i: int) -> int:
        sums = 0
        for rows in self._stored[:3]:
            sums = zlib.crc32(rows[i].tobytes(), sums)
        return sums

    def write(self, i: int, numerator: Tensor, weight: Tensor) -> None:
        """Store row i (numerator (C, C, C), weight (n,)) with its checksum, the checksum last."""
        stored = self._stored
        stored.checksum[i] = (0, 0)
        for which, (rows, values) in enumerate(((stored.numerator, numerator), (stored.weight, weight))):
            scale = max(float(values.abs().max()), NOTHING)
            rows[i] = (values.flatten() / scale).half().numpy()
            stored.scale[i, which] = scale
        stored.checksum[i] = (1, self._sum(i))
        self._compared[i] = True

    def flush(self) -> None:
        """Push every row to the disk."""
        for array in self._stored:
            if isinstance(array, np.memmap):
                array.flush()


@dataclass
class OnTheFly:
    """``Rows`` made from the subtomograms at every read: neither disk nor memory, very slow."""

    particles: Particles
    grid: Grid
    noise: Noise
    moved: Tensor

    def __len__(self) -> int:
        return len(self.particles)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C) float32."""
        return torch.stack([observe(self.particles, int(i), self.grid, self.noise)[0] for i in index])

    def weight(self, index: Tensor) -> Tensor:
        """(b, n) float32."""
        return torch.stack([observe(self.particles, int(i), self.grid, self.noise)[1] for i in index])


def row_bytes(grid: Grid) -> int:
    """Bytes of one row on disk."""
    return 2 * (grid.crop**3 + len(band_frequencies(grid.working_box))) + 16


_ROW_FILES = ("numerator.f16", "weight.f16", "scale.f32", "checksum.u32")


def _files(folder: Path, grid: Grid, count: int) -> list[tuple[Path, type, tuple[int, int]]]:
    """Path, type and shape of the files that hold the rows, in the order of ``_ROW_FILES``."""
    types = np.float16, np.float16, np.float32, np.uint32
    widths = grid.crop**3, len(band_frequencies(grid.working_box)), 2, 2
    return [(folder / n, t, (count, w)) for n, t, w in zip(_ROW_FILES, types, widths, strict=True)]


def _clear(folder: Path) -> None:
    """Remove the files of a cache, the manifest first; whatever else is in the folder is not ours to remove."""
    for name in (_MANIFEST, *_ROW_FILES, _NOISE):
        (folder / name).unlink(missing_ok=True)


def _allocate(folder: Path, grid: Grid, count: int) -> None:
    """Reserve the space of every file at once, so that a full disk is met before any work is done."""
    need = count * row_bytes(grid)
    try:
        for path, kind, shape in _files(folder, grid, count):
            with path.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, int(np.prod(shape)) * np.dtype(kind).itemsize)
    except OSError as error:
        _clear(folder)
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"{folder}: disk full: the cache needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "free space, give another folder for the cache, lower --downfrac, or use --no-cache"
        ) from None


def _open(folder: Path, grid: Grid, count: int, noise: Noise, mark: str, mode: str) -> Cache:
    maps: list[np.ndarray] = []
    for path, kind, shape in _files(folder, grid, count):
        if not path.exists() or path.stat().st_size != int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise UserError(f"{path}: missing or truncated cache file; delete {folder} and run again")
        maps.append(np.memmap(path, kind, mode, shape=shape))  # type: ignore[call-overload]
    return Cache(folder, grid, noise, mark, Stored(*maps), torch.zeros(count, 6))


def _opened_elsewhere(folder: Path, grid: Grid, noise: Noise, mark: str, moved: Tensor) -> Cache:
    cache = _open(folder, grid, len(moved), noise, mark, "r")
    cache.moved = moved
    return cache


def _load_noise(folder: Path, manifest: dict) -> Noise:
    stored = read_arrays(folder / _NOISE, f"delete {folder} and run again")
    power, explained = torch.from_numpy(stored["power"]), torch.from_numpy(stored["explained"])
    kept = {name: manifest[name] for name in ("contrast", "mean_normalised", "contrast_sure", "calibration")}
    return Noise(power=power, explained=explained, **kept)


def read_manifest(folder: Path) -> dict | None:
    """The cache's manifest, or None where there is none, or one that is damaged or of another version."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        sound = manifest.pop("checksum") == _manifest_sum(manifest) and manifest["format"] == FORMAT
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if sound else None


def _manifest_sum(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def open_cache(folder: Path) -> Cache:
    """Open a finished cache for reading.  Raises UserError if it is absent, unfinished or damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no cache here; make it with `opustomo cache STAR --mask MASK -o {folder}`")
    grid = Grid(*manifest["grid"])
    cache = _open(folder, grid, manifest["rows"], _load_noise(folder, manifest), manifest["fingerprint"], "r")
    bad = cache.absent() if manifest.get(_FINISHED) else cache.missing()
    if len(bad):
        raise _damage(folder, bad, len(cache))
    return cache


def _damage(folder: Path, rows: np.ndarray, count: int) -> UserError:
    return UserError(
        f"{folder}: {len(rows)} of {count} rows are unfinished or damaged (first: row {rows[0] + 1}); "
        "run `opustomo cache` or `opustomo train` again, which makes only those anew"
    )


def prepare_cache(
    folder: Path,
    particles: Particles,
    grid: Grid,
    noise: Callable[[], Noise],
    mark: str,
    workers: int,
    progress: Progress,
) -> Cache:
    """Open the cache if it is current; finish it if it is incomplete; make it anew if it is stale.

    mark: the ``fingerprint`` that a current one has; noise: gives that of a cache that has to be made anew.
    """
    with exclusive(folder):  # runs that share a cache may begin at the same time
        for name in (_MANIFEST, _NOISE):
            remove_leftovers(folder, name)
        manifest = read_manifest(folder)
        if manifest is not None and manifest["fingerprint"] == mark:
            known, finished = _load_noise(folder, manifest), bool(manifest.get(_FINISHED))
        else:
            known, finished = noise(), False
            _create(folder, particles, grid, known, mark)
        reopen = partial(_open, folder, grid, len(particles), known, mark, "r+")
        cache = reopen()
        missing = cache.absent() if finished else cache.missing()
        if len(missing) or not finished:
            # opened again: other processes have written rows since
            cache = fill(cache, particles, missing, workers, progress, reopen)
            _mark_finished(folder, True)
        for i in cache.silent():  # why a row says nothing is known where it was made now
            if particles.usable[i]:
                observe(particles, i, grid, known)
        return cache


def rows_without_disk(
    particles: Particles, grid: Grid, noise: Noise, workers: int, progress: Progress
) -> Cache | OnTheFly:
    """``--no-cache``: rows kept in memory where they take less than half of what is free, else made at every read."""
    need = len(particles) * row_bytes(grid)
    if need > 0.5 * free_memory():
        return OnTheFly(particles, grid, noise, torch.zeros(len(particles), 6))
    count = len(particles)
    made = Stored(*(np.zeros(shape, kind) for _, kind, shape in _files(Path(), grid, count)))
    cache = Cache(Path(), grid, noise, "", made, torch.zeros(count, 6))
    return fill(cache, particles, np.arange(count), workers, progress)


def is_free(folder: Path) -> bool:
    """Whether a cache may be made in a folder: it is absent, empty or one already."""
    names = {path.name for path in folder.iterdir() if not is_leftover(path)} if folder.is_dir() else set()
    return not names - {CTF_PACK, LOCK} or not names.isdisjoint({_MANIFEST, _NOISE})


def _mark_finished(folder: Path, finished: bool) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        _write_manifest(folder, manifest | {_FINISHED: finished})


def _write_manifest(folder: Path, manifest: dict) -> None:
    whole = manifest | {"checksum": _manifest_sum(manifest)}
    write_text(folder / _MANIFEST, json.dumps(whole, indent=1) + "\n")


def _create(folder: Path, particles: Particles, grid: Grid, noise: Noise, mark: str) -> None:
    if not is_free(folder):
        raise UserError(f"{folder}: not empty and not a cache; choose another folder for the cache")
    _clear(folder)
    # first: it marks the folder as a cache, should the next step be killed
    save_arrays(folder / _NOISE, power=noise.power.numpy(), explained=noise.explained.numpy())
    _allocate(folder, grid, len(particles))
    manifest = {
        "format": FORMAT,
        "fingerprint": mark,
        "rows": len(particles),
        "grid": list(grid),
        "contrast": noise.contrast,
        "contrast_sure": noise.contrast_sure,
        "mean_normalised": noise.mean_normalised,
        "calibration": noise.calibration,
        "source": str(particles.source),
    }
    _write_manifest(folder, manifest)
