"""The seed's command lines: what they mean here, and the files of the pose commands."""

import shlex
import types
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from opustomo import cli
from opustomo.compat import dsd, dsdsh
from opustomo.config import AnalyzeConfig, GridOptions, InputOptions, TrainConfig, VolumesConfig
from opustomo.data.mrc import write_volume
from opustomo.data.pickles import load_poses, save_pickle
from opustomo.data.star import read_star

TRAIN = (
    "train_tomo /work/ribo.star --poses ./ribo_pose_euler.pkl -n 40 -b 8 --zdim 12 --lr 5.e-5 --num-gpus 4 --multigpu "
    "--beta-control 0.8 --beta cos -o /work/ribo -r ./mask.mrc --downfrac 0.65 --valfrac 0.1 --lamb 0.8 "
    "--split ribo-split.pkl --bfactor 4. --templateres 160 --angpix 2.1 --estpose --tmp-prefix ref --datadir /work/"
)
RESUME = (
    "train_tomo /work/ribo.star --poses ./ribo_pose_euler.pkl --lazy-single -n 20 --pe-type vanilla --encode-mode grad "
    "--template-type conv -b 12 --zdim 12 --lr 1.e-4  --num-gpus 4 --multigpu --beta-control 2. --beta cos "
    "-o /work/ribo -r ./mask.mrc --downfrac 0.75 --lamb 1. --valfrac 0.25 --load /work/ribo/weights.0.pkl "
    "--latents /work/sp/z.0.pkl --split ribo-split.pkl --bfactor 4. --templateres 160"
)
EULER = np.array([[10.0, 20.0, 30.0], [-100.0, 95.0, 170.0], [0.0, 0.0, 45.0]])
ORIGIN = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0], [-1.5, 0.0, 2.0]])  # pixels
BOX, APIX = 16, 5.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What reaches ``cli.call``; no verb runs."""
    found: list[tuple] = []
    monkeypatch.setattr(cli, "call", lambda *call: found.append(call))
    return found


@pytest.fixture
def star(tmp_path: Path) -> Path:
    """Three subtomograms in the RELION 3.0 layout."""
    rows = []
    for i, (euler, origin) in enumerate(zip(EULER, ORIGIN, strict=True)):
        write_volume(tmp_path / f"{i}.mrc", np.full((BOX,) * 3, i, np.float32), APIX)
        numbers = " ".join(f"{v:.6f}" for v in (*euler, *origin))
        rows.append(f"tomo {i}.mrc {numbers} 10000 {APIX}")
    columns = (
        "MicrographName ImageName AngleRot AngleTilt AnglePsi OriginX OriginY OriginZ Magnification DetectorPixelSize"
    )
    return write_table(tmp_path / "three.star", "data_\n", columns, rows)


@pytest.fixture
def star31(tmp_path: Path, star: Path) -> Path:
    """The same particles as RELION 3.1: optics table, origins in Angstrom."""
    rows = []
    for i, (euler, origin) in enumerate(zip(EULER, ORIGIN, strict=True)):
        rows.append(f"{i}.mrc 1 " + " ".join(f"{v:.6f}" for v in (*euler, *origin * APIX)))
    columns = "ImageName OpticsGroup AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst OriginZAngst"
    optics = (
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnImageSize #3\n"
        f"1 {APIX} {BOX}\n\ndata_particles\n"
    )
    return write_table(tmp_path / "three31.star", optics, columns, rows)


def write_table(path: Path, head: str, columns: str, rows: list[str]) -> Path:
    names = "".join(f"_rln{name} #{i}\n" for i, name in enumerate(columns.split(), 1))
    path.write_text(head + "\nloop_\n" + names + "\n".join(rows) + "\n")
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ": error: " in message
    return message


def test_the_training_line_of_the_seed(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsd.main(shlex.split(TRAIN)) == 0
    [(verb, config, given)] = calls
    assert verb == "train"
    assert config == TrainConfig(
        star=Path("/work/ribo.star"),
        output=Path("/work/ribo"),
        input=InputOptions(datadir=Path("/work"), angpix=2.1),
        grid=GridOptions(mask=Path("mask.mrc"), downfrac=0.65),
        poses=Path("ribo_pose_euler.pkl"),
        epochs=40,
        batch=8,
        zdim=12,
        lr=5e-5,
        num_gpus=4,
        multigpu=True,
        beta="cos",
        beta_control=0.8,
        valfrac=0.1,
        lamb=0.8,
        split=Path("ribo-split.pkl"),
        bfactor=4.0,
        templateres=160,
        estpose=True,
        tmp_prefix="ref",
    )
    typed = "star poses epochs batch zdim lr num_gpus multigpu beta_control beta output mask downfrac valfrac lamb"
    assert given == {*typed.split(), "split", "bfactor", "templateres", "angpix", "estpose", "tmp_prefix", "datadir"}
    assert capsys.readouterr().err == ""


def test_the_resume_line_of_the_seed(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsd.main(shlex.split(RESUME)) == 0
    [(_, config, given)] = calls
    assert (config.load, config.latents) == ("/work/ribo/weights.0.pkl", Path("/work/sp/z.0.pkl"))
    assert (config.epochs, config.lr, config.beta_control, config.batch) == (20, 1e-4, 2.0, 12)
    assert (config.grid.downfrac, config.valfrac, config.lamb) == (0.75, 0.25, 1.0)
    # stored values must survive for what the line leaves out
    assert not given & {"estpose", "angpix", "datadir", "tmp_prefix", "seed"} and {"load", "latents"} <= given
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "only mode" in message


def test_the_line_of_later_versions(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    """What they state of the CTF is how it is here, and of the loading changes nothing; both are told."""
    line = "train_tomo ribo.star -n 40 -b 12 -o ribo -r mask.mrc --tilt-range 50 --tilt-step 2"
    assert dsd.main([*line.split(), "--ctfalpha", "0.", "--ctfbeta", "1.", "--float16"]) == 0
    assert dsd.main(line.split()) == 0
    assert calls[0] == calls[1]
    told = capsys.readouterr().err.splitlines()
    assert [row.split(":")[2].strip() for row in told] == ["--ctfalpha 0", "--ctfbeta 1", "--float16"]
    assert ["as always here" in row for row in told] == [True, True, False] and "no effect" in told[2]


@pytest.mark.parametrize(
    ("given", "advice"), [("--ctfalpha 1", "leave --ctfalpha out"), ("--ctfbeta 0", "rlnPhaseShift 90")]
)
def test_another_power_of_the_ctf_is_refused(
    given: str, advice: str, calls: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsd.main(["train_tomo", "ribo.star", "-o", "ribo", *given.split()]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and given in told and advice in told and calls == []


def test_the_long_training_line_of_the_seed_starts(calls: list[tuple]) -> None:
    line = "train_tomo a.star --poses p.pkl -o out -n 40 --templateres 160 --num-gpus 4 --multigpu --estpose"
    assert dsd.main(line.split()) == 0
    assert (calls[0][1].num_gpus, calls[0][1].templateres, calls[0][1].epochs) == (4, 160, 40)


def test_defaults_that_the_seed_states(calls: list[tuple]) -> None:
    assert dsd.main(["train_tomo", "a.star", "-o", "out"]) == 0
    [(_, config, given)] = calls
    assert (config.templateres, config.valfrac, config.tmp_prefix, config.beta) == (192, 0.1, "tmp", "cos")
    assert given == {"star", "output"}


def test_poses_are_corrected_where_the_seeds_flag_is_given(
    calls: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    """Natively they are unless told otherwise; a line of the seed means what it says."""
    line = ["train_tomo", "a.star", "-o", "out"]
    assert dsd.main(line) == 0 and dsd.main([*line, "--estpose"]) == 0
    assert [(config.estpose, "estpose" in given) for _, config, given in calls] == [(False, False), (True, True)]
    assert dsd.main([*line, "--no-estpose"]) == 2
    assert "unknown option --no-estpose" in one_line(capsys)


def test_further_arguments_of_the_seed(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "train_tomo a.star -o out --ind i.pkl --checkpoint 5 --log-interval 200 --seed 3 --wd 0.1 --accum-step 2 "
        "--encoderres 8 --zaffinedim 4 --uninvert-data --verbose --plot --load latest --relion31"
    )
    assert dsd.main(line.split()) == 0
    [(_, config, given)] = calls
    assert (config.ind, config.checkpoint, config.log_interval, config.seed) == (Path("i.pkl"), 5, 200, 3)
    assert (config.wd, config.accum_step, config.encoderres, config.load) == (0.1, 2, 8, "latest")
    assert config.verbose and config.plot and config.input.relion31 and config.input.contrast == "white"
    assert "contrast" in given and "zaffinedim" not in given
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "without --masks there is no conformation code" in message
    assert dsd.main(["train_tomo", "a.star", "-o", "out", "--masks", "mask_params.pkl", "--zaffinedim", "2"]) == 0
    assert (calls[1][1].masks, calls[1][1].zaffinedim) == ("mask_params.pkl", 2)
    assert {"masks", "zaffinedim"} <= calls[1][2]


def test_invert_data_means_dark_protein(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsd.main(["train_tomo", "a.star", "-o", "out", "--invert-data"]) == 0
    assert calls[0][1].input.contrast == "black"
    assert dsd.main(["train_tomo", "a.star", "-o", "out", "--invert-data", "--uninvert-data"]) == 2
    assert "not allowed with" in one_line(capsys)


def test_every_config_field_that_was_typed_is_a_field_of_train(calls: list[tuple]) -> None:
    from opustomo.options import options_of

    dsd.main(shlex.split(TRAIN))
    dsd.main(shlex.split(RESUME))
    fields = {option.field for option in options_of(TrainConfig)}
    assert all(given <= fields for _, _, given in calls)


def test_both_spellings_of_an_option(calls: list[tuple]) -> None:
    assert dsd.main(["train_tomo", "a.star", "-o", "out", "--beta_control", "2", "-n40"]) == 0
    assert (calls[0][1].beta_control, calls[0][1].epochs) == (2.0, 40)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--pe-type linear", "--pe-type linear: only 'vanilla' exists here"),
        ("--encode-mode conv", "argument --encode-mode: invalid choice: 'conv'"),
        ("--template-type atom", "--template-type atom: only 'conv' exists here"),
        ("--ctf x.pkl", "unknown option --ctf"),
        ("--template 160", "did you mean '--templateres'?"),  # no silent abbreviation
        ("--beta linear", "invalid choice: 'linear'"),
        ("-n many", "argument -n: invalid int value: 'many'"),
        ("more.star", "unexpected 'more.star'"),
    ],
)
def test_what_train_tomo_refuses(line: str, words: str, calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsd.main(["train_tomo", "a.star", "-o", "out", *line.split()]) == 2
    assert words in one_line(capsys) and not calls


def test_analyze_and_volumes_lines_of_the_seed(calls: list[tuple]) -> None:
    for line in ("analyze /work/sp 16 4 16", "analyze /work/sp 16 4 16 --skip-umap"):
        assert dsdsh.main(line.split()) == 0
    for line in ("eval_vol /work/sp 16 kmeans 16 2.2 --num-bodies 2", "eval_vol /work/sp 16 pc 1 2.2 --flip"):
        assert dsdsh.main(line.split()) == 0
    run = Path("/work/sp")
    assert [call[:2] for call in calls] == [
        ("analyze", AnalyzeConfig(run, epoch=16, pcs=4, clusters=16)),
        ("analyze", AnalyzeConfig(run, epoch=16, pcs=4, clusters=16, skip_umap=True)),
        ("volumes", VolumesConfig(run, epoch=16, kmeans=16, angpix=2.2)),
        ("volumes", VolumesConfig(run, epoch=16, pc=1, angpix=2.2, flip=True)),
    ]


def test_volumes_for_a_list_of_codes(tmp_path: Path, calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("weights.7.pkl", "config.pkl", "z.txt", "last.pkl"):
        (tmp_path / name).write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.pkl").write_text("")
    common = f"--zfile {tmp_path}/z.txt --Apix 2.2 -o {tmp_path}/out"
    line = f"eval_vol --load {tmp_path}/weights.7.pkl -c {tmp_path}/config.pkl {common} --prefix map"
    assert dsd.main(line.split()) == 0
    expected = VolumesConfig(
        tmp_path, epoch=7, zfile=tmp_path / "z.txt", output=tmp_path / "out", prefix="map", angpix=2.2
    )
    assert calls[0][:2] == ("volumes", expected)
    assert dsd.main(f"eval_vol --load {tmp_path}/last.pkl {common}".split()) == 2
    assert "weights.N.pkl" in one_line(capsys)
    line = f"eval_vol --load {tmp_path}/weights.7.pkl -c {tmp_path}/other/config.pkl {common}"
    assert dsd.main(line.split()) == 2
    assert "does not lie beside" in one_line(capsys)


@pytest.mark.parametrize("program", [dsd, dsdsh], ids=lambda module: module.__name__)
def test_help_of_every_command_states_purpose_defaults_and_example(
    program: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["-h"]) == 0
    overview = capsys.readouterr().out
    for name, command in program.COMMANDS.items():
        assert f"  {name}" in overview
        assert program.main([name, "-h"]) == 0
        text = capsys.readouterr().out
        assert command.purpose in text and f"example:\n  {program.__name__.split('.')[-1]} {name} " in text
        assert "(default: None)" not in text
    assert program.main([]) == 2


def test_commands_that_never_were_are_refused_with_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert dsdsh.main(["convert_everything", "a.star"]) == 2
    assert "available: prepare, prepare_multi, analyze, eval_vol, parse_pose" in one_line(capsys)
    assert dsdsh.main(["eval_vol", "out", "3", "mpc", "1", "2.2"]) == 2
    assert "invalid choice: 'mpc'" in one_line(capsys)


def check_poses(path: Path) -> None:
    poses = load_poses(path)
    # RELION's matrix is the transpose of the intrinsic ZYZ rotation
    expected = Rotation.from_euler("ZYZ", EULER, degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(poses.rotation, expected, atol=1e-6)
    np.testing.assert_allclose(poses.origin * BOX, ORIGIN, atol=1e-5)
    np.testing.assert_allclose(poses.euler, EULER, atol=1e-5)


def test_prepare_writes_poses_beside_the_star(star: Path, star31: Path) -> None:
    assert dsdsh.main(["prepare", str(star), "16", "5"]) == 0
    check_poses(star.parent / "three_pose_euler.pkl")
    assert dsdsh.main(["prepare", str(star31), "16", "5", "--relion31"]) == 0
    check_poses(star.parent / "three31_pose_euler.pkl")


def test_parse_pose_star_writes_poses_where_told(star: Path) -> None:
    out = star.parent / "poses.pkl"
    assert dsd.main(["parse_pose_star", str(star), "-D", "16", "--Apix", "5", "-o", str(out)]) == 0
    check_poses(out)


@pytest.mark.parametrize(
    ("box", "angpix", "words"),
    [
        ("2.1", "236", "BOX and APIX are swapped; give BOX 236 and APIX 2.1"),
        ("5", "16", "BOX and APIX are swapped; give BOX 16 and APIX 5"),
        ("16.5", "5", "whole number of voxels"),
        ("18", "5", "BOX 18: the subtomograms have box 16"),
        ("16", "5.2", "APIX 5.2: "),
        ("16", "-5", "above zero"),
        ("big", "5", "invalid float value: 'big'"),
    ],
)
def test_prepare_compares_box_and_pixel_size_with_the_data(
    box: str, angpix: str, words: str, star: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsdsh.main(["prepare", str(star), box, angpix]) == 2
    message = one_line(capsys)
    assert words in message and "leave it out" not in message
    assert not list(star.parent.glob("*.pkl"))


def test_relion31_is_a_cross_check(star: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsdsh.main(["prepare", str(star), "16", "5", "--relion31"]) == 2
    assert "RELION 3.0" in one_line(capsys)


def test_prepare_without_the_subtomograms_at_hand(star: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for image in star.parent.glob("*.mrc"):
        image.unlink()
    assert dsdsh.main(["prepare", str(star), "16", "5"]) == 0
    assert "were not found" in capsys.readouterr().err
    check_poses(star.parent / "three_pose_euler.pkl")
    assert dsdsh.main(["prepare", str(star), "16", "2.1"]) == 2
    assert "says 5 A; give APIX 5" in one_line(capsys)


def test_a_star_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsdsh.main(["prepare", str(tmp_path / "none.star"), "16", "5"]) == 2
    assert "none.star" in one_line(capsys)


def image_names(path: Path) -> list[str]:
    return list(read_star(path).particles["rlnImageName"])


def test_parse_pose_writes_one_star_per_class(star: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "analyze.16" / "kmeans2"
    folder.mkdir(parents=True)
    save_pickle(folder / "labels.pkl", np.array([1, 0, 1]))
    assert dsdsh.main(["parse_pose", str(star), "16", "5", str(tmp_path / "out"), "16", "2"]) == 0
    assert image_names(folder / "pre0.star") == ["1.mrc"]
    assert image_names(folder / "pre1.star") == ["0.mrc", "2.mrc"]


def test_parse_pose_before_analyze_names_the_command(
    star: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsdsh.main(["parse_pose", str(star), "16", "5", str(tmp_path / "out"), "16", "2"]) == 2
    assert f"dsdsh analyze {tmp_path / 'out'} 16 4 2" in one_line(capsys)


def test_parse_pose_star_with_labels(star: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pickle(tmp_path / "labels.pkl", np.array([1, 0, 1]))
    common = ["parse_pose_star", str(star), "-D", "16", "--Apix", "5", "--labels", str(tmp_path / "labels.pkl")]
    assert dsd.main([*common, "--outdir", str(tmp_path / "classes")]) == 0
    assert image_names(tmp_path / "classes" / "pre1.star") == ["0.mrc", "2.mrc"]
    capsys.readouterr()
    assert dsd.main(common) == 2
    assert "belong together" in one_line(capsys)
    assert dsd.main(common[:6]) == 2
    assert "missing: -o" in one_line(capsys)
