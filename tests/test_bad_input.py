"""What bad input gets: one line that names the place and the fix, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import pytest

from opustomo import cli
from opustomo.errors import UserError
from small_set import EPOCHS, SmallSet, copy_run, train
from star_sets import BOX, PIXEL, Set, put_loop, put_volume, tilt_columns

Damage = Callable[[Set], str]

# what a run that failed at its start may leave: whole files
COMPLETE = {"run.log", "split.pkl", "config.yaml", "config.pkl"}


@pytest.fixture
def given(tmp_path: Path) -> Set:
    """Four good subtomograms of noise with CTF, and a mask."""
    made = Set(tmp_path / "set")
    made.write()
    axis = np.arange(BOX) - BOX // 2
    inside = axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2 < 36
    put_volume(made.folder / "mask.mrc", inside.astype(np.float32))
    return made


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run ``opustomo``: status 2 and exactly one line with ``error:``, which is returned."""
    assert cli.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err and "error:" not in captured.out
    return lines[0]


def line_of(verb: str, made: Set, *options: object) -> list[object]:
    words: list[object] = [verb, made.star, "-r", made.folder / "mask.mrc", *options]
    if verb != "check":
        words += ["-o", made.folder / "out"]
    if verb == "train":
        words += ["--width", "0.05", "-n", "1", "-b", "2", "--zdim", "1", "--device", "cpu"]
    if verb != "check":
        words += ["--workers", "1"]
    return words


def assert_nothing_half_written(made: Set) -> None:
    out = made.folder / "out"
    assert not out.exists() or {path.name for path in out.rglob("*")} <= COMPLETE


# ------------------------------------------------------------------------------------------------ the data


def missing_star(made: Set) -> str:
    made.star.unlink()
    return "particles.star"


def empty_star(made: Set) -> str:
    made.star.write_text("")
    return "particles.star"


def star_without_rows(made: Set) -> str:
    made.columns = {name: [] for name in made.columns}
    made.write_star()
    return "particles.star"


def misspelt_column(made: Set) -> str:
    made.columns["rlnAngleTitl"] = made.columns.pop("rlnAngleTilt")
    made.write_star()
    return "_rlnAngleTilt"


def word_where_a_number_belongs(made: Set) -> str:
    made.columns["rlnAngleTilt"][2] = "forty"
    made.write_star()
    return "forty"


def missing_subtomogram(made: Set) -> str:
    (made.folder / "sub" / "p2.mrc").unlink()
    return "sub/p2.mrc (row 3)"


def truncated_subtomogram(made: Set) -> str:
    path = made.folder / "sub" / "p3.mrc"
    path.write_bytes(path.read_bytes()[:-100])
    return "p3.mrc: is truncated"


