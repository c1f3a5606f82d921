"""STAR text comes back exactly as it was; damage is named with its line."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import starfile

from opustomo import __version__
from opustomo.data.star import read_numeric_table, read_star, write_star
from opustomo.errors import UserError

TEXT = """# a comment
data_general

_rlnTomoSubTomosAre2DStacks   0
_rlnNote  "two words"

data_optics

loop_

_rlnOpticsGroup #1
_rlnVoltage #2
1 300.000000   # trailing comment

data_particles

loop_
_rlnImageName #1
_rlnAngleRot #2
_rlnCoordinatex #3
_rlnTomoVisibleFrames #4
sub/0001.mrc  1.50 007 [0,1,1]
# a comment between rows
sub/0#2.mrc  -2e-03 1e3 [1,1,1]


"""


def put(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_star(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blocks_order_and_text_are_kept(tmp_path: Path, newline: str) -> None:
    star = read_star(put(tmp_path / "a.star", TEXT.replace("\n", newline)))
    assert list(star.blocks) == ["general", "optics", "particles"]
    assert star.particle_block == "particles" and star.optics_block == "optics"
    assert star.blocks["general"] == {"rlnTomoSubTomosAre2DStacks": "0", "rlnNote": "two words"}
    assert star.particles.to_numpy().tolist() == [
        ["sub/0001.mrc", "1.50", "007", "[0,1,1]"],
        ["sub/0#2.mrc", "-2e-03", "1e3", "[1,1,1]"],
    ]
    np.testing.assert_array_equal(star.numbers("particles", "rlnAngleRot", "x"), [1.5, -0.002])
    np.testing.assert_array_equal(star.numbers("particles", "rlnCoordinateX", "x"), [7, 1000])


def test_written_file_is_the_same_and_readable_by_others(tmp_path: Path) -> None:
    star = read_star(put(tmp_path / "a.star", TEXT))
    write_star(tmp_path / "b.star", star.blocks)
    again = read_star(tmp_path / "b.star")
    assert list(again.blocks) == list(star.blocks)
    assert again.blocks["general"] == star.blocks["general"]
    assert again.particles.equals(star.particles)
    write_star(tmp_path / "b.star", read_star(put(tmp_path / "a.star", TEXT.replace("0#2", "02"))).blocks)
    other = starfile.read(tmp_path / "b.star")["particles"]
    np.testing.assert_allclose(other["rlnAngleRot"], [1.5, -0.002])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.star", "b.star"]


def test_a_written_file_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one comment, whatever was typed."""
    monkeypatch.setattr("sys.argv", ["/somewhere/opustomo", "select", "a\nb", "-o", "c"])
    write_star(tmp_path / "a.star", {"general": {"rlnNote": "1"}})
    lines = (tmp_path / "a.star").read_text().splitlines()
    assert lines[0] == f"# opustomo {__version__}: opustomo select 'a b' -o c" and lines[1:3] == ["", "data_general"]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_star(tmp_path / "file" / "b.star", {"": {"a": "1"}})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a STAR file"),
        ("hello world\n", "not a STAR file (line 1"),
        ("\0\1\2", "binary"),
        ("data_\nloop_\n_rlnA #1\n_rlnB #2\n1 2\n3\n", "line 6 has 1 values but the table has 2 columns"),
        ("data_\nloop_\n_rlnA #1\n_rlnA #2\n1 2\n", "line 4: column _rlnA occurs twice"),
        ("data_x\n_a 1\ndata_x\n_a 1\n", "line 3: block data_x occurs twice"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    assert words in error_of(put(tmp_path / "bad.star", text))


def test_missing_file(tmp_path: Path) -> None:
    assert "no such STAR file" in error_of(tmp_path / "absent.star")


def test_missing_column_names_its_purpose_and_bad_number_its_row(tmp_path: Path) -> None:
    star = read_star(put(tmp_path / "a.star", TEXT.replace("-2e-03", "n/a")))
    with pytest.raises(UserError, match=r"no column _rlnAngleTilt, needed for the poses"):
        star.numbers("particles", "rlnAngleTilt", "the poses")
    with pytest.raises(UserError, match=r"_rlnAngleRot, row 2: 'n/a' is not a finite number"):
        star.numbers("particles", "rlnAngleRot", "the poses")


def test_empty_table_and_no_particles(tmp_path: Path) -> None:
    empty = read_star(put(tmp_path / "a.star", "data_particles\n\nloop_\n_rlnImageName #1\n\n"))
    with pytest.raises(UserError, match="no rows"):
        _ = empty.particles
    with pytest.raises(UserError, match=r"no table of particles \(blocks found: data_global\)"):
        _ = read_star(put(tmp_path / "b.star", "data_global\n_rlnX 1\n")).particles


def test_numeric_table_is_fast(tmp_path: Path) -> None:
    rows = "\n".join(f"frame{i}.mrc {20000 + i} 300 2.7 0.07 0 {3 * i - 60} 0 {4 * i} 0.5" for i in range(41))
    names = ["Name", "DefocusU", "Voltage", "Cs", "Amp", "Rot", "Tilt", "Psi", "CtfBfactor", "Scale"]
    head = "\n".join(f"_rln{name} #{i}" for i, name in enumerate(names, 1))
    path = put(tmp_path / "t.star", f"\ndata_images\n\nloop_\n{head}\n{rows}\n\n")
    table = read_numeric_table(path, "images", ("rlnTilt", "rlnDefocusU", "rlnAbsent"))
    assert list(table) == ["rlnTilt", "rlnDefocusU"]
    np.testing.assert_array_equal(table["rlnTilt"], 3.0 * np.arange(41) - 60)
    start = time.process_time()
    for _ in range(100):
        read_numeric_table(path, "images", ("rlnTilt", "rlnDefocusU", "rlnVoltage", "rlnScale"))
    assert (time.process_time() - start) / 100 < 1e-3
