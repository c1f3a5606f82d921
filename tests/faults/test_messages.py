"""docs/messages.md: bad inputs and what each gets, word for word.

``PYTHONPATH=src:tests:tests/faults python tests/faults/test_messages.py`` writes the page anew.
"""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from atom_files import pdb, places, two_models
from fuzz_targets import attempt, saved, seeds
from opustomo import cli
from opustomo.compat import dsd
from opustomo.config import InputOptions, TrainConfig
from opustomo.data.readers import read_particles
from opustomo.errors import UserError
from opustomo.training.start import with_sizes
from star_sets import BOX

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"
LONGEST = 300  # characters
Change = Callable[[bytes], bytes]
Program = Callable[[list[str]], int]


def text(old: str, new: str, count: int = 1) -> Change:
    def change(raw: bytes) -> bytes:
        assert old.encode() in raw, old
        return raw.replace(old.encode(), new.encode(), count)

    return change


def cell(row: int, column: int, value: str) -> Change:
    """Another value in a row (from 0) of the last table."""

    def change(raw: bytes) -> bytes:
        lines = raw.decode().splitlines()
        at = [i for i, line in enumerate(lines) if line[:1] not in ("", "_") and len(line.split()) > 2][row]
        words = lines[at].split()
        words[column] = value
        return "\n".join([*lines[:at], " ".join(words), *lines[at + 1 :]]).encode()

    return change


def put(at: int, *words: int) -> Change:
    """Other 32-bit integers in the header of an MRC file, from word ``at``."""
    return lambda raw: raw[: 4 * at] + np.array(words, "<i4").tobytes() + raw[4 * (at + len(words)) :]


def voxels(value: float, count: int) -> Change:
    return lambda raw: raw[: len(raw) - 4 * count] + np.full(count, value, "<f4").tobytes()


def instead(raw: bytes) -> Change:
    return lambda _: raw


def pickled(value: object) -> Change:
    return instead(pickle.dumps(value))


def flipped(after: bytes) -> Change:
    """One bit of the 80th byte behind the first ``after``."""

    def change(raw: bytes) -> bytes:
        at = raw.index(after) + 80
        return raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :]

    return change


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) * 2 // 3]


def one_line_less(raw: bytes) -> bytes:
    """Without the last atom of the last model."""
    return b"\n".join(raw.splitlines()[:-3] + raw.splitlines()[-2:])


def unknown_element() -> str:
    """No columns 77-78, and a name that begins with the letter of no element."""
    return pdb(places(0.0), elements=False).replace("CB  ", "QB  ", 1)


def three_images(raw: bytes) -> bytes:
    """A sound stack of the first three of its four images (box 16)."""
    three = (3).to_bytes(4, "little")
    return raw[:8] + three + raw[12:36] + three + raw[40 : 1024 + 3 * 16 * 16 * 4]


def two_pixel_sizes(raw: bytes) -> bytes:
    """A second optics group, of images with another pixel size, for the second particle."""
    lines = raw.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("1 a "))
    other = lines[at].split()
    other[:2], other[7] = ["2", "b"], "7.5"
    last = lines[-1].split()
    last[4] = "2"
    return "\n".join([*lines[: at + 1], " ".join(other), *lines[at + 1 : -1], " ".join(last)]).encode()


