"""Written maps: exact pixel size, in register with the consensus map, the right hand, the right density."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy import ndimage

from fake_run import CENTRES, GRID, ZDIM, FakeRun, blob, fake_run
from opustomo.analysis import volumes
from opustomo.errors import UserError
from opustomo.physics.fourier import from_band, irfft3
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, spherical_mask


def _centre_of_mass_angstrom(path: Path) -> np.ndarray:
    """(x, y, z) where ChimeraX would show the density."""
    with mrcfile.open(path) as mrc:
        origin = np.array([float(mrc.header.origin[axis]) for axis in "xyz"])
        return origin + np.array(ndimage.center_of_mass(mrc.data.astype(float))[::-1]) * float(mrc.voxel_size.x)


@pytest.mark.parametrize(("angpix", "box"), [(None, 0), (10.0, 32), (7.3, 0), (3.37, 64), (14.6, 0), (5.0, 48)])
def test_header_is_exact_and_the_map_overlays_the_consensus(tmp_path: Path, angpix: float | None, box: int) -> None:
    run, _ = fake_run(tmp_path)
    codes = np.array([[2.0, 3, 0, 0]])
    (path,) = volumes.write_volumes(run, codes, tmp_path / "out", angpix=angpix, box=box)
    assert path == tmp_path / "out" / "reference0.mrc" and mrcfile.validate(str(path))
    with mrcfile.open(path) as mrc:
        n = mrc.data.shape[0]
        assert mrc.data.shape == (n, n, n) and n % 2 == 0 and (not box or n == box)
        assert float(mrc.header.cella.x) == pytest.approx(n * (angpix or 10.0), rel=1e-6)
    # the consensus map: box 48 at 5 A, voxel 0 at the origin, so the crop's centre voxel lies at 120 A
    decoded = run.decode(codes)[0].astype(float)
    expected = 24 * 5.0 + (np.array(ndimage.center_of_mass(decoded)[::-1]) - GRID.crop // 2) * GRID.working_pixel
    np.testing.assert_allclose(_centre_of_mass_angstrom(path), expected, atol=0.15)


@pytest.mark.parametrize("pixel", [3.37, 8.0, 10.0])
def test_finer_samples_lie_on_the_same_function(pixel: float) -> None:
    # a Gaussian of 2 voxels is band-limited to 1e-4 of its height at this sampling
    fine = volumes.resample(blob(24, 1, -2, 0.5), 10.0, pixel, 40)
    ratio = pixel / 10.0
    expected = blob(40, 1 / ratio, -2 / ratio, 0.5 / ratio, 2.0 / ratio)
    inside = np.abs(np.arange(40) - 20) * ratio <= 12
    expected = expected * inside[:, None, None] * inside[None, :, None] * inside[None, None, :]
    np.testing.assert_allclose(fine, expected, atol=2e-3)


def test_coarse_samples_are_low_passed_not_aliased() -> None:
    volume = blob(32, 0, 0, 0, 3.0)
    checker = np.where(np.indices((32, 32, 32)).sum(0) % 2 == 0, 1.0, -1.0) * blob(32, 0, 0, 0, 4.0)
    clean, noisy = (volumes.resample(v.astype(np.float32), 5.0, 10.0, 16) for v in (volume, volume + checker))
    np.testing.assert_allclose(noisy, clean, atol=0.02)
    # densities, not sums: the height of the blob stays
    assert clean[8, 8, 8] == pytest.approx(1.0, abs=0.02)


def test_box_only_pads(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    small, large = (
        volumes.write_volumes(run, np.zeros((1, ZDIM)), tmp_path / str(box), angpix=8.0, box=box)[0] for box in (0, 60)
    )
    a, b = mrcfile.read(small), mrcfile.read(large)
    start = 30 - len(a) // 2
    part = slice(start, start + len(a))
    np.testing.assert_array_equal(b[part, part, part], a)
    rest = b.copy()
    rest[part, part, part] = 0
    assert not rest.any()


@pytest.mark.parametrize("angpix", [None, 7.3])
def test_flip_mirrors_z_about_the_centre_voxel(tmp_path: Path, angpix: float | None) -> None:
    run, _ = fake_run(tmp_path)
    codes = np.array([[3.0, 3, 0, 0]])
    (plain,) = volumes.write_volumes(run, codes, tmp_path / "a", angpix=angpix)
    (flipped,) = volumes.write_volumes(run, codes, tmp_path / "b", angpix=angpix, flip=True)
    a, b = mrcfile.read(plain), mrcfile.read(flipped)
    np.testing.assert_allclose(b[1:], a[1:][::-1], atol=1e-5)
    x, y, z = _centre_of_mass_angstrom(plain)
    np.testing.assert_allclose(_centre_of_mass_angstrom(flipped), [x, y, 240 - z], atol=0.1)
    assert abs(z - 120) > 1


@pytest.mark.parametrize(
    ("angpix", "box", "message"),
    [
        (0.0, 0, "pixel size in Angstrom above 0"),
        (float("nan"), 0, "pixel size in Angstrom above 0"),
        (0.01, 0, "a box of 20000 voxels"),
        (1000.0, 0, "a box of 2 voxels"),
        (10.0, 18, "even and at least 20"),
        (10.0, 33, "even and at least 20"),
    ],
)
def test_pixel_sizes_and_boxes_that_do_not_fit(tmp_path: Path, angpix: float, box: int, message: str) -> None:
    run, _ = fake_run(tmp_path)
    with pytest.raises(UserError, match=message):
        volumes.write_volumes(run, np.zeros((1, ZDIM)), tmp_path / "out", angpix=angpix, box=box)
    assert not (tmp_path / "out").exists()


def test_lists_of_codes_name_the_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "z.txt"
    path.write_text("# codes\n1 2 3 4\n\n5, 6, 7, 8e-1\n")
    np.testing.assert_allclose(volumes.read_codes(path, 4), [[1, 2, 3, 4], [5, 6, 7, 0.8]])
    for text, message in (
        ("1 2 3 4\n1 2 3\n", "row 2 has 3 columns"),
        ("1 2 3 x\n", "row 1: .*'x'"),
        ("1 2 nan 4\n", "row 1 .* not finite"),
        ("\n", "has no codes"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            volumes.read_codes(path, 4)
    with pytest.raises(UserError, match=r"missing\.txt: cannot be read"):
        volumes.read_codes(tmp_path / "missing.txt", 4)


def test_kernel_covers_the_nearest_particles() -> None:
    codes = np.random.default_rng(0).normal(size=(500, 3))
    weight = volumes.kernel(codes, codes[7], 50)
    distance = np.linalg.norm(codes - codes[7], axis=1)
    assert (weight > 0).sum() == 50
    assert weight[7] == 1 and (np.diff(weight[np.argsort(distance)]) <= 0).all()
    assert weight[np.argsort(distance)[49]] == pytest.approx(np.exp(-2))
    # equal codes and fewer particles than asked for
    assert (volumes.kernel(np.zeros((5, 3)), np.zeros(3), 50) == 1).all()


class Rows:
    """Numerators and weights of particles that show what the decoder says at their code, in the stated noise."""

    def __init__(self, run: FakeRun, noise: float) -> None:
        self.grid = run.grid
        size, rng = run.grid.working_box, torch.Generator().manual_seed(0)
        signal = model_band(torch.from_numpy(run.decode(run.codes)), size)
        hidden = torch.randn(signal.shape, dtype=torch.complex64, generator=rng) * noise
        self.weights = torch.rand(signal.shape, generator=rng) / noise**2
        self.numerators = self.weights * (signal + hidden)

    def __len__(self) -> int:
        return len(self.weights)

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        return self.weights[index]

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        return centre_crop(irfft3(from_band(self.numerators[index], self.grid.working_box)), self.grid.crop)


def test_data_volumes_show_the_state_of_the_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path, particles=90)
    run.mask = spherical_mask(20, 7.5, 2.0)
    monkeypatch.setattr(volumes, "open_cache", lambda folder: Rows(run, noise=0.1))
    codes = CENTRES[:2]
    paths = volumes.write_data_volumes(run, codes, tmp_path / "out", neighbours=25)
    maps = [mrcfile.read(path).ravel() for path in paths]
    truth = (run.decode(codes) * run.mask.numpy()).reshape(2, -1)
    difference = np.corrcoef(maps[0] - maps[1], truth[0] - truth[1])[0, 1]
    assert difference > 0.9
    with mrcfile.open(paths[0]) as mrc:
        assert float(mrc.voxel_size.x) == pytest.approx(10.0)
    frequency, curves = volumes.read_fsc(tmp_path / "out" / "fsc_data.csv")
    assert list(curves) == ["reference0", "reference1", "random"]
    assert frequency[-1] == pytest.approx(1 / 20)
    # the neighbours agree with each other better than random particles, which mix three states, do
    fine = slice(3, 6)
    assert curves["reference0"][fine].mean() > 0.9
    assert curves["reference0"][fine].mean() > curves["random"][fine].mean()


def test_half_maps_of_noise_do_not_correlate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path, particles=60)
    monkeypatch.setattr(volumes, "open_cache", lambda folder: Rows(run, noise=300.0))
    volumes.write_data_volumes(run, CENTRES[:1], tmp_path / "out", neighbours=30)
    _, curves = volumes.read_fsc(tmp_path / "out" / "fsc_data.csv")
    assert abs(curves["reference0"][4:].mean()) < 0.15


def test_from_data_without_a_fitting_cache_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path)
    with pytest.raises(UserError, match=r"cache: no cache here; make it with `opustomo cache"):
        volumes.write_data_volumes(run, np.zeros((1, ZDIM)), tmp_path / "out")
    other, _ = fake_run(tmp_path, particles=30)
    monkeypatch.setattr(volumes, "open_cache", lambda folder: Rows(other, noise=1.0))
    with pytest.raises(UserError, match=r"is of other particles.*opustomo cache"):
        volumes.write_data_volumes(run, np.zeros((1, ZDIM)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_are_found_in_any_group() -> None:
    config = {"grid": {"mask": "m.mrc"}, "lr": 1, "input": {"datadir": None}}
    assert volumes.option(config, "mask") == "m.mrc" and volumes.option(config, "datadir") == ""
