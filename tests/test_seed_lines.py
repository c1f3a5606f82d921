"""The command lines printed in the seed's README, run on a small RELION 3.0 set and its 3.1 twin, and what they leave.

The lines stand in seed_set.py as they are printed; ``typed`` exchanges paths, box, pixel size, epochs and sizes,
nothing else.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo import train
from opustomo.checkpoint import open_run
from opustomo.data.mrc import header_of, read_volume
from opustomo.data.pickles import load_pickle, load_split, save_pickle
from opustomo.data.star import read_star
from opustomo.errors import UserError
from pictures import drawn_pictures
from seed_set import (
    ANALYZE,
    APIX,
    BOX,
    COUNT,
    KMEANS_VOLUMES,
    PARSE_POSE31,
    PARSE_POSE_STAR,
    PC_VOLUMES,
    PREPARE31,
    PRINTED,
    README,
    RESUME,
    TARGET,
    TRAIN,
    WORKING,
    Place,
    call,
    check_classes,
    make_place,
    poses_of,
    process,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("seed"))


@pytest.fixture(scope="module")
def trained(place: Place) -> tuple[Place, str]:
    """The place after the training line, and what it said."""
    changes = (("-n 40", "-n 2"), ("--templateres 160", "--templateres 32"), ("--angpix 2.1", f"--angpix {APIX}"))
    return place, called(place.typed(TRAIN, *changes), place.cwd)


def called(line: str, cwd: Path) -> str:
    """What a line that succeeds says on stderr when typed in ``cwd``; nothing on stdout."""
    said, printed = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed)
    with contextlib.chdir(cwd), streams[0], streams[1], drawn_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(line))
        assert call(line) == 0, said.getvalue()
    assert printed.getvalue() == ""
    return said.getvalue()


@pytest.fixture(scope="module")
def resumed(trained: tuple[Place, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder after the resume line, which goes on from epoch 0, and what it said."""
    place = trained[0]
    again = Place(tmp_path_factory.mktemp("again"), place.cwd)
    shutil.copytree(place.run, again.run)
    star = ("/work/ribo.star", f"{place.work}/ribo.star")
    line = again.typed(RESUME, star, ("-n 20", "-n 2"), ("--templateres 160", "--templateres 32"))
    return again.run, called(line, place.cwd)


@pytest.fixture(scope="module")
def analysed(trained: tuple[Place, Any]) -> tuple[Place, Path]:
    place = trained[0]
    assert call(place.typed(ANALYZE, ("/work/sp 16 4 16", f"{place.run} 1 4 6")) + " --skip-umap") == 0
    return place, place.run / "analyze.1"


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory that has to stay empty."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message, which must be the only line that is not of the log."""
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    return lines[0]


def test_the_lines_are_those_of_the_readme() -> None:
    if not README:
        pytest.skip("the seed's README is not here")
    text = " ".join(README[0].read_text().split())
    assert not [line for line in PRINTED if " ".join(line.split()) not in text]


def test_poses_of_either_dialect(place: Place, cwd: Path) -> None:
    given = poses_of(place.cwd / "ribo_pose_euler.pkl")
    table = read_star(place.work / "ribo.star").particles
    origin = table[[f"rlnOrigin{axis}" for axis in "XYZ"]].to_numpy(float)
    np.testing.assert_allclose(given[1] * BOX, origin, atol=1e-5)
    np.testing.assert_allclose(given[2], table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float))

    assert call(place.typed(PREPARE31, ("236 2.1", f"{BOX} {APIX}"))) == 0
    line = place.typed(
        PARSE_POSE_STAR, ("/work/consensus_data", "/work/ribo"), ("236", f"{BOX}"), ("2.1", f"{APIX}")
    )  # fmt: skip
    assert call(line) == 0
    for path in (place.work / "consensus_data_pose_euler.pkl", cwd / "ribo-pose-euler.pkl"):
        for value, expected in zip(poses_of(path), given, strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-6)
        path.unlink()


@pytest.mark.parametrize(("star", "flag"), [("ribo.star", ""), ("consensus_data.star", "--relion31")])
def test_one_star_file_for_each_label(star: str, flag: str, place: Place, tmp_path: Path) -> None:
    labels = np.arange(COUNT) % 3
    save_pickle(tmp_path / "labels.pkl", labels)
    common = f"dsd parse_pose_star {place.work}/{star} -D {BOX} --Apix {APIX} {flag}"
    assert call(f"{common} --labels {tmp_path}/labels.pkl --outdir {tmp_path}/classes") == 0
    check_classes(tmp_path / "classes", place.work / star, np.arange(COUNT), labels)