# columns of star_sets.Set: 0 micrograph, 1 image, 2 CTF, 3-5 angles, 6-8 origins, 9 magnification, 10 pixel size
FILES: list[tuple[str, str, str, Change]] = [
    ("STAR file", "empty", "particles", instead(b"")),
    ("STAR file", "binary", "particles", instead(b"\0\1\2\3" * 99)),
    ("STAR file", "values before any block", "particles", instead(b"1 2 3\n")),
    ("STAR file", "no rows", "particles", lambda raw: raw[: raw.index(b"TS_0")]),
    ("STAR file", "cut off within a row", "particles", lambda raw: raw[:-40]),
    ("STAR file", "a column twice", "particles", text("_rlnAngleTilt", "_rlnAngleRot")),
    ("STAR file", "a misspelt column", "particles", text("_rlnAngleTilt", "_rlnAngleTitl")),
    ("STAR file", "no names of images", "particles", text("_rlnImageName", "_rlnOther")),
    ("STAR file", "a word for an angle", "particles", cell(1, 4, "forty")),
    ("STAR file", "an infinite angle", "particles", cell(1, 4, "inf")),
    ("STAR file", "an angle beyond reason", "particles", cell(1, 4, "1e300")),
    ("STAR file", "an origin beyond reason", "particles", cell(2, 6, "1e300")),
    ("STAR file", "magnification 0", "particles", cell(0, 9, "0")),
    ("STAR file", "two magnifications", "particles", cell(2, 9, "20000")),
    ("STAR file", "a negative pixel size", "particles", text(" 3.5\n", " -3.5\n", 9)),
    ("STAR file", "a pixel size unlike the headers'", "particles", text(" 3.5\n", " 7\n", 9)),
    ("STAR file", "a subtomogram that is not there", "particles", cell(2, 1, "sub/p9.mrc")),
    ("STAR file", "a folder for a subtomogram", "particles", cell(2, 1, "sub")),
    ("STAR file", "half sets other than 1 and 2", "particles", text("_rlnMagnification", "_rlnRandomSubset")),
    (
        "STAR file",
        "CTF applied, given as CTF STAR files",
        "particles",
        text("_rlnMagnification", "_rlnCtfDataAreCtfPremultiplied"),
    ),
    ("CTF STAR", "empty", "ctf_star", instead(b"")),
    ("CTF STAR", "no tilt angles", "ctf_star", text("_rlnAngleTilt", "_rlnOther")),
    ("CTF STAR", "no defocus", "ctf_star", text("_rlnDefocusU", "_rlnOther")),
    ("CTF STAR", "a word for a defocus", "ctf_star", text("21000", "deep")),
    ("CTF STAR", "a defocus beyond reason", "ctf_star", text("21000", "2e9")),
    ("CTF STAR", "voltage in volts", "ctf_star", text(" 300 ", " 300000 ")),
    ("CTF STAR", "amplitude contrast in per cent", "ctf_star", text(" 0.07 ", " 7 ")),
    ("CTF STAR", "spherical aberration in Angstrom", "ctf_star", text(" 2.7 ", " 27000000 ")),
    ("CTF STAR", "a tilt angle beyond reason", "ctf_star", text(" -40.0 ", " 1e9 ")),
    ("CTF STAR", "a value too few", "ctf_star", text(" 2.7 ", " ")),
    ("CTF STAR", "every tilt excluded", "ctf_star", lambda raw: re.sub(rb"[\d.]+$", b"0", raw, flags=re.M)),
    ("CTF table (CSV)", "no column for the scale", "ctf_csv", text("Scale", "Weight")),
    ("CTF table (CSV)", "a word for a voltage", "ctf_csv", text("300000", "300kV")),
    ("CTF table (CSV)", "a value too few", "ctf_csv", text(" 0.07,", "")),
    ("optimisation set", "no particles file", "optimisation", text("particles.star", "gone.star")),
    ("optimisation set", "no tomograms file", "optimisation", text("tomograms.star", "gone.star")),
    ("optimisation set", "no tomograms named", "optimisation", text("_rlnTomoTomogramsFile", "_rlnOther")),
    ("particles of a set", "a tomogram that is not there", "stacks", text("TS_1 TS_1/1", "TS_9 TS_1/1")),
    ("particles of a set", "flags of another tilt series", "stacks", text("[1,1,", "[1,")),
    ("particles of a set", "nothing visible", "stacks", text("[1,1,1,1]", "[0,0,0,0]")),
    ("particles of a set", "two pixel sizes", "stacks", two_pixel_sizes),
    ("stack of images", "shorter than the visible frames", "stack", three_images),
    ("tomograms of a set", "no table of tomograms", "tomograms", text("data_global", "data_other")),
    ("tomograms of a set", "a frame count that is not the images'", "tomograms", text(" -1.0 4 ", " -1.0 5 ")),
    ("tomograms of a set", "a projection that scales", "tomograms", text("[0.500000000,", "[1.500000000,")),
    ("tomograms of a set", "a word in a projection", "tomograms", text("[0.500000000,", "[half,")),
    ("tomograms of a set", "no defocus", "tomograms", text("_rlnDefocusU", "_rlnOther")),
    ("pseudo-subtomograms", "not said to be premultiplied", "pseudo", text("CtfDataAreCtfPremultiplied", "Other")),
    ("one row per image", "no number of the image", "series", text("\n1@", "\none@")),
    ("one row per image", "images of a particle in two stacks", "series", text("\n2@all", "\n2@other")),
    ("one row per image", "no voltage", "series", text("_rlnVoltage", "_rlnOther")),
    (
        "one row per image",
        "an image of a particle twice",
        "series",
        lambda raw: raw.rstrip() + b"\n" + raw.splitlines()[-1],
    ),
    ("MRC volume", "empty", "mrc", instead(b"")),
    ("MRC volume", "text", "mrc", instead(b"not a volume " * 200)),
    ("MRC volume", "cut off", "mrc", cut),
    ("MRC volume", "complex numbers", "mrc", put(3, 4)),
    ("MRC volume", "mode 101", "mrc", put(3, 101)),
    ("MRC volume", "size 0", "mrc", put(0, 0)),
    ("MRC volume", "a size beyond the file", "mrc", put(0, 2000, 2000, 2000)),
    ("MRC volume", "a negative size", "mrc", put(0, -16)),
    ("MRC volume", "one section", "mrc", put(2, 1)),
    ("mask", "another box", "mask", put(0, 16, 16, 15)),
    ("mask", "zeros", "mask", voxels(0, BOX**3)),
    ("mask", "NaN", "mask", voxels(np.nan, 3)),
    ("mask", "a map", "mask", voxels(40, 5)),
    ("mask", "hardly any voxel", "mask", lambda raw: voxels(1, 9)(voxels(0, BOX**3)(raw))),
    ("mask", "cut off", "mask", cut),
    ("CTF volume", "another box", "transfer", put(0, 16, 16, 15)),
    ("CTF volume", "zeros", "transfer", voxels(0, BOX**3)),
    ("CTF volume", "NaN", "transfer", voxels(np.nan, 3)),
    ("CTF volume", "shifted", "transfer", lambda raw: voxels(1, 700)(voxels(0, BOX**3)(raw))),
    ("poses (--poses)", "not a pickle", "poses", instead(b"0 1 2\n")),
    ("poses (--poses)", "cut off", "poses", cut),
    ("poses (--poses)", "something else", "poses", pickled([1, 2, 3])),
    (
        "poses (--poses)",
        "of the wrong shapes",
        "poses",
        pickled((np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3)))),
    ),
    (
        "poses (--poses)",
        "not finite",
        "poses",
        pickled((np.full((4, 3, 3), np.nan), np.zeros((4, 3)), np.zeros((4, 3)))),
    ),
    ("any pickle", "code to be run", "pickles", instead(b"cos\nsystem\n(S'true'\ntR.")),
    ("rows (--ind)", "beyond the last", "indices", pickled([0, 99])),
    ("rows (--ind)", "negative", "indices", pickled([-1, 2])),
    ("rows (--ind)", "none", "indices", pickled([])),
    ("rows (--ind)", "a mask", "indices", pickled(np.array([True, False, True, True]))),
    ("rows (--ind)", "fractions", "indices", pickled([0.5, 1.5])),
    ("rows (--ind), text", "words", "indices_text", instead(b"0\none\n")),
    ("split (--split)", "of another set", "split", pickled(np.arange(7))),
    ("split (--split)", "a row twice", "split", pickled([0, 1, 1, 3])),
    ("classes (labels.pkl)", "negative", "labels", pickled([-1, 0, 1])),
    ("classes (labels.pkl)", "none", "labels", pickled([])),
    ("selection (--selection)", "cut off", "selection", cut),
    ("selection (--selection)", "of another set", "selection", text('"particles": 4', '"particles": 5')),
    ("selection (--selection)", "beyond the last", "selection", text("[0, 2]", "[0, 4]")),
    ("selection (--selection)", "none", "selection", text("[0, 2]", "[]")),
    ("selection (--selection)", "words", "selection", text("[0, 2]", '["0"]')),
    ("checkpoint", "a flipped bit", "tensors", flipped(b"mu")),
    ("checkpoint", "cut off", "tensors", cut),
    ("checkpoint", "an object to be built", "tensors", instead(saved(lambda b: torch.save({"a": Path}, b)))),
    ("linear.npz", "a flipped bit", "arrays", flipped(b"NUMPY")),
    ("config.yaml", "not YAML", "config", instead(b"kind: [")),
    ("config.yaml", "a word for a number", "config", text("box: 16", "box: wide")),
    ("config.yaml", "aliases", "config", instead(b"kind: network\nstar: &a [x]\nmask: *a\n")),
    ("codes (--zfile)", "a word", "codes", text("1e3", "one")),
    ("codes (--zfile)", "too few columns", "codes", text("3, 4", "3")),
    ("codes (--zfile)", "none", "codes", instead(b"# nothing\n")),
    ("Dynamo table", "too few columns", "dynamo", instead(b"1 2 3\n")),
    ("PyTom list", "not XML", "pytom", instead(b"<ParticleList>")),
    ("ndjson list", "not JSON", "ndjson", instead(b"{\n")),
    ("ndjson list", "no location", "ndjson", text("location", "place", 2)),
    ("atoms (--atoms)", "empty", "atoms", instead(b"")),
    ("atoms (--atoms)", "no atoms", "atoms", instead(b"HEADER    HYDROLASE\nEND\n")),
    ("atoms (--atoms)", "an atom too few in one conformation", "atoms", one_line_less),
    ("atoms (--atoms)", "atoms in another order", "atoms", text(" CB  CYS A   2", " XX  CYS A   2")),
    ("atoms (--atoms)", "an atom of no element", "atoms", instead(unknown_element().encode())),
    ("atoms (--atoms)", "one conformation twice", "atoms", instead(two_models(0.0, 0.0).encode())),
]
INPUTS: list[tuple[str, InputOptions]] = [
    ("-D 32", InputOptions(box=32)),
    ("--angpix 7", InputOptions(angpix=7.0)),
    ("--relion31", InputOptions(relion31=True)),
    ("--datadir nowhere", InputOptions(Path("nowhere"))),
]
LINES = [
    ["train"], ["train", "a.star", "-o", "run", "--zdims", "3"], ["train", "a.star", "-o", "run", "-n", "ten"],
    ["train", "a.star", "-o", "run", "--device", "tpu"], ["train", "--resume"], ["train", "--resume", "nowhere"],
    ["trian"], ["--completion", "csh"], ["simulate", "-o", "set", "--atoms", "gone.pdb"],
    ["expand", "a.star", "--symmetry", "Q7", "-o", "b.star"], ["simulate", "-o", "set", "--no-align"],
    ["simulate", "-o", "set", "--atoms", "a.pdb", "--preset", "hinge"],
]  # fmt: skip
OF_DSD = [["train_tomo", "a.star", "-o", "run", *option] for option in (("--ctfalpha", "1"), ("--ctfbeta", "0"))]
SIZES = [{"epochs": 0}, {"batch": 0}, {"lr": -1.0}, {"valfrac": 1.0}, {"templateres": 50}, {"tmp_prefix": "../tmp"}]


