"""CTF tables of Warp (CSV), and tilts that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opustomo import cli
from opustomo.compat import dsd
from opustomo.config import InputOptions
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
from opustomo.errors import UserError
from star_sets import BOX, Set, put_loop, put_volume, tilt_columns

# nothing is on a grid: as after levelling
ANGLES = [-61.3, -40.2, 0.7, 39.6, 50.9]
U, V, AXIS, DOSES = 21000.0, 20200.0, 30.0, [3.0, 5.0, 7.0, 9.0, 11.0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What reaches ``cli.call``; no verb runs."""
    found: list[tuple] = []
    monkeypatch.setattr(cli, "call", lambda *call: found.append(call))
    return found


def put_table(path: Path, angles: list[float], scales: list[float] | None = None, **changed: str) -> None:
    """What the fork writes: SI units, defocus and B-factor negative (-4 x dose x 1e-20 m^2)."""
    scales = list(np.cos(np.deg2rad(angles))) if scales is None else scales
    lines = ["TiltAngle, Defocus, Voltage, Cs, Amplitude, Bfactor, Scale, DefocusDelta, AstigmatismAngle"]
    for angle, dose, scale in zip(angles, DOSES, scales, strict=False):
        values = {
            "TiltAngle": f"{angle}", "Defocus": f"{-(U + V) / 2 * 1e-10:.9e}", "Voltage": "300000", "Cs": "0.0027",
            "Amplitude": "0.07", "Bfactor": f"{-4 * dose * 1e-20:.6e}", "Scale": f"{scale:.7f}",
            "DefocusDelta": f"{-(U - V) / 2 * 1e-10:.9e}", "AstigmatismAngle": f"{np.deg2rad(AXIS):.9f}",
        }  # fmt: skip
        lines.append(", ".join((values | changed).values()))
    path.write_text("\n".join(lines) + "\n")


def warp_set(folder: Path, **changed: str) -> Path:
    """The fork's export: volumes named by rlnCtfImage are there, too, and a table beside each."""
    made = Set(folder)
    star = made.write(ctf=False)
    for i in range(made.n):
        put_table(folder / f"sub/p{i}_ctf.csv", ANGLES[: 5 - i % 2], **changed)
        (folder / f"sub/p{i}_ctf.mrc").touch()
    return star


def read(star: Path, **options: object) -> Particles:
    return read_particles(star, InputOptions(**options))  # type: ignore[arg-type]


def test_a_table_is_read_as_the_ctf_star_that_says_the_same(tmp_path: Path) -> None:
    found = read(warp_set(tmp_path / "warp"))
    made = Set(tmp_path / "relion")
    star = made.write(ctf=False)
    for i in range(made.n):
        angles = ANGLES[: 5 - i % 2]
        columns = tilt_columns(angles) | {
            "rlnDefocusU": [f"{U}"] * len(angles), "rlnDefocusV": [f"{V}"] * len(angles),
            "rlnDefocusAngle": [f"{AXIS}"] * len(angles),
            # a quarter of Warp's, as OPUS-TOMO takes it
            "rlnCtfBfactor": [f"{dose}" for dose in DOSES[: len(angles)]],
        }  # fmt: skip
        put_loop(made.folder / f"sub/p{i}_ctf.star", "images", columns)
    expected = read(star)
    assert list(np.diff(found.tilt_offsets)) == [5, 4, 5, 4]
    np.testing.assert_allclose(found.tilts, expected.tilts, rtol=1e-6, atol=1e-5)
    assert found.transfer == "tilts" and any("4 CTF tables (CSV) of Warp, 4 to 5 tilts" in n for n in found.notes)