@pytest.mark.slow
def test_training_leaves_the_promised_files(trained: tuple[Place, str]) -> None:
    place, said = trained
    assert {path.name for path in place.cwd.iterdir()} == {"mask.mrc", "ribo_pose_euler.pkl"}
    epochs = {f"{name}.{n}.pkl" for name in ("weights", "z", "pose") for n in (0, 1)}
    expected = {*epochs, "config.pkl", "config.yaml", "run.log", "metrics.csv", "ribo-split.pkl", "ref.mrc", "ref.png"}
    assert expected <= {path.name for path in place.run.iterdir()}
    assert "global batch of 32" in said
    assert (place.run / "ref.png").read_bytes().startswith(b"\x89PNG")
    assert header_of(place.run / "ref.mrc").pixel_size == pytest.approx(BOX * APIX / WORKING, rel=1e-5)

    split = load_pickle(place.run / "ribo-split.pkl")
    np.testing.assert_array_equal(np.sort(split), np.arange(COUNT))
    opened = open_run(place.run)
    np.testing.assert_array_equal(opened.split[0], split[:44])  # the first (1 - valfrac) of 48
    for epoch in (0, 1):
        codes = torch.load(place.run / f"z.{epoch}.pkl", weights_only=True)
        assert codes["mu"].shape == (COUNT, 12) and codes["mu"].isfinite().all() and codes["mu"].std() > 0
        assert "multi_mu" not in codes  # no conformation code was trained
        assert "model" in torch.load(place.run / f"weights.{epoch}.pkl", weights_only=True)
        poses = poses_of(place.run / f"pose.{epoch}.pkl")
        moved = np.abs(poses[1] - poses_of(place.cwd / "ribo_pose_euler.pkl")[1]).max() * BOX
        assert 0.01 < moved < 3  # --estpose corrects, by pixels at most


@pytest.mark.slow
def test_config_pickle_has_the_layout_that_scripts_read(trained: tuple[Place, Any]) -> None:
    with (trained[0].run / "config.pkl").open("rb") as file:
        config, meta = pickle.load(file), pickle.load(file)
        assert not file.read()
    assert {"dataset_args", "lattice_args", "model_args", "seed"} <= config.keys()
    assert config["lattice_args"]["D"] == BOX + 1
    assert (config["model_args"]["zdim"], config["model_args"]["templateres"]) == (12, 32)
    assert config["model_args"]["Apix"] == pytest.approx(BOX * APIX / WORKING)
    assert {"time", "cmd", "version"} <= meta.keys() and "--estpose" in meta["cmd"]


@pytest.mark.slow
def test_the_resume_line_starts_warm_and_says_so(resumed: tuple[Path, str]) -> None:
    run, said = resumed
    log = (run / "run.log").read_text()
    [warm] = [line for line in log.splitlines() if "warm start, not an exact continuation" in line]
    for change in ("lr 5e-05 -> 0.0001", "beta_control 0.8 -> 2.0", "downfrac 0.65 -> 0.75", "lamb 0.8 -> 1.0",
                   "valfrac 0.1 -> 0.25", "batch 8 -> 12"):  # fmt: skip
        assert change in warm
    assert warm.count("->") == 6 and "from epoch 0" in warm
    assert said.count("only mode") == 1
    assert all(flag in said for flag in ("--lazy-single", "--pe-type", "--template-type"))
    assert re.search(r"/sp/z\.0\.pkl is not there; \S+/ribo/z\.0\.pkl", log)

    after, before = open_run(run, 1), open_run(run, 0)
    kept = {"estpose": True, "angpix": APIX, "tmp_prefix": "ref", "lr": 1e-4, "valfrac": 0.25, "batch": 12}
    assert {name: after.config[name] for name in kept} == kept
    assert Path(after.config["datadir"]).name == "work"
    assert [len(part) for part in after.split] == [36, 12]
    # each epoch keeps the grid it was trained on
    assert (before.grid.working_box, after.grid.working_box) == (WORKING, 18)
    assert before.decode(before.codes[:1]).shape[-1] == before.grid.crop
    # the corrected poses hold; what pose.N.pkl adds to them is what the data on the grid of that epoch still say
    for name in ("rotation", "origin", "euler"):
        assert torch.equal(after.weights[name], before.weights[name])
    apart = Rotation.from_matrix(after.rotation).inv() * Rotation.from_matrix(before.rotation)
    assert 0 < np.degrees(np.median(apart.magnitude())) < 1