def collect(folder: Path, say: Callable[[Program, list[str]], str]) -> list[tuple[str, str, str]]:
    """(what, what is wrong with it, message) of every bad input; say: the error of a program's command line."""
    rows: list[tuple[str, str, str | None]] = []
    good = seeds(folder)
    for what, wrong, target, change in FILES:
        found = attempt(target, change(good[target][0]), folder)
        rows.append((what, wrong, found and re.sub(r"(hostile|list)\.\w+", "FILE", found)))
    for option, options in INPUTS:
        (folder / "hostile.star").write_bytes(good["particles"][0])
        rows.append(
            ("option", option, refusal(lambda options=options: read_particles(folder / "hostile.star", options)))
        )
    for size in SIZES:
        [(name, value)] = size.items()
        config = TrainConfig(Path("a.star"), Path("run"), **size)  # type: ignore[arg-type]
        option = f"--{name.replace('_', '-')} {value}"
        rows.append(("option", option, refusal(lambda config=config: with_sizes(config, torch.device("cpu")))))
    rows += [("command line", "opustomo " + " ".join(line), say(cli.main, line)) for line in LINES]
    rows += [("command line", "dsd " + " ".join(line), say(dsd.main, line)) for line in OF_DSD]
    return [
        (
            what,
            wrong,
            (found or "USED").replace(f"{folder}/", "").replace(str(folder), "FOLDER").replace("hostile.star", "FILE"),
        )
        for what, wrong, found in rows
    ]


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def page(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| {' | '.join(part.replace('|', chr(92) + '|') for part in row)} |" for row in rows]
    return "\n".join([HEADER, *lines]) + "\n"


HEADER = """\
# What bad input is told

Every message is one line on stderr, after `opustomo VERB: error: `, with exit status 2. FILE stands for the name of the
file in question. The page is written by `tests/faults/test_messages.py`, which compares it with what the program says.

| input | what is wrong with it | message |
|---|---|---|"""


def test_the_page_says_what_the_program_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def say(program: Program, line: list[str]) -> str:
        assert program(line) == 2
        [words] = capsys.readouterr().err.splitlines()
        return words.split("error: ", 1)[1]

    rows = collect(tmp_path, say)
    assert len(rows) >= 60 and len({row[:2] for row in rows}) == len(rows)
    for what, wrong, message in rows:
        assert len(message) <= LONGEST, message
        assert message != "USED" and message.isprintable() and "Traceback" not in message, (what, wrong)
        assert not re.search(r"(?<![\w./])/\w", message), message  # no path outside the folder
        if what not in ("option", "command line"):
            assert re.search(r"FILE|config.yaml|sub\b|\w\.star", message), (what, wrong, message)
        assert re.search(r"; |--help|\bor\b|correct|available|must (be|lie)", message), message  # the way out
    assert PAGE.read_text() == page(rows)


if __name__ == "__main__":
    import contextlib
    import io

    def told(program: Program, line: list[str]) -> str:
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            program(line)
        return error.getvalue().strip().split("error: ", 1)[-1]

    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        PAGE.write_text(page(collect(Path(name), told)))
