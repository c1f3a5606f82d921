"""The numerator/weight cache: every particle's row in the consensus frame, made once, read many times.

Owns: the files of the cache folder (docs/outputs.md), their fingerprint and checksums.  Rows are float16 with a
float32 scale each; the numerator is cropped by the mask, the weight covers the band of the working box.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opustomo.data.atomic import exclusive, write_text
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise, observe, observe_all
from opustomo.data.particles import Particles
from opustomo.data.tensors import read_arrays, save_arrays
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.grid import Grid

FORMAT = 3
HELD_SHARE = 0.1  # of the free memory
_MANIFEST, _NOISE = "cache.json", "noise.npz"
_FILES = ("numerator.f16", "weight.f16", "scale.f32", "checksum.u32")
Row = tuple[int, Tensor, Tensor]
Progress = Callable[[Iterable[Row], int], Iterable[Row]]


def fingerprint(particles: Particles, grid: Grid, mask: Tensor, options: tuple[str, ...]) -> str:
    """Everything a row depends on, as one hash; subtomograms by path, size and time of change."""
    digest = hashlib.sha256(repr((FORMAT, tuple(grid)[:4], options)).encode())
    for path in (*particles.image_files, *dict.fromkeys(particles.ctf_files)):
        status = path.stat()
        digest.update(os.fsencode(path) + f"{status.st_size}{status.st_mtime_ns}".encode())
    digest.update(str(particles.premultiplied).encode())
    geometry = (particles.tilts, particles.tilt_offsets, particles.slices, particles.tilt_shifts)
    for array in (particles.rotation, particles.origin, *geometry):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Cache:
    """An opened cache: a ``Rows`` with its grid, mask and noise model."""

    folder: Path
    grid: Grid
    noise: Noise
    fingerprint: str
    _numerator: np.ndarray
    _weight: np.ndarray
    _scale: np.ndarray
    _checksum: np.ndarray
    moved: Tensor  # (P, 6) from the poses given: see data.poses
    _held: tuple[Tensor, Tensor] | None = None  # all rows as float32

    def __len__(self) -> int:
        return len(self._scale)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its folder: that opens the files itself."""
        return _opened_elsewhere, (self.folder, self.grid, self.noise, self.fingerprint, self.moved)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C) float32 numerators of the rows at ``index``."""
        return self._read(self._numerator, 0, index).unflatten(1, (self.grid.crop,) * 3)

    def weight(self, index: Tensor) -> Tensor:
        """(b, n) float32 weights of the rows at ``index``, on the band."""
        return self._read(self._weight, 1, index)

    def hold(self) -> None:
        """Keep the rows of a small set in memory as float32: reading float16 is two thirds of an EM step's time."""
        if 2 * len(self) * row_bytes(self.grid) > HELD_SHARE * free_memory():
            return
        everyone = torch.arange(len(self))
        self._held = self._read(self._numerator, 0, everyone), self._read(self._weight, 1, everyone)

    def _read(self, rows: np.ndarray, which: int, index: Tensor) -> Tensor:
        if self._held is not None:
            return self._held[which][index]
        where = index.numpy()
        values = torch.from_numpy(np.asarray(rows[where])).float()
        return values * torch.from_numpy(np.asarray(self._scale[where, which]))[:, None]

    def missing(self) -> np.ndarray:
        """Rows not written yet or damaged: those whose bytes do not have the stored checksum."""
        return np.array([i for i in range(len(self)) if not self._intact(i)], np.int64)

    def _intact(self, i: int) -> bool:
        return bool(self._checksum[i, 0] == 1 and self._checksum[i, 1] == self._sum(i))

    def _sum(self, i: int) -> int:
        sums = 0
        for part in (self._numerator[i], self._weight[i], self._scale[i]):
            sums = zlib.crc32(part.tobytes(), sums)
        return sums

    def write(self, i: int, numerator: Tensor, weight: Tensor) -> None:
        """Store row i (numerator (C, C, C), weight (n,)) with its checksum, the checksum last."""
        self._checksum[i] = (0, 0)
        for which, (rows, values) in enumerate(((self._numerator, numerator), (self._weight, weight))):
            scale = max(float(values.abs().max()), 1e-30)
            rows[i] = (values.flatten() / scale).numpy().astype(np.float16)
            self._scale[i, which] = scale
        self._checksum[i] = (1, self._sum(i))

    def flush(self) -> None:
        """Push every row to the disk."""
        for array in (self._numerator, self._weight, self._scale, self._checksum):
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