def test_a_ctf_star_beats_the_table(tmp_path: Path) -> None:
    star = warp_set(tmp_path)
    for i in range(4):
        put_loop(tmp_path / f"sub/p{i}_ctf.star", "images", tilt_columns([0.0]))
    assert len(read(star).tilts) == 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"Voltage": "300kV"}, "p0_ctf.csv: column Voltage, tilt 1: '300kV' is not a number"),
        ({"Voltage": "-300000"}, "tilt 1: _rlnVoltage -300 is not possible; write kV, e.g. 300 (converted from Warp's"),
        ({"Scale": "0"}, "p0_ctf.csv: all 5 tilts of particle sub/p0.mrc are excluded"),
        ({"Scale": ""}, "column Scale, tilt 1: '' is not a number"),
        ({"Scale": "1, 2"}, "p0_ctf.csv: tilt 1 has 10 values for 9 columns"),
    ],
)
def test_tables_that_cannot_be_used_say_why(changed: dict[str, str], words: str, tmp_path: Path) -> None:
    star = warp_set(tmp_path, **changed)
    with pytest.raises(UserError) as caught:
        read(star)
    assert words in str(caught.value)


def test_a_table_without_a_column_and_one_without_rows(tmp_path: Path) -> None:
    star = warp_set(tmp_path)
    table = tmp_path / "sub/p2_ctf.csv"
    table.write_text(table.read_text().replace("DefocusDelta", "Delta"))
    with pytest.raises(UserError, match=r"p2_ctf.csv: has no column DefocusDelta"):
        read(star)
    table.write_text("TiltAngle, Defocus, Voltage, Cs, Amplitude, Bfactor, Scale, DefocusDelta, AstigmatismAngle\n")
    with pytest.raises(UserError, match=r"p2_ctf.csv: has no tilts"):
        read(star)
    table.unlink()
    (tmp_path / "sub/p3_ctf.mrc").unlink()
    (tmp_path / "sub/p2_ctf.mrc").unlink()
    with pytest.raises(UserError, match=r"1 of 4 CTF tables \(CSV\) of Warp missing, first: sub/p2_ctf.csv"):
        read(star)


def test_tilts_beyond_the_limit_are_left_out_and_the_rest_keep_their_angles(tmp_path: Path) -> None:
    star = warp_set(tmp_path)
    found = read(star, tilt_limit=45.0)
    assert list(found.tilts_of(0)[:, 1]) == [-40.2, 0.7, 39.6] and len(found.tilts_of(1)) == 3
    assert any(n.startswith("6 of 18 tilts are further than --tilt-limit 45 from 0") for n in found.notes)
    assert np.array_equal(read(star).tilts[:, :11], found.tilts[:, :11])
    for limit, words in (
        (0.5, "leaves particle sub/p0.mrc of"),
        (-1.0, "give degrees"),
        (float("nan"), "give degrees"),
    ):
        with pytest.raises(UserError, match=words):
            read(star, tilt_limit=limit)


def test_a_limit_needs_tilts(tmp_path: Path) -> None:
    star = Set(tmp_path).write(ctf=False)
    for i in range(4):
        put_volume(tmp_path / f"sub/p{i}_ctf.mrc", np.ones((BOX, BOX, BOX), np.float32))
    with pytest.raises(UserError, match=r"--tilt-limit 45: the CTFs of .* are volumes"):
        read(star, tilt_limit=45.0)


def test_the_options_of_later_versions(tmp_path: Path, calls: list[tuple]) -> None:
    line = ["train_tomo", str(warp_set(tmp_path)), "-o", str(tmp_path / "run"), "--warp"]
    for more, limit in (
        ("", None), ("--tilt-step 3", None), ("--tilt-range 50 --tilt-step 3", 51.5), ("--tilt-limit 40", 40.0),
        ("--tilt-range 60 --tilt-limit 45", 45.0), ("--tilt-range 90 --tilt-step 3", 90.0),
    ):  # fmt: skip
        assert dsd.main([*line, *more.split()]) == 0
        _, config, given = calls.pop()
        assert config.input.tilt_limit == limit and ("tilt_limit" in given) == (limit is not None)
        assert not given & {"warp", "tilt_range", "tilt_step"}


def test_warp_is_a_cross_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[tuple]) -> None:
    star = Set(tmp_path).write()
    assert dsd.main(["train_tomo", str(star), "-o", str(tmp_path / "run"), "--warp"]) == 2
    assert "has CTF STAR files; export with --output_ctf_csv" in capsys.readouterr().err
    for path in (tmp_path / "sub").glob("*.star"):
        path.unlink()
    assert dsd.main(["train_tomo", str(star), "-o", str(tmp_path / "run"), "--warp"]) == 2
    assert "has no CTF tables" in capsys.readouterr().err and not calls