@pytest.mark.slow
def test_more_epochs_than_planned_stretch_the_schedules(trained: tuple[Place, Any], tmp_path: Path) -> None:
    place, again = trained[0], tmp_path / "ribo"
    shutil.copytree(place.run, again)
    line = f"dsd train_tomo {place.work}/ribo.star -o {again} --load latest -n 3"
    assert call(line) == 0
    log = (again / "run.log").read_text()
    assert "schedules stretch to 3 epochs, from epoch 1" in log and "exact continuation" not in log
    opened = open_run(again)
    assert opened.config["estpose"] is True and opened.config["beta"] == "cos"  # stored, not the defaults of dsd
    assert (opened.epoch, opened.config["num_gpus"], opened.config["multigpu"]) == (2, 4, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--latents {z}", "do not belong to"),
        ("--templateres 48", "--templateres 48 where"),
        ("--zdim 8", "--zdim 8 where"),
        ("--ind {z}", "--ind"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    options: str, words: str, trained: tuple[Place, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, other = trained[0], tmp_path / "z.0.pkl"
    torch.save({"mu": torch.zeros(COUNT, 12)}, other)
    load = f"--load {place.run}/weights.0.pkl {options.format(z=other)}"
    assert call(f"dsd train_tomo {place.work}/ribo.star -o {tmp_path}/out {load}") == 2
    assert words in one_line(capsys) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_folder_can_move(trained: tuple[Place, Any], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained[0].run, moved)
    there = f"split: {trained[0].run}/"
    text = (moved / "config.yaml").read_text()
    assert there in text
    (moved / "config.yaml").write_text(text.replace(there, "split: /gone/"))
    for found, expected in zip(open_run(moved).split, open_run(trained[0].run).split, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_split_of_the_earlier_program_is_read(tmp_path: Path) -> None:
    torch.save(torch.randperm(COUNT), tmp_path / "split.pkl")
    np.testing.assert_array_equal(np.sort(load_split(tmp_path / "split.pkl", COUNT)), np.arange(COUNT))
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "split.pkl").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.pkl: (cannot be read|refused)"):
        load_split(tmp_path / "cut.pkl", COUNT)


@pytest.mark.slow
def test_analyze_without_umap(analysed: tuple[Place, Path]) -> None:
    place, folder = analysed
    codes = open_run(place.run, 1).codes
    labels = load_pickle(folder / "kmeans6" / "labels.pkl")
    index = np.loadtxt(folder / "kmeans6" / "centers_ind.txt", dtype=int)
    assert labels.shape == (COUNT,) and set(labels) == set(range(6))
    np.testing.assert_array_equal(labels[index], np.arange(6))  # a centre is a particle of its class
    np.testing.assert_allclose(np.loadtxt(folder / "kmeans6" / "centers.txt"), codes[index], rtol=1e-4, atol=1e-5)
    for pc in range(1, 5):
        line = np.loadtxt(folder / f"pc{pc}" / "z_pc.txt")
        assert line.shape == (10, 12)
        length = np.linalg.norm(line[-1] - line[0])
        if length == 0:  # dimensions that the evidence does not support stay empty: nothing varies along this one
            assert pc > 1 and np.linalg.matrix_rank(codes - codes.mean(0), tol=1e-4) < pc
            continue
        axis = (line[-1] - line[0]) / length
        ends = np.percentile((codes - codes.mean(0)) @ axis, [5, 95])
        np.testing.assert_allclose((line - codes.mean(0)) @ axis, np.linspace(*ends, 10), atol=1e-3)
    pictures = {"z_pca.png", "explained_variance.png", "axes.png", "kmeans6/z_pca.png"}
    pictures |= {"controls.png", "convergence.png", "kmeans6/tomograms.png"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == pictures


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_analyze_as_printed_and_again_from_the_stored_umap(trained: tuple[Place, Any]) -> None:
    place = trained[0]
    folder, line = place.run / "analyze.0", place.typed(ANALYZE, ("/work/sp 16 4 16", f"{place.run} 0 4 6"))
    assert call(line) == 0
    drawn = [folder / name for name in ("umap.png", "umap_hexbin.png", "kmeans6/umap.png", "kmeans6/z_pca.png")]
    assert all(path.is_file() for path in drawn)
    stored = (folder / "umap.pkl").read_bytes()
    assert load_pickle(folder / "umap.pkl").shape == (COUNT, 2)
    for path in drawn:
        path.unlink()
    assert call(f"{line} --skip-umap") == 0
    assert all(path.is_file() for path in drawn) and (folder / "umap.pkl").read_bytes() == stored


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_volumes_of_clusters_components_and_any_codes(analysed: tuple[Place, Path], tmp_path: Path) -> None:
    place, folder = analysed
    for line, known in ((KMEANS_VOLUMES, "16 kmeans 16 2.2"), (PC_VOLUMES, "16 pc 1 2.2")):
        here = f"1 kmeans 6 {APIX}" if "kmeans" in known else f"1 pc 1 {TARGET}"
        assert call(place.typed(line, (f"/work/sp {known}", f"{place.run} {here}"))) == 0
    for name, count, pixel in (("kmeans6", 6, APIX), ("pc1", 10, TARGET)):
        maps = sorted((folder / name).glob("reference*.mrc"))
        assert {path.name for path in maps} == {f"reference{i}.mrc" for i in range(count)}
        assert all(header_of(path).pixel_size == pytest.approx(pixel, rel=1e-6) for path in maps)
    volume, _ = read_volume(folder / "kmeans6" / "reference0.mrc")
    truth, _ = read_volume(place.work / "gt" / "state1_hinge+0.0.mrc")
    assert volume.shape == truth.shape
    assert np.corrcoef(volume.ravel(), truth.ravel())[0, 1] > 0.8  # a ribosome, at 53 Angstrom

    files = f"--load {place.run}/weights.1.pkl -c {place.run}/config.pkl --zfile {folder}/kmeans6/centers.txt"
    assert call(f"dsd eval_vol {files} --Apix {APIX} -o {tmp_path}/any --prefix map") == 0
    np.testing.assert_allclose(read_volume(tmp_path / "any" / "map0.mrc")[0], volume, atol=1e-4 * volume.max())
    assert call(f"dsd eval_vol {files} --Apix {APIX} -o {tmp_path}/any --flip") == 0
    flipped, _ = read_volume(tmp_path / "any" / "reference0.mrc")
    np.testing.assert_allclose(flipped[1:], volume[:0:-1], atol=1e-3 * volume.max())


@pytest.mark.slow
@pytest.mark.parametrize("star", ["ribo.star", "consensus_data.star"])
def test_classes_as_star_files(star: str, analysed: tuple[Place, Path]) -> None:
    place, folder = analysed
    flag = "" if star == "ribo.star" else " --relion31"
    here = f"/work/{star} {BOX} {APIX} {place.run} 1 6{flag}"
    assert call(place.typed(PARSE_POSE31, (PARSE_POSE31.split("parse_pose ")[1], here)).strip()) == 0
    labels = load_pickle(folder / "kmeans6" / "labels.pkl")
    check_classes(folder / "kmeans6", place.work / star, np.arange(COUNT), labels)


@pytest.mark.slow
def test_plot_and_a_subset(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--plot draws at every log interval, with no display; with --ind classes are written of the rows trained on."""
    monkeypatch.delenv("DISPLAY", raising=False)
    drawn: list[int] = []
    original = train.preview
    monkeypatch.setattr(train, "preview", lambda *given: (drawn.append(1), original(*given)))
    rows = np.array([40, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37])
    save_pickle(tmp_path / "ind.pkl", rows)
    out = tmp_path / "out"
    line = f"dsd train_tomo {place.work}/consensus_data.star -o {out} -r {place.work}/mask.mrc --relion31 -n 1 -b 4"
    options = f"--ind {tmp_path}/ind.pkl --templateres 32 --zdim 2 --plot --log-interval 1 --tmp-prefix now --verbose"
    assert call(f"{line} {options}") == 0
    assert len(drawn) == 3  # three batches, the last of which ends the epoch
    assert (out / "now.png").is_file() and (out / "now.mrc").is_file()
    assert (out / "run.log").read_text().count("DEBUG   epoch 0") == 3
    opened = open_run(out)
    assert opened.config["estpose"] is False  # without --estpose the poses are kept
    table = read_star(place.work / "ribo.star").particles
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float)[np.sort(rows)]
    np.testing.assert_allclose(opened.euler, angles, atol=1e-4)
    assert call(f"dsdsh analyze {out} 0 1 2 --skip-umap") == 0
    assert call(f"dsdsh parse_pose {place.work}/consensus_data.star {BOX} {APIX} {out} 0 2 --relion31") == 0
    labels = load_pickle(out / "analyze.0" / "kmeans2" / "labels.pkl")
    check_classes(out / "analyze.0" / "kmeans2", place.work / "consensus_data.star", np.sort(rows), labels)


@pytest.mark.slow
def test_the_large_template_of_the_seed_trains_on_a_few_particles(place: Place, tmp_path: Path) -> None:
    (tmp_path / "ind.txt").write_text("0 1 2")
    line = f"dsd train_tomo {place.work}/ribo.star --poses {place.cwd}/ribo_pose_euler.pkl -o {tmp_path}/out"
    literal = "-n 1 --templateres 160 --num-gpus 4 --multigpu --estpose"
    assert call(f"{line} -r {place.work}/mask.mrc --downfrac 0.65 --ind {tmp_path}/ind.txt {literal}") == 0
    opened = open_run(tmp_path / "out")
    assert (opened.grid.templateres, opened.codes.shape) == (160, (3, 12))
    assert "peak memory" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dsd train_tomo {work}/ribo.star --poses nope.pkl -o {tmp}/out", "nope.pkl: no such file"),
        ("dsd train_tomo {work}/ribo.star --poses {tmp}/few.pkl -o {tmp}/out", "has 3 poses but"),
        ("dsd train_tomo {work}/nope.star -o {tmp}/out", "nope.star"),
        ("dsd train_tomo {work}/ribo.star --angpix 2.1 -o {tmp}/out", "give --angpix 15.5"),
        ("dsd train_tomo {work}/ribo.star --tmp-prefix /tmp/x -o {tmp}/out", "is a name, not a path"),
        ("dsd train_tomo {work}/ribo.star --lr -1 -o {tmp}/out", "--lr -1.0: must be"),
        ("dsdsh prepare {work}/ribo.star 15.5 24", "swapped; give BOX 24 and APIX 15.5"),
        ("dsdsh prepare {work}/ribo.star 24 nan", "must be numbers"),
        ("dsdsh analyze {work} -1 4 6", "counted from 0"),
        ("dsdsh eval_vol {work} 1 kmeans 0 2.2", "at least 1"),
    ],
)
def test_mistakes_are_one_line_with_the_fix(
    line: str, words: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pickle(tmp_path / "few.pkl", (np.zeros((3, 3, 3)), np.zeros((3, 3)), np.zeros((3, 3))))
    assert call(line.format(work=place.work, tmp=tmp_path)) == 2
    assert words in one_line(capsys)
    assert {path.name for path in tmp_path.glob("out/*")} <= {"run.log"} and not list(place.work.glob("*.pkl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dsdsh analyze {run} 7 4 6", "no epoch 7; present are 0, 1"),
        ("dsdsh analyze {run} 1 4 60", "has 48 particles"),
        ("dsdsh eval_vol {run} 7 kmeans 6 2.2", "no epoch 7; present are 0, 1"),
        ("dsdsh eval_vol {run} 1 kmeans 5 2.2", "dsdsh analyze {run} 1 4 5"),
        ("dsdsh eval_vol {run} 1 pc 7 2.2", "dsdsh analyze {run} 1 7 16"),
        ("dsdsh parse_pose {work}/ribo.star 24 15.5 {run} 7 6", "no epoch 7; present are 0, 1"),
        ("dsdsh parse_pose {work}/ribo.star 24 15.5 {run} 1 5", "dsdsh analyze {run} 1 4 5"),
        ("dsdsh parse_pose {work}/ribo.star 15.5 24 {run} 1 6", "swapped"),
        ("dsd train_tomo {work}/ribo.star -o {run}", "holds a run already"),
    ],
)
def test_what_was_not_made_is_named_with_the_command_that_makes_it(
    line: str, words: str, analysed: tuple[Place, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"run": analysed[0].run, "work": analysed[0].work}
    assert call(line.format(**names)) == 2
    assert words.format(**names) in one_line(capsys)


@pytest.mark.slow
def test_a_failure_is_a_status_of_the_process(place: Place, cwd: Path) -> None:
    done = process(f"dsdsh analyze {place.work} -1 4 6", cwd)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_help_shows_every_argument_of_the_readme_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("dsd train_tomo -h") == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = {word for line in (TRAIN, RESUME) for word in shlex.split(line) if re.match(r"-{1,2}[a-z]", word)}
    assert not [flag for flag in (*flags, "--plot") if f"{flag} " not in text]
    for default in ("validation (default: 0.1)", "multiple of 16 (default: 192)", "in the run folder (default: tmp)"):
        assert default in text
