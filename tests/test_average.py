"""``opustomo average``: the map is the molecule, half maps are independent, the proposed mask holds the particle."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy import ndimage

from opustomo import cli
from opustomo.average import half_maps, half_sets, half_totals, resolution
from opustomo.config import InputOptions
from opustomo.data.mrc import header_of, read_volume
from opustomo.data.observe import Noise
from opustomo.data.readers import read_particles
from opustomo.mask import automatic, solvent_mask
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask
from pictures import drawn_pictures
from small_set import PARTICLES, SmallSet, gaussians

Row = tuple[int, torch.Tensor, torch.Tensor]
FILES = {"average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "average.png", "fsc.png", "fsc.csv", "run.log"}


@pytest.fixture(scope="module")
def made(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average") / "average"
    with drawn_pictures():
        assert cli.main(["average", str(small_set.star), "-o", str(folder), "--workers", "1"]) == 0
    return folder


def truth(small_set: SmallSet) -> np.ndarray:
    """The two states in the proportion of the set, (24, 24, 24)."""
    states = [read_volume(small_set.folder / "gt" / f"state{s}_hinge+0.0.mrc")[0] for s in (0, 1)]
    return np.average(states, axis=0, weights=[float((small_set.state == s).mean()) for s in (0, 1)])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_files_are_those_promised(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FILES
    for name in ("average.mrc", "half1.mrc", "half2.mrc", "mask.mrc"):
        header = header_of(made / name)
        assert header.shape == (24, 24, 24) and header.pixel_size == pytest.approx(15.0)
        assert mrcfile.validate(str(made / name))


def test_map_is_the_molecule_the_right_way_up(small_set: SmallSet, made: Path) -> None:
    average, expected = read_volume(made / "average.mrc")[0], truth(small_set)
    inside = read_volume(small_set.mask)[0] > 0.5
    assert correlation(average[inside], expected[inside]) > 0.9
    # and not its mirror image or a turned one
    for other in (expected[::-1], expected[:, ::-1], expected[:, :, ::-1], expected.swapaxes(0, 1)):
        assert correlation(average[inside], other[inside]) < correlation(average[inside], expected[inside]) - 0.05


def test_half_maps_agree_and_the_curve_says_so(made: Path) -> None:
    halves = [read_volume(made / f"half{h}.mrc")[0] for h in (1, 2)]
    assert 0.8 < correlation(*halves) < 0.9999
    with (made / "fsc.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert float(rows[1]["resolution_angstrom"]) == pytest.approx(360.0)
    assert float(rows[6]["resolution_angstrom"]) == pytest.approx(60.0)
    assert float(rows[2]["fsc"]) > 0.9
    assert "FSC 0.5 at" in (made / "run.log").read_text()


def test_proposed_mask_holds_the_particle_and_leaves_the_solvent_out(small_set: SmallSet, made: Path) -> None:
    mask, density = read_volume(made / "mask.mrc")[0], truth(small_set)
    assert mask.min() >= 0 and mask.max() == pytest.approx(1.0, abs=1e-3)
    assert float((mask * density).sum() / density.sum()) > 0.9
    assert 0.05 < mask.mean() < 0.5
    assert ((mask > 0.05) & (mask < 0.95)).mean() > 0.02  # soft


def test_maps_and_masks_that_are_there_are_not_replaced(
    small_set: SmallSet, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["average", str(small_set.star), "-o", str(made)]) == 2
    assert f"-o {made}: holds average.mrc already; choose another folder" in capsys.readouterr().err
    (tmp_path / "mask.mrc").write_text("the user's")
    assert cli.main(["average", str(small_set.star), "-o", str(tmp_path)]) == 2
    assert "holds mask.mrc already" in capsys.readouterr().err
    assert (tmp_path / "mask.mrc").read_text() == "the user's" and len(list(tmp_path.iterdir())) == 1


def test_an_average_of_a_few_says_that_its_resolution_means_nothing(small_set: SmallSet, tmp_path: Path) -> None:
    lines, few = small_set.star.read_text().splitlines(), tmp_path / "few.star"
    header, rows = ([line for line in lines if (".mrc" in line) == wanted] for wanted in (False, True))
    options = ["--datadir", str(small_set.folder), "-r", str(small_set.mask), "--downfrac", "0.7", "--workers", "1"]
    for count, said in ((9, True), (10, False)):
        few.write_text("\n".join([*header, *rows[:count]]) + "\n")
        assert cli.main(["average", str(few), "-o", str(tmp_path / str(count)), *options]) == 0
        log = (tmp_path / str(count) / "run.log").read_text()
        assert (f"{count} particles are too few" in log) == said


def test_map_with_the_users_mask_leaves_it_alone(small_set: SmallSet, tmp_path: Path) -> None:
    line = ["average", str(small_set.star), "-o", str(tmp_path / "a"), "-r", str(small_set.mask)]
    assert cli.main([*line, "--downfrac", "0.7", "--workers", "1"]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES - {"mask.mrc"}
    header = header_of(tmp_path / "a" / "average.mrc")
    assert header.shape == (16, 16, 16) and header.pixel_size == pytest.approx(22.5)


def test_half_sets_are_those_of_the_file_or_alternate(small_set: SmallSet) -> None:
    particles = read_particles(small_set.star, InputOptions())
    assert half_sets(particles).tolist() == [i % 2 for i in range(PARTICLES)]
    particles.half[:] = np.where(np.arange(PARTICLES) < 25, 1, 2)
    assert half_sets(particles).tolist() == [0] * 25 + [1] * 35
    particles.half[:] = 1  # a file of one half set has none to compare
    assert set(half_sets(particles)) == {0, 1}


def test_no_particle_is_in_both_halves(small_set: SmallSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Particle i says 2^i in its numerator and 3^i in its weight: the sums tell who is in which half."""
    particles, size = read_particles(small_set.star, InputOptions()).subset(np.arange(8)), 16
    particles.half[:] = [1, 2, 2, 1, 2, 1, 1, 2]
    grid, n = Grid(24, 15.0, size, size, 16), len(band_frequencies(size))

    def rows(_: object, index: Iterable[int], *rest: object, crop: int) -> Iterator[Row]:
        return ((i, torch.full((crop,) * 3, 2.0**i), torch.full((n,), 3.0**i)) for i in index)

    monkeypatch.setattr("opustomo.average.observe_all", rows)
    share = torch.ones(2, 8)
    share[1] = torch.tensor([0, 0, 0.5, 0, 0, 2.0, 0, 0])
    noise = Noise(torch.ones(n), 1.0, False, torch.zeros(size // 2 + 1))
    (numerator, few), (weight, few_weight) = half_totals(particles, grid, noise, share, half_sets(particles), 1)
    assert few[:, 0, 0, 0].tolist() == [2.0 * 2**5, 0.5 * 2**2]
    assert few_weight[:, 0].tolist() == [2.0 * 3**5, 0.5 * 3**2]
    first, second = [0, 3, 5, 6], [1, 2, 4, 7]
    assert numerator[:, 0, 0, 0].tolist() == [sum(2.0**i for i in first), sum(2.0**i for i in second)]
    assert weight[:, 0].tolist() == [sum(3.0**i for i in first), sum(3.0**i for i in second)]


def test_half_maps_of_noise_do_not_agree() -> None:
    size = 16
    generator = torch.Generator().manual_seed(0)
    numerator = torch.randn((2, size, size, size), generator=generator)
    weight = torch.ones(2, len(band_frequencies(size)))
    halves, full, fsc = half_maps(numerator, weight, size, spherical_mask(size, 5.0, 2.0))
    assert abs(correlation(*(half.numpy() for half in halves))) < 0.1
    assert float(fsc[3:].abs().mean()) < 0.25
    # what does not agree is not shown: the map is filtered by its FSC
    assert float(full.std()) < 0.7 * float(halves.mean(0).std())


def test_resolution_is_where_the_curve_first_falls_below() -> None:
    fsc = torch.tensor([1.0, 1.0, 0.9, 0.6, 0.4, 0.6, 0.1])
    assert resolution(fsc, 0.5, 120.0) == 30.0
    assert resolution(fsc, 0.143, 120.0) == 20.0
    assert resolution(torch.ones(7), 0.5, 120.0) == 20.0  # Nyquist
    assert resolution(torch.tensor([0.0, 0.1, 0.9, 0.2]), 0.5, 120.0) == 40.0  # the first shells are no resolution


def test_proposed_mask_is_one_body_and_takes_the_largest() -> None:
    size = 32
    body = gaussians(size, np.array([[1.0, 2, 0], [-2, 0, 1]]), 3.0)
    speck = 0.9 * gaussians(size, np.array([[-10.0, -8, 4]]), 1.2)
    mask = solvent_mask(body + speck, automatic(8.0, size)).numpy()
    assert ndimage.label(mask > 0.05)[1] == 1
    assert mask[size // 2, size // 2, size // 2] == 1.0
    assert mask[size // 2 + 4, size // 2 - 8, size // 2 - 10] == 0.0


def test_map_of_nothing_gives_a_mask_that_can_be_used() -> None:
    mask = solvent_mask(torch.zeros(16, 16, 16), automatic(8.0, 16))
    assert torch.isfinite(mask).all() and float(mask.max()) == 1.0
