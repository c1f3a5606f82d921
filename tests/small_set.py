"""A simulated set of 60 particles (box 24, 50S or 70S, wrong poses), a finished run on it, and rows without files.

Sets and runs are made once per test session, when first asked for; ``copy_run`` gives a test a run of its own.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PARTICLES = 60
EPOCHS = 3
PIXEL = 15.0
# Working box 16 (22.5 A), the smallest template, a tenth of the channels: an epoch takes a fifth of a second.
# with an encoder, so that what it does is tested; what a run is without one: test_train
SMALL = ["--downfrac", "0.7", "--width", "0.1", "-b", "8", "--zdim", "2", "--workers", "1", "--device", "cpu",
         "--encoderres", "6"]  # fmt: skip
RATES = ("seconds", "particles_per_second")


@dataclass(frozen=True)
class SmallSet:
    """Folder of the set, and the truth: state (P,), A (P, 3, 3) and origin (P, 3) pixels."""

    folder: Path
    state: np.ndarray
    rotation: np.ndarray
    origin: np.ndarray

    @property
    def star(self) -> Path:
        return self.folder / "particles.star"

    @property
    def mask(self) -> Path:
        return self.folder / "mask.mrc"


def make_set(folder: Path, seed: int = 3, **changes: Any) -> SmallSet:
    """Like the small set, but for ``changes`` of the simulator's preset and other particles of another seed."""
    from opustomo.simulate.dataset import simulate
    from opustomo.simulate.plan import Preset, make_plan

    usual = Preset(n=PARTICLES, states=(0, 1), box=24, pixel_size=PIXEL, snr=2.0, rot_err=2.0, shift_err=0.3)
    preset = replace(usual, **changes)
    simulate(folder, preset, seed, {})
    plan = make_plan(preset, seed)
    return SmallSet(folder, plan.state, plan.rotation, plan.origin)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    return make_set(tmp_path_factory.mktemp("small") / "set")


@pytest.fixture(scope="session")
def finished_run(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs with the options SMALL; read only.

    Its own cache has the corrected poses; the one at the poses given is ``given_cache``, for other runs to share.
    """
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(small_set, folder, "-n", str(EPOCHS), "--cache", str(given_cache(folder))) == 0
    return folder


def given_cache(run: Path) -> Path:
    """The cache of the finished run at the poses of the file (``--cache``)."""
    return run.parent / "given"


def train_line(small_set: SmallSet, run: Path, *options: str) -> list[str]:
    """Arguments of ``opustomo``; of an option given twice the later one holds."""
    options = (*SMALL, *options)
    chosen = {}
    at = 0
    while at < len(options):
        flag, follows = options[at], options[at + 1 : at + 2]
        value = list(follows) if follows and not follows[0].startswith("-") else []
        chosen[flag] = value
        at += 1 + len(value)
    words = [word for flag, value in chosen.items() for word in (flag, *value)]
    return ["train", str(small_set.star), "-r", str(small_set.mask), "-o", str(run), *words]


def train(small_set: SmallSet, run: Path, *options: str) -> int:
    """Run ``opustomo train`` in this process; the exit status."""
    from opustomo import cli

    return cli.main(train_line(small_set, run, *options))


def copy_run(run: Path, to: Path, epoch: int) -> Path:
    """A copy of a run as it was when ``epoch`` had just been written (its cache is not copied)."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("cache"))
    for path in to.glob("*.*.pkl"):
        if int(path.name.split(".")[1]) > epoch:
            path.unlink()
    return to


def analysed(finished_run: Path, folder: Path, epoch: int) -> Path:
    """A copy of the finished run as of ``epoch``, with its rows and three classes."""
    from opustomo.analysis.latents import main
    from opustomo.config import AnalyzeConfig

    copy_run(finished_run, folder, epoch)
    (folder / "cache").symlink_to(finished_run / "cache")
    main(AnalyzeConfig(run=folder, clusters=3, skip_umap=True))
    return folder


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that nobody looks at as empty files: half the time of a run."""
    from opustomo.analysis import plots

    for name in ("montage", "picture_rows", "scatter"):
        monkeypatch.setattr(plots, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(plots, "save", lambda figure, path: path.touch())


def learner_of(model: Any, optimizer: torch.optim.Optimizer, bank: torch.Tensor, epoch: int) -> Any:
    """What ``train_epoch`` changes, at the beginning of an epoch."""
    from opustomo.training.course import Course
    from opustomo.training.keeping import Learner

    return Learner(model, optimizer, bank, Course(epoch, seen=epoch * len(bank)))


def metrics_of(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what the clock says."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in RATES} for row in csv.DictReader(file)]


def held_out(run: Path) -> list[float]:
    """The held-out bound of every epoch, nats per particle."""
    return [float(row["val_elbo"]) for row in metrics_of(run) if row["val_elbo"]]


def tensors(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def assert_equal(a: object, b: object, where: str = "") -> None:
    """The same tensors and numbers, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_epoch(a: Path, b: Path, epoch: int) -> None:
    for kind in ("z", "weights"):
        assert_equal(tensors(a / f"{kind}.{epoch}.pkl"), tensors(b / f"{kind}.{epoch}.pkl"), kind)
    assert (a / f"pose.{epoch}.pkl").read_bytes() == (b / f"pose.{epoch}.pkl").read_bytes()


class MemoryRows:
    """Rows that were made, not read: numerators (P, C, C, C), weights (P, n) and moves (P, 6; None: not moved)."""

    def __init__(self, numerators: torch.Tensor, weights: torch.Tensor, moved: torch.Tensor | None = None) -> None:
        self.numerators, self.weights = numerators, weights
        self.moved = torch.zeros(len(numerators), 6) if moved is None else moved

    def __len__(self) -> int:
        return len(self.numerators)

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        return self.numerators[index]

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        return self.weights[index]


def even_weights(count: int, size: int, seed: int, strength: float = 1.0) -> torch.Tensor:
    """(count, n) weights on the band of a box ``size``: each lacks a wedge of its own; W(k) = W(-k)."""
    from opustomo.physics.fourier import band_frequencies

    generator = torch.Generator().manual_seed(seed)
    k = band_frequencies(size)
    axis = torch.nn.functional.normalize(torch.randn((count, 3), generator=generator), dim=-1)
    along = (axis @ k.T) / k.norm(dim=-1)
    falloff = torch.exp(-((k.norm(dim=-1) / (0.4 * size)) ** 2))
    return strength * torch.where(along.abs() < 0.8, 0.3 + along.square(), 0.0) * falloff


def observed(volumes: torch.Tensor, weights: torch.Tensor, size: int, seed: int | None) -> MemoryRows:
    """Rows of particles with densities (P, C, C, C): ``B = W V + sqrt(W) noise``, white noise unless seed is None."""
    from opustomo.physics.fourier import from_band, irfft3, rfft3, to_band
    from opustomo.physics.observation import model_band
    from opustomo.physics.volume import centre_crop

    band = weights * model_band(volumes, size)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        band = band + weights.sqrt() * to_band(rfft3(torch.randn((len(volumes), *(size,) * 3), generator=generator)))
    return MemoryRows(centre_crop(irfft3(from_band(band, size)), volumes.shape[-1]), weights)


def gaussians(size: int, centres: np.ndarray, width: float) -> torch.Tensor:
    """Sum of Gaussians of unit height at centres (n, 3), (x, y, z) voxels from voxel size//2."""
    axis = np.arange(size) - size // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    grid = np.stack([x, y, z], -1)[..., None, :]
    return torch.from_numpy(np.exp(-((grid - centres) ** 2).sum(-1) / (2 * width**2)).sum(-1)).float()
