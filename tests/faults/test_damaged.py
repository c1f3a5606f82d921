"""``--damaged``: subtomograms that cannot be used end a run at once, or are gone over and named."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from opustomo import cli
from opustomo.analysis.made_from import open_rows
from opustomo.checkpoint import open_run
from opustomo.compat import dsd, dsdsh
from opustomo.data.cache import open_cache
from opustomo.data.mrc import read_volume
from opustomo.data.pickles import load_poses
from opustomo.data.star import read_star
from small_set import SmallSet, hurry, train_line
from stack_writers import two_states_set
from star_sets import put_loop, put_volume

COUNT = 12
DAMAGED = {2: "p00001.mrc: no such volume", 4: "empty box", 5: "is truncated", 7: "NaN", 9: "all tilts are excluded"}


@pytest.fixture
def given(small_set: SmallSet, tmp_path: Path) -> SmallSet:
    """Twelve particles, five of which (see ``DAMAGED``, by row) cannot be used, each for another reason."""
    folder = tmp_path / "set"
    table = read_star(small_set.star).particles.head(COUNT)
    columns = {name: [str(v) for v in table[name]] for name in table}
    shutil.copytree(small_set.folder / "subtomo", folder / "subtomo")
    shutil.copy(small_set.mask, folder)
    images = [folder / name for name in columns["rlnImageName"]]
    images[1].unlink()
    images[1].with_name("p00001_ctf.star").unlink()
    put_volume(images[3], np.full((24,) * 3, 7.0, np.float32), 15.0)
    images[4].write_bytes(images[4].read_bytes()[:-100])
    images[6].write_bytes(images[6].read_bytes()[:-4] + np.float32(np.nan).tobytes())
    star = images[8].with_name("p00008_ctf.star")
    lines = [line.split() for line in star.read_text().splitlines()]
    star.write_text("\n".join(" ".join([*w[:8], "0"] if len(w) == 9 else w) for w in lines) + "\n")
    put_loop(folder / "particles.star", "", columns)
    return SmallSet(folder, *(a[:COUNT] for a in (small_set.state, small_set.rotation, small_set.origin)))


def run_of(given: SmallSet, out: Path, *options: str) -> int:
    return cli.main(train_line(given, out, "-n", "1", "-b", "4", *options))


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "damaged.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_they_are_left_out_and_named(
    given: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hurry(monkeypatch)
    out = tmp_path / "run"
    assert run_of(given, out, "--damaged", "skip") == 0
    assert "5 of 12 particles cannot be used (rows 2, 4, 5, 7, 9)" in capsys.readouterr().err
    found = table_of(out)
    assert [int(row["row"]) for row in found] == list(DAMAGED)
    assert all(words in row["reason"] for row, words in zip(found, DAMAGED.values(), strict=True))
    assert [Path(row["file"]).name for row in found] == [f"p{row - 1:05d}.mrc" for row in DAMAGED]
    run, bad = open_run(out), np.array(list(DAMAGED)) - 1
    good = np.setdiff1d(np.arange(COUNT), bad)
    assert len(run.codes) == COUNT and np.flatnonzero(~run.typical).tolist() == bad.tolist()
    # nothing is known of them but the prior, the same for all; their poses go with the map as a whole
    prior = (run.weights["mixture"]["share"] @ run.weights["mixture"]["mean"]).numpy()
    linear = run.linear_results()
    assert (
        linear is not None
        and np.allclose(linear["code"][bad], prior, atol=1e-5)
        and np.allclose(linear["evidence"][bad], 0, atol=1e-6)
    )
    assert np.ptp(run.codes[bad], 0).max() < 1e-6 < 1e-3 < np.ptp(run.codes[good, 0])
    table = read_star(given.star).particles
    assert np.allclose(run.origin[bad, 0], table["rlnOriginX"].to_numpy(float)[bad], atol=0.2)
    rows = open_rows(run)
    assert not rows.numerator(torch.from_numpy(bad)).any() and not rows.weight(torch.from_numpy(bad)).any()
    assert rows.weight(torch.from_numpy(good)).flatten(1).amax(1).all()
    # a cache that is there already says it, too; with the other policy it is as if it had not been made
    again = [*train_line(given, out, "--cache", str(out / "cache"))[1:4], "-o", str(tmp_path / "linear")]
    line = ["--downfrac", "0.7", "--workers", "1", "--no-estpose", "--components", "1"]
    shutil.copytree(out / "cache", tmp_path / "linear" / "cache")
    assert cli.main(["linear", *again, *line, "--damaged", "skip"]) == 0
    assert table_of(tmp_path / "linear") == found
    for verb in (
        ["analyze", str(out), "--clusters", "2", "--skip-umap"],
        ["volumes", str(out), "--kmeans", "2", "--full"],
    ):
        assert cli.main(verb) == 0
    maps = list(out.rglob("*_data.mrc"))
    assert maps and all(np.isfinite(read_volume(path)[0]).all() for path in maps)


def test_the_others_are_fitted_as_if_there_were_no_damaged(
    given: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    assert cli.main(["average", str(given.star), "-o", str(tmp_path / "all"), "--damaged", "skip"]) == 0
    table = read_star(given.star).particles
    kept = [i for i in range(COUNT) if i + 1 not in DAMAGED]
    put_loop(given.star, "", {name: [str(table[name][i]) for i in kept] for name in table})
    assert cli.main(["average", str(given.star), "-o", str(tmp_path / "good"), "--mask", str(given.mask)]) == 0
    assert len(table_of(tmp_path / "all")) == 5 and not (tmp_path / "good" / "damaged.csv").exists()
    # alternate rows make the halves: others here than there, but the sum of both is one
    a, b = (read_volume(tmp_path / name / "average.mrc")[0].ravel() for name in ("all", "good"))
    assert np.corrcoef(a, b)[0, 1] > 0.95


@pytest.mark.parametrize("verb", ["cache", "linear", "average"])
def test_the_first_one_stops(verb: str, given: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, name in ((2, "p00000"), (5, "p00002")):
        path = given.folder / "subtomo" / f"p{row - 1:05d}.mrc"
        shutil.copy(given.folder / "subtomo" / f"{name}.mrc", path)
        shutil.copy(given.folder / "subtomo" / "p00000_ctf.star", path.with_name(f"p{row - 1:05d}_ctf.star"))
    star = given.folder / "subtomo" / "p00008_ctf.star"
    shutil.copy(star.with_name("p00000_ctf.star"), star)
    assert cli.main([verb, str(given.star), "-o", str(tmp_path / "out"), "--workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "p00003.mrc: empty box (every voxel is 7)" in line and "(row 4 of 12)" in line
    assert "--damaged skip" in line and "--ind" in line and len(line) < 400
    assert not list((tmp_path / "out").rglob("*.f16")) and not (tmp_path / "out" / "damaged.csv").exists()


def test_the_forms_of_the_seed(
    given: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Poses of all with a header that cannot be read; training leaves out what the verb leaves out."""
    hurry(monkeypatch)
    for row, name in ((2, "p00000"), (5, "p00002")):  # files that are missing: no box is compared, as ever
        shutil.copy(given.folder / "subtomo" / f"{name}.mrc", given.folder / "subtomo" / f"p{row - 1:05d}.mrc")
    (given.folder / "subtomo" / "p00001.mrc").write_bytes(b"MAP")
    shutil.copy(given.folder / "subtomo" / "p00000_ctf.star", given.folder / "subtomo" / "p00001_ctf.star")
    poses = given.folder / "particles_pose_euler.pkl"
    line = ["prepare", str(given.star), "24", "15"]
    assert dsdsh.main(line) == 2 and "p00001.mrc" in capsys.readouterr().err
    assert dsdsh.main([*line, "--damaged", "skip"]) == 0
    made = poses.read_bytes()
    assert dsd.main(["parse_pose_star", str(given.star), "-D", "24", "--Apix", "15", "-o", str(poses),
                     "--damaged", "skip"]) == 0 and poses.read_bytes() == made  # fmt: skip
    asked = ["-o", str(tmp_path / "run"), "-r", str(given.mask), "--templateres", "16", "-n", "1", "-b", "4"]
    trained = ["train_tomo", str(given.star), "--poses", str(poses), "--downfrac", "0.7", "--zdim", "1", *asked]
    assert dsd.main(trained) == 2
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert dsd.main([*trained, "--damaged", "skip"]) == 0
    assert [int(row["row"]) for row in table_of(tmp_path / "run")] == [2, 4, 7, 9]
    assert len(load_poses(poses)[0]) == len(open_run(tmp_path / "run").codes) == COUNT


