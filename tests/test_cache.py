"""The cache: what is read is what was observed, only missing rows are made, damage and a full disk are told."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import star_sets
from opustomo.config import GridOptions, InputOptions
from opustomo.data import cache as cache_module
from opustomo.data.cache import Cache, OnTheFly, Row, fingerprint, hash_mask, open_cache, prepare_cache, row_bytes
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.mrc import write_volume
from opustomo.data.observe import Noise, observe, working_mask
from opustomo.data.particles import TILT_COLUMNS, Particles
from opustomo.data.poses import moved_from
from opustomo.data.readers import read_particles
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.geometry import euler_to_matrix
from opustomo.physics.grid import Grid
from opustomo.physics.observation import negative_log_likelihood
from opustomo.physics.volume import spherical_mask
from opustomo.preparation import RowMaker
from opustomo.reconstruct import Rows

GRID = Grid(star_sets.BOX, star_sets.PIXEL, 12, 10, 16)
MASK = spherical_mask(GRID.crop, 3, 2)
COUNT = 6


@pytest.fixture
def particles(tmp_path: Path) -> Particles:
    return read_particles(star_sets.Set(tmp_path / "set", COUNT).write(), InputOptions())


@pytest.fixture
def noise() -> Noise:
    shells = 1.0 + 0.1 * band_frequencies(GRID.working_box).norm(dim=-1)
    return Noise(shells, 1.0, False, torch.zeros(GRID.working_box // 2 + 1), 1.05)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row numbers written since the fixture was made."""
    rows: list[int] = []
    write = Cache.write

    def recording(self: Cache, i: int, numerator: torch.Tensor, weight: torch.Tensor) -> None:
        rows.append(i)
        write(self, i, numerator, weight)

    monkeypatch.setattr(Cache, "write", recording)
    return rows


def quiet(rows: Iterable[Row], total: int) -> Iterable[Row]:
    return rows


def prepare(
    folder: Path, particles: Particles, noise: Noise | None, workers: int = 1, mark: str = hash_mask(MASK)
) -> Cache:
    """``noise`` stands in for the estimate, which has tests of its own; None: a stored cache must not need one."""

    def estimate() -> Noise:
        assert noise is not None, "the noise of a current cache was estimated again"
        return noise

    whole = fingerprint(particles, GRID, mark, ("auto", "auto"))
    return prepare_cache(folder, particles, GRID, estimate, whole, workers, quiet)


