"""MRC files: exact headers, every mode, and one line for every kind of damage."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest

from opustomo import __version__
from opustomo.data.mrc import header_of, read_volume, write_volume
from opustomo.errors import UserError

SHAPE = (6, 4, 8)  # z, y, x: no two alike


def ramp(dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)


@pytest.mark.parametrize(("dtype", "mode"), [("int8", 0), ("int16", 1), ("float32", 2), ("uint16", 6), ("float16", 12)])
def test_all_modes_read_as_float32_zyx(tmp_path: Path, dtype: str, mode: int) -> None:
    data = ramp(dtype)
    mrcfile.write(tmp_path / "a.mrc", data, voxel_size=2.5)
    volume, pixel = read_volume(tmp_path / "a.mrc")
    assert volume.dtype == np.float32 and pixel == 2.5
    np.testing.assert_array_equal(volume, data.astype(np.float32))
    assert header_of(tmp_path / "a.mrc") == (SHAPE, 2.5, mode)


def test_big_endian_and_extended_header(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    mrcfile.write(path, ramp(), voxel_size=2.0)
    with mrcfile.open(path, "r+") as mrc:
        mrc.set_extended_header(np.zeros(160, "u1").view("V160"))
    np.testing.assert_array_equal(read_volume(path)[0], ramp())
    with mrcfile.new(path, ramp().astype(">f4"), overwrite=True):
        pass
    np.testing.assert_array_equal(read_volume(path)[0], ramp())


@pytest.mark.parametrize("pixel", [1.699, 2.1, 10.0, 3.3702, 0.834567, 1 / 3])
@pytest.mark.parametrize("size", [16, 30, 47])
def test_written_pixel_size_is_exact(tmp_path: Path, pixel: float, size: int) -> None:
    path = tmp_path / "a.mrc"
    write_volume(path, np.zeros((size,) * 3), pixel)
    with mrcfile.open(path, header_only=True) as mrc:
        cell = np.float64(mrc.header.cella.x)
        assert mrc.header.mx == size
    assert abs(cell / size - pixel) <= pixel * 2.0**-24
    assert header_of(path).pixel_size == pytest.approx(pixel, rel=1e-6)
    if len(str(pixel)) < 9:
        assert header_of(path).pixel_size == pixel


def test_written_volume_is_valid_and_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "a.mrc"
    write_volume(path, ramp("float64"), 1.7, (-10.5, 20.0, 3.25))
    assert mrcfile.validate(path), capsys.readouterr().out
    with mrcfile.open(path) as mrc:
        np.testing.assert_array_equal(mrc.data, ramp())
        assert mrc.header.origin.tolist() == (-10.5, 20.0, 3.25)
        assert mrc.header.dmax == ramp().max()
    write_volume(path, ramp("float16"), 1.7)
    assert header_of(path).mode == 12
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mrc"]


def test_nan_passes_and_unset_pixel_size_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    mrcfile.write(path, ramp())
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    volume, pixel = read_volume(path)
    assert np.isnan(volume[-1, -1, -1]) and pixel == 0.0


def test_damage_is_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.mrc"
    mrcfile.write(good, ramp(), voxel_size=2.0)
    raw = good.read_bytes()
    cases = {
        "truncated": raw[:-4],
        "empty or cut off": raw[:100],
        "zero size": bytes(12) + raw[12:],
        "mode 4 is not supported": raw[:12] + (4).to_bytes(4, "little") + raw[16:],
        "not an MRC volume": b"\xff" * 2000,
    }
    for words, content in cases.items():
        bad = tmp_path / "bad.mrc"
        bad.write_bytes(content)
        for read in (header_of, read_volume):
            with pytest.raises(UserError, match=words) as caught:
                read(bad)
            assert str(bad) in str(caught.value)
    mrcfile.write(tmp_path / "image.mrc", ramp()[0])
    with pytest.raises(UserError, match="not a 3-D volume"):
        read_volume(tmp_path / "image.mrc")
    with pytest.raises(UserError, match="no such volume"):
        read_volume(tmp_path / "absent.mrc")


def test_a_map_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of 80 characters, in place of the library's own; what does not fit is cut."""
    monkeypatch.setattr("sys.argv", ["/somewhere/opustomo", "volumes", "run é", "--kmeans", "16", *["x" * 70] * 20])
    write_volume(tmp_path / "map.mrc", np.zeros((4, 4, 4), np.float32), 2.0)
    with mrcfile.open(tmp_path / "map.mrc") as mrc:
        labels = mrc.get_labels()
    assert (
        labels[0].startswith(f"opustomo {__version__}: opustomo volumes 'run ?' --kmeans 16 xxx") and len(labels) == 10
    )
    assert mrcfile.validate(tmp_path / "map.mrc")