def flat_box(made: Set) -> str:
    put_volume(made.folder / "sub" / "p0.mrc", np.ones((BOX, BOX, BOX // 2), np.float32))
    return "p0.mrc: subtomogram is not cubic"


def odd_box(made: Set) -> str:
    put_volume(made.folder / "sub" / "p0.mrc", np.ones((15, 15, 15), np.float32))
    return "p0.mrc: box 15 is odd"


def mixed_boxes(made: Set) -> str:
    put_volume(made.folder / "sub" / "p1.mrc", np.ones((18, 18, 18), np.float32))
    return "p1.mrc: box 18"


def pixel_of_another_size(made: Set) -> str:
    made.header_pixel = 2 * PIXEL
    made.write()
    return f"{PIXEL:g} A but the header of"


def empty_subtomogram(made: Set) -> str:
    put_volume(made.folder / "sub" / "p1.mrc", np.zeros((BOX,) * 3, np.float32))
    return "sub/p1.mrc: empty box"


def nan_in_a_subtomogram(made: Set) -> str:
    path = made.folder / "sub" / "p2.mrc"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    return "sub/p2.mrc: NaN"


def no_ctf_at_all(made: Set) -> str:
    del made.columns["rlnCtfImage"]
    made.write_star()
    for path in (made.folder / "sub").glob("*_ctf.star"):
        path.unlink()
    return "without CTF"


def one_particle_without_ctf(made: Set) -> str:
    (made.folder / "sub" / "p3_ctf.star").unlink()
    return "p3_ctf.star"


def every_tilt_excluded(made: Set) -> str:
    columns = tilt_columns([-40.0, 0.0, 40.0])
    columns["rlnCtfScalefactor"] = ["0"] * 3
    put_loop(made.folder / "sub" / "p1_ctf.star", "images", columns)
    return "all 3 tilts of particle sub/p1.mrc"


def mask_of_another_size(made: Set) -> str:
    put_volume(made.folder / "mask.mrc", np.ones((BOX + 2,) * 3, np.float32))
    return "mask.mrc: mask of 18x18x18 voxels"


def empty_mask(made: Set) -> str:
    put_volume(made.folder / "mask.mrc", np.zeros((BOX,) * 3, np.float32))
    return "mask.mrc: the mask is empty"


def map_for_a_mask(made: Set) -> str:
    put_volume(made.folder / "mask.mrc", 40 * np.random.default_rng(0).normal(size=(BOX,) * 3).astype(np.float32))
    return "mask.mrc: mask values span"


def nan_in_the_mask(made: Set) -> str:
    path = made.folder / "mask.mrc"
    raw = bytearray(path.read_bytes())
    raw[-12:] = np.full(3, np.nan, np.float32).tobytes()
    path.write_bytes(raw)
    return "mask.mrc: the mask has NaN or infinite values (3 voxels)"


def speck_for_a_mask(made: Set) -> str:
    mask = np.zeros((BOX,) * 3, np.float32)
    mask[8, 8, 8] = 1.0
    put_volume(made.folder / "mask.mrc", mask)
    return "mask.mrc: the mask covers only 1 voxels"


def missing_mask(made: Set) -> str:
    (made.folder / "mask.mrc").unlink()
    return "mask.mrc: no such mask; check the name after -r"


DATA: list[Damage] = [
    missing_star, empty_star, star_without_rows, misspelt_column, word_where_a_number_belongs, missing_subtomogram,
    truncated_subtomogram, flat_box, odd_box, mixed_boxes, pixel_of_another_size, no_ctf_at_all,
    one_particle_without_ctf, every_tilt_excluded, mask_of_another_size, empty_mask, map_for_a_mask, missing_mask,
    empty_subtomogram, nan_in_a_subtomogram, nan_in_the_mask, speck_for_a_mask,
]  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "linear", "average", "cache"])
@pytest.mark.parametrize("damage", DATA, ids=lambda damage: damage.__name__)
def test_damaged_data(verb: str, damage: Damage, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    words = damage(given)
    message = refusal(capsys, *line_of(verb, given))
    assert words in message
    assert ";" in message or " or " in message  # what, where; the fix
    assert_nothing_half_written(given)


@pytest.mark.parametrize(
    "damage", [missing_star, empty_star, misspelt_column, missing_subtomogram, odd_box, empty_mask, every_tilt_excluded]
)
def test_check_says_the_same(damage: Damage, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    words = damage(given)
    assert cli.main([str(word) for word in line_of("check", given)]) != 0
    captured = capsys.readouterr()
    assert words in captured.err + captured.out and "Traceback" not in captured.err


def test_the_set_itself_is_good(given: Set) -> None:
    """Every refusal above is due to its damage."""
    assert cli.main([str(word) for word in line_of("cache", given)]) == 0


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nonsense", "3"], "unknown option --nonsense"),
        (["--zdims", "3"], "did you mean '--zdim'?"),
        (["--templateres", "50"], "--templateres 50: must be a multiple of 16; the nearest is 48"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--batch", "0"], "--batch 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--valfrac", "1"], "--valfrac 1: must lie in [0, 1)"),
        (["--downfrac", "0"], "--downfrac"),
        (["--downfrac", "1.5"], "--downfrac"),
        (["--angpix", "7"], "--angpix 7"),
        (["-D", "32"], "-D 32"),
        (["--relion31"], "--relion31"),
        (["--datadir", "/nowhere"], "--datadir /nowhere: no such folder"),
        (["--poses", "/nowhere.pkl"], "/nowhere.pkl"),
        (["--ind", "/nowhere.pkl"], "/nowhere.pkl"),
        (["--tmp-prefix", "../tmp"], "--tmp-prefix ../tmp"),
        (["--latents", "z.0.pkl"], "--latents has no effect without --load"),
        (["--device", "tpu"], "device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be(options: list[str], words: str, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    line = [word for word in line_of("train", given) if word not in options[:1]]
    assert words in refusal(capsys, *line, *options)
    assert_nothing_half_written(given)


@pytest.mark.parametrize("verb", ["train", "linear", "average", "cache"])
def test_fewer_than_no_threads(verb: str, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(verb, given)
    line[line.index("--workers") + 1] = "-2"
    assert "--workers -2: must be at least 0; " in refusal(capsys, *line)
    assert_nothing_half_written(given)


def test_more_threads_than_cores_are_cut(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from opustomo import preparation
    from opustomo.preparation import prepare_process

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(preparation, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with caplog.at_level("INFO", "opustomo"):
        prepare_process(99)
        assert "--workers 99: 2 core(s) may be used here" in caplog.text
        caplog.clear()
        prepare_process(2)
        prepare_process(0)  # torch's choice, which knows of no quota
    assert asked == [2, 2, 2] and not caplog.text


def test_rows_split_and_poses_of_another_set(given: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "--ind": np.array([0, 99]),
        "--split": np.arange(7),
        "--poses": (np.zeros((7, 3, 3)), np.zeros((7, 3)), np.zeros((7, 3))),
    }
    for option, content in files.items():
        path = tmp_path / f"{option.strip('-')}.pkl"
        path.write_bytes(pickle.dumps(content))
        message = refusal(capsys, *line_of("train", given, option, path))
        assert str(path) in message or option in message
        assert_nothing_half_written(given)


class Harmful:
    """A pickle that would run a command when it is loaded the ordinary way."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_pickles_are_read_without_running_them(given: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, witness = tmp_path / "rows.pkl", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Harmful(witness)))
    assert "refused" in refusal(capsys, *line_of("train", given, "--ind", path))
    assert not witness.exists()


# ------------------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize("verb", ["train", "linear", "average", "cache"])
def test_output_that_cannot_be_written(verb: str, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    (given.folder / "out").write_text("a file in the way")
    message = refusal(capsys, *line_of(verb, given))
    assert "out: is a file; give a folder" in message and "-o" in message
    assert (given.folder / "out").read_text() == "a file in the way"


def test_output_below_a_file(given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of("train", given)
    line[line.index("-o") + 1] = given.star / "out"
    assert "cannot be written" in refusal(capsys, *line)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_output_without_permission(given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    (given.folder / "out").mkdir(mode=0o500)
    assert "ermission" in refusal(capsys, *line_of("train", given))


@pytest.mark.parametrize("verb", ["train", "linear", "cache"])
def test_full_disk_is_met_before_the_cache_is_begun(
    verb: str, given: Set, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        message = refusal(capsys, *line_of(verb, given))
    assert "disk full" in message and "GB are free" in message and "--downfrac" in message
    assert_nothing_half_written(given)
    line = line_of("cache", given)
    if verb != "cache":
        line[line.index("-o") + 1] = given.folder / "out" / "cache"
    assert cli.main([str(word) for word in line]) == 0  # and once there is space it goes on


def test_full_disk_while_writing_a_result_leaves_the_old_one(
    small_set: SmallSet,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    run = copy_run(finished_run, tmp_path / "run", EPOCHS - 1)
    (run / "cache").symlink_to(finished_run / "cache")
    before = {path.name for path in run.iterdir()}

    def full(payload: object, handle: IO[bytes]) -> NoReturn:
        handle.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert train(small_set, run, "-n", str(EPOCHS + 1), "--load", "latest") == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"weights.{EPOCHS}.pkl" in message and "No space left" in message
    assert {path.name for path in run.iterdir()} == before


def test_full_disk_is_told_as_such_by_torch(tmp_path: Path) -> None:
    """torch hides the reason of a failed write behind a failure of its own."""
    import torch

    from opustomo.checkpoint import save_tensors

    path = tmp_path / "weights.0.pkl"
    save_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=r"weights.0.pkl: cannot be written \(File too large\); free space"):
            save_tensors(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ runs


def test_checkpoint_of_another_configuration(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_set, tmp_path / "run", "--load", f"{finished_run}/weights.0.pkl", "--zdim", "7") == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--zdim 7" in message and "trained with 2" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["analyze", "volumes", "report"])
def test_folders_that_are_no_runs(verb: str, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kmeans", "2"] if verb == "volumes" else []
    before = sorted(given.folder.rglob("*"))
    assert "no run here" in refusal(capsys, verb, given.folder, *options)
    assert sorted(given.folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["analyze", "volumes", "report"])
def test_files_that_are_no_runs(verb: str, given: Set, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kmeans", "2"] if verb == "volumes" else []
    message = refusal(capsys, verb, given.star, *options)
    assert "particles.star: is a file, not a run folder; give the folder that" in message


def test_epoch_that_was_not_written(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "analyze", finished_run, "--epoch", "9")
    assert "no epoch 9; present are 0, 1, 2" in message