def on_the_fly(particles: Particles, noise: Noise) -> OnTheFly:
    return OnTheFly(particles, GRID, noise, torch.zeros(COUNT, 6))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_reopened_cache_holds_the_observations(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    prepare(tmp_path / "cache", particles, noise)
    cache = open_cache(tmp_path / "cache")
    assert len(cache) == COUNT
    assert cache.grid == GRID
    assert torch.equal(cache.noise.power, noise.power)
    assert (cache.noise.contrast, cache.noise.mean_normalised, cache.noise.calibration) == (1.0, False, 1.05)
    order = torch.tensor([4, 0, 5])
    numerator, weight = cache.numerator(order), cache.weight(order)
    for place, i in enumerate(order.tolist()):
        b, w = observe(particles, i, GRID, noise)
        assert float((numerator[place] - b).abs().max()) < 1e-3 * float(b.abs().max())
        assert float((weight[place] - w).abs().max()) < 1e-3 * float(w.abs().max())


def test_rows_held_in_memory_are_those_of_the_file(
    tmp_path: Path, particles: Particles, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "cache", particles, noise)
    index = torch.tensor([5, 1, 1])
    read, held = open_cache(tmp_path / "cache"), open_cache(tmp_path / "cache")
    monkeypatch.setattr(cache_module, "free_memory", lambda: 0)
    held.hold()
    assert held._held is None  # a set too large for the memory is read from disk
    monkeypatch.setattr(cache_module, "free_memory", lambda: 10**12)
    held.hold()
    assert torch.equal(held.numerator(index), read.numerator(index))
    assert torch.equal(held.weight(index), read.weight(index))


def test_half_precision_keeps_the_likelihood(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    """E of each particle's own best volume (steepest descent, one step) to a thousandth."""
    prepare(tmp_path / "cache", particles, noise)
    cache, direct = open_cache(tmp_path / "cache"), on_the_fly(particles, noise)
    every = torch.arange(COUNT)
    b, w = direct.numerator(every), direct.weight(every)
    volume = b * MASK
    slope = (volume * b).sum((1, 2, 3))
    curvature = 2 * (negative_log_likelihood(volume, b, w, GRID.working_box) + slope)
    volume = volume * (slope / curvature)[:, None, None, None]
    exact = negative_log_likelihood(volume, b, w, GRID.working_box)
    stored = negative_log_likelihood(volume, cache.numerator(every), cache.weight(every), GRID.working_box)
    assert float(exact.max()) < 0
    assert float(((stored - exact) / exact).abs().max()) < 1e-3


def test_current_cache_is_not_made_again(tmp_path: Path, particles: Particles, noise: Noise, made: list[int]) -> None:
    prepare(tmp_path / "cache", particles, noise)
    assert sorted(made) == list(range(COUNT))
    made.clear()
    prepare(tmp_path / "cache", particles, None)
    assert made == []


def test_interrupted_cache_is_finished(tmp_path: Path, particles: Particles, noise: Noise, made: list[int]) -> None:
    folder = tmp_path / "cache"
    prepare(folder, particles, noise)
    finished = everything(folder)
    checksums = np.memmap(folder / "checksum.u32", np.uint32, "r+", shape=(COUNT, 2))
    checksums[[1, 4]] = 0
    checksums.flush()
    with pytest.raises(UserError, match=r"2 of 6 rows are unfinished or damaged \(first: row 2\)"):
        open_cache(folder)
    made.clear()
    prepare(folder, particles, None)
    assert sorted(made) == [1, 4]
    assert everything(folder) == finished


@pytest.mark.parametrize(
    "name",
    [
        "numerator.f16",
        "weight.f16",
        "scale.f32",
    ],
)
def test_one_wrong_byte_is_found_and_mended(
    tmp_path: Path, particles: Particles, noise: Noise, made: list[int], name: str
) -> None:
    folder = tmp_path / "cache"
    prepare(folder, particles, noise)
    finished = everything(folder)
    damaged = bytearray(finished[name])
    position = len(damaged) * 3 // COUNT + 1  # in row 3
    damaged[position] ^= 0x10
    (folder / name).write_bytes(bytes(damaged))
    cache, sound = open_cache(folder), torch.tensor([0, 1, 2, 4, 5])
    cache.numerator(sound), cache.weight(sound)
    with pytest.raises(UserError, match=r"1 of 6 rows are unfinished or damaged \(first: row 4\)"):
        cache.weight(torch.arange(COUNT))
    with pytest.raises(UserError, match="1 of 6 rows"):
        open_cache(folder)
    made.clear()
    prepare(folder, particles, None)
    assert made == [3]
    assert everything(folder) == finished


def test_opening_a_finished_cache_reads_no_rows(
    tmp_path: Path, particles: Particles, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start must not wait for the rows of a hundred thousand particles; each is compared once, when it is read."""
    prepare(tmp_path / "cache", particles, noise)
    summed: list[int] = []
    total = Cache._sum

    def counting(self: Cache, i: int) -> int:
        summed.append(i)
        return total(self, i)

    monkeypatch.setattr(Cache, "_sum", counting)
    cache = prepare(tmp_path / "cache", particles, None)
    open_cache(tmp_path / "cache")
    assert summed == []
    for _ in range(2):
        cache.weight(torch.tensor([4, 2]))
        cache.numerator(torch.tensor([2, 4]))
    assert sorted(summed) == [2, 4]


def test_killed_while_it_was_made(tmp_path: Path, particles: Particles, noise: Noise, made: list[int]) -> None:
    """The marks of rows that were never flushed say nothing: without the end, every row is compared."""
    folder = tmp_path / "cache"
    prepare(folder, particles, noise)
    assert json.loads((folder / "cache.json").read_text())["finished"] is True
    cache_module._mark_finished(folder, False)
    numerators = np.memmap(folder / "numerator.f16", np.float16, "r+", shape=(COUNT, GRID.crop**3))
    numerators[2] = 0
    numerators.flush()
    made.clear()
    prepare(folder, particles, None)
    assert made == [2]
    assert open_cache(folder).missing().size == 0


def test_truncated_file_is_told(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    folder = tmp_path / "cache"
    prepare(folder, particles, noise)
    os.truncate(folder / "weight.f16", 100)
    with pytest.raises(UserError, match=r"weight.f16: missing or truncated"):
        open_cache(folder)


def test_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache here"):
        open_cache(tmp_path / "nothing")


def moved(particles: Particles) -> Particles:
    euler = particles.euler + np.array([0.0, 1.0, 0.0])
    return replace(particles, euler=euler, rotation=euler_to_matrix(torch.from_numpy(euler)).numpy())


def shifted(particles: Particles) -> Particles:
    return replace(particles, origin=particles.origin + 0.1)


def other_defocus(particles: Particles) -> Particles:
    defocus = np.isin(TILT_COLUMNS, ("defocus_u", "defocus_v"))
    return replace(particles, tilts=particles.tilts + 10.0 * defocus)


def touched(particles: Particles) -> Particles:
    path = particles.image_files[2]
    star_sets.put_volume(path, np.random.default_rng(9).normal(size=(16,) * 3).astype(np.float32))
    os.utime(path, ns=(0, 0))
    return particles


@pytest.mark.parametrize("change", [moved, shifted, other_defocus, touched])
def test_stale_cache_is_made_anew(
    tmp_path: Path, particles: Particles, noise: Noise, made: list[int], change: Callable[[Particles], Particles]
) -> None:
    prepare(tmp_path / "cache", particles, noise)
    made.clear()
    changed = change(particles)
    cache = prepare(tmp_path / "cache", changed, noise)
    assert sorted(made) == list(range(COUNT))
    b, _ = observe(changed, 2, GRID, noise)
    assert float((cache.numerator(torch.tensor([2]))[0] - b).abs().max()) < 1e-3 * float(b.abs().max())


def test_other_mask_makes_the_cache_stale(tmp_path: Path, particles: Particles, noise: Noise, made: list[int]) -> None:
    prepare(tmp_path / "cache", particles, noise)
    made.clear()
    prepare(tmp_path / "cache", particles, noise, mark=hash_mask(MASK * 0.5))
    assert len(made) == COUNT


def test_another_processor_finds_the_cache_current(
    tmp_path: Path, particles: Particles, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another processor rounds resized mask and rotations differently; a cache that it finds is not stale for that."""
    folder, file = tmp_path / "cache", tmp_path / "mask.mrc"

    def rows(mask: torch.Tensor, rounding: float = 0.0) -> int:
        write_volume(file, mask.numpy(), star_sets.PIXEL)
        inputs = read_inputs(particles.source, InputOptions(), GridOptions(mask=file, downfrac=0.75))
        inputs = replace(inputs, particles=replace(inputs.particles, rotation=inputs.particles.rotation + rounding))
        size = inputs.grid.working_box
        noise = Noise(torch.ones(len(band_frequencies(size))), 1.0, False, torch.zeros(size // 2 + 1))
        made.clear()
        RowMaker(inputs, folder, InputOptions(), 1, noise=noise)(inputs.particles)
        return len(made)

    mask = spherical_mask(star_sets.BOX, 4, 2)
    assert rows(mask) == COUNT
    monkeypatch.setattr("opustomo.data.inputs.working_mask", lambda mask, grid: working_mask(mask, grid) * (1 - 1e-6))
    assert rows(mask, 1e-16) == 0
    assert rows(mask * 0.99) == COUNT
    assert rows(mask * 0.99, 1e-4) == COUNT


def test_full_disk_is_met_before_any_work(
    tmp_path: Path, particles: Particles, noise: Noise, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"disk full.*--no-cache") as caught:
        prepare(tmp_path / "cache", particles, noise)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    assert made == []


def test_folder_of_others_is_left_alone(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert not cache_module.is_free(folder)
    with pytest.raises(UserError, match="not empty and not a cache; choose another folder for the cache"):
        prepare(folder, particles, noise)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_rows_do_not_depend_on_threads_or_order(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    prepare(tmp_path / "one", particles, noise, workers=1)
    prepare(tmp_path / "many", particles, noise, workers=4)
    one, many = everything(tmp_path / "one"), everything(tmp_path / "many")
    assert one == many
    order = np.array([5, 2, 0])
    part = prepare(tmp_path / "part", particles.subset(order), noise)
    whole = open_cache(tmp_path / "one")
    index = torch.arange(3)
    assert torch.equal(part.numerator(index), whole.numerator(torch.from_numpy(order)))
    assert torch.equal(part.weight(index), whole.weight(torch.from_numpy(order)))


def test_on_the_fly_is_the_same_without_a_disk(particles: Particles, noise: Noise) -> None:
    rows = on_the_fly(particles, noise)
    b, w = observe(particles, 3, GRID, noise)
    assert len(rows) == COUNT
    assert torch.equal(rows.numerator(torch.tensor([3]))[0], b)
    assert torch.equal(rows.weight(torch.tensor([3]))[0], w)


def test_size_on_disk_is_as_announced(tmp_path: Path, particles: Particles, noise: Noise) -> None:
    prepare(tmp_path / "cache", particles, noise)
    rows = sum(
        path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix in {".f16", ".f32", ".u32"}
    )
    assert rows == COUNT * row_bytes(GRID)
    manifest = json.loads((tmp_path / "cache/cache.json").read_text())
    assert manifest["rows"] == COUNT


# ------------------------------------------------------------------------------------------------ moved poses


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> list[Particles]:
    """The particles of every estimate of the noise, each twice as strong as the one before."""
    asked: list[Particles] = []

    def estimate(particles: Particles, *_: object, **__: object) -> Noise:
        asked.append(particles)
        return replace(noise, power=noise.power * 2.0 ** (len(asked) - 1))

    monkeypatch.setattr("opustomo.preparation.estimate_noise", estimate)
    return asked


def maker(particles: Particles, folder: Path | None, shared: Path | None = None) -> RowMaker:
    return RowMaker(Inputs(particles, GRID, MASK, hash_mask(MASK)), folder, InputOptions(), 1, shared)


def assert_rows_of(rows: Rows, particles: Particles, noise: Noise) -> None:
    every = torch.arange(COUNT)
    for i in range(COUNT):
        b, w = observe(particles, i, GRID, noise)
        assert float((rows.numerator(every)[i] - b).abs().max()) < 1e-3 * float(b.abs().max())
        assert float((rows.weight(every)[i] - w).abs().max()) < 1e-3 * float(w.abs().max())


def test_shared_cache_never_gets_other_poses(
    tmp_path: Path, particles: Particles, noise: Noise, estimates: list[Particles], made: list[int]
) -> None:
    """Rows at moved poses lie in the run's own folder; those at the given poses stay, to the byte, for other runs."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    rows_of = maker(particles, own, shared)
    rows_of(particles)
    given = everything(shared)
    written = {path.name: path.stat().st_mtime_ns for path in shared.iterdir()}
    assert not own.exists() and len(made) == COUNT
    for change in (shifted, moved):
        assert_rows_of(rows_of(change(particles)), change(particles), noise)
    assert open_cache(own).fingerprint != open_cache(shared).fingerprint
    made.clear()
    assert_rows_of(rows_of(particles), particles, noise)
    assert made == [] and everything(shared) == given
    assert {path.name: path.stat().st_mtime_ns for path in shared.iterdir()} == written


def test_rows_say_how_far_they_were_moved(tmp_path: Path, particles: Particles, estimates: list[Particles]) -> None:
    rows_of = maker(particles, tmp_path / "own")
    assert torch.equal(rows_of(particles).moved[:, 3:], torch.zeros(COUNT, 3))
    turned, expected = rows_of(moved(particles)).moved, np.deg2rad(1.0)
    assert np.allclose(turned[:, :3].norm(dim=1), expected, rtol=1e-4) and float(turned[:, 3:].abs().max()) == 0
    away = rows_of(shifted(particles)).moved
    assert np.allclose(away[:, 3:].norm(dim=1), 0.1 * 3**0.5 * 12 / 16, rtol=1e-4)  # working voxels
    assert torch.equal(away, moved_from(shifted(particles), particles, GRID))


@pytest.mark.parametrize("where", ["disk", "shared", "memory", "fly"])
def test_noise_is_estimated_once_at_the_given_poses(
    where: str, tmp_path: Path, particles: Particles, noise: Noise, estimates: list[Particles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Evidences at different poses can be compared only under one noise model."""
    if where == "fly":
        monkeypatch.setattr(cache_module, "free_memory", lambda: 0)
    folder = None if where in ("memory", "fly") else tmp_path / "own"
    rows_of = maker(particles, folder, tmp_path / "shared" if where == "shared" else None)
    for at in (particles, moved(particles), shifted(particles), particles):
        rows = rows_of(at)
        assert isinstance(rows, OnTheFly) == (where == "fly")
        assert_rows_of(rows, at, noise)
    assert estimates == [particles]


def test_lost_cache_is_made_with_the_noise_that_is_known(
    tmp_path: Path, particles: Particles, noise: Noise, estimates: list[Particles]
) -> None:
    """A resumed run whose cache is gone: the noise of its checkpoint, not one estimated at the corrected poses."""
    rows_of = maker(particles, tmp_path / "own")
    rows_of.noise = replace(noise, power=3.0 * noise.power)
    assert_rows_of(rows_of(moved(particles)), moved(particles), rows_of.noise)
    assert estimates == []
    assert torch.equal(open_cache(tmp_path / "own").noise.power, 3.0 * noise.power)
