"""One simulated set in every dialect gives one map and one code, and every dialect is written back as it came in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from gemmi import cif

from dialect_writers import IMAGES, VOLUMES, Subtomograms, write_every_dialect
from opustomo.average import half_maps, half_sets, half_totals
from opustomo.config import InputOptions
from opustomo.data.export import write_subset
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import observe_all
from opustomo.data.readers import read_particles
from opustomo.data.readers.source import read_source
from opustomo.data.star import read_star
from opustomo.physics.fourier import band_multiplicity, fourier_resize
from opustomo.physics.grid import make_grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import fourier_shell_correlation, spherical_mask
from stack_writers import Set, two_states_set
from star_sets import SHARED

NAMES = [*IMAGES, *VOLUMES]
COUNT, BOX, SIZE = 16, 32, 24
GRID = make_grid(BOX, 7.5, SIZE / BOX, SIZE // 2)
MASK = spherical_mask(SIZE, 9.0, 3.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Set, dict[str, Path]]:
    made = two_states_set(COUNT, 1.0, step=6.0, scattered=6000.0)
    return made, write_every_dialect(made, tmp_path_factory.mktemp("dialects"))


def averaged(star: Path, grid: object = GRID, mask: torch.Tensor = MASK) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Masked average, FSC of its half maps, and the noise that was found."""
    particles = read_particles(star, InputOptions())
    noise = estimate_noise(particles, grid, mask, contrast="auto", normalisation="auto", workers=1)
    everyone = torch.ones(1, len(particles))
    [b], [w] = half_totals(particles, grid, noise, everyone, half_sets(particles), 1)
    _, full, fsc = half_maps(b, w, len(mask), mask)
    return full * mask, fsc, noise


def codes(star: Path, made: Set, noise: object) -> np.ndarray:
    """Amplitude of the difference between the states in every particle: a linear stage whose component is known."""
    middle, apart = (
        fourier_resize(torch.from_numpy(v).float(), SIZE)
        for v in (
            sum(s.density(BOX) for s in made.states) / 2,
            made.states[0].density(BOX) - made.states[1].density(BOX),
        )
    )
    v, d = model_band(middle, SIZE), model_band(apart, SIZE)
    pairs = band_multiplicity(SIZE)
    found = []
    for _, b, w in observe_all(read_particles(star, InputOptions()), range(COUNT), GRID, noise, 1, crop=SIZE):
        explained = ((d.conj() * v).real * w * pairs).sum()
        found.append(float(((b * apart).sum() - explained) / (d.abs().square() * w * pairs).sum()))
    return np.array(found)


def test_every_dialect_gives_the_same_map_and_codes(written: tuple[Set, dict[str, Path]]) -> None:
    made, stars = written
    first, fsc, noise = averaged(stars[NAMES[0]])
    limit = int(np.flatnonzero(fsc[2:].numpy() < 0.5)[0]) + 2
    assert limit >= 7
    expected = codes(stars[NAMES[0]], made, noise)
    assert abs(np.corrcoef(expected, made.state)[0, 1]) > 0.9
    for name in NAMES[1:]:
        other, _, noise = averaged(stars[name])
        assert fourier_shell_correlation(other, first)[1:limit].min() > 0.95, name
        assert np.corrcoef(codes(stars[name], made, noise), expected)[0, 1] > 0.95, name
        if "RELION 3" in name and "STAR" in name:
            assert noise.mean_normalised == ("3.1" in name), name


@pytest.mark.parametrize("step", [3.0, 6.0])
@pytest.mark.parametrize("noise", [1.0, 16.0])
def test_means_and_sums_are_told_apart_at_any_signal(tmp_path: Path, step: float, noise: float) -> None:
    """A strong signal does not fall with the multiplicity, and where few slices meet the noise does not either."""
    made = two_states_set(3, noise, box=16, step=step)
    grid, mask = make_grid(16, 15.0, 1.0, 8), spherical_mask(16, 6.0, 2.0)
    for name, write in (("sum", Subtomograms.relion30), ("mean", Subtomograms.relion31)):
        particles = read_particles(write(Subtomograms(made, tmp_path / name)), InputOptions())
        found = estimate_noise(particles, grid, mask, contrast="white", normalisation="auto", workers=1)
        assert found.mean_normalised == (name == "mean"), name


@pytest.mark.parametrize("name", NAMES)
def test_all_particles_selected_are_the_file_that_came_in(
    written: tuple[Set, dict[str, Path]], tmp_path: Path, name: str
) -> None:
    star = written[1][name]
    source = read_source(star)
    out = tmp_path / "all.star"
    write_subset(source, np.arange(COUNT), out)
    before, after = source.whole.blocks, read_star(out).blocks
    assert list(after) == list(before) and "rlnKept" in after[source.whole.particle_block]
    for block, table in before.items():
        assert table.equals(after[block]) if isinstance(table, pd.DataFrame) else table == after[block], block
    if source.optimisation is not None:
        new = read_star(tmp_path / "all_optimisation_set.star").blocks
        assert list(new) == list(source.optimisation.blocks)
        for block, pairs in source.optimisation.blocks.items():
            assert list(new[block]) == list(pairs)
            assert [new[block][key] for key in pairs if key != "rlnTomoParticlesFile"] == [
                pairs[key] for key in pairs if key != "rlnTomoParticlesFile"
            ]
    # two other readers take it for the same
    others = starfile.read(out, always_dict=True, parse_as_string=["rlnKept"])
    last = source.whole.particle_block
    assert others[last]["rlnKept"].tolist() == before[last]["rlnKept"].tolist()
    loop = cif.read_file(str(out))[-1]
    for column in before[last]:
        assert [cif.as_string(value) for value in loop.find_loop(f"_{column}")] == before[last][column].tolist(), column
    again, given = (read_particles(path, InputOptions(datadir=star.parent)) for path in (
        out if source.optimisation is None else tmp_path / "all_optimisation_set.star", star
    ))  # fmt: skip
    for field in ("names", "rotation", "origin", "tilts", "slices", "half"):
        assert np.array_equal(getattr(again, field), getattr(given, field)), field


def test_real_images_and_subtomograms_average_to_one_map() -> None:
    folder = SHARED / "real_70S_warptools"
    if not folder.exists():
        pytest.skip("the shared data sets are not here")
    grid, mask = make_grid(32, 12.0, 0.75, 12), spherical_mask(24, 9.0, 3.0)
    [images] = (folder / "stacks_2d").glob("*_optimisation_set.star")
    (one, halves, _), (other, _, _) = (
        averaged(star, grid, mask) for star in (images, folder / "subtomograms_3d/particles.star")
    )
    limit = int(np.flatnonzero(halves[2:].numpy() < 0.5)[0]) + 2
    assert limit >= 5 and fourier_shell_correlation(one, other)[2:limit].min() > 0.9
