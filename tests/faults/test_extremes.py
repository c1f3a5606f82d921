"""Data at the edge of what can be: every verb works with finite numbers, or refuses in one line with the fix."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from opustomo import cli
from opustomo.analysis import page
from opustomo.data.mrc import read_volume
from opustomo.data.pickles import load_poses
from opustomo.data.star import read_star
from small_set import SmallSet, hurry
from star_sets import put_loop, put_volume

COUNT, BATCH = 6, "4"


@dataclass
class Case:
    """A small set that may be changed: particles.star, subtomo/ and mask.mrc in a folder of its own."""

    folder: Path
    batch: str = BATCH
    columns: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, given: SmallSet, folder: Path, count: int = COUNT) -> Case:
        folder.mkdir()
        shutil.copy(given.mask, folder / "mask.mrc")
        table = read_star(given.star).particles.head(count)
        case = cls(folder, columns={name: [str(v) for v in table[name]] for name in table})
        for name in case.columns["rlnImageName"]:
            (folder / name).parent.mkdir(exist_ok=True)
            for path in (name, name.replace(".mrc", "_ctf.star")):
                shutil.copy(given.folder / path, folder / path)
        return case

    @property
    def images(self) -> list[Path]:
        return [self.folder / name for name in self.columns["rlnImageName"]]

    def keep(self, count: int) -> None:
        self.columns = {name: values[:count] for name, values in self.columns.items()}

    def same(self, *names: str) -> None:
        for name in names:
            self.columns[name] = self.columns[name][:1] * len(self.columns[name])

    def voxels(self, which: list[Path], make: Callable[[Path], np.ndarray]) -> None:
        for path in which:
            put_volume(path, make(path).astype(np.float32), read_volume(path)[1])

    def tilts(self, which: list[Path], change: Callable[[list[list[str]]], list[list[str]]]) -> None:
        for path in which:
            star = path.with_name(path.stem + "_ctf.star")
            lines = star.read_text().splitlines()
            head = [line for line in lines if not line[:1].isdigit() and line.strip()]
            rows = change([line.split() for line in lines if line[:1].isdigit()])
            star.write_text("\n".join([*head, *(" ".join(row) for row in rows)]) + "\n")

    def write(self) -> None:
        put_loop(self.folder / "particles.star", "", self.columns)


def batch_of_one(case: Case) -> None:
    case.batch = "1"


def one_particle(case: Case) -> None:
    case.keep(1)


def two_particles(case: Case) -> None:
    case.keep(2)


def three_particles(case: Case) -> None:
    case.keep(3)


def one_orientation(case: Case) -> None:
    case.same("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def one_image_in_many_poses(case: Case) -> None:
    case.same("rlnImageName", "rlnCtfImage")


def identical_particles(case: Case) -> None:
    case.same(*case.columns)


def one_box_of_zeros(case: Case) -> None:
    case.voxels(case.images[2:3], lambda path: np.zeros((24,) * 3))


def one_constant_box(case: Case) -> None:
    case.voxels(case.images[2:3], lambda path: np.full((24,) * 3, 3.5))


def all_boxes_of_zeros(case: Case) -> None:
    case.voxels(case.images, lambda path: np.zeros((24,) * 3))


def one_tilt(case: Case) -> None:
    case.tilts(case.images[1:2], lambda rows: rows[len(rows) // 2 : len(rows) // 2 + 1])


def one_tilt_each(case: Case) -> None:
    case.tilts(case.images, lambda rows: rows[len(rows) // 2 : len(rows) // 2 + 1])


def defocus(value: str) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.tilts(case.images, lambda rows: [[value, *row[1:]] for row in rows])

    change.__name__ = f"defocus_{value}"
    return change


def mask_of_a_few_voxels(case: Case) -> None:
    axis = np.arange(24) - 12
    put_volume(
        case.folder / "mask.mrc", (axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2 <= 9).astype("f4"), 15.0
    )


def pure_noise(case: Case) -> None:
    rng = np.random.default_rng(0)
    case.voxels(case.images, lambda path: rng.normal(size=(24,) * 3))


def no_noise(case: Case) -> None:
    axis = np.arange(24) - 12
    blob = np.exp(-(axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2) / 18)
    case.voxels(case.images, lambda path: blob)


# message: what a verb that refuses says; None where all of them work
CASES = [
    (batch_of_one, None),
    (one_particle, "particles.star: 1 particle(s) to fit: at least 2 are needed"),
    (two_particles, None),
    pytest.param(three_particles, None, marks=pytest.mark.slow),
    pytest.param(one_orientation, None, marks=pytest.mark.slow),
    pytest.param(one_image_in_many_poses, None, marks=pytest.mark.slow),
    (identical_particles, None),
    (one_box_of_zeros, "p00002.mrc: empty box (every voxel is 0)"),
    (one_constant_box, "p00002.mrc: empty box (every voxel is 3.5)"),
    (all_boxes_of_zeros, "p00000.mrc: empty box (every voxel is 0)"),
    (one_tilt, None),
    pytest.param(one_tilt_each, None, marks=pytest.mark.slow),
    pytest.param(defocus("0"), None, marks=pytest.mark.slow),
    pytest.param(defocus("200000"), None, marks=pytest.mark.slow),
    (defocus("-30000"), None),
    pytest.param(mask_of_a_few_voxels, None, marks=pytest.mark.slow),
    (pure_noise, None),
    (no_noise, None),
]


def lines_of(case: Case) -> list[list[object]]:
    star, mask, run = (case.folder / name for name in ("particles.star", "mask.mrc", "run"))
    few = ["--downfrac", "0.5", "--workers", "1"]
    options = [*few, "--width", "0.05", "--device", "cpu", "--zdim", "1", "-n", "2", "-b", case.batch]
    return [
        ["linear", star, "-r", mask, "-o", case.folder / "linear", *few, "--components", "1", "--iterations", "2"],
        ["train", star, "-r", mask, "-o", run, *options],
        ["analyze", run, "--clusters", "1", "--skip-umap"],
        ["volumes", run, "--kmeans", "1"],
        ["report", run],
    ]


def not_finite(folder: Path) -> list[str]:
    """Files of results, by what they hold, with a number that is none."""
    bad = []
    for path in folder.rglob("*"):
        if path.suffix == ".mrc":
            values = [read_volume(path)[0]]
        elif path.suffix == ".npz":
            with np.load(path) as stored:
                values = [stored[name] for name in stored.files if stored[name].dtype.kind == "f"]
        elif path.name.startswith(("z.", "weights.")):
            values = [tensor.numpy() for tensor in tensors_in(torch.load(path, weights_only=True))]
        elif path.name.startswith("pose."):
            values = [np.asarray(part) for part in load_poses(path)]
        elif path.suffix in (".csv", ".html"):
            words = re.findall(r"(?<![\w.])-?(?:nan|inf)(?!\w)", path.read_text())
            values = [np.array([float(word) for word in words])]
        else:
            continue
        bad += [str(path)] if not all(np.isfinite(v).all() for v in values) else []
    return bad


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, dict | list | tuple):
        return [t for part in (value.values() if isinstance(value, dict) else value) for t in tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []


@pytest.mark.parametrize(("change", "message"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_works_or_is_refused(
    change: Callable[[Case], None],
    message: str | None,
    small_set: SmallSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(page, "png", lambda figure, **options: b"")
    case = Case.of(small_set, tmp_path / "set")
    change(case)
    case.write()
    assert cli.main(["check", str(case.folder / "particles.star"), "-r", str(case.folder / "mask.mrc")]) in (0, 1)
    shown = capsys.readouterr()
    assert not re.search(r"\bnan\b|Traceback", shown.out + shown.err)
    for line in lines_of(case)[: None if message is None else 2]:
        status = cli.main([str(word) for word in line])
        error = [found for found in capsys.readouterr().err.splitlines() if "error:" in found]
        if message is None:
            assert (status, error) == (0, []), (line, error)
        else:
            assert status == 2 and len(error) == 1 and message in error[0], error
            assert not list(tmp_path.rglob("z.*.pkl")) and not list(tmp_path.rglob("*.f16"))
    assert not not_finite(tmp_path)
