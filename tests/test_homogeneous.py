"""One map without codes: poses against each half's own map, a better map than the average, and what has no codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opustomo import checkpoint, cli
from opustomo.analysis.score_poses import pose_errors
from opustomo.compat import dsd
from opustomo.config import InputOptions
from opustomo.data.mrc import read_volume
from opustomo.data.readers import read_particles
from opustomo.physics.volume import fourier_shell_correlation
from opustomo.stored import read_config
from small_set import SmallSet, hurry, make_set, tensors

COUNT = 60


@pytest.fixture(scope="module")
def poor_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """One state, noisy, at poses so wrong (6 degrees, 0.8 pixels) that the average is blurred."""
    folder = tmp_path_factory.mktemp("poor") / "set"
    return make_set(folder, 5, n=COUNT, states=(0,), snr=0.5, rot_err=6.0, shift_err=0.8)


def line(of: SmallSet, to: Path, *options: str) -> list[str]:
    return [
        "train",
        str(of.star),
        "-r",
        str(of.mask),
        "-o",
        str(to),
        "--encode-mode",
        "fixed",
        "--workers",
        "1",
        *options,
    ]


@pytest.fixture(scope="module")
def fixed(poor_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixed") / "run"
    assert cli.main(line(poor_set, folder, "--downfrac", "1")) == 0
    return folder


def volume(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_volume(path)[0].astype(np.float32))


def resolved(fsc: torch.Tensor, threshold: float) -> int:
    """Number of the first shell whose correlation is below a threshold, or of those there are."""
    below = torch.nonzero(fsc < threshold)
    return int(below[0]) if len(below) else len(fsc)


def test_poses_and_map_are_better_than_those_of_the_average(poor_set: SmallSet, fixed: Path, tmp_path: Path) -> None:
    given, run = read_particles(poor_set.star, InputOptions()), checkpoint.open_run(fixed, needs_codes=False)
    truth = poor_set.rotation, poor_set.origin
    before, after = (pose_errors(p.rotation, p.origin, *truth) for p in (given, run))
    assert after["angle_median"] < 0.5 * before["angle_median"] and after["angle_p90"] < 0.5 * before["angle_p90"]
    assert after["shift_median"] < 0.4 * before["shift_median"]

    average = ["average", str(poor_set.star), "-r", str(poor_set.mask), "--workers", "1", "-o", str(tmp_path)]
    assert cli.main(average) == 0
    mask, [true] = volume(poor_set.mask), (poor_set.folder / "gt").glob("state0*.mrc")
    fsc = {
        folder: fourier_shell_correlation(volume(folder / "average.mrc") * mask, volume(true) * mask)
        for folder in (tmp_path, fixed)
    }
    assert resolved(fsc[fixed], 0.5) > resolved(fsc[tmp_path], 0.5)
    assert (fsc[fixed] - fsc[tmp_path]).min() > -0.001 and float((fsc[fixed] - fsc[tmp_path]).mean()) > 0.1


def test_half_maps_say_what_the_map_is_worth(poor_set: SmallSet, fixed: Path) -> None:
    """Each half is corrected against itself: the correlation with the truth that the FSC promises is the true one."""
    mask, [true] = volume(poor_set.mask), (poor_set.folder / "gt").glob("state0*.mrc")
    half = fourier_shell_correlation(volume(fixed / "half1.mrc") * mask, volume(fixed / "half2.mrc") * mask)
    stored = np.loadtxt(fixed / "fsc.csv", delimiter=",", skiprows=1)[:, 2]
    assert np.allclose(stored, half, atol=1e-4)
    promised = (2 * half / (1 + half)).clamp(0, 1).sqrt()
    known = fourier_shell_correlation(volume(fixed / "average.mrc") * mask, volume(true) * mask)
    assert (promised - known)[1:-2].abs().max() < 0.05


@pytest.mark.slow
def test_noise_stays_noise(poor_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a molecule in the boxes rounds of poses make no correlation between the halves."""
    from opustomo.data import observe

    hurry(monkeypatch)
    read = observe.read_volume

    def only_noise(path: Path) -> tuple[np.ndarray, float]:
        values, pixel = read(path)
        noise = np.random.default_rng(int(path.stem[1:])).normal(size=values.shape)
        return noise.astype(np.float32), pixel

    monkeypatch.setattr(observe, "read_volume", only_noise)
    assert cli.main(line(poor_set, tmp_path, "--downfrac", "0.7", "--contrast", "white")) == 0
    fsc = np.loadtxt(tmp_path / "fsc.csv", delimiter=",", skiprows=1)[3:, 2]
    assert np.abs(fsc).max() < 0.4 and abs(fsc.mean()) < 0.15


def test_the_folder_is_a_run_without_codes(
    poor_set: SmallSet, fixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tensors(fixed / "z.0.pkl")["mu"].shape == (COUNT, 0)
    assert read_config(fixed)["kind"] == "map" and read_config(fixed)["zdim"] == 0
    encode = ["encode", str(fixed), str(poor_set.star), "-o", str(tmp_path / "no")]
    verbs = ("analyze",), ("volumes", "--pc", "1"), ("evaluate", "--truth", ".")
    for verb in (*([name, str(fixed), *options] for name, *options in verbs), encode):
        assert cli.main(verb) == 2
        assert "is one map (--encode-mode fixed) and has no codes" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(fixed), "-n", "3"]) == 2
    assert cli.main(line(poor_set, fixed)) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_poses_go_back_and_the_report_shows_the_map(poor_set: SmallSet, fixed: Path, tmp_path: Path) -> None:
    assert cli.main(["select", str(poor_set.star), "--run", str(fixed), "--corrected", "-o", str(tmp_path)]) == 0
    back = read_particles(tmp_path / "pre0.star", InputOptions(datadir=poor_set.folder))
    run = checkpoint.open_run(fixed, needs_codes=False)
    assert np.allclose(back.rotation, run.rotation, atol=1e-5) and np.allclose(back.origin, run.origin, atol=1e-4)
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"] == {"0": COUNT}
    assert cli.main(["report", str(fixed)]) == 0
    text = (fixed / "report.html").read_text()
    assert all(word in text for word in ("one map", "Half maps", "shift, median (pixels)", "--corrected"))


def test_options_of_a_network_are_named_once(
    poor_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier program's line has them all; without --estpose poses are those of the file, as the line says."""
    hurry(monkeypatch)
    words = f"train_tomo {poor_set.star} -o {tmp_path} --encode-mode fixed --zdim 12 --beta-control 0.8 --downfrac 0.7"
    assert dsd.main(words.split()) == 0
    said = capsys.readouterr().err
    told = "warning: no effect with --encode-mode fixed, which has no network: --zdim 12, --beta-control 0.8"
    assert said.count(told) == 1  # and once more at the end, without the mark
    given = read_particles(poor_set.star, InputOptions())
    assert np.allclose(checkpoint.open_run(tmp_path, needs_codes=False).euler, given.euler, atol=1e-4)
    assert cli.main(line(poor_set, tmp_path / "x", "--load", "latest")) == 2
    assert "has nothing to continue" in capsys.readouterr().err
