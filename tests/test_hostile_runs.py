"""What every verb says to a run, a pickle or names that are damaged or made to harm: one line."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from opustomo import cli
from opustomo.analysis import latents
from opustomo.compat import dsd
from opustomo.data.star import read_star, write_star
from small_set import SmallSet, copy_run, train_line

LAST = 2
Line = Callable[[Path, SmallSet, Path], list[object]]

VERBS: dict[str, Line] = {
    "analyze": lambda run, given, out: ["analyze", run, "--clusters", 2, "--skip-umap"],
    "volumes": lambda run, given, out: ["volumes", run, "--kmeans", 2, "-o", out],
    "quality": lambda run, given, out: ["quality", run, "--kmeans", 2, "-o", out],
    "report": lambda run, given, out: ["report", run, "-o", out / "page.html"],
    "evaluate": lambda run, given, out: ["evaluate", run, "--truth", given.folder],
    "encode": lambda run, given, out: ["encode", run, given.star, "-o", out],
    "train --resume": lambda run, given, out: ["train", "--resume", run, "-n", 9],
    "train --load": lambda run, given, out: train_line(given, out, "--load", f"{run}/weights.{LAST}.pkl", "-n", "9"),
    "select": lambda run, given, out: ["select", given.star, "--run", run, "-o", out, "--kmeans", 2, "--corrected"],
    "export": lambda run, given, out: ["export", run, "-o", out, "--kmeans", 2, "--corrected"],
}


@pytest.fixture(scope="module")
def analysed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy_run(finished_run, tmp_path_factory.mktemp("analysed") / "run", LAST)
    for epoch in range(LAST):
        (run / f"weights.{epoch}.pkl").unlink()  # --resume would go on from the one before a damaged one
    assert cli.main(["analyze", str(run), "--clusters", "2", "--skip-umap"]) == 0
    return run


@pytest.fixture
def run(analysed: Path, tmp_path: Path) -> Path:
    return copy_run(analysed, tmp_path / "run", LAST)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], line: list[object], main: Callable[[list[str]], int] = cli.main) -> str:
    """Status 2 and exactly one line with ``error:``, which is returned."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    captured = capsys.readouterr()
    lines = [found for found in captured.err.splitlines() if "error:" in found]
    assert len(lines) == 1 and "Traceback" not in captured.err + captured.out, captured.err
    assert lines[0].isprintable() and ";" in lines[0]
    return lines[0]


# ------------------------------------------------------------------------------------------------ damaged runs