def free_memory() -> int:
    """Bytes of memory that are free now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row_bytes(grid: Grid) -> int:
    """Bytes of one row on disk."""
    return 2 * (grid.crop**3 + len(band_frequencies(grid.working_box))) + 16


def _files(folder: Path, grid: Grid, count: int) -> dict[str, tuple[Path, type, tuple[int, int]]]:
    band = len(band_frequencies(grid.working_box))
    kinds = ((np.float16, grid.crop**3), (np.float16, band), (np.float32, 2), (np.uint32, 2))
    return {
        name.split(".")[0]: (folder / name, kind, (count, width))
        for name, (kind, width) in zip(_FILES, kinds, strict=True)
    }


def _clear(folder: Path) -> None:
    """Remove the files of a cache, the manifest first; whatever else is in the folder is not ours to remove."""
    for name in (_MANIFEST, *_FILES, _NOISE):
        (folder / name).unlink(missing_ok=True)


def _allocate(folder: Path, grid: Grid, count: int) -> None:
    """Reserve the space of every file at once, so that a full disk is met before any work is done."""
    need = count * row_bytes(grid)
    try:
        for path, kind, shape in _files(folder, grid, count).values():
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
    maps = {}
    for name, (path, kind, shape) in _files(folder, grid, count).items():
        if not path.exists() or path.stat().st_size != int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise UserError(f"{path}: missing or truncated cache file; delete {folder} and run again")
        maps[name] = np.memmap(path, kind, mode, shape=shape)  # type: ignore[call-overload]
    arrays = maps["numerator"], maps["weight"], maps["scale"], maps["checksum"]
    return Cache(folder, grid, noise, mark, *arrays, torch.zeros(count, 6))


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
    bad = cache.missing()
    if len(bad):
        raise UserError(
            f"{folder}: {len(bad)} of {len(cache)} rows are unfinished or damaged (first: row {bad[0] + 1}); "
            "run `opustomo cache` or `opustomo train` again, which makes only those anew"
        )
    return cache


def prepare_cache(
    folder: Path,
    particles: Particles,
    grid: Grid,
    mask: Tensor,
    noise: Noise | None = None,
    *,
    contrast: str,
    normalisation: str,
    workers: int,
    progress: Progress,
) -> Cache:
    """Open the cache if it is current; finish it if it is incomplete; make it anew if it is stale.

    mask: (C, C, C) on the working grid.  noise: for a cache that has to be made anew; None: estimated.
    """
    mark = fingerprint(particles, grid, mask, (contrast, normalisation))
    with exclusive(folder):  # runs that share a cache may begin at the same time
        return _prepare(folder, particles, grid, mask, noise, mark, contrast, normalisation, workers, progress)


def _prepare(
    folder: Path, particles: Particles, grid: Grid, mask: Tensor, noise: Noise | None, mark: str,
    contrast: str, normalisation: str, workers: int, progress: Progress,
) -> Cache:  # fmt: skip
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != mark:
        noise = noise or estimate_noise(
            particles, grid, mask, contrast=contrast, normalisation=normalisation, workers=workers
        )
        _create(folder, particles, grid, noise, mark)
    else:
        noise = _load_noise(folder, manifest)
    cache = _open(folder, grid, len(particles), noise, mark, "r+")
    _fill(cache, particles, cache.missing(), workers, progress)
    return cache


def rows_without_disk(
    particles: Particles, grid: Grid, noise: Noise, workers: int, progress: Progress
) -> Cache | OnTheFly:
    """``--no-cache``: rows kept in memory where they take less than half of what is free, else made at every read."""
    need = len(particles) * row_bytes(grid)
    if need > 0.5 * free_memory():
        return OnTheFly(particles, grid, noise, torch.zeros(len(particles), 6))
    count = len(particles)
    made: list[np.ndarray] = [np.zeros(shape, kind) for _, kind, shape in _files(Path(), grid, count).values()]
    cache = Cache(Path(), grid, noise, "", made[0], made[1], made[2], made[3], torch.zeros(count, 6))
    _fill(cache, particles, np.arange(count), workers, progress)
    return cache


def _create(folder: Path, particles: Particles, grid: Grid, noise: Noise, mark: str) -> None:
    found = {path.name for path in folder.iterdir()} - {".lock"}
    if found and not found & {_MANIFEST, _NOISE}:
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
    manifest["checksum"] = _manifest_sum(manifest)
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _fill(cache: Cache, particles: Particles, rows: np.ndarray, workers: int, progress: Progress) -> None:
    if len(rows) == 0:
        return

    made = observe_all(particles, rows.tolist(), cache.grid, cache.noise, workers)
    try:
        for i, numerator, weight in progress(made, len(rows)):
            cache.write(i, numerator, weight)
    finally:
        cache.flush()