def test_most_are_no_accident(given: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (0, 2):
        path = given.folder / "subtomo" / f"p{i:05d}.mrc"
        put_volume(path, np.zeros((24,) * 3, np.float32), 15.0)
    assert cli.main(["cache", str(given.star), "-o", str(tmp_path / "out"), "--damaged", "skip"]) == 2
    assert "7 of 12 particles looked at cannot be used" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.f16"))


def test_check_goes_over_them(given: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(given.star), "-r", str(given.mask), "--damaged", "skip"]) == 1
    shown = capsys.readouterr().out
    assert (
        "2 of 12 files cannot be read" in shown
        and "1 of 10 read are empty" in shown
        and "1 of 10 read have NaN" in shown
    )


def test_stacks_of_tilt_images(tmp_path: Path) -> None:
    """A stack that is missing and one without a single picture; the others as if these were not there."""
    star = two_states_set(6, 5.0, box=16, step=40.0).write_set(tmp_path / "set")
    stacks = sorted((tmp_path / "set").rglob("*.mrcs"))
    with mrcfile.open(stacks[3], "r+") as mrc:
        mrc.data[:] = 2.0
    stacks[1].unlink()
    assert cli.main(["cache", str(star), "-o", str(tmp_path / "out"), "--damaged", "skip", "--workers", "1"]) == 0
    found = table_of(tmp_path / "out")
    assert [(Path(row["file"]).name, row["reason"].split(": ")[-1][:9]) for row in found] == [
        (stacks[1].name, "no such v"),
        (stacks[3].name, "every ima"),
    ]
    assert len(open_cache(tmp_path / "out")) == 6