def flip(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def options(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    return change


def bomb(path: Path) -> None:
    """Nine lines for a billion values."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path.write_text("\n".join(["kind: network", *lines, "star: *a8"]) + "\n")


def other_content(**entries: object) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | entries, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit of the weights": (f"weights.{LAST}.pkl", flip),
    "end of the weights": (f"weights.{LAST}.pkl", cut),
    "weights without a model": (f"weights.{LAST}.pkl", other_content(model={})),
    "bit of the codes": (f"z.{LAST}.pkl", lambda path: flip(path, 0.3)),
    "text for codes": (f"z.{LAST}.pkl", other_content(mu="text")),
    "codes of fewer particles": (f"z.{LAST}.pkl", other_content(mu=torch.zeros(3, 2))),
    "codes that repeat one number": (f"z.{LAST}.pkl", other_content(mu=torch.zeros(1, 1).expand(10**9, 2))),
    "end of the poses": (f"pose.{LAST}.pkl", cut),
    "end of the options": ("config.yaml", lambda path: path.write_text("kind: [")),
    "bytes for options": ("config.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00kind")),
    "list of options": ("config.yaml", lambda path: path.write_text("- kind\n")),
    "endless options": ("config.yaml", bomb),
    "nested options": ("config.yaml", lambda path: path.write_text("[" * 5000)),
    "python in the options": (
        "config.yaml",
        lambda path: path.write_text("star: !!python/object/apply:os.system ['touch witness']\n"),
    ),
    "number for a path": ("config.yaml", options(star=5)),
    "text for a number": ("config.yaml", options(box="large", bfactor="a", batch="b")),
    "another kind": ("config.yaml", options(kind="other")),
}


# every verb opens a run in the same way, train in its own
FEW = ("bit of the weights", "end of the poses", "endless options", "number for a path")
CASES = [
    (verb, damage) for verb in VERBS for damage in DAMAGE if verb in ("analyze", "train --resume") or damage in FEW
]
UNREAD = {
    "train --resume": ("z.", "pose."),
    "train --load": ("z.", "pose."),
    "select": ("z.", "weights."),
    "export": ("z.", "weights."),
}


@pytest.mark.parametrize(
    ("verb", "damage"), [case for case in CASES if not DAMAGE[case[1]][0].startswith(UNREAD.get(case[0], "none"))]
)
def test_damaged_runs(
    verb: str, damage: str, run: Path, small_set: SmallSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name, harm = DAMAGE[damage]
    harm(run / name)
    line = VERBS[verb](run, small_set, tmp_path / "out")
    before = contents(run)
    message = refused(capsys, line)
    assert name in message or str(run) in message
    assert contents(run) == before
    assert not (tmp_path / "out").exists() and not Path("witness").exists()


# ------------------------------------------------------------------------------------------------ harmful pickles


class Harmful:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def as_pickle(path: Path, harmful: Harmful) -> None:
    path.write_bytes(pickle.dumps([harmful]))


def as_torch(path: Path, harmful: Harmful) -> None:
    torch.save({"mu": harmful, "model": harmful}, path)


def as_array(path: Path, harmful: Harmful) -> None:
    """An array of objects, as ``np.savez`` pickles it, in an archive that is sound."""
    np.savez(path, allow_pickle=True, outlier=np.array([harmful], object))


PLACES: dict[str, tuple[str, Callable[[Path, Harmful], None], str]] = {
    "weights": (f"weights.{LAST}.pkl", as_torch, "analyze"),
    "weights as a bare pickle": (f"weights.{LAST}.pkl", as_pickle, "train --resume"),
    "codes": (f"z.{LAST}.pkl", as_torch, "volumes"),
    "poses": (f"pose.{LAST}.pkl", as_pickle, "select"),
    "labels": (f"analyze.{LAST}/kmeans2/labels.pkl", as_pickle, "select"),
    "classes": (f"analyze.{LAST}/kmeans2/labels.pkl", as_pickle, "quality"),
    "classes of a page": (f"analyze.{LAST}/kmeans2/labels.pkl", as_pickle, "report"),
    "umap": (f"analyze.{LAST}/umap.pkl", as_pickle, "analyze"),
    "split": ("split.pkl", as_torch, "train --resume"),
    "linear results": ("linear/linear.npz", as_array, "quality"),
}


@pytest.mark.parametrize("place", PLACES)
def test_harmful_pickles_in_a_run(
    place: str, run: Path, small_set: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, put, verb = PLACES[place]
    put(run / name, Harmful(tmp_path / "witness"))
    assert Path(name).name in refused(capsys, VERBS[verb](run, small_set, tmp_path / "out"))
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("option", ["--poses", "--split", "--ind", "--latents", "--mask", "labels"])
def test_harmful_pickles_beside_a_run(
    option: str, finished_run: Path, small_set: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "harmful.pkl"
    as_pickle(path, Harmful(tmp_path / "witness"))
    if option == "labels":
        line: list[object] = ["parse_pose_star", small_set.star, "-D", 24, "--Apix", 15, "--labels", path]
        line += ["--outdir", tmp_path]
        message = refused(capsys, line, dsd.main)
    else:
        start = ["--load", f"{finished_run}/weights.{LAST}.pkl"] if option == "--latents" else []
        line = train_line(small_set, tmp_path / "out", *start, "-n", "9")
        if option == "--mask":
            line[line.index("-r") + 1] = str(path)
        else:
            line += [option, path]
        message = refused(capsys, line)
    assert "harmful.pkl" in message
    assert not (tmp_path / "witness").exists()


def test_compressed_bombs_are_not_unpacked(tmp_path: Path) -> None:
    """A few megabytes that unpack to 4 GB are refused before anything is unpacked."""
    from opustomo.data.tensors import read_arrays
    from opustomo.errors import UserError

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 29,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as part:
        part.write(header.getvalue())
        for _ in range(256):
            part.write(bytes(1 << 20))
    with pytest.raises(UserError, match="claim more than the file can hold"):
        read_arrays(tmp_path / "a.npz", "make it again")


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.slow
def test_names_from_files_write_nothing_elsewhere(
    analysed: Path,
    small_set: SmallSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Absolute names, names that climb, blanks, quotes, control characters, markup, bytes that are no text."""
    monkeypatch.setattr(latents, "embed", lambda codes, seed: codes[:, :2])  # no name reaches UMAP
    home = tmp_path / "home"
    shutil.copytree(small_set.folder / "subtomo", home / "subtomo")
    star = home / "set" / "particles.star"
    blocks = dict(read_star(small_set.star).blocks)
    table = blocks[""]
    names = [f"../{name}" for name in table["rlnImageName"]]
    names[0] = f"{home}/subtomo/p00000.mrc"
    for i, stem in enumerate(["a b", "\x1b[31mred", "<b>$x_{", "\udcff\u2028é", 'with "quotes"'], 1):
        for end in (".mrc", "_ctf.star"):
            (home / "subtomo" / f"p{i:05d}{end}").rename(home / "subtomo" / (stem + end))
        names[i] = f"../subtomo/{stem}.mrc"
    table["rlnImageName"] = pd.Series(names, dtype=object)
    table["rlnCtfImage"] = pd.Series([name.replace(".mrc", "_ctf.mrc") for name in names], dtype=object)
    write_star(star, blocks)
    before = contents(home)
    lines: list[list[object]] = [
        ["check", star],
        ["encode", analysed, star, "-o", tmp_path / "out" / "more"],
        ["report", tmp_path / "out" / "more", "--clusters", 3],
        ["analyze", tmp_path / "out" / "more", "--clusters", 2, "--skip-umap"],
        ["select", star, "--run", tmp_path / "out" / "more", "-o", tmp_path / "out" / "classes", "--kmeans", 2],
    ]
    for line in lines:
        assert cli.main([str(word) for word in line]) in ((0, 1) if line[0] == "check" else (0,)), capsys.readouterr()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and "\x1b" not in captured.err + captured.out
    assert contents(home) == before
    assert {path.name for path in tmp_path.iterdir()} == {"home", "out"}
    parts = [read_star(path).particles for path in sorted((tmp_path / "out" / "classes").glob("pre*.star"))]
    assert sorted(name for part in parts for name in part["rlnImageName"]) == sorted(names)
