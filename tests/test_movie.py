"""Movies of a series: one level and one scale for all maps, in the order of their numbers, playable without more."""

from __future__ import annotations

import builtins
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.filters import threshold_otsu

from fake_run import blob
from opustomo.analysis import movie
from opustomo.cli import main
from opustomo.data.mrc import write_volume

SIZE = 12
WIDTHS = (1.2, 1.6, 2.0, 2.4)


def write_series(folder: Path, first: int = 0) -> list[Path]:
    """Blobs that grow, numbered so that the order of names is not that of numbers."""
    paths = [folder / f"reference{first + i}.mrc" for i in range(len(WIDTHS))]
    for path, width in zip(paths, WIDTHS, strict=True):
        write_volume(path, blob(SIZE, 0, 0, 0, width), 5.0)
    return paths


def test_gif_plays_forth_and_back_at_one_level(tmp_path: Path) -> None:
    paths = write_series(tmp_path, 8)
    found = movie.series(tmp_path, "reference")
    assert [path.name for path in found] == [path.name for path in paths]  # 10 after 9
    volumes, pixel = movie.read_series(found)
    written = movie.write_movie(volumes, pixel, found, tmp_path / "reference", 0.5, rate=4, size=80)
    assert {path.suffix for path in written} >= {".gif", ".cxc", ".png"} and all(path.is_file() for path in written)
    with Image.open(tmp_path / "reference.gif") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0 and gif.info["duration"] == 250
        areas = []
        for i in range(6):
            gif.seek(i)
            front = np.asarray(gif.convert("RGB"), np.float64)[20:80, :78]
            areas.append(int((front[..., 2] - front[..., 0] > 40).sum()))
    # the disc of radius w sqrt(2 log 2): its area goes with w^2 where level and scale are the same
    np.testing.assert_allclose(areas[:4] / np.square(WIDTHS), areas[3] / WIDTHS[3] ** 2, rtol=0.25)
    assert areas[4] == areas[2] and areas[5] == areas[1]


def test_without_a_level_it_is_that_of_all_maps_together(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    volumes, pixel = movie.read_series(paths)
    movie.write_movie(volumes, pixel, paths, tmp_path / "reference", size=64)
    mean = volumes.mean(0)
    level = threshold_otsu(mean[mean > 0.02 * mean.max()])
    assert f"level {level:.6g} " in (tmp_path / "reference.cxc").read_text()


def test_frames_show_the_length_of_the_bar_and_have_even_edges() -> None:
    assert [movie._round(length) for length in (0.9, 1, 4.99, 5, 73, 200)] == [0.5, 1, 2, 5, 50, 200]
    volumes = np.stack([blob(SIZE, 0, 0, 0, 2.0)] * 2)
    frames = movie.draw_frames(volumes, ["a$b", "c_d"], 5.0, 0.5, 5.0, 97)
    assert frames.dtype == np.uint8 and len(frames) == 2 and not any(edge % 2 for edge in frames.shape[1:3])


def test_mp4_has_every_map_at_the_rate_asked_for(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    (path,) = movie.write_mp4(frames, [0, 1, 2, 1], tmp_path / "m.mp4", 6.0)
    assert ffmpeg.count_frames_and_secs(str(path)) == (16, pytest.approx(4 / 6, abs=0.05))
    assert [p.name for p in tmp_path.iterdir()] == ["m.mp4"]


def test_without_imageio_ffmpeg_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def absent(name: str, *given: Any) -> Any:
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert movie.write_mp4(np.zeros((2, 64, 64, 3), np.uint8), [0, 1], tmp_path / "m.mp4", 6.0) == []
    assert [record.getMessage() for record in caplog.records] == [
        "no MP4: imageio-ffmpeg is not installed; `pip install imageio-ffmpeg` brings it"
    ]
    assert not any(tmp_path.iterdir())


def test_the_script_opens_the_maps_as_one_series(tmp_path: Path) -> None:
    paths = [tmp_path / f"reference{i}.mrc" for i in range(3)]
    beside = movie.chimerax_script(paths, tmp_path, 0.25, 6, True).splitlines()
    assert 'open "reference0.mrc" "reference1.mrc" "reference2.mrc" vseries true' in beside
    assert any(re.fullmatch(r"volume #1 .*\blevel 0\.25\b.*", line) for line in beside)
    assert any(line.startswith("vseries play #1") and "oscillate" in line for line in beside)
    elsewhere = movie.chimerax_script(paths, tmp_path / "other", 0.25, 6, False)
    assert f'"{paths[1].resolve()}"' in elsewhere and "direction forward" in elsewhere


def test_what_makes_no_movie_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps, out = tmp_path / "maps", tmp_path / "out"
    write_series(maps)

    def refused(message: str, *words: str) -> None:
        assert main(["movie", str(maps), "-o", str(out), *words]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

    refused("has 0 maps other0.mrc", "--prefix", "other")
    refused("the densest voxel of all maps has 1;", "--level", "3")
    refused("64 to 2048 pixels", "--size", "10")
    refused("is a name, not a path", "--prefix", "../reference")
    with pytest.warns(RuntimeWarning, match="NaN"):
        write_volume(maps / "reference4.mrc", np.full((SIZE,) * 3, np.nan, np.float32), 5.0)
    refused("reference4.mrc: has values that are not finite")
    write_volume(maps / "reference4.mrc", np.zeros((SIZE + 2,) * 3, np.float32), 5.0)
    refused("reference4.mrc: (14, 14, 14) voxels of 5 Angstrom")
    write_volume(maps / "reference4.mrc", np.zeros((SIZE,) * 3, np.float32), 6.0)
    refused("voxels of 6 Angstrom where reference0.mrc has")
    (maps / "config.yaml").write_text("")
    refused("is a run: say which maps")


def test_the_scripts_line_in_chimerax_makes_a_movie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ChimeraX runs ``--script "./analysis_scripts/movie.py reference 0.985"``: with ``session`` and the words."""
    ran: list[tuple[object, str]] = []
    for name in ("chimerax", "chimerax.core", "chimerax.core.commands", "chimerax.core.errors"):
        module = types.ModuleType(name)
        module.run = lambda session, command: ran.append((session, command))  # type: ignore[attr-defined]
        module.UserError = ValueError  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    write_series(tmp_path, 8)
    script, session = Path(__file__).parents[1] / "analysis_scripts" / "movie.py", object()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "reference", "0.985"])
    runpy.run_path(str(script), init_globals={"session": session})
    assert {given for given, _ in ran} == {session}
    commands = [command for _, command in ran]
    opened = [Path(name).name for name in re.findall(r'"([^"]+)"', commands[1])]
    assert opened == ["reference8.mrc", "reference9.mrc", "reference10.mrc", "reference11.mrc"]
    assert "level 0.985" in commands[2] and commands[-1].startswith('movie encode "reference.mp4"')
